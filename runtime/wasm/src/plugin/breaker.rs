//! When the next instance of a plugin that crashes may start.

use std::time::{Duration, Instant};

/// Keeps a plugin that crashes again and again from burning time: a few crashes in a row are forgiven, then each next start
/// waits twice as long.
#[derive(Default)]
pub(super) struct Breaker {
    /// Crashes without a quiet time between them.
    crashes: u32,
    /// When the next start was or is due.
    closed_until: Option<Instant>,
}

/// Crashes that are forgiven, the time after a start in which there must be none for them to be forgotten, and the bounds
/// of the waiting.
const CRASHES_FORGIVEN: u32 = 5;
const QUIET: Duration = Duration::from_secs(30);
const WAIT_MIN: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(30);

impl Breaker {
    /// How long to wait before the next start.
    pub(super) fn crashed(&mut self, now: Instant) -> Duration {
        if self.closed_until.is_none_or(|until| now.saturating_duration_since(until) > QUIET) {
            self.crashes = 0;
        }
        self.crashes = self.crashes.saturating_add(1);
        let over = self.crashes.saturating_sub(CRASHES_FORGIVEN);
        let wait = match over {
            0 => Duration::ZERO,
            _ => (WAIT_MIN * 2u32.pow((over - 1).min(5))).min(WAIT_MAX),
        };
        self.closed_until = Some(now + wait);
        wait
    }

    /// A start that fails is never forgiven: it would fail for the next exchange again.
    pub(super) fn failed_to_start(&mut self, now: Instant) -> Duration {
        self.crashes = self.crashes.max(CRASHES_FORGIVEN);
        self.closed_until = Some(now);
        self.crashed(now)
    }

    pub(super) fn may_start(&self, now: Instant) -> bool {
        self.closed_until.is_none_or(|until| now >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_crashes_are_forgiven_and_those_after_wait_ever_longer() {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        for seconds in [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 30, 30, 30] {
            let wait = Duration::from_secs(seconds);
            assert_eq!(breaker.crashed(now), wait);
            assert!(breaker.may_start(now) == wait.is_zero() && breaker.may_start(now + wait));
            // It crashes as soon as it has started.
            now += wait;
        }
        assert_eq!(breaker.crashed(now + QUIET + WAIT_MIN), Duration::ZERO, "after a quiet time");
    }

    #[test]
    fn a_start_that_fails_is_not_forgiven() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        let waits = [1, 2, 4].map(Duration::from_secs);
        assert_eq!([(); 3].map(|()| breaker.failed_to_start(now)), waits);
    }
}
