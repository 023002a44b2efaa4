//! Hostile guests: whatever one does, its exchange follows its fail strategy, the reason can be seen, and the plugins and
//! exchanges beside it go on.

use super::outside::{self, Asking};
use super::*;
use crate::{Health, Version};
use bytes::Bytes;
use cairn_filter::{Body, BodyBroken, Chain, NoBody, Outcome, Piece};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

/// Where the hostile plugin runs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Where {
    Workers,
    OwnThreads,
}

/// An engine with a hostile plugin and a calm one, which marks requests.
struct Chaos {
    engine: Engine,
    hostile: Arc<dyn Factory>,
    version: Version,
    calm: Arc<dyn Factory>,
}

impl Chaos {
    fn new(guest: &str, strategy: FailStrategy, at: Where, deadline: Option<Duration>) -> Self {
        let engine = Engine::new(settings()).unwrap();
        let mut spec = plugin(strategy, "");
        spec.limits.deadline = deadline;
        spec.limits.own_threads = (at == Where::OwnThreads).then_some(1);
        let module = engine.compile(&wat::parse_str(guest).unwrap()).unwrap();
        let started = engine.start(module, &spec).unwrap();
        let marks = calling(
            "x-calm",
            "(call $add (i32.const 0) (i32.const 1024) (i32.const 6) (i32.const 1024) (i32.const 6))",
        );
        let spec = WasmPlugin { name: ResourceName::new("ns", "calm"), ..plugin(FailStrategy::Close, "") };
        let calm = load(&engine, &marks, &spec).unwrap();
        Self { engine, hostile: started.factory, version: started.version, calm }
    }

    fn health(&self) -> Health {
        self.version.health().unwrap()
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// A request through these plugins: what it came to, and its head.
fn request_through(plugins: &[&Arc<dyn Factory>], crash: bool) -> (Outcome, RequestHead) {
    let mut exchange = exchange();
    let mut head = request();
    if crash {
        head.headers.insert("x-crash", HeaderValue::from_static("1"));
    }
    let mut running =
        Chain::new(plugins.iter().map(|factory| Arc::clone(factory)).collect()).start(&exchange);
    let outcome = block_on(running.request_headers(&mut exchange, &mut head, true, &mut NoBody));
    running.finish(&mut exchange);
    (outcome, head)
}

/// Runs `code` on requests that have the header x-crash.
fn hostile(code: &str) -> String {
    let body = format!(
        r#"(func $recurse (result i32) (i32.add (call $recurse) (i32.const 1)))
           (func $boom {code})
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (if (i32.eqz (call $get (i32.const 0) (i32.const 525) (i32.const 7) (i32.const 16) (i32.const 20)))
               (then (call $boom)))
             (i32.const 0))"#
    );
    guest("key", &body)
}

/// What a guest does, the bound that it runs into, what is said of it, and the deadline that leaves it time to get there.
const KINDS: [(&str, &str, &str, &str, Option<Duration>); 6] = [
    ("infinite loop", "(loop (br 0))", "deadline", "it ran for more than 100 ms", None),
    (
        "unbounded allocation",
        "(loop (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable)) (br 0))",
        "memory",
        "it wanted more than 4 MiB of memory",
        None,
    ),
    ("stack overflow", "(drop (call $recurse))", "stack", "stack exhausted", None),
    ("trap", "unreachable", "", "unreachable", None),
    (
        "endless host calls",
        "(loop (drop (call $log_level (i32.const 16))) (br 0))",
        "host_calls",
        "it called the host more than 1000000 times in one call",
        Some(Duration::from_secs(10)),
    ),
    (
        "endless copies",
        "(loop (drop (call $set_shared (i32.const 1024) (i32.const 3) (i32.const 0) (i32.const 131072) (i32.const 0))) (br 0))",
        "host_bytes",
        "it had the host copy more than 128 MiB in one call",
        Some(Duration::from_secs(10)),
    ),
];

#[test]
fn whatever_a_plugin_does_those_beside_it_go_on() {
    for (name, code, limit, reason, deadline) in KINDS {
        for (strategy, at) in [
            (FailStrategy::Open, Where::Workers),
            (FailStrategy::Close, Where::OwnThreads),
            (FailStrategy::Reload, Where::Workers),
        ] {
            let about = format!("{name} {strategy:?} {at:?}");
            let chaos = Chaos::new(&hostile(code), strategy, at, deadline);
            let (outcome, head) = request_through(&[&chaos.hostile, &chaos.calm], true);
            match strategy {
                FailStrategy::Open => {
                    assert!(matches!(outcome, Outcome::Continue), "{about}: {outcome:?}");
                    assert!(head.headers.contains_key("x-calm"), "the next plugin runs: {about}");
                }
                FailStrategy::Close | FailStrategy::Reload => {
                    let Outcome::Reply(reply) = outcome else { panic!("{about}: {outcome:?}") };
                    assert_eq!(
                        (reply.status.as_u16(), &*reply.details),
                        (503, "wasm_fail_stream"),
                        "{about}"
                    );
                }
            }
            // Another service's exchanges, and this plugin's own that ask for nothing bad.
            let (outcome, head) = request_through(&[&chaos.calm], true);
            assert!(matches!(outcome, Outcome::Continue) && head.headers.contains_key("x-calm"), "{about}");

            let health = chaos.health();
            assert_eq!((health.crashes, health.failed_exchanges), (1, 1), "{about}: {health:?}");
            let crash = &health.last_crashes[0];
            assert!(crash.reason.contains(reason), "{about}: {}", crash.reason);
            let function = if name == "stack overflow" { "recurse" } else { "boom" };
            assert!(
                crash.backtrace.contains(function),
                "the function is named: {about}: {}",
                crash.backtrace
            );
            assert_eq!(crash.callback, "proxy_on_request_headers", "{about}");
            let counted = health.limits.iter().any(|(hit, count)| (*hit, *count) == (limit, 1));
            assert!(counted || limit.is_empty(), "{about}: {:?}", health.limits);
            let moved = at == Where::OwnThreads || limit == "deadline" || deadline.is_some();
            assert_eq!(health.own_threads, usize::from(moved), "{about}");
            let text = chaos.engine.encode_metrics();
            assert!(text.contains("cairn_wasm_failed_exchanges_total{plugin=\"ns/calm\"} 0\n"), "{text}");
        }
    }
}

#[test]
fn a_plugin_that_keeps_crashing_is_broken_out_of_the_chain_and_reported() {
    for (strategy, at) in [(FailStrategy::Open, Where::Workers), (FailStrategy::Close, Where::OwnThreads)] {
        let (chaos, outcome, head) = loop {
            let chaos = Chaos::new(&hostile("unreachable"), strategy, at, None);
            (0..5).for_each(|_| drop(request_through(&[&chaos.hostile], true)));
            let begun = Instant::now();
            request_through(&[&chaos.hostile], true);
            let (outcome, head) = request_through(&[&chaos.hostile, &chaos.calm], false);
            // The first pause is that long; on a machine that does much else it may be over by now.
            if begun.elapsed() < Duration::from_secs(1) {
                break (chaos, outcome, head);
            }
        };
        let passes = strategy == FailStrategy::Open;
        assert_eq!(matches!(outcome, Outcome::Continue), passes, "{outcome:?}");
        assert_eq!(head.headers.contains_key("x-calm"), passes);
        let health = chaos.health();
        assert_eq!((health.paused, health.instances, health.crashes), (1, 1, 6), "{health:?}");
        assert_eq!(health.last_crashes.len(), 5, "the last ones are kept");
        let text = chaos.engine.encode_metrics();
        assert!(text.contains("cairn_wasm_paused_instances{plugin=\"ns/test\"} 1\n"), "{text}");
    }
}

/// A body of one piece, and trailers.
struct Whole(Vec<Piece>);

impl Whole {
    fn new() -> Self {
        let data = Piece::Data { bytes: Bytes::from_static(b"body"), end_of_stream: false };
        let trailers =
            HeaderMap::from_iter([(HeaderName::from_static("x-t"), HeaderValue::from_static("t"))]);
        Self(vec![Piece::Trailers(trailers), data])
    }
}

impl Body for Whole {
    fn poll_piece(&mut self, _: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        Poll::Ready(Ok(self.0.pop().unwrap_or_else(Piece::end)))
    }
}

/// What became of a whole exchange, in a word, when a plugin is in its way.
async fn whole_exchange(chaos: &Chaos) -> &'static str {
    let mut exchange = exchange();
    let mut running = Chain::new(vec![Arc::clone(&chaos.hostile)]).start(&exchange);
    let run = async {
        let (mut head, mut body) = (request(), Whole::new());
        match running.request_headers(&mut exchange, &mut head, false, &mut body).await {
            Outcome::Continue => {}
            _ => return "refused",
        }
        loop {
            let piece =
                std::future::poll_fn(|cx| running.poll_request_body(cx, &mut exchange, &mut body)).await;
            match piece {
                Ok(piece) if piece.is_last() => break,
                Ok(_) => {}
                Err(_) => return "refused in the request's body",
            }
        }
        let (mut head, mut body) = (response(), Whole::new());
        match running.response_headers(&mut exchange, &mut head, false, &mut body).await {
            Outcome::Continue => {}
            _ => return "replaced",
        }
        loop {
            let piece =
                std::future::poll_fn(|cx| running.poll_response_body(cx, &mut exchange, &mut body)).await;
            match piece {
                Ok(piece) if piece.is_last() => return "passes",
                Ok(_) => {}
                Err(_) => return "cut in the response's body",
            }
        }
    };
    let outcome = run.await;
    running.finish(&mut exchange);
    outcome
}

#[test]
fn a_trap_in_any_callback_ends_one_exchange() {
    for (callback, parameters, result, closed) in [
        ("proxy_on_context_create", "i32 i32", "", "refused"),
        ("proxy_on_request_headers", "i32 i32 i32", "i32", "refused"),
        ("proxy_on_request_body", "i32 i32 i32", "i32", "refused in the request's body"),
        ("proxy_on_request_trailers", "i32 i32", "i32", "refused in the request's body"),
        ("proxy_on_response_headers", "i32 i32 i32", "i32", "replaced"),
        ("proxy_on_response_body", "i32 i32 i32", "i32", "cut in the response's body"),
        ("proxy_on_response_trailers", "i32 i32", "i32", "cut in the response's body"),
        ("proxy_on_log", "i32", "", "passes"),
        ("proxy_on_done", "i32", "i32", "passes"),
        ("proxy_on_delete", "i32", "", "passes"),
    ] {
        let result = if result.is_empty() { String::new() } else { format!("(result {result})") };
        // Not for the root context, with which the plugin starts; but always for streams.
        let trap = "(if (i32.gt_u (local.get 0) (i32.const 1)) (then (call $boom))) ";
        let value = if result.is_empty() { "" } else { "(i32.const 0)" };
        let other = match callback {
            "proxy_on_request_headers" => "proxy_on_response_headers",
            _ => "proxy_on_request_headers",
        };
        let body = format!(
            r#"(func $boom unreachable)
               (func (export "{callback}") (param {parameters}) {result} {trap} {value})
               (func (export "{other}") (param i32 i32 i32) (result i32) (i32.const 0))"#
        );
        for (strategy, at) in [
            (FailStrategy::Open, Where::Workers),
            (FailStrategy::Close, Where::Workers),
            (FailStrategy::Open, Where::OwnThreads),
            (FailStrategy::Close, Where::OwnThreads),
        ] {
            let about = format!("{callback} {strategy:?} {at:?}");
            let chaos = Chaos::new(&guest("", &body), strategy, at, None);
            let outcome = block_on(whole_exchange(&chaos));
            assert_eq!(outcome, if strategy == FailStrategy::Open { "passes" } else { closed }, "{about}");
            // The end of an exchange is told to its own threads, and not waited for.
            outside::until("the crash", || chaos.health().crashes == 1);
            let crash = &chaos.health().last_crashes[0];
            assert_eq!(crash.callback, callback, "{about}");
            assert!(crash.backtrace.starts_with("boom < "), "{about}: {}", crash.backtrace);
        }
    }
}

#[test]
fn queued_calls_are_bounded() {
    let headers = outside::map(&[(":method", "GET"), (":path", "/"), (":authority", "a")]);
    let mut data = b"auth.shop:80".to_vec();
    data.resize(256, 0);
    data.extend_from_slice(&headers);
    let length = headers.len();
    // Asks 1,100 times in one call, and reports the last status.
    let body = format!(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (local $left i32) (local $status i32)
             (local.set $left (i32.const 1100))
             (loop
               (local.set $status (call $http_call (i32.const 1024) (i32.const 12) (i32.const 1280)
                 (i32.const {length}) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 60000)
                 (i32.const 3000)))
               (local.set $left (i32.sub (local.get $left) (i32.const 1)))
               (br_if 0 (local.get $left)))
             (call $finish (local.get $status))
             (i32.const 0))"#
    );
    let asking = Asking::new(&guest(&outside::escaped(&data), &body));
    let mut run = asking.start();
    assert_eq!(word(&run.request()), "continue");
    assert_eq!(run.header("x-status"), "10");
    asking.mesh.wait(1000);
    let text = asking.host.engine.encode_metrics();
    for expected in ["calls_total{plugin=\"ns/test\"} 1000\n", "limit=\"calls\"} 100\n"] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

/// Counts lines.
#[derive(Clone, Default)]
struct Lines(Arc<AtomicUsize>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.fetch_add(bytes.iter().filter(|byte| **byte == b'\n').count(), Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_flood_of_log_lines_is_dropped_and_counted() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let code = r#"(local $left i32)
      (local.set $left (i32.const 20000))
      (loop
        (drop (call $log (i32.const 3) (i32.const 1024) (i32.const 3)))
        (local.set $left (i32.sub (local.get $left) (i32.const 1)))
        (br_if 0 (local.get $left)))"#;
    tracing::subscriber::with_default(subscriber, || {
        // Two services with the same plugin, and one line of its own for each.
        let chaos = Chaos::new(&hostile(code), FailStrategy::Open, Where::Workers, None);
        let begun = Instant::now();
        for _ in 0..2 {
            request_through(&[&chaos.hostile], true);
        }
        let seconds = begun.elapsed().as_secs() as usize + 1;
        let (written, dropped) = (lines.0.load(Ordering::Relaxed), chaos.health().log_lines_dropped);
        assert!(written <= 1000 * seconds + 100, "{written} lines in {seconds} s");
        assert!(dropped > 0, "{dropped} dropped");
    });
}
