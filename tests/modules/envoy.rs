//! Stock Envoy with one module in its chain.

use crate::ask::Version;
use crate::module::Module;
use crate::run::{Line, Logged, wait_until};
use crate::upstream::{SERVICES, Upstream};
use anyhow::{Context, Result, ensure};
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

/// How long Envoy may take to start: it compiles the module four times.
const START_MAX: Duration = Duration::from_secs(240);

/// Runs a program while its standard input is open, so that it ends with this process, however that ends.
const LIFELINE: &str = r#"
"$@" </dev/null & program=$!
cat >/dev/null
kill -TERM "$program"; wait "$program"
"#;

/// What a line of the log begins with, and where the module's own words begin.
const FORMAT: &str = "%%%l|%n|%v";
const GUEST: &str = "wasm log";

/// Where Envoy is, if it is installed.
pub fn program() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/envoy");
    std::env::var_os("ENVOY").map(PathBuf::from).or(Some(installed)).filter(|file| file.exists())
}

/// A running Envoy. It ends when dropped.
pub struct Envoy {
    process: Child,
    lifeline: Option<ChildStdin>,
    directory: TempDir,
    listeners: BTreeMap<String, SocketAddr>,
}

impl Envoy {
    /// Starts `program` with `module` in front of `upstream`.
    pub async fn start(program: &Path, module: &Module, upstream: &Upstream) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let configuration = directory.path().join("envoy.json");
        fs::write(&configuration, serde_json::to_vec(&bootstrap(module, upstream))?)?;
        let log = File::create(directory.path().join("envoy.log"))?;
        let mut process = Command::new("sh")
            .args(["-c", LIFELINE, "envoy"])
            .arg(program)
            .arg("-c")
            .arg(&configuration)
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"])
            .args(["--component-log-level", "wasm:trace", "--log-format", FORMAT])
            .arg("--admin-address-path")
            .arg(directory.path().join("admin"))
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run sh")?;
        let lifeline = process.stdin.take();
        let mut envoy = Self { process, lifeline, directory, listeners: BTreeMap::new() };
        envoy.listeners = envoy.wait_for_listeners().await?;
        Ok(envoy)
    }

    /// Where requests of this version are sent.
    pub fn address(&self, version: Version) -> Result<SocketAddr> {
        self.listeners.get(&format!("{version:?}")).copied().context("no such listener")
    }

    /// The counters and gauges that the module defined.
    pub async fn metrics(&self) -> Result<BTreeMap<String, String>> {
        let text = get(self.admin()?, "/stats?filter=^wasmcustom%5C.").await?;
        let split = |line: &str| {
            let (name, value) = line.trim_start_matches("wasmcustom.").rsplit_once(": ")?;
            Some((name.to_owned(), value.to_owned()))
        };
        Ok(text.lines().filter_map(split).collect())
    }

    /// Waits until no request is in progress, the last callback of each included.
    pub async fn idle(&self) -> Result<()> {
        let admin = self.admin()?;
        wait_until("Envoy's requests end", || async move {
            let text = get(admin, "/stats?filter=downstream_rq_active").await?;
            Ok(text.lines().all(|line| line.ends_with(": 0") || line.contains("http.admin")))
        })
        .await
    }

    fn admin(&self) -> Result<SocketAddr> {
        Ok(fs::read_to_string(self.directory.path().join("admin"))?.trim().parse()?)
    }

    async fn wait_for_listeners(&self) -> Result<BTreeMap<String, SocketAddr>> {
        let deadline = Instant::now() + START_MAX;
        loop {
            match self.listeners().await {
                Ok(listeners) => return Ok(listeners),
                Err(error) if Instant::now() > deadline || self.log().contains("|exiting") => {
                    return Err(error.context(format!("Envoy does not start:\n{}", self.log())));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn listeners(&self) -> Result<BTreeMap<String, SocketAddr>> {
        let admin = self.admin()?;
        let ready = get(admin, "/ready").await?;
        ensure!(ready.trim() == "LIVE", "not ready: {ready}");
        let listeners: Value = serde_json::from_str(&get(admin, "/listeners?format=json").await?)?;
        let list = listeners["listener_statuses"].as_array().context("no listeners")?;
        ensure!(list.len() == 2, "not all listeners: {listeners}");
        list.iter()
            .map(|listener| {
                let name = listener["name"].as_str().context("no name")?.to_owned();
                let at = &listener["local_address"]["socket_address"];
                let (ip, port) = (at["address"].as_str().context("no address")?, &at["port_value"]);
                Ok((name, format!("{ip}:{port}").parse()?))
            })
            .collect()
    }

    fn log(&self) -> String {
        let bytes = fs::read(self.directory.path().join("envoy.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Logged for Envoy {
    fn lines(&self) -> Vec<Line> {
        // A module's line may have several lines.
        self.log()
            .split("\n%")
            .filter_map(|entry| line(entry.trim_start_matches('%').trim_end_matches('\n')))
            .collect()
    }

    fn trouble(&self) -> String {
        let log = self.log();
        let telling = log.lines().filter(|line| !line.starts_with("%trace|") && !line.starts_with("%debug|"));
        telling.rev().take(10).collect::<Vec<_>>().join("\n")
    }
}

fn line(entry: &str) -> Option<Line> {
    let mut parts = entry.splitn(3, '|');
    let (level, _, text) = (parts.next()?, parts.next()?, parts.next()?);
    let text = text.strip_prefix(GUEST)?.split_once(": ")?.1;
    let level = if level == "critical" { "error" } else { level };
    Some(Line { level: level.to_owned(), text: text.to_owned() })
}

impl Drop for Envoy {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let _status = self.process.wait();
    }
}

async fn get(admin: SocketAddr, path: &str) -> Result<String> {
    let stream = TcpStream::connect(admin).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let running = tokio::spawn(connection);
    let request = http::Request::get(path).header("host", "admin").body(Empty::<bytes::Bytes>::new())?;
    let answer = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
    running.abort();
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn bootstrap(module: &Module, upstream: &Upstream) -> Value {
    let listeners = [Version::Http1, Version::Http2].map(|version| listener(version, module));
    let versions = [Version::Http1, Version::Http2];
    let mut clusters: Vec<Value> =
        versions.map(|version| cluster(&format!("{version:?}"), upstream.address, version)).into();
    for (name, address) in SERVICES.iter().zip(&upstream.services) {
        let version = if *name == "grpcbin" { Version::Http2 } else { Version::Http1 };
        clusters.push(cluster(name, *address, version));
    }
    json!({
        "admin": { "address": loopback(0) },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

fn loopback(port: u16) -> Value {
    json!({ "socket_address": { "address": "127.0.0.1", "port_value": port } })
}

fn extension(name: &str, kind: &str, mut fields: Value) -> Value {
    fields["@type"] = format!("type.googleapis.com/envoy.extensions.{kind}").into();
    json!({ "name": name, "typed_config": fields })
}

fn cluster(name: &str, address: SocketAddr, version: Version) -> Value {
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [
            { "endpoint": { "address": loopback(address.port()) } },
        ] }] },
    });
    if version == Version::Http2 {
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { "http2_protocol_options": {} },
            },
        });
    }
    cluster
}

fn listener(version: Version, module: &Module) -> Value {
    let name = format!("{version:?}");
    let filters = [
        extension("wasm", "filters.http.wasm.v3.Wasm", plugin(module)),
        extension("envoy.filters.http.router", "filters.http.router.v3.Router", json!({})),
    ];
    // Istio's routes have no timeout.
    let route = json!({ "match": { "prefix": "/" }, "route": { "cluster": name, "timeout": "0s" } });
    let manager = extension(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "modules",
            "generate_request_id": false,
            "skip_xff_append": true,
            "delayed_close_timeout": "0s",
            "http_filters": filters,
            "route_config": { "name": "all", "virtual_hosts": [
                { "name": "all", "domains": ["*"], "routes": [route] },
            ] },
        }),
    );
    json!({ "name": name, "address": loopback(0), "filter_chains": [{ "filters": [manager] }] })
}

fn plugin(module: &Module) -> Value {
    let text =
        |text: &str| json!({ "@type": "type.googleapis.com/google.protobuf.StringValue", "value": text });
    json!({ "config": {
        "name": "m",
        "root_id": module.known.root,
        "failure_policy": "FAIL_CLOSED",
        "configuration": text(&module.known.config),
        "vm_config": {
            "runtime": "envoy.wasm.runtime.v8",
            "code": { "local": { "filename": module.file } },
        },
    } })
}
