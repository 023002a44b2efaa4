//! What our server serves at one moment: every resource in its wire form, and the differences between two moments.

use crate::authorization::authorization_to_proto;
use crate::tokens::Role;
use crate::workload::{service_to_proto, workload_to_proto};
use crate::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Object};
use cairn_mesh::{Authorization, Identity, NetworkAddress, ResourceName, Service, Workload};
use cairn_proto::workload as wire;
use cairn_proto::{discovery, workload::address};
use prost::Message;
use prost_types::Any;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use tracing::warn;

/// Everything to be served.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// Workloads, for everyone.
    pub workloads: Vec<Workload>,
    /// Services, for everyone.
    pub services: Vec<Service>,
    /// L4 policies, for everyone.
    pub authorizations: Vec<Authorization>,
    /// Objects, each for the waypoints that it names.
    pub objects: Vec<Object>,
}

/// The resources of one type by name. Unchanged ones are shared between generations.
pub(crate) type Resources = BTreeMap<Arc<str>, Arc<Entry>>;

/// One resource in its wire form.
#[derive(Debug, PartialEq)]
pub(crate) struct Entry {
    /// A hash of the content: the same after a restart.
    version: String,
    content: Any,
    /// `None`: everyone's.
    gateways: Option<Vec<ResourceName>>,
}

/// One generation.
#[derive(Default)]
pub(crate) struct Published {
    /// Counts from 1; 0 is before the first.
    pub(crate) generation: u64,
    types: BTreeMap<Arc<str>, Arc<Resources>>,
    /// The nodes on which each identity runs.
    nodes: HashMap<Identity, HashSet<Arc<str>>>,
    /// What else workloads and services are called: `network/address`.
    aliases: Names,
    /// The workloads behind each service, by `namespace/hostname`.
    endpoints: Names,
}

impl Published {
    /// The generation after this one.
    pub(crate) fn next(&self, served: Served) -> Self {
        let mut nodes: HashMap<Identity, HashSet<Arc<str>>> = HashMap::new();
        let mut types: BTreeMap<Arc<str>, Resources> = BTreeMap::new();
        let (mut aliases, mut endpoints) = (Names::new(), Names::new());
        let mut add = |type_url: &str, name: String, content: Any, gateways| {
            let entry = Entry { version: version(&content), content, gateways };
            types.entry(type_url.into()).or_default().insert(name.into(), Arc::new(entry));
        };
        for workload in &served.workloads {
            let message = address::Type::Workload(workload_to_proto(workload));
            add(ADDRESS_TYPE, workload.uid.to_string(), address(message), None);
            nodes.entry(workload.identity.clone()).or_default().insert(Arc::clone(&workload.node));
            for address in workload.network_addresses() {
                aliases.entry(alias(&address)).or_default().push(Arc::clone(&workload.uid));
            }
            for (service, _) in &workload.services {
                endpoints.entry(service.to_string().into()).or_default().push(Arc::clone(&workload.uid));
            }
        }
        for service in &served.services {
            let message = address::Type::Service(service_to_proto(service));
            let key: Arc<str> = service.key().to_string().into();
            add(ADDRESS_TYPE, key.to_string(), address(message), None);
            for vip in &service.vips {
                aliases.entry(alias(vip)).or_default().push(Arc::clone(&key));
            }
        }
        for policy in &served.authorizations {
            let Some(message) = authorization_to_proto(policy) else {
                warn!(policy = %policy.name, "an AUDIT policy has no L4 form: left out");
                continue;
            };
            let content = Any { type_url: AUTHORIZATION_TYPE.to_owned(), value: message.encode_to_vec() };
            add(AUTHORIZATION_TYPE, policy.name.to_string(), content, None);
        }
        for object in served.objects {
            add(&object.type_url(), object.name.to_string(), object.to_any(), Some(object.gateways.clone()));
        }
        let types = types.into_iter().map(|(type_url, resources)| {
            let resources = self.share(&type_url, resources);
            (type_url, resources)
        });
        Self { generation: self.generation + 1, types: types.collect(), nodes, aliases, endpoints }
    }

    /// The names of the workloads and services that one asks for by a name or by `network/address`; with a service come
    /// the workloads behind it. None when there is nothing of that name.
    pub(crate) fn look_up(&self, asked: &str) -> Vec<Arc<str>> {
        let Some(all) = self.types.get(ADDRESS_TYPE) else { return Vec::new() };
        let own = all.get_key_value(asked).map(|(name, _)| name);
        let mut found: Vec<Arc<str>> =
            own.into_iter().chain(self.aliases.get(asked).into_iter().flatten()).cloned().collect();
        let behind = |name: &Arc<str>| self.endpoints.get(name).into_iter().flatten();
        let endpoints: Vec<Arc<str>> = found.iter().flat_map(behind).cloned().collect();
        found.extend(endpoints);
        found
    }

    /// The workloads and services that one asks for who asks for these names.
    pub(crate) fn named<'a>(&self, asked: impl Iterator<Item = &'a String>) -> Arc<Resources> {
        let all = self.resources(ADDRESS_TYPE);
        let found = asked.flat_map(|asked| self.look_up(asked));
        let entries = found.filter_map(|name| all.get_key_value(&name));
        Arc::new(entries.map(|(name, entry)| (Arc::clone(name), Arc::clone(entry))).collect())
    }

    /// Keeps the allocations of this generation for what is the same in the next, so that comparing them is cheap.
    fn share(&self, type_url: &str, mut resources: Resources) -> Arc<Resources> {
        let Some(before) = self.types.get(type_url) else { return Arc::new(resources) };
        let mut same = before.len() == resources.len();
        for (name, entry) in &mut resources {
            match before.get(name) {
                Some(known) if known == entry => *entry = Arc::clone(known),
                _ => same = false,
            }
        }
        if same { Arc::clone(before) } else { Arc::new(resources) }
    }

    /// The resources of one type; none if the type is not served.
    pub(crate) fn resources(&self, type_url: &str) -> Arc<Resources> {
        self.types.get(type_url).cloned().unwrap_or_default()
    }

    /// Whether a workload with this identity runs on this node.
    pub(crate) fn runs_on(&self, identity: &Identity, node: &str) -> bool {
        self.nodes.get(identity).is_some_and(|nodes| nodes.contains(node))
    }
}

/// Names by another name.
type Names = HashMap<Arc<str>, Vec<Arc<str>>>;

/// How an address is asked for.
fn alias(address: &NetworkAddress) -> Arc<str> {
    format!("{}/{}", address.network, address.address).into()
}

fn address(message: address::Type) -> Any {
    let address = wire::Address { r#type: Some(message) };
    Any { type_url: ADDRESS_TYPE.to_owned(), value: address.encode_to_vec() }
}

/// 128 bits of SHA-256, in hexadecimal: maps are sorted on the wire, so equal resources have equal versions.
fn version(content: &Any) -> String {
    let digest = Sha256::digest(&content.value);
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// What a client holds of one type.
pub(crate) enum Held {
    /// What it said at the beginning, by name and version.
    Claimed(BTreeMap<String, String>),
    /// What it has been sent.
    Sent(Arc<Resources>),
}

/// What a client has to be told of one type.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Difference {
    pub(crate) put: Vec<discovery::Resource>,
    pub(crate) removed: Vec<String>,
}

/// What separates what a client holds from `now`, as far as its role may see.
pub(crate) fn difference(held: &Held, now: &Arc<Resources>, role: &Role) -> Difference {
    let mut difference = Difference::default();
    match held {
        Held::Sent(before) if Arc::ptr_eq(before, now) => {}
        Held::Sent(before) => {
            let visible = |name: &Arc<str>| before.get(name).filter(|entry| entry.is_for(role));
            for (name, entry) in now.iter().filter(|(_, entry)| entry.is_for(role)) {
                if visible(name).is_none_or(|known| known.version != entry.version) {
                    difference.put.push(entry.to_resource(name));
                }
            }
            let gone = |name: &Arc<str>| now.get(name).is_none_or(|entry| !entry.is_for(role));
            let removed = before.iter().filter(|(name, entry)| entry.is_for(role) && gone(name));
            difference.removed = removed.map(|(name, _)| name.to_string()).collect();
        }
        Held::Claimed(claimed) => {
            for (name, entry) in now.iter().filter(|(_, entry)| entry.is_for(role)) {
                if claimed.get(&**name) != Some(&entry.version) {
                    difference.put.push(entry.to_resource(name));
                }
            }
            let gone = |name: &str| now.get(name).is_none_or(|entry| !entry.is_for(role));
            difference.removed = claimed.keys().filter(|name| gone(name)).cloned().collect();
        }
    }
    difference
}

impl Entry {
    fn is_for(&self, role: &Role) -> bool {
        match (&self.gateways, role) {
            (None, _) => true,
            (Some(gateways), Role::Waypoint { gateway, .. }) => gateways.contains(gateway),
            (Some(_), Role::Ztunnel { .. }) => false,
        }
    }

    pub(crate) fn to_resource(&self, name: &str) -> discovery::Resource {
        discovery::Resource {
            version: self.version.clone(),
            resource: Some(self.content.clone()),
            name: name.to_owned(),
            aliases: Vec::new(),
        }
    }
}

#[cfg(test)]
#[path = "published/tests.rs"]
mod tests;
