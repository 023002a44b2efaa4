//! A plugin: its instances, one per worker, what happens when one crashes, and where it runs.

mod away;
mod breaker;
mod connection;
mod context;
mod filter;
mod grpc;
mod health;
mod outside;
mod own;

pub(crate) use filter::PluginFactory;
pub use health::{CrashReport, Health};

use crate::budget::{DEADLINE, START_DEADLINE, slow_sampled};
use crate::clones::Clones;
use crate::engine::Environment;
use crate::error::PluginError;
use crate::instance::{Crash, Instance};
use crate::log::LogRate;
use crate::metrics::Limit;
use crate::module::Module;
use crate::shadow::{ShadowFactory, ShadowView};
use crate::state::Facts;
use crate::threads::OwnThreads;
use breaker::Breaker;
use cairn_filter::Factory;
use cairn_mesh::{FailStrategy, PluginKind, PluginMode, WasmPlugin};
use connection::ConnectionPluginFactory;
use health::Crashes;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// One version of one plugin: code and configuration do not change.
pub(crate) struct Plugin {
    module: Arc<Module>,
    facts: Arc<Facts>,
    fail_strategy: FailStrategy,
    /// Whether it is only asked what it would do.
    is_shadow: bool,
    /// Whether it sees the body while it holds the head.
    holds_heads: bool,
    /// How long the slowest start took; decides whether a worker may do the next one itself.
    start_nanos: AtomicU64,
    slots: Box<[Mutex<Slot>]>,
    /// Where exchanges have their own instances from. Those in slots are then for what happens outside of exchanges.
    clones: Option<Clones>,
    /// Where it runs, once that is not on the workers any more: from the start if it is known to be heavy, or else from its
    /// first missed deadline until it is replaced.
    own_threads: OnceLock<OwnThreads>,
    /// Slots that wait for their next instance, for the last ones crashed again and again.
    paused: AtomicUsize,
    crashes: Crashes,
}

/// The place of one instance.
struct Slot {
    instance: Option<Box<Instance>>,
    /// Counts the instances of this place, so that a stream knows whether its own is still there.
    generation: u64,
    breaker: Breaker,
    is_paused: bool,
    /// A thread is starting the next instance.
    starting: bool,
}

/// The longest start that a worker does itself. Anything slower would hold up the worker's other exchanges.
const START_INLINE_MAX: Duration = if cfg!(test) {
    // Tests expect a new instance at once, also where their threads wait for a processor.
    Duration::from_secs(5)
} else {
    Duration::from_millis(5)
};

impl Plugin {
    /// Starts an instance for every worker, or for every thread of its own. The first one decides whether the plugin can be
    /// used at all, and is what `clones` makes others of.
    pub(crate) fn start(
        module: Arc<Module>,
        plugin: &WasmPlugin,
        environment: Arc<Environment>,
        clones: impl FnOnce(&mut Instance) -> Result<Option<Clones>, PluginError>,
    ) -> Result<Arc<Self>, PluginError> {
        let workers = environment.settings.workers.max(1);
        let facts = Arc::new(facts_of(&module, plugin, environment));
        report(&module, &facts);
        let wants_threads = facts.deadline > DEADLINE;
        let own_threads = plugin.limits.own_threads.or(wants_threads.then(|| threads_for(workers)));
        let mut start_nanos = 0;
        let is_shadow = plugin.mode == PluginMode::Shadow;
        let (mut how, mut clones) = (Some(clones), None);
        let mut slots = Vec::new();
        for _ in 0..own_threads.unwrap_or(workers) {
            let started = Instant::now();
            let mut instance = Box::new(Instance::start(&module, &facts, START_DEADLINE)?);
            start_nanos = start_nanos.max(nanos(started.elapsed()));
            facts.counters.starts.fetch_add(1, Ordering::Relaxed);
            if let Some(how) = how.take() {
                clones = how(&mut instance)?;
            }
            slots.push(Mutex::new(Slot::of(instance)));
        }
        let plugin = Arc::new(Self {
            module,
            facts,
            // What does not decide, fails nothing.
            fail_strategy: if is_shadow { FailStrategy::Open } else { plugin.fail_strategy },
            is_shadow,
            holds_heads: plugin.holds_heads,
            start_nanos: AtomicU64::new(start_nanos),
            slots: slots.into_boxed_slice(),
            clones,
            own_threads: OnceLock::new(),
            paused: AtomicUsize::new(0),
            crashes: Crashes::default(),
        });
        if let Some(count) = own_threads {
            plugin.run_on_own_threads(count).map_err(PluginError::Thread)?;
        }
        if plugin.clones.as_ref().is_some_and(Clones::wait_in_vain) {
            let plugin = &plugin.facts.name;
            tracing::warn!(%plugin, "the plugin called others when it was configured: no exchange's instance will know the answers");
        }
        for (worker, slot) in plugin.slots.iter().enumerate() {
            plugin.run_errands(&mut slot.lock(), worker);
        }
        Ok(plugin)
    }

    /// The factory of its filters. Connections have no shadow: a manifest that asks for one is refused.
    pub(crate) fn factory(self: Arc<Self>, kind: PluginKind) -> Arc<dyn Factory> {
        match (kind, self.is_shadow) {
            (PluginKind::Network, _) => Arc::new(ConnectionPluginFactory::new(self)),
            (PluginKind::Http, false) => Arc::new(PluginFactory::new(self)),
            (PluginKind::Http, true) => {
                let facts = Arc::clone(&self.facts);
                let (environment, counters) = (Arc::clone(&facts.environment), Arc::clone(&facts.counters));
                Arc::new(ShadowFactory::new(PluginFactory::new(self), environment, counters))
            }
        }
    }

    /// What it would have done, if it is only asked that.
    pub(crate) fn shadow(&self) -> Option<ShadowView> {
        let counters = &self.facts.counters;
        self.is_shadow.then(|| counters.shadow.view(counters.traps.load(Ordering::Relaxed)))
    }

    fn slot(&self, worker: usize) -> Option<&Mutex<Slot>> {
        // A worker that was not announced shares an instance: slower, not wrong.
        self.slots.get(worker % self.slots.len().max(1))
    }

    /// From now on all guest code runs on threads of the plugin's own.
    fn run_on_own_threads(&self, count: usize) -> std::io::Result<()> {
        if self.own_threads.get().is_some() {
            return Ok(());
        }
        let threads = OwnThreads::start(count, self.slots.len())?;
        if self.own_threads.set(threads).is_ok() {
            self.facts.counters.own_threads.fetch_add(count as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Takes a crashed instance away and, unless it crashes too often, puts a new one in its place.
    fn crashed(self: &Arc<Self>, slot: &mut Slot, worker: usize, crash: &Crash) {
        self.facts.counters.traps.fetch_add(1, Ordering::Relaxed);
        self.crashes.add(crash);
        let wait = slot.breaker.crashed(Instant::now());
        tracing::warn!(
            plugin = %self.facts.name,
            callback = crash.callback,
            reason = %crash.reason,
            backtrace = %crash.backtrace,
            restart_after_ms = wait.as_millis() as u64,
            "the plugin crashed"
        );
        if let Some(instance) = slot.instance.take() {
            instance.wake_all();
        }
        slot.generation += 1;
        if crash.limit == Some(Limit::Deadline) {
            self.missed_deadline();
        }
        if wait.is_zero() {
            self.restart(slot, worker);
        } else {
            self.pause(slot);
        }
    }

    /// A plugin that once took too long may do so again: the workers do not wait for it any more.
    fn missed_deadline(&self) {
        if self.own_threads.get().is_some() {
            return;
        }
        let threads = threads_for(self.slots.len());
        match self.run_on_own_threads(threads) {
            Ok(()) => tracing::warn!(
                plugin = %self.facts.name,
                threads,
                "the plugin missed its deadline: from now on it runs on threads of its own"
            ),
            Err(error) => tracing::error!(
                plugin = %self.facts.name, %error,
                "the plugin missed its deadline, and there is no thread of its own for it to run on"
            ),
        }
    }

    /// Starts a new instance: at once if that is quick, else on a thread of its own.
    fn restart(self: &Arc<Self>, slot: &mut Slot, worker: usize) {
        if self.start_nanos.load(Ordering::Relaxed) <= nanos(START_INLINE_MAX) {
            // It was quick so far. Should it not be this time, whoever waits for it waits as for any call.
            let started = self.start_instance(DEADLINE);
            self.put(slot, started);
            self.run_errands(slot, worker);
            return;
        }
        if slot.starting {
            return;
        }
        let plugin = Arc::clone(self);
        let start = move || {
            let started = plugin.start_instance(START_DEADLINE);
            if let Some(slot) = plugin.slot(worker) {
                let mut slot = slot.lock();
                slot.starting = false;
                plugin.put(&mut slot, started);
                plugin.run_errands(&mut slot, worker);
            }
        };
        match std::thread::Builder::new().name("wasm-start".into()).spawn(start) {
            Ok(_) => slot.starting = true,
            Err(error) => self.put(slot, Err(PluginError::Thread(error))),
        }
    }

    fn start_instance(&self, deadline: Duration) -> Result<Instance, PluginError> {
        let started = Instant::now();
        let instance = Instance::start(&self.module, &self.facts, deadline);
        self.start_nanos.fetch_max(nanos(started.elapsed()), Ordering::Relaxed);
        let instance = instance?;
        self.facts.counters.starts.fetch_add(1, Ordering::Relaxed);
        Ok(instance)
    }

    fn put(&self, slot: &mut Slot, started: Result<Instance, PluginError>) {
        match started {
            Ok(instance) => {
                slot.instance = Some(Box::new(instance));
                self.unpause(slot);
            }
            Err(error) => {
                let wait = slot.breaker.failed_to_start(Instant::now());
                tracing::warn!(plugin = %self.facts.name, %error, retry_after_ms = wait.as_millis() as u64, "the plugin did not restart");
                self.pause(slot);
            }
        }
    }

    fn pause(&self, slot: &mut Slot) {
        if !std::mem::replace(&mut slot.is_paused, true) {
            self.paused.fetch_add(1, Ordering::Relaxed);
            self.facts.counters.paused.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn unpause(&self, slot: &mut Slot) {
        if std::mem::take(&mut slot.is_paused) {
            self.paused.fetch_sub(1, Ordering::Relaxed);
            self.facts.counters.paused.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let threads = self.own_threads.take();
        for (lane, slot) in self.slots.iter_mut().enumerate() {
            let slot = slot.get_mut();
            let (instance, facts) = (slot.instance.take(), Arc::clone(&self.facts));
            if std::mem::take(&mut slot.is_paused) {
                facts.counters.paused.fetch_sub(1, Ordering::Relaxed);
            }
            match (&threads, instance) {
                (Some(threads), Some(instance)) => {
                    threads.push(lane, Box::new(move || shut_down(instance, &facts)));
                }
                (None, Some(instance)) => shut_down(instance, &facts),
                (_, None) => {}
            }
        }
        let count = threads.map_or(0, |threads| threads.count());
        self.facts.counters.own_threads.fetch_sub(count as u64, Ordering::Relaxed);
    }
}

fn shut_down(mut instance: Box<Instance>, facts: &Facts) {
    if let Err(crash) = instance.shut_down() {
        tracing::debug!(plugin = %facts.name, reason = %crash.reason, "the plugin crashed as it ended");
    }
}

/// How many threads of its own a plugin has that does not say: half as many as there are workers.
fn threads_for(workers: usize) -> usize {
    (workers / 2).max(1)
}

fn facts_of(module: &Module, plugin: &WasmPlugin, environment: Arc<Environment>) -> Facts {
    let name: Arc<str> = plugin.name.to_string().into();
    Facts {
        plugin_name: format!("{}.{}", plugin.name.namespace, plugin.name.name),
        scope: Arc::clone(&plugin.name.namespace),
        data_scope: data_scope(plugin),
        abi: module.abi(),
        root_id: Arc::clone(&plugin.plugin_name),
        config: Arc::clone(&plugin.config),
        env: plugin.env.clone(),
        counters: environment.metrics.plugin(&name),
        deadline: plugin.limits.deadline.unwrap_or(DEADLINE),
        memory_max: plugin.limits.memory_bytes_max.unwrap_or(environment.settings.memory_max),
        log_rate: LogRate::default(),
        slow_sampled: slow_sampled(),
        asked_in_vain: Mutex::new(BTreeSet::new()),
        name,
        environment,
    }
}

/// Plugins of a namespace share data. One that decides nothing must not decide for the others in this way.
fn data_scope(plugin: &WasmPlugin) -> Arc<str> {
    match plugin.mode {
        PluginMode::Enforce => Arc::clone(&plugin.name.namespace),
        // No namespace has such a name.
        PluginMode::Shadow => format!("shadow of {}", plugin.name).into(),
    }
}

/// Says once what a module has that will not be used.
fn report(module: &Module, facts: &Facts) {
    if !module.unmet_imports().is_empty() {
        let functions = module.unmet_imports().join(", ");
        tracing::warn!(plugin = %facts.name, %functions, "the module imports functions that this host does not have");
    }
    if !module.uncalled_callbacks().is_empty() {
        let callbacks = module.uncalled_callbacks().join(", ");
        tracing::info!(plugin = %facts.name, %callbacks, "callbacks that are not called yet");
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Slot {
    fn of(instance: Box<Instance>) -> Self {
        Self {
            instance: Some(instance),
            generation: 0,
            breaker: Breaker::default(),
            is_paused: false,
            starting: false,
        }
    }

    /// The instance, started again if its time has come.
    fn ready(&mut self, plugin: &Arc<Plugin>, worker: usize) -> Option<&mut Instance> {
        if self.instance.is_none() && !self.starting && self.breaker.may_start(Instant::now()) {
            plugin.restart(self, worker);
        }
        self.instance.as_deref_mut()
    }
}
