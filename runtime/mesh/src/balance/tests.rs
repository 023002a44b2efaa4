//! Tests of picking endpoints.

use super::*;
use crate::{
    Change, Identity, LoadBalancing, Locality, NetworkAddress, PortMapping, ResourceName, RoutingScope,
    Service, ServicePort, Store,
};
use std::collections::BTreeMap;
use std::sync::Arc;

fn endpoint(uid: &str, region: &str, zone: &str) -> Workload {
    let locality = Locality { region: region.into(), zone: zone.into(), subzone: "".into() };
    Workload {
        addresses: vec![[10, 0, 0, 1].into()],
        services: vec![(ResourceName::new("ns", "svc"), Vec::new())],
        locality,
        ..Workload::new(uid, uid, Identity::new("td", "ns", "sa").unwrap())
    }
}

fn state(load_balancing: LoadBalancing, endpoints: Vec<Workload>) -> Arc<ServiceState> {
    let port = |port, target_port| ServicePort { port, target_port, protocol: crate::AppProtocol::Tcp };
    let service = Service {
        name: "svc".into(),
        namespace: "ns".into(),
        hostname: "svc".into(),
        vips: vec![NetworkAddress { network: "".into(), address: [10, 96, 0, 1].into() }],
        ports: vec![port(80, 8080), port(81, 0)],
        subject_alt_names: Vec::new(),
        waypoint: None,
        load_balancing,
        canonical: true,
        ..Service::default()
    };
    let mut store = Store::new();
    store.apply([Change::Service(service)].into_iter().chain(endpoints.into_iter().map(Change::Workload)));
    Arc::clone(store.snapshot().service(&ResourceName::new("ns", "svc")).unwrap())
}

/// How often each endpoint is picked in 6,000 picks.
fn picks(state: &ServiceState, port: u16, source: Option<&Workload>) -> BTreeMap<String, u32> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut counts = BTreeMap::new();
    for _ in 0..6_000 {
        if let Some((endpoint, _)) = pick(state, port, source, &mut |bound| random.u64(..bound)) {
            *counts.entry(endpoint.workload.uid.to_string()).or_default() += 1;
        }
    }
    counts
}

fn names(counts: &BTreeMap<String, u32>) -> Vec<&str> {
    counts.keys().map(String::as_str).collect()
}

fn is_near(count: u32, expected: u32) -> bool {
    count.abs_diff(expected) < expected / 8
}

#[test]
fn endpoints_share_by_capacity() {
    let weighted = |uid, capacity| Workload { capacity, ..endpoint(uid, "", "") };
    let even = picks(&state(LoadBalancing::default(), vec![weighted("a", 1), weighted("b", 1)]), 80, None);
    assert!(is_near(even["a"], 3_000) && is_near(even["b"], 3_000), "{even:?}");
    let endpoints = vec![weighted("a", 1), weighted("b", 0), weighted("c", 2), weighted("d", 3)];
    let counts = picks(&state(LoadBalancing::default(), endpoints), 80, None);
    assert_eq!(names(&counts), ["a", "c", "d"], "capacity 0 takes nothing");
    let shares = [("a", 1_000), ("c", 2_000), ("d", 3_000)];
    assert!(shares.iter().all(|(uid, share)| is_near(counts[*uid], *share)), "{counts:?}");
    assert!(picks(&state(LoadBalancing::default(), vec![weighted("a", 0)]), 80, None).is_empty());
}

#[test]
fn few_endpoints_of_many_that_serve_a_port_are_found() {
    let mut endpoints: Vec<Workload> = (0..200).map(|n| endpoint(&format!("w{n:03}"), "", "")).collect();
    endpoints[77].services[0].1 = vec![PortMapping { service_port: 81, target_port: 9090 }];
    let state = state(LoadBalancing::default(), endpoints);
    let counts = picks(&state, 81, None);
    assert_eq!((names(&counts), counts["w077"]), (vec!["w077"], 6_000));
    let (_, port) = pick(&state, 81, None, &mut |_| 0).unwrap();
    assert_eq!(port, 9090);
    assert!(picks(&state, 82, None).is_empty());
}

#[test]
fn preferences_choose_by_locality() {
    let endpoints =
        || vec![endpoint("here", "r", "z"), endpoint("near", "r", "y"), endpoint("far", "q", "z")];
    let with = |mode| LoadBalancing {
        mode,
        scopes: vec![RoutingScope::Region, RoutingScope::Zone],
        ..Default::default()
    };
    let all = ["far", "here", "near"];
    for (name, mode, source, expected) in [
        ("standard", LoadBalancingMode::Standard, ("r", "z"), &all[..]),
        ("failover: same zone", LoadBalancingMode::Failover, ("r", "z"), &["here"]),
        ("failover: same region", LoadBalancingMode::Failover, ("r", "x"), &["here", "near"]),
        (
            "failover: elsewhere; a zone's name counts in its region only",
            LoadBalancingMode::Failover,
            ("s", "z"),
            &all,
        ),
        ("strict: same zone", LoadBalancingMode::Strict, ("r", "z"), &["here"]),
        ("strict: elsewhere", LoadBalancingMode::Strict, ("r", "x"), &[]),
    ] {
        let source = endpoint("source", source.0, source.1);
        let counts = picks(&state(with(mode), endpoints()), 80, Some(&source));
        assert_eq!(names(&counts), expected, "{name}");
    }
}

#[test]
fn preferred_endpoints_share_by_capacity_too() {
    let weighted = |uid, capacity| Workload { capacity, ..endpoint(uid, "r", "z") };
    let endpoints = vec![weighted("a", 1), weighted("b", 2), endpoint("far", "q", "z")];
    let balancing = LoadBalancing {
        mode: LoadBalancingMode::Failover,
        scopes: vec![RoutingScope::Region],
        ..Default::default()
    };
    let counts = picks(&state(balancing, endpoints), 80, Some(&endpoint("source", "r", "x")));
    assert_eq!(names(&counts), ["a", "b"]);
    assert!(is_near(counts["a"], 2_000) && is_near(counts["b"], 4_000), "{counts:?}");
}
