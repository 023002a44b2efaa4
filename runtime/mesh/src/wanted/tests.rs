//! What is to be asked for, step by step, until a connection can be decided about.

use super::*;
use crate::{Change, GatewayAddress, Identity, NetworkMode, Service, ServicePort, Store};

fn at(network: &str, address: &str) -> NetworkAddress {
    NetworkAddress { network: network.into(), address: address.parse().unwrap() }
}

fn by_name(name: &str) -> Option<GatewayAddress> {
    Some(GatewayAddress { target: GatewayTarget::Hostname(ResourceName::new("b", name)), hbone_port: 15008 })
}

fn by_address(network: &str, address: &str) -> Option<GatewayAddress> {
    Some(GatewayAddress { target: GatewayTarget::Address(at(network, address)), hbone_port: 15008 })
}

fn workload(name: &str, address: &str, service: Option<&str>) -> Workload {
    Workload {
        addresses: vec![address.parse().unwrap()],
        services: service.map(|name| (ResourceName::new("b", name), Vec::new())).into_iter().collect(),
        ..Workload::new(name, name, Identity::new("td", "b", "sa").unwrap())
    }
}

fn service(hostname: &str, vip: &str) -> Service {
    Service {
        name: hostname.into(),
        namespace: "b".into(),
        hostname: hostname.into(),
        vips: vec![at("", vip)],
        ports: vec![ServicePort { port: 80, target_port: 8080, protocol: crate::AppProtocol::Tcp }],
        ..Service::default()
    }
}

fn snapshot(changes: Vec<Change>) -> Snapshot {
    let mut store = Store::new();
    store.apply(changes);
    store.snapshot()
}

fn texts(wanted: &[Wanted]) -> Vec<String> {
    wanted.iter().map(ToString::to_string).collect()
}

#[test]
fn the_way_out_is_asked_for_step_by_step() {
    let client = workload("client", "10.0.0.1", None);
    let plain = || Change::Service(service("echo", "10.96.0.1"));
    let guarded = || Change::Service(Service { waypoint: by_name("wp"), ..service("echo", "10.96.0.1") });
    let beyond = || {
        Change::Workload(Workload {
            network: "n2".into(),
            network_gateway: by_address("n2", "10.9.9.9"),
            ..workload("far", "10.0.2.7", Some("echo"))
        })
    };
    let shared = || {
        Change::Workload(Workload { network_mode: NetworkMode::Host, ..workload("node", "10.0.0.9", None) })
    };
    for (name, changes, destination, expected) in [
        ("nothing is known", vec![], "10.96.0.1:80", vec!["/10.96.0.1"]),
        ("an address that IPv6 wraps", vec![], "[::ffff:10.96.0.1]:80", vec!["/10.96.0.1"]),
        ("a service is enough", vec![plain()], "10.96.0.1:80", vec![]),
        ("its waypoint by name", vec![guarded()], "10.96.0.1:80", vec!["b/wp"]),
        (
            "its waypoint, a service, is known",
            vec![guarded(), Change::Service(service("wp", "10.96.0.2"))],
            "10.96.0.1:80",
            vec![],
        ),
        (
            "its waypoint, a workload, is known",
            vec![
                guarded(),
                Change::Workload(Workload { hostname: "wp".into(), ..workload("wp", "10.0.3.3", None) }),
            ],
            "10.96.0.1:80",
            vec![],
        ),
        (
            "a workload's waypoint by address",
            vec![Change::Workload(Workload {
                waypoint: by_address("", "10.0.3.3"),
                ..workload("echo", "10.0.2.7", None)
            })],
            "10.0.2.7:8080",
            vec!["/10.0.3.3"],
        ),
        ("the gateway of another network", vec![plain(), beyond()], "10.96.0.1:80", vec!["n2/10.9.9.9"]),
        ("an address that is shared with a node", vec![shared()], "10.0.0.9:80", vec![]),
    ] {
        let snapshot = snapshot(changes);
        let wanted = wanted_outbound(&snapshot, &client, destination.parse().unwrap());
        assert_eq!(texts(&wanted), expected, "{name}");
    }
}

#[test]
fn the_way_in_is_asked_for_where_it_is_not_the_workloads_own() {
    let server = workload("server", "10.0.2.7", Some("echo"));
    let local: IpAddr = "10.0.2.7".parse().unwrap();
    let own = ArrivalTarget::Address("10.0.2.7:8080".parse().unwrap());
    let other = ArrivalTarget::Address("10.96.0.1:80".parse().unwrap());
    for (name, target, known, expected) in [
        ("its own address", own, false, vec![]),
        ("another address", other, false, vec!["/10.96.0.1"]),
        ("another address that is known", other, true, vec![]),
        ("its own service", ArrivalTarget::Host("echo", 80), false, vec!["b/echo"]),
        ("its own service that is known", ArrivalTarget::Host("echo", 80), true, vec![]),
        ("somebody else's service", ArrivalTarget::Host("other", 80), false, vec![]),
    ] {
        let changes = if known { vec![Change::Service(service("echo", "10.96.0.1"))] } else { vec![] };
        let wanted = wanted_inbound(&snapshot(changes), &server, local, target);
        assert_eq!(texts(&wanted), expected, "{name}");
    }
}

#[test]
fn a_workload_is_known_by_its_uid() {
    let snapshot = snapshot(vec![Change::Workload(workload("u", "10.0.0.1", None))]);
    assert!(Wanted::Workload("u".into()).is_known(&snapshot));
    assert!(!Wanted::Workload("v".into()).is_known(&snapshot));
}
