//! Our HTTP engine with one module in its chain, as a waypoint would have it.

use crate::ask::Version;
use crate::module::Module;
use crate::run::{Line, Logged, wait_until};
use crate::upstream::{SERVICES, Upstream};
use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use cairn_filter::{Chain, Connection, Factory, Peer};
use cairn_http::{MeshCallout, RouteTable, Site, SiteHandle, Worker, WorkerSettings, serve};
use cairn_mesh::{
    AppProtocol, Change, FailStrategy, Identity, Isolation, MeshSettings, NetworkAddress, PluginKind,
    PluginLimits, PluginMode, PluginPhase, ResourceName, Service, ServicePort, Snapshot, Store, WasmPlugin,
    Workload,
};
use cairn_net::{Drain, DrainTrigger, drain};
use cairn_telemetry::{Telemetry, TelemetrySettings};
use cairn_wasm::{Engine, EngineSettings, WorkerPlace};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context as LayerContext, Layer, SubscriberExt};

/// The namespace of everything.
pub const NAMESPACE: &str = "modules";

/// The ports of the upstream's service, one for each version.
const PORTS: [(Version, u16); 2] = [(Version::Http1, 80), (Version::Http2, 81)];

/// Our engine, running. It ends when dropped.
pub struct Ours {
    engine: Engine,
    name: String,
    listeners: Vec<(Version, SocketAddr)>,
    /// Connections that are open.
    open: Arc<AtomicUsize>,
    _trigger: DrainTrigger,
    _running: JoinSet<()>,
}

impl Ours {
    /// Starts it with `module` in front of `upstream`.
    pub async fn start(module: &Module, upstream: &Upstream) -> Result<Self> {
        listen_to_plugins();
        let snapshot = Arc::new(ArcSwap::from_pointee(mesh(upstream)));
        let settings = TelemetrySettings { access_log: false, ..TelemetrySettings::default() };
        let telemetry = Telemetry::new("modules", "0", &settings, std::io::sink());
        let settings = WorkerSettings { retries_max: 0, ..WorkerSettings::default() };
        let worker = Worker::new(settings, Arc::clone(&snapshot), None, telemetry);
        let callout = Arc::new(MeshCallout::new(Arc::clone(&worker), nowhere(), ECHO.into()));
        let place = WorkerPlace { runtime: Handle::current(), callout };
        let engine = Engine::new(EngineSettings { places: vec![place], ..EngineSettings::default() })?;
        let name = format!("{NAMESPACE}/{}", module.name);
        let (engine, factory) = tokio::task::spawn_blocking({
            let module = module.clone();
            // Compiling takes long, and others run meanwhile.
            move || factory(&engine, &module).map(|factory| (engine, factory))
        })
        .await??;
        let ((_trigger, drain), mut _running) = (drain(), JoinSet::new());
        let (mut listeners, open) = (Vec::new(), Arc::new(AtomicUsize::new(0)));
        for (version, port) in PORTS {
            let site = site(&snapshot.load(), Arc::clone(&factory), port)?;
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            listeners.push((version, listener.local_addr()?));
            _running.spawn(accept(listener, site, Arc::clone(&worker), drain.clone(), Arc::clone(&open)));
        }
        Ok(Self { engine, name, listeners, open, _trigger, _running })
    }

    /// Where requests of this version are sent.
    pub fn address(&self, version: Version) -> Result<SocketAddr> {
        let mut listeners = self.listeners.iter();
        listeners
            .find(|listener| listener.0 == version)
            .map(|listener| listener.1)
            .context("no such listener")
    }

    /// Waits until no connection is open; a client has one for each request.
    pub async fn idle(&self) -> Result<()> {
        wait_until("our connections end", || async { Ok(self.open.load(Relaxed) == 0) }).await
    }

    /// What the engine exports of plugins' metrics.
    pub fn metrics(&self) -> String {
        self.engine.encode_metrics()
    }
}

impl Logged for Ours {
    fn lines(&self) -> Vec<Line> {
        let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.get(&self.name).cloned().unwrap_or_default()
    }

    fn trouble(&self) -> String {
        let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        let host = lines.get("").into_iter().flatten().rev().take(10);
        host.map(|line| line.text.as_str()).collect::<Vec<_>>().join("\n")
    }
}

fn factory(engine: &Engine, module: &Module) -> Result<Arc<dyn Factory>> {
    let compiled = engine.compile(&std::fs::read(&module.file)?)?;
    let plugin = WasmPlugin {
        name: ResourceName::new(NAMESPACE, module.name.as_str()),
        targets: Vec::new(),
        url: format!("file://{}", module.file.display()).into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: module.known.root.into(),
        kind: PluginKind::Http,
        ports: Vec::new(),
        config: module.known.config.as_str().into(),
        phase: PluginPhase::Unspecified,
        priority: 0,
        fail_strategy: FailStrategy::Close,
        env: Vec::new(),
        host_env: Vec::new(),
        holds_heads: false,
        limits: PluginLimits { deadline: module.known.deadline, ..PluginLimits::default() },
        isolation: Isolation::Shared,
        mode: PluginMode::Enforce,
    };
    Ok(engine.factory(compiled, &plugin)?)
}

/// A service `echo` and those that modules ask, each with one endpoint outside the mesh.
fn mesh(upstream: &Upstream) -> Snapshot {
    let mut store = Store::new();
    let echo = PORTS.map(|(version, port)| ServicePort {
        port,
        target_port: upstream.address.port(),
        protocol: match version {
            Version::Http1 => AppProtocol::Http11,
            Version::Http2 => AppProtocol::Http2,
        },
    });
    let mut changes = service("echo", 1, upstream.address, echo.into());
    for (index, (name, address)) in (2..).zip(SERVICES.iter().zip(&upstream.services)) {
        let protocol = if *name == "grpcbin" { AppProtocol::Grpc } else { AppProtocol::Http11 };
        let port = ServicePort { port: 80, target_port: address.port(), protocol };
        changes.extend(service(name, index, *address, vec![port]));
    }
    store.apply(changes);
    store.snapshot()
}

/// The hostname of a service.
pub fn hostname(name: &str) -> String {
    format!("{name}.{NAMESPACE}.svc.cluster.local")
}

/// A service of the namespace at 10.0.0.`index` with one endpoint outside the mesh.
pub fn service(name: &str, index: u8, at: SocketAddr, ports: Vec<ServicePort>) -> Vec<Change> {
    let key = ResourceName::new(NAMESPACE, hostname(name));
    let service = Service {
        name: name.into(),
        namespace: NAMESPACE.into(),
        hostname: hostname(name).into(),
        vips: vec![NetworkAddress { network: "".into(), address: [10, 0, 0, index].into() }],
        ports,
        subject_alt_names: Vec::new(),
        waypoint: None,
        load_balancing: Default::default(),
        canonical: true,
        ..Service::default()
    };
    let Ok(identity) = Identity::new("cluster.local", NAMESPACE, name) else { return Vec::new() };
    let pod = Workload {
        addresses: vec![at.ip()],
        services: vec![(key, Vec::new())],
        ..Workload::new(name, name, identity)
    };
    vec![Change::Service(service), Change::Workload(pod)]
}

/// Where clients mean to go; the port says which version they speak.
const ECHO: ([u8; 4], u16) = ([10, 0, 0, 1], 80);

/// The site of a port of the upstream's service.
fn site(snapshot: &Snapshot, factory: Arc<dyn Factory>, port: u16) -> Result<SiteHandle> {
    let state = snapshot.service_named(&hostname("echo"), "").context("no upstream")?;
    let service = Arc::clone(&state.service);
    let protocol = service.port(port).context("no such port")?.protocol;
    let routes = RouteTable::compile(&[], Some(&*service), port, "cluster.local");
    let chain = Chain::new(vec![factory]);
    Ok(Arc::new(ArcSwap::from_pointee(Site {
        chain,
        routes,
        protocol,
        service: Some(service),
        port,
        ..nobodys_site()
    })))
}

/// The site for what a module asks when no request is at hand.
fn nowhere() -> SiteHandle {
    Arc::new(ArcSwap::from_pointee(nobodys_site()))
}

/// The site of a destination of which nothing is known.
pub fn nobodys_site() -> Site {
    Site {
        chain: Chain::default(),
        routes: RouteTable::compile(&[], None, 0, ""),
        service: None,
        port: 0,
        protocol: AppProtocol::Unknown,
        normalization: MeshSettings::default().path_normalization,
        explain_to: Arc::default(),
        viewpoint: None,
        observer: None,
    }
}

async fn accept(
    listener: TcpListener,
    site: SiteHandle,
    worker: Arc<Worker>,
    drain: Drain,
    open: Arc<AtomicUsize>,
) {
    let mut connections = JoinSet::new();
    let mut id = 0;
    while let Ok((stream, client)) = listener.accept().await {
        id += 1;
        let port = site.load().port;
        let destination = SocketAddr::from((ECHO.0, port));
        let connection = Connection {
            id,
            worker: 0,
            source: Peer { address: client, identity: None, workload: None },
            destination,
            service: site.load().service.clone(),
            local: None,
            callout: Arc::new(MeshCallout::new(Arc::clone(&worker), Arc::clone(&site), destination)),
        };
        let (site, worker, drain) = (Arc::clone(&site), Arc::clone(&worker), drain.clone());
        let open = Arc::clone(&open);
        open.fetch_add(1, Relaxed);
        connections.spawn(async move {
            serve(stream, Arc::new(connection), site, worker, drain).await;
            open.fetch_sub(1, Relaxed);
        });
    }
}

/// What plugins have logged, by their names, and under no name what the host said of them.
static LINES: Mutex<BTreeMap<String, Vec<Line>>> = Mutex::new(BTreeMap::new());

/// What the plugin of this name, `namespace/name`, logged.
pub fn lines_of(name: &str) -> Vec<String> {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    lines.get(name).into_iter().flatten().map(|line| line.text.clone()).collect()
}

/// Has plugins' lines kept.
pub fn listen_to_plugins() {
    let subscriber = tracing_subscriber::registry().with(Keep);
    // The first of several tests has set it.
    let _already_set = tracing::subscriber::set_global_default(subscriber);
}

/// Keeps the lines of plugins.
struct Keep;

impl<S: tracing::Subscriber> Layer<S> for Keep {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: LayerContext<'_, S>) -> bool {
        metadata.target() == "plugin" || metadata.target().starts_with("cairn_wasm")
    }

    fn on_event(&self, event: &tracing::Event<'_>, _: LayerContext<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = event.metadata().level().to_string().to_lowercase();
        let level = if level == "warn" { "warning".to_owned() } else { level };
        let is_guest = event.metadata().target() == "plugin";
        let name = if is_guest { fields.plugin } else { String::new() };
        let text = if is_guest { fields.message } else { fields.all };
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.entry(name).or_default().push(Line { level, text });
    }
}

#[derive(Default)]
struct Fields {
    plugin: String,
    message: String,
    all: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "plugin" {
            self.plugin = value.to_owned();
        }
        self.record_debug(field, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => self.all += &format!(" {name}={value:?}"),
        }
        if field.name() == "message" {
            self.all.insert_str(0, &self.message.clone());
        }
    }
}
