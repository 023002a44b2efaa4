//! Small meshes made from a list of numbers: the smaller the numbers and the shorter the list, the simpler the mesh, so
//! that a failing one shrinks.

use cairn_mesh::{
    ApplicationTunnel, Change, GatewayAddress, GatewayTarget, Health, HealthPolicy, Identity, IpFamilies,
    LoadBalancing, LoadBalancingMode, Locality, NetworkAddress, NetworkBlock, NetworkMode, PortMapping,
    ResourceName, RoutingScope, Service, ServicePort, TunnelHandover, TunnelProtocol, Visibility,
    WeightedWaypoint, Workload,
};
use std::net::{IpAddr, SocketAddr};

const NETWORKS: [&str; 2] = ["", "far"];
const NAMESPACES: [&str; 2] = ["a", "b"];
const HOSTS: [&str; 3] = ["one", "two", "three"];
const PORTS: [u16; 3] = [80, 15008, 81];

/// A mesh. Its first workload is the one that asks.
#[derive(Debug)]
pub struct World {
    pub workloads: Vec<Workload>,
    pub services: Vec<Service>,
    destination: u8,
}

/// Numbers that are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    /// One of `count`; the first when there are no more numbers.
    fn below(&mut self, count: usize) -> usize {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        usize::from(*first) % count
    }

    fn of<T: Clone>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())].clone()
    }

    /// True once in `count`, and never when there are no more numbers.
    fn once_in(&mut self, count: usize) -> bool {
        self.below(count) == count - 1
    }
}

fn vip(index: usize) -> IpAddr {
    [10, 96, 0, index as u8].into()
}

fn pod_v4(index: usize) -> IpAddr {
    [10, 0, 0, index as u8].into()
}

fn pod_v6(index: usize) -> IpAddr {
    [0xfd00, 0, 0, 0, 0, 0, 0, index as u16].into()
}

impl World {
    pub fn from(choices: &[u8]) -> Self {
        let mut choices = Choices(choices);
        let destination = choices.below(256) as u8;
        let services = (0..choices.below(4)).map(|index| service(index, &mut choices)).collect();
        let workloads = (0..1 + choices.below(6)).map(|index| workload(index, &mut choices)).collect();
        Self { workloads, services, destination }
    }

    pub fn source(&self) -> &Workload {
        &self.workloads[0]
    }

    pub fn changes(&self) -> Vec<Change> {
        let services = self.services.iter().cloned().map(Change::Service);
        services.chain(self.workloads.iter().cloned().map(Change::Workload)).collect()
    }

    /// Some destinations: each mesh is asked for a few of them.
    pub fn destinations(&self) -> Vec<SocketAddr> {
        let chosen = usize::from(self.destination);
        let addresses: [IpAddr; 13] = [
            vip(0),
            pod_v4(1),
            vip(1),
            pod_v6(1),
            vip(2),
            pod_v4(2),
            vip(9),
            [10, 97, 1, 1].into(),
            [10, 0, 0, 200].into(),
            pod_v4(0),
            [1, 1, 1, 1].into(),
            [0xfd96, 0, 0, 0, 0, 0, 0, 1].into(),
            [127, 0, 0, 1].into(),
        ];
        let at = |offset: usize| addresses[(chosen + offset) % addresses.len()];
        let port = |offset: usize| PORTS[(chosen / 13 + offset) % PORTS.len()];
        (0..5).map(|offset| SocketAddr::new(at(offset), port(offset / 4))).collect()
    }

    /// What CONNECTs may ask for: hosts, whose address then only carries the port, and addresses.
    pub fn authorities(&self) -> Vec<(Option<String>, SocketAddr)> {
        let by_address = self.destinations().into_iter().map(|address| (None, address));
        let hosts = HOSTS.iter().zip(PORTS);
        by_address
            .chain(hosts.map(|(host, port)| (Some((*host).to_owned()), ([0, 0, 0, 0], port).into())))
            .collect()
    }
}

fn gateway(choices: &mut Choices<'_>) -> GatewayAddress {
    let address =
        |network: &str, address| GatewayTarget::Address(NetworkAddress { network: network.into(), address });
    let host = |name: &str, choices: &mut Choices<'_>| {
        GatewayTarget::Hostname(ResourceName::new(choices.of(&NAMESPACES), name))
    };
    let target = match choices.below(7) {
        0 => address("", pod_v4(1)),
        1 => host(HOSTS[0], choices),
        2 => address("", vip(choices.below(3))),
        3 => host(HOSTS[choices.below(3)], choices),
        4 => address("far", pod_v4(2)),
        5 => host("dns-1", choices),
        _ => address("", pod_v6(2)),
    };
    GatewayAddress { target, hbone_port: choices.of(&[15008, 80, 15009]) }
}

fn service(index: usize, choices: &mut Choices<'_>) -> Service {
    let namespace = choices.of(&NAMESPACES);
    let network = |choices: &mut Choices<'_>| if choices.once_in(6) { "far" } else { "" };
    let mut vips = Vec::new();
    if !choices.once_in(6) {
        // Some share a VIP.
        let at = if choices.once_in(5) { 0 } else { index };
        vips.push(NetworkAddress { network: network(choices).into(), address: vip(at) });
    }
    if choices.once_in(4) {
        let address = [0xfd96, 0, 0, 0, 0, 0, 0, index as u16].into();
        vips.push(NetworkAddress { network: "".into(), address });
    }
    let mut blocks = Vec::new();
    if choices.once_in(4) {
        let block = choices.of(&["10.96.0.0/16", "10.96.0.0/24", "10.97.0.0/16", "fd96::/64"]);
        let block = block.parse().unwrap();
        blocks.push(NetworkBlock { network: network(choices).into(), block });
    }
    let ports = |choices: &mut Choices<'_>| {
        let port = |port: u16, choices: &mut Choices<'_>| ServicePort {
            port,
            target_port: choices.of(&[8080, 0, 15008]),
            protocol: Default::default(),
        };
        let mut ports = Vec::new();
        for number in PORTS {
            if !choices.once_in(4) {
                ports.push(port(number, choices));
            }
        }
        ports
    };
    let scopes = [
        RoutingScope::Network,
        RoutingScope::Region,
        RoutingScope::Zone,
        RoutingScope::Node,
        RoutingScope::Subzone,
        RoutingScope::Cluster,
    ];
    let mode = choices.of(&[
        LoadBalancingMode::Standard,
        LoadBalancingMode::Standard,
        LoadBalancingMode::Failover,
        LoadBalancingMode::Strict,
        LoadBalancingMode::Failover,
        LoadBalancingMode::Passthrough,
    ]);
    let load_balancing = LoadBalancing {
        mode,
        scopes: (0..choices.below(4)).map(|_| choices.of(&scopes)).collect(),
        health: if choices.once_in(5) { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy },
    };
    let weighted = |choices: &mut Choices<'_>| WeightedWaypoint {
        waypoint: gateway(choices),
        weight: choices.of(&[1, 0, 3]),
    };
    Service {
        name: HOSTS[index].into(),
        namespace: namespace.into(),
        hostname: HOSTS[index].into(),
        vips,
        ports: ports(choices),
        subject_alt_names: (0..choices.below(2))
            .map(|_| Identity::new("td", "san", HOSTS[index]).unwrap())
            .collect(),
        waypoint: choices.once_in(3).then(|| gateway(choices)),
        load_balancing,
        canonical: choices.once_in(2),
        blocks,
        weighted_waypoints: if choices.once_in(4) {
            (0..1 + choices.below(2)).map(|_| weighted(choices)).collect()
        } else {
            Vec::new()
        },
        ip_families: choices.of(&[IpFamilies::Automatic, IpFamilies::Dual, IpFamilies::V4, IpFamilies::V6]),
        visibility: if choices.once_in(4) { Visibility::Namespace } else { Visibility::Public },
        ingress_use_waypoint: false,
    }
}

fn workload(index: usize, choices: &mut Choices<'_>) -> Workload {
    let namespace = choices.of(&NAMESPACES);
    let identity = Identity::new("td", namespace, &format!("w{index}")).unwrap();
    let mut addresses = match choices.below(6) {
        0..=2 => vec![pod_v4(index)],
        3 => vec![pod_v6(index), pod_v4(index)],
        4 => vec![pod_v6(index)],
        _ => Vec::new(),
    };
    let network_mode = if choices.once_in(8) { NetworkMode::Host } else { NetworkMode::Own };
    if network_mode == NetworkMode::Host {
        addresses = vec![[10, 0, 0, 200].into()];
    }
    let place = |choices: &mut Choices<'_>| choices.of(&["", "x", "y"]).into();
    let services = HOSTS.iter().filter_map(|host| choices.once_in(2).then_some(*host)).collect::<Vec<_>>();
    let services = services.into_iter().map(|host| {
        let mapping = |choices: &mut Choices<'_>| PortMapping {
            service_port: choices.of(&PORTS),
            target_port: choices.of(&[9090, 0]),
        };
        let ports = if choices.once_in(2) { vec![mapping(choices)] } else { Vec::new() };
        (ResourceName::new(choices.of(&NAMESPACES), host), ports)
    });
    let services = services.collect();
    Workload {
        network: choices.of(&[NETWORKS[0], NETWORKS[0], NETWORKS[1]]).into(),
        protocol: if choices.once_in(2) { TunnelProtocol::None } else { TunnelProtocol::Hbone },
        waypoint: choices.once_in(4).then(|| gateway(choices)),
        network_gateway: choices.once_in(2).then(|| gateway(choices)),
        health: if choices.once_in(5) { Health::Unhealthy } else { Health::Healthy },
        node: place(choices),
        locality: Locality { region: place(choices), zone: place(choices), subzone: place(choices) },
        cluster_id: place(choices),
        capacity: choices.of(&[1, 1, 2, 0]),
        hostname: if choices.once_in(4) { format!("dns-{index}").into() } else { "".into() },
        application_tunnel: choices.once_in(5).then(|| ApplicationTunnel {
            handover: choices.of(&[TunnelHandover::Proxy, TunnelHandover::None]),
            port: choices.of(&[Some(15088), None, Some(15001)]),
        }),
        network_mode,
        addresses,
        services,
        ..Workload::new(format!("w{index}"), format!("w{index}"), identity)
    }
}
