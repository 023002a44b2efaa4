//! A stand-in for kube-proxy on one machine: a service's address and port, forwarded as they are to one of its pods.
//!
//! It serves clients outside the mesh, which know nothing of waypoints. Clients in the mesh never come here: their
//! ztunnel resolves services itself.

use cairn_mesh::pick;
use cairn_net::{ByteCounts, ConnectOptions, ListenOptions};
use cairn_xds::Mesh;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A pause after a failed accept, so that running out of descriptors is not a hot loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// The forwarders of a mesh.
pub struct Forwarders {
    mesh: Arc<Mesh>,
    running: BTreeMap<SocketAddr, JoinHandle<()>>,
    /// Addresses that could not be had, told once each.
    refused: BTreeSet<SocketAddr>,
}

impl Forwarders {
    /// None yet.
    pub fn new(mesh: Arc<Mesh>) -> Self {
        Self { mesh, running: BTreeMap::new(), refused: BTreeSet::new() }
    }

    /// Makes forwarders be those of the services now known.
    pub fn follow(&mut self) {
        let snapshot = self.mesh.snapshot();
        let wanted: BTreeSet<SocketAddr> = snapshot
            .services()
            .flat_map(|state| {
                let ports = &state.service.ports;
                state.service.vips.iter().flat_map(move |vip| {
                    ports.iter().map(move |port| SocketAddr::new(vip.address, port.port))
                })
            })
            .filter(|address| address.ip().is_loopback())
            .collect();
        self.running.retain(|address, task| {
            let keep = wanted.contains(address);
            if !keep {
                task.abort();
            }
            keep
        });
        self.refused.retain(|address| wanted.contains(address));
        for address in wanted {
            if self.running.contains_key(&address) {
                continue;
            }
            match cairn_net::listen(address, &ListenOptions::default()) {
                Ok(listener) => {
                    let task = tokio::spawn(accept(Arc::clone(&self.mesh), address, listener));
                    self.running.insert(address, task);
                }
                Err(error) => {
                    if self.refused.insert(address) {
                        tracing::info!(%address, %error, "service is not reachable for clients outside the mesh");
                    }
                }
            }
        }
    }
}

impl Drop for Forwarders {
    fn drop(&mut self) {
        for task in self.running.values() {
            task.abort();
        }
    }
}

async fn accept(mesh: Arc<Mesh>, address: SocketAddr, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((client, peer)) => {
                tokio::spawn(forward(Arc::clone(&mesh), address, client, peer));
            }
            Err(error) => {
                tracing::warn!(%address, %error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn forward(mesh: Arc<Mesh>, address: SocketAddr, mut client: TcpStream, peer: SocketAddr) {
    let snapshot = mesh.snapshot();
    let target = snapshot.service_at(&snapshot.local(address), "").and_then(|state| {
        let (endpoint, port) = pick(state, address.port(), None, &mut |bound| fastrand::u64(..bound))?;
        Some(SocketAddr::new(*endpoint.workload.addresses.first()?, port))
    });
    let Some(target) = target else {
        return tracing::debug!(%address, "no endpoint");
    };
    let options = ConnectOptions { bind: Some(peer.ip()), ..ConnectOptions::default() };
    match cairn_net::connect(target, &options).await {
        Ok(mut server) => {
            if let Err(error) = cairn_net::copy(&mut client, &mut server, &ByteCounts::default()).await {
                tracing::debug!(%address, %target, %error, "connection broke");
            }
        }
        Err(error) => tracing::debug!(%address, %target, %error, "endpoint does not answer"),
    }
}
