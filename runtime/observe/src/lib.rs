//! What Telemetry resources ask for: log formats, expressions, and the records made with them.
//!
//! A [`cairn_mesh::TelemetryPlan`] is compiled once per destination to an [`Observer`], which the HTTP engine asks
//! what to count and tells what is over. [`Format`] and [`Expression`] are also what manifests are checked with.

mod attribute;
mod clock;
mod expression;
mod facts;
mod format;
mod json;
mod observer;
mod operator;
mod outputs;
#[cfg(test)]
mod testing;

pub use expression::{Expression, ExpressionError};
pub use facts::{Own, is_header_name};
pub use format::{Format, FormatError};
pub use observer::Observer;
pub use outputs::Outputs;
