//! Entering a guest outside of its streams: answers of other services, the timer, queues. They arrive at the root
//! context, from which the guest may speak of a stream (`proxy_set_effective_context`).

use super::grpc::GrpcCallbacks;
use super::{Crash, Instance, Outcome, Phase, call};
use crate::abi::{Callback, ROOT_CONTEXT};
use crate::delivery::Delivery;
use crate::heads::{Request, Response};
use crate::outside::Errand;
use crate::state::{Held, State, copy_of, number_of};
use cairn_filter::{CalloutAnswer, CalloutError, Exchange, Side};
use std::time::Duration;
use tokio::task::AbortHandle;
use wasmtime::{Store, TypedFunc};

/// A root context, a call, and the numbers of its answer's headers, bytes and trailers.
type Answered = (u32, u32, u32, u32, u32);

/// The guest's exports that are called outside of streams.
pub(super) struct OutsideCallbacks {
    tick: Option<TypedFunc<u32, ()>>,
    queue_ready: Option<TypedFunc<(u32, u32), ()>>,
    http_call_response: Option<TypedFunc<Answered, ()>>,
    pub(super) grpc: GrpcCallbacks,
}

impl OutsideCallbacks {
    pub(super) fn resolve(store: &mut Store<State>, instance: &wasmtime::Instance) -> Self {
        Self {
            tick: instance.get_typed_func(&mut *store, "proxy_on_tick").ok(),
            queue_ready: instance.get_typed_func(&mut *store, "proxy_on_queue_ready").ok(),
            http_call_response: instance.get_typed_func(&mut *store, "proxy_on_http_call_response").ok(),
            grpc: GrpcCallbacks::resolve(store, instance),
        }
    }
}

impl Instance {
    /// Whether the guest asked for something that is done now that it has returned.
    #[inline]
    pub(crate) fn has_errands(&self) -> bool {
        self.store.data().outside.is_waiting()
    }

    pub(crate) fn take_errands(&mut self) -> Vec<Errand> {
        self.store.data_mut().outside.take_errands()
    }

    /// The timer's period if it is to be started anew.
    pub(crate) fn take_tick(&mut self) -> Option<Duration> {
        self.store.data_mut().outside.take_tick()
    }

    pub(crate) fn ticking(&mut self, task: AbortHandle) {
        self.store.data_mut().outside.ticking(task);
    }

    pub(crate) fn call_begun(&mut self, id: u32, task: AbortHandle) {
        self.store.data_mut().outside.begun(id, task);
    }

    /// `proxy_on_tick`. Returns after what time the next one is due.
    pub(crate) fn tick(&mut self) -> Result<Option<Duration>, Crash> {
        if let Some(tick) = &self.callbacks.outside(&mut self.store, &self.guest).tick {
            call(&mut self.store, tick, ROOT_CONTEXT, Callback::Tick, ROOT_CONTEXT)?;
            self.returned()?;
        }
        Ok(self.store.data_mut().outside.next_tick())
    }

    /// `proxy_on_queue_ready`.
    pub(crate) fn queue_ready(&mut self, queue: u32) -> Result<(), Crash> {
        let callbacks = self.callbacks.outside(&mut self.store, &self.guest);
        let Some(ready) = &callbacks.queue_ready else { return Ok(()) };
        call(&mut self.store, ready, (ROOT_CONTEXT, queue), Callback::QueueReady, ROOT_CONTEXT)?;
        self.returned()
    }

    /// `proxy_on_http_call_response`, once for every call.
    pub(crate) fn http_call_response(
        &mut self,
        id: u32,
        answer: Result<CalloutAnswer, CalloutError>,
    ) -> Result<(), Crash> {
        if !self.store.data_mut().outside.answered(id) {
            return Ok(());
        }
        let callbacks = self.callbacks.outside(&mut self.store, &self.guest);
        let Some(function) = &callbacks.http_call_response else { return Ok(()) };
        let delivery = Delivery::of_http_call(answer);
        let [headers, bytes, trailers] = delivery.http_counts();
        self.store.data_mut().outside.delivery = delivery;
        let parameters = (ROOT_CONTEXT, id, headers, bytes, trailers);
        call(&mut self.store, function, parameters, Callback::HttpCallResponse, ROOT_CONTEXT)?;
        self.returned()
    }

    /// Tidies up behind a callback outside of streams.
    pub(super) fn returned(&mut self) -> Result<(), Crash> {
        let state = self.store.data_mut();
        state.outside.delivery = Delivery::default();
        state.hand_back();
        self.settle()
    }

    /// Keeps what the guest may see and change of a stream that it holds, for callbacks outside of it.
    pub(super) fn hold(&mut self, context: u32, exchange: &Exchange, side: Side, phase: Option<&Phase<'_>>) {
        let Some(stream) = self.store.data_mut().streams.get_mut(&context) else { return };
        let mut held = Held {
            exchange: copy_of(exchange),
            request: Request::none(),
            response: Response::none(),
            map: phase.map(Phase::map),
            changes: String::new(),
        };
        match phase {
            Some(Phase::Request(head)) => held.request.head = (*head).clone(),
            Some(Phase::Response(head)) => held.response.head = (*head).clone(),
            None => {}
        }
        stream.held[number_of(side)] = Some(Box::new(held));
    }

    /// What was kept of a stream that the guest held.
    pub(super) fn take_held(&mut self, context: u32, side: Side) -> Option<Box<Held>> {
        self.store.data_mut().streams.get_mut(&context)?.held[number_of(side)].take()
    }

    /// Puts what was changed of a head while it was held into the one at hand.
    pub(super) fn take_up(&mut self, held: Held, side: Side) {
        if held.map.is_none() {
            return;
        }
        let live = &mut self.store.data_mut().live;
        live.changes = held.changes;
        match side {
            Side::Request => live.request = held.request,
            Side::Response => live.response = held.response,
        }
    }

    /// What has become of a stream that was held in this phase: what was changed meanwhile is put into its head.
    pub(crate) fn resumed(&mut self, context: u32, exchange: &mut Exchange, mut phase: Phase<'_>) -> Outcome {
        let side = phase.side();
        if let Some(held) = self.take_held(context, side) {
            self.enter(context, exchange, &mut phase);
            self.take_up(*held, side);
            if let Some(name) = self.leave(context, exchange, &mut phase) {
                return Outcome::Incomplete(name);
            }
        }
        let outcome = self.outcome(context, number_of(side), true);
        if matches!(outcome, Outcome::Paused(_)) {
            self.hold(context, exchange, side, Some(&phase));
        }
        outcome
    }
}
