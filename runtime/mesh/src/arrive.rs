//! What an inbound tunnel is meant for: this workload's own port, or, where the workload takes tunnels meant for
//! others, that.

use crate::plan::is_instance;
use crate::{
    Destination, GatewayAddress, NetworkAddress, OWN_PORTS, Service, ServiceState, Snapshot, TunnelHandover,
    Workload,
};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What a CONNECT asks for: its authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArrivalTarget<'a> {
    /// An address.
    Address(SocketAddr),
    /// A service by its hostname, in lower case, and its port.
    Host(&'a str, u16),
}

/// Where a tunnel that has arrived goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The workload's own address, and the port to connect to. This is what policies decide on.
    pub destination: SocketAddr,
    /// What a PROXY protocol header must say before the tunnel's bytes: where the client wanted to go. The application
    /// then listens on loopback only, lest others send it such headers.
    pub announce: Option<SocketAddr>,
    /// The service asked for, where it was asked for by name.
    pub service: Option<Arc<Service>>,
}

/// Why a tunnel is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwelcome {
    /// It is meant for an address that is neither this workload's nor one of whom it is the waypoint.
    NotHere,
    /// It is meant for a service that is not known, or with which this workload has nothing to do.
    NotOurService,
    /// The service has no such port, or says no port of this workload for it.
    NoPort,
    /// The port belongs to the ztunnel.
    OwnPort,
    /// The service has no address by which it could be announced.
    NoVip,
}

impl fmt::Display for Unwelcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotHere => "destination is not this workload",
            Self::NotOurService => "destination is not a service of this workload",
            Self::NoPort => "the service has no such port here",
            Self::OwnPort => "port belongs to the ztunnel",
            Self::NoVip => "the service has no address to be announced by",
        })
    }
}

/// Decides what a tunnel to `workload`, which arrived at its address `local`, is meant for (ztunnel
/// `validate_destination` and `find_inbound_upstream`, in their order).
///
/// # Errors
/// When the tunnel must not be taken.
pub fn arrive(
    snapshot: &Snapshot,
    workload: &Workload,
    local: IpAddr,
    target: ArrivalTarget<'_>,
) -> Result<Arrival, Unwelcome> {
    let (port, service) = match target {
        ArrivalTarget::Address(address) => {
            if !is_for(snapshot, workload, local, address.ip().to_canonical()) {
                return Err(Unwelcome::NotHere);
            }
            (address.port(), None)
        }
        ArrivalTarget::Host(hostname, port) => {
            let state = snapshot.service_named(hostname, &workload.namespace);
            let state = state.filter(|state| is_service_for(snapshot, workload, &state.service));
            let state = state.ok_or(Unwelcome::NotOurService)?;
            let own = own_port(workload, state, port).ok_or(Unwelcome::NoPort)?;
            (own, Some((Arc::clone(&state.service), port)))
        }
    };
    let tunnel = workload.application_tunnel;
    let taken_at = tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port);
    if OWN_PORTS.contains(&port) || OWN_PORTS.contains(&taken_at) {
        return Err(Unwelcome::OwnPort);
    }
    let announced = tunnel.is_some_and(|tunnel| tunnel.handover == TunnelHandover::Proxy);
    let announce = match (announced, target, &service) {
        (false, _, _) => None,
        (true, ArrivalTarget::Address(address), _) => {
            Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
        }
        (true, ArrivalTarget::Host(..), None) => return Err(Unwelcome::NoVip),
        (true, ArrivalTarget::Host(..), Some((service, port))) => {
            let vip = announced_vip(service, &workload.network).ok_or(Unwelcome::NoVip)?;
            Some(SocketAddr::new(vip, *port))
        }
    };
    let service = service.map(|(service, _)| service);
    Ok(Arrival { destination: SocketAddr::new(local, taken_at), announce, service })
}

/// Whether an address is this workload's, or one of whom this workload is a waypoint. A workload with a tunnel of its
/// own is told where each one leads and decides itself.
fn is_for(snapshot: &Snapshot, workload: &Workload, local: IpAddr, wanted: IpAddr) -> bool {
    if wanted == local || workload.addresses.contains(&wanted) || workload.application_tunnel.is_some() {
        return true;
    }
    let address = NetworkAddress { network: Arc::clone(&workload.network), address: wanted };
    match snapshot.destination(&address, "") {
        Some(Destination::Service(state)) => is_waypoint_of(snapshot, workload, state.service.waypoints()),
        Some(Destination::Workload(other)) => is_waypoint_of(snapshot, workload, other.waypoint.iter()),
        None => false,
    }
}

fn is_service_for(snapshot: &Snapshot, workload: &Workload, service: &Service) -> bool {
    let is_of = |(key, _): &(crate::ResourceName, _)| {
        key.name == service.hostname && key.namespace == service.namespace
    };
    workload.application_tunnel.is_some()
        || workload.services.iter().any(is_of)
        || is_waypoint_of(snapshot, workload, service.waypoints())
}

fn is_waypoint_of<'a>(
    snapshot: &Snapshot,
    workload: &Workload,
    mut waypoints: impl Iterator<Item = &'a GatewayAddress>,
) -> bool {
    waypoints.any(|reference| is_instance(snapshot, reference, workload))
}

/// The workload's port behind a service's: as the workload itself says, ready or not, else as the service says.
fn own_port(workload: &Workload, state: &ServiceState, port: u16) -> Option<u16> {
    let key = state.service.key();
    let own = workload.services.iter().filter(|(service, _)| *service == key);
    let mut mapped = own.flat_map(|(_, ports)| ports).filter(|mapping| mapping.service_port == port);
    let mapped = mapped.next().map(|mapping| mapping.target_port).filter(|target| *target != 0);
    let shared = || state.service.port(port).map(|port| port.target_port).filter(|target| *target != 0);
    mapped.or_else(shared)
}

/// The VIP by which a service is announced: of the workload's own network first, and then of IPv4.
fn announced_vip(service: &Service, network: &str) -> Option<IpAddr> {
    let rank = |vip: &&NetworkAddress| match (*vip.network == *network, vip.address.is_ipv4()) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => 2,
    };
    service.vips.iter().min_by_key(rank).map(|vip| vip.address)
}

#[cfg(test)]
#[path = "arrive/tests.rs"]
mod tests;
