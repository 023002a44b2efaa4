//! JSON log lines: keys sorted, as Envoy sorts them, and values by format.

use crate::facts::Facts;
use crate::{Format, FormatError};
use cairn_mesh::LogValue;
use cairn_telemetry::Wants;
use serde_json::Value;
use std::sync::Arc;

/// Istio's default keys (`meshConfig.accessLogEncoding: JSON`).
const DEFAULT: [(&str, &str); 24] = [
    ("authority", "%REQ(:AUTHORITY)%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("duration", "%DURATION%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("route_name", "%ROUTE_NAME%"),
    ("start_time", "%START_TIME%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
];

/// A JSON log.
#[derive(Clone, Debug)]
pub(crate) struct JsonFormat {
    root: Entries,
    omit_empty: bool,
}

type Entries = Vec<(Arc<str>, Node)>;

#[derive(Clone, Debug)]
enum Node {
    Format(Format),
    Literal(Value),
    List(Vec<Node>),
    Map(Entries),
}

impl JsonFormat {
    /// Istio's default keys.
    pub(crate) fn istio(omit_empty: bool) -> Result<Self, FormatError> {
        let entry = |(key, format): (&str, &str)| Ok((key.into(), Node::Format(Format::parse(format)?)));
        Ok(Self { root: DEFAULT.into_iter().map(entry).collect::<Result<_, FormatError>>()?, omit_empty })
    }

    /// These keys.
    pub(crate) fn new(entries: &[(Arc<str>, LogValue)], omit_empty: bool) -> Result<Self, FormatError> {
        Ok(Self { root: map(entries)?, omit_empty })
    }

    pub(crate) fn want(&self, wants: &mut Wants) {
        self.root.iter().for_each(|(_, node)| node.want(wants));
    }

    /// Appends a line, without a line feed.
    pub(crate) fn write(&self, out: &mut Vec<u8>, facts: &Facts<'_>) {
        let value = object(&self.root, facts, self.omit_empty);
        // Writing to a Vec cannot fail, and keys are text.
        if let Err(error) = serde_json::to_writer(out, &value) {
            tracing::error!(%error, "a log line is not JSON");
        }
    }

    /// The values, by key.
    pub(crate) fn values(&self, facts: &Facts<'_>) -> serde_json::Map<String, Value> {
        match object(&self.root, facts, self.omit_empty) {
            Value::Object(values) => values,
            _ => serde_json::Map::new(),
        }
    }
}

fn map(entries: &[(Arc<str>, LogValue)]) -> Result<Entries, FormatError> {
    let mut read = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        read.push((Arc::clone(key), node(value)?));
    }
    read.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(read)
}

fn node(value: &LogValue) -> Result<Node, FormatError> {
    Ok(match value {
        LogValue::Text(text) => Node::Format(Format::parse(text)?),
        LogValue::Literal(text) => Node::Literal(serde_json::from_str(text).unwrap_or_default()),
        LogValue::List(items) => Node::List(items.iter().map(node).collect::<Result<_, _>>()?),
        LogValue::Map(entries) => Node::Map(map(entries)?),
    })
}

impl Node {
    fn want(&self, wants: &mut Wants) {
        match self {
            Self::Format(format) => format.want(wants),
            Self::Literal(_) => {}
            Self::List(items) => items.iter().for_each(|item| item.want(wants)),
            Self::Map(entries) => entries.iter().for_each(|(_, node)| node.want(wants)),
        }
    }

    fn value(&self, facts: &Facts<'_>, omit_empty: bool) -> Value {
        match self {
            Self::Format(format) => format.json(facts),
            Self::Literal(value) => value.clone(),
            Self::List(items) => {
                let values = items.iter().map(|item| item.value(facts, omit_empty));
                values.filter(|value| !omit_empty || !value.is_null()).collect()
            }
            Self::Map(entries) => object(entries, facts, omit_empty),
        }
    }
}

fn object(entries: &Entries, facts: &Facts<'_>, omit_empty: bool) -> Value {
    let values = entries.iter().map(|(key, node)| (key.to_string(), node.value(facts, omit_empty)));
    Value::Object(values.filter(|(_, value)| !omit_empty || !value.is_null()).collect())
}
