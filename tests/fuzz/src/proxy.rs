//! A proxy for the targets that are guests: the host of plugins with a chain of two of them, one that always does the same
//! and the one at hand, and a mesh that answers what guests ask.

use bytes::Bytes;
use cairn_filter::{
    Body, BodyBroken, Callout, CalloutAnswer, CalloutError, CalloutFeed, CalloutFuture, CalloutOpening,
    CalloutPart, CalloutParts, CalloutRequest, Chain, Connection, Exchange, Factory, NoBody, Outcome, Peer,
    Piece, Protocol, RequestHead, ResponseHead, Running,
};
use cairn_mesh::{FailStrategy, Identity, PluginPhase, ResourceName, WasmPlugin};
use cairn_wasm::{Engine, EngineSettings, WorkerPlace};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};
use tokio::runtime::{Builder, Runtime};

/// The most memory of a guest.
const MEMORY_BYTES_MAX: usize = 4 << 20;
/// How long a guest may hold an exchange; short, so that runs are.
const PAUSE_MAX: Duration = Duration::from_millis(5);
/// How long timers and answers have to reach the guest after each exchange.
const AFTERWARDS: Duration = Duration::from_millis(2);
/// How long one poll of the chain may take: a few callbacks of 100 ms each, on a machine that does other things, too.
const POLL_MAX: Duration = Duration::from_secs(10);
/// The same of a start, whose callbacks have 10 s each.
const START_MAX: Duration = Duration::from_secs(90);
/// How often one phase is polled at most.
const POLLS_MAX: usize = 1000;
/// After so many runs there is a new proxy, so that the end of one is tried, too.
const RUNS_MAX: usize = 1000;
/// How much more memory the process may have than after its first runs. AddressSanitizer keeps 256 MiB of what is freed.
const GROWTH_BYTES_MAX: usize = 768 << 20;
/// The runs after which that is measured from.
const WARM_AFTER: usize = 100;

/// Adds `x-witness` to requests, whatever else happens.
const WITNESS: &str = r#"(module
  (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 16) "x-witness")
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "malloc") (param i32) (result i32) (i32.const 1024))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (call $add (i32.const 0) (i32.const 16) (i32.const 9) (i32.const 16) (i32.const 9))))"#;

/// The host, and where it runs.
pub struct Proxy {
    engine: Engine,
    runtime: Runtime,
    witness: Arc<dyn Factory>,
    runs: usize,
}

thread_local! {
    static PROXY: RefCell<Option<Proxy>> = const { RefCell::new(None) };
    static WARM: RefCell<(usize, usize)> = const { RefCell::new((0, 0)) };
}

/// Runs `module` as a plugin in several exchanges; `said` is what the other ends say.
pub fn run(module: &[u8], said: &[u8]) {
    PROXY.with_borrow_mut(|proxy| {
        let used = proxy.get_or_insert_with(Proxy::new);
        used.run(module, said);
        used.runs += 1;
        if used.runs >= RUNS_MAX {
            *proxy = None;
        }
    });
    check_memory();
}

/// What guests leave behind does not add up.
fn check_memory() {
    WARM.with_borrow_mut(|(runs, at_first)| {
        *runs += 1;
        if *runs <= WARM_AFTER {
            *at_first = resident_bytes();
        } else if runs.is_multiple_of(WARM_AFTER) {
            let now = resident_bytes();
            assert!(
                now <= *at_first + GROWTH_BYTES_MAX,
                "{} MiB of memory, {} at first",
                now >> 20,
                *at_first >> 20
            );
        }
    });
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|text| text.parse::<usize>().ok());
    pages.unwrap_or_default() * 4096
}

impl Proxy {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
        let callout = Arc::new(Mesh { said: Bytes::from_static(b"said") });
        let place = WorkerPlace { runtime: runtime.handle().clone(), callout };
        let settings = EngineSettings {
            memory_max: MEMORY_BYTES_MAX,
            pause_max: PAUSE_MAX,
            places: vec![place],
            node: vec![("metadata.NAMESPACE".to_owned(), "fuzz".to_owned())],
            ..EngineSettings::default()
        };
        let engine = Engine::new(settings).expect("an engine");
        let witness = wat::parse_str(WITNESS).expect("a module");
        let witness = engine
            .compile(&witness)
            .and_then(|module| engine.factory(module, &plugin("witness", FailStrategy::Close)));
        Self { witness: witness.expect("a plugin"), engine, runtime, runs: 0 }
    }

    fn run(&self, module: &[u8], said: &[u8]) {
        let module = match self.engine.compile(module) {
            Ok(module) => module,
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        let strategy = if said.len().is_multiple_of(2) { FailStrategy::Close } else { FailStrategy::Open };
        let start = Instant::now();
        let started = self.engine.start(module, &plugin("guest", strategy));
        assert!(start.elapsed() < START_MAX, "a start took {:?}", start.elapsed());
        let (chain, version) = match started {
            Ok(started) => (Chain::new(vec![Arc::clone(&self.witness), started.factory]), started.version),
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        self.runtime.block_on(async {
            // The second one begins while the first one is under way, and ends after it; the third is given up.
            let (mut first, mut second) = (Talk::new(&chain, said), Talk::new(&chain, said));
            let third = Talk::new(&chain, said);
            first.request().await;
            second.request().await;
            first.response().await;
            first.finish();
            tokio::time::sleep(AFTERWARDS).await;
            second.response().await;
            drop(third);
            second.finish();
            tokio::time::sleep(AFTERWARDS).await;
        });
        drop(chain);
        // A thread may still be starting an instance of it; nothing else may hold on to it.
        let deadline = Instant::now() + START_MAX;
        while version.is_in_use() {
            assert!(Instant::now() < deadline, "nobody uses the plugin, and it is not gone");
            std::thread::sleep(Duration::from_millis(1));
        }
        let metrics = self.engine.encode_metrics();
        let witness = "cairn_wasm_failed_exchanges_total{plugin=\"fuzz/witness\"} 0\n";
        assert!(metrics.contains(witness), "the other plugin failed: {metrics}");
    }
}

fn plugin(name: &str, fail_strategy: FailStrategy) -> WasmPlugin {
    WasmPlugin {
        name: ResourceName::new("fuzz", name),
        targets: Vec::new(),
        url: "file:///fuzz.wasm".into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "root".into(),
        config: r#"{"key": "value"}"#.into(),
        phase: PluginPhase::Unspecified,
        priority: 0,
        fail_strategy,
        env: vec![("KEY".into(), "value".into())],
        host_env: Vec::new(),
        holds_heads: false,
        kind: cairn_mesh::PluginKind::Http,
        ports: Vec::new(),
        limits: cairn_mesh::PluginLimits::default(),
        isolation: cairn_mesh::Isolation::Shared,
        mode: cairn_mesh::PluginMode::Enforce,
    }
}

/// One exchange with the chain.
struct Talk {
    running: Running,
    exchange: Exchange,
    said: Bytes,
    is_over: bool,
}

impl Talk {
    fn new(chain: &Chain, said: &[u8]) -> Self {
        let address = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let said = Bytes::copy_from_slice(said);
        let connection = Connection {
            id: 1,
            worker: 0,
            source: Peer {
                address: address(5000),
                identity: Identity::new("cluster.local", "fuzz", "client").ok(),
                workload: None,
            },
            destination: address(80),
            service: None,
            local: None,
            callout: Arc::new(Mesh { said: said.clone() }),
        };
        let exchange =
            Exchange::new(Arc::new(connection), Protocol::Http2, Instant::now(), SystemTime::now());
        Self { running: chain.start(&exchange), exchange, said, is_over: false }
    }

    async fn request(&mut self) {
        let mut head = RequestHead {
            method: Method::POST,
            scheme: HeaderValue::from_static("http"),
            authority: HeaderValue::from_static("shop:80"),
            path: PathAndQuery::from_static("/items?x=1"),
            headers: headers(&self.said),
            version: Version::HTTP_2,
        };
        let mut body = Sent::new(&self.said);
        let Self { running, exchange, .. } = self;
        let outcome =
            polled(|cx| running.poll_request_headers(cx, exchange, &mut head, false, &mut body)).await;
        self.is_over = !matches!(outcome, Some(Outcome::Continue));
        while !self.is_over {
            let Self { running, exchange, .. } = self;
            let piece = polled(|cx| running.poll_request_body(cx, exchange, &mut body)).await;
            match piece {
                Some(Ok(piece)) if !piece.is_last() => {}
                Some(Ok(_)) => break,
                _ => self.is_over = true,
            }
        }
    }

    async fn response(&mut self) {
        if self.is_over {
            return;
        }
        self.exchange.status = Some(StatusCode::OK);
        let mut body = Sent::new(&self.said);
        let mut head = ResponseHead { status: StatusCode::OK, headers: headers(&self.said) };
        loop {
            let Self { running, exchange, .. } = self;
            let outcome =
                polled(|cx| running.poll_response_headers(cx, exchange, &mut head, false, &mut body)).await;
            match outcome {
                Some(Outcome::Continue) => break,
                // As the engine does: the answer in its place meets the filters that are left.
                Some(Outcome::Reply(reply)) => {
                    head = ResponseHead { status: reply.status, headers: HeaderMap::new() }
                }
                _ => return,
            }
        }
        for _ in 0..POLLS_MAX {
            let Self { running, exchange, .. } = self;
            let piece = polled(|cx| running.poll_response_body(cx, exchange, &mut body)).await;
            if !matches!(piece, Some(Ok(piece)) if !piece.is_last()) {
                break;
            }
        }
    }

    fn finish(&mut self) {
        self.running.finish(&mut self.exchange);
    }
}

/// Polls until it is ready, and not for ever; each poll ends in time.
async fn polled<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Option<T> {
    let mut polls = 0;
    poll_fn(|cx| {
        let start = Instant::now();
        let polled = poll(cx);
        assert!(start.elapsed() < POLL_MAX, "a guest held its worker for {:?}", start.elapsed());
        polls += 1;
        match polled {
            Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
            Poll::Pending if polls >= POLLS_MAX => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

fn headers(said: &Bytes) -> HeaderMap {
    let mut map = HeaderMap::new();
    map.insert("x-in", HeaderValue::from_static("hello"));
    map.append("x-dup", HeaderValue::from_static("a"));
    map.append("x-dup", HeaderValue::from_static("b"));
    let (name, value) = said.split_at(said.len().min(8));
    if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
        map.append(name, value);
    }
    map
}

/// A body in up to three pieces, with trailers or without, of which nothing comes late.
struct Sent(VecDeque<Piece>);

impl Sent {
    fn new(said: &Bytes) -> Self {
        let third = said.len() / 3;
        let data =
            |range: std::ops::Range<usize>| Piece::Data { bytes: said.slice(range), end_of_stream: false };
        let end = match said.len() % 4 {
            0 => Piece::end(),
            _ => Piece::Trailers(headers(said)),
        };
        Self(VecDeque::from([data(0..third), data(third..said.len()), end]))
    }
}

impl Body for Sent {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        match self.0.pop_front() {
            Some(piece) => Poll::Ready(Ok(piece)),
            None => NoBody.poll_piece(cx),
        }
    }
}

/// A mesh that knows `auth.shop` with both versions of HTTP; what it answers depends on who is asked.
#[derive(Debug)]
struct Mesh {
    said: Bytes,
}

impl Mesh {
    fn answer(&self, request: &CalloutRequest) -> Result<Response<Bytes>, CalloutError> {
        match request.request.uri().path() {
            "/close" => return Err(CalloutError::Closed),
            "/none" => return Err(CalloutError::NoEndpoint(request.host.to_string())),
            _ => {}
        }
        let mut response = Response::new(self.said.clone());
        *response.headers_mut() = headers(&self.said);
        Ok(response)
    }
}

impl Callout for Mesh {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        let answer = self.answer(&request);
        let trailers = headers(&self.said);
        Box::pin(async move {
            tokio::task::yield_now().await;
            Ok(CalloutAnswer { response: answer?, trailers })
        })
    }

    fn open(&self, request: CalloutRequest, feed: Box<dyn CalloutFeed>) -> CalloutOpening {
        let answer = self.answer(&request);
        Box::pin(async move {
            tokio::task::yield_now().await;
            let (head, body) = answer?.into_parts();
            let trailers = CalloutPart::Trailers(head.headers.clone());
            let parts = VecDeque::from([CalloutPart::Data(body.clone()), CalloutPart::Data(body), trailers]);
            let parts: Box<dyn CalloutParts> = Box::new(Parts { parts, feed });
            Ok(Response::from_parts(head, parts))
        })
    }

    fn version(&self, host: &str, _: Option<&str>, port: u16) -> Option<Version> {
        match (host, port) {
            ("auth.shop.svc.cluster.local", 80) => Some(Version::HTTP_11),
            ("auth.shop.svc.cluster.local", 81) => Some(Version::HTTP_2),
            _ => None,
        }
    }
}

/// An answer in parts, each of which waits for what the guest sends.
struct Parts {
    parts: VecDeque<CalloutPart>,
    feed: Box<dyn CalloutFeed>,
}

impl CalloutParts for Parts {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<CalloutPart, CalloutError>>> {
        // Whether the guest has said all or not, the answer goes on.
        while let Poll::Ready(Some(_)) = self.feed.poll_next(cx) {}
        Poll::Ready(self.parts.pop_front().map(Ok))
    }
}
