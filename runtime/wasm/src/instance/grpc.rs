//! Telling a guest what happens in its gRPC calls.

use super::{Crash, Instance, call};
use crate::abi::{Callback, ROOT_CONTEXT};
use crate::delivery::Delivery;
use crate::grpc::{self, GrpcEvent};
use crate::state::State;
use cairn_filter::{CalloutAnswer, CalloutError};
use wasmtime::{Store, TypedFunc};

/// The guest's exports for gRPC calls: each gets the root context, the call, and a number.
pub(super) struct GrpcCallbacks {
    initial: Option<TypedFunc<(u32, u32, u32), ()>>,
    message: Option<TypedFunc<(u32, u32, u32), ()>>,
    trailing: Option<TypedFunc<(u32, u32, u32), ()>>,
    close: Option<TypedFunc<(u32, u32, u32), ()>>,
}

impl GrpcCallbacks {
    pub(super) fn resolve(store: &mut Store<State>, instance: &wasmtime::Instance) -> Self {
        let mut find = |name: &str| instance.get_typed_func(&mut *store, name).ok();
        Self {
            initial: find("proxy_on_grpc_receive_initial_metadata"),
            message: find("proxy_on_grpc_receive"),
            // The SDK for AssemblyScript has another name for it.
            trailing: find("proxy_on_grpc_receive_trailing_metadata")
                .or_else(|| find("proxy_on_grpc_trailing_metadata")),
            close: find("proxy_on_grpc_close"),
        }
    }
}

impl Instance {
    /// What a single call came to: `proxy_on_grpc_receive` or `proxy_on_grpc_close`.
    pub(crate) fn grpc_answer(
        &mut self,
        id: u32,
        answer: Result<CalloutAnswer, CalloutError>,
    ) -> Result<(), Crash> {
        if !self.store.data_mut().outside.answered(id) {
            return Ok(());
        }
        match grpc::of_answer(answer) {
            Ok(message) => self.tell_grpc(id, GrpcEvent::Message(message)),
            Err(ended) => self.tell_grpc(id, GrpcEvent::Closed(ended)),
        }
    }

    /// What happened in a stream. False when the guest does not want to know any more.
    pub(crate) fn grpc_event(&mut self, id: u32, event: GrpcEvent) -> Result<bool, Crash> {
        let outside = &mut self.store.data_mut().outside;
        let wanted = match event {
            GrpcEvent::Closed(_) => outside.answered(id),
            _ => outside.is_under_way(id),
        };
        if wanted {
            self.tell_grpc(id, event)?;
        }
        Ok(self.store.data().outside.is_under_way(id))
    }

    fn tell_grpc(&mut self, id: u32, event: GrpcEvent) -> Result<(), Crash> {
        let callbacks = &self.callbacks.outside(&mut self.store, &self.guest).grpc;
        let (function, callback, number) = match &event {
            GrpcEvent::Initial(head) => (&callbacks.initial, Callback::GrpcInitial, head.count()),
            GrpcEvent::Message(message) => (&callbacks.message, Callback::GrpcReceive, message.len()),
            GrpcEvent::Trailing(tail) => (&callbacks.trailing, Callback::GrpcTrailing, tail.count()),
            GrpcEvent::Closed((code, _)) => (&callbacks.close, Callback::GrpcClose, *code as usize),
        };
        let Some(function) = function else { return Ok(()) };
        self.store.data_mut().outside.delivery = delivery(event);
        let parameters = (ROOT_CONTEXT, id, number as u32);
        call(&mut self.store, function, parameters, callback, ROOT_CONTEXT)?;
        self.returned()
    }
}

fn delivery(event: GrpcEvent) -> Delivery {
    let mut delivery = Delivery::default();
    match event {
        GrpcEvent::Initial(head) => delivery.set_metadata(Delivery::GRPC_INITIAL, &head),
        GrpcEvent::Message(message) => delivery.message = message,
        GrpcEvent::Trailing(tail) => delivery.set_metadata(Delivery::GRPC_TRAILING, &tail),
        GrpcEvent::Closed(ended) => delivery.status = ended,
    }
    delivery
}
