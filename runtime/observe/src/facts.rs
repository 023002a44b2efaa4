//! What is known of an exchange or connection when it is over: where formats, expressions and tags find their values.

use cairn_mesh::Workload;
use cairn_telemetry::{HttpRecord, HttpScope, PeerLabels, legible};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::borrow::Cow;
use std::sync::Arc;

/// What a waypoint knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// Its node id, as it tells the control plane.
    pub node_id: Arc<str>,
    /// Its Gateway's namespace.
    pub namespace: Arc<str>,
    /// Its Gateway's name.
    pub name: Arc<str>,
    /// Its identity.
    pub identity: Arc<str>,
    /// Its cluster.
    pub cluster_id: Arc<str>,
    /// The mesh's id.
    pub mesh_id: Arc<str>,
    /// The host's name.
    pub hostname: Arc<str>,
}

impl Own {
    /// A key of the node's metadata.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        Some(match key {
            "NAMESPACE" => &self.namespace,
            "NAME" | "WORKLOAD_NAME" => &self.name,
            "CLUSTER_ID" => &self.cluster_id,
            "MESH_ID" => &self.mesh_id,
            _ => return None,
        })
    }

    /// The name under which OpenTelemetry and Zipkin know it (Istio: the proxy's cluster, `name.namespace`).
    pub(crate) fn service_name(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }
}

/// A finished exchange or connection.
#[derive(Clone, Copy)]
pub(crate) struct Facts<'a> {
    pub(crate) own: &'a Own,
    pub(crate) scope: &'a HttpScope,
    pub(crate) record: &'a HttpRecord<'a>,
}

/// Which end of the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Downstream,
    Upstream,
}

/// The fields of a peer, with the names that Istio gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerField {
    Name,
    Namespace,
    Cluster,
    Service,
    Revision,
    App,
    Version,
    Workload,
    Type,
    Identity,
    Region,
    Zone,
}

impl PeerField {
    pub(crate) const ALL: [(&'static str, Self); 12] = [
        ("name", Self::Name),
        ("namespace", Self::Namespace),
        ("cluster", Self::Cluster),
        ("service", Self::Service),
        ("revision", Self::Revision),
        ("app", Self::App),
        ("version", Self::Version),
        ("workload", Self::Workload),
        ("type", Self::Type),
        ("identity", Self::Identity),
        ("region", Self::Region),
        ("zone", Self::Zone),
    ];

    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, field)| *field)
    }

    pub(crate) fn of(self, workload: &Workload) -> &str {
        match self {
            Self::Name => &workload.name,
            Self::Namespace => &workload.namespace,
            Self::Cluster => &workload.cluster_id,
            Self::Service | Self::App => &workload.canonical_name,
            Self::Revision | Self::Version => &workload.canonical_revision,
            Self::Workload => &workload.workload_name,
            Self::Type => workload.kind.as_str(),
            Self::Identity => workload.identity.as_str(),
            Self::Region => &workload.locality.region,
            Self::Zone => &workload.locality.zone,
        }
    }
}

impl<'a> Facts<'a> {
    pub(crate) fn workload(&self, side: Side) -> Option<&'a Workload> {
        match side {
            Side::Downstream => self.source().workload.as_deref(),
            Side::Upstream => self.record.upstream_workload.map(|workload| &**workload),
        }
    }

    pub(crate) fn source(&self) -> &'a PeerLabels {
        self.scope.source()
    }

    /// A field of a peer; `None` when the mesh does not know it.
    pub(crate) fn peer(&self, side: Side, field: PeerField) -> Option<&'a str> {
        if (side, field) == (Side::Downstream, PeerField::Identity) {
            return self.source().principal.as_ref().map(|identity| identity.as_str());
        }
        self.workload(side).map(|workload| field.of(workload))
    }

    /// A header of the request, or one of the pseudo-headers, as formats have it.
    pub(crate) fn request_header(&self, name: &Header) -> Option<Cow<'a, [u8]>> {
        match name {
            Header::Named(name) => value_of(self.record.request_headers, name),
            name => self.own_header(name).map(Cow::Borrowed),
        }
    }

    /// The same as expressions and tags have it: all its values, as text.
    pub(crate) fn request_text(&self, name: &Header) -> Option<Cow<'a, str>> {
        self.request_values(name).map(as_text)
    }

    /// All values of a header.
    pub(crate) fn request_values(&self, name: &Header) -> Option<Cow<'a, [u8]>> {
        match name {
            Header::Named(name) => values_of(self.record.request_headers, name),
            name => self.own_header(name).map(Cow::Borrowed),
        }
    }

    /// A header that every record has.
    fn own_header(&self, name: &Header) -> Option<&'a [u8]> {
        let record = self.record;
        let text = match name {
            Header::Method => record.method,
            Header::Path => record.path,
            Header::Authority => record.authority,
            Header::Scheme if record.http => "http",
            Header::OriginalPath => record.original_path,
            Header::RequestId => return record.request_id,
            Header::UserAgent => return record.user_agent,
            Header::ForwardedFor => return record.forwarded_for,
            Header::Named(_) | Header::Scheme | Header::Status | Header::ServiceTime => "",
        };
        Some(text.as_bytes()).filter(|text| !text.is_empty())
    }
}

/// Headers of which Envoy keeps all values in one (`header_map.h`, the inline headers that clients may repeat).
const JOINED: [&str; 12] = [
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-forwarded-client-cert",
    "user-agent",
    "x-request-id",
    "content-type",
    "te",
    "via",
    "connection",
    "server",
];

/// A header's value as formats have it: the first, or all of one that Envoy joins.
pub(crate) fn value_of<'a>(headers: Option<&'a HeaderMap>, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    if JOINED.contains(&name.as_str()) {
        return joined(headers?, name);
    }
    Some(headers?.get(name)?.as_bytes().into())
}

/// All values of a header, with commas between them.
fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut values = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let first = values.next()?;
    let Some(second) = values.next() else { return Some(first.into()) };
    let all: Vec<&[u8]> = [first, second].into_iter().chain(values).collect();
    Some(all.join(&b',').into())
}

/// All values of a header, as text.
pub(crate) fn text_of<'a>(headers: Option<&'a HeaderMap>, name: &HeaderName) -> Option<Cow<'a, str>> {
    values_of(headers, name).map(as_text)
}

/// All values of a header.
pub(crate) fn values_of<'a>(headers: Option<&'a HeaderMap>, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    joined(headers?, name)
}

/// Bytes of a peer as text.
pub(crate) fn as_text(bytes: Cow<'_, [u8]>) -> Cow<'_, str> {
    match bytes {
        Cow::Borrowed(bytes) => legible(bytes),
        Cow::Owned(bytes) => legible(&bytes).into_owned().into(),
    }
}

/// A header by name: those that every record has are told apart from those it must be asked to keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Header {
    Method,
    Path,
    Authority,
    Scheme,
    Status,
    RequestId,
    UserAgent,
    ForwardedFor,
    /// `x-envoy-upstream-service-time`.
    ServiceTime,
    /// `x-envoy-original-path`: the path before a route changed it.
    OriginalPath,
    Named(HeaderName),
}

impl Header {
    /// A header of a request; `None` when it cannot be the name of one.
    pub(crate) fn of_request(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":authority" | "host" => Self::Authority,
            ":scheme" => Self::Scheme,
            "x-request-id" => Self::RequestId,
            "user-agent" => Self::UserAgent,
            "x-forwarded-for" => Self::ForwardedFor,
            "x-envoy-original-path" => Self::OriginalPath,
            name => Self::Named(HeaderName::from_bytes(name.as_bytes()).ok()?),
        })
    }

    /// A header or trailer of a response.
    pub(crate) fn of_response(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            ":status" => Self::Status,
            "x-envoy-upstream-service-time" => Self::ServiceTime,
            name => Self::Named(HeaderName::from_bytes(name.as_bytes()).ok()?),
        })
    }

    /// Its name, if records must be asked to keep it.
    pub(crate) fn to_keep(&self) -> Option<&HeaderName> {
        match self {
            Self::Named(name) => Some(name),
            _ => None,
        }
    }
}

/// Whether `name`, in lower case, can be the name of a header.
pub fn is_header_name(name: &str) -> bool {
    HeaderName::from_bytes(name.as_bytes()).is_ok()
}

/// Envoy's number of a response flag (`response_flags.h`), for `response.flags` and the access log service.
pub(crate) fn flag_bits(flags: &str) -> i64 {
    const FLAGS: [&str; 26] = [
        "LH", "UH", "UT", "LR", "UR", "UF", "UC", "UO", "NR", "DI", "FI", "RL", "UAEX", "RLSE", "DC", "URX",
        "SI", "IH", "DPE", "UMSDR", "RFCF", "NFCF", "DT", "UPE", "NC", "OM",
    ];
    let bit = |flag: &str| FLAGS.iter().position(|known| *known == flag).map_or(0, |at| 1 << at);
    flags.split(',').map(bit).sum()
}
