//! What Telemetry resources ask for: log formats, expressions, and the records made with them.
//!
//! A [`cairn_mesh::TelemetryPlan`] is compiled once per destination to an [`Observer`], which the HTTP engine asks
//! what to count and tells what is over. What is sent to collectors goes through a [`Feed`], which its owner runs where
//! they can be reached from. [`Format`] and [`Expression`] are also what manifests are checked with.

mod als;
mod attribute;
mod clock;
mod export;
mod expression;
mod facts;
mod format;
mod json;
mod observer;
mod operator;
mod otlp;
mod outputs;
mod span;
#[cfg(test)]
mod testing;
mod trace_context;
mod zipkin;

pub use export::Feed;
pub use expression::{Expression, ExpressionError};
pub use facts::{Own, is_header_name};
pub use format::{Format, FormatError};
pub use observer::Observer;
pub use outputs::Outputs;
