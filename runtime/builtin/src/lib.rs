//! Filters written in Rust.
//!
//! [`authentication`] verifies the tokens of the requests to one destination, as Istio's RequestAuthentication asks;
//! [`authorization`] enforces AuthorizationPolicy on them; [`external_authorization`] asks a provider about what policies
//! with action CUSTOM match; [`unenforceable`] answers in place of policies that cannot be enforced. Each gives a
//! [`cairn_filter::Factory`]: the waypoint puts it into the destination's chain. [`Authenticator`] and [`Authorizer`] are
//! the decisions behind the first two.

mod authentication;
mod authorization;
mod ext_authz;
mod unenforceable;

pub use authentication::{
    Accepted, Algorithm, Authenticator, Judgement, Jwt, KeySet, KeySetError, KeySource, Keys, Moment,
    Refused, Terms, TokenCache, TokenError, authentication, inline_keys,
};
pub use authorization::{Authorizer, ConnectionFacts, Decision, Known, Remarks, Standing, authorization};
pub use ext_authz::external_authorization;
pub use unenforceable::unenforceable;
