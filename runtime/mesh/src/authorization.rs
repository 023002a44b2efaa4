//! L4 authorization: the policies a ztunnel enforces (`istio.security.Authorization`), and the decision.

mod compiled;
mod explain;
mod index;
mod trial;

pub(crate) use compiled::Compiled;
pub use compiled::{L4Policies, l4_policies};
pub use explain::{L4Considered, consider};
pub use trial::{Trial, on_trial};

use crate::{Identity, ResourceName, ServiceAccount, Snapshot, TextMatch, Values, Workload};
use ipnet::IpNet;
use std::fmt;
use std::net::SocketAddr;

/// What a matching rule means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    /// Matching traffic is allowed, all other denied.
    Allow,
    /// Matching traffic is denied.
    Deny,
    /// Matching traffic is marked; it changes no decision.
    Audit,
}

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every workload.
    Global,
    /// Every workload of its namespace.
    Namespace,
    /// Workloads that name it.
    WorkloadSelector,
}

/// One L4 policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// Its name.
    pub name: ResourceName,
    /// Which workloads it applies to.
    pub scope: Scope,
    /// What a match means: allow or deny.
    pub action: PolicyAction,
    /// Its rules; any may match. None: it never matches.
    pub rules: Vec<L4Rule>,
    /// It only reports what it would do.
    pub dry_run: bool,
}

/// One rule: all clauses must match. None: it matches everything.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct L4Rule {
    /// The clauses.
    pub clauses: Vec<Clause>,
}

/// One clause: any of its matches. None: it matches everything.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Clause {
    /// The matches.
    pub matches: Vec<L4Match>,
}

/// One match: every field set must hold. Nothing set: it never matches (ztunnel `src/rbac.rs`).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct L4Match {
    /// The peer's namespace; a peer without identity has the namespace `""`.
    pub namespaces: Values<TextMatch>,
    /// The peer's identity without its scheme.
    pub principals: Values<TextMatch>,
    /// The peer's service account, whatever its trust domain.
    pub service_accounts: Values<ServiceAccount>,
    /// The peer's address.
    pub source_ips: Values<IpNet>,
    /// The destination's address.
    pub destination_ips: Values<IpNet>,
    /// The destination's port: the workload's, not the service's.
    pub destination_ports: Values<u16>,
    /// It holds something unknown here, so it matches nothing. (An ALLOW rule then allows less. The reader of a DENY
    /// rule leaves this unset, so that the known part denies.)
    pub never: bool,
}

impl L4Match {
    fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.principals.is_empty()
            && self.service_accounts.is_empty()
            && self.source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.destination_ports.is_empty()
    }

    fn matches(&self, peer: &L4Peer<'_>) -> bool {
        !self.never && !self.is_empty() && self.first_miss(peer).is_none()
    }

    /// The first field that does not hold.
    fn first_miss(&self, peer: &L4Peer<'_>) -> Option<&'static str> {
        let namespace = peer.identity.map_or("", Identity::namespace);
        let source = peer.source.ip().to_canonical();
        let destination = peer.destination.ip().to_canonical();
        let is_account = |account: &ServiceAccount| {
            peer.identity.is_some_and(|id| {
                id.namespace() == &*account.namespace && id.service_account() == &*account.name
            })
        };
        if !self.namespaces.hold(|text| text.matches(namespace)) {
            Some("namespace")
        } else if !self.principals.hold(|text| peer.identity.is_some_and(|id| text.matches(id.principal()))) {
            Some("principal")
        } else if !self.service_accounts.hold(is_account) {
            Some("service account")
        } else if !self.source_ips.hold(|block| block.contains(&source)) {
            Some("source ip")
        } else if !self.destination_ips.hold(|block| block.contains(&destination)) {
            Some("destination ip")
        } else if !self.destination_ports.hold(|port| *port == peer.destination.port()) {
            Some("port")
        } else {
            None
        }
    }
}

impl Authorization {
    /// The index of the first rule that matches.
    pub fn matching_rule(&self, peer: &L4Peer<'_>) -> Option<usize> {
        self.rules.iter().position(|rule| rule.matches(peer))
    }
}

impl L4Rule {
    fn matches(&self, peer: &L4Peer<'_>) -> bool {
        self.clauses.iter().all(|clause| clause.matches(peer))
    }
}

impl Clause {
    fn matches(&self, peer: &L4Peer<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|one| one.matches(peer))
    }
}

/// A connection to be decided.
#[derive(Clone, Copy, Debug)]
pub struct L4Peer<'a> {
    /// The identity proven by mTLS; `None` for plaintext.
    pub identity: Option<&'a Identity>,
    /// The peer's address.
    pub source: SocketAddr,
    /// The workload's address and its own port.
    pub destination: SocketAddr,
}

/// Whether a connection is allowed, and by what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes. The policy and its rule, or `None` when no ALLOW policy applies.
    Allow(Option<(ResourceName, usize)>),
    /// No.
    Deny(DenyReason),
}

/// Why a connection is denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// A DENY policy matches.
    Policy(ResourceName, usize),
    /// ALLOW policies apply and none matches; the names of those looked at, at most four.
    NotAllowed(Vec<ResourceName>),
    /// The workload names a policy that has not arrived.
    MissingPolicy(ResourceName),
    /// The mesh no longer knows the workload, nor by which policies it is to be reached.
    UnknownWorkload,
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(name, rule) => write!(f, "explicitly denied by: {name} rule {rule}"),
            Self::NotAllowed(names) => {
                write!(f, "allow policies exist, but none allowed: ")?;
                for (index, name) in names.iter().enumerate() {
                    write!(f, "{}{name}", if index == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            Self::MissingPolicy(name) => write!(f, "policy not known yet: {name}"),
            Self::UnknownWorkload => f.write_str("the workload is no longer known"),
        }
    }
}

/// Decides whether `peer` may connect to `workload`: [`L4Policies::decide`].
pub fn decide(snapshot: &Snapshot, workload: &Workload, peer: &L4Peer<'_>) -> Decision {
    l4_policies(snapshot, workload).decide(peer)
}

#[cfg(test)]
#[path = "authorization/tests.rs"]
mod tests;
