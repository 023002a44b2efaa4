//! What is awaited: callouts in flight, and futures beside exchanges. A module has one thread, and whatever ends a wait enters
//! through a callback of the proxy, so the executor is [`crate::runtime`] polling the exchange whose wait ended.

use crate::call::Answer;
use crate::{GrpcError, sys};
use std::cell::{Cell, RefCell};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The most callouts in flight and the most futures beside exchanges, per instance.
const IN_FLIGHT_MAX: usize = 1024;
const SPAWNED_MAX: usize = 256;

/// Whose code is running: an exchange's context, or the root's twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) context: u32,
    pub(crate) root: u32,
}

/// What ends a callout. An HTTP call that brought nothing failed on its way.
#[derive(Debug)]
pub(crate) enum Arrival {
    Http(Option<Answer>),
    Grpc(Result<Vec<u8>, GrpcError>),
}

/// Ids of HTTP and gRPC calls are counted apart in some proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallKind {
    Http,
    Grpc,
}

#[derive(Default)]
struct Slot {
    arrival: Option<Arrival>,
    waker: Option<Waker>,
}

struct InFlight {
    kind: CallKind,
    id: u32,
    context: u32,
    slot: Rc<RefCell<Slot>>,
}

struct Spawned {
    root: u32,
    future: Pin<Box<dyn Future<Output = ()>>>,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place { context: 0, root: 0 }) };
    static IN_FLIGHT: RefCell<Vec<InFlight>> = const { RefCell::new(Vec::new()) };
    static SPAWNED: RefCell<Vec<Spawned>> = const { RefCell::new(Vec::new()) };
}

/// Remembers whose code runs now; returns whose did.
pub(crate) fn enter(place: Place) -> Place {
    PLACE.replace(place)
}

/// Whose code is running.
pub(crate) fn place() -> Place {
    PLACE.get()
}

/// A callout on its way. Dropping it forgets the call: its answer will be ignored.
#[derive(Debug)]
pub(crate) struct Arriving {
    kind: CallKind,
    id: u32,
    slot: Rc<RefCell<Slot>>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("arrival", &self.arrival).finish_non_exhaustive()
    }
}

/// Whether one more callout may be made.
pub(crate) fn may_call() -> bool {
    IN_FLIGHT.with_borrow(Vec::len) < IN_FLIGHT_MAX
}

impl Arriving {
    /// The call that the proxy gave this id.
    pub(crate) fn new(kind: CallKind, id: u32) -> Self {
        let slot = Rc::new(RefCell::new(Slot::default()));
        let entry = InFlight { kind, id, context: place().context, slot: Rc::clone(&slot) };
        IN_FLIGHT.with_borrow_mut(|calls| calls.push(entry));
        Self { kind, id, slot }
    }
}

impl Future for Arriving {
    type Output = Arrival;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Arrival> {
        let mut slot = self.slot.borrow_mut();
        if let Some(arrival) = slot.arrival.take() {
            return Poll::Ready(arrival);
        }
        slot.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        // During the thread's end there is nothing left to forget.
        let _ = IN_FLIGHT.try_with(|calls| {
            calls.borrow_mut().retain(|call| (call.kind, call.id) != (self.kind, self.id));
        });
    }
}

/// Whether somebody waits for this call.
pub(crate) fn is_awaited(kind: CallKind, id: u32) -> bool {
    IN_FLIGHT.with_borrow(|calls| calls.iter().any(|call| (call.kind, call.id) == (kind, id)))
}

/// A call has ended; returns whose context waits for it.
pub(crate) fn arrived(kind: CallKind, id: u32, arrival: Arrival) -> Option<u32> {
    let call = IN_FLIGHT.with_borrow_mut(|calls| {
        let index = calls.iter().position(|call| (call.kind, call.id) == (kind, id))?;
        Some(calls.swap_remove(index))
    })?;
    let waker = {
        let mut slot = call.slot.borrow_mut();
        slot.arrival = Some(arrival);
        slot.waker.take()
    };
    if let Some(waker) = waker {
        waker.wake();
    }
    Some(call.context)
}

/// Runs a future beside exchanges, to its first wait at once. It may make callouts and sleep; it has no exchange, even when an
/// exchange started it. Returns whether it runs: an instance has at most 256.
///
/// ```
/// use cairn_sdk::testing::{Proxy, TestResponse};
/// use cairn_sdk::{Call, Plugin, spawn, tick_every};
/// use std::cell::RefCell;
/// use std::rc::Rc;
/// use std::time::Duration;
///
/// struct Keys {
///     keys: Rc<RefCell<String>>,
/// }
///
/// #[cairn_sdk::plugin]
/// impl Plugin for Keys {
///     type Config = ();
///     type Exchange = ();
///
///     fn configure((): ()) -> Result<Self, String> {
///         tick_every(Duration::from_secs(60));
///         Ok(Self { keys: Rc::default() })
///     }
///
///     fn on_tick(&self) {
///         let keys = Rc::clone(&self.keys);
///         spawn(async move {
///             if let Ok(answer) = Call::get("keys", "/keys").send().await {
///                 *keys.borrow_mut() = answer.text();
///             }
///         });
///     }
/// }
///
/// let mut proxy = Proxy::<Keys>::new("").unwrap();
/// proxy.cluster("keys", |_| TestResponse::new(200).body("k1"));
/// proxy.advance(Duration::from_secs(61));
/// assert_eq!(proxy.plugin().keys.borrow().as_str(), "k1");
/// ```
pub fn spawn(future: impl Future<Output = ()> + 'static) -> bool {
    if SPAWNED.with_borrow(Vec::len) >= SPAWNED_MAX {
        log::warn!("too many futures beside exchanges: one was not started");
        return false;
    }
    let here = place();
    let root = Place { context: here.root, root: here.root };
    let mut future: Pin<Box<dyn Future<Output = ()>>> = Box::pin(future);
    enter(root);
    // The proxy knows its own contexts.
    let _ = sys::set_effective_context(root.context);
    let pending = poll(future.as_mut()).is_pending();
    enter(here);
    let _ = sys::set_effective_context(here.context);
    if pending {
        SPAWNED.with_borrow_mut(|spawned| spawned.push(Spawned { root: here.root, future }));
    }
    true
}

/// Polls the futures of a root context.
pub(crate) fn poll_spawned(root: u32) {
    let mut mine = Vec::new();
    SPAWNED.with_borrow_mut(|spawned| {
        mine.extend(spawned.extract_if(.., |one| one.root == root));
    });
    mine.retain_mut(|one| poll(one.future.as_mut()).is_pending());
    SPAWNED.with_borrow_mut(|spawned| spawned.append(&mut mine));
}

/// Drops the futures of a root context.
pub(crate) fn forget(root: u32) {
    let mut mine = Vec::new();
    SPAWNED.with_borrow_mut(|spawned| {
        mine.extend(spawned.extract_if(.., |one| one.root == root));
    });
}

/// Polls once. Nobody needs to be woken: whatever ends a wait polls again.
pub(crate) fn poll<T: ?Sized + Future>(future: Pin<&mut T>) -> Poll<T::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Awaits two futures at once, such as two callouts, until both are done.
pub async fn join<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut first, mut second) = (None, None);
    std::future::poll_fn(|context| {
        if first.is_none()
            && let Poll::Ready(output) = a.as_mut().poll(context)
        {
            first = Some(output);
        }
        if second.is_none()
            && let Poll::Ready(output) = b.as_mut().poll(context)
        {
            second = Some(output);
        }
        match (first.take(), second.take()) {
            (Some(a), Some(b)) => Poll::Ready((a, b)),
            (a, b) => {
                (first, second) = (a, b);
                Poll::Pending
            }
        }
    })
    .await
}
