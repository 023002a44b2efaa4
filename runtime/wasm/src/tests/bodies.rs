//! Bodies and trailers: what a guest sees of them and may do to them, in which phase, and what holding them means.

use super::*;
use bytes::Bytes;
use cairn_filter::{Chunk, HeldHead, Part, Phases, Side, WhenFull};

/// Appends the status and what was returned, if anything, to a body.
const REPORT: &str = r#"
  (func $report (param $buffer i32) (param $status i32)
    (i32.store8 (i32.const 600) (i32.add (i32.const 48) (i32.div_u (local.get $status) (i32.const 10))))
    (i32.store8 (i32.const 601) (i32.add (i32.const 48) (i32.rem_u (local.get $status) (i32.const 10))))
    (drop (call $set_buffer (local.get $buffer) (i32.const -1) (i32.const 0) (i32.const 600) (i32.const 2)))
    (if (i32.load (i32.const 8)) (then
      (drop (call $set_buffer (local.get $buffer) (i32.const -1) (i32.const 0)
        (i32.load (i32.const 8)) (i32.load (i32.const 12)))))))"#;

fn chunk(text: &'static str, end_of_stream: bool) -> Chunk {
    Chunk { bytes: Bytes::from_static(text.as_bytes()), end_of_stream, ..Chunk::default() }
}

fn trailers() -> HeaderMap {
    HeaderMap::from_iter([(HeaderName::from_static("x-t"), HeaderValue::from_static("one"))])
}

impl Run {
    fn body(&mut self, side: Side, chunk: &mut Chunk) -> Verdict {
        self.filter.body(&mut self.exchange, Part { side, head: None, chunk })
    }

    fn body_with_head(&mut self, chunk: &mut Chunk) -> Verdict {
        let head = Some(HeldHead::Request(&mut self.head));
        self.filter.body(&mut self.exchange, Part { side: Side::Request, head, chunk })
    }

    fn trailers(&mut self, side: Side, chunk: &mut Chunk) -> Verdict {
        self.filter.trailers(&mut self.exchange, Part { side, head: None, chunk })
    }

    fn resumed(&mut self, side: Side, chunk: &mut Chunk) -> Verdict {
        self.filter.resumed(&mut self.exchange, Part { side, head: None, chunk })
    }
}

fn text(chunk: &Chunk) -> String {
    String::from_utf8_lossy(&chunk.bytes).into_owned()
}

/// Runs one call at the end of a request's body "hello" and checks what became of the body.
fn check(name: &str, data: &str, code: &str, expected: &str) {
    let body = format!(
        r#"{REPORT} (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
             (call $report (i32.const 0) {code}) (i32.const 0))"#
    );
    let host = Host::new(&guest(data, &body));
    let mut run = host.start();
    run.request();
    let mut chunk = chunk("hello", true);
    assert_eq!(word(&run.body(Side::Request, &mut chunk)), "continue", "{name}");
    assert_eq!((text(&chunk), chunk.is_changed), (expected.to_owned(), true), "{name}");
}

#[test]
fn a_body_is_read() {
    let get = |number: i32, start: i32, max: i64, out: &str| {
        format!("(call $buffer (i32.const {number}) (i32.const {start}) (i32.const {max}) {out})")
    };
    const OUT: &str = "(i32.const 8) (i32.const 12)";
    check("all", "", &get(0, 0, -1, OUT), "hello00hello");
    check("some", "", &get(0, 1, 3, OUT), "hello00ell");
    check("more than there is", "", &get(0, 3, 100, OUT), "hello00lo");
    check("behind the end", "", &get(0, 5, 1, OUT), "hello00");
    check("to whatever end", "", &get(0, 1, -1, OUT), "hello00ello");
    check("of the response, which is not here", "", &get(1, 0, -1, OUT), "hello00");
    check("no such buffer", "", &get(9, 0, -1, OUT), "hello02");
    check("bad result", "", &get(0, 0, -1, "(i32.const -4) (i32.const 12)"), "hello06");
    check("bad result length", "", &get(0, 0, -1, "(i32.const 8) (i32.const -4)"), "hello06");
    let status = |number: i32, at: i32| {
        format!("(call $buffer_status (i32.const {number}) (i32.const {at}) (i32.const 20))")
    };
    check("length", "", &format!("(i32.add {} (i32.load (i32.const 16)))", status(0, 16)), "hello05");
    check("length, bad result", "", &status(0, -4), "hello06");
}

#[test]
fn a_body_is_changed() {
    let set = |number: i32, start: i64, size: i64, at: i64, length: i64| {
        format!(
            "(call $set_buffer (i32.const {number}) (i32.const {start}) (i32.const {size}) (i32.const {at}) \
             (i32.const {length}))"
        )
    };
    check("before", "new", &set(0, 0, 0, 1024, 3), "newhello00");
    check("behind", "new", &set(0, 5, 0, 1024, 3), "hellonew00");
    check("far behind", "new", &set(0, -1, -1, 1024, 3), "hellonew00");
    check("in place of all", "new", &set(0, 0, -1, 1024, 3), "new00");
    check("in place of the first", "new", &set(0, 0, 2, 1024, 3), "newllo00");
    check("with nothing", "", &set(0, 0, -1, 0, 0), "00");
    check("in the middle", "new", &set(0, 2, 1, 1024, 3), "hello02");
    check("bad address", "", &set(0, 0, 0, -4, 8), "hello06");
    check("bad length", "", &set(0, 0, 0, 1024, -1), "hello06");
    check("of the response, which is not here", "new", &set(1, 0, 0, 1024, 3), "hello02");
    check("not there now", "new", &set(7, 0, 0, 1024, 3), "hello01");
    check("no such buffer", "new", &set(9, 0, 0, 1024, 3), "hello02");
}

#[test]
fn heads_are_read_and_not_changed_once_they_are_gone() {
    let get = "(call $get (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 8) (i32.const 12))";
    check("a header", "x-in", get, "hello00hello");
    let add = |map: i32| {
        format!("(call $add (i32.const {map}) (i32.const 1024) (i32.const 4) (i32.const 1024) (i32.const 4))")
    };
    check("of the request", "x-in", &add(0), "hello02");
    check("of the response, which is not here", "x-in", &add(2), "hello02");
    check("trailers of the response", "x-in", &add(3), "hello02");
    check("trailers, at the end", "x-in", &add(1), "hello00");
}

/// A guest whose callbacks return actions, or do something first.
fn acting(callback: &str, parameters: &str, code: &str) -> String {
    guest(
        "x-tnewx-in",
        &format!(r#"{REPORT} (func (export "{callback}") (param {parameters}) (result i32) {code})"#),
    )
}

#[test]
fn actions_say_what_becomes_of_a_body() {
    for (action, expected, when_full, kept) in [
        (0, "continue", None, "hello"),
        (1, "hold", Some(WhenFull::Fail), ""),
        (2, "hold", Some(WhenFull::Wait), ""),
        (3, "hold", Some(WhenFull::Fail), ""),
        (9, "hold", Some(WhenFull::Fail), ""),
    ] {
        let host =
            Host::new(&acting("proxy_on_request_body", "i32 i32 i32", &format!("(i32.const {action})")));
        let mut run = host.start();
        let mut shown = chunk("hello", false);
        let verdict = run.body(Side::Request, &mut shown);
        assert_eq!((word(&verdict), text(&shown)), (expected.to_owned(), kept.to_owned()), "{action}");
        if let Verdict::Hold(hold) = verdict {
            let swallowed = action > 2;
            assert_eq!(
                (Some(hold.when_full), hold.kept),
                (when_full, if swallowed { 0 } else { 5 }),
                "{action}"
            );
        }
    }
    for (action, expected) in [(0, "continue"), (1, "hold"), (7, "hold")] {
        let host =
            Host::new(&acting("proxy_on_response_trailers", "i32 i32", &format!("(i32.const {action})")));
        let mut shown = Chunk { trailers: Some(trailers()), ..Chunk::default() };
        assert_eq!(word(&host.start().trailers(Side::Response, &mut shown)), expected, "{action}");
    }
}

#[test]
fn what_is_held_is_shown_again_and_passed_on_as_a_whole() {
    for side in [Side::Request, Side::Response] {
        let (name, buffer) = if side == Side::Request { ("request", 0) } else { ("response", 1) };
        let code = format!(
            "(if (i32.eqz (local.get 2)) (then (return (i32.const 1))))
             (call $report (i32.const {buffer}) (local.get 1)) (i32.const 0)"
        );
        let host = Host::new(&acting(&format!("proxy_on_{name}_body"), "i32 i32 i32", &code));
        let mut run = host.start();
        for (text, kept) in [("he", 2), ("llo", 5)] {
            let Verdict::Hold(hold) = run.body(side, &mut chunk(text, false)) else { panic!("not held") };
            assert_eq!(hold.kept, kept);
        }
        let mut end = chunk("", true);
        assert_eq!(word(&run.body(side, &mut end)), "continue");
        assert_eq!(text(&end), "hello05");
        assert_eq!(run.notes(), [format!("{name}: changed the body")]);
    }
}

#[test]
fn trailers_are_read_changed_and_logged() {
    let body = format!(
        r#"{REPORT}
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (i32.const 1))
           (func (export "proxy_on_request_trailers") (param i32 i32) (result i32)
             (drop (call $add (i32.const 1) (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const 3)))
             (drop (call $replace (i32.const 1) (i32.const 1030) (i32.const 4) (i32.const 1027) (i32.const 3)))
             (call $report (i32.const 0)
               (call $get (i32.const 1) (i32.const 1024) (i32.const 3) (i32.const 8) (i32.const 12)))
             (call $report (i32.const 0) (local.get 1))
             (i32.const 0))
           (func (export "proxy_on_log") (param i32)
             (if (call $get (i32.const 1) (i32.const 1024) (i32.const 3) (i32.const 8) (i32.const 12))
               (then unreachable))
             (drop (call $set_property (i32.const 1024) (i32.const 3) (i32.load (i32.const 8)) (i32.const 3)))
             (if (i32.ne (i32.const 2) (call $add (i32.const 1) (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const 3)))
               (then unreachable))
             (if (i32.ne (i32.const 2) (call $set_buffer (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))
               (then unreachable)))"#
    );
    let host = Host::new(&guest("x-tnewx-in", &body));
    let mut run = host.start();
    assert_eq!(word(&run.body(Side::Request, &mut chunk("held", false))), "hold");
    let mut last = Chunk { trailers: Some(trailers()), ..Chunk::default() };
    assert_eq!(word(&run.trailers(Side::Request, &mut last)), "continue");
    assert_eq!(text(&last), "held00one01one");
    let map = last.trailers.unwrap();
    assert_eq!(map.get_all("x-t").iter().collect::<Vec<_>>(), ["one", "new"]);
    assert_eq!(map["x-in"], "new");
    run.finish();
    assert_eq!(host.traps(), 0);
}

#[test]
fn trailers_are_added_at_the_end_of_a_body_only() {
    let add = "(call $add (i32.const 3) (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const 3))";
    let code = format!("(call $report (i32.const 1) {add}) (i32.const 0)");
    let host = Host::new(&acting("proxy_on_response_body", "i32 i32 i32", &code));
    let mut run = host.start();
    let (mut first, mut last) = (chunk("a", false), chunk("b", true));
    run.body(Side::Response, &mut first);
    run.body(Side::Response, &mut last);
    assert_eq!((text(&first), first.trailers), ("a02".to_owned(), None));
    assert_eq!(
        (text(&last), last.trailers.unwrap()["x-t"].clone()),
        ("b00".to_owned(), HeaderValue::from_static("new"))
    );
}

#[test]
fn a_body_can_be_answered_or_ended() {
    let reply =
        "(drop (call $reply (i32.const 418) (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const 3)
                   (i32.const 0) (i32.const 0) (i32.const -1))) (i32.const 0)";
    let close = "(drop (call $close (i32.const 0))) (i32.const 0)";
    for (callback, parameters) in
        [("proxy_on_request_body", "i32 i32 i32"), ("proxy_on_request_trailers", "i32 i32")]
    {
        for (code, expected) in [(reply, "reply 418 x-t"), (close, "reset")] {
            let host = Host::new(&acting(callback, parameters, code));
            let mut run = host.start();
            let verdict = match callback {
                "proxy_on_request_body" => run.body(Side::Request, &mut chunk("x", false)),
                _ => {
                    run.trailers(Side::Request, &mut Chunk { trailers: Some(trailers()), ..Chunk::default() })
                }
            };
            assert_eq!(word(&verdict), expected, "{callback}");
        }
    }
}

/// Holds bodies and trailers; a request with the header x-crash does something to stream 2.
fn holding(act: &str) -> String {
    let body = format!(
        r#"{REPORT}
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (if (i32.eqz (call $get (i32.const 0) (i32.const 525) (i32.const 7) (i32.const 16) (i32.const 20)))
               (then (drop (call $effective (i32.const 2))) {act}))
             (i32.const 0))
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (i32.const 1))
           (func (export "proxy_on_request_trailers") (param i32 i32) (result i32) (i32.const 1))
           (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32) (i32.const 1))"#
    );
    guest("new", &body)
}

#[tokio::test(start_paused = true)]
async fn a_held_body_goes_on_changed_or_answered_by_another_callback() {
    for (act, expected, bytes) in [
        ("(drop (call $continue (i32.const 0)))", "continue", "hello"),
        ("(drop (call $set_buffer (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 1024) (i32.const 3)))
          (drop (call $continue (i32.const 0)))", "continue", "new"),
        ("(drop (call $close (i32.const 0)))", "reset", "hello"),
        ("(drop (call $reply (i32.const 403) (i32.const 1024) (i32.const 3) (i32.const 0) (i32.const 0)
            (i32.const 0) (i32.const 0) (i32.const -1)))", "reply 403 new", "hello"),
        ("unreachable", "reply 503 wasm_fail_stream", "hello"),
    ] {
        let host = Host::new(&holding(act));
        let mut held = host.start();
        let mut shown = chunk("hello", true);
        held.request();
        let Verdict::Hold(hold) = held.body(Side::Request, &mut shown) else { panic!("not held") };
        let mut until = hold.until.unwrap();
        assert!(super::lifecycle::poll(&mut until).is_pending(), "{act}");
        host.start().with_header("x-crash", "1").request();
        assert!(super::lifecycle::poll(&mut until).is_ready(), "{act}");
        assert_eq!(word(&held.resumed(Side::Request, &mut shown)), expected, "{act}");
        assert_eq!(text(&shown), bytes, "{act}");
    }
}

#[tokio::test(start_paused = true)]
async fn both_sides_of_a_stream_are_held_apart() {
    let host = Host::new(&holding("(drop (call $continue (i32.const 1)))"));
    let mut held = host.start();
    held.request();
    let (mut request, mut response) = (chunk("up", true), chunk("down", true));
    let Verdict::Hold(up) = held.body(Side::Request, &mut request) else { panic!("not held") };
    let Verdict::Hold(down) = held.body(Side::Response, &mut response) else { panic!("not held") };
    host.start().with_header("x-crash", "1").request();
    // Both are woken, and one finds that it is still held.
    up.until.unwrap().await;
    down.until.unwrap().await;
    assert_eq!(word(&held.resumed(Side::Request, &mut request)), "hold");
    assert_eq!(word(&held.resumed(Side::Response, &mut response)), "continue");
    assert_eq!((text(&request), text(&response)), (String::new(), "down".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_body_is_not_held_for_ever_once_nothing_more_comes() {
    for (strategy, expected) in
        [(FailStrategy::Close, "reply 503 wasm_fail_stream"), (FailStrategy::Open, "continue")]
    {
        let host = Host::with(&holding(""), strategy, "");
        let mut held = host.start();
        let Verdict::Hold(open) = held.body(Side::Request, &mut chunk("he", false)) else {
            panic!("not held")
        };
        let waiting = tokio::time::timeout(Duration::from_secs(3600), open.until.unwrap());
        assert!(waiting.await.is_err(), "the client may take its time");
        let mut shown =
            Chunk { bytes: Bytes::from_static(b"llo"), trailers: Some(trailers()), ..Chunk::default() };
        let mut verdict = held.trailers(Side::Request, &mut shown);
        // Time that is only waited for passes at once here, but the plugin looks at the real clock.
        while let Verdict::Hold(hold) = verdict {
            hold.until.unwrap().await;
            verdict = held.resumed(Side::Request, &mut shown);
        }
        assert_eq!(word(&verdict), expected);
        assert_eq!((text(&shown), shown.trailers.is_some()), ("hello".to_owned(), true));
    }
}

#[test]
fn a_crash_loses_nothing_of_a_body() {
    for callback in ["proxy_on_request_body", "proxy_on_request_trailers"] {
        for (strategy, expected) in [
            (FailStrategy::Close, "reply 503 wasm_fail_stream"),
            (FailStrategy::Reload, "reply 503 wasm_fail_stream"),
            (FailStrategy::Open, "continue"),
        ] {
            let body = if callback == "proxy_on_request_body" {
                "(if (local.get 2) (then unreachable)) (i32.const 1)"
            } else {
                "(i32.const 1)"
            };
            let body = format!(
                r#"(func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) {body})
                   (func (export "proxy_on_request_trailers") (param i32 i32) (result i32) unreachable)"#
            );
            let host = Host::with(&guest("", &body), strategy, "");
            let (mut run, mut other) = (host.start(), host.start());
            for run in [&mut run, &mut other] {
                assert_eq!(word(&run.body(Side::Request, &mut chunk("hel", false))), "hold", "{callback}");
            }
            let mut shown = chunk("lo", true);
            let verdict = if callback == "proxy_on_request_body" {
                run.body(Side::Request, &mut shown)
            } else {
                (shown.end_of_stream, shown.trailers) = (false, Some(trailers()));
                run.trailers(Side::Request, &mut shown)
            };
            assert_eq!(
                (word(&verdict), text(&shown)),
                (expected.to_owned(), "hello".to_owned()),
                "{callback}"
            );
            assert_eq!(shown.trailers.is_some(), callback == "proxy_on_request_trailers");
            // What another exchange held in the same guest is not lost either.
            let mut held = chunk("", false);
            assert_eq!(word(&other.resumed(Side::Request, &mut held)), expected, "{callback}");
            assert_eq!(text(&held), "hel", "{callback}");
            run.finish();
            assert_eq!(host.traps(), 1);
        }
    }
}

#[test]
fn a_head_that_is_held_can_be_changed_by_what_the_body_says() {
    let body = r#"
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
        (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
          (if (i32.eqz (local.get 2)) (then (return (i32.const 1))))
          (drop (call $buffer (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 8) (i32.const 12)))
          (call $finish (call $add (i32.const 0) (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const 3)))
          (i32.const 0))"#;
    let engine = Engine::new(settings()).unwrap();
    let holds = WasmPlugin { holds_heads: true, ..plugin(FailStrategy::Close, "") };
    let host = Host { factory: load(&engine, &guest("x-tnew", body), &holds).unwrap(), engine };
    let mut run = host.start();
    let verdict = run.filter.request_headers(&mut run.exchange, &mut run.head, false);
    assert_eq!(word(&verdict), "hold");
    assert_eq!(word(&run.body_with_head(&mut chunk("bo", false))), "hold");
    assert_eq!(word(&run.body_with_head(&mut chunk("dy", true))), "continue");
    assert_eq!(
        (run.header("x-status"), run.header("x-got"), run.header("x-t")),
        ("00".into(), "body".into(), "new".into())
    );
    assert_eq!(run.notes(), ["request: added x-t, set x-status, set x-got"]);
    // Where there is no body there is nothing to look at.
    assert_eq!(word(&host.start().request()), "wait");
}

#[test]
fn only_what_is_exported_is_called() {
    let of = |body: &str| Host::new(&guest("", body)).factory.phases();
    let heads =
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#;
    assert_eq!(of(heads), Phases::REQUEST_HEADERS | Phases::FINISH);
    let body = r#"(func (export "proxy_on_response_body") (param i32 i32 i32) (result i32) (i32.const 0))"#;
    assert_eq!(of(body), Phases::RESPONSE_BODY | Phases::FINISH);
    let trailers =
        r#"(func (export "proxy_on_request_trailers") (param i32 i32) (result i32) (i32.const 0))"#;
    assert_eq!(of(trailers), Phases::REQUEST_TRAILERS | Phases::FINISH);
}

#[test]
fn nothing_of_a_stream_is_left_when_it_is_over() {
    // A second stream speaks of the first, which has ended but asked for time.
    let body = format!(
        r#"{REPORT}
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
             (if (i32.eq (local.get 0) (i32.const 2)) (then (return (i32.const 1))))
             (drop (call $effective (i32.const 2)))
             (local.set 1 (call $set_buffer (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1024) (i32.const 3)))
             (drop (call $buffer (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 8) (i32.const 12)))
             (drop (call $effective (local.get 0)))
             (call $report (i32.const 0) (local.get 1)) (i32.const 0))
           (func (export "proxy_on_done") (param i32) (result i32) (i32.const 0))"#
    );
    let host = Host::new(&guest("new", &body));
    let mut first = host.start();
    assert_eq!(word(&first.body(Side::Request, &mut chunk("gone", false))), "hold");
    first.finish();
    let mut shown = chunk("here", true);
    host.start().body(Side::Request, &mut shown);
    assert_eq!(text(&shown), "here02");
}
