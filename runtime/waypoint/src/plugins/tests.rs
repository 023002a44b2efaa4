//! What becomes of plugins while modules and configurations change.

use super::*;
use cairn_fetch::{FetchSettings, Fetcher, Puller, Store, StoreSettings};
use cairn_mesh::{FailStrategy, Isolation, PluginKind, PluginMode, PluginPhase};
use cairn_wasm::{CacheSettings, Engine, EngineSettings};
use std::path::Path;

/// A plugin that passes everything, and logs a number, so that each number is another module.
fn module(number: u8) -> Vec<u8> {
    let text = format!(
        r#"(module (memory (export "memory") 1) (data (i32.const 0) "{number}")
             (func (export "proxy_abi_version_0_2_1"))
             (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 64))
             (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0)))"#
    );
    wat::parse_str(text).unwrap()
}

fn spec(url: &str, config: &str) -> L7 {
    let plugin = WasmPlugin {
        name: ResourceName::new("shop", "p"),
        targets: Vec::new(),
        url: url.into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "".into(),
        kind: PluginKind::Http,
        ports: Vec::new(),
        config: config.into(),
        phase: PluginPhase::Authn,
        priority: 0,
        fail_strategy: FailStrategy::Close,
        env: Vec::new(),
        host_env: Vec::new(),
        holds_heads: false,
        limits: Default::default(),
        isolation: Isolation::Shared,
        mode: PluginMode::Enforce,
    };
    let mut l7 = L7::default();
    l7.plugins.insert(plugin.name.clone(), Arc::new(plugin));
    l7
}

struct Bench {
    plugins: Plugins,
    events: mpsc::Receiver<Event>,
    engine: Arc<Engine>,
}

impl Bench {
    fn new(state: &Path, settings: LoaderSettings) -> Self {
        let cache = CacheSettings { directory: state.join("compiled"), bytes_max: 1 << 20 };
        let engine = Engine::new(EngineSettings { cache: Some(cache), ..EngineSettings::default() });
        let engine = Arc::new(engine.unwrap());
        let store = StoreSettings { directory: Some(state.join("modules")), ..StoreSettings::default() };
        let store = Arc::new(Store::open(store).unwrap());
        let puller = Puller::new(Fetcher::new(FetchSettings::default()), Arc::clone(&store));
        let loader = Loader::new(Arc::clone(&engine), puller, store, settings);
        let (plugins, events) = Plugins::new(Arc::new(loader));
        Self { plugins, events, engine }
    }

    /// Wants this, and waits for `events` of what becomes of it. Returns state and reason.
    async fn want(&mut self, l7: &L7, events: usize) -> (&'static str, String) {
        self.plugins.want(l7);
        for _ in 0..events {
            let event = tokio::time::timeout(Duration::from_secs(30), self.events.recv()).await;
            self.plugins.take(event.unwrap().unwrap());
        }
        self.state()
    }

    fn state(&mut self) -> (&'static str, String) {
        let list = self.plugins.list();
        (list[0].state, list[0].brief()["reason"].as_str().unwrap_or_default().to_owned())
    }

    fn factory(&self) -> Arc<dyn Factory> {
        match self.plugins.standing(&ResourceName::new("shop", "p")) {
            Standing::Ready(factory, _) => factory,
            _ => panic!("not ready"),
        }
    }

    fn whole(&mut self) -> serde_json::Value {
        self.plugins.list()[0].whole()
    }
}

#[tokio::test]
async fn a_version_is_swapped_in_when_it_runs_and_the_one_before_drains() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("p.wasm");
    let url = format!("file://{}", file.display());
    std::fs::write(&file, module(1)).unwrap();
    let mut bench = Bench::new(home.path(), LoaderSettings::default());
    assert_eq!(bench.want(&spec(&url, "1"), 1).await, ("ready", String::new()));
    let first = bench.factory();
    // Another configuration is another version of the same code.
    bench.plugins.want(&spec(&url, "2"));
    assert!(Arc::ptr_eq(&bench.factory(), &first), "the old version serves until the new one runs");
    assert!(!bench.plugins.settled(Startup::Wait));
    assert_eq!(bench.want(&spec(&url, "2"), 1).await, ("ready", String::new()));
    assert!(!Arc::ptr_eq(&bench.factory(), &first));
    let whole = bench.whole();
    assert_eq!((&whole["running"]["version"], &whole["running"]["code"]), (&2.into(), &"shared".into()));
    assert_eq!(whole["draining"][0]["version"], 1, "{whole}");
    drop(first);
    assert_eq!(bench.whole()["draining"], serde_json::json!([]));
    // Other code is a new version when something about the plugin changes.
    std::fs::write(&file, module(2)).unwrap();
    assert_eq!(bench.want(&spec(&url, "3"), 1).await, ("ready", String::new()));
    let whole = bench.whole();
    assert_eq!((&whole["running"]["version"], &whole["running"]["code"]), (&3.into(), &"compiled".into()));
}

#[tokio::test]
async fn what_cannot_be_loaded_keeps_what_runs_and_is_tried_again() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("p.wasm");
    let url = format!("file://{}", file.display());
    let mut bench = Bench::new(home.path(), LoaderSettings::default());
    let (state, reason) = bench.want(&spec(&url, "1"), 1).await;
    assert!(state == "failed" && reason.contains("cannot read"), "{state} {reason}");
    assert!(bench.plugins.settled(Startup::Wait) && !bench.plugins.settled(Startup::Require));
    assert_eq!(bench.whole()["retryAfterSeconds"], 0.5);
    std::fs::write(&file, module(1)).unwrap();
    // By itself, nothing having changed.
    assert_eq!(bench.want(&spec(&url, "1"), 1).await, ("ready", String::new()));
    let first = bench.factory();
    std::fs::write(&file, b"no module").unwrap();
    let (state, reason) = bench.want(&spec(&url, "2"), 1).await;
    assert!(state == "ready" && reason.contains("no WebAssembly module"), "{state} {reason}");
    assert!(Arc::ptr_eq(&bench.factory(), &first));
    // A module that does not compile is not tried again.
    std::fs::write(&file, b"\0asm\x01\0\0\0\xff").unwrap();
    let (state, reason) = bench.want(&spec(&url, "3"), 1).await;
    assert!(state == "ready" && reason.contains("does not compile"), "{state} {reason}");
    assert!(bench.whole()["retryAfterSeconds"].is_null());
    assert_eq!(bench.want(&spec("oci://host.example/Upper", "3"), 1).await.0, "ready");
    // Nobody wants it any more.
    bench.plugins.want(&L7::default());
    assert!(bench.plugins.list().is_empty() && bench.plugins.settled(Startup::Require));
}

#[tokio::test]
async fn a_waypoint_that_starts_again_compiles_nothing() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("p.wasm");
    let url = format!("file://{}", file.display());
    std::fs::write(&file, module(1)).unwrap();
    for (code, compiled) in [("compiled", 1), ("disk", 0), ("disk", 0)] {
        let mut bench = Bench::new(home.path(), LoaderSettings::default());
        assert_eq!(bench.want(&spec(&url, ""), 1).await, ("ready", String::new()));
        assert_eq!(bench.whole()["running"]["code"], code);
        let metrics = bench.engine.encode_metrics();
        let line = format!("\ncairn_wasm_modules_loaded_total{{origin=\"compiled\"}} {compiled}\n");
        assert!(metrics.contains(&line), "{metrics}");
    }
}

#[tokio::test]
async fn plugins_have_of_the_environment_what_they_may() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("p.wasm");
    std::fs::write(&file, module(1)).unwrap();
    let url = format!("file://{}", file.display());
    let wanting = |name: &str| {
        let mut l7 = spec(&url, "");
        let plugin = l7.plugins.values_mut().next().unwrap();
        Arc::make_mut(plugin).host_env = vec![name.into()];
        l7
    };
    let environment = [("REGION".to_owned(), "north".to_owned())].into();
    let mut bench = Bench::new(home.path(), LoaderSettings { environment, ..LoaderSettings::default() });
    let (state, reason) = bench.want(&wanting("SECRET"), 1).await;
    assert!(state == "failed" && reason.contains("`SECRET`"), "{reason}");
    assert_eq!(bench.want(&wanting("REGION"), 1).await, ("ready", String::new()));
}
