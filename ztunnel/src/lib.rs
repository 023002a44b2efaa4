//! The node proxy: takes the traffic of this node's pods, decides where it goes, and carries it.
//!
//! Out: accept → where was it going → [`cairn_mesh::plan`] → open a tunnel → copy → record (`outbound.rs`).
//! In: accept mTLS → CONNECT → is it ours → [`cairn_mesh::decide`] → connect to the application → 200 → copy
//! (`inbound.rs`); plaintext likewise, without an identity (`plaintext.rs`). Pods come and go in `pods.rs` as the mesh
//! says, or in `inpod.rs` as istio-cni does; open connections are decided again in `live.rs`.

mod access;
mod admin;
mod asked;
mod carry;
mod choice;
mod collector;
mod demand;
mod dns;
mod dump;
mod explain;
mod handover;
mod inbound;
mod inpod;
mod istio;
mod lifecycle;
mod live;
mod local;
mod onward;
mod open;
mod outbound;
mod plaintext;
mod pods;
mod proxy_protocol;
mod revoked;
mod settings;
mod socks;
mod trial;

pub use inpod::PodName;
pub use pods::{TWIN_DISTANCE, namespace_file, twin};
pub use settings::{
    Afterwards, Capture, CaptureKind, ControlPlane, Handover, InPod, KeptState, Options, OriginalSource,
    OwnPod, PodSource, Settings,
};

use anyhow::{Context, bail};
use asked::OnDemandDns;
use cairn_hbone::{Pool, PoolSettings};
use cairn_identity::{CaClient, CaSettings, CertificateSettings, Certificates, Revocations, Trust};
use cairn_net::{ConnectOptions, Drain, ListenOptions};
use cairn_process::{
    Liveness, LogControl, LogFormat, OperatorError, Operators, Pending, Readiness, Serving, Workers,
};
use cairn_telemetry::{Counter, Telemetry, TelemetrySettings};
use cairn_xds::{FollowSettings, KeepSettings, Mesh};
use choice::Names;
use collector::Collector;
use handover::{Owner, Sockets};
use live::Live;
use onward::Ways;
use open::OpenConnections;
use pods::{Pod, Spoofing};
use std::ffi::OsString;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use trial::Trials;

/// How long the process stays for its last log lines, and for the last records of its collector.
const LAST_WORDS_MAX: Duration = Duration::from_secs(2);

/// How many connections to a peer are made so that tunnels that carry much do not hold up others.
const SPREAD_MAX: usize = 4;

/// What all connections of the process share.
struct Proxy {
    settings: Settings,
    mesh: Arc<Mesh>,
    certificates: Arc<Certificates>,
    telemetry: Arc<Telemetry>,
    /// Where connections are told of beside the log.
    collector: Option<Collector>,
    workers: Workers,
    ways: Ways,
    live: Arc<Live>,
    /// Connections that are carried.
    open: Arc<OpenConnections>,
    trials: Trials,
    drain: Drain,
    /// The pods that istio-cni has named.
    enrolled: inpod::Views,
    dns: dns::DnsMetrics,
    /// What is logged.
    log: LogControl,
    /// An operator asks for the drain.
    quit: Notify,
    /// Connections that could not be accepted.
    accept_failures: Counter,
    /// What is listened on.
    sockets: Arc<Sockets>,
}

impl Proxy {
    /// How sockets are opened on behalf of a pod towards the network: in its namespace, where the kernel chooses its
    /// address and any free port for each destination; else from its address.
    fn options_to_network(&self, pod: &Pod) -> ConnectOptions {
        ConnectOptions {
            bind: pod.namespace.is_none().then_some(pod.address),
            namespace: pod.namespace.clone(),
            mark: pod.mark,
            ..ConnectOptions::default()
        }
    }

    /// All metrics in the Prometheus text format.
    fn encode_metrics(&self) -> String {
        let mut text = self.telemetry.metrics.encode();
        text += &self.mesh.encode_metrics();
        text += &encode_state_metrics(&self.mesh);
        text += &self.ways.asked.encode_metrics();
        text += &self.trials.encode_metrics();
        if let Some(revocations) = self.certificates.trust().revocations() {
            text += &revoked::encode_metrics(&revocations.counts());
        }
        let (outbound, inbound) = self.open.counts();
        let dropped = self.log.dropped();
        // Writing to a text cannot fail.
        let _written = write!(
            text,
            "# HELP istio_tcp_sockets_open Connections that are carried\n# TYPE istio_tcp_sockets_open gauge\n\
             istio_tcp_sockets_open{{reporter=\"source\"}} {outbound}\n\
             istio_tcp_sockets_open{{reporter=\"destination\"}} {inbound}\n\
             # HELP cairn_log_dropped_total Log lines dropped, because the reader was too slow\n\
             # TYPE cairn_log_dropped_total counter\ncairn_log_dropped_total {dropped}\n"
        );
        text + &cairn_process::encode_file_metrics()
    }

    /// How the application of a pod is connected to: from the client's address, so that it sees who calls.
    fn options_to_application(&self, pod: &Pod, client: IpAddr) -> ConnectOptions {
        let spoof =
            client != pod.address && client.is_ipv4() == pod.address.is_ipv4() && pod.spoofing.covers(client);
        ConnectOptions {
            bind: spoof.then_some(client),
            transparent: pod.spoofing == Spoofing::Any,
            namespace: pod.namespace.clone(),
            mark: pod.mark,
            ..ConnectOptions::default()
        }
    }
}

/// Runs a ztunnel until SIGTERM or SIGINT, and drains. Starts its own threads: call it from `main`.
///
/// # Errors
/// When settings are not valid, a port cannot be had or a thread cannot be started.
pub fn run(options: Options) -> anyhow::Result<()> {
    let text =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    let environment: istio::Environment = std::env::vars_os().filter_map(text).collect();
    let is_istios = options.command.first().is_some_and(|command| command == "proxy");
    let collector = collector::settings(|name| {
        environment.get(name).map(|text| text.trim()).filter(|text| !text.is_empty())
    })?;
    let settings = match options.command.first().map(String::as_str) {
        None => options.resolve()?,
        Some("proxy") => istio::settings(&environment)?,
        Some("version") => {
            println!("cairn ztunnel {}", env!("CARGO_PKG_VERSION"));
            return Ok(());
        }
        Some(other) => bail!("`{other}` is neither `proxy` nor `version`"),
    };
    let settings = Settings { collector, ..settings };
    let log = cairn_process::init_queued_logging(&settings.log, settings.log_format)?;
    if is_istios {
        istio::tell_what_is_without_effect(&environment);
    }
    cairn_process::raise_file_limit();
    let result = run_with(settings, log.clone());
    log.flush(LAST_WORDS_MAX);
    result
}

fn run_with(settings: Settings, log: LogControl) -> anyhow::Result<()> {
    settings.compliance.enforce()?;
    let workers = Workers::start(settings.workers)?;
    let runtime = cairn_process::control_runtime()?;
    let result = runtime.block_on(serve(settings, workers, log));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(settings: Settings, workers: Workers, log: LogControl) -> anyhow::Result<()> {
    let json = settings.log_format == LogFormat::Json;
    let telemetry_settings =
        TelemetrySettings { access_log: settings.access_log, json, ..Default::default() };
    let telemetry =
        Telemetry::new("ztunnel", env!("CARGO_PKG_VERSION"), &telemetry_settings, std::io::stdout());
    let dns = dns::DnsMetrics::new(&telemetry.metrics);
    let accept_failures =
        telemetry.metrics.counter("cairn_accept_failures", "Connections that could not be accepted");
    let issuer = CaClient::new(CaSettings {
        address: settings.ca.address.clone(),
        roots: settings.ca.roots.clone(),
        token: settings.token.clone(),
        host: settings.ca.host.clone(),
        headers: settings.ca.headers.clone(),
        cluster_id: settings.cluster_id.clone(),
        impersonate: true,
    });
    let certificate_settings = CertificateSettings { ttl: settings.certificate_ttl, ..Default::default() };
    // Without knowing who is revoked nobody is served: a successor that does not start leaves its predecessor at work.
    let revocations = settings.revoked.clone().map(Revocations::open).transpose()?;
    let trust = Arc::new(Trust::new(revocations));
    trust.set_aliases(settings.mesh.trust_domain_aliases.iter().cloned());
    let certificates = Certificates::with_trust(Arc::new(issuer), certificate_settings, trust);

    let sockets = match &settings.handover {
        Some(_) => Sockets::for_handover().context("cannot tell which network namespace this is")?,
        None => Sockets::new(),
    };
    let (trigger, drain) = cairn_net::drain();
    let limits = PoolSettings { spread_max: SPREAD_MAX, ..settings.tunnels.pool() };
    let pool = |_| Pool::new(limits.clone());
    let mesh = match settings.on_demand {
        true => Mesh::on_demand(settings.mesh.clone()),
        false => Mesh::with_settings(settings.mesh.clone()),
    };
    if let Some(local) = &settings.local {
        mesh.publish(local::read(local, &settings.mesh)?);
    }
    let ways = Ways {
        mesh: Arc::clone(&mesh),
        certificates: Arc::clone(&certificates),
        pools: (0..workers.count()).map(pool).collect(),
        tunnels: limits.clone(),
        loads: Arc::default(),
        names: Names::default(),
        asked: OnDemandDns::default(),
    };
    let collector = settings.collector.as_ref();
    let collector = collector.map(|settings| Collector::start(settings, &telemetry.metrics)).transpose()?;
    let proxy = Arc::new(Proxy {
        mesh,
        ways,
        certificates,
        telemetry,
        collector,
        workers,
        live: Arc::default(),
        open: Arc::default(),
        trials: Trials::default(),
        drain: drain.clone(),
        enrolled: inpod::Views::default(),
        dns,
        log,
        quit: Notify::new(),
        accept_failures,
        sockets: Arc::new(sockets),
        settings,
    });
    lifecycle::run(proxy, trigger).await
}

/// Serves pods, wherever they come from, until the process ends.
async fn serve_pods(proxy: Arc<Proxy>, readiness: Readiness, listening: Pending) {
    let own = proxy.settings.own_pod.as_ref().map(|own| inpod::serve_own_pod(&proxy, own));
    let _own = match own.transpose() {
        Ok(served) => served,
        Err(error) => {
            tracing::warn!(error = onward::chain(&error), "the ztunnel's own pod is not in the mesh");
            None
        }
    };
    let certificates = pods::keep_certificates(Arc::clone(&proxy));
    match proxy.settings.pods.clone() {
        PodSource::Mesh(capture) => pods::run(proxy, capture, listening).await,
        PodSource::Cni(settings) => {
            tokio::join!(inpod::run(proxy, settings, readiness, listening), certificates);
        }
        PodSource::Dedicated(name, settings) => {
            tokio::join!(inpod::run_dedicated(proxy, name, settings, listening), certificates);
        }
        PodSource::Nowhere => {
            listening.done();
            std::future::pending().await
        }
    }
}

fn start_operators(proxy: &Arc<Proxy>, readiness: Readiness) -> Result<Serving, OperatorError> {
    let at = |port| SocketAddr::new(proxy.settings.address, port);
    let counted = Arc::clone(proxy);
    Operators {
        readiness_address: at(15021),
        metrics_address: at(proxy.settings.metrics_port),
        metrics_address_too: None,
        admin_address: SocketAddr::new(proxy.settings.admin_address, proxy.settings.admin_port),
        readiness,
        liveness: Liveness::watch(&proxy.workers.runtimes()),
        metrics: Arc::new(move || counted.encode_metrics()),
        admin: admin::router(Arc::clone(proxy)),
    }
    .start_at(&|address| proxy.sockets.listen(Owner::ZTUNNEL, address, &ListenOptions::default()))
}

/// Whether what is in force comes from disk, and how old it and what is kept there are, in Prometheus' text format.
fn encode_state_metrics(mesh: &Mesh) -> String {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (restored, kept) = (mesh.restored(), mesh.kept());
    let mut text = format!(
        "# HELP cairn_xds_restored Whether the state in force was kept on disk and not confirmed yet\n\
         # TYPE cairn_xds_restored gauge\ncairn_xds_restored {}\n",
        u8::from(restored.is_some())
    );
    for (name, help, time) in [
        ("cairn_xds_restored_timestamp_seconds", "When the state in force was kept", restored),
        ("cairn_xds_kept_timestamp_seconds", "When the state was last kept on disk", kept),
    ] {
        if let Some(time) = time {
            text += &format!("# HELP {name} {help}\n# TYPE {name} gauge\n{name} {}\n", seconds(time));
        }
    }
    text
}

async fn follow(proxy: Arc<Proxy>) {
    let settings = &proxy.settings;
    let Some(xds) = &settings.xds else { return std::future::pending().await };
    let (name, namespace) = match &settings.own_pod {
        Some(own) => (own.name.clone(), own.namespace.as_str()),
        None => (format!("ztunnel.{}", settings.node), "istio-system"),
    };
    let id = format!("ztunnel~{}~{name}.{namespace}~{namespace}.svc.cluster.local", settings.own_address);
    let mut follow = FollowSettings::new(xds.address.clone(), xds.roots.clone(), id);
    follow.token = settings.token.clone();
    follow.host = xds.host.clone();
    follow.headers = xds.headers.clone();
    follow.cluster_id = settings.cluster_id.clone();
    follow.node_metadata = vec![("NODE_NAME".to_owned(), settings.node.as_str().into())];
    follow.node_metadata.extend(settings.metadata.iter().cloned());
    follow.keep = settings.kept_state.as_ref().map(|kept| {
        let scope = format!("{}/{}", settings.cluster_id, settings.node);
        let defaults = KeepSettings::new(&kept.path, scope);
        KeepSettings { age_max: kept.age_max, wait: kept.wait, ..defaults }
    });
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
