//! The trace that an exchange is part of.

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
    /// `tracestate` as it came.
    pub state: String,
}
