//! The attributes that expressions may speak of: names as Envoy and Istio have them, values from the record.

use crate::facts::{Facts, Header, PeerField, Side, flag_bits, text_of, values_of};
use cairn_telemetry::{Wanted, Wants};
use cel::Value;
use cel::common::types::{CelBool, CelDuration, CelInt, CelString, CelTimestamp};
use cel::common::value::CowVal;
use chrono::DateTime;
use http::{HeaderMap, HeaderName};
use std::borrow::Cow;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

/// One attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attribute {
    RequestHeader(Header),
    RequestHeaders,
    ResponseHeader(HeaderName),
    ResponseHeaders,
    ResponseTrailer(HeaderName),
    ResponseTrailers,
    UrlPath,
    Query,
    Protocol,
    RequestSize,
    RequestTotalSize,
    RequestTime,
    RequestDuration,
    BackendLatency,
    UpstreamLocal,
    UpstreamFailure,
    TokenPrincipal,
    Claims,
    Claim(Vec<String>),
    ResponseCode,
    ResponseDetails,
    ResponseFlags,
    GrpcStatus,
    ResponseSize,
    ResponseTotalSize,
    Address(End),
    Port(End),
    ConnectionId,
    Mtls,
    Principal(Side),
    ServerName,
    Peer(Side),
    PeerField(Side, PeerField),
    Cluster,
    Route,
    NodeId,
    NodeMetadata(String),
    /// What filters said: a namespace, and the keys that lead to a value in it.
    Metadata(Vec<String>),
    OwnIdentity,
    Attempts,
    /// Known, and never there inside a waypoint.
    Absent,
}

/// Whose address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
    Upstream,
}

/// What Envoy says of a TLS connection and its certificates: a waypoint's connections are inside a tunnel.
const OF_TLS: [&str; 7] = [
    "tls_version",
    "subject_local_certificate",
    "subject_peer_certificate",
    "dns_san_local_certificate",
    "dns_san_peer_certificate",
    "sha256_peer_certificate_digest",
    "locality",
];

/// What Envoy says of its own configuration, of which a waypoint has none.
const OF_XDS: [&str; 10] = [
    "cluster_metadata",
    "listener_metadata",
    "listener_direction",
    "listener_name",
    "filter_chain_name",
    "route_metadata",
    "virtual_host_name",
    "virtual_host_metadata",
    "upstream_host_metadata",
    "upstream_host_locality_metadata",
];

/// Under which name claims of verified tokens stand in `metadata`.
const TOKENS: &str = "envoy.filters.http.jwt_authn";

/// The first words of attributes.
pub(crate) const ROOTS: [&str; 12] = [
    "request",
    "response",
    "connection",
    "source",
    "destination",
    "upstream",
    "metadata",
    "node",
    "xds",
    "filter_state",
    "upstream_peer",
    "downstream_peer",
];

impl Attribute {
    /// The attribute of this path; `None` if there is none.
    pub(crate) fn find(path: &[&str]) -> Option<Self> {
        let header = |name: &str| HeaderName::from_bytes(name.to_ascii_lowercase().as_bytes()).ok();
        Some(match path {
            ["request", rest @ ..] => return Self::of_request(rest),
            ["response", "headers"] => Self::ResponseHeaders,
            ["response", "headers", name] => Self::ResponseHeader(header(name)?),
            ["response", "trailers"] => Self::ResponseTrailers,
            ["response", "trailers", name] => Self::ResponseTrailer(header(name)?),
            ["response", "code"] => Self::ResponseCode,
            ["response", "code_details"] => Self::ResponseDetails,
            ["response", "flags"] => Self::ResponseFlags,
            ["response", "grpc_status"] => Self::GrpcStatus,
            ["response", "size"] => Self::ResponseSize,
            ["response", "total_size"] => Self::ResponseTotalSize,
            ["source", "address"] => Self::Address(End::Source),
            ["source", "port"] => Self::Port(End::Source),
            ["source", "principal"] | ["connection", "uri_san_peer_certificate"] => {
                Self::Principal(Side::Downstream)
            }
            ["destination", "address"] => Self::Address(End::Destination),
            ["destination", "port"] => Self::Port(End::Destination),
            ["destination", "principal"] | ["upstream", "uri_san_peer_certificate"] => {
                Self::Principal(Side::Upstream)
            }
            ["upstream", "address"] => Self::Address(End::Upstream),
            ["upstream", "port"] => Self::Port(End::Upstream),
            ["response", "backend_latency"] => Self::BackendLatency,
            ["upstream", "local_address"] => Self::UpstreamLocal,
            ["upstream", "transport_failure_reason"] => Self::UpstreamFailure,
            ["metadata", "filter_metadata", TOKENS] => Self::Claims,
            ["metadata", "filter_metadata", TOKENS, "payload"] => Self::Claims,
            ["metadata", "filter_metadata", TOKENS, "payload", path @ ..]
            | ["metadata", "filter_metadata", TOKENS, path @ ..] => {
                Self::Claim(path.iter().map(|name| (*name).to_owned()).collect())
            }
            ["metadata", "filter_metadata", path @ ..] if !path.is_empty() => {
                Self::Metadata(path.iter().map(|name| (*name).to_owned()).collect())
            }
            ["metadata"] | ["metadata", "filter_metadata"] => Self::Absent,
            ["connection" | "upstream", "uri_san_local_certificate"] => Self::OwnIdentity,
            ["connection" | "upstream", name] if OF_TLS.contains(name) => Self::Absent,
            ["connection", "termination_details" | "transport_failure_reason"] => Self::Absent,
            ["upstream", "request_attempt_count"] => Self::Attempts,
            ["upstream", "cx_pool_ready_duration" | "num_endpoints"] => Self::Absent,
            ["connection", "id"] => Self::ConnectionId,
            ["connection", "mtls"] => Self::Mtls,
            ["connection", "requested_server_name"] => Self::ServerName,
            ["upstream_peer"] | ["filter_state", "upstream_peer" | "wasm.upstream_peer"] => {
                Self::Peer(Side::Upstream)
            }
            ["downstream_peer"] | ["filter_state", "downstream_peer" | "wasm.downstream_peer"] => {
                Self::Peer(Side::Downstream)
            }
            ["upstream_peer", field] | ["filter_state", "upstream_peer" | "wasm.upstream_peer", field] => {
                Self::PeerField(Side::Upstream, PeerField::named(field)?)
            }
            ["downstream_peer", field]
            | ["filter_state", "downstream_peer" | "wasm.downstream_peer", field] => {
                Self::PeerField(Side::Downstream, PeerField::named(field)?)
            }
            ["filter_state", "io.istio.peer_principal"] => Self::Principal(Side::Downstream),
            ["filter_state", _] => Self::Absent,
            ["xds", "cluster_name"] => Self::Cluster,
            ["xds", "route_name"] => Self::Route,
            ["xds", name] if OF_XDS.contains(name) => Self::Absent,
            ["node", "id"] | ["xds", "node", "id"] => Self::NodeId,
            ["node", "metadata", key] | ["xds", "node", "metadata", key] => {
                Self::NodeMetadata((*key).to_owned())
            }
            _ => return None,
        })
    }

    fn of_request(path: &[&str]) -> Option<Self> {
        let header = |name: &str| Header::of_request(name).map(Self::RequestHeader);
        match path {
            ["path"] => header(":path"),
            ["url_path"] => Some(Self::UrlPath),
            ["query"] => Some(Self::Query),
            ["host"] => header(":authority"),
            ["scheme"] => header(":scheme"),
            ["method"] => header(":method"),
            ["referer"] => header("referer"),
            ["useragent"] => header("user-agent"),
            ["id"] => header("x-request-id"),
            ["protocol"] => Some(Self::Protocol),
            ["size"] => Some(Self::RequestSize),
            ["total_size"] => Some(Self::RequestTotalSize),
            ["time"] => Some(Self::RequestTime),
            ["duration"] => Some(Self::RequestDuration),
            ["headers"] => Some(Self::RequestHeaders),
            ["headers", name] => header(name),
            ["auth", "principal"] => Some(Self::TokenPrincipal),
            ["auth", "claims"] => Some(Self::Claims),
            ["auth", "claims", path @ ..] => {
                Some(Self::Claim(path.iter().map(|name| (*name).to_owned()).collect()))
            }
            _ => None,
        }
    }

    /// Asks for the headers it needs.
    pub(crate) fn want(&self, wants: &mut Wants) {
        match self {
            Self::RequestHeader(header) => {
                if let Some(name) = header.to_keep() {
                    wants.request.add(name);
                }
            }
            Self::RequestHeaders => wants.request = Wanted::All,
            Self::ResponseHeader(name) => wants.response.add(name),
            Self::ResponseHeaders => wants.response = Wanted::All,
            Self::ResponseTrailer(name) => wants.trailers.add(name),
            Self::ResponseTrailers => wants.trailers = Wanted::All,
            _ => {}
        }
    }

    /// The bytes of the header that it is; `None` when it is not there, or no header.
    pub(crate) fn bytes<'a>(&self, facts: &Facts<'a>) -> Option<Cow<'a, [u8]>> {
        let record = facts.record;
        match self {
            Self::RequestHeader(header) => facts.request_values(header),
            Self::ResponseHeader(name) => values_of(record.response_headers, name),
            Self::ResponseTrailer(name) => values_of(record.response_trailers, name),
            _ => None,
        }
    }

    /// Its value; `None` when it is not there.
    pub(crate) fn value<'a>(&self, facts: &Facts<'a>) -> Option<CowVal<'a, 'a>> {
        let record = facts.record;
        match self {
            Self::RequestHeader(header) => cow(facts.request_text(header)?),
            Self::RequestHeaders => map(request_headers(facts)),
            Self::ResponseHeader(name) => cow(text_of(record.response_headers, name)?),
            Self::ResponseHeaders => map(headers(record.response_headers)),
            Self::ResponseTrailer(name) => cow(text_of(record.response_trailers, name)?),
            Self::ResponseTrailers => map(headers(record.response_trailers)),
            Self::UrlPath => text(record.path.split('?').next().filter(|_| record.http)?),
            Self::Query if record.http => text(record.path.split_once('?').map_or("", |(_, query)| query)),
            Self::Protocol => text(Some(record.protocol).filter(|protocol| !protocol.is_empty())?),
            Self::RequestSize => size(record.request_body_bytes),
            Self::RequestTotalSize => size(record.request_bytes),
            Self::RequestTime => {
                let since = record.started.duration_since(UNIX_EPOCH).ok()?;
                let at = DateTime::from_timestamp(since.as_secs().try_into().ok()?, since.subsec_nanos())?;
                Some(CowVal::owned(CelTimestamp::from(at.fixed_offset())))
            }
            Self::RequestDuration => duration(record.duration),
            Self::BackendLatency => duration(record.backend_latency?),
            Self::UpstreamLocal => owned(Value::from(record.upstream_local?.to_string())),
            // Of an endpoint that was reached there is a reason, and it is empty.
            Self::UpstreamFailure => record.upstream.and_then(|_| text(record.upstream_failure)),
            Self::TokenPrincipal => text(Some(record.token_principal).filter(|text| !text.is_empty())?),
            Self::Claims => owned(json(&serde_json::Value::Object(record.claims?.clone()))),
            Self::Claim(path) => {
                let (first, rest) = path.split_first()?;
                let mut value = record.claims?.get(first)?;
                for name in rest {
                    value = value.get(name)?;
                }
                owned(json(value))
            }
            Self::ResponseCode => (record.status > 0).then(|| number(i64::from(record.status))),
            Self::ResponseDetails => text(Some(record.details).filter(|text| !text.is_empty())?),
            Self::ResponseFlags => Some(number(flag_bits(record.flags))),
            Self::GrpcStatus => record.grpc_status.map(|status| number(i64::from(status))),
            Self::ResponseSize => size(record.response_body_bytes),
            Self::ResponseTotalSize => size(record.response_bytes),
            Self::Address(end) => owned(Value::from(address(facts, *end)?.to_string())),
            Self::Port(end) => Some(number(i64::from(address(facts, *end)?.port()))),
            Self::ConnectionId => size(record.connection_id),
            Self::Mtls => Some(CowVal::owned(CelBool::from(facts.source().principal.is_some()))),
            Self::Principal(side) => text(facts.peer(*side, PeerField::Identity)?),
            Self::ServerName => text(""),
            Self::Peer(side) => map(peer(facts, *side)?),
            Self::PeerField(side, field) => text(facts.peer(*side, *field)?),
            Self::Cluster => text(Some(record.cluster).filter(|text| !text.is_empty())?),
            Self::Route => text(Some(record.route).filter(|text| !text.is_empty())?),
            Self::NodeId => text(&facts.own.node_id),
            Self::NodeMetadata(key) => text(facts.own.metadata(key)?),
            Self::Metadata(path) => {
                let (first, rest) = path.split_first()?;
                let said = record.metadata?.get(first)?;
                owned(json(rest.iter().try_fold(said, |value, key| value.get(key))?))
            }
            Self::OwnIdentity => text(Some(&*facts.own.identity).filter(|text| !text.is_empty())?),
            Self::Attempts => size(u64::from(record.attempts)),
            Self::Query | Self::Absent => None,
        }
    }
}

fn cow<'a>(value: Cow<'a, str>) -> Option<CowVal<'a, 'a>> {
    match value {
        Cow::Borrowed(value) => text(value),
        Cow::Owned(value) => owned(Value::from(value)),
    }
}

fn text<'a>(text: &'a str) -> Option<CowVal<'a, 'a>> {
    Some(CowVal::owned(CelString::from(text)))
}

fn number<'a>(number: i64) -> CowVal<'a, 'a> {
    CowVal::owned(CelInt::from(number))
}

fn duration<'a>(duration: Duration) -> Option<CowVal<'a, 'a>> {
    Some(CowVal::owned(CelDuration::from(chrono::Duration::from_std(duration).ok()?)))
}

fn size<'a>(size: u64) -> Option<CowVal<'a, 'a>> {
    Some(number(i64::try_from(size).unwrap_or(i64::MAX)))
}

fn owned<'a>(value: Value) -> Option<CowVal<'a, 'a>> {
    value.try_into().ok().map(CowVal::Owned)
}

fn map<'a>(entries: HashMap<String, String>) -> Option<CowVal<'a, 'a>> {
    owned(Value::from(entries))
}

fn headers(headers: Option<&HeaderMap>) -> HashMap<String, String> {
    let names = headers.into_iter().flat_map(HeaderMap::keys);
    names.filter_map(|name| Some((name.to_string(), text_of(headers, name)?.into_owned()))).collect()
}

fn request_headers(facts: &Facts<'_>) -> HashMap<String, String> {
    let mut map = headers(facts.record.request_headers);
    for name in [":method", ":path", ":authority", ":scheme", "x-request-id"] {
        if let Some(value) = Header::of_request(name).and_then(|header| facts.request_text(&header)) {
            map.insert(name.to_owned(), value.into_owned());
        }
    }
    map
}

fn peer(facts: &Facts<'_>, side: Side) -> Option<HashMap<String, String>> {
    facts.workload(side)?;
    let field =
        |(name, field): &(&str, PeerField)| Some(((*name).to_owned(), facts.peer(side, *field)?.to_owned()));
    Some(PeerField::ALL.iter().filter_map(field).collect())
}

fn address(facts: &Facts<'_>, end: End) -> Option<SocketAddr> {
    match end {
        End::Source => Some(facts.record.downstream),
        End::Destination => Some(facts.record.local),
        End::Upstream => facts.record.upstream,
    }
}

fn json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(flag) => Value::Bool(*flag),
        serde_json::Value::Number(number) => match number.as_i64() {
            Some(whole) => Value::Int(whole),
            None => Value::Float(number.as_f64().unwrap_or_default()),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => Value::from(items.iter().map(json).collect::<Vec<Value>>()),
        serde_json::Value::Object(fields) => {
            let fields = fields.iter().map(|(name, value)| (name.clone(), json(value)));
            Value::from(fields.collect::<HashMap<String, Value>>())
        }
    }
}
