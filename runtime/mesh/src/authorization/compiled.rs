//! The policies of one workload, compiled: what is asked of a connection does not grow with the number of policies.

use super::index::Index;
use super::{Authorization, Decision, DenyReason, L4Peer, PolicyAction, Scope, Trial};
use crate::{ResourceName, Snapshot, Workload};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Compiled policies are kept for so many workloads: more than run on a node. Beyond, all are compiled anew.
const KEPT_MAX: usize = 4096;

/// How many names of policies a denial tells.
const NAMES_MAX: usize = 4;

/// The policies of workloads that were decided about. One for all snapshots: what it holds says for which state of the
/// policies and of the workload it was compiled.
#[derive(Default)]
pub(crate) struct Compiled(Mutex<HashMap<Arc<str>, Arc<L4Policies>>>);

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

/// The policies that apply to a workload: the global ones, those of its namespace, those it names.
#[derive(Debug)]
pub struct L4Policies {
    /// The state of all policies that this was made from.
    version: u64,
    /// The workload that this was made for; `None` for one that is not in the mesh.
    workload: Option<Arc<Workload>>,
    /// A policy that the workload names and that is not known yet.
    missing: Option<ResourceName>,
    all: Vec<Arc<Authorization>>,
    deny: Index,
    allow: Index,
    /// The first ALLOW policies; there are none if this is empty.
    allow_names: Vec<ResourceName>,
    trial_deny: Index,
    trial_allow: Index,
    trial_allow_first: Option<ResourceName>,
}

/// The compiled policies of a workload as it is in `snapshot`. The same as before, if neither any policy nor the workload
/// has changed since: whoever keeps it can tell by comparing pointers whether to decide again.
pub fn l4_policies(snapshot: &Snapshot, workload: &Workload) -> Arc<L4Policies> {
    // Only the mesh's own form is kept: others are passed in by tests and offline checks.
    let own = snapshot.workload(&workload.uid).filter(|own| std::ptr::eq(&raw const ***own, workload));
    let Some(own) = own else { return Arc::new(L4Policies::new(snapshot, workload, None)) };
    let fits = |known: &&Arc<L4Policies>| {
        let same = known.workload.as_ref().is_some_and(|workload| Arc::ptr_eq(workload, own));
        same && known.version == snapshot.policies
    };
    if let Some(known) = snapshot.compiled.0.lock().get(&own.uid).filter(fits) {
        return Arc::clone(known);
    }
    let made = Arc::new(L4Policies::new(snapshot, own, Some(Arc::clone(own))));
    let mut kept = snapshot.compiled.0.lock();
    if kept.len() >= KEPT_MAX && !kept.contains_key(&own.uid) {
        kept.clear();
    }
    kept.insert(Arc::clone(&own.uid), Arc::clone(&made));
    made
}

impl L4Policies {
    fn new(snapshot: &Snapshot, workload: &Workload, own: Option<Arc<Workload>>) -> Self {
        let (all, missing) = match applying(snapshot, workload) {
            Ok(all) => (all, None),
            Err(missing) => (Vec::new(), Some(missing)),
        };
        let of = |action, dry_run| {
            let chosen =
                move |policy: &&Arc<Authorization>| policy.action == action && policy.dry_run == dry_run;
            all.iter().filter(chosen)
        };
        let index = |action, dry_run| Index::new(of(action, dry_run).cloned());
        let (deny, allow) = (index(PolicyAction::Deny, false), index(PolicyAction::Allow, false));
        let names = of(PolicyAction::Allow, false).map(|policy| policy.name.clone());
        let (allow_names, trial_allow_first) = (
            names.take(NAMES_MAX).collect(),
            of(PolicyAction::Allow, true).next().map(|policy| policy.name.clone()),
        );
        let (trial_deny, trial_allow) = (index(PolicyAction::Deny, true), index(PolicyAction::Allow, true));
        let (version, workload) = (snapshot.policies, own);
        Self {
            version,
            workload,
            missing,
            all,
            deny,
            allow,
            allow_names,
            trial_deny,
            trial_allow,
            trial_allow_first,
        }
    }

    /// Decides whether `peer` may connect.
    ///
    /// Any DENY match denies; without ALLOW policies the rest is allowed; otherwise one must match (ztunnel
    /// `src/state.rs`, `assert_rbac`). A policy named and not known denies, where ztunnel skips it; one that was removed
    /// is skipped.
    pub fn decide(&self, peer: &L4Peer<'_>) -> Decision {
        if let Some(missing) = &self.missing {
            return Decision::Deny(DenyReason::MissingPolicy(missing.clone()));
        }
        if let Some((policy, rule)) = self.deny.first_match(peer) {
            return Decision::Deny(DenyReason::Policy(policy.clone(), rule));
        }
        if self.allow_names.is_empty() {
            return Decision::Allow(None);
        }
        match self.allow.first_match(peer) {
            Some((policy, rule)) => Decision::Allow(Some((policy.clone(), rule))),
            None => Decision::Deny(DenyReason::NotAllowed(self.allow_names.clone())),
        }
    }

    /// What the policies on trial would do, DENY before ALLOW; nothing when there are none, or when a policy that the
    /// workload names is not known yet.
    pub fn on_trial(&self, peer: &L4Peer<'_>) -> Vec<Trial> {
        let denied = self.trial_deny.first_match(peer);
        let denied = denied.map(|(policy, rule)| Trial::WouldDeny(policy.clone(), rule));
        let allowed = match self.trial_allow.first_match(peer) {
            Some((policy, rule)) => Some(Trial::WouldAllow(policy.clone(), rule)),
            None => self.trial_allow_first.clone().map(Trial::WouldNotAllow),
        };
        denied.into_iter().chain(allowed).collect()
    }

    /// All of them, in the order in which they are asked within an action.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.all.iter()
    }
}

/// `Err`: a policy that the workload names is not known yet.
fn applying(snapshot: &Snapshot, workload: &Workload) -> Result<Vec<Arc<Authorization>>, ResourceName> {
    let is_scoped = |policy: &Authorization| match policy.scope {
        Scope::Global => true,
        Scope::Namespace => policy.name.namespace == workload.namespace,
        Scope::WorkloadSelector => false,
    };
    let of_namespace = snapshot.namespace_authorizations(&workload.namespace);
    let mut all: Vec<_> = snapshot.global_authorizations().iter().chain(of_namespace).cloned().collect();
    for name in &workload.authorization_policies {
        match snapshot.authorization(name) {
            Some(policy) if is_scoped(policy) => {}
            Some(policy) => all.push(Arc::clone(policy)),
            None if snapshot.gone.contains(name) => {}
            None => return Err(name.clone()),
        }
    }
    let settings = snapshot.settings();
    if !settings.trust_domain_aliases.is_empty() {
        // The workload's own is the mesh's, whatever the settings call that.
        let own = std::iter::once(workload.identity.trust_domain().into());
        let known = std::iter::once(&settings.trust_domain).chain(&settings.trust_domain_aliases);
        let domains = crate::TrustDomains::new(own.chain(known.cloned()));
        for policy in &mut all {
            expand(Arc::make_mut(policy), &domains);
        }
    }
    Ok(all)
}

/// Who is named in one of the mesh's trust domains is meant in all of them.
fn expand(policy: &mut Authorization, domains: &crate::TrustDomains) {
    let clauses = policy.rules.iter_mut().flat_map(|rule| &mut rule.clauses);
    for one in clauses.flat_map(|clause| &mut clause.matches) {
        one.principals = domains.principals(&one.principals);
    }
}
