//! HTTPRoute of a mesh: parents are Services. What is wrong in one rule breaks that rule only, which then answers
//! 500, as the Gateway API asks.

use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{
    Backend, BackendKind, Change, ClaimMatch, HeaderChange, HeaderChanges, HttpRoute, NameMatch, ParentRef,
    PathRewrite, PathRule, Redirect, ResourceName, Rewrite, RouteFilter, RouteForm, RouteMatch, RouteRule,
    ValueMatch,
};
use regex::Regex;
use std::sync::Arc;

/// Limits of the Gateway API.
const PARENTS_MAX: usize = 32;
const RULES_MAX: usize = 16;
const MATCHES_MAX: usize = 64;
const LIST_MAX: usize = 16;
const WEIGHT_MAX: i64 = 1_000_000;

/// What a waypoint does with the route.
pub(super) fn decode(object: &Object, findings: &mut Findings) -> Vec<Change> {
    let route = parse(object, findings);
    if findings.broken { Vec::new() } else { vec![Change::Route(route)] }
}

fn parse(object: &Object, findings: &mut Findings) -> HttpRoute {
    let known = ["parentRefs", "hostnames", "rules", "useDefaultGateways"];
    let spec = Node::new(&object.spec, object.root()).map(&known, findings);
    let parents = spec.bounded_list("parentRefs", PARENTS_MAX, findings);
    let parents = parents.iter().filter_map(|node| parent(node, object, findings)).collect();
    let rules = spec.bounded_list("rules", RULES_MAX, findings);
    let rules = rules.iter().filter_map(|node| rule(node, object, findings)).collect();
    let (name, created) = (object.name.clone(), object.created.as_str().into());
    HttpRoute { form: RouteForm::HttpRoute, name, created, parents, rules }
}

fn parent(node: &Node<'_>, object: &Object, findings: &mut Findings) -> Option<ParentRef> {
    let entries = node.map(&["group", "kind", "namespace", "name", "sectionName", "port"], findings);
    let group = entries.text("group", findings).unwrap_or("gateway.networking.k8s.io");
    let kind = entries.text("kind", findings).unwrap_or("Gateway");
    let name = entries.require("name", findings)?.filled(findings)?;
    let namespace = entries.text("namespace", findings).unwrap_or(&object.name.namespace);
    let port = entries.get("port").and_then(|node| node.port(findings));
    if (group, kind) == ("gateway.networking.k8s.io", "Gateway") {
        let reason = "a Gateway as parent is for ingress gateways; in the mesh parents are Services";
        findings.note(Severity::Info, "not-ours", &node.at, reason);
        return None;
    }
    if !matches!((group, kind), ("" | "core", "Service")) {
        let reason = format!("`{kind}` of group `{group}` cannot be a parent here");
        findings.note(Severity::Error, "not-supported", &node.at, reason);
        return None;
    }
    if let Some(section) = entries.get("sectionName") {
        findings.refuse("not-supported", &section.at, "ports are named by number here: use `port`");
    }
    Some(ParentRef { service: ResourceName::new(namespace, name), port })
}

/// A rule while it is read: the first thing that breaks it.
#[derive(Default)]
pub(super) struct Rule {
    pub(super) broken: Option<Arc<str>>,
}

impl Rule {
    /// Notes that the rule cannot be honoured, and why.
    pub(super) fn breaks(
        &mut self,
        code: &'static str,
        at: &FieldPath,
        reason: &str,
        findings: &mut Findings,
    ) {
        let said = format!("{reason}: requests that this rule matches are answered 500");
        findings.note(Severity::Error, code, at, said);
        self.broken.get_or_insert_with(|| format!("{at}: {reason}").into());
    }
}

fn rule(node: &Node<'_>, object: &Object, findings: &mut Findings) -> Option<RouteRule> {
    let known = ["name", "matches", "filters", "backendRefs", "timeouts", "retry", "sessionPersistence"];
    let entries = node.map(&known, findings);
    let mut rule = Rule::default();
    let name = entries.text("name", findings).map(Arc::from);
    for unread in ["timeouts", "retry", "sessionPersistence"] {
        if let Some(node) = entries.get(unread) {
            findings.note(
                Severity::Warning,
                "not-supported",
                &node.at,
                "is not supported yet: it has no effect",
            );
        }
    }
    let written = entries.bounded_list("matches", MATCHES_MAX, findings);
    let matches: Vec<RouteMatch> =
        written.iter().filter_map(|node| route_match(node, &mut rule, findings)).collect();
    let matches = match (written.is_empty(), matches.is_empty()) {
        (true, _) => vec![RouteMatch {
            path: PathRule::Prefix("/".into()),
            headers: vec![],
            claims: vec![],
            query: vec![],
            method: None,
        }],
        (false, true) => return None,
        (false, false) => matches,
    };
    let filters = filters(&entries, &mut rule, findings);
    let backends: Vec<Backend> = entries
        .bounded_list("backendRefs", LIST_MAX, findings)
        .iter()
        .filter_map(|node| backend(node, object, &mut rule, findings))
        .collect();
    check_together(&entries.at, &matches, &filters, &backends, &mut rule, findings);
    Some(RouteRule { name, matches, filters, backends, broken: rule.broken })
}

/// What is wrong only with the parts of a rule taken together.
fn check_together(
    at: &FieldPath,
    matches: &[RouteMatch],
    filters: &[RouteFilter],
    backends: &[Backend],
    rule: &mut Rule,
    findings: &mut Findings,
) {
    let redirects = filters.iter().any(|filter| matches!(filter, RouteFilter::Redirect(_)));
    let rewrites = filters.iter().any(|filter| matches!(filter, RouteFilter::Rewrite(_)));
    if redirects && (rewrites || !backends.is_empty()) {
        let reason = "a redirect cannot be combined with a rewrite or with backends";
        rule.breaks("invalid-value", &at.key("filters"), reason, findings);
    }
    let by_prefix = |filter: &RouteFilter| match filter {
        RouteFilter::Redirect(redirect) => matches!(redirect.path, Some(PathRewrite::Prefix(_))),
        RouteFilter::Rewrite(rewrite) => matches!(rewrite.path, Some(PathRewrite::Prefix(_))),
        RouteFilter::RequestHeaders(_) | RouteFilter::ResponseHeaders(_) => false,
    };
    let all_prefixes = matches.iter().all(|one| matches!(one.path, PathRule::Prefix(_)));
    if filters.iter().any(by_prefix) && !all_prefixes {
        let reason = "ReplacePrefixMatch needs a PathPrefix match";
        rule.breaks("invalid-value", &at.key("filters"), reason, findings);
    }
    if !redirects && rule.broken.is_none() && backends.iter().all(|backend| backend.weight == 0) {
        let reason = "the rule has no backend that takes a share: its requests are answered 500";
        findings.note(Severity::Warning, "no-backend", at, reason);
    }
}

/// Reads a match; `None`, with the rule broken, when it can match nothing certain.
fn route_match(node: &Node<'_>, rule: &mut Rule, findings: &mut Findings) -> Option<RouteMatch> {
    const METHODS: [(&str, &str); 9] = [
        ("GET", "GET"),
        ("HEAD", "HEAD"),
        ("POST", "POST"),
        ("PUT", "PUT"),
        ("DELETE", "DELETE"),
        ("CONNECT", "CONNECT"),
        ("OPTIONS", "OPTIONS"),
        ("TRACE", "TRACE"),
        ("PATCH", "PATCH"),
    ];
    let entries = node.map(&["path", "headers", "queryParams", "method"], findings);
    let path = match entries.get("path") {
        Some(node) => path_rule(&node, rule, findings),
        None => Some(PathRule::Prefix("/".into())),
    };
    let headers = name_matches(&entries, "headers", true, rule, findings);
    let query = name_matches(&entries, "queryParams", false, rule, findings);
    let (claims, headers) = headers?.into_iter().partition::<Vec<_>, _>(|matched| is_of_claim(&matched.name));
    let claims = claims.into_iter().filter_map(claim_match).collect();
    let method = entries.get("method").and_then(|node| node.choice(&METHODS, findings)).map(Arc::from);
    Some(RouteMatch { path: path?, headers, claims, query: query?, method })
}

fn path_rule(node: &Node<'_>, rule: &mut Rule, findings: &mut Findings) -> Option<PathRule> {
    #[derive(Clone, Copy)]
    enum Type {
        Exact,
        Prefix,
        Regex,
    }
    const TYPES: [(&str, Type); 3] =
        [("Exact", Type::Exact), ("PathPrefix", Type::Prefix), ("RegularExpression", Type::Regex)];
    let entries = node.map(&["type", "value"], findings);
    let kind = entries.get("type").map_or(Some(Type::Prefix), |node| node.choice(&TYPES, findings))?;
    let value = entries.text("value", findings).unwrap_or("/");
    let at = entries.at.key("value");
    if matches!(kind, Type::Regex) {
        return is_regex(value, &at, rule, findings).then(|| PathRule::Regex(value.into()));
    }
    let lower = value.to_ascii_lowercase();
    let odd = ["//", "/./", "/../", "%2f", "#"].iter().any(|part| lower.contains(part));
    if !value.starts_with('/') || odd || lower.ends_with("/..") || lower.ends_with("/.") {
        findings.refuse("invalid-value", &at, format!("`{value}` is not a normal path that begins with `/`"));
    }
    Some(if matches!(kind, Type::Exact) {
        PathRule::Exact(value.into())
    } else {
        PathRule::Prefix(value.into())
    })
}

/// Whether it is an expression; if not, the rule is broken.
pub(super) fn is_regex(text: &str, at: &FieldPath, rule: &mut Rule, findings: &mut Findings) -> bool {
    match Regex::new(text) {
        Ok(_) => true,
        Err(error) => {
            let last =
                error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            rule.breaks(
                "invalid-value",
                at,
                &format!("`{text}` is not a regular expression: {last}"),
                findings,
            );
            false
        }
    }
}

/// Header or query matches; of several with one name the first counts.
fn name_matches(
    entries: &Entries<'_>,
    key: &str,
    is_header: bool,
    rule: &mut Rule,
    findings: &mut Findings,
) -> Option<Vec<NameMatch>> {
    const TYPES: [(&str, bool); 2] = [("Exact", false), ("RegularExpression", true)];
    let mut matches: Vec<NameMatch> = Vec::new();
    let mut certain = true;
    for node in entries.bounded_list(key, LIST_MAX, findings) {
        let one = node.map(&["type", "name", "value"], findings);
        let is_expression = one.get("type").and_then(|node| node.choice(&TYPES, findings)).unwrap_or(false);
        let name_node = one.require("name", findings);
        let value = one.require("value", findings).and_then(|node| node.text(findings));
        let Some((name_node, value)) = name_node.zip(value) else { continue };
        let name = if is_header {
            let Some(name) = matched_name(&name_node, findings) else { continue };
            name
        } else {
            let Some(name) = name_node.filled(findings) else { continue };
            name.into()
        };
        if is_expression && !is_regex(value, &one.at.key("value"), rule, findings) {
            certain = false;
            continue;
        }
        let value =
            if is_expression { ValueMatch::Regex(value.into()) } else { ValueMatch::Exact(value.into()) };
        if !matches.iter().any(|known| known.name == name) {
            matches.push(NameMatch { name, value, inverted: false });
        }
    }
    certain.then_some(matches)
}

/// What stands in place of a header's name to mean a claim of the verified token: Istio's form for VirtualServices, which
/// is ours for HTTPRoutes. No header can be called so.
const CLAIMS: &str = "@request.auth.claims";

/// Whether the name is meant to be a claim's.
pub(super) fn is_of_claim(name: &str) -> bool {
    name.starts_with(CLAIMS)
}

fn claim_match(matched: NameMatch) -> Option<ClaimMatch> {
    Some(ClaimMatch { path: claim_path(&matched.name)?, value: matched.value, inverted: false })
}

/// The names that `@request.auth.claims.a.b` or `@request.auth.claims[a][b]` lead through; in brackets a name may have
/// dots.
pub(super) fn claim_path(name: &str) -> Option<Vec<Arc<str>>> {
    let rest = name.strip_prefix(CLAIMS)?;
    let path: Vec<Arc<str>> = match rest.strip_prefix('.') {
        Some(dotted) => dotted.split('.').map(Arc::from).collect(),
        None => rest.strip_prefix('[')?.strip_suffix(']')?.split("][").map(Arc::from).collect(),
    };
    let is_name = |name: &Arc<str>| !name.is_empty() && !name.contains(['[', ']']);
    path.iter().all(is_name).then_some(path)
}

/// The name of a header to match on, in lower case, or what means a claim, as written.
fn matched_name(node: &Node<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let name = node.filled(findings)?;
    if !name.starts_with('@') {
        return header_name(name, &node.at, findings);
    }
    if claim_path(name).is_none() {
        let reason =
            format!("`{name}` is neither the name of a header nor {CLAIMS} with `.name` or `[name]`");
        findings.refuse("invalid-value", &node.at, reason);
        return None;
    }
    Some(name.into())
}

/// The header's name in lower case.
pub(super) fn header_name(name: &str, at: &FieldPath, findings: &mut Findings) -> Option<Arc<str>> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(is_token) {
        findings.refuse("invalid-value", at, format!("`{name}` is not the name of a header"));
        return None;
    }
    Some(name.to_ascii_lowercase().into())
}

fn filters(entries: &Entries<'_>, rule: &mut Rule, findings: &mut Findings) -> Vec<RouteFilter> {
    let nodes = entries.bounded_list("filters", LIST_MAX, findings);
    nodes.iter().filter_map(|node| filter(node, rule, findings)).collect()
}

fn filter(node: &Node<'_>, rule: &mut Rule, findings: &mut Findings) -> Option<RouteFilter> {
    const KNOWN: [&str; 9] = [
        "type",
        "requestHeaderModifier",
        "responseHeaderModifier",
        "requestRedirect",
        "urlRewrite",
        "requestMirror",
        "cors",
        "externalAuth",
        "extensionRef",
    ];
    let entries = node.map(&KNOWN, findings);
    let type_node = entries.require("type", findings)?;
    let kind = type_node.text(findings)?;
    match kind {
        "RequestHeaderModifier" => {
            let changes = header_changes(&entries.require("requestHeaderModifier", findings)?, findings);
            Some(RouteFilter::RequestHeaders(changes))
        }
        "ResponseHeaderModifier" => {
            let changes = header_changes(&entries.require("responseHeaderModifier", findings)?, findings);
            Some(RouteFilter::ResponseHeaders(changes))
        }
        "RequestRedirect" => {
            Some(RouteFilter::Redirect(redirect(&entries.require("requestRedirect", findings)?, findings)))
        }
        "URLRewrite" => {
            Some(RouteFilter::Rewrite(rewrite(&entries.require("urlRewrite", findings)?, findings)))
        }
        "RequestMirror" | "CORS" | "ExternalAuth" | "ExtensionRef" => {
            rule.breaks(
                "not-supported",
                &type_node.at,
                &format!("filter {kind} is not supported yet"),
                findings,
            );
            None
        }
        _ => {
            findings.refuse("invalid-value", &type_node.at, format!("`{kind}` is not a type of filter"));
            None
        }
    }
}

fn header_changes(node: &Node<'_>, findings: &mut Findings) -> HeaderChanges {
    let entries = node.map(&["set", "add", "remove"], findings);
    let mut list = |key: &str| -> Vec<HeaderChange> {
        let nodes = entries.bounded_list(key, LIST_MAX, findings);
        nodes.iter().filter_map(|node| header_change(node, findings)).collect()
    };
    let (set, add) = (list("set"), list("add"));
    let remove = entries.bounded_list("remove", LIST_MAX, findings);
    HeaderChanges {
        set,
        add,
        remove: remove
            .iter()
            .filter_map(|node| header_name(node.text(findings)?, &node.at, findings))
            .collect(),
    }
}

fn header_change(node: &Node<'_>, findings: &mut Findings) -> Option<HeaderChange> {
    let entries = node.map(&["name", "value"], findings);
    let name_node = entries.require("name", findings)?;
    let name = header_name(name_node.text(findings)?, &name_node.at, findings)?;
    let value_node = entries.require("value", findings)?;
    let value = value_node.text(findings)?;
    if value.chars().any(|c| c.is_control() && c != '\t') {
        findings.refuse("invalid-value", &value_node.at, "has a character that a header cannot have");
        return None;
    }
    Some(HeaderChange { name, value: value.into() })
}

fn redirect(node: &Node<'_>, findings: &mut Findings) -> Redirect {
    const SCHEMES: [(&str, &str); 2] = [("http", "http"), ("https", "https")];
    let entries = node.map(&["scheme", "hostname", "path", "port", "statusCode"], findings);
    let scheme = entries.get("scheme").and_then(|node| node.choice(&SCHEMES, findings));
    let status = entries.get("statusCode").map_or(Some(302), |node| {
        let status = node.integer(301..=308, findings)?;
        if !matches!(status, 301 | 302 | 303 | 307 | 308) {
            findings.refuse("invalid-value", &node.at, "must be 301, 302, 303, 307 or 308");
        }
        u16::try_from(status).ok()
    });
    Redirect {
        scheme: scheme.map(Arc::from),
        hostname: hostname(&entries, findings),
        path: entries.get("path").and_then(|node| path_rewrite(&node, findings)),
        port: entries.get("port").and_then(|node| node.port(findings)),
        status: status.unwrap_or(302),
    }
}

fn rewrite(node: &Node<'_>, findings: &mut Findings) -> Rewrite {
    let entries = node.map(&["hostname", "path"], findings);
    Rewrite {
        hostname: hostname(&entries, findings),
        path: entries.get("path").and_then(|node| path_rewrite(&node, findings)),
    }
}

fn hostname(entries: &Entries<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let node = entries.get("hostname")?;
    let text = node.filled(findings)?;
    if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.')) {
        findings.refuse("invalid-value", &node.at, format!("`{text}` is not a host name"));
        return None;
    }
    Some(text.into())
}

fn path_rewrite(node: &Node<'_>, findings: &mut Findings) -> Option<PathRewrite> {
    const TYPES: [(&str, bool); 2] = [("ReplaceFullPath", false), ("ReplacePrefixMatch", true)];
    let entries = node.map(&["type", "replaceFullPath", "replacePrefixMatch"], findings);
    let by_prefix = entries.require("type", findings)?.choice(&TYPES, findings)?;
    let key = if by_prefix { "replacePrefixMatch" } else { "replaceFullPath" };
    let value = entries.require(key, findings)?;
    let text = value.text(findings)?;
    if text.chars().any(|c| c.is_control() || c.is_whitespace() || c == '#') {
        findings.refuse("invalid-value", &value.at, "has a character that a path cannot have");
    }
    Some(if by_prefix { PathRewrite::Prefix(text.into()) } else { PathRewrite::Full(text.into()) })
}

fn backend(node: &Node<'_>, object: &Object, rule: &mut Rule, findings: &mut Findings) -> Option<Backend> {
    let entries = node.map(&["group", "kind", "name", "namespace", "port", "weight", "filters"], findings);
    let group = entries.text("group", findings).unwrap_or_default();
    let kind = entries.text("kind", findings).unwrap_or("Service");
    let name = entries.require("name", findings)?.filled(findings)?;
    let namespace = entries.text("namespace", findings).unwrap_or(&object.name.namespace);
    let port = entries.get("port").and_then(|node| node.port(findings));
    let weight = entries.get("weight").map_or(Some(1), |node| node.integer(0..=WEIGHT_MAX, findings))?;
    let mut invalid = |at: &FieldPath, reason: String| {
        let said = format!("{reason}: its share of the requests is answered 500");
        findings.note(Severity::Error, "invalid-backend", at, said);
        BackendKind::Invalid(format!("{at}: {reason}").into())
    };
    let kind = match (group, kind, port) {
        ("" | "core", "Service", Some(port)) => {
            BackendKind::Service { service: ResourceName::new(namespace, name), port }
        }
        ("" | "core", "Service", None) => invalid(&node.at, "a Service as backend needs a port".to_owned()),
        _ => invalid(&node.at, format!("`{kind}` of group `{group}` cannot be a backend")),
    };
    let filters = filters(&entries, rule, findings);
    let headers_only = |filter: &RouteFilter| {
        matches!(filter, RouteFilter::RequestHeaders(_) | RouteFilter::ResponseHeaders(_))
    };
    if !filters.iter().all(headers_only) {
        let reason = "only header changes can be made for one backend";
        rule.breaks("not-supported", &entries.at.key("filters"), reason, findings);
    }
    Some(Backend { kind, weight: u32::try_from(weight).unwrap_or(0), filters })
}
