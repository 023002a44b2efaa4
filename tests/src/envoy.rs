//! Stock Envoy as tests start it: a process of its own with one configuration, which ends with the test.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// Runs a program while its standard input is open, so that it ends with this process, however that ends.
const LIFELINE: &str = r#"
"$@" </dev/null & program=$!
cat >/dev/null
kill -TERM "$program"; wait "$program"
"#;

/// Where Envoy is, if it is installed.
pub fn program() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/envoy");
    std::env::var_os("ENVOY").map(PathBuf::from).or(Some(installed)).filter(|file| file.exists())
}

/// How an Envoy is started.
pub struct Start<'a> {
    /// Its configuration. The admin port is any of loopback.
    pub bootstrap: &'a Value,
    /// How many listeners there must be.
    pub listeners: usize,
    /// Further flags.
    pub flags: &'a [&'a str],
    /// How long it may take.
    pub limit: Duration,
}

/// A running Envoy. It ends when dropped.
pub struct Envoy {
    process: Child,
    lifeline: Option<ChildStdin>,
    directory: TempDir,
    listeners: BTreeMap<String, SocketAddr>,
}

impl Envoy {
    /// Starts `program` and waits until it serves.
    ///
    /// # Errors
    /// When it cannot be run, or does not serve in time.
    pub async fn start(program: &Path, start: &Start<'_>) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let configuration = directory.path().join("envoy.json");
        fs::write(&configuration, serde_json::to_vec(start.bootstrap)?)?;
        let log = File::create(directory.path().join("envoy.log"))?;
        let mut process = Command::new("sh")
            .args(["-c", LIFELINE, "envoy"])
            .arg(program)
            .arg("-c")
            .arg(&configuration)
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"])
            .args(start.flags)
            .arg("--admin-address-path")
            .arg(directory.path().join("admin"))
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run sh")?;
        let lifeline = process.stdin.take();
        let mut envoy = Self { process, lifeline, directory, listeners: BTreeMap::new() };
        envoy.listeners = envoy.wait_for_listeners(start).await?;
        Ok(envoy)
    }

    /// Where a listener listens.
    ///
    /// # Errors
    /// When there is no such listener.
    pub fn address(&self, name: &str) -> Result<SocketAddr> {
        self.listeners.get(name).copied().with_context(|| format!("no listener {name}"))
    }

    /// Asks its admin port.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn admin(&self, path: &str) -> Result<String> {
        let admin: SocketAddr = fs::read_to_string(self.directory.path().join("admin"))?.trim().parse()?;
        get(admin, path).await
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.directory.path().join("envoy.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    async fn wait_for_listeners(&self, start: &Start<'_>) -> Result<BTreeMap<String, SocketAddr>> {
        let deadline = Instant::now() + start.limit;
        loop {
            match self.find_listeners(start.listeners).await {
                Ok(listeners) => return Ok(listeners),
                Err(error) if Instant::now() > deadline || self.log().contains("exiting") => {
                    return Err(error.context(format!("Envoy does not start:\n{}", self.log())));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn find_listeners(&self, wanted: usize) -> Result<BTreeMap<String, SocketAddr>> {
        let ready = self.admin("/ready").await?;
        ensure!(ready.trim() == "LIVE", "not ready: {ready}");
        let listeners: Value = serde_json::from_str(&self.admin("/listeners?format=json").await?)?;
        let list = listeners["listener_statuses"].as_array().context("no listeners")?;
        ensure!(list.len() == wanted, "not all listeners: {listeners}");
        let address = |listener: &Value| {
            let name = listener["name"].as_str().context("no name")?.to_owned();
            let at = &listener["local_address"]["socket_address"];
            let (ip, port) = (at["address"].as_str().context("no address")?, &at["port_value"]);
            Ok((name, format!("{ip}:{port}").parse()?))
        };
        list.iter().map(address).collect()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        // It ends by itself; were it to fail, there would be nothing left to do.
        let _status = self.process.wait();
    }
}

async fn get(admin: SocketAddr, path: &str) -> Result<String> {
    let stream = TcpStream::connect(admin).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let running = tokio::spawn(connection);
    let request = http::Request::get(path).header("host", "admin").body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
    running.abort();
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// A port of loopback; 0: any.
pub fn loopback(port: u16) -> Value {
    json!({ "socket_address": { "address": "127.0.0.1", "port_value": port } })
}

/// A message of this type of Envoy's extensions.
pub fn typed(kind: &str, mut fields: Value) -> Value {
    fields["@type"] = format!("type.googleapis.com/envoy.extensions.{kind}").into();
    fields
}

/// An extension with its configuration.
pub fn extension(name: &str, kind: &str, fields: Value) -> Value {
    json!({ "name": name, "typed_config": typed(kind, fields) })
}
