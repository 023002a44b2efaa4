//! A plugin as the admin port and metrics tell of it.

use super::{Plugin, Running, Standing};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

/// How one plugin stands.
pub struct View {
    /// Its name, `namespace/name`.
    pub name: String,
    url: String,
    /// `ready`, `loading` or `failed`.
    pub state: &'static str,
    reason: Option<Arc<str>>,
    retry: Option<Duration>,
    loading: bool,
    running: Option<Running>,
    draining: Vec<Running>,
    /// How many versions have run.
    pub versions: u64,
}

impl View {
    pub(super) fn new(plugin: &Plugin) -> Self {
        let (state, reason) = match &plugin.standing {
            Standing::Ready(_, reason) => ("ready", reason.clone()),
            Standing::Loading => ("loading", None),
            Standing::Failed(reason) => ("failed", Some(Arc::clone(reason))),
        };
        Self {
            name: plugin.wanted.name.to_string(),
            url: plugin.wanted.url.to_string(),
            state,
            reason,
            retry: plugin.retry,
            loading: !plugin.tried,
            running: plugin.running.clone(),
            draining: plugin.draining.clone(),
            versions: plugin.versions,
        }
    }

    /// In short, for the dump of the configuration.
    pub fn brief(&self) -> Value {
        json!({ "name": self.name, "url": self.url, "state": self.state, "reason": self.reason })
    }

    /// All that is known.
    pub fn whole(&self) -> Value {
        json!({
            "name": self.name,
            "url": self.url,
            "state": self.state,
            "reason": self.reason,
            "loadsNextVersion": self.loading && self.running.is_some(),
            "retryAfterSeconds": self.retry.map(|retry| retry.as_secs_f64()),
            "running": self.running.as_ref().map(running),
            "draining": self.draining.iter().filter(|old| old.version.is_in_use()).map(running).collect::<Vec<_>>(),
        })
    }
}

fn running(running: &Running) -> Value {
    json!({
        "version": running.number,
        "sha256": running.digest.to_string(),
        "manifest": running.manifest.map(|digest| digest.qualified()),
        "code": running.origin.as_str(),
        "codeMs": running.module_took.as_secs_f64() * 1e3,
        "startMs": running.start_took.as_secs_f64() * 1e3,
        "since": running.since.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
    })
}
