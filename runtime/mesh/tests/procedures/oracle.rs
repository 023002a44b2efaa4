//! What a ztunnel does, step by step as its facts tell it, over plain lists.
//!
//! Where ours is meant to differ, the oracle says what ours shall do, and a comment says what a ztunnel does. The same
//! list is in the README of the ztunnel.

use super::world::World;
use cairn_mesh::{
    GatewayAddress, GatewayTarget, Health, HealthPolicy, Identity, IpFamilies, LoadBalancingMode,
    NetworkMode, RoutingScope, Service, TunnelHandover, TunnelProtocol, Visibility, Workload,
};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

const ILLEGAL: [u16; 4] = [15001, 15006, 15008, 15080];

/// What is at an address.
enum Found<'a> {
    Workload(&'a Workload),
    Service(&'a Service),
}

/// A destination that was picked: a workload and a port, and the service it stands behind.
#[derive(Clone, Copy)]
struct Upstream<'a> {
    workload: &'a Workload,
    port: u16,
    service: Option<&'a Service>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Standard,
    Waypoint,
}

fn visible(service: &Service, client: Option<&str>) -> bool {
    match (service.visibility, client) {
        (Visibility::Namespace, Some(client)) => *service.namespace == *client,
        _ => true,
    }
}

/// The best of services that share a key: the client's namespace's, then a canonical one, then the first by namespace
/// (a ztunnel: the first that it was told of). Of several in the client's namespace, a canonical one.
fn best<'a>(mut services: Vec<&'a Service>, client: Option<&str>) -> Option<&'a Service> {
    services.sort_by_key(|one| (!one.canonical, one.namespace.clone(), one.hostname.clone()));
    let own = services.iter().find(|service| Some(&*service.namespace) == client);
    let canonical = || services.iter().find(|service| service.canonical);
    own.or_else(canonical).or(services.first()).copied()
}

fn by_vip<'a>(world: &'a World, network: &str, ip: IpAddr, client: Option<&str>) -> Option<&'a Service> {
    let seen = || world.services.iter().filter(|service| visible(service, client));
    let has =
        |service: &&Service| service.vips.iter().any(|vip| *vip.network == *network && vip.address == ip);
    if let Some(found) = best(seen().filter(has).collect(), client) {
        return Some(found);
    }
    // Ranges: own namespace, then the longest prefix, then canonical.
    let mut ranked = Vec::new();
    for service in seen() {
        for block in &service.blocks {
            if *block.network == *network && block.block.contains(&ip) {
                let own = Some(&*service.namespace) == client;
                ranked.push(((own, block.block.prefix_len(), service.canonical), service));
            }
        }
    }
    let top = ranked.iter().map(|(rank, _)| *rank).max()?;
    best(ranked.into_iter().filter(|(rank, _)| *rank == top).map(|(_, service)| service).collect(), client)
}

fn by_ip<'a>(world: &'a World, network: &str, ip: IpAddr) -> Option<&'a Workload> {
    world.workloads.iter().find(|workload| {
        *workload.network == *network
            && workload.addresses.contains(&ip)
            && workload.network_mode != NetworkMode::Host
    })
}

/// A workload by its address first, then a service.
fn find_address<'a>(world: &'a World, network: &str, ip: IpAddr, client: Option<&str>) -> Option<Found<'a>> {
    match by_ip(world, network, ip) {
        Some(workload) => Some(Found::Workload(workload)),
        None => by_vip(world, network, ip, client).map(Found::Service),
    }
}

fn find_host<'a>(world: &'a World, namespace: &str, host: &str) -> Option<Found<'a>> {
    let service = world.services.iter().find(|one| *one.namespace == *namespace && *one.hostname == *host);
    let workload =
        || world.workloads.iter().find(|one| *one.namespace == *namespace && *one.hostname == *host);
    service.map(Found::Service).or_else(|| workload().map(Found::Workload))
}

fn endpoints<'a>(world: &'a World, service: &Service) -> Vec<(&'a Workload, Vec<(u16, u16)>)> {
    let mut endpoints = Vec::new();
    for workload in &world.workloads {
        for (key, ports) in &workload.services {
            let of_it = key.namespace == service.namespace && key.name == service.hostname;
            let included =
                workload.health == Health::Healthy || service.load_balancing.health == HealthPolicy::AllowAll;
            if of_it && included {
                let ports = ports.iter().map(|port| (port.service_port, port.target_port)).collect();
                endpoints.push((workload, ports));
            }
        }
    }
    endpoints
}

fn service_port(service: &Service, port: u16) -> Option<u16> {
    service.ports.iter().find(|one| one.port == port).map(|one| one.target_port)
}

fn matches(scope: RoutingScope, source: &Workload, workload: &Workload) -> bool {
    match scope {
        RoutingScope::Region => source.locality.region == workload.locality.region,
        RoutingScope::Zone => source.locality.zone == workload.locality.zone,
        RoutingScope::Subzone => source.locality.subzone == workload.locality.subzone,
        RoutingScope::Node => source.node == workload.node,
        RoutingScope::Cluster => source.cluster_id == workload.cluster_id,
        RoutingScope::Network => source.network == workload.network,
    }
}

/// The rank of an endpoint; `None` when it must not be selected.
fn rank(service: &Service, source: &Workload, workload: &Workload) -> Option<usize> {
    let scopes = &service.load_balancing.scopes;
    let network_first = scopes.first() == Some(&RoutingScope::Network);
    let (mut rank, mut adjust) = (0, 0);
    for scope in scopes {
        let same = matches(*scope, source, workload);
        if *scope == RoutingScope::Network && network_first {
            if !same {
                continue;
            }
            adjust = scopes.len() - 1;
        }
        if !same {
            break;
        }
        rank += 1;
    }
    if service.load_balancing.mode == LoadBalancingMode::Strict && rank != scopes.len() {
        return None;
    }
    Some(rank + adjust)
}

/// Every endpoint that may be picked.
fn load_balance<'a>(world: &'a World, service: &'a Service, port: u16, mode: Mode) -> Vec<Upstream<'a>> {
    let source = world.source();
    let mut options = Vec::new();
    for (workload, own_ports) in endpoints(world, service) {
        let reachable = !workload.addresses.is_empty()
            || !workload.hostname.is_empty()
            || workload.network != source.network && workload.network_gateway.is_some();
        if !reachable {
            continue;
        }
        // A port of 0 is none, of an endpoint as well (a ztunnel would connect to it).
        let mapped =
            own_ports.iter().find(|(from, _)| *from == port).map(|(_, to)| *to).filter(|to| *to != 0);
        let declared = service_port(service, port);
        let target = mapped.or(declared.filter(|to| *to != 0));
        let target = match mode {
            // What only the endpoint declares is enough (a ztunnel wants it of the service too).
            Mode::Standard => target,
            // An endpoint without a port is passed over (a ztunnel picks it and then fails).
            Mode::Waypoint => match &workload.application_tunnel {
                Some(tunnel) => target.or(tunnel.port.map(|_| port)),
                None => target.filter(|_| declared.is_some()),
            },
        };
        if let Some(port) = target {
            options.push(Upstream { workload, port, service: Some(service) });
        }
    }
    // Nobody is picked who takes no share: those are passed over before ranks are compared (in a ztunnel, after).
    options.retain(|option| option.workload.capacity > 0);
    if service.load_balancing.mode == LoadBalancingMode::Standard {
        return options;
    }
    let ranked: Vec<_> =
        options.into_iter().filter_map(|one| Some((rank(service, source, one.workload)?, one))).collect();
    let top = ranked.iter().map(|(rank, _)| *rank).max();
    ranked.into_iter().filter(|(rank, _)| Some(*rank) == top).map(|(_, one)| one).collect()
}

/// The address to connect to, or what stands in its place.
enum Address {
    Ip(IpAddr),
    Resolve(String),
    None,
}

fn pick_address(upstream: &Upstream<'_>, wanted: IpAddr) -> Address {
    let workload = upstream.workload;
    if workload.addresses.contains(&wanted) {
        return Address::Ip(wanted);
    }
    let families = upstream.service.map_or(IpFamilies::Automatic, |service| service.ip_families);
    let allowed: Vec<IpAddr> = workload
        .addresses
        .iter()
        .copied()
        .filter(|ip| match families {
            IpFamilies::Automatic | IpFamilies::Dual => true,
            IpFamilies::V4 => ip.is_ipv4(),
            IpFamilies::V6 => ip.is_ipv6(),
        })
        .collect();
    let same = allowed.iter().find(|ip| ip.is_ipv6() == wanted.is_ipv6());
    match same.or(allowed.first()) {
        Some(ip) => Address::Ip(*ip),
        None if workload.hostname.is_empty() => Address::None,
        None => Address::Resolve(workload.hostname.to_string()),
    }
}

/// Every instance that a reference to a waypoint or gateway may mean, with the address that it is asked for by.
fn resolve<'a>(
    world: &'a World,
    reference: &GatewayAddress,
    destination: IpAddr,
    mode: Mode,
) -> Vec<(Upstream<'a>, IpAddr)> {
    let port = reference.hbone_port;
    match &reference.target {
        GatewayTarget::Address(at) => {
            // Whatever its visibility (a ztunnel: as the client sees it), a workload before a VIP.
            match find_address(world, &at.network, at.address, None) {
                Some(Found::Workload(workload)) => {
                    vec![(Upstream { workload, port, service: None }, at.address)]
                }
                Some(Found::Service(service)) => {
                    if service.load_balancing.mode == LoadBalancingMode::Passthrough {
                        return Vec::new();
                    }
                    let picked = load_balance(world, service, port, mode);
                    picked.into_iter().map(|one| (one, at.address)).collect()
                }
                None => Vec::new(),
            }
        }
        GatewayTarget::Hostname(name) => match find_host(world, &name.namespace, &name.name) {
            Some(Found::Service(service)) => {
                load_balance(world, service, port, mode).into_iter().map(|one| (one, destination)).collect()
            }
            Some(Found::Workload(workload)) => {
                vec![(Upstream { workload, port, service: None }, destination)]
            }
            None => Vec::new(),
        },
    }
}

fn as_text(names: Vec<&Identity>) -> String {
    let mut names: Vec<&str> = names.into_iter().map(Identity::principal).collect();
    names.sort_unstable();
    names.join("|")
}

fn sans(upstream: &Upstream<'_>) -> String {
    let of_service = upstream.service.iter().flat_map(|service| &service.subject_alt_names);
    as_text(std::iter::once(&upstream.workload.identity).chain(of_service).collect())
}

fn key(service: Option<&Service>) -> String {
    service.map_or("-".to_owned(), |service| format!("{}/{}", service.namespace, service.hostname))
}

fn or_refuse(mut outcomes: BTreeSet<String>) -> BTreeSet<String> {
    if outcomes.is_empty() {
        outcomes.insert("refuse".to_owned());
    }
    outcomes
}

/// Double HBONE, for each gateway that may be picked.
fn through_gateway(
    world: &World,
    upstream: &Upstream<'_>,
    service: &Service,
    to: SocketAddr,
) -> BTreeSet<String> {
    let Some(reference) = &upstream.workload.network_gateway else { return or_refuse(BTreeSet::new()) };
    let gateways = resolve(world, reference, to.ip(), Mode::Standard).into_iter();
    or_refuse(
        gateways
            .map(|(gateway, wanted)| match pick_address(&gateway, wanted) {
                Address::Ip(ip) => {
                    let inner = upstream.service.iter().flat_map(|service| &service.subject_alt_names);
                    let (outer, inner) = (sans(&gateway), as_text(inner.collect()));
                    let at = SocketAddr::new(ip, gateway.port);
                    let (uid, host, port) = (&gateway.workload.uid, &service.hostname, to.port());
                    format!(
                        "cross {uid} at {at} for {host}:{port} as {outer} then {inner}; {}",
                        upstream.workload.uid
                    )
                }
                Address::Resolve(host) => format!("resolve {host}"),
                Address::None => "refuse".to_owned(),
            })
            .collect(),
    )
}

fn through_waypoint(
    waypoint: &Upstream<'_>,
    wanted: IpAddr,
    to: SocketAddr,
    service: Option<&Service>,
    workload: &str,
) -> String {
    match pick_address(waypoint, wanted) {
        Address::Ip(ip) => {
            let (at, uid) = (SocketAddr::new(ip, waypoint.port), &waypoint.workload.uid);
            format!("waypoint {uid} at {at} for {to} as {}; {} {workload}", sans(waypoint), key(service))
        }
        Address::Resolve(host) => format!("resolve {host}"),
        Address::None => "refuse".to_owned(),
    }
}

fn to_upstream(upstream: &Upstream<'_>, to: SocketAddr) -> String {
    let ip = match pick_address(upstream, to.ip()) {
        Address::Ip(ip) => ip,
        Address::Resolve(host) => return format!("resolve {host}"),
        Address::None => return "refuse".to_owned(),
    };
    let (at, uid, service) =
        (SocketAddr::new(ip, upstream.port), &upstream.workload.uid, key(upstream.service));
    match upstream.workload.protocol {
        TunnelProtocol::Hbone => {
            let tunnel = SocketAddr::new(ip, 15008);
            format!("direct {uid} at {tunnel} for {at} as {}; {service}", sans(upstream))
        }
        TunnelProtocol::None => format!("plain {at}; {service} {uid}"),
    }
}

/// Whether the source is an instance of the waypoint, ready or not (a ztunnel: a ready one).
fn from_waypoint(world: &World, reference: &GatewayAddress, source: &Workload) -> bool {
    let behind = |service: &Service| {
        source
            .services
            .iter()
            .any(|(key, _)| *key.namespace == *service.namespace && *key.name == *service.hostname)
    };
    match &reference.target {
        GatewayTarget::Address(at) => {
            let itself = source.network == at.network && source.addresses.contains(&at.address);
            let has = |service: &&Service| service.vips.contains(at);
            itself || world.services.iter().filter(has).any(behind)
        }
        GatewayTarget::Hostname(name) => {
            let named = source.namespace == name.namespace && source.hostname == name.name;
            named || source.services.iter().any(|(key, _)| key == name)
        }
    }
}

/// Every place where a connection of the source to `to` may go (§2.8).
pub fn outbound(world: &World, to: SocketAddr) -> BTreeSet<String> {
    let source = world.source();
    let one = |outcome: String| BTreeSet::from([outcome]);
    // 1. Calls to the ztunnel itself: on loopback, and on the pod's own addresses (a ztunnel: on loopback).
    if ILLEGAL.contains(&to.port()) && (to.ip().is_loopback() || source.addresses.contains(&to.ip())) {
        return one("refuse".to_owned());
    }
    // 3. What is at that address?
    let found = find_address(world, &source.network, to.ip(), Some(&source.namespace));
    match found {
        // 6. Nothing: it passes through.
        None => one(format!("plain {to}; - -")),
        // 4. A service: through its waypoint, if it has one.
        Some(Found::Service(service)) => {
            let weighted: Vec<&GatewayAddress> = service
                .weighted_waypoints
                .iter()
                .filter(|weighted| weighted.weight > 0)
                .map(|weighted| &weighted.waypoint)
                .collect();
            let references = if weighted.is_empty() { service.waypoint.iter().collect() } else { weighted };
            let mut outcomes = BTreeSet::new();
            for reference in &references {
                let instances = resolve(world, reference, to.ip(), Mode::Waypoint);
                if instances.is_empty() {
                    outcomes.insert("refuse".to_owned());
                }
                for (waypoint, wanted) in instances {
                    if waypoint.workload.network != source.network {
                        outcomes.extend(through_gateway(world, &waypoint, service, to));
                    } else {
                        outcomes.insert(through_waypoint(&waypoint, wanted, to, Some(service), "-"));
                    }
                }
            }
            if !references.is_empty() {
                return outcomes;
            }
            // 5. and 6.
            if service.load_balancing.mode == LoadBalancingMode::Passthrough {
                return one(format!("plain {to}; {} -", key(Some(service))));
            }
            // 7. and 8.
            for upstream in load_balance(world, service, to.port(), Mode::Standard) {
                if upstream.workload.network != source.network {
                    outcomes.extend(through_gateway(world, &upstream, service, to));
                } else {
                    outcomes.insert(to_upstream(&upstream, to));
                }
            }
            or_refuse(outcomes)
        }
        // 8. A workload: through its waypoint, unless that is who asks.
        Some(Found::Workload(workload)) => {
            let reference = workload.waypoint.as_ref().filter(|at| !from_waypoint(world, at, source));
            let Some(reference) = reference else {
                return one(to_upstream(&Upstream { workload, port: to.port(), service: None }, to));
            };
            let instances = resolve(world, reference, to.ip(), Mode::Waypoint).into_iter();
            or_refuse(
                instances
                    .map(|(one, wanted)| through_waypoint(&one, wanted, to, None, &workload.uid))
                    .collect(),
            )
        }
    }
}

/// What becomes of a tunnel that has arrived at the source's address `local` (§2.9).
pub fn inbound(world: &World, local: IpAddr, host: Option<&str>, to: SocketAddr) -> String {
    let own = world.source();
    let refuse = || "refuse".to_owned();
    let waypoint_of = |mut references: Vec<&GatewayAddress>| {
        references.retain(|reference| from_waypoint(world, reference, own));
        !references.is_empty()
    };
    // Weighted waypoints are looked at as well (a ztunnel: only the one).
    let waypoints = |service: &'_ Service| -> Vec<GatewayAddress> {
        let weighted = service.weighted_waypoints.iter().map(|weighted| weighted.waypoint.clone());
        weighted.chain(service.waypoint.clone()).collect()
    };
    // 4. Is it for us?
    let mut named = None;
    let port = match host {
        None => {
            let ours = to.ip() == local
                // Every address of ours is ours (a ztunnel: the one connected to).
                || own.addresses.contains(&to.ip())
                || own.application_tunnel.is_some()
                || match find_address(world, &own.network, to.ip(), None) {
                    Some(Found::Service(service)) => waypoint_of(waypoints(service).iter().collect()),
                    Some(Found::Workload(other)) => waypoint_of(other.waypoint.iter().collect()),
                    None => false,
                };
            if !ours {
                return refuse();
            }
            to.port()
        }
        Some(host) => {
            let seen = world.services.iter().filter(|one| *one.hostname == *host);
            let seen = seen.filter(|one| visible(one, Some(&own.namespace))).collect();
            let Some(service) = best(seen, Some(&own.namespace)) else { return refuse() };
            let mapping = own
                .services
                .iter()
                .filter(|(key, _)| key.namespace == service.namespace && key.name == service.hostname);
            let mapping: Vec<_> = mapping.collect();
            // A service that is none of ours is not for us (a ztunnel takes any).
            let ours = own.application_tunnel.is_some()
                || !mapping.is_empty()
                || waypoint_of(waypoints(service).iter().collect());
            if !ours {
                return refuse();
            }
            named = Some(service);
            // 5. The endpoint's own port, else the service's.
            let mut ports = mapping.iter().flat_map(|(_, ports)| ports);
            let own_port = ports.find(|one| one.service_port == to.port()).map(|one| one.target_port);
            let port = own_port.filter(|port| *port != 0).or(service_port(service, to.port()));
            match port {
                None | Some(0) => return refuse(),
                Some(port) => port,
            }
        }
    };
    let tunnel = own.application_tunnel;
    let taken_at = tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port);
    // The tunnel's own port must not be ours either (a ztunnel does not look).
    if ILLEGAL.contains(&port) || ILLEGAL.contains(&taken_at) {
        return refuse();
    }
    let announce = match (tunnel, named) {
        (Some(tunnel), _) if tunnel.handover == TunnelHandover::None => None,
        (None, _) => None,
        (Some(_), None) => Some(to),
        (Some(_), Some(service)) => {
            let in_network = service.vips.iter().filter(|vip| vip.network == own.network);
            let v4 = in_network.clone().find(|vip| vip.address.is_ipv4());
            let first = v4.or(in_network.clone().next()).or(service.vips.first());
            match first {
                Some(vip) => Some(SocketAddr::new(vip.address, to.port())),
                None => return refuse(),
            }
        }
    };
    format!("{} {announce:?}", SocketAddr::new(local, taken_at))
}
