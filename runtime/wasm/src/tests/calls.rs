//! Every host function with good arguments, bad addresses and bad lengths.

use super::*;

/// Runs one call on request headers and checks its status and, unless empty, what it returned.
fn check(name: &str, data: &str, code: &str, status: u32, got: &str) {
    let host = Host::new(&calling(data, code));
    let mut run = host.start();
    assert_eq!(word(&run.request()), "continue", "{name}");
    assert_eq!(run.header("x-status"), format!("{status:02}"), "{name}");
    if !got.is_empty() {
        assert_eq!(run.header("x-got"), got, "{name}");
    }
}

/// The address of the text, and addresses that are none.
const AT: &str = "(i32.const 1024)";
const OUT: &str = "(i32.const 8) (i32.const 12)";
const BAD: &str = "(i32.const -4)";
const BEHIND: &str = "(i32.const 131070)";

fn number(number: i64) -> String {
    format!("(i32.const {number})")
}

#[test]
fn headers() {
    let get = |map: i64, at: &str, length: i64, out: &str| {
        format!("(call $get {} {at} {} {out})", number(map), number(length))
    };
    check("a header", "x-in", &get(0, AT, 4, OUT), 0, "hello");
    check("in any case", "X-IN", &get(0, AT, 4, OUT), 0, "hello");
    check("first of two", "x-dup", &get(0, AT, 5, OUT), 0, "a");
    check("pseudo-header", ":path", &get(0, AT, 5, OUT), 0, "/items?x=1");
    check("host is the authority", "Host", &get(0, AT, 4, OUT), 0, "shop:80");
    check("empty value", "x-empty", &get(0, AT, 7, OUT), 0, "");
    check("absent", "x-none", &get(0, AT, 6, OUT), 1, "");
    check("response not here yet", "x-in", &get(2, AT, 4, OUT), 1, "");
    check("trailers", "x-in", &get(1, AT, 4, OUT), 1, "");
    check("no such map", "x-in", &get(8, AT, 4, OUT), 2, "");
    check("bad name", "x-in", &get(0, BAD, 4, OUT), 6, "");
    check("bad length", "x-in", &get(0, AT, -1, OUT), 6, "");
    check("bad result address", "x-in", &get(0, AT, 4, &format!("{BEHIND} (i32.const 12)")), 6, "");
    check("bad result length", "x-in", &get(0, AT, 4, &format!("(i32.const 8) {BAD}")), 6, "");

    check("size", "", "(call $map_size (i32.const 0) (i32.const 16))", 0, "");
    check("size, bad result", "", "(call $map_size (i32.const 0) (i32.const -4))", 6, "");
    check("pairs, bad result", "", "(call $pairs (i32.const 0) (i32.const -4) (i32.const 12))", 6, "");
    check("pairs of nothing", "", "(call $pairs (i32.const 1) (i32.const 8) (i32.const 12))", 0, "");
    check("pairs of no map", "", "(call $pairs (i32.const 9) (i32.const 8) (i32.const 12))", 2, "");
}

#[test]
fn header_changes() {
    let cases = [
        ("replace", "replace", "x-dupNEW", 5, 3, 0, ["NEW", ""], "request: set x-dup, set x-status"),
        ("add", "add", "x-dupNEW", 5, 3, 0, ["a", "NEW"], "request: added x-dup, set x-status"),
        ("upper case", "replace", "X-DUPNEW", 5, 3, 0, ["NEW", ""], "request: set X-DUP, set x-status"),
        ("line break", "replace", "x-dupA\\0aB", 5, 3, 2, ["a", "b"], "request: set x-status"),
        (
            "invalid value is left out",
            "replace",
            "x-dupA\\01B",
            5,
            3,
            0,
            ["a", "b"],
            "request: set x-dup, set x-status",
        ),
    ];
    for (name, call, data, name_length, value_length, status, expected, note) in cases {
        let value_at = 1024 + name_length;
        let code = format!(
            "(call ${call} (i32.const 0) (i32.const 1024) (i32.const {name_length})
               (i32.const {value_at}) (i32.const {value_length}))"
        );
        let host = Host::new(&calling(data, &code));
        let mut run = host.start();
        run.request();
        assert_eq!(run.header("x-status"), format!("{status:02}"), "{name}");
        let values: Vec<_> =
            run.head.headers.get_all("x-dup").iter().map(|value| value.to_str().unwrap()).collect();
        assert_eq!(values.first(), Some(&expected[0]), "{name}");
        assert_eq!(
            values.last().filter(|_| values.len() > 1).copied().unwrap_or_default(),
            expected[1],
            "{name}"
        );
        assert_eq!(run.notes(), [note], "{name}");
    }
    for call in ["replace", "add"] {
        let bad = format!("(call ${call} (i32.const 0) {BAD} (i32.const 8) {AT} (i32.const 1))");
        check("bad name", "x-in", &bad, 6, "");
        let bad = format!("(call ${call} (i32.const 0) {AT} (i32.const 4) {AT} (i32.const -1))");
        check("bad value length", "x-in", &bad, 6, "");
        let bad = format!("(call ${call} (i32.const 2) {AT} (i32.const 4) {AT} (i32.const 1))");
        check("a map that is not at hand", "x-in", &bad, 2, "");
    }
    let remove = |at: &str, length| format!("(call $remove (i32.const 0) {at} (i32.const {length}))");
    check("remove missing", "x-none", &remove(AT, 6), 0, "");
    check("remove, bad name", "x-none", &remove(BAD, 6), 6, "");
    let host = Host::new(&calling("x-dup", &remove(AT, 5)));
    let mut run = host.start();
    run.request();
    assert_eq!(run.header("x-dup"), "");
    assert_eq!(run.notes(), ["request: removed x-dup, set x-status"]);
}

#[test]
fn whole_maps() {
    let set = |length: i64| format!("(call $set_pairs (i32.const 0) {AT} {})", number(length));
    check("bad length", "", &set(-1), 6, "");
    let host = Host::new(&calling("\\ff\\ff\\ff\\ff", &set(4)));
    let mut run = host.start();
    run.request();
    assert_eq!(
        (run.header("x-status"), run.header("x-in")),
        ("00".to_owned(), "hello".to_owned()),
        "malformed: as it was"
    );

    // Reading all pairs and writing them back changes nothing.
    let code = "(block (result i32)
        (drop (call $pairs (i32.const 0) (i32.const 16) (i32.const 20)))
        (call $set_pairs (i32.const 0) (i32.load (i32.const 16)) (i32.load (i32.const 20))))";
    let host = Host::new(&calling("", code));
    let mut run = host.start();
    assert_eq!(word(&run.request()), "continue");
    run.head.headers.remove("x-status");
    let before = request();
    assert_eq!(run.head.headers, before.headers);
    assert_eq!(
        (&run.head.method, &run.head.path, &run.head.authority),
        (&before.method, &before.path, &before.authority)
    );

    let host = Host::new(&calling("", &set(0)));
    assert_eq!(
        word(&host.start().request()),
        "reply 503 filter_removed_required_headers{:authority}:ns/test",
        "an empty map lacks what a request needs"
    );
}

#[test]
fn properties() {
    let get = |length: usize, out: &str| format!("(call $property {AT} (i32.const {length}) {out})");
    let cases = [
        ("request\\00path", "/items?x=1"),
        ("request\\00path\\00", "/items?x=1"),
        ("request\\00url_path", "/items"),
        ("request\\00query", "x=1"),
        ("request\\00host", "shop:80"),
        ("request\\00method", "GET"),
        ("request\\00scheme", "http"),
        ("request\\00protocol", "HTTP/1.1"),
        ("request\\00headers\\00x-dup", "a,b"),
        ("request\\00headers\\00:path", "/items?x=1"),
        ("source\\00address", "10.0.0.1:5000"),
        ("destination\\00address", "10.0.1.1:80"),
        ("connection\\00uri_san_peer_certificate", "spiffe://cluster.local/ns/shop/sa/web"),
        ("connection\\00tls_version", "TLSv1.3"),
        ("filter_state\\00downstream_peer\\00workload", "web-1"),
        ("filter_state\\00wasm.downstream_peer\\00name", "web-1"),
        ("wasm.downstream_peer\\00namespace", "shop"),
        ("filter_state\\00downstream_peer\\00identity", "spiffe://cluster.local/ns/shop/sa/web"),
        ("filter_state\\00io.istio.peer_principal", "spiffe://cluster.local/ns/shop/sa/web"),
        ("metadata\\00filter_metadata\\00envoy.filters.http.jwt_authn\\00payload\\00iss", "issuer"),
        ("filter_state\\00downstream_peer\\00namespace", "shop"),
        ("plugin_name", "ns.test"),
        ("plugin_root_id", "root"),
        ("xds\\00node\\00metadata\\00NAMESPACE", "mesh"),
        ("node\\00metadata\\00NAMESPACE", "mesh"),
    ];
    let length = |path: &str| path.replace("\\00", "0").len();
    for (path, value) in cases {
        check(path, path, &get(length(path), OUT), 0, value);
    }
    for (path, status) in [
        ("plugin_vm_id", 0),
        ("connection\\00mtls", 0),
        ("connection\\00id", 0),
        ("request\\00time", 0),
        ("request\\00headers", 0),
        ("request\\00duration", 1),
        ("request\\00size", 0),
        ("request\\00total_size", 0),
        ("response\\00flags", 0),
        ("response\\00size", 0),
        ("response\\00total_size", 0),
        ("response\\00headers", 0),
        ("response\\00trailers", 0),
        ("response\\00backend_latency", 1),
        ("response\\00grpc_status", 1),
        ("upstream\\00request_attempt_count", 0),
        ("upstream\\00port", 1),
        ("connection\\00termination_details", 1),
        ("metadata", 0),
        ("metadata\\00filter_metadata\\00other", 1),
        ("xds\\00node", 0),
        ("xds\\00node\\00metadata", 0),
        ("xds", 3),
        ("xds\\00listener_direction", 0),
        ("listener_direction", 0),
        ("xds\\00listener_metadata", 0),
        ("xds\\00cluster_metadata", 1),
        ("xds\\00upstream_host_metadata", 1),
        ("filter_state", 3),
        ("filter_state\\00downstream_peer", 0),
        ("filter_state\\00upstream_peer\\00name", 1),
        ("upstream_filter_state", 1),
        ("request", 3),
        ("source", 3),
        ("upstream\\00address", 1),
        ("response\\00code", 1),
        ("nonsense", 1),
        ("source\\00nonsense", 1),
        ("", 1),
    ] {
        // Bytes that are no text cannot be shown in a header, so the results go elsewhere.
        check(path, path, &get(length(path), "(i32.const 16) (i32.const 20)"), status, "");
    }
    check("bad path", "", &format!("(call $property {BAD} (i32.const 8) {OUT})"), 6, "");
    check("bad result", "plugin_name", &get(11, &format!("{BAD} (i32.const 12)")), 6, "");
    let own = format!(
        "(block (result i32) (drop (call $set_property {AT} (i32.const 3) (i32.const 1027) (i32.const 2)))
        (call $property {AT} (i32.const 3) {OUT}))"
    );
    check("own", "abcOK", &own, 0, "OK");
    check(
        "own, bad value",
        "abc",
        &format!("(call $set_property {AT} (i32.const 3) {BAD} (i32.const 8))"),
        6,
        "",
    );
    let state = format!(
        "(block (result i32) (drop (call $set_property (i32.const 1042) (i32.const 3) {AT} (i32.const 2)))
        (call $property {AT} (i32.const 21) {OUT}))"
    );
    check("own as filter state", "filter_state\\00wasm.abc.abc", &state, 0, "fi");
}

#[test]
fn metrics_and_shared_state() {
    let define = "(drop (call $define (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 16)))";
    let with = |code: &str| format!("(block (result i32) {define} {code})");
    check(
        "define",
        "hits",
        "(call $define (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 16))",
        0,
        "",
    );
    check(
        "define, bad kind",
        "hits",
        "(call $define (i32.const 3) (i32.const 1024) (i32.const 4) (i32.const 16))",
        2,
        "",
    );
    check(
        "define, bad name",
        "hits",
        "(call $define (i32.const 0) (i32.const -4) (i32.const 8) (i32.const 16))",
        6,
        "",
    );
    check(
        "define, bad result",
        "hits",
        "(call $define (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const -1))",
        6,
        "",
    );
    check("increment", "hits", &with("(call $increment (i32.load (i32.const 16)) (i64.const 2))"), 0, "");
    check(
        "increment by 0",
        "hits",
        &with("(call $increment (i32.load (i32.const 16)) (i64.const 0))"),
        2,
        "",
    );
    check("increment unknown", "hits", "(call $increment (i32.const 99) (i64.const 2))", 1, "");
    check(
        "increment, wrong kind bits",
        "hits",
        &with("(call $increment (i32.const 5) (i64.const 2))"),
        1,
        "",
    );
    check("record", "hits", &with("(call $record (i32.load (i32.const 16)) (i64.const 2))"), 0, "");
    check("get", "hits", &with("(call $metric (i32.load (i32.const 16)) (i32.const 24))"), 0, "");
    check("get, bad result", "hits", &with("(call $metric (i32.load (i32.const 16)) (i32.const -4))"), 6, "");

    let host =
        Host::new(&calling("hits", &with("(call $increment (i32.load (i32.const 16)) (i64.const 2))")));
    host.start().request();
    host.start().request();
    let text = host.engine.encode_metrics();
    assert!(text.contains("# TYPE hits counter\nhits 4\n"), "{text}");
    assert!(text.contains("cairn_wasm_instance_starts_total{plugin=\"ns/test\"} 1\n"), "{text}");

    let set = "(drop (call $set_shared (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const 2) (i32.const 0)))";
    let with = |code: &str| format!("(block (result i32) {set} {code})");
    let get = "(call $get_shared (i32.const 1024) (i32.const 3) (i32.const 8) (i32.const 12) (i32.const 16))";
    check("shared", "keyOK", &with(get), 0, "OK");
    check("shared, absent", "key", get, 1, "");
    check("shared, bad key", "key", &get.replace("1024", "-1"), 6, "");
    check("shared, bad version", "key", &with(&get.replace("(i32.const 16)", "(i32.const -4)")), 6, "");
    let again =
        "(call $set_shared (i32.const 1024) (i32.const 3) (i32.const 1027) (i32.const 2) (i32.const 77))";
    check("shared, other version", "keyOK", &with(again), 8, "");

    let register = "(drop (call $register (i32.const 1024) (i32.const 3) (i32.const 16)))";
    let with = |code: &str| format!("(block (result i32) {register} {code})");
    let dequeue = "(call $dequeue (i32.load (i32.const 16)) (i32.const 8) (i32.const 12))";
    let enqueue = "(drop (call $enqueue (i32.load (i32.const 16)) (i32.const 1027) (i32.const 2)))";
    check("queue, empty", "keyOK", &with(dequeue), 7, "");
    check("queue", "keyOK", &with(&format!("{enqueue} {dequeue}")), 0, "OK");
    check(
        "queue, bad result",
        "keyOK",
        &with(&format!("{enqueue} {}", dequeue.replace("(i32.const 8)", BAD))),
        6,
        "",
    );
    check("queue, unknown", "key", "(call $enqueue (i32.const 9) (i32.const 1024) (i32.const 3))", 1, "");
    let resolve = "(call $resolve (i32.const 0) (i32.const 0) (i32.const 1024) (i32.const 3) (i32.const 16))";
    check("resolve", "key", &with(resolve), 0, "");
    check("resolve, absent", "key", resolve, 1, "");
    let other =
        "(call $resolve (i32.const 1024) (i32.const 3) (i32.const 1024) (i32.const 3) (i32.const 16))";
    check("resolve, other vm", "key", &with(other), 1, "");
}

#[test]
fn buffers_logs_and_time() {
    let buffer = |kind: i64, start: i64, max: i64| {
        format!("(call $buffer {} {} {} {OUT})", number(kind), number(start), number(max))
    };
    check("body", "", &buffer(0, 0, 10), 0, "");
    check("callout", "", &buffer(4, 0, 10), 1, "");
    check("configuration elsewhere", "", &buffer(7, 0, 10), 1, "");
    check("no such buffer", "", &buffer(9, 0, 10), 2, "");
    check("overflow", "", &buffer(0, 1, -1), 0, "");
    check("everything", "", &buffer(0, 0, -1), 0, "");
    check("bad result", "", &buffer(0, 0, 1).replace("(i32.const 8)", BAD), 6, "");
    check("buffer status", "", "(call $buffer_status (i32.const 6) (i32.const 16) (i32.const 20))", 0, "");
    check(
        "buffer status, bad",
        "",
        "(call $buffer_status (i32.const 6) (i32.const -4) (i32.const 20))",
        6,
        "",
    );
    check(
        "set body, not in its phase",
        "",
        "(call $set_buffer (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))",
        2,
        "",
    );
    check("log", "hi", "(call $log (i32.const 2) (i32.const 1024) (i32.const 2))", 0, "");
    check("log, bad level", "hi", "(call $log (i32.const 6) (i32.const 1024) (i32.const 2))", 2, "");
    check("log, bad text", "hi", "(call $log (i32.const 2) (i32.const -1) (i32.const 2))", 6, "");
    check("log level", "", "(call $log_level (i32.const 16))", 0, "");
    check("log level, bad", "", "(call $log_level (i32.const -1))", 6, "");
    check("time", "", "(call $time (i32.const 16))", 0, "");
    check("time, bad", "", "(call $time (i32.const -1))", 6, "");
    check("status of no call", "", "(call $status (i32.const 16) (i32.const 20) (i32.const 24))", 0, "");
}

#[test]
fn wasi() {
    let random = "(call $random (i32.const 2048) (i32.const 16))";
    check("random", "", random, 0, "");
    check("random, too much", "", &random.replace("16)", "65537)"), 28, "");
    check("random, bad", "", &random.replace("2048", "-4"), 21, "");
    check("clock", "", "(call $clock (i32.const 1) (i64.const 0) (i32.const 16))", 0, "");
    check("clock, unknown", "", "(call $clock (i32.const 2) (i64.const 0) (i32.const 16))", 58, "");
    check("clock, bad", "", "(call $clock (i32.const 0) (i64.const 0) (i32.const -4))", 21, "");
    check("environment, bad", "", "(call $environ (i32.const 2048) (i32.const -4))", 21, "");
    check(
        "write",
        "\\00\\04\\00\\00\\02\\00\\00\\00",
        "(call $fd_write (i32.const 1) (i32.const 1024) (i32.const 1) (i32.const 16))",
        0,
        "",
    );
    check(
        "write, bad fd",
        "",
        "(call $fd_write (i32.const 3) (i32.const 1024) (i32.const 1) (i32.const 16))",
        8,
        "",
    );
    check(
        "write, bad buffers",
        "",
        "(call $fd_write (i32.const 1) (i32.const -4) (i32.const 1) (i32.const 16))",
        21,
        "",
    );
    check(
        "write, bad buffer",
        "\\ff\\ff\\ff\\ff\\02\\00\\00\\00",
        "(call $fd_write (i32.const 1) (i32.const 1024) (i32.const 1) (i32.const 16))",
        21,
        "",
    );
    let environ = "(block (result i32)
        (drop (call $environ_sizes (i32.const 16) (i32.const 20)))
        (drop (call $environ (i32.const 2048) (i32.const 3000)))
        (i32.store (i32.const 8) (i32.load (i32.const 2048)))
        (i32.store (i32.const 12) (i32.sub (i32.load (i32.const 20)) (i32.const 1)))
        (i32.sub (i32.load (i32.const 16)) (i32.const 1)))";
    check("environment", "", environ, 0, "KEY=value");
}

#[test]
fn what_is_not_offered_fails_softly() {
    let zeros = |count| "(i32.const 0)".repeat(count);
    check("foreign function", "abc", &format!("(call $foreign {AT} (i32.const 3) {})", zeros(4)), 1, "");
    check(
        "foreign function, bad name",
        "",
        &format!("(call $foreign {BAD} (i32.const 8) {})", zeros(4)),
        6,
        "",
    );
    check("resume a TCP stream", "", "(call $continue (i32.const 3))", 0, "");
    check("resume nonsense", "", "(call $continue (i32.const 4))", 2, "");
    check("close nonsense", "", "(call $close (i32.const 4))", 2, "");
    check("unknown context", "", "(call $effective (i32.const 999))", 2, "");
    check(
        "root context",
        "",
        "(block (result i32) (call $effective (i32.const 1)) (drop (call $effective (i32.const 2))))",
        0,
        "",
    );
    check("done, unasked", "", "(call $done)", 1, "");
}
