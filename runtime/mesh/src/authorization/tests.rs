//! Tests of L4 authorization: the algebra of matches, and which policies decide.

use super::*;
use crate::{Change, Store};

fn texts(values: &[&str]) -> Vec<TextMatch> {
    values.iter().map(|value| TextMatch::parse(value)).collect()
}

fn any<T>(values: Vec<T>) -> Values<T> {
    Values { any: values, none: Vec::new() }
}

fn none<T>(values: Vec<T>) -> Values<T> {
    Values { any: Vec::new(), none: values }
}

fn blocks(values: &[&str]) -> Vec<IpNet> {
    values.iter().map(|value| value.parse().unwrap()).collect()
}

fn account(namespace: &str, name: &str) -> ServiceAccount {
    ServiceAccount { namespace: namespace.into(), name: name.into() }
}

fn everything() -> L4Rule {
    L4Rule::default()
}

/// One rule of one clause.
fn rule(matches: Vec<L4Match>) -> L4Rule {
    L4Rule { clauses: vec![Clause { matches }] }
}

fn policy(name: &str, action: PolicyAction, scope: Scope, rules: Vec<L4Rule>) -> Authorization {
    Authorization { name: ResourceName::parse(name).unwrap(), scope, action, rules, dry_run: false }
}

/// A client `ns1/a` at 10.0.0.1 that reaches 10.0.0.2:8080, and the same without a proven identity.
const CLIENT: Option<&str> = Some("spiffe://td/ns/ns1/sa/a");
const PLAINTEXT: Option<&str> = None;

fn matches(rules: Vec<L4Rule>, identity: Option<&str>) -> bool {
    let identity = identity.map(|identity| identity.parse::<Identity>().unwrap());
    let peer = L4Peer {
        identity: identity.as_ref(),
        source: ([10, 0, 0, 1], 40000).into(),
        destination: ([10, 0, 0, 2], 8080).into(),
    };
    policy("ns/p", PolicyAction::Deny, Scope::Namespace, rules).matching_rule(&peer).is_some()
}

#[test]
fn fields_compare_with_what_the_peer_proved() {
    let empty = L4Match::default;
    let namespaces = |namespaces| L4Match { namespaces, ..empty() };
    let principals = |principals| L4Match { principals, ..empty() };
    let accounts = |service_accounts| L4Match { service_accounts, ..empty() };
    let sources = |source_ips| L4Match { source_ips, ..empty() };
    let destinations = |destination_ips| L4Match { destination_ips, ..empty() };
    let ports = |destination_ports| L4Match { destination_ports, ..empty() };
    for (name, matching, client, plaintext) in [
        ("namespace", namespaces(any(texts(&["ns1"]))), true, false),
        ("namespace prefix", namespaces(any(texts(&["ns*"]))), true, false),
        ("another namespace", namespaces(any(texts(&["ns2"]))), false, false),
        ("not namespace", namespaces(none(texts(&["ns1"]))), false, true),
        ("any namespace: none is not one", namespaces(any(texts(&["*"]))), true, false),
        ("principal", principals(any(texts(&["td/ns/ns1/sa/a"]))), true, false),
        ("principal with scheme", principals(any(texts(&["spiffe://td/ns/ns1/sa/a"]))), false, false),
        ("principal prefix", principals(any(texts(&["td/ns/ns1/*"]))), true, false),
        ("principal suffix", principals(any(texts(&["*/sa/a"]))), true, false),
        ("any principal", principals(any(texts(&["*"]))), true, false),
        ("no principal: STRICT", principals(none(texts(&["*"]))), false, true),
        ("not another principal", principals(none(texts(&["td/ns/ns1/sa/b"]))), true, true),
        ("service account", accounts(any(vec![account("ns1", "a")])), true, false),
        (
            "another service account",
            accounts(any(vec![account("ns1", "b"), account("ns2", "a")])),
            false,
            false,
        ),
        ("not service account", accounts(none(vec![account("ns1", "a")])), false, true),
        ("source", sources(any(blocks(&["10.0.0.0/24"]))), true, true),
        ("another source", sources(any(blocks(&["10.0.1.0/24"]))), false, false),
        ("not source", sources(none(blocks(&["10.0.0.1/32"]))), false, false),
        ("destination", destinations(any(blocks(&["10.0.0.2/32"]))), true, true),
        ("destination is not source", destinations(any(blocks(&["10.0.0.1/32"]))), false, false),
        ("port", ports(any(vec![8080])), true, true),
        ("port is not the tunnel's", ports(any(vec![15008])), false, false),
        ("not port", ports(none(vec![8080])), false, false),
        (
            "any value and no excluded one",
            namespaces(Values { any: texts(&["ns*"]), none: texts(&["ns1"]) }),
            false,
            false,
        ),
        (
            "all fields",
            L4Match { destination_ports: any(vec![8080]), ..namespaces(any(texts(&["ns1"]))) },
            true,
            false,
        ),
        (
            "one field fails",
            L4Match { destination_ports: any(vec![81]), ..namespaces(any(texts(&["ns1"]))) },
            false,
            false,
        ),
        ("unknown parts match nothing", L4Match { never: true, ..ports(any(vec![8080])) }, false, false),
        ("wholly empty", empty(), false, false),
    ] {
        assert_eq!(matches(vec![rule(vec![matching.clone()])], CLIENT), client, "{name}: client");
        assert_eq!(matches(vec![rule(vec![matching])], PLAINTEXT), plaintext, "{name}: plaintext");
    }
}

#[test]
fn emptiness_has_a_meaning_at_each_level() {
    let port = |port| L4Match { destination_ports: any(vec![port]), ..L4Match::default() };
    let clause = |matches| Clause { matches };
    for (name, rules, expected) in [
        ("no rules: never", vec![], false),
        ("no clauses: always", vec![everything()], true),
        ("no matches in a clause: always", vec![rule(vec![])], true),
        ("an empty match: never", vec![rule(vec![L4Match::default()])], false),
        ("an empty match beside one that holds", vec![rule(vec![L4Match::default(), port(8080)])], true),
        ("any rule", vec![rule(vec![port(81)]), rule(vec![port(8080)])], true),
        ("any match of a clause", vec![rule(vec![port(81), port(8080)])], true),
        (
            "every clause",
            vec![L4Rule { clauses: vec![clause(vec![port(8080)]), clause(vec![port(81)])] }],
            false,
        ),
        (
            "an L7 part that left its clause empty: the DENY rule never fires",
            vec![L4Rule { clauses: vec![clause(vec![port(8080)]), clause(vec![L4Match::default()])] }],
            false,
        ),
    ] {
        assert_eq!(matches(rules, CLIENT), expected, "{name}");
    }
}

#[test]
fn mapped_addresses_are_ipv4() {
    let rules = vec![rule(vec![L4Match { source_ips: any(blocks(&["10.0.0.0/24"])), ..L4Match::default() }])];
    let peer = L4Peer {
        identity: None,
        source: "[::ffff:10.0.0.1]:40000".parse().unwrap(),
        destination: "[::ffff:10.0.0.2]:8080".parse().unwrap(),
    };
    assert_eq!(policy("ns/p", PolicyAction::Deny, Scope::Namespace, rules).matching_rule(&peer), Some(0));
}

/// Decides about the client's connection to a workload of namespace `ns` that names `named`.
fn check(policies: Vec<Authorization>, named: &[&str]) -> Decision {
    let mut store = Store::new();
    let identity = Identity::new("td", "ns", "server").unwrap();
    let mut workload = Workload::new("uid", "server", identity);
    workload.authorization_policies = named.iter().map(|name| ResourceName::parse(name).unwrap()).collect();
    let mut changes: Vec<Change> = policies.into_iter().map(Change::Authorization).collect();
    changes.push(Change::Workload(workload));
    store.apply(changes);
    let snapshot = store.snapshot();
    let client: Identity = CLIENT.unwrap().parse().unwrap();
    let peer = L4Peer {
        identity: Some(&client),
        source: ([10, 0, 0, 1], 40000).into(),
        destination: ([10, 0, 0, 2], 8080).into(),
    };
    decide(&snapshot, snapshot.workload("uid").unwrap(), &peer)
}

fn name(text: &str) -> ResourceName {
    ResourceName::parse(text).unwrap()
}

#[test]
fn policies_of_the_mesh_the_namespace_and_the_workload_decide() {
    use PolicyAction::{Allow, Audit, Deny};
    use Scope::{Global, Namespace, WorkloadSelector};
    let all = || vec![everything()];
    let nothing = || vec![rule(vec![L4Match { destination_ports: any(vec![1]), ..L4Match::default() }])];
    let allowed = |by: &str| Decision::Allow(Some((name(by), 0)));
    let denied = |by: &str| Decision::Deny(DenyReason::Policy(name(by), 0));
    let not_allowed =
        |by: &[&str]| Decision::Deny(DenyReason::NotAllowed(by.iter().map(|by| name(by)).collect()));
    let none: &[&str] = &[];
    for (what, policies, named, expected) in [
        ("no policy", vec![], none, Decision::Allow(None)),
        ("its namespace's", vec![policy("ns/p", Deny, Namespace, all())], none, denied("ns/p")),
        ("another namespace's", vec![policy("other/p", Deny, Namespace, all())], none, Decision::Allow(None)),
        (
            "another namespace's, named",
            vec![policy("root/strict", Deny, Namespace, all())],
            &["root/strict"],
            denied("root/strict"),
        ),
        ("the mesh's", vec![policy("root/p", Deny, Global, all())], none, denied("root/p")),
        (
            "by label and named",
            vec![policy("ns/p", Deny, WorkloadSelector, all())],
            &["ns/p"],
            denied("ns/p"),
        ),
        (
            "by label and not named",
            vec![policy("ns/p", Deny, WorkloadSelector, all())],
            none,
            Decision::Allow(None),
        ),
        (
            "DENY that does not match",
            vec![policy("ns/p", Deny, Namespace, nothing())],
            none,
            Decision::Allow(None),
        ),
        ("ALLOW that matches", vec![policy("ns/p", Allow, Namespace, all())], none, allowed("ns/p")),
        (
            "ALLOW that does not",
            vec![policy("ns/p", Allow, Namespace, nothing())],
            none,
            not_allowed(&["ns/p"]),
        ),
        ("ALLOW without rules", vec![policy("ns/p", Allow, Namespace, vec![])], none, not_allowed(&["ns/p"])),
        (
            "any ALLOW will do",
            vec![policy("root/p", Allow, Global, nothing()), policy("ns/p", Allow, WorkloadSelector, all())],
            &["ns/p"],
            allowed("ns/p"),
        ),
        (
            "deny wins over allow",
            vec![policy("ns/a", Allow, Namespace, all()), policy("root/p", Deny, Global, all())],
            none,
            denied("root/p"),
        ),
        ("AUDIT decides nothing", vec![policy("ns/p", Audit, Namespace, all())], none, Decision::Allow(None)),
        (
            "nor does a dry run",
            vec![
                Authorization { dry_run: true, ..policy("ns/d", Deny, Namespace, all()) },
                Authorization { dry_run: true, ..policy("ns/a", Allow, Namespace, nothing()) },
            ],
            none,
            Decision::Allow(None),
        ),
        (
            "a named policy that is not known",
            vec![policy("ns/a", Allow, Namespace, all())],
            &["ns/unknown"],
            Decision::Deny(DenyReason::MissingPolicy(name("ns/unknown"))),
        ),
    ] {
        assert_eq!(check(policies, named), expected, "{what}");
    }
}

#[test]
fn the_reason_names_at_most_four_policies() {
    let policies = (0..9).map(|n| policy(&format!("ns/p{n}"), PolicyAction::Allow, Scope::Namespace, vec![]));
    let Decision::Deny(reason) = check(policies.collect(), &[]) else { panic!("denied") };
    assert_eq!(reason.to_string(), "allow policies exist, but none allowed: ns/p0, ns/p1, ns/p2, ns/p3");
    let policy = policy(
        "ns/p",
        PolicyAction::Deny,
        Scope::Namespace,
        vec![rule(vec![L4Match::default()]), everything()],
    );
    let Decision::Deny(reason) = check(vec![policy], &[]) else { panic!("denied") };
    assert_eq!(reason.to_string(), "explicitly denied by: ns/p rule 1");
}

#[test]
fn policies_on_trial_change_nothing_and_say_what_they_would() {
    let identity: Identity = "spiffe://td/ns/ns1/sa/a".parse().unwrap();
    let peer = L4Peer {
        identity: Some(&identity),
        source: ([10, 0, 0, 1], 40000).into(),
        destination: ([10, 0, 0, 2], 8080).into(),
    };
    let never = || rule(vec![L4Match { namespaces: any(texts(&["ns2"])), ..L4Match::default() }]);
    let trial = |name: &str, action, rule| Authorization {
        dry_run: true,
        ..policy(name, action, Scope::Namespace, vec![rule])
    };
    use PolicyAction::{Allow, Deny};
    for (name, policies, expected) in [
        ("none on trial", vec![policy("ns/p", Deny, Scope::Namespace, vec![never()])], ""),
        ("deny", vec![trial("ns/p", Deny, everything())], "ns/p rule 0 would deny"),
        ("deny that does not match", vec![trial("ns/p", Deny, never())], ""),
        ("allow", vec![trial("ns/p", Allow, everything())], "ns/p rule 0 would allow"),
        ("allow that does not match", vec![trial("ns/p", Allow, never())], "none would allow: ns/p"),
        (
            "both, and another that does not match",
            vec![
                trial("ns/a", Allow, everything()),
                trial("ns/b", Deny, everything()),
                trial("ns/c", Deny, never()),
            ],
            "ns/b rule 0 would deny; ns/a rule 0 would allow",
        ),
        ("elsewhere", vec![trial("other/p", Deny, everything())], ""),
    ] {
        let mut store = Store::new();
        store.apply(policies.into_iter().map(Change::Authorization));
        let workload = Workload::new("w", "w", Identity::new("td", "ns", "b").unwrap());
        let found = on_trial(store.current(), &workload, &peer);
        let said: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(said.join("; "), expected, "{name}");
        assert_eq!(decide(store.current(), &workload, &peer), Decision::Allow(None), "{name}");
    }
}

#[test]
fn who_is_named_in_the_trust_domain_of_the_workload_or_an_alias_is_meant_in_all_of_them() {
    let settings = crate::MeshSettings {
        trust_domain: "mesh".into(),
        trust_domain_aliases: vec!["old".into()],
        ..crate::MeshSettings::default()
    };
    let workload = Workload::new("w", "w", Identity::new("own", "ns", "w").unwrap());
    let decided = |written: &str, aliases: bool, found: &str| {
        let matched = L4Match { principals: any(texts(&[written])), ..L4Match::default() };
        let deny = policy("ns/p", PolicyAction::Deny, Scope::Namespace, vec![rule(vec![matched])]);
        let mut store = Store::new();
        let settings = aliases.then(|| Change::Settings(settings.clone()));
        let others = [Change::Authorization(deny), Change::Workload(workload.clone())];
        store.apply(settings.into_iter().chain(others));
        let identity: Identity = found.parse().unwrap();
        let peer = L4Peer {
            identity: Some(&identity),
            source: ([10, 0, 0, 1], 40000).into(),
            destination: ([10, 0, 0, 2], 8080).into(),
        };
        matches!(decide(store.current(), &workload, &peer), Decision::Deny(_))
    };
    for (written, aliases, found, denied) in [
        ("own/ns/a/sa/x", false, "old", false),
        ("own/ns/a/sa/x", true, "own", true),
        ("own/ns/a/sa/x", true, "old", true),
        ("old/ns/a/sa/x", true, "own", true),
        ("mesh/ns/a/sa/x", true, "own", true),
        ("cluster.local/ns/a/sa/x", true, "own", true),
        ("elsewhere/ns/a/sa/x", true, "own", false),
        ("own/ns/a/sa/y", true, "old", false),
    ] {
        let found = format!("spiffe://{found}/ns/a/sa/x");
        assert_eq!(decided(written, aliases, &found), denied, "{written} {found}");
    }
}
