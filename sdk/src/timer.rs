//! Time: the plugin's tick, and sleeping futures. A proxy has one timer per plugin; while a future sleeps, it runs at
//! [`GRANULARITY`].

use crate::{sys, task};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How exact sleeping is.
const GRANULARITY: Duration = Duration::from_millis(10);
/// The most sleeping futures of an instance; more do not sleep.
const SLEEPERS_MAX: usize = 16_384;

#[derive(Default)]
struct Timers {
    root: u32,
    /// The plugin's own period and when it ends next; none if it did not ask.
    tick: Option<(Duration, u64)>,
    /// What the proxy's timer is set to.
    host: Duration,
    sleepers: BTreeMap<(u64, u64), (u32, Waker)>,
}

thread_local! {
    static TIMERS: RefCell<Vec<Timers>> = const { RefCell::new(Vec::new()) };
    static NEXT_SLEEPER: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// The time, as the proxy tells it.
pub fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(sys::now())
}

/// Asks for [`crate::Plugin::on_tick`] whenever this much time has passed, from then on; zero ends it. Each worker of a proxy
/// ticks for itself. For `configure` and `on_tick`.
///
/// ```
/// use cairn_sdk::{Plugin, tick_every};
/// use std::cell::Cell;
/// use std::time::Duration;
///
/// struct Clock(Cell<u32>);
///
/// #[cairn_sdk::plugin]
/// impl Plugin for Clock {
///     type Config = ();
///     type Exchange = ();
///
///     fn configure((): ()) -> Result<Self, String> {
///         tick_every(Duration::from_secs(1));
///         Ok(Self(Cell::new(0)))
///     }
///
///     fn on_tick(&self) {
///         self.0.set(self.0.get() + 1);
///     }
/// }
/// # let mut proxy = cairn_sdk::testing::Proxy::<Clock>::new("").unwrap();
/// # proxy.advance(Duration::from_millis(3500));
/// # assert_eq!(proxy.plugin().0.get(), 3);
/// ```
pub fn tick_every(period: Duration) {
    with(task::place().root, |timers| {
        let next = sys::now().saturating_add(nanos(period));
        timers.tick = Some((period, next)).filter(|_| !period.is_zero());
        timers.arm();
    });
}

/// Waits; exact to about 10 ms. Only in futures of [`crate::Flow::wait`] and [`crate::spawn`].
///
/// ```
/// use cairn_sdk::{Flow, Plugin, Request, sleep};
/// use std::time::Duration;
/// # use cairn_sdk::testing::{Proxy, TestRequest};
///
/// struct Slow;
///
/// #[cairn_sdk::plugin]
/// impl Plugin for Slow {
///     type Config = ();
///     type Exchange = ();
/// #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
///
///     fn on_request(&self, request: Request, _: &mut ()) -> Flow {
///         Flow::wait(async move {
///             sleep(Duration::from_millis(100)).await;
///             request.set_header("x-late", "100");
///             Flow::Continue
///         })
///     }
/// }
/// # let mut proxy = Proxy::<Slow>::new("").unwrap();
/// # let outcome = proxy.send(TestRequest::get("/"));
/// # assert_eq!(outcome.upstream.unwrap().header("x-late").as_deref(), Some("100"));
/// # assert!(outcome.took >= Duration::from_millis(100) && outcome.took < Duration::from_millis(130));
/// ```
pub fn sleep(duration: Duration) -> impl Future<Output = ()> {
    Sleep { deadline: sys::now().saturating_add(nanos(duration)), registered: None }
}

/// A wait that took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl std::fmt::Display for Elapsed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("it took too long")
    }
}

impl std::error::Error for Elapsed {}

/// Awaits a future, but not for longer than `duration`; then it is dropped.
///
/// # Errors
/// When the time is over first.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let (mut future, mut sleep) = (pin!(future), pin!(sleep(duration)));
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => sleep.as_mut().poll(context).map(|()| Err(Elapsed)),
    })
    .await
}

struct Sleep {
    deadline: u64,
    registered: Option<(u32, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if sys::now() >= self.deadline {
            return Poll::Ready(());
        }
        let place = task::place();
        let id = self.registered.map_or_else(|| NEXT_SLEEPER.replace(NEXT_SLEEPER.get() + 1), |(_, id)| id);
        let sleeper = (place.context, context.waker().clone());
        let sleeps = with(place.root, |timers| {
            let room = self.registered.is_some() || timers.sleepers.len() < SLEEPERS_MAX;
            if room {
                timers.sleepers.insert((self.deadline, id), sleeper);
                timers.arm();
            }
            room
        });
        if !sleeps {
            log::warn!("too many sleeping futures: one did not sleep");
            return Poll::Ready(());
        }
        self.registered = Some((place.root, id));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let Some((root, id)) = self.registered else { return };
        // During the thread's end there is nothing left to forget.
        let _ = TIMERS.try_with(|timers| {
            if let Some(timers) = timers.borrow_mut().iter_mut().find(|timers| timers.root == root) {
                timers.sleepers.remove(&(self.deadline, id));
            }
        });
    }
}

/// What a tick of the proxy's timer means.
pub(crate) struct Due {
    /// The plugin's own period has ended.
    pub(crate) tick: bool,
    /// The contexts in which a future has slept enough.
    pub(crate) contexts: Vec<u32>,
}

/// The proxy's timer has gone off.
pub(crate) fn due(root: u32) -> Due {
    with(root, |timers| {
        let now = sys::now();
        let mut contexts = Vec::new();
        while let Some(entry) = timers.sleepers.first_entry().filter(|entry| entry.key().0 <= now) {
            let (context, waker) = entry.remove();
            waker.wake();
            contexts.push(context);
        }
        let alone = timers.tick.is_some_and(|(period, _)| period == timers.host);
        let tick = timers.tick.is_some_and(|(_, next)| alone || now >= next);
        if let Some((period, next)) = timers.tick.as_mut().filter(|_| tick) {
            *next = now.saturating_add(nanos(*period));
        }
        Due { tick, contexts }
    })
}

/// Sets the proxy's timer to what is needed now.
pub(crate) fn rearm(root: u32) {
    with(root, Timers::arm);
}

/// Forgets a root context.
pub(crate) fn forget(root: u32) {
    TIMERS.with_borrow_mut(|timers| timers.retain(|timers| timers.root != root));
}

/// Forgets all timers, which run elsewhere.
pub(crate) fn forget_all() {
    drop(TIMERS.take());
}

impl Timers {
    fn arm(&mut self) {
        let tick = self.tick.map(|(period, _)| period);
        let wanted = match (self.sleepers.is_empty(), tick) {
            (true, tick) => tick.unwrap_or_default(),
            (false, tick) => tick.map_or(GRANULARITY, |period| period.min(GRANULARITY)),
        };
        if wanted == self.host {
            return;
        }
        let milliseconds = u32::try_from(wanted.as_millis()).unwrap_or(u32::MAX);
        match sys::set_tick_period(milliseconds.max(u32::from(!wanted.is_zero()))) {
            Ok(()) => self.host = wanted,
            Err(error) => log::error!("the proxy did not set its timer: {error}"),
        }
    }
}

fn with<T>(root: u32, change: impl FnOnce(&mut Timers) -> T) -> T {
    TIMERS.with_borrow_mut(|all| {
        let index = all.iter().position(|timers| timers.root == root).unwrap_or_else(|| {
            all.push(Timers { root, ..Timers::default() });
            all.len() - 1
        });
        change(&mut all[index])
    })
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
