//! Foreign functions called by a guest.

use super::outside::escaped;
use super::*;

/// Calls a function with arguments, reports the status, and the result as text.
fn check(name: &str, arguments: &[u8], status: u32, got: &str) {
    let mut data = name.as_bytes().to_vec();
    data.resize(64, 0);
    data.extend_from_slice(arguments);
    let code = format!(
        "(call $foreign (i32.const 1024) (i32.const {}) (i32.const 1088) (i32.const {}) (i32.const 8) (i32.const 12))",
        name.len(),
        arguments.len()
    );
    let host = Host::new(&calling(&escaped(&data), &code));
    let mut run = host.start();
    assert_eq!(word(&run.request()), "continue", "{name}");
    assert_eq!(run.header("x-status"), format!("{status:02}"), "{name} {arguments:?}");
    if !got.is_empty() {
        assert_eq!(run.header("x-got"), got, "{name} {arguments:?}");
    }
}

#[test]
fn functions_answer_as_in_envoy() {
    check("compress", b"1 == 1", 0, "");
    check("uncompress", b"1 == 1", 3, "");
    check("verify_signature", b"1 == 1", 2, "");
    check("sign", b"1 == 1", 2, "");
    check("declare_property", b"1 == 1", 2, "");
    check("declare_property", b"\x0a\x04mine\x10\x01", 0, "");
    check("set_envoy_filter_state", b"1 == 1", 2, "");
    check("set_envoy_filter_state", b"\x0a\x01a\x12\x01b", 0, "");
    check("clear_route_cache", b"", 0, "");
    check("nosuch", b"", 1, "");
    check("expr_create", b"1 == ", 2, "");
    check("expr_create", b"unknown.name == 1", 2, "");
    check("expr_create", b"\xff", 2, "");
    check("expr_evaluate", b"abcd", 1, "");
    check("expr_evaluate", b"abc", 2, "");
    check("expr_delete", b"abcd", 0, "");
    check("expr_delete", b"", 2, "");
    check("cairn.features", b"", 0, "callouts,grpc,timers,queues,expressions,signatures,compression");
}

/// Runs `code`, in which the name of a function starts at 1024 and another one at 1056, arguments at 1088 and 1120.
fn run_two(names: [&str; 2], arguments: [&[u8]; 2], code: &str) -> Run {
    let mut data = vec![0; 128];
    for (at, bytes) in
        [(0, names[0].as_bytes()), (32, names[1].as_bytes()), (64, arguments[0]), (96, arguments[1])]
    {
        data[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let host = Host::new(&calling(&escaped(&data), code));
    let mut run = host.start().with_header("x-env", "test");
    assert_eq!(word(&run.request()), "continue");
    run
}

#[test]
fn what_is_compressed_can_be_uncompressed() {
    let code = "(block (result i32)
        (drop (call $foreign (i32.const 1024) (i32.const 8) (i32.const 1088) (i32.const 5) (i32.const 16) (i32.const 20)))
        (call $foreign (i32.const 1056) (i32.const 10) (i32.load (i32.const 16)) (i32.load (i32.const 20))
          (i32.const 8) (i32.const 12)))";
    let run = run_two(["compress", "uncompress"], [b"hello", b""], code);
    assert_eq!((run.header("x-status"), run.header("x-got")), ("00".into(), "hello".into()));
}

#[test]
fn addresses_are_checked_and_results_may_be_unwanted() {
    let call = |name: &str, arguments: &str, result: &str| {
        format!("(call $foreign {name} (i32.const 8) {arguments} {result})")
    };
    let (name, arguments, result) =
        ("(i32.const 1024)", "(i32.const 1088) (i32.const 5)", "(i32.const 16) (i32.const 20)");
    for (code, status) in [
        (call(name, arguments, result), "00"),
        (call(name, arguments, "(i32.const 0) (i32.const 0)"), "00"),
        (call("(i32.const -4)", arguments, result), "06"),
        (call(name, "(i32.const -4) (i32.const 5)", result), "06"),
        (call(name, "(i32.const 1088) (i32.const -1)", result), "06"),
        (call(name, arguments, "(i32.const -2) (i32.const 20)"), "06"),
        (call(name, arguments, "(i32.const 16) (i32.const -2)"), "06"),
    ] {
        let run = run_two(["compress", ""], [b"hello", b""], &code);
        assert_eq!(run.header("x-status"), status, "{code}");
    }
}

#[test]
fn a_property_declared_read_only_is_set_once() {
    let set = "(call $set_property (i32.const 1120) (i32.const 4) (i32.const 1120) (i32.const 2))";
    let declare = "(drop (call $foreign (i32.const 1024) (i32.const 16) (i32.const 1088) (i32.const 8) (i32.const 0) (i32.const 0)))";
    let code = format!("(block (result i32) {declare} (if {set} (then unreachable)) {set})");
    let run = run_two(["declare_property", ""], [b"\x0a\x04mine\x10\x01", b"mine"], &code);
    assert_eq!(run.header("x-status"), "02");
    let twice = format!(
        "(block (result i32) {declare}
           (call $foreign (i32.const 1024) (i32.const 16) (i32.const 1088) (i32.const 8) (i32.const 0) (i32.const 0)))"
    );
    let run = run_two(["declare_property", ""], [b"\x0a\x04mine\x10\x01", b""], &twice);
    assert_eq!(run.header("x-status"), "02");
}

#[test]
fn filter_state_can_be_read_back() {
    let code = "(block (result i32)
        (drop (call $foreign (i32.const 1024) (i32.const 22) (i32.const 1088) (i32.const 8) (i32.const 0) (i32.const 0)))
        (call $property (i32.const 1120) (i32.const 15) (i32.const 8) (i32.const 12)))";
    let arguments: [&[u8]; 2] = [b"\x0a\x02ab\x12\x02cd", b"filter_state\0ab"];
    let run = run_two(["set_envoy_filter_state", ""], arguments, code);
    assert_eq!((run.header("x-status"), run.header("x-got")), ("00".into(), "cd".into()));
}

#[test]
fn expressions_are_evaluated_over_properties() {
    let code = |length: usize| {
        format!(
            "(block (result i32)
               (if (call $foreign (i32.const 1024) (i32.const 11) (i32.const 1088) (i32.const {length}) (i32.const 16) (i32.const 20))
                 (then unreachable))
               (call $foreign (i32.const 1056) (i32.const 13) (i32.load (i32.const 16)) (i32.const 4) (i32.const 8) (i32.const 12)))"
        )
    };
    for (text, status, got) in [
        ("request.method", "00", "GET"),
        ("'a' + request.host", "00", "ashop:80"),
        ("request.headers['x-env']", "00", "test"),
        ("source.address", "00", "10.0.0.1:5000"),
        ("request.nosuch", "10", ""),
        ("1 + 'a'", "10", ""),
        ("[1]", "03", ""),
        ("has(request.id) ? 'y' : 'n'", "00", "n"),
        ("plugin_name", "00", "ns.test"),
    ] {
        let run = run_two(["expr_create", "expr_evaluate"], [text.as_bytes(), b""], &code(text.len()));
        assert_eq!(run.header("x-status"), status, "{text}");
        if status == "00" {
            assert_eq!(run.header("x-got"), got, "{text}");
        }
    }
}
