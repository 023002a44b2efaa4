//! Pods as istio-cni names them (ZDS): it tells which are in the mesh and hands over their network namespaces, and
//! waits for each until it is served.
//!
//! `message.rs` reads and writes packets, `roster.rs` knows who is to be served, `enrolled.rs` serves one pod; here they
//! meet. Where a ztunnel of Istio exits on a message out of order, the connection ends and begins anew: one bad message
//! must not cost all pods of the node their traffic.

mod enrolled;
mod message;
mod roster;

pub use message::PodName;

use crate::Proxy;
use crate::pods::Way;
use crate::settings::{InPod, OriginalSource, OwnPod};
use cairn_mesh::{HBONE_PORT, SOCKS_PORT};
use cairn_net::{Namespace, NamespaceId, PacketError, PacketSocket};
use cairn_process::{Pending, Readiness};
use cairn_telemetry::{Counter, Gauge, Metrics};
use enrolled::{ALL_WAYS, Place, Served};
use message::{Fault, Message};
use parking_lot::Mutex;
use roster::{Added, Roster};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// A pod that could not be served is tried again this often (facts: 5 s).
const RETRY: Duration = Duration::from_secs(5);

/// The first pause before dialling again; it doubles up to the last (facts: 10 ms to 15 s).
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(15);

/// istio-cni reads what it is sent within this time (facts: its own deadline, 5 s).
const SEND_MAX: Duration = Duration::from_secs(5);

/// What readiness says while it is not known which pods there are.
const MANAGER: &str = "workload proxy manager";

/// Why a connection to istio-cni ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Packet(#[from] PacketError),
    #[error("istio-cni closed the connection")]
    Closed,
    #[error("istio-cni takes no answers")]
    Stuck,
    #[error("{0}")]
    Fault(Fault),
}

/// A pod for the config dump.
#[derive(Clone, Debug)]
pub struct View {
    /// Its name.
    pub name: PodName,
    /// It has its listeners.
    pub is_up: bool,
}

/// The pods that istio-cni has named, by uid, for operators.
#[derive(Default)]
pub struct Views(Mutex<BTreeMap<Arc<str>, View>>);

impl Views {
    /// The pods now.
    pub fn list(&self) -> BTreeMap<Arc<str>, View> {
        self.0.lock().clone()
    }
}

/// A namespace, compared by what it is rather than by how it came.
#[derive(Clone)]
struct Held(Namespace, NamespaceId);

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.1 == other.1
    }
}

struct Manager {
    proxy: Arc<Proxy>,
    settings: InPod,
    roster: Roster<Held>,
    served: HashMap<Arc<str>, Served>,
    readiness: Readiness,
    unready: Option<Pending>,
    counts: Counts,
}

/// Metrics as Istio's ztunnel names them.
struct Counts {
    active: Gauge,
    pending: Gauge,
    started: Counter,
    stopped: Counter,
}

impl Counts {
    fn new(metrics: &Metrics) -> Self {
        Self {
            active: metrics.gauge("workload_manager_active_proxy_count", "Pods that are served"),
            pending: metrics.gauge("workload_manager_pending_proxy_count", "Pods that cannot be served yet"),
            started: metrics.counter("workload_manager_proxies_started", "Pods that have begun to be served"),
            stopped: metrics.counter("workload_manager_proxies_stopped", "Pods that are served no more"),
        }
    }
}

/// Serves the pods that istio-cni names until the drain begins. `first` is done as soon as readiness waits for them.
pub async fn run(proxy: Arc<Proxy>, settings: InPod, readiness: Readiness, first: Pending) {
    let drain = proxy.drain.clone();
    let unready = readiness.wait_for(MANAGER);
    first.done();
    let mut manager = Manager {
        counts: Counts::new(&proxy.telemetry.metrics),
        unready: Some(unready),
        roster: Roster::new(),
        served: HashMap::new(),
        proxy,
        settings,
        readiness,
    };
    tokio::select! {
        () = manager.follow() => {}
        () = drain.started() => {}
    }
    // Listeners and connections end by themselves, or at the deadline; this task ends with the process.
    std::future::pending::<()>().await;
    drop(manager);
}

impl Manager {
    /// Dials istio-cni for ever.
    async fn follow(&mut self) {
        let mut delay = BACKOFF_MIN;
        loop {
            let Err(ended) = self.connection(&mut delay).await;
            self.roster.disconnected();
            self.tell();
            match ended {
                Ended::Closed => tracing::info!(?delay, "istio-cni closed the connection"),
                error => {
                    let error = crate::onward::chain(&error);
                    tracing::warn!(error, ?delay, "no connection to istio-cni");
                }
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(BACKOFF_MAX);
        }
    }

    /// One connection, from its beginning to its end.
    async fn connection(&mut self, delay: &mut Duration) -> Result<std::convert::Infallible, Ended> {
        let socket = PacketSocket::connect(&self.settings.socket)?;
        self.roster.connected();
        self.tell();
        send(&socket, &message::hello()).await?;
        let mut retry = tokio::time::interval_at(tokio::time::Instant::now() + RETRY, RETRY);
        loop {
            let packet = tokio::select! {
                packet = socket.receive() => packet?.ok_or(Ended::Closed)?,
                _ = retry.tick() => {
                    self.retry();
                    continue;
                }
            };
            *delay = BACKOFF_MIN;
            let taken = message::read(packet).and_then(|message| self.take(message));
            self.tell();
            match taken {
                Ok(done) => send(&socket, &message::answer(done.as_deref().map_or(Ok(()), Err))).await?,
                Err(fault) => {
                    send(&socket, &message::answer(Err(&fault.to_string()))).await?;
                    return Err(Ended::Fault(fault));
                }
            }
        }
    }

    /// Does what a message says; the reason when it cannot be done yet.
    fn take(&mut self, message: Message) -> Result<Option<String>, Fault> {
        match message {
            Message::Add { uid, name, namespace } => return self.add(&uid, name, namespace),
            Message::Keep(uid) => {
                if !self.roster.keep(&uid)? {
                    tracing::debug!(%uid, "pod to be kept is not known");
                }
            }
            Message::Delete(uid) => {
                if self.roster.delete(&uid) {
                    self.stop(&uid);
                }
            }
            Message::SnapshotSent => {
                for uid in self.roster.snapshot_sent()? {
                    self.stop(&uid);
                }
            }
        }
        Ok(None)
    }

    fn add(&mut self, uid: &Arc<str>, name: PodName, namespace: Namespace) -> Result<Option<String>, Fault> {
        let id = namespace.id().map_err(|_| Fault::Read("the network namespace cannot be examined"))?;
        let held = Held(namespace, id);
        match self.roster.add(uid, name.clone(), held.clone()) {
            Added::Same => return Ok(None),
            Added::Replace => self.stop(uid),
            Added::Start => {}
        }
        Ok(self.start(uid, &name, &held).err())
    }

    fn start(&mut self, uid: &Arc<str>, name: &PodName, held: &Held) -> Result<(), String> {
        let PodName { name: pod, namespace, .. } = name;
        let place = Place { uid, name, namespace: Some(&held.0) };
        let ways = ways(&self.settings);
        match enrolled::serve(&self.proxy, &self.settings, &place, &ways) {
            Ok(served) => {
                tracing::info!(%uid, %namespace, %pod, "pod joined");
                self.roster.started(uid);
                self.served.insert(Arc::clone(uid), served);
                self.counts.started.inc();
                Ok(())
            }
            Err(error) => {
                let error = crate::onward::chain(&error);
                tracing::warn!(%uid, %namespace, %pod, error, "pod cannot be served yet, will retry");
                Err(format!("failure to start proxy: {error}"))
            }
        }
    }

    fn stop(&mut self, uid: &str) {
        let Some(served) = self.served.remove(uid) else { return };
        let namespace = served.namespace().cloned();
        drop(served);
        // Its own tunnels ended with it; they would hold its namespace as long as nobody else closes them.
        if let Some(namespace) = namespace {
            let given_up: usize = self.proxy.ways.pools.iter().map(|pool| pool.forget_from(&namespace)).sum();
            tracing::debug!(%uid, given_up, "connections of a pod that left were given up");
        }
        tracing::info!(%uid, "pod left");
        self.counts.stopped.inc();
    }

    fn retry(&mut self) {
        for (uid, pod) in self.roster.pending() {
            // It has been logged, and stays pending.
            let _reason = self.start(&uid, &pod.name, &pod.namespace);
        }
        self.tell();
    }

    /// Brings readiness, metrics and the operators' view up to date.
    fn tell(&mut self) {
        match self.roster.is_whole() {
            true => {
                if let Some(unready) = self.unready.take() {
                    unready.done();
                }
            }
            false => {
                self.unready.get_or_insert_with(|| self.readiness.wait_for(MANAGER));
            }
        }
        let pods = self.roster.pods();
        let views: BTreeMap<Arc<str>, View> = pods
            .map(|(uid, pod)| (Arc::clone(uid), View { name: pod.name.clone(), is_up: pod.is_served }))
            .collect();
        let count = |is_up| views.values().filter(|view| view.is_up == is_up).count();
        self.counts.active.set(i64::try_from(count(true)).unwrap_or(i64::MAX));
        self.counts.pending.set(i64::try_from(count(false)).unwrap_or(i64::MAX));
        *self.proxy.enrolled.0.lock() = views;
    }
}

fn ways(settings: &InPod) -> Vec<(u16, Way)> {
    let mut ways = ALL_WAYS.to_vec();
    if settings.socks5 {
        ways.push((SOCKS_PORT, Way::Socks));
    }
    ways
}

/// Serves one pod in our own namespace until the drain begins (Istio's dedicated mode). `first` is done when it is served.
pub async fn run_dedicated(proxy: Arc<Proxy>, name: PodName, settings: InPod, first: Pending) {
    let uid: Arc<str> = format!("{}/{}", name.namespace, name.name).into();
    let place = Place { uid: &uid, name: &name, namespace: None };
    let ways = ways(&settings);
    let served = loop {
        match enrolled::serve(&proxy, &settings, &place, &ways) {
            Ok(served) => break served,
            Err(error) => {
                let error = crate::onward::chain(&error);
                tracing::warn!(%uid, error, "pod cannot be served yet, will retry");
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    proxy.enrolled.0.lock().insert(uid, View { name, is_up: true });
    first.done();
    // Listeners and connections end by themselves, or at the deadline; this task ends with the process.
    std::future::pending::<()>().await;
    drop(served);
}

/// Takes tunnels to the ztunnel's own pod, so that its ports for operators can be scraped through the mesh.
///
/// # Errors
/// When the port cannot be had.
pub fn serve_own_pod(proxy: &Arc<Proxy>, own: &OwnPod) -> Result<Served, cairn_net::NetError> {
    let uid: Arc<str> = "ztunnel".into();
    let name = PodName {
        name: own.name.as_str().into(),
        namespace: own.namespace.as_str().into(),
        service_account: own.service_account.as_str().into(),
    };
    let settings = InPod { mark: None, original_source: OriginalSource::Never, ..InPod::default() };
    let place = Place { uid: &uid, name: &name, namespace: None };
    enrolled::serve(proxy, &settings, &place, &[(HBONE_PORT, Way::Hbone)])
}

async fn send(socket: &PacketSocket, packet: &[u8]) -> Result<(), Ended> {
    match tokio::time::timeout(SEND_MAX, socket.send(packet)).await {
        Ok(sent) => Ok(sent?),
        Err(_) => Err(Ended::Stuck),
    }
}
