//! One immutable state of the mesh, shared by all readers.

use crate::authorization::Compiled;
use crate::balance::{Tiers, Wheel};
use crate::{
    Authorization, AuthorizationPolicy, CustomPolicy, Health, HealthPolicy, HttpRoute, LoadBalancingMode,
    MeshSettings, NetworkAddress, NetworkBlock, NetworkMode, PortMapping, PullSecret, RequestAuthentication,
    ResourceKey, ResourceName, Service, Sharded, TelemetryPolicy, TextMatch, Unenforceable, WasmPlugin,
    Workload,
};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

/// A workload behind a service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its own ports behind the service's.
    pub ports: Arc<[PortMapping]>,
}

impl Endpoint {
    /// The workload's port behind `service`'s `port`: the endpoint's own mapping, else the service's target port.
    pub fn target_port(&self, service: &Service, port: u16) -> Option<u16> {
        let own =
            self.ports.iter().find(|mapping| mapping.service_port == port).map(|mapping| mapping.target_port);
        let shared = || service.port(port).map(|port| port.target_port);
        own.filter(|target| *target != 0).or_else(shared).filter(|target| *target != 0)
    }
}

/// A service with its endpoints.
#[derive(Debug)]
pub struct ServiceState {
    /// The service.
    pub service: Arc<Service>,
    /// The endpoints that may be chosen: healthy ones, or all if the service says so. In order of their uid.
    pub endpoints: Vec<Endpoint>,
    /// How many there are in all.
    pub endpoints_known: usize,
    /// All of `endpoints`, to draw from.
    pub(crate) wheel: Wheel,
    /// The same by what the service prefers, if it does.
    pub(crate) tiers: Option<Tiers>,
}

impl ServiceState {
    pub(crate) fn new(service: Arc<Service>, all: &BTreeMap<Arc<str>, Endpoint>) -> Self {
        let any = service.load_balancing.health == HealthPolicy::AllowAll;
        let usable = |endpoint: &&Endpoint| any || endpoint.workload.health == Health::Healthy;
        let endpoints: Vec<Endpoint> = all.values().filter(usable).cloned().collect();
        let count = u32::try_from(endpoints.len()).unwrap_or(u32::MAX);
        let capacity = |index: u32| endpoints.get(index as usize).map_or(0, |one| one.workload.capacity);
        let wheel = Wheel::new(0..count, capacity);
        let balancing = &service.load_balancing;
        let prefers = balancing.mode != LoadBalancingMode::Standard;
        let tiers = prefers.then(|| Tiers::new(&balancing.scopes, &endpoints)).flatten();
        Self { service, endpoints, endpoints_known: all.len(), wheel, tiers }
    }
}

/// What configures a waypoint's L7 pipeline.
#[derive(Clone, Debug, Default)]
pub struct L7 {
    /// The waypoint's own name, from its Gateway.
    pub gateway: Option<ResourceName>,
    /// Principals of clients who are told what decided their requests.
    pub explain_to: Arc<[TextMatch]>,
    /// What the waypoint's own Gateway says of telemetry.
    pub gateway_telemetry: Arc<crate::GatewayTelemetry>,
    /// Routes.
    pub routes: BTreeMap<ResourceKey, Arc<HttpRoute>>,
    /// Authorization policies.
    pub policies: BTreeMap<ResourceName, Arc<AuthorizationPolicy>>,
    /// Whose tokens are accepted.
    pub authentications: BTreeMap<ResourceName, Arc<RequestAuthentication>>,
    /// Authorization policies with action CUSTOM.
    pub custom_policies: BTreeMap<ResourceName, Arc<CustomPolicy>>,
    /// Plugins.
    pub plugins: BTreeMap<ResourceName, Arc<WasmPlugin>>,
    /// Who we say that we are to registries.
    pub pull_secrets: BTreeMap<ResourceName, Arc<PullSecret>>,
    /// Telemetry resources.
    pub telemetry: BTreeMap<ResourceName, Arc<TelemetryPolicy>>,
    /// Resources that are attached and cannot be enforced.
    pub unenforceable: BTreeMap<ResourceKey, Arc<Unenforceable>>,
}

/// What an address is.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A workload's own.
    Workload(Arc<Workload>),
    /// A service's VIP.
    Service(Arc<ServiceState>),
}

/// One immutable state of the mesh.
#[derive(Clone, Default)]
pub struct Snapshot {
    pub(crate) workloads: Sharded<Arc<str>, Arc<Workload>>,
    pub(crate) addresses: Sharded<NetworkAddress, Vec<Arc<Workload>>>,
    pub(crate) services: Sharded<ResourceName, Arc<ServiceState>>,
    pub(crate) hostnames: Sharded<Arc<str>, Vec<ResourceName>>,
    pub(crate) vips: Sharded<NetworkAddress, Vec<ResourceName>>,
    pub(crate) blocks: Sharded<NetworkBlock, Vec<ResourceName>>,
    /// Which lengths of prefix `blocks` has, and how many blocks of each.
    pub(crate) block_lengths: Arc<BTreeMap<u8, usize>>,
    /// Workloads that DNS knows by name, by `namespace/hostname`.
    pub(crate) named: Sharded<ResourceName, Vec<Arc<Workload>>>,
    pub(crate) authorizations: Sharded<ResourceName, Arc<Authorization>>,
    pub(crate) namespace_authorizations: Sharded<Arc<str>, Arc<Vec<Arc<Authorization>>>>,
    pub(crate) global_authorizations: Arc<Vec<Arc<Authorization>>>,
    /// L4 policies that were removed while a workload may still name them.
    pub(crate) gone: Arc<BTreeSet<ResourceName>>,
    /// Counts changes of L4 policies.
    pub(crate) policies: u64,
    /// The L4 policies of workloads that were decided about, compiled; shared by all snapshots.
    pub(crate) compiled: Arc<Compiled>,
    pub(crate) l7: Arc<L7>,
    pub(crate) settings: Arc<MeshSettings>,
    pub(crate) generation: u64,
}

impl Snapshot {
    /// Counts publications: a higher number is a later state.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The workload with this uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|(_, workload)| workload)
    }

    /// The workload at an address; the first by uid where several share one (host network).
    pub fn workload_at(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.addresses.get(address)?.first()
    }

    /// All workloads at an address.
    pub fn workloads_at(&self, address: &NetworkAddress) -> &[Arc<Workload>] {
        self.addresses.get(address).map_or(&[], Vec::as_slice)
    }

    /// The workload that DNS knows as `namespace/hostname`; the first by uid where several are called so.
    pub fn workload_named(&self, key: &ResourceName) -> Option<&Arc<Workload>> {
        self.named.get(key)?.first()
    }

    /// The service `namespace/hostname`.
    pub fn service(&self, key: &ResourceName) -> Option<&Arc<ServiceState>> {
        self.services.get(key)
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceState>> {
        self.services.iter().map(|(_, state)| state)
    }

    /// The services with this VIP; several when namespaces share one.
    pub fn services_at(&self, address: &NetworkAddress) -> impl Iterator<Item = &Arc<ServiceState>> {
        self.vips.get(address).into_iter().flatten().filter_map(|key| self.services.get(key))
    }

    /// The service with this VIP as a client in `namespace` sees it: its own namespace's first, then the canonical
    /// one, then the first by name. If it sees none, one of whose ranges the address is in: its own namespace's first,
    /// then that of the longest prefix, then the canonical one. The namespace `""` is nobody's: it sees all.
    pub fn service_at(&self, address: &NetworkAddress, namespace: &str) -> Option<&Arc<ServiceState>> {
        let visible = |state: &&Arc<ServiceState>| state.service.is_visible_to(namespace);
        let exact = self.services_at(address).filter(visible);
        exact
            .min_by_key(|state| rank(&state.service, namespace))
            .or_else(|| self.service_around(address, namespace))
    }

    fn service_around(&self, address: &NetworkAddress, namespace: &str) -> Option<&Arc<ServiceState>> {
        let mut best: Option<&Arc<ServiceState>> = None;
        for length in self.block_lengths.keys().rev() {
            let Ok(block) = IpNet::new(address.address, *length) else { continue };
            let block = NetworkBlock { network: Arc::clone(&address.network), block: block.trunc() };
            let keys = self.blocks.get(&block).into_iter().flatten();
            let states = keys.filter_map(|key| self.services.get(key));
            let visible = states.filter(|state| state.service.is_visible_to(namespace));
            let Some(found) = visible.min_by_key(|state| rank(&state.service, namespace)) else { continue };
            if *found.service.namespace == *namespace {
                return Some(found);
            }
            best = best.or(Some(found));
        }
        best
    }

    /// The service with this hostname as a client in `namespace` sees it.
    pub fn service_named(&self, hostname: &str, namespace: &str) -> Option<&Arc<ServiceState>> {
        let keys = self.hostnames.get(hostname)?;
        keys.iter()
            .filter_map(|key| self.services.get(key))
            .filter(|state| state.service.is_visible_to(namespace))
            .min_by_key(|state| rank(&state.service, namespace))
    }

    /// What `address` is for a client in `namespace`: a workload's own address wins over a VIP (ztunnel
    /// `find_address`). An address that workloads share with their node is none of theirs.
    pub fn destination(&self, address: &NetworkAddress, namespace: &str) -> Option<Destination> {
        let mut here = self.workloads_at(address).iter();
        if let Some(workload) = here.find(|workload| workload.network_mode == NetworkMode::Own) {
            return Some(Destination::Workload(Arc::clone(workload)));
        }
        self.service_at(address, namespace).map(|state| Destination::Service(Arc::clone(state)))
    }

    /// The L4 policy with this name.
    pub fn authorization(&self, name: &ResourceName) -> Option<&Arc<Authorization>> {
        self.authorizations.get(name)
    }

    /// All L4 policies, in no order.
    pub fn authorizations(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.authorizations.iter().map(|(_, policy)| policy)
    }

    /// L4 policies that apply to every workload of a namespace, by name.
    pub fn namespace_authorizations(&self, namespace: &str) -> &[Arc<Authorization>] {
        self.namespace_authorizations.get(namespace).map_or(&[], |policies| policies.as_slice())
    }

    /// L4 policies that apply to every workload, by name.
    pub fn global_authorizations(&self) -> &[Arc<Authorization>] {
        &self.global_authorizations
    }

    /// The configuration of the L7 pipeline.
    pub fn l7(&self) -> &Arc<L7> {
        &self.l7
    }

    /// The mesh's settings.
    pub fn settings(&self) -> &Arc<MeshSettings> {
        &self.settings
    }

    /// The key under which an address of the mesh's own network is found.
    pub fn local(&self, address: SocketAddr) -> NetworkAddress {
        NetworkAddress { network: "".into(), address: address.ip().to_canonical() }
    }
}

fn rank(service: &Service, namespace: &str) -> (bool, bool, Arc<str>) {
    (*service.namespace != *namespace, !service.canonical, Arc::clone(&service.namespace))
}
