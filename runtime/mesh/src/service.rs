//! Services: names and VIPs in front of workloads (`istio.workload.Service`, without its wire format).

use crate::{GatewayAddress, Identity, NetworkAddress, ResourceName};
use ipnet::IpNet;
use std::net::IpAddr;
use std::sync::Arc;

/// What a service port carries, as its name prefix or `appProtocol` declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AppProtocol {
    /// Undeclared: the first bytes tell.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC.
    Grpc,
    /// Opaque TCP.
    Tcp,
    /// TLS, opaque here.
    Tls,
}

/// One port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The service's port.
    pub port: u16,
    /// The workload's port; 0: each endpoint says its own (a named target port).
    pub target_port: u16,
    /// What it carries.
    pub protocol: AppProtocol,
}

/// What endpoints are preferred by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingScope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}

/// How endpoints are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LoadBalancingMode {
    /// Any.
    #[default]
    Standard,
    /// Only those that match every scope.
    Strict,
    /// Those that match most scopes.
    Failover,
    /// None: the original destination.
    Passthrough,
}

/// Which endpoints may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HealthPolicy {
    /// Healthy ones.
    #[default]
    OnlyHealthy,
    /// All, as with `publishNotReadyAddresses`.
    AllowAll,
}

/// Load balancing of a service.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LoadBalancing {
    /// How.
    pub mode: LoadBalancingMode,
    /// By what, most important first.
    pub scopes: Vec<RoutingScope>,
    /// Among which.
    pub health: HealthPolicy,
}

/// A range of addresses within a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkBlock {
    /// The network's name.
    pub network: Arc<str>,
    /// The range; bits beyond its prefix are zero.
    pub block: IpNet,
}

/// Which families of addresses of its endpoints a service is reached on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IpFamilies {
    /// Undeclared: any.
    #[default]
    Automatic,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether an endpoint's address may be used.
    pub fn accept(self, address: IpAddr) -> bool {
        match self {
            Self::Automatic | Self::Dual => true,
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }
}

/// Who can find a service by its addresses and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Visibility {
    /// Everyone.
    #[default]
    Public,
    /// Clients of its own namespace.
    Namespace,
}

/// One of several waypoints among which a service's connections are spread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub waypoint: GatewayAddress,
    /// Its share is this, divided by the sum of all.
    pub weight: u32,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Service {
    /// Its name in its namespace.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its hostname, `<name>.<namespace>.svc.cluster.local` for Kubernetes services.
    pub hostname: Arc<str>,
    /// Its VIPs; none for headless services.
    pub vips: Vec<NetworkAddress>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Identities that its endpoints may have beside their own.
    pub subject_alt_names: Vec<Identity>,
    /// The waypoint for traffic addressed to it.
    pub waypoint: Option<GatewayAddress>,
    /// How endpoints are chosen.
    pub load_balancing: LoadBalancing,
    /// Whether it is the owner of its hostname (a Kubernetes Service rather than a ServiceEntry).
    pub canonical: bool,
    /// Ranges of addresses that are its VIPs too.
    pub blocks: Vec<NetworkBlock>,
    /// Waypoints that share the traffic addressed to it. If their weights sum to more than 0, `waypoint` is not used.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// Which addresses of its endpoints are used.
    pub ip_families: IpFamilies,
    /// Who can find it.
    pub visibility: Visibility,
    /// Ingress gateways send its traffic through its waypoint as well. Nothing here asks for it.
    pub ingress_use_waypoint: bool,
}

impl Service {
    /// `namespace/hostname`, which names it on the wire and in [`crate::Workload::services`].
    pub fn key(&self) -> ResourceName {
        ResourceName { namespace: Arc::clone(&self.namespace), name: Arc::clone(&self.hostname) }
    }

    /// Whether a client in `namespace` can find it; the namespace `""` is nobody's, and sees all.
    pub fn is_visible_to(&self, namespace: &str) -> bool {
        self.visibility == Visibility::Public || namespace.is_empty() || *self.namespace == *namespace
    }

    /// Every waypoint that it may be reached through.
    pub fn waypoints(&self) -> impl Iterator<Item = &GatewayAddress> {
        self.weighted_waypoints.iter().map(|weighted| &weighted.waypoint).chain(&self.waypoint)
    }

    /// The port with this number.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|candidate| candidate.port == port)
    }
}
