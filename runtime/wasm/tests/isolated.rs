//! Plugins as their authors build them, each exchange with an instance of its own: they do what they do when all exchanges share
//! one, and what one exchange leaves behind is gone.

// A test may end where it stands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use cairn_filter::{
    Connection, Exchange, Factory, NoCallout, Peer, Protocol, RequestHead, ResponseHead, Verdict,
};
use cairn_mesh::{FailStrategy, Isolation, PluginKind, PluginMode, PluginPhase, ResourceName, WasmPlugin};
use cairn_wasm::{Engine, EngineSettings};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

fn plugin(config: &str) -> WasmPlugin {
    WasmPlugin {
        name: ResourceName::new("shop", "isolated"),
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
        isolation: Isolation::Exchange,
        mode: PluginMode::Enforce,
    }
}

/// What becomes of one exchange, in words.
fn exchange(factory: &dyn Factory) -> String {
    let nowhere = ([127, 0, 0, 1], 1).into();
    let connection = Connection {
        id: 1,
        worker: 0,
        source: Peer { address: nowhere, identity: None, workload: None },
        destination: nowhere,
        service: None,
        local: None,
        callout: Arc::new(NoCallout),
    };
    let mut exchange =
        Exchange::new(Arc::new(connection), Protocol::Http11, Instant::now(), SystemTime::now());
    let mut headers = HeaderMap::new();
    headers.insert("x-team", HeaderValue::from_static("blue"));
    let mut head = RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop"),
        path: PathAndQuery::from_static("/hello"),
        headers,
        version: Version::HTTP_11,
    };
    let mut response = ResponseHead { status: StatusCode::OK, headers: HeaderMap::new() };
    let mut filter = factory.start(&exchange).unwrap();
    let mut words = Vec::new();
    let phases = factory.phases();
    if phases.contains(cairn_filter::Phases::REQUEST_HEADERS) {
        words.push(word(&filter.request_headers(&mut exchange, &mut head, true)));
    }
    if phases.contains(cairn_filter::Phases::RESPONSE_HEADERS) {
        words.push(word(&filter.response_headers(&mut exchange, &mut response, true)));
    }
    filter.finish(&mut exchange);
    let notes: Vec<_> = exchange.notes.iter().map(|note| note.text.as_ref()).collect();
    format!("{words:?} {head:?} {response:?} {notes:?}")
}

fn word(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Continue => "continue".to_owned(),
        Verdict::Reply(reply) => format!("reply {} {:?}", reply.status, reply.headers),
        _ => "other".to_owned(),
    }
}

/// Compares a plugin with itself; false when it has not been built.
fn compare(module: &str, config: &str) -> bool {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target").join(module);
    let Ok(bytes) = std::fs::read(&path) else {
        println!("skipped: no {}", path.display());
        return false;
    };
    let engine = Engine::new(EngineSettings::default()).unwrap();
    let shared = engine.factory(engine.compile(&bytes).unwrap(), &plugin(config)).unwrap();
    let (_, isolated) = engine.start_isolated(module, &bytes, &plugin(config)).unwrap();
    let expected = exchange(&*shared);
    for _ in 0..3 {
        assert_eq!(exchange(&*isolated.factory), expected, "{module}");
    }
    let metrics = engine.encode_metrics();
    assert!(metrics.contains("\ncairn_wasm_exchange_instances 0\n"), "{metrics}");
    assert!(metrics.contains("cairn_wasm_traps_total{plugin=\"shop/isolated\"} 0\n"), "{metrics}");
    true
}

#[test]
fn plugins_of_our_sdk_do_the_same_in_instances_of_their_own() {
    let tag = r#"{ "request": [{ "header": "x-asked", "value": "{request.method} {request.path}" }],
        "response": [{ "header": "x-tagged", "value": "yes" }] }"#;
    let has_run = compare("plugins/tag.wasm", tag);
    assert!(has_run || std::env::var_os("CI").is_none(), "CI builds plugins before it tests");
}

#[test]
fn plugins_of_the_official_sdk_do_the_same_in_instances_of_their_own() {
    for module in ["v013_http_config", "v020_http_config", "v020_http_headers"] {
        compare(&format!("modules/{module}.wasm"), "configured");
    }
}
