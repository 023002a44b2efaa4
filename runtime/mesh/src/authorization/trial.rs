//! What policies on trial (dry run) would do with a connection.

use super::{L4Peer, l4_policies};
use crate::{ResourceName, Snapshot, Workload};
use std::fmt;

/// What the policies on trial of one action would do. They change no decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trial {
    /// This DENY policy's rule matches.
    WouldDeny(ResourceName, usize),
    /// This ALLOW policy's rule matches.
    WouldAllow(ResourceName, usize),
    /// There are ALLOW policies on trial and none matches; the first of them.
    WouldNotAllow(ResourceName),
}

impl Trial {
    /// The policy.
    pub fn policy(&self) -> &ResourceName {
        match self {
            Self::WouldDeny(policy, _) | Self::WouldAllow(policy, _) | Self::WouldNotAllow(policy) => policy,
        }
    }

    /// `deny` or `allow`: what would become of the connection.
    pub fn decision(&self) -> &'static str {
        match self {
            Self::WouldDeny(..) | Self::WouldNotAllow(_) => "deny",
            Self::WouldAllow(..) => "allow",
        }
    }
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WouldDeny(policy, rule) => write!(f, "{policy} rule {rule} would deny"),
            Self::WouldAllow(policy, rule) => write!(f, "{policy} rule {rule} would allow"),
            Self::WouldNotAllow(policy) => write!(f, "none would allow: {policy}"),
        }
    }
}

/// What the policies on trial that apply to `workload` would do: [`super::L4Policies::on_trial`].
pub fn on_trial(snapshot: &Snapshot, workload: &Workload, peer: &L4Peer<'_>) -> Vec<Trial> {
    l4_policies(snapshot, workload).on_trial(peer)
}
