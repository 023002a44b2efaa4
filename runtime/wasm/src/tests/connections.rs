//! Plugins of type NETWORK: what a guest sees of connections that carry no HTTP, and what becomes of them when it fails.
//! The order of callbacks, and what each is told, is compared with Envoy in `tests/modules/connections.rs`.

use super::outside::{Mesh, answer, until};
use super::*;
use bytes::Bytes;
use cairn_filter::{Callout, Closer, ConnectionFilter, Passage, Side, Wakers};
use cairn_mesh::PluginKind;

/// A plugin for connections, and one of them.
struct Line {
    engine: Engine,
    factory: Arc<dyn Factory>,
    mesh: Arc<Mesh>,
    _runtime: tokio::runtime::Runtime,
}

/// One connection with the plugin.
struct Open {
    filter: Box<dyn ConnectionFilter>,
    exchange: Exchange,
    wakers: Wakers,
}

impl Line {
    fn new(body: &str, fail_strategy: FailStrategy) -> Self {
        Self::with(body, fail_strategy, None)
    }

    /// The same with the plugin on one thread of its own, where it may take two seconds: longer than a test takes to see that.
    fn away(body: &str, fail_strategy: FailStrategy) -> Self {
        Self::with(body, fail_strategy, Some(1))
    }

    fn with(body: &str, fail_strategy: FailStrategy, own_threads: Option<usize>) -> Self {
        let mesh = Arc::new(Mesh::default());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let callout = Arc::clone(&mesh) as Arc<dyn Callout>;
        let place = crate::WorkerPlace { runtime: runtime.handle().clone(), callout };
        let engine = Engine::new(EngineSettings { places: vec![place], ..settings() }).unwrap();
        let mut plugin = WasmPlugin { kind: PluginKind::Network, ..plugin(fail_strategy, "") };
        plugin.limits.own_threads = own_threads;
        plugin.limits.deadline = own_threads.map(|_| Duration::from_secs(2));
        let factory = load(&engine, &guest(DATA, body), &plugin).unwrap();
        Self { engine, factory, mesh, _runtime: runtime }
    }

    fn open(&self) -> Open {
        let mut exchange = exchange();
        Arc::get_mut(&mut exchange.connection).unwrap().callout = Arc::clone(&self.mesh) as Arc<dyn Callout>;
        exchange.protocol = Protocol::Tcp;
        let wakers = Wakers::default();
        let filter = self.factory.connect(&exchange, &wakers).unwrap();
        Open { filter, exchange, wakers }
    }

    fn counts(&self, line: &str) -> bool {
        self.engine.encode_metrics().contains(line)
    }
}

impl Open {
    fn opened(&mut self) -> String {
        said(self.filter.opened(&mut self.exchange))
    }

    fn data(&mut self, side: Side, text: &'static str) -> String {
        said(self.filter.data(&mut self.exchange, side, Bytes::from_static(text.as_bytes()), false))
    }

    fn end(&mut self, side: Side, text: &'static str) -> String {
        said(self.filter.data(&mut self.exchange, side, Bytes::from_static(text.as_bytes()), true))
    }

    fn woken(&mut self, side: Side) -> String {
        said(self.filter.woken(&mut self.exchange, side))
    }

    /// Waits until the connection is woken.
    fn wait(&self, side: Side) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let woken = self.wakers.of(side).notified();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), woken).await.unwrap() });
    }

    /// Waits until this becomes of a side.
    fn until(&mut self, side: Side, expected: &str) {
        while self.after(side) != expected {}
    }

    /// What becomes of a side when it is woken the next time.
    fn after(&mut self, side: Side) -> String {
        self.wait(side);
        self.woken(side)
    }

    fn closed(&mut self) {
        self.filter.closed(&mut self.exchange, Closer::Client);
    }
}

fn said(passage: Passage) -> String {
    match passage {
        Passage::Pass(bytes) => format!("pass {}", String::from_utf8_lossy(&bytes)),
        Passage::Hold { kept, .. } => format!("hold {kept}"),
        Passage::Close(reason) => format!("close: {reason}"),
    }
}

/// What guests of these tests pass: a metric, a service, a map of a request.
const DATA: &str = "callsauth.shop:80\\03\\00\\00\\00\\07\\00\\00\\00\\03\\00\\00\\00\\05\\00\\00\\00\\01\\00\\00\\00\
    \\0a\\00\\00\\00\\01\\00\\00\\00:method\\00GET\\00:path\\00/\\00:authority\\00a\\00";

/// Counts `$count`s in the metric `calls`.
const COUNTING: &str = r#"
  (global $metric (mut i32) (i32.const 0))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $define (i32.const 0) (i32.const 1024) (i32.const 5) (i32.const 40)))
    (global.set $metric (i32.load (i32.const 40))) (i32.const 1))
  (func $count (drop (call $increment (global.get $metric) (i64.const 1))))"#;

#[test]
fn a_module_without_callbacks_for_connections_lets_them_pass() {
    let line = Line::new("", FailStrategy::Close);
    let mut open = line.open();
    assert_eq!(open.opened(), "pass ");
    assert_eq!(open.data(Side::Request, "hello"), "pass hello");
    assert_eq!(open.data(Side::Response, "there"), "pass there");
    open.closed();
    assert!(
        line.factory.phases().is_empty() && line.factory.start(&exchange()).is_none(),
        "no exchange meets it"
    );
}

#[test]
fn what_is_held_is_shown_with_what_follows_and_let_go_by_what_resumes_it() {
    // Holds what the client sends until it has three bytes; and everything of the server's until the client's third.
    let line = Line::new(
        r#"(global $go (mut i32) (i32.const 0))
           (func (export "proxy_on_downstream_data") (param $context i32) (param $size i32) (param i32) (result i32)
             (if (i32.lt_u (local.get $size) (i32.const 3)) (then (return (i32.const 1))))
             (drop (call $set_buffer (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 1024) (i32.const 1)))
             (drop (call $continue (i32.const 3))) (i32.const 0))
           (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32) (i32.const 1))"#,
        FailStrategy::Close,
    );
    let mut open = line.open();
    open.opened();
    assert_eq!(open.data(Side::Response, "ready"), "hold 5");
    assert_eq!(open.woken(Side::Response), "hold 5", "nobody let it go");
    assert_eq!(open.data(Side::Request, "ab"), "hold 2");
    assert_eq!(open.data(Side::Request, "c"), "pass cbc", "the first was replaced");
    assert_eq!(open.woken(Side::Response), "pass ready");
    assert_eq!(open.woken(Side::Response), "pass ", "once");
    assert_eq!(open.data(Side::Response, "more"), "hold 4");
    open.closed();
}

#[test]
fn whatever_is_no_action_holds() {
    let line = Line::new(
        r#"(func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32) (i32.const 7))
           (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32) (i32.const -1))"#,
        FailStrategy::Close,
    );
    let mut open = line.open();
    assert_eq!(
        (open.data(Side::Request, "a"), open.data(Side::Response, "b")),
        ("hold 1".into(), "hold 1".into())
    );
}

#[test]
fn closing_a_stream_ends_the_connection_whichever_it_is() {
    for stream in [2, 3] {
        let body = format!(
            r#"(func (export "proxy_on_new_connection") (param i32) (result i32)
                 (drop (call $close (i32.const {stream}))) (i32.const 0))"#
        );
        let mut open = Line::new(&body, FailStrategy::Open).open();
        assert_eq!(open.opened(), "close: plugin ns/test closed the connection", "stream {stream}");
        open.closed();
    }
    let body = r#"(func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32)
                    (drop (call $close (i32.const 0))) (drop (call $reply (i32.const 403) (i32.const 0) (i32.const 0)
                      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1))) (i32.const 0))"#;
    let line = Line::new(body, FailStrategy::Close);
    assert_eq!(line.open().data(Side::Request, "x"), "pass x", "a connection has no request");
}

#[test]
fn a_connection_waits_for_the_answer_of_another_service() {
    let line = Line::new(
        r#"(func (export "proxy_on_new_connection") (param i32) (result i32)
             (global.set $last (local.get 0))
             (call $http_call (i32.const 1029) (i32.const 12) (i32.const 1041) (i32.const 61)
               (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 40))
             (if (result i32) (then unreachable) (else (i32.const 1))))
           (global $last (mut i32) (i32.const 0))
           (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
             (if (call $effective (global.get $last)) (then unreachable))
             ;; What is known of the connection is known here too.
             (if (call $property (i32.const 1200) (i32.const 14) (i32.const 48) (i32.const 52)) (then unreachable))
             (drop (call $continue (i32.const 2))))
           (data (i32.const 1200) "source\00address")"#,
        FailStrategy::Close,
    );
    let mut open = line.open();
    assert_eq!(open.opened(), "hold 0");
    line.mesh.wait(1);
    assert_eq!(open.opened(), "hold 0");
    line.mesh.answer(0, answer(200, "yes"));
    let woken = open.wakers.of(Side::Request).notified();
    line._runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), woken).await.unwrap() });
    until("the connection goes on", || open.opened() == "pass ");
}

#[test]
fn a_plugin_that_crashes_ends_the_connection_or_takes_no_further_part_in_it() {
    let body = r#"(func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32) (i32.const 1))
                  (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32) unreachable)"#;
    for (strategy, shown, after, held) in [
        (FailStrategy::Close, "close: plugin ns/test: the plugin crashed", "pass more", "pass held"),
        (FailStrategy::Open, "pass hello", "pass more", "pass held"),
    ] {
        let line = Line::new(body, strategy);
        let mut open = line.open();
        open.opened();
        assert_eq!(open.data(Side::Response, "held"), "hold 4");
        assert_eq!(open.data(Side::Request, "hello"), shown, "{strategy:?}");
        assert_eq!(open.woken(Side::Response), held, "{strategy:?}: it holds nothing any more");
        assert_eq!(open.data(Side::Request, "more"), after);
        open.closed();
        assert!(line.counts("cairn_wasm_traps_total{plugin=\"ns/test\"} 1\n"), "{strategy:?}");
        // The next one meets a new instance.
        let mut next = line.open();
        assert_eq!(next.data(Side::Response, "held"), "hold 4", "{strategy:?}");
    }
}

#[test]
fn a_plugin_that_holds_on_for_too_long_has_failed() {
    let body = r#"(func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32) (i32.const 1))"#;
    for (strategy, expected) in [
        (FailStrategy::Close, "close: plugin ns/test: it held the connection for too long"),
        (FailStrategy::Open, "pass hello"),
    ] {
        let mut open = Line::new(body, strategy).open();
        assert_eq!(open.data(Side::Request, "hello"), "hold 5");
        assert_eq!(said(open.filter.overdue(&mut open.exchange, Side::Request)), expected);
    }
}

#[test]
fn every_context_of_a_connection_ends_however_that_ends() {
    let deleting = format!(
        "{COUNTING} (func (export \"proxy_on_delete\") (param i32) (if (i32.gt_u (local.get 0) (i32.const 1)) (then (call $count))))"
    );
    let line = Line::new(&deleting, FailStrategy::Close);
    let mut closed = line.open();
    closed.opened();
    closed.closed();
    drop(closed);
    let mut dropped = line.open();
    dropped.opened();
    drop(dropped);
    drop(line.open());
    assert!(line.counts("calls 2\n"), "{}", line.engine.encode_metrics());
}

#[test]
fn on_threads_of_its_own_a_plugin_sees_and_does_the_same() {
    // As above: what the server sends waits for the client's third byte.
    let line = Line::away(
        r#"(func (export "proxy_on_downstream_data") (param $context i32) (param $size i32) (param i32) (result i32)
             (if (i32.lt_u (local.get $size) (i32.const 3)) (then (return (i32.const 1))))
             (drop (call $set_buffer (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 1024) (i32.const 1)))
             (drop (call $continue (i32.const 3))) (i32.const 0))
           (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32) (i32.const 1))"#,
        FailStrategy::Close,
    );
    let mut open = line.open();
    assert_eq!(open.opened(), "hold 0", "not here");
    open.wait(Side::Request);
    assert_eq!(open.opened(), "pass ");
    // While the guest is called, how much of it is still here is its threads' to say.
    assert!(open.data(Side::Response, "ready").starts_with("hold "));
    open.until(Side::Response, "hold 5");
    assert!(open.data(Side::Request, "ab").starts_with("hold "));
    open.until(Side::Request, "hold 2");
    assert!(open.data(Side::Request, "c").starts_with("hold "));
    // The first is replaced.
    open.until(Side::Request, "pass cbc");
    open.until(Side::Response, "pass ready");
    open.closed();
}

#[test]
fn what_comes_while_the_guest_is_called_follows_in_its_order_and_the_end_last() {
    let line = Line::away(
        r#"(func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32) (i32.const 0))"#,
        FailStrategy::Close,
    );
    for pieces in 1..20 {
        let mut open = line.open();
        let mut passed = String::new();
        let mut take = |said: String| {
            let is_over = !said.starts_with("hold");
            passed.push_str(said.strip_prefix("pass ").unwrap_or_default());
            is_over
        };
        for _ in 1..pieces {
            take(open.data(Side::Request, "ab"));
        }
        // Whatever passes once the end was shown passes with the end: it must be all.
        let mut is_over = take(open.end(Side::Request, "cd"));
        while !is_over {
            is_over = take(open.after(Side::Request));
        }
        assert_eq!(passed, format!("{}cd", "ab".repeat(pieces - 1)));
        open.closed();
    }
}

/// Spins over what the client sends, and lets pass what the server does.
const SPINS: &str = r#"
    (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32) (loop (br 0)) (i32.const 0))
    (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32) (i32.const 0))"#;

#[test]
fn the_worker_goes_on_while_a_plugin_of_connections_spins() {
    for (strategy, shown, after) in [
        (
            FailStrategy::Close,
            "close: plugin ns/test: the plugin crashed",
            "close: plugin ns/test: the plugin crashed in another connection",
        ),
        (FailStrategy::Open, "pass hello", "pass there"),
    ] {
        let line = Line::away(SPINS, strategy);
        let (mut spins, mut waits, mut ends) = (line.open(), line.open(), line.open());
        for open in [&mut waits, &mut ends] {
            assert!(open.data(Side::Response, "here").starts_with("hold "));
            open.until(Side::Response, "pass here");
        }
        assert!(spins.data(Side::Request, "hello").starts_with("hold "));
        // These would wait for the guest if they met it here.
        assert!(waits.data(Side::Response, "there").starts_with("hold "));
        assert!(waits.woken(Side::Response).starts_with("hold "));
        ends.closed();
        drop(ends);
        assert!(!line.counts("cairn_wasm_traps_total{plugin=\"ns/test\"} 1\n"), "it spins on: {strategy:?}");
        spins.until(Side::Request, shown);
        assert!(line.counts("cairn_wasm_traps_total{plugin=\"ns/test\"} 1\n"), "{strategy:?}");
        // Its turn came too late, or to an instance that knows it no more.
        let late = ["close: plugin ns/test: the plugin's own threads had no time for it", after];
        let mut told = waits.after(Side::Response);
        while told.starts_with("hold") {
            told = waits.after(Side::Response);
        }
        assert!(late.contains(&&*told), "{strategy:?}: {told}");
    }
}

#[test]
fn a_timer_lets_go_of_a_connection_on_threads_of_its_own() {
    // Holds what the client sends, and lets go of it from its timer.
    let line = Line::away(
        r#"(global $stream (mut i32) (i32.const 0))
           (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32)
             (global.set $stream (local.get 0)) (drop (call $tick (i32.const 10))) (i32.const 1))
           (func (export "proxy_on_tick") (param i32)
             (drop (call $effective (global.get $stream))) (drop (call $continue (i32.const 2))))"#,
        FailStrategy::Close,
    );
    for _ in 0..10 {
        let mut open = line.open();
        let mut told = open.data(Side::Request, "hello");
        while told.starts_with("hold ") {
            told = open.after(Side::Request);
        }
        assert_eq!(told, "pass hello");
        open.closed();
    }
}

#[test]
fn a_connection_moves_to_threads_of_its_own_with_its_plugin() {
    let line = Line::new(SPINS, FailStrategy::Open);
    let mut open = line.open();
    assert_eq!(
        (open.opened(), open.data(Side::Response, "one")),
        ("pass ".into(), "pass one".into()),
        "here"
    );
    assert_eq!(line.open().data(Side::Request, "x"), "pass x", "here, and too slow");
    assert!(line.counts("cairn_wasm_own_threads{plugin=\"ns/test\"} 1\n"));
    // How much of it is still here is the threads' to say.
    assert!(open.data(Side::Response, "two").starts_with("hold "), "there");
    // Without the guest, whose context went with its instance.
    open.until(Side::Response, "pass two");
    let mut next = line.open();
    assert!(next.data(Side::Response, "three").starts_with("hold "));
    next.until(Side::Response, "pass three");
    next.closed();
}

#[test]
fn every_context_ends_on_threads_of_its_own_too() {
    let deleting = format!(
        "{COUNTING} (func (export \"proxy_on_delete\") (param i32) (if (i32.gt_u (local.get 0) (i32.const 1)) (then (call $count))))
         (func (export \"proxy_on_new_connection\") (param i32) (result i32) (i32.const 0))"
    );
    let line = Line::away(&deleting, FailStrategy::Close);
    let mut closed = line.open();
    closed.opened();
    closed.wait(Side::Request);
    closed.closed();
    drop(closed);
    let mut dropped = line.open();
    dropped.opened();
    dropped.wait(Side::Request);
    drop(dropped);
    drop(line.open());
    until("both contexts deleted", || line.counts("calls 2\n"));
}
