//! What a ztunnel says of connections to a pod that only one account may reach.

use super::*;
use cairn_mesh::{
    Authorization, Change, Clause, L4Match, L4Rule, NetworkAddress, PolicyAction, Scope, Store, TextMatch,
    Values,
};

fn workload(name: &str, address: &str, protocol: TunnelProtocol) -> Workload {
    let mut workload = Workload::new(name, name, Identity::new("td", "shop", name).unwrap());
    (workload.addresses, workload.protocol) = (vec![address.parse().unwrap()], protocol);
    workload
}

fn mesh() -> Store {
    let principals = Values { any: vec![TextMatch::parse("td/ns/shop/sa/web")], none: Vec::new() };
    let matches = vec![L4Match { principals, ..L4Match::default() }];
    let policy = |name: &str, action, dry_run, rules| {
        let (name, scope) = (ResourceName::new("shop", name), Scope::Namespace);
        Change::Authorization(Authorization { name, scope, action, rules, dry_run })
    };
    let mut store = Store::new();
    store.apply([
        Change::Workload(workload("web", "10.0.0.1", TunnelProtocol::Hbone)),
        Change::Workload(workload("guest", "10.0.0.3", TunnelProtocol::Hbone)),
        Change::Workload(workload("vault", "10.0.0.2", TunnelProtocol::Hbone)),
        Change::Workload(workload("old", "10.0.0.4", TunnelProtocol::None)),
        policy("web-only", PolicyAction::Allow, false, vec![L4Rule { clauses: vec![Clause { matches }] }]),
        policy("trial", PolicyAction::Deny, true, vec![L4Rule::default()]),
    ]);
    store
}

fn ask(from: Option<&str>, to: &str) -> Result<Explanation, Unanswerable> {
    let question = serde_json::json!({ "from": from, "to": to, "method": "GET", "path": "/", "headers": [] });
    explain(mesh().current(), &serde_json::from_value(question).unwrap())
}

#[test]
fn a_connection_is_explained_as_it_would_be_decided() {
    const WEB: &str = "spiffe://td/ns/shop/sa/web";
    for (from, to, end, text, steps) in [
        (Some("shop/web"), "10.0.0.2:80", "passes", "reaches shop/vault", 2),
        (Some(WEB), "10.0.0.2:80", "passes", "reaches shop/vault", 1),
        (
            Some("shop/guest"),
            "10.0.0.2:80",
            "denied",
            "the connection is refused by the ztunnel of shop/vault: allow policies exist, but none allowed: \
             shop/web-only",
            2,
        ),
        (
            None,
            "10.0.0.2:80",
            "denied",
            "the connection is refused by the ztunnel of shop/vault: allow policies exist, but none allowed: \
             shop/web-only",
            1,
        ),
        (Some("shop/web"), "10.0.0.4:80", "passes", "reaches an application outside the mesh", 1),
        (None, "10.0.0.4:80", "passes", "reaches shop/old", 1),
    ] {
        let found = ask(from, to).unwrap();
        assert_eq!(
            (found.answer.end, &*found.answer.text, found.steps.len()),
            (end, text, steps),
            "{from:?} {to}"
        );
    }
}

#[test]
fn each_rule_that_was_looked_at_is_told() {
    let found = ask(Some("spiffe://td/ns/shop/sa/guest"), "10.0.0.2:80").unwrap();
    let lines: Vec<_> =
        found.steps[0].lines.iter().map(|line| (&*line.what, line.matched, &*line.because)).collect();
    let miss = "principal: td/ns/shop/sa/guest is none that it asks for";
    assert_eq!(
        lines,
        [("dry run: DENY shop/trial rule 0", true, ""), ("ALLOW shop/web-only rule 0", false, miss)]
    );
}

#[test]
fn what_is_not_in_the_mesh_has_no_answer() {
    for (from, to) in
        [(Some("shop/nobody"), "10.0.0.2:80"), (None, "10.9.9.9:80"), (None, "nowhere:80"), (None, "x")]
    {
        assert!(ask(from, to).is_err(), "{from:?} {to}");
    }
    let unused = NetworkAddress { network: "".into(), address: "10.0.0.2".parse().unwrap() };
    assert!(mesh().current().workload_at(&unused).is_some());
}
