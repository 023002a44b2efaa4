//! Entries of Envoy's access log service.

use crate::Own;
use crate::facts::{Facts, Header, text_of};
use cairn_mesh::AlsLog;
use cairn_proto::accesslog::{
    AccessLogCommon, Address, ConnectionProperties, HttpAccessLogEntry, HttpRequestProperties,
    HttpResponseProperties, ResponseFlags, SocketAddress, StreamAccessLogsMessage, TcpAccessLogEntry,
    response_flags::Unauthorized,
    stream_access_logs_message::{HttpAccessLogEntries, Identifier, LogEntries, Node, TcpAccessLogEntries},
};
use cairn_telemetry::{Wants, legible};
use http::{HeaderMap, HeaderName};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

pub(crate) const PATH: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";

/// Envoy's name for what denied a request that was not authorized: an external service.
const EXTERNAL_SERVICE: i32 = 1;

/// Methods in the order of Envoy's enumeration, from 1.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// One entry.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "it is boxed as a whole, once per exchange")]
pub(crate) enum Entry {
    Http(HttpAccessLogEntry),
    Tcp(TcpAccessLogEntry),
}

/// A batch of entries as one message: each call is a stream of its own, which begins by saying who sends it.
pub(crate) fn message(
    own: &Own,
    log: &AlsLog,
    entries: impl Iterator<Item = Entry>,
) -> StreamAccessLogsMessage {
    let node = Node { id: own.node_id.to_string(), cluster: own.service_name() };
    let identifier = Identifier { node: Some(node), log_name: log.log_name.to_string() };
    let log_entries = if log.tcp {
        let of_kind = |entry| match entry {
            Entry::Tcp(entry) => Some(entry),
            Entry::Http(_) => None,
        };
        LogEntries::TcpLogs(TcpAccessLogEntries { log_entry: entries.filter_map(of_kind).collect() })
    } else {
        let of_kind = |entry| match entry {
            Entry::Http(entry) => Some(entry),
            Entry::Tcp(_) => None,
        };
        LogEntries::HttpLogs(HttpAccessLogEntries { log_entry: entries.filter_map(of_kind).collect() })
    };
    StreamAccessLogsMessage { identifier: Some(identifier), log_entries: Some(log_entries) }
}

/// Which further headers an entry has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Further {
    pub(crate) request: Vec<(String, Header)>,
    pub(crate) response: Vec<HeaderName>,
    pub(crate) trailers: Vec<HeaderName>,
}

impl Further {
    pub(crate) fn of(log: &AlsLog) -> Self {
        let names = |list: &[std::sync::Arc<str>]| -> Vec<HeaderName> {
            list.iter().filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok()).collect()
        };
        let request = |name: &std::sync::Arc<str>| Some((name.to_string(), Header::of_request(name)?));
        Self {
            request: log.request_headers.iter().filter_map(request).collect(),
            response: names(&log.response_headers),
            trailers: names(&log.response_trailers),
        }
    }
}

impl Further {
    /// Asks for the headers it needs.
    pub(crate) fn want(&self, wants: &mut Wants) {
        self.request
            .iter()
            .filter_map(|(_, header)| header.to_keep())
            .for_each(|name| wants.request.add(name));
        self.response.iter().for_each(|name| wants.response.add(name));
        self.trailers.iter().for_each(|name| wants.trailers.add(name));
    }
}

/// The entry of a finished exchange or connection; `None` when the log is for the other kind.
pub(crate) fn entry(facts: &Facts<'_>, further: &Further, tcp: bool) -> Option<Entry> {
    let record = facts.record;
    if record.http == tcp {
        return None;
    }
    let common_properties = Some(common(facts));
    if tcp {
        let bytes = ConnectionProperties {
            received_bytes: record.request_body_bytes,
            sent_bytes: record.response_body_bytes,
        };
        let connection_properties = Some(bytes);
        return Some(Entry::Tcp(TcpAccessLogEntry { common_properties, connection_properties }));
    }
    Some(Entry::Http(HttpAccessLogEntry {
        common_properties,
        protocol_version: match record.protocol {
            "HTTP/1.0" => 1,
            "HTTP/1.1" => 2,
            "HTTP/2" => 3,
            _ => 0,
        },
        request: Some(request(facts, further)),
        response: Some(HttpResponseProperties {
            response_code: (record.status > 0).then(|| u32::from(record.status)),
            response_headers_bytes: record.response_bytes.saturating_sub(record.response_body_bytes),
            response_body_bytes: record.response_body_bytes,
            response_headers: texts(record.response_headers, &further.response),
            response_trailers: texts(record.response_trailers, &further.trailers),
            response_code_details: record.details.to_owned(),
        }),
    }))
}

fn common(facts: &Facts<'_>) -> AccessLogCommon {
    let record = facts.record;
    AccessLogCommon {
        downstream_remote_address: Some(address(record.downstream)),
        downstream_direct_remote_address: Some(address(record.downstream)),
        downstream_local_address: Some(address(record.local)),
        start_time: Some(record.started.into()),
        time_to_last_downstream_tx_byte: duration(record.duration),
        duration: duration(record.duration),
        upstream_remote_address: record.upstream.map(address),
        upstream_cluster: record.cluster.to_owned(),
        response_flags: Some(flags(record.flags)),
        route_name: record.route.to_owned(),
        upstream_request_attempt_count: record.attempts,
    }
}

fn request(facts: &Facts<'_>, further: &Further) -> HttpRequestProperties {
    let record = facts.record;
    let method = METHODS.iter().position(|known| *known == record.method);
    let extra = further
        .request
        .iter()
        .filter_map(|(name, header)| Some((name.clone(), facts.request_text(header)?.into_owned())));
    let text = |bytes: Option<&[u8]>| legible(bytes.unwrap_or_default()).into_owned();
    HttpRequestProperties {
        request_method: method.map_or(0, |at| at as i32 + 1),
        scheme: "http".to_owned(),
        authority: record.authority.to_owned(),
        path: record.path.to_owned(),
        user_agent: text(record.user_agent),
        referer: String::new(),
        forwarded_for: text(record.forwarded_for),
        request_id: text(record.request_id),
        request_headers_bytes: record.request_bytes.saturating_sub(record.request_body_bytes),
        request_body_bytes: record.request_body_bytes,
        request_headers: extra.collect(),
    }
}

fn texts(headers: Option<&HeaderMap>, names: &[HeaderName]) -> BTreeMap<String, String> {
    let Some(headers) = headers else { return BTreeMap::new() };
    let text = |name: &HeaderName| Some((name.to_string(), text_of(Some(headers), name)?.into_owned()));
    names.iter().filter_map(text).collect()
}

fn address(at: SocketAddr) -> Address {
    let socket = SocketAddress { address: at.ip().to_string(), port_value: u32::from(at.port()) };
    Address { socket_address: Some(socket) }
}

fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

fn flags(flags: &str) -> ResponseFlags {
    let has = |flag: &str| flags.split(',').any(|one| one == flag);
    ResponseFlags {
        no_healthy_upstream: has("UH"),
        upstream_remote_reset: has("UR"),
        upstream_connection_failure: has("UF"),
        upstream_connection_termination: has("UC"),
        upstream_overflow: has("UO"),
        no_route_found: has("NR"),
        downstream_connection_termination: has("DC"),
        no_cluster_found: has("NC"),
        unauthorized_details: has("UAEX").then_some(Unauthorized { reason: EXTERNAL_SERVICE }),
        upstream_retry_limit_exceeded: has("URX"),
        upstream_protocol_error: has("UPE"),
    }
}
