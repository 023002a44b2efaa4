//! gRPC calls of guests, single and streamed.

use super::outside::{Asking, COUNT, Opened, block_on, escaped, map, until};
use super::*;
use crate::grpc::frame;
use bytes::Bytes;
use cairn_filter::{CalloutAnswer, CalloutError, CalloutPart};
use http::Response;

/// The name at 1024, a service at 1280, a method at 1300, metadata at 1320.
fn data(name: &[u8]) -> String {
    let mut bytes = name.to_vec();
    bytes.resize(256, 0);
    bytes.extend_from_slice(b"pkg.Service");
    bytes.resize(276, 0);
    bytes.extend_from_slice(b"Method");
    bytes.resize(296, 0);
    bytes.extend_from_slice(&map(&[("x-md", "1")]));
    escaped(&bytes)
}

const METADATA_BYTES: usize = 4 + 8 + 4 + 1 + 1 + 1;

/// A call with arguments replaced by position.
fn call(name: &[u8], replaced: &[(usize, i64)]) -> String {
    let mut arguments =
        [1024, name.len() as i64, 1280, 11, 1300, 6, 1320, METADATA_BYTES as i64, 1280, 3, 2000, 3000];
    for (position, argument) in replaced {
        arguments[*position] = *argument;
    }
    let arguments: String = arguments.iter().map(|number| format!(" (i32.const {number})")).collect();
    format!("(call $grpc_call{arguments})")
}

fn stream(name: &[u8], replaced: &[(usize, i64)]) -> String {
    let mut arguments = [1024, name.len() as i64, 1280, 11, 1300, 6, 1320, METADATA_BYTES as i64, 3000];
    for (position, argument) in replaced {
        arguments[*position] = *argument;
    }
    let arguments: String = arguments.iter().map(|number| format!(" (i32.const {number})")).collect();
    format!("(call $grpc_stream{arguments})")
}

/// Runs `begin` for a request that is held, and these callbacks.
fn with(name: &[u8], begin: &str, callbacks: &str) -> String {
    let body = format!(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (global.set $stream (local.get 0))
             (call $finish {begin}) (i32.const 1))
           (global $stream (mut i32) (i32.const 0))
           {callbacks}
           (data (i32.const 4096) "answers:statusx-authx-trailer")
           {COUNT}"#
    );
    guest(&data(name), &body)
}

/// Tells the message, or the status, and goes on.
const SINGLE: &str = r#"
    (func (export "proxy_on_grpc_receive") (param i32) (param $id i32) (param $size i32)
      (drop (call $buffer (i32.const 5) (i32.const 0) (i32.const -1) (i32.const 8) (i32.const 12)))
      (drop (call $effective (global.get $stream)))
      (call $finish (local.get $size))
      (drop (call $continue (i32.const 0))))
    (func (export "proxy_on_grpc_close") (param i32) (param $id i32) (param $code i32)
      (drop (call $status (i32.const 3200) (i32.const 8) (i32.const 12)))
      (if (i32.ne (i32.load (i32.const 3200)) (local.get $code)) (then unreachable))
      (drop (call $effective (global.get $stream)))
      (call $finish (local.get $code))
      (drop (call $continue (i32.const 0))))"#;

const NAME: &[u8] = b"auth.shop:81";

fn message(trailers: &[(&'static str, &'static str)], body: Bytes) -> CalloutAnswer {
    let trailers =
        trailers.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
    CalloutAnswer { response: Response::new(body), trailers: trailers.collect() }
}

#[test]
fn a_single_call_ends_with_a_message_or_a_status() {
    // GrpcService { envoy_grpc { cluster_name: "auth.shop:81", authority: "other" }, timeout { seconds: 3 } }
    let service = b"\x0a\x15\x0a\x0cauth.shop:81\x12\x05other\x1a\x02\x08\x03".to_vec();
    for (name, authority) in [(NAME.to_vec(), "auth.shop.svc.cluster.local"), (service, "other")] {
        let asking = Asking::new(&with(&name, &call(&name, &[]), SINGLE));
        let mut run = asking.start();
        let verdict = run.request();
        assert_eq!(run.header("x-status"), "00");
        asking.mesh.wait(1);
        {
            let asked = asking.mesh.asked.lock();
            let asked = &asked[0].0;
            let uri = format!("http://{authority}/pkg.Service/Method");
            assert_eq!((asked.request.uri().to_string(), asked.http2), (uri, true));
            assert_eq!(asked.request.body(), &frame(b"pkg"));
            let headers = asked.request.headers();
            assert_eq!(
                (&headers["content-type"], &headers["te"]),
                (&"application/grpc".parse().unwrap(), &"trailers".parse().unwrap())
            );
            assert_eq!(
                (&headers["x-md"], &headers["grpc-timeout"]),
                (&"1".parse().unwrap(), &"2000m".parse().unwrap())
            );
        }
        asking.mesh.answer(0, Ok(message(&[("grpc-status", "0")], frame(b"four"))));
        block_on(verdict);
        assert_eq!(word(&run.request()), "continue");
        assert_eq!((run.header("x-got"), run.header("x-status")), ("four".into(), "04".into()));
    }
    for (name, answer, status, text) in [
        (
            "status",
            Ok(message(&[("grpc-status", "7"), ("grpc-message", "no%21")], Bytes::new())),
            "07",
            "no!",
        ),
        ("nobody there", Err(CalloutError::Unreachable("x".into())), "14", "the endpoint did not answer: x"),
        ("late", Err(CalloutError::Timeout(Duration::from_secs(1))), "14", "upstream request timeout"),
    ] {
        let asking = Asking::new(&with(NAME, &call(NAME, &[]), SINGLE));
        let mut run = asking.start();
        let verdict = run.request();
        asking.mesh.wait(1);
        asking.mesh.answer(0, answer);
        block_on(verdict);
        assert_eq!(word(&run.request()), "continue", "{name}");
        assert_eq!((run.header("x-got"), run.header("x-status")), (text.into(), status.into()), "{name}");
    }
}

#[test]
fn calls_that_cannot_be_made_say_so() {
    let unknown = b"outbound|80||nobody.example";
    for (name, code, status) in [
        ("unknown service", call(unknown, &[(1, unknown.len() as i64)]), 4),
        ("no service", call(NAME, &[(3, 0)]), 4),
        ("no method", call(NAME, &[(5, 0)]), 4),
        ("malformed metadata", call(NAME, &[(7, 7)]), 4),
        ("bad name", call(NAME, &[(0, -4)]), 6),
        ("bad service", call(NAME, &[(2, -4)]), 6),
        ("bad method", call(NAME, &[(4, -4)]), 6),
        ("bad metadata", call(NAME, &[(6, -4)]), 6),
        ("bad message", call(NAME, &[(9, -1)]), 6),
        ("bad id", call(NAME, &[(11, -1)]), 6),
        ("stream to nobody", stream(NAME, &[(1, 3)]), 4),
        ("stream, bad service", stream(NAME, &[(2, -4)]), 6),
        ("stream, bad id", stream(NAME, &[(8, -1)]), 6),
        (
            "send to nobody",
            "(call $grpc_send (i32.const 6) (i32.const 0) (i32.const 0) (i32.const 0))".into(),
            1,
        ),
        ("close nobody", "(call $grpc_close (i32.const 6))".into(), 1),
        ("cancel nobody", "(call $grpc_cancel (i32.const 5))".into(), 1),
        ("status, bad", "(call $status (i32.const -1) (i32.const 8) (i32.const 12))".into(), 6),
    ] {
        let bytes: &[u8] = if name == "unknown service" { unknown } else { NAME };
        let asking = Asking::new(&with(bytes, &code, ""));
        let mut run = asking.start();
        run.request();
        assert_eq!(run.header("x-status"), format!("{status:02}"), "{name}");
        assert!(asking.mesh.asked.lock().is_empty(), "{name}");
    }
    // A single call takes no further messages, and can be given up.
    let code = format!(
        "(block (result i32) (drop {})
           (if (i32.ne (call $grpc_send (i32.load (i32.const 3000)) (i32.const 0) (i32.const 0) (i32.const 0)) (i32.const 2))
             (then unreachable))
           (if (call $grpc_close (i32.load (i32.const 3000))) (then unreachable))
           (call $grpc_cancel (i32.load (i32.const 3000))))",
        call(NAME, &[])
    );
    let asking = Asking::new(&with(NAME, &code, ""));
    let mut run = asking.start();
    run.request();
    assert_eq!(run.header("x-status"), "01", "gone already");
}

/// Writes a letter for every callback at 5000, and tells them all when the stream closes.
const STREAMED: &str = r#"
    (global $length (mut i32) (i32.const 0))
    (func $note (param $letter i32) (param $number i32)
      (i32.store8 (i32.add (i32.const 5000) (global.get $length)) (local.get $letter))
      (i32.store8 (i32.add (i32.const 5001) (global.get $length)) (i32.add (i32.const 48) (local.get $number)))
      (global.set $length (i32.add (i32.const 2) (global.get $length))))
    (func (export "proxy_on_grpc_receive_initial_metadata") (param i32 i32) (param $count i32)
      (if (i32.eqz (call $get (i32.const 4) (i32.const 4110) (i32.const 6) (i32.const 8) (i32.const 12)))
        (then (call $note (i32.const 105) (local.get $count)))
        (else (call $note (i32.const 73) (local.get $count)))))
    (func (export "proxy_on_grpc_receive") (param i32) (param $id i32) (param $size i32)
      (call $note (i32.const 109) (local.get $size))
      (drop (call $grpc_send (local.get $id) (i32.const 1280) (local.get $size) (i32.const 0))))
    (func (export "proxy_on_grpc_receive_trailing_metadata") (param i32 i32) (param $count i32)
      (call $note (i32.const 116) (local.get $count)))
    (func (export "proxy_on_grpc_close") (param i32 i32) (param $code i32)
      (call $note (i32.const 99) (local.get $code))
      (drop (call $effective (global.get $stream)))
      (i32.store (i32.const 8) (i32.const 5000)) (i32.store (i32.const 12) (global.get $length))
      (call $finish (i32.const 0))
      (drop (call $continue (i32.const 0))))"#;

#[test]
fn a_stream_tells_of_everything_and_can_be_answered() {
    let begin = format!(
        "(block (result i32) (drop {})
           (call $grpc_send (i32.load (i32.const 3000)) (i32.const 1280) (i32.const 3) (i32.const 0)))",
        stream(NAME, &[])
    );
    let asking = Asking::new(&with(NAME, &begin, STREAMED));
    let mut run = asking.start();
    let verdict = run.request();
    assert_eq!(run.header("x-status"), "00");
    until("the stream is opened", || asking.mesh.streams.lock().len() == 1);
    let opened = asking.mesh.streams.lock().pop().unwrap();
    assert_eq!(opened.sent(3 + 5), frame(b"pkg"));
    opened.head(&[("x-auth", "who")]);
    let both = [frame(b"one"), frame(b"")].concat();
    opened.part(CalloutPart::Data(Bytes::copy_from_slice(&both[..6])));
    opened.part(CalloutPart::Data(Bytes::copy_from_slice(&both[6..])));
    // It answers each message with as many bytes.
    let expected = [frame(b"pkg"), frame(b"pkg"), frame(b"")].concat();
    assert_eq!(opened.sent(expected.len()), expected);
    let trailers = [("grpc-status".parse().unwrap(), HeaderValue::from_static("5"))].into_iter().collect();
    opened.part(CalloutPart::Trailers(trailers));
    block_on(verdict);
    assert_eq!(word(&run.request()), "continue");
    assert_eq!(run.header("x-got"), "i2m3m0t1c5");
}

#[test]
fn a_stream_may_fail_or_be_given_up() {
    for (name, head, expected) in [
        ("trailers only", &[("grpc-status", "3")][..], "I0t2c3"),
        ("not gRPC", &[("x-auth", "who"), (":status", "403")][..], "I0t0c7"),
    ] {
        let asking = Asking::new(&with(NAME, &stream(NAME, &[]), STREAMED));
        let mut run = asking.start();
        let verdict = run.request();
        until("the stream is opened", || asking.mesh.streams.lock().len() == 1);
        asking.mesh.streams.lock().pop().unwrap().head(head);
        block_on(verdict);
        assert_eq!(word(&run.request()), "continue", "{name}");
        assert_eq!(run.header("x-got"), expected, "{name}");
    }
    let asking = Asking::new(&with(NAME, &stream(NAME, &[]), STREAMED));
    let mut run = asking.start();
    let verdict = run.request();
    until("the stream is opened", || asking.mesh.streams.lock().len() == 1);
    drop(asking.mesh.streams.lock().pop());
    block_on(verdict);
    assert_eq!(word(&run.request()), "continue");
    assert_eq!(run.header("x-got"), "I0t4c>", "14, unavailable");

    let cancel = format!(
        "(block (result i32) (drop {}) (call $grpc_cancel (i32.load (i32.const 3000))))",
        stream(NAME, &[])
    );
    let asking = Asking::new(&with(NAME, &cancel, STREAMED));
    let mut run = asking.start();
    run.request();
    assert_eq!(run.header("x-status"), "00");
    until("nobody waits", || asking.mesh.streams.lock().iter().all(Opened::is_given_up));
}
