//! Where log lines and spans go: one writer per file and one queue per collector, shared by all destinations.

use crate::export::{Exporter, queue};
use crate::{Feed, Own};
use cairn_mesh::TelemetryProvider;
use cairn_telemetry::{AccessLog, Counter, Telemetry};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::sync::{Arc, Weak};

/// The most files that are open at once; each has a thread.
const FILES_MAX: usize = 32;

/// The files of access logs, and the queues of collectors.
pub struct Outputs {
    telemetry: Arc<Telemetry>,
    own: Arc<Own>,
    start: Box<dyn Fn(Feed) + Send + Sync>,
    queues: Mutex<Vec<(Arc<TelemetryProvider>, Weak<Exporter>)>>,
    sent: Counter,
    dropped: Counter,
    files: Mutex<HashMap<Arc<str>, Arc<AccessLog>>>,
}

impl Outputs {
    /// None open yet. Standard output is the process's own log, where that is on; `start` runs a collector's feed.
    pub fn new(
        telemetry: Arc<Telemetry>,
        own: Arc<Own>,
        start: impl Fn(Feed) + Send + Sync + 'static,
    ) -> Self {
        let counter = |name, help| telemetry.metrics.counter(name, help);
        Self {
            sent: counter("cairn_telemetry_sent", "Spans and log records that collectors took"),
            dropped: counter(
                "cairn_telemetry_dropped",
                "Spans and log records dropped: the queue was full, or the collector did not take them",
            ),
            own,
            start: Box::new(start),
            queues: Mutex::default(),
            files: Mutex::default(),
            telemetry,
        }
    }

    /// The queue of a collector.
    pub(crate) fn queue(&self, provider: &Arc<TelemetryProvider>) -> Arc<Exporter> {
        let mut queues = self.queues.lock();
        queues.retain(|(_, queue)| queue.strong_count() > 0);
        let known = queues.iter().find(|(known, _)| known == provider);
        if let Some(queue) = known.and_then(|(_, queue)| queue.upgrade()) {
            return queue;
        }
        let (exporter, feed) = queue(provider, &self.own, &self.sent, &self.dropped);
        let exporter = Arc::new(exporter);
        queues.push((Arc::clone(provider), Arc::downgrade(&exporter)));
        drop(queues);
        (self.start)(feed);
        exporter
    }

    /// The process's own log.
    pub(crate) fn own(&self) -> Arc<AccessLog> {
        Arc::clone(&self.telemetry.access_log)
    }

    /// The log at `path`, opened to be appended to. A file that cannot be opened is reported, and tried again with
    /// the next configuration.
    pub(crate) fn file(&self, path: &Arc<str>) -> Option<Arc<AccessLog>> {
        if &**path == "/dev/stdout" && self.telemetry.access_log.is_on() {
            return Some(self.own());
        }
        let mut files = self.files.lock();
        if let Some(log) = files.get(path) {
            return Some(Arc::clone(log));
        }
        // What no destination logs to any more is closed.
        files.retain(|_, log| Arc::strong_count(log) > 1);
        if files.len() == FILES_MAX {
            tracing::warn!(path = &**path, "access log is not written: too many files are open");
            return None;
        }
        let dropped = self.telemetry.lines_dropped.clone();
        let log = match &**path {
            "/dev/stdout" => AccessLog::start(std::io::stdout(), dropped),
            "/dev/stderr" => AccessLog::start(std::io::stderr(), dropped),
            name => {
                let opened = Arc::clone(path);
                let open = move || OpenOptions::new().append(true).create(true).open(&*opened);
                match AccessLog::open(open, dropped) {
                    Ok(log) => log,
                    Err(error) => {
                        tracing::warn!(path = name, %error, "access log is not written: the file cannot be opened");
                        return None;
                    }
                }
            }
        };
        let log = Arc::new(log);
        files.insert(Arc::clone(path), Arc::clone(&log));
        Some(log)
    }
}

impl Outputs {
    /// Opens all files anew, for what rotates them has moved them away.
    pub fn reopen(&self) {
        self.files.lock().values().for_each(|log| log.reopen());
    }
}

impl std::fmt::Debug for Outputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outputs").field("files", &self.files.lock().keys()).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "outputs/tests.rs"]
mod tests;
