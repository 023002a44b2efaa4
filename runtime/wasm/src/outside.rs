//! What an instance has under way beside its streams: calls that are not answered yet, its timer, and what it asked for
//! during a callback, which is done once the guest has returned.

use crate::abi::Status;
use crate::delivery::Delivery;
use crate::grpc::{self, Feed, FeedSender};
use bytes::Bytes;
use cairn_filter::{Callout, CalloutRequest};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::AbortHandle;

/// The most calls of one instance that wait for an answer.
pub(crate) const CALLS_MAX: usize = 1000;
/// The most bytes in them.
pub(crate) const CALL_BYTES_MAX: usize = 32 << 20;
/// The shortest period of a timer: a shorter one would leave a worker little time for anything else.
const TICK_MIN: Duration = Duration::from_millis(10);

/// What a guest asked for that is done once it has returned.
pub(crate) enum Errand {
    /// Ask another service.
    Ask {
        /// The call's id.
        id: u32,
        /// The way of the exchange at hand; `None`: the worker's own.
        callout: Option<Arc<dyn Callout>>,
        request: Box<CalloutRequest>,
    },
    /// Open a stream to another service.
    Open {
        /// The call's id.
        id: u32,
        /// As above.
        callout: Option<Arc<dyn Callout>>,
        request: Box<CalloutRequest>,
        feed: Feed,
    },
    /// Be told when something is put into this queue.
    Listen(u32),
}

/// A call's kind, which stands in the low two bits of its id, as in Envoy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallKind {
    Http = 0,
    GrpcCall = 1,
    GrpcStream = 2,
}

impl CallKind {
    /// The kind of the call with this id.
    pub(crate) fn of(id: u32) -> Self {
        match id & 3 {
            1 => Self::GrpcCall,
            2 => Self::GrpcStream,
            _ => Self::Http,
        }
    }
}

/// A call without an answer.
#[derive(Default)]
struct Call {
    /// How much it brings.
    bytes: usize,
    /// Gives it up; `None` until it was begun.
    task: Option<AbortHandle>,
    /// Where the guest's messages go; `None` when it is no stream, or sends no more.
    feed: Option<FeedSender>,
}

/// What is under way.
#[derive(Default)]
pub(crate) struct Outside {
    errands: Vec<Errand>,
    /// Calls without an answer.
    calls: HashMap<u32, Call>,
    /// The bytes of all of them.
    call_bytes: usize,
    last_call: u32,
    tick_period: Option<Duration>,
    tick_changed: bool,
    tick: Option<AbortHandle>,
    /// What the running callback brings.
    pub(crate) delivery: Delivery,
}

impl Outside {
    /// Whether one more call with so many bytes may wait for an answer.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        self.calls.len() < CALLS_MAX && self.call_bytes.saturating_add(bytes) <= CALL_BYTES_MAX
    }

    /// Notes a call down and returns its id, which no other call that is under way has.
    fn call(&mut self, kind: CallKind, bytes: usize) -> u32 {
        loop {
            // The first is 4, and none is negative for SDKs that take ids for signed numbers.
            self.last_call = (self.last_call + 1) & (i32::MAX as u32 >> 2);
            let id = self.last_call << 2 | kind as u32;
            if self.last_call != 0 && !self.calls.contains_key(&id) {
                self.calls.insert(id, Call { bytes, ..Call::default() });
                self.call_bytes += bytes;
                return id;
            }
        }
    }

    /// Notes down how to give a call up. False when it was given up already.
    pub(crate) fn begun(&mut self, id: u32, task: AbortHandle) {
        match self.calls.get_mut(&id) {
            Some(call) => call.task = Some(task),
            None => task.abort(),
        }
    }

    /// Opens a stream, once the guest has returned. What the guest sends before goes first.
    pub(crate) fn open_stream(&mut self, callout: Option<Arc<dyn Callout>>, request: CalloutRequest) -> u32 {
        let id = self.call(CallKind::GrpcStream, 0);
        let (sender, feed) = grpc::feed();
        if let Some(call) = self.calls.get_mut(&id) {
            call.feed = Some(sender);
        }
        self.errands.push(Errand::Open { id, callout, request: Box::new(request), feed });
        id
    }

    /// Sends a frame in a stream, perhaps the last one.
    pub(crate) fn send(&mut self, id: u32, frame: Bytes, end: bool) -> Result<(), Status> {
        let call = self.grpc_call(id)?;
        let Some(feed) = &call.feed else {
            // In a stream that sends no more Envoy takes it all the same; a single call was never one to send in.
            let is_stream = CallKind::of(id) == CallKind::GrpcStream;
            return if is_stream { Ok(()) } else { Err(Status::BadArgument) };
        };
        if !feed.send(frame) {
            return Err(Status::BadArgument);
        }
        if end {
            call.feed = None;
        }
        Ok(())
    }

    /// Ends what the guest sends in a stream; a single call, which has nothing more to send, is given up, as in Envoy.
    pub(crate) fn close_stream(&mut self, id: u32) -> Result<(), Status> {
        match CallKind::of(id) {
            CallKind::GrpcStream => self.grpc_call(id).map(|call| call.feed = None),
            CallKind::Http | CallKind::GrpcCall => self.cancel_grpc(id),
        }
    }

    /// Gives a gRPC call up; the guest hears no more of it.
    pub(crate) fn cancel_grpc(&mut self, id: u32) -> Result<(), Status> {
        self.grpc_call(id)?;
        if let Some(task) = self.remove(id).and_then(|call| call.task) {
            task.abort();
        }
        Ok(())
    }

    fn grpc_call(&mut self, id: u32) -> Result<&mut Call, Status> {
        let call = self.calls.get_mut(&id).filter(|_| CallKind::of(id) != CallKind::Http);
        call.ok_or(Status::NotFound)
    }

    /// Whether any call has no answer yet.
    pub(crate) fn has_calls(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Whether the guest waits for this call.
    pub(crate) fn is_under_way(&self, id: u32) -> bool {
        self.calls.contains_key(&id)
    }

    /// Takes a call whose answer is here off the list; false when nobody waits for it.
    pub(crate) fn answered(&mut self, id: u32) -> bool {
        self.remove(id).is_some()
    }

    fn remove(&mut self, id: u32) -> Option<Call> {
        let call = self.calls.remove(&id)?;
        self.call_bytes -= call.bytes;
        Some(call)
    }

    /// Has another service asked, once the guest has returned.
    pub(crate) fn ask(
        &mut self,
        kind: CallKind,
        callout: Option<Arc<dyn Callout>>,
        request: CalloutRequest,
        bytes: usize,
    ) -> u32 {
        let id = self.call(kind, bytes);
        self.errands.push(Errand::Ask { id, callout, request: Box::new(request) });
        id
    }

    /// Has the guest told of items of a queue, once it has returned.
    pub(crate) fn listen(&mut self, queue: u32) {
        // A guest may ask again and again; there are a few hundred queues at most.
        if !self.errands.iter().any(|errand| matches!(errand, Errand::Listen(known) if *known == queue)) {
            self.errands.push(Errand::Listen(queue));
        }
    }

    /// Whether something is to be done once the guest has returned.
    #[inline]
    pub(crate) fn is_waiting(&self) -> bool {
        self.tick_changed || !self.errands.is_empty()
    }

    /// Whether the guest may be called outside of streams: something is under way, or will be when it has returned.
    pub(crate) fn may_call(&self) -> bool {
        !self.calls.is_empty() || self.tick_period.is_some() || self.is_waiting()
    }

    pub(crate) fn take_errands(&mut self) -> Vec<Errand> {
        std::mem::take(&mut self.errands)
    }

    /// Sets the timer; 0 stops it.
    pub(crate) fn set_tick(&mut self, milliseconds: u32) {
        let period = Duration::from_millis(milliseconds.into());
        self.tick_period = (milliseconds > 0).then_some(period.max(TICK_MIN));
        self.tick_changed = true;
    }

    /// The timer's period if it is to be started anew. Whatever ran before ends.
    pub(crate) fn take_tick(&mut self) -> Option<Duration> {
        if !std::mem::take(&mut self.tick_changed) {
            return None;
        }
        if let Some(tick) = self.tick.take() {
            tick.abort();
        }
        self.tick_period
    }

    /// The period of the running timer, which takes up what the guest set meanwhile.
    pub(crate) fn next_tick(&mut self) -> Option<Duration> {
        self.tick_changed = false;
        self.tick_period
    }

    pub(crate) fn ticking(&mut self, task: AbortHandle) {
        self.tick = Some(task);
    }
}

impl Drop for Outside {
    /// A guest that is gone gets no answers.
    fn drop(&mut self) {
        let calls = self.calls.values().filter_map(|call| call.task.as_ref());
        calls.chain(&self.tick).for_each(AbortHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_envoy_and_unique() {
        let mut outside = Outside::default();
        assert_eq!([outside.call(CallKind::Http, 1), outside.call(CallKind::Http, 2)], [4, 8]);
        outside.last_call = i32::MAX as u32 >> 2;
        assert_eq!(outside.call(CallKind::Http, 4), 12, "0, 4 and 8 are passed over");
        assert!(outside.answered(8) && !outside.answered(8));
        assert_eq!((outside.calls.len(), outside.call_bytes), (2, 5));
        assert!(outside.has_room(CALL_BYTES_MAX - 5) && !outside.has_room(CALL_BYTES_MAX - 4));
    }

    #[test]
    fn timers_have_a_shortest_period_and_can_be_stopped() {
        let mut outside = Outside::default();
        assert_eq!(outside.take_tick(), None);
        outside.set_tick(1);
        assert_eq!(outside.take_tick(), Some(TICK_MIN));
        assert_eq!(outside.take_tick(), None, "taken already");
        outside.set_tick(0);
        assert!(outside.is_waiting());
        assert_eq!(outside.take_tick(), None);
        outside.set_tick(400);
        assert_eq!(outside.next_tick(), Some(Duration::from_millis(400)));
        assert!(!outside.is_waiting());
    }
}
