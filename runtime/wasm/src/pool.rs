//! Where instances for single exchanges come from: an engine that keeps room for them ready, and clears it copy-on-write.

use crate::clones::HostState;
use crate::compiler::{Compiler, EngineKind};
use crate::engine::{Environment, compile_error};
use crate::error::PluginError;
use crate::host;
use crate::load::Compiled;
use crate::loaded::Modules;
use crate::module::{self, Module};
use crate::state::State;
use parking_lot::Mutex;
use std::fmt::Write;
use std::sync::Arc;
use wasmtime::{Enabled, InstanceAllocationStrategy, Linker, PoolingAllocationConfig};

/// The engine of instances for single exchanges.
pub(crate) struct Pool {
    compiler: Compiler,
    engine: wasmtime::Engine,
    linker: Linker<State>,
    modules: Modules,
}

/// How much of an instance's memory stays with the process when the instance is gone, so that the next one need not ask the system
/// for it again: it is cleared page by page, where the system tells which were written to (Linux 6.7).
const RESIDENT_BYTES: usize = 256 << 10;
/// As much of a table.
const TABLE_RESIDENT_BYTES: usize = 64 << 10;

/// The largest table, as for other instances.
const TABLE_ELEMENTS_MAX: usize = 100_000;
/// Tables of all instances, by how many there may be of those; few modules have more than one.
const TABLES_PER_INSTANCE: u32 = 2;

/// The most memory that a plugin may have by its own word, in place of what the engine gives every plugin.
const MEMORY_BYTES_MAX: usize = 1 << 30;

/// Instances that are being cleared at a time: one per worker.
const CLEARING_MAX: u32 = 256;

impl Pool {
    /// Address space for as many instances as there may be at a time. None of it is memory yet.
    pub(crate) fn new(environment: &Environment, turn: Arc<Mutex<()>>) -> Result<Self, PluginError> {
        let settings = &environment.settings;
        let count = u32::try_from(settings.exchange_instances_max).unwrap_or(u32::MAX);
        let mut pool = PoolingAllocationConfig::default();
        // A few more, since an instance is counted as gone a moment before its room is cleared.
        let count = count.saturating_add(CLEARING_MAX);
        pool.total_core_instances(count)
            .total_memories(count)
            .total_tables(count.saturating_mul(TABLES_PER_INSTANCE))
            .max_tables_per_module(TABLES_PER_INSTANCE)
            .table_elements(TABLE_ELEMENTS_MAX)
            .max_memory_size(settings.memory_max.max(MEMORY_BYTES_MAX))
            // The room of the instance that ended last is the next one's, so that as much is resident as was used at a time.
            .max_unused_warm_slots(0);
        if PoolingAllocationConfig::is_pagemap_scan_available() {
            pool.pagemap_scan(Enabled::Yes)
                .linear_memory_keep_resident(RESIDENT_BYTES)
                .table_keep_resident(TABLE_RESIDENT_BYTES);
        }
        let mut pooled = EngineKind::Pooled.config();
        pooled.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
        let engine = wasmtime::Engine::new(&pooled).map_err(compile_error)?;
        environment.ticker.tick_too(engine.weak());
        let mut linker = Linker::new(&engine);
        host::define(&mut linker).map_err(compile_error)?;
        let modules = Modules::new(settings.cache.clone(), &engine, turn)?;
        Ok(Self { compiler: settings.compiler.clone(), engine, linker, modules })
    }

    fn compile(&self, snapshot: &[u8]) -> Result<Compiled, PluginError> {
        let turn = self.modules.turn();
        let _turn = turn.lock();
        self.compiler.compile(EngineKind::Pooled, snapshot)
    }

    /// A snapshot's module, compiled unless it is known. One that no other start comes to is not kept.
    pub(crate) fn load(&self, snapshot: &[u8], host: &HostState) -> Result<Arc<Module>, PluginError> {
        let analyze = |module| module::analyze(module, &self.linker);
        if host.is_unique {
            let compiled = self.compile(snapshot)?;
            return analyze(compiled.load(&self.engine).map_err(compile_error)?).map(Arc::new);
        }
        let digest = digest(snapshot);
        if let Some(found) = self.modules.find(&digest, &self.engine, analyze) {
            return Ok(found.module);
        }
        let compiled = self.compile(snapshot)?;
        let module = self.modules.keep(&digest, compiled, &self.engine)?;
        Ok(self.modules.remember(&digest, analyze(module)?))
    }
}

fn digest(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a text cannot fail.
        let _written = write!(text, "{byte:02x}");
        text
    })
}
