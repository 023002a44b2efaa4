//! An exchange's own instance. It is there while the exchange is, and for a while after if something is under way in it; what
//! happens in it touches no other exchange.

use super::Plugin;
use super::context::{Context, StreamState};
use super::outside::Seat;
use crate::clones::{Clones, NoClone};
use crate::instance::{Crash, Instance, Outcome};
use crate::metrics::Limit;
use cairn_filter::Exchange;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::Notify;

/// How long an instance may outlive its exchange.
const LINGER: Duration = Duration::from_secs(30);

/// The place of an exchange's own instance; empty when that has crashed, and when it is over.
#[derive(Default)]
pub(super) struct Own {
    pub(super) instance: Mutex<Option<Box<Instance>>>,
    /// Told when nothing is under way any more.
    pub(super) idle: Notify,
}

impl Context {
    /// Enters the guest's context for the exchange, in the exchange's own instance.
    ///
    /// # Errors
    /// Why the plugin failed the exchange.
    pub(super) fn enter_own(
        &mut self,
        plugin: &Arc<Plugin>,
        clones: &Clones,
        run: impl FnOnce(&mut Instance, u32) -> Result<Outcome, Crash>,
    ) -> Result<Outcome, &'static str> {
        if matches!(self.stream, StreamState::Closed) {
            return Ok(Outcome::Continue);
        }
        let own = match &self.own {
            Some(own) => Arc::clone(own),
            None => Arc::clone(self.own.insert(plugin.make_own(clones)?)),
        };
        let mut place = own.instance.lock();
        // It was asked for something meanwhile, and crashed.
        let Some(instance) = place.as_deref_mut() else { return Err("the plugin crashed") };
        let outcome = match self.stream {
            StreamState::Open { context, .. } => run(instance, context),
            StreamState::Closed => return Ok(Outcome::Continue),
            StreamState::None => match instance.open() {
                Ok(Some(context)) => {
                    self.stream = StreamState::Open { generation: 0, context };
                    run(instance, context)
                }
                Ok(None) => {
                    plugin.facts.counters.hit(Limit::Streams);
                    return Err("the plugin has too many streams");
                }
                Err(crash) => Err(crash),
            },
        };
        match outcome {
            Ok(outcome) => {
                plugin
                    .run_errands_of(instance, &Seat::Own { worker: self.worker, own: Arc::downgrade(&own) });
                Ok(outcome)
            }
            Err(crash) => {
                plugin.own_crashed(clones, &mut place, &crash);
                Err("the plugin crashed")
            }
        }
    }

    /// Closes the guest's context in the exchange's own instance, and ends that, at once or when nothing is under way in it.
    pub(super) fn close_own(
        &mut self,
        plugin: &Arc<Plugin>,
        clones: &Clones,
        exchange: Option<&mut Exchange>,
    ) {
        let stream = std::mem::replace(&mut self.stream, StreamState::Closed);
        let own = match self.own.take() {
            Some(own) => own,
            // For its access log only.
            None => match plugin.make_own(clones) {
                Ok(own) => own,
                Err(_) => return,
            },
        };
        let mut place = own.instance.lock();
        let Some(instance) = place.as_deref_mut() else { return };
        let closed = match stream {
            StreamState::Open { context, .. } => instance.close(context, exchange),
            StreamState::None => instance.open().and_then(|context| match context {
                Some(context) => instance.close(context, exchange),
                None => Ok(()),
            }),
            StreamState::Closed => Ok(()),
        };
        if let Err(crash) = closed {
            plugin.own_crashed(clones, &mut place, &crash);
            return;
        }
        plugin.run_errands_of(instance, &Seat::Own { worker: self.worker, own: Arc::downgrade(&own) });
        if instance.is_waiting() {
            drop(place);
            plugin.linger(self.worker, own);
        }
    }
}

impl Plugin {
    /// # Errors
    /// Why there is none.
    fn make_own(self: &Arc<Self>, clones: &Clones) -> Result<Arc<Own>, &'static str> {
        match clones.make(&self.facts, &self.facts.environment.leases) {
            Ok(instance) => {
                Ok(Arc::new(Own { instance: Mutex::new(Some(Box::new(instance))), ..Own::default() }))
            }
            Err(NoClone::Full) => {
                self.facts.counters.instances_refused.fetch_add(1, Ordering::Relaxed);
                Err("too many exchanges have an instance of their own")
            }
            Err(NoClone::Crash(crash)) => {
                self.own_crashed(clones, &mut None, &crash);
                Err("the plugin crashed")
            }
        }
    }

    /// Takes a crashed instance away. The next exchange has another one anyway.
    pub(super) fn own_crashed(&self, clones: &Clones, place: &mut Option<Box<Instance>>, crash: &Crash) {
        self.facts.counters.traps.fetch_add(1, Ordering::Relaxed);
        self.crashes.add(crash);
        let Crash { callback, reason, backtrace, limit } = crash;
        let plugin = &self.facts.name;
        if clones.warns() {
            tracing::warn!(%plugin, callback, %reason, %backtrace, "the plugin crashed, in an exchange's own instance");
        } else {
            tracing::debug!(%plugin, callback, %reason, %backtrace, "the plugin crashed, in an exchange's own instance");
        }
        if let Some(instance) = place.take() {
            instance.wake_all();
        }
        if *limit == Some(Limit::Deadline) {
            self.missed_deadline();
        }
    }

    /// Keeps an instance whose exchange is over until nothing is under way in it.
    fn linger(self: &Arc<Self>, worker: usize, own: Arc<Own>) {
        // Without a thread nothing is under way.
        let Ok(runtime) = self.facts.environment.places.runtime(worker) else { return };
        let plugin = Arc::downgrade(self);
        runtime.spawn(async move {
            // Whoever is in it says so when it is idle; a worker does not wait for that.
            let is_waiting = || {
                let place = own.instance.try_lock();
                place.is_none_or(|place| place.as_ref().is_some_and(|instance| instance.is_waiting()))
            };
            let over = async {
                while is_waiting() {
                    own.idle.notified().await;
                }
            };
            // What is under way after that is given up.
            let _late = tokio::time::timeout(LINGER, over).await;
            let end = move || drop(own.instance.lock().take());
            let plugin = plugin.upgrade();
            match plugin.as_ref().and_then(|plugin| plugin.own_threads.get()) {
                Some(threads) => threads.push(worker, Box::new(end)),
                None => end(),
            }
        });
    }
}
