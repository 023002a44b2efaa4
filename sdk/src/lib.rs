//! The guest side of proxy-wasm for plugin authors.
//!
//! A plugin is a type that implements [`Plugin`]: it is made of its typed configuration and handles what it overrides of
//! requests, responses, their bodies and trailers, connections without HTTP, ticks and ends. [`macro@plugin`] on the `impl` block exports just that, so a
//! proxy skips all callbacks that the plugin has no use for. Modules speak ABI 0.2.1 and nothing more, so they run in every
//! proxy-wasm host. [`testing`] is a proxy made of memory: `cargo test` runs the same plugin natively.
//!
//! ```
//! use cairn_sdk::testing::{Proxy, TestRequest};
//! use cairn_sdk::{Flow, Plugin, Reply, Request, Response};
//!
//! #[derive(serde::Deserialize)]
//! struct Config {
//!     team: String,
//! }
//!
//! struct Teams {
//!     team: String,
//! }
//!
//! #[cairn_sdk::plugin]
//! impl Plugin for Teams {
//!     type Config = Config;
//!     type Exchange = ();
//!
//!     fn configure(config: Config) -> Result<Self, String> {
//!         Ok(Self { team: config.team })
//!     }
//!
//!     fn on_request(&self, request: Request, _: &mut ()) -> Flow {
//!         if request.header("x-team").as_deref() != Some(self.team.as_bytes()) {
//!             return Reply::text(403, "not your team").into();
//!         }
//!         Flow::Continue
//!     }
//!
//!     fn on_response(&self, response: Response, _: &mut ()) -> Flow {
//!         response.set_header("x-team", &self.team);
//!         Flow::Continue
//!     }
//! }
//!
//! let mut proxy = Proxy::<Teams>::new(r#"{"team": "blue"}"#).unwrap();
//! assert_eq!(proxy.send(TestRequest::get("/").header("x-team", "red")).status, 403);
//! let outcome = proxy.send(TestRequest::get("/").header("x-team", "blue"));
//! assert_eq!((outcome.status, outcome.header("x-team")), (200, Some("blue".to_owned())));
//! ```
//!
//! Each feature has an example of its own: whole bodies at [`Plugin::on_request_body`], chunks at
//! [`Plugin::on_request_chunk`], trailers at [`Trailers`], connections without HTTP at [`Plugin::on_connection`], callouts that are awaited at [`Call`] and [`GrpcCall`], timers at
//! [`sleep`] and [`tick_every`], shared data at [`shared`], metrics at [`Counter`], what the proxy knows at [`Properties`],
//! replies at [`Reply`], work beside exchanges at [`spawn`], memory with bounds at [`Cache`].

// The attribute names the crate as plugins see it.
extern crate self as cairn_sdk;

mod abi;
mod cache;
mod call;
mod config;
mod connection;
mod export;
mod grpc;
mod logger;
mod metrics;
mod plugin;
mod properties;
mod reply;
#[doc(hidden)]
pub mod runtime;
pub mod shared;
#[cfg(target_arch = "wasm32")]
#[path = "sys/wasm.rs"]
#[doc(hidden)]
pub mod sys;
#[cfg(not(target_arch = "wasm32"))]
mod sys;
mod task;
#[cfg(not(target_arch = "wasm32"))]
pub mod testing;
mod timer;
mod uri;
mod view;

pub use abi::HostError;
pub use cache::Cache;
pub use cairn_sdk_macros::plugin;
pub use call::{Answer, Call, CallError};
pub use connection::{ClosedBy, Connection, Passage};
pub use grpc::{GrpcCall, GrpcError};
pub use log;
pub use metrics::{Counter, Gauge, Histogram};
pub use plugin::{Flow, Plugin};
pub use properties::{Properties, Workload};
pub use reply::Reply;
pub use task::{join, spawn};
pub use timer::{Elapsed, now, sleep, tick_every, timeout};
pub use uri::{HeaderName, HeaderText, form_decode, percent_decode};
pub use view::{Body, Chunk, Request, Response, Trailers};

/// A random number, good for shares and samples and for no secret.
pub fn random() -> u64 {
    sys::random()
}

/// Calls a foreign function of the proxy by name, such as Envoy's `compress`.
///
/// # Errors
/// [`HostError::NotFound`] where the proxy does not have it.
pub fn call_foreign(name: &str, argument: &[u8]) -> Result<Vec<u8>, HostError> {
    sys::call_foreign(name, argument)
}
