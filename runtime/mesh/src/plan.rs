//! Where an outbound connection goes next.

use crate::balance::{Asked, Purpose};
use crate::{
    Chooser, Destination, GatewayAddress, GatewayTarget, Identity, IpFamilies, LoadBalancingMode,
    NetworkAddress, Service, ServiceState, Snapshot, TunnelProtocol, Workload,
};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The port on which a ztunnel takes redirected connections out of a pod.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port on which it takes redirected plaintext into a pod.
pub const PLAINTEXT_PORT: u16 = 15006;
/// The port on which a meshed workload's ztunnel accepts HBONE.
pub const HBONE_PORT: u16 = 15008;
/// The port on which it listens for programs without redirection (SOCKS5).
pub const SOCKS_PORT: u16 = 15080;

/// Ports that belong to the ztunnel in a pod, never to an application: outbound, plaintext, HBONE, SOCKS5.
pub const OWN_PORTS: [u16; 4] = [OUTBOUND_PORT, PLAINTEXT_PORT, HBONE_PORT, SOCKS_PORT];

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

/// A way into another network: a tunnel to its gateway, and in that a tunnel to whom the gateway chooses. Both have
/// the service's name as their authority (facts: ztunnel's double HBONE).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// Where the gateway is.
    pub connect: SocketAddr,
    /// Identities one of which the gateway must prove.
    pub gateway_identities: Vec<Identity>,
    /// Identities one of which the end of the inner tunnel must prove.
    pub identities: Vec<Identity>,
    /// The port of the service that is addressed.
    pub port: u16,
    /// The gateway.
    pub gateway: Arc<Workload>,
    /// What stands for the other network's endpoints here: a workload, or a waypoint.
    pub workload: Arc<Workload>,
    /// The service addressed.
    pub service: Arc<Service>,
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
    /// Into another network.
    Cross(Box<Crossing>),
    /// Plain TCP to a workload or address outside the mesh.
    Plain {
        /// Where to connect.
        connect: SocketAddr,
        /// The workload, if known.
        workload: Option<Arc<Workload>>,
        /// The service addressed, if any.
        service: Option<Arc<Service>>,
    },
    /// To a workload whose address only DNS knows: ask for its hostname, and then plan again with what it says.
    Resolve(Arc<Workload>),
    /// Nowhere.
    Refuse(Refusal),
}

/// Why a connection goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It would arrive at the ztunnel itself.
    OwnPort(SocketAddr),
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
    /// The destination is in another network, and that one's gateway cannot be found or has no ready endpoint.
    NoGateway(String),
    /// The workload has no address that can be reached.
    NoAddress(Arc<str>),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OwnPort(at) => write!(f, "{at} is the ztunnel itself"),
            Self::NoEndpoint { service, port } => {
                write!(f, "no healthy upstream: {} has no ready endpoint for port {port}", service.hostname)
            }
            Self::NoWaypoint(reference) => write!(f, "waypoint {reference} has no ready endpoint"),
            Self::NoGateway(reference) => write!(f, "gateway {reference} has no ready endpoint"),
            Self::NoAddress(uid) => write!(f, "workload {uid} has no address that can be reached"),
        }
    }
}

/// Decides where a connection from `source` to `destination` goes next (ztunnel `build_request`, in its order).
pub fn plan(
    snapshot: &Snapshot,
    source: &Workload,
    destination: SocketAddr,
    chooser: &mut dyn Chooser,
) -> Plan {
    let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    if is_own_port(source, destination) {
        return Plan::Refuse(Refusal::OwnPort(destination));
    }
    let address = NetworkAddress { network: Arc::clone(&source.network), address: destination.ip() };
    let mut outbound = Outbound { snapshot, source, destination, chooser };
    let decided = match snapshot.destination(&address, &source.namespace) {
        Some(Destination::Service(state)) => outbound.service(&state),
        Some(Destination::Workload(workload)) => outbound.workload(workload),
        None => Ok(Plan::Plain { connect: destination, workload: None, service: None }),
    };
    decided.unwrap_or_else(|stop| match stop {
        Stop::Refuse(refusal) => Plan::Refuse(refusal),
        Stop::Resolve(workload) => Plan::Resolve(workload),
    })
}

/// Whether the connection would come back to the source's own ztunnel. Where pods live on loopback, only their own
/// addresses are themselves.
fn is_own_port(source: &Workload, destination: SocketAddr) -> bool {
    let on_loopback = source.addresses.iter().any(IpAddr::is_loopback);
    let is_own = source.addresses.contains(&destination.ip());
    OWN_PORTS.contains(&destination.port()) && (is_own || destination.ip().is_loopback() && !on_loopback)
}

/// Why a plan ends early.
enum Stop {
    Refuse(Refusal),
    Resolve(Arc<Workload>),
}

/// A workload that was chosen, and how it is to be reached.
struct Chosen {
    workload: Arc<Workload>,
    port: u16,
    /// The service that it was chosen from.
    service: Option<Arc<Service>>,
    /// The address that was asked for.
    wanted: IpAddr,
}

impl Chosen {
    fn identities(&self) -> Vec<Identity> {
        let of_service = self.service.iter().flat_map(|service| service.subject_alt_names.iter());
        std::iter::once(&self.workload.identity).chain(of_service).cloned().collect()
    }
}

/// The question while it is answered.
struct Outbound<'a> {
    snapshot: &'a Snapshot,
    source: &'a Workload,
    destination: SocketAddr,
    chooser: &'a mut dyn Chooser,
}

impl Outbound<'_> {
    fn service(&mut self, state: &ServiceState) -> Result<Plan, Stop> {
        let service = &state.service;
        if let Some(reference) = sample(service, self.chooser).or(service.waypoint.as_ref()) {
            let waypoint = self.gateway(reference, Purpose::Waypoint);
            let waypoint =
                waypoint.ok_or_else(|| Stop::Refuse(Refusal::NoWaypoint(reference.to_string())))?;
            if waypoint.workload.network != self.source.network {
                return self.cross(waypoint, service);
            }
            return self.through(waypoint, Some(Arc::clone(service)), None);
        }
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            let service = Some(Arc::clone(service));
            return Ok(Plan::Plain { connect: self.destination, workload: None, service });
        }
        let (port, wanted) = (self.destination.port(), self.destination.ip());
        let chosen = self.pick(state, port, Purpose::Service, wanted);
        let none = || Stop::Refuse(Refusal::NoEndpoint { service: Arc::clone(service), port });
        let chosen = chosen.ok_or_else(none)?;
        if chosen.workload.network != self.source.network {
            return self.cross(chosen, service);
        }
        self.direct(chosen)
    }

    fn workload(&mut self, workload: Arc<Workload>) -> Result<Plan, Stop> {
        if let Some(reference) = &workload.waypoint
            && !is_instance(self.snapshot, reference, self.source)
        {
            let waypoint = self.gateway(reference, Purpose::Waypoint);
            let waypoint =
                waypoint.ok_or_else(|| Stop::Refuse(Refusal::NoWaypoint(reference.to_string())))?;
            return self.through(waypoint, None, Some(Arc::clone(&workload)));
        }
        let (port, wanted) = (self.destination.port(), self.destination.ip());
        self.direct(Chosen { workload, port, service: None, wanted })
    }

    fn through(
        &mut self,
        waypoint: Chosen,
        service: Option<Arc<Service>>,
        workload: Option<Arc<Workload>>,
    ) -> Result<Plan, Stop> {
        let connect = SocketAddr::new(self.address(&waypoint)?, waypoint.port);
        let tunnel = Tunnel { connect, authority: self.destination, identities: waypoint.identities() };
        Ok(Plan::Waypoint { tunnel, waypoint: waypoint.workload, service, workload })
    }

    fn direct(&mut self, chosen: Chosen) -> Result<Plan, Stop> {
        let ip = self.address(&chosen)?;
        let authority = SocketAddr::new(ip, chosen.port);
        let identities = chosen.identities();
        let Chosen { workload, service, .. } = chosen;
        Ok(match workload.protocol {
            TunnelProtocol::None => Plan::Plain { connect: authority, workload: Some(workload), service },
            TunnelProtocol::Hbone => {
                let tunnel = Tunnel { connect: SocketAddr::new(ip, HBONE_PORT), authority, identities };
                Plan::Direct { tunnel, workload, service }
            }
        })
    }

    /// Through the gateway of the network in which `chosen` is.
    fn cross(&mut self, chosen: Chosen, service: &Arc<Service>) -> Result<Plan, Stop> {
        let Some(reference) = &chosen.workload.network_gateway else {
            return Err(Stop::Refuse(Refusal::NoAddress(Arc::clone(&chosen.workload.uid))));
        };
        let gateway = self.gateway(reference, Purpose::Service);
        let gateway = gateway.ok_or_else(|| Stop::Refuse(Refusal::NoGateway(reference.to_string())))?;
        let connect = SocketAddr::new(self.address(&gateway)?, gateway.port);
        let of_service = chosen.service.iter().flat_map(|service| service.subject_alt_names.iter());
        Ok(Plan::Cross(Box::new(Crossing {
            connect,
            gateway_identities: gateway.identities(),
            identities: of_service.cloned().collect(),
            port: self.destination.port(),
            gateway: gateway.workload,
            workload: Arc::clone(&chosen.workload),
            service: Arc::clone(service),
        })))
    }

    fn pick(&mut self, state: &ServiceState, port: u16, purpose: Purpose, wanted: IpAddr) -> Option<Chosen> {
        let asked = Asked { state, port, source: Some(self.source), purpose };
        let (endpoint, port) = asked.pick(self.chooser)?;
        let (workload, service) = (Arc::clone(&endpoint.workload), Some(Arc::clone(&state.service)));
        Some(Chosen { workload, port, service, wanted })
    }

    /// An instance of a waypoint or gateway. One that is named by its address is reached on that; one named by its
    /// hostname on an address of the client's family.
    fn gateway(&mut self, reference: &GatewayAddress, purpose: Purpose) -> Option<Chosen> {
        let port = reference.hbone_port;
        let at = |workload: &Arc<Workload>, wanted| {
            let workload = Arc::clone(workload);
            Some(Chosen { workload, port, service: None, wanted }).filter(|_| port != 0)
        };
        match &reference.target {
            GatewayTarget::Address(address) => match self.snapshot.destination(address, "")? {
                Destination::Workload(workload) => at(&workload, address.address),
                Destination::Service(state) => {
                    let passes = state.service.load_balancing.mode == LoadBalancingMode::Passthrough;
                    if passes { None } else { self.pick(&state, port, purpose, address.address) }
                }
            },
            GatewayTarget::Hostname(key) => match self.snapshot.service(key) {
                Some(state) => self.pick(state, port, purpose, self.destination.ip()),
                None => at(self.snapshot.workload_named(key)?, self.destination.ip()),
            },
        }
    }

    /// The address to use: the one asked for if it is the workload's; else one that the service is reached on, of the
    /// family asked for if there is one; else one that DNS says.
    fn address(&mut self, chosen: &Chosen) -> Result<IpAddr, Stop> {
        let Chosen { workload, wanted, .. } = chosen;
        if workload.addresses.contains(wanted) {
            return Ok(*wanted);
        }
        let families = chosen.service.as_ref().map_or(IpFamilies::Automatic, |service| service.ip_families);
        let accepted = || workload.addresses.iter().copied().filter(|ip| families.accept(*ip));
        let same_family = accepted().find(|ip| ip.is_ipv4() == wanted.is_ipv4());
        if let Some(ip) = same_family.or_else(|| accepted().next()) {
            return Ok(ip);
        }
        let nowhere = || Stop::Refuse(Refusal::NoAddress(Arc::clone(&workload.uid)));
        if workload.hostname.is_empty() {
            return Err(nowhere());
        }
        match self.chooser.addresses(&workload.hostname) {
            None => Err(Stop::Resolve(Arc::clone(workload))),
            Some(found) => {
                let same_family = found.iter().copied().filter(|ip| ip.is_ipv4() == wanted.is_ipv4());
                let mut usable: Vec<IpAddr> = same_family.collect();
                if usable.is_empty() {
                    usable = found.to_vec();
                }
                let at = self.chooser.below((usable.len() as u64).max(1)) as usize;
                usable.get(at).copied().ok_or_else(nowhere)
            }
        }
    }
}

/// One of a service's weighted waypoints, each as likely as its weight says; `None` when the weights sum to nothing.
fn sample<'s>(service: &'s Service, chooser: &mut dyn Chooser) -> Option<&'s GatewayAddress> {
    let weights = || service.weighted_waypoints.iter().map(|one| u64::from(one.weight));
    let total: u64 = weights().sum();
    let mut at = if total == 0 { return None } else { chooser.below(total) };
    let drawn = service.weighted_waypoints.iter().find(|one| {
        let here = at < u64::from(one.weight);
        at = at.saturating_sub(one.weight.into());
        here
    });
    drawn.map(|one| &one.waypoint)
}

/// Whether `workload` is an instance of the waypoint, ready or not: its own traffic must not go round in a circle.
pub(crate) fn is_instance(snapshot: &Snapshot, reference: &GatewayAddress, workload: &Workload) -> bool {
    match &reference.target {
        GatewayTarget::Hostname(key) => {
            let is_called = workload.namespace == key.namespace && workload.hostname == key.name;
            is_called || workload.services.iter().any(|(service, _)| service == key)
        }
        GatewayTarget::Address(at) => {
            let is_here = at.network == workload.network && workload.addresses.contains(&at.address);
            is_here
                || snapshot.services_at(at).any(|state| {
                    let key = state.service.key();
                    workload.services.iter().any(|(service, _)| *service == key)
                })
        }
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
