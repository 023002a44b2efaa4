//! Services: names and VIPs in front of workloads (`istio.workload.Service`, without its wire format).

use crate::{GatewayAddress, Identity, NetworkAddress, ResourceName};
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

/// One service.
#[derive(Clone, Debug, PartialEq, Eq)]
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
}

impl Service {
    /// `namespace/hostname`, which names it on the wire and in [`crate::Workload::services`].
    pub fn key(&self) -> ResourceName {
        ResourceName { namespace: Arc::clone(&self.namespace), name: Arc::clone(&self.hostname) }
    }

    /// The port with this number.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|candidate| candidate.port == port)
    }
}
