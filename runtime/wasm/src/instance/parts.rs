//! Showing a guest bodies and trailers.

use super::{Crash, Instance, Outcome, Phase, call};
use crate::abi::{Callback, VM_CONTEXT};
use crate::bodies::Bodies;
use crate::state::{State, number_of};
use bytes::Bytes;
use cairn_filter::{Exchange, HeldHead, Part, Side, WhenFull};
use std::sync::Arc;
use wasmtime::{Store, TypedFunc};

/// A callback for a body: the context, how many bytes there are, and whether they are the last; the action.
type BodyCallback = TypedFunc<(u32, u32, u32), u32>;
/// A callback for trailers: the context, and how many there are; the action.
type TrailersCallback = TypedFunc<(u32, u32), u32>;

/// The guest's exports for bodies and trailers, of requests and of responses.
pub(super) struct PartCallbacks {
    body: [Option<BodyCallback>; 2],
    trailers: [Option<TrailersCallback>; 2],
}

impl PartCallbacks {
    pub(super) fn resolve(store: &mut Store<State>, instance: &wasmtime::Instance) -> Self {
        let bodies = ["proxy_on_request_body", "proxy_on_response_body"];
        let trailers = ["proxy_on_request_trailers", "proxy_on_response_trailers"];
        Self {
            body: bodies.map(|name| instance.get_typed_func(&mut *store, name).ok()),
            trailers: trailers.map(|name| instance.get_typed_func(&mut *store, name).ok()),
        }
    }
}

/// What a guest makes of a body that it is shown.
enum Action {
    Continue,
    Hold(WhenFull),
    /// What it was shown goes nowhere.
    Swallow,
}

impl Instance {
    /// Shows the guest a part of a body, which is in `bodies` already. The head, if the guest holds it, and `exchange` are
    /// moved into the store for the duration of the call.
    pub(crate) fn part(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        part: &mut Part<'_>,
        is_trailers: bool,
        bodies: &Arc<Bodies>,
    ) -> Result<Outcome, Crash> {
        let side = part.side;
        self.begin_part(context, part, is_trailers, bodies);
        self.enter_part(context, exchange, part);
        let called = self.call_part(context, part, is_trailers, bodies);
        let missing = self.leave_part(context, exchange, part);
        let action = called?;
        if let Some(name) = missing {
            return Ok(Outcome::Incomplete(name));
        }
        let mut body = bodies.side(side);
        let is_paused = match action {
            Action::Continue => false,
            Action::Hold(when_full) => {
                body.when_full = when_full;
                true
            }
            Action::Swallow => {
                body.bytes = Bytes::new();
                body.is_changed = true;
                true
            }
        };
        drop(body);
        Ok(self.part_outcome(context, exchange, part, is_paused))
    }

    /// What has become of a body that was held.
    pub(crate) fn part_resumed(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        part: &mut Part<'_>,
    ) -> Outcome {
        self.enter_part(context, exchange, part);
        if let Some(name) = self.leave_part(context, exchange, part) {
            return Outcome::Incomplete(name);
        }
        self.part_outcome(context, exchange, part, true)
    }

    fn part_outcome(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        part: &mut Part<'_>,
        is_paused: bool,
    ) -> Outcome {
        let index = number_of(part.side);
        let outcome = self.outcome(context, index, is_paused);
        if matches!(outcome, Outcome::Paused(_)) {
            self.hold_part(context, exchange, part);
            return outcome;
        }
        let keeps = self.exports.log;
        if let Some(stream) = self.store.data_mut().streams.get_mut(&context) {
            let trailers = &mut stream.trailers[index];
            if std::mem::take(&mut trailers.is_open) {
                part.chunk.trailers = if keeps { trailers.map.clone() } else { trailers.map.take() };
            }
        }
        outcome
    }

    fn begin_part(&mut self, context: u32, part: &Part<'_>, is_trailers: bool, bodies: &Arc<Bodies>) {
        let index = number_of(part.side);
        let Some(stream) = self.store.data_mut().streams.get_mut(&context) else { return };
        stream.resumed[index] = false;
        stream.bodies.get_or_insert_with(|| Arc::clone(bodies));
        let trailers = &mut stream.trailers[index];
        if is_trailers {
            trailers.map = part.chunk.trailers.clone();
        }
        // At the end of a body some can be added.
        trailers.is_open = is_trailers || part.chunk.end_of_stream;
        bodies.side(part.side).is_at_hand = true;
    }

    fn call_part(
        &mut self,
        context: u32,
        part: &Part<'_>,
        is_trailers: bool,
        bodies: &Bodies,
    ) -> Result<Action, Crash> {
        let index = number_of(part.side);
        let action = if is_trailers {
            let callbacks = self.callbacks.parts(&mut self.store, &self.guest);
            let Some(function) = &callbacks.trailers[index] else { return Ok(Action::Continue) };
            let callback = match part.side {
                Side::Request => Callback::RequestTrailers,
                Side::Response => Callback::ResponseTrailers,
            };
            let count = part.chunk.trailers.as_ref().map_or(0, |trailers| trailers.len() as u32);
            call(&mut self.store, function, (context, count), callback, context)?.min(1)
        } else {
            let callbacks = self.callbacks.parts(&mut self.store, &self.guest);
            let Some(function) = &callbacks.body[index] else { return Ok(Action::Continue) };
            let callback = match part.side {
                Side::Request => Callback::RequestBody,
                Side::Response => Callback::ResponseBody,
            };
            let length = bodies.side(part.side).bytes.len() as u32;
            let parameters = (context, length, u32::from(part.chunk.end_of_stream));
            call(&mut self.store, function, parameters, callback, context)?
        };
        self.settle()?;
        Ok(match action {
            0 => Action::Continue,
            1 => Action::Hold(WhenFull::Fail),
            2 => Action::Hold(WhenFull::Wait),
            _ => Action::Swallow,
        })
    }

    /// Moves the exchange into the store, and the head with what was changed of it meanwhile, if the guest holds that.
    fn enter_part(&mut self, context: u32, exchange: &mut Exchange, part: &mut Part<'_>) {
        let held = self.take_held(context, part.side);
        match phase_of(part) {
            Some(mut phase) => {
                self.enter(context, exchange, &mut phase);
                if let Some(held) = held {
                    self.take_up(*held, part.side);
                }
            }
            None => {
                let live = &mut self.store.data_mut().live;
                live.context = context;
                live.changes.clear();
                std::mem::swap(&mut live.exchange, exchange);
            }
        }
    }

    fn leave_part(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        part: &mut Part<'_>,
    ) -> Option<&'static str> {
        match phase_of(part) {
            Some(mut phase) => self.leave(context, exchange, &mut phase),
            None => {
                let State { live, facts, .. } = self.store.data_mut();
                live.context = VM_CONTEXT;
                std::mem::swap(&mut live.exchange, exchange);
                if !live.changes.is_empty() {
                    exchange.note(&facts.name, format!("trailers: {}", live.changes));
                }
                None
            }
        }
    }

    /// Keeps what callbacks outside of the stream may see of it, if there may be any.
    fn hold_part(&mut self, context: u32, exchange: &Exchange, part: &mut Part<'_>) {
        let side = part.side;
        if self.store.data().outside.may_call() {
            self.hold(context, exchange, side, phase_of(part).as_ref());
        }
    }
}

/// The head that the guest holds.
fn phase_of<'a>(part: &'a mut Part<'_>) -> Option<Phase<'a>> {
    match part.head.as_mut()? {
        HeldHead::Request(head) => Some(Phase::Request(head)),
        HeldHead::Response(head) => Some(Phase::Response(head)),
    }
}
