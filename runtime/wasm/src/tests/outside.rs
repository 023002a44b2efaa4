//! What reaches a guest outside of its streams: answers of other services, its timer, its queues.

use super::*;
use bytes::Bytes;
use cairn_filter::{
    Callout, CalloutAnswer, CalloutError, CalloutFeed, CalloutFuture, CalloutOpening, CalloutPart,
    CalloutParts, CalloutRequest,
};
use http::Response;
use parking_lot::Mutex;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tokio::sync::{mpsc, oneshot};

type Answer = Result<CalloutAnswer, CalloutError>;

/// A mesh of two services. What is asked waits here until the test answers.
#[derive(Debug, Default)]
pub(super) struct Mesh {
    pub(super) asked: Mutex<Vec<(CalloutRequest, Option<oneshot::Sender<Answer>>)>>,
    /// How many questions were given up.
    given_up: Arc<AtomicUsize>,
    /// Streams that were opened.
    pub(super) streams: Mutex<Vec<Opened>>,
}

/// Counts a question that nobody waits for any more.
struct GivenUp(Arc<AtomicUsize>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Callout for Mesh {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        let (sender, answer) = oneshot::channel();
        self.asked.lock().push((request, Some(sender)));
        let given_up = GivenUp(Arc::clone(&self.given_up));
        Box::pin(async move {
            let answer = answer.await.expect("the test answers or waits");
            std::mem::forget(given_up);
            answer
        })
    }

    fn open(&self, request: CalloutRequest, feed: Box<dyn CalloutFeed>) -> CalloutOpening {
        let (head, answered) = oneshot::channel::<Response<()>>();
        let (sender, parts) = mpsc::unbounded_channel();
        let sent = Arc::new(Mutex::new(request.request.into_body().to_vec()));
        let opened = Opened { sent: Arc::clone(&sent), head: Mutex::new(Some(head)), parts: sender };
        self.streams.lock().push(opened);
        let mut rest = Parts { parts, feed, sent };
        Box::pin(async move {
            let mut answered = pin!(answered);
            let head = poll_fn(|cx| {
                rest.collect(cx);
                answered.as_mut().poll(cx)
            });
            let head = head.await.map_err(|_| CalloutError::Closed)?;
            Ok(head.map(|()| Box::new(rest) as Box<dyn CalloutParts>))
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

/// A stream that a guest opened.
#[derive(Debug)]
pub(super) struct Opened {
    sent: Arc<Mutex<Vec<u8>>>,
    head: Mutex<Option<oneshot::Sender<Response<()>>>>,
    parts: mpsc::UnboundedSender<CalloutPart>,
}

impl Opened {
    /// What the guest sent, once it is this long.
    pub(super) fn sent(&self, length: usize) -> Bytes {
        until("messages sent", || self.sent.lock().len() >= length);
        Bytes::copy_from_slice(&self.sent.lock())
    }

    pub(super) fn head(&self, headers: &[(&'static str, &'static str)]) {
        let mut response = Response::new(());
        for (name, value) in headers {
            match *name {
                ":status" => *response.status_mut() = value.parse().unwrap(),
                name => {
                    response.headers_mut().insert(name, HeaderValue::from_static(value));
                }
            }
        }
        self.head.lock().take().unwrap().send(response).expect("the guest waits");
    }

    pub(super) fn part(&self, part: CalloutPart) {
        self.parts.send(part).expect("the guest listens");
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.parts.is_closed()
    }
}

/// The guest's side of a stream: what the test says, while what the guest sends is kept.
struct Parts {
    parts: mpsc::UnboundedReceiver<CalloutPart>,
    feed: Box<dyn CalloutFeed>,
    sent: Arc<Mutex<Vec<u8>>>,
}

impl Parts {
    fn collect(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(data)) = self.feed.poll_next(cx) {
            self.sent.lock().extend_from_slice(&data);
        }
    }
}

impl CalloutParts for Parts {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<CalloutPart, CalloutError>>> {
        self.collect(cx);
        self.parts.poll_recv(cx).map(|part| part.map(Ok))
    }
}

impl Mesh {
    /// Waits until `count` questions were asked.
    pub(super) fn wait(&self, count: usize) {
        until("questions asked", || self.asked.lock().len() >= count);
    }

    pub(super) fn answer(&self, index: usize, answer: Answer) {
        let sender = self.asked.lock()[index].1.take().expect("answered once");
        // The asker may be gone.
        let _ = sender.send(answer);
    }
}

/// Waits for something that happens on another thread.
pub(super) fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !happened() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn answer(status: u16, body: &'static str) -> Answer {
    let response = Response::builder().status(status).header("x-auth", "who").body(body.into()).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-trailer", HeaderValue::from_static("t"));
    Ok(CalloutAnswer { response, trailers })
}

/// A plugin whose worker can ask `Mesh`, and so can its exchanges.
pub(super) struct Asking {
    pub(super) host: Host,
    pub(super) mesh: Arc<Mesh>,
    _runtime: tokio::runtime::Runtime,
}

impl Asking {
    pub(super) fn new(guest: &str) -> Self {
        Self::start_with(guest).expect("the guest starts")
    }

    pub(super) fn on_own_threads(guest: &str) -> Self {
        let mut plugin = plugin(FailStrategy::Close, "");
        plugin.limits.own_threads = Some(1);
        Self::start_as(guest, &plugin).expect("the guest starts")
    }

    /// `None` when the guest does not start.
    pub(super) fn start_with(guest: &str) -> Option<Self> {
        Self::start_as(guest, &plugin(FailStrategy::Close, ""))
    }

    fn start_as(guest: &str, plugin: &WasmPlugin) -> Option<Self> {
        let mesh = Arc::new(Mesh::default());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let place = crate::WorkerPlace {
            runtime: runtime.handle().clone(),
            callout: Arc::clone(&mesh) as Arc<dyn Callout>,
        };
        let engine = Engine::new(EngineSettings {
            places: vec![place],
            pause_max: Duration::from_secs(20),
            ..settings()
        })
        .unwrap();
        let factory = load(&engine, guest, plugin).ok()?;
        Some(Self { host: Host { engine, factory }, mesh, _runtime: runtime })
    }

    pub(super) fn start(&self) -> Run {
        let mut run = self.host.start();
        let connection = Arc::get_mut(&mut run.exchange.connection).unwrap();
        connection.callout = Arc::clone(&self.mesh) as Arc<dyn Callout>;
        run.filter = self.host.factory.start(&run.exchange).unwrap();
        run
    }

    fn counts(&self, line: &str) -> bool {
        self.host.engine.encode_metrics().contains(line)
    }
}

/// Bytes as a string of the text format.
pub(super) fn escaped(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\{byte:02x}")).collect()
}

pub(super) fn map(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let pairs = pairs.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    crate::pairs::write(&mut bytes, pairs.len() as u32, pairs);
    bytes
}

const ASKED: [(&str, &str); 5] = [
    (":method", "POST"),
    (":path", "/check?a=b"),
    (":authority", "auth.example"),
    ("X-Mixed", "A"),
    ("content-length", "99"),
];

/// What a call is made of. The name stands at 1024, the headers at 1280, the body at 1024 too.
struct Call {
    name: &'static str,
    headers: Vec<u8>,
    /// What stands in place of the usual arguments, by position.
    arguments: Vec<(usize, i64)>,
}

impl Call {
    fn new(name: &'static str, headers: &[(&str, &str)]) -> Self {
        Self { name, headers: map(headers), arguments: Vec::new() }
    }

    fn with(mut self, position: usize, argument: i64) -> Self {
        self.arguments.push((position, argument));
        self
    }

    fn data(&self) -> String {
        let mut bytes = self.name.as_bytes().to_vec();
        bytes.resize(256, 0);
        bytes.extend_from_slice(&self.headers);
        escaped(&bytes)
    }

    fn code(&self) -> String {
        let (name, headers) = (self.name.len() as i64, self.headers.len() as i64);
        let mut arguments = [1024, name, 1280, headers, 1024, 4, 0, 0, 1000, 3000];
        for (position, argument) in &self.arguments {
            arguments[*position] = *argument;
        }
        let arguments: String = arguments.iter().map(|number| format!(" (i32.const {number})")).collect();
        format!("(call $http_call{arguments})")
    }

    /// A guest that makes this call for a request, holds it, and does `then` when the answer is here.
    fn guest(&self, then: &str) -> String {
        let body = format!(
            r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (global.set $stream (local.get 0))
                 (call $finish {}) (i32.const 1))
               (global $stream (mut i32) (i32.const 0))
               (func (export "proxy_on_http_call_response") (param $root i32) (param $id i32) (param $headers i32)
                 (param $body i32) (param $trailers i32)
                 {then})
               (data (i32.const 4096) "answers:statusx-authx-trailer")
               {COUNT}"#,
            self.code()
        );
        guest(&self.data(), &body)
    }
}

/// Counts in the metric `answers`.
pub(super) const COUNT: &str = r#"(func $count
     (drop (call $define (i32.const 0) (i32.const 4096) (i32.const 7) (i32.const 3100)))
     (drop (call $increment (i32.load (i32.const 3100)) (i64.const 1))))"#;

/// Sets x-got of the stream to the body, x-status to the headers' status, and goes on.
const TELL: &str = r#"
    (drop (call $get (i32.const 6) (i32.const 4103) (i32.const 7) (i32.const 3200) (i32.const 3204)))
    (drop (call $buffer (i32.const 4) (i32.const 0) (i32.const -1) (i32.const 8) (i32.const 12)))
    (drop (call $effective (global.get $stream)))
    (call $finish (i32.add (local.get $headers) (local.get $trailers)))
    (drop (call $replace (i32.const 0) (i32.const 4103) (i32.const 7) (i32.load (i32.const 3200)) (i32.load (i32.const 3204))))
    (drop (call $replace (i32.const 0) (i32.const 512) (i32.const 8) (i32.load (i32.const 3200)) (i32.load (i32.const 3204))))
    (drop (call $continue (i32.const 0)))
    (call $count)"#;

pub(super) fn block_on(verdict: Verdict) {
    let Verdict::Wait(future) = verdict else { panic!("{}", word(&verdict)) };
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future);
}

const AUTH: &str = "outbound|80||auth.shop.svc.cluster.local";

#[test]
fn an_answer_arrives_and_the_stream_goes_on() {
    for (name, http2) in [(AUTH, false), ("auth.shop:80", false), ("auth.shop:81", true)] {
        let asking = Asking::new(&Call::new(name, &ASKED).guest(TELL));
        let mut run = asking.start();
        let verdict = run.request();
        assert_eq!((word(&verdict), run.header("x-status")), ("wait".into(), "00".into()), "{name}");
        asking.mesh.wait(1);
        {
            let asked = asking.mesh.asked.lock();
            let CalloutRequest { host, http2: spoken, request, timeout, .. } = &asked[0].0;
            assert_eq!((&**host, *spoken), ("auth.shop.svc.cluster.local", http2), "{name}");
            assert_eq!(request.uri(), "http://auth.example/check?a=b");
            assert_eq!((request.method().as_str(), &request.body()[..]), ("POST", &name.as_bytes()[..4]));
            assert_eq!(request.headers().len(), 1, "lengths are the engine's: {request:?}");
            assert_eq!(request.headers()["x-mixed"], "A");
            assert_eq!(*timeout, Duration::from_secs(1));
        }
        asking.mesh.answer(0, answer(200, "fine"));
        block_on(verdict);
        assert_eq!(word(&run.request()), "continue");
        assert_eq!((run.header("x-got"), run.header("x-status")), ("fine".into(), "200".into()));
        assert_eq!(run.notes().last(), Some(&"request: set x-status, set x-got, set :status, set x-status"));
        assert!(
            asking.counts("answers 1\n") && asking.counts("cairn_wasm_calls_total{plugin=\"ns/test\"} 1\n")
        );
        run.finish();
    }
}

#[test]
fn calls_that_cannot_be_made_say_so() {
    let without = |name: &str| ASKED.into_iter().filter(|(n, _)| *n != name).collect::<Vec<_>>();
    let with = |name, value| without(name).into_iter().chain([(name, value)]).collect::<Vec<_>>();
    let usual = || Call::new(AUTH, &ASKED);
    let cases = [
        ("good", usual(), 0),
        ("unknown service", Call::new("outbound|80||nobody.example", &ASKED), 2),
        ("unknown port", Call::new("auth.shop:443", &ASKED), 2),
        ("an address", Call::new("127.0.0.1:80", &ASKED), 2),
        ("no method", Call::new(AUTH, &without(":method")), 2),
        ("no path", Call::new(AUTH, &without(":path")), 2),
        ("no authority", Call::new(AUTH, &without(":authority")), 2),
        ("bad path", Call::new(AUTH, &with(":path", "/a b")), 2),
        ("bad authority", Call::new(AUTH, &with(":authority", "a b")), 2),
        ("bad scheme", Call::new(AUTH, &with(":scheme", "h p")), 2),
        ("bad method", Call::new(AUTH, &with(":method", "G T")), 2),
        ("line break", Call::new(AUTH, &with("x", "a\r\nb: c")), 2),
        ("malformed headers", usual().with(3, 7), 2),
        ("no headers", usual().with(3, 0), 2),
        ("malformed trailers", usual().with(6, 1024).with(7, 7), 2),
        ("bad name", usual().with(0, -4), 6),
        ("bad name length", usual().with(1, -1), 6),
        ("bad headers", usual().with(2, -4), 6),
        ("bad headers length", usual().with(3, -1), 6),
        ("bad body", usual().with(4, -4), 6),
        ("bad body length", usual().with(5, -1), 6),
        ("bad trailers", usual().with(6, -4).with(7, 4), 6),
        ("bad id", usual().with(9, -2), 6),
    ];
    for (name, call, status) in cases {
        let asking = Asking::new(&call.guest(""));
        let mut run = asking.start();
        run.request();
        assert_eq!(run.header("x-status"), format!("{status:02}"), "{name}");
        if status == 0 {
            asking.mesh.wait(1);
        } else {
            assert!(asking.counts("cairn_wasm_calls_total{plugin=\"ns/test\"} 0\n"), "{name}");
        }
    }
}

#[test]
fn failures_are_answered_as_by_envoys_router() {
    let refused =
        "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure";
    let cases = [
        ("no endpoint", CalloutError::NoEndpoint("x".into()), "503", "no healthy upstream"),
        ("nobody listens", CalloutError::Unreachable("x".into()), "503", refused),
        (
            "closed",
            CalloutError::Closed,
            "503",
            "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
        ),
        ("late", CalloutError::Timeout(Duration::from_secs(1)), "504", "upstream request timeout"),
        ("broken off", CalloutError::BrokenOff("x".into()), "", ""),
        ("too long", CalloutError::TooLong(1), "", ""),
    ];
    for (name, error, status, body) in cases {
        let asking = Asking::new(&Call::new(AUTH, &ASKED).guest(TELL));
        let mut run = asking.start();
        let verdict = run.request();
        asking.mesh.wait(1);
        asking.mesh.answer(0, Err(error));
        block_on(verdict);
        assert_eq!(word(&run.request()), "continue", "{name}");
        assert_eq!((run.header("x-got"), run.header("x-status")), (body.into(), status.into()), "{name}");
    }
}

#[test]
fn an_answer_may_end_the_stream() {
    let reply = "(drop (call $effective (global.get $stream)))
        (drop (call $reply (i32.const 403) (i32.const 4096) (i32.const 7) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const -1)))";
    let close = "(drop (call $effective (global.get $stream))) (drop (call $close (i32.const 0)))";
    for (then, expected) in [(reply, "reply 403 answers"), (close, "reset")] {
        let asking = Asking::new(&Call::new(AUTH, &ASKED).guest(then));
        let mut run = asking.start();
        let verdict = run.request();
        asking.mesh.wait(1);
        asking.mesh.answer(0, answer(200, ""));
        block_on(verdict);
        assert_eq!(word(&run.request()), expected);
    }
}

#[test]
fn an_answer_outlives_its_stream_but_not_its_instance() {
    let guest = Call::new(AUTH, &ASKED).guest("(call $count)");
    let asking = Asking::new(&guest);
    let mut gone = asking.start();
    gone.request();
    gone.finish();
    asking.mesh.wait(1);
    asking.mesh.answer(0, answer(200, ""));
    until("the root got the answer", || asking.counts("answers 1\n"));

    // The guest crashes while a call is under way: its next instance never asked.
    let crashes = Call::new(AUTH, &ASKED).guest("unreachable");
    let asking = Asking::new(&crashes);
    let (mut first, mut second) = (asking.start(), asking.start());
    let (first_verdict, _second_verdict) = (first.request(), second.request());
    asking.mesh.wait(2);
    asking.mesh.answer(0, answer(200, ""));
    block_on(first_verdict);
    assert_eq!(word(&first.request()), "reply 503 wasm_fail_stream");
    until("the other call is given up", || asking.mesh.given_up.load(Ordering::Relaxed) == 1);
    assert!(asking.counts("cairn_wasm_traps_total{plugin=\"ns/test\"} 1\n"));

    // The plugin is replaced while a call is under way.
    let asking = Asking::new(&guest);
    let mut run = asking.start();
    run.request();
    asking.mesh.wait(1);
    let Asking { host, mesh, _runtime } = asking;
    drop((run, host));
    until("the call is given up", || mesh.given_up.load(Ordering::Relaxed) == 1);
}

#[test]
fn calls_under_way_are_bounded() {
    let call = Call::new(AUTH, &ASKED);
    let many = format!(
        "(local $i i32)
         (loop (local.set $i (i32.add (local.get $i) (i32.const 1)))
           (br_if 0 (i32.eqz (i32.or {} (i32.ge_u (local.get $i) (i32.const 2000)))))
         )
         (call $finish (i32.div_u (local.get $i) (i32.const 100)))
         (call $finish {})",
        call.code(),
        call.code()
    );
    let body = format!(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) {many} (i32.const 0))"#
    );
    let asking = Asking::new(&guest(&call.data(), &body));
    let mut run = asking.start();
    assert_eq!(word(&run.request()), "continue");
    assert_eq!(run.header("x-status"), "10");
    until("all are asked", || asking.mesh.asked.lock().len() == crate::outside::CALLS_MAX);
}

#[test]
fn what_an_answer_brings_is_there_during_its_callback_only() {
    // Statuses of maps and buffers in a stream while no answer is delivered.
    let get = "(call $get (i32.const 6) (i32.const 1024) (i32.const 4) (i32.const 8) (i32.const 12))";
    let asking = Asking::new(&calling(":path", get));
    let mut run = asking.start();
    run.request();
    assert_eq!(run.header("x-status"), "01");

    // Trailers and own reads during the callback, from the root and from the stream.
    let then = "(if (call $get (i32.const 7) (i32.const 4116) (i32.const 9) (i32.const 8) (i32.const 12)) (then unreachable))
        (if (i32.ne (call $get (i32.const 6) (i32.const 4116) (i32.const 9) (i32.const 8) (i32.const 12)) (i32.const 1)) (then unreachable))
        (if (i32.ne (call $get (i32.const 0) (i32.const 4116) (i32.const 9) (i32.const 8) (i32.const 12)) (i32.const 2)) (then unreachable))
        (if (i32.ne (call $add (i32.const 6) (i32.const 4116) (i32.const 9) (i32.const 8) (i32.const 2)) (i32.const 2)) (then unreachable))
        (if (i32.ne (call $buffer_status (i32.const 4) (i32.const 3200) (i32.const 3204)) (i32.const 0)) (then unreachable))
        (if (i32.ne (i32.load (i32.const 3200)) (i32.const 4)) (then unreachable))
        (call $count)";
    let asking = Asking::new(&Call::new(AUTH, &ASKED).guest(then));
    let mut run = asking.start();
    run.request();
    asking.mesh.wait(1);
    asking.mesh.answer(0, answer(200, "four"));
    until("the root got the answer", || asking.counts("answers 1\n"));
}

/// A guest that asks for a tick every 10 ms when it is configured, and does `then` in each.
fn ticking(period: u32, then: &str) -> String {
    let body = format!(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
             (i32.eqz (call $tick (i32.const {period}))))
           (func (export "proxy_on_tick") (param i32) {then})
           (global $ticks (mut i32) (i32.const 0))
           (data (i32.const 4096) "answers")
           {COUNT}"#
    );
    guest("", &body)
}

/// What the guest's counter says; a timer may have gone past any number by the time one looks.
fn answers(metrics: &str) -> u64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix("answers "));
    line.and_then(|count| count.parse().ok()).unwrap_or_default()
}

#[test]
fn timers_tick_until_they_are_stopped() {
    let asking = Asking::new(&ticking(10, "(call $count)"));
    until("three ticks", || answers(&asking.host.engine.encode_metrics()) >= 3);

    let once = "(call $count) (drop (call $tick (i32.const 0)))";
    let stopped = Asking::new(&ticking(1, once));
    until("a tick", || stopped.counts("answers 1\n"));
    until("others tick on", || answers(&asking.host.engine.encode_metrics()) >= 10);
    assert!(stopped.counts("answers 1\n"), "stopped");

    // A guest that crashes in a tick starts again and ticks again.
    let crashes = Asking::new(&ticking(10, "(call $count) unreachable"));
    until("two instances ticked", || answers(&crashes.host.engine.encode_metrics()) >= 2);
    // Without a place for it, the engine has a thread.
    let alone = Host::new(&ticking(10, "(call $count)"));
    until("a tick", || answers(&alone.engine.encode_metrics()) >= 2);
}

#[test]
fn timers_may_call_out_and_streams_may_set_them() {
    let call = Call::new(AUTH, &ASKED);
    let body = format!(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (call $finish (call $tick (i32.const 10))) (i32.const 0))
           (func (export "proxy_on_tick") (param i32)
             (drop (call $tick (i32.const 0)))
             (if {} (then unreachable)))
           (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32) (call $count))
           (data (i32.const 4096) "answers")
           {COUNT}"#,
        call.code()
    );
    let asking = Asking::new(&guest(&call.data(), &body));
    asking.start().request();
    asking.mesh.wait(1);
    asking.mesh.answer(0, answer(200, ""));
    until("the answer", || asking.counts("answers 1\n"));
}

#[test]
fn queues_tell_of_every_item() {
    let body = format!(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
             (i32.eqz (call $register (i32.const 1024) (i32.const 1) (i32.const 3000))))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (drop (call $enqueue (i32.load (i32.const 3000)) (i32.const 1024) (i32.const 1)))
             (drop (call $enqueue (i32.load (i32.const 3000)) (i32.const 1024) (i32.const 1)))
             (i32.const 0))
           (func (export "proxy_on_queue_ready") (param i32) (param $queue i32)
             (if (i32.eqz (call $dequeue (local.get $queue) (i32.const 3200) (i32.const 3204)))
               (then (call $count))))
           (data (i32.const 4096) "answers")
           {COUNT}"#
    );
    let asking = Asking::new(&guest("q", &body));
    asking.start().request();
    until("two items", || asking.counts("answers 2\n"));
    asking.start().request();
    until("four items", || asking.counts("answers 4\n"));
}
