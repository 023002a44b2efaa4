//! Do picking and deciding cost more where there is more to pick from and more to decide by?
//!
//! An endpoint is picked by locality and by load among ten or ten thousand; a connection is decided by ten or ten
//! thousand policies of ten rules each, none of which matches.

// A benchmark's own inputs are right or it must stop.
#![allow(clippy::expect_used)]

use cairn_mesh::{
    Authorization, Change, Chooser, Clause, Decision, Identity, L4Match, L4Peer, L4Rule, LoadBalancing,
    LoadBalancingMode, Locality, PolicyAction, ResourceName, RoutingScope, Scope, Service, ServicePort,
    Store, TextMatch, Values, Workload, decide, pick,
};
use divan::{AllocProfiler, Bencher, black_box};
use std::net::{IpAddr, Ipv4Addr};

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

fn identity(name: &str) -> Identity {
    Identity::new("cluster.local", "ns", name).expect("an identity")
}

/// Chance, and a load that is the same everywhere.
struct Drawing(fastrand::Rng);

impl Chooser for Drawing {
    fn below(&mut self, bound: u64) -> u64 {
        self.0.u64(..bound)
    }

    fn load(&self, _: &Workload) -> Option<u64> {
        Some(1)
    }
}

fn endpoint(number: u32) -> Workload {
    let name = |kind: &str, of: u32| format!("{kind}-{}", number % of).into();
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + number);
    Workload {
        addresses: vec![IpAddr::V4(address)],
        services: vec![(ResourceName::new("ns", "svc"), Vec::new())],
        locality: Locality { region: name("region", 2), zone: name("zone", 6), subzone: "".into() },
        node: name("node", 100),
        capacity: 1 + number % 3,
        ..Workload::new(format!("uid-{number}"), format!("pod-{number}"), identity("sa"))
    }
}

/// The nearest of so many endpoints, the less loaded of two, without allocating.
#[divan::bench(args = [10, 10_000])]
fn pick_the_nearest_among(bencher: Bencher, endpoints: u32) {
    let mut store = Store::new();
    let scopes = vec![RoutingScope::Network, RoutingScope::Region, RoutingScope::Zone];
    let service = Service {
        namespace: "ns".into(),
        hostname: "svc".into(),
        ports: vec![ServicePort { port: 80, target_port: 8080, protocol: Default::default() }],
        load_balancing: LoadBalancing { mode: LoadBalancingMode::Failover, scopes, ..Default::default() },
        ..Service::default()
    };
    store.apply(
        [Change::Service(service)].into_iter().chain((0..endpoints).map(|n| Change::Workload(endpoint(n)))),
    );
    let snapshot = store.snapshot();
    let state = snapshot.service(&ResourceName::new("ns", "svc")).expect("the service");
    let source = endpoint(1);
    let mut chooser = Drawing(fastrand::Rng::with_seed(7));
    bencher.counter(1_u32).bench_local(|| {
        let (picked, _) = pick(black_box(state), 80, Some(&source), &mut chooser).expect("an endpoint");
        assert_eq!(picked.workload.locality.zone, source.locality.zone);
    });
}

/// So many policies of ten rules, each of which names one client or one range of addresses.
fn policies(count: u32) -> Store {
    let principal = |text: String| L4Match {
        principals: Values { any: vec![TextMatch::Exact(text.into())], none: Vec::new() },
        ..L4Match::default()
    };
    let block = |number: u32| L4Match {
        source_ips: Values {
            any: vec![format!("172.16.{}.0/24", number % 256).parse().expect("a block")],
            none: Vec::new(),
        },
        ..L4Match::default()
    };
    let rule = |number: u32, rule: u32| {
        let one = match rule % 2 {
            0 => principal(format!("cluster.local/ns/ns/sa/{number}-{rule}")),
            _ => block(number),
        };
        L4Rule { clauses: vec![Clause { matches: vec![one] }] }
    };
    let policy = |number: u32| Authorization {
        name: ResourceName::new("ns", format!("policy-{number}")),
        scope: Scope::WorkloadSelector,
        action: PolicyAction::Deny,
        rules: (0..10).map(|at| rule(number, at)).collect(),
        dry_run: false,
    };
    let names = (0..count).map(|number| ResourceName::new("ns", format!("policy-{number}")));
    let workload = Workload {
        authorization_policies: names.collect(),
        ..Workload::new("uid", "pod", identity("server"))
    };
    let mut store = Store::new();
    store.apply(
        (0..count).map(|number| Change::Authorization(policy(number))).chain([Change::Workload(workload)]),
    );
    store
}

/// One connection, against so many policies that apply to its destination.
#[divan::bench(args = [10, 10_000])]
fn decide_by(bencher: Bencher, count: u32) {
    let store = policies(count);
    let (snapshot, client) = (store.snapshot(), identity("client"));
    let workload = snapshot.workload("uid").expect("the workload");
    let peer = L4Peer {
        identity: Some(&client),
        source: ([10, 0, 0, 1], 40_000).into(),
        destination: ([10, 0, 0, 2], 8080).into(),
    };
    let decide = || decide(black_box(&snapshot), workload, black_box(&peer));
    assert_eq!(decide(), Decision::Allow(None));
    bencher.counter(1_u32).bench_local(decide);
}
