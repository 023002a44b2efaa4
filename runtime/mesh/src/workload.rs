//! Workloads: what runs in the mesh (`istio.workload.Workload`, without its wire format).

use crate::{Identity, ResourceName};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// An address within a network; `""` is the network of single-network meshes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// The network's name.
    pub network: Arc<str>,
    /// The address in it.
    pub address: IpAddr,
}

/// How a workload is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TunnelProtocol {
    /// Plain TCP: it is not in the mesh.
    #[default]
    None,
    /// HBONE on port 15008.
    Hbone,
}

/// What controls a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WorkloadKind {
    /// A Deployment.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A bare pod.
    #[default]
    Pod,
    /// A Job.
    Job,
}

impl WorkloadKind {
    /// The lower-case word used in `baggage` keys: `k8s.<word>.name`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// Whether a workload is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Health {
    /// It takes traffic.
    #[default]
    Healthy,
    /// It takes traffic only of services that publish unready addresses.
    Unhealthy,
}

/// Where a workload runs.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Subzone.
    pub subzone: Arc<str>,
}

/// Where a gateway or waypoint is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayTarget {
    /// By service hostname, `namespace/hostname`.
    Hostname(ResourceName),
    /// By address: a VIP or a pod.
    Address(NetworkAddress),
}

/// A gateway or waypoint and its HBONE port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayAddress {
    /// Where.
    pub target: GatewayTarget,
    /// Its HBONE port, normally 15008.
    pub hbone_port: u16,
}

impl fmt::Display for GatewayAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            GatewayTarget::Hostname(name) => write!(f, "{name}:{}", self.hbone_port),
            GatewayTarget::Address(at) => write!(f, "{}/{}:{}", at.network, at.address, self.hbone_port),
        }
    }
}

/// How a workload wants to be told where its tunnels lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TunnelHandover {
    /// Not at all.
    #[default]
    None,
    /// By a PROXY protocol header, version 2, before the tunnel's bytes.
    Proxy,
}

/// What a workload declares that takes tunnels meant for others: a waypoint behind a ztunnel of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// How it is told where a tunnel leads.
    pub handover: TunnelHandover,
    /// The port on which it takes all tunnels; `None`: each at its own port.
    pub port: Option<u16>,
}

/// Whose address a workload has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum NetworkMode {
    /// Its own.
    #[default]
    Own,
    /// That of its node, which it shares: by address alone it cannot be found.
    Host,
}

/// A service port and the workload's own port behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// The service's port.
    pub service_port: u16,
    /// The workload's port; 0: as the service says.
    pub target_port: u16,
}

/// One workload: a pod, a virtual machine, or an address outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique over clusters: `<cluster>//Pod/<namespace>/<name>` for pods.
    pub uid: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// Who it is.
    pub identity: Identity,
    /// Its addresses in `network`.
    pub addresses: Vec<IpAddr>,
    /// Its network.
    pub network: Arc<str>,
    /// How it is reached.
    pub protocol: TunnelProtocol,
    /// The waypoint for traffic addressed to the workload itself.
    pub waypoint: Option<GatewayAddress>,
    /// The gateway of its network, for traffic from other networks.
    pub network_gateway: Option<GatewayAddress>,
    /// The node it runs on.
    pub node: Arc<str>,
    /// Canonical service.
    pub canonical_name: Arc<str>,
    /// Canonical revision.
    pub canonical_revision: Arc<str>,
    /// What controls it.
    pub kind: WorkloadKind,
    /// The name of what controls it.
    pub workload_name: Arc<str>,
    /// It terminates HBONE itself, without a ztunnel.
    pub native_tunnel: bool,
    /// Policies that select it by label; those of its namespace and of the mesh apply anyway.
    pub authorization_policies: Vec<ResourceName>,
    /// Whether it is ready.
    pub health: Health,
    /// Its cluster.
    pub cluster_id: Arc<str>,
    /// Its locality.
    pub locality: Locality,
    /// The services it is an endpoint of, by `namespace/hostname`.
    pub services: Vec<(ResourceName, Vec<PortMapping>)>,
    /// Weight in load balancing.
    pub capacity: u32,
    /// The name under which DNS knows its addresses, if `addresses` is empty; else `""`.
    pub hostname: Arc<str>,
    /// It takes tunnels meant for others.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Whose address it has.
    pub network_mode: NetworkMode,
}

impl Workload {
    /// A healthy pod with an identity and no addresses, to be completed with struct update syntax.
    pub fn new(uid: impl Into<Arc<str>>, name: impl Into<Arc<str>>, identity: Identity) -> Self {
        let name = name.into();
        Self {
            uid: uid.into(),
            namespace: identity.namespace().into(),
            canonical_name: Arc::clone(&name),
            workload_name: Arc::clone(&name),
            name,
            identity,
            addresses: Vec::new(),
            network: "".into(),
            protocol: TunnelProtocol::None,
            waypoint: None,
            network_gateway: None,
            node: "".into(),
            canonical_revision: "latest".into(),
            kind: WorkloadKind::Pod,
            native_tunnel: false,
            authorization_policies: Vec::new(),
            health: Health::Healthy,
            cluster_id: "Kubernetes".into(),
            locality: Locality::default(),
            services: Vec::new(),
            capacity: 1,
            hostname: "".into(),
            application_tunnel: None,
            network_mode: NetworkMode::Own,
        }
    }

    /// The addresses as keys of the snapshot.
    pub fn network_addresses(&self) -> impl Iterator<Item = NetworkAddress> + '_ {
        self.addresses
            .iter()
            .map(|address| NetworkAddress { network: Arc::clone(&self.network), address: *address })
    }
}
