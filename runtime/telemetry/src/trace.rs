//! The trace that an exchange is part of.

use cairn_mesh::Workload;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// A request's place in its trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The trace, 128 bits; of 64 where the client chose so.
    pub trace_id: u128,
    /// The exchange's own span.
    pub span_id: u64,
    /// The caller's span; 0 without one.
    pub parent_id: u64,
    /// Whether the span is to be reported.
    pub sampled: bool,
    /// The trace's id is written with 64 bits.
    pub narrow: bool,
    /// `tracestate` as it came.
    pub state: String,
}

/// One attempt to send a traced request, which has a span of its own.
#[derive(Clone, Debug)]
pub struct Try {
    /// Its span, whose parent is the exchange's.
    pub span_id: u64,
    /// From the request's head to its beginning.
    pub after: Duration,
    /// How long it took; `None`: until the exchange was over.
    pub duration: Option<Duration>,
    /// The endpoint.
    pub upstream: SocketAddr,
    /// The endpoint's workload.
    pub workload: Arc<Workload>,
    /// Response flags of an attempt that failed, `-` of one that was answered.
    pub flags: &'static str,
}
