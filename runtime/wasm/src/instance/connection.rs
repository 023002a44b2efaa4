//! Showing a guest connections that carry no HTTP.

use super::{Crash, Instance, Outcome, call};
use crate::abi::{Callback, VM_CONTEXT};
use crate::bodies::Bodies;
use crate::state::{State, Stream, number_of};
use cairn_filter::{Closer, Exchange, Side, Wakers};
use std::sync::Arc;
use wasmtime::{Store, TypedFunc};

/// A callback for bytes: the context, how many there are, and whether they are the last; the action.
type DataCallback = TypedFunc<(u32, u32, u32), u32>;

/// The guest's exports for connections, those of one side each for the client's and the server's.
pub(super) struct ConnectionCallbacks {
    opened: Option<TypedFunc<u32, u32>>,
    data: [Option<DataCallback>; 2],
    closed: [Option<TypedFunc<(u32, u32), ()>>; 2],
}

impl ConnectionCallbacks {
    pub(super) fn resolve(store: &mut Store<State>, instance: &wasmtime::Instance) -> Self {
        let data = ["proxy_on_downstream_data", "proxy_on_upstream_data"];
        let closed = ["proxy_on_downstream_connection_close", "proxy_on_upstream_connection_close"];
        Self {
            opened: instance.get_typed_func(&mut *store, "proxy_on_new_connection").ok(),
            data: data.map(|name| instance.get_typed_func(&mut *store, name).ok()),
            closed: closed.map(|name| instance.get_typed_func(&mut *store, name).ok()),
        }
    }
}

/// Who closed a connection, as the ABI numbers them (`PeerType`).
#[derive(Clone, Copy)]
enum Peer {
    Unknown = 0,
    Local = 1,
    Remote = 2,
}

impl Instance {
    /// A context for a connection; `None` when there are too many.
    pub(crate) fn open_connection(
        &mut self,
        data: &Arc<Bodies>,
        wakers: &Wakers,
    ) -> Result<Option<u32>, Crash> {
        let waiting = [Side::Request, Side::Response].map(|side| Some(Arc::clone(wakers.of(side))));
        self.open_as(Stream { data: Some(Arc::clone(data)), waiting, ..Stream::default() })
    }

    /// `proxy_on_new_connection`.
    pub(crate) fn new_connection(&mut self, context: u32, exchange: &mut Exchange) -> Result<Outcome, Crash> {
        self.forget_resumption(context, Side::Request);
        let Some(function) = self.callbacks.connection(&mut self.store, &self.guest).opened.clone() else {
            return Ok(Outcome::Continue);
        };
        let called = self.about(context, exchange, |instance| {
            call(&mut instance.store, &function, context, Callback::NewConnection, context)
        });
        self.connection_outcome(context, exchange, Side::Request, called? != 0)
    }

    /// `proxy_on_downstream_data` and `proxy_on_upstream_data`, with the bytes in the context's buffer; and, when the
    /// server's are at their end, `proxy_on_upstream_connection_close`, as in Envoy.
    pub(crate) fn connection_data(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        (side, end): (Side, bool),
        data: &Bodies,
    ) -> Result<Outcome, Crash> {
        let index = number_of(side);
        self.forget_resumption(context, side);
        let callback = match side {
            Side::Request => Callback::DownstreamData,
            Side::Response => Callback::UpstreamData,
        };
        let length = {
            let mut shown = data.side(side);
            shown.is_at_hand = true;
            shown.bytes.len() as u32
        };
        let function = self.callbacks.connection(&mut self.store, &self.guest).data[index].clone();
        let called = self.about(context, exchange, |instance| {
            let action = match &function {
                Some(function) => {
                    let parameters = (context, length, u32::from(end));
                    call(&mut instance.store, function, parameters, callback, context)?
                }
                None => 0,
            };
            let is_over = end && side == Side::Response;
            // What goes on is not to be seen there any more.
            if is_over {
                data.side(side).is_at_hand = action != 0;
                instance.call_closed(context, side, Peer::Unknown)?;
                data.side(side).is_at_hand = true;
            }
            Ok(action)
        });
        self.connection_outcome(context, exchange, side, called? != 0)
    }

    /// What has become of a connection that was woken; `is_held`: the guest holds what is there of this side.
    pub(crate) fn connection_woken(&mut self, context: u32, side: Side, is_held: bool) -> Outcome {
        let Some(stream) = self.store.data_mut().streams.get_mut(&context) else { return Outcome::Reset };
        outcome(stream, side, is_held)
    }

    /// The connection is over: `proxy_on_downstream_connection_close`, `proxy_on_done`, `proxy_on_log` and, unless the guest
    /// asks for time, `proxy_on_delete`, in the order that connections have in Envoy.
    pub(crate) fn connection_closed(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        by: Closer,
    ) -> Result<(), Crash> {
        let peer = match by {
            Closer::Here => Peer::Local,
            Closer::Client => Peer::Remote,
        };
        self.about(context, exchange, |instance| {
            instance.call_closed(context, Side::Request, peer)?;
            let is_done = match &instance.callbacks.done {
                Some(done) => call(&mut instance.store, done, context, Callback::Done, context)? != 0,
                None => true,
            };
            if let Some(log) = &instance.callbacks.log {
                call(&mut instance.store, log, context, Callback::Log, context)?;
            }
            instance.delete_unless(context, is_done)
        })?;
        self.settle()
    }

    fn call_closed(&mut self, context: u32, side: Side, peer: Peer) -> Result<(), Crash> {
        let Some(function) = &self.callbacks.connection(&mut self.store, &self.guest).closed[number_of(side)]
        else {
            return Ok(());
        };
        let callback = match side {
            Side::Request => Callback::DownstreamClose,
            Side::Response => Callback::UpstreamClose,
        };
        call(&mut self.store, function, (context, peer as u32), callback, context)
    }

    /// Runs something with the facts of a connection at hand.
    fn about<T>(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        run: impl FnOnce(&mut Self) -> Result<T, Crash>,
    ) -> Result<T, Crash> {
        let live = &mut self.store.data_mut().live;
        live.context = context;
        std::mem::swap(&mut live.exchange, exchange);
        let result = run(self);
        let live = &mut self.store.data_mut().live;
        std::mem::swap(&mut live.exchange, exchange);
        live.context = VM_CONTEXT;
        result
    }

    /// What was resumed before a callback is of no meaning for what the callback decides.
    fn forget_resumption(&mut self, context: u32, side: Side) {
        if let Some(stream) = self.store.data_mut().streams.get_mut(&context) {
            stream.resumed[number_of(side)] = false;
        }
    }

    fn connection_outcome(
        &mut self,
        context: u32,
        exchange: &Exchange,
        side: Side,
        is_paused: bool,
    ) -> Result<Outcome, Crash> {
        self.settle()?;
        // Callbacks outside of the connection speak of it as it is now.
        self.hold(context, exchange, Side::Request, None);
        let Some(stream) = self.store.data_mut().streams.get_mut(&context) else {
            return Ok(Outcome::Reset);
        };
        Ok(outcome(stream, side, is_paused))
    }
}

fn outcome(stream: &mut Stream, side: Side, is_paused: bool) -> Outcome {
    let index = number_of(side);
    if stream.closed {
        return Outcome::Reset;
    }
    if !is_paused || std::mem::take(&mut stream.resumed[index]) {
        return Outcome::Continue;
    }
    match &stream.waiting[index] {
        Some(waiting) => Outcome::Paused(Arc::clone(waiting)),
        None => Outcome::Continue,
    }
}
