//! The plugins of this waypoint: loaded in the background, swapped in when they are ready, kept when their next version
//! is not.

mod absent;
mod loader;
mod metrics;
mod view;

pub use absent::absent;
pub use loader::{Event, Loader, LoaderSettings};
pub use metrics::encode_metrics;
pub use view::View;

use crate::settings::Startup;
use cairn_fetch::Digest;
use cairn_filter::Factory;
use cairn_mesh::{L7, PullSecret, ResourceName, WasmPlugin};
use cairn_wasm::{Origin, Version};
use loader::Outcome;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// What loaders say and nobody has heard yet.
const EVENTS_MAX: usize = 64;

/// Versions of one plugin that are told of while they drain.
const DRAINING_MAX: usize = 64;

/// How a plugin stands.
#[derive(Clone)]
pub enum Standing {
    /// It runs; if its latest version could not be had, this is the one before, with the reason.
    Ready(Arc<dyn Factory>, Option<Arc<str>>),
    /// It is being loaded for the first time.
    Loading,
    /// It could not be loaded, and there is none before.
    Failed(Arc<str>),
}

/// The version of a plugin that runs.
#[derive(Clone)]
pub struct Running {
    /// Counts the versions of the plugin, from 1.
    pub number: u64,
    /// The module's digest.
    pub digest: Digest,
    /// The digest of the manifest of the image that it came in.
    pub manifest: Option<Digest>,
    /// Where its code came from.
    pub origin: Origin,
    /// How long that took.
    pub module_took: Duration,
    /// How long its instances took to start.
    pub start_took: Duration,
    /// Since when it runs.
    pub since: SystemTime,
    /// Tells whether exchanges are in it.
    pub version: Version,
}

struct Plugin {
    wanted: Arc<WasmPlugin>,
    secret: Option<Arc<PullSecret>>,
    standing: Standing,
    running: Option<Running>,
    /// Versions that exchanges which had begun may still be in.
    draining: Vec<Running>,
    /// The version that is wanted has been tried.
    tried: bool,
    /// When it will be tried again.
    retry: Option<Duration>,
    /// Counts the versions that ran.
    versions: u64,
    loader: AbortHandle,
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.loader.abort();
    }
}

/// Where sites find plugins.
pub trait PluginSource {
    /// Makes the plugins be those of `l7`: new ones and new versions start to load, others are forgotten.
    fn want(&mut self, l7: &L7);

    /// How a plugin stands.
    fn standing(&self, name: &ResourceName) -> Standing;
}

/// The plugins of this waypoint, by name.
pub struct Plugins {
    loader: Arc<Loader>,
    plugins: HashMap<ResourceName, Plugin>,
    events: mpsc::Sender<Event>,
}

impl Plugins {
    /// None yet. What loaders say arrives at the receiver, to be given to [`Plugins::take`].
    pub fn new(loader: Arc<Loader>) -> (Self, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        (Self { loader, plugins: HashMap::new(), events }, receiver)
    }

    /// Whether the waypoint may take traffic, as far as plugins go.
    pub fn settled(&self, startup: Startup) -> bool {
        match startup {
            Startup::Serve => true,
            Startup::Wait => self.plugins.values().all(|plugin| plugin.tried),
            Startup::Require => {
                self.plugins.values().all(|plugin| matches!(plugin.standing, Standing::Ready(..)))
            }
        }
    }

    /// All plugins, in order of their names.
    pub fn list(&mut self) -> Vec<View> {
        for plugin in self.plugins.values_mut() {
            plugin.draining.retain(|old| old.version.is_in_use());
        }
        let mut list: Vec<View> = self.plugins.values().map(View::new).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// Takes up what a loader says. What it says of a version that is no longer wanted is dropped.
    pub fn take(&mut self, event: Event) {
        let name = &event.spec.name;
        let is_wanted = |plugin: &&mut Plugin| Arc::ptr_eq(&plugin.wanted, &event.spec);
        let Some(plugin) = self.plugins.get_mut(name).filter(is_wanted) else { return };
        (plugin.tried, plugin.retry) = (true, event.retry);
        match event.outcome {
            Outcome::Ready(loaded, note) => {
                plugin.versions += 1;
                let running = Running { number: plugin.versions, ..loaded.running };
                tracing::info!(
                    plugin = %name, sha256 = %running.digest, origin = running.origin.as_str(), version = running.number,
                    module_ms = running.module_took.as_millis() as u64, start_ms = running.start_took.as_millis() as u64,
                    "plugin ready"
                );
                plugin.draining.retain(|old| old.version.is_in_use());
                plugin.draining.extend(plugin.running.replace(running));
                let over = plugin.draining.len().saturating_sub(DRAINING_MAX);
                plugin.draining.drain(..over);
                plugin.standing = Standing::Ready(loaded.factory, note);
            }
            Outcome::Unchanged(note) => {
                if let Standing::Ready(_, reason) = &mut plugin.standing {
                    *reason = note;
                }
            }
            Outcome::Failed(reason) => {
                tracing::error!(plugin = %name, %reason, retry = ?event.retry, "plugin not loaded");
                plugin.standing = match &plugin.standing {
                    Standing::Ready(before, _) => Standing::Ready(Arc::clone(before), Some(reason)),
                    Standing::Loading | Standing::Failed(_) => Standing::Failed(reason),
                };
            }
        }
    }

    /// Removes fetched modules that no plugin uses, in the background.
    pub fn purge(&self) {
        let in_use = self.plugins.values().map(|plugin| loader::place(&plugin.wanted)).collect();
        self.loader.purge(in_use);
    }

    fn load(&self, spec: &Arc<WasmPlugin>, secret: Option<&Arc<PullSecret>>) -> AbortHandle {
        let loader = Arc::clone(&self.loader);
        let load = loader.run(Arc::clone(spec), secret.cloned(), self.events.clone());
        tokio::spawn(load).abort_handle()
    }
}

impl PluginSource for Plugins {
    fn want(&mut self, l7: &L7) {
        self.plugins.retain(|name, _| l7.plugins.contains_key(name));
        for (name, spec) in &l7.plugins {
            let secret = spec.pull_secret.as_ref();
            let secret = secret.map(|secret| ResourceName::new(name.namespace.clone(), secret.clone()));
            let secret = secret.and_then(|name| l7.pull_secrets.get(&name));
            let known = self.plugins.get(name);
            if known.is_some_and(|known| known.is_as(spec, secret)) {
                continue;
            }
            let loader = self.load(spec, secret);
            let (wanted, secret) = (Arc::clone(spec), secret.cloned());
            let plugin = match self.plugins.remove(name) {
                Some(mut before) => {
                    before.loader.abort();
                    let standing = match &before.standing {
                        Standing::Failed(_) => Standing::Loading,
                        other => other.clone(),
                    };
                    let running = before.running.take();
                    let (draining, versions) = (std::mem::take(&mut before.draining), before.versions);
                    Plugin {
                        wanted,
                        secret,
                        standing,
                        running,
                        draining,
                        tried: false,
                        retry: None,
                        versions,
                        loader,
                    }
                }
                None => Plugin {
                    wanted,
                    secret,
                    standing: Standing::Loading,
                    running: None,
                    draining: Vec::new(),
                    tried: false,
                    retry: None,
                    versions: 0,
                    loader,
                },
            };
            self.plugins.insert(name.clone(), plugin);
        }
    }

    fn standing(&self, name: &ResourceName) -> Standing {
        self.plugins.get(name).map_or(Standing::Loading, |plugin| plugin.standing.clone())
    }
}

impl Plugin {
    /// Whether there is nothing to load: it is what is wanted, and what another secret could open has been had.
    fn is_as(&self, spec: &Arc<WasmPlugin>, secret: Option<&Arc<PullSecret>>) -> bool {
        let is_had = matches!(self.standing, Standing::Ready(_, None));
        self.wanted == *spec && (is_had || self.secret.as_ref() == secret)
    }
}

#[cfg(test)]
#[path = "plugins/tests.rs"]
mod tests;
