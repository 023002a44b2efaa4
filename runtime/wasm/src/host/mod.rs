//! The functions that plugins import: `proxy_*` of the module `env`, and WASI.
//!
//! Pointers are the guest's: every one is checked, and results are written only after all of them were. Statuses stay
//! within what the official SDKs survive; where that leaves no honest one, the call traps.

mod buffers;
mod calls;
mod foreign;
mod grpc;
mod headers;
mod log;
mod memory;
mod metrics;
mod properties;
mod shared;
mod stream;
mod timer;
mod wasi;

use crate::state::State;
use wasmtime::{Caller, Linker};

/// The caller of a host function.
type Guest<'a> = Caller<'a, State>;

pub(crate) use foreign::{Declared, Expressions};
pub(crate) use stream::define_resultless;
pub(crate) use wasi::Exit;

/// Defines everything that a module may import.
pub(crate) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    calls::define(linker)?;
    foreign::define(linker)?;
    grpc::define(linker)?;
    log::define(linker)?;
    buffers::define(linker)?;
    headers::define(linker)?;
    metrics::define(linker)?;
    properties::define(linker)?;
    shared::define(linker)?;
    stream::define(linker)?;
    timer::define(linker)?;
    wasi::define(linker)
}
