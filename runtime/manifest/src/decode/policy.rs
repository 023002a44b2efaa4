//! AuthorizationPolicy, read whole and checked as Istio's admission does.

use super::target::{self, Attachment};
use super::{refusal, unenforceable};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{
    AuthorizationPolicy, Change, Condition, HostMatch, MeshSettings, Operation, PathMatch, PolicyAction,
    PolicyRule, ResourceKey, ServiceAccount, Source, TextMatch, Values,
};
use ipnet::IpNet;
use std::net::IpAddr;
use std::sync::Arc;

/// Istio's limit on rules of one policy, and on sources of one rule.
const RULES_MAX: usize = 512;
/// Istio's limits on service accounts of one source.
const SERVICE_ACCOUNTS_MAX: usize = 16;
const SERVICE_ACCOUNT_LEN_MAX: usize = 320;

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
}

/// A rule, and what of it the model's form does not hold.
#[derive(Debug, Default)]
pub(crate) struct Rule {
    pub(crate) rule: PolicyRule,
    /// Attributes that only a waypoint can look at.
    pub(crate) l7: Vec<FieldPath>,
    /// Attributes that need a verified token or filter metadata; they are not in `rule`.
    pub(crate) unsupported: Vec<FieldPath>,
    /// How many conditions are not in `rule`.
    pub(crate) missing_conditions: usize,
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
    let spec = object.root();
    let action = match policy.action {
        Action::Allow => PolicyAction::Allow,
        Action::Deny => PolicyAction::Deny,
        Action::Audit => PolicyAction::Audit,
        Action::Custom => {
            let reason = "action CUSTOM (external authorization) is not supported yet";
            return refuse_targets(object, key, policy.attachment, &spec.key("action"), reason, findings);
        }
    };
    if let Some(field) = policy.rules.iter().flat_map(|rule| &rule.unsupported).next() {
        let reason = "attributes of verified tokens and of filter metadata are not supported yet";
        return refuse_targets(object, key, policy.attachment, field, reason, findings);
    }
    vec![Change::Policy(AuthorizationPolicy {
        name: object.name.clone(),
        targets: policy.attachment.targets,
        action,
        rules: policy.rules.into_iter().map(|rule| rule.rule).collect(),
        dry_run: policy.dry_run,
    })]
}

fn refuse_targets(
    object: &Object,
    key: &ResourceKey,
    attachment: Attachment,
    field: &FieldPath,
    reason: &str,
    findings: &mut Findings,
) -> Vec<Change> {
    let said = format!("{reason}: the targets answer 503 until it is removed");
    findings.note(Severity::Error, "unenforceable", field, said);
    vec![unenforceable(object, key, attachment.targets, format!("{field}: {reason}"))]
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
    let provider = spec.get("provider");
    if let Some(provider) = provider.as_ref().filter(|_| action != Action::Custom) {
        findings.refuse("invalid-value", &provider.at, "only a policy with action CUSTOM has a provider");
    } else if action == Action::Custom && provider.is_none() {
        findings.refuse("missing-field", &spec.at, "action CUSTOM needs a provider");
    }
    let rules: Vec<Rule> = spec
        .bounded_list("rules", RULES_MAX, findings)
        .iter()
        .enumerate()
        .map(|(index, node)| rule(node, index, object, findings))
        .collect();
    if rules.is_empty() && matches!(action, Action::Deny | Action::Custom) {
        findings.refuse("missing-field", &spec.at, "a policy with action DENY or CUSTOM must have rules");
    }
    let dry_run = dry_run(object, action, findings);
    Policy { attachment, action, rules, dry_run }
}

fn dry_run(object: &Object, action: Action, findings: &mut Findings) -> bool {
    const NAME: &str = "istio.io/dry-run";
    let Some(text) = object.annotations.get(NAME) else { return false };
    let at = FieldPath::of(&["metadata", "annotations", NAME]);
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
        match condition(&when, object, &mut found, findings) {
            Some(condition) => found.rule.when.push(condition),
            None => found.missing_conditions += 1,
        }
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
    let request_principals =
        values(&entries, "requestPrincipals", "notRequestPrincipals", findings, text_match);
    if !request_principals.is_empty() {
        let at = set_field(&entries, "requestPrincipals", "notRequestPrincipals");
        rule.l7.push(at.clone());
        rule.unsupported.push(at);
    }
    let account =
        |node: &Node<'_>, text: &str, findings: &mut Findings| service_account(node, text, object, findings);
    let source = Source {
        principals: values(&entries, "principals", "notPrincipals", findings, principal),
        namespaces: values(&entries, "namespaces", "notNamespaces", findings, as_text),
        service_accounts: values(&entries, "serviceAccounts", "notServiceAccounts", findings, account),
        ip_blocks: values(&entries, "ipBlocks", "notIpBlocks", findings, ip_block),
        remote_ip_blocks: values(&entries, "remoteIpBlocks", "notRemoteIpBlocks", findings, ip_block),
        trust_domains: values(&entries, "trustDomains", "notTrustDomains", findings, trust_domain),
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
    if !source.remote_ip_blocks.is_empty() {
        rule.l7.push(set_field(&entries, "remoteIpBlocks", "notRemoteIpBlocks"));
    }
    if !source.trust_domains.is_empty() {
        rule.l7.push(set_field(&entries, "trustDomains", "notTrustDomains"));
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

/// Reads a condition; `None` when it cannot be held, which `rule` then knows.
fn condition(
    node: &Node<'_>,
    object: &Object,
    rule: &mut Rule,
    findings: &mut Findings,
) -> Option<Condition> {
    let entries = node.map(&["key", "values", "notValues"], findings);
    let key_node = entries.require("key", findings)?;
    let key = key_node.filled(findings)?;
    if entries.get("values").is_none() && entries.get("notValues").is_none() {
        findings.refuse("missing-field", &node.at, "must have `values` or `notValues`");
    }
    let e = &entries;
    let account =
        |node: &Node<'_>, text: &str, findings: &mut Findings| service_account(node, text, object, findings);
    let condition = match key {
        "source.ip" => Condition::SourceIp(both(e, findings, ip_block)),
        "source.namespace" => Condition::SourceNamespace(both(e, findings, as_text)),
        "source.principal" => Condition::SourcePrincipal(both(e, findings, principal)),
        "destination.ip" => Condition::DestinationIp(both(e, findings, ip_block)),
        "destination.port" => Condition::DestinationPort(both(e, findings, port)),
        l7 => {
            rule.l7.push(key_node.at.clone());
            match l7 {
                "remote.ip" => Condition::RemoteIp(both(e, findings, ip_block)),
                "source.serviceAccount" => Condition::SourceServiceAccount(both(e, findings, account)),
                "source.trustDomain" => Condition::SourceTrustDomain(both(e, findings, trust_domain)),
                "connection.sni" => Condition::ConnectionSni(both(e, findings, text_match)),
                _ if bracketed(key, "request.headers").is_some_and(|name| !name.contains(['[', ']'])) => {
                    let name = bracketed(key, "request.headers").unwrap_or_default().to_ascii_lowercase();
                    Condition::RequestHeader(name.into(), both(e, findings, text_match))
                }
                "request.auth.principal" | "request.auth.audiences" | "request.auth.presenter" => {
                    return unsupported(&key_node, e, rule, findings);
                }
                _ if bracketed(key, "request.auth.claims").is_some()
                    || key.starts_with("experimental.envoy.filters.") =>
                {
                    return unsupported(&key_node, e, rule, findings);
                }
                _ => {
                    findings.refuse(
                        "invalid-value",
                        &key_node.at,
                        format!("`{key}` is not a key of conditions"),
                    );
                    return None;
                }
            }
        }
    };
    Some(condition)
}

fn unsupported(
    key: &Node<'_>,
    entries: &Entries<'_>,
    rule: &mut Rule,
    findings: &mut Findings,
) -> Option<Condition> {
    both(entries, findings, as_text);
    rule.unsupported.push(key.at.clone());
    None
}

/// The name in `prefix[name]`, if it is one and not empty.
fn bracketed<'a>(key: &'a str, prefix: &str) -> Option<&'a str> {
    let name = key.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']')?;
    (!name.is_empty()).then_some(name)
}

/// Reads `values` and `notValues` of a condition.
fn both<T>(
    entries: &Entries<'_>,
    findings: &mut Findings,
    parse: impl Fn(&Node<'_>, &str, &mut Findings) -> Option<T>,
) -> Values<T> {
    values(entries, "values", "notValues", findings, parse)
}

/// Reads a list and its opposite. An empty list is refused: it would quietly mean any.
fn values<T>(
    entries: &Entries<'_>,
    any: &str,
    none: &str,
    findings: &mut Findings,
    parse: impl Fn(&Node<'_>, &str, &mut Findings) -> Option<T>,
) -> Values<T> {
    let mut list = |key: &str| -> Vec<T> {
        let Some(node) = entries.get(key) else { return Vec::new() };
        let items = node.list(findings);
        if items.is_empty() && node.value.is_array() {
            findings.refuse("invalid-value", &node.at, "must not be empty: leave it out to mean any");
        }
        items.iter().filter_map(|item| parse(item, item.filled(findings)?, findings)).collect()
    };
    Values { any: list(any), none: list(none) }
}

fn as_text(_: &Node<'_>, text: &str, _: &mut Findings) -> Option<Arc<str>> {
    Some(text.into())
}

fn text_match(_: &Node<'_>, text: &str, _: &mut Findings) -> Option<TextMatch> {
    Some(TextMatch::parse(text))
}

fn principal(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<TextMatch> {
    if text.starts_with("spiffe://") {
        findings.refuse(
            "invalid-value",
            &node.at,
            "principals are written without `spiffe://`, and never match with it",
        );
        return None;
    }
    Some(TextMatch::parse(text))
}

fn host(_: &Node<'_>, text: &str, _: &mut Findings) -> Option<HostMatch> {
    Some(TextMatch::parse(&text.to_ascii_lowercase()))
}

fn ip_block(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<IpNet> {
    let block = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    if block.is_none() {
        findings.refuse("invalid-value", &node.at, format!("`{text}` is not an IP address or CIDR block"));
    }
    block
}

fn port(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<u16> {
    let port = text.parse::<u16>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    if port.is_none() {
        findings.refuse("invalid-value", &node.at, format!("`{text}` is not a port number"));
    }
    port
}

fn trust_domain(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<TextMatch> {
    let stars = text.matches('*').count();
    let at_an_end = text.starts_with('*') || text.ends_with('*');
    if text.contains('/') || stars > 1 || (stars == 1 && !at_an_end) {
        let reason = format!("`{text}` is not a trust domain with at most one `*` at its start or end");
        findings.refuse("invalid-value", &node.at, reason);
        return None;
    }
    Some(TextMatch::parse(text))
}

fn service_account(
    node: &Node<'_>,
    text: &str,
    object: &Object,
    findings: &mut Findings,
) -> Option<ServiceAccount> {
    let (namespace, name) = text.split_once('/').unwrap_or((&object.name.namespace, text));
    let is_part = |part: &str| !part.is_empty() && !part.contains(['/', '*']);
    if !is_part(namespace) || !is_part(name) || text.len() > SERVICE_ACCOUNT_LEN_MAX {
        let reason = format!("`{text}` is not `namespace/name` or `name` of a service account");
        findings.refuse("invalid-value", &node.at, reason);
        return None;
    }
    Some(ServiceAccount { namespace: namespace.into(), name: name.into() })
}

fn path(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<PathMatch> {
    if !text.contains(['{', '}']) {
        return Some(PathMatch::Text(TextMatch::parse(text)));
    }
    match template_fault(text) {
        None => Some(PathMatch::Template(text.into())),
        Some(fault) => {
            findings.refuse("invalid-value", &node.at, format!("`{text}` is not a path template: {fault}"));
            None
        }
    }
}

/// What is wrong with a path template (Istio `security.CheckValidPathTemplate`, Envoy's `uri_template`).
fn template_fault(text: &str) -> Option<&'static str> {
    const MARKS: &str = "-._~%!$&'()+,;:@=";
    let Some(rest) = text.strip_prefix('/') else { return Some("it must begin with `/`") };
    let is_literal = |segment: &str| segment.chars().all(|c| c.is_ascii_alphanumeric() || MARKS.contains(c));
    let last = rest.split('/').count() - 1;
    let mut ended = false;
    for (index, segment) in rest.split('/').enumerate() {
        match segment {
            "{*}" | "{**}" if ended => return Some("`{**}` must be its last operator"),
            "{**}" => ended = true,
            "{*}" => {}
            "" if index < last => return Some("it has an empty segment"),
            _ if segment.contains(['{', '}', '*']) => return Some("`{*}` or `{**}` must be a whole segment"),
            _ if !is_literal(segment) => return Some("it has a character that a path cannot have"),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::template_fault;

    #[test]
    fn template_is_checked() {
        for (template, valid) in [
            ("/foo/{*}", true),
            ("/foo/{**}/", true),
            ("/foo/{*}/bar/{**}", true),
            ("/{**}/cart", true),
            ("/foo/{*}.txt", false),
            ("/foo//{*}", false),
            ("/foo/{**}/{*}", false),
            ("/foo/{**}/{**}", false),
            ("/foo/*/{*}", false),
            ("/foo/{x}", false),
            ("/foo/{", false),
            ("foo/{*}", false),
            ("/foo bar/{*}", false),
        ] {
            assert_eq!(template_fault(template).is_none(), valid, "{template}");
        }
    }
}
