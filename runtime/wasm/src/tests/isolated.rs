//! Plugins of which every exchange meets an instance of its own.

use super::outside::{Mesh, answer, block_on, until};
use super::*;
use cairn_filter::{Callout, Chunk, Part, Side};

/// Starts a plugin with an instance per exchange.
fn isolated(engine: &Engine, guest: &str, plugin: &WasmPlugin) -> Result<Arc<dyn Factory>, PluginError> {
    let bytes = wat::parse_str(guest).unwrap();
    let (_, started) = engine.start_isolated("digest", &bytes, plugin)?;
    Ok(started.factory)
}

impl Host {
    fn isolated(guest: &str) -> Self {
        Self::isolated_with(guest, FailStrategy::Close, settings())
    }

    fn isolated_with(guest: &str, fail_strategy: FailStrategy, settings: EngineSettings) -> Self {
        let engine = Engine::new(settings).unwrap();
        let factory = isolated(&engine, guest, &plugin(fail_strategy, "configured")).unwrap();
        Self { engine, factory }
    }

    /// The value of a metric of the host.
    fn metric(&self, name: &str) -> u64 {
        let text = self.engine.encode_metrics();
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {text}"))
    }
}

/// Counts exchanges in a global, in memory, and in memory that it got when it was configured, and shows the sum, which is 3 in
/// the first exchange of an instance, and the configuration.
const COUNTING: &str = r#"
  (global $count (mut i32) (i32.const 0))
  (global $wide (mut i64) (i64.const 0))
  (global $float (mut f64) (f64.const 0))
  (global $page (mut i32) (i32.const 0))
  (global $fixed i32 (i32.const 40))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $buffer (i32.const 7) (i32.const 0) (local.get 1) (i32.const 3000) (i32.const 3004)))
    (global.set $page (i32.mul (memory.grow (i32.const 1)) (i32.const 65536)))
    (i32.store (i32.add (global.get $page) (i32.const 65532)) (i32.const 10))
    (global.set $wide (i64.const -5000000000))
    (global.set $float (f64.const 0.5))
    (i32.const 1))
  (func $once
    (if (i64.ne (global.get $wide) (i64.const -5000000000)) (then unreachable))
    (if (f64.ne (global.get $float) (f64.const 0.5)) (then unreachable))
    (if (i32.ne (i32.load (i32.add (global.get $page) (i32.const 65532))) (i32.const 10)) (then unreachable))
    (global.set $count (i32.add (global.get $count) (i32.const 1)))
    (i32.store (i32.const 3100) (i32.add (i32.load (i32.const 3100)) (i32.const 1)))
    (i32.store (global.get $page) (i32.add (i32.load (global.get $page)) (i32.const 1))))
  (func $sum (result i32)
    (i32.add (global.get $fixed)
      (i32.add (global.get $count) (i32.add (i32.load (i32.const 3100)) (i32.load (global.get $page))))))
  (func $show
    (i32.store (i32.const 8) (i32.load (i32.const 3000)))
    (i32.store (i32.const 12) (i32.load (i32.const 3004)))
    (call $finish (call $sum)))"#;

const ON_REQUEST: &str = r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (call $once) (call $crash_if_asked) (call $show) (i32.const 0))"#;

#[test]
fn no_exchange_sees_what_another_has_done() {
    let body = format!("{COUNTING} {ON_REQUEST}");
    let shared = Host::with(&guest("", &body), FailStrategy::Close, "configured");
    let isolated = Host::isolated(&guest("", &body));
    for (host, counts) in [(&shared, ["43", "46", "49"]), (&isolated, ["43"; 3])] {
        for count in counts {
            let mut run = host.start();
            assert_eq!(word(&run.request()), "continue");
            assert_eq!((run.header("x-status"), run.header("x-got")), (count.into(), "configured".into()));
            run.finish();
        }
    }
    assert_eq!(isolated.metric("cairn_wasm_instance_starts_total{"), 1, "it was configured once");
}

#[test]
fn one_exchange_meets_one_instance_in_all_its_phases() {
    let body = format!(
        r#"{COUNTING} {ON_REQUEST}
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (call $once) (call $show) (i32.const 0))
           (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
             (call $once)
             (if (i32.eq (call $sum) (i32.const 49)) (then
               (drop (call $replace (i32.const 2) (i32.const 520) (i32.const 5) (i32.const 1024) (i32.const 3)))))
             (i32.const 0))"#
    );
    let host = Host::isolated(&guest("yes", &body));
    for _ in 0..2 {
        // Two at a time.
        let mut runs = [host.start(), host.start()];
        for run in &mut runs {
            assert_eq!(
                word(&run.filter.request_headers(&mut run.exchange, &mut run.head, false)),
                "continue"
            );
            assert_eq!(run.header("x-status"), "43");
        }
        assert_eq!(host.metric("cairn_wasm_exchange_instances "), 2);
        for run in &mut runs {
            let mut chunk = Chunk { end_of_stream: true, ..Chunk::default() };
            let part = Part { side: Side::Request, head: None, chunk: &mut chunk };
            assert_eq!(word(&run.filter.body(&mut run.exchange, part)), "continue");
            assert_eq!(word(&run.response()), "continue");
            assert_eq!(run.response.headers["x-got"], "yes");
            run.finish();
        }
        assert_eq!(host.metric("cairn_wasm_exchange_instances "), 0);
    }
}

#[test]
fn a_crash_touches_no_other_exchange() {
    let body = format!(
        r#"{COUNTING} {ON_REQUEST}
           (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#
    );
    for (strategy, expected) in
        [(FailStrategy::Close, "reply 503 wasm_fail_stream"), (FailStrategy::Open, "continue")]
    {
        let host = Host::isolated_with(&guest("", &body), strategy, settings());
        let mut neighbour = host.start();
        assert_eq!(word(&neighbour.request()), "continue");
        // More than a shared instance is forgiven.
        for _ in 0..10 {
            let mut run = host.start().with_header("x-crash", "1");
            assert_eq!(word(&run.request()), expected);
            assert_eq!(run.notes(), ["the plugin crashed"]);
            assert_eq!(word(&run.response()), "continue", "no further part in it");
            run.finish();
        }
        assert_eq!(word(&neighbour.response()), "continue");
        neighbour.finish();
        assert_eq!(neighbour.notes().last(), Some(&"request: set x-status, set x-got"));
        let mut next = host.start();
        next.request();
        assert_eq!(next.header("x-status"), "43");
        assert_eq!((host.traps(), host.metric("cairn_wasm_failed_exchanges_total{")), (10, 10));
        assert_eq!(host.metric("cairn_wasm_instance_starts_total{"), 1, "the root's instance stays");
    }
}

#[test]
fn on_threads_of_the_plugins_own_each_exchange_has_its_instance_too() {
    let mut spec = plugin(FailStrategy::Close, "configured");
    spec.limits.own_threads = Some(2);
    let engine = Engine::new(settings()).unwrap();
    let factory = isolated(&engine, &guest("", &format!("{COUNTING} {ON_REQUEST}")), &spec).unwrap();
    let host = Host { engine, factory };
    for _ in 0..3 {
        let mut run = host.start();
        let asked = run.request();
        assert_eq!(word(&asked), "wait");
        block_on(asked);
        assert_eq!((word(&run.request()), run.header("x-status")), ("continue".into(), "43".into()));
        run.finish();
    }
    assert_eq!(host.metric("cairn_wasm_instance_starts_total{"), 2, "one for each thread");
    until("the end of them", || host.metric("cairn_wasm_exchange_instances ") == 0);
}

#[test]
fn there_are_only_so_many_instances() {
    let settings = || EngineSettings { exchange_instances_max: 2, ..settings() };
    let body = format!("{COUNTING} {ON_REQUEST}");
    for (strategy, expected) in
        [(FailStrategy::Close, "reply 503 wasm_fail_stream"), (FailStrategy::Open, "continue")]
    {
        let host = Host::isolated_with(&guest("", &body), strategy, settings());
        let mut runs = [host.start(), host.start(), host.start()];
        assert_eq!([word(&runs[0].request()), word(&runs[1].request())], ["continue", "continue"]);
        assert_eq!(word(&runs[2].request()), expected);
        assert_eq!(runs[2].notes(), ["too many exchanges have an instance of their own"]);
        assert_eq!(host.metric("cairn_wasm_exchange_instances_refused_total{"), 1);
        runs[0].finish();
        let mut next = host.start();
        next.request();
        assert_eq!(next.header("x-status"), "43");
    }
}

#[test]
fn instances_may_not_get_all_the_memory_there_is() {
    // Wants a page more in every exchange, and says 1 when it has it.
    let body = r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $finish (i32.ne (memory.grow (i32.const 1)) (i32.const -1))) (i32.const 0))"#;
    let settings = EngineSettings { exchange_memory_max: (3 * 2 + 2) << 16, ..settings() };
    let host = Host::isolated_with(&guest("", body), FailStrategy::Close, settings);
    let mut runs = [host.start(), host.start(), host.start()];
    let has = runs.each_mut().map(|run| {
        run.request();
        run.header("x-status")
    });
    assert_eq!(has, ["01", "01", "00"]);
    assert_eq!(host.metric("cairn_wasm_exchange_memory_bytes "), (3 * 2 + 2) << 16);
    let mut full = host.start();
    assert_eq!(word(&full.request()), "reply 503 wasm_fail_stream", "what it begins with is too much now");
    assert_eq!(host.metric("cairn_wasm_exchange_instances_refused_total{"), 1);
    drop((runs, full));
    assert_eq!(host.metric("cairn_wasm_exchange_memory_bytes "), 0);
    let mut next = host.start();
    next.request();
    assert_eq!(next.header("x-status"), "01");
}

#[test]
fn nothing_is_left_of_ten_thousand_exchanges() {
    let body = format!(
        r#"{COUNTING}
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
             (call $once)
             (memory.fill (i32.mul (memory.grow (i32.const 4)) (i32.const 65536)) (i32.const 7) (i32.const 262144))
             (call $show) (i32.const 0))"#
    );
    let host = Host::isolated(&guest("", &body));
    let mut resident = 0;
    for number in 0..10_000 {
        let mut run = host.start();
        run.request();
        assert_eq!(run.header("x-status"), "43");
        run.finish();
        if number == 100 {
            resident = resident_kib();
        }
    }
    assert_eq!(host.metric("cairn_wasm_exchange_instances "), 0);
    assert_eq!(host.metric("cairn_wasm_exchange_memory_bytes "), 0);
    // 256 KiB of each would be 2.5 GiB. Other tests run in the same process.
    assert!(resident_kib() < resident + (512 << 10), "{resident} KiB became {} KiB", resident_kib());
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[test]
fn what_a_snapshot_does_not_hold_is_refused() {
    for (name, body, expected) in [
        (
            "a table that changes",
            r#"(table 2 funcref) (elem declare func $f)
               (func $f (table.set (i32.const 0) (ref.func $f)))"#,
            "changes its tables itself (table.set)",
        ),
        ("a reference that changes", "(global (mut funcref) (ref.null func))", "global 1 holds a reference"),
    ] {
        let engine = Engine::new(settings()).unwrap();
        let found = isolated(&engine, &guest("", body), &plugin(FailStrategy::Close, ""));
        let PluginError::Snapshot(error) = found.err().unwrap() else { panic!("{name}") };
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
}

#[test]
fn tables_and_passive_data_are_there_in_every_instance() {
    // The first instruction of the exchange copies passive data, the second calls through the table.
    let body = r#"(table 2 funcref) (elem (i32.const 1) $seven)
        (data $later "late") (data $never "gone")
        (type $get (func (result i32)))
        (func $seven (result i32) (i32.const 7))
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
          (memory.init $never (i32.const 3000) (i32.const 0) (i32.const 4)) (data.drop $never) (i32.const 1))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (memory.init $later (i32.const 3004) (i32.const 0) (i32.const 4))
          (i32.store (i32.const 8) (i32.const 3000)) (i32.store (i32.const 12) (i32.const 8))
          (call $finish (call_indirect (type $get) (i32.const 1))) (i32.const 0))"#;
    let host = Host::isolated(&guest("", body));
    for _ in 0..2 {
        let mut run = host.start();
        run.request();
        assert_eq!((run.header("x-status"), run.header("x-got")), ("07".into(), "gonelate".into()));
    }
}

#[test]
fn a_start_function_runs_once() {
    let body = r#"(func $start (i32.store (i32.const 3000) (i32.add (i32.load (i32.const 3000)) (i32.const 1))))
        (start $start)
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (call $finish (i32.load (i32.const 3000))) (i32.const 0))"#;
    let host = Host::isolated(&guest("", body));
    let mut run = host.start();
    run.request();
    assert_eq!(run.header("x-status"), "01");
}

#[test]
fn a_guest_is_told_that_it_is_a_clone() {
    let body = r#"(func (export "cairn_on_clone") (i32.store (i32.const 3000) (i32.const 5)))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (call $finish (i32.load (i32.const 3000))) (i32.const 0))"#;
    for (host, expected) in [(Host::new(&guest("", body)), "00"), (Host::isolated(&guest("", body)), "05")] {
        let mut run = host.start();
        run.request();
        assert_eq!(run.header("x-status"), expected);
    }
}

#[test]
fn metrics_keep_their_numbers() {
    let body = r#"(global $metric (mut i32) (i32.const 0))
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
          (drop (call $define (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 16)))
          (global.set $metric (i32.load (i32.const 16))) (i32.const 1))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (call $finish (call $increment (global.get $metric) (i64.const 1))) (i32.const 0))"#;
    let host = Host::isolated(&guest("seen", body));
    (0..3).for_each(|_| assert_eq!(word(&host.start().request()), "continue"));
    assert_eq!(host.metric("seen "), 3);
}

/// A plugin whose worker and whose exchanges can ask `Mesh`.
struct Asking {
    host: Host,
    mesh: Arc<Mesh>,
    _runtime: tokio::runtime::Runtime,
}

impl Asking {
    fn new(guest: &str) -> Self {
        let mesh = Arc::new(Mesh::default());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let callout = Arc::clone(&mesh) as Arc<dyn Callout>;
        let place = crate::WorkerPlace { runtime: runtime.handle().clone(), callout };
        let pause_max = Duration::from_secs(20);
        let settings = EngineSettings { places: vec![place], pause_max, ..settings() };
        let host = Host::isolated_with(guest, FailStrategy::Close, settings);
        Self { host, mesh, _runtime: runtime }
    }

    fn start(&self) -> Run {
        let mut run = self.host.start();
        let connection = Arc::get_mut(&mut run.exchange.connection).unwrap();
        connection.callout = Arc::clone(&self.mesh) as Arc<dyn Callout>;
        run.filter = self.host.factory.start(&run.exchange).unwrap();
        run
    }
}

/// `auth`, and a serialised map of method, path and authority at 1032.
const CALL_DATA: &str = "auth.shop:80\\03\\00\\00\\00\\07\\00\\00\\00\\03\\00\\00\\00\\05\\00\\00\\00\\01\\00\\00\\00\\0a\\00\\00\\00\\04\\00\\00\\00:method\\00GET\\00:path\\00/\\00:authority\\00auth\\00";
/// Asks, and counts what it asked.
const CALL: &str = r#"(func $call (result i32)
    (call $http_call (i32.const 1024) (i32.const 12) (i32.const 1036) (i32.const 64) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0) (i32.const 60000) (i32.const 16)))"#;

#[test]
fn answers_reach_the_instance_that_asked() {
    // Each exchange asks, and answers with the status that it was told, or crashes when there is none.
    let body = format!(
        r#"{CALL}
        (global $stream (mut i32) (i32.const 0))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (global.set $stream (local.get 0))
          (if (call $call) (then unreachable)) (i32.const 1))
        (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
          (if (i32.eqz (local.get 3)) (then unreachable))
          (drop (call $effective (global.get $stream)))
          (drop (call $reply (i32.add (i32.const 400) (local.get 3)) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
            (i32.const 0) (i32.const 0) (i32.const -1))))"#
    );
    let asking = Asking::new(&guest(CALL_DATA, &body));
    let mut runs = [asking.start(), asking.start(), asking.start()];
    let mut waits = Vec::new();
    for run in &mut runs {
        let Verdict::Wait(until) = run.request() else { panic!("not paused: {:?}", run.notes()) };
        waits.push(until);
        // So that questions are in the order of exchanges.
        asking.mesh.wait(waits.len());
    }
    asking.mesh.answer(2, answer(200, "abc"));
    asking.mesh.answer(0, answer(200, "a"));
    asking.mesh.answer(1, answer(200, ""));
    let waiting = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    waits.into_iter().for_each(|wait| waiting.block_on(wait));
    let found = runs.each_mut().map(|run| word(&run.request()));
    assert_eq!(
        found,
        ["reply 401 wasm_local_response", "reply 503 wasm_fail_stream", "reply 403 wasm_local_response"]
    );
    runs.iter_mut().for_each(Run::finish);
    drop(runs);
    until("instances gone", || asking.host.metric("cairn_wasm_exchange_instances ") == 0);
    assert_eq!(asking.host.traps(), 1);
}

#[test]
fn an_instance_stays_for_the_answer_that_its_exchange_does_not_wait_for() {
    // What comes back is counted.
    let body = format!(
        r#"{CALL}
        (func (export "proxy_on_log") (param i32) (if (call $call) (then unreachable)))
        (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
          (drop (call $define (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 16)))
          (drop (call $increment (i32.load (i32.const 16)) (i64.const 1))))"#
    );
    let asking = Asking::new(&guest(CALL_DATA, &body));
    let mut run = asking.start();
    run.finish();
    drop(run);
    asking.mesh.wait(1);
    assert_eq!(asking.host.metric("cairn_wasm_exchange_instances "), 1);
    asking.mesh.answer(0, answer(200, "b"));
    until("instance gone", || asking.host.metric("cairn_wasm_exchange_instances ") == 0);
    assert_eq!((asking.host.metric("auth "), asking.host.traps()), (1, 0));
}

#[test]
fn timers_tick_where_they_were_set() {
    // The root's, set when it is configured, counts; an exchange's own lets it go on.
    let body = r#"(global $stream (mut i32) (i32.const 0))
        (func (export "proxy_on_configure") (param i32 i32) (result i32) (drop (call $tick (i32.const 10))) (i32.const 1))
        (func (export "proxy_on_tick") (param i32)
          (if (global.get $stream)
            (then (drop (call $effective (global.get $stream))) (drop (call $continue (i32.const 0))))
            (else
              (drop (call $define (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 16)))
              (drop (call $increment (i32.load (i32.const 16)) (i64.const 1))))))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
          (global.set $stream (local.get 0)) (drop (call $tick (i32.const 10))) (i32.const 1))"#;
    let asking = Asking::new(&guest("root", body));
    let mut run = asking.start();
    let Verdict::Wait(wait) = run.request() else { panic!("not paused") };
    let waiting = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    waiting.block_on(wait);
    assert_eq!(word(&run.request()), "continue");
    let ticks = || {
        let text = asking.host.engine.encode_metrics();
        text.lines().find_map(|line| line.strip_prefix("root ")?.parse().ok()).unwrap_or(0)
    };
    until("ticks of the root", || ticks() >= 2);
    assert_eq!(asking.host.traps(), 0);
}

#[test]
fn a_snapshot_that_comes_again_is_not_compiled_again() {
    let home = tempfile::tempdir().unwrap();
    let settings = || {
        let cache = crate::CacheSettings { directory: home.path().join("compiled"), bytes_max: 64 << 20 };
        EngineSettings { cache: Some(cache), ..settings() }
    };
    let files = || std::fs::read_dir(home.path().join("compiled")).unwrap().count();
    // The key; for each of two modules its code and its seal.
    let same = format!("{COUNTING} {ON_REQUEST}");
    for _ in 0..2 {
        let host = Host::isolated_with(&guest("", &same), FailStrategy::Close, settings());
        let mut run = host.start();
        run.request();
        assert_eq!((run.header("x-status"), files()), ("43".into(), 5));
    }
    // One that has asked for random bytes is not kept: there will never be another like it.
    let unique = format!(
        r#"(func (export "_initialize") (drop (call $random (i32.const 3200) (i32.const 8)))) {COUNTING} {ON_REQUEST}"#
    );
    let engine = Engine::new(settings()).unwrap();
    let bytes = wat::parse_str(guest("", &unique)).unwrap();
    engine.start_isolated("other", &bytes, &plugin(FailStrategy::Close, "")).unwrap();
    assert_eq!(files(), 7);
}
