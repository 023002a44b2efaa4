//! HTTP exchanges: what is said of one when it is over, and how it is counted.

use crate::histogram::Histogram;
use crate::labels::{HttpLabels, PeerLabels};
use crate::metrics::Metrics;
use crate::tcp_record::copy_text;
use cairn_mesh::{Identity, Service, Workload};
use parking_lot::Mutex;
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
    /// `x-request-id`.
    pub request_id: &'a str,
    /// The method.
    pub method: &'a str,
    /// The path with its query, as filters saw it.
    pub path: &'a str,
    /// `HTTP/1.1` and so on.
    pub protocol: &'static str,
    /// Host or `:authority`.
    pub authority: &'a str,
    /// `user-agent`.
    pub user_agent: &'a str,
    /// `x-forwarded-for`.
    pub forwarded_for: &'a str,
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
    /// The client.
    pub downstream: SocketAddr,
    /// Where the client meant to go.
    pub local: SocketAddr,
    /// The chosen endpoint.
    pub upstream: Option<SocketAddr>,
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

/// The metrics of one downstream connection: the labels that do not change, and handles to the series met so far, so
/// that a request on a connection in use hashes no labels.
pub struct HttpScope {
    metrics: Arc<Metrics>,
    source: PeerLabels,
    service: Option<Arc<Service>>,
    handles: Mutex<SmallVec<[Handle; 2]>>,
}

/// The most handles kept per connection.
const HANDLES_MAX: usize = 32;

struct Handle {
    status: u16,
    grpc: bool,
    grpc_status: Option<u8>,
    flags: &'static str,
    destination: Option<Arc<Workload>>,
    series: Arc<HttpSeries>,
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

    pub(crate) fn count(&self, record: &HttpRecord<'_>) {
        let mut handles = self.handles.lock();
        if let Some(handle) = handles.iter().find(|handle| handle.fits(record)) {
            handle.series.count(record);
            return;
        }
        let series = self.metrics.http_series(&self.labels(record));
        series.count(record);
        if handles.len() == HANDLES_MAX {
            handles.clear();
        }
        handles.push(Handle {
            status: record.status,
            grpc: record.grpc,
            grpc_status: record.grpc_status,
            flags: record.flags,
            destination: record.upstream_workload.cloned(),
            series,
        });
    }

    fn labels(&self, record: &HttpRecord<'_>) -> HttpLabels {
        let workload = record.upstream_workload;
        HttpLabels {
            source: self.source.clone(),
            destination: PeerLabels::of(workload, workload.map(|workload| &workload.identity)),
            service: self.service.clone(),
            grpc: record.grpc,
            response_code: record.status,
            grpc_status: record.grpc_status,
            response_flags: record.flags,
        }
    }
}

impl Handle {
    fn fits(&self, record: &HttpRecord<'_>) -> bool {
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
    }
}

/// The values of one label set.
#[derive(Debug, Default)]
pub(crate) struct HttpSeries {
    pub(crate) requests: AtomicU64,
    /// Observed in microseconds, printed in milliseconds.
    pub(crate) duration: Histogram<1000>,
    pub(crate) request_bytes: Histogram<1>,
    pub(crate) response_bytes: Histogram<1>,
}

impl HttpSeries {
    fn count(&self, record: &HttpRecord<'_>) {
        self.requests.fetch_add(1, Relaxed);
        self.duration.observe(u64::try_from(record.duration.as_micros()).unwrap_or(u64::MAX));
        self.request_bytes.observe(record.request_bytes);
        self.response_bytes.observe(record.response_bytes);
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
        copy_text(&mut self.request_id, record.request_id);
        self.source = Some(record.downstream);
        self.source_identity.clone_from(&scope.source.principal);
        self.source_workload.clone_from(&scope.source.workload);
        self.destination_service.clone_from(&scope.service);
        self.destination = Some(record.local);
        copy_text(&mut self.method, record.method);
        copy_text(&mut self.authority, record.authority);
        copy_text(&mut self.path, record.path);
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
