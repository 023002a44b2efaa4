//! What the mesh answers to a question of a pod: services and their endpoints, by the names that Kubernetes' DNS gives
//! them (facts: Istio's ztunnel, DNS proxy). Pure: a snapshot in, records out.

use super::message::{A, AAAA, Record, SRV};
use cairn_mesh::{AppProtocol, Chooser, Endpoint, IpFamilies, ServicePort, ServiceState, Snapshot, Workload};
use std::net::IpAddr;
use std::sync::Arc;

/// Names longer than any of DNS are none of ours.
const NAME_BYTES_MAX: usize = 253;

/// The records for a question, each with its owner; `None` when the mesh does not know the name, and others are to be
/// asked. An empty answer says that the name has no records of this type.
pub fn lookup(
    snapshot: &Snapshot,
    client: &Workload,
    name: &str,
    kind: u16,
    random: &mut dyn Chooser,
) -> Option<Vec<(String, Record)>> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\\') {
        return None;
    }
    let scope = Scope { snapshot, client, domain: &snapshot.settings().cluster_domain };
    match kind {
        A | AAAA => scope.addresses(name, kind, random),
        SRV => scope.ports(name, random),
        _ => None,
    }
}

/// A name under which a service may be known.
struct Alias {
    name: String,
    /// What is left of the question without the search domain it ends in.
    stripped: Option<String>,
}

/// Who asks, and about what.
struct Scope<'a> {
    snapshot: &'a Snapshot,
    client: &'a Workload,
    domain: &'a str,
}

impl Scope<'_> {
    fn addresses(&self, name: &str, kind: u16, random: &mut dyn Chooser) -> Option<Vec<(String, Record)>> {
        for alias in self.aliases(name) {
            let Some((found, is_wildcard)) = self.find(&alias.name) else { continue };
            let addresses = match &found {
                Found::Service(state) => self.of_service(state, kind),
                Found::Pod(workload, families) => {
                    of_workload(workload, *families, kind).into_iter().collect()
                }
            };
            let stripped = alias.stripped.filter(|_| !is_wildcard);
            let owner = stripped.as_deref().unwrap_or(name);
            let mut records: Vec<(String, Record)> =
                shuffle(addresses, random).into_iter().map(|record| (owner.to_owned(), record)).collect();
            if owner != name && !records.is_empty() {
                records.insert(0, (name.to_owned(), Record::Cname(owner.to_owned())));
            }
            return Some(records);
        }
        None
    }

    /// `_port._protocol.service`. The control plane tells numbers of ports and what they carry, not their names: by one
    /// of these they are found, and other names are asked of others.
    fn ports(&self, name: &str, random: &mut dyn Chooser) -> Option<Vec<(String, Record)>> {
        let (port, rest) = name.strip_prefix('_')?.split_once("._")?;
        let (transport, service) = rest.split_once('.')?;
        if transport != "tcp" {
            return None;
        }
        for alias in self.aliases(service) {
            let Some((Found::Service(state), false)) = self.find(&alias.name) else { continue };
            let ports = state.service.ports.iter().filter(|known| is_called(known, port));
            let records: Vec<Record> = ports.flat_map(|port| targets(&state, port)).collect();
            if records.is_empty() {
                return None;
            }
            return Some(
                shuffle(records, random).into_iter().map(|record| (name.to_owned(), record)).collect(),
            );
        }
        None
    }

    /// The name itself, the names that Kubernetes' search list makes of it, and the same of what is left of it without a
    /// search domain.
    fn aliases(&self, name: &str) -> Vec<Alias> {
        let mut aliases: Vec<Alias> = Vec::new();
        let mut add = |name: String, stripped: Option<&str>| {
            if aliases.iter().all(|known| known.name != name) {
                aliases.push(Alias { name, stripped: stripped.map(str::to_owned) });
            }
        };
        add(name.to_owned(), None);
        for expanded in self.expanded(name) {
            add(expanded, None);
        }
        let (namespace, domain) = (&self.client.namespace, self.domain);
        for search in [format!(".{namespace}.svc.{domain}"), format!(".svc.{domain}"), format!(".{domain}")] {
            let Some(stripped) = name.strip_suffix(&search).filter(|rest| !rest.is_empty()) else { continue };
            add(stripped.to_owned(), Some(stripped));
            for expanded in self.expanded(stripped) {
                add(expanded, Some(stripped));
            }
        }
        aliases
    }

    /// A short name in full, by the number of its labels.
    fn expanded(&self, name: &str) -> Vec<String> {
        let (namespace, domain) = (&self.client.namespace, self.domain);
        let within = format!("{name}.{domain}");
        match name.split('.').count() {
            1 => vec![format!("{name}.{namespace}.svc.{domain}")],
            2 => vec![format!("{name}.svc.{domain}"), format!("{name}.{namespace}.svc.{domain}")],
            3 if name.ends_with(".svc") => vec![within, format!("{name}.svc.{domain}")],
            // A pod of a service: `pod.service.namespace`.
            3 => vec![format!("{name}.svc.{domain}")],
            4 if name.ends_with(".svc") => vec![within],
            _ => Vec::new(),
        }
    }

    /// What has this name: a service, a pod of a headless one, or a service whose name is a pattern, the closest.
    fn find(&self, name: &str) -> Option<(Found, bool)> {
        if let Some(state) = self.service(name) {
            return Some((Found::Service(state), false));
        }
        if let Some(pod) = self.pod(name) {
            return Some((pod, false));
        }
        let mut rest = name;
        while let Some((_, above)) = rest.split_once('.') {
            if let Some(state) = self.service(&format!("*.{above}")) {
                return Some((Found::Service(state), true));
            }
            rest = above;
        }
        None
    }

    /// A service that can be answered: it has an address, or is one of Kubernetes' whose pods are the answer.
    fn service(&self, name: &str) -> Option<Arc<ServiceState>> {
        let state = self.snapshot.service_named(name, &self.client.namespace)?;
        let is_kubernetes = name.strip_suffix(self.domain).is_some_and(|rest| rest.ends_with(".svc."));
        (!state.service.vips.is_empty() || is_kubernetes).then(|| Arc::clone(state))
    }

    /// `pod.service.namespace.svc.domain` of a headless service: by the pod's name, or its address with dashes.
    fn pod(&self, name: &str) -> Option<Found> {
        let (pod, service) = name.split_once('.')?;
        let state = self.service(service).filter(|state| state.service.vips.is_empty())?;
        let is_it = |endpoint: &&Endpoint| {
            let mut addresses = endpoint.workload.addresses.iter();
            *endpoint.workload.name == *pod
                || addresses.any(|address| address.to_string().replace(['.', ':'], "-") == pod)
        };
        let endpoint = state.endpoints.iter().find(is_it)?;
        Some(Found::Pod(Arc::clone(&endpoint.workload), state.service.ip_families))
    }

    /// A service's own addresses on the client's network, or those of its pods that are of its families.
    fn of_service(&self, state: &ServiceState, kind: u16) -> Vec<Record> {
        if state.service.vips.is_empty() {
            let families = state.service.ip_families;
            let pods = state.endpoints.iter().map(|endpoint| &endpoint.workload);
            return pods.filter_map(|workload| of_workload(workload, families, kind)).collect();
        }
        let near = state.service.vips.iter().filter(|vip| vip.network == self.client.network);
        near.filter_map(|vip| record(vip.address, kind)).collect()
    }
}

enum Found {
    Service(Arc<ServiceState>),
    /// And the families of the service that it is behind.
    Pod(Arc<Workload>, IpFamilies),
}

/// The first address of a workload of the family that is asked for, if its service is of that family.
fn of_workload(workload: &Workload, families: IpFamilies, kind: u16) -> Option<Record> {
    let mut addresses = workload.addresses.iter().filter(|address| families.accept(**address));
    addresses.find_map(|address| record(*address, kind))
}

fn record(address: IpAddr, kind: u16) -> Option<Record> {
    match (address, kind) {
        (IpAddr::V4(v4), A) => Some(Record::A(v4)),
        (IpAddr::V6(v6), AAAA) => Some(Record::Aaaa(v6)),
        _ => None,
    }
}

/// Whether a port goes by this name: its number, or what it carries.
fn is_called(port: &ServicePort, name: &str) -> bool {
    let carries = match port.protocol {
        AppProtocol::Http11 => "http",
        AppProtocol::Http2 => "http2",
        AppProtocol::Grpc => "grpc",
        AppProtocol::Tls => "tls",
        _ => "tcp",
    };
    name == carries || name.parse() == Ok(port.port)
}

/// Where a port of a service is: at the service itself, or at each of its pods.
fn targets(state: &ServiceState, port: &ServicePort) -> Vec<Record> {
    let service = &state.service;
    if !service.vips.is_empty() {
        return vec![Record::Srv(port.port, service.hostname.to_string())];
    }
    let of_pod = |endpoint: &Endpoint| {
        let target = endpoint.target_port(service, port.port)?;
        Some(Record::Srv(target, format!("{}.{}", endpoint.workload.name, service.hostname)))
    };
    state.endpoints.iter().filter_map(of_pod).collect()
}

/// Every order is as likely: clients take the first.
fn shuffle(mut records: Vec<Record>, random: &mut dyn Chooser) -> Vec<Record> {
    for last in (1..records.len()).rev() {
        let other = random.below(last as u64 + 1);
        records.swap(last, usize::try_from(other).unwrap_or(last));
    }
    records
}

#[cfg(test)]
#[path = "lookup_tests.rs"]
mod tests;
