//! Watching a directory: says that something changed, soon and once per burst.

use crate::files::fingerprint;
use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// A burst of events ends after this long without one: editors write, rename and chmod in a few milliseconds.
const QUIET: Duration = Duration::from_millis(50);
/// A burst is cut after this long.
const BURST_MAX: Duration = Duration::from_millis(400);
/// How often the files are looked at beside the events, which do not tell of a link whose target is elsewhere, and
/// do not come at all on some file systems.
const POLL: Duration = Duration::from_millis(500);

/// Tells when the manifests of a directory may have changed. Watching ends when it is dropped.
#[derive(Debug)]
pub struct Watch {
    ticks: watch::Receiver<u64>,
}

impl Watch {
    /// Begins to watch the directory or file at `root`, which may come into being later.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(root: impl Into<PathBuf>) -> std::io::Result<Self> {
        let root = root.into();
        let (sender, ticks) = watch::channel(0);
        let (event_sender, events) = sync_channel(1);
        let watched = Watched::new(root, event_sender);
        std::thread::Builder::new()
            .name("manifests".to_owned())
            .spawn(move || watched.run(&events, &sender))?;
        Ok(Self { ticks })
    }

    /// Waits until something changed since the last call, or since the start. Cancelling it loses nothing.
    pub async fn changed(&mut self) {
        if self.ticks.changed().await.is_err() {
            // The thread ends only after its receiver; should it ever die, nothing changes any more.
            std::future::pending().await
        }
    }
}

/// The thread's own state.
struct Watched {
    root: PathBuf,
    fingerprint: u64,
    events: SyncSender<()>,
    watcher: Option<RecommendedWatcher>,
}

impl Watched {
    /// Watching begins here, before any thread runs, so that no change after it goes unseen.
    fn new(root: PathBuf, events: SyncSender<()>) -> Self {
        let watcher = watcher(&root, events.clone());
        Self { fingerprint: fingerprint(&root), root, events, watcher }
    }

    fn run(mut self, events: &Receiver<()>, ticks: &watch::Sender<u64>) {
        while !ticks.is_closed() {
            match events.recv_timeout(POLL) {
                Ok(()) => {
                    wait_for_quiet(events);
                    self.fingerprint = fingerprint(&self.root);
                }
                Err(RecvTimeoutError::Timeout) => {
                    let now = fingerprint(&self.root);
                    if now == self.fingerprint {
                        continue;
                    }
                    self.fingerprint = now;
                    // No event told of it: what is watched may not be what `root` is now.
                    self.watcher = watcher(&self.root, self.events.clone());
                }
                // Cannot be, as this holds a sender itself.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            ticks.send_modify(|count| *count += 1);
        }
    }
}

fn wait_for_quiet(events: &Receiver<()>) {
    let start = Instant::now();
    while start.elapsed() < BURST_MAX && events.recv_timeout(QUIET).is_ok() {}
}

fn watcher(root: &Path, events: SyncSender<()>) -> Option<RecommendedWatcher> {
    let tell = move |event: notify::Result<Event>| {
        if event.map_or(true, |event| may_change(&event.kind)) {
            // A full channel already says it.
            let _ = events.try_send(());
        }
    };
    let watch = || {
        let mut watcher = notify::recommended_watcher(tell)?;
        watcher.watch(root, RecursiveMode::Recursive)?;
        Ok::<_, notify::Error>(watcher)
    };
    watch()
        .inspect_err(
            |error| tracing::warn!(%error, "file events are not available, looking at files instead"),
        )
        .ok()
}

/// Reading files also makes events.
fn may_change(kind: &EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

#[cfg(test)]
#[path = "watch/tests.rs"]
mod tests;
