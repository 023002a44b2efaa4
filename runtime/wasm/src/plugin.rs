//! A plugin as a filter: its instances, one per worker, what happens when one crashes, and the life of one exchange.

mod connection;
mod grpc;
mod outside;

pub(crate) use connection::ConnectionPluginFactory;

use crate::bodies::Bodies;
use crate::engine::Environment;
use crate::error::PluginError;
use crate::instance::{Crash, Instance, Outcome, Phase};
use crate::module::Module;
use crate::state::{Facts, number_of};
use cairn_filter::{
    Exchange, Factory, Filter, Hold, LocalReply, Part, Phases, RequestHead, ResponseHead, Side, Until,
    Verdict, append,
};
use cairn_mesh::{FailStrategy, WasmPlugin};
use http::StatusCode;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// One version of one plugin: code and configuration do not change.
pub(crate) struct Plugin {
    module: Arc<Module>,
    facts: Arc<Facts>,
    fail_strategy: FailStrategy,
    /// Whether it sees the body while it holds the head.
    holds_heads: bool,
    /// How long the slowest start took; decides whether a worker may do the next one itself.
    start_nanos: AtomicU64,
    workers: Box<[Mutex<Slot>]>,
}

/// The place of one worker's instance.
struct Slot {
    instance: Option<Box<Instance>>,
    /// Counts the instances of this place, so that a stream knows whether its own is still there.
    generation: u64,
    breaker: Breaker,
    /// A thread is starting the next instance.
    starting: bool,
}

/// The longest start that a worker does itself. Anything slower would hold up the worker's other exchanges.
const START_INLINE_MAX: Duration = Duration::from_millis(5);

impl Plugin {
    /// Starts an instance for every worker. The first one decides whether the plugin can be used at all.
    pub(crate) fn start(
        module: Arc<Module>,
        plugin: &WasmPlugin,
        environment: Arc<Environment>,
    ) -> Result<Arc<Self>, PluginError> {
        let name: Arc<str> = plugin.name.to_string().into();
        let facts = Facts {
            plugin_name: format!("{}.{}", plugin.name.namespace, plugin.name.name),
            scope: Arc::clone(&plugin.name.namespace),
            abi: module.abi(),
            root_id: Arc::clone(&plugin.plugin_name),
            config: Arc::clone(&plugin.config),
            env: plugin.env.clone(),
            counters: environment.metrics.plugin(&name),
            asked_in_vain: Mutex::new(BTreeSet::new()),
            name,
            environment,
        };
        report(&module, &facts);
        let facts = Arc::new(facts);
        let mut start_nanos = 0;
        let mut slots = Vec::new();
        for _ in 0..facts.environment.settings.workers.max(1) {
            let started = Instant::now();
            let instance = Box::new(Instance::start(&module, &facts)?);
            start_nanos = start_nanos.max(nanos(started.elapsed()));
            facts.counters.starts.fetch_add(1, Ordering::Relaxed);
            let breaker = Breaker::default();
            slots.push(Mutex::new(Slot {
                instance: Some(instance),
                generation: 0,
                breaker,
                starting: false,
            }));
        }
        let plugin = Arc::new(Self {
            module,
            facts,
            fail_strategy: plugin.fail_strategy,
            holds_heads: plugin.holds_heads,
            start_nanos: AtomicU64::new(start_nanos),
            workers: slots.into_boxed_slice(),
        });
        for (worker, slot) in plugin.workers.iter().enumerate() {
            plugin.run_errands(&mut slot.lock(), worker);
        }
        Ok(plugin)
    }

    fn slot(&self, worker: usize) -> Option<&Mutex<Slot>> {
        // A worker that was not announced shares an instance: slower, not wrong.
        self.workers.get(worker % self.workers.len().max(1))
    }

    /// Takes a crashed instance away and, unless it crashes too often, puts a new one in its place.
    fn crashed(self: &Arc<Self>, slot: &mut Slot, worker: usize, crash: &Crash) {
        self.facts.counters.traps.fetch_add(1, Ordering::Relaxed);
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
        if wait.is_zero() {
            self.restart(slot, worker);
        }
    }

    /// Starts a new instance: at once if that is quick, else on a thread of its own.
    fn restart(self: &Arc<Self>, slot: &mut Slot, worker: usize) {
        if self.start_nanos.load(Ordering::Relaxed) <= nanos(START_INLINE_MAX) {
            let started = self.start_instance();
            slot.put(started, &self.facts);
            self.run_errands(slot, worker);
            return;
        }
        if slot.starting {
            return;
        }
        let plugin = Arc::clone(self);
        let start = move || {
            let started = plugin.start_instance();
            if let Some(slot) = plugin.slot(worker) {
                let mut slot = slot.lock();
                slot.starting = false;
                slot.put(started, &plugin.facts);
                plugin.run_errands(&mut slot, worker);
            }
        };
        match std::thread::Builder::new().name("wasm-start".into()).spawn(start) {
            Ok(_) => slot.starting = true,
            Err(error) => slot.put(Err(PluginError::Thread(error)), &self.facts),
        }
    }

    fn start_instance(&self) -> Result<Instance, PluginError> {
        let started = Instant::now();
        let instance = Instance::start(&self.module, &self.facts)?;
        self.start_nanos.fetch_max(nanos(started.elapsed()), Ordering::Relaxed);
        self.facts.counters.starts.fetch_add(1, Ordering::Relaxed);
        Ok(instance)
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        for slot in &mut self.workers {
            if let Some(Err(crash)) = slot.get_mut().instance.as_mut().map(|instance| instance.shut_down()) {
                tracing::debug!(plugin = %self.facts.name, reason = %crash.reason, "the plugin crashed as it ended");
            }
        }
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
    /// The instance, started again if its time has come.
    fn ready(&mut self, plugin: &Arc<Plugin>, worker: usize) -> Option<&mut Instance> {
        if self.instance.is_none() && !self.starting && self.breaker.may_start(Instant::now()) {
            plugin.restart(self, worker);
        }
        self.instance.as_deref_mut()
    }

    fn put(&mut self, started: Result<Instance, PluginError>, facts: &Facts) {
        match started {
            Ok(instance) => self.instance = Some(Box::new(instance)),
            Err(error) => {
                let wait = self.breaker.failed_to_start(Instant::now());
                tracing::warn!(plugin = %facts.name, %error, retry_after_ms = wait.as_millis() as u64, "the plugin did not restart");
            }
        }
    }
}

/// Keeps a plugin that crashes again and again from burning the worker's time: a few crashes in a row are forgiven, then
/// each next start waits twice as long.
#[derive(Default)]
struct Breaker {
    /// Crashes without a quiet time between them.
    crashes: u32,
    last: Option<Instant>,
    closed_until: Option<Instant>,
}

/// Crashes that are forgiven, the time after which they are forgotten, and the bounds of the waiting.
const CRASHES_FORGIVEN: u32 = 5;
const QUIET: Duration = Duration::from_secs(30);
const WAIT_MIN: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(30);

impl Breaker {
    /// How long to wait before the next start.
    fn crashed(&mut self, now: Instant) -> Duration {
        if self.last.is_none_or(|last| now.duration_since(last) > QUIET) {
            self.crashes = 0;
        }
        self.crashes += 1;
        self.last = Some(now);
        let over = self.crashes.saturating_sub(CRASHES_FORGIVEN);
        let wait = match over {
            0 => Duration::ZERO,
            _ => (WAIT_MIN * 2u32.pow((over - 1).min(5))).min(WAIT_MAX),
        };
        self.closed_until = Some(now + wait);
        wait
    }

    /// A start that fails is never forgiven: it would fail for the next exchange again.
    fn failed_to_start(&mut self, now: Instant) -> Duration {
        self.crashes = self.crashes.max(CRASHES_FORGIVEN);
        self.last = Some(now);
        self.crashed(now)
    }

    fn may_start(&self, now: Instant) -> bool {
        self.closed_until.is_none_or(|until| now >= until)
    }
}

/// The plugin in a chain.
pub(crate) struct PluginFactory {
    plugin: Arc<Plugin>,
    phases: Phases,
}

impl PluginFactory {
    pub(crate) fn new(plugin: Arc<Plugin>) -> Self {
        let exports = plugin.module.exports;
        let mut phases = Phases::empty();
        phases.set(Phases::REQUEST_HEADERS, exports.request_headers);
        phases.set(Phases::RESPONSE_HEADERS, exports.response_headers);
        phases.set(Phases::REQUEST_BODY, exports.body[0]);
        phases.set(Phases::RESPONSE_BODY, exports.body[1]);
        phases.set(Phases::REQUEST_TRAILERS, exports.trailers[0]);
        phases.set(Phases::RESPONSE_TRAILERS, exports.trailers[1]);
        if exports.log || !phases.is_empty() {
            phases |= Phases::FINISH;
        }
        Self { plugin, phases }
    }
}

impl Factory for PluginFactory {
    fn name(&self) -> &str {
        &self.plugin.facts.name
    }

    fn phases(&self) -> Phases {
        self.phases
    }

    fn start(&self, exchange: &Exchange) -> Option<Box<dyn Filter>> {
        Some(Box::new(PluginFilter {
            plugin: Arc::clone(&self.plugin),
            worker: exchange.connection.worker,
            stream: StreamState::None,
            is_held: [false; 2],
            held_until: [None; 2],
            bodies: None,
            has_changed: [false; 2],
            failed: false,
        }))
    }
}

/// The plugin at work on one exchange.
struct PluginFilter {
    plugin: Arc<Plugin>,
    worker: usize,
    stream: StreamState,
    /// The guest holds the head of the request, or of the response.
    is_held: [bool; 2],
    /// The guest holds the request, or the response, and nothing more will come of it; until then at most.
    held_until: [Option<Instant>; 2],
    /// What the guest was shown of bodies, and holds.
    bodies: Option<Arc<Bodies>>,
    /// It was noted that the guest changed the body of the request, or of the response.
    has_changed: [bool; 2],
    /// The plugin failed this exchange and takes no further part in it.
    failed: bool,
}

/// The guest's context for the exchange.
#[derive(Clone, Copy)]
enum StreamState {
    /// There is none yet.
    None,
    Open {
        generation: u64,
        context: u32,
    },
    /// It was closed.
    Closed,
}

/// What a guest is shown of a body.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Body,
    Trailers,
    /// Nothing new: it may have let go of what it holds.
    Nothing,
}

/// Resolves when something about a held stream may have changed, or when its time is over; which of the two is found out
/// by who asks then.
fn woken(notify: Arc<Notify>, until: Option<Instant>) -> Until {
    Box::pin(async move {
        match until {
            Some(until) => drop(tokio::time::timeout_at(until.into(), notify.notified()).await),
            None => notify.notified().await,
        }
    })
}

/// Why an exchange failed that nobody let go.
const TOO_LONG: &str = "the plugin held the exchange for too long";

/// Envoy's response code details for an exchange that a plugin failed.
const FAILED: &str = "wasm_fail_stream";

impl PluginFilter {
    /// Shows the guest a head, or finds out what became of one that it held.
    fn head(&mut self, exchange: &mut Exchange, phase: Phase<'_>, end_of_stream: bool) -> Verdict {
        let side = phase.side();
        let is_held = std::mem::take(&mut self.is_held[number_of(side)]);
        let outcome = self.with_guest(exchange, |instance, context, exchange| match is_held {
            true => Ok(instance.resumed(context, exchange, phase)),
            false => instance.headers(context, exchange, phase, end_of_stream),
        });
        match outcome {
            Ok(Outcome::Paused(notify)) if self.plugin.holds_heads && !end_of_stream => {
                Verdict::Hold(Hold { until: Some(woken(notify, None)), ..Hold::default() })
            }
            Ok(Outcome::Paused(notify)) => match self.held_until(side) {
                Some(until) => {
                    self.is_held[number_of(side)] = true;
                    Verdict::Wait(woken(notify, Some(until)))
                }
                None => self.fail(exchange, TOO_LONG),
            },
            Ok(outcome) => self.verdict(exchange, side, outcome),
            Err(why) => self.fail(exchange, why),
        }
    }

    /// Shows the guest a part of a body, or finds out what became of one that it held.
    fn part(&mut self, exchange: &mut Exchange, mut part: Part<'_>, shown: Shown) -> Verdict {
        let side = part.side;
        let bodies = Arc::clone(self.bodies.get_or_insert_default());
        append(&mut bodies.side(side).bytes, std::mem::take(&mut part.chunk.bytes));
        let outcome = self.with_guest(exchange, |instance, context, exchange| match shown {
            Shown::Nothing => Ok(instance.part_resumed(context, exchange, &mut part)),
            shown => instance.part(context, exchange, &mut part, shown == Shown::Trailers, &bodies),
        });
        let verdict = match outcome {
            Ok(Outcome::Paused(notify)) => {
                let is_last = part.chunk.end_of_stream || part.chunk.trailers.is_some();
                // As long as more is to come, it is the sender's time that passes.
                let until = if is_last { self.held_until(side) } else { None };
                if until.is_some() || !is_last {
                    let body = bodies.side(side);
                    let until = Some(woken(notify, until));
                    return Verdict::Hold(Hold { until, kept: body.bytes.len(), when_full: body.when_full });
                }
                self.fail(exchange, TOO_LONG)
            }
            Ok(outcome) => self.verdict(exchange, side, outcome),
            Err(why) => self.fail(exchange, why),
        };
        let mut body = bodies.side(side);
        part.chunk.bytes = body.take();
        if std::mem::take(&mut body.is_changed) {
            part.chunk.is_changed = true;
            if std::mem::replace(&mut self.has_changed[number_of(side)], true) {
                return verdict;
            }
            let whose = if side == Side::Request { "request" } else { "response" };
            exchange.note(&self.plugin.facts.name, format!("{whose}: changed the body"));
        }
        verdict
    }

    /// Enters the guest's context for the exchange.
    ///
    /// # Errors
    /// Why the plugin failed the exchange.
    fn with_guest(
        &mut self,
        exchange: &mut Exchange,
        run: impl FnOnce(&mut Instance, u32, &mut Exchange) -> Result<Outcome, Crash>,
    ) -> Result<Outcome, &'static str> {
        if self.failed {
            return Ok(Outcome::Continue);
        }
        let plugin = Arc::clone(&self.plugin);
        let Some(slot) = plugin.slot(self.worker) else { return Ok(Outcome::Continue) };
        let mut slot = slot.lock();
        let generation = slot.generation;
        let Some(instance) = slot.ready(&plugin, self.worker) else {
            return Err("the plugin is not running");
        };
        let outcome = match self.stream {
            StreamState::Open { generation: ours, .. } if ours != generation => {
                return Err("the plugin crashed in another exchange");
            }
            StreamState::Open { context, .. } => run(instance, context, exchange),
            StreamState::Closed => return Ok(Outcome::Continue),
            StreamState::None => match instance.open() {
                Ok(Some(context)) => {
                    self.stream = StreamState::Open { generation, context };
                    run(instance, context, exchange)
                }
                Ok(None) => return Err("the plugin has too many streams"),
                Err(crash) => Err(crash),
            },
        };
        match outcome {
            Ok(outcome) => {
                plugin.run_errands(&mut slot, self.worker);
                Ok(outcome)
            }
            Err(crash) => {
                plugin.crashed(&mut slot, self.worker, &crash);
                Err("the plugin crashed")
            }
        }
    }

    /// Until when the guest may hold a side of which nothing more comes; `None` when that time is over.
    fn held_until(&mut self, side: Side) -> Option<Instant> {
        let pause_max = self.plugin.facts.environment.settings.pause_max;
        let until = *self.held_until[number_of(side)].get_or_insert_with(|| Instant::now() + pause_max);
        (Instant::now() < until).then_some(until)
    }

    fn verdict(&mut self, exchange: &mut Exchange, side: Side, outcome: Outcome) -> Verdict {
        self.held_until[number_of(side)] = None;
        match outcome {
            Outcome::Continue | Outcome::Paused(_) => Verdict::Continue,
            Outcome::Reset => Verdict::Reset,
            Outcome::Reply(reply) => {
                exchange.note(&self.plugin.facts.name, format!("answered {}", reply.status.as_u16()));
                Verdict::Reply(reply)
            }
            Outcome::Incomplete(name) => {
                tracing::warn!(plugin = %self.plugin.facts.name, header = name, "the plugin removed a header that is needed");
                let details = format!("filter_removed_required_headers{{{name}}}:{}", self.plugin.facts.name);
                Verdict::Reply(Box::new(LocalReply::text(StatusCode::SERVICE_UNAVAILABLE, "", details)))
            }
        }
    }

    /// Lets the exchange pass, or refuses it, as the plugin's fail strategy says.
    fn fail(&mut self, exchange: &mut Exchange, why: &'static str) -> Verdict {
        self.failed = true;
        self.plugin.facts.counters.failed_exchanges.fetch_add(1, Ordering::Relaxed);
        exchange.note(&self.plugin.facts.name, why);
        tracing::debug!(plugin = %self.plugin.facts.name, why, "the plugin failed an exchange");
        match self.plugin.fail_strategy {
            FailStrategy::Open => Verdict::Continue,
            FailStrategy::Close | FailStrategy::Reload => {
                Verdict::Reply(Box::new(LocalReply::text(StatusCode::SERVICE_UNAVAILABLE, "", FAILED)))
            }
        }
    }

    /// Closes the guest's context. An exchange that was answered before the plugin's turn gets one now, since plugins that
    /// keep an access log count it too (Envoy does the same).
    fn close(&mut self, exchange: Option<&mut Exchange>) {
        if let Some(bodies) = &self.bodies {
            for side in [Side::Request, Side::Response] {
                bodies.side(side).is_at_hand = false;
            }
        }
        let unseen = matches!(self.stream, StreamState::None);
        let wants_log = self.plugin.module.exports.log && exchange.is_some() && !self.failed;
        if matches!(self.stream, StreamState::Closed) || unseen && !wants_log {
            return;
        }
        let plugin = Arc::clone(&self.plugin);
        let Some(slot) = plugin.slot(self.worker) else { return };
        let mut slot = slot.lock();
        let generation = slot.generation;
        let Some(instance) = slot.instance.as_deref_mut() else { return };
        let closed = match std::mem::replace(&mut self.stream, StreamState::Closed) {
            StreamState::Open { generation: ours, context } if ours == generation => {
                instance.close(context, exchange)
            }
            StreamState::None => instance.open().and_then(|context| match context {
                Some(context) => instance.close(context, exchange),
                None => Ok(()),
            }),
            StreamState::Open { .. } | StreamState::Closed => Ok(()),
        };
        if let Err(crash) = closed {
            plugin.crashed(&mut slot, self.worker, &crash);
        }
        plugin.run_errands(&mut slot, self.worker);
    }
}

impl Filter for PluginFilter {
    fn request_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut RequestHead,
        end_of_stream: bool,
    ) -> Verdict {
        self.head(exchange, Phase::Request(head), end_of_stream)
    }

    fn response_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut ResponseHead,
        end_of_stream: bool,
    ) -> Verdict {
        self.head(exchange, Phase::Response(head), end_of_stream)
    }

    fn body(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.part(exchange, part, Shown::Body)
    }

    fn trailers(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.part(exchange, part, Shown::Trailers)
    }

    fn resumed(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.part(exchange, part, Shown::Nothing)
    }

    fn finish(&mut self, exchange: &mut Exchange) {
        self.close(Some(exchange));
    }
}

impl Drop for PluginFilter {
    /// An exchange whose task was dropped was never finished; its context must not stay in the guest.
    fn drop(&mut self) {
        if matches!(self.stream, StreamState::Open { .. }) {
            self.close(None);
        }
    }
}
