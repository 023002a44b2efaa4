//! Tests of the whole host with guests written as text: what a chain sees of a plugin, whatever the plugin does.

mod bodies;
mod calls;
mod chaos;
mod connections;
mod crashes;
mod foreign;
mod grpc;
mod isolated;
mod kept;
mod lifecycle;
mod matrix;
mod outside;
mod own_threads;
mod sequences;
mod shadow;

use crate::{Engine, EngineSettings, PluginError};
use cairn_filter::{
    Connection, Exchange, Factory, Filter, Peer, Protocol, RequestHead, ResponseHead, Verdict,
};
use cairn_mesh::{
    FailStrategy, Identity, Isolation, PluginKind, PluginMode, PluginPhase, ResourceName, WasmPlugin,
    Workload,
};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// The imports that guests use, an allocator, and ways to report. `{data}` is placed at 1024, `{body}` are functions.
/// `$finish` writes a status to the request header `x-status` and, if one was returned, the bytes whose address and
/// length are at 8 and 12 to `x-got`.
const PRELUDE: &str = r#"(module
  (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
  (import "env" "proxy_get_log_level" (func $log_level (param i32) (result i32)))
  (import "env" "proxy_get_current_time_nanoseconds" (func $time (param i32) (result i32)))
  (import "env" "proxy_get_header_map_size" (func $map_size (param i32 i32) (result i32)))
  (import "env" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
  (import "env" "proxy_set_header_map_pairs" (func $set_pairs (param i32 i32 i32) (result i32)))
  (import "env" "proxy_get_header_map_value" (func $get (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_replace_header_map_value" (func $replace (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_remove_header_map_value" (func $remove (param i32 i32 i32) (result i32)))
  (import "env" "proxy_get_buffer_bytes" (func $buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_buffer_status" (func $buffer_status (param i32 i32 i32) (result i32)))
  (import "env" "proxy_set_buffer_bytes" (func $set_buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_property" (func $property (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_property" (func $set_property (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_send_local_response"
    (func $reply (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
  (import "env" "proxy_close_stream" (func $close (param i32) (result i32)))
  (import "env" "proxy_done" (func $done (result i32)))
  (import "env" "proxy_set_effective_context" (func $effective (param i32) (result i32)))
  (import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
  (import "env" "proxy_record_metric" (func $record (param i32 i64) (result i32)))
  (import "env" "proxy_get_metric" (func $metric (param i32 i32) (result i32)))
  (import "env" "proxy_set_shared_data" (func $set_shared (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_shared_data" (func $get_shared (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_register_shared_queue" (func $register (param i32 i32 i32) (result i32)))
  (import "env" "proxy_resolve_shared_queue" (func $resolve (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_enqueue_shared_queue" (func $enqueue (param i32 i32 i32) (result i32)))
  (import "env" "proxy_dequeue_shared_queue" (func $dequeue (param i32 i32 i32) (result i32)))
  (import "env" "proxy_http_call" (func $http_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_grpc_call"
    (func $grpc_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_grpc_stream"
    (func $grpc_stream (param i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_grpc_send" (func $grpc_send (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_grpc_close" (func $grpc_close (param i32) (result i32)))
  (import "env" "proxy_grpc_cancel" (func $grpc_cancel (param i32) (result i32)))
  (import "env" "proxy_call_foreign_function" (func $foreign (param i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_tick_period_milliseconds" (func $tick (param i32) (result i32)))
  (import "env" "proxy_get_status" (func $status (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ (param i32 i32) (result i32)))
  (import "wasi_unstable" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (memory (export "memory") 2)
  (global $free (mut i32) (i32.const 65536))
  (data (i32.const 512) "x-statusx-gotx-crash")
  (data (i32.const 1024) "{data}")
  (func (export "{allocator}") (param $size i32) (result i32)
    (local $at i32)
    (if (i32.eqz (local.get $size)) (then unreachable))
    (local.set $at (global.get $free))
    (global.set $free (i32.add (global.get $free) (local.get $size)))
    (local.get $at))
  (func (export "{marker}"))
  (func $finish (param $status i32)
    (i32.store8 (i32.const 600) (i32.add (i32.const 48) (i32.div_u (local.get $status) (i32.const 10))))
    (i32.store8 (i32.const 601) (i32.add (i32.const 48) (i32.rem_u (local.get $status) (i32.const 10))))
    (drop (call $replace (i32.const 0) (i32.const 512) (i32.const 8) (i32.const 600) (i32.const 2)))
    (if (i32.load (i32.const 8)) (then
      (drop (call $replace (i32.const 0)
        (i32.const 520) (i32.const 5) (i32.load (i32.const 8)) (i32.load (i32.const 12)))))))
  ;; Traps if the request has the header x-crash.
  (func $crash_if_asked
    (if (i32.eqz (call $get (i32.const 0) (i32.const 525) (i32.const 7) (i32.const 16) (i32.const 20)))
      (then unreachable)))
  {body})"#;

/// A guest with these functions, this text at 1024, ABI 0.2.1 and the allocator of the specification.
fn guest(data: &str, body: &str) -> String {
    guest_of("proxy_abi_version_0_2_1", "proxy_on_memory_allocate", data, body)
}

fn guest_of(marker: &str, allocator: &str, data: &str, body: &str) -> String {
    let text = PRELUDE.replace("{data}", data).replace("{marker}", marker).replace("{allocator}", allocator);
    text.replace("{body}", body)
}

/// A guest that runs `code`, which leaves a status, on request headers, and reports it.
fn calling(data: &str, code: &str) -> String {
    let body = format!(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (call $finish {code}) (i32.const 0))"#
    );
    guest(data, &body)
}

fn settings() -> EngineSettings {
    EngineSettings {
        memory_max: 4 << 20,
        pause_max: Duration::from_millis(50),
        node: vec![("metadata.NAMESPACE".to_owned(), "mesh".to_owned())],
        ..EngineSettings::default()
    }
}

fn plugin(fail_strategy: FailStrategy, config: &str) -> WasmPlugin {
    WasmPlugin {
        name: ResourceName::new("ns", "test"),
        targets: Vec::new(),
        url: "file:///test.wasm".into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "root".into(),
        kind: PluginKind::Http,
        ports: Vec::new(),
        config: config.into(),
        phase: PluginPhase::Unspecified,
        priority: 0,
        fail_strategy,
        env: vec![("KEY".into(), "value".into())],
        host_env: Vec::new(),
        holds_heads: false,
        limits: Default::default(),
        isolation: Isolation::Shared,
        mode: PluginMode::Enforce,
    }
}

fn load(engine: &Engine, guest: &str, plugin: &WasmPlugin) -> Result<Arc<dyn Factory>, PluginError> {
    engine.factory(engine.compile(&wat::parse_str(guest).unwrap())?, plugin)
}

/// An engine and one plugin on it.
struct Host {
    engine: Engine,
    factory: Arc<dyn Factory>,
}

impl Host {
    fn new(guest: &str) -> Self {
        Self::with(guest, FailStrategy::Close, "")
    }

    fn with(guest: &str, fail_strategy: FailStrategy, config: &str) -> Self {
        let engine = Engine::new(settings()).unwrap();
        let factory = load(&engine, guest, &plugin(fail_strategy, config)).unwrap();
        Self { engine, factory }
    }

    /// How often the plugin crashed.
    fn traps(&self) -> u64 {
        let text = self.engine.encode_metrics();
        let line = text.lines().find(|line| line.starts_with("cairn_wasm_traps_total{"));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }

    fn start(&self) -> Run {
        let exchange = exchange();
        Run {
            filter: self.factory.start(&exchange).unwrap(),
            exchange,
            head: request(),
            response: response(),
        }
    }
}

/// One exchange with the plugin.
struct Run {
    filter: Box<dyn Filter>,
    exchange: Exchange,
    head: RequestHead,
    response: ResponseHead,
}

impl Run {
    fn with_header(mut self, name: &'static str, value: &'static str) -> Self {
        self.head.headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        self
    }

    fn request(&mut self) -> Verdict {
        self.filter.request_headers(&mut self.exchange, &mut self.head, true)
    }

    fn response(&mut self) -> Verdict {
        self.filter.response_headers(&mut self.exchange, &mut self.response, true)
    }

    fn finish(&mut self) {
        self.filter.finish(&mut self.exchange);
    }

    /// A request header as text; empty if absent.
    fn header(&self, name: &str) -> String {
        let value = self.head.headers.get(name);
        value.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).unwrap_or_default()
    }

    fn notes(&self) -> Vec<&str> {
        self.exchange.notes.iter().map(|note| &*note.text).collect()
    }
}

fn exchange() -> Exchange {
    let identity = Identity::new("cluster.local", "shop", "web").unwrap();
    let workload = Workload::new("k//Pod/shop/web-1", "web-1", identity.clone());
    let connection = Connection {
        id: 7,
        worker: 0,
        source: Peer {
            address: "10.0.0.1:5000".parse().unwrap(),
            identity: Some(identity),
            workload: Some(Arc::new(workload)),
        },
        destination: "10.0.1.1:80".parse().unwrap(),
        service: None,
        local: None,
        callout: Arc::new(cairn_filter::NoCallout),
    };
    let claims = serde_json::from_str(r#"{"iss": "issuer", "sub": "me"}"#).unwrap();
    let mut exchange =
        Exchange::new(Arc::new(connection), Protocol::Http11, Instant::now(), SystemTime::now());
    exchange.token = Some(Arc::new(cairn_filter::Token::new(claims)));
    exchange
}

fn request() -> RequestHead {
    let mut headers = HeaderMap::new();
    headers.insert("x-in", HeaderValue::from_static("hello"));
    headers.append("x-dup", HeaderValue::from_static("a"));
    headers.append("x-dup", HeaderValue::from_static("b"));
    headers.insert("x-empty", HeaderValue::from_static(""));
    RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop:80"),
        path: PathAndQuery::from_static("/items?x=1"),
        headers,
        version: Version::HTTP_11,
    }
}

fn response() -> ResponseHead {
    let mut headers = HeaderMap::new();
    headers.insert("x-up", HeaderValue::from_static("up"));
    ResponseHead { status: StatusCode::OK, headers }
}

/// What the plugin says in the end: on threads of its own that takes a while.
fn said(mut ask: impl FnMut() -> Verdict) -> Verdict {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    loop {
        match ask() {
            Verdict::Wait(until) => runtime.block_on(until),
            verdict => return verdict,
        }
    }
}

/// A verdict in words.
fn word(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Continue => "continue".to_owned(),
        Verdict::Reset => "reset".to_owned(),
        Verdict::Wait(_) => "wait".to_owned(),
        Verdict::Hold(_) => "hold".to_owned(),
        Verdict::ReadBody { .. } => "read body".to_owned(),
        Verdict::Reply(reply) => format!("reply {} {}", reply.status.as_u16(), reply.details),
    }
}
