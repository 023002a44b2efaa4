//! Out of a pod: where was it going, where does it go next, and there it goes.

use crate::Proxy;
use crate::carry::Account;
use crate::pods::{OWN_PORTS, Pod};
use crate::socks::{self, Reply, Target};
use cairn_hbone::{ConnectError, PoolTarget, TunnelStream};
use cairn_mesh::{Plan, Tunnel, Workload, plan, resolve};
use cairn_telemetry::Direction;
use http::HeaderMap;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;

/// A connection that redirection brought here.
pub async fn redirected(
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    worker: usize,
    mut client: TcpStream,
    peer: SocketAddr,
) {
    let destination = match cairn_net::original_destination(&client) {
        Ok(destination) => destination,
        Err(error) => return tracing::debug!(%peer, %error, "client went away at once"),
    };
    let own_address = destination.ip().is_loopback() || destination.ip() == pod.address;
    if own_address && OWN_PORTS.contains(&destination.port()) {
        return tracing::warn!(%peer, %destination, "connection to the ztunnel itself refused");
    }
    let _working = proxy.drain.hold();
    let mut account = Account::new(Direction::Outbound, peer, destination);
    match open(&proxy, &pod, worker, destination, &mut account).await {
        Ok(upstream) => upstream.carry(&proxy, account, &mut client).await,
        Err(failure) => account.refused(&proxy, failure.flag, &failure.reason),
    }
}

/// A client that asks by SOCKS5.
pub async fn socks(proxy: Arc<Proxy>, pod: Arc<Pod>, worker: usize, mut client: TcpStream, peer: SocketAddr) {
    let _working = proxy.drain.hold();
    let target = match tokio::time::timeout(socks::HANDSHAKE_MAX, socks::handshake(&mut client)).await {
        Ok(Ok(target)) => target,
        Ok(Err(error)) => return tracing::debug!(%peer, %error, "SOCKS5 handshake failed"),
        Err(_) => return tracing::debug!(%peer, "SOCKS5 handshake took too long"),
    };
    let snapshot = proxy.mesh.snapshot();
    let namespace = pod.workload(&snapshot).map(|workload| Arc::clone(&workload.namespace));
    let destination = match target {
        Target::Address(address) => Some(address),
        Target::Name(name, port) => namespace
            .and_then(|namespace| resolve(&snapshot, &name, &namespace, &mut |bound| fastrand::u64(..bound)))
            .map(|ip| SocketAddr::new(ip, port)),
    };
    let Some(destination) = destination else {
        let account = Account::new(Direction::Outbound, peer, SocketAddr::new(peer.ip(), 0));
        account.refused(&proxy, "CONNECT", "name is not known in the mesh");
        return tell(&mut client, Reply::HostUnreachable).await;
    };
    let mut account = Account::new(Direction::Outbound, peer, destination);
    match open(&proxy, &pod, worker, destination, &mut account).await {
        Ok(upstream) => {
            tell(&mut client, Reply::Succeeded).await;
            upstream.carry(&proxy, account, &mut client).await;
        }
        Err(failure) => {
            account.refused(&proxy, failure.flag, &failure.reason);
            tell(&mut client, failure.reply).await;
        }
    }
}

async fn tell(client: &mut TcpStream, reply: Reply) {
    if let Err(error) = socks::answer(client, reply).await {
        tracing::debug!(%error, "client left before its answer");
    }
}

/// The way onwards, open.
enum Upstream {
    Tcp(TcpStream),
    Tunnel(TunnelStream),
}

impl Upstream {
    async fn carry(self, proxy: &Proxy, account: Account, client: &mut TcpStream) {
        let never = std::future::pending();
        match self {
            Self::Tcp(mut server) => account.carry(proxy, client, &mut server, never).await,
            Self::Tunnel(mut server) => account.carry(proxy, client, &mut server, never).await,
        }
    }
}

/// Why there is no way onwards.
struct Failure {
    /// For the metrics (facts: ztunnel's response flags).
    flag: &'static str,
    reason: String,
    reply: Reply,
}

impl Failure {
    fn new(flag: &'static str, reply: Reply, reason: impl std::fmt::Display) -> Self {
        Self { flag, reason: reason.to_string(), reply }
    }
}

/// Decides where the connection goes next and opens that, noting each step in `account`.
async fn open(
    proxy: &Proxy,
    pod: &Pod,
    worker: usize,
    destination: SocketAddr,
    account: &mut Account,
) -> Result<Upstream, Failure> {
    let snapshot = proxy.mesh.snapshot();
    let Some(source) = pod.workload(&snapshot) else {
        return Err(Failure::new("CONNECT", Reply::Failure, "the source workload is no longer known"));
    };
    account.source_workload = Some(Arc::clone(&source));
    let mut random = |bound| fastrand::u64(..bound);
    match plan(&snapshot, &source, destination, &mut random) {
        Plan::Waypoint { tunnel, waypoint, service, workload: _ } => {
            account.way = "waypoint";
            account.service = service;
            account.destination_workload = Some(waypoint);
            open_tunnel(proxy, pod, worker, &source, tunnel, account).await
        }
        Plan::Direct { tunnel, workload, service } => {
            account.way = "direct";
            account.service = service;
            account.destination_workload = Some(workload);
            open_tunnel(proxy, pod, worker, &source, tunnel, account).await
        }
        Plan::Plain { connect, workload, service } => {
            account.way = if workload.is_some() { "plain" } else { "passthrough" };
            account.service = service;
            account.destination_workload = workload;
            account.destination = connect;
            let connected = cairn_net::connect(connect, &proxy.options_to_network(pod)).await;
            connected
                .map(Upstream::Tcp)
                .map_err(|error| Failure::new("CONNECT", Reply::Refused, chain(&error)))
        }
        Plan::Refuse(refusal) => {
            account.way = "refused";
            Err(Failure::new("CONNECT", Reply::HostUnreachable, refusal))
        }
    }
}

async fn open_tunnel(
    proxy: &Proxy,
    pod: &Pod,
    worker: usize,
    source: &Arc<Workload>,
    tunnel: Tunnel,
    account: &mut Account,
) -> Result<Upstream, Failure> {
    account.destination = tunnel.connect;
    account.authority = tunnel.authority.to_string();
    account.source_identity = Some(source.identity.clone());
    account.destination_identity =
        account.destination_workload.as_ref().map(|workload| workload.identity.clone());
    let certificate = proxy.certificates.get(&source.identity).await;
    let certificate =
        certificate.map_err(|error| Failure::new("IDENTITY_ERROR", Reply::Failure, chain(&error)))?;
    let mut headers = HeaderMap::new();
    let host = account.service.as_ref().map(|service| &*service.hostname);
    headers.insert("baggage", cairn_hbone::baggage(source));
    headers.insert("forwarded", cairn_hbone::forwarded(account.source, host));
    headers.insert("traceparent", cairn_hbone::traceparent());
    let target = PoolTarget {
        certificate,
        connect: tunnel.connect,
        workload: None,
        identities: tunnel.identities,
        authority: account.authority.clone(),
        options: proxy.options_to_network(pod),
    };
    let Some(pool) = proxy.pools.get(worker) else {
        return Err(Failure::new("CONNECT", Reply::Failure, "no such worker"));
    };
    match pool.connect(&target, headers).await {
        Ok(stream) => Ok(Upstream::Tunnel(stream)),
        Err(error) => {
            let (flag, reply) = match &error {
                ConnectError::Refused(status) if *status == http::StatusCode::FORBIDDEN => {
                    ("DENY", Reply::NotAllowed)
                }
                ConnectError::Tls { .. } => ("TLS_FAILURE", Reply::Refused),
                ConnectError::Http2 { .. } => ("H2_HANDSHAKE_FAILURE", Reply::Refused),
                _ => ("CONNECT", Reply::Refused),
            };
            Err(Failure::new(flag, reply, chain(&error)))
        }
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
