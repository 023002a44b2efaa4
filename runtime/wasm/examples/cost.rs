//! What a plugin costs: memory and start of an engine with one plugin, and the CPU time per exchange.
//!
//! `cargo run --release -p cairn-wasm --example cost -- target/plugins/tag.wasm '{"request": [], …}'`
//!
//! The exchange is one request and one response without a network, with the plugin's header phases and its end: in an instance
//! that all exchanges share, in one of its own, and in the shadow of the first kind.

#![allow(clippy::expect_used, reason = "a measuring tool may stop with a message")]

use cairn_filter::{Connection, Exchange, Factory, Peer, Protocol, RequestHead, ResponseHead};
use cairn_mesh::{
    FailStrategy, Identity, Isolation, PluginKind, PluginMode, PluginPhase, ResourceName, WasmPlugin,
    Workload,
};
use cairn_wasm::{Engine, EngineSettings};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

const WORKERS: usize = 2;
const ROUNDS: u32 = 200_000;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().expect("the path of a module");
    let config = arguments.next().unwrap_or_default();
    println!("before: {}", resident());
    let engine =
        Engine::new(EngineSettings { workers: WORKERS, ..EngineSettings::default() }).expect("an engine");
    println!("engine: {}", resident());
    let bytes = std::fs::read(&path).expect("the module can be read");
    let started = Instant::now();
    let module = engine.compile(&bytes).expect("the module compiles");
    println!("compiled in {:?}: {}", started.elapsed(), resident());
    let started = Instant::now();
    let factory = engine.factory(Arc::clone(&module), &plugin(&config)).expect("the plugin starts");
    println!("{WORKERS} instances in {:?}: {}", started.elapsed(), resident());
    let shared = measure("shared instance", &*factory);
    drop(factory);

    let started = Instant::now();
    let isolated = engine.start_isolated("module", &bytes, &plugin(&config)).expect("a snapshot");
    println!("snapshot, compiled twice, in {:?}: {}", started.elapsed(), resident());
    let own = measure("own instance", &*isolated.1.factory);
    println!("an instance for each exchange: {} ns more than a shared one", own.saturating_sub(shared));
    drop(isolated);

    let shadowed = WasmPlugin { mode: PluginMode::Shadow, ..plugin(&config) };
    let factory = engine.factory(module, &shadowed).expect("the plugin starts");
    measure("in the shadow, on this thread alone", &*factory);
}

/// Prints and returns the nanoseconds that a plugin adds to an exchange.
fn measure(what: &str, factory: &dyn Factory) -> u64 {
    let connection = connection();
    let bare = per_round(|| {
        let (mut head, mut response, exchange) = exchange(&connection);
        std::hint::black_box((&mut head, &mut response, exchange));
    });
    let with_plugin = per_round(|| {
        let (mut head, mut response, mut exchange) = exchange(&connection);
        let mut filter = factory.start(&exchange).expect("the plugin takes part");
        std::hint::black_box(filter.request_headers(&mut exchange, &mut head, true));
        std::hint::black_box(filter.response_headers(&mut exchange, &mut response, true));
        filter.finish(&mut exchange);
        std::hint::black_box((&head, &response, exchange));
    });
    let added = with_plugin.saturating_sub(bare);
    println!("{what}: {added} ns per exchange ({bare} ns of the measurement itself)");
    println!("after {ROUNDS} exchanges: {}", resident());
    added
}

fn per_round(mut round: impl FnMut()) -> u64 {
    for _ in 0..ROUNDS / 10 {
        round();
    }
    let started = cpu_nanos();
    for _ in 0..ROUNDS {
        round();
    }
    (cpu_nanos() - started) / u64::from(ROUNDS)
}

/// The CPU time of this thread, which other processes do not disturb; 0 where there is no procfs.
fn cpu_nanos() -> u64 {
    let line = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    line.split_whitespace().next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0)
}

fn connection() -> Arc<Connection> {
    let identity = Identity::new("cluster.local", "shop", "web").expect("an identity");
    let workload = Workload::new("k//Pod/shop/web-1", "web-1", identity.clone());
    Arc::new(Connection {
        id: 1,
        worker: 0,
        source: Peer {
            address: ([10, 0, 0, 1], 5000).into(),
            identity: Some(identity),
            workload: Some(Arc::new(workload)),
        },
        destination: ([10, 0, 1, 1], 80).into(),
        service: None,
        local: None,
        callout: Arc::new(cairn_filter::NoCallout),
    })
}

fn exchange(connection: &Arc<Connection>) -> (RequestHead, ResponseHead, Exchange) {
    let mut headers = HeaderMap::new();
    for (name, value) in
        [("user-agent", "load"), ("accept", "*/*"), ("x-request-id", "1234"), ("x-team", "blue")]
    {
        headers.insert(name, HeaderValue::from_static(value));
    }
    let head = RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop"),
        path: PathAndQuery::from_static("/items"),
        headers,
        version: Version::HTTP_11,
    };
    let response = ResponseHead { status: StatusCode::OK, headers: HeaderMap::new() };
    let exchange = Exchange::new(Arc::clone(connection), Protocol::Http11, Instant::now(), SystemTime::now());
    (head, response, exchange)
}

fn plugin(config: &str) -> WasmPlugin {
    WasmPlugin {
        name: ResourceName::new("shop", "cost"),
        targets: Vec::new(),
        url: "".into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "".into(),
        kind: PluginKind::Http,
        ports: Vec::new(),
        config: config.into(),
        phase: PluginPhase::Unspecified,
        priority: 0,
        fail_strategy: FailStrategy::Close,
        env: Vec::new(),
        host_env: Vec::new(),
        holds_heads: false,
        limits: Default::default(),
        isolation: Isolation::Shared,
        mode: PluginMode::Enforce,
    }
}

/// What the process holds in memory, and how much of it is not backed by files; empty where there is no procfs.
fn resident() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).unwrap_or_default().to_owned()
    };
    format!("{} resident, {} of it anonymous", field("VmRSS:"), field("RssAnon:"))
}
