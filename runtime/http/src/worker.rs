//! What the connections of one thread share: upstream connections and their load, and ways to reach the mesh.

use crate::host::Hosts;
use arc_swap::{ArcSwap, Guard};
use cairn_hbone::Pool;
use cairn_identity::Certificates;
use cairn_mesh::{Identity, Snapshot};
use cairn_net::{ConnectOptions, Drain};
use cairn_telemetry::Telemetry;
use http::HeaderValue;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::watch;

/// How one of several endpoints is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Balancer {
    /// Of two picked by weight, the one with fewer requests of this worker in progress.
    #[default]
    LeastRequest,
    /// In turn.
    RoundRobin,
}

/// Settings of a worker.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// How an endpoint is chosen.
    pub balancer: Balancer,
    /// The address that upstream connections come from: the waypoint pod's own; the kernel's choice if unset.
    pub bind: Option<IpAddr>,
    /// How long an endpoint may take to accept a connection. Default: 10 s (Istio `meshConfig.connectTimeout`).
    pub connect_timeout: Duration,
    /// How often a request is tried again on another endpoint. Default: 2 (Istio's default retry policy).
    pub retries_max: usize,
    /// How long an upstream connection is kept without work. Default: 90 s.
    pub upstream_idle: Duration,
    /// The most idle connections kept per endpoint. Default: 256.
    pub upstream_idle_max: usize,
    /// The most connections per endpoint. Default: 4,096.
    pub upstream_connections_max: usize,
    /// How long a client's connection is kept without work. Default: 1 h (Envoy's default).
    pub downstream_idle: Duration,
    /// How long the first bytes of an undeclared protocol are awaited before it is taken for one in which the server
    /// speaks first. Default: 500 ms.
    pub sniff_wait: Duration,
    /// The most bytes of one body that one filter holds. Default: 1 MiB (Envoy's `per_connection_buffer_limit_bytes`).
    pub body_held_max: usize,
    /// The `server` header put on every response; `None` leaves the upstream's. Default: `istio-envoy`, which is what
    /// clients and dashboards of a mesh know.
    pub server: Option<HeaderValue>,
}

impl Default for WorkerSettings {
    fn default() -> Self {
        Self {
            balancer: Balancer::default(),
            bind: None,
            connect_timeout: Duration::from_secs(10),
            retries_max: 2,
            upstream_idle: Duration::from_secs(90),
            upstream_idle_max: 256,
            upstream_connections_max: 4096,
            downstream_idle: Duration::from_secs(3600),
            sniff_wait: Duration::from_millis(500),
            body_held_max: 1 << 20,
            server: Some(HeaderValue::from_static("istio-envoy")),
        }
    }
}

/// How endpoints inside the mesh are reached: through tunnels, as the waypoint itself.
#[derive(Clone)]
pub struct Tunnels {
    /// This worker's tunnels.
    pub pool: Pool,
    /// Where the waypoint's certificate is found.
    pub certificates: Arc<Certificates>,
    /// The waypoint's identity.
    pub identity: Identity,
}

/// One worker: what the connections of one thread share.
pub struct Worker {
    pub(crate) settings: WorkerSettings,
    pub(crate) hosts: Hosts,
    pub(crate) tunnels: Option<Tunnels>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    telemetry: Arc<Telemetry>,
    turn: AtomicU64,
    sites: watch::Sender<()>,
}

impl Worker {
    /// A worker that finds endpoints in the current `snapshot`. Without `tunnels`, only endpoints outside the mesh can
    /// be reached. Its thread must also run [`Worker::maintain`].
    pub fn new(
        settings: WorkerSettings,
        snapshot: Arc<ArcSwap<Snapshot>>,
        tunnels: Option<Tunnels>,
        telemetry: Arc<Telemetry>,
    ) -> Arc<Self> {
        Arc::new(Self {
            settings,
            hosts: Hosts::default(),
            tunnels,
            snapshot,
            telemetry,
            turn: AtomicU64::new(0),
            sites: watch::Sender::new(()),
        })
    }

    /// Closes upstream connections that idled too long and forgets endpoints that nobody uses, until the drain starts.
    pub async fn maintain(self: Arc<Self>, drain: Drain) {
        let mut tick = tokio::time::interval(self.settings.upstream_idle / 4);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = tick.tick() => self.hosts.prune(self.settings.upstream_idle),
            }
        }
    }

    /// Tells open connections that sites changed: those that carry no HTTP are judged again, and cut if they may no
    /// longer pass. (An exchange takes the current site when it begins.)
    pub fn sites_changed(&self) {
        self.sites.send_replace(());
    }

    pub(crate) fn site_changes(&self) -> watch::Receiver<()> {
        self.sites.subscribe()
    }

    /// How upstream connections are made.
    pub(crate) fn connect_options(&self) -> ConnectOptions {
        let WorkerSettings { bind, connect_timeout: timeout, .. } = self.settings;
        ConnectOptions { bind, timeout, ..ConnectOptions::default() }
    }

    pub(crate) fn snapshot(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    pub(crate) fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// A number below `bound`: at random, or in turn if the balancer says so.
    pub(crate) fn draw(&self, bound: u64) -> u64 {
        match self.settings.balancer {
            Balancer::LeastRequest => fastrand::u64(..bound.max(1)),
            Balancer::RoundRobin => self.turn.fetch_add(1, Relaxed) % bound.max(1),
        }
    }
}
