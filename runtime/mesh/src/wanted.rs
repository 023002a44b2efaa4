//! What must be known before a connection can be decided about, for a mesh that is known only as far as it was asked for.

use crate::{
    ArrivalTarget, Destination, GatewayAddress, GatewayTarget, NetworkAddress, ResourceName, Snapshot,
    Workload,
};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Something to be asked for. Its text is how the workload API calls it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wanted {
    /// Who or what is at an address.
    Address(NetworkAddress),
    /// The service or the workload that is called so.
    Name(ResourceName),
    /// The workload with this uid.
    Workload(Arc<str>),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(at) => write!(f, "{}/{}", at.network, at.address),
            Self::Name(name) => name.fmt(f),
            Self::Workload(uid) => f.write_str(uid),
        }
    }
}

impl Wanted {
    /// Whether the mesh knows it.
    pub fn is_known(&self, snapshot: &Snapshot) -> bool {
        match self {
            Self::Address(at) => {
                !snapshot.workloads_at(at).is_empty() || snapshot.service_at(at, "").is_some()
            }
            Self::Name(name) => snapshot.service(name).is_some() || snapshot.workload_named(name).is_some(),
            Self::Workload(uid) => snapshot.workload(uid).is_some(),
        }
    }

    fn of(gateway: &GatewayAddress) -> Self {
        match &gateway.target {
            GatewayTarget::Address(at) => Self::Address(at.clone()),
            GatewayTarget::Hostname(name) => Self::Name(name.clone()),
        }
    }
}

/// What [`crate::plan()`] needs and the mesh does not know. Once that is known it may need more: the waypoint of a service
/// that nobody had asked for. Nothing is named twice.
pub fn wanted_outbound(snapshot: &Snapshot, source: &Workload, destination: SocketAddr) -> Vec<Wanted> {
    let at =
        NetworkAddress { network: Arc::clone(&source.network), address: destination.ip().to_canonical() };
    let elsewhere = |workload: &Workload| workload.network != source.network;
    let gateways: Vec<Wanted> = match snapshot.destination(&at, &source.namespace) {
        // An address that workloads share is known, though it is none of theirs.
        None => return unknown(snapshot, vec![Wanted::Address(at)]),
        Some(Destination::Workload(workload)) => {
            let gateway = workload.network_gateway.iter().filter(|_| elsewhere(&workload));
            workload.waypoint.iter().chain(gateway).map(Wanted::of).collect()
        }
        Some(Destination::Service(state)) => {
            let endpoints = state.endpoints.iter().map(|endpoint| &endpoint.workload);
            let beyond = endpoints.filter(|workload| elsewhere(workload));
            let gateways = beyond.filter_map(|workload| workload.network_gateway.as_ref());
            state.service.waypoints().chain(gateways).map(Wanted::of).collect()
        }
    };
    unknown(snapshot, gateways)
}

/// What [`crate::arrive()`] needs and the mesh does not know, of a tunnel to `workload` that arrived at its address `local`.
pub fn wanted_inbound(
    snapshot: &Snapshot,
    workload: &Workload,
    local: IpAddr,
    target: ArrivalTarget<'_>,
) -> Vec<Wanted> {
    let wanted = match target {
        ArrivalTarget::Address(address) => {
            let address = address.ip().to_canonical();
            if address == local || workload.addresses.contains(&address) {
                return Vec::new();
            }
            vec![Wanted::Address(NetworkAddress { network: Arc::clone(&workload.network), address })]
        }
        ArrivalTarget::Host(hostname, _) => {
            let keys = workload.services.iter().map(|(key, _)| key);
            keys.filter(|key| *key.name == *hostname).cloned().map(Wanted::Name).collect()
        }
    };
    unknown(snapshot, wanted)
}

fn unknown(snapshot: &Snapshot, mut wanted: Vec<Wanted>) -> Vec<Wanted> {
    wanted.retain(|wanted| !wanted.is_known(snapshot));
    wanted.sort();
    wanted.dedup();
    wanted
}

#[cfg(test)]
#[path = "wanted/tests.rs"]
mod tests;
