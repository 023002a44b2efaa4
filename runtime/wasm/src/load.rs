//! Compiles modules to machine code and loads it. The one place of this crate with `unsafe` code.
//!
//! An engine's compiler keeps its buffers for the next module, some 10 MiB that a waypoint at rest would hold for ever. So
//! modules are compiled with an engine that exists only for that, and their code is loaded into the one that runs them.

use wasmtime::{Config, Engine, Module};

/// Machine code that this process has compiled. Made only by [`compile`], and never from bytes of another origin.
pub(crate) struct Compiled {
    code: Vec<u8>,
}

/// Compiles a module for engines with this configuration.
pub(crate) fn compile(config: &Config, bytes: &[u8]) -> wasmtime::Result<Compiled> {
    Ok(Compiled { code: Engine::new(config)?.precompile_module(bytes)? })
}

impl Compiled {
    /// Loads the code into an engine; fails if its configuration is another one.
    #[allow(unsafe_code, reason = "the code comes from our own compiler, in this process")]
    pub(crate) fn load(&self, engine: &Engine) -> wasmtime::Result<Module> {
        // SAFETY: a `Compiled` is what wasmtime's compiler returned in this process, and its bytes are private to this
        // module, which does not change them. That it fits the engine's settings and this machine, wasmtime checks.
        unsafe { Module::deserialize(engine, &self.code) }
    }
}
