//! Into a pod without a tunnel: nobody proves who they are, and policies decide on that.

use crate::Proxy;
use crate::carry::{Account, Cut};
use crate::inbound::{decide_now, decide_when_known, mention, note_decision, peer_workload};
use crate::live::Connected;
use crate::onward::chain;
use crate::pods::Pod;
use cairn_mesh::{L4Peer, OWN_PORTS};
use cairn_telemetry::Direction;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;

/// A connection that redirection brought here.
pub async fn redirected(
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    _worker: usize,
    client: TcpStream,
    peer: SocketAddr,
) {
    match cairn_net::original_destination(&client) {
        Ok(destination) => Box::pin(serve(&proxy, &pod, client, peer, destination)).await,
        Err(error) => tracing::debug!(%peer, %error, "client went away at once"),
    }
}

/// A connection to the pod's own address and the application's port, which the ztunnel holds in its place.
pub async fn direct(proxy: Arc<Proxy>, pod: Arc<Pod>, _worker: usize, client: TcpStream, peer: SocketAddr) {
    match client.local_addr() {
        Ok(destination) => Box::pin(serve(&proxy, &pod, client, peer, destination)).await,
        Err(error) => tracing::debug!(%peer, %error, "client went away at once"),
    }
}

async fn serve(proxy: &Proxy, pod: &Pod, mut client: TcpStream, peer: SocketAddr, destination: SocketAddr) {
    let _working = proxy.drain.hold();
    let mut account = Account::new(Direction::Inbound, peer, destination);
    account.way = "plaintext";
    if OWN_PORTS.contains(&destination.port()) {
        return account.refused(proxy, "CONNECT", "port belongs to the ztunnel");
    }
    let snapshot = proxy.mesh.snapshot();
    let Some(workload) = pod.workload(&snapshot) else {
        return account.refused(proxy, "CONNECT", "pod is no longer known");
    };
    mention(proxy, peer, &workload);
    account.source_workload = peer_workload(&snapshot, peer, &workload);
    account.destination_workload = Some(Arc::clone(&workload));
    let asked = L4Peer { identity: None, source: peer, destination };
    if let Err(reason) = note_decision(&mut account, Box::pin(decide_when_known(proxy, pod, &asked)).await) {
        return account.refused(proxy, "DENY", &reason);
    }
    let options = proxy.options_to_application(pod, peer.ip());
    let application = SocketAddr::new(pod.application, destination.port());
    let mut application = match Box::pin(cairn_net::connect(application, &options)).await {
        Ok(application) => application,
        Err(error) => return account.refused(proxy, "CONNECT", &chain(&error)),
    };
    let uid = Arc::clone(&workload.uid);
    let mut live =
        proxy.live.register(Connected { workload: uid, identity: None, source: peer, destination });
    // What changed while the application was connected to was not rechecked: the connection was not open yet.
    if let Err(reason) = note_decision(&mut account, decide_now(proxy, pod, &asked)) {
        return account.refused(proxy, "DENY", &reason);
    }
    let cut = Box::pin(async { Cut::denied(live.cut_reason().await) });
    account.carry(proxy, &mut client, &mut application, cut).await;
}
