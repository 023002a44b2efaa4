//! One immutable state of the mesh, shared by all readers.

use crate::{
    Authorization, AuthorizationPolicy, CustomPolicy, Health, HealthPolicy, HttpRoute, MeshSettings,
    NetworkAddress, PortMapping, PullSecret, RequestAuthentication, ResourceKey, ResourceName, Service,
    Sharded, TelemetryPolicy, TextMatch, Unenforceable, WasmPlugin, Workload,
};
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
    /// Sums of the capacities up to each endpoint, when they differ; empty when all are 1.
    pub(crate) weights: Vec<u64>,
}

impl ServiceState {
    pub(crate) fn new(service: Arc<Service>, all: &BTreeMap<Arc<str>, Endpoint>) -> Self {
        let any = service.load_balancing.health == HealthPolicy::AllowAll;
        let usable = |endpoint: &&Endpoint| any || endpoint.workload.health == Health::Healthy;
        let endpoints: Vec<Endpoint> = all.values().filter(usable).cloned().collect();
        let weights = if endpoints.iter().all(|endpoint| endpoint.workload.capacity == 1) {
            Vec::new()
        } else {
            let sum = |sum: &mut u64, endpoint: &Endpoint| {
                *sum += u64::from(endpoint.workload.capacity);
                Some(*sum)
            };
            endpoints.iter().scan(0, sum).collect()
        };
        Self { service, endpoints, endpoints_known: all.len(), weights }
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
    pub(crate) authorizations: Sharded<ResourceName, Arc<Authorization>>,
    pub(crate) namespace_authorizations: Sharded<Arc<str>, Arc<Vec<Arc<Authorization>>>>,
    pub(crate) global_authorizations: Arc<Vec<Arc<Authorization>>>,
    /// L4 policies that were removed while a workload may still name them.
    pub(crate) gone: Arc<BTreeSet<ResourceName>>,
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
    /// one, then the first by name.
    pub fn service_at(&self, address: &NetworkAddress, namespace: &str) -> Option<&Arc<ServiceState>> {
        self.services_at(address).min_by_key(|state| rank(&state.service, namespace))
    }

    /// The service with this hostname as a client in `namespace` sees it.
    pub fn service_named(&self, hostname: &str, namespace: &str) -> Option<&Arc<ServiceState>> {
        let keys = self.hostnames.get(hostname)?;
        keys.iter()
            .filter_map(|key| self.services.get(key))
            .min_by_key(|state| rank(&state.service, namespace))
    }

    /// What `address` is for a client in `namespace`: a workload's own address wins over a VIP (ztunnel
    /// `find_address`).
    pub fn destination(&self, address: &NetworkAddress, namespace: &str) -> Option<Destination> {
        if let Some(workload) = self.workload_at(address) {
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
