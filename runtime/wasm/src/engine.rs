//! The engine: what all plugins of the process share, and the way from bytes to a filter factory.

use crate::error::PluginError;
use crate::host;
use crate::load;
use crate::metrics::Registry;
use crate::module::{self, Module};
use crate::places::{Places, WorkerPlace};
use crate::plugin::{Plugin, PluginFactory};
use crate::shared::Shared;
use crate::state::State;
use crate::ticker::Ticker;
use cairn_filter::Factory;
use cairn_mesh::WasmPlugin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use wasmtime::{Config, Linker, OptLevel, WasmBacktraceDetails};

/// How plugins run.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// The number of workers, each of which gets an instance of every plugin. Default 1.
    pub workers: usize,
    /// Where plugins of each worker keep timers and call other services from. Default none: a thread of the engine, from
    /// where no service is known.
    pub places: Vec<WorkerPlace>,
    /// The most memory of one instance, in bytes. Default 256 MiB.
    pub memory_max: usize,
    /// The largest module, in bytes. Default 256 MiB, as in Istio's agent.
    pub module_bytes_max: usize,
    /// How long a plugin may hold an exchange that it paused. Default 10 s.
    pub pause_max: Duration,
    /// What plugins are told about this proxy as `xds.node.*` and `node.*`: `id`, `cluster`, `metadata.NAMESPACE` and
    /// so on. Default none.
    pub node: Vec<(String, String)>,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            workers: 1,
            places: Vec::new(),
            memory_max: 256 << 20,
            module_bytes_max: 256 << 20,
            pause_max: Duration::from_secs(10),
            node: Vec::new(),
        }
    }
}

/// What all plugins share. Lives as long as the engine or any plugin.
pub(crate) struct Environment {
    pub(crate) settings: EngineSettings,
    pub(crate) metrics: Registry,
    pub(crate) shared: Shared,
    pub(crate) places: Places,
    pub(crate) ticker: Ticker,
}

/// Compiles modules and starts plugins. One per process.
pub struct Engine {
    config: Config,
    engine: wasmtime::Engine,
    linker: Linker<State>,
    environment: Arc<Environment>,
}

/// The most stack that a guest may use. Workers need that much and what the proxy itself uses.
const STACK_BYTES_MAX: usize = 1 << 20;
/// The stack of the thread that compiles: Cranelift recurses on deeply nested code.
const COMPILER_STACK_BYTES: usize = 8 << 20;

impl Engine {
    /// An engine with its clock running.
    ///
    /// # Errors
    /// When the machine cannot run WebAssembly or start a thread.
    pub fn new(settings: EngineSettings) -> Result<Self, PluginError> {
        let mut config = Config::new();
        config
            .cranelift_opt_level(OptLevel::Speed)
            .epoch_interruption(true)
            .max_wasm_stack(STACK_BYTES_MAX)
            .wasm_backtrace_details(WasmBacktraceDetails::Disable)
            .wasm_memory64(false)
            .wasm_multi_memory(false)
            .native_unwind_info(false)
            .memory_init_cow(true);
        let engine = wasmtime::Engine::new(&config).map_err(compile_error)?;
        let mut linker = Linker::new(&engine);
        host::define(&mut linker).map_err(compile_error)?;
        let ticker = Ticker::start(engine.weak()).map_err(PluginError::Thread)?;
        let places = Places::new(settings.places.clone());
        let environment =
            Environment { settings, metrics: Registry::default(), shared: Shared::default(), places, ticker };
        Ok(Self { config, engine, linker, environment: Arc::new(environment) })
    }

    /// Compiles a module and checks that it is a plugin. Takes as long as the module is large, about 1 s per MiB; call it
    /// where that disturbs nobody. The work happens on a thread and with a compiler of its own,
    /// of which nothing stays.
    ///
    /// # Errors
    /// When it is not a module that this host can run.
    pub fn compile(&self, bytes: &[u8]) -> Result<Arc<Module>, PluginError> {
        let bytes_max = self.environment.settings.module_bytes_max;
        if bytes.len() > bytes_max {
            return Err(PluginError::TooLarge { bytes: bytes.len(), bytes_max });
        }
        let compile = || load::compile(&self.config, bytes).map_err(compile_error);
        let compiled = thread::scope(|scope| {
            let builder = thread::Builder::new().name("wasm-compile".into()).stack_size(COMPILER_STACK_BYTES);
            let thread = builder.spawn_scoped(scope, compile).map_err(PluginError::Thread)?;
            thread.join().unwrap_or_else(|_| Err(PluginError::Compile("the compiler panicked".into())))
        })?;
        let module = compiled.load(&self.engine).map_err(compile_error)?;
        module::analyze(module, &self.linker).map(Arc::new)
    }

    /// Starts a plugin, one instance per worker, and returns the factory of its filters. Runs guest code for up to 10 s
    /// per instance; call it where that disturbs nobody.
    ///
    /// # Errors
    /// When the plugin does not start, or refuses its configuration.
    pub fn factory(&self, module: Arc<Module>, plugin: &WasmPlugin) -> Result<Arc<dyn Factory>, PluginError> {
        let plugin = Plugin::start(module, plugin, Arc::clone(&self.environment))?;
        Ok(Arc::new(PluginFactory::new(plugin)))
    }

    /// What plugins count, and what the host counts about them, in the Prometheus text format.
    pub fn encode_metrics(&self) -> String {
        self.environment.metrics.encode()
    }
}

pub(crate) fn compile_error(error: wasmtime::Error) -> PluginError {
    PluginError::Compile(error.into())
}
