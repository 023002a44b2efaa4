//! WebAssembly plugins (`extensions.istio.io/v1alpha1 WasmPlugin`).

use crate::{ResourceName, TargetRef};
use std::sync::Arc;

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

/// One plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WasmPlugin {
    /// Its name.
    pub name: ResourceName,
    /// What it attaches to; empty: it selects workloads by label, which no waypoint is.
    pub targets: Vec<TargetRef>,
    /// Where its module is: `file:///…`.
    pub url: Arc<str>,
    /// The module's SHA-256 in lower-case hex, if pinned.
    pub sha256: Option<Arc<str>>,
    /// The root id that the module registers its context under.
    pub plugin_name: Arc<str>,
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
}
