//! The workload API (`istio.workload`) and the model, both ways: workloads and services.
//!
//! Unknown fields and enum values are tolerated here, except a tunnel protocol, without which the workload cannot be
//! reached as its author meant. Defaults are those of Istio's reader.

use crate::ResourceError;
use cairn_mesh::{
    AppProtocol, ApplicationTunnel, Change, GatewayAddress, GatewayTarget, Health, HealthPolicy, Identity,
    IpFamilies, LoadBalancing, LoadBalancingMode, Locality, NetworkAddress, NetworkBlock, NetworkMode,
    PortMapping, ResourceName, RoutingScope, Service, ServicePort, TunnelHandover, TunnelProtocol,
    Visibility, WeightedWaypoint, Workload, WorkloadKind,
};
use cairn_proto::workload as wire;
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The change that an `istio.workload.Address` brings.
///
/// # Errors
/// When it names neither a workload nor a service, or one that cannot be used.
pub fn address_from_proto(address: wire::Address) -> Result<Change, ResourceError> {
    match address.r#type {
        Some(wire::address::Type::Workload(workload)) => workload_from_proto(workload).map(Change::Workload),
        Some(wire::address::Type::Service(service)) => service_from_proto(service).map(Change::Service),
        None => Err(ResourceError::Missing { field: "type" }),
    }
}

/// A workload from its wire form.
///
/// # Errors
/// When it has no uid, no identity, a malformed address, port or name, or a tunnel protocol that we do not speak.
pub fn workload_from_proto(from: wire::Workload) -> Result<Workload, ResourceError> {
    if from.uid.is_empty() {
        return Err(ResourceError::Missing { field: "uid" });
    }
    let protocol = match wire::TunnelProtocol::try_from(from.tunnel_protocol) {
        Ok(wire::TunnelProtocol::None) => TunnelProtocol::None,
        Ok(wire::TunnelProtocol::Hbone) => TunnelProtocol::Hbone,
        Ok(wire::TunnelProtocol::LegacyIstioMtls) | Err(_) => {
            return Err(ResourceError::value("tunnel_protocol", from.tunnel_protocol));
        }
    };
    let trust_domain = or(&from.trust_domain, "cluster.local");
    let identity = Identity::new(trust_domain, &from.namespace, or(&from.service_account, "default"))?;
    let kind = kind_from_proto(from.workload_type());
    let health = match from.status() {
        wire::WorkloadStatus::Healthy => Health::Healthy,
        wire::WorkloadStatus::Unhealthy => Health::Unhealthy,
    };
    let network_mode = match from.network_mode() {
        wire::NetworkMode::Standard => NetworkMode::Own,
        wire::NetworkMode::HostNetwork => NetworkMode::Host,
    };
    let locality = from.locality.unwrap_or_default();
    Ok(Workload {
        network_mode,
        application_tunnel: from.application_tunnel.map(tunnel_from_proto).transpose()?,
        hostname: from.hostname.into(),
        kind,
        health,
        addresses: from.addresses.iter().map(|bytes| ip(bytes, "addresses")).collect::<Result<_, _>>()?,
        authorization_policies: from
            .authorization_policies
            .iter()
            .map(|name| resource_name(name, "authorization_policies"))
            .collect::<Result<_, _>>()?,
        services: from.services.iter().map(service_ports).collect::<Result<_, _>>()?,
        waypoint: from.waypoint.map(gateway_from_proto).transpose()?,
        network_gateway: from.network_gateway.map(gateway_from_proto).transpose()?,
        cluster_id: or(&from.cluster_id, "Kubernetes").into(),
        locality: Locality {
            region: locality.region.into(),
            zone: locality.zone.into(),
            subzone: locality.subzone.into(),
        },
        uid: from.uid.into(),
        name: from.name.into(),
        namespace: from.namespace.into(),
        identity,
        network: from.network.into(),
        protocol,
        node: from.node.into(),
        canonical_name: from.canonical_name.into(),
        canonical_revision: from.canonical_revision.into(),
        workload_name: from.workload_name.into(),
        native_tunnel: from.native_tunnel,
        capacity: from.capacity.unwrap_or(1),
    })
}

/// A service from its wire form.
///
/// # Errors
/// When it has no namespace or hostname, or a malformed address or port.
pub fn service_from_proto(from: wire::Service) -> Result<Service, ResourceError> {
    for (field, value) in [("namespace", &from.namespace), ("hostname", &from.hostname)] {
        if value.is_empty() {
            return Err(ResourceError::Missing { field });
        }
    }
    let ports = from.ports.iter().map(service_port).collect::<Result<_, _>>()?;
    let (ip_families, visibility) = (from.ip_families(), from.visibility());
    let mut vips = Vec::with_capacity(from.addresses.len());
    let mut blocks = Vec::new();
    for address in &from.addresses {
        match block(address)? {
            Some(block) => blocks.push(block),
            None => vips.push(network_address(address)?),
        }
    }
    let weighted = |from: wire::WeightedWaypoint| {
        let waypoint = from.destination.ok_or(ResourceError::Missing { field: "weighted_waypoints" })?;
        Ok(WeightedWaypoint { waypoint: gateway_from_proto(waypoint)?, weight: from.weight })
    };
    let weighted_waypoints = from.weighted_waypoints.into_iter().map(weighted);
    Ok(Service {
        weighted_waypoints: weighted_waypoints.collect::<Result<_, ResourceError>>()?,
        ip_families: match ip_families {
            wire::IpFamilies::Automatic => IpFamilies::Automatic,
            wire::IpFamilies::Ipv4Only => IpFamilies::V4,
            wire::IpFamilies::Ipv6Only => IpFamilies::V6,
            wire::IpFamilies::Dual => IpFamilies::Dual,
        },
        visibility: match visibility {
            wire::Visibility::Public => Visibility::Public,
            wire::Visibility::Namespace => Visibility::Namespace,
        },
        ingress_use_waypoint: from.ingress_use_waypoint,
        blocks,
        vips,
        ports,
        subject_alt_names: from.subject_alt_names.iter().filter_map(|name| name.parse().ok()).collect(),
        waypoint: from.waypoint.map(gateway_from_proto).transpose()?,
        load_balancing: from.load_balancing.map(load_balancing_from_proto).unwrap_or_default(),
        canonical: from.canonical,
        name: from.name.into(),
        namespace: from.namespace.into(),
        hostname: from.hostname.into(),
    })
}

/// A workload in its wire form.
pub fn workload_to_proto(from: &Workload) -> wire::Workload {
    let protocol = match from.protocol {
        TunnelProtocol::None => wire::TunnelProtocol::None,
        TunnelProtocol::Hbone => wire::TunnelProtocol::Hbone,
    };
    let status = match from.health {
        Health::Healthy => wire::WorkloadStatus::Healthy,
        Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
    };
    let port = |mapping: &PortMapping| wire::Port {
        service_port: mapping.service_port.into(),
        target_port: mapping.target_port.into(),
        app_protocol: 0,
    };
    let ports = |ports: &[PortMapping]| wire::PortList { ports: ports.iter().map(port).collect() };
    let services: BTreeMap<_, _> =
        from.services.iter().map(|(key, mappings)| (key.to_string(), ports(mappings))).collect();
    wire::Workload {
        name: from.name.to_string(),
        namespace: from.namespace.to_string(),
        addresses: from.addresses.iter().map(ip_bytes).collect(),
        network: from.network.to_string(),
        tunnel_protocol: protocol.into(),
        trust_domain: from.identity.trust_domain().to_owned(),
        service_account: from.identity.service_account().to_owned(),
        waypoint: from.waypoint.as_ref().map(gateway_to_proto),
        node: from.node.to_string(),
        canonical_name: from.canonical_name.to_string(),
        canonical_revision: from.canonical_revision.to_string(),
        workload_type: kind_to_proto(from.kind).into(),
        workload_name: from.workload_name.to_string(),
        native_tunnel: from.native_tunnel,
        authorization_policies: from.authorization_policies.iter().map(ResourceName::to_string).collect(),
        status: status.into(),
        cluster_id: from.cluster_id.to_string(),
        network_gateway: from.network_gateway.as_ref().map(gateway_to_proto),
        uid: from.uid.to_string(),
        services,
        locality: (from.locality != Locality::default()).then(|| wire::Locality {
            region: from.locality.region.to_string(),
            zone: from.locality.zone.to_string(),
            subzone: from.locality.subzone.to_string(),
        }),
        capacity: (from.capacity != 1).then_some(from.capacity),
        hostname: from.hostname.to_string(),
        application_tunnel: from.application_tunnel.as_ref().map(tunnel_to_proto),
        network_mode: match from.network_mode {
            NetworkMode::Own => wire::NetworkMode::Standard,
            NetworkMode::Host => wire::NetworkMode::HostNetwork,
        }
        .into(),
        extensions: Vec::new(),
    }
}

/// A service in its wire form.
pub fn service_to_proto(from: &Service) -> wire::Service {
    let port = |port: &ServicePort| wire::Port {
        service_port: port.port.into(),
        target_port: port.target_port.into(),
        app_protocol: protocol_to_proto(port.protocol).into(),
    };
    wire::Service {
        name: from.name.to_string(),
        namespace: from.namespace.to_string(),
        hostname: from.hostname.to_string(),
        addresses: from
            .vips
            .iter()
            .map(network_address_to_proto)
            .chain(from.blocks.iter().map(block_to_proto))
            .collect(),
        ports: from.ports.iter().map(port).collect(),
        subject_alt_names: from
            .subject_alt_names
            .iter()
            .map(|identity| identity.as_str().to_owned())
            .collect(),
        waypoint: from.waypoint.as_ref().map(gateway_to_proto),
        load_balancing: (from.load_balancing != LoadBalancing::default())
            .then(|| load_balancing_to_proto(&from.load_balancing)),
        canonical: from.canonical,
        ip_families: match from.ip_families {
            IpFamilies::Automatic => wire::IpFamilies::Automatic,
            IpFamilies::V4 => wire::IpFamilies::Ipv4Only,
            IpFamilies::V6 => wire::IpFamilies::Ipv6Only,
            IpFamilies::Dual => wire::IpFamilies::Dual,
        }
        .into(),
        visibility: match from.visibility {
            Visibility::Public => wire::Visibility::Public,
            Visibility::Namespace => wire::Visibility::Namespace,
        }
        .into(),
        ingress_use_waypoint: from.ingress_use_waypoint,
        weighted_waypoints: from
            .weighted_waypoints
            .iter()
            .map(|one| wire::WeightedWaypoint {
                destination: Some(gateway_to_proto(&one.waypoint)),
                weight: one.weight,
            })
            .collect(),
        extensions: Vec::new(),
    }
}

/// `namespace/name` of a field.
fn resource_name(text: &str, field: &'static str) -> Result<ResourceName, ResourceError> {
    ResourceName::parse(text).ok_or_else(|| ResourceError::value(field, text))
}

fn service_ports(
    (key, ports): (&String, &wire::PortList),
) -> Result<(ResourceName, Vec<PortMapping>), ResourceError> {
    let mapping = |port: &wire::Port| {
        Ok(PortMapping {
            service_port: number(port.service_port, "service_port")?,
            target_port: number(port.target_port, "target_port")?,
        })
    };
    let ports = ports.ports.iter().map(mapping).collect::<Result<_, ResourceError>>()?;
    Ok((resource_name(key, "services")?, ports))
}

fn service_port(from: &wire::Port) -> Result<ServicePort, ResourceError> {
    let protocol = match from.app_protocol() {
        wire::AppProtocol::Unknown => AppProtocol::Unknown,
        wire::AppProtocol::Http11 => AppProtocol::Http11,
        wire::AppProtocol::Http2 => AppProtocol::Http2,
        wire::AppProtocol::Grpc => AppProtocol::Grpc,
        wire::AppProtocol::Tcp => AppProtocol::Tcp,
        wire::AppProtocol::Tls => AppProtocol::Tls,
    };
    Ok(ServicePort {
        port: number(from.service_port, "service_port")?,
        target_port: number(from.target_port, "target_port")?,
        protocol,
    })
}

fn protocol_to_proto(from: AppProtocol) -> wire::AppProtocol {
    match from {
        AppProtocol::Unknown => wire::AppProtocol::Unknown,
        AppProtocol::Http11 => wire::AppProtocol::Http11,
        AppProtocol::Http2 => wire::AppProtocol::Http2,
        AppProtocol::Grpc => wire::AppProtocol::Grpc,
        AppProtocol::Tcp => wire::AppProtocol::Tcp,
        AppProtocol::Tls => wire::AppProtocol::Tls,
    }
}

fn kind_from_proto(from: wire::WorkloadType) -> WorkloadKind {
    match from {
        wire::WorkloadType::Deployment => WorkloadKind::Deployment,
        wire::WorkloadType::Cronjob => WorkloadKind::CronJob,
        wire::WorkloadType::Pod => WorkloadKind::Pod,
        wire::WorkloadType::Job => WorkloadKind::Job,
    }
}

fn kind_to_proto(from: WorkloadKind) -> wire::WorkloadType {
    match from {
        WorkloadKind::Deployment => wire::WorkloadType::Deployment,
        WorkloadKind::CronJob => wire::WorkloadType::Cronjob,
        WorkloadKind::Pod => wire::WorkloadType::Pod,
        WorkloadKind::Job => wire::WorkloadType::Job,
    }
}

fn gateway_from_proto(from: wire::GatewayAddress) -> Result<GatewayAddress, ResourceError> {
    let target = match from.destination {
        Some(wire::gateway_address::Destination::Hostname(name)) => {
            GatewayTarget::Hostname(ResourceName::new(name.namespace, name.hostname))
        }
        Some(wire::gateway_address::Destination::Address(address)) => {
            GatewayTarget::Address(network_address(&address)?)
        }
        None => return Err(ResourceError::Missing { field: "destination" }),
    };
    Ok(GatewayAddress { target, hbone_port: number(from.hbone_mtls_port, "hbone_mtls_port")? })
}

fn gateway_to_proto(from: &GatewayAddress) -> wire::GatewayAddress {
    let destination = match &from.target {
        GatewayTarget::Hostname(name) => {
            wire::gateway_address::Destination::Hostname(wire::NamespacedHostname {
                namespace: name.namespace.to_string(),
                hostname: name.name.to_string(),
            })
        }
        GatewayTarget::Address(address) => {
            wire::gateway_address::Destination::Address(network_address_to_proto(address))
        }
    };
    wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: from.hbone_port.into() }
}

/// An unknown protocol is none: the tunnel's bytes arrive as they are.
fn tunnel_from_proto(from: wire::ApplicationTunnel) -> Result<ApplicationTunnel, ResourceError> {
    let handover = match from.protocol() {
        wire::application_tunnel::Protocol::None => TunnelHandover::None,
        wire::application_tunnel::Protocol::Proxy => TunnelHandover::Proxy,
    };
    let port = number(from.port, "application_tunnel.port")?;
    Ok(ApplicationTunnel { handover, port: (port != 0).then_some(port) })
}

fn tunnel_to_proto(from: &ApplicationTunnel) -> wire::ApplicationTunnel {
    let protocol = match from.handover {
        TunnelHandover::None => wire::application_tunnel::Protocol::None,
        TunnelHandover::Proxy => wire::application_tunnel::Protocol::Proxy,
    };
    wire::ApplicationTunnel { protocol: protocol.into(), port: from.port.unwrap_or(0).into() }
}

fn load_balancing_from_proto(from: wire::LoadBalancing) -> LoadBalancing {
    let scope = |scope| match scope {
        wire::load_balancing::Scope::UnspecifiedScope => None,
        wire::load_balancing::Scope::Region => Some(RoutingScope::Region),
        wire::load_balancing::Scope::Zone => Some(RoutingScope::Zone),
        wire::load_balancing::Scope::Subzone => Some(RoutingScope::Subzone),
        wire::load_balancing::Scope::Node => Some(RoutingScope::Node),
        wire::load_balancing::Scope::Cluster => Some(RoutingScope::Cluster),
        wire::load_balancing::Scope::Network => Some(RoutingScope::Network),
    };
    LoadBalancing {
        mode: match from.mode() {
            wire::load_balancing::Mode::UnspecifiedMode => LoadBalancingMode::Standard,
            wire::load_balancing::Mode::Strict => LoadBalancingMode::Strict,
            wire::load_balancing::Mode::Failover => LoadBalancingMode::Failover,
            wire::load_balancing::Mode::Passthrough => LoadBalancingMode::Passthrough,
        },
        scopes: from.routing_preference().filter_map(scope).collect(),
        health: match from.health_policy() {
            wire::load_balancing::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            wire::load_balancing::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    }
}

fn load_balancing_to_proto(from: &LoadBalancing) -> wire::LoadBalancing {
    let scope = |scope: &RoutingScope| match scope {
        RoutingScope::Region => wire::load_balancing::Scope::Region,
        RoutingScope::Zone => wire::load_balancing::Scope::Zone,
        RoutingScope::Subzone => wire::load_balancing::Scope::Subzone,
        RoutingScope::Node => wire::load_balancing::Scope::Node,
        RoutingScope::Cluster => wire::load_balancing::Scope::Cluster,
        RoutingScope::Network => wire::load_balancing::Scope::Network,
    };
    let mode = match from.mode {
        LoadBalancingMode::Standard => wire::load_balancing::Mode::UnspecifiedMode,
        LoadBalancingMode::Strict => wire::load_balancing::Mode::Strict,
        LoadBalancingMode::Failover => wire::load_balancing::Mode::Failover,
        LoadBalancingMode::Passthrough => wire::load_balancing::Mode::Passthrough,
    };
    let health = match from.health {
        HealthPolicy::OnlyHealthy => wire::load_balancing::HealthPolicy::OnlyHealthy,
        HealthPolicy::AllowAll => wire::load_balancing::HealthPolicy::AllowAll,
    };
    wire::LoadBalancing {
        routing_preference: from.scopes.iter().map(|it| scope(it).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    }
}

fn network_address(from: &wire::NetworkAddress) -> Result<NetworkAddress, ResourceError> {
    Ok(NetworkAddress { network: from.network.as_str().into(), address: ip(&from.address, "address")? })
}

/// The range that an address with a prefix names; `None` for a single address. A 16-byte form of an IPv4 address counts
/// its prefix in 128 bits.
fn block(from: &wire::NetworkAddress) -> Result<Option<NetworkBlock>, ResourceError> {
    let Some(length) = from.length else { return Ok(None) };
    let unusable = || ResourceError::value("address", format_args!("a prefix of {length} bits"));
    let address = ip(&from.address, "address")?;
    let mapped = if address.is_ipv4() && from.address.len() == 16 { 96 } else { 0 };
    let length =
        length.checked_sub(mapped).and_then(|length| u8::try_from(length).ok()).ok_or_else(unusable)?;
    let block = IpNet::new(address, length).map_err(|_| unusable())?.trunc();
    let is_single = block.prefix_len() == block.max_prefix_len();
    Ok((!is_single).then(|| NetworkBlock { network: from.network.as_str().into(), block }))
}

fn block_to_proto(from: &NetworkBlock) -> wire::NetworkAddress {
    wire::NetworkAddress {
        network: from.network.to_string(),
        address: ip_bytes(&from.block.addr()),
        length: Some(from.block.prefix_len().into()),
    }
}

fn network_address_to_proto(from: &NetworkAddress) -> wire::NetworkAddress {
    wire::NetworkAddress { network: from.network.to_string(), address: ip_bytes(&from.address), length: None }
}

/// An address of 4 or 16 bytes.
pub(crate) fn ip(bytes: &[u8], field: &'static str) -> Result<IpAddr, ResourceError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        Ok(v4.into())
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        Ok(IpAddr::from(v6).to_canonical())
    } else {
        Err(ResourceError::value(field, format_args!("an address of {} bytes", bytes.len())))
    }
}

/// The 4 or 16 bytes of an address.
pub(crate) fn ip_bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn number(value: u32, field: &'static str) -> Result<u16, ResourceError> {
    u16::try_from(value).map_err(|_| ResourceError::value(field, value))
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

#[cfg(test)]
#[path = "workload/tests.rs"]
mod tests;
