//! From the mesh to compiled sites: which destinations are ours, and what is done with traffic to each.
//!
//! This is the one place where built-in filters and plugins meet. A site is compiled again only when something it is
//! made of changed; connections find the new one at their next exchange.

use crate::keys::Keyring;
use crate::observers::Observers;
use crate::plugins::{PluginSource, Standing, absent};
use crate::scope::{Addressed, Own};
use arc_swap::ArcSwap;
use cairn_filter::{Chain, Position, Slot, sort_factories};
use cairn_http::{RouteTable, Site, SiteHandle};
use cairn_mesh::{
    AppProtocol, AuthorizationPolicy, CustomPolicy, FailStrategy, HttpRoute, JwtRule, MeshSettings,
    NetworkAddress, PluginKind, PluginMode, PluginPhase, RequestAuthentication, ResourceName, Service,
    Snapshot, TelemetryPlan, TextMatch, Unenforceable, WasmPlugin, Workload,
};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What traffic is addressed to, as a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// A service's VIP and port.
    Service(SocketAddr),
    /// A pod, whatever its port.
    Workload(IpAddr),
}

/// The destinations of this waypoint, for workers to look up.
#[derive(Default)]
pub struct Table {
    sites: HashMap<Key, SiteHandle>,
    /// VIPs and ports by hostname, for authorities that name a host.
    hostnames: HashMap<Arc<str>, IpAddr>,
}

impl Table {
    /// The site of an address: a service's port, or any port of a pod.
    pub fn at(&self, destination: SocketAddr) -> Option<&SiteHandle> {
        let pod = || self.sites.get(&Key::Workload(destination.ip()));
        self.sites.get(&Key::Service(destination)).or_else(pod)
    }

    /// The VIP of a service of ours.
    pub fn vip(&self, hostname: &str) -> Option<IpAddr> {
        self.hostnames.get(hostname).copied()
    }

    /// The destinations and the filters of each, in request order.
    pub fn list(&self) -> Vec<(String, Vec<String>)> {
        let view = |(key, handle): (&Key, &SiteHandle)| {
            let site = handle.load();
            let host = site.service.as_ref().map_or("", |service| &*service.hostname);
            let name = match key {
                Key::Service(address) => format!("{host}:{} ({address})", address.port()),
                Key::Workload(address) => format!("pod {address}"),
            };
            (name, site.chain.names().map(str::to_owned).collect())
        };
        let mut list: Vec<_> = self.sites.iter().map(view).collect();
        list.sort();
        list
    }
}

/// What a site is made of; equal parts make an equal site.
struct Parts {
    /// The same for all: what their tokens are verified with.
    keyring: Arc<Keyring>,
    service: Option<Arc<Service>>,
    workload: Option<Arc<Workload>>,
    viewpoint: Option<Arc<Workload>>,
    settings: Arc<MeshSettings>,
    authentications: Vec<Arc<RequestAuthentication>>,
    explain_to: Arc<[TextMatch]>,
    policies: Vec<Arc<AuthorizationPolicy>>,
    custom_policies: Vec<Arc<CustomPolicy>>,
    plugins: Vec<(Arc<WasmPlugin>, Standing)>,
    unenforceable: Vec<Arc<Unenforceable>>,
    routes: Vec<Arc<HttpRoute>>,
    telemetry: TelemetryPlan,
}

impl Parts {
    fn same(&self, other: &Self) -> bool {
        let standing = |a: &Standing, b: &Standing| match (a, b) {
            (Standing::Ready(a, _), Standing::Ready(b, _)) => Arc::ptr_eq(a, b),
            (Standing::Failed(a), Standing::Failed(b)) => a == b,
            (Standing::Loading, Standing::Loading) => true,
            _ => false,
        };
        self.service == other.service
            && self.workload == other.workload
            && self.viewpoint == other.viewpoint
            && self.settings == other.settings
            && same_all(&self.authentications, &other.authentications)
            && self.explain_to == other.explain_to
            && same_all(&self.policies, &other.policies)
            && same_all(&self.custom_policies, &other.custom_policies)
            && same_all(&self.unenforceable, &other.unenforceable)
            && same_all(&self.routes, &other.routes)
            && self.telemetry == other.telemetry
            && self.plugins.len() == other.plugins.len()
            && self.plugins.iter().zip(&other.plugins).all(|(a, b)| a.0 == b.0 && standing(&a.1, &b.1))
    }
}

fn same_all<T: PartialEq>(a: &[Arc<T>], b: &[Arc<T>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b) || a == b)
}

/// Compiles sites.
pub struct Sites {
    own: Own,
    keyring: Arc<Keyring>,
    /// `None`: nothing is observed, for there is no traffic.
    observers: Option<Observers>,
    known: HashMap<Key, (Parts, SiteHandle)>,
    /// Destinations that are no longer ours, while connections to them are open: what they still send is refused, and
    /// should the destination come back, they find its new site.
    left: HashMap<Key, SiteHandle>,
}

impl Sites {
    /// None yet.
    pub fn new(own: Own, keyring: Arc<Keyring>, observers: Observers) -> Self {
        Self { observers: Some(observers), ..Self::unobserved(own, keyring) }
    }

    /// None yet, for traffic that is only told about.
    pub fn unobserved(own: Own, keyring: Arc<Keyring>) -> Self {
        Self { own, keyring, observers: None, known: HashMap::new(), left: HashMap::new() }
    }

    /// Opens the files of access logs anew, for what rotates them has moved them away.
    pub fn reopen_logs(&self) {
        if let Some(observers) = &self.observers {
            observers.reopen_logs();
        }
    }

    /// Compiles what changed and returns the table of all. `plugins` starts to load what is new.
    pub fn update(&mut self, snapshot: &Snapshot, plugins: &mut dyn PluginSource) -> Table {
        let l7 = snapshot.l7();
        plugins.want(l7);
        let mut table = Table::default();
        let mut known = std::mem::take(&mut self.known);
        for (key, parts, port, protocol) in self.wanted(snapshot, plugins) {
            if let (Key::Service(address), Some(service)) = (key, &parts.service) {
                table.hostnames.insert(Arc::clone(&service.hostname), address.ip());
            }
            let handle = match known.remove(&key) {
                Some((before, handle)) if before.same(&parts) => handle,
                Some((_, handle)) => {
                    handle.store(Arc::new(self.compile(&parts, port, protocol)));
                    handle
                }
                None => match self.left.remove(&key) {
                    Some(handle) => {
                        handle.store(Arc::new(self.compile(&parts, port, protocol)));
                        handle
                    }
                    None => Arc::new(ArcSwap::from_pointee(self.compile(&parts, port, protocol))),
                },
            };
            table.sites.insert(key, Arc::clone(&handle));
            self.known.insert(key, (parts, handle));
        }
        for (key, (parts, handle)) in known {
            let before = handle.load_full();
            handle.store(Arc::new(closed(&parts, before.port, before.protocol)));
            self.left.insert(key, handle);
        }
        // The table that readers still hold is one owner; connections are the others.
        self.left.retain(|_, handle| Arc::strong_count(handle) > 1);
        table
    }

    /// The destinations that are ours, with what each is made of.
    fn wanted(&self, snapshot: &Snapshot, plugins: &dyn PluginSource) -> Vec<(Key, Parts, u16, AppProtocol)> {
        let mut wanted = Vec::new();
        for state in snapshot.services() {
            let service = &state.service;
            let ours = service.waypoint.as_ref().is_some_and(|at| self.own.is_named_by(snapshot, at));
            if !ours {
                continue;
            }
            for port in &service.ports {
                for vip in &service.vips {
                    let parts = self.parts(snapshot, plugins, Addressed::Service(service), port.port);
                    let parts = Parts { service: Some(Arc::clone(service)), ..parts };
                    let key = Key::Service(SocketAddr::new(vip.address, port.port));
                    wanted.push((key, parts, port.port, port.protocol));
                }
            }
        }
        for workload in snapshot.workloads() {
            let ours = workload.waypoint.as_ref().is_some_and(|at| self.own.is_named_by(snapshot, at));
            if !ours {
                continue;
            }
            for address in &workload.addresses {
                let parts = self.parts(snapshot, plugins, Addressed::Workload(workload), 0);
                let parts = Parts { workload: Some(Arc::clone(workload)), ..parts };
                wanted.push((Key::Workload(*address), parts, 0, AppProtocol::Unknown));
            }
        }
        wanted
    }

    fn parts(
        &self,
        snapshot: &Snapshot,
        plugins: &dyn PluginSource,
        addressed: Addressed<'_>,
        port: u16,
    ) -> Parts {
        let (l7, settings) = (snapshot.l7(), snapshot.settings());
        let root = &settings.root_namespace;
        let own = NetworkAddress { network: "".into(), address: self.own.address };
        let attached = self.own.plugins(l7, addressed, root).into_iter();
        Parts {
            keyring: Arc::clone(&self.keyring),
            service: None,
            workload: None,
            viewpoint: snapshot.workload_at(&own).cloned(),
            settings: Arc::clone(settings),
            authentications: self.own.authentications(l7, addressed, root),
            explain_to: Arc::clone(&l7.explain_to),
            policies: self.own.policies(l7, addressed, root),
            custom_policies: self.own.custom_policies(l7, addressed, root),
            plugins: attached
                .map(|plugin| (plugins.standing(&plugin.name), plugin))
                .map(|(s, p)| (p, s))
                .collect(),
            unenforceable: self.own.unenforceable(l7, addressed, root),
            routes: match addressed {
                Addressed::Service(service) => self.own.routes(l7, service, port),
                Addressed::Workload(_) => Vec::new(),
            },
            telemetry: TelemetryPlan::merge(&self.own.telemetry(l7, addressed, root), &settings.telemetry)
                .at(&l7.gateway_telemetry),
        }
    }
}

impl Sites {
    fn compile(&mut self, parts: &Parts, port: u16, protocol: AppProtocol) -> Site {
        report_blind(parts, port, protocol);
        let observer = self.observers.as_mut().and_then(|observers| observers.of(&parts.telemetry));
        Site { observer, ..compile(parts, port, protocol) }
    }
}

/// Says of plugins that are attached to a destination and see nothing of it.
fn report_blind(parts: &Parts, port: u16, protocol: AppProtocol) {
    let Some(service) = parts.service.as_ref().filter(|_| !carries_connections(protocol)) else { return };
    let is_blind = |plugin: &WasmPlugin| {
        plugin.kind == PluginKind::Network && (plugin.ports.is_empty() || plugin.ports.contains(&port))
    };
    for (plugin, _) in parts.plugins.iter().filter(|(plugin, _)| is_blind(plugin)) {
        tracing::warn!(plugin = %plugin.name, service = %service.hostname, port,
            "a plugin of type NETWORK sees no HTTP, which is all that the port is declared to carry");
    }
}

/// The site without its observer.
fn compile(parts: &Parts, port: u16, protocol: AppProtocol) -> Site {
    Site {
        chain: Chain::new(sort_factories(slots(parts, port, protocol))),
        routes: RouteTable::compile(
            &parts.routes,
            parts.service.as_deref(),
            port,
            &parts.settings.cluster_domain,
        ),
        service: parts.service.clone(),
        port,
        protocol,
        normalization: parts.settings.path_normalization,
        explain_to: Arc::clone(&parts.explain_to),
        viewpoint: parts.viewpoint.clone(),
        observer: None,
    }
}

/// The site of a destination that is no longer ours.
fn closed(parts: &Parts, port: u16, protocol: AppProtocol) -> Site {
    let namespace = match (&parts.service, &parts.workload) {
        (Some(service), _) => Arc::clone(&service.namespace),
        (None, Some(workload)) => Arc::clone(&workload.namespace),
        (None, None) => Arc::from(""),
    };
    let left = Unenforceable {
        what: "destination".into(),
        targets: Vec::new(),
        namespace,
        reason: "it is no longer one of this waypoint's".into(),
    };
    let filters = Slot {
        position: Position::Unenforceable,
        priority: 0,
        factory: cairn_builtin::unenforceable(&[Arc::new(left)]),
    };
    Site { chain: Chain::new(sort_factories(vec![filters])), ..compile(parts, port, protocol) }
}

/// A filter specification becomes a factory: the one `match` where built-ins and plugins meet.
fn slots(parts: &Parts, port: u16, protocol: AppProtocol) -> Vec<Slot> {
    let mut slots = Vec::new();
    let built_in = |position, factory| Slot { position, priority: 0, factory };
    let mut unenforceable = parts.unenforceable.clone();
    for (plugin, standing) in parts.plugins.iter().filter(|(plugin, _)| meets(plugin, port, protocol)) {
        let at_its_place = |factory| Slot {
            position: match plugin.phase {
                PluginPhase::Authn => Position::PluginAuthn,
                PluginPhase::Authz => Position::PluginAuthz,
                PluginPhase::Stats => Position::PluginStats,
                PluginPhase::Unspecified => Position::PluginUnspecified,
            },
            priority: plugin.priority,
            factory,
        };
        match standing {
            Standing::Ready(factory, _) => slots.push(at_its_place(Arc::clone(factory))),
            Standing::Loading | Standing::Failed(_) if !is_needed(plugin) => {}
            Standing::Loading | Standing::Failed(_) if plugin.kind == PluginKind::Network => {
                let reason = match standing {
                    Standing::Failed(reason) => reason,
                    _ => "it is still being loaded",
                };
                slots.push(at_its_place(absent(&plugin.name.to_string(), reason)));
            }
            Standing::Loading => unenforceable.push(not_running(plugin, "it is still being loaded")),
            Standing::Failed(reason) => unenforceable.push(not_running(plugin, reason)),
        }
    }
    if !unenforceable.is_empty() {
        slots.push(built_in(Position::Unenforceable, cairn_builtin::unenforceable(&unenforceable)));
    }
    let domains = parts.settings.trust_domains();
    let mut by_provider: BTreeMap<&str, Vec<Arc<CustomPolicy>>> = BTreeMap::new();
    for custom in &parts.custom_policies {
        by_provider.entry(&custom.provider).or_default().push(Arc::clone(custom));
    }
    for (name, policies) in by_provider {
        let mut providers = parts.settings.authorization_providers.iter();
        let provider = providers.find(|provider| *provider.name == *name).cloned();
        let factory = cairn_builtin::external_authorization(name, provider, &policies, &domains);
        slots.push(built_in(Position::Custom, factory));
    }
    if !parts.authentications.is_empty() {
        let keyring = &parts.keyring;
        let domain = &parts.settings.cluster_domain;
        let mut keys = |name: &ResourceName, rule: &JwtRule| keyring.source(name, rule, domain);
        let factory = cairn_builtin::authentication(&parts.authentications, &mut keys, &keyring.cache);
        slots.push(built_in(Position::Authentication, factory));
    }
    if !parts.policies.is_empty() {
        let factory = cairn_builtin::authorization(&parts.policies, &domains);
        slots.push(built_in(Position::Authorization, factory));
    }
    slots
}

/// Whether a plugin has to do with what a port carries. As in Istio, plugins of type NETWORK see connections without HTTP
/// only, and those for some ports none to a pod by its address.
fn meets(plugin: &WasmPlugin, port: u16, protocol: AppProtocol) -> bool {
    plugin.kind == PluginKind::Http
        || carries_connections(protocol) && (plugin.ports.is_empty() || plugin.ports.contains(&port))
}

fn carries_connections(protocol: AppProtocol) -> bool {
    match protocol {
        AppProtocol::Tcp | AppProtocol::Tls | AppProtocol::Unknown => true,
        AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => false,
    }
}

/// Whether traffic is refused that a plugin should have seen and has not.
fn is_needed(plugin: &WasmPlugin) -> bool {
    plugin.fail_strategy != FailStrategy::Open && plugin.mode == PluginMode::Enforce
}

fn not_running(plugin: &WasmPlugin, reason: &str) -> Arc<Unenforceable> {
    Arc::new(Unenforceable {
        what: format!("WasmPlugin {}", plugin.name).into(),
        targets: plugin.targets.clone(),
        namespace: Arc::clone(&plugin.name.namespace),
        reason: reason.into(),
    })
}

#[cfg(test)]
#[path = "sites/tests.rs"]
mod tests;
