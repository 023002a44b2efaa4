//! Tests of the outbound plan: the same small mesh, asked for different destinations.

use super::*;
use crate::{
    Change, Health, LoadBalancing, LoadBalancingMode, PortMapping, ResourceName, ServicePort, Store,
};

const VIP: &str = "10.96.0.10";
const ENDPOINT: &str = "10.0.2.7";

fn identity(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account).unwrap()
}

fn at(address: &str) -> NetworkAddress {
    NetworkAddress { network: "".into(), address: address.parse().unwrap() }
}

fn workload(uid: &str, namespace: &str, account: &str, address: &str, services: &[(&str, u16)]) -> Workload {
    let ports = |port: u16| vec![PortMapping { service_port: port, target_port: 0 }];
    Workload {
        addresses: vec![address.parse().unwrap()],
        protocol: TunnelProtocol::Hbone,
        services: services
            .iter()
            .map(|(host, port)| (ResourceName::new(namespace, *host), ports(*port)))
            .collect(),
        ..Workload::new(uid, uid, identity(namespace, account))
    }
}

fn service(name: &str, namespace: &str, vip: &str, port: u16, target_port: u16) -> Service {
    Service {
        name: name.into(),
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
        vips: vec![at(vip)],
        ports: vec![ServicePort { port, target_port, protocol: crate::AppProtocol::Http11 }],
        subject_alt_names: Vec::new(),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        canonical: true,
    }
}

const ECHO: &str = "echo.b.svc.cluster.local";
const WAYPOINT: &str = "wp.b.svc.cluster.local";

/// Client `a/web`, service `b/echo` with one endpoint, and `b/wp`, a waypoint nobody uses yet.
struct Mesh {
    client: Workload,
    echo: Service,
    endpoint: Workload,
    waypoint_service: Service,
    waypoint: Workload,
}

fn mesh() -> Mesh {
    Mesh {
        client: workload("web", "a", "x", "10.0.1.5", &[]),
        echo: service("echo", "b", VIP, 80, 8080),
        endpoint: workload("echo", "b", "echo", ENDPOINT, &[(ECHO, 80)]),
        waypoint_service: service("wp", "b", "10.96.0.20", 15008, 15008),
        waypoint: workload("wp", "b", "wp", "10.0.3.3", &[(WAYPOINT, 15008)]),
    }
}

fn by_hostname() -> Option<GatewayAddress> {
    let target = GatewayTarget::Hostname(ResourceName::new("b", WAYPOINT));
    Some(GatewayAddress { target, hbone_port: 15008 })
}

fn by_address(address: &str) -> Option<GatewayAddress> {
    Some(GatewayAddress { target: GatewayTarget::Address(at(address)), hbone_port: 15008 })
}

/// The plan in one line.
fn check(mesh: Mesh, destination: &str) -> String {
    let mut store = Store::new();
    let source = mesh.client.clone();
    store.apply([
        Change::Workload(mesh.client),
        Change::Service(mesh.echo),
        Change::Workload(mesh.endpoint),
        Change::Service(mesh.waypoint_service),
        Change::Workload(mesh.waypoint),
    ]);
    describe(&plan(&store.snapshot(), &source, destination.parse().unwrap(), &mut |_| 0))
}

fn describe(plan: &Plan) -> String {
    let tunnel = |tunnel: &Tunnel| {
        let names: Vec<&str> = tunnel.identities.iter().map(Identity::principal).collect();
        format!("{} authority {} as {}", tunnel.connect, tunnel.authority, names.join(" or "))
    };
    let service = |service: &Option<Arc<Service>>| match service {
        Some(service) => format!(" for {}", service.hostname),
        None => String::new(),
    };
    match plan {
        Plan::Waypoint { tunnel: to, waypoint, service: of, workload } => {
            let workload = workload.as_ref().map(|workload| format!(" for workload {}", workload.uid));
            format!("waypoint {} {}{}{}", waypoint.uid, tunnel(to), service(of), workload.unwrap_or_default())
        }
        Plan::Direct { tunnel: to, workload, service: of } => {
            format!("direct {} {}{}", workload.uid, tunnel(to), service(of))
        }
        Plan::Plain { connect, workload, service: of } => {
            let workload = workload.as_ref().map(|workload| format!(" to {}", workload.uid));
            format!("plain {connect}{}{}", workload.unwrap_or_default(), service(of))
        }
        Plan::Refuse(refusal) => format!("refused: {refusal}"),
    }
}

const VIP_80: &str = "10.96.0.10:80";
const POD_8080: &str = "10.0.2.7:8080";

#[test]
fn vip_without_waypoint_goes_to_an_endpoint_at_its_target_port() {
    let expected = "direct echo 10.0.2.7:15008 authority 10.0.2.7:8080 as cluster.local/ns/b/sa/echo for echo.b.svc.cluster.local";
    assert_eq!(check(mesh(), VIP_80), expected);
}

#[test]
fn identities_of_the_service_are_accepted_too() {
    let mut mesh = mesh();
    mesh.echo.subject_alt_names = vec![identity("b", "other")];
    let expected = "direct echo 10.0.2.7:15008 authority 10.0.2.7:8080 as cluster.local/ns/b/sa/echo or \
                    cluster.local/ns/b/sa/other for echo.b.svc.cluster.local";
    assert_eq!(check(mesh, VIP_80), expected);
}

#[test]
fn pod_address_without_waypoint_goes_to_the_pod() {
    let expected = "direct echo 10.0.2.7:15008 authority 10.0.2.7:8080 as cluster.local/ns/b/sa/echo";
    assert_eq!(check(mesh(), POD_8080), expected);
}

#[test]
fn vip_with_waypoint_keeps_vip_and_service_port() {
    let expected = "waypoint wp 10.0.3.3:15008 authority 10.96.0.10:80 as cluster.local/ns/b/sa/wp for \
                    echo.b.svc.cluster.local";
    for reference in [by_hostname(), by_address("10.96.0.20"), by_address("10.0.3.3")] {
        let mut mesh = mesh();
        mesh.echo.waypoint = reference.clone();
        assert_eq!(check(mesh, VIP_80), expected, "{reference:?}");
    }
}

#[test]
fn identities_of_the_waypoints_service_are_accepted_too() {
    let mut mesh = mesh();
    mesh.echo.waypoint = by_hostname();
    mesh.waypoint_service.subject_alt_names = vec![identity("b", "wp2")];
    let plan = check(mesh, VIP_80);
    assert!(plan.contains("as cluster.local/ns/b/sa/wp or cluster.local/ns/b/sa/wp2 for"), "{plan}");
}

#[test]
fn pod_address_with_workload_waypoint_keeps_the_pods_address() {
    let mut mesh = mesh();
    mesh.endpoint.waypoint = by_address("10.0.3.3");
    let expected =
        "waypoint wp 10.0.3.3:15008 authority 10.0.2.7:8080 as cluster.local/ns/b/sa/wp for workload echo";
    assert_eq!(check(mesh, POD_8080), expected);
}

#[test]
fn a_workloads_waypoint_is_not_for_traffic_to_its_service() {
    let mut mesh = mesh();
    mesh.endpoint.waypoint = by_hostname();
    assert!(check(mesh, VIP_80).starts_with("direct echo"));
}

#[test]
fn the_waypoint_itself_does_not_go_round_in_a_circle() {
    for reference in [by_hostname(), by_address("10.0.3.3"), by_address("10.96.0.20")] {
        let mut mesh = mesh();
        mesh.client = mesh.waypoint.clone();
        mesh.endpoint.waypoint = reference.clone();
        assert!(check(mesh, POD_8080).starts_with("direct echo"), "{reference:?}");
    }
}

#[test]
fn endpoint_outside_the_mesh_is_reached_in_plain() {
    let mut mesh = mesh();
    mesh.endpoint.protocol = TunnelProtocol::None;
    assert_eq!(check(mesh, VIP_80), "plain 10.0.2.7:8080 to echo for echo.b.svc.cluster.local");
}

#[test]
fn unknown_address_passes_through() {
    assert_eq!(check(mesh(), "1.1.1.1:443"), "plain 1.1.1.1:443");
}

#[test]
fn passthrough_service_keeps_the_address() {
    let mut mesh = mesh();
    mesh.echo.load_balancing.mode = LoadBalancingMode::Passthrough;
    assert_eq!(check(mesh, VIP_80), "plain 10.96.0.10:80 for echo.b.svc.cluster.local");
}

#[test]
fn ipv6_pod_is_reached_on_ipv6() {
    let mut mesh = mesh();
    mesh.endpoint.addresses = vec!["fd00::7".parse().unwrap()];
    let expected = "direct echo [fd00::7]:15008 authority [fd00::7]:8080 as cluster.local/ns/b/sa/echo";
    assert_eq!(check(mesh, "[fd00::7]:8080"), expected);
}

#[test]
fn the_endpoints_address_is_of_the_family_asked_for() {
    let mut mesh = mesh();
    mesh.endpoint.addresses.insert(0, "fd00::7".parse().unwrap());
    assert!(check(mesh, VIP_80).contains(" authority 10.0.2.7:8080 "));
}

#[test]
fn mapped_destination_is_ipv4() {
    assert!(
        check(mesh(), "[::ffff:10.0.2.7]:8080")
            .starts_with("direct echo 10.0.2.7:15008 authority 10.0.2.7:8080")
    );
}

#[test]
fn a_service_without_a_ready_endpoint_refuses() {
    let expected = "refused: no healthy upstream: echo.b.svc.cluster.local has no ready endpoint for port";
    let mut unhealthy = mesh();
    unhealthy.endpoint.health = Health::Unhealthy;
    assert_eq!(check(unhealthy, VIP_80), format!("{expected} 80"));
    assert_eq!(check(mesh(), "10.96.0.10:81"), format!("{expected} 81"));
    let mut without_address = mesh();
    without_address.endpoint.addresses.clear();
    assert_eq!(check(without_address, VIP_80), format!("{expected} 80"));
}

#[test]
fn a_waypoint_that_is_not_there_is_never_gone_past() {
    let mut unready = mesh();
    unready.echo.waypoint = by_hostname();
    unready.waypoint.health = Health::Unhealthy;
    assert_eq!(
        check(unready, VIP_80),
        "refused: waypoint b/wp.b.svc.cluster.local:15008 has no ready endpoint"
    );
    let mut unknown = mesh();
    unknown.echo.waypoint = by_address("10.0.9.9");
    assert_eq!(check(unknown, VIP_80), "refused: waypoint /10.0.9.9:15008 has no ready endpoint");
}
