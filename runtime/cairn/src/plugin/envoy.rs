//! The same scenario through an Envoy, to see that a plugin does there what it does here.

use super::module::Files;
use super::server::Known;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// How long an Envoy may take to compile a plugin and listen.
const START_MAX: Duration = Duration::from_secs(60);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// A running Envoy. It ends when this is dropped.
pub struct Envoy {
    /// Where it listens.
    pub address: SocketAddr,
    _process: Child,
    _folder: TempDir,
}

impl Envoy {
    /// Starts `binary` with the plugin of `files` in front of `upstream`.
    ///
    /// # Errors
    /// When it does not start; says what it logged.
    pub async fn start(binary: &Path, files: &Files, upstream: SocketAddr, known: &[Known]) -> Result<Self> {
        // A port that was free a moment ago; Envoy cannot be given a socket.
        let address = TcpListener::bind(("127.0.0.1", 0)).await?.local_addr()?;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("envoy.json");
        let config = files.read()?.config;
        std::fs::write(&path, bootstrap(files, &config, (address, upstream), known)?.to_string())?;
        let log = std::fs::File::create(folder.path().join("log"))?;
        let mut process = Command::new(binary)
            .arg("-c")
            .arg(&path)
            .args(["--concurrency", "1", "-l", "warn", "--use-dynamic-base-id"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;
        let deadline = Instant::now() + START_MAX;
        while tokio::net::TcpStream::connect(address).await.is_err() {
            let ended = process.try_wait()?.is_some();
            if ended || Instant::now() > deadline {
                let log = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
                bail!("Envoy does not start: {log}");
            }
            sleep(LOOK).await;
        }
        Ok(Self { address, _process: process, _folder: folder })
    }
}

fn bootstrap(
    files: &Files,
    config: &str,
    (address, upstream): (SocketAddr, SocketAddr),
    known: &[Known],
) -> Result<Value> {
    let module = std::path::absolute(&files.module)?;
    let name = files.name();
    let wasm = json!({
        "name": "envoy.filters.http.wasm",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
            "config": {
                "name": name,
                "root_id": name,
                "vm_config": {"runtime": "envoy.wasm.runtime.v8", "code": {"local": {"filename": module}}},
                "configuration": {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": config},
            },
        },
    });
    let router = json!({
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
    });
    let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": "upstream"}}]);
    let manager = json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "plugin",
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
            "http_filters": [wasm, router],
        },
    });
    let mut clusters = vec![cluster("upstream", upstream)];
    clusters.extend(known.iter().map(|one| cluster(&one.cluster(), one.address())));
    Ok(json!({
        "static_resources": {
            "listeners": [{"address": socket(address), "filter_chains": [{"filters": [manager]}]}],
            "clusters": clusters,
        },
    }))
}

fn cluster(name: &str, address: SocketAddr) -> Value {
    let endpoint = json!({"endpoint": {"address": socket(address)}});
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    })
}

fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip(), "port_value": address.port()}})
}
