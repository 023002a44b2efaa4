//! A pod that istio-cni has named: its listeners, opened inside its network namespace, and what is done with the
//! connections that arrive on them.

use super::message::PodName;
use crate::Proxy;
use crate::dns::{self, DNS_PORT, Forwarder, servers_of};
use crate::handover::Owner;
use crate::pods::{self, Pod, Spoofing, Way};
use crate::settings::{InPod, OriginalSource};
use cairn_mesh::{HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, SOCKS_PORT, Snapshot, Wanted, Workload};
use cairn_net::{Drain, DrainTrigger, ListenOptions, Namespace, NetError};
use parking_lot::Mutex;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinHandle;

/// How long a connection waits for its pod to become known to the mesh (facts: 5 s).
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);

/// A pod as istio-cni named it.
pub struct Enrolled {
    /// Kubernetes' uid of the pod.
    uid: Arc<str>,
    name: PodName,
    /// Its network namespace; `None` is our own.
    namespace: Option<Namespace>,
    spoofing: Spoofing,
    mark: Option<u32>,
    /// Where its workload was found last, so that it is not searched for each connection.
    known: Mutex<Known>,
    /// Is cut when the pod is removed.
    life: Drain,
    /// A part of that, which starts when the mesh no longer knows the pod. Connections that come when it knows it again
    /// have another.
    presence: Mutex<(DrainTrigger, Drain)>,
}

#[derive(Default)]
struct Known {
    uid: Option<Arc<str>>,
    /// The generation of the mesh in which all were searched in vain.
    searched: Option<u64>,
}

/// A pod that is served. Dropping it closes its listeners and ends its connections; peers are told so.
pub struct Served {
    listeners: Vec<JoinHandle<()>>,
    life: DrainTrigger,
    namespace: Option<Namespace>,
}

impl Served {
    /// The network namespace of the pod; `None` is our own.
    pub fn namespace(&self) -> Option<&Namespace> {
        self.namespace.as_ref()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.life.cut();
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

/// A pod to be served.
pub struct Place<'a> {
    /// Kubernetes' uid of the pod.
    pub uid: &'a Arc<str>,
    /// Its name.
    pub name: &'a PodName,
    /// Its network namespace; `None` is our own.
    pub namespace: Option<&'a Namespace>,
}

/// The ways in which connections reach a pod of the mesh.
pub const ALL_WAYS: [(u16, Way); 3] =
    [(HBONE_PORT, Way::Hbone), (OUTBOUND_PORT, Way::Redirected), (PLAINTEXT_PORT, Way::Plaintext)];

/// Opens the listeners of a pod in its namespace, and serves it.
///
/// # Errors
/// When one of them cannot be had.
pub fn serve(
    proxy: &Arc<Proxy>,
    settings: &InPod,
    place: &Place<'_>,
    ways: &[(u16, Way)],
) -> Result<Served, NetError> {
    let mut is_transparent = true;
    let mut bound = Vec::with_capacity(ways.len());
    for (port, way) in ways {
        let (listener, transparent) = listen(proxy, place.owner(), *port, settings)?;
        is_transparent &= transparent;
        bound.push((listener, *way));
    }
    let (trigger, life) = proxy.drain.part();
    let pod = Arc::new(Enrolled {
        uid: Arc::clone(place.uid),
        name: place.name.clone(),
        namespace: place.namespace.cloned(),
        spoofing: if is_transparent { Spoofing::Any } else { Spoofing::None },
        mark: settings.mark,
        known: Mutex::default(),
        presence: Mutex::new(life.part()),
        life,
    });
    let names = match &settings.dns {
        Some(file) if ways.iter().any(|(_, way)| *way == Way::Redirected) => {
            answer_names(proxy, settings, &pod, place, &servers_of(file))?
        }
        _ => Vec::new(),
    };
    let listeners = bound.into_iter().map(|(listener, way)| accept(proxy, &pod, listener, way));
    let presence = tokio::spawn(follow_presence(Arc::clone(proxy), Arc::clone(&pod)));
    Ok(Served {
        listeners: listeners.chain(names).chain([presence]).collect(),
        life: trigger,
        namespace: place.namespace.cloned(),
    })
}

/// Listens on a port of all addresses of the pod's namespace. Returns as well whether sockets there may take others'
/// addresses.
fn listen(
    proxy: &Proxy,
    owner: Owner<'_>,
    port: u16,
    settings: &InPod,
) -> Result<(Arc<TcpListener>, bool), NetError> {
    let address: IpAddr = match port {
        // An identity without a password: for the pod itself only.
        SOCKS_PORT => Ipv4Addr::LOCALHOST.into(),
        _ if settings.ipv6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    let address = SocketAddr::new(address, port);
    let transparent = settings.original_source != OriginalSource::Never;
    let options = ListenOptions {
        transparent,
        reuse_port: settings.reuse_port,
        mark: settings.mark,
        ..ListenOptions::default()
    };
    let listen = |options: &ListenOptions| proxy.sockets.listen(owner, address, options);
    match listen(&options) {
        Err(NetError::Listen { source, .. })
            if settings.original_source == OriginalSource::IfPermitted
                && source.kind() == ErrorKind::PermissionDenied =>
        {
            Ok((listen(&ListenOptions { transparent: false, ..options })?, false))
        }
        other => Ok((other?, transparent)),
    }
}

/// Answers the pod's DNS questions, which redirection brings to loopback.
fn answer_names(
    proxy: &Arc<Proxy>,
    settings: &InPod,
    pod: &Arc<Enrolled>,
    place: &Place<'_>,
    servers: &[SocketAddr],
) -> Result<Vec<JoinHandle<()>>, NetError> {
    let options =
        ListenOptions { reuse_port: settings.reuse_port, mark: settings.mark, ..ListenOptions::default() };
    let open = |address: IpAddr| {
        let at = SocketAddr::new(address, DNS_PORT);
        let (sockets, owner) = (&proxy.sockets, place.owner());
        let packets = sockets.listen_datagram(owner, at, &options)?;
        Ok::<_, NetError>((at, packets, sockets.listen(owner, at, &options)?))
    };
    let mut sockets = vec![open(Ipv4Addr::LOCALHOST.into())?];
    if settings.ipv6 {
        // A pod may have no IPv6, and then asks nothing that way.
        sockets.extend(open(Ipv6Addr::LOCALHOST.into()).ok());
    }
    let forwarder = Arc::new(Forwarder {
        servers: servers.to_vec(),
        namespace: place.namespace.cloned(),
        mark: settings.mark,
    });
    let mut tasks = Vec::new();
    for (at, packets, listener) in sockets {
        let client = who(proxy, pod);
        let asked = Asked { pod: Arc::clone(pod), at, packets, forwarder: Arc::clone(&forwarder) };
        tasks.push(tokio::spawn(answer_packets(Arc::clone(proxy), asked, client.clone())));
        let (shared, forwarder) = (Arc::clone(proxy), Arc::clone(&forwarder));
        tasks.push(pods::accept_with(proxy, Arc::clone(&pod.uid), "DNS", listener, move |_, stream, _| {
            let (proxy, forwarder, client) = (Arc::clone(&shared), Arc::clone(&forwarder), client.clone());
            async move { dns::serve_connection(&proxy, stream, &forwarder, client).await }
        }));
    }
    Ok(tasks)
}

/// Where a pod's questions in packets arrive.
struct Asked {
    pod: Arc<Enrolled>,
    at: SocketAddr,
    packets: UdpSocket,
    forwarder: Arc<Forwarder>,
}

/// Has a worker answer questions in packets until the pod is removed.
async fn answer_packets<C, F>(proxy: Arc<Proxy>, asked: Asked, client: C)
where
    C: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Option<Arc<Workload>>> + Send + 'static,
{
    let Asked { pod, at, packets, forwarder } = asked;
    let Ok(packets) = packets.into_std() else { return };
    let workers = proxy.workers.clone();
    let life = pod.life.clone();
    let start = move |_worker| async move {
        let packets = match UdpSocket::from_std(packets) {
            Ok(packets) => Arc::new(packets),
            Err(error) => return tracing::warn!(%error, "names cannot be answered"),
        };
        proxy.sockets.remember_datagram(pod.owner(), at, &packets);
        tokio::select! {
            () = dns::serve_packets(proxy, packets, forwarder, client) => {}
            () = life.cut() => {}
        }
    };
    workers.run(start).await;
}

/// Has peers open no more tunnels to the pod when the mesh no longer knows it, which is before its network is gone; those
/// that are open go on.
async fn follow_presence(proxy: Arc<Proxy>, pod: Arc<Enrolled>) {
    let mut changes = proxy.mesh.changes();
    let mut gone = None;
    while changes.changed().await.is_ok() {
        let snapshot = proxy.mesh.snapshot();
        // One that nobody has connected to is of no interest.
        let Some(uid) = pod.known.lock().uid.clone() else { continue };
        if snapshot.workload(&uid).is_some() {
            gone = None;
        } else if gone.as_ref() != Some(&uid) {
            gone = Some(uid);
            let (leaving, _) = std::mem::replace(&mut *pod.presence.lock(), pod.life.part());
            leaving.start();
            tracing::debug!(pod = %pod.uid, "the mesh no longer knows the pod");
        }
    }
}

/// Finds out who the pod is, each time anew.
fn who(
    proxy: &Arc<Proxy>,
    pod: &Arc<Enrolled>,
) -> impl Fn() -> BoxFuture<Option<Arc<Workload>>> + Clone + Send + Sync + use<> {
    let (proxy, pod) = (Arc::clone(proxy), Arc::clone(pod));
    move || {
        let (proxy, pod) = (Arc::clone(&proxy), Arc::clone(&pod));
        let known: BoxFuture<_> = Box::pin(async move { pod.workload_when_known(&proxy).await });
        known
    }
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

fn accept(proxy: &Arc<Proxy>, pod: &Arc<Enrolled>, listener: Arc<TcpListener>, way: Way) -> JoinHandle<()> {
    let (of, label) = (Arc::clone(pod), Arc::clone(&pod.uid));
    let shared = Arc::clone(proxy);
    pods::accept_with(proxy, label, way.as_str(), listener, move |worker, stream, peer| {
        let (proxy, pod) = (Arc::clone(&shared), Arc::clone(&of));
        async move {
            let life = pod.life.clone();
            tokio::select! {
                // A tunnels' connection has a last word.
                biased;
                () = connection(proxy, pod, worker, stream, peer, way) => {}
                () = life.cut() => tracing::debug!(%peer, ?way, "connection ended with its pod"),
            }
        }
    })
}

async fn connection(
    proxy: Arc<Proxy>,
    enrolled: Arc<Enrolled>,
    worker: usize,
    stream: TcpStream,
    peer: SocketAddr,
    way: Way,
) {
    let Some(workload) = enrolled.workload_when_known(&proxy).await else {
        return tracing::warn!(%peer, pod = %enrolled.uid, ?way, "connection failed: the mesh does not know the pod");
    };
    let address = match own_address(&stream, peer, way, &workload) {
        Ok(address) => address,
        Err(error) => return tracing::debug!(%peer, %error, "client went away at once"),
    };
    let pod = Arc::new(Pod {
        uid: Arc::clone(&workload.uid),
        address,
        namespace: enrolled.namespace.clone(),
        application: address,
        spoofing: enrolled.spoofing,
        mark: enrolled.mark,
        is_alone: true,
        drain: enrolled.presence.lock().1.clone(),
    });
    pods::hand_over(proxy, pod, worker, stream, peer, way).await;
}

/// Which of the pod's addresses a connection concerns: the one it comes from, or the one it was sent to.
fn own_address(
    stream: &TcpStream,
    peer: SocketAddr,
    way: Way,
    workload: &Workload,
) -> Result<IpAddr, NetError> {
    Ok(match way {
        Way::Redirected => peer.ip(),
        Way::Socks => workload.addresses.first().copied().unwrap_or(peer.ip()),
        Way::Plaintext => cairn_net::original_destination(stream)?.ip(),
        Way::Hbone | Way::PlaintextHere => {
            stream.local_addr().map_err(NetError::LocalAddress)?.ip().to_canonical()
        }
    })
}

impl Place<'_> {
    fn owner(&self) -> Owner<'_> {
        Owner { uid: self.uid, namespace: self.namespace }
    }
}

impl Enrolled {
    fn owner(&self) -> Owner<'_> {
        Owner { uid: &self.uid, namespace: self.namespace.as_ref() }
    }

    /// The pod's workload, waiting for it while the mesh does not know it; `None` when it does not come to know it.
    async fn workload_when_known(&self, proxy: &Proxy) -> Option<Arc<Workload>> {
        let mut changes = proxy.mesh.changes();
        let deadline = tokio::time::Instant::now() + WORKLOAD_WAIT;
        loop {
            changes.borrow_and_update();
            if let Some(workload) = self.workload(proxy, &proxy.mesh.snapshot()) {
                return Some(workload);
            }
            proxy.mesh.mention(&Wanted::Workload(self.usual_uid(proxy).into()));
            tokio::time::timeout_at(deadline, changes.changed()).await.ok()?.ok()?;
        }
    }

    /// What the control plane calls a pod (facts: forms of uid).
    fn usual_uid(&self, proxy: &Proxy) -> String {
        let PodName { name, namespace, .. } = &self.name;
        format!("{}//Pod/{namespace}/{name}", proxy.settings.cluster_id)
    }

    /// The workload on our node with the pod's name and service account.
    fn workload(&self, proxy: &Proxy, snapshot: &Snapshot) -> Option<Arc<Workload>> {
        let node = &*proxy.settings.node;
        let mut known = self.known.lock();
        let likely = known.uid.as_ref().and_then(|uid| snapshot.workload(uid));
        if let Some(workload) = likely.filter(|workload| self.name.is_of(workload, node)) {
            return Some(Arc::clone(workload));
        }
        let usual = snapshot.workload(&self.usual_uid(proxy));
        let usual = usual.filter(|workload| self.name.is_of(workload, node));
        if usual.is_none() && known.searched == Some(snapshot.generation()) {
            return None;
        }
        known.searched = Some(snapshot.generation());
        let found =
            usual.or_else(|| snapshot.workloads().find(|workload| self.name.is_of(workload, node)))?;
        known.uid = Some(Arc::clone(&found.uid));
        Some(Arc::clone(found))
    }
}

impl PodName {
    /// Whether a workload is this pod, on this node if we know which that is.
    fn is_of(&self, workload: &Workload, node: &str) -> bool {
        workload.name == self.name
            && workload.namespace == self.namespace
            && workload.identity.service_account() == &*self.service_account
            && (node.is_empty() || &*workload.node == node)
    }
}
