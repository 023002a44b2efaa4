//! WebAssembly plugins (`extensions.istio.io/v1alpha1 WasmPlugin`).

use crate::{ResourceName, TargetRef};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// When a plugin runs among the built-in filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PluginPhase {
    /// Before token verification.
    Authn,
    /// After authentication, before authorization.
    Authz,
    /// After authorization, before telemetry.
    Stats,
    /// Last before the router.
    #[default]
    Unspecified,
}

/// What happens to traffic when a plugin cannot run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FailStrategy {
    /// It is refused.
    #[default]
    Close,
    /// It passes without the plugin.
    Open,
    /// The plugin is started anew; until then traffic is refused.
    Reload,
}

/// What a plugin looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PluginKind {
    /// Exchanges of HTTP.
    #[default]
    Http,
    /// The bytes of connections that carry no HTTP.
    Network,
}

/// Which instance of a plugin an exchange meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Isolation {
    /// That of its worker, as in Envoy: what the plugin remembers stays for the next exchange.
    #[default]
    Shared,
    /// A fresh one for each exchange, as the plugin was when it had been configured.
    Exchange,
}

/// What a plugin's word counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PluginMode {
    /// It decides.
    #[default]
    Enforce,
    /// It is shown copies, and what it would have done is counted.
    Shadow,
}

/// When a module that was fetched before is asked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    /// Never.
    IfNotPresent,
    /// Whenever the plugin is loaded.
    Always,
}

/// Who to say that we are to registries: a Secret of type `kubernetes.io/dockerconfigjson`.
#[derive(Clone, PartialEq, Eq)]
pub struct PullSecret {
    /// Its name.
    pub name: ResourceName,
    /// The docker configuration, JSON.
    pub config: Arc<str>,
}

impl fmt::Debug for PullSecret {
    /// Names it only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullSecret").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a plugin may use where it differs from what the proxy gives every plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PluginLimits {
    /// The longest that one call of it may take.
    pub deadline: Option<Duration>,
    /// The most memory of one instance, in bytes.
    pub memory_bytes_max: Option<usize>,
    /// How many threads of its own it runs on from the start; unset: it runs on the workers while it keeps its deadline.
    pub own_threads: Option<usize>,
}

/// One plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WasmPlugin {
    /// Its name.
    pub name: ResourceName,
    /// What it attaches to; empty: it selects workloads by label, which no waypoint is.
    pub targets: Vec<TargetRef>,
    /// Where its module is: `file:///…`, `http(s)://…` or `oci://…`; without a scheme it is an image.
    pub url: Arc<str>,
    /// The SHA-256 in lower-case hex of the module, or of the image's manifest, if pinned.
    pub sha256: Option<Arc<str>>,
    /// When it is asked for again; unset: as its URL suggests.
    pub pull_policy: Option<PullPolicy>,
    /// The [`PullSecret`] of its namespace that it is asked for with.
    pub pull_secret: Option<Arc<str>>,
    /// The root id that the module registers its context under.
    pub plugin_name: Arc<str>,
    /// What it looks at.
    pub kind: PluginKind,
    /// The ports of services to which connections are looked at, for [`PluginKind::Network`]; empty: all.
    pub ports: Vec<u16>,
    /// Its configuration as JSON text; empty without one.
    pub config: Arc<str>,
    /// When it runs.
    pub phase: PluginPhase,
    /// Among plugins of its phase, higher first; unset is the lowest.
    pub priority: i32,
    /// What happens when it cannot run.
    pub fail_strategy: FailStrategy,
    /// Environment variables given to the module.
    pub env: Vec<(Arc<str>, Arc<str>)>,
    /// Environment variables of the proxy that it is to be given too.
    pub host_env: Vec<Arc<str>>,
    /// Whether it sees the body while it holds the head. As in Istio it does not, unless it says so.
    pub holds_heads: bool,
    /// What it may use.
    pub limits: PluginLimits,
    /// Which instance of it an exchange meets.
    pub isolation: Isolation,
    /// What its word counts for.
    pub mode: PluginMode,
}
