//! Drain: telling everything that runs to finish, and waiting until it has.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// A drain that has not started, and the side that watches it.
pub fn drain() -> (DrainTrigger, Drain) {
    of_part(None)
}

fn of_part(whole: Option<Arc<Drain>>) -> (DrainTrigger, Drain) {
    let (stage, seen) = watch::channel(Stage::Running);
    let held_too = whole.as_ref().map(|whole| Arc::clone(&whole.work));
    let work = Arc::new(Work { held: AtomicUsize::new(0), finished: Notify::new(), whole: held_too });
    (DrainTrigger { stage, work: Arc::clone(&work) }, Drain { stage: seen, work, whole })
}

/// How far a drain has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    /// Nothing new begins, and what goes on may end by itself.
    Draining,
    /// What goes on is cut.
    Cut,
}

#[derive(Debug)]
struct Work {
    held: AtomicUsize,
    finished: Notify,
    /// The work of which this is a part.
    whole: Option<Arc<Work>>,
}

/// Starts the drain and waits for its end.
#[derive(Debug)]
pub struct DrainTrigger {
    stage: watch::Sender<Stage>,
    work: Arc<Work>,
}

impl DrainTrigger {
    /// Starts the drain. Starting it again does nothing.
    pub fn start(&self) {
        self.advance(Stage::Draining);
    }

    /// Starts the drain if need be, and has what goes on end at once.
    pub fn cut(&self) {
        self.advance(Stage::Cut);
    }

    fn advance(&self, to: Stage) {
        self.stage.send_if_modified(|stage| {
            let is_further = *stage < to;
            *stage = to.max(*stage);
            is_further
        });
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
    stage: watch::Receiver<Stage>,
    work: Arc<Work>,
    /// What this is a part of.
    whole: Option<Arc<Drain>>,
}

impl Drain {
    /// A drain of a part of the work, such as that of one pod: it starts by its own trigger, or with the whole. What is
    /// held of the part is held of the whole.
    pub fn part(&self) -> (DrainTrigger, Drain) {
        of_part(Some(Arc::new(self.clone())))
    }

    /// Waits for the drain to start. If its trigger is dropped, it never does.
    pub async fn started(&self) {
        self.reached(Stage::Draining).await;
    }

    /// Waits until what goes on is to end at once. If its trigger is dropped, it never is.
    pub async fn cut(&self) {
        self.reached(Stage::Cut).await;
    }

    async fn reached(&self, wanted: Stage) {
        let Some(whole) = &self.whole else { return self.own_reached(wanted).await };
        tokio::select! {
            () = self.own_reached(wanted) => {}
            () = Box::pin(whole.reached(wanted)) => {}
        }
    }

    async fn own_reached(&self, wanted: Stage) {
        if self.stage.clone().wait_for(|stage| *stage >= wanted).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the drain has started.
    pub fn is_started(&self) -> bool {
        *self.stage.borrow() >= Stage::Draining || self.whole.as_ref().is_some_and(|whole| whole.is_started())
    }

    /// Marks work in progress: the drain is not finished while the guard lives.
    pub fn hold(&self) -> DrainGuard {
        let mut work = Some(&self.work);
        while let Some(one) = work {
            one.held.fetch_add(1, Ordering::AcqRel);
            work = one.whole.as_ref();
        }
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
        let mut work = Some(&self.work);
        while let Some(one) = work {
            if one.held.fetch_sub(1, Ordering::AcqRel) == 1 {
                one.finished.notify_waiters();
            }
            work = one.whole.as_ref();
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
    #[tokio::test]
    async fn a_part_drains_alone_or_with_the_whole() {
        let (whole_trigger, whole) = drain();
        let (one_trigger, one) = whole.part();
        let (other_trigger, other) = whole.part();
        let held = one.hold();
        one_trigger.start();
        one.started().await;
        assert!(one.is_started() && !other.is_started() && !whole.is_started());
        assert!(!one_trigger.finished(Duration::from_millis(1)).await);
        assert!(!whole_trigger.finished(Duration::from_millis(1)).await, "the part is held");
        assert!(other_trigger.finished(Duration::from_secs(60)).await, "another part is not");
        whole_trigger.start();
        other.started().await;
        assert!(other.is_started());
        drop(held);
        assert!(whole_trigger.finished(Duration::from_secs(60)).await);
    }

    #[tokio::test]
    async fn a_cut_is_further_than_a_start_and_never_goes_back() {
        let (_whole_trigger, whole) = drain();
        let (trigger, part) = whole.part();
        trigger.start();
        assert!(tokio::time::timeout(Duration::from_millis(1), part.cut()).await.is_err());
        trigger.cut();
        part.cut().await;
        trigger.start();
        part.cut().await;
        assert!(!whole.is_started());
        assert!(tokio::time::timeout(Duration::from_millis(1), whole.cut()).await.is_err());
    }
}
