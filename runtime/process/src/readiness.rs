//! Readiness: a list of things that must have happened before traffic is welcome.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// What must happen before the process is ready. Copies share one list.
#[derive(Clone, Default, Debug)]
pub struct Readiness {
    pending: Arc<Mutex<BTreeSet<&'static str>>>,
    fewer: Arc<Notify>,
}

/// One thing that has not happened yet. Dropping it without [`Pending::done`] leaves the process unready.
#[derive(Debug)]
pub struct Pending {
    name: &'static str,
    readiness: Readiness,
}

impl Readiness {
    /// Adds a thing to wait for, named as operators see it.
    pub fn wait_for(&self, name: &'static str) -> Pending {
        self.list().insert(name);
        Pending { name, readiness: self.clone() }
    }

    /// What is still to happen; empty when ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.list().iter().copied().collect()
    }

    /// Waits until nothing is still to happen.
    pub async fn ready(&self) {
        loop {
            // Registered before the list is looked at, so that the last thing cannot slip between.
            let fewer = self.fewer.notified();
            if self.list().is_empty() {
                return;
            }
            fewer.await;
        }
    }

    fn list(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        // A set of names is whole whatever panicked while it was held.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    /// It has happened.
    pub fn done(self) {
        self.readiness.list().remove(self.name);
        self.readiness.fewer.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::Readiness;

    #[test]
    fn ready_when_everything_has_happened() {
        let readiness = Readiness::default();
        let (xds, proxy) = (readiness.wait_for("xds"), readiness.wait_for("proxy"));
        assert_eq!(readiness.pending(), ["proxy", "xds"]);
        xds.done();
        assert_eq!(readiness.clone().pending(), ["proxy"]);
        proxy.done();
        assert!(readiness.pending().is_empty());
    }

    #[tokio::test]
    async fn who_waits_is_told_with_the_last_thing() {
        let readiness = Readiness::default();
        readiness.ready().await;
        let (xds, proxy) = (readiness.wait_for("xds"), readiness.wait_for("proxy"));
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        xds.done();
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        proxy.done();
        waiting.await.unwrap();
    }
}
