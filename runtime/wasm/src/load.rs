//! Compiles modules to machine code and loads it. The one place of this crate with `unsafe` code.
//!
//! An engine's compiler keeps its buffers for the next module, some 10 MiB that a waypoint at rest would hold for ever. So
//! modules are compiled with an engine that exists only for that, mostly in a process that does ([`crate::compiler`]), and
//! their code is loaded into the one that runs them.

use crate::cache::Kept;
use wasmtime::{Config, Engine, Module};

/// Machine code that this program has compiled. Made only by [`compile`], in this process or in one that it has started, and
/// never from bytes of another origin.
pub(crate) struct Compiled {
    code: Vec<u8>,
}

/// Compiles a module for engines with this configuration.
pub(crate) fn compile(config: &Config, bytes: &[u8]) -> wasmtime::Result<Compiled> {
    Ok(Compiled { code: Engine::new(config)?.precompile_module(bytes)? })
}

impl Compiled {
    /// What a process wrote that this one has started to compile a module, and that ended well.
    pub(crate) fn by_another_process(code: Vec<u8>) -> Self {
        Self { code }
    }

    /// The code, to be kept.
    pub(crate) fn code(&self) -> &[u8] {
        &self.code
    }

    /// Loads the code into an engine; fails if its configuration is another one.
    #[allow(unsafe_code, reason = "the code comes from our own compiler")]
    pub(crate) fn load(&self, engine: &Engine) -> wasmtime::Result<Module> {
        // SAFETY: a `Compiled` is what wasmtime's compiler returned, in this process or in one of the same program that this
        // one started and whose pipe nobody else has, and its bytes are private to this module, which does not change
        // them. That it fits the engine's settings and this machine, wasmtime checks.
        unsafe { Module::deserialize(engine, &self.code) }
    }
}

/// Maps the code of a file into an engine; fails if its configuration is another one.
#[allow(unsafe_code, reason = "the code comes from our own compiler, and whoever kept it had our key")]
pub(crate) fn map(kept: Kept, engine: &Engine) -> wasmtime::Result<Module> {
    // SAFETY: a `Kept` is made only by the cache, which has checked that a process with the key of its directory wrote
    // exactly these bytes, as what wasmtime's compiler returned. Key, file and directory belong to this user, and nobody
    // else may enter the directory, so nobody else can change the file while it is mapped; the cache itself never writes to
    // a file that it has finished.
    unsafe { Module::deserialize_open_file(engine, kept.into_file()) }
}
