//! AuthorizationPolicy, read whole and checked as Istio's admission does.

mod condition;
mod values;

use super::refusal;
use super::target::{self, Attachment};
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{
    AuthorizationPolicy, Change, Condition, CustomPolicy, MeshSettings, Operation, PolicyAction, PolicyRule,
    ResourceKey, Source,
};
use std::sync::Arc;
use values::{
    host, ip_block, path, port, principal, request_principal, text, text_match, trust_domain, values,
};

/// Istio's limit on rules of one policy, and on sources of one rule.
const RULES_MAX: usize = 512;
/// Istio's limit on service accounts of one source.
const SERVICE_ACCOUNTS_MAX: usize = 16;

/// The annotation of a policy that only says what it would do.
pub(crate) const DRY_RUN: &str = "istio.io/dry-run";

/// What a policy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Allow,
    Deny,
    Audit,
    Custom,
}

/// A policy as written, for waypoints and for ztunnels.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) attachment: Attachment,
    pub(crate) action: Action,
    pub(crate) rules: Vec<Rule>,
    pub(crate) dry_run: bool,
    /// Who is asked: for action CUSTOM.
    pub(crate) provider: Option<Arc<str>>,
}

/// A rule, and where it asks what a ztunnel cannot know.
#[derive(Debug, Default)]
pub(crate) struct Rule {
    pub(crate) rule: PolicyRule,
    /// Attributes that only a waypoint can look at.
    pub(crate) l7: Vec<FieldPath>,
}

/// What a waypoint does with the policy.
pub(super) fn decode(
    object: &Object,
    key: &ResourceKey,
    settings: &MeshSettings,
    findings: &mut Findings,
) -> Vec<Change> {
    let policy = parse(object, settings, findings);
    if findings.broken {
        return refusal(object, key, &policy.attachment, findings);
    }
    if !policy.attachment.has_targets {
        return vec![Change::L7Removed(key.clone())];
    }
    let action = match policy.action {
        Action::Allow => PolicyAction::Allow,
        Action::Deny | Action::Custom => PolicyAction::Deny,
        Action::Audit => PolicyAction::Audit,
    };
    let enforced = AuthorizationPolicy {
        name: object.name.clone(),
        targets: policy.attachment.targets,
        action,
        rules: policy.rules.into_iter().map(|rule| rule.rule).collect(),
        dry_run: policy.dry_run,
    };
    let Some(provider) = policy.provider else { return vec![Change::Policy(enforced)] };
    vec![Change::CustomPolicy(CustomPolicy { provider, policy: enforced })]
}

/// Reads the whole policy, noting everything that is wrong.
pub(crate) fn parse(object: &Object, settings: &MeshSettings, findings: &mut Findings) -> Policy {
    const KNOWN: [&str; 6] = ["selector", "targetRef", "targetRefs", "action", "provider", "rules"];
    const ACTIONS: [(&str, Action); 4] = [
        ("ALLOW", Action::Allow),
        ("DENY", Action::Deny),
        ("AUDIT", Action::Audit),
        ("CUSTOM", Action::Custom),
    ];
    let nothing = serde_json::json!({});
    // A policy without a spec is `ALLOW` without rules, as in Istio.
    let spec = if object.spec.is_null() { &nothing } else { &object.spec };
    let spec = Node::new(spec, object.root()).map(&KNOWN, findings);
    let attachment = target::attachment(&spec, object, settings, findings);
    let action = match spec.get("action") {
        Some(node) => node.choice(&ACTIONS, findings).unwrap_or(Action::Deny),
        None => Action::Allow,
    };
    let provider = provider(&spec, action, findings);
    let rules: Vec<Rule> = spec
        .bounded_list("rules", RULES_MAX, findings)
        .iter()
        .enumerate()
        .map(|(index, node)| rule(node, index, object, findings))
        .collect();
    if rules.is_empty() && matches!(action, Action::Deny | Action::Custom) {
        findings.refuse("missing-field", &spec.at, "a policy with action DENY or CUSTOM must have rules");
    }
    if action == Action::Custom {
        refuse_early_questions(&rules, &spec.at, findings);
    }
    let dry_run = dry_run(object, action, findings);
    Policy { attachment, action, rules, dry_run, provider }
}

fn provider(spec: &Entries<'_>, action: Action, findings: &mut Findings) -> Option<Arc<str>> {
    match (spec.get("provider"), action) {
        (Some(node), Action::Custom) => {
            let name = node.map(&["name"], findings).require("name", findings)?;
            Some(name.filled(findings)?.into())
        }
        (Some(node), _) => {
            findings.refuse("invalid-value", &node.at, "only a policy with action CUSTOM has a provider");
            None
        }
        (None, Action::Custom) => {
            findings.refuse("missing-field", &spec.at, "action CUSTOM needs a provider");
            None
        }
        (None, _) => None,
    }
}

/// Providers are asked before identities and tokens are looked at, so Istio's admission takes no rule that needs them.
fn refuse_early_questions(rules: &[Rule], spec: &FieldPath, findings: &mut Findings) {
    let reason =
        "a policy with action CUSTOM cannot ask who sends the request: its provider is told, and decides";
    for (at, Rule { rule, .. }) in rules.iter().enumerate() {
        let place = spec.key("rules").index(at);
        for (index, source) in rule.from.iter().enumerate() {
            let addresses = Source {
                ip_blocks: source.ip_blocks.clone(),
                remote_ip_blocks: source.remote_ip_blocks.clone(),
                ..Source::default()
            };
            if *source != addresses {
                findings.refuse("invalid-value", &place.key("from").index(index).key("source"), reason);
            }
        }
        for (index, condition) in rule.when.iter().enumerate() {
            if asks_who(condition) {
                findings.refuse("invalid-value", &place.key("when").index(index).key("key"), reason);
            }
        }
    }
}

fn asks_who(condition: &Condition) -> bool {
    match condition {
        Condition::SourceNamespace(_)
        | Condition::SourcePrincipal(_)
        | Condition::SourceServiceAccount(_)
        | Condition::SourceTrustDomain(_)
        | Condition::RequestPrincipal(_)
        | Condition::RequestAudiences(_)
        | Condition::RequestPresenter(_)
        | Condition::RequestClaim(..) => true,
        Condition::RequestHeader(..)
        | Condition::SourceIp(_)
        | Condition::RemoteIp(_)
        | Condition::DestinationIp(_)
        | Condition::DestinationPort(_)
        | Condition::ConnectionSni(_)
        | Condition::FilterMetadata(..) => false,
    }
}

fn dry_run(object: &Object, action: Action, findings: &mut Findings) -> bool {
    let Some(text) = object.annotations.get(DRY_RUN) else { return false };
    let at = FieldPath::of(&["metadata", "annotations", DRY_RUN]);
    let Ok(dry_run) = text.parse::<bool>() else {
        findings.refuse("invalid-value", &at, "must be `true` or `false`");
        return false;
    };
    if dry_run && !matches!(action, Action::Allow | Action::Deny) {
        findings.refuse("invalid-value", &at, "only ALLOW and DENY policies can be tried without effect");
    }
    dry_run
}

fn rule(node: &Node<'_>, index: usize, object: &Object, findings: &mut Findings) -> Rule {
    let entries = node.map(&["from", "to", "when"], findings);
    let mut found = Rule { rule: PolicyRule { index, ..PolicyRule::default() }, ..Rule::default() };
    for key in ["from", "to", "when"] {
        if let Some(list) = entries.get(key).filter(|list| list.value.as_array().is_some_and(Vec::is_empty)) {
            findings.refuse("invalid-value", &list.at, "must not be empty: leave it out to mean any");
        }
    }
    for from in entries.bounded_list("from", RULES_MAX, findings) {
        let inner = from.map(&["source"], findings).require("source", findings);
        let source = inner.map(|node| source(&node, object, &mut found, findings)).unwrap_or_default();
        found.rule.from.push(source);
    }
    for to in entries.list("to", findings) {
        let inner = to.map(&["operation"], findings).require("operation", findings);
        let operation = inner.map(|node| operation(&node, &mut found, findings)).unwrap_or_default();
        found.rule.to.push(operation);
    }
    for when in entries.list("when", findings) {
        let condition = condition::read(&when, object, &mut found, findings);
        found.rule.when.extend(condition);
    }
    found
}

fn source(node: &Node<'_>, object: &Object, rule: &mut Rule, findings: &mut Findings) -> Source {
    const KNOWN: [&str; 14] = [
        "principals",
        "notPrincipals",
        "requestPrincipals",
        "notRequestPrincipals",
        "namespaces",
        "notNamespaces",
        "serviceAccounts",
        "notServiceAccounts",
        "ipBlocks",
        "notIpBlocks",
        "remoteIpBlocks",
        "notRemoteIpBlocks",
        "trustDomains",
        "notTrustDomains",
    ];
    let entries = node.map(&KNOWN, findings);
    if entries.is_empty() {
        findings.refuse("invalid-value", &node.at, "must not be empty");
    }
    let account = |node: &Node<'_>, text: &str, findings: &mut Findings| {
        values::service_account(node, text, object, findings)
    };
    let source = Source {
        principals: values(&entries, "principals", "notPrincipals", findings, principal),
        namespaces: values(&entries, "namespaces", "notNamespaces", findings, text),
        service_accounts: values(&entries, "serviceAccounts", "notServiceAccounts", findings, account),
        ip_blocks: values(&entries, "ipBlocks", "notIpBlocks", findings, ip_block),
        remote_ip_blocks: values(&entries, "remoteIpBlocks", "notRemoteIpBlocks", findings, ip_block),
        trust_domains: values(&entries, "trustDomains", "notTrustDomains", findings, trust_domain),
        request_principals: values(
            &entries,
            "requestPrincipals",
            "notRequestPrincipals",
            findings,
            request_principal,
        ),
    };
    let accounts = &source.service_accounts;
    if accounts.any.len() > SERVICE_ACCOUNTS_MAX || accounts.none.len() > SERVICE_ACCOUNTS_MAX {
        let reason = format!("has more than {SERVICE_ACCOUNTS_MAX} service accounts");
        findings.refuse("invalid-value", &node.at, reason);
    }
    let has_others = !source.principals.is_empty() || !source.namespaces.is_empty();
    if !accounts.is_empty() && has_others {
        let reason = "service accounts cannot be combined with principals or namespaces in one source";
        findings.refuse("invalid-value", &node.at, reason);
    }
    let l7 = [
        (source.request_principals.is_empty(), "requestPrincipals", "notRequestPrincipals"),
        (source.remote_ip_blocks.is_empty(), "remoteIpBlocks", "notRemoteIpBlocks"),
        (source.trust_domains.is_empty(), "trustDomains", "notTrustDomains"),
    ];
    for (_, any, none) in l7.into_iter().filter(|(is_empty, _, _)| !is_empty) {
        rule.l7.push(set_field(&entries, any, none));
    }
    source
}

fn operation(node: &Node<'_>, rule: &mut Rule, findings: &mut Findings) -> Operation {
    const KNOWN: [&str; 8] =
        ["hosts", "notHosts", "ports", "notPorts", "methods", "notMethods", "paths", "notPaths"];
    let entries = node.map(&KNOWN, findings);
    if entries.is_empty() {
        findings.refuse("invalid-value", &node.at, "must not be empty");
    }
    let operation = Operation {
        hosts: values(&entries, "hosts", "notHosts", findings, host),
        ports: values(&entries, "ports", "notPorts", findings, port),
        methods: values(&entries, "methods", "notMethods", findings, text_match),
        paths: values(&entries, "paths", "notPaths", findings, path),
    };
    let l7 = [
        (operation.hosts.is_empty(), "hosts", "notHosts"),
        (operation.methods.is_empty(), "methods", "notMethods"),
        (operation.paths.is_empty(), "paths", "notPaths"),
    ];
    for (_, any, none) in l7.into_iter().filter(|(is_empty, _, _)| !is_empty) {
        rule.l7.push(set_field(&entries, any, none));
    }
    operation
}

/// The place of whichever of two fields is set.
fn set_field(entries: &Entries<'_>, any: &str, none: &str) -> FieldPath {
    entries.at.key(if entries.get(any).is_some() { any } else { none })
}
