//! The one writer of the mesh's state: applies changes, publishes snapshots.

use crate::snapshot::{Endpoint, ServiceState};
use crate::{
    Authorization, AuthorizationPolicy, CustomPolicy, HttpRoute, MeshSettings, NetworkAddress, NetworkBlock,
    PullSecret, RequestAuthentication, ResourceKey, ResourceName, Scope, Service, Snapshot, TelemetryPolicy,
    TextMatch, Unenforceable, WasmPlugin, Workload,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// One change of the mesh's state.
#[derive(Clone, Debug)]
pub enum Change {
    /// A workload is there, or changed.
    Workload(Workload),
    /// A workload is gone, by uid.
    WorkloadRemoved(Arc<str>),
    /// A service is there, or changed.
    Service(Service),
    /// A service is gone, by `namespace/hostname`.
    ServiceRemoved(ResourceName),
    /// An L4 policy is there, or changed.
    Authorization(Authorization),
    /// An L4 policy is gone.
    AuthorizationRemoved(ResourceName),
    /// The waypoint's own Gateway is known.
    Gateway(ResourceName),
    /// Principals of clients who are told what decided their requests.
    ExplainTo(Vec<TextMatch>),
    /// What the waypoint's own Gateway says of telemetry.
    GatewayTelemetry(crate::GatewayTelemetry),
    /// A route is there, or changed.
    Route(HttpRoute),
    /// An L7 policy is there, or changed.
    Policy(AuthorizationPolicy),
    /// Whose tokens are accepted is known, or changed.
    RequestAuthentication(RequestAuthentication),
    /// An L7 policy with action CUSTOM is there, or changed.
    CustomPolicy(CustomPolicy),
    /// A plugin is there, or changed.
    Plugin(WasmPlugin),
    /// Who we say that we are to registries is known, or changed.
    PullSecret(PullSecret),
    /// A Telemetry resource is there, or changed.
    Telemetry(TelemetryPolicy),
    /// A resource is attached that cannot be enforced. It replaces the enforceable form of the same name.
    Unenforceable(ResourceKey, Unenforceable),
    /// A route, policy, plugin, Telemetry or unenforceable resource is gone.
    L7Removed(ResourceKey),
    /// The mesh's settings changed.
    Settings(MeshSettings),
}

/// What applying changes left open.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Uids of workloads whose new list of policies names one that is not known. They keep their previous policies
    /// until it arrives or [`Store::give_up`] is called for them.
    pub waiting: Vec<Arc<str>>,
}

/// How many names of removed policies are kept.
const GONE_MAX: usize = 1024;

/// The writer. It holds the state it builds snapshots from; readers hold snapshots only.
#[derive(Default)]
pub struct Store {
    current: Snapshot,
    /// Endpoints by service, known before or after the service itself.
    endpoints: HashMap<ResourceName, BTreeMap<Arc<str>, Endpoint>>,
    /// Lists of policies that wait for one to arrive, by workload.
    deferred: HashMap<Arc<str>, Vec<ResourceName>>,
}

impl Store {
    /// An empty mesh.
    pub fn new() -> Self {
        Self::default()
    }

    /// The state now, for readers to keep.
    pub fn snapshot(&self) -> Snapshot {
        self.current.clone()
    }

    /// The state now.
    pub fn current(&self) -> &Snapshot {
        &self.current
    }

    /// Applies changes in order, those of L4 policies before all others, so that a workload that arrives with its
    /// policy never waits.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Applied {
        let (policies, others): (Vec<Change>, Vec<Change>) = changes.into_iter().partition(is_authorization);
        let mut touched = BTreeSet::new();
        let policies_changed = !policies.is_empty();
        for change in policies.into_iter().chain(others) {
            self.apply_one(change, &mut touched);
        }
        if policies_changed {
            self.retry_deferred(&mut touched);
        }
        for key in touched {
            self.rebuild_service(&key);
        }
        self.current.generation += 1;
        let mut waiting: Vec<_> = self.deferred.keys().cloned().collect();
        waiting.sort();
        Applied { waiting }
    }

    /// Stops waiting for the policies of these workloads: their new lists take effect, and what names an unknown
    /// policy is denied.
    pub fn give_up(&mut self, uids: &[Arc<str>]) {
        let mut touched = BTreeSet::new();
        for uid in uids {
            if let Some(policies) = self.deferred.remove(uid) {
                self.set_policies(uid, policies, &mut touched);
            }
        }
        for key in touched {
            self.rebuild_service(&key);
        }
        self.current.generation += 1;
    }

    fn apply_one(&mut self, change: Change, touched: &mut BTreeSet<ResourceName>) {
        match change {
            Change::Workload(workload) => self.put_workload(workload, touched),
            Change::WorkloadRemoved(uid) => {
                self.deferred.remove(&uid);
                self.take_workload(&uid, touched);
            }
            Change::Service(service) => self.put_service(service, touched),
            Change::ServiceRemoved(key) => self.remove_service(&key),
            Change::Authorization(policy) => self.put_authorization(policy),
            Change::AuthorizationRemoved(name) => {
                self.remove_authorization(&name);
                self.remember_gone(name);
            }
            Change::Gateway(name) => Arc::make_mut(&mut self.current.l7).gateway = Some(name),
            Change::ExplainTo(principals) => {
                Arc::make_mut(&mut self.current.l7).explain_to = principals.into();
            }
            Change::GatewayTelemetry(said) => {
                Arc::make_mut(&mut self.current.l7).gateway_telemetry = Arc::new(said);
            }
            Change::Route(route) => {
                let key = route.key();
                self.l7_without(key.clone()).routes.insert(key, Arc::new(route));
            }
            Change::Policy(policy) => {
                let kind = crate::Kind::AuthorizationPolicy;
                let l7 = self.l7_without(ResourceKey { kind, name: policy.name.clone() });
                l7.policies.insert(policy.name.clone(), Arc::new(policy));
            }
            Change::RequestAuthentication(authentication) => {
                let kind = crate::Kind::RequestAuthentication;
                let l7 = self.l7_without(ResourceKey { kind, name: authentication.name.clone() });
                l7.authentications.insert(authentication.name.clone(), Arc::new(authentication));
            }
            Change::CustomPolicy(custom) => {
                let kind = crate::Kind::AuthorizationPolicy;
                let name = custom.policy.name.clone();
                let l7 = self.l7_without(ResourceKey { kind, name: name.clone() });
                l7.custom_policies.insert(name, Arc::new(custom));
            }
            Change::Plugin(plugin) => {
                let l7 =
                    self.l7_without(ResourceKey { kind: crate::Kind::WasmPlugin, name: plugin.name.clone() });
                l7.plugins.insert(plugin.name.clone(), Arc::new(plugin));
            }
            Change::PullSecret(secret) => {
                let l7 = Arc::make_mut(&mut self.current.l7);
                l7.pull_secrets.insert(secret.name.clone(), Arc::new(secret));
            }
            Change::Telemetry(policy) => {
                let name = policy.name.clone();
                let l7 = self.l7_without(ResourceKey { kind: crate::Kind::Telemetry, name: name.clone() });
                l7.telemetry.insert(name, Arc::new(policy));
            }
            Change::Unenforceable(key, what) => {
                self.l7_without(key.clone()).unenforceable.insert(key, Arc::new(what));
            }
            Change::L7Removed(key) => {
                self.l7_without(key);
            }
            Change::Settings(settings) => {
                // Policies mean the mesh's trust domain and its aliases.
                self.current.policies += 1;
                self.current.settings = Arc::new(settings);
            }
        }
    }

    /// The L7 configuration, with every form of `key` removed.
    fn l7_without(&mut self, key: ResourceKey) -> &mut crate::L7 {
        let l7 = Arc::make_mut(&mut self.current.l7);
        match key.kind {
            crate::Kind::HttpRoute | crate::Kind::VirtualService => drop(l7.routes.remove(&key)),
            crate::Kind::AuthorizationPolicy => {
                l7.policies.remove(&key.name);
                l7.custom_policies.remove(&key.name);
            }
            crate::Kind::RequestAuthentication => drop(l7.authentications.remove(&key.name)),
            crate::Kind::WasmPlugin => drop(l7.plugins.remove(&key.name)),
            crate::Kind::PullSecret => drop(l7.pull_secrets.remove(&key.name)),
            crate::Kind::Telemetry => drop(l7.telemetry.remove(&key.name)),
            crate::Kind::Gateway if l7.gateway.as_ref() == Some(&key.name) => {
                (l7.gateway, l7.explain_to) = (None, Arc::default());
                l7.gateway_telemetry = Arc::default();
            }
            _ => {}
        }
        l7.unenforceable.remove(&key);
        l7
    }

    fn put_workload(&mut self, mut workload: Workload, touched: &mut BTreeSet<ResourceName>) {
        let known = |name: &ResourceName| self.current.authorizations.get(name).is_some();
        let all_known = workload.authorization_policies.iter().all(known);
        for name in &workload.authorization_policies {
            if self.current.gone.contains(name) {
                // It is named anew, so it will come back.
                self.current.policies += 1;
                Arc::make_mut(&mut self.current.gone).remove(name);
            }
        }
        let previous = self.take_workload(&workload.uid, touched);
        self.deferred.remove(&workload.uid);
        if let (false, Some(previous)) = (all_known, previous) {
            let wanted = std::mem::replace(
                &mut workload.authorization_policies,
                previous.authorization_policies.clone(),
            );
            self.deferred.insert(Arc::clone(&workload.uid), wanted);
        } else if !all_known {
            self.deferred.insert(Arc::clone(&workload.uid), workload.authorization_policies.clone());
        }
        self.insert_workload(Arc::new(workload), touched);
    }

    fn insert_workload(&mut self, workload: Arc<Workload>, touched: &mut BTreeSet<ResourceName>) {
        for address in workload.network_addresses() {
            let mut at = self.current.addresses.get(&address).cloned().unwrap_or_default();
            if let Err(place) = at.binary_search_by(|other| other.uid.cmp(&workload.uid)) {
                at.insert(place, Arc::clone(&workload));
            }
            self.current.addresses.insert(address, at);
        }
        if let Some(name) = dns_name(&workload) {
            let mut called = self.current.named.get(&name).cloned().unwrap_or_default();
            if let Err(place) = called.binary_search_by(|other| other.uid.cmp(&workload.uid)) {
                called.insert(place, Arc::clone(&workload));
            }
            self.current.named.insert(name, called);
        }
        for (key, ports) in &workload.services {
            let endpoint = Endpoint { workload: Arc::clone(&workload), ports: ports.as_slice().into() };
            self.endpoints.entry(key.clone()).or_default().insert(Arc::clone(&workload.uid), endpoint);
            touched.insert(key.clone());
        }
        self.current.workloads.insert(Arc::clone(&workload.uid), workload);
    }

    fn take_workload(&mut self, uid: &str, touched: &mut BTreeSet<ResourceName>) -> Option<Arc<Workload>> {
        let workload = self.current.workloads.remove(uid)?;
        for address in workload.network_addresses() {
            let mut at = self.current.addresses.get(&address).cloned().unwrap_or_default();
            at.retain(|other| other.uid != workload.uid);
            if at.is_empty() {
                self.current.addresses.remove(&address);
            } else {
                self.current.addresses.insert(address, at);
            }
        }
        if let Some(name) = dns_name(&workload) {
            let mut called = self.current.named.get(&name).cloned().unwrap_or_default();
            called.retain(|other| other.uid != workload.uid);
            if called.is_empty() {
                self.current.named.remove(&name);
            } else {
                self.current.named.insert(name, called);
            }
        }
        for (key, _) in &workload.services {
            if let Some(endpoints) = self.endpoints.get_mut(key) {
                endpoints.remove(uid);
                if endpoints.is_empty() {
                    self.endpoints.remove(key);
                }
            }
            touched.insert(key.clone());
        }
        Some(workload)
    }

    fn put_service(&mut self, service: Service, touched: &mut BTreeSet<ResourceName>) {
        let key = service.key();
        self.remove_service(&key);
        add_key(&mut self.current.hostnames, Arc::clone(&service.hostname), &key);
        for vip in &service.vips {
            add_key(&mut self.current.vips, vip.clone(), &key);
        }
        for block in service.blocks.iter().collect::<BTreeSet<_>>() {
            add_key::<NetworkBlock>(&mut self.current.blocks, block.clone(), &key);
            let lengths = Arc::make_mut(&mut self.current.block_lengths);
            *lengths.entry(block.block.prefix_len()).or_default() += 1;
        }
        let state = ServiceState::new(Arc::new(service), &BTreeMap::new());
        self.current.services.insert(key.clone(), Arc::new(state));
        touched.insert(key);
    }

    fn remove_service(&mut self, key: &ResourceName) {
        let Some(state) = self.current.services.remove(key) else { return };
        remove_key(&mut self.current.hostnames, &state.service.hostname, key);
        for vip in &state.service.vips {
            remove_key::<NetworkAddress>(&mut self.current.vips, vip, key);
        }
        for block in state.service.blocks.iter().collect::<BTreeSet<_>>() {
            remove_key::<NetworkBlock>(&mut self.current.blocks, block, key);
            let (length, lengths) =
                (block.block.prefix_len(), Arc::make_mut(&mut self.current.block_lengths));
            match lengths.get_mut(&length) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(lengths.remove(&length)),
            }
        }
    }

    fn rebuild_service(&mut self, key: &ResourceName) {
        let Some(state) = self.current.services.get(key) else { return };
        let none = BTreeMap::new();
        let endpoints = self.endpoints.get(key).unwrap_or(&none);
        let state = ServiceState::new(Arc::clone(&state.service), endpoints);
        self.current.services.insert(key.clone(), Arc::new(state));
    }

    fn put_authorization(&mut self, policy: Authorization) {
        self.current.policies += 1;
        self.remove_authorization(&policy.name);
        if self.current.gone.contains(&policy.name) {
            Arc::make_mut(&mut self.current.gone).remove(&policy.name);
        }
        let policy = Arc::new(policy);
        let add = |list: &mut Vec<Arc<Authorization>>| {
            list.push(Arc::clone(&policy));
            list.sort_by(|a, b| a.name.cmp(&b.name));
        };
        match policy.scope {
            Scope::Global => add(Arc::make_mut(&mut self.current.global_authorizations)),
            Scope::Namespace => {
                let namespace = &policy.name.namespace;
                let scoped = &mut self.current.namespace_authorizations;
                let mut list = scoped.get(&**namespace).cloned().unwrap_or_default();
                add(Arc::make_mut(&mut list));
                scoped.insert(Arc::clone(namespace), list);
            }
            Scope::WorkloadSelector => {}
        }
        self.current.authorizations.insert(policy.name.clone(), policy);
    }

    fn remove_authorization(&mut self, name: &ResourceName) {
        self.current.policies += 1;
        let Some(policy) = self.current.authorizations.remove(name) else { return };
        match policy.scope {
            Scope::Global => {
                Arc::make_mut(&mut self.current.global_authorizations).retain(|other| other.name != *name);
            }
            Scope::Namespace => {
                let scoped = &mut self.current.namespace_authorizations;
                let mut list = scoped.get(&*name.namespace).cloned().unwrap_or_default();
                Arc::make_mut(&mut list).retain(|other| other.name != *name);
                if list.is_empty() {
                    scoped.remove(&*name.namespace);
                } else {
                    scoped.insert(Arc::clone(&name.namespace), list);
                }
            }
            Scope::WorkloadSelector => {}
        }
    }

    /// A workload may name a policy for a moment longer than there is one. What was taken away on purpose denies
    /// nothing; past the bound, the first names by order are forgotten, and then deny.
    fn remember_gone(&mut self, name: ResourceName) {
        self.current.policies += 1;
        let gone = Arc::make_mut(&mut self.current.gone);
        gone.insert(name);
        while gone.len() > GONE_MAX {
            gone.pop_first();
        }
    }

    fn retry_deferred(&mut self, touched: &mut BTreeSet<ResourceName>) {
        let known = |name: &ResourceName| self.current.authorizations.get(name).is_some();
        let ready: Vec<Arc<str>> = self
            .deferred
            .iter()
            .filter(|(_, policies)| policies.iter().all(known))
            .map(|(uid, _)| Arc::clone(uid))
            .collect();
        for uid in ready {
            if let Some(policies) = self.deferred.remove(&uid) {
                self.set_policies(&uid, policies, touched);
            }
        }
    }

    fn set_policies(&mut self, uid: &str, policies: Vec<ResourceName>, touched: &mut BTreeSet<ResourceName>) {
        let Some(workload) = self.take_workload(uid, touched) else { return };
        let workload = Workload { authorization_policies: policies, ..(*workload).clone() };
        self.insert_workload(Arc::new(workload), touched);
    }
}

/// By what name DNS knows a workload's addresses, if it does.
fn dns_name(workload: &Workload) -> Option<ResourceName> {
    let name =
        || ResourceName { namespace: Arc::clone(&workload.namespace), name: Arc::clone(&workload.hostname) };
    (!workload.hostname.is_empty()).then(name)
}

fn is_authorization(change: &Change) -> bool {
    matches!(change, Change::Authorization(_) | Change::AuthorizationRemoved(_))
}

fn add_key<K>(map: &mut crate::Sharded<K, Vec<ResourceName>>, at: K, key: &ResourceName)
where
    K: Eq + std::hash::Hash + Clone,
{
    let mut keys = map.get(&at).cloned().unwrap_or_default();
    if let Err(place) = keys.binary_search(key) {
        keys.insert(place, key.clone());
        map.insert(at, keys);
    }
}

fn remove_key<K>(map: &mut crate::Sharded<K, Vec<ResourceName>>, at: &K, key: &ResourceName)
where
    K: Eq + std::hash::Hash + Clone,
{
    let mut keys = map.get(at).cloned().unwrap_or_default();
    keys.retain(|other| other != key);
    if keys.is_empty() {
        map.remove(at);
    } else {
        map.insert(at.clone(), keys);
    }
}

#[cfg(test)]
#[path = "store/tests.rs"]
mod tests;
