//! How plugins start, what they decide, and in which order they are called.

use super::*;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

fn error(guest: &str, config: &str) -> String {
    let engine = Engine::new(settings()).unwrap();
    let plugin = plugin(FailStrategy::Close, config);
    load(&engine, guest, &plugin).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn modules_that_are_no_plugins_are_told_why() {
    let allocator = r#"(func (export "malloc") (param i32) (result i32) (i32.const 64))"#;
    let marker = r#"(func (export "proxy_abi_version_0_2_0"))"#;
    let memory = r#"(memory (export "memory") 1)"#;
    let cases = [
        ("no marker", format!("(module {memory} {allocator})"), "exports none of proxy_abi_version"),
        ("no memory", format!("(module {marker} {allocator})"), "exports no `memory`"),
        (
            "no allocator",
            format!("(module {marker} {memory})"),
            "exports no `proxy_on_memory_allocate` or `malloc`",
        ),
        (
            "wrong type",
            format!(r#"(module {marker} {memory} {allocator} (func (export "proxy_on_log") (param i64)))"#),
            "the export `proxy_on_log` has the type",
        ),
        (
            "imported memory",
            format!(
                r#"(module (import "env" "memory" (memory 1)) {marker} {allocator} (export "memory" (memory 0)))"#
            ),
            "imports `env.memory`, which is not a function",
        ),
        (
            "wrong type of an import",
            format!(
                r#"(module (import "env" "proxy_log" (func (param i64))) {memory} {marker} {allocator})"#
            ),
            "does not compile",
        ),
        (
            "too much memory at once",
            format!(r#"(module (memory (export "memory") 1000) {marker} {allocator})"#),
            "it wanted more than 4 MiB of memory",
        ),
    ];
    for (name, guest, expected) in cases {
        let found = error(&guest, "");
        assert!(found.contains(expected), "{name}: {found}");
    }
    let engine = Engine::new(settings()).unwrap();
    assert!(matches!(engine.compile(b"not wasm"), Err(PluginError::Compile(_))));
    let small = Engine::new(EngineSettings { module_bytes_max: 10, ..settings() }).unwrap();
    assert!(matches!(small.compile(&[0; 11]), Err(PluginError::TooLarge { bytes: 11, bytes_max: 10 })));
    let unknown = format!(
        r#"(module (import "env" "redis_call" (func (param i64) (result i32))) {memory} {marker} {allocator})"#
    );
    let module = engine.compile(&wat::parse_str(unknown).unwrap()).unwrap();
    assert_eq!(module.unmet_imports(), ["env.redis_call"]);
}

#[test]
fn a_refused_configuration_comes_with_the_log() {
    // Logs its configuration and refuses it.
    let body = r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $buffer (i32.const 7) (i32.const 0) (local.get 1) (i32.const 8) (i32.const 12)))
        (drop (call $log (i32.const 4) (i32.load (i32.const 8)) (i32.load (i32.const 12))))
        (i32.const 0))"#;
    let found = error(&guest("", body), "{\"a\": 1}");
    assert_eq!(found, "the plugin answered false in proxy_on_configure; it logged: {\"a\": 1}");
    let found = error(
        &guest("", r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 0))"#),
        "",
    );
    assert_eq!(found, "the plugin answered false in proxy_on_vm_start");
    let found = error(
        &guest("", r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32) unreachable)"#),
        "",
    );
    assert!(
        found.starts_with("the plugin failed in proxy_on_vm_start: wasm trap: wasm `unreachable`"),
        "{found}"
    );
}

/// Sets `x-got` to the byte at 3000 plus a digit, to show what ran before.
const SHOW: &str = r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (i32.store8 (i32.const 3000) (i32.add (i32.const 48) (i32.load8_u (i32.const 3000))))
    (i32.store (i32.const 8) (i32.const 3000)) (i32.store (i32.const 12) (i32.const 1))
    (call $finish (i32.const 0)) (i32.const 0))"#;

#[test]
fn every_way_to_initialise_runs() {
    let mark = "(i32.store8 (i32.const 3000) (i32.add (i32.load8_u (i32.const 3000)) (i32.const 1)))";
    let cases = [
        ("_initialize", format!(r#"(func (export "_initialize") {mark})"#), "1"),
        ("_start that exits", format!(r#"(func (export "_start") {mark} (call $exit (i32.const 0)))"#), "1"),
        (
            "a reactor's main, not its _start",
            format!(
                r#"(func (export "_initialize") {mark}) (func (export "_start") unreachable)
                   (func (export "main") (param i32 i32) (result i32) {mark} (i32.const 3))"#
            ),
            "2",
        ),
        (
            "__main_void",
            format!(
                r#"(func (export "_initialize")) (func (export "__main_void") (result i32) {mark} (i32.const 0))"#
            ),
            "1",
        ),
        ("nothing", String::new(), "0"),
    ];
    for (name, body, expected) in cases {
        let host = Host::new(&guest("", &format!("{body} {SHOW}")));
        let mut run = host.start();
        assert_eq!(word(&run.request()), "continue", "{name}");
        assert_eq!(run.header("x-got"), expected, "{name}");
    }
    let found = error(&guest("", r#"(func (export "_start") (call $exit (i32.const 3)))"#), "");
    assert!(found.contains("the plugin failed in start: the plugin exited with code 3"), "{found}");
}

#[test]
fn old_and_new_modules_are_called_alike() {
    let get = "(call $get (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 8) (i32.const 12))";
    for allocator in ["proxy_on_memory_allocate", "malloc"] {
        for (marker, parameters) in [
            ("proxy_abi_version_0_1_0", "i32 i32"),
            ("proxy_abi_version_0_1_0", "i32 i32 i32"),
            ("proxy_abi_version_0_2_0", "i32 i32 i32"),
            ("proxy_abi_version_0_2_1", "i32 i32"),
        ] {
            let body = format!(
                r#"(func (export "proxy_on_request_headers") (param {parameters}) (result i32)
                     (call $finish {get}) (i32.const 0))"#
            );
            let host = Host::new(&guest_of(marker, allocator, "x-in", &body));
            let mut run = host.start();
            run.request();
            assert_eq!(run.header("x-got"), "hello", "{allocator} {marker} {parameters}");
        }
    }
    // ABI 0.1.0 answers OK for an absent header, and has functions without a result.
    let text = guest_of(
        "proxy_abi_version_0_1_0",
        "malloc",
        "none",
        &format!(
            r#"(func (export "proxy_on_request_headers") (param i32 i32) (result i32)
             (call $finish {get}) (call $resume) (i32.const 1))"#
        ),
    );
    let text =
        text.replacen("(memory", r#"(import "env" "proxy_continue_request" (func $resume)) (memory"#, 1);
    let host = Host::new(&text);
    let mut run = host.start();
    assert_eq!(word(&run.request()), "continue", "it resumed before it paused");
    assert_eq!(run.header("x-status"), "00");
}

#[test]
fn a_stream_ends_with_log_done_delete() {
    // Each callback appends its letter at 3000; the count is at 2996. The log callback reads both heads' headers.
    let mark = |letter: char| {
        format!(
            "(i32.store8 (i32.add (i32.const 3000) (i32.load (i32.const 2996))) (i32.const {}))
             (i32.store (i32.const 2996) (i32.add (i32.load (i32.const 2996)) (i32.const 1)))",
            letter as u32
        )
    };
    let get = |map, at, length| {
        format!(
            "(if (call $get (i32.const {map}) (i32.const {at}) (i32.const {length}) (i32.const 16) (i32.const 20)) (then unreachable))"
        )
    };
    let body = format!(
        r#"(func (export "proxy_on_context_create") (param i32 i32) {create})
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) {request} (i32.const 0))
           (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) {response} {early} (i32.const 0))
           (func (export "proxy_on_log") (param i32) {log} {early} {late})
           (func (export "proxy_on_done") (param i32) (result i32) {done} (i32.const 1))
           (func (export "proxy_on_delete") (param i32) {delete}
             (drop (call $log (i32.const 4) (i32.const 3000) (i32.load (i32.const 2996)))))
           (func (export "proxy_on_memory") )"#,
        create = mark('c'),
        request = mark('q'),
        response = mark('s'),
        log = mark('l'),
        done = mark('d'),
        delete = mark('x'),
        early = get(0, 1024, 4),
        late = get(2, 1028, 4),
    );
    // What the guest remembers is told by the next request, which returns it as a header.
    let body = body.replacen(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)"#,
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (i32.store (i32.const 8) (i32.const 3000)) (i32.store (i32.const 12) (i32.load (i32.const 2996)))
             (call $finish (i32.const 0))"#,
        1,
    );
    let host = Host::new(&guest("x-inx-up", &body));
    let mut run = host.start();
    assert_eq!(word(&run.request()), "continue");
    assert_eq!(word(&run.response()), "continue");
    run.finish();
    drop(run);
    let mut next = host.start();
    next.request();
    // The root context, a whole stream, and a new one.
    assert_eq!(next.header("x-got"), "ccqsldxc");
    // A stream whose task was dropped is not logged, but deleted.
    drop(next);
    let mut last = host.start();
    last.request();
    assert_eq!(last.header("x-got"), "ccqsldxcqdxc");
}

#[test]
fn an_exchange_answered_before_is_logged_too() {
    let body = format!(
        r#"(func (export "proxy_on_log") (param i32) (i32.store8 (i32.const 3000) (i32.const 5))) {SHOW}"#
    );
    let host = Host::new(&guest("", &body));
    host.start().finish();
    let mut run = host.start();
    run.request();
    assert_eq!(run.header("x-got"), "5");
}

#[test]
fn a_local_reply_is_what_the_guest_said() {
    // Status, details, body and headers, one of which is a pseudo-header.
    let data = "my why\\0abodyT\\02\\00\\00\\00\\07\\00\\00\\00\\03\\00\\00\\00\\03\\00\\00\\00\\01\\00\\00\\00:status\\00200\\00X-A\\00b\\00";
    let send = |status: i64, grpc: i64, headers: i64| {
        format!(
            "(call $reply (i32.const {status}) (i32.const 1024) (i32.const 7) (i32.const 1031) (i32.const 5)
               (i32.const 1036) (i32.const {headers}) (i32.const {grpc}))"
        )
    };
    let length = 4 + 16 + 8 + 4 + 4 + 2;
    let host = Host::new(&calling(data, &send(418, -1, length)));
    let mut run = host.start();
    let Verdict::Reply(reply) = run.request() else { panic!("no reply") };
    assert_eq!((reply.status.as_u16(), &*reply.body, &*reply.details), (418, &b"bodyT"[..], "my_why_"));
    assert_eq!(reply.grpc_status, None);
    assert_eq!(reply.headers.len(), 1);
    assert_eq!(reply.headers["x-a"], "b");
    assert_eq!(run.notes().last(), Some(&"answered 418"));
    for (name, status, grpc, headers, expected) in [
        ("status too small", 99, -1, length, "02"),
        ("interim status", 101, -1, length, "02"),
        ("status too large", 600, -1, length, "02"),
        ("no such gRPC status", 200, 17, length, "02"),
        ("headers outside of memory", 200, -1, -1, "06"),
        ("headers cut short", 200, -1, length - 1, "02"),
    ] {
        let host = Host::new(&calling(data, &send(status, grpc, headers)));
        let mut run = host.start();
        assert_eq!(word(&run.request()), "continue", "{name}");
        assert_eq!(run.header("x-status"), expected, "{name}");
    }
}

#[test]
fn a_closed_stream_is_reset() {
    let host = Host::new(&calling("", "(call $close (i32.const 0))"));
    assert_eq!(word(&host.start().request()), "reset");
}

#[test]
fn a_response_is_seen_with_its_request() {
    let body = r#"(func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (drop (call $get (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 8) (i32.const 12)))
        (drop (call $replace (i32.const 2) (i32.const 520) (i32.const 5) (i32.load (i32.const 8)) (i32.load (i32.const 12))))
        (drop (call $replace (i32.const 2) (i32.const 1028) (i32.const 7) (i32.const 1035) (i32.const 3)))
        (i32.const 0))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#;
    let host = Host::new(&guest("x-in:status404", body));
    let mut run = host.start();
    run.request();
    assert_eq!(word(&run.response()), "continue");
    assert_eq!(run.response.headers["x-got"], "hello");
    assert_eq!(run.response.status, 404);
    assert_eq!(run.notes(), ["response: set x-got, set :status"]);
}

/// A guest that pauses requests, and resumes or answers stream 2 from a request with the header x-crash.
fn pausing(act: &str) -> String {
    let body = format!(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (if (i32.eqz (call $get (i32.const 0) (i32.const 525) (i32.const 7) (i32.const 16) (i32.const 20)))
               (then (drop (call $effective (i32.const 2))) (drop {act}) (return (i32.const 0))))
             (i32.const 1))"#
    );
    guest("", &body)
}

pub(super) fn poll(future: &mut Pin<Box<dyn Future<Output = ()> + Send>>) -> Poll<()> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[tokio::test(start_paused = true)]
async fn a_paused_request_goes_on_when_it_is_resumed() {
    for (act, expected) in [
        ("(call $continue (i32.const 0))", "continue"),
        ("(call $close (i32.const 0))", "reset"),
        (
            "(call $reply (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1))",
            "reply 403 wasm_local_response",
        ),
    ] {
        let host = Host::new(&pausing(act));
        let mut paused = host.start();
        let Verdict::Wait(mut until) = paused.request() else { panic!("not paused") };
        assert!(poll(&mut until).is_pending(), "{act}");
        let mut other = host.start().with_header("x-crash", "1");
        assert_eq!(word(&other.request()), "continue", "{act}");
        assert!(poll(&mut until).is_ready(), "{act}");
        assert_eq!(word(&paused.request()), expected, "{act}");
    }
}

#[tokio::test]
async fn a_paused_request_does_not_wait_for_ever() {
    for (strategy, expected) in
        [(FailStrategy::Open, "continue"), (FailStrategy::Close, "reply 503 wasm_fail_stream")]
    {
        let host = Host::with(&pausing("(i32.const 0)"), strategy, "");
        let mut paused = host.start();
        let verdict = loop {
            match paused.request() {
                Verdict::Wait(until) => until.await,
                verdict => break verdict,
            }
        };
        assert_eq!(word(&verdict), expected);
        assert_eq!(word(&paused.response()), "continue", "it takes no further part");
        assert_eq!(paused.notes(), ["the plugin held the exchange for too long"]);
    }
}

#[test]
fn a_stream_stays_until_the_guest_is_done_with_it() {
    // The first stream asks for time; a request with x-crash ends it.
    let body = r#"(func (export "proxy_on_done") (param i32) (result i32) (i32.ne (local.get 0) (i32.const 2)))
        (func (export "proxy_on_delete") (param i32) (i32.store8 (i32.const 3000) (local.get 0)))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (if (i32.eqz (call $get (i32.const 0) (i32.const 525) (i32.const 7) (i32.const 16) (i32.const 20)))
            (then (drop (call $effective (i32.const 2))) (i32.store8 (i32.const 3001) (i32.add (i32.const 48) (call $done)))
              (drop (call $effective (local.get 0))))
            (else (i32.store8 (i32.const 3001) (i32.const 45))))
          (i32.store8 (i32.const 3000) (i32.add (i32.const 48) (i32.load8_u (i32.const 3000))))
          (i32.store (i32.const 8) (i32.const 3000)) (i32.store (i32.const 12) (i32.const 2))
          (call $finish (i32.const 0))
          (i32.store8 (i32.const 3000) (i32.const 0))
          (i32.const 0))"#;
    let host = Host::new(&guest("", body));
    let show = |crash: bool| {
        let mut run = if crash { host.start().with_header("x-crash", "1") } else { host.start() };
        run.request();
        run.finish();
        run.header("x-got")
    };
    assert_eq!(show(false), "0-", "stream 2 is over and stays");
    assert_eq!(show(false), "0-", "stream 3 comes and goes");
    assert_eq!(show(true), "30", "stream 3 was deleted; stream 2 is done now");
    assert_eq!(show(false), "4-", "stream 4 was deleted last, after stream 2");
    assert_eq!(show(true), "51", "stream 2 is gone");
}
