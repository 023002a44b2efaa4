//! What is read of a VirtualService, and what is said of the rest.

use super::*;
use crate::testing::{object, short};

fn read(spec: &str) -> (Option<HttpRoute>, Vec<String>) {
    let indented: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    let head = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: r, namespace: n}";
    let object = object(&format!("{head}\nspec:\n{indented}"));
    let mut findings = Findings::default();
    let changes = decode(&object, &MeshSettings::default(), &mut findings);
    let route = changes.into_iter().find_map(|change| match change {
        Change::Route(route) => Some(route),
        _ => None,
    });
    (route, findings.list.iter().map(short).collect())
}

/// The route of a spec in which nothing is amiss.
fn good(spec: &str) -> HttpRoute {
    let (route, findings) = read(spec);
    assert_eq!(findings, [""; 0], "{spec}");
    route.unwrap()
}

const TO: &str = "route: [{destination: {host: web, port: {number: 80}}}]";

/// The only match of a rule, written as YAML.
fn one_match(written: &str) -> RouteMatch {
    let mut route = good(&format!("hosts: [web]\nhttp: [{{match: [{written}], {TO}}}]"));
    route.rules.remove(0).matches.remove(0)
}

#[test]
fn matches_are_read_as_istio_reads_them() {
    let header = |name: &str, value, inverted| NameMatch { name: name.into(), value, inverted };
    let claim = |path: &[&str], value, inverted| ClaimMatch {
        path: path.iter().map(|name| Arc::from(*name)).collect(),
        value,
        inverted,
    };
    let exact = |text: &str| ValueMatch::Exact(text.into());
    let prefix = |text: &str| ValueMatch::Prefix(text.into());
    let regex = |text: &str| ValueMatch::Regex(text.into());
    let of = everything;
    for (written, expected) in [
        ("{}", of()),
        ("{uri: {exact: /a}}", RouteMatch { path: PathRule::Exact("/a".into()), ..of() }),
        ("{uri: {prefix: /a}}", RouteMatch { path: PathRule::TextPrefix("/a".into()), ..of() }),
        ("{uri: {regex: /a.*}}", RouteMatch { path: PathRule::Regex("/a.*".into()), ..of() }),
        ("{method: {exact: GET}}", RouteMatch { method: Some("GET".into()), ..of() }),
        (
            "{authority: {prefix: a.}}",
            RouteMatch { headers: vec![header("host", prefix("a."), false)], ..of() },
        ),
        (
            "{headers: {X-Foo: {exact: a}}}",
            RouteMatch { headers: vec![header("x-foo", exact("a"), false)], ..of() },
        ),
        (
            "{headers: {x-foo: {}}}",
            RouteMatch { headers: vec![header("x-foo", ValueMatch::Present, false)], ..of() },
        ),
        (
            "{headers: {':authority': {exact: a}}}",
            RouteMatch { headers: vec![header("host", exact("a"), false)], ..of() },
        ),
        (
            "{withoutHeaders: {x-foo: {regex: '*'}}}",
            RouteMatch { headers: vec![header("x-foo", ValueMatch::Present, true)], ..of() },
        ),
        (
            "{queryParams: {q: {regex: '[0-9]+'}}}",
            RouteMatch { query: vec![header("q", regex("[0-9]+"), false)], ..of() },
        ),
        (
            "{headers: {'@request.auth.claims.nested.key1': {exact: a}}}",
            RouteMatch { claims: vec![claim(&["nested", "key1"], exact("a"), false)], ..of() },
        ),
        (
            "{headers: {'@request.auth.claims[a.b/c][d]': {prefix: a}}}",
            RouteMatch { claims: vec![claim(&["a.b/c", "d"], prefix("a"), false)], ..of() },
        ),
        (
            "{withoutHeaders: {'@request.auth.claims.sub': {regex: a|b}}}",
            RouteMatch { claims: vec![claim(&["sub"], regex("a|b"), true)], ..of() },
        ),
    ] {
        assert_eq!(one_match(written), expected, "{written}");
    }
}

#[test]
fn hosts_name_services() {
    let parents = |hosts: &str| {
        let (route, findings) = read(&format!("hosts: [{hosts}]\nhttp: [{{{TO}}}]"));
        let names =
            route.unwrap().parents.iter().map(|parent| parent.service.to_string()).collect::<Vec<_>>();
        (names.join(" "), findings.join("; "))
    };
    for (hosts, names, findings) in [
        ("web", "n/web", ""),
        ("web.m.svc.cluster.local, web", "m/web n/web", ""),
        ("web.m", "", "error not-supported spec.hosts[0]"),
        ("'*.m.svc.cluster.local'", "", "error not-supported spec.hosts[0]"),
        ("'*', web", "n/web", "error not-supported spec.hosts[0]"),
        ("example.com", "", "error not-supported spec.hosts[0]"),
    ] {
        assert_eq!(parents(hosts), (names.to_owned(), findings.to_owned()), "{hosts}");
    }
}

#[test]
fn gateways_choose_whether_it_is_for_the_mesh() {
    for (gateways, parents, findings) in [
        ("[]", 1, ""),
        ("[mesh]", 1, ""),
        ("[n/ingress, mesh]", 1, ""),
        ("[n/ingress]", 0, "info not-ours spec.gateways"),
    ] {
        let (route, found) = read(&format!("hosts: [web]\ngateways: {gateways}\nhttp: [{{{TO}}}]"));
        assert_eq!((route.unwrap().parents.len(), &*found.join("; ")), (parents, findings), "{gateways}");
    }
}

#[test]
fn destinations_share_by_weight() {
    let shares = |route: &str| {
        let mut route = good(&format!("hosts: [web]\nhttp: [{{route: [{route}]}}]"));
        let backends = route.rules.remove(0).backends;
        backends.into_iter().map(|backend| (backend.kind, backend.weight)).collect::<Vec<_>>()
    };
    let service = |name: &str| ResourceName::new("n", name);
    let at = |name: &str, port| BackendKind::Service { service: service(name), port };
    assert_eq!(shares("{destination: {host: a}}"), [(BackendKind::SamePort(service("a")), 1)]);
    assert_eq!(shares("{destination: {host: a, port: {number: 81}}, weight: 0}"), [(at("a", 81), 1)]);
    let two = "{destination: {host: a, port: {number: 80}}, weight: 90}, \
               {destination: {host: b.n.svc.cluster.local, port: {number: 80}}, weight: 10}";
    assert_eq!(shares(two), [(at("a", 80), 90), (at("b", 80), 10)]);
}

#[test]
fn what_is_not_done_breaks_its_rule_and_no_other() {
    for (rule, field) in [
        ("{TO, timeout: 1s}", "http[0].timeout"),
        ("{TO, retries: {attempts: 1}}", "http[0].retries"),
        ("{TO, fault: {abort: {httpStatus: 418}}}", "http[0].fault"),
        ("{TO, rewrite: {uri: /}}", "http[0].rewrite"),
        ("{TO, mirror: {host: b}}", "http[0].mirror"),
        ("{TO, corsPolicy: {}}", "http[0].corsPolicy"),
        ("{TO, headers: {request: {set: {a: b}}}}", "http[0].headers"),
        ("{redirect: {uri: /}, TO}", "http[0].redirect"),
        ("{TO, match: [{port: 80}]}", "http[0].match[0].port"),
        ("{TO, match: [{sourceLabels: {app: a}}]}", "http[0].match[0].sourceLabels"),
        ("{TO, match: [{ignoreUriCase: true, uri: {exact: /a}}]}", "http[0].match[0].ignoreUriCase"),
        ("{TO, match: [{method: {regex: G.*}}]}", "http[0].match[0].method"),
        ("{TO, match: [{headers: {':path': {exact: /}}}]}", "http[0].match[0].headers.:path"),
        ("{route: [{destination: {host: web, subset: v1}}]}", "http[0].route[0].destination.subset"),
    ] {
        let (route, findings) = read(&format!("hosts: [web]\nhttp: [{}, {{{TO}}}]", rule.replace("TO", TO)));
        assert_eq!(findings, [format!("error not-supported spec.{field}")], "{rule}");
        let route = route.unwrap();
        assert!(route.rules[0].broken.is_some() && route.rules[1].broken.is_none(), "{rule}");
        assert!(!route.rules[0].matches.is_empty(), "{rule}: it still answers what it may have matched");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (http, expected) in [
        ("[{TO, match: [{uri: {exact: /a, prefix: /b}}]}]", "error invalid-value spec.http[0].match[0].uri"),
        ("[{TO, match: [{uri: {suffix: /a}}]}]", "error unknown-field spec.http[0].match[0].uri.suffix"),
        (
            "[{TO, match: [{headers: {'@request.auth.claims.': {exact: a}}}]}]",
            "error invalid-value spec.http[0].match[0].headers[\"@request.auth.claims.\"]",
        ),
        (
            "[{TO, match: [{headers: {'a b': {exact: a}}}]}]",
            "error invalid-value spec.http[0].match[0].headers[\"a b\"]",
        ),
        ("[{TO, more: 1}]", "error unknown-field spec.http[0].more"),
        ("[{route: [{weight: 1}]}]", "error missing-field spec.http[0].route[0]"),
    ] {
        let (route, findings) = read(&format!("hosts: [web]\nhttp: {}", http.replace("TO", TO)));
        assert!(route.is_none(), "{http}");
        assert!(findings.iter().any(|finding| finding == expected), "{http}: {findings:?}");
    }
    let (route, findings) = read("hosts: [web]\nhttp: [{match: [{uri: {exact: /a}}]}]");
    assert_eq!(findings, ["error no-backend spec.http[0]"]);
    assert!(route.unwrap().rules[0].broken.is_some());
}
