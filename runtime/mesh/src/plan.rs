//! Where an outbound connection goes next.

use crate::{
    Destination, GatewayAddress, GatewayTarget, Identity, LoadBalancingMode, NetworkAddress, Random,
    ResourceName, Service, Snapshot, TunnelProtocol, Workload, pick,
};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The port on which a meshed workload's ztunnel accepts HBONE.
pub const HBONE_PORT: u16 = 15008;

/// A tunnel to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Where to connect.
    pub connect: SocketAddr,
    /// The CONNECT authority: what the other end is asked to reach.
    pub authority: SocketAddr,
    /// Identities one of which the other end must prove.
    pub identities: Vec<Identity>,
}

/// Where an outbound connection goes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Through a waypoint.
    Waypoint {
        /// The tunnel to it.
        tunnel: Tunnel,
        /// The waypoint.
        waypoint: Arc<Workload>,
        /// The service addressed, if any.
        service: Option<Arc<Service>>,
        /// The workload addressed, when it is one that has the waypoint.
        workload: Option<Arc<Workload>>,
    },
    /// Straight to the workload's ztunnel.
    Direct {
        /// The tunnel to it.
        tunnel: Tunnel,
        /// The workload.
        workload: Arc<Workload>,
        /// The service addressed, if any.
        service: Option<Arc<Service>>,
    },
    /// Plain TCP to a workload or address outside the mesh.
    Plain {
        /// Where to connect.
        connect: SocketAddr,
        /// The workload, if known.
        workload: Option<Arc<Workload>>,
        /// The service addressed, if any.
        service: Option<Arc<Service>>,
    },
    /// Nowhere.
    Refuse(Refusal),
}

/// Why a connection goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The service has no endpoint that is ready and serves the port.
    NoEndpoint {
        /// The service.
        service: Arc<Service>,
        /// The port asked for.
        port: u16,
    },
    /// The destination has a waypoint that cannot be found or has no ready endpoint. Going past it would go past its
    /// policies.
    NoWaypoint(String),
    /// The workload has no address that can be reached.
    NoAddress(Arc<str>),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEndpoint { service, port } => {
                write!(f, "no healthy upstream: {} has no ready endpoint for port {port}", service.hostname)
            }
            Self::NoWaypoint(reference) => write!(f, "waypoint {reference} has no ready endpoint"),
            Self::NoAddress(uid) => write!(f, "workload {uid} has no address that can be reached"),
        }
    }
}

/// Decides where a connection from `source` to `destination` goes next (ztunnel `build_request`, in its order; ours
/// knows one network).
pub fn plan(
    snapshot: &Snapshot,
    source: &Workload,
    destination: SocketAddr,
    random: &mut dyn Random,
) -> Plan {
    let address =
        NetworkAddress { network: Arc::clone(&source.network), address: destination.ip().to_canonical() };
    match snapshot.destination(&address, &source.namespace) {
        Some(Destination::Service(state)) => {
            let service = Some(Arc::clone(&state.service));
            if let Some(waypoint) = &state.service.waypoint {
                return through(snapshot, waypoint, source, destination, service, None, random);
            }
            if state.service.load_balancing.mode == LoadBalancingMode::Passthrough {
                return Plan::Plain { connect: destination, workload: None, service };
            }
            match pick(&state, destination.port(), Some(source), random) {
                Some((endpoint, port)) => {
                    let names = &state.service.subject_alt_names;
                    direct(&endpoint.workload, port, destination.ip(), service, names)
                }
                None => Plan::Refuse(Refusal::NoEndpoint {
                    service: Arc::clone(&state.service),
                    port: destination.port(),
                }),
            }
        }
        Some(Destination::Workload(workload)) => match &workload.waypoint {
            Some(waypoint) if !is_waypoint_itself(snapshot, waypoint, source) => {
                let workload = Some(workload.clone());
                through(snapshot, waypoint, source, destination, None, workload, random)
            }
            _ => direct(&workload, destination.port(), destination.ip(), None, &[]),
        },
        None => Plan::Plain { connect: destination, workload: None, service: None },
    }
}

fn through(
    snapshot: &Snapshot,
    reference: &GatewayAddress,
    source: &Workload,
    authority: SocketAddr,
    service: Option<Arc<Service>>,
    workload: Option<Arc<Workload>>,
    random: &mut dyn Random,
) -> Plan {
    match resolve_waypoint(snapshot, reference, Some(source), random) {
        Some((waypoint, connect, mut names)) => {
            names.insert(0, waypoint.identity.clone());
            let tunnel = Tunnel { connect, authority, identities: names };
            Plan::Waypoint { tunnel, waypoint, service, workload }
        }
        None => Plan::Refuse(Refusal::NoWaypoint(reference.to_string())),
    }
}

fn direct(
    workload: &Arc<Workload>,
    port: u16,
    wanted: IpAddr,
    service: Option<Arc<Service>>,
    names: &[Identity],
) -> Plan {
    let Some(ip) = address_of(workload, wanted) else {
        return Plan::Refuse(Refusal::NoAddress(Arc::clone(&workload.uid)));
    };
    let authority = SocketAddr::new(ip, port);
    let workload = Arc::clone(workload);
    match workload.protocol {
        TunnelProtocol::None => Plan::Plain { connect: authority, workload: Some(workload), service },
        TunnelProtocol::Hbone => {
            let mut identities = vec![workload.identity.clone()];
            identities.extend(names.iter().cloned());
            let tunnel = Tunnel { connect: SocketAddr::new(ip, HBONE_PORT), authority, identities };
            Plan::Direct { tunnel, workload, service }
        }
    }
}

/// The address to use: the one asked for if it is the workload's, else one of the same family, else its first.
fn address_of(workload: &Workload, wanted: IpAddr) -> Option<IpAddr> {
    let own = &workload.addresses;
    let same_family = || own.iter().find(|ip| ip.is_ipv4() == wanted.is_ipv4());
    own.iter().find(|ip| **ip == wanted).or_else(same_family).or_else(|| own.first()).copied()
}

/// Finds a ready instance of a waypoint: the workload, where to connect, and the identities its service adds.
pub fn resolve_waypoint(
    snapshot: &Snapshot,
    reference: &GatewayAddress,
    source: Option<&Workload>,
    random: &mut dyn Random,
) -> Option<(Arc<Workload>, SocketAddr, Vec<Identity>)> {
    let port = reference.hbone_port;
    let state = match &reference.target {
        GatewayTarget::Hostname(key) => snapshot.service(key)?,
        GatewayTarget::Address(address) => match snapshot.workload_at(address) {
            Some(workload) => {
                return Some((Arc::clone(workload), SocketAddr::new(address.address, port), Vec::new()));
            }
            None => snapshot.service_at(address, "")?,
        },
    };
    let (endpoint, target) = pick(state, port, source, random)?;
    let ip = endpoint.workload.addresses.first()?;
    let names = state.service.subject_alt_names.clone();
    Some((Arc::clone(&endpoint.workload), SocketAddr::new(*ip, target), names))
}

/// Whether `source` is an instance of the waypoint: its own traffic must not go round in a circle.
fn is_waypoint_itself(snapshot: &Snapshot, reference: &GatewayAddress, source: &Workload) -> bool {
    let is_endpoint = |key: &ResourceName| {
        snapshot
            .service(key)
            .is_some_and(|state| state.endpoints.iter().any(|endpoint| endpoint.workload.uid == source.uid))
    };
    match &reference.target {
        GatewayTarget::Hostname(key) => is_endpoint(key),
        GatewayTarget::Address(at) => {
            source.addresses.contains(&at.address)
                || snapshot.services_at(at).any(|state| is_endpoint(&state.service.key()))
        }
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
