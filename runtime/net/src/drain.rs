//! Drain: telling everything that runs to finish, and waiting until it has.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// A drain that has not started, and the side that watches it.
pub fn drain() -> (DrainTrigger, Drain) {
    let (start, started) = watch::channel(false);
    let work = Arc::new(Work { held: AtomicUsize::new(0), finished: Notify::new() });
    (DrainTrigger { start, work: Arc::clone(&work) }, Drain { started, work })
}

#[derive(Debug)]
struct Work {
    held: AtomicUsize,
    finished: Notify,
}

/// Starts the drain and waits for its end.
#[derive(Debug)]
pub struct DrainTrigger {
    start: watch::Sender<bool>,
    work: Arc<Work>,
}

impl DrainTrigger {
    /// Starts the drain. Starting it again does nothing.
    pub fn start(&self) {
        self.start.send_replace(true);
    }

    /// Waits until no work is held. Returns whether that was so before `deadline` had passed.
    pub async fn finished(&self, deadline: Duration) -> bool {
        let idle = async {
            loop {
                // Registered before the count is read, so that the last guard cannot slip between.
                let finished = self.work.finished.notified();
                if self.work.held.load(Ordering::Acquire) == 0 {
                    return;
                }
                finished.await;
            }
        };
        tokio::time::timeout(deadline, idle).await.is_ok()
    }
}

/// Sees a drain start. Clones see the same drain.
#[derive(Clone, Debug)]
pub struct Drain {
    started: watch::Receiver<bool>,
    work: Arc<Work>,
}

impl Drain {
    /// Waits for the drain to start. If its trigger is dropped, it never does.
    pub async fn started(&self) {
        if self.started.clone().wait_for(|started| *started).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the drain has started.
    pub fn is_started(&self) -> bool {
        *self.started.borrow()
    }

    /// Marks work in progress: the drain is not finished while the guard lives.
    pub fn hold(&self) -> DrainGuard {
        self.work.held.fetch_add(1, Ordering::AcqRel);
        DrainGuard { work: Arc::clone(&self.work) }
    }
}

/// Work in progress.
#[derive(Debug)]
#[must_use = "the work ends when the guard is dropped"]
pub struct DrainGuard {
    work: Arc<Work>,
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        if self.work.held.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.work.finished.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_finishes_when_the_last_guard_is_dropped() {
        let (trigger, drain) = drain();
        let first = drain.hold();
        let second = drain.clone().hold();
        assert!(!drain.is_started());
        trigger.start();
        drain.started().await;
        assert!(drain.is_started());
        assert!(!trigger.finished(Duration::from_millis(1)).await);
        drop(first);
        let waiting = tokio::spawn(async move { trigger.finished(Duration::from_secs(60)).await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(second);
        assert!(waiting.await.unwrap());
    }

    #[tokio::test]
    async fn everyone_waiting_sees_the_start() {
        let (trigger, drain) = drain();
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let drain = drain.clone();
                tokio::spawn(async move { drain.started().await })
            })
            .collect();
        trigger.start();
        trigger.start();
        for task in waiting {
            task.await.unwrap();
        }
        assert!(trigger.finished(Duration::from_secs(60)).await);
    }

    #[tokio::test]
    async fn dropped_trigger_is_no_drain() {
        let (trigger, drain) = drain();
        drop(trigger);
        assert!(tokio::time::timeout(Duration::from_millis(1), drain.started()).await.is_err());
        assert!(!drain.is_started());
    }
}
