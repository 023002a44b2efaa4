//! The life of one HTTP exchange: serve, route, balance, retry, upstream.
//!
//! [`serve`] takes a byte stream that came out of a tunnel and does with it what its destination's [`Site`] says:
//! HTTP runs through the hub in `exchange.rs`, which reads from top to bottom as a request lives; anything else is
//! copied. A [`Worker`] owns what the connections of one thread share: upstream connections and their load.

mod body;
mod callout;
mod decision;
mod download;
mod endpoint;
mod exchange;
mod explain;
mod failure;
mod grpc;
mod head;
mod host;
mod matcher;
mod pipe;
mod record;
mod reply;
mod rewrite;
mod route;
mod serve;
mod site;
mod sniff;
mod stream;
mod tcp;
mod upgrade;
mod upload;
mod upstream;
mod worker;

pub use callout::MeshCallout;
pub use explain::{Candidate, Next, Routed, Share};
pub use failure::{Answer, Failure};
pub use route::RouteTable;
pub use serve::serve;
pub use site::{Site, SiteHandle};
pub use worker::{Balancer, Tunnels, Worker, WorkerSettings};
