//! Hostile plugins: the requests of other services, measured with and without one at work.

use crate::client::{Client, Who, admin};
use crate::edits::SMALL;
use crate::harness::{Mesh, SOON};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

/// Something bad that a plugin does to each request, and the bound that it is known by then.
struct Kind {
    name: &'static str,
    code: &'static str,
    /// Annotations of the plugin.
    annotations: &'static str,
    /// The key of its count on `/plugins`, and what must not be 0 there.
    told: fn(&Value) -> &Value,
}

const KINDS: [Kind; 8] = [
    Kind {
        name: "infinite loop",
        code: "(loop (br 0))",
        annotations: "",
        told: |health| &health["limitHits"]["deadline"],
    },
    Kind {
        name: "unbounded allocation",
        code: "(loop (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable)) (br 0))",
        annotations: "cairn.dev/memory: 64Mi",
        told: |health| &health["limitHits"]["memory"],
    },
    Kind {
        name: "stack overflow",
        code: "(drop (call $recurse))",
        annotations: "",
        told: |health| &health["limitHits"]["stack"],
    },
    Kind { name: "trap", code: "unreachable", annotations: "", told: |health| &health["crashes"] },
    Kind {
        name: "1,000 calls",
        code: r#"(local $left i32) (local.set $left (i32.const 1001))
          (loop
            (drop (call $http_call (i32.const 1024) (i32.const 13) (i32.const 1280) (i32.const 71)
              (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 3000)))
            (local.set $left (i32.sub (local.get $left) (i32.const 1)))
            (br_if 0 (local.get $left)))"#,
        annotations: "",
        told: |health| &health["limitHits"]["calls"],
    },
    Kind {
        name: "log flood",
        code: r#"(local $left i32) (local.set $left (i32.const 100000))
          (loop
            (drop (call $log (i32.const 3) (i32.const 1024) (i32.const 100)))
            (local.set $left (i32.sub (local.get $left) (i32.const 1)))
            (br_if 0 (local.get $left)))"#,
        annotations: "",
        told: |health| &health["logLinesDropped"],
    },
    Kind {
        name: "endless host calls",
        code: "(loop (drop (call $time (i32.const 3000))) (br 0))",
        annotations: "",
        told: |health| &health["crashes"],
    },
    // It does nothing wrong but to be heavy, as its operator knows.
    Kind {
        name: "60 ms of work each",
        code: r#"(local $end i64)
          (drop (call $time (i32.const 3000)))
          (local.set $end (i64.add (i64.load (i32.const 3000)) (i64.const 60000000)))
          (loop
            (drop (call $time (i32.const 3000)))
            (br_if 0 (i64.lt_u (i64.load (i32.const 3000)) (local.get $end))))"#,
        annotations: "cairn.dev/own-threads: '1'",
        told: |health| &health["ownThreads"],
    },
];

/// A header map of `:method`, `:path` and `:authority`, as a string of the text format.
fn call_headers() -> String {
    let pairs = [(":method", "GET"), (":path", "/"), (":authority", "own.example")];
    let mut bytes = (pairs.len() as u32).to_le_bytes().to_vec();
    for (name, value) in pairs {
        bytes.extend_from_slice(&(name.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(value.len() as u32).to_le_bytes());
    }
    for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    }
    bytes.iter().map(|byte| format!("\\{byte:02x}")).collect()
}

/// Does something to each request, and answers it.
fn module(code: &str) -> Vec<u8> {
    let headers = call_headers();
    let text = format!(
        r#"(module
          (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
          (import "env" "proxy_get_current_time_nanoseconds" (func $time (param i32) (result i32)))
          (import "env" "proxy_http_call" (func $http_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
          (import "env" "proxy_send_local_response"
            (func $reply (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 2)
          (global $free (mut i32) (i32.const 65536))
          (data (i32.const 1024) "own.shop:8000")
          (data (i32.const 1280) "{headers}")
          (func (export "proxy_abi_version_0_2_1"))
          (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
            (local $at i32)
            (local.set $at (global.get $free))
            (global.set $free (i32.add (global.get $free) (local.get $size)))
            (local.get $at))
          (func $recurse (result i32) (i32.add (call $recurse) (i32.const 1)))
          (func $boom {code})
          (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32))
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (call $boom)
            (drop (call $reply (i32.const 200) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
              (i32.const 0) (i32.const 0) (i32.const -1)))
            (i32.const 1)))"#
    );
    wat::parse_str(text).unwrap()
}

/// A calm service with a calm plugin, and another with a hostile one.
struct Chaos {
    mesh: Mesh,
    calm: SocketAddr,
    hostile: SocketAddr,
    web: Who,
    _silent: JoinHandle<()>,
    _home: tempfile::TempDir,
}

impl Chaos {
    async fn start(kind: &Kind) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let path = home.path().join("hostile.wasm");
        std::fs::write(&path, module(kind.code))?;
        let plugins = format!(
            "apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {{ name: calm, namespace: shop }}
spec:
  targetRefs: [{{ group: '', kind: Service, name: catalog }}]
  url: file://PLUGINS/tag.wasm
---
apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {{ name: hostile, namespace: shop, annotations: {{ {} }} }}
spec:
  targetRefs: [{{ group: '', kind: Service, name: own }}]
  url: file://{}
",
            kind.annotations,
            path.display()
        );
        let mesh = Mesh::start(&[SMALL, ("plugins.yaml", &plugins)], &[])?;
        // What the hostile plugin asks takes connections and never answers.
        let listener = TcpListener::bind(mesh.twin("shop/own", 9000)?).await?;
        let silent = tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                open.push(stream);
            }
        });
        Ok(Self {
            calm: mesh.service("shop/catalog", 8000)?,
            hostile: mesh.service("shop/own", 8000)?,
            web: Who::Pod(mesh.pod("shop/web")?),
            mesh,
            _silent: silent,
            _home: home,
        })
    }

    /// What is told of the hostile plugin.
    async fn health(&self) -> Result<Value> {
        let plugins = admin(self.mesh.waypoint("shop/gate")?, "/plugins").await?;
        let plugin = plugins.as_array().into_iter().flatten().find(|plugin| plugin["name"] == "shop/hostile");
        Ok(plugin.context("it is not there")?["health"].clone())
    }

    /// Sends requests to the hostile plugin's service while `on` says so, until the task ends.
    async fn provoke(&self, on: &Arc<AtomicBool>) -> Result<Tasks> {
        let mut tasks = Tasks::default();
        for _ in 0..2 {
            let (on, mut client) = (Arc::clone(on), Client::open(self.web, self.hostile).await?);
            let (who, to) = (self.web, self.hostile);
            tasks.0.push(tokio::spawn(async move {
                let mut pace = tokio::time::interval(Duration::from_millis(20));
                pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    pace.tick().await;
                    if on.load(Ordering::Relaxed) && client.get("/").await.is_err() {
                        client = Client::open(who, to).await?;
                    }
                }
            }));
        }
        Ok(tasks)
    }

    /// Sends a bounded stream of requests to the calm service, and keeps how long each took.
    async fn measure(&self, samples: &Arc<Mutex<Vec<Duration>>>) -> Result<Tasks> {
        let mut tasks = Tasks::default();
        for _ in 0..2 {
            let (samples, mut client) = (Arc::clone(samples), Client::open(self.web, self.calm).await?);
            tasks.0.push(tokio::spawn(async move {
                let mut pace = tokio::time::interval(Duration::from_millis(5));
                pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    pace.tick().await;
                    let begun = Instant::now();
                    let answer = client.get("/").await?;
                    let taken = begun.elapsed();
                    ensure!(answer.status == 200, "{}: {}", answer.status, answer.body);
                    if let Ok(mut samples) = samples.lock() {
                        samples.push(taken);
                    }
                }
            }));
        }
        Ok(tasks)
    }
}

/// Tasks that end when this is dropped.
#[derive(Default)]
struct Tasks(Vec<JoinHandle<Result<()>>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

impl Tasks {
    /// They go on until they are ended: one that has ended by itself failed.
    async fn check(&mut self) -> Result<()> {
        for task in &mut self.0 {
            if task.is_finished() {
                task.await??;
            }
        }
        Ok(())
    }
}

/// Half, and all but one of a hundred, took no longer than this; and how many there were.
fn quantiles(samples: &Mutex<Vec<Duration>>) -> (Duration, Duration, usize) {
    let mut samples = samples.lock().map(|mut samples| std::mem::take(&mut *samples)).unwrap_or_default();
    samples.sort();
    let at = |part: usize| samples.get(samples.len() * part / 100).copied().unwrap_or_default();
    (at(50), at(99), samples.len())
}

fn median(mut values: Vec<Duration>) -> Duration {
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Measures the calm service in pairs of windows, without and with chaos; the medians of p99 of both.
async fn compare(kind: &Kind, pairs: usize, window: Duration) -> Result<(Duration, Duration)> {
    let chaos = Chaos::start(kind).await?;
    let (on, samples) = (Arc::new(AtomicBool::new(true)), Arc::default());
    let _provoking = chaos.provoke(&on).await?;
    let mut measuring = chaos.measure(&samples).await?;
    // Until it is known for what it is, no longer than its deadline is promised.
    let deadline = Instant::now() + SOON;
    while (kind.told)(&chaos.health().await?).as_u64().unwrap_or_default() == 0 {
        measuring.check().await?;
        ensure!(Instant::now() < deadline, "{}: {:#}", kind.name, chaos.health().await?);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        for (is_on, all) in [(false, &mut without), (true, &mut with)] {
            on.store(is_on, Ordering::Relaxed);
            // What was under way ends.
            tokio::time::sleep(Duration::from_millis(300)).await;
            quantiles(&samples);
            tokio::time::sleep(window).await;
            measuring.check().await?;
            let (half, p99, count) = quantiles(&samples);
            ensure!(count > 0, "nothing was answered");
            println!(
                "{:22} {:8} p50 {half:>9.2?}  p99 {p99:>9.2?}  of {count}",
                kind.name,
                if is_on { "chaos" } else { "calm" }
            );
            all.push(p99);
        }
    }
    let health = chaos.health().await?;
    let log = chaos.mesh.log("waypoint")?;
    if health["crashes"].as_u64().unwrap_or_default() > 0 {
        // The innermost functions are named: of a stack that is full, all are the one that calls itself.
        let is_named = log.contains("boom") || log.contains("recurse");
        ensure!(log.contains("the plugin crashed") && is_named, "its function is not in the log");
    }
    if health["limitHits"]["deadline"].is_u64() {
        ensure!(
            health["ownThreads"].as_u64() > Some(0),
            "it missed its deadline and did not move: {health:#}"
        );
        ensure!(
            log.contains("from now on it runs on threads of its own"),
            "the log does not say that it moved"
        );
    }
    Ok((median(without), median(with)))
}

#[tokio::test]
async fn requests_of_other_services_do_not_wait_for_a_plugin_that_loops() -> Result<()> {
    let [kind, ..] = &KINDS;
    // Each calm request must succeed. How long it took depends on what else this machine does.
    let (without, with) = compare(kind, 1, Duration::from_secs(1)).await?;
    println!("p99 without chaos {without:?}, with {with:?}");
    Ok(())
}

/// By hand, on a machine that does nothing else:
/// `cargo test -p cairn-tests --test it -- --ignored --nocapture chaos::`.
#[tokio::test]
#[ignore = "takes minutes, and a quiet machine"]
async fn p99_stays_within_twice_that_without_chaos() -> Result<()> {
    let mut wrong = Vec::new();
    for kind in &KINDS {
        let (without, with) = compare(kind, 5, Duration::from_secs(4)).await?;
        let ratio = with.as_secs_f64() / without.as_secs_f64();
        println!(
            "{:22} median p99: {without:.2?} without chaos, {with:.2?} with: {ratio:.2} times",
            kind.name
        );
        if ratio > 2.0 {
            wrong.push(format!("{}: {ratio:.2} times", kind.name));
        }
    }
    ensure!(wrong.is_empty(), "{wrong:?}");
    Ok(())
}
