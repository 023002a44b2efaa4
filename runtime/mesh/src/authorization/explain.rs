//! Every rule that a connection is held against, and what it fails on.

use super::{Authorization, L4Peer, L4Rule, PolicyAction, l4_policies};
use crate::{Identity, ResourceName, Snapshot, Workload};

/// The most rules that are told of.
const CONSIDERED_MAX: usize = 256;

/// One rule of an L4 policy, and what it says to a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L4Considered {
    /// The policy.
    pub policy: ResourceName,
    /// What a match means.
    pub action: PolicyAction,
    /// It only reports.
    pub dry_run: bool,
    /// The rule; `None` for a policy without any.
    pub rule: Option<usize>,
    /// Whether it matches.
    pub matched: bool,
    /// If it does not, what it fails on.
    pub because: String,
}

impl L4Considered {
    /// What it is, in a few words.
    pub fn what(&self) -> String {
        let action = match self.action {
            PolicyAction::Allow => "ALLOW",
            PolicyAction::Deny => "DENY",
            PolicyAction::Audit => "AUDIT",
        };
        let rule = self.rule.map_or_else(String::new, |rule| format!(" rule {rule}"));
        let tried = if self.dry_run { "dry run: " } else { "" };
        format!("{tried}{action} {}{rule}", self.policy)
    }
}

/// The rules that [`super::decide`] asks, in its order: DENY before ALLOW.
pub fn consider(snapshot: &Snapshot, workload: &Workload, peer: &L4Peer<'_>) -> Vec<L4Considered> {
    let policies = l4_policies(snapshot, workload);
    let of = |action| policies.all().filter(move |policy| policy.action == action);
    let in_order = of(PolicyAction::Deny).chain(of(PolicyAction::Allow));
    in_order.flat_map(|policy| rules(policy, peer)).take(CONSIDERED_MAX).collect()
}

fn rules(policy: &Authorization, peer: &L4Peer<'_>) -> Vec<L4Considered> {
    let one = |rule: Option<(usize, &L4Rule)>| L4Considered {
        policy: policy.name.clone(),
        action: policy.action,
        dry_run: policy.dry_run,
        rule: rule.map(|(index, _)| index),
        matched: rule.is_some_and(|(_, rule)| rule.matches(peer)),
        because: rule.map_or_else(|| "it has no rule".to_owned(), |(_, rule)| because(rule, peer)),
    };
    if policy.rules.is_empty() {
        return vec![one(None)];
    }
    policy.rules.iter().enumerate().map(|rule| one(Some(rule))).collect()
}

/// What a rule fails on first; empty when it matches.
fn because(rule: &L4Rule, peer: &L4Peer<'_>) -> String {
    let Some(clause) = rule.clauses.iter().find(|clause| !clause.matches(peer)) else { return String::new() };
    let field = clause.matches.iter().find_map(|one| {
        let can_match = !one.never && !one.is_empty();
        if can_match { one.first_miss(peer) } else { None }
    });
    let identity = |part: fn(&Identity) -> String| match peer.identity {
        Some(identity) => part(identity),
        None => "a peer without identity".to_owned(),
    };
    let found = match field {
        None => return "it asks for what a ztunnel cannot look at".to_owned(),
        Some("namespace") => identity(|peer| peer.namespace().to_owned()),
        Some("principal") => identity(|peer| peer.principal().to_owned()),
        Some("service account") => {
            identity(|peer| format!("{}/{}", peer.namespace(), peer.service_account()))
        }
        Some("source ip") => peer.source.ip().to_string(),
        Some("destination ip") => peer.destination.ip().to_string(),
        Some(_) => peer.destination.port().to_string(),
    };
    format!("{}: {found} is none that it asks for", field.unwrap_or_default())
}
