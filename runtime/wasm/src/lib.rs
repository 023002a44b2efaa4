//! Filters in WebAssembly: the proxy-wasm host.
//!
//! An [`Engine`] compiles modules ([`Module`]) and makes filter factories of them, one per plugin. A plugin has one
//! instance per worker; an exchange enters the instance of the worker it lives on, so its lock is never contended, and
//! the guest runs only inside a synchronous call that ends within a deadline. A guest that traps, overruns its deadline or
//! wants too much memory ends with that call: the exchange at hand follows the plugin's fail strategy, and the next one
//! meets a new instance. A plugin that missed a deadline, or is known to be heavy, runs on threads of its own, and exchanges
//! wait for it as they wait for anything else.
//!
//! ABI 0.1.0, 0.2.0 and 0.2.1 are spoken. Heads, bodies, trailers, calls of other services, timers and queues run; a plugin
//! that asks for anything else is told so by a status its SDK survives.

mod abi;
mod bodies;
mod budget;
mod cache;
mod clones;
mod compiler;
mod delivery;
mod engine;
mod error;
mod grpc;
mod heads;
mod host;
mod instance;
mod lease;
mod load;
mod loaded;
mod log;
mod metrics;
mod module;
mod outside;
mod pairs;
mod places;
mod plugin;
mod pool;
mod shadow;
mod shared;
mod snapshot;
mod state;
mod threads;
mod ticker;
mod upstream;

pub use abi::AbiVersion;
pub use cache::{CacheError, CacheSettings};
pub use compiler::{Compiler, compile_if_asked};
pub use engine::{Engine, EngineSettings};
pub use error::PluginError;
pub use loaded::{Loaded, Origin, Started, Version};
pub use module::Module;
pub use places::WorkerPlace;
pub use plugin::{CrashReport, Health};
pub use shadow::ShadowView;
pub use snapshot::SnapshotError;

#[cfg(test)]
mod tests;
