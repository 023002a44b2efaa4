//! Connections: what is said of one when it is over, and how it is counted.

use crate::labels::TcpLabels;
use crate::metrics::Metrics;
use crate::table::Activity;
use cairn_mesh::{Identity, Service, Workload};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

/// The values of one label set.
#[derive(Debug, Default)]
pub(crate) struct TcpSeries {
    pub(crate) opened: AtomicU64,
    pub(crate) closed: AtomicU64,
    pub(crate) received: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) failed: AtomicU64,
}

impl Activity for TcpSeries {
    fn activity(&self) -> u64 {
        let counters = [&self.opened, &self.closed, &self.received, &self.sent, &self.failed];
        counters.iter().fold(0, |sum, counter| sum.wrapping_add(counter.load(Relaxed)))
    }
}

/// The metrics of one open connection. Dropping it without [`TcpConnection::close`] counts it as closed without a
/// flag, so that opened and closed always agree.
pub struct TcpConnection {
    metrics: Arc<Metrics>,
    labels: TcpLabels,
    series: Arc<TcpSeries>,
    received: u64,
    sent: u64,
    closed: bool,
}

impl TcpConnection {
    /// Counts a connection as opened. `labels.response_flags` is `-`.
    pub fn open(metrics: &Arc<Metrics>, labels: TcpLabels) -> Self {
        let series = metrics.tcp_series(&labels);
        series.opened.fetch_add(1, Relaxed);
        Self { metrics: Arc::clone(metrics), labels, series, received: 0, sent: 0, closed: false }
    }

    /// Counts a connection that never opened, under its own response flag.
    pub fn failed(metrics: &Arc<Metrics>, labels: &TcpLabels) {
        metrics.tcp_series(labels).failed.fetch_add(1, Relaxed);
    }

    /// Counts the bytes since the last report; `received` (client to server) and `sent` are totals of the connection.
    /// Called every few seconds for long connections, and before the end.
    pub fn report(&mut self, received: u64, sent: u64) {
        self.series.received.fetch_add(received.saturating_sub(self.received), Relaxed);
        self.series.sent.fetch_add(sent.saturating_sub(self.sent), Relaxed);
        self.received = received;
        self.sent = sent;
    }

    /// Counts the connection as closed, under `-` or why it ended.
    pub fn close(mut self, response_flags: &'static str) {
        self.closed = true;
        if response_flags == self.labels.response_flags {
            self.series.closed.fetch_add(1, Relaxed);
        } else {
            let labels = TcpLabels { response_flags, ..self.labels.clone() };
            self.metrics.tcp_series(&labels).closed.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for TcpConnection {
    fn drop(&mut self) {
        if !self.closed {
            self.series.closed.fetch_add(1, Relaxed);
        }
    }
}

/// Which side of the proxy the workload it serves is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the workload.
    Inbound,
    /// From the workload.
    Outbound,
}

impl Direction {
    /// As in the access log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// A finished connection. Texts are empty when there is nothing to say.
#[derive(Clone, Debug)]
pub struct TcpRecord<'a> {
    /// When it was accepted.
    pub started: SystemTime,
    /// How long it lived.
    pub duration: Duration,
    /// Which side.
    pub direction: Direction,
    /// The client's address.
    pub source: SocketAddr,
    /// The client's workload.
    pub source_workload: Option<&'a Arc<Workload>>,
    /// The client's identity, if mTLS proved it.
    pub source_identity: Option<&'a Identity>,
    /// Outbound: the next hop. Inbound: where the client connected.
    pub destination: SocketAddr,
    /// The CONNECT authority.
    pub hbone_authority: &'a str,
    /// The service addressed.
    pub service: Option<&'a Arc<Service>>,
    /// The workload connected to.
    pub destination_workload: Option<&'a Arc<Workload>>,
    /// Its identity, if mTLS proved it.
    pub destination_identity: Option<&'a Identity>,
    /// Bytes sent, from the reporter's own side (the log turns Istio's metric convention round for the source).
    pub bytes_sent: u64,
    /// Bytes received, likewise.
    pub bytes_received: u64,
    /// What went wrong.
    pub error: &'a str,
    /// The way taken: `direct`, `waypoint`, `plain`, `refused` …
    pub plan: &'a str,
    /// `allow`, `deny`, or empty when nothing was decided here.
    pub decision: &'a str,
    /// The policy that decided, or why.
    pub policy: &'a str,
}

/// A finished connection as it is kept for explanations.
#[derive(Clone, Debug)]
pub struct TcpExplanation {
    /// When it was accepted.
    pub started: SystemTime,
    /// How long it lived.
    pub duration: Duration,
    /// Which side.
    pub direction: Direction,
    /// The client's address.
    pub source: Option<SocketAddr>,
    /// The client's workload.
    pub source_workload: Option<Arc<Workload>>,
    /// The client's identity.
    pub source_identity: Option<Identity>,
    /// The destination's address.
    pub destination: Option<SocketAddr>,
    /// The CONNECT authority.
    pub hbone_authority: String,
    /// The service addressed.
    pub service: Option<Arc<Service>>,
    /// The workload connected to.
    pub destination_workload: Option<Arc<Workload>>,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// What went wrong.
    pub error: String,
    /// The way taken.
    pub plan: String,
    /// The decision.
    pub decision: String,
    /// The policy that decided, or why.
    pub policy: String,
}

impl Default for TcpExplanation {
    fn default() -> Self {
        Self {
            started: SystemTime::UNIX_EPOCH,
            duration: Duration::ZERO,
            direction: Direction::Inbound,
            source: None,
            source_workload: None,
            source_identity: None,
            destination: None,
            hbone_authority: String::new(),
            service: None,
            destination_workload: None,
            bytes_sent: 0,
            bytes_received: 0,
            error: String::new(),
            plan: String::new(),
            decision: String::new(),
            policy: String::new(),
        }
    }
}

impl TcpExplanation {
    pub(crate) fn refill(&mut self, record: &TcpRecord<'_>) {
        self.started = record.started;
        self.duration = record.duration;
        self.direction = record.direction;
        self.source = Some(record.source);
        self.source_workload = record.source_workload.cloned();
        self.source_identity = record.source_identity.cloned();
        self.destination = Some(record.destination);
        copy_text(&mut self.hbone_authority, record.hbone_authority);
        self.service = record.service.cloned();
        self.destination_workload = record.destination_workload.cloned();
        self.bytes_sent = record.bytes_sent;
        self.bytes_received = record.bytes_received;
        copy_text(&mut self.error, record.error);
        copy_text(&mut self.plan, record.plan);
        copy_text(&mut self.decision, record.decision);
        copy_text(&mut self.policy, record.policy);
    }
}

/// The most bytes of a text that are kept.
const TEXT_BYTES_MAX: usize = 512;

/// Overwrites `to`, whose allocation is used again.
pub(crate) fn copy_text(to: &mut String, from: &str) {
    to.clear();
    to.push_str(from.get(..from.floor_char_boundary(TEXT_BYTES_MAX)).unwrap_or(from));
}
