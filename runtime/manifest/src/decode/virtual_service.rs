//! VirtualService, as far as it is read: HTTP rules that match on path, method, headers, query and claims and that
//! share requests out among services. What else a rule asks for breaks that rule, which then answers 500.

use super::route::{Rule, claim_path, header_name, is_of_claim, is_regex};
use crate::diagnostic::Severity;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{
    Backend, BackendKind, Change, ClaimMatch, HttpRoute, MeshSettings, NameMatch, ParentRef, PathRule,
    ResourceName, RouteForm, RouteMatch, RouteRule, ValueMatch,
};
use std::sync::Arc;

/// Istio bounds none of these.
const HOSTS_MAX: usize = 32;
const RULES_MAX: usize = 128;
const LIST_MAX: usize = 64;
const WEIGHT_MAX: i64 = 1_000_000;

/// What is known of a VirtualService and not done: a rule that asks for it is broken.
const UNDONE: [&str; 14] = [
    "redirect",
    "directResponse",
    "delegate",
    "rewrite",
    "timeout",
    "retries",
    "fault",
    "mirror",
    "mirrors",
    "mirrorPercentage",
    "mirrorPercent",
    "mirror_percent",
    "corsPolicy",
    "headers",
];

/// The same of a match. Without it the rest matches more, and that is answered 500.
const UNMATCHED: [&str; 7] =
    ["scheme", "port", "gateways", "sourceLabels", "sourceNamespace", "ignoreUriCase", "statPrefix"];

/// What a waypoint does with the VirtualService.
pub(super) fn decode(object: &Object, settings: &MeshSettings, findings: &mut Findings) -> Vec<Change> {
    let known = ["hosts", "gateways", "http", "tls", "tcp", "exportTo"];
    let spec = Node::new(&object.spec, object.root()).map(&known, findings);
    for unread in ["tls", "tcp", "exportTo"] {
        if let Some(node) = spec.get(unread) {
            let reason = "is not supported yet: it has no effect";
            findings.note(Severity::Warning, "not-supported", &node.at, reason);
        }
    }
    let hosts = spec.bounded_list("hosts", HOSTS_MAX, findings);
    let parents = hosts.iter().filter_map(|node| parent(node, object, settings, findings)).collect();
    let parents = if is_of_mesh(&spec, findings) { parents } else { Vec::new() };
    let rules = spec.bounded_list("http", RULES_MAX, findings);
    let rules = rules.iter().map(|node| rule(node, object, settings, findings)).collect();
    let route = HttpRoute {
        form: RouteForm::VirtualService,
        name: object.name.clone(),
        created: object.created.as_str().into(),
        parents,
        rules,
    };
    if findings.broken { Vec::new() } else { vec![Change::Route(route)] }
}

/// Whether it is for traffic inside the mesh: it names no gateway, or `mesh` among them.
fn is_of_mesh(spec: &Entries<'_>, findings: &mut Findings) -> bool {
    let Some(node) = spec.get("gateways") else { return true };
    let names: Vec<&str> = node.list(findings).iter().filter_map(|node| node.text(findings)).collect();
    let is_ours = names.is_empty() || names.contains(&"mesh");
    if !is_ours {
        let reason = "is for ingress gateways: `mesh` is not among them";
        findings.note(Severity::Info, "not-ours", &node.at, reason);
    }
    is_ours
}

fn parent(
    node: &Node<'_>,
    object: &Object,
    settings: &MeshSettings,
    findings: &mut Findings,
) -> Option<ParentRef> {
    let host = node.filled(findings)?;
    let Some(service) = service(host, object, settings) else {
        let reason = format!(
            "`{host}` is not the name of a Service, alone or followed by its namespace and svc.{}: the route has no \
             effect on it",
            settings.cluster_domain
        );
        findings.note(Severity::Error, "not-supported", &node.at, reason);
        return None;
    };
    Some(ParentRef { service, port: None })
}

/// The Service that a host names: its bare name, in the VirtualService's namespace, or its full one.
pub(crate) fn service(host: &str, object: &Object, settings: &MeshSettings) -> Option<ResourceName> {
    let is_label = |text: &str| !text.is_empty() && !text.contains(['.', '*', '/']);
    let (name, namespace) = match host.strip_suffix(&format!(".svc.{}", settings.cluster_domain)) {
        Some(own) => own.split_once('.')?,
        None => (host, &*object.name.namespace),
    };
    (is_label(name) && is_label(namespace)).then(|| ResourceName::new(namespace, name))
}

fn rule(node: &Node<'_>, object: &Object, settings: &MeshSettings, findings: &mut Findings) -> RouteRule {
    let entries = node.map(&[&["name", "match", "route"][..], &UNDONE].concat(), findings);
    let mut rule = Rule::default();
    for undone in UNDONE {
        if let Some(node) = entries.get(undone) {
            rule.breaks("not-supported", &node.at, "is not supported yet", findings);
        }
    }
    let written = entries.bounded_list("match", LIST_MAX, findings);
    let mut matches: Vec<RouteMatch> =
        written.iter().map(|node| route_match(node, &mut rule, findings)).collect();
    if matches.is_empty() {
        matches.push(everything());
    }
    let destinations = entries.bounded_list("route", LIST_MAX, findings);
    let is_only = destinations.len() == 1;
    let backends: Vec<Backend> = destinations
        .iter()
        .filter_map(|node| backend(node, is_only, object, settings, &mut rule, findings))
        .collect();
    if backends.iter().all(|backend| backend.weight == 0) {
        rule.breaks("no-backend", &entries.at, "has no destination that takes a share", findings);
    }
    let name = entries.text("name", findings).map(Arc::from);
    RouteRule { name, matches, filters: Vec::new(), backends, broken: rule.broken }
}

fn everything() -> RouteMatch {
    RouteMatch {
        path: PathRule::Prefix("/".into()),
        headers: vec![],
        claims: vec![],
        query: vec![],
        method: None,
    }
}

fn route_match(node: &Node<'_>, rule: &mut Rule, findings: &mut Findings) -> RouteMatch {
    let known = ["name", "uri", "method", "authority", "headers", "withoutHeaders", "queryParams"];
    let entries = node.map(&[&known[..], &UNMATCHED].concat(), findings);
    for unmatched in UNMATCHED {
        if let Some(node) = entries.get(unmatched) {
            rule.breaks("not-supported", &node.at, "is not supported yet", findings);
        }
    }
    let mut one = everything();
    if let Some(path) = entries.get("uri").and_then(|node| value(&node, rule, findings)) {
        one.path = match path {
            ValueMatch::Present => PathRule::Prefix("/".into()),
            ValueMatch::Exact(path) => PathRule::Exact(path),
            ValueMatch::Prefix(prefix) => PathRule::TextPrefix(prefix),
            ValueMatch::Regex(expression) => PathRule::Regex(expression),
        };
    }
    if let Some(node) = entries.get("method") {
        one.method = method(&node, rule, findings);
    }
    if let Some(value) = entries.get("authority").and_then(|node| value(&node, rule, findings)) {
        one.headers.push(NameMatch { name: "host".into(), value, inverted: false });
    }
    for (key, inverted) in [("headers", false), ("withoutHeaders", true)] {
        headers(&entries, key, inverted, &mut one, rule, findings);
    }
    if let Some(node) = entries.get("queryParams") {
        for (name, node) in node.any_map(findings).all() {
            let Some(value) = value(&node, rule, findings) else { continue };
            one.query.push(NameMatch { name: name.as_str().into(), value, inverted: false });
        }
    }
    one
}

/// Reads `headers` or `withoutHeaders`, claims among them.
fn headers(
    entries: &Entries<'_>,
    key: &str,
    inverted: bool,
    one: &mut RouteMatch,
    rule: &mut Rule,
    findings: &mut Findings,
) {
    let Some(node) = entries.get(key) else { return };
    for (name, node) in node.any_map(findings).all() {
        let Some(value) = value(&node, rule, findings) else { continue };
        if is_of_claim(name) {
            match claim_path(name) {
                Some(path) => one.claims.push(ClaimMatch { path, value, inverted }),
                None => findings.refuse("invalid-value", &node.at, format!("`{name}` names no claim")),
            }
            continue;
        }
        let name = if name.eq_ignore_ascii_case(":authority") { "host" } else { name };
        if name.starts_with(':') {
            rule.breaks("not-supported", &node.at, "is not supported yet", findings);
        } else if let Some(name) = header_name(name, &node.at, findings) {
            one.headers.push(NameMatch { name, value, inverted });
        }
    }
}

fn method(node: &Node<'_>, rule: &mut Rule, findings: &mut Findings) -> Option<Arc<str>> {
    match value(node, rule, findings)? {
        ValueMatch::Exact(method) => Some(method),
        ValueMatch::Present => None,
        ValueMatch::Prefix(_) | ValueMatch::Regex(_) => {
            rule.breaks("not-supported", &node.at, "only `exact` is supported here", findings);
            None
        }
    }
}

/// Reads a StringMatch: one of three forms, or none, which asks for presence alone, as the expression `*` does (Istio).
fn value(node: &Node<'_>, rule: &mut Rule, findings: &mut Findings) -> Option<ValueMatch> {
    let entries = node.map(&["exact", "prefix", "regex"], findings);
    let mut forms = entries.all();
    let Some((form, inner)) = forms.next() else { return Some(ValueMatch::Present) };
    if forms.next().is_some() {
        findings.refuse("invalid-value", &node.at, "must have one of `exact`, `prefix` and `regex`");
        return None;
    }
    let text = inner.text(findings)?;
    match form.as_str() {
        "exact" => Some(ValueMatch::Exact(text.into())),
        "prefix" => Some(ValueMatch::Prefix(text.into())),
        "regex" if text == "*" => Some(ValueMatch::Present),
        "regex" if is_regex(text, &inner.at, rule, findings) => Some(ValueMatch::Regex(text.into())),
        _ => None,
    }
}

fn backend(
    node: &Node<'_>,
    is_only: bool,
    object: &Object,
    settings: &MeshSettings,
    rule: &mut Rule,
    findings: &mut Findings,
) -> Option<Backend> {
    let entries = node.map(&["destination", "weight", "headers"], findings);
    if let Some(node) = entries.get("headers") {
        rule.breaks("not-supported", &node.at, "is not supported yet", findings);
    }
    let destination = entries.require("destination", findings)?.map(&["host", "subset", "port"], findings);
    if let Some(node) = destination.get("subset") {
        rule.breaks("not-supported", &node.at, "subsets are not supported yet", findings);
    }
    let host_node = destination.require("host", findings)?;
    let host = host_node.filled(findings)?;
    let port = destination.get("port").map(|node| node.map(&["number"], findings));
    let port = port.and_then(|entries| entries.require("number", findings)?.port(findings));
    let weight = entries.get("weight").map(|node| node.integer(0..=WEIGHT_MAX, findings));
    let weight = if is_only { 1 } else { weight.flatten().unwrap_or(0) };
    let kind = match (service(host, object, settings), port) {
        (Some(service), Some(port)) => BackendKind::Service { service, port },
        (Some(service), None) => BackendKind::SamePort(service),
        (None, _) => {
            let reason = format!("`{host}` is no Service of the mesh");
            let said = format!("{reason}: its share of the requests is answered 500");
            findings.note(Severity::Error, "invalid-backend", &host_node.at, said);
            BackendKind::Invalid(format!("{}: {reason}", host_node.at).into())
        }
    };
    Some(Backend { kind, weight: u32::try_from(weight).unwrap_or(0), filters: Vec::new() })
}

#[cfg(test)]
#[path = "virtual_service/tests.rs"]
mod tests;
