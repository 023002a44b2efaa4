//! What do publishing, looking up and picking cost in a large mesh?
//!
//! The mesh has 100,000 workloads in 10,000 services of ten endpoints each.

// A benchmark's own inputs are right or it must stop.
#![allow(clippy::expect_used)]

use cairn_mesh::{
    AppProtocol, Change, Destination, Identity, LoadBalancing, NetworkAddress, ResourceName, Service,
    ServicePort, Snapshot, Store, Workload, pick,
};
use divan::{Bencher, black_box};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

const WORKLOADS: u32 = 100_000;
const ENDPOINTS_EACH: u32 = 10;

fn main() {
    divan::main();
}

fn at(address: IpAddr) -> NetworkAddress {
    NetworkAddress { network: "".into(), address }
}

fn pod_ip(number: u32) -> IpAddr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + number).into()
}

fn vip(number: u32) -> IpAddr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + number).into()
}

fn key(service: u32) -> ResourceName {
    ResourceName::new("ns", format!("svc-{service}.ns.svc.cluster.local"))
}

fn workload(number: u32, service: u32) -> Workload {
    let identity = Identity::new("cluster.local", "ns", "sa").expect("an identity");
    Workload {
        addresses: vec![pod_ip(number)],
        services: vec![(key(service), Vec::new())],
        ..Workload::new(format!("Kubernetes//Pod/ns/pod-{number}"), format!("pod-{number}"), identity)
    }
}

fn service(number: u32) -> Service {
    let key = key(number);
    Service {
        name: format!("svc-{number}").into(),
        namespace: key.namespace,
        hostname: key.name,
        vips: vec![at(vip(number))],
        ports: vec![ServicePort { port: 80, target_port: 8080, protocol: AppProtocol::Http11 }],
        subject_alt_names: Vec::new(),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        canonical: true,
        ..Service::default()
    }
}

fn mesh(workloads: u32, endpoints_each: u32) -> Store {
    let mut store = Store::new();
    let services = (0..workloads / endpoints_each).map(|number| Change::Service(service(number)));
    let pods = (0..workloads).map(|number| Change::Workload(workload(number, number / endpoints_each)));
    store.apply(services.chain(pods));
    store
}

fn large_mesh() -> Store {
    mesh(WORKLOADS, ENDPOINTS_EACH)
}

/// Publishing a workload that changes at every turn, to readers that hold the snapshot before.
fn publish(bencher: Bencher, mut store: Store, number: u32, service: u32) {
    let mut published: Snapshot = store.snapshot();
    let mut revision = 0_u32;
    let prepare = || {
        revision += 1;
        let revision = revision.to_string().into();
        Change::Workload(Workload { canonical_revision: revision, ..workload(number, service) })
    };
    bencher.counter(1_u32).with_inputs(prepare).bench_local_values(|change| {
        store.apply([change]);
        std::mem::replace(&mut published, store.snapshot())
    });
    let now = published.workload_at(&at(pod_ip(number))).expect("the workload");
    assert!(now.canonical_revision.parse::<u32>().is_ok_and(|at| at > 0));
    let state = published.service(&key(service)).expect("its service");
    assert!(state.endpoints.iter().any(|endpoint| Arc::ptr_eq(&endpoint.workload, now)));
}

/// One change among 100,000 workloads, in a service of ten endpoints: applied and published.
#[divan::bench]
fn publish_one_change(bencher: Bencher) {
    publish(bencher, large_mesh(), 77_777, 7_777);
}

/// The same, in a service of so many endpoints, which is rebuilt.
#[divan::bench(args = [100, 1_000, 10_000])]
fn publish_an_endpoint_among(bencher: Bencher, endpoints: u32) {
    publish(bencher, mesh(endpoints, endpoints), endpoints / 2, 0);
}

/// The first load: the whole mesh in one batch.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn load_100_000_workloads(bencher: Bencher) {
    bencher.counter(WORKLOADS).bench_local(|| {
        let store = large_mesh();
        assert_eq!(store.current().workloads().count(), WORKLOADS as usize);
        store
    });
}

/// Which service is at a VIP.
#[divan::bench]
fn look_up_vip(bencher: Bencher) {
    let snapshot = large_mesh().snapshot();
    let address = at(vip(7_777));
    let look_up = || snapshot.destination(black_box(&address), black_box("ns"));
    assert!(matches!(look_up(), Some(Destination::Service(state)) if state.service.key() == key(7_777)));
    bencher.counter(1_u32).bench_local(look_up);
}

/// Which workload is at a pod's address.
#[divan::bench]
fn look_up_pod(bencher: Bencher) {
    let snapshot = large_mesh().snapshot();
    let address = at(pod_ip(77_777));
    let look_up = || snapshot.destination(black_box(&address), black_box("ns"));
    assert!(matches!(look_up(), Some(Destination::Workload(workload)) if &*workload.name == "pod-77777"));
    bencher.counter(1_u32).bench_local(look_up);
}

/// An endpoint among so many.
#[divan::bench(args = [10, 1_000, 10_000])]
fn pick_an_endpoint_among(bencher: Bencher, endpoints: u32) {
    let snapshot = mesh(endpoints, endpoints).snapshot();
    let state = snapshot.service(&key(0)).expect("the service");
    assert_eq!(state.endpoints.len(), endpoints as usize);
    let mut random = fastrand::Rng::with_seed(7);
    bencher.counter(1_u32).bench_local(|| {
        let picked = pick(black_box(state), 80, None, &mut |bound| random.u64(..bound));
        assert!(picked.is_some_and(|(_, port)| port == 8080));
    });
}
