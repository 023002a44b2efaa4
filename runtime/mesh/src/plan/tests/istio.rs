//! The cases in which a ztunnel's own tests ask where a connection goes, and what they expect, as one table.

use super::describe;
use crate::{
    Change, GatewayAddress, GatewayTarget, Health, Identity, IpFamilies, LoadBalancing, LoadBalancingMode,
    NetworkAddress, NetworkMode, PortMapping, ResourceName, RoutingScope, Service, ServicePort, Store,
    TunnelProtocol, Workload, plan,
};

const HOST: &str = "example.com";

fn ip(address: &str) -> NetworkAddress {
    in_network("", address)
}

fn in_network(network: &str, address: &str) -> NetworkAddress {
    NetworkAddress { network: network.into(), address: address.parse().unwrap() }
}

fn at(target: GatewayTarget, hbone_port: u16) -> Option<GatewayAddress> {
    Some(GatewayAddress { target, hbone_port })
}

fn by_address(network: &str, address: &str, port: u16) -> Option<GatewayAddress> {
    at(GatewayTarget::Address(in_network(network, address)), port)
}

fn by_name(host: &str, port: u16) -> Option<GatewayAddress> {
    at(GatewayTarget::Hostname(ResourceName::new("ns", host)), port)
}

fn service(host: &str, vip: &str, ports: &[(u16, u16)]) -> Service {
    let port = |(port, target_port): &(u16, u16)| ServicePort {
        port: *port,
        target_port: *target_port,
        protocol: Default::default(),
    };
    Service {
        name: host.into(),
        namespace: "ns".into(),
        hostname: host.into(),
        vips: vec![ip(vip)],
        ports: ports.iter().map(port).collect(),
        ..Service::default()
    }
}

fn workload(name: &str, addresses: &[&str], services: &[(&str, &[(u16, u16)])]) -> Workload {
    let mapping = |(service_port, target_port): &(u16, u16)| PortMapping {
        service_port: *service_port,
        target_port: *target_port,
    };
    let of = |(host, ports): &(&str, &[(u16, u16)])| {
        (ResourceName::new("ns", *host), ports.iter().map(mapping).collect())
    };
    Workload {
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        services: services.iter().map(of).collect(),
        ..Workload::new(name, name, Identity::new("td", "ns", name).unwrap())
    }
}

fn meshed(workload: Workload) -> Change {
    Change::Workload(Workload { protocol: TunnelProtocol::Hbone, ..workload })
}

/// Where `10.0.0.1` of this network goes for `destination`.
fn check(name: &str, changes: Vec<Change>, destination: &str, expected: &str) {
    let source = Workload { node: "here".into(), ..workload("source", &["10.0.0.1"], &[]) };
    let mut store = Store::new();
    store.apply([Change::Workload(source.clone())].into_iter().chain(changes));
    let found = plan(&store.snapshot(), &source, destination.parse().unwrap(), &mut |_| 0);
    assert_eq!(describe(&found), expected, "{name}");
}

#[test]
fn workloads_are_reached_as_they_are() {
    let pod = || workload("pod", &["10.0.0.2"], &[]);
    let here = || Workload { node: "here".into(), ..pod() };
    let dual = || workload("pod", &["10.0.0.2", "ff06::c3"], &[]);
    let direct = "direct pod 10.0.0.2:15008 authority 10.0.0.2:80 as td/ns/ns/sa/pod";
    for (name, changes, destination, expected) in [
        ("unknown_dest", vec![Change::Workload(pod())], "1.2.3.4:80", "plain 1.2.3.4:80"),
        (
            "known_dest_remote_node_tcp",
            vec![Change::Workload(pod())],
            "10.0.0.2:80",
            "plain 10.0.0.2:80 to pod",
        ),
        ("known_dest_remote_node_hbone", vec![meshed(pod())], "10.0.0.2:80", direct),
        (
            "known_dest_local_node_tcp",
            vec![Change::Workload(here())],
            "10.0.0.2:80",
            "plain 10.0.0.2:80 to pod",
        ),
        ("known_dest_local_node_hbone", vec![meshed(here())], "10.0.0.2:80", direct),
        (
            "multiple_address_workload: v4",
            vec![Change::Workload(dual())],
            "10.0.0.2:80",
            "plain 10.0.0.2:80 to pod",
        ),
        (
            "multiple_address_workload: v6",
            vec![Change::Workload(dual())],
            "[ff06::c3]:80",
            "plain [ff06::c3]:80 to pod",
        ),
    ] {
        check(name, changes, destination, expected);
    }
}

#[test]
fn waypoints_of_workloads_and_services() {
    let waypoint = || Change::Workload(workload("wp", &["10.0.0.10"], &[]));
    let with = |addresses: &[&str]| Workload {
        waypoint: by_address("", "10.0.0.10", 15008),
        ..workload("pod", addresses, &[])
    };
    let through = "waypoint wp 10.0.0.10:15008 authority";
    let as_wp = "as td/ns/ns/sa/wp for";
    let of_service =
        Service { waypoint: by_address("", "10.0.0.10", 15008), ..service(HOST, "10.0.0.3", &[(80, 8080)]) };
    let passing = |service: Service| Service {
        load_balancing: LoadBalancing { mode: LoadBalancingMode::Passthrough, ..Default::default() },
        ..service
    };
    for (name, changes, destination, expected) in [
        (
            "destination_waypoint",
            vec![waypoint(), Change::Workload(with(&["10.0.0.2"]))],
            "10.0.0.2:80",
            format!("{through} 10.0.0.2:80 {as_wp} workload pod"),
        ),
        (
            "destination_waypoint_mismatch_ip",
            vec![waypoint(), Change::Workload(with(&["10.0.0.2", "ff06::c3"]))],
            "[ff06::c3]:80",
            format!("{through} [ff06::c3]:80 {as_wp} workload pod"),
        ),
        (
            "destination_svc_waypoint",
            vec![waypoint(), Change::Service(of_service.clone())],
            "10.0.0.3:80",
            format!("{through} 10.0.0.3:80 {as_wp} {HOST}"),
        ),
        (
            "empty_service",
            vec![Change::Service(service(HOST, "10.0.0.3", &[(80, 8080)]))],
            "10.0.0.3:80",
            format!("refused: no healthy upstream: {HOST} has no ready endpoint for port 80"),
        ),
        (
            "passthrough_svc",
            vec![Change::Service(passing(service(HOST, "10.0.0.3", &[(80, 80)])))],
            "10.0.0.3:80",
            format!("plain 10.0.0.3:80 for {HOST}"),
        ),
        (
            "passthrough_svc_with_waypoint",
            vec![waypoint(), Change::Service(passing(of_service))],
            "10.0.0.3:80",
            format!("{through} 10.0.0.3:80 {as_wp} {HOST}"),
        ),
    ] {
        check(name, changes, destination, &expected);
    }
    // Though the source has a waypoint, it is not for what the source sends.
    let mut store = Store::new();
    let source = with(&["10.0.0.2"]);
    store.apply([
        waypoint(),
        Change::Workload(source.clone()),
        Change::Workload(workload("other", &["10.0.0.1"], &[])),
    ]);
    let found = plan(&store.snapshot(), &source, "10.0.0.1:80".parse().unwrap(), &mut |_| 0);
    assert_eq!(describe(&found), "plain 10.0.0.1:80 to other", "source_waypoint");
}

#[test]
fn ports_and_addresses_of_endpoints() {
    let named = service(HOST, "10.0.0.3", &[(80, 0), (8080, 0)]);
    let of = |name: &str, address: &str, ports: &[(u16, u16)]| {
        Change::Workload(workload(name, &[address], &[(HOST, ports)]))
    };
    check(
        "target_port",
        vec![
            Change::Service(named),
            of("a", "10.0.0.4", &[(8080, 9999)]),
            of("b", "10.0.0.2", &[(80, 1234)]),
        ],
        "10.0.0.3:80",
        "plain 10.0.0.2:1234 to b for example.com",
    );
    let on_host = |name: &str, services: &[(&str, &[(u16, u16)])]| {
        let pod = workload(name, &["10.0.0.2"], services);
        Change::Workload(Workload { network_mode: NetworkMode::Host, ..pod })
    };
    let shared = || {
        let service = Change::Service(service(HOST, "10.0.0.3", &[(80, 80)]));
        vec![service, on_host("pod2", &[(HOST, &[(80, 80)])]), on_host("pod1", &[])]
    };
    check("host_network: its service", shared(), "10.0.0.3:80", "plain 10.0.0.2:80 to pod2 for example.com");
    check("host_network: the node", shared(), "10.0.0.2:80", "plain 10.0.0.2:80");
    for (families, destination, expected) in [
        (IpFamilies::V6, "10.0.0.3:80", "[ff06::c3]"),
        (IpFamilies::V4, "10.0.0.3:80", "10.0.0.2"),
        (IpFamilies::V4, "[::3]:80", "10.0.0.2"),
        (IpFamilies::Dual, "10.0.0.3:80", "10.0.0.2"),
        (IpFamilies::Dual, "[::3]:80", "[ff06::c3]"),
        (IpFamilies::Automatic, "[::3]:80", "[ff06::c3]"),
    ] {
        let mut service = Service { ip_families: families, ..service(HOST, "10.0.0.3", &[(80, 80)]) };
        service.vips.push(ip("::3"));
        let dual = meshed(workload("pod", &["10.0.0.2", "ff06::c3"], &[(HOST, &[])]));
        let expected =
            format!("direct pod {expected}:15008 authority {expected}:80 as td/ns/ns/sa/pod for {HOST}");
        check(
            &format!("service_ip_families: {families:?}"),
            vec![Change::Service(service), dual],
            destination,
            &expected,
        );
    }
}

/// The other network's side of a service: behind a gateway, without an address here.
fn remote(name: &str, host: &str, port: u16, gateway: Option<GatewayAddress>) -> Change {
    Change::Workload(Workload {
        network: "remote".into(),
        network_gateway: gateway,
        ..workload(name, &[], &[(host, &[(port, port)])])
    })
}

fn gateway() -> Change {
    let pod = workload("gw", &["10.22.1.1"], &[]);
    Change::Workload(Workload { network: "remote".into(), ..pod })
}

#[test]
fn other_networks_are_reached_through_their_gateways() {
    let of = || Change::Service(service(HOST, "10.0.0.3", &[(80, 8080)]));
    let by_ip = || by_address("remote", "10.22.1.1", 15009);
    let crossed = "as td/ns/ns/sa/gw authority example.com:80 as [] to";
    let unknown = vec![
        of(),
        Change::Workload(Workload {
            network: "remote".into(),
            ..workload("far", &["10.0.0.2"], &[(HOST, &[(80, 8080)])])
        }),
    ];
    check(
        "wrong_network",
        unknown,
        "10.0.0.3:80",
        "refused: workload far has no address that can be reached",
    );
    check(
        "double_hbone: the gateway by address",
        vec![of(), remote("far", HOST, 80, by_ip()), gateway()],
        "10.0.0.3:80",
        &format!("cross gw 10.22.1.1:15009 {crossed} far"),
    );
    check(
        "double_hbone: the gateway by hostname",
        vec![
            of(),
            Change::Service(service("ew-gtw", "10.0.0.4", &[(15009, 15009)])),
            remote("far", HOST, 80, by_name("ew-gtw", 15009)),
            Change::Workload(workload("gw", &["10.0.0.5"], &[("ew-gtw", &[(15009, 15008)])])),
        ],
        "10.0.0.3:80",
        &format!("cross gw 10.0.0.5:15008 {crossed} far"),
    );
    let behind =
        Service { waypoint: by_name("waypoint.com", 15008), ..service(HOST, "10.0.0.3", &[(80, 8080)]) };
    check(
        "double_hbone: to a waypoint",
        vec![
            Change::Service(behind),
            Change::Service(service("waypoint.com", "10.0.0.4", &[(15008, 15008)])),
            remote("far-wp", "waypoint.com", 15008, by_ip()),
            gateway(),
        ],
        "10.0.0.3:80",
        &format!("cross gw 10.22.1.1:15009 {crossed} far-wp"),
    );
    let nearest = LoadBalancing {
        mode: LoadBalancingMode::Failover,
        scopes: vec![RoutingScope::Network],
        ..Default::default()
    };
    for (health, expected) in [
        (
            Health::Healthy,
            "direct near 10.0.0.2:15008 authority 10.0.0.2:8080 as td/ns/ns/sa/near for example.com"
                .to_owned(),
        ),
        (Health::Unhealthy, format!("cross gw 10.22.1.1:15009 {crossed} far")),
    ] {
        let of = Service { load_balancing: nearest.clone(), ..service(HOST, "10.0.0.3", &[(80, 8080)]) };
        let near = Workload { health, ..workload("near", &["10.0.0.2"], &[(HOST, &[(80, 8080)])]) };
        let changes = vec![Change::Service(of), gateway(), remote("far", HOST, 80, by_ip()), meshed(near)];
        check(&format!("failover_to_remote: {health:?}"), changes, "10.0.0.3:80", &expected);
    }
    check(
        "a gateway that is not known",
        vec![of(), remote("far", HOST, 80, by_ip())],
        "10.0.0.3:80",
        "refused: gateway remote/10.22.1.1:15009 has no ready endpoint",
    );
}
