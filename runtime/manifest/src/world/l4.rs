//! AuthorizationPolicies without targets, as ztunnels enforce them (istiod's conversion, facts of `istio.security`).

use super::pods::Pod;
use super::waypoints::Waypoint;
use super::{Scene, selects};
use crate::decode::policy::{self, Action, Rule};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::Findings;
use cairn_mesh::{
    Authorization, Clause, Condition, L4Match, L4Rule, Operation, PolicyAction, Scope, Source, TextMatch,
    TrustDomains, Values,
};
use std::sync::Arc;

/// Converts all policies that are for ztunnels, and lists on each pod those that select it.
pub(super) fn policies(
    scene: &mut Scene<'_>,
    waypoints: &[Waypoint],
    pods: &mut [Pod],
) -> Vec<Authorization> {
    let mut policies = Vec::new();
    for (index, object) in scene.objects.iter().enumerate() {
        if !object.is("security.istio.io", "AuthorizationPolicy") {
            continue;
        }
        let mut findings = Findings::default();
        let policy = policy::parse(object, scene.settings, &mut findings);
        let unreadable = findings.broken || object.broken.is_some();
        if !policy.attachment.guards_workloads() && object.broken.is_none() {
            continue;
        }
        let selector = policy.attachment.selector.as_ref().filter(|_| !policy.attachment.uncertain);
        let is_root = object.name.namespace == scene.settings.root_namespace;
        let scope = match selector {
            Some(_) => Scope::WorkloadSelector,
            None if is_root => Scope::Global,
            None => Scope::Namespace,
        };
        let (action, rules) = if unreadable {
            (PolicyAction::Deny, vec![L4Rule::default()])
        } else {
            let Some(action) = l4_action(scene, index, policy.action) else { continue };
            let guarded = waypoints.iter().any(|waypoint| waypoint.name.namespace == object.name.namespace);
            let rules = policy.rules.iter().enumerate();
            (action, rules.map(|(at, rule)| convert(scene, index, at, action, rule, guarded)).collect())
        };
        if let Some(selector) = selector {
            for pod in
                pods.iter_mut().filter(|pod| is_root || pod.workload.namespace == object.name.namespace)
            {
                if selects(selector, &pod.labels) {
                    pod.workload.authorization_policies.push(object.name.clone());
                }
            }
        }
        let dry_run = is_dry_run(object);
        policies.push(Authorization { name: object.name.clone(), scope, action, rules, dry_run });
    }
    policies
}

/// Read again here, as a policy that cannot be read is still only tried when it clearly says so.
fn is_dry_run(object: &Object) -> bool {
    object.annotations.get("istio.io/dry-run").is_some_and(|text| text == "true")
}

fn l4_action(scene: &mut Scene<'_>, index: usize, action: Action) -> Option<PolicyAction> {
    match action {
        Action::Allow => Some(PolicyAction::Allow),
        Action::Deny => Some(PolicyAction::Deny),
        Action::Audit | Action::Custom => {
            let at = FieldPath::of(&["spec", "action"]);
            let reason = "only waypoints know this action: without targetRefs the policy has no effect";
            scene.note(index, Severity::Error, "l7-in-l4-policy", &at, reason);
            None
        }
    }
}

/// Converts a rule. Its place among the rules stays, as it is named in logs.
fn convert(
    scene: &mut Scene<'_>,
    index: usize,
    at: usize,
    action: PolicyAction,
    rule: &Rule,
    guarded: bool,
) -> L4Rule {
    let mut clauses = Vec::new();
    let domains = scene.settings.trust_domains();
    let from: Vec<L4Match> = rule.rule.from.iter().map(|source| source_match(source, &domains)).collect();
    let to: Vec<L4Match> = rule.rule.to.iter().map(operation_match).collect();
    clauses.extend(
        [from, to].into_iter().filter(|matches| !matches.is_empty()).map(|matches| Clause { matches }),
    );
    for condition in &rule.rule.when {
        clauses.push(Clause { matches: vec![condition_match(condition, &domains)] });
    }
    let place = FieldPath::of(&["spec", "rules"]).index(at);
    let l7 = rule.l7.first().cloned().or_else(|| has_inner_star(rule).then(|| place.key("from")));
    let Some(field) = l7 else { return L4Rule { clauses } };
    let never_fires = clauses.iter().any(|clause| clause.matches.iter().all(is_empty));
    let hint = if guarded { "; with targetRefs the waypoint of the namespace enforces it" } else { "" };
    let (severity, consequence) = match (action, never_fires) {
        (PolicyAction::Allow, _) => (Severity::Warning, "the rule allows nothing"),
        (_, true) => (Severity::Error, "the rule never denies"),
        (_, false) => (Severity::Warning, "the rule denies more, whatever this attribute is"),
    };
    let reason = format!("a ztunnel cannot look at this attribute, so {consequence}{hint}");
    scene.note(index, severity, "l7-in-l4-policy", &field, reason);
    match action {
        PolicyAction::Allow => {
            let never = L4Match { never: true, ..L4Match::default() };
            L4Rule { clauses: vec![Clause { matches: vec![never] }] }
        }
        PolicyAction::Deny | PolicyAction::Audit => L4Rule { clauses },
    }
}

fn is_empty(one: &L4Match) -> bool {
    *one == L4Match::default()
}

/// Namespaces may have `*` anywhere in a waypoint, at one end here.
fn namespaces(values: &Values<Arc<str>>) -> Values<TextMatch> {
    let keep = |list: &[Arc<str>]| {
        list.iter().filter(|text| !is_inner_star(text)).map(|text| TextMatch::parse(text)).collect()
    };
    Values { any: keep(&values.any), none: keep(&values.none) }
}

fn is_inner_star(text: &str) -> bool {
    text != "*"
        && (text.matches('*').count() > 1 || text.trim_start_matches('*').trim_end_matches('*').contains('*'))
}

fn has_inner_star(rule: &Rule) -> bool {
    let conditions = rule.rule.when.iter().filter_map(|condition| match condition {
        Condition::SourceNamespace(values) => Some(values),
        _ => None,
    });
    let all = rule.rule.from.iter().map(|source| &source.namespaces).chain(conditions);
    all.flat_map(|values| values.any.iter().chain(&values.none)).any(|text| is_inner_star(text))
}

fn source_match(source: &Source, domains: &TrustDomains) -> L4Match {
    L4Match {
        principals: domains.principals(&source.principals),
        namespaces: namespaces(&source.namespaces),
        service_accounts: source.service_accounts.clone(),
        source_ips: source.ip_blocks.clone(),
        ..L4Match::default()
    }
}

fn operation_match(operation: &Operation) -> L4Match {
    L4Match { destination_ports: operation.ports.clone(), ..L4Match::default() }
}

fn condition_match(condition: &Condition, domains: &TrustDomains) -> L4Match {
    let none = L4Match::default();
    match condition {
        Condition::SourceIp(values) => L4Match { source_ips: values.clone(), ..none },
        Condition::SourceNamespace(values) => L4Match { namespaces: namespaces(values), ..none },
        Condition::SourcePrincipal(values) => L4Match { principals: domains.principals(values), ..none },
        Condition::DestinationIp(values) => L4Match { destination_ips: values.clone(), ..none },
        Condition::DestinationPort(values) => L4Match { destination_ports: values.clone(), ..none },
        Condition::RequestHeader(..)
        | Condition::RemoteIp(_)
        | Condition::SourceServiceAccount(_)
        | Condition::SourceTrustDomain(_)
        | Condition::ConnectionSni(_)
        | Condition::RequestPrincipal(_)
        | Condition::RequestAudiences(_)
        | Condition::RequestPresenter(_)
        | Condition::RequestClaim(..)
        | Condition::FilterMetadata(..) => none,
    }
}
