//! JSON log lines: keys sorted, as Envoy sorts them, and values by format.

use crate::facts::Facts;
use crate::operator::Written;
use crate::{Format, FormatError};
use cairn_mesh::LogValue;
use cairn_telemetry::Wants;
use serde_json::Value;
use std::io::Write;
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

type Entries = Vec<Entry>;

#[derive(Clone, Debug)]
struct Entry {
    key: Arc<str>,
    /// The key as it is written, with its colon.
    written: Vec<u8>,
    node: Node,
}

impl Entry {
    fn new(key: &str, node: Node) -> Self {
        let mut written = Vec::with_capacity(key.len() + 3);
        append_json_bytes(&mut written, key.as_bytes());
        written.push(b':');
        Self { key: key.into(), written, node }
    }
}

#[derive(Clone, Debug)]
enum Node {
    Format(Format),
    /// A value that never changes, and how it is written.
    Literal(Value, Vec<u8>),
    List(Vec<Node>),
    Map(Entries),
}

impl JsonFormat {
    /// Istio's default keys.
    pub(crate) fn istio(omit_empty: bool) -> Result<Self, FormatError> {
        let entry = |(key, format): (&str, &str)| Ok(Entry::new(key, Node::Format(Format::parse(format)?)));
        Ok(Self { root: DEFAULT.into_iter().map(entry).collect::<Result<_, FormatError>>()?, omit_empty })
    }

    /// These keys.
    pub(crate) fn new(entries: &[(Arc<str>, LogValue)], omit_empty: bool) -> Result<Self, FormatError> {
        Ok(Self { root: map(entries)?, omit_empty })
    }

    pub(crate) fn want(&self, wants: &mut Wants) {
        self.root.iter().for_each(|entry| entry.node.want(wants));
    }

    /// Appends a line, without a line feed.
    pub(crate) fn write(&self, out: &mut Vec<u8>, facts: &Facts<'_>) {
        write_object(&self.root, out, facts, self.omit_empty);
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
        read.push(Entry::new(key, node(value)?));
    }
    read.sort_by(|a: &Entry, b| a.key.cmp(&b.key));
    Ok(read)
}

fn node(value: &LogValue) -> Result<Node, FormatError> {
    Ok(match value {
        LogValue::Text(text) => Node::Format(Format::parse(text)?),
        LogValue::Literal(text) => {
            let value: Value = serde_json::from_str(text).unwrap_or_default();
            let written = value.to_string().into_bytes();
            Node::Literal(value, written)
        }
        LogValue::List(items) => Node::List(items.iter().map(node).collect::<Result<_, _>>()?),
        LogValue::Map(entries) => Node::Map(map(entries)?),
    })
}

impl Node {
    fn want(&self, wants: &mut Wants) {
        match self {
            Self::Format(format) => format.want(wants),
            Self::Literal(..) => {}
            Self::List(items) => items.iter().for_each(|item| item.want(wants)),
            Self::Map(entries) => entries.iter().for_each(|entry| entry.node.want(wants)),
        }
    }

    /// Appends its value; says when that is nothing, having written `null`.
    fn write(&self, out: &mut Vec<u8>, facts: &Facts<'_>, omit_empty: bool) -> Written {
        match self {
            Self::Format(format) => return format.write_json(out, facts, omit_empty),
            Self::Literal(value, written) => {
                out.extend_from_slice(written);
                if value.is_null() {
                    return Written::Nothing;
                }
            }
            Self::List(items) => {
                out.push(b'[');
                write_all(items, out, |out, item| item.write(out, facts, omit_empty), omit_empty);
                out.push(b']');
            }
            Self::Map(entries) => {
                // Envoy leaves out a map of which it has left out all.
                if write_object(entries, out, facts, omit_empty) == Written::Nothing && omit_empty {
                    return Written::Nothing;
                }
            }
        }
        Written::Something
    }

    fn value(&self, facts: &Facts<'_>, omit_empty: bool) -> Value {
        match self {
            Self::Format(format) => format.json(facts),
            Self::Literal(value, _) => value.clone(),
            Self::List(items) => {
                let values = items.iter().map(|item| item.value(facts, omit_empty));
                values.filter(|value| !omit_empty || !value.is_null()).collect()
            }
            Self::Map(entries) => object(entries, facts, omit_empty),
        }
    }
}

/// Appends items with commas between them; those that are nothing are taken back if `omit_empty`. Says whether any is
/// left.
fn write_all<T>(
    items: &[T],
    out: &mut Vec<u8>,
    mut write: impl FnMut(&mut Vec<u8>, &T) -> Written,
    omit_empty: bool,
) -> Written {
    let mut is_first = true;
    for item in items {
        let before = out.len();
        if !is_first {
            out.push(b',');
        }
        if write(out, item) == Written::Nothing && omit_empty {
            out.truncate(before);
        } else {
            is_first = false;
        }
    }
    if is_first { Written::Nothing } else { Written::Something }
}

fn write_object(entries: &Entries, out: &mut Vec<u8>, facts: &Facts<'_>, omit_empty: bool) -> Written {
    out.push(b'{');
    let write = |out: &mut Vec<u8>, entry: &Entry| {
        out.extend_from_slice(&entry.written);
        entry.node.write(out, facts, omit_empty)
    };
    let written = write_all(entries, out, write, omit_empty);
    out.push(b'}');
    written
}

fn object(entries: &Entries, facts: &Facts<'_>, omit_empty: bool) -> Value {
    let values = entries.iter().map(|entry| (entry.key.to_string(), entry.node.value(facts, omit_empty)));
    Value::Object(values.filter(|(_, value)| !omit_empty || !value.is_null()).collect())
}

/// Appends a JSON string: as it is, but for what JSON must escape. Of what is no UTF-8, all that is no ASCII is escaped
/// byte by byte, and what JSON must escape by its number too, as Envoy does.
pub(crate) fn append_json_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    let is_plain = |byte: u8| (b' '..0x80).contains(&byte) && byte != b'"' && byte != b'\\';
    if bytes.iter().copied().all(is_plain) {
        out.reserve(bytes.len() + 2);
        out.push(b'"');
        out.extend_from_slice(bytes);
        out.push(b'"');
        return;
    }
    let is_text = std::str::from_utf8(bytes).is_ok();
    out.push(b'"');
    for byte in bytes.iter().copied() {
        match byte {
            byte if !is_text && !is_plain(byte) => {
                // Writing to a Vec cannot fail.
                drop(write!(out, "\\u{byte:04x}"));
            }
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0c => out.extend_from_slice(b"\\f"),
            byte if byte < b' ' => drop(write!(out, "\\u{byte:04x}")),
            byte => out.push(byte),
        }
    }
    out.push(b'"');
}
