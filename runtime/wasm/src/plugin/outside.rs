//! What reaches a plugin outside of exchanges: answers of other services, its timer, its queues. Each is a task on the
//! runtime of the worker whose instance it enters; it ends with that instance.

use super::grpc::{self, Opening};
use super::own::Own;
use super::{Plugin, Slot};
use crate::instance::{Crash, Instance};
use crate::outside::{CallKind, Errand};
use cairn_filter::{Callout, CalloutRequest};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

impl Plugin {
    /// Does what the guest asked for while it ran. To be called whenever a guest has returned.
    #[inline]
    pub(super) fn run_errands(self: &Arc<Self>, slot: &mut Slot, worker: usize) {
        if slot.instance.as_ref().is_some_and(|instance| instance.has_errands()) {
            self.run_waiting_errands(slot, worker);
        }
    }

    fn run_waiting_errands(self: &Arc<Self>, slot: &mut Slot, worker: usize) {
        let at = Seat::Shared { worker, generation: slot.generation };
        let Some(instance) = slot.instance.as_deref_mut() else { return };
        self.run_errands_of(instance, &at);
    }

    /// Does what a guest asked for while it ran. To be called whenever it has returned.
    pub(super) fn run_errands_of(self: &Arc<Self>, instance: &mut Instance, at: &Seat) {
        if !instance.has_errands() {
            return;
        }
        let worker = at.worker();
        let runtime = match self.facts.environment.places.runtime(worker) {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(plugin = %self.facts.name, %error, "no thread for what the plugin asked for");
                return;
            }
        };
        if let Some(period) = instance.take_tick() {
            instance.ticking(self.start_timer(&runtime, at, period));
        }
        for errand in instance.take_errands() {
            match errand {
                Errand::Ask { id, callout, request } => {
                    let callout = callout.unwrap_or_else(|| self.facts.environment.places.callout(worker));
                    self.ask(&runtime, at, instance, Question { id, callout, request: *request });
                }
                Errand::Open { id, callout, request, feed } => {
                    let callout = callout.unwrap_or_else(|| self.facts.environment.places.callout(worker));
                    self.facts.counters.count_call();
                    let opening = Opening { id, callout, request: *request, feed };
                    instance.call_begun(id, grpc::open(self, &runtime, at.clone(), opening));
                }
                Errand::Listen(queue) => {
                    if let Some(at) = self.lasting(at) {
                        self.listen(&runtime, at, queue);
                    }
                }
            }
        }
    }

    /// Who is told of items in a queue that was asked for here: the shared instance, if the exchange's own is here.
    fn lasting(&self, at: &Seat) -> Option<Seat> {
        match at {
            Seat::Shared { .. } => Some(at.clone()),
            Seat::Own { worker, .. } => {
                let generation = self.slot(*worker)?.lock().generation;
                Some(Seat::Shared { worker: *worker, generation })
            }
        }
    }

    fn ask(self: &Arc<Self>, runtime: &Handle, at: &Seat, instance: &mut Instance, question: Question) {
        let Question { id, callout, request } = question;
        let (plugin, at) = (Arc::downgrade(self), at.clone());
        let asking = async move {
            let answer = callout.call(request).await;
            if let Some(plugin) = plugin.upgrade() {
                let told = plugin.enter(&at, move |instance| match CallKind::of(id) {
                    CallKind::Http => instance.http_call_response(id, answer),
                    CallKind::GrpcCall | CallKind::GrpcStream => instance.grpc_answer(id, answer),
                });
                // The instance is gone, or it crashed, which is known by now.
                let _gone = told.await;
            }
        };
        self.facts.counters.count_call();
        instance.call_begun(id, runtime.spawn(asking).abort_handle());
    }

    fn start_timer(
        self: &Arc<Self>,
        runtime: &Handle,
        at: &Seat,
        mut period: Duration,
    ) -> tokio::task::AbortHandle {
        let (plugin, at) = (Arc::downgrade(self), at.clone());
        let ticking = async move {
            loop {
                tokio::time::sleep(period).await;
                let Some(plugin) = plugin.upgrade() else { return };
                match plugin.enter(&at, Instance::tick).await.flatten() {
                    Some(next) => period = next,
                    None => return,
                }
            }
        };
        runtime.spawn(ticking).abort_handle()
    }

    /// Has the guest told when something is put into a queue, as long as nobody else asks for the same.
    fn listen(self: &Arc<Self>, runtime: &Handle, at: Seat, queue: u32) {
        let (plugin, runtime) = (Arc::downgrade(self), runtime.clone());
        let tell = move || {
            let (plugin, at) = (plugin.clone(), at.clone());
            runtime.spawn(async move {
                let Some(environment) = plugin.upgrade().map(|plugin| Arc::clone(&plugin.facts.environment))
                else {
                    return;
                };
                // One call for every item, since guests take one at a time. Items that come meanwhile are told of anew.
                for _ in 0..environment.shared.begin_telling(queue) {
                    let Some(plugin) = plugin.upgrade() else { return };
                    if plugin.enter(&at, move |instance| instance.queue_ready(queue)).await.is_none() {
                        return;
                    }
                    drop(plugin);
                    tokio::task::yield_now().await;
                }
            });
        };
        self.facts.environment.shared.listen(queue, Arc::new(tell));
    }

    /// Enters an instance if it is still the one that is meant: here, or on the plugin's own threads if it has some. What
    /// the guest asked for itself has bounds of its own, so it is never refused there.
    pub(super) async fn enter<T: Send + 'static>(
        self: &Arc<Self>,
        at: &Seat,
        run: impl FnOnce(&mut Instance) -> Result<T, Crash> + Send + 'static,
    ) -> Option<T> {
        let Some(threads) = self.own_threads.get() else { return self.enter_here(at, run) };
        let (tell, told) = oneshot::channel();
        let (plugin, seat) = (Arc::clone(self), at.clone());
        let enter = move || {
            // Whoever asked may be gone.
            let _gone = tell.send(plugin.enter_here(&seat, run));
        };
        threads.push(at.worker(), Box::new(enter));
        told.await.ok().flatten()
    }

    fn enter_here<T>(
        self: &Arc<Self>,
        at: &Seat,
        run: impl FnOnce(&mut Instance) -> Result<T, Crash>,
    ) -> Option<T> {
        let (worker, generation) = match at {
            Seat::Shared { worker, generation } => (*worker, *generation),
            Seat::Own { own, .. } => {
                let own = own.upgrade()?;
                return self.enter_own(&own, at, run);
            }
        };
        let mut slot = self.slot(worker)?.lock();
        if slot.generation != generation {
            return None;
        }
        let result = run(slot.instance.as_deref_mut()?);
        if let Err(crash) = &result {
            self.crashed(&mut slot, worker, crash);
        }
        self.run_errands(&mut slot, worker);
        result.ok()
    }

    fn enter_own<T>(
        self: &Arc<Self>,
        own: &Own,
        at: &Seat,
        run: impl FnOnce(&mut Instance) -> Result<T, Crash>,
    ) -> Option<T> {
        let mut place = own.instance.lock();
        let instance = place.as_deref_mut()?;
        let result = run(instance);
        let is_idle = match &result {
            Ok(_) => {
                self.run_errands_of(instance, at);
                !instance.is_waiting()
            }
            Err(crash) => {
                if let Some(clones) = &self.clones {
                    self.own_crashed(clones, &mut place, crash);
                }
                true
            }
        };
        // Whoever is told looks into it.
        drop(place);
        if is_idle {
            own.idle.notify_one();
        }
        result.ok()
    }
}

/// One instance.
#[derive(Clone)]
pub(super) enum Seat {
    /// That of a worker, or of a thread of the plugin's own, and which of its successive instances.
    Shared { worker: usize, generation: u64 },
    /// An exchange's own, as long as it is there, and the worker or thread that it lives on.
    Own { worker: usize, own: Weak<Own> },
}

impl Seat {
    fn worker(&self) -> usize {
        match self {
            Self::Shared { worker, .. } | Self::Own { worker, .. } => *worker,
        }
    }
}

/// A call that is to be made.
struct Question {
    id: u32,
    callout: Arc<dyn Callout>,
    request: CalloutRequest,
}
