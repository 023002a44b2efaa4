//! The way onwards of an outbound connection: opened as planned, and if an endpoint fails before a byte of the client's
//! has been taken, by another one.

use crate::asked::OnDemandDns;
use crate::carry::Account;
use crate::choice::{Choice, Load, Loads, Names};
use crate::socks::Reply;
use cairn_hbone::{ConnectError, NestedTarget, Pool, PoolSettings, PoolTarget, TunnelStream};
use cairn_identity::{Certificates, WorkloadCertificate};
use cairn_mesh::{Crossing, Identity, Plan, Snapshot, Tunnel, Workload, plan, wanted_outbound};
use cairn_net::ConnectOptions;
use cairn_xds::Mesh;
use http::{HeaderMap, HeaderValue, StatusCode};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// How many endpoints a connection tries.
const ENDPOINTS_MAX: usize = 3;

/// No further endpoint is tried when the connection is so old: the client would not wait.
const TRY_FOR: Duration = Duration::from_secs(10);

/// How many names of workloads are asked for on behalf of one connection.
const NAMES_MAX: usize = 8;

/// The way onwards, open.
pub struct Onward {
    pub stream: OnwardStream,
    /// Counts as long as the connection is carried.
    _load: Option<Load>,
}

/// What it is made of.
pub enum OnwardStream {
    Tcp(TcpStream),
    Tunnel(Box<TunnelStream>),
}

/// Why there is no way onwards.
pub struct Failure {
    /// For the metrics (facts: ztunnel's response flags).
    pub flag: &'static str,
    pub reason: String,
    pub reply: Reply,
    /// Another endpoint may do better.
    elsewhere: bool,
}

impl Failure {
    /// One that no other endpoint would mend.
    pub fn new(flag: &'static str, reply: Reply, reason: impl std::fmt::Display) -> Self {
        Self { flag, reason: reason.to_string(), reply, elsewhere: false }
    }

    fn of_endpoint(flag: &'static str, reply: Reply, reason: impl std::fmt::Display) -> Self {
        Self { elsewhere: true, ..Self::new(flag, reply, reason) }
    }
}

/// What it takes to open ways onwards, shared by all connections of the process.
pub struct Ways {
    pub mesh: Arc<Mesh>,
    pub certificates: Arc<Certificates>,
    /// One pool of tunnels per worker.
    pub pools: Box<[Pool]>,
    /// Limits of tunnels that no pool has: those within another.
    pub tunnels: PoolSettings,
    pub loads: Arc<Loads>,
    pub names: Names,
    /// What DNS was asked for.
    pub asked: OnDemandDns,
}

/// On whose behalf.
pub struct Client<'a> {
    /// The client's workload as the mesh knows it now; `None` when it is gone.
    pub workload: &'a (dyn Fn(&Snapshot) -> Option<Arc<Workload>> + Sync),
    /// How sockets towards the network are opened for it.
    pub options: ConnectOptions,
    /// The worker that the connection lives on.
    pub worker: usize,
}

/// One attempt.
struct Opening<'a> {
    ways: &'a Ways,
    client: &'a Client<'a>,
    source: Arc<Workload>,
}

/// Decides where the connection goes next and opens that, noting each step in `account`.
pub async fn open(
    ways: &Ways,
    client: &Client<'_>,
    destination: SocketAddr,
    account: &mut Account,
) -> Result<Onward, Failure> {
    let began = Instant::now();
    if ways.mesh.is_on_demand() {
        Box::pin(ask(ways, client, destination)).await?;
    }
    let mut choice = Choice::new(&ways.loads);
    let (mut endpoints, mut names) = (0, 0);
    let mut last: Option<Failure> = None;
    loop {
        let snapshot = ways.mesh.snapshot();
        let Some(source) = (client.workload)(&snapshot) else {
            return Err(Failure::new("CONNECT", Reply::Failure, "the source workload is no longer known"));
        };
        account.source_workload = Some(Arc::clone(&source));
        let plan = plan(&snapshot, &source, destination, &mut choice);
        // Nothing of the mesh is held while waiting.
        drop(snapshot);
        if let Plan::Resolve(workload) = &plan {
            names += 1;
            if names > NAMES_MAX {
                return Err(Failure::new("CONNECT", Reply::HostUnreachable, "too many names to ask DNS for"));
            }
            ways.asked.count(&source, &workload.hostname);
            let addresses = ways.names.resolve(&workload.hostname).await;
            choice.learn(&workload.hostname, addresses);
            continue;
        }
        if let Plan::Refuse(refusal) = &plan {
            // Every endpoint has been tried: the last one's failure says more.
            account.way = "refused";
            return Err(last.unwrap_or_else(|| Failure::new("CONNECT", Reply::HostUnreachable, refusal)));
        }
        let next = next_hop(&plan).cloned();
        // Where there is no choice, what has failed is not asked again.
        if let Some(failure) = last.take_if(|_| next.as_ref().is_some_and(|next| choice.has_failed(next))) {
            return Err(failure);
        }
        let opening = Opening { ways, client, source };
        let failure = match opening.follow(plan, account).await {
            Ok(stream) => {
                let load = next.map(|workload| ways.loads.begin(&workload));
                return Ok(Onward { stream, _load: load });
            }
            Err(failure) => failure,
        };
        endpoints += 1;
        let another = failure.elsewhere && endpoints < ENDPOINTS_MAX && began.elapsed() < TRY_FOR;
        match next {
            Some(workload) if another && choice.failed(&workload) => {
                tracing::debug!(destination = %account.destination, error = %failure.reason, "trying another endpoint");
                last = Some(failure);
            }
            _ => return Err(failure),
        }
    }
}

/// Asks the control plane for what the plan needs.
async fn ask(ways: &Ways, client: &Client<'_>, destination: SocketAddr) -> Result<(), Failure> {
    let wanted = |snapshot: &Snapshot| {
        let source = (client.workload)(snapshot);
        source.map_or_else(Vec::new, |source| wanted_outbound(snapshot, &source, destination))
    };
    let known = crate::demand::know(&ways.mesh, wanted).await;
    known.map_err(|error| Failure::new("CONNECT", Reply::HostUnreachable, chain(&error)))
}

/// The workload that a plan connects to.
fn next_hop(plan: &Plan) -> Option<&Arc<Workload>> {
    match plan {
        Plan::Waypoint { waypoint, .. } => Some(waypoint),
        Plan::Direct { workload, .. } => Some(workload),
        Plan::Cross(crossing) => Some(&crossing.gateway),
        Plan::Plain { workload, .. } => workload.as_ref(),
        Plan::Resolve(_) | Plan::Refuse(_) => None,
    }
}

impl Opening<'_> {
    async fn follow(&self, plan: Plan, account: &mut Account) -> Result<OnwardStream, Failure> {
        match plan {
            Plan::Waypoint { tunnel, waypoint, service, workload: _ } => {
                (account.way, account.service) = ("waypoint", service);
                account.destination_workload = Some(waypoint);
                self.tunnel(tunnel, account).await
            }
            Plan::Direct { tunnel, workload, service } => {
                (account.way, account.service) = ("direct", service);
                account.destination_workload = Some(workload);
                self.tunnel(tunnel, account).await
            }
            Plan::Cross(crossing) => Box::pin(self.cross(*crossing, account)).await,
            Plan::Plain { connect, workload, service } => {
                account.way = if workload.is_some() { "plain" } else { "passthrough" };
                account.service = service;
                account.destination_workload = workload;
                account.destination = connect;
                // An endpoint that was tried before may have been at the end of a tunnel.
                account.authority.clear();
                account.destination_identity = None;
                let connected = cairn_net::connect(connect, &self.client.options).await;
                connected
                    .map(OnwardStream::Tcp)
                    .map_err(|error| Failure::of_endpoint("CONNECT", Reply::Refused, chain(&error)))
            }
            // Neither leads anywhere; they are answered before.
            Plan::Resolve(_) | Plan::Refuse(_) => {
                Err(Failure::new("CONNECT", Reply::HostUnreachable, "there is no way onwards"))
            }
        }
    }

    async fn tunnel(&self, tunnel: Tunnel, account: &mut Account) -> Result<OnwardStream, Failure> {
        account.authority = tunnel.authority.to_string();
        let certificate = self.certificate(account).await?;
        let stream = self.pooled(tunnel.connect, tunnel.identities, certificate, account).await?;
        Ok(OnwardStream::Tunnel(Box::new(stream)))
    }

    /// Through the gateway of another network, and in that tunnel through another.
    async fn cross(&self, crossing: Crossing, account: &mut Account) -> Result<OnwardStream, Failure> {
        let Crossing { connect, gateway_identities, identities, port, gateway, service, .. } = crossing;
        account.way = "gateway";
        account.authority = format!("{}:{port}", service.hostname);
        account.service = Some(service);
        account.destination_workload = Some(gateway);
        let certificate = self.certificate(account).await?;
        let outer = self.pooled(connect, gateway_identities, Arc::clone(&certificate), account).await?;
        let mut headers = self.headers(account);
        let network = HeaderValue::from_str(&self.source.network);
        headers.insert("x-forwarded-network", network.unwrap_or_else(|_| HeaderValue::from_static("")));
        let target = NestedTarget { certificate, identities, authority: account.authority.clone() };
        let stream = cairn_hbone::connect_nested(outer, &target, headers, &self.ways.tunnels).await;
        let stream = stream.map_err(|error| failure(&error))?;
        // The gateway has chosen; the other end says who it is.
        account.destination_identity = stream.peer().cloned();
        account.destination_workload = match (stream.headers().get("baggage"), stream.peer()) {
            (Some(baggage), Some(peer)) => cairn_hbone::described(baggage, peer).map(Arc::new),
            _ => None,
        };
        Ok(OnwardStream::Tunnel(Box::new(stream)))
    }

    async fn certificate(&self, account: &mut Account) -> Result<Arc<WorkloadCertificate>, Failure> {
        account.source_identity = Some(self.source.identity.clone());
        let certificate = self.ways.certificates.get(&self.source.identity).await;
        certificate.map_err(|error| Failure::new("IDENTITY_ERROR", Reply::Failure, chain(&error)))
    }

    async fn pooled(
        &self,
        connect: SocketAddr,
        identities: Vec<Identity>,
        certificate: Arc<WorkloadCertificate>,
        account: &mut Account,
    ) -> Result<TunnelStream, Failure> {
        account.destination = connect;
        let workload = account.destination_workload.as_ref();
        account.destination_identity = workload.map(|workload| workload.identity.clone());
        let target = PoolTarget {
            certificate,
            connect,
            workload: workload.map(|workload| Arc::clone(&workload.uid)),
            identities,
            authority: account.authority.clone(),
            options: self.client.options.clone(),
        };
        let Some(pool) = self.ways.pools.get(self.client.worker) else {
            return Err(Failure::new("CONNECT", Reply::Failure, "no such worker"));
        };
        pool.connect(&target, self.headers(account)).await.map_err(|error| failure(&error))
    }

    fn headers(&self, account: &Account) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let host = account.service.as_ref().map(|service| &*service.hostname);
        headers.insert("baggage", cairn_hbone::baggage(&self.source));
        headers.insert("forwarded", cairn_hbone::forwarded(account.source, host));
        headers.insert("traceparent", cairn_hbone::traceparent());
        headers
    }
}

fn failure(error: &ConnectError) -> Failure {
    let reason = chain(error);
    match error {
        ConnectError::Refused(StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED) => {
            Failure::new("DENY", Reply::NotAllowed, reason)
        }
        // The other end could not reach its application; another may.
        ConnectError::Refused(StatusCode::SERVICE_UNAVAILABLE) => {
            Failure::of_endpoint("CONNECT", Reply::Refused, reason)
        }
        ConnectError::Tcp(cause) if matches!(**cause, cairn_net::NetError::ConnectTimeout { .. }) => {
            let hint = "a network policy may forbid port 15008";
            Failure::of_endpoint("NETWORK_POLICY", Reply::Refused, format!("{reason}: {hint}"))
        }
        ConnectError::Tcp(_) | ConnectError::Timeout => {
            Failure::of_endpoint("CONNECT", Reply::Refused, reason)
        }
        ConnectError::Tls(_) | ConnectError::Revoked => {
            Failure::of_endpoint("TLS_FAILURE", Reply::Refused, reason)
        }
        ConnectError::Http2 { .. } => Failure::of_endpoint("H2_HANDSHAKE_FAILURE", Reply::Refused, reason),
        _ => Failure::new("CONNECT", Reply::Refused, reason),
    }
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

#[cfg(test)]
#[path = "onward/tests.rs"]
mod tests;
