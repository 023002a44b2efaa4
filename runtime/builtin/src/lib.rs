//! Filters written in Rust.
//!
//! [`authorization`] enforces Istio's AuthorizationPolicy on the requests of one destination; [`unenforceable`]
//! answers in place of policies that cannot be enforced yet. Both give a [`cairn_filter::Factory`]: the waypoint puts
//! it into the destination's chain. [`Authorizer`] is the pure decision behind the first.

mod authorization;
mod unenforceable;

pub use authorization::{Authorizer, ConnectionFacts, Decision, Standing, authorization};
pub use unenforceable::unenforceable;
