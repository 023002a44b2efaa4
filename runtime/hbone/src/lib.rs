//! CONNECT tunnels over mTLS HTTP/2: accept, open, pool.
//!
//! A tunnel is a byte stream plus who is at its other end. [`serve`] takes an accepted connection and hands out each
//! [`Connect`] that arrives on it; [`Pool`] opens tunnels to others over few connections. Both give a [`TunnelStream`].

mod ahead;
mod authority;
mod client;
mod headers;
mod keepalive;
mod nested;
mod pool;
mod revocation;
mod server;
mod transport;
mod tunnel;
mod wire;

pub use authority::{Authority, AuthorityError};
pub use headers::{baggage, described, forwarded, forwarded_host, traceparent};
pub use nested::{NestedTarget, connect_nested};
pub use pool::{ConnectError, Pool, PoolSettings, PoolTarget};
pub use revocation::Revocation;
pub use server::{Connect, Downstream, ServeError, ServerSettings, serve};
pub use tunnel::{TunnelError, TunnelStream};

#[cfg(test)]
mod tests;
