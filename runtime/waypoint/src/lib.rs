//! The L7 proxy of a namespace or service: tunnel → HTTP engine → tunnel.
//!
//! Peers' tunnels are accepted in `accept.rs`; what is done with the traffic of each destination is compiled in
//! `sites.rs` from what `scope.rs` says applies to it; plugins load in `plugins.rs`; the HTTP engine does the rest.

mod accept;
mod admin;
mod collectors;
mod explain;
mod keys;
mod objects;
mod observers;
mod plugins;
mod scope;
mod settings;
mod sites;

pub use cairn_wasm::compile_if_asked;
pub use explain::{
    Answer, End, Explanation, L4Connection, Line, Place, Question, Step, Unanswerable, View, explain,
    offline, refusal,
};
pub use objects::{BROKEN, OBJECT_TYPES};
pub use settings::{BalancerKind, Options, PluginSettings, Settings, Startup};

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use cairn_builtin::TokenCache;
use cairn_fetch::{Credentials, FetchSettings, Fetcher, Puller, Store, StoreSettings};
use cairn_filter::Chain;
use cairn_http::{Balancer, MeshCallout, RouteTable, Site, SiteHandle, Tunnels, Worker, WorkerSettings};
use cairn_identity::{CaClient, CaSettings, CertificateSettings, Certificates};
use cairn_mesh::{AppProtocol, PathNormalization, Snapshot};
use cairn_net::{Drain, ListenOptions};
use cairn_process::{Liveness, Operators, Pending, Readiness, Workers};
use cairn_telemetry::{Telemetry, TelemetrySettings};
use cairn_wasm::{CacheSettings, Compiler, Engine, EngineSettings, WorkerPlace};
use cairn_xds::{FollowSettings, Mesh};
use keys::Keyring;
use plugins::{Loader, LoaderSettings, Plugins};
use scope::Own;
use sites::{Sites, Table};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// How often modules that no plugin uses are removed, as Istio's agent does.
const TIDYING_PERIOD: Duration = Duration::from_secs(3600);

/// What all connections of the process share.
struct Waypoint {
    settings: Settings,
    mesh: Arc<Mesh>,
    /// The state that the sites were compiled from, published with them.
    snapshot: Arc<ArcSwap<Snapshot>>,
    table: ArcSwap<Table>,
    plugin_list: ArcSwap<Vec<plugins::View>>,
    certificates: Arc<Certificates>,
    telemetry: Arc<Telemetry>,
    keyring: Arc<Keyring>,
    workers: Workers,
    /// One HTTP engine per worker.
    engines: Box<[Arc<Worker>]>,
    drain: Drain,
}

/// Runs a waypoint until SIGTERM or SIGINT, and drains. Starts its own threads: call it from `main`.
///
/// # Errors
/// When settings are not valid, a port cannot be had or a thread cannot be started.
pub fn run(options: Options) -> anyhow::Result<()> {
    let settings = options.resolve()?;
    cairn_process::init_logging(&settings.log, settings.log_format)?;
    settings.compliance.enforce()?;
    cairn_process::raise_file_limit();
    let workers = Workers::start(settings.workers)?;
    let runtime = cairn_process::control_runtime()?;
    let result = runtime.block_on(serve(settings, workers));
    // A module that is being compiled is not waited for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}

async fn serve(settings: Settings, workers: Workers) -> anyhow::Result<()> {
    let mut telemetry_settings =
        TelemetrySettings { access_log: settings.access_log, ..TelemetrySettings::default() };
    telemetry_settings.metrics.idle_max = settings.metrics_idle;
    // What Istio's proxies call themselves in `istio_build`.
    let telemetry =
        Telemetry::new("proxy", env!("CARGO_PKG_VERSION"), &telemetry_settings, std::io::stdout());
    let issuer = CaClient::new(CaSettings {
        address: settings.ca_address.clone(),
        roots: settings.xds_root.clone().into(),
        token: settings.token.clone().map(Into::into),
        host: None,
        headers: Vec::new(),
        cluster_id: settings.cluster_id.clone(),
        impersonate: false,
    });
    let certificate_settings = CertificateSettings { ttl: settings.certificate_ttl, ..Default::default() };
    let certificates = Certificates::new(Arc::new(issuer), certificate_settings);

    let (trigger, drain) = cairn_net::drain();
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let engines = (0..workers.count())
        .map(|_| engine(&settings, &snapshot, &certificates, &telemetry))
        .collect::<Box<[_]>>();
    // What is asked on nobody's behalf has connections of its own.
    let asking = engine(&settings, &snapshot, &certificates, &telemetry);
    tokio::spawn(Arc::clone(&asking).maintain(drain.clone()));
    let keyring = Arc::new(keyring(&settings, asking));
    let waypoint = Arc::new(Waypoint {
        mesh: Mesh::new(),
        snapshot,
        table: ArcSwap::default(),
        plugin_list: ArcSwap::default(),
        certificates,
        telemetry,
        keyring,
        workers,
        engines,
        drain: drain.clone(),
        settings,
    });
    for engine in &waypoint.engines {
        let (engine, drain) = (Arc::clone(engine), drain.clone());
        waypoint.workers.run(move |_| engine.maintain(drain)).await;
    }

    let node = vec![
        ("id".to_owned(), node_id(&waypoint.settings)),
        ("metadata.NAMESPACE".to_owned(), waypoint.settings.gateway.namespace.to_string()),
        ("metadata.NAME".to_owned(), waypoint.settings.gateway.name.to_string()),
    ];
    let state = state_directory(&waypoint.settings.plugins)?;
    let cache = state.as_ref().map(|state| CacheSettings {
        directory: state.join("compiled"),
        bytes_max: waypoint.settings.plugins.cache_bytes_max,
    });
    let wasm = Arc::new(Engine::new(EngineSettings {
        cache,
        compiler: Compiler::this_program(),
        workers: waypoint.workers.count(),
        places: places(&waypoint),
        node,
        ..Default::default()
    })?);
    let loader = Arc::new(loader(&waypoint.settings.plugins, state, &wasm)?);
    let readiness = Readiness::default();
    let (state, plugins) = (readiness.wait_for("state"), readiness.wait_for("plugins"));
    let (certificate, listening) = (readiness.wait_for("certificate"), readiness.wait_for("listener"));
    start_operators(&waypoint, &wasm, &loader, readiness)?;
    let listener = cairn_net::listen(waypoint.settings.hbone, &ListenOptions::default())?;
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&waypoint.certificates).renew());
    tasks.spawn(follow(Arc::clone(&waypoint)));
    let (compiled, first) = oneshot::channel();
    tasks.spawn(compile(Arc::clone(&waypoint), loader, compiled, plugins));
    let accepting = tokio::spawn({
        let waypoint = Arc::clone(&waypoint);
        async move {
            // Before the first table everything would be refused as not ours.
            if first.await.is_ok() {
                state.done();
                first_certificate(&waypoint, certificate).await;
                listening.done();
                accept::run(waypoint, listener).await;
            }
        }
    });

    // Without any of its control tasks the proxy would go on with what it last knew, looking healthy.
    let signal = tokio::select! {
        signal = cairn_process::stop_signal() => signal.context("cannot watch for signals")?,
        ended = tasks.join_next() => bail!("a control task ended: {ended:?}"),
    };
    trigger.start();
    tracing::info!(signal, "draining");
    let all_ended = trigger.finished(waypoint.settings.drain).await;
    accepting.abort();
    tracing::info!(all_ended, "stopped");
    Ok(())
}

fn engine(
    settings: &Settings,
    snapshot: &Arc<ArcSwap<Snapshot>>,
    certificates: &Arc<Certificates>,
    telemetry: &Arc<Telemetry>,
) -> Arc<Worker> {
    let balancer = match settings.balancer {
        BalancerKind::LeastRequest => Balancer::LeastRequest,
        BalancerKind::RoundRobin => Balancer::RoundRobin,
    };
    let tunnels = Tunnels {
        pool: cairn_hbone::Pool::new(cairn_hbone::PoolSettings::default()),
        certificates: Arc::clone(certificates),
        identity: settings.identity.clone(),
    };
    let worker_settings =
        WorkerSettings { balancer, bind: Some(settings.hbone.ip()), ..WorkerSettings::default() };
    Worker::new(worker_settings, Arc::clone(snapshot), Some(tunnels), Arc::clone(telemetry))
}

/// Fetches keys over the connections of `engine`.
fn keyring(settings: &Settings, engine: Arc<Worker>) -> Keyring {
    let callout = MeshCallout::new(engine, nobodys_site(), settings.hbone);
    let cache = if settings.token_cache { TokenCache::default() } else { TokenCache::off() };
    let keyring = Keyring::new(Arc::new(callout), settings.jwks_roots.clone(), cache);
    match &settings.jwks_cache {
        Some(directory) => keyring.keeping(directory.clone()),
        None => keyring,
    }
}

/// Where plugins of each worker call other services from when no exchange is at hand.
fn places(waypoint: &Waypoint) -> Vec<WorkerPlace> {
    let place = |(runtime, engine): (_, &Arc<Worker>)| WorkerPlace {
        runtime,
        callout: Arc::new(MeshCallout::new(Arc::clone(engine), nobodys_site(), waypoint.settings.hbone)),
    };
    waypoint.workers.runtimes().into_iter().zip(&waypoint.engines).map(place).collect()
}

/// A site for what is asked on nobody's behalf.
fn nobodys_site() -> SiteHandle {
    let nobodys = Site {
        chain: Chain::default(),
        routes: RouteTable::compile(&[], None, 0, ""),
        service: None,
        port: 0,
        protocol: AppProtocol::Unknown,
        normalization: PathNormalization::default(),
        explain_to: Arc::default(),
        viewpoint: None,
        observer: None,
    };
    Arc::new(ArcSwap::from_pointee(nobodys))
}

/// Makes the directory that outlives the process, if there is to be one.
fn state_directory(settings: &PluginSettings) -> anyhow::Result<Option<PathBuf>> {
    let Some(directory) = &settings.state_directory else { return Ok(None) };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.with_context(|| format!("cannot make --state-directory {}", directory.display()))?;
    Ok(Some(directory.clone()))
}

/// Loads plugins as the settings say.
fn loader(settings: &PluginSettings, state: Option<PathBuf>, wasm: &Arc<Engine>) -> anyhow::Result<Loader> {
    let fetcher = Fetcher::new(FetchSettings {
        roots: settings.registry_roots.clone(),
        insecure_registries: settings.insecure_registries.clone(),
        blocked: settings.blocked.clone(),
        ..FetchSettings::default()
    });
    let store = Arc::new(Store::open(StoreSettings {
        directory: state.map(|state| state.join("modules")),
        bytes_max: settings.cache_bytes_max,
        ..StoreSettings::default()
    })?);
    let credentials = match &settings.registry_credentials {
        Some(file) => {
            let json = std::fs::read(file);
            let json =
                json.with_context(|| format!("cannot read --registry-credentials {}", file.display()))?;
            Credentials::parse(&json)?
        }
        None => Credentials::default(),
    };
    let puller = Puller::new(fetcher, Arc::clone(&store));
    let settings = LoaderSettings { credentials, environment: settings.environment.clone() };
    Ok(Loader::new(Arc::clone(wasm), puller, store, settings))
}

fn start_operators(
    waypoint: &Arc<Waypoint>,
    wasm: &Arc<Engine>,
    loader: &Arc<Loader>,
    readiness: Readiness,
) -> anyhow::Result<()> {
    let at = |port| SocketAddr::new(waypoint.settings.hbone.ip(), port);
    let (telemetry, wasm) = (Arc::clone(&waypoint.telemetry), Arc::clone(wasm));
    let keyring = Arc::clone(&waypoint.keyring);
    let (loader, listing) = (Arc::clone(loader), Arc::clone(waypoint));
    Operators {
        readiness_address: at(15021),
        metrics_address: at(15020),
        metrics_address_too: Some(at(15090)),
        admin_address: SocketAddr::new(waypoint.settings.admin_address, 15000),
        readiness,
        liveness: Liveness::watch(&waypoint.workers.runtimes()),
        metrics: Arc::new(move || {
            telemetry.metrics.encode()
                + &wasm.encode_metrics()
                + &plugins::encode_metrics(&loader, &listing.plugin_list.load())
                + &keyring.encode_metrics()
        }),
        admin: admin::router(Arc::clone(waypoint)),
    }
    .start()?;
    Ok(())
}

async fn first_certificate(waypoint: &Waypoint, pending: Pending) {
    loop {
        match waypoint.certificates.get(&waypoint.settings.identity).await {
            Ok(_) => return pending.done(),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "no certificate yet, will retry");
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            }
        }
    }
}

/// Compiles sites whenever the mesh or a plugin changes.
async fn compile(waypoint: Arc<Waypoint>, loader: Arc<Loader>, first: oneshot::Sender<()>, settled: Pending) {
    // As Envoy, which `logrotate` tells so. Where it cannot be heard, nothing else is lost.
    let mut rotated = cairn_process::reopen_signals().inspect_err(|error| {
        tracing::warn!(%error, "access logs are not opened anew: SIGUSR1 cannot be heard");
    });
    let own = Own { gateway: waypoint.settings.gateway.clone(), address: waypoint.settings.hbone.ip() };
    let observers = observers::Observers::new(&waypoint);
    let mut sites = Sites::new(own, Arc::clone(&waypoint.keyring), observers);
    let (mut plugins, mut events) = Plugins::new(loader);
    let mut changes = waypoint.mesh.changes();
    waypoint.mesh.ready().await;
    let (mut first, mut settled) = (Some(first), Some(settled));
    let PluginSettings { startup, wait, .. } = waypoint.settings.plugins;
    // A plugin that takes long keeps only those from being served that use it.
    let mut patience = pin!(tokio::time::sleep(wait));
    let mut tidying = tokio::time::interval(TIDYING_PERIOD);
    tidying.reset();
    loop {
        changes.borrow_and_update();
        let snapshot = waypoint.mesh.snapshot();
        let aliases = &snapshot.settings().trust_domain_aliases;
        waypoint.certificates.trust().set_aliases(aliases.iter().cloned());
        let said = &snapshot.l7().gateway_telemetry;
        let idle_max = said.eviction.or(waypoint.settings.metrics_idle);
        waypoint.telemetry.metrics.configure(&said.buckets, idle_max);
        let table = sites.update(&snapshot, &mut plugins);
        waypoint.snapshot.store(snapshot);
        waypoint.table.store(Arc::new(table));
        waypoint.engines.iter().for_each(|engine| engine.sites_changed());
        waypoint.plugin_list.store(Arc::new(plugins.list()));
        if let Some(first) = first.take() {
            // Nobody waits any more when the waypoint is ending.
            let _ending = first.send(());
        }
        if plugins.settled(startup)
            && let Some(settled) = settled.take()
        {
            settled.done();
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            event = events.recv() => match event {
                Some(event) => plugins.take(event),
                None => return,
            },
            () = &mut patience, if settled.is_some() && startup == Startup::Wait => {
                tracing::warn!("plugins are still being loaded, and the waypoint does not wait for them");
                if let Some(settled) = settled.take() {
                    settled.done();
                }
            }
            _ = tidying.tick() => plugins.purge(),
            Some(()) = next(&mut rotated) => sites.reopen_logs(),
        }
    }
}

/// The next signal; never, where there are none.
async fn next(signals: &mut std::io::Result<cairn_process::Signals>) -> Option<()> {
    match signals {
        Ok(signals) => signals.recv().await,
        Err(_) => std::future::pending().await,
    }
}

fn node_id(settings: &Settings) -> String {
    let Settings { gateway, hbone, .. } = settings;
    format!(
        "waypoint~{}~{}-0.{}~{}.svc.cluster.local",
        hbone.ip(),
        gateway.name,
        gateway.namespace,
        gateway.namespace
    )
}

async fn follow(waypoint: Arc<Waypoint>) {
    let settings = &waypoint.settings;
    let mut follow =
        FollowSettings::new(settings.xds_address.clone(), settings.xds_root.clone(), node_id(settings));
    follow.token = settings.token.clone().map(Into::into);
    follow.cluster_id = settings.cluster_id.clone();
    follow.node_metadata = vec![
        ("NAMESPACE".to_owned(), (*settings.gateway.namespace).into()),
        ("CLUSTER_ID".to_owned(), settings.cluster_id.as_str().into()),
    ];
    follow.object_types = OBJECT_TYPES.iter().map(|kind| (*kind).to_owned()).collect();
    let decoder = objects::decoder();
    // Policies are followed to the end, for exchanges that drain are still decided by them.
    cairn_xds::follow(follow, Some(decoder), Arc::clone(&waypoint.mesh), std::future::pending()).await;
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}
