//! Tests of the outbound plan: the same small mesh, asked for different destinations.

#[path = "tests/istio.rs"]
mod istio;

use super::*;
use crate::{
    Change, Health, LoadBalancing, LoadBalancingMode, PortMapping, ResourceName, ServicePort, Store,
    WeightedWaypoint,
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
        ..Service::default()
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

impl Mesh {
    fn store(&self) -> Store {
        let mut store = Store::new();
        store.apply([
            Change::Workload(self.client.clone()),
            Change::Service(self.echo.clone()),
            Change::Workload(self.endpoint.clone()),
            Change::Service(self.waypoint_service.clone()),
            Change::Workload(self.waypoint.clone()),
        ]);
        store
    }
}

/// The plan in one line.
fn check(mesh: Mesh, destination: &str) -> String {
    let snapshot = mesh.store().snapshot();
    describe(&plan(&snapshot, &mesh.client, destination.parse().unwrap(), &mut |_| 0))
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
        Plan::Cross(crossing) => {
            let names =
                |names: &[Identity]| names.iter().map(Identity::principal).collect::<Vec<_>>().join(" or ");
            let Crossing { connect, gateway, workload, service, port, .. } = &**crossing;
            let (outer, inner) = (names(&crossing.gateway_identities), names(&crossing.identities));
            let (gateway, workload, host) = (&gateway.uid, &workload.uid, &service.hostname);
            format!("cross {gateway} {connect} as {outer} authority {host}:{port} as [{inner}] to {workload}")
        }
        Plan::Resolve(workload) => format!("resolve {}", workload.hostname),
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

#[test]
fn weighted_waypoints_share_by_weight_and_replace_the_one() {
    let weighted = |weights: &[(&str, u32)]| {
        let one = |(address, weight): &(&str, u32)| WeightedWaypoint {
            waypoint: by_address(address).unwrap(),
            weight: *weight,
        };
        weights.iter().map(one).collect::<Vec<_>>()
    };
    for (name, weights, draw, expected) in [
        ("the first share", &[("10.0.3.3", 90), ("10.0.2.7", 10)][..], 89, "waypoint wp"),
        ("the second share", &[("10.0.3.3", 90), ("10.0.2.7", 10)], 90, "waypoint echo"),
        ("no weight, no share", &[("10.0.3.3", 0), ("10.0.2.7", 1)], 0, "waypoint echo"),
        ("no weight at all", &[("10.0.2.7", 0)], 0, "waypoint wp"),
        ("none", &[], 0, "waypoint wp"),
    ] {
        let mut mesh = mesh();
        mesh.echo.waypoint = by_hostname();
        mesh.echo.weighted_waypoints = weighted(weights);
        let mut chooser = |bound: u64| draw.min(bound - 1);
        let (snapshot, source) = (mesh.store().snapshot(), mesh.client);
        let plan = plan(&snapshot, &source, VIP_80.parse().unwrap(), &mut chooser);
        assert!(describe(&plan).starts_with(expected), "{name}: {}", describe(&plan));
    }
}

/// Says what DNS says, which endpoints have been tried, and how busy they are.
#[derive(Default)]
struct Knowing {
    addresses: Option<Vec<IpAddr>>,
    tried: Vec<&'static str>,
    load: Option<(&'static str, u64)>,
    draws: Vec<u64>,
}

impl Chooser for Knowing {
    fn below(&mut self, bound: u64) -> u64 {
        self.draws.pop().unwrap_or(0).min(bound - 1)
    }

    fn load(&self, workload: &Workload) -> Option<u64> {
        self.load.map(|(busy, load)| if *workload.uid == *busy { load } else { 0 })
    }

    fn is_tried(&self, workload: &Workload, _port: u16) -> bool {
        self.tried.contains(&&*workload.uid)
    }

    fn addresses(&self, _: &str) -> Option<&[IpAddr]> {
        self.addresses.as_deref()
    }
}

#[test]
fn a_workload_known_by_name_waits_for_dns() {
    let found = |addresses: &[&str]| Some(addresses.iter().map(|ip| ip.parse().unwrap()).collect());
    let nowhere = "refused: no healthy upstream: echo.b.svc.cluster.local has no ready endpoint for port 80";
    for (name, addresses, expected) in [
        ("not asked yet", None, "resolve echo.example"),
        ("of the family asked for", found(&["fd00::9", "10.5.5.5"]), "direct echo 10.5.5.5:15008"),
        ("of another, if there is none", found(&["fd00::9"]), "direct echo [fd00::9]:15008"),
        ("not found", found(&[]), nowhere),
    ] {
        let mut mesh = mesh();
        mesh.endpoint.addresses.clear();
        mesh.endpoint.hostname = "echo.example".into();
        let mut chooser = Knowing { addresses, ..Knowing::default() };
        let plan = plan(&mesh.store().snapshot(), &mesh.client, VIP_80.parse().unwrap(), &mut chooser);
        assert!(describe(&plan).starts_with(expected), "{name}: {}", describe(&plan));
    }
}

#[test]
fn a_waypoint_may_be_a_workload_known_by_name() {
    let mut mesh = mesh();
    let target = GatewayTarget::Hostname(ResourceName::new("b", "wp.example"));
    mesh.echo.waypoint = Some(GatewayAddress { target, hbone_port: 15008 });
    mesh.waypoint.hostname = "wp.example".into();
    assert!(check(mesh, VIP_80).starts_with("waypoint wp 10.0.3.3:15008 authority 10.96.0.10:80"));
}

/// Two endpoints of `b/echo`, `echo` and `second`.
fn two_endpoints() -> (Snapshot, Workload) {
    let mesh = mesh();
    let mut store = mesh.store();
    store.apply([Change::Workload(workload("second", "b", "echo", "10.0.2.8", &[(ECHO, 80)]))]);
    (store.snapshot(), mesh.client)
}

#[test]
fn an_endpoint_that_has_been_tried_is_not_picked_again() {
    let (snapshot, source) = two_endpoints();
    for (tried, expected) in [
        (vec![], "direct echo"),
        (vec!["echo"], "direct second"),
        (vec!["second"], "direct echo"),
        (vec!["echo", "second"], "refused: no healthy upstream"),
    ] {
        let mut chooser = Knowing { tried: tried.clone(), ..Knowing::default() };
        let plan = plan(&snapshot, &source, VIP_80.parse().unwrap(), &mut chooser);
        assert!(describe(&plan).starts_with(expected), "{tried:?}: {}", describe(&plan));
    }
}

#[test]
fn the_less_busy_of_two_is_picked() {
    let (snapshot, source) = two_endpoints();
    for (load, draws, expected) in [
        (("echo", 2), vec![1, 0], "direct second"),
        (("echo", 0), vec![1, 0], "direct echo"),
        (("second", 2), vec![0, 1], "direct echo"),
        (("echo", 2), vec![0, 0], "direct echo"),
    ] {
        let name = format!("{load:?} {draws:?}");
        let mut chooser = Knowing { load: Some(load), draws, ..Knowing::default() };
        let plan = plan(&snapshot, &source, VIP_80.parse().unwrap(), &mut chooser);
        assert!(describe(&plan).starts_with(expected), "{name}: {}", describe(&plan));
    }
}

#[test]
fn the_ztunnel_itself_is_no_destination() {
    let refused = |address: &str| format!("refused: {address} is the ztunnel itself");
    for port in OWN_PORTS {
        for own in ["127.0.0.1", "10.0.1.5"] {
            let address = format!("{own}:{port}");
            assert_eq!(check(mesh(), &address), refused(&address));
        }
        assert!(check(mesh(), &format!("10.0.2.7:{port}")).starts_with("direct echo"));
    }
    assert_eq!(check(mesh(), "127.0.0.1:8080"), "plain 127.0.0.1:8080");
    let mut on_loopback = mesh();
    on_loopback.client.addresses = vec!["127.10.0.1".parse().unwrap()];
    on_loopback.endpoint.addresses = vec!["127.10.0.2".parse().unwrap()];
    assert!(check(on_loopback, "127.10.0.2:15001").starts_with("direct echo"));
}

#[test]
fn a_service_is_seen_as_its_visibility_says() {
    let mut hidden = mesh();
    hidden.echo.visibility = crate::Visibility::Namespace;
    assert_eq!(check(hidden, VIP_80), "plain 10.96.0.10:80");
    let mut own = mesh();
    own.echo.visibility = crate::Visibility::Namespace;
    own.client = workload("web", "b", "x", "10.0.1.5", &[]);
    assert!(check(own, VIP_80).starts_with("direct echo"));
}

#[test]
fn a_range_of_addresses_is_a_services_where_no_vip_is() {
    let block = |text: &str| crate::NetworkBlock { network: "".into(), block: text.parse().unwrap() };
    let mesh = || {
        let mut mesh = mesh();
        mesh.echo.blocks = vec![block("10.96.0.0/16")];
        mesh.waypoint_service.blocks = vec![block("10.96.7.0/24")];
        mesh.waypoint_service.ports = mesh.echo.ports.clone();
        mesh.waypoint.services = vec![(
            ResourceName::new("b", WAYPOINT),
            vec![PortMapping { service_port: 80, target_port: 8080 }],
        )];
        mesh
    };
    for (name, address, expected) in [
        ("in the range", "10.96.200.1:80", "direct echo"),
        ("in the longer one", "10.96.7.1:80", "direct wp"),
        ("a VIP within it", "10.96.0.20:80", "direct wp"),
        ("a workload within it is not asked for", "10.97.0.1:80", "plain"),
    ] {
        assert!(check(mesh(), address).starts_with(expected), "{name}: {}", check(mesh(), address));
    }
    let mut own_namespace = mesh();
    own_namespace.client = workload("web", "c", "x", "10.0.1.5", &[]);
    own_namespace.echo.namespace = "c".into();
    own_namespace.endpoint.services = vec![(ResourceName::new("c", ECHO), Vec::new())];
    let plan = check(own_namespace, "10.96.7.1:80");
    assert!(plan.starts_with("direct echo"), "its own namespace's before a longer prefix: {plan}");
}
