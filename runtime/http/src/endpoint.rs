//! Choosing the endpoint of a backend.

use crate::host::{Active, Host};
use crate::route::Target;
use crate::worker::Balancer;
use crate::{Failure, Worker};
use cairn_mesh::{AppProtocol, Service, ServiceState, TunnelProtocol, Workload, pick};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// An endpoint chosen for a request, which counts as its load from now on.
pub(crate) struct Chosen {
    pub(crate) active: Active,
    pub(crate) workload: Arc<Workload>,
    /// What its port is declared to carry.
    pub(crate) protocol: AppProtocol,
}

/// How often another endpoint is drawn when one has been tried already (Envoy `host_selection_retry_max_attempts`).
const DRAWS_MAX: usize = 5;

/// From where an endpoint is looked for.
pub(crate) struct Reach<'a> {
    pub(crate) worker: &'a Worker,
    /// The workload whose own place endpoints should be near to.
    pub(crate) viewpoint: Option<&'a Workload>,
    /// Where the client meant to go.
    pub(crate) destination: SocketAddr,
}

/// Chooses an endpoint of `target`, not one of `tried` if that can be helped.
pub(crate) fn choose(reach: &Reach<'_>, target: &Target, tried: &[SocketAddr]) -> Result<Chosen, Failure> {
    let Reach { worker, destination, .. } = *reach;
    let snapshot = worker.snapshot();
    let (key, port) = match target {
        Target::Invalid(reason) => return Err(Failure::InvalidBackend(Arc::clone(reason))),
        Target::Addressed => {
            let at = snapshot.local(destination);
            let workload = snapshot.workload_at(&at).ok_or(Failure::NoEndpoint)?;
            let host = host_of(worker, workload, destination);
            return Ok(Chosen {
                active: Active::new(host),
                workload: Arc::clone(workload),
                protocol: AppProtocol::Unknown,
            });
        }
        Target::Service { key, port } => (key, *port),
    };
    let unusable = |what: String| Failure::InvalidBackend(what.into());
    let state = snapshot.service(key).ok_or_else(|| unusable(format!("service {key} is not known")))?;
    let declared = |service: &Service| service.port(port).map(|port| port.protocol);
    let protocol =
        declared(&state.service).ok_or_else(|| unusable(format!("service {key} has no port {port}")))?;
    let draw = || draw(reach, state, port);
    let mut best = draw().ok_or(Failure::NoEndpoint)?;
    for _ in 0..DRAWS_MAX {
        if !tried.contains(&best.1.address) {
            break;
        }
        best = draw().unwrap_or(best);
    }
    if state.endpoints.len() > 1 && worker.settings.balancer == Balancer::LeastRequest {
        let other = draw().filter(|other| !tried.contains(&other.1.address));
        best = other.filter(|other| other.1.active() < best.1.active()).unwrap_or(best);
    }
    let (workload, host) = best;
    Ok(Chosen { active: Active::new(host), workload: Arc::clone(workload), protocol })
}

fn draw<'a>(reach: &Reach<'_>, state: &'a ServiceState, port: u16) -> Option<(&'a Arc<Workload>, Arc<Host>)> {
    let worker = reach.worker;
    let (endpoint, target) = pick(state, port, reach.viewpoint, &mut |bound| worker.draw(bound))?;
    let ip = address_of(&endpoint.workload, reach.destination.ip())?;
    Some((&endpoint.workload, host_of(worker, &endpoint.workload, SocketAddr::new(ip, target))))
}

fn host_of(worker: &Worker, workload: &Workload, address: SocketAddr) -> Arc<Host> {
    let identity = (workload.protocol == TunnelProtocol::Hbone).then_some(&workload.identity);
    worker.hosts.host(address, identity)
}

/// The workload's address of the family that the client used, else its first.
pub(crate) fn address_of(workload: &Workload, wanted: IpAddr) -> Option<IpAddr> {
    let same_family = workload.addresses.iter().find(|ip| ip.is_ipv4() == wanted.is_ipv4());
    same_family.or_else(|| workload.addresses.first()).copied()
}
