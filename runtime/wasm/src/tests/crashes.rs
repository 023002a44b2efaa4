//! Guests that crash, spin or eat memory: their exchange follows the fail strategy, the next one meets a new instance.

use super::*;
use std::time::{Duration, Instant};

const OPEN: &str = "continue";
const CLOSED: &str = "reply 503 wasm_fail_stream";

/// Runs `code` on requests that have the header x-crash.
fn crashing(code: &str) -> String {
    let body = format!(
        r#"(global $counter (mut i32) (i32.const 0))
           (func $recurse (result i32) (i32.add (call $recurse) (i32.const 1)))
           (func $do (if (i32.eqz (call $get (i32.const 0) (i32.const 525) (i32.const 7) (i32.const 16) (i32.const 20)))
             (then {code})))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (global.set $counter (i32.add (global.get $counter) (i32.const 1)))
             (drop (call $replace (i32.const 0) (i32.const 1024) (i32.const 3) (i32.const 1024) (i32.const 3)))
             (call $do)
             (call $finish (global.get $counter)) (i32.const 0))
           (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#
    );
    guest("x-a", &body)
}

const ENDINGS: [(&str, &str, &str); 6] = [
    ("trap", "unreachable", "unreachable"),
    ("loop", "(loop (br 0))", "more than 100 ms"),
    ("recursion", "(drop (call $recurse))", "stack"),
    (
        "memory",
        "(loop (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable)) (br 0))",
        "4 MiB",
    ),
    ("exit", "(call $exit (i32.const 7))", "code 7"),
    (
        "endless host calls",
        "(loop (drop (call $log (i32.const 0) (i32.const 0) (i32.const 0))) (br 0))",
        "more than 100 ms",
    ),
];

/// The first exchange that an instance takes part in: on a busy machine a new one starts in the background, and the
/// fail strategy stands in for it.
fn served(host: &Host) -> Run {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut run = host.start();
        let verdict = word(&said(|| run.request()));
        if verdict == "continue" && !run.header("x-status").is_empty() {
            return run;
        }
        run.finish();
        assert!(Instant::now() < deadline, "no new instance: {verdict}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_crash_ends_one_exchange() {
    for (name, code, _) in ENDINGS {
        for (strategy, expected) in
            [(FailStrategy::Open, OPEN), (FailStrategy::Close, CLOSED), (FailStrategy::Reload, CLOSED)]
        {
            let host = Host::with(&crashing(code), strategy, "");
            let mut before = host.start();
            assert_eq!(word(&before.request()), "continue", "{name}");
            let mut run = host.start().with_header("x-crash", "1");
            assert_eq!(word(&run.request()), expected, "{name} {strategy:?}");
            assert_eq!(run.notes(), ["request: set x-a", "the plugin crashed"], "{name}");
            assert_eq!(run.header("x-a"), "x-a", "the head is back, with what was changed: {name}");
            assert_eq!(word(&run.response()), "continue", "no further part in it: {name}");
            run.finish();
            // The other exchange's context is gone with the instance.
            assert_eq!(word(&said(|| before.response())), expected, "{name} {strategy:?}");
            before.finish();

            let text = host.engine.encode_metrics();
            assert!(text.contains("cairn_wasm_traps_total{plugin=\"ns/test\"} 1\n"), "{text}");
            assert!(text.contains("cairn_wasm_failed_exchanges_total{plugin=\"ns/test\"} 2\n"), "{text}");
            assert_eq!(served(&host).header("x-status"), "01", "a new instance: {name}");
        }
    }
}

#[test]
fn a_crash_at_the_start_says_what_happened() {
    for (name, code, reason) in ENDINGS {
        let code = if name == "loop" || name == "endless host calls" { "unreachable" } else { code };
        let reason = if code == "unreachable" { "unreachable" } else { reason };
        let body = format!(
            r#"(func $recurse (result i32) (i32.add (call $recurse) (i32.const 1)))
               (func $broken {code})
               (func (export "proxy_on_configure") (param i32 i32) (result i32) (call $broken) (i32.const 1))"#
        );
        let engine = Engine::new(settings()).unwrap();
        let error =
            load(&engine, &guest("", &body), &plugin(FailStrategy::Close, "")).err().unwrap().to_string();
        assert!(error.starts_with("the plugin failed in proxy_on_configure: "), "{name}: {error}");
        assert!(error.contains(reason), "{name}: {error}");
        let function = if name == "recursion" { "recurse (repeated)" } else { "broken" };
        assert!(error.contains(function), "the backtrace names the function: {name}: {error}");
    }
}

#[test]
fn crashes_in_a_row_pause_the_plugin() {
    for (strategy, expected) in [(FailStrategy::Open, OPEN), (FailStrategy::Close, CLOSED)] {
        let host = Host::with(&crashing("unreachable"), strategy, "");
        for _ in 0..6 {
            assert_eq!(word(&host.start().with_header("x-crash", "1").request()), expected);
        }
        let mut run = host.start();
        assert_eq!(word(&run.request()), expected);
        assert_eq!(run.notes(), ["the plugin is not running"]);
    }
}

#[test]
fn a_crash_at_the_end_is_contained() {
    for callback in ["proxy_on_log", "proxy_on_delete"] {
        let body = format!(
            r#"(func (export "{callback}") (param i32) unreachable)
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (call $finish (i32.const 0)) (i32.const 0))"#
        );
        let host = Host::new(&guest("", &body));
        for _ in 0..2 {
            served(&host).finish();
        }
        let text = host.engine.encode_metrics();
        assert!(text.contains("cairn_wasm_traps_total{plugin=\"ns/test\"} 2\n"), "{callback}: {text}");
    }
}

#[test]
fn an_allocator_that_misbehaves_is_survived() {
    let get = "(call $get (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 8) (i32.const 12))";
    for (name, allocator, status) in [
        ("null", "(i32.const 0)", Some("06")),
        ("outside of memory", "(i32.const -16)", Some("06")),
        ("trap", "unreachable", None),
        ("asks for data", get, None),
    ] {
        let text = calling("x-in", get).replacen(r#"(export "proxy_on_memory_allocate")"#, "", 1);
        let own = format!(r#"(func (export "malloc") (param i32) (result i32) {allocator}) (func $finish"#);
        let host = Host::new(&text.replacen("(func $finish", &own, 1));
        let mut run = host.start();
        let verdict = run.request();
        match status {
            Some(status) => assert_eq!(
                (word(&verdict), run.header("x-status")),
                (OPEN.to_owned(), status.to_owned()),
                "{name}"
            ),
            None => assert_eq!(word(&verdict), CLOSED, "{name}"),
        }
    }
}
