//! The pods of this node: which are here, and the listeners that each has.

use crate::handover::Owner;
use crate::settings::Capture;
use crate::{Proxy, inbound, outbound, plaintext};
use cairn_mesh::{
    HBONE_PORT, Identity, OUTBOUND_PORT, OWN_PORTS, PLAINTEXT_PORT, SOCKS_PORT, Snapshot, TunnelProtocol,
    Workload,
};
use cairn_net::{Drain, DrainGuard, DrainTrigger, ListenOptions, Namespace};
use cairn_process::{Pending, Workers};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// How long a pod whose listeners cannot be had waits before the next try.
const RETRY: Duration = Duration::from_millis(500);

/// The first pause after a failed accept, so that running out of descriptors is not a hot loop; it doubles up to the
/// last while accepts go on failing.
const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(10);
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// As many connections wait to be accepted at most (the default of [`ListenOptions`]), and are taken when the drain begins.
const WAITING_MAX: usize = 1024;

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
    /// Whose addresses sockets towards its application may take.
    pub spoofing: Spoofing,
    /// The mark on packets of ours.
    pub mark: Option<u32>,
    /// Loopback, where sockets are opened for it, is the pod's alone: nobody else can connect to what listens there.
    pub is_alone: bool,
    /// Starts when the pod leaves: peers are told to open no more tunnels to it.
    pub drain: Drain,
}

/// Whose addresses sockets towards an application may take, so that it sees who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoofing {
    /// Nobody's.
    None,
    /// Those of clients on loopback, where every address is ours.
    Loopback,
    /// Every client's: the kernel lets us, and redirection brings the replies back.
    Any,
}

impl Spoofing {
    /// Whether it covers this client.
    pub fn covers(self, client: IpAddr) -> bool {
        match self {
            Self::None => false,
            Self::Loopback => client.is_loopback(),
            Self::Any => true,
        }
    }
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
    drain: DrainTrigger,
    listeners: Vec<JoinHandle<()>>,
    /// Ports on which plaintext is taken in place of the application.
    plain: BTreeSet<u16>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // What is open goes on as long as its sockets do.
        self.drain.start();
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

/// Keeps listeners in step with the pods of this node, as the mesh knows them, until the drain begins.
pub async fn run(proxy: Arc<Proxy>, capture: Capture, first: Pending) {
    let mut first = Some(first);
    let mut changes = proxy.mesh.changes();
    let mut running: HashMap<Arc<str>, Running> = HashMap::new();
    loop {
        changes.borrow_and_update();
        let snapshot = proxy.mesh.snapshot();
        let failed = reconcile(&proxy, &capture, &snapshot, &mut running);
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
    // The listeners end by themselves, and this task with the process.
    std::future::pending::<()>().await;
    drop(running);
}

/// Follows certificates alone: for pods that come and go as istio-cni says.
pub async fn keep_certificates(proxy: Arc<Proxy>) {
    let mut changes = proxy.mesh.changes();
    loop {
        changes.borrow_and_update();
        follow_certificates(&proxy, &proxy.mesh.snapshot());
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Has the certificates of this node's pods fetched before the first connection needs them, and forgotten with the last
/// workload of an identity here.
fn follow_certificates(proxy: &Proxy, snapshot: &Snapshot) {
    // Who does not know its node cannot tell whose certificates it needs before they are asked for, nor whose no longer.
    if proxy.settings.node.is_empty() {
        return;
    }
    let here = || snapshot.workloads().filter(|workload| *workload.node == *proxy.settings.node);
    let known: HashSet<&Identity> = here().map(|workload| &workload.identity).collect();
    // Keys of those who left are not kept.
    for identity in proxy.certificates.identities() {
        if !known.contains(&identity) {
            proxy.certificates.forget(&identity);
        }
    }
    let wanted: HashSet<&Identity> =
        here().filter(|workload| is_local(proxy, workload)).map(|workload| &workload.identity).collect();
    for identity in wanted {
        if let Err(error) = proxy.certificates.prefetch(identity) {
            tracing::warn!(%identity, %error, "certificate cannot be fetched ahead");
        }
    }
}

fn is_local(proxy: &Proxy, workload: &Workload) -> bool {
    *workload.node == *proxy.settings.node
        && workload.protocol == TunnelProtocol::Hbone
        && !workload.native_tunnel
        && !workload.addresses.is_empty()
}

/// Starts and stops listeners; returns whether some could not be had and must be tried again.
fn reconcile(
    proxy: &Arc<Proxy>,
    capture: &Capture,
    snapshot: &Snapshot,
    running: &mut HashMap<Arc<str>, Running>,
) -> bool {
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
    follow_certificates(proxy, snapshot);
    let mut failed = false;
    for (uid, workload) in local {
        if !running.contains_key(uid) {
            match start(proxy, capture, workload) {
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
            failed |= !follow_plain_ports(proxy, capture, snapshot, workload, pod);
        }
    }
    failed
}

fn start(proxy: &Arc<Proxy>, capture: &Capture, workload: &Workload) -> Result<Running, cairn_net::NetError> {
    let address = workload.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let options = ListenOptions::default();
    let (drain, drained) = proxy.drain.part();
    Ok(match capture {
        Capture::Addresses { twins } => {
            let application = if *twins { twin(address) } else { address };
            let uid = Arc::clone(&workload.uid);
            let spoofing = Spoofing::Loopback;
            let pod = Arc::new(Pod {
                uid,
                address,
                namespace: None,
                application,
                spoofing,
                mark: None,
                is_alone: false,
                drain: drained,
            });
            let owner = Owner { uid: &workload.uid, namespace: None };
            let listen = |port| proxy.sockets.listen(owner, SocketAddr::new(address, port), &options);
            let hbone = listen(HBONE_PORT)?;
            let mut listeners = vec![accept(proxy, &pod, hbone, Way::Hbone)];
            // A SOCKS5 port is an identity without a password: on loopback only.
            if address.is_loopback() {
                listeners.push(accept(proxy, &pod, listen(SOCKS_PORT)?, Way::Socks));
            }
            Running { pod, drain, listeners, plain: BTreeSet::new() }
        }
        Capture::Namespaces(directory) => {
            let file = directory.join(namespace_file(&workload.namespace, &workload.name));
            let namespace = Namespace::open(&file)?;
            let options = ListenOptions { transparent: true, mark: Some(cairn_net::ZTUNNEL_MARK), ..options };
            let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
            let owner = Owner { uid: &workload.uid, namespace: Some(&namespace) };
            let listen = |port| proxy.sockets.listen(owner, any(port), &options);
            let ports = [
                (HBONE_PORT, Way::Hbone),
                (OUTBOUND_PORT, Way::Redirected),
                (PLAINTEXT_PORT, Way::Plaintext),
            ];
            let bound: Result<Vec<_>, _> =
                ports.map(|(port, way)| listen(port).map(|at| (at, way))).into_iter().collect();
            let bound = bound?;
            let uid = Arc::clone(&workload.uid);
            let pod = Arc::new(Pod {
                uid,
                address,
                namespace: Some(namespace),
                application: address,
                spoofing: Spoofing::Any,
                mark: Some(cairn_net::ZTUNNEL_MARK),
                is_alone: true,
                drain: drained,
            });
            let listeners = bound.into_iter().map(|(at, way)| accept(proxy, &pod, at, way)).collect();
            Running { pod, drain, listeners, plain: BTreeSet::new() }
        }
    })
}

/// With twin addresses, takes plaintext on the ports that the application serves. Returns whether all could be had.
fn follow_plain_ports(
    proxy: &Arc<Proxy>,
    capture: &Capture,
    snapshot: &Snapshot,
    workload: &Workload,
    pod: &mut Running,
) -> bool {
    if !matches!(capture, Capture::Addresses { twins: true }) {
        return true;
    }
    let mut complete = true;
    for port in application_ports(snapshot, workload) {
        if OWN_PORTS.contains(&port) || pod.plain.contains(&port) {
            continue;
        }
        let (owner, at) =
            (Owner { uid: &workload.uid, namespace: None }, SocketAddr::new(pod.pod.address, port));
        match proxy.sockets.listen(owner, at, &ListenOptions::default()) {
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
pub enum Way {
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

impl Way {
    /// What logs call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hbone => "HBONE",
            Self::Redirected => "outbound",
            Self::Socks => "SOCKS5",
            Self::Plaintext | Self::PlaintextHere => "plaintext",
        }
    }
}

fn accept(proxy: &Arc<Proxy>, pod: &Arc<Pod>, listener: Arc<TcpListener>, way: Way) -> JoinHandle<()> {
    let (of, label) = (Arc::clone(pod), Arc::clone(&pod.uid));
    let shared = Arc::clone(proxy);
    accept_with(proxy, label, way.as_str(), listener, move |worker, stream, peer| {
        hand_over(Arc::clone(&shared), Arc::clone(&of), worker, stream, peer, way)
    })
}

/// Accepts connections until the drain begins, and has each served by a worker. `label` is whose they are in logs, and
/// `way` which of them.
pub fn accept_with<S, F>(
    proxy: &Arc<Proxy>,
    label: Arc<str>,
    way: &'static str,
    listener: Arc<TcpListener>,
    serve: S,
) -> JoinHandle<()>
where
    S: Fn(usize, TcpStream, SocketAddr) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (workers, drain) = (proxy.workers.clone(), proxy.drain.clone());
    let failures = proxy.accept_failures.clone();
    tokio::spawn(async move {
        // The drain is not over before this has seen it begin, nor before a worker has what was accepted.
        let _accepting = drain.hold();
        let mut pause = ACCEPT_PAUSE_MIN;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = drain.started() => break,
            };
            match accepted {
                Ok((stream, peer)) => {
                    pause = ACCEPT_PAUSE_MIN;
                    give(&workers, drain.hold(), stream, peer, serve.clone()).await;
                }
                Err(error) => {
                    failures.inc();
                    tracing::warn!(pod = %label, way, %error, ?pause, "accept failed");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(ACCEPT_PAUSE_MAX);
                }
            }
        }
        // Those who are connected already and wait would be reset with the listener, unless a successor has it too.
        for _ in 0..WAITING_MAX {
            let accepted = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
            let Ok(Ok((stream, peer))) = accepted else { break };
            give(&workers, drain.hold(), stream, peer, serve.clone()).await;
        }
    })
}

/// Has a worker serve a connection; `working` lives as long.
async fn give<S, F>(workers: &Workers, working: DrainGuard, stream: TcpStream, peer: SocketAddr, serve: S)
where
    S: FnOnce(usize, TcpStream, SocketAddr) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let Ok(stream) = stream.into_std() else { return };
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let start = move |worker| async move {
        let _working = working;
        // The socket is registered with the worker's own event queue.
        match TcpStream::from_std(stream) {
            Ok(stream) => serve(worker, stream, peer).await,
            Err(error) => tracing::warn!(%peer, %error, "connection cannot be taken over"),
        }
    };
    workers.run(start).await;
}

/// Serves one connection of a pod. Each way takes the memory that it needs, as long as the connection is open.
pub async fn hand_over(
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
        Way::Hbone => Box::pin(inbound::connection(proxy, pod, worker, stream, peer)).await,
        Way::Redirected => Box::pin(outbound::redirected(proxy, pod, worker, stream, peer)).await,
        Way::Socks => Box::pin(outbound::socks(proxy, pod, worker, stream, peer)).await,
        Way::Plaintext => Box::pin(plaintext::redirected(proxy, pod, worker, stream, peer)).await,
        Way::PlaintextHere => Box::pin(plaintext::direct(proxy, pod, worker, stream, peer)).await,
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
