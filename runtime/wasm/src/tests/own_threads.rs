//! Plugins on threads of their own: exchanges wait for them without holding a worker up, and lose nothing by it.

use super::outside::{Asking, answer, until};
use super::*;
use crate::threads::QUEUE_MAX;
use bytes::Bytes;
use cairn_filter::{Chain, Chunk, NoBody, Outcome, Part, Running, Side};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

/// A plugin that runs on so many threads of its own.
fn on_own_threads(guest: &str, fail_strategy: FailStrategy, count: usize) -> Host {
    let mut plugin = plugin(fail_strategy, "");
    // Where a guest spins, longer than a test takes to see that.
    (plugin.limits.own_threads, plugin.limits.deadline) = (Some(count), Some(Duration::from_secs(2)));
    let engine = Engine::new(settings()).unwrap();
    let factory = load(&engine, guest, &plugin).unwrap();
    Host { engine, factory }
}

/// Spins when it is asked to.
const SPINS: &str = r#"
    (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
      (if (i32.eqz (call $get (i32.const 0) (i32.const 525) (i32.const 7) (i32.const 16) (i32.const 20)))
        (then (loop (br 0))))
      (call $finish (i32.const 0)) (i32.const 0))"#;

#[test]
fn heads_bodies_and_trailers_come_back_as_the_guest_left_them() {
    let body = r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $finish (i32.const 1)) (i32.const 0))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (drop (call $set_buffer (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 512) (i32.const 8)))
        (i32.const 0))
      (func (export "proxy_on_request_trailers") (param i32 i32) (result i32)
        (drop (call $add (i32.const 1) (i32.const 520) (i32.const 5) (i32.const 512) (i32.const 8)))
        (i32.const 0))
      (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (drop (call $reply (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 512) (i32.const 8)
          (i32.const 0) (i32.const 0) (i32.const -1)))
        (i32.const 0))
      (func (export "proxy_on_log") (param i32) (call $count))
      (data (i32.const 4096) "answers:")"#;
    let host = on_own_threads(&guest("", &format!("{body} {}", outside::COUNT)), FailStrategy::Close, 2);
    let mut run = host.start();
    let first = run.request();
    assert_eq!((word(&first), run.header("x-status")), ("wait".into(), String::new()), "not here");
    drop(first);
    assert_eq!(word(&said(|| run.request())), "continue");
    assert_eq!(run.header("x-status"), "01");
    let mut chunk = Chunk { bytes: Bytes::from_static(b"body"), ..Chunk::default() };
    let mut shown = || {
        let Run { filter, exchange, .. } = &mut run;
        let part = Part { side: Side::Request, head: None, chunk: &mut chunk };
        filter.body(exchange, part)
    };
    assert_eq!(word(&said(&mut shown)), "continue");
    assert_eq!((&chunk.bytes[..], chunk.is_changed), (&b"x-status"[..], true));
    let mut chunk = Chunk { trailers: Some(HeaderMap::new()), ..Chunk::default() };
    let mut shown = || {
        let Run { filter, exchange, .. } = &mut run;
        let part = Part { side: Side::Request, head: None, chunk: &mut chunk };
        filter.trailers(exchange, part)
    };
    assert_eq!(word(&said(&mut shown)), "continue");
    assert_eq!(chunk.trailers.unwrap()["x-got"], "x-status");
    assert_eq!(word(&said(|| run.response())), "reply 403 wasm_local_response");
    assert_eq!(
        run.notes(),
        ["request: set x-status", "request: changed the body", "trailers: added x-got", "answered 403"]
    );
    run.finish();
    until("the log", || host.engine.encode_metrics().contains("answers 1\n"));
    let text = host.engine.encode_metrics();
    assert!(text.contains("cairn_wasm_own_threads{plugin=\"ns/test\"} 2\n"), "{text}");
    drop((run, host.factory));
    until("the end of its threads", || {
        host.engine.encode_metrics().contains("cairn_wasm_own_threads{plugin=\"ns/test\"} 0\n")
    });
}

#[test]
fn an_answer_to_a_call_lets_a_stream_go_on() {
    let body = r#"
      (global $stream (mut i32) (i32.const 0))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (global.set $stream (local.get 0))
        (call $finish (call $http_call (i32.const 1024) (i32.const 12) (i32.const 1280) (i32.const {length})
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 3000)))
        (i32.const 1))
      (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
        (drop (call $buffer (i32.const 4) (i32.const 0) (i32.const -1) (i32.const 8) (i32.const 12)))
        (drop (call $effective (global.get $stream)))
        (call $finish (i32.const 2))
        (drop (call $continue (i32.const 0))))"#;
    let headers = outside::map(&[(":method", "GET"), (":path", "/"), (":authority", "a")]);
    let mut data = b"auth.shop:80".to_vec();
    data.resize(256, 0);
    data.extend_from_slice(&headers);
    let body = body.replace("{length}", &headers.len().to_string());
    let asking = Asking::on_own_threads(&guest(&outside::escaped(&data), &body));
    let mut run = asking.start();
    outside::block_on(run.request());
    // The guest has asked, and holds the request now.
    let held = run.request();
    assert_eq!((word(&held), run.header("x-status")), ("wait".into(), "00".into()));
    asking.mesh.wait(1);
    asking.mesh.answer(0, answer(200, "fine"));
    outside::block_on(held);
    assert_eq!(word(&said(|| run.request())), "continue");
    assert_eq!((run.header("x-got"), run.header("x-status")), ("fine".into(), "02".into()));
}

#[test]
fn a_plugin_moves_to_threads_of_its_own_when_it_misses_its_deadline() {
    let host = Host::with(&guest("", SPINS), FailStrategy::Open, "");
    let health = || {
        let text = host.engine.encode_metrics();
        let value = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.rsplit(' ').next().and_then(|number| number.parse::<u64>().ok())
        };
        (
            value("cairn_wasm_own_threads{plugin=\"ns/test\"}"),
            value("cairn_wasm_limit_hits_total{plugin=\"ns/test\",limit=\"deadline\"}"),
        )
    };
    let mut before = host.start();
    assert_eq!(word(&before.request()), "continue");
    assert_eq!((before.header("x-status"), health()), ("00".into(), (Some(0), None)));
    let mut run = host.start().with_header("x-crash", "1");
    assert_eq!(word(&run.request()), "continue", "here, and at once");
    assert_eq!((run.notes(), health()), (vec!["the plugin crashed"], (Some(1), Some(1))));
    let mut run = host.start().with_header("x-crash", "1");
    assert_eq!(word(&run.request()), "wait", "there, and not at once");
    assert_eq!(word(&said(|| run.request())), "continue");
    assert_eq!((run.notes(), health()), (vec!["the plugin crashed"], (Some(1), Some(2))));
    // What had begun before goes on there.
    assert_eq!(word(&said(|| before.response())), "continue");
    before.finish();
    let mut run = host.start();
    assert_eq!(word(&said(|| run.request())), "continue");
    assert_eq!(run.header("x-status"), "00", "it runs on");
}

/// Fills the only thread of a plugin and its queue, and returns the exchanges that do.
fn filled(host: &Host, more: usize) -> Vec<(Run, Verdict)> {
    let fill = |_| {
        let mut run = host.start().with_header("x-crash", "1");
        let verdict = run.request();
        (run, verdict)
    };
    (0..more).map(fill).collect()
}

#[test]
fn a_full_queue_is_answered_by_the_fail_strategy() {
    for (strategy, expected) in
        [(FailStrategy::Open, "continue"), (FailStrategy::Close, "reply 503 wasm_fail_stream")]
    {
        let host = on_own_threads(&guest("", SPINS), strategy, 1);
        // The first runs, the others wait; those above are told at once.
        let all = filled(&host, QUEUE_MAX + 20);
        let refused = all.iter().filter(|(_, verdict)| word(verdict) == expected).count();
        assert!((10..=20).contains(&refused), "{refused}");
        let (run, _) = &all[QUEUE_MAX + 19];
        assert_eq!(run.notes(), ["too much waits for the plugin's own threads"]);
        let text = host.engine.encode_metrics();
        let expected = format!("limit=\"queue_full\"}} {refused}\n");
        assert!(text.contains(&expected), "{text}");
    }
}

#[test]
fn who_waits_too_long_is_answered_by_the_fail_strategy_and_keeps_its_head() {
    let host = on_own_threads(&guest("", SPINS), FailStrategy::Open, 1);
    let _busy = filled(&host, 30);
    let mut run = host.start();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let Verdict::Wait(waits) = run.request() else { panic!("it does not wait") };
    // The clock of the exchange is far ahead of that of the guests.
    runtime.block_on(waits);
    assert_eq!(word(&run.request()), "continue");
    assert_eq!(run.notes(), ["the plugin's own threads had no time for it"]);
    assert_eq!(run.header("x-in"), "hello");
    assert_eq!(word(&run.response()), "continue", "no further part in it");
    let text = host.engine.encode_metrics();
    assert!(text.contains("limit=\"queue_wait\"} 1\n"), "{text}");
}

#[test]
fn an_exchange_that_ends_meanwhile_leaves_nothing_behind() {
    // Counts contexts that were created and not deleted.
    let body = r#"
      (func $note (param $by i64)
        (drop (call $define (i32.const 1) (i32.const 1024) (i32.const 8) (i32.const 3100)))
        (drop (call $increment (i32.load (i32.const 3100)) (local.get $by))))
      (func (export "proxy_on_context_create") (param i32 i32)
        (if (local.get 1) (then (call $note (i64.const 1)))))
      (func (export "proxy_on_delete") (param i32) (call $note (i64.const -1)))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#;
    let host = on_own_threads(&guest("contexts", body), FailStrategy::Close, 1);
    for ends in ["dropped", "finished"] {
        let runs: Vec<Run> = (0..50)
            .map(|_| {
                let mut run = host.start();
                assert_eq!(word(&run.request()), "wait");
                run
            })
            .collect();
        for mut run in runs {
            if ends == "finished" {
                run.finish();
            }
        }
        // Once this one has run, all before it are over.
        let mut last = host.start();
        assert_eq!(word(&said(|| last.request())), "continue");
        last.finish();
        drop(last);
        until("all contexts deleted", || {
            host.engine.encode_metrics().lines().any(|line| line == "contexts 0")
        });
    }
}

#[test]
fn a_head_that_is_held_is_given_back_when_the_guest_lets_go() {
    // Holds the head, and lets go of it from its timer, having changed it.
    let body = r#"
      (global $stream (mut i32) (i32.const 0))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (global.set $stream (local.get 0))
        (drop (call $tick (i32.const 10)))
        (i32.const 1))
      (func (export "proxy_on_tick") (param i32)
        (drop (call $effective (global.get $stream)))
        (call $finish (i32.const 7))
        (drop (call $continue (i32.const 0))))"#;
    let mut plugin = plugin(FailStrategy::Close, "");
    (plugin.limits.own_threads, plugin.holds_heads) = (Some(1), true);
    let engine = Engine::new(EngineSettings { pause_max: Duration::from_secs(20), ..settings() }).unwrap();
    let factory = load(&engine, &guest("", body), &plugin).unwrap();
    let mut exchange = exchange();
    let mut running = Chain::new(vec![factory]).start(&exchange);
    let (mut head, mut source) = (request(), Unending);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let outcome = running.request_headers(&mut exchange, &mut head, false, &mut source);
    let outcome = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), outcome).await });
    assert!(matches!(outcome, Ok(Outcome::Continue)), "{outcome:?}");
    assert_eq!(head.headers["x-status"], "07");
}

/// A body of which nothing comes.
struct Unending;

impl cairn_filter::Body for Unending {
    fn poll_piece(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<Result<cairn_filter::Piece, cairn_filter::BodyBroken>> {
        Poll::Pending
    }
}

#[test]
fn the_worker_goes_on_while_a_plugin_spins() {
    let spinning = on_own_threads(&guest("", SPINS), FailStrategy::Close, 1);
    let calm = Host::new(&calling("", "(i32.const 0)"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let is_over = AtomicBool::new(false);
    let asked = async |host: &Host, crash: bool| {
        let mut run = host.start();
        if crash {
            run = run.with_header("x-crash", "1");
        }
        let mut running: Running = Chain::new(vec![Arc::clone(&host.factory)]).start(&run.exchange);
        running.request_headers(&mut run.exchange, &mut run.head, true, &mut NoBody).await
    };
    runtime.block_on(async {
        let spins = async {
            let outcome = asked(&spinning, true).await;
            is_over.store(true, Ordering::Relaxed);
            outcome
        };
        let calm = async {
            let mut meanwhile = 0;
            while !is_over.load(Ordering::Relaxed) {
                assert!(matches!(asked(&calm, false).await, Outcome::Continue));
                meanwhile += 1;
                tokio::task::yield_now().await;
            }
            meanwhile
        };
        let (spun, meanwhile) = tokio::join!(spins, calm);
        assert!(matches!(spun, Outcome::Reply(_)), "{spun:?}");
        assert!(meanwhile > 1, "one worker served {meanwhile} exchanges while a plugin of another ran");
    });
}
