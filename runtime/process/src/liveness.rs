//! Liveness: whether the threads that carry traffic still take turns.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// How often each thread shows that it is alive.
const BEAT: Duration = Duration::from_secs(1);

/// A thread that has shown nothing for so long is stuck: no task of ours may keep it for more than milliseconds, and a
/// machine that is merely busy gives it a turn before.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// Watches threads. Clones watch the same.
#[derive(Clone, Debug)]
pub struct Liveness {
    started: Instant,
    /// When each last had a turn, in milliseconds since `started`.
    turns: Arc<[Arc<AtomicU64>]>,
}

impl Liveness {
    /// Watches these runtimes, in their order.
    pub fn watch(runtimes: &[Handle]) -> Self {
        let started = Instant::now();
        let turns = runtimes.iter().map(|runtime| {
            let turn = Arc::new(AtomicU64::new(0));
            runtime.spawn(beat(started, Arc::clone(&turn)));
            turn
        });
        Self { started, turns: turns.collect() }
    }

    /// The numbers of those that are stuck now.
    pub fn stuck(&self) -> Vec<usize> {
        self.stuck_for(STUCK_AFTER)
    }

    fn stuck_for(&self, limit: Duration) -> Vec<usize> {
        let now = self.started.elapsed();
        let silent =
            |turn: &AtomicU64| now.saturating_sub(Duration::from_millis(turn.load(Ordering::Relaxed)));
        let stuck = self.turns.iter().enumerate().filter(|(_, turn)| silent(turn) > limit);
        stuck.map(|(number, _)| number).collect()
    }
}

async fn beat(started: Instant, turn: Arc<AtomicU64>) {
    loop {
        let now = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        turn.store(now, Ordering::Relaxed);
        tokio::time::sleep(BEAT).await;
    }
}

/// How long whatever was ready on each of these runtimes had to wait for the rest at most, while this looked. Time in which
/// the thread itself waited for a processor is not in it, where the system tells that. It asks for a turn again and again,
/// so that the threads are busy meanwhile.
pub async fn longest_turns(runtimes: &[Handle], period: Duration) -> Vec<Duration> {
    let until = Instant::now() + period;
    let probes: Vec<_> = runtimes.iter().map(|runtime| runtime.spawn(longest_turn(until))).collect();
    let mut turns = Vec::with_capacity(probes.len());
    for probe in probes {
        // A runtime that ends has taken its last turn.
        turns.push(probe.await.unwrap_or_default());
    }
    turns
}

async fn longest_turn(until: Instant) -> Duration {
    let clock = ThreadClock::start();
    let (mut longest, mut last) = (Duration::ZERO, clock.now());
    while Instant::now() < until {
        tokio::task::yield_now().await;
        let now = clock.now();
        longest = longest.max(now.saturating_sub(last));
        last = now;
    }
    longest
}

/// Time as the thread that started it has it: without that in which another had its processor.
struct ThreadClock {
    started: Instant,
    /// Linux's account of this thread: nanoseconds on a processor, nanoseconds of waiting for one, and how often.
    account: Option<File>,
}

impl ThreadClock {
    fn start() -> Self {
        Self { started: Instant::now(), account: File::open("/proc/thread-self/schedstat").ok() }
    }

    fn now(&self) -> Duration {
        let mut waited = self.waited();
        loop {
            let elapsed = self.started.elapsed();
            let still = self.waited();
            // Otherwise it waited just between the two, and nobody knows on which side.
            if waited == still {
                return elapsed.saturating_sub(waited);
            }
            waited = still;
        }
    }

    fn waited(&self) -> Duration {
        let mut text = [0; 96];
        let length = self.account.as_ref().and_then(|account| account.read_at(&mut text, 0).ok());
        let text =
            std::str::from_utf8(text.get(..length.unwrap_or(0)).unwrap_or_default()).unwrap_or_default();
        let nanos = text.split_whitespace().nth(1).and_then(|nanos| nanos.parse().ok());
        Duration::from_nanos(nanos.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Workers;
    use std::sync::mpsc;

    #[test]
    fn a_thread_that_takes_no_turns_is_noticed_and_its_recovery_too() {
        let workers = Workers::start(2).unwrap();
        let runtimes = workers.runtimes();
        let (entered, has_entered) = mpsc::channel();
        let (leave, may_leave) = mpsc::channel::<()>();
        runtimes[1].spawn(async move {
            entered.send(()).unwrap();
            // A task that does what none may: it keeps the thread.
            may_leave.recv().unwrap();
        });
        has_entered.recv().unwrap();
        let liveness = Liveness::watch(&runtimes);
        let until = |expected: &[usize]| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while liveness.stuck_for(Duration::from_secs(3)) != expected {
                assert!(Instant::now() < deadline, "never {expected:?}");
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        until(&[1]);
        leave.send(()).unwrap();
        until(&[]);
    }

    #[test]
    fn a_long_turn_is_measured() {
        let workers = Workers::start(2).unwrap();
        let runtimes = workers.runtimes();
        let (long, other) = (Duration::from_millis(300), runtimes[1].clone());
        let begun = Instant::now();
        let kept = runtimes[1].spawn(async move {
            while begun.elapsed() < Duration::from_secs(1) {
                tokio::task::yield_now().await;
            }
            // A task that does what none may: it keeps the thread.
            std::thread::sleep(long);
        });
        let turns = other.block_on(longest_turns(&runtimes, Duration::from_secs(3)));
        assert!(kept.is_finished());
        assert!(turns[1] >= long, "{turns:?}");
        assert_eq!(turns.len(), 2);
    }
}
