//! Policies through the wire and back, and what becomes of what is not understood.

use super::*;
use cairn_mesh::{Change, Decision, Identity, L4Peer, Store, Workload, decide};
use proptest::prelude::*;
use std::sync::Arc;

fn policy(action: PolicyAction, matches: Vec<L4Match>) -> Authorization {
    Authorization {
        name: ResourceName::new("ns", "p"),
        scope: Scope::Namespace,
        action,
        rules: vec![L4Rule { clauses: vec![Clause { matches }] }],
        dry_run: false,
    }
}

fn port(port: u16) -> L4Match {
    L4Match { destination_ports: Values { any: vec![port], none: vec![] }, ..L4Match::default() }
}

fn full_match() -> L4Match {
    let texts = || Values {
        any: vec![TextMatch::Exact("a".into()), TextMatch::Prefix("b".into())],
        none: vec![TextMatch::Suffix("c".into()), TextMatch::Present],
    };
    let blocks =
        || Values { any: vec!["10.0.0.0/8".parse().unwrap()], none: vec!["fd00::/16".parse().unwrap()] };
    let account = |name: &str| ServiceAccount { namespace: "ns".into(), name: name.into() };
    L4Match {
        namespaces: texts(),
        principals: texts(),
        service_accounts: Values { any: vec![account("x")], none: vec![account("y")] },
        source_ips: blocks(),
        destination_ips: blocks(),
        destination_ports: Values { any: vec![80], none: vec![81, 65535] },
        never: false,
    }
}

#[test]
fn policies_survive_the_wire() {
    use PolicyAction::{Allow, Deny};
    let scoped = |scope| Authorization { scope, dry_run: true, ..policy(Deny, vec![port(1)]) };
    for (name, policy) in [
        ("every field", policy(Allow, vec![full_match(), port(80)])),
        ("no rules", Authorization { rules: vec![], ..policy(Deny, vec![]) }),
        ("a rule without clauses", Authorization { rules: vec![L4Rule::default()], ..policy(Deny, vec![]) }),
        ("a clause without matches", policy(Deny, vec![])),
        ("an empty match", policy(Deny, vec![L4Match::default()])),
        ("global", scoped(Scope::Global)),
        ("by selector", scoped(Scope::WorkloadSelector)),
    ] {
        let bytes = authorization_to_proto(&policy).unwrap().encode_to_vec();
        let read = authorization_from_bytes(&bytes).unwrap();
        assert_eq!(read, ReadAuthorization { policy, not_understood: vec![] }, "{name}");
    }
}

#[test]
fn audit_has_no_wire_form() {
    assert_eq!(authorization_to_proto(&policy(PolicyAction::Audit, vec![])), None);
}

#[test]
fn a_match_that_never_holds_never_holds_on_the_other_side() {
    let never = L4Match { never: true, ..port(80) };
    let bytes = authorization_to_proto(&policy(PolicyAction::Allow, vec![never])).unwrap().encode_to_vec();
    let read = authorization_from_bytes(&bytes).unwrap().policy;
    assert_eq!(read.rules[0].clauses[0].matches, [L4Match::default()]);
    assert!(!allows(read, 80));
}

#[test]
fn unreadable_policies_are_refused() {
    let good = authorization_to_proto(&policy(PolicyAction::Allow, vec![])).unwrap();
    for (name, bytes) in [
        ("bytes", vec![0xff]),
        ("no name", wire::Authorization { name: String::new(), ..good.clone() }.encode_to_vec()),
        ("no namespace", wire::Authorization { namespace: String::new(), ..good.clone() }.encode_to_vec()),
        ("an action of the future", wire::Authorization { action: 2, ..good.clone() }.encode_to_vec()),
        ("a scope of the future", wire::Authorization { scope: 3, ..good.clone() }.encode_to_vec()),
    ] {
        assert!(authorization_from_bytes(&bytes).is_err(), "{name}");
    }
}

/// Whether a workload in namespace `ns` lets a peer in on this port.
fn allows(policy: Authorization, port: u16) -> bool {
    let identity = Identity::new("td", "ns", "sa").unwrap();
    let workload = Arc::new(Workload::new("u", "w", identity.clone()));
    let mut store = Store::new();
    store.apply([Change::Authorization(policy), Change::Workload((*workload).clone())]);
    let peer = L4Peer {
        identity: Some(&identity),
        source: "10.0.0.1:1".parse().unwrap(),
        destination: format!("10.0.0.2:{port}").parse().unwrap(),
    };
    matches!(decide(store.current(), &workload, &peer), Decision::Allow(_))
}

/// Appends field 99, a varint.
const UNKNOWN: &[u8] = &[0x98, 0x06, 0x01];

/// One length-delimited field with a number below 16.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
    bytes.extend_from_slice(content);
    bytes
}

/// A policy for namespace `ns`, with unknown fields put where the levels say.
struct Wire {
    action: u8,
    in_policy: &'static [u8],
    in_rule: &'static [u8],
    in_clause: &'static [u8],
    one_match: Vec<u8>,
}

impl Wire {
    fn bytes(&self) -> Vec<u8> {
        let clause = [field(2, &self.one_match), self.in_clause.to_vec()].concat();
        let rule = [field(1, &clause), self.in_rule.to_vec()].concat();
        let head = [field(1, b"p"), field(2, b"ns"), vec![3 << 3, 1, 4 << 3, self.action]];
        [head.concat(), field(5, &rule), self.in_policy.to_vec()].concat()
    }
}

const PORT_80: &[u8] = &[9 << 3, 80];
const ALLOW: u8 = 0;
const DENY: u8 = 1;

#[test]
fn unknown_conditions_count_as_false_in_allow_and_as_true_in_deny() {
    let wire = |action, one_match: &[&[u8]]| Wire {
        action,
        in_policy: &[],
        in_rule: &[],
        in_clause: &[],
        one_match: one_match.concat(),
    };
    let bad_ip = field(5, &field(1, &[1, 2, 3]));
    let untyped = field(3, &[]);
    let exact_principal = field(3, &field(1, b"td/ns/ns/sa/other"));
    for (name, wire, port_80, port_81) in [
        ("ALLOW port 80", wire(ALLOW, &[PORT_80]), true, false),
        ("ALLOW with an unknown field in the match", wire(ALLOW, &[PORT_80, UNKNOWN]), false, false),
        ("ALLOW with extensions", wire(ALLOW, &[PORT_80, &field(13, b"")]), false, false),
        ("ALLOW with a malformed address", wire(ALLOW, &[PORT_80, &bad_ip]), false, false),
        ("ALLOW with an untyped principal", wire(ALLOW, &[PORT_80, &untyped]), false, false),
        ("ALLOW with a port above 65535", wire(ALLOW, &[PORT_80, &[9 << 3, 0x80, 0x80, 0x04]]), false, false),
        (
            "ALLOW, unknown in the clause",
            Wire { in_clause: UNKNOWN, ..wire(ALLOW, &[PORT_80]) },
            false,
            false,
        ),
        ("ALLOW, unknown in the rule", Wire { in_rule: UNKNOWN, ..wire(ALLOW, &[PORT_80]) }, false, false),
        (
            "ALLOW, unknown in the policy",
            Wire { in_policy: UNKNOWN, ..wire(ALLOW, &[PORT_80]) },
            false,
            false,
        ),
        ("DENY port 80", wire(DENY, &[PORT_80]), false, true),
        ("DENY with an unknown field in the match", wire(DENY, &[PORT_80, UNKNOWN]), false, true),
        ("DENY with a malformed address", wire(DENY, &[PORT_80, &bad_ip]), false, true),
        (
            "DENY with another principal and a bad address",
            wire(DENY, &[&exact_principal, &bad_ip]),
            true,
            true,
        ),
        ("DENY of which nothing is known", wire(DENY, &[UNKNOWN]), false, false),
        ("DENY of an untyped principal", wire(DENY, &[&untyped]), false, false),
        ("DENY of nothing at all never matches", wire(DENY, &[]), true, true),
        ("DENY, unknown in the clause", Wire { in_clause: UNKNOWN, ..wire(DENY, &[PORT_80]) }, false, true),
        ("DENY, unknown in the rule", Wire { in_rule: UNKNOWN, ..wire(DENY, &[PORT_80]) }, false, true),
        ("DENY, unknown in the policy", Wire { in_policy: UNKNOWN, ..wire(DENY, &[PORT_80]) }, false, true),
    ] {
        let read = authorization_from_bytes(&wire.bytes()).unwrap();
        assert_eq!(allows(read.policy.clone(), 80), port_80, "{name}, port 80");
        assert_eq!(allows(read.policy, 81), port_81, "{name}, port 81");
        let understood =
            ["ALLOW port 80", "DENY port 80", "DENY of nothing at all never matches"].contains(&name);
        assert_eq!(read.not_understood.is_empty(), understood, "{name}: {:?}", read.not_understood);
    }
}

#[test]
fn siblings_of_a_match_that_is_not_understood_still_hold() {
    let clause = [field(2, &[PORT_80, UNKNOWN].concat()), field(2, &[9 << 3, 81])].concat();
    let bytes = [field(1, b"p"), field(2, b"ns"), vec![3 << 3, 1], field(5, &field(1, &clause))].concat();
    let read = authorization_from_bytes(&bytes).unwrap();
    assert_eq!(
        read.not_understood,
        ["rule 0 clause 0 match 0 has an unknown field: it allows nothing there"]
    );
    assert!(!allows(read.policy.clone(), 80));
    assert!(allows(read.policy, 81));
}

#[test]
fn a_stand_in_denies_its_scope() {
    let future = wire::Authorization {
        action: 7,
        scope: wire::Scope::Global.into(),
        ..authorization_to_proto(&policy(PolicyAction::Allow, vec![])).unwrap()
    };
    let name = ResourceName::new("ns", "p");
    assert_eq!(stand_in(name.clone(), &future.encode_to_vec()).scope, Scope::Global);
    let blind = stand_in(name, &[0xff]);
    assert_eq!(blind.scope, Scope::Namespace);
    assert!(!allows(blind, 80));
}

#[test]
fn blocks_of_mapped_addresses_count_their_own_bits() {
    let mapped = |length| wire::Address {
        address: "::ffff:10.0.0.0".parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec(),
        length,
    };
    assert_eq!(block(&mapped(104)), Some("10.0.0.0/8".parse().unwrap()));
    assert_eq!(block(&mapped(8)), None);
    assert_eq!(block(&wire::Address { address: vec![10, 0, 0, 0], length: 33 }), None);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        // What comes of it is judged above.
        let _ = authorization_from_bytes(&bytes);
    }

    #[test]
    fn any_unknown_field_in_an_allow_match_takes_its_effect(number in 14u32..2000, value in 0u8..128) {
        let mut one_match = PORT_80.to_vec();
        let key = number << 3;
        let mut rest = key;
        while rest >= 0x80 {
            one_match.push((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        one_match.extend([rest as u8, value]);
        let wire = Wire { action: ALLOW, in_policy: &[], in_rule: &[], in_clause: &[], one_match };
        prop_assert!(!allows(authorization_from_bytes(&wire.bytes()).unwrap().policy, 80));
    }
}
