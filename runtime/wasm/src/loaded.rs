//! From a digest to a module: the one in use, the one on disk, or a new one from the compiler; and what that took.

use crate::cache::{Cache, CacheError, CacheSettings};
use crate::engine::compile_error;
use crate::error::PluginError;
use crate::load::{self, Compiled};
use crate::module::Module;
use crate::plugin::{Health, Plugin};
use crate::shadow::ShadowView;
use cairn_filter::Factory;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// A module, and where it came from.
pub struct Loaded {
    /// The module.
    pub module: Arc<Module>,
    /// Where it came from.
    pub origin: Origin,
    /// How long it took to get it from there.
    pub took: Duration,
}

/// Where a module came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Another plugin, or another version of this one, runs it.
    Shared,
    /// It had been compiled before, and kept on disk.
    Disk,
    /// It was compiled.
    Compiled,
}

impl Origin {
    /// The word for it in metrics and on the admin port.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Disk => "disk",
            Self::Compiled => "compiled",
        }
    }
}

/// A plugin that has been started.
pub struct Started {
    /// Makes its filters.
    pub factory: Arc<dyn Factory>,
    /// Tells whether any of them is left.
    pub version: Version,
}

/// One version of one plugin, for as long as exchanges are in it.
#[derive(Clone)]
pub struct Version(pub(crate) Weak<Plugin>);

impl Version {
    /// Whether anything still uses it: a chain, or an exchange that has begun with it.
    pub fn is_in_use(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// How it does; `None` when nothing uses it any more.
    pub fn health(&self) -> Option<Health> {
        self.0.upgrade().map(|plugin| plugin.health())
    }

    /// What the plugin would have done, if it is only asked that: over all its versions, as long as this one is in use.
    pub fn shadow(&self) -> Option<ShadowView> {
        self.0.upgrade()?.shadow()
    }
}

/// The modules of an engine.
pub(crate) struct Modules {
    cache: Option<Cache>,
    in_use: Mutex<HashMap<String, Weak<Module>>>,
    /// One module is compiled at a time, over all engines of the process.
    turn: Arc<Mutex<()>>,
    shared: AtomicU64,
    disk: AtomicU64,
    compiled: AtomicU64,
    failed: AtomicU64,
    compile_nanos: AtomicU64,
}

impl Modules {
    pub(crate) fn new(
        cache: Option<CacheSettings>,
        engine: &wasmtime::Engine,
        turn: Arc<Mutex<()>>,
    ) -> Result<Self, CacheError> {
        let zero = || AtomicU64::new(0);
        Ok(Self {
            cache: cache.map(|settings| Cache::open(settings, engine)).transpose()?,
            in_use: Mutex::default(),
            turn,
            shared: zero(),
            disk: zero(),
            compiled: zero(),
            failed: zero(),
            compile_nanos: zero(),
        })
    }

    /// The module of this digest, if it is in use or on disk. `analyze` makes one of wasmtime's ours.
    pub(crate) fn find(
        &self,
        digest: &str,
        engine: &wasmtime::Engine,
        analyze: impl FnOnce(wasmtime::Module) -> Result<Module, PluginError>,
    ) -> Option<Loaded> {
        let start = Instant::now();
        if let Some(module) = self.in_use.lock().get(digest).and_then(Weak::upgrade) {
            self.shared.fetch_add(1, Ordering::Relaxed);
            return Some(Loaded { module, origin: Origin::Shared, took: start.elapsed() });
        }
        let cache = self.cache.as_ref()?;
        let mapped = load::map(cache.find(digest)?, engine).map_err(compile_error);
        match mapped.and_then(analyze) {
            Ok(module) => {
                self.disk.fetch_add(1, Ordering::Relaxed);
                let module = self.remember(digest, module);
                Some(Loaded { module, origin: Origin::Disk, took: start.elapsed() })
            }
            Err(error) => {
                tracing::warn!(digest, %error, "compiled module does not fit, and is compiled again");
                cache.remove(digest);
                None
            }
        }
    }

    /// What whoever compiles holds.
    pub(crate) fn turn(&self) -> Arc<Mutex<()>> {
        Arc::clone(&self.turn)
    }

    pub(crate) fn has(&self, digest: &str) -> bool {
        let in_use = || self.in_use.lock().get(digest).is_some_and(|module| module.strong_count() > 0);
        in_use() || self.cache.as_ref().is_some_and(|cache| cache.has(digest))
    }

    /// Waits for its turn, then runs `compile` unless somebody else has done it meanwhile (`again` finds that).
    pub(crate) fn compile(
        &self,
        again: impl FnOnce() -> Option<Loaded>,
        compile: impl FnOnce() -> Result<Loaded, PluginError>,
    ) -> Result<Loaded, PluginError> {
        let _turn = self.turn.lock();
        if let Some(loaded) = again() {
            return Ok(loaded);
        }
        let start = Instant::now();
        let compiled = compile();
        let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.compile_nanos.fetch_add(nanos, Ordering::Relaxed);
        let count = if compiled.is_ok() { &self.compiled } else { &self.failed };
        count.fetch_add(1, Ordering::Relaxed);
        compiled
    }

    /// Keeps the code on disk, and maps it from there: pages of a file are shared, and given back when memory is short.
    pub(crate) fn keep(
        &self,
        digest: &str,
        compiled: Compiled,
        engine: &wasmtime::Engine,
    ) -> Result<wasmtime::Module, PluginError> {
        if let Some(cache) = &self.cache {
            match cache.keep(digest, compiled.code()) {
                Ok(()) => {
                    if let Some(Ok(module)) = cache.find(digest).map(|kept| load::map(kept, engine)) {
                        return Ok(module);
                    }
                }
                Err(error) => tracing::warn!(digest, %error, "compiled module not kept"),
            }
        }
        compiled.load(engine).map_err(compile_error)
    }

    pub(crate) fn remember(&self, digest: &str, module: Module) -> Arc<Module> {
        let module = Arc::new(module);
        let mut in_use = self.in_use.lock();
        in_use.retain(|_, module| module.strong_count() > 0);
        in_use.insert(digest.to_owned(), Arc::downgrade(&module));
        module
    }

    /// In the Prometheus text format.
    pub(crate) fn encode(&self, text: &mut String) {
        let mut family = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
            // Writing to a text cannot fail.
            let _written = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            for (labels, value) in samples {
                let _written = writeln!(text, "{name}{labels} {value}");
            }
        };
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
        let loads = [
            ("{origin=\"shared\"}", count(&self.shared)),
            ("{origin=\"disk\"}", count(&self.disk)),
            ("{origin=\"compiled\"}", count(&self.compiled)),
        ];
        family(
            "cairn_wasm_modules_loaded_total",
            "counter",
            "Modules loaded, by where they came from.",
            &loads,
        );
        let failed = [("", count(&self.failed))];
        family("cairn_wasm_compile_failures_total", "counter", "Modules that did not compile.", &failed);
        let seconds = [("", count(&self.compile_nanos) / 1e9)];
        family("cairn_wasm_compile_seconds_total", "counter", "Time spent compiling.", &seconds);
        if let Some(cache) = &self.cache {
            let (modules, bytes) = cache.size();
            let modules = [("", modules as f64)];
            family("cairn_wasm_cache_modules", "gauge", "Compiled modules kept on disk.", &modules);
            family("cairn_wasm_cache_bytes", "gauge", "Their bytes.", &[("", bytes as f64)]);
        }
    }
}
