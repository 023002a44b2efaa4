//! The pods of this node: which are here, and the listeners that each has.

use crate::settings::Capture;
use crate::{Proxy, inbound, outbound, plaintext};
use cairn_mesh::{Snapshot, TunnelProtocol, Workload};
use cairn_net::{ListenOptions, Namespace};
use cairn_process::Pending;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Where redirected outbound connections arrive.
const OUTBOUND_PORT: u16 = 15001;
/// Where redirected plaintext inbound connections arrive.
const PLAINTEXT_PORT: u16 = 15006;
/// Where HBONE arrives.
const HBONE_PORT: u16 = cairn_mesh::HBONE_PORT;
/// Where programs without redirection ask for a way out.
const SOCKS_PORT: u16 = 15080;

/// Ports that belong to the ztunnel in a pod: never a destination behind it.
pub const OWN_PORTS: [u16; 4] = [OUTBOUND_PORT, PLAINTEXT_PORT, HBONE_PORT, SOCKS_PORT];

/// How long a pod whose listeners cannot be had waits before the next try.
const RETRY: Duration = Duration::from_millis(500);

/// A pause after a failed accept, so that running out of descriptors is not a hot loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// One pod of this node.
pub struct Pod {
    /// The uid of its workload.
    pub uid: Arc<str>,
    /// Its address.
    pub address: IpAddr,
    /// Its network namespace, when capture is by redirection.
    pub namespace: Option<Namespace>,
    /// Where its application listens: a twin address, or its own.
    pub application: IpAddr,
}

impl Pod {
    /// The pod's workload as the mesh knows it now; `None` when it is gone.
    pub fn workload(&self, snapshot: &Snapshot) -> Option<Arc<Workload>> {
        snapshot.workload(&self.uid).cloned()
    }
}

/// How much higher the second octet of a twin address is.
pub const TWIN_DISTANCE: u8 = 20;

/// The twin of a loopback address, where an application listens while the ztunnel has the address itself: the second
/// octet is [`TWIN_DISTANCE`] higher.
pub fn twin(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) if v4.is_loopback() => {
            let [a, b, c, d] = v4.octets();
            IpAddr::V4(Ipv4Addr::new(a, b.wrapping_add(TWIN_DISTANCE), c, d))
        }
        other => other,
    }
}

/// How long the name of a pod's network namespace may be; a file's name ends at 255 bytes, and others may put
/// something before it.
const NAMESPACE_FILE_BYTES_MAX: usize = 200;

/// What a pod's network namespace is called in a node's directory of them: `namespace.pod`, or the beginning of that
/// and a digest of all of it where it is too long for a file's name.
pub fn namespace_file(namespace: &str, pod: &str) -> String {
    let name = format!("{namespace}.{pod}");
    if name.len() <= NAMESPACE_FILE_BYTES_MAX {
        return name;
    }
    // FNV-1a: the same in every process. What could collide begins with the same namespace.
    let digest = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let end = name.floor_char_boundary(NAMESPACE_FILE_BYTES_MAX - 17);
    format!("{}~{digest:016x}", name.get(..end).unwrap_or(""))
}

struct Running {
    pod: Arc<Pod>,
    listeners: Vec<JoinHandle<()>>,
    /// Ports on which plaintext is taken in place of the application.
    plain: BTreeSet<u16>,
}

impl Drop for Running {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

/// Keeps listeners in step with the pods of this node until the drain begins; then closes them all.
pub async fn run(proxy: Arc<Proxy>, first: Pending) {
    let mut first = Some(first);
    let mut changes = proxy.mesh.changes();
    let mut running: HashMap<Arc<str>, Running> = HashMap::new();
    loop {
        changes.borrow_and_update();
        let snapshot = proxy.mesh.snapshot();
        let failed = reconcile(&proxy, &snapshot, &mut running);
        if let Some(first) = first.take() {
            first.done();
        }
        let retry =
            async { if failed { tokio::time::sleep(RETRY).await } else { std::future::pending().await } };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = retry => {}
            () = proxy.drain.started() => break,
        }
    }
    drop(running);
    // This task ends with the process.
    std::future::pending().await
}

fn is_local(proxy: &Proxy, workload: &Workload) -> bool {
    *workload.node == *proxy.settings.node
        && workload.protocol == TunnelProtocol::Hbone
        && !workload.native_tunnel
        && !workload.addresses.is_empty()
}

/// Starts and stops listeners; returns whether some could not be had and must be tried again.
fn reconcile(proxy: &Arc<Proxy>, snapshot: &Snapshot, running: &mut HashMap<Arc<str>, Running>) -> bool {
    let local: HashMap<&Arc<str>, &Arc<Workload>> = snapshot
        .workloads()
        .filter(|workload| is_local(proxy, workload))
        .map(|workload| (&workload.uid, workload))
        .collect();
    running.retain(|uid, pod| {
        // A pod of the same name and address may be a new one, in a new namespace.
        let keep =
            local.get(uid).is_some_and(|workload| workload.addresses.first() == Some(&pod.pod.address))
                && pod.pod.namespace.as_ref().is_none_or(Namespace::is_current);
        if !keep {
            tracing::info!(pod = %uid, "pod left");
        }
        keep
    });
    // Keys of those who left are not kept.
    for certificate in proxy.certificates.list() {
        if !local.values().any(|workload| workload.identity == certificate.identity) {
            proxy.certificates.forget(&certificate.identity);
        }
    }
    let mut failed = false;
    for (uid, workload) in local {
        if !running.contains_key(uid) {
            match start(proxy, workload) {
                Ok(pod) => {
                    tracing::info!(pod = %uid, address = %pod.pod.address, "pod joined");
                    running.insert(Arc::clone(uid), pod);
                }
                Err(error) => {
                    failed = true;
                    tracing::warn!(pod = %uid, %error, "pod cannot be served yet, will retry");
                    continue;
                }
            }
        }
        if let Some(pod) = running.get_mut(uid) {
            failed |= !follow_plain_ports(proxy, snapshot, workload, pod);
        }
    }
    failed
}

fn start(proxy: &Arc<Proxy>, workload: &Workload) -> Result<Running, cairn_net::NetError> {
    let address = workload.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let options = ListenOptions::default();
    let mut running = match &proxy.settings.capture {
        Capture::Addresses { twins } => {
            let application = if *twins { twin(address) } else { address };
            let uid = Arc::clone(&workload.uid);
            let pod = Arc::new(Pod { uid, address, namespace: None, application });
            let hbone = cairn_net::listen(SocketAddr::new(address, HBONE_PORT), &options)?;
            let mut listeners = vec![accept(proxy, &pod, hbone, Way::Hbone)];
            // A SOCKS5 port is an identity without a password: on loopback only.
            if address.is_loopback() {
                let socks = cairn_net::listen(SocketAddr::new(address, SOCKS_PORT), &options)?;
                listeners.push(accept(proxy, &pod, socks, Way::Socks));
            }
            Running { pod, listeners, plain: BTreeSet::new() }
        }
        Capture::Namespaces(directory) => {
            let file = directory.join(namespace_file(&workload.namespace, &workload.name));
            let namespace = Namespace::open(&file)?;
            let options = ListenOptions { transparent: true, mark: Some(cairn_net::ZTUNNEL_MARK), ..options };
            let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
            let listen = |port| namespace.within(|| cairn_net::listen(any(port), &options))?;
            let ports = [
                (HBONE_PORT, Way::Hbone),
                (OUTBOUND_PORT, Way::Redirected),
                (PLAINTEXT_PORT, Way::Plaintext),
            ];
            let bound: Result<Vec<_>, _> =
                ports.map(|(port, way)| listen(port).map(|at| (at, way))).into_iter().collect();
            let bound = bound?;
            let uid = Arc::clone(&workload.uid);
            let pod = Arc::new(Pod { uid, address, namespace: Some(namespace), application: address });
            let listeners = bound.into_iter().map(|(at, way)| accept(proxy, &pod, at, way)).collect();
            Running { pod, listeners, plain: BTreeSet::new() }
        }
    };
    // Certificates are fetched before the first connection needs them.
    let warm = Arc::clone(proxy);
    let identity = workload.identity.clone();
    running.listeners.push(tokio::spawn(async move {
        if let Err(error) = warm.certificates.get(&identity).await {
            tracing::warn!(%identity, %error, "no certificate yet, will retry");
        }
    }));
    Ok(running)
}

/// With twin addresses, takes plaintext on the ports that the application serves. Returns whether all could be had.
fn follow_plain_ports(
    proxy: &Arc<Proxy>,
    snapshot: &Snapshot,
    workload: &Workload,
    pod: &mut Running,
) -> bool {
    if !matches!(proxy.settings.capture, Capture::Addresses { twins: true }) {
        return true;
    }
    let mut complete = true;
    for port in application_ports(snapshot, workload) {
        if OWN_PORTS.contains(&port) || pod.plain.contains(&port) {
            continue;
        }
        match cairn_net::listen(SocketAddr::new(pod.pod.address, port), &ListenOptions::default()) {
            Ok(listener) => {
                pod.plain.insert(port);
                pod.listeners.push(accept(proxy, &pod.pod, listener, Way::PlaintextHere));
            }
            Err(error) => {
                complete = false;
                tracing::warn!(pod = %workload.uid, port, %error, "plaintext port is taken, will retry");
            }
        }
    }
    complete
}

/// The ports behind the services of a workload.
fn application_ports(snapshot: &Snapshot, workload: &Workload) -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    for (key, mappings) in &workload.services {
        ports.extend(mappings.iter().map(|mapping| mapping.target_port));
        if let Some(state) = snapshot.service(key) {
            ports.extend(state.service.ports.iter().map(|port| port.target_port));
        }
    }
    ports.remove(&0);
    ports
}

/// The ways in which a connection reaches the ztunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// From a peer, as HBONE.
    Hbone,
    /// From the pod, by redirection.
    Redirected,
    /// From the pod, by SOCKS5.
    Socks,
    /// From a peer, as plaintext, by redirection.
    Plaintext,
    /// From a peer, as plaintext, on the pod's address and the application's port.
    PlaintextHere,
}

fn accept(proxy: &Arc<Proxy>, pod: &Arc<Pod>, listener: TcpListener, way: Way) -> JoinHandle<()> {
    let (proxy, pod) = (Arc::clone(proxy), Arc::clone(pod));
    tokio::spawn(async move {
        loop {
            let (stream, peer) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(pod = %pod.uid, ?way, %error, "accept failed");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                () = proxy.drain.started() => return,
            };
            let Ok(stream) = stream.into_std() else { continue };
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            let (proxy, pod) = (Arc::clone(&proxy), Arc::clone(&pod));
            let workers = proxy.workers.clone();
            let start = move |worker| async move {
                // The socket is registered with the worker's own event queue.
                match TcpStream::from_std(stream) {
                    Ok(stream) => hand_over(proxy, pod, worker, stream, peer, way).await,
                    Err(error) => tracing::warn!(%peer, %error, "connection cannot be taken over"),
                }
            };
            workers.run(start).await;
        }
    })
}

async fn hand_over(
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    worker: usize,
    stream: TcpStream,
    peer: SocketAddr,
    way: Way,
) {
    if let Err(error) = cairn_net::prepare(&stream) {
        tracing::debug!(%peer, %error, "client went away at once");
        return;
    }
    match way {
        Way::Hbone => inbound::connection(proxy, pod, worker, stream, peer).await,
        Way::Redirected => outbound::redirected(proxy, pod, worker, stream, peer).await,
        Way::Socks => outbound::socks(proxy, pod, worker, stream, peer).await,
        Way::Plaintext => plaintext::redirected(proxy, pod, worker, stream, peer).await,
        Way::PlaintextHere => plaintext::direct(proxy, pod, worker, stream, peer).await,
    }
}

#[cfg(test)]
mod tests {
    use super::{namespace_file, twin};

    #[test]
    fn namespaces_are_files_of_any_pod_and_of_one_only() {
        assert_eq!(namespace_file("shop", "web-0"), "shop.web-0");
        let (a, b) = (namespace_file("shop", &"a".repeat(253)), namespace_file("shop", &"a".repeat(252)));
        assert!(a.starts_with("shop.aaa") && a != b, "{a} {b}");
        assert_eq!((a.len(), b.len()), (200, 200));
    }

    #[test]
    fn twins_are_loopback_addresses_of_their_own() {
        for (address, expected) in
            [("127.10.1.2", "127.30.1.2"), ("127.250.0.1", "127.14.0.1"), ("10.0.0.1", "10.0.0.1")]
        {
            assert_eq!(twin(address.parse().unwrap()), expected.parse::<std::net::IpAddr>().unwrap());
        }
    }
}
