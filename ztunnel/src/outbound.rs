//! Out of a pod: where was it going, where does it go next, and there it goes.

use crate::Proxy;
use crate::carry::{Account, Cut};
use crate::onward::{self, Client, Failure, Onward, OnwardStream};
use crate::pods::Pod;
use crate::socks::{self, Reply, Target};
use cairn_mesh::{Snapshot, resolve};
use cairn_telemetry::Direction;
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
    let _working = proxy.drain.hold();
    let mut account = Account::new(Direction::Outbound, peer, destination);
    match Box::pin(open(&proxy, &pod, worker, destination, &mut account)).await {
        Ok(onward) => carry(onward, &proxy, account, &mut client).await,
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
    match Box::pin(open(&proxy, &pod, worker, destination, &mut account)).await {
        Ok(onward) => {
            tell(&mut client, Reply::Succeeded).await;
            carry(onward, &proxy, account, &mut client).await;
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

async fn open(
    proxy: &Proxy,
    pod: &Pod,
    worker: usize,
    destination: SocketAddr,
    account: &mut Account,
) -> Result<Onward, Failure> {
    let workload = |snapshot: &Snapshot| pod.workload(snapshot);
    let client = Client { workload: &workload, options: proxy.options_to_network(pod), worker };
    onward::open(&proxy.ways, &client, destination, account).await
}

async fn carry(mut onward: Onward, proxy: &Proxy, account: Box<Account>, client: &mut TcpStream) {
    match onward.stream {
        OnwardStream::Tcp(ref mut server) => {
            account.carry(proxy, client, server, std::future::pending()).await
        }
        OnwardStream::Tunnel(ref mut server) => {
            let revocation = server.revocation().clone();
            let cut = Box::pin(async {
                revocation.revoked().await;
                Cut::revoked()
            });
            account.carry(proxy, client, &mut **server, cut).await
        }
    }
}
