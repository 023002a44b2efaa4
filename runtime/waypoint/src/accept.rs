//! HBONE connections of peers: each CONNECT is for one of our destinations, or refused.

use crate::Waypoint;
use cairn_filter::{Admission, Connection, Denial, Peer};
use cairn_hbone::{Authority, Connect, ServerSettings};
use cairn_http::{MeshCallout, Site, SiteHandle};
use cairn_mesh::{AppProtocol, NetworkAddress, Snapshot};
use cairn_telemetry::Denied;
use http::{HeaderMap, StatusCode};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::net::{TcpListener, TcpStream};

/// A pause after a failed accept, so that running out of descriptors is not a hot loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Numbers connections within the process.
static CONNECTIONS: AtomicU64 = AtomicU64::new(1);

/// Takes HBONE connections until the drain begins, and hands each to a worker.
pub async fn run(waypoint: Arc<Waypoint>, listener: TcpListener) {
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = waypoint.drain.started() => return,
        };
        let Ok(stream) = stream.into_std() else { continue };
        let owner = Arc::clone(&waypoint);
        let start = move |worker| async move {
            // The socket is registered with the worker's own event queue.
            match TcpStream::from_std(stream) {
                Ok(stream) => connection(owner, worker, stream, peer).await,
                Err(error) => tracing::warn!(%peer, %error, "connection cannot be taken over"),
            }
        };
        waypoint.workers.run(start).await;
    }
}

async fn connection(waypoint: Arc<Waypoint>, worker: usize, tcp: TcpStream, peer: SocketAddr) {
    if let Err(error) = cairn_net::prepare(&tcp) {
        return tracing::debug!(%peer, %error, "client went away at once");
    }
    let certificate = match waypoint.certificates.get(&waypoint.settings.identity).await {
        Ok(certificate) => certificate,
        Err(error) => return tracing::warn!(%peer, %error, "no certificate, connection refused"),
    };
    let handler = {
        let waypoint = Arc::clone(&waypoint);
        move |connect: Connect| {
            tokio::spawn(tunnel(Arc::clone(&waypoint), worker, connect));
        }
    };
    let settings = ServerSettings::default();
    if let Err(error) = cairn_hbone::serve(tcp, certificate, &settings, waypoint.drain.clone(), handler).await
    {
        tracing::debug!(%peer, error = %crate::chain(&error), "tunnel connection ended");
    }
}

/// One CONNECT: looks its destination up, and serves what comes through the tunnel.
async fn tunnel(waypoint: Arc<Waypoint>, worker: usize, connect: Connect) {
    let _working = waypoint.drain.hold();
    let downstream = Arc::clone(connect.downstream());
    let Some((destination, site)) = destination(&waypoint, connect.authority()) else {
        tracing::info!(source = %downstream.identity, authority = %connect.authority(),
            "CONNECT refused: destination is not one of this waypoint's");
        return connect.refuse(StatusCode::NOT_FOUND);
    };
    let snapshot = waypoint.snapshot.load_full();
    let Some(engine) = waypoint.engines.get(worker) else {
        return connect.refuse(StatusCode::SERVICE_UNAVAILABLE);
    };
    let connection = Arc::new(Connection {
        id: CONNECTIONS.fetch_add(1, Ordering::Relaxed),
        worker,
        source: peer(&snapshot, &downstream),
        destination,
        service: site.load().service.clone(),
        local: Some(waypoint.settings.identity.clone()),
        callout: Arc::new(MeshCallout::new(Arc::clone(engine), Arc::clone(&site), destination)),
    });
    if let Some(denial) = refused_at_once(&site.load(), &connection) {
        tracing::info!(source = %downstream.identity, %destination, policy = %denial.policy, reason = denial.reason,
            "CONNECT refused by policy");
        remember(&waypoint, &connection, denial);
        return connect.refuse(StatusCode::FORBIDDEN);
    }
    match connect.accept(HeaderMap::new()) {
        Ok(stream) => {
            cairn_http::serve(stream, connection, site, Arc::clone(engine), waypoint.drain.clone()).await;
        }
        Err(error) => tracing::debug!(error = %crate::chain(&error), "client went away before its answer"),
    }
}

/// Keeps a denial for those who ask why.
fn remember(waypoint: &Waypoint, connection: &Connection, denial: Denial) {
    let addressed = connection
        .service
        .as_ref()
        .map_or_else(|| connection.destination.to_string().into(), |service| Arc::clone(&service.hostname));
    waypoint.telemetry.denials.push(&addressed, |denied| {
        *denied = Denied {
            at: SystemTime::now(),
            source: Some(connection.source.address),
            source_identity: connection.source.identity.clone(),
            service: addressed.to_string(),
            destination: Some(connection.destination),
            policy: denial.policy.into_owned(),
            reason: denial.reason,
            ..Denied::default()
        };
    });
}

/// Where the port is declared to carry no HTTP, policy decides before the tunnel is accepted.
fn refused_at_once(site: &Site, connection: &Connection) -> Option<Denial> {
    if !matches!(site.protocol, AppProtocol::Tcp | AppProtocol::Tls) {
        return None;
    }
    match site.chain.admit(connection) {
        Admission::Refuse(denial) => Some(denial),
        Admission::Pass(_) => None,
    }
}

fn destination(waypoint: &Waypoint, authority: &Authority) -> Option<(SocketAddr, SiteHandle)> {
    let table = waypoint.table.load();
    let address = match authority {
        Authority::Address(address) => SocketAddr::new(address.ip().to_canonical(), address.port()),
        Authority::Host { name, port } => SocketAddr::new(table.vip(name)?, *port),
    };
    table.at(address).map(|site| (address, Arc::clone(site)))
}

/// Who is at the other end: the workload at the address that the tunnel kept, if its identity is the one proven.
fn peer(snapshot: &Snapshot, downstream: &cairn_hbone::Downstream) -> Peer {
    let at = NetworkAddress { network: "".into(), address: downstream.address.ip().to_canonical() };
    let mut workloads = snapshot.workloads_at(&at).iter();
    let workload = workloads.find(|workload| workload.identity == downstream.identity).cloned();
    Peer { address: downstream.address, identity: Some(downstream.identity.clone()), workload }
}
