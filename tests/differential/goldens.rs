//! The policies of Istio's golden files for its translation (`pilot/pkg/security/authz/builder/testdata`), derived again as
//! what they are to decide. Both sides are held to it. Those with action CUSTOM are in the tests of external
//! authorization.

use crate::envoy::Envoy;
use crate::ours::{self, Ours};
use crate::scenario::{Ask, Outcome, Remarks, Scenario};
use anyhow::{Context, Result, ensure};
use cairn_mesh::PathNormalization;
use serde_json::{Value, json};
use std::sync::Arc;

/// A policy and what it is to decide.
struct Golden {
    name: &'static str,
    scenario: Scenario,
    expected: Vec<Expected>,
}

/// What is to become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Passes,
    Denied,
    /// It passes, with these remarks: AUDIT, ALLOW on trial refuses, DENY on trial refuses.
    Remarked(bool, bool, bool),
}
use Expected::{Denied, Passes, Remarked};

impl Expected {
    fn is(self, outcome: &Outcome) -> bool {
        match (self, outcome) {
            (Denied, Outcome::Denied { .. } | Outcome::Closed) => true,
            (Passes, Outcome::Allowed { remarks, .. }) => *remarks == Remarks::default(),
            (
                Remarked(audited, refused_by_allow_on_trial, refused_by_deny_on_trial),
                Outcome::Allowed { remarks, .. },
            ) => *remarks == Remarks { audited, refused_by_allow_on_trial, refused_by_deny_on_trial },
            _ => false,
        }
    }
}

fn policy(name: &str, action: &str, rules: Value) -> Value {
    let mut policy = json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": { "name": name, "namespace": "foo" },
        "spec": {
            "targetRefs": [{ "kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint" }],
            "action": action,
        },
    });
    if !rules.is_null() {
        policy["spec"]["rules"] = rules;
    }
    policy
}

fn on_trial(mut policy: Value) -> Value {
    policy["metadata"]["annotations"] = json!({ "istio.io/dry-run": "true" });
    policy
}

/// A request of `cluster.local/ns/rule-ns/sa/rule` from 10.0.0.1 to 10.1.0.1:80.
fn get(target: &str) -> Ask {
    Ask {
        peer: Some("spiffe://cluster.local/ns/rule-ns/sa/rule".to_owned()),
        source: ([10, 0, 0, 1], 40_000).into(),
        destination: ([10, 1, 0, 1], 80).into(),
        method: "GET".to_owned(),
        target: target.to_owned(),
        headers: vec![("host".to_owned(), "exact.com".to_owned())],
        body: String::new(),
        http2: false,
    }
}

impl Ask {
    fn by(self, principal: &str) -> Self {
        Self { peer: Some(format!("spiffe://{principal}")), ..self }
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    fn method(self, method: &str) -> Self {
        Self { method: method.to_owned(), ..self }
    }

    fn port(mut self, port: u16) -> Self {
        self.destination.set_port(port);
        self
    }
}

fn golden<const N: usize>(name: &'static str, objects: Vec<Value>, rows: [(Ask, Expected); N]) -> Golden {
    let (asks, expected) = rows.into_iter().unzip();
    let trust_domains = vec!["cluster.local".to_owned()];
    let normalization = PathNormalization::Base;
    Golden { name, scenario: Scenario { normalization, trust_domains, tcp: false, objects, asks }, expected }
}

impl Golden {
    fn in_domains(mut self, trust_domains: &[&str]) -> Self {
        self.scenario.trust_domains = trust_domains.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    fn without_http(mut self) -> Self {
        self.scenario.tcp = true;
        self
    }
}

fn path(path: &str) -> Value {
    json!({ "to": [{ "operation": { "paths": [path] } }] })
}

/// A rule that asks about everything at once.
fn full() -> Value {
    json!([{
        "from": [{ "source": {
            "principals": ["cluster.local/ns/rule-ns/sa/rule"], "notPrincipals": ["*/sa/not-rule"],
            "namespaces": ["rule-ns"], "notNamespaces": ["not-*"],
            "ipBlocks": ["10.0.0.0/8"], "notIpBlocks": ["10.9.0.0/16"],
            "remoteIpBlocks": ["172.17.0.0/16"], "notRemoteIpBlocks": ["172.17.9.0/24"],
        } }],
        "to": [{ "operation": {
            "methods": ["GET"], "notMethods": ["PUT"], "hosts": ["exact.com", "*.suffix.com"], "notHosts": ["not.com"],
            "ports": ["80"], "notPorts": ["8000"], "paths": ["/exact", "/prefix/*"], "notPaths": ["/prefix/not*"],
        } }],
        "when": [
            { "key": "request.headers[X-header]", "values": ["header", "header-prefix-*"], "notValues": ["header-prefix-not"] },
            { "key": "destination.ip", "values": ["10.1.0.0/16"], "notValues": ["10.1.9.0/24"] },
            { "key": "destination.port", "values": ["80"], "notValues": ["90"] },
            { "key": "source.namespace", "values": ["rule-*"] },
            { "key": "source.principal", "values": ["*/sa/rule"] },
        ],
    }])
}

/// What the whole of [`full`] matches.
fn whole() -> Ask {
    get("/prefix/a").with("x-forwarded-for", "172.17.1.1").with("x-header", "header-prefix-a")
}

fn of_rules() -> Vec<Golden> {
    let full_rows = |passes, denied| {
        [
            (whole(), passes),
            (whole().by("cluster.local/ns/rule-ns/sa/other"), denied),
            (whole().by("cluster.local/ns/other/sa/rule"), denied),
            (whole().method("POST"), denied),
            (whole().port(81), denied),
            (whole().with("x-header", "header-prefix-not"), denied),
            (Ask { target: "/prefix/not-this".to_owned(), ..whole() }, denied),
            (Ask { source: ([10, 9, 0, 1], 1).into(), ..whole() }, denied),
            (get("/prefix/a").with("x-header", "header"), denied),
        ]
    };
    let identity = |name: &str| json!([{ "from": [{ "source": { "principals": [format!("cluster.local/ns/foo/sa/{name}")] } }] }]);
    let by = |name: &str| get("/").by(&format!("cluster.local/ns/foo/sa/{name}"));
    vec![
        golden("allow-empty-rule", vec![policy("p", "ALLOW", json!([{}]))], [(get("/"), Passes)]),
        golden("allow-nil-rule", vec![policy("p", "ALLOW", Value::Null)], [(get("/"), Denied)]),
        golden("allow-full-rule", vec![policy("p", "ALLOW", full())], full_rows(Passes, Denied)),
        golden(
            "audit-full-rule",
            vec![policy("p", "AUDIT", full())],
            full_rows(Remarked(true, false, false), Passes),
        ),
        golden(
            "allow-path",
            vec![policy("p", "ALLOW", json!([path("/exact"), path("/prefix*"), path("*suffix"), path("*")]))],
            [(get("/exact"), Passes), (get("/"), Passes)],
        ),
        golden("deny-empty-rule", vec![policy("p", "DENY", json!([{}]))], [(get("/"), Denied)]),
        golden(
            "deny-and-allow",
            vec![
                policy("d", "DENY", json!([path("/deny")])),
                policy("a", "ALLOW", json!([path("/allow"), path("/deny")])),
            ],
            [(get("/allow"), Passes), (get("/deny"), Denied), (get("/other"), Denied)],
        ),
        golden(
            "single-policy",
            vec![policy("p", "ALLOW", identity("a"))],
            [(by("a"), Passes), (by("b"), Denied)],
        ),
        golden(
            "multiple-policies",
            vec![
                policy("p", "ALLOW", identity("a")),
                policy("q", "ALLOW", identity("b")),
                policy("r", "ALLOW", Value::Null),
            ],
            [(by("a"), Passes), (by("b"), Passes), (by("c"), Denied)],
        ),
        golden(
            "dry-run-allow",
            vec![on_trial(policy("p", "ALLOW", json!([path("/allow")])))],
            [(get("/allow"), Passes), (get("/other"), Remarked(false, true, false))],
        ),
        golden(
            "dry-run-allow-and-deny",
            vec![
                on_trial(policy("a", "ALLOW", json!([path("/allow")]))),
                on_trial(policy("d", "DENY", json!([path("/deny")]))),
            ],
            [
                (get("/allow"), Passes),
                (get("/deny"), Remarked(false, true, true)),
                (get("/other"), Remarked(false, true, false)),
            ],
        ),
        golden(
            "dry-run-mix",
            vec![
                policy("a", "ALLOW", json!([path("/allow*")])),
                policy("d", "DENY", json!([path("/allow/deny")])),
                on_trial(policy("ta", "ALLOW", json!([path("/allow/less")]))),
                on_trial(policy("td", "DENY", json!([path("/allow/more")]))),
            ],
            [
                (get("/allow/less"), Passes),
                (get("/allow/deny"), Denied),
                (get("/allow/more"), Remarked(false, true, true)),
                (get("/other"), Denied),
            ],
        ),
    ]
}

fn of_trust_domains() -> Vec<Golden> {
    let principal = |value: &str| {
        vec![policy("p", "ALLOW", json!([{ "from": [{ "source": { "principals": [value] } }] }]))]
    };
    let condition = |key: &str, value: &str| {
        vec![policy("p", "ALLOW", json!([{ "when": [{ "key": key, "values": [value] }] }]))]
    };
    let in_domain = |domain: &str| get("/").by(&format!("{domain}/ns/rule-ns/sa/rule"));
    vec![
        golden(
            "simple-policy-td-aliases",
            principal("cluster.local/ns/rule-ns/sa/rule"),
            [(in_domain("td1"), Passes), (in_domain("cluster.local"), Passes), (in_domain("other"), Denied)],
        )
        .in_domains(&["td1", "cluster.local"]),
        golden(
            "simple-policy-multiple-td-aliases",
            principal("cluster.local/ns/rule-ns/sa/rule"),
            [(in_domain("td1"), Passes), (in_domain("some-td"), Passes), (in_domain("other"), Denied)],
        )
        .in_domains(&["td1", "cluster.local", "some-td"]),
        golden(
            "simple-policy-principal-with-wildcard",
            principal("*"),
            [
                (in_domain("td1"), Passes),
                (in_domain("any"), Passes),
                (Ask { peer: None, ..get("/") }, Denied),
            ],
        )
        .in_domains(&["td1", "foobar"]),
        golden(
            "td-aliases-source-principal",
            condition("source.principal", "td1/ns/rule-ns/sa/rule"),
            [(in_domain("td1"), Passes), (in_domain("old-td"), Passes), (in_domain("other"), Denied)],
        )
        .in_domains(&["old-td", "td1"]),
        golden(
            "trust-domains",
            condition("source.trustDomain", "td1"),
            [(in_domain("td1"), Passes), (in_domain("old-td"), Passes), (in_domain("td11"), Denied)],
        )
        .in_domains(&["old-td", "td1"]),
    ]
}

fn of_connections() -> Vec<Golden> {
    let port = |port: &str| json!({ "to": [{ "operation": { "ports": [port] } }] });
    let both = json!([
        path("/http"),
        { "to": [{ "operation": { "ports": ["80"], "methods": ["GET"] } }] },
        { "from": [{ "source": { "namespaces": ["rule-ns"] } }], "to": [{ "operation": { "ports": ["9000"] } }] },
        { "when": [{ "key": "request.headers[x]", "values": ["y"] }] },
    ]);
    let other = || get("/").by("cluster.local/ns/other/sa/rule");
    vec![
        // Of four rules the one without HTTP is left.
        golden(
            "tcp allow-both-http-tcp",
            vec![policy("p", "ALLOW", both.clone())],
            [
                (get("/").port(9000), Passes),
                (other().port(9000), Denied),
                (get("/"), Denied),
                (get("/http").port(81), Denied),
            ],
        ),
        // None is left, and the policy still allows nothing.
        golden("tcp allow-only-http", vec![policy("p", "ALLOW", json!([path("/")]))], [(get("/"), Denied)]),
        // Each rule loses what it asks about HTTP: the first and the last match everything.
        golden(
            "tcp deny-both-http-tcp",
            vec![policy("p", "DENY", both.clone())],
            [(get("/").port(81), Denied)],
        ),
        golden(
            "tcp deny, a part of a rule",
            vec![policy(
                "p",
                "DENY",
                json!([{ "to": [{ "operation": { "ports": ["80"], "paths": ["/http"] } }] }]),
            )],
            [(get("/"), Denied), (get("/").port(81), Passes)],
        ),
        golden("tcp audit-both", vec![policy("p", "AUDIT", both)], [(get("/"), Passes)]),
        golden(
            "tcp dry-run-mix",
            vec![
                policy("p", "ALLOW", json!([port("80")])),
                on_trial(policy("t", "DENY", json!([port("80")]))),
            ],
            [(get("/"), Passes), (get("/").port(81), Denied)],
        ),
    ]
    .into_iter()
    .map(Golden::without_http)
    .collect()
}

#[tokio::test]
async fn istios_goldens_are_decided_as_they_are_meant() -> Result<()> {
    let all: Vec<Golden> = [of_rules(), of_trust_domains(), of_connections()].into_iter().flatten().collect();
    let ours = Arc::new(Ours::new());
    for (index, golden) in all.iter().enumerate() {
        let site = ours::site(&golden.scenario).context(golden.name)?;
        for (ask, expected) in golden.scenario.asks.iter().zip(&golden.expected) {
            let outcome = ours.ask(&site, index, ask).await?;
            ensure!(expected.is(&outcome), "{}: {ask}\nis not {expected:?}: {outcome:?}", golden.name);
        }
    }
    let Some(program) = cairn_tests::envoy::program() else {
        cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    };
    let scenarios: Vec<Scenario> = all.iter().map(|golden| golden.scenario.clone()).collect();
    let envoy = Envoy::start(&program, &scenarios).await?;
    for (index, golden) in all.iter().enumerate() {
        for (ask, expected) in golden.scenario.asks.iter().zip(&golden.expected) {
            let outcome = envoy.ask(index, golden.scenario.normalization, ask).await?;
            ensure!(expected.is(&outcome), "Envoy, {}: {ask}\nis not {expected:?}: {outcome:?}", golden.name);
        }
    }
    Ok(())
}
