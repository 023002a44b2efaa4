//! What tunnels that arrive are taken for: the cases of a ztunnel's own tests, and what we do otherwise.

use super::*;
use crate::{
    ApplicationTunnel, Change, GatewayTarget, Health, Identity, PortMapping, ResourceName, ServicePort,
    Store, WeightedWaypoint,
};

const SERVER: &str = "10.0.1.1";
const CLIENT: &str = "10.0.1.2";
const WAYPOINT: &str = "10.0.1.3";
const SERVER_VIP: &str = "10.10.0.1";
const WAYPOINT_VIP: &str = "10.10.0.2";
const SERVER_HOST: &str = "server.ns";
const WAYPOINT_HOST: &str = "waypoint.ns";

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

fn at(address: &str) -> NetworkAddress {
    NetworkAddress { network: "".into(), address: ip(address) }
}

fn by(address: &str) -> GatewayAddress {
    GatewayAddress { target: GatewayTarget::Address(at(address)), hbone_port: 15008 }
}

fn workload(name: &str, address: &str, host: &str) -> Workload {
    let ports = vec![PortMapping { service_port: 81, target_port: 9090 }];
    Workload {
        addresses: vec![ip(address)],
        services: vec![(ResourceName::new("ns", host), ports)],
        ..Workload::new(name, name, Identity::new("td", "ns", name).unwrap())
    }
}

fn service(host: &str, vip: &str) -> Service {
    let port = |port, target_port| ServicePort { port, target_port, protocol: Default::default() };
    Service {
        name: host.into(),
        namespace: "ns".into(),
        hostname: host.into(),
        vips: vec![at(vip)],
        ports: vec![port(80, 8080), port(81, 0), port(82, 0), port(83, 15001)],
        ..Service::default()
    }
}

struct Mesh {
    server: Workload,
    server_service: Service,
    waypoint: Workload,
    client: Workload,
}

fn mesh() -> Mesh {
    Mesh {
        server: workload("server", SERVER, SERVER_HOST),
        server_service: service(SERVER_HOST, SERVER_VIP),
        waypoint: workload("waypoint", WAYPOINT, WAYPOINT_HOST),
        client: workload("client", CLIENT, "client.ns"),
    }
}

/// What becomes of a tunnel to the workload at `local`, in one line.
fn check(mesh: &Mesh, local: &str, target: &str) -> String {
    let mut store = Store::new();
    let all = [&mesh.server, &mesh.waypoint, &mesh.client];
    store.apply(all.map(|workload| Change::Workload(workload.clone())));
    store.apply([
        Change::Service(mesh.server_service.clone()),
        Change::Service(service(WAYPOINT_HOST, WAYPOINT_VIP)),
    ]);
    let local = ip(local);
    let own = all.into_iter().find(|workload| workload.addresses.contains(&local)).unwrap();
    let (host, port) = target.rsplit_once(':').unwrap();
    let target = match target.parse() {
        Ok(address) => ArrivalTarget::Address(address),
        Err(_) => ArrivalTarget::Host(host, port.parse().unwrap()),
    };
    match arrive(store.current(), own, local, target) {
        Ok(Arrival { destination, announce: Some(announced), .. }) => {
            format!("{destination} says {announced}")
        }
        Ok(Arrival { destination, .. }) => destination.to_string(),
        Err(unwelcome) => unwelcome.to_string(),
    }
}

const PROXY: ApplicationTunnel = ApplicationTunnel { handover: TunnelHandover::Proxy, port: Some(15088) };

#[test]
fn tunnels_are_taken_as_a_ztunnel_takes_them() {
    let not_here = "destination is not this workload";
    for (name, of_service, of_workload, tunnel, local, target, expected) in [
        ("to workload no waypoint", None, None, None, SERVER, "10.0.1.1:8080", "10.0.1.1:8080"),
        ("svc hostname to workload no waypoint", None, None, None, SERVER, "server.ns:80", "10.0.1.1:8080"),
        (
            "to workload with waypoint referenced by pod",
            None,
            Some(WAYPOINT),
            None,
            WAYPOINT,
            "10.0.1.1:8080",
            "10.0.1.3:8080",
        ),
        (
            "to workload with waypoint referenced by vip",
            None,
            Some(WAYPOINT_VIP),
            None,
            WAYPOINT,
            "10.0.1.1:8080",
            "10.0.1.3:8080",
        ),
        (
            "to workload with app tunnel",
            None,
            Some(WAYPOINT_VIP),
            Some(PROXY),
            WAYPOINT,
            "10.0.1.1:8080",
            "10.0.1.3:15088 says 10.0.1.1:8080",
        ),
        (
            "to service with waypoint referenced by pod",
            Some(WAYPOINT),
            None,
            None,
            WAYPOINT,
            "10.10.0.1:80",
            "10.0.1.3:80",
        ),
        (
            "to service with waypoint referenced by vip",
            Some(WAYPOINT_VIP),
            None,
            None,
            WAYPOINT,
            "10.10.0.1:80",
            "10.0.1.3:80",
        ),
        (
            "to service with app tunnel",
            Some(WAYPOINT_VIP),
            None,
            Some(PROXY),
            WAYPOINT,
            "10.10.0.1:80",
            "10.0.1.3:15088 says 10.10.0.1:80",
        ),
        ("to server ip mismatch", None, None, None, SERVER, "10.0.1.2:8080", not_here),
        ("to waypoint without attachment", None, None, None, WAYPOINT, "10.0.1.2:8080", not_here),
        (
            "to workload via waypoint with wrong attachment",
            Some(WAYPOINT),
            None,
            None,
            WAYPOINT,
            "10.0.1.1:8080",
            not_here,
        ),
        (
            "to service via waypoint with wrong attachment",
            None,
            Some(WAYPOINT),
            None,
            WAYPOINT,
            "10.10.0.1:80",
            not_here,
        ),
        (
            "a name is announced by its VIP",
            None,
            None,
            Some(PROXY),
            WAYPOINT,
            "server.ns:80",
            "10.0.1.3:15088 says 10.10.0.1:80",
        ),
    ] {
        let mut mesh = mesh();
        mesh.server_service.waypoint = of_service.map(by);
        mesh.server.waypoint = of_workload.map(by);
        mesh.waypoint.application_tunnel = tunnel;
        assert_eq!(check(&mesh, local, target), expected, "{name}");
    }
}

#[test]
fn ports_behind_a_name_are_the_workloads_own() {
    let with = |health| {
        let mut mesh = mesh();
        mesh.server.health = health;
        mesh
    };
    for health in [Health::Healthy, Health::Unhealthy] {
        for (name, target, expected) in [
            ("the service says", "server.ns:80", "10.0.1.1:8080"),
            ("the workload says", "server.ns:81", "10.0.1.1:9090"),
            ("nobody says", "server.ns:82", "the service has no such port here"),
            ("no such port", "server.ns:99", "the service has no such port here"),
            ("one of ours", "server.ns:83", "port belongs to the ztunnel"),
            ("no such service", "nobody.ns:80", "destination is not a service of this workload"),
            ("another's service", "waypoint.ns:80", "destination is not a service of this workload"),
        ] {
            assert_eq!(check(&with(health), SERVER, target), expected, "{name}");
        }
    }
}

#[test]
fn the_ztunnels_own_ports_are_no_destination() {
    for port in OWN_PORTS {
        assert_eq!(check(&mesh(), SERVER, &format!("{SERVER}:{port}")), "port belongs to the ztunnel");
    }
    let mut forwarding = mesh();
    forwarding.server.application_tunnel = Some(ApplicationTunnel { port: Some(15008), ..PROXY });
    assert_eq!(check(&forwarding, SERVER, "10.0.1.1:80"), "port belongs to the ztunnel");
}

#[test]
fn a_tunnel_without_a_port_of_its_own_keeps_each() {
    let mut mesh = mesh();
    mesh.waypoint.application_tunnel = Some(ApplicationTunnel { port: None, ..PROXY });
    assert_eq!(check(&mesh, WAYPOINT, "10.10.0.1:80"), "10.0.1.3:80 says 10.10.0.1:80");
    mesh.waypoint.application_tunnel =
        Some(ApplicationTunnel { handover: TunnelHandover::None, port: Some(15088) });
    assert_eq!(check(&mesh, WAYPOINT, "10.10.0.1:80"), "10.0.1.3:15088");
    mesh.server_service.vips.clear();
    mesh.waypoint.application_tunnel = Some(PROXY);
    assert_eq!(check(&mesh, WAYPOINT, "server.ns:80"), "the service has no address to be announced by");
}

#[test]
fn a_waypoint_that_shares_a_service_by_weight_is_its_waypoint() {
    let mut mesh = mesh();
    mesh.server_service.waypoint = Some(by(CLIENT));
    mesh.server_service.weighted_waypoints = vec![WeightedWaypoint { waypoint: by(WAYPOINT), weight: 10 }];
    assert_eq!(check(&mesh, WAYPOINT, "10.10.0.1:80"), "10.0.1.3:80");
    assert_eq!(check(&mesh, WAYPOINT, "server.ns:80"), "10.0.1.3:8080");
}

#[test]
fn every_address_of_a_workload_is_its_own() {
    let mut mesh = mesh();
    mesh.server.addresses.push(ip("fd00::1"));
    assert_eq!(check(&mesh, SERVER, "[fd00::1]:8080"), "10.0.1.1:8080");
    assert_eq!(check(&mesh, "fd00::1", "[fd00::1]:8080"), "[fd00::1]:8080");
    assert_eq!(check(&mesh, SERVER, "[::ffff:10.0.1.1]:8080"), "10.0.1.1:8080");
}
