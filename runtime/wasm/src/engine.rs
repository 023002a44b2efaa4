//! The engine: what all plugins of the process share, and the way from bytes to a filter factory.

use crate::cache::CacheSettings;
use crate::clones::Clones;
use crate::compiler::{Compiler, EngineKind};
use crate::error::PluginError;
use crate::host;
use crate::instance::Instance;
use crate::lease::Leases;
use crate::load::Compiled;
use crate::loaded::{Loaded, Modules, Origin, Started, Version};
use crate::metrics::Registry;
use crate::module::{self, Module};
use crate::places::{Places, WorkerPlace};
use crate::plugin::Plugin;
use crate::pool::Pool;
use crate::shared::Shared;
use crate::snapshot;
use crate::state::State;
use crate::ticker::Ticker;
use cairn_filter::Factory;
use cairn_mesh::{PluginKind, WasmPlugin};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wasmtime::Linker;

/// How plugins run.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// The number of workers, each of which gets an instance of every plugin. Default 1.
    pub workers: usize,
    /// Where plugins of each worker keep timers and call other services from. Default none: a thread of the engine, from
    /// where no service is known.
    pub places: Vec<WorkerPlace>,
    /// The most memory of one instance, in bytes, unless its plugin says otherwise. Default 256 MiB.
    pub memory_max: usize,
    /// The largest module, in bytes. Default 256 MiB, as in Istio's agent.
    pub module_bytes_max: usize,
    /// The most exchanges at a time that have an instance of their own, over all plugins that want that. Default 1000.
    pub exchange_instances_max: usize,
    /// The most memory in bytes that all those instances together may have, what they begin with included. Default 2 GiB.
    pub exchange_memory_max: usize,
    /// How long a plugin may hold an exchange that it paused. Default 10 s.
    pub pause_max: Duration,
    /// Where modules are compiled. Default: in this process.
    pub compiler: Compiler,
    /// Where compiled modules are kept. Default nowhere: each is compiled again when the process starts again.
    pub cache: Option<CacheSettings>,
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
            exchange_instances_max: 1000,
            exchange_memory_max: 2 << 30,
            pause_max: Duration::from_secs(10),
            compiler: Compiler::Here,
            cache: None,
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
    pub(crate) leases: Arc<Leases>,
}

/// Compiles modules and starts plugins. One per process.
pub struct Engine {
    engine: wasmtime::Engine,
    linker: Linker<State>,
    environment: Arc<Environment>,
    modules: Modules,
    /// Where instances for single exchanges come from, once a plugin wants them.
    pool: Mutex<Option<Arc<Pool>>>,
}

impl Engine {
    /// An engine with its clock running.
    ///
    /// # Errors
    /// When the machine cannot run WebAssembly or start a thread.
    pub fn new(settings: EngineSettings) -> Result<Self, PluginError> {
        let engine = wasmtime::Engine::new(&EngineKind::Lasting.config()).map_err(compile_error)?;
        let mut linker = Linker::new(&engine);
        host::define(&mut linker).map_err(compile_error)?;
        let ticker = Ticker::start(engine.weak()).map_err(PluginError::Thread)?;
        let modules = Modules::new(settings.cache.clone(), &engine, Arc::default())?;
        let places = Places::new(settings.places.clone());
        let leases = Arc::new(Leases::new(settings.exchange_instances_max, settings.exchange_memory_max));
        let environment = Environment {
            settings,
            metrics: Registry::default(),
            shared: Shared::default(),
            places,
            ticker,
            leases,
        };
        let (environment, pool) = (Arc::new(environment), Mutex::new(None));
        Ok(Self { engine, linker, environment, modules, pool })
    }

    /// Compiles a module and checks that it is a plugin. Takes as long as the module is large, about 1 s per MiB; call it
    /// where that disturbs nobody. The work happens on a thread or in a process of its own ([`EngineSettings::compiler`]), of
    /// which nothing stays.
    ///
    /// # Errors
    /// When it is not a module that this host can run.
    pub fn compile(&self, bytes: &[u8]) -> Result<Arc<Module>, PluginError> {
        self.check_size(bytes)?;
        let compiled = self.compile_bytes(bytes)?;
        let module = compiled.load(&self.engine).map_err(compile_error)?;
        module::analyze(module, &self.linker).map(Arc::new)
    }

    /// The module whose bytes have this SHA-256, if another plugin runs it or it has been compiled before and kept. Reads
    /// files; call it where that disturbs nobody.
    pub fn find(&self, digest: &str) -> Option<Loaded> {
        self.modules.find(digest, &self.engine, |module| module::analyze(module, &self.linker))
    }

    /// Whether [`Engine::find`] will most likely find it.
    pub fn has(&self, digest: &str) -> bool {
        self.modules.has(digest)
    }

    /// The module of `bytes`, whose SHA-256 is `digest`: as [`Engine::find`] finds it, else compiled, one at a time, and
    /// kept.
    ///
    /// # Errors
    /// When it is not a module that this host can run.
    pub fn load(&self, digest: &str, bytes: &[u8]) -> Result<Loaded, PluginError> {
        self.check_size(bytes)?;
        let compile = || {
            let start = Instant::now();
            let compiled = self.compile_bytes(bytes)?;
            let module = self.modules.keep(digest, compiled, &self.engine)?;
            let module = module::analyze(module, &self.linker)?;
            let module = self.modules.remember(digest, module);
            Ok(Loaded { module, origin: Origin::Compiled, took: start.elapsed() })
        };
        self.find(digest).map_or_else(|| self.modules.compile(|| self.find(digest), compile), Ok)
    }

    fn compile_bytes(&self, bytes: &[u8]) -> Result<Compiled, PluginError> {
        self.environment.settings.compiler.compile(EngineKind::Lasting, bytes)
    }

    fn check_size(&self, bytes: &[u8]) -> Result<(), PluginError> {
        let bytes_max = self.environment.settings.module_bytes_max;
        if bytes.len() > bytes_max {
            return Err(PluginError::TooLarge { bytes: bytes.len(), bytes_max });
        }
        Ok(())
    }

    /// Starts a plugin, one instance per worker, and returns the factory of its filters. Runs guest code for up to 10 s
    /// per instance; call it where that disturbs nobody.
    ///
    /// # Errors
    /// When the plugin does not start, or refuses its configuration.
    pub fn factory(&self, module: Arc<Module>, plugin: &WasmPlugin) -> Result<Arc<dyn Factory>, PluginError> {
        self.start(module, plugin).map(|started| started.factory)
    }

    /// The same, and tells for how long it is in use.
    ///
    /// # Errors
    /// As [`Engine::factory`].
    pub fn start(&self, module: Arc<Module>, plugin: &WasmPlugin) -> Result<Started, PluginError> {
        let kind = plugin.kind;
        let plugin = Plugin::start(module, plugin, Arc::clone(&self.environment), |_| Ok(None))?;
        Ok(started(plugin, kind))
    }

    /// Starts a plugin of which every exchange meets an instance of its own, as the plugin is when it has been configured,
    /// whatever `plugin` says of that. The module of `bytes`, whose SHA-256 is `digest`, is compiled twice: so that one can
    /// look into its instances, and with what was found there, unless that is known from before.
    ///
    /// # Errors
    /// As [`Engine::load`] and [`Engine::factory`], and when a snapshot would not hold all that the plugin keeps.
    pub fn start_isolated(
        &self,
        digest: &str,
        bytes: &[u8],
        plugin: &WasmPlugin,
    ) -> Result<(Loaded, Started), PluginError> {
        self.check_size(bytes)?;
        let opened = snapshot::open(bytes)?;
        let loaded = self.load(&format!("{digest}-open"), &opened.module)?;
        let clones = |root: &mut Instance| -> Result<Option<Clones>, PluginError> {
            let pool = self.pool()?;
            let (snapshot, host) = root.frozen(&opened)?;
            Ok(Some(Clones::new(pool.load(&snapshot, &host)?, host)))
        };
        let (module, kind) = (Arc::clone(&loaded.module), plugin.kind);
        let plugin = Plugin::start(module, plugin, Arc::clone(&self.environment), clones)?;
        Ok((loaded, started(plugin, kind)))
    }

    fn pool(&self) -> Result<Arc<Pool>, PluginError> {
        let mut pool = self.pool.lock();
        if let Some(pool) = &*pool {
            return Ok(Arc::clone(pool));
        }
        let new = Arc::new(Pool::new(&self.environment, self.modules.turn())?);
        Ok(Arc::clone(pool.insert(new)))
    }

    /// What plugins count, and what the host counts about them, in the Prometheus text format.
    pub fn encode_metrics(&self) -> String {
        let mut text = self.environment.metrics.encode();
        self.modules.encode(&mut text);
        self.environment.leases.encode(&mut text);
        text
    }
}

fn started(plugin: Arc<Plugin>, kind: PluginKind) -> Started {
    let version = Version(Arc::downgrade(&plugin));
    Started { factory: plugin.factory(kind), version }
}

pub(crate) fn compile_error(error: wasmtime::Error) -> PluginError {
    PluginError::Compile(error.into())
}
