//! A plugin as the admin port and metrics tell of it.

use super::{Plugin, Running, Standing};
use cairn_mesh::{Isolation, PluginMode};
use cairn_wasm::{Health, ShadowView};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How one plugin stands.
pub struct View {
    /// Its name, `namespace/name`.
    pub name: String,
    url: String,
    isolation: &'static str,
    mode: &'static str,
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
            isolation: match plugin.wanted.isolation {
                Isolation::Shared => "shared",
                Isolation::Exchange => "exchange",
            },
            mode: match plugin.wanted.mode {
                PluginMode::Enforce => "enforce",
                PluginMode::Shadow => "shadow",
            },
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
        let health = self.running.as_ref().and_then(|running| running.version.health());
        json!({
            "name": self.name,
            "url": self.url,
            "isolation": self.isolation,
            "mode": self.mode,
            "shadow": self.running.as_ref().and_then(|running| running.version.shadow()).map(|view| shadow(&view)),
            "state": self.state,
            "reason": self.reason.as_deref().map(str::to_owned).or(health.as_ref().and_then(paused)),
            "loadsNextVersion": self.loading && self.running.is_some(),
            "retryAfterSeconds": self.retry.map(|retry| retry.as_secs_f64()),
            "running": self.running.as_ref().map(running),
            "health": health.as_ref().map(told),
            "draining": self.draining.iter().filter(|old| old.version.is_in_use()).map(running).collect::<Vec<_>>(),
        })
    }
}

/// Why a plugin that is there does not run, or not everywhere.
fn paused(health: &Health) -> Option<String> {
    let last = health.last_crashes.first().map_or("it crashed", |crash| &crash.reason);
    (health.paused > 0).then(|| {
        let (paused, instances) = (health.paused, health.instances);
        format!("{paused} of {instances} instances are paused, for they crashed again and again; the last time {last}")
    })
}

fn told(health: &Health) -> Value {
    let limits: Map<String, Value> =
        health.limits.iter().map(|(limit, count)| ((*limit).to_owned(), (*count).into())).collect();
    let crashes = health.last_crashes.iter().map(|crash| {
        json!({
            "at": seconds(crash.at),
            "callback": crash.callback,
            "reason": crash.reason,
            "backtrace": crash.backtrace,
        })
    });
    json!({
        "deadlineMs": health.deadline.as_millis() as u64,
        "memoryBytesMax": health.memory_bytes_max,
        "memoryBytes": health.memory_bytes,
        "instances": health.instances,
        "pausedInstances": health.paused,
        "ownThreads": health.own_threads,
        "waitingCalls": health.waiting,
        "crashes": health.crashes,
        "failedExchanges": health.failed_exchanges,
        "logLinesDropped": health.log_lines_dropped,
        "limitHits": limits,
        "lastCrashes": crashes.collect::<Vec<_>>(),
    })
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// What a plugin that is only asked would have done.
fn shadow(view: &ShadowView) -> Value {
    let verdicts = view.verdicts.iter().map(|(verdict, count)| ((*verdict).to_owned(), Value::from(*count)));
    json!({
        "exchanges": view.exchanges,
        "verdicts": verdicts.collect::<Map<_, _>>(),
        "crashes": view.crashes,
        "cpuSeconds": view.cpu.as_secs_f64(),
    })
}

fn running(running: &Running) -> Value {
    json!({
        "version": running.number,
        "sha256": running.digest.to_string(),
        "manifest": running.manifest.map(|digest| digest.qualified()),
        "code": running.origin.as_str(),
        "codeMs": running.module_took.as_secs_f64() * 1e3,
        "startMs": running.start_took.as_secs_f64() * 1e3,
        "since": seconds(running.since),
    })
}
