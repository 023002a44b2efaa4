//! The plugins of this waypoint: loaded in the background, swapped in when they are ready, kept when their next version
//! is not.

use cairn_filter::Factory;
use cairn_mesh::{ResourceName, WasmPlugin};
use cairn_wasm::{Engine, Module};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Modules up to this size are read (facts: Istio's agent has the same bound).
const MODULE_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Compiled modules kept for other plugins and for later versions of the same configuration.
const MODULES_MAX: usize = 64;

/// Loads finished and not yet taken up.
const FINISHED_MAX: usize = 64;

/// Why a plugin is not running.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its URL is of a kind that cannot be fetched yet.
    #[error("url `{0}` is not a file:// URL; other sources cannot be fetched yet")]
    Scheme(String),
    /// Its module cannot be read.
    #[error("cannot read module {path}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its module is larger than [`MODULE_BYTES_MAX`].
    #[error("module {path} has {bytes} bytes; at most {MODULE_BYTES_MAX} are read")]
    Size {
        /// The file.
        path: String,
        /// How many.
        bytes: u64,
    },
    /// Its module is not the one that was pinned.
    #[error("module has sha256 {actual}, the plugin wants {wanted}")]
    Digest {
        /// What was read.
        actual: String,
        /// What was asked for.
        wanted: Arc<str>,
    },
    /// The module does not start.
    #[error(transparent)]
    Plugin(#[from] cairn_wasm::PluginError),
}

/// How a plugin stands.
#[derive(Clone)]
pub enum Standing {
    /// It runs; if its latest version could not be loaded, this is the one before, with the reason.
    Ready(Arc<dyn Factory>, Option<Arc<str>>),
    /// It is being loaded for the first time.
    Loading,
    /// It could not be loaded, and there is none before.
    Failed(Arc<str>),
}

struct Plugin {
    wanted: Arc<WasmPlugin>,
    standing: Standing,
    loading: bool,
}

/// A load that has ended.
pub struct Finished {
    spec: Arc<WasmPlugin>,
    result: Result<Arc<dyn Factory>, LoadError>,
}

type Modules = Mutex<HashMap<String, Arc<Module>>>;

/// Where sites find plugins.
pub trait PluginSource {
    /// Makes the plugins be `wanted`: new ones and new versions start to load, others are forgotten.
    fn want(&mut self, wanted: &mut dyn Iterator<Item = &Arc<WasmPlugin>>);

    /// How a plugin stands.
    fn standing(&self, name: &ResourceName) -> Standing;
}

/// The plugins of this waypoint, by name.
pub struct Plugins {
    engine: Arc<Engine>,
    modules: Arc<Modules>,
    plugins: HashMap<ResourceName, Plugin>,
    finished: mpsc::Sender<Finished>,
}

impl Plugins {
    /// None yet. Ended loads arrive at the receiver, to be given to [`Plugins::take`].
    pub fn new(engine: Arc<Engine>) -> (Self, mpsc::Receiver<Finished>) {
        let (finished, receiver) = mpsc::channel(FINISHED_MAX);
        (Self { engine, modules: Arc::default(), plugins: HashMap::new(), finished }, receiver)
    }

    /// Whether every plugin has been tried.
    pub fn settled(&self) -> bool {
        self.plugins.values().all(|plugin| !plugin.loading)
    }

    /// All plugins: name, module's URL, and how it stands.
    pub fn list(&self) -> Vec<(String, String, Standing)> {
        let view = |plugin: &Plugin| {
            (plugin.wanted.name.to_string(), plugin.wanted.url.to_string(), plugin.standing.clone())
        };
        let mut list: Vec<_> = self.plugins.values().map(view).collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }

    /// Takes up a load that ended. One of a version that is no longer wanted is dropped.
    pub fn take(&mut self, finished: Finished) {
        let name = &finished.spec.name;
        let Some(plugin) = self.plugins.get_mut(name).filter(|plugin| plugin.wanted == finished.spec) else {
            return;
        };
        plugin.loading = false;
        match finished.result {
            Ok(factory) => {
                tracing::info!(plugin = %name, "plugin ready");
                plugin.standing = Standing::Ready(factory, None);
            }
            Err(error) => {
                let reason: Arc<str> = chain(&error).into();
                tracing::error!(plugin = %name, %reason, "plugin not loaded");
                plugin.standing = match &plugin.standing {
                    Standing::Ready(before, _) => Standing::Ready(Arc::clone(before), Some(reason)),
                    Standing::Loading | Standing::Failed(_) => Standing::Failed(reason),
                };
            }
        }
    }

    fn start_load(&self, spec: Arc<WasmPlugin>) {
        let (engine, modules) = (Arc::clone(&self.engine), Arc::clone(&self.modules));
        let finished = self.finished.clone();
        tokio::task::spawn_blocking(move || {
            let result = load(&engine, &modules, &spec);
            // Nobody listens any more when the waypoint is ending.
            let _ending = finished.blocking_send(Finished { spec, result });
        });
    }
}

impl PluginSource for Plugins {
    fn want(&mut self, wanted: &mut dyn Iterator<Item = &Arc<WasmPlugin>>) {
        let wanted: HashMap<&ResourceName, &Arc<WasmPlugin>> =
            wanted.map(|plugin| (&plugin.name, plugin)).collect();
        self.plugins.retain(|name, _| wanted.contains_key(name));
        for (name, spec) in wanted {
            let known = self.plugins.get_mut(name);
            if known.as_ref().is_some_and(|known| known.wanted == *spec) {
                continue;
            }
            let standing = known.map_or(Standing::Loading, |known| known.standing.clone());
            let standing = if let Standing::Failed(_) = standing { Standing::Loading } else { standing };
            self.plugins.insert(name.clone(), Plugin { wanted: Arc::clone(spec), standing, loading: true });
            self.start_load(Arc::clone(spec));
        }
    }

    fn standing(&self, name: &ResourceName) -> Standing {
        self.plugins.get(name).map_or(Standing::Loading, |plugin| plugin.standing.clone())
    }
}

fn load(engine: &Engine, modules: &Modules, spec: &WasmPlugin) -> Result<Arc<dyn Factory>, LoadError> {
    let path = spec.url.strip_prefix("file://").ok_or_else(|| LoadError::Scheme(spec.url.to_string()))?;
    let read = |source| LoadError::Read { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(read)?.len();
    if bytes > MODULE_BYTES_MAX {
        return Err(LoadError::Size { path: path.to_owned(), bytes });
    }
    let bytes = std::fs::read(Path::new(path)).map_err(read)?;
    let digest = hex(&Sha256::digest(&bytes));
    if let Some(wanted) = spec.sha256.as_ref().filter(|wanted| ***wanted != *digest) {
        return Err(LoadError::Digest { actual: digest, wanted: Arc::clone(wanted) });
    }
    let known = modules.lock().get(&digest).cloned();
    let module = match known {
        Some(module) => module,
        None => {
            let module = engine.compile(&bytes)?;
            let mut modules = modules.lock();
            if modules.len() >= MODULES_MAX {
                modules.clear();
            }
            modules.insert(digest, Arc::clone(&module));
            module
        }
    };
    Ok(engine.factory(module, spec)?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}
