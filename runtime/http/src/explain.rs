//! Telling where a request would go, without sending it: the same route table, the same choice of endpoints.

use crate::endpoint::address_of;
use crate::rewrite::redirect_reply;
use crate::route::{Found, Rule, Target};
use crate::{Failure, Site};
use cairn_filter::{Considered, RequestHead, Token};
use cairn_mesh::{Snapshot, TunnelProtocol, Workload, candidates};
use http::Request;
use std::net::SocketAddr;
use std::sync::Arc;

/// Where a request would go.
#[derive(Debug)]
pub struct Routed {
    /// The rule in force, `ns/name/index` or `default`.
    pub rule: Option<Arc<str>>,
    /// The rules that were tried before it, and what each failed on.
    pub passed_over: Vec<Considered>,
    /// What it does with the request.
    pub next: Next,
}

/// What a route does with a request.
#[derive(Debug)]
pub enum Next {
    /// It fails, or no rule matches.
    Fail(Failure),
    /// It is redirected: the status, and to where.
    Redirect(u16, String),
    /// It is sent to one of these, by weight.
    Send(Vec<Share>),
}

/// A backend of a rule.
#[derive(Debug)]
pub struct Share {
    /// Istio's name of the cluster.
    pub cluster: Arc<str>,
    /// Its share.
    pub weight: u64,
    /// Of how much.
    pub total: u64,
    /// The request as it would be sent: method, authority and path.
    pub sent: String,
    /// One of these would be chosen; or why none.
    pub endpoints: Result<Vec<Candidate>, Failure>,
}

/// An endpoint that may be chosen.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its workload.
    pub workload: Arc<Workload>,
    /// Its own address and port.
    pub address: SocketAddr,
}

impl Candidate {
    /// Whether it is reached through a tunnel.
    pub fn is_tunnelled(&self) -> bool {
        self.workload.protocol == TunnelProtocol::Hbone
    }
}

impl Site {
    /// The head of a request as filters see it.
    ///
    /// # Errors
    /// When the request would not be let as far as that.
    pub fn head(&self, request: Request<()>) -> Result<RequestHead, Failure> {
        let (head, well_formed) = crate::head::request_head(request.into_parts().0, self.normalization);
        well_formed.map(|()| head)
    }

    /// Where a request that passed the filters goes. `destination`: where the client meant to go.
    pub fn route(
        &self,
        snapshot: &Snapshot,
        head: &RequestHead,
        token: Option<&Token>,
        destination: SocketAddr,
    ) -> Routed {
        let passed_over = self.routes.passed_over(head, token);
        let Some(Found { rule, prefix }) = self.routes.find(head, token) else {
            return Routed { rule: None, passed_over, next: Next::Fail(Failure::NoRoute) };
        };
        let next = match (&rule.broken, &rule.redirect) {
            (Some(reason), _) => Next::Fail(Failure::BrokenRoute(Arc::clone(reason))),
            (None, Some(redirect)) => {
                let reply = redirect_reply(redirect, head, prefix.as_deref(), self.port);
                let to = reply.headers.get(http::header::LOCATION);
                let to = to.and_then(|to| to.to_str().ok()).unwrap_or_default().to_owned();
                Next::Redirect(reply.status.as_u16(), to)
            }
            (None, None) => self.shares(snapshot, head, &rule, prefix.as_deref(), destination),
        };
        Routed { rule: Some(Arc::clone(&rule.name)), passed_over, next }
    }

    fn shares(
        &self,
        snapshot: &Snapshot,
        head: &RequestHead,
        rule: &Rule,
        prefix: Option<&str>,
        destination: SocketAddr,
    ) -> Next {
        if let Err(failure) = rule.backend(|_| 0) {
            return Next::Fail(failure);
        }
        let shares = rule.backends().filter(|backend| backend.weight > 0);
        let share = |backend: &crate::route::Backend| {
            let mut sent = head.clone();
            rule.request.apply_to_request(&mut sent);
            backend.request.apply_to_request(&mut sent);
            if let Some(rewrite) = &rule.rewrite {
                rewrite.apply(&mut sent, prefix);
            }
            let authority = String::from_utf8_lossy(sent.authority.as_bytes());
            Share {
                cluster: Arc::clone(&backend.cluster),
                weight: u64::from(backend.weight),
                total: rule.weight(),
                sent: format!("{} {authority}{}", sent.method, sent.path),
                endpoints: self.endpoints(snapshot, &backend.target, destination),
            }
        };
        Next::Send(shares.map(share).collect())
    }

    /// The endpoints one of which would be chosen for a connection that carries no HTTP.
    ///
    /// # Errors
    /// When there is none.
    pub fn endpoints_of_connection(
        &self,
        snapshot: &Snapshot,
        destination: SocketAddr,
    ) -> Result<Vec<Candidate>, Failure> {
        let target = match &self.service {
            Some(service) => Target::Service { key: service.key(), port: self.port },
            None => Target::Addressed,
        };
        self.endpoints(snapshot, &target, destination)
    }

    fn endpoints(
        &self,
        snapshot: &Snapshot,
        target: &Target,
        destination: SocketAddr,
    ) -> Result<Vec<Candidate>, Failure> {
        let (key, port) = match target {
            Target::Invalid(reason) => return Err(Failure::InvalidBackend(Arc::clone(reason))),
            Target::Addressed => {
                let workload = snapshot.workload_at(&snapshot.local(destination));
                let workload = Arc::clone(workload.ok_or(Failure::NoEndpoint)?);
                return Ok(vec![Candidate { workload, address: destination }]);
            }
            Target::Service { key, port } => (key, *port),
        };
        let unusable = |what: String| Failure::InvalidBackend(what.into());
        let state = snapshot.service(key).ok_or_else(|| unusable(format!("service {key} is not known")))?;
        if state.service.port(port).is_none() {
            return Err(unusable(format!("service {key} has no port {port}")));
        }
        let found: Vec<Candidate> = candidates(state, port, self.viewpoint.as_deref())
            .into_iter()
            .filter_map(|(endpoint, target)| {
                let ip = address_of(&endpoint.workload, destination.ip())?;
                let workload = Arc::clone(&endpoint.workload);
                Some(Candidate { workload, address: SocketAddr::new(ip, target) })
            })
            .collect();
        if found.is_empty() { Err(Failure::NoEndpoint) } else { Ok(found) }
    }
}
