//! The node proxy: takes the traffic of this node's pods, decides where it goes, and carries it.
//!
//! Out: accept → where was it going → [`cairn_mesh::plan`] → open a tunnel → copy → record (`outbound.rs`).
//! In: accept mTLS → CONNECT → is it ours → [`cairn_mesh::decide`] → connect to the application → 200 → copy
//! (`inbound.rs`); plaintext likewise, without an identity (`plaintext.rs`). Pods come and go in `pods.rs`, open
//! connections are decided again in `live.rs`.

mod admin;
mod carry;
mod choice;
mod explain;
mod inbound;
mod live;
mod onward;
mod outbound;
mod plaintext;
mod pods;
mod proxy_protocol;
mod settings;
mod socks;
mod trial;

pub use pods::{TWIN_DISTANCE, namespace_file, twin};
pub use settings::{Capture, CaptureKind, Options, Settings};

use anyhow::{Context, bail};
use cairn_identity::{CaClient, CaSettings, CertificateSettings, Certificates};
use cairn_net::{ConnectOptions, Drain};
use cairn_process::{Operators, Readiness, Workers};
use cairn_telemetry::{Telemetry, TelemetrySettings};
use cairn_xds::{FollowSettings, Mesh};
use choice::Names;
use live::Live;
use onward::Ways;
use pods::Pod;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::task::JoinSet;
use trial::Trials;

/// How many connections to a peer are made so that tunnels that carry much do not hold up others.
const SPREAD_MAX: usize = 4;

/// What all connections of the process share.
struct Proxy {
    settings: Settings,
    mesh: Arc<Mesh>,
    certificates: Arc<Certificates>,
    telemetry: Arc<Telemetry>,
    workers: Workers,
    ways: Ways,
    live: Arc<Live>,
    trials: Trials,
    drain: Drain,
}

impl Proxy {
    /// How sockets are opened on behalf of a pod towards the network: in its namespace, where the kernel chooses its
    /// address and any free port for each destination; else from its address.
    fn options_to_network(&self, pod: &Pod) -> ConnectOptions {
        ConnectOptions {
            bind: pod.namespace.is_none().then_some(pod.address),
            namespace: pod.namespace.clone(),
            mark: pod.namespace.as_ref().map(|_| cairn_net::ZTUNNEL_MARK),
            ..ConnectOptions::default()
        }
    }

    /// How the application of a pod is connected to: from the client's address, so that it sees who calls.
    fn options_to_application(&self, pod: &Pod, client: IpAddr) -> ConnectOptions {
        let spoof = client != pod.address && client.is_ipv4() == pod.address.is_ipv4();
        ConnectOptions {
            bind: spoof.then_some(client).filter(|_| pod.namespace.is_some() || client.is_loopback()),
            transparent: pod.namespace.is_some(),
            namespace: pod.namespace.clone(),
            mark: pod.namespace.as_ref().map(|_| cairn_net::ZTUNNEL_MARK),
            ..ConnectOptions::default()
        }
    }
}

/// Runs a ztunnel until SIGTERM or SIGINT, and drains. Starts its own threads: call it from `main`.
///
/// # Errors
/// When settings are not valid, a port cannot be had or a thread cannot be started.
pub fn run(options: Options) -> anyhow::Result<()> {
    let settings = options.resolve()?;
    cairn_process::init_logging(&settings.log, settings.log_format)?;
    let workers = Workers::start(settings.workers)?;
    let runtime = cairn_process::control_runtime()?;
    let result = runtime.block_on(serve(settings, workers));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}

async fn serve(settings: Settings, workers: Workers) -> anyhow::Result<()> {
    let telemetry_settings = TelemetrySettings { access_log: settings.access_log, ..Default::default() };
    let telemetry =
        Telemetry::new("ztunnel", env!("CARGO_PKG_VERSION"), &telemetry_settings, std::io::stdout());
    let issuer = CaClient::new(CaSettings {
        address: settings.ca_address.clone(),
        roots: settings.xds_root.clone(),
        token: settings.token.clone(),
        cluster_id: settings.cluster_id.clone(),
        impersonate: true,
    });
    let certificate_settings = CertificateSettings { ttl: settings.certificate_ttl, ..Default::default() };
    let certificates = Certificates::new(Arc::new(issuer), certificate_settings);

    let (trigger, drain) = cairn_net::drain();
    let pool = |_| {
        cairn_hbone::Pool::new(cairn_hbone::PoolSettings { spread_max: SPREAD_MAX, ..Default::default() })
    };
    let mesh = Mesh::new();
    let ways = Ways {
        mesh: Arc::clone(&mesh),
        certificates: Arc::clone(&certificates),
        pools: (0..workers.count()).map(pool).collect(),
        loads: Arc::default(),
        names: Names::default(),
    };
    let proxy = Arc::new(Proxy {
        mesh,
        ways,
        certificates,
        telemetry,
        workers,
        live: Arc::default(),
        trials: Trials::default(),
        drain: drain.clone(),
        settings,
    });

    let readiness = Readiness::default();
    let (state, listening) = (readiness.wait_for("state manager"), readiness.wait_for("proxy"));
    start_operators(&proxy, readiness)?;
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&proxy.certificates).renew());
    tasks.spawn(follow(Arc::clone(&proxy)));
    tasks.spawn(recheck(Arc::clone(&proxy)));
    tasks.spawn({
        let proxy = Arc::clone(&proxy);
        async move {
            proxy.mesh.ready().await;
            state.done();
            tracing::info!("first state received");
            pods::run(proxy, listening).await;
        }
    });

    // Without any of its control tasks the proxy would go on with what it last knew, looking healthy.
    let signal = tokio::select! {
        signal = cairn_process::stop_signal() => signal.context("cannot watch for signals")?,
        ended = tasks.join_next() => bail!("a control task ended: {ended:?}"),
    };
    tracing::info!(signal, "draining");
    trigger.start();
    let all_ended = trigger.finished(proxy.settings.drain).await;
    tracing::info!(all_ended, "stopped");
    Ok(())
}

fn start_operators(proxy: &Arc<Proxy>, readiness: Readiness) -> anyhow::Result<()> {
    let at = |port| SocketAddr::new(proxy.settings.address, port);
    let counted = Arc::clone(proxy);
    Operators {
        readiness_address: at(15021),
        metrics_address: at(15020),
        metrics_address_too: None,
        admin_address: SocketAddr::new(proxy.settings.admin_address, 15000),
        readiness,
        metrics: Arc::new(move || counted.telemetry.metrics.encode() + &counted.trials.encode_metrics()),
        admin: admin::router(Arc::clone(proxy)),
    }
    .start()?;
    Ok(())
}

async fn follow(proxy: Arc<Proxy>) {
    let settings = &proxy.settings;
    let node = &settings.node;
    let id = format!("ztunnel~{}~ztunnel.{node}~istio-system.svc.cluster.local", settings.address);
    let mut follow = FollowSettings::new(settings.xds_address.clone(), settings.xds_root.clone(), id);
    follow.token = settings.token.clone();
    follow.cluster_id = settings.cluster_id.clone();
    follow.node_metadata = vec![
        ("NODE_NAME".to_owned(), node.as_str().into()),
        ("CLUSTER_ID".to_owned(), settings.cluster_id.as_str().into()),
    ];
    // Policies are followed to the end, for connections that drain are still decided by them.
    cairn_xds::follow(follow, None, Arc::clone(&proxy.mesh), std::future::pending()).await;
}

/// Follows what the mesh's changes mean for what is open: decides inbound connections again, and gives up tunnels to
/// workloads that are gone.
async fn recheck(proxy: Arc<Proxy>) {
    let mut changes = proxy.mesh.changes();
    while changes.changed().await.is_ok() {
        let snapshot = proxy.mesh.snapshot();
        let cut = proxy.live.recheck(&snapshot);
        if cut > 0 {
            tracing::info!(cut, "connections no longer allowed were cut");
        }
        let is_gone = |uid: &str| snapshot.workload(uid).is_none();
        let given_up: usize = proxy.ways.pools.iter().map(|pool| pool.forget(is_gone)).sum();
        if given_up > 0 {
            tracing::debug!(given_up, "connections to workloads that are gone were given up");
        }
    }
}
