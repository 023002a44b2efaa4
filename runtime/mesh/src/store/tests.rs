//! Tests of the store: what a sequence of changes leaves in the snapshot.

use super::*;
use crate::{
    Destination, Health, HealthPolicy, Identity, Kind, LoadBalancing, PolicyAction, PortMapping, TargetKind,
    TargetRef,
};
use proptest::prelude::*;
use std::fmt::Write;

fn at(address: &str) -> NetworkAddress {
    NetworkAddress { network: "".into(), address: address.parse().unwrap() }
}

fn name(text: &str) -> ResourceName {
    ResourceName::parse(text).unwrap()
}

fn workload(uid: &str, address: &str, services: &[&str]) -> Workload {
    let ports = vec![PortMapping { service_port: 80, target_port: 8080 }];
    Workload {
        addresses: vec![address.parse().unwrap()],
        services: services.iter().map(|key| (name(key), ports.clone())).collect(),
        ..Workload::new(uid, uid, Identity::new("td", "ns", "sa").unwrap())
    }
}

fn service(key: &str, vip: &str, canonical: bool) -> Service {
    let key = name(key);
    Service {
        name: Arc::clone(&key.name),
        namespace: key.namespace,
        hostname: key.name,
        vips: vec![at(vip)],
        ports: Vec::new(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        canonical,
        ..Service::default()
    }
}

fn policy(key: &str, scope: Scope) -> Authorization {
    Authorization { name: name(key), scope, action: PolicyAction::Allow, rules: Vec::new(), dry_run: false }
}

fn naming(uid: &str, policies: &[&str]) -> Change {
    let authorization_policies = policies.iter().map(|key| name(key)).collect();
    Change::Workload(Workload { authorization_policies, ..workload(uid, "10.0.0.1", &[]) })
}

fn endpoints(snapshot: &Snapshot, key: &str) -> Vec<String> {
    let state = snapshot.service(&name(key)).unwrap();
    state.endpoints.iter().map(|endpoint| endpoint.workload.uid.to_string()).collect()
}

fn policies_of(snapshot: &Snapshot, uid: &str) -> Vec<String> {
    let workload = snapshot.workload(uid).unwrap();
    workload.authorization_policies.iter().map(ToString::to_string).collect()
}

#[test]
fn endpoints_wait_for_their_service_and_outlive_it() {
    let mut store = Store::new();
    store.apply([Change::Workload(workload("w", "10.0.0.1", &["ns/svc"]))]);
    assert!(store.snapshot().service(&name("ns/svc")).is_none());
    store.apply([Change::Service(service("ns/svc", "10.96.0.1", true))]);
    assert_eq!(endpoints(&store.snapshot(), "ns/svc"), ["w"]);
    store.apply([Change::ServiceRemoved(name("ns/svc"))]);
    assert!(store.snapshot().service_at(&at("10.96.0.1"), "ns").is_none());
    assert!(store.snapshot().service_named("svc", "ns").is_none());
    store.apply([Change::Service(service("ns/svc", "10.96.0.2", true))]);
    assert_eq!(endpoints(&store.snapshot(), "ns/svc"), ["w"]);
    assert!(store.snapshot().service_at(&at("10.96.0.2"), "ns").is_some());
}

#[test]
fn a_changed_workload_leaves_its_old_addresses_and_services() {
    let mut store = Store::new();
    store.apply([
        Change::Service(service("ns/old", "10.96.0.1", true)),
        Change::Service(service("ns/new", "10.96.0.2", true)),
        Change::Workload(workload("w", "10.0.0.1", &["ns/old"])),
    ]);
    store.apply([Change::Workload(workload("w", "10.0.0.2", &["ns/new"]))]);
    let snapshot = store.snapshot();
    assert!(snapshot.workload_at(&at("10.0.0.1")).is_none());
    assert_eq!(&*snapshot.workload_at(&at("10.0.0.2")).unwrap().uid, "w");
    assert_eq!((endpoints(&snapshot, "ns/old").len(), endpoints(&snapshot, "ns/new").len()), (0, 1));
    store.apply([Change::WorkloadRemoved("w".into())]);
    let snapshot = store.snapshot();
    assert!(snapshot.workload("w").is_none() && snapshot.workload_at(&at("10.0.0.2")).is_none());
    assert_eq!(endpoints(&snapshot, "ns/new").len(), 0);
    assert_eq!(snapshot.workloads().count(), 0);
}

#[test]
fn removing_what_is_not_there_changes_nothing() {
    let mut store = Store::new();
    store.apply([
        Change::WorkloadRemoved("w".into()),
        Change::ServiceRemoved(name("ns/svc")),
        Change::AuthorizationRemoved(name("ns/p")),
        Change::L7Removed(ResourceKey { kind: Kind::HttpRoute, name: name("ns/r") }),
    ]);
    assert_eq!(describe(&store.snapshot()), describe(&Snapshot::default()));
}

#[test]
fn workloads_on_one_address_are_all_known_and_the_first_by_uid_answers() {
    let mut store = Store::new();
    for uid in ["b", "a", "c"] {
        store.apply([Change::Workload(workload(uid, "10.0.0.1", &[]))]);
    }
    let uids = |store: &Store| -> Vec<String> {
        store
            .current()
            .workloads_at(&at("10.0.0.1"))
            .iter()
            .map(|workload| workload.uid.to_string())
            .collect()
    };
    assert_eq!(uids(&store), ["a", "b", "c"]);
    assert_eq!(&*store.current().workload_at(&at("10.0.0.1")).unwrap().uid, "a");
    store.apply([Change::WorkloadRemoved("a".into())]);
    assert_eq!(uids(&store), ["b", "c"]);
}

#[test]
fn the_callers_namespace_then_the_canonical_service_then_the_first_answers() {
    let mut store = Store::new();
    let shared = |key, canonical| Change::Service(service(key, "10.96.0.1", canonical));
    store.apply([shared("c/host", false), shared("b/host", true), shared("a/host", false)]);
    let snapshot = store.snapshot();
    for (namespace, expected) in [("a", "a"), ("b", "b"), ("c", "c"), ("other", "b")] {
        let by_vip = snapshot.service_at(&at("10.96.0.1"), namespace).unwrap();
        let by_name = snapshot.service_named("host", namespace).unwrap();
        assert_eq!((&*by_vip.service.namespace, &*by_name.service.namespace), (expected, expected));
    }
    store.apply([Change::ServiceRemoved(name("b/host"))]);
    let snapshot = store.snapshot();
    assert_eq!(&*snapshot.service_named("host", "other").unwrap().service.namespace, "a");
    assert_eq!(snapshot.services_at(&at("10.96.0.1")).count(), 2);
}

#[test]
fn a_workloads_own_address_wins_over_a_vip() {
    let mut store = Store::new();
    store.apply([Change::Service(service("ns/svc", "10.0.0.1", true))]);
    assert!(matches!(store.current().destination(&at("10.0.0.1"), "ns"), Some(Destination::Service(_))));
    store.apply([Change::Workload(workload("w", "10.0.0.1", &[]))]);
    assert!(matches!(store.current().destination(&at("10.0.0.1"), "ns"), Some(Destination::Workload(_))));
    assert!(store.current().destination(&at("10.0.0.2"), "ns").is_none());
}

#[test]
fn only_healthy_endpoints_are_chosen_unless_the_service_says_so() {
    let mut store = Store::new();
    let sick = Workload { health: Health::Unhealthy, ..workload("sick", "10.0.0.2", &["ns/svc"]) };
    store.apply([
        Change::Service(service("ns/svc", "10.96.0.1", true)),
        Change::Workload(workload("well", "10.0.0.1", &["ns/svc"])),
        Change::Workload(sick),
    ]);
    assert_eq!(endpoints(store.current(), "ns/svc"), ["well"]);
    assert_eq!(store.current().service(&name("ns/svc")).unwrap().endpoints_known, 2);
    let load_balancing = LoadBalancing { health: HealthPolicy::AllowAll, ..LoadBalancing::default() };
    store.apply([Change::Service(Service { load_balancing, ..service("ns/svc", "10.96.0.1", true) })]);
    assert_eq!(endpoints(store.current(), "ns/svc"), ["sick", "well"]);
}

#[test]
fn a_workload_keeps_its_policies_until_the_new_ones_are_known() {
    let mut store = Store::new();
    let known = Change::Authorization(policy("ns/old", Scope::WorkloadSelector));
    assert_eq!(store.apply([naming("w", &["ns/old"]), known]), Applied::default());
    let waiting = Applied { waiting: vec!["w".into()] };
    assert_eq!(store.apply([naming("w", &["ns/new"])]), waiting);
    assert_eq!(policies_of(store.current(), "w"), ["ns/old"]);
    assert_eq!(store.apply([]), waiting, "it goes on waiting");
    let arrived = Change::Authorization(policy("ns/new", Scope::WorkloadSelector));
    assert_eq!(store.apply([arrived]), Applied::default());
    assert_eq!(policies_of(store.current(), "w"), ["ns/new"]);
}

#[test]
fn a_workload_that_is_given_up_gets_its_new_policies() {
    let mut store = Store::new();
    store.apply([Change::Authorization(policy("ns/old", Scope::WorkloadSelector)), naming("w", &["ns/old"])]);
    let waiting = store.apply([naming("w", &["ns/new"])]).waiting;
    store.give_up(&waiting);
    assert_eq!(policies_of(store.current(), "w"), ["ns/new"]);
    assert_eq!(store.apply([]), Applied::default());
}

#[test]
fn a_workload_that_goes_or_changes_its_mind_does_not_wait() {
    let mut store = Store::new();
    assert_eq!(store.apply([naming("w", &["ns/p"])]).waiting.len(), 1);
    assert_eq!(store.apply([naming("w", &[])]), Applied::default());
    assert_eq!(store.apply([naming("w", &["ns/p"])]).waiting.len(), 1);
    assert_eq!(store.apply([Change::WorkloadRemoved("w".into())]), Applied::default());
}

#[test]
fn a_policy_that_waited_reaches_the_endpoints_of_services() {
    let mut store = Store::new();
    let waiting =
        Workload { authorization_policies: vec![name("ns/p")], ..workload("w", "10.0.0.1", &["ns/svc"]) };
    let without = workload("w", "10.0.0.1", &["ns/svc"]);
    store.apply([Change::Service(service("ns/svc", "10.96.0.1", true)), Change::Workload(without)]);
    store.apply([Change::Workload(waiting)]);
    store.apply([Change::Authorization(policy("ns/p", Scope::WorkloadSelector))]);
    let state = Arc::clone(store.current().service(&name("ns/svc")).unwrap());
    assert_eq!(state.endpoints[0].workload.authorization_policies, [name("ns/p")]);
}

#[test]
fn a_policy_removed_while_it_is_named_denies_nothing_until_it_is_named_anew() {
    let decide = |store: &Store| {
        let workload = store.current().workload("w").unwrap();
        let address = ([10, 0, 0, 1], 1).into();
        let peer = crate::L4Peer { identity: None, source: address, destination: address };
        matches!(crate::decide(store.current(), workload, &peer), crate::Decision::Allow(_))
    };
    let put = || Change::Authorization(policy("ns/p", Scope::WorkloadSelector));
    let mut store = Store::new();
    store.apply([put(), naming("w", &["ns/p"])]);
    assert!(!decide(&store), "an ALLOW policy without rules");
    store.apply([Change::AuthorizationRemoved(name("ns/p"))]);
    assert!(decide(&store));
    store.apply([put()]);
    assert!(!decide(&store), "it came back");
    store.apply([Change::AuthorizationRemoved(name("ns/p"))]);
    store.apply([naming("w", &["ns/p"])]);
    assert!(!decide(&store), "it is expected back");
}

#[test]
fn names_of_removed_policies_are_bounded() {
    let mut store = Store::new();
    store.apply((0..GONE_MAX * 2).map(|n| Change::AuthorizationRemoved(name(&format!("ns/p{n}")))));
    assert_eq!(store.current().gone.len(), GONE_MAX);
}

#[test]
fn a_policy_that_changes_its_scope_leaves_the_old_one() {
    let mut store = Store::new();
    let counts = |store: &Store| {
        let snapshot = store.current();
        (snapshot.global_authorizations().len(), snapshot.namespace_authorizations("ns").len())
    };
    for (scope, expected) in [
        (Scope::Global, (1, 0)),
        (Scope::Namespace, (0, 1)),
        (Scope::WorkloadSelector, (0, 0)),
        (Scope::Global, (1, 0)),
    ] {
        store.apply([Change::Authorization(policy("ns/p", scope))]);
        assert_eq!(counts(&store), expected, "{scope:?}");
    }
    store.apply([Change::AuthorizationRemoved(name("ns/p"))]);
    assert_eq!(counts(&store), (0, 0));
}

#[test]
fn an_unenforceable_resource_takes_the_place_of_the_enforceable_one() {
    let key = ResourceKey { kind: Kind::AuthorizationPolicy, name: name("ns/p") };
    let enforceable = || {
        Change::Policy(AuthorizationPolicy {
            name: name("ns/p"),
            targets: vec![TargetRef { kind: TargetKind::Gateway, name: "wp".into() }],
            action: PolicyAction::Deny,
            rules: Vec::new(),
            dry_run: false,
        })
    };
    let broken = Unenforceable {
        what: "AuthorizationPolicy ns/p".into(),
        targets: Vec::new(),
        namespace: "ns".into(),
        reason: "it asks for a token".into(),
    };
    let counts =
        |store: &Store| (store.current().l7().policies.len(), store.current().l7().unenforceable.len());
    let mut store = Store::new();
    store.apply([enforceable()]);
    assert_eq!(counts(&store), (1, 0));
    store.apply([Change::Unenforceable(key.clone(), broken.clone())]);
    assert_eq!(counts(&store), (0, 1));
    store.apply([enforceable()]);
    assert_eq!(counts(&store), (1, 0));
    store.apply([Change::Unenforceable(key.clone(), broken), Change::L7Removed(key)]);
    assert_eq!(counts(&store), (0, 0));
}

#[test]
fn a_snapshot_does_not_see_later_changes() {
    let mut store = Store::new();
    store.apply([
        Change::Service(service("ns/svc", "10.96.0.1", true)),
        Change::Workload(workload("w", "10.0.0.1", &["ns/svc"])),
        Change::Authorization(policy("ns/p", Scope::Namespace)),
    ]);
    let before = store.snapshot();
    let seen = describe(&before);
    store.apply([
        Change::WorkloadRemoved("w".into()),
        Change::ServiceRemoved(name("ns/svc")),
        Change::AuthorizationRemoved(name("ns/p")),
        Change::Gateway(name("ns/wp")),
    ]);
    assert_eq!(describe(&before), seen);
    assert_ne!(describe(&store.snapshot()), seen);
    assert!(store.snapshot().generation() > before.generation());
}

/// All that readers can find in a snapshot, as text. The order of maps does not show, that of lists does.
fn describe(snapshot: &Snapshot) -> String {
    let mut lines = Vec::new();
    for workload in snapshot.workloads() {
        lines.push(format!("{workload:?}"));
    }
    for (address, workloads) in snapshot.addresses.iter() {
        let uids: Vec<_> = workloads.iter().map(|workload| &workload.uid).collect();
        lines.push(format!("{address:?} {uids:?}"));
    }
    for state in snapshot.services() {
        let mut line = format!("{:?} of {}:", state.service, state.endpoints_known);
        for endpoint in &state.endpoints {
            write!(line, " {:?} {:?}", endpoint.workload, endpoint.ports).unwrap();
        }
        lines.push(format!("{line} {:?}", state.wheel));
    }
    lines.extend(snapshot.hostnames.iter().map(|entry| format!("hostname {entry:?}")));
    lines.extend(snapshot.vips.iter().map(|entry| format!("vip {entry:?}")));
    lines.extend(snapshot.blocks.iter().map(|entry| format!("block {entry:?}")));
    lines.extend(snapshot.named.iter().map(|entry| format!("named {entry:?}")));
    lines.push(format!("{:?}", snapshot.block_lengths));
    lines.extend(snapshot.authorizations.iter().map(|entry| format!("policy {entry:?}")));
    lines.extend(snapshot.namespace_authorizations.iter().map(|entry| format!("namespace {entry:?}")));
    lines.push(format!("global {:?}", snapshot.global_authorizations));
    lines.push(format!("{:?}", snapshot.l7));
    lines.sort();
    lines.join("\n")
}

const POLICIES: [&str; 3] = ["ns/p0", "ns/p1", "other/p2"];

prop_compose! {
    fn some_workload()(
        uid in 0..6_u8,
        address in 1..5_u8,
        services in prop::sample::subsequence(vec!["ns/a", "ns/b", "other/a"], 0..=3),
        policies in prop::sample::subsequence(POLICIES.to_vec(), 0..=2),
        is_healthy: bool,
        capacity in 1..3_u32,
    ) -> Change {
        Change::Workload(Workload {
            authorization_policies: policies.into_iter().map(name).collect(),
            health: if is_healthy { Health::Healthy } else { Health::Unhealthy },
            capacity,
            ..workload(&format!("w{uid}"), &format!("10.0.0.{address}"), &services)
        })
    }
}

fn some_policy() -> impl Strategy<Value = Change> {
    let scopes = [Scope::Global, Scope::Namespace, Scope::WorkloadSelector];
    (prop::sample::select(&POLICIES), prop::sample::select(scopes.to_vec()))
        .prop_map(|(key, scope)| Change::Authorization(policy(key, scope)))
}

fn some_change() -> impl Strategy<Value = Change> {
    let keys = || prop::sample::select(vec!["ns/a", "ns/b", "other/a"]);
    prop_oneof![
        4 => some_workload(),
        1 => (0..6_u8).prop_map(|uid| Change::WorkloadRemoved(format!("w{uid}").into())),
        2 => (keys(), 1..3_u8, any::<bool>())
            .prop_map(|(key, vip, own)| Change::Service(service(key, &format!("10.96.0.{vip}"), own))),
        1 => keys().prop_map(|key| Change::ServiceRemoved(name(key))),
        2 => some_policy(),
        1 => prop::sample::select(&POLICIES).prop_map(|key| Change::AuthorizationRemoved(name(key))),
    ]
}

proptest! {
    /// Waiting for policies depends on what came when, so here every policy has arrived in the end.
    #[test]
    fn a_batch_leaves_what_its_changes_one_by_one_leave(changes in prop::collection::vec(some_change(), 0..40)) {
        let arrived = POLICIES.map(|key| Change::Authorization(policy(key, Scope::Namespace)));
        let changes: Vec<Change> = changes.into_iter().chain(arrived).collect();
        let mut batch = Store::new();
        prop_assert_eq!(batch.apply(changes.clone()), Applied::default());
        let mut single = Store::new();
        for change in changes {
            single.apply([change]);
        }
        prop_assert_eq!(describe(batch.current()), describe(single.current()));
    }

    /// Nothing is left behind: what every later change takes away is gone from every index.
    #[test]
    fn removing_everything_leaves_an_empty_snapshot(changes in prop::collection::vec(some_change(), 0..40)) {
        let mut store = Store::new();
        store.apply(changes);
        store.apply((0..6_u8).map(|uid| Change::WorkloadRemoved(format!("w{uid}").into())));
        store.apply(["ns/a", "ns/b", "other/a"].map(|key| Change::ServiceRemoved(name(key))));
        store.apply(POLICIES.map(|key| Change::AuthorizationRemoved(name(key))));
        prop_assert_eq!(describe(store.current()), describe(&Snapshot::default()));
        prop_assert!(store.endpoints.is_empty() && store.deferred.is_empty());
    }
}

#[test]
fn an_authentication_and_what_stands_in_its_place_replace_each_other() {
    let name = name("ns/a");
    let key = ResourceKey { kind: Kind::RequestAuthentication, name: name.clone() };
    let good = || {
        let name = name.clone();
        Change::RequestAuthentication(crate::RequestAuthentication {
            name,
            targets: Vec::new(),
            rules: Vec::new(),
        })
    };
    let broken = Unenforceable {
        what: "RequestAuthentication ns/a".into(),
        targets: Vec::new(),
        namespace: "ns".into(),
        reason: "it cannot be read".into(),
    };
    let mut store = Store::new();
    for (change, counts) in [
        (good(), (1, 0)),
        (Change::Unenforceable(key.clone(), broken), (0, 1)),
        (good(), (1, 0)),
        (Change::L7Removed(key), (0, 0)),
    ] {
        store.apply([change]);
        let l7 = store.current().l7();
        assert_eq!((l7.authentications.len(), l7.unenforceable.len()), counts);
    }
}
