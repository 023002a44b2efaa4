//! Programs of others that tests talk to, which `tests/peers` installs: Python with the official packages.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a collector may take to start, on a machine that is busy with other tests.
const START_MAX: Duration = Duration::from_secs(30);
/// How long telemetry may take to arrive: it is sent in batches.
const ARRIVAL_MAX: Duration = Duration::from_secs(20);

/// Python with the packages; `None`, having said why, where they are not installed.
fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/python/bin/python");
    let imports = "import grpc, prometheus_client, opentelemetry.proto.trace.v1.trace_pb2, envoy.data.accesslog.v3.accesslog_pb2";
    let works = Command::new(&python).args(["-c", imports]).stderr(Stdio::null()).status();
    if works.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    cairn_tests::skipped("no Python packages in target/peers; `tests/peers` installs them");
    None
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("it/peers").join(name)
}

/// The samples of a scrape as Prometheus' own parser reads them; `None` where it is not installed.
pub fn scrape(text: &str) -> Result<Option<Vec<Value>>> {
    let Some(python) = python() else { return Ok(None) };
    let mut parser = Command::new(python)
        .arg(script("scrape.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    parser.stdin.take().context("no pipe")?.write_all(text.as_bytes())?;
    let output = parser.wait_with_output()?;
    ensure!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
    Ok(Some(serde_json::from_slice(&output.stdout)?))
}

/// A collector of everything. It ends when dropped.
pub struct Collector {
    process: Child,
    /// Its port of gRPC.
    pub grpc: u16,
    /// Its port of HTTP.
    pub http: u16,
    arrived: Arc<Mutex<Vec<Value>>>,
}

impl Collector {
    /// Starts one; `None` where it is not installed.
    pub fn start() -> Result<Option<Self>> {
        let Some(python) = python() else { return Ok(None) };
        let mut process = Command::new(python)
            .arg(script("collector.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = process.stdout.take().context("no pipe")?;
        let (ports, said) = std::sync::mpsc::channel();
        let arrived = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&arrived);
        std::thread::spawn(move || listen(output, &ports, &into));
        let Ok((grpc, http)) = said.recv_timeout(START_MAX) else {
            process.kill()?;
            process.wait()?;
            anyhow::bail!("the collector did not start");
        };
        Ok(Some(Self { process, grpc, http, arrived }))
    }

    /// What has arrived of this kind.
    pub fn all(&self, kind: &str) -> Vec<Value> {
        let arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        arrived.iter().filter(|value| value["kind"] == kind).cloned().collect()
    }

    /// Waits for something of this kind.
    pub async fn wait(&self, kind: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + ARRIVAL_MAX;
        loop {
            if let Some(found) = self.all(kind).into_iter().find(&is_it) {
                return Ok(found);
            }
            ensure!(Instant::now() < deadline, "no such {kind} among {:#?}", self.all(kind));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn listen(output: ChildStdout, ports: &std::sync::mpsc::Sender<(u16, u16)>, arrived: &Mutex<Vec<Value>>) {
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        if let Some((grpc, http)) = line.strip_prefix("ports ").and_then(|rest| rest.split_once(' ')) {
            if let (Ok(grpc), Ok(http)) = (grpc.parse(), http.parse()) {
                // Whoever started it may have given up.
                let _gone = ports.send((grpc, http));
            }
        } else if let Ok(value) = serde_json::from_str(&line) {
            arrived.lock().unwrap_or_else(PoisonError::into_inner).push(value);
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        // It ends when its input does; were that to fail, there would be nothing left to do.
        drop(self.process.stdin.take());
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
