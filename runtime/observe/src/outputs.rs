//! Where log lines go: one writer per file, shared by all destinations that log to it.

use cairn_telemetry::{AccessLog, Telemetry};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Arc;

/// The most files that are open at once; each has a thread.
const FILES_MAX: usize = 32;

/// The files of access logs.
pub struct Outputs {
    telemetry: Arc<Telemetry>,
    files: Mutex<HashMap<Arc<str>, Arc<AccessLog>>>,
}

impl Outputs {
    /// None open yet. Standard output is the process's own log, where that is on.
    pub fn new(telemetry: Arc<Telemetry>) -> Arc<Self> {
        Arc::new(Self { telemetry, files: Mutex::default() })
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
        let out: Box<dyn Write + Send> = match &**path {
            "/dev/stdout" => Box::new(std::io::stdout()),
            "/dev/stderr" => Box::new(std::io::stderr()),
            path => match OpenOptions::new().append(true).create(true).open(path) {
                Ok(file) => Box::new(file),
                Err(error) => {
                    tracing::warn!(path, %error, "access log is not written: the file cannot be opened");
                    return None;
                }
            },
        };
        let log = Arc::new(AccessLog::start(out, self.telemetry.lines_dropped.clone()));
        files.insert(Arc::clone(path), Arc::clone(&log));
        Some(log)
    }
}

impl std::fmt::Debug for Outputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outputs").field("files", &self.files.lock().keys()).finish_non_exhaustive()
    }
}
