//! What one call of a guest may cost: time, calls of the host, and bytes that the host copies for it.

use crate::log::Sampled;
use crate::metrics::Limit;
use crate::state::State;
use crate::ticker::{TICK, ticks};
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};
use wasmtime::{StoreContextMut, UpdateDeadline, WasmBacktrace};

/// The longest that a call may take, unless its plugin says otherwise. A worker's other exchanges wait for so long at most.
pub(crate) const DEADLINE: Duration = Duration::from_millis(100);
/// The longest that a guest may take to start and to configure itself.
pub(crate) const START_DEADLINE: Duration = Duration::from_secs(10);
/// The part of its deadline after which a call is reported as slow.
const SLOW: u32 = 10;
/// How many times its deadline a call may last that the machine gives no time: a thread that waits its turn has not done
/// anything wrong, but whoever waits for it does not wait for ever.
const WAIT_FACTOR: u32 = 10;
/// The most calls of the host in one call of a guest, which would take longer than most deadlines.
const HOST_CALLS_MAX: u32 = 1_000_000;
/// The most bytes that the host copies in one call of a guest: the largest body that it may make, read and written twice.
const HOST_BYTES_MAX: usize = 128 << 20;

/// A guest asked for more than one call of it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Exhausted {
    #[error("it called the host more than {} times in one call", HOST_CALLS_MAX)]
    Calls,
    #[error("it had the host copy more than {} MiB in one call", HOST_BYTES_MAX >> 20)]
    Bytes,
}

impl Exhausted {
    pub(crate) fn limit(self) -> Limit {
        match self {
            Self::Calls => Limit::HostCalls,
            Self::Bytes => Limit::HostBytes,
        }
    }
}

/// What the running call of a guest has left.
pub(crate) struct Budget {
    deadline: Duration,
    calls: u32,
    bytes: usize,
    /// When it was found to be slow, and how much time of the processor its thread had had by then.
    slow_since: Option<(Instant, Duration)>,
}

impl Budget {
    pub(crate) fn new(deadline: Duration) -> Self {
        Self { deadline, calls: HOST_CALLS_MAX, bytes: HOST_BYTES_MAX, slow_since: None }
    }

    /// After how many ticks [`out_of_time`] is asked for the first time: whenever the first comes, not before the call is slow.
    pub(crate) fn first_ticks(&self) -> u64 {
        ticks(self.slow()) + 1
    }

    fn slow(&self) -> Duration {
        (self.deadline / SLOW).max(TICK)
    }

    /// Takes one call of the host.
    #[inline]
    pub(crate) fn take_call(&mut self) -> Result<(), Exhausted> {
        self.calls = self.calls.checked_sub(1).ok_or(Exhausted::Calls)?;
        Ok(())
    }

    /// Takes bytes that the host is about to copy.
    #[inline]
    pub(crate) fn take_bytes(&mut self, count: usize) -> Result<(), Exhausted> {
        self.bytes = self.bytes.checked_sub(count).ok_or(Exhausted::Bytes)?;
        Ok(())
    }

    /// How much time the call has left; the first question finds it slow, and takes the time up to then for used.
    fn left(&mut self, now: Instant, processor: Duration) -> Option<Duration> {
        let rest = self.deadline.saturating_sub(self.slow()).max(TICK);
        let Some((since, before)) = self.slow_since else {
            self.slow_since = Some((now, processor));
            return Some(rest);
        };
        if now.duration_since(since) >= rest * WAIT_FACTOR {
            return None;
        }
        rest.checked_sub(processor.saturating_sub(before)).filter(|left| !left.is_zero())
    }
}

/// The engine's clock says that the running call may be out of time: it is ended, or goes on for what it has left. Time
/// that its thread waited for a processor does not count.
pub(crate) fn out_of_time(mut store: StoreContextMut<'_, State>) -> wasmtime::Result<UpdateDeadline> {
    // As long as it runs, the clock must not rest.
    store.data().facts.environment.ticker.wake();
    let is_first = store.data().budget.slow_since.is_none();
    if is_first {
        let facts = &store.data().facts;
        facts.counters.hit(Limit::Slow);
        if facts.slow_sampled.passes() {
            let backtrace = crate::instance::backtrace_line(&WasmBacktrace::capture(&store));
            let state = store.data();
            tracing::warn!(
                plugin = %state.facts.name,
                callback = state.callback.as_str(),
                after_ms = state.budget.slow().as_millis() as u64,
                %backtrace,
                "the plugin is slow"
            );
        }
    }
    Ok(match store.data_mut().budget.left(Instant::now(), processor_time()) {
        Some(left) => UpdateDeadline::Continue(ticks(left).max(1)),
        None => UpdateDeadline::Interrupt,
    })
}

/// How much time of the processor this thread has had.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or_default(), nanos.unwrap_or_default())
}

/// How often a plugin's slowness is logged.
pub(crate) fn slow_sampled() -> Sampled {
    Sampled::every(Duration::from_secs(10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_counts_that_the_processor_gave() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        for (name, wall, used, left) in [
            ("all of it used", 90, 90, None),
            ("more than that", 500, 95, None),
            ("half of it used", 45, 45, Some(45)),
            ("on a busy machine", 200, 30, Some(60)),
            ("never given any", 900, 0, None),
        ] {
            let mut budget = Budget::new(ms(100));
            assert_eq!(budget.first_ticks(), ticks(ms(10)) + 1, "{name}");
            assert_eq!(budget.left(start, ms(7)), Some(ms(90)), "{name}: found slow");
            assert_eq!(budget.left(start + ms(wall), ms(7 + used)), left.map(ms), "{name}");
        }
        assert_eq!(Budget::new(ms(5)).first_ticks(), 2, "the shortest deadlines have a whole tick");
    }

    #[test]
    fn calls_and_bytes_are_counted() {
        let mut budget = Budget::new(DEADLINE);
        assert!((0..HOST_CALLS_MAX).all(|_| budget.take_call().is_ok()));
        assert_eq!(budget.take_call(), Err(Exhausted::Calls));
        assert_eq!(budget.take_bytes(HOST_BYTES_MAX), Ok(()));
        assert_eq!(budget.take_bytes(1), Err(Exhausted::Bytes));
        assert_eq!(budget.take_bytes(0), Ok(()));
    }
}
