//! Where a filter stands in the chain: Istio's phases and priorities as a sort over one list.

use crate::Factory;
use std::sync::Arc;

/// The place of a filter among the others, in the order requests meet them
/// (Istio: ext_authz, AUTHN plugins, JWT, AUTHZ plugins, RBAC, CORS and fault, STATS plugins, plugins without phase).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Position {
    /// A policy that cannot be enforced yet: answers before anything else runs.
    Unenforceable,
    /// External authorization.
    Custom,
    /// Plugins of phase AUTHN.
    PluginAuthn,
    /// Token verification.
    Authentication,
    /// Plugins of phase AUTHZ.
    PluginAuthz,
    /// AuthorizationPolicy.
    Authorization,
    /// Plugins of phase STATS.
    PluginStats,
    /// Plugins without a phase, last before the router.
    PluginUnspecified,
}

/// A factory with its place.
#[derive(Clone)]
pub struct Slot {
    /// The phase.
    pub position: Position,
    /// Within one position higher priorities run first; unset sorts as the lowest.
    pub priority: i32,
    /// The filter.
    pub factory: Arc<dyn Factory>,
}

/// Sorts by position, then priority (higher first), then name, and returns the factories in request order.
pub fn sort_factories(mut slots: Vec<Slot>) -> Vec<Arc<dyn Factory>> {
    slots.sort_by(|a, b| {
        a.position
            .cmp(&b.position)
            .then(b.priority.cmp(&a.priority))
            .then_with(|| a.factory.name().cmp(b.factory.name()))
    });
    slots.into_iter().map(|slot| slot.factory).collect()
}
