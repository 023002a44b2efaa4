//! Plugins that are only asked what they would do.

use super::outside::{Mesh, answer, until};
use super::*;
use bytes::Bytes;
use cairn_filter::{Callout, Chunk, Part, Side};

fn in_shadow(engine: &Engine, guest: &str, fail_strategy: FailStrategy) -> Arc<dyn Factory> {
    let spec = WasmPlugin { mode: PluginMode::Shadow, ..plugin(fail_strategy, "") };
    load(engine, guest, &spec).unwrap()
}

impl Host {
    fn in_shadow(guest: &str) -> Self {
        let engine = Engine::new(settings()).unwrap();
        let factory = in_shadow(&engine, guest, FailStrategy::Close);
        Self { engine, factory }
    }

    /// How often the plugin would have done this.
    fn verdict(&self, verdict: &str) -> u64 {
        let text = self.engine.encode_metrics();
        let name = format!("cairn_wasm_shadow_verdicts_total{{plugin=\"ns/test\",verdict=\"{verdict}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
    }
}

/// What an exchange consists of, to the last bit.
fn all_of(run: &Run, chunks: &[Chunk; 2]) -> String {
    let facts = (&run.exchange.details, run.exchange.status, &run.exchange.metadata, &run.exchange.denial);
    format!("{:?} {:?} {chunks:?} {facts:?}", run.head, run.response)
}

/// Runs an exchange with bodies and trailers by a plugin in the shadow, which must leave all of it as it was; waits for what is
/// counted, and returns what is noted.
fn check(host: &Host, name: &str, header: Option<&'static str>, counted: impl Fn() -> bool) -> Vec<String> {
    let mut run = host.start();
    if let Some(value) = header {
        run = run.with_header("x-crash", value);
    }
    let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-t"), HeaderValue::from_static("t"))]);
    let chunk = |text: &'static str| Chunk { bytes: Bytes::from_static(text.as_bytes()), ..Chunk::default() };
    let mut chunks = [chunk("question"), chunk("answer")];
    let before = all_of(&run, &chunks);
    let mut verdicts = vec![run.filter.request_headers(&mut run.exchange, &mut run.head, false)];
    for (side, chunk) in [Side::Request, Side::Response].into_iter().zip(&mut chunks) {
        if side == Side::Response {
            verdicts.push(run.filter.response_headers(&mut run.exchange, &mut run.response, false));
        }
        verdicts.push(run.filter.body(&mut run.exchange, Part { side, head: None, chunk }));
        let mut end = Chunk { trailers: Some(trailers.clone()), ..Chunk::default() };
        verdicts.push(run.filter.trailers(&mut run.exchange, Part { side, head: None, chunk: &mut end }));
        assert_eq!((end.trailers.as_ref(), end.is_changed), (Some(&trailers), false), "{name}");
    }
    until(name, counted);
    run.finish();
    assert!(verdicts.iter().all(|verdict| word(verdict) == "continue"), "{name}");
    assert_eq!(all_of(&run, &chunks), before, "{name}");
    run.notes().into_iter().map(str::to_owned).collect()
}

/// Exports a callback for a head, or for a body.
fn on(callback: &str, code: &str) -> String {
    format!(r#"(func (export "proxy_on_{callback}") (param i32 i32 i32) (result i32) {code})"#)
}

const REPLY: &str =
    "(drop (call $reply (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
    (i32.const 0) (i32.const 0) (i32.const -1)))";

#[test]
fn whatever_it_would_do_leaves_the_exchange_as_it_was_and_is_counted() {
    let set = |map: u32| {
        format!(
            "(drop (call $replace (i32.const {map}) (i32.const 1024) (i32.const 3) (i32.const 1024) (i32.const 3)))
             (i32.const 0)"
        )
    };
    let append = |buffer: u32| {
        format!(
            "(drop (call $set_buffer (i32.const {buffer}) (i32.const -1) (i32.const 0) (i32.const 1024) (i32.const 3)))
             (i32.const 0)"
        )
    };
    let remove = "(drop (call $remove (i32.const 0) (i32.const 1027) (i32.const 5))) (i32.const 0)";
    let close = "(drop (call $close (i32.const 0))) (i32.const 1)";
    let reply = format!("{REPLY} (i32.const 1)");
    let cases = [
        ("answers a request", on("request_headers", &reply), "answer_4xx", "shadow: would have answered 403"),
        (
            "changes a request",
            on("request_headers", &set(0)),
            "change_request_head",
            "shadow: request: set x-a",
        ),
        (
            "ends a request",
            on("request_headers", close),
            "reset",
            "shadow: would have ended the exchange without an answer",
        ),
        (
            "takes the path away",
            on("request_headers", remove),
            "answer_5xx",
            "shadow: would have answered 503",
        ),
        (
            "changes a response",
            on("response_headers", &set(2)),
            "change_response_head",
            "shadow: response: set x-a",
        ),
        (
            "answers a response",
            on("response_headers", &reply),
            "answer_4xx",
            "shadow: would have answered 403",
        ),
        (
            "changes a request's body",
            on("request_body", &append(0)),
            "change_request_body",
            "shadow: request: changed the body",
        ),
        (
            "changes a response's body",
            on("response_body", &append(1)),
            "change_response_body",
            "shadow: response: changed the body",
        ),
        (
            "answers within a body",
            on("request_body", &reply),
            "answer_4xx",
            "shadow: would have answered 403",
        ),
    ];
    for (name, body, verdict, note) in cases {
        let host = Host::in_shadow(&guest("x-a:path", &body));
        for count in 1..3 {
            let notes = check(&host, name, None, || host.verdict(verdict) == count);
            assert!(notes.iter().any(|found| found == note), "{name}: {notes:?}");
            assert!(notes.iter().all(|note| note.starts_with("shadow: ")), "{name}: {notes:?}");
        }
        let text = host.engine.encode_metrics();
        assert!(text.contains("cairn_wasm_shadow_exchanges_total{plugin=\"ns/test\"} 2\n"), "{name}: {text}");
        let cost = text.lines().find(|line| line.starts_with("cairn_wasm_shadow_cpu_seconds_total{"));
        assert!(cost.is_some_and(|line| !line.ends_with(" 0")), "{name}: {text}");
        let total: u64 = text
            .lines()
            .filter(|line| line.starts_with("cairn_wasm_shadow_verdicts_total{"))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum();
        assert_eq!(total, 2, "nothing else: {name}: {text}");
    }
}

#[test]
fn on_threads_of_its_own_it_is_asked_the_same() {
    let mut spec = WasmPlugin { mode: PluginMode::Shadow, ..plugin(FailStrategy::Close, "") };
    spec.limits.own_threads = Some(1);
    let engine = Engine::new(settings()).unwrap();
    let text = guest("", &on("request_headers", &format!("{REPLY} (i32.const 1)")));
    let host = Host { factory: load(&engine, &text, &spec).unwrap(), engine };
    check(&host, "away", None, || host.verdict("answer_4xx") == 1);
    assert_eq!(host.verdict("hold"), 0, "that it was waited for says nothing");
}

#[test]
fn a_crash_fails_nothing() {
    for strategy in [FailStrategy::Close, FailStrategy::Open] {
        let body = on("request_headers", "(call $crash_if_asked) (i32.const 0)");
        let engine = Engine::new(settings()).unwrap();
        let factory = in_shadow(&engine, &guest("", &body), strategy);
        let host = Host { engine, factory };
        let notes = check(&host, "crash", Some("1"), || host.traps() == 1);
        // It is told if the task had come to it.
        assert!(notes.iter().all(|note| note.starts_with("shadow: ")), "{notes:?}");
        assert_eq!(host.verdict("answer_5xx"), 0, "what failStrategy would have answered is no verdict");
        check(&host, "no crash", None, || true);
    }
}

#[test]
fn nobody_waits_for_what_it_holds() {
    // Holds every request, and never lets go.
    let host = Host::in_shadow(&guest("", &on("request_headers", "(i32.const 1)")));
    let begun = Instant::now();
    let notes = check(&host, "holds", None, || true);
    assert!(notes.iter().all(|note| note.starts_with("shadow: ")), "{notes:?}");
    until("given up", || host.verdict("hold") == 1);
    assert!(begun.elapsed() >= settings().pause_max, "it was given its time");
    let text = host.engine.encode_metrics();
    assert!(text.contains("cairn_wasm_failed_exchanges_total{plugin=\"ns/test\"} 1\n"), "{text}");
}

#[test]
fn what_it_asks_is_asked_and_the_answer_is_only_counted() {
    let data = "auth.shop:80\\03\\00\\00\\00\\07\\00\\00\\00\\03\\00\\00\\00\\05\\00\\00\\00\\01\\00\\00\\00\\0a\\00\\00\\00\\04\\00\\00\\00:method\\00GET\\00:path\\00/\\00:authority\\00auth\\00";
    let body = format!(
        r#"(global $stream (mut i32) (i32.const 0))
        {}
        (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
          (drop (call $effective (global.get $stream))) {REPLY})"#,
        on(
            "request_headers",
            "(global.set $stream (local.get 0))
             (drop (call $http_call (i32.const 1024) (i32.const 12) (i32.const 1036) (i32.const 64) (i32.const 0)
               (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 60000) (i32.const 16)))
             (i32.const 1)"
        )
    );
    let mesh = Arc::new(Mesh::default());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
    let callout = Arc::clone(&mesh) as Arc<dyn Callout>;
    let place = crate::WorkerPlace { runtime: runtime.handle().clone(), callout: Arc::clone(&callout) };
    let pause_max = Duration::from_secs(20);
    let engine = Engine::new(EngineSettings { places: vec![place], pause_max, ..settings() }).unwrap();
    let factory = in_shadow(&engine, &guest(data, &body), FailStrategy::Close);
    let host = Host { engine, factory };
    let mut run = host.start();
    Arc::get_mut(&mut run.exchange.connection).unwrap().callout = callout;
    assert_eq!(word(&run.request()), "continue");
    mesh.wait(1);
    // The exchange has long been over when the answer comes.
    run.finish();
    drop(run);
    mesh.answer(0, answer(200, "no"));
    until("the verdict", || host.verdict("answer_4xx") == 1);
}

#[test]
fn what_it_holds_is_bounded() {
    // Holds all of the request's body.
    let host = Host::in_shadow(&guest("", &on("request_body", "(i32.const 1)")));
    let mut run = host.start();
    run.filter.request_headers(&mut run.exchange, &mut run.head, false);
    let bytes = Bytes::from(vec![7; 1 << 20]);
    for _ in 0..4 {
        let mut chunk = Chunk { bytes: bytes.clone(), ..Chunk::default() };
        let part = Part { side: Side::Request, head: None, chunk: &mut chunk };
        assert_eq!(word(&run.filter.body(&mut run.exchange, part)), "continue");
        assert_eq!((chunk.bytes.len(), chunk.is_changed), (1 << 20, false));
    }
    run.finish();
    // Either it was slow, or it held more than a filter may, which ends an exchange.
    until("an end", || host.verdict("given_up") + host.verdict("answer_4xx") > 0);
}

#[test]
fn its_data_is_its_own() {
    // Counts requests in shared data, and answers with the count.
    let body = on(
        "request_headers",
        "(drop (call $get_shared (i32.const 1024) (i32.const 3) (i32.const 8) (i32.const 12) (i32.const 16)))
         (i32.store8 (i32.const 3000) (i32.const 49))
         (drop (call $set_shared (i32.const 1024) (i32.const 3) (i32.const 3000) (i32.const 1) (i32.const 0)))
         (call $finish (i32.const 0)) (i32.const 0)",
    );
    let engine = Engine::new(settings()).unwrap();
    let text = guest("key", &body);
    let host = Host { factory: in_shadow(&engine, &text, FailStrategy::Close), engine };
    check(&host, "writes", None, || host.verdict("change_request_head") == 1);
    let factory = load(&host.engine, &text, &plugin(FailStrategy::Close, "")).unwrap();
    for expected in ["", "1"] {
        let mut run = host.start();
        run.filter = factory.start(&run.exchange).unwrap();
        run.request();
        assert_eq!(run.header("x-got"), expected);
    }
}

#[test]
fn an_exchange_that_is_dropped_leaves_nothing() {
    let body = format!("{} {}", on("request_headers", "(i32.const 0)"), on("request_body", "(i32.const 1)"));
    let host = Host::in_shadow(&guest("", &body));
    for _ in 0..5000 {
        let mut run = host.start();
        run.filter.request_headers(&mut run.exchange, &mut run.head, false);
    }
    // More than may be played at a time: the first of them are over.
    until("plays", || {
        let mut run = host.start();
        run.filter.request_headers(&mut run.exchange, &mut run.head, false);
        run.finish();
        !run.notes().iter().any(|note| note.contains("passed over"))
    });
}
