//! HTTP exchanges: what is said of one when it is over, and how it is counted.

use crate::histogram::Histogram;
use crate::labels::{CustomLabels, HttpLabels, PeerLabels};
use crate::metrics::{HttpBounds, Metrics};
use crate::observe::Observe;
use crate::table::Activity;
use crate::tcp_record::copy_text;
use crate::trace::{Trace, Try};
use cairn_mesh::{Identity, Service, Workload};
use http::HeaderMap;
use parking_lot::Mutex;
use serde_json::{Map, Value};
use smallvec::SmallVec;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

/// A finished exchange. Texts are empty when there is nothing to say.
#[derive(Clone, Debug)]
pub struct HttpRecord<'a> {
    /// When the request's head arrived.
    pub started: SystemTime,
    /// From then to the last byte of the response.
    pub duration: Duration,
    /// From sending the request to the response's head.
    pub upstream_duration: Option<Duration>,
    /// From the request's head to the first byte of the upstream's answer.
    pub first_byte: Option<Duration>,
    /// From sending the request to the last byte of the upstream's answer.
    pub backend_latency: Option<Duration>,
    /// `x-request-id`, as it came; `None`: there is none.
    pub request_id: Option<&'a [u8]>,
    /// The method.
    pub method: &'a str,
    /// The path with its query, as it went upstream.
    pub path: &'a str,
    /// The path as filters saw it, where a route changed it since (Envoy's `x-envoy-original-path`).
    pub original_path: &'a str,
    /// `HTTP/1.1` and so on.
    pub protocol: &'static str,
    /// Host or `:authority`.
    pub authority: &'a str,
    /// `user-agent`, as it came; `None`: there is none.
    pub user_agent: Option<&'a [u8]>,
    /// `x-forwarded-for`, as it came; `None`: there is none.
    pub forwarded_for: Option<&'a [u8]>,
    /// The status; 0 when the client left before one was sent.
    pub status: u16,
    /// Envoy's response flags, `-` for none.
    pub flags: &'static str,
    /// Envoy's response code details.
    pub details: &'a str,
    /// Whether this is gRPC.
    pub grpc: bool,
    /// Its gRPC status; 255 stands for a text that is no status.
    pub grpc_status: Option<u8>,
    /// Bytes of the request's body.
    pub request_body_bytes: u64,
    /// Bytes of the response's body.
    pub response_body_bytes: u64,
    /// Bytes of the request, headers included.
    pub request_bytes: u64,
    /// Bytes of the response, headers included.
    pub response_bytes: u64,
    /// gRPC messages of the request.
    pub request_messages: u64,
    /// gRPC messages of the response.
    pub response_messages: u64,
    /// How often it was sent upstream.
    pub attempts: u32,
    /// The request's headers that its destination's [`crate::Observe::wants`].
    pub request_headers: Option<&'a HeaderMap>,
    /// The response's.
    pub response_headers: Option<&'a HeaderMap>,
    /// The response's trailers.
    pub response_trailers: Option<&'a HeaderMap>,
    /// The claims of a verified token.
    pub claims: Option<&'a Map<String, Value>>,
    /// `issuer/subject` of a verified token.
    pub token_principal: &'a str,
    /// What filters said of it, by namespace.
    pub metadata: Option<&'a Map<String, Value>>,
    /// The trace it is part of.
    pub trace: Option<&'a Trace>,
    /// The attempts to send it, where they have spans of their own.
    pub tries: &'a [Try],
    /// Numbers connections within the process.
    pub connection_id: u64,
    /// Whether this is HTTP, or a connection of anything else.
    pub http: bool,
    /// The client.
    pub downstream: SocketAddr,
    /// Where the client meant to go.
    pub local: SocketAddr,
    /// The chosen endpoint.
    pub upstream: Option<SocketAddr>,
    /// Our end of the connection to it.
    pub upstream_local: Option<SocketAddr>,
    /// Why there was no connection to it.
    pub upstream_failure: &'a str,
    /// The chosen endpoint's workload.
    pub upstream_workload: Option<&'a Arc<Workload>>,
    /// The chosen cluster.
    pub cluster: &'a str,
    /// The route in force.
    pub route: &'a str,
    /// The policy that allowed it.
    pub allowed_by: &'a str,
    /// The policy that denied it, and why.
    pub denial: Option<(&'a str, &'a str)>,
    /// What filters did: the filter, and what.
    pub notes: Vec<(&'a str, &'a str)>,
}

impl<'a> HttpRecord<'a> {
    /// A record in which nothing is known yet but who connected where, to be completed with struct update syntax.
    pub fn new(started: SystemTime, downstream: SocketAddr, local: SocketAddr) -> Self {
        Self {
            started,
            duration: Duration::ZERO,
            upstream_duration: None,
            first_byte: None,
            backend_latency: None,
            request_id: None,
            method: "",
            path: "",
            original_path: "",
            protocol: "",
            authority: "",
            user_agent: None,
            forwarded_for: None,
            status: 0,
            flags: "-",
            details: "",
            grpc: false,
            grpc_status: None,
            request_body_bytes: 0,
            response_body_bytes: 0,
            request_bytes: 0,
            response_bytes: 0,
            request_messages: 0,
            response_messages: 0,
            attempts: 0,
            request_headers: None,
            response_headers: None,
            response_trailers: None,
            claims: None,
            token_principal: "",
            metadata: None,
            trace: None,
            tries: &[],
            connection_id: 0,
            http: true,
            downstream,
            local,
            upstream: None,
            upstream_local: None,
            upstream_failure: "",
            upstream_workload: None,
            cluster: "",
            route: "",
            allowed_by: "",
            denial: None,
            notes: Vec::new(),
        }
    }

    /// The path that logs show: as it was before a route changed it.
    pub fn logged_path(&self) -> &'a str {
        if self.original_path.is_empty() { self.path } else { self.original_path }
    }
}

/// The metrics of one downstream connection: the labels that do not change, and handles to the series met so far, so
/// that a request on a connection in use hashes no labels.
pub struct HttpScope {
    metrics: Arc<Metrics>,
    source: PeerLabels,
    service: Option<Arc<Service>>,
    handles: Mutex<Handles>,
}

/// Handles, and the epoch of the metrics that they belong to.
#[derive(Default)]
struct Handles {
    epoch: u64,
    list: SmallVec<[Handle; 2]>,
}

/// The most handles kept per connection.
const HANDLES_MAX: usize = 32;

struct Handle {
    key: Key,
    series: Arc<HttpSeries>,
}

/// What tells the series of one connection apart.
struct Key {
    status: u16,
    grpc: bool,
    grpc_status: Option<u8>,
    flags: &'static str,
    destination: Option<Arc<Workload>>,
    custom: CustomLabels,
}

impl HttpScope {
    /// The scope of a connection from `source`, addressed to `service` (`None`: to a workload).
    pub fn new(metrics: &Arc<Metrics>, source: PeerLabels, service: Option<Arc<Service>>) -> Self {
        Self { metrics: Arc::clone(metrics), source, service, handles: Mutex::default() }
    }

    /// Who connected.
    pub fn source(&self) -> &PeerLabels {
        &self.source
    }

    /// The service addressed.
    pub fn service(&self) -> Option<&Arc<Service>> {
        self.service.as_ref()
    }

    /// Counts a finished exchange.
    pub(crate) fn count(&self, record: &HttpRecord<'_>, observer: Option<&dyn Observe>) {
        self.with_series(record, observer, |series| series.count(record));
    }

    /// Counts messages of a stream that goes on, under the labels known by now. The status is not among them, so it
    /// does not matter that it may change.
    pub fn count_messages(
        &self,
        record: &HttpRecord<'_>,
        observer: Option<&dyn Observe>,
        requests: u64,
        responses: u64,
    ) {
        self.with_series(record, observer, |series| {
            series.request_messages.fetch_add(requests, Relaxed);
            series.response_messages.fetch_add(responses, Relaxed);
        });
    }

    fn with_series(
        &self,
        record: &HttpRecord<'_>,
        observer: Option<&dyn Observe>,
        count: impl FnOnce(&HttpSeries),
    ) {
        let custom = match observer {
            None => CustomLabels::default(),
            Some(observer) => {
                let shape = observer.shape();
                let mut values = Vec::new();
                if shape.values() > 0 {
                    observer.label_values(self, record, &mut values);
                }
                CustomLabels::new(shape, values)
            }
        };
        let mut handles = self.handles.lock();
        let epoch = self.metrics.epoch();
        if handles.epoch != epoch {
            handles.list.clear();
            handles.epoch = epoch;
        }
        let handles = &mut handles.list;
        if let Some(handle) = handles.iter().find(|handle| handle.key.fits(record, &custom)) {
            return count(&handle.series);
        }
        let series = self.metrics.http_series(&self.labels(record, custom.clone()).simplified());
        count(&series);
        if handles.len() == HANDLES_MAX {
            handles.clear();
        }
        let key = Key {
            status: record.status,
            grpc: record.grpc,
            grpc_status: record.grpc_status,
            flags: record.flags,
            destination: record.upstream_workload.cloned(),
            custom,
        };
        handles.push(Handle { key, series });
    }

    fn labels(&self, record: &HttpRecord<'_>, custom: CustomLabels) -> HttpLabels {
        let workload = record.upstream_workload;
        HttpLabels {
            source: self.source.clone(),
            destination: PeerLabels::of(workload, workload.map(|workload| &workload.identity)),
            service: self.service.clone(),
            grpc: record.grpc,
            response_code: record.status,
            grpc_status: record.grpc_status,
            response_flags: record.flags,
            custom,
        }
    }
}

impl Key {
    fn fits(&self, record: &HttpRecord<'_>, custom: &CustomLabels) -> bool {
        let same_destination = match (&self.destination, record.upstream_workload) {
            (Some(known), Some(now)) => Arc::ptr_eq(known, now),
            (None, None) => true,
            _ => false,
        };
        same_destination
            && self.status == record.status
            && self.grpc == record.grpc
            && self.grpc_status == record.grpc_status
            && self.flags == record.flags
            && self.custom == *custom
    }
}

/// The values of one label set.
#[derive(Debug)]
pub(crate) struct HttpSeries {
    pub(crate) requests: AtomicU64,
    pub(crate) request_messages: AtomicU64,
    pub(crate) response_messages: AtomicU64,
    /// Observed in microseconds, printed in milliseconds.
    pub(crate) duration: Histogram<1000>,
    pub(crate) request_bytes: Histogram<1>,
    pub(crate) response_bytes: Histogram<1>,
}

impl HttpSeries {
    pub(crate) fn new(bounds: &HttpBounds) -> Self {
        Self {
            requests: AtomicU64::default(),
            request_messages: AtomicU64::default(),
            response_messages: AtomicU64::default(),
            duration: Histogram::new(&bounds.duration),
            request_bytes: Histogram::new(&bounds.request_bytes),
            response_bytes: Histogram::new(&bounds.response_bytes),
        }
    }

    fn count(&self, record: &HttpRecord<'_>) {
        self.requests.fetch_add(1, Relaxed);
        self.duration.observe(u64::try_from(record.duration.as_micros()).unwrap_or(u64::MAX));
        self.request_bytes.observe(record.request_bytes);
        self.response_bytes.observe(record.response_bytes);
        if record.grpc {
            self.request_messages.fetch_add(record.request_messages, Relaxed);
            self.response_messages.fetch_add(record.response_messages, Relaxed);
        }
    }
}

impl Activity for HttpSeries {
    fn activity(&self) -> u64 {
        let counters = [&self.requests, &self.request_messages, &self.response_messages];
        counters.iter().fold(0, |sum, counter| sum.wrapping_add(counter.load(Relaxed)))
    }
}

/// A finished exchange as it is kept for explanations. Texts are cut at 512 bytes.
#[derive(Clone, Debug)]
pub struct HttpExplanation {
    /// When the request's head arrived.
    pub started: SystemTime,
    /// From then to the last byte of the response.
    pub duration: Duration,
    /// `x-request-id`.
    pub request_id: String,
    /// The client's address.
    pub source: Option<SocketAddr>,
    /// The client's identity.
    pub source_identity: Option<Identity>,
    /// The client's workload.
    pub source_workload: Option<Arc<Workload>>,
    /// The service addressed.
    pub destination_service: Option<Arc<Service>>,
    /// The address the client meant to reach.
    pub destination: Option<SocketAddr>,
    /// The method.
    pub method: String,
    /// Host or `:authority`.
    pub authority: String,
    /// The path with its query.
    pub path: String,
    /// `HTTP/1.1` and so on.
    pub protocol: &'static str,
    /// The status; 0 when the client left before one was sent.
    pub status: u16,
    /// The gRPC status.
    pub grpc_status: Option<u8>,
    /// Response flags.
    pub flags: &'static str,
    /// Response code details.
    pub details: String,
    /// The policy that denied it; empty if none did.
    pub denied_by: String,
    /// Why it was denied.
    pub denial_reason: String,
    /// The policy that allowed it.
    pub allowed_by: String,
    /// The route in force.
    pub route: String,
    /// The chosen cluster.
    pub cluster: String,
    /// The chosen endpoint.
    pub upstream: Option<SocketAddr>,
    /// The chosen endpoint's workload.
    pub upstream_workload: Option<Arc<Workload>>,
    /// What filters did: the filter, and what.
    pub notes: Vec<(String, String)>,
}

impl Default for HttpExplanation {
    fn default() -> Self {
        Self {
            started: SystemTime::UNIX_EPOCH,
            duration: Duration::ZERO,
            request_id: String::new(),
            source: None,
            source_identity: None,
            source_workload: None,
            destination_service: None,
            destination: None,
            method: String::new(),
            authority: String::new(),
            path: String::new(),
            protocol: "",
            status: 0,
            grpc_status: None,
            flags: "-",
            details: String::new(),
            denied_by: String::new(),
            denial_reason: String::new(),
            allowed_by: String::new(),
            route: String::new(),
            cluster: String::new(),
            upstream: None,
            upstream_workload: None,
            notes: Vec::new(),
        }
    }
}

impl HttpExplanation {
    pub(crate) fn refill(&mut self, scope: &HttpScope, record: &HttpRecord<'_>) {
        self.started = record.started;
        self.duration = record.duration;
        let id = record.request_id.unwrap_or_default();
        copy_text(&mut self.request_id, std::str::from_utf8(id).unwrap_or_default());
        self.source = Some(record.downstream);
        self.source_identity.clone_from(&scope.source.principal);
        self.source_workload.clone_from(&scope.source.workload);
        self.destination_service.clone_from(&scope.service);
        self.destination = Some(record.local);
        copy_text(&mut self.method, record.method);
        copy_text(&mut self.authority, record.authority);
        copy_path(&mut self.path, record.logged_path());
        self.protocol = record.protocol;
        self.status = record.status;
        self.grpc_status = record.grpc_status;
        self.flags = record.flags;
        copy_text(&mut self.details, record.details);
        let (policy, reason) = record.denial.unwrap_or(("", ""));
        copy_text(&mut self.denied_by, policy);
        copy_text(&mut self.denial_reason, reason);
        copy_text(&mut self.allowed_by, record.allowed_by);
        copy_text(&mut self.route, record.route);
        copy_text(&mut self.cluster, record.cluster);
        self.upstream = record.upstream;
        self.upstream_workload = record.upstream_workload.cloned();
        self.notes.resize_with(record.notes.len(), Default::default);
        for (kept, (filter, text)) in self.notes.iter_mut().zip(&record.notes) {
            copy_text(&mut kept.0, filter);
            copy_text(&mut kept.1, text);
        }
    }
}

/// A path with its query, but for tokens in it: an explanation is for more eyes than the request was.
fn copy_path(to: &mut String, path: &str) {
    // Every token begins so: it is `{"` in base64.
    const TOKEN: &str = "eyJ";
    let Some((before, query)) = path.split_once('?').filter(|(_, query)| query.contains(TOKEN)) else {
        return copy_text(to, path);
    };
    let shown = query.split('&').map(|pair| match pair.split_once('=') {
        Some((name, value)) if value.starts_with(TOKEN) && value.contains('.') => format!("{name}=[token]"),
        _ => pair.to_owned(),
    });
    copy_text(to, &format!("{before}?{}", shown.collect::<Vec<_>>().join("&")));
}

#[cfg(test)]
mod tests {
    use super::copy_path;

    #[test]
    fn an_explanation_shows_no_token() {
        for (path, shown) in [
            ("/a?b=c", "/a?b=c"),
            ("/a?access_token=eyJhbGciOiJub25lIn0.eyJ9.x&b=c", "/a?access_token=[token]&b=c"),
            ("/a?b&t=eyJ.e.x", "/a?b&t=[token]"),
            ("/eyJ.e.x", "/eyJ.e.x"),
            ("/a?eyJ", "/a?eyJ"),
        ] {
            let mut text = "before".to_owned();
            copy_path(&mut text, path);
            assert_eq!(text, shown);
        }
    }
}
