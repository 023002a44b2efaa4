//! Choosing the endpoint of a backend.

use crate::host::{Active, Host};
use crate::route::Target;
use crate::worker::Balancer;
use crate::{Failure, Worker};
use cairn_mesh::{AppProtocol, Chooser, Service, ServiceState, TunnelProtocol, Workload, pick};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// An endpoint chosen for a request, which counts as its load from now on.
pub(crate) struct Chosen {
    pub(crate) active: Active,
    pub(crate) workload: Arc<Workload>,
    /// What its port is declared to carry.
    pub(crate) protocol: AppProtocol,
}

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
    let draw = |tried| draw(reach, state, port, tried);
    let mut best = draw(tried).or_else(|| draw(&[])).ok_or(Failure::NoEndpoint)?;
    if state.endpoints.len() > 1 && worker.settings.balancer == Balancer::LeastRequest {
        let other = draw(tried).filter(|other| other.1.active() < best.1.active());
        best = other.unwrap_or(best);
    }
    let (workload, host) = best;
    Ok(Chosen { active: Active::new(host), workload: Arc::clone(workload), protocol })
}

fn draw<'a>(
    reach: &Reach<'_>,
    state: &'a ServiceState,
    port: u16,
    tried: &[SocketAddr],
) -> Option<(&'a Arc<Workload>, Arc<Host>)> {
    let (endpoint, target) = pick(state, port, reach.viewpoint, &mut Draw { reach, tried })?;
    let ip = address_of(&endpoint.workload, reach.destination.ip())?;
    Some((&endpoint.workload, host_of(reach.worker, &endpoint.workload, SocketAddr::new(ip, target))))
}

/// Draws as the worker's balancer does, and never what has been tried (Envoy's retry predicate `previous_hosts`, which
/// gives up after a few draws).
struct Draw<'a, 'r> {
    reach: &'a Reach<'r>,
    tried: &'a [SocketAddr],
}

impl Chooser for Draw<'_, '_> {
    fn below(&mut self, bound: u64) -> u64 {
        self.reach.worker.draw(bound)
    }

    fn is_tried(&self, workload: &Workload, port: u16) -> bool {
        let ip = address_of(workload, self.reach.destination.ip());
        ip.is_some_and(|ip| self.tried.contains(&SocketAddr::new(ip, port)))
    }
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
