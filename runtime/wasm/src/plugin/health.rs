//! How a plugin that runs does, for the admin port.

use super::Plugin;
use crate::instance::Crash;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

/// How a plugin does. Counts are over all its versions, as in metrics.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Health {
    /// The longest that one call may take.
    pub deadline: Duration,
    /// The most memory of one instance, in bytes.
    pub memory_bytes_max: usize,
    /// The memory of all its instances, in bytes.
    pub memory_bytes: u64,
    /// How many threads of its own it has; 0: it runs on the workers.
    pub own_threads: usize,
    /// Calls that wait for those threads.
    pub waiting: usize,
    /// Instances that are paused, for they crashed again and again, out of all of this version.
    pub paused: usize,
    /// The instances of this version.
    pub instances: usize,
    /// How often it crashed.
    pub crashes: u64,
    /// Exchanges that it failed.
    pub failed_exchanges: u64,
    /// Log lines that were dropped.
    pub log_lines_dropped: u64,
    /// How often it ran into which bound.
    pub limits: Vec<(&'static str, u64)>,
    /// The last crashes of this version, latest first.
    pub last_crashes: Vec<CrashReport>,
}

/// One crash.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CrashReport {
    /// When it was.
    pub at: SystemTime,
    /// In which callback.
    pub callback: &'static str,
    /// What happened, in words.
    pub reason: String,
    /// The guest's functions, innermost first.
    pub backtrace: String,
}

/// The most crashes that are kept, and the longest backtrace.
const CRASHES_MAX: usize = 5;
const BACKTRACE_BYTES_MAX: usize = 2 << 10;

/// The last crashes.
#[derive(Default)]
pub(super) struct Crashes(Mutex<VecDeque<CrashReport>>);

impl Crashes {
    pub(super) fn add(&self, crash: &Crash) {
        let report = CrashReport {
            at: SystemTime::now(),
            callback: crash.callback,
            reason: crash.reason.clone(),
            backtrace: shortened(&crash.backtrace),
        };
        let mut crashes = self.0.lock();
        crashes.truncate(CRASHES_MAX - 1);
        crashes.push_front(report);
    }
}

fn shortened(text: &str) -> String {
    text.chars()
        .scan(0, |length, c| {
            *length += c.len_utf8();
            (*length <= BACKTRACE_BYTES_MAX).then_some(c)
        })
        .collect()
}

impl Plugin {
    pub(crate) fn health(&self) -> Health {
        let counters = &self.facts.counters;
        let threads = self.own_threads.get();
        Health {
            deadline: self.facts.deadline,
            memory_bytes_max: self.facts.memory_max,
            memory_bytes: counters.memory_bytes.load(Ordering::Relaxed),
            own_threads: threads.map_or(0, |threads| threads.count()),
            waiting: threads.map_or(0, |threads| threads.waiting()),
            paused: self.paused.load(Ordering::Relaxed),
            instances: self.slots.len(),
            crashes: counters.traps.load(Ordering::Relaxed),
            failed_exchanges: counters.failed_exchanges.load(Ordering::Relaxed),
            log_lines_dropped: counters.log_lines_dropped.load(Ordering::Relaxed),
            limits: counters.limits().filter(|(_, count)| *count > 0).collect(),
            last_crashes: self.crashes.0.lock().iter().cloned().collect(),
        }
    }
}
