//! Loading one plugin: its module is pulled, compiled or found compiled, and started, all where no traffic waits for it; and
//! what could not be had is tried again until it can.

use super::Running;
use crate::chain;
use cairn_fetch::{
    Asking, Backoff, Credentials, CredentialsError, Digest, FetchError, Pulled, Puller, Source, Store,
    Wanted, kept_as,
};
use cairn_filter::Factory;
use cairn_mesh::{Isolation, PullPolicy, PullSecret, WasmPlugin};
use cairn_wasm::{Engine, PluginError, Started};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// The wait before the second try; it doubles up to the other.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(300);

/// Plugins that are compiled or started at the same time. One that takes long to start does not hold up all others.
const LOADS_MAX: usize = 4;

/// How much starting a plugin gives way to the workers.
const NICENESS: i32 = 10;

/// Why a plugin is not running.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its module cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// Its pull secret is damaged.
    #[error("its pull secret cannot be read")]
    Secret(#[source] CredentialsError),
    /// It asks for something of the proxy's own environment that it may not have.
    #[error(
        "the environment variable `{0}` of the proxy is not among those that the operator lets plugins have"
    )]
    Environment(Arc<str>),
    /// The module does not start.
    #[error(transparent)]
    Plugin(#[from] PluginError),
    /// What was there a moment ago is not any more.
    #[error("the module was removed while it was being loaded")]
    Gone,
    /// The thread that loads it cannot be started, or broke.
    #[error("no thread to load it on")]
    Thread,
}

impl LoadError {
    /// Whether another try may end otherwise: a module that does not compile never does, a registry may mend.
    fn may_pass(&self) -> bool {
        match self {
            Self::Plugin(PluginError::CompilerEnded { .. }) => true,
            Self::Fetch(FetchError::Source(_)) | Self::Secret(_) | Self::Environment(_) | Self::Plugin(_) => {
                false
            }
            Self::Fetch(_) | Self::Gone | Self::Thread => true,
        }
    }
}

/// A plugin that has been started.
pub struct Loaded {
    pub(super) running: Running,
    pub(super) factory: Arc<dyn Factory>,
}

/// What became of a try.
pub(super) enum Outcome {
    /// A version runs; with a note, it is not certain to be the latest.
    Ready(Box<Loaded>, Option<Arc<str>>),
    /// What runs is still what is wanted; with a note, that is not certain.
    Unchanged(Option<Arc<str>>),
    Failed(Arc<str>),
}

/// What a loader says.
pub struct Event {
    pub(super) spec: Arc<WasmPlugin>,
    pub(super) outcome: Outcome,
    /// When it tries again, if it does.
    pub(super) retry: Option<Duration>,
}

/// What plugins are loaded with.
#[derive(Debug, Default)]
pub struct LoaderSettings {
    /// Who registries are told that we are by plugins that name no secret.
    pub credentials: Credentials,
    /// Variables of the proxy's environment that plugins may have.
    pub environment: BTreeMap<String, String>,
}

/// Loads plugins.
pub struct Loader {
    engine: Arc<Engine>,
    store: Arc<Store>,
    /// Fetches modules.
    pub puller: Puller,
    settings: LoaderSettings,
    loads: Arc<Semaphore>,
}

impl Loader {
    /// Loads into `engine` what `puller` keeps in `store`.
    pub fn new(engine: Arc<Engine>, puller: Puller, store: Arc<Store>, settings: LoaderSettings) -> Self {
        Self { engine, store, puller, settings, loads: Arc::new(Semaphore::new(LOADS_MAX)) }
    }

    /// Loads a plugin and says what became of it, until there is nothing more to try.
    pub(super) async fn run(
        self: Arc<Self>,
        spec: Arc<WasmPlugin>,
        secret: Option<Arc<PullSecret>>,
        events: mpsc::Sender<Event>,
    ) {
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        let mut running = None;
        loop {
            let (outcome, again) = match self.load(&spec, secret.as_deref(), running).await {
                Ok((loaded, stale)) => {
                    let note = stale.as_ref().map(outdated);
                    running = loaded.as_ref().map(|loaded| loaded.running.digest).or(running);
                    let outcome = match loaded {
                        Some(loaded) => Outcome::Ready(loaded, note),
                        None => Outcome::Unchanged(note),
                    };
                    (outcome, stale.is_some())
                }
                Err(error) => (Outcome::Failed(chain(&error).into()), error.may_pass()),
            };
            let retry = again.then(|| backoff.pause());
            // Nobody listens any more when the waypoint is ending.
            if events.send(Event { spec: Arc::clone(&spec), outcome, retry }).await.is_err() {
                return;
            }
            let Some(pause) = retry else { return };
            tokio::time::sleep(pause).await;
        }
    }

    /// One try. Nothing is loaded when what is to be had is what runs already.
    async fn load(
        &self,
        spec: &Arc<WasmPlugin>,
        secret: Option<&PullSecret>,
        running: Option<Digest>,
    ) -> Result<(Option<Box<Loaded>>, Option<FetchError>), LoadError> {
        let wanted = self.wanted(spec, secret)?;
        let asking = asking(spec, &wanted.source);
        let engine = &self.engine;
        let is_isolated = spec.isolation == Isolation::Exchange;
        let has_code = |digest: Digest| !is_isolated && engine.has(&digest.to_string());
        let needless = |digest: Digest| running == Some(digest) || has_code(digest);
        let mut pulled = self.puller.pull(&name(spec), &wanted, asking, &needless).await?;
        let stale = pulled.stale.take();
        if running == Some(pulled.digest) {
            return Ok((None, stale));
        }
        let spec = self.with_environment(spec)?;
        let turn = Arc::clone(&self.loads).acquire_owned().await.map_err(|_| LoadError::Thread)?;
        let (engine, store) = (Arc::clone(&self.engine), Arc::clone(&self.store));
        let loaded = apart(move || {
            let loaded = start(&engine, &store, pulled, &spec);
            drop(turn);
            loaded
        });
        Ok((Some(Box::new(loaded.await?)), stale))
    }

    fn wanted(&self, spec: &WasmPlugin, secret: Option<&PullSecret>) -> Result<Wanted, LoadError> {
        let source = Source::parse(&spec.url).map_err(FetchError::Source)?;
        let pinned = pinned(spec);
        let credentials = match (&spec.pull_secret, secret) {
            (Some(_), Some(secret)) => {
                Credentials::parse(secret.config.as_bytes()).map_err(LoadError::Secret)?
            }
            // The secret that it names is not there: the registry is asked as nobody, and says so.
            (Some(_), None) => Credentials::default(),
            (None, _) => self.settings.credentials.clone(),
        };
        Ok(Wanted { source, pinned, credentials })
    }

    /// The plugin with what it may have of the proxy's environment.
    fn with_environment(&self, spec: &Arc<WasmPlugin>) -> Result<Arc<WasmPlugin>, LoadError> {
        if spec.host_env.is_empty() {
            return Ok(Arc::clone(spec));
        }
        let mut spec = WasmPlugin::clone(spec);
        for name in &spec.host_env {
            let Some(value) = self.settings.environment.get(&**name) else {
                return Err(LoadError::Environment(Arc::clone(name)));
            };
            spec.env.push((Arc::clone(name), value.as_str().into()));
        }
        Ok(Arc::new(spec))
    }

    /// Removes fetched modules that none of these names uses, in the background.
    pub(super) fn purge(&self, in_use: BTreeSet<String>) {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || {
            let in_use = in_use.iter().map(String::as_str).collect();
            if let Err(error) = store.purge(&in_use, SystemTime::now()) {
                tracing::warn!(error = %chain(&error), "fetched modules are not tidied");
            }
        });
    }
}

/// What a plugin's module is kept as.
pub(super) fn place(spec: &WasmPlugin) -> String {
    kept_as(&name(spec), pinned(spec))
}

fn pinned(spec: &WasmPlugin) -> Option<Digest> {
    spec.sha256.as_deref().and_then(Digest::parse)
}

/// Where a plugin's module is from: what a secret opened is not for those who do not have it.
fn name(spec: &WasmPlugin) -> String {
    match &spec.pull_secret {
        Some(secret) => format!("{} for {}/{secret}", spec.url, spec.name.namespace),
        None => spec.url.to_string(),
    }
}

/// Whether the registry is asked again. Unless the plugin says, what may change by itself is asked for.
fn asking(spec: &WasmPlugin, source: &Source) -> Asking {
    match (spec.pull_policy, source) {
        (Some(PullPolicy::Always), _) => Asking::Always,
        (None, Source::Oci(reference)) if reference.is_latest() => Asking::Always,
        (Some(PullPolicy::IfNotPresent) | None, _) => Asking::IfNotPresent,
    }
}

fn outdated(error: &FetchError) -> Arc<str> {
    format!("it is what was last fetched, for nobody could be asked: {}", chain(error)).into()
}

fn start(engine: &Engine, store: &Store, pulled: Pulled, spec: &WasmPlugin) -> Result<Loaded, LoadError> {
    let Pulled { digest, manifest, bytes, .. } = pulled;
    if spec.isolation == Isolation::Exchange {
        // Its module is written anew with what it keeps, whether or not its code is known.
        let bytes = bytes.or_else(|| store.bytes(digest)).ok_or(LoadError::Gone)?;
        let begun = Instant::now();
        let (loaded, started) = engine.start_isolated(&digest.to_string(), &bytes, spec)?;
        let start_took = begun.elapsed().saturating_sub(loaded.took);
        return Ok(running(digest, manifest, &loaded, started, start_took));
    }
    let known = engine.find(&digest.to_string());
    let loaded = match known {
        Some(loaded) => loaded,
        None => {
            let bytes = bytes.or_else(|| store.bytes(digest)).ok_or(LoadError::Gone)?;
            engine.load(&digest.to_string(), &bytes)?
        }
    };
    let begun = Instant::now();
    let started = engine.start(Arc::clone(&loaded.module), spec)?;
    Ok(running(digest, manifest, &loaded, started, begun.elapsed()))
}

fn running(
    digest: Digest,
    manifest: Option<Digest>,
    module: &cairn_wasm::Loaded,
    started: Started,
    start_took: Duration,
) -> Loaded {
    let running = Running {
        number: 0,
        digest,
        manifest,
        origin: module.origin,
        module_took: module.took,
        start_took,
        since: SystemTime::now(),
        version: started.version,
    };
    Loaded { running, factory: started.factory }
}

/// Runs on a thread of its own, which gives way to all that serve traffic.
async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LoadError> + Send + 'static,
) -> Result<T, LoadError> {
    let (done, result) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let run = move || {
        let _runtime = runtime.enter();
        // Of this thread alone, on Linux. Where it is not allowed, loading is as important as all else.
        let _polite = rustix::process::setpriority_process(None, NICENESS);
        // Nobody waits any more when another version is wanted.
        let _late = done.send(work());
    };
    std::thread::Builder::new().name("wasm-load".into()).spawn(run).map_err(|_| LoadError::Thread)?;
    result.await.unwrap_or(Err(LoadError::Thread))
}
