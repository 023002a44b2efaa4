//! Stock Envoy with one module in its chain.

use crate::ask::Version;
use crate::module::Module;
use crate::run::{Line, Logged, wait_until};
use crate::upstream::{SERVICES, Upstream};
use anyhow::Result;
use cairn_tests::envoy::{Start, extension, loopback};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// How long Envoy may take to start: it compiles the module four times.
const START_MAX: Duration = Duration::from_secs(240);

/// What a line of the log begins with, and where the module's own words begin.
const FORMAT: &str = "%%%l|%n|%v";
const GUEST: &str = "wasm log";

/// A running Envoy. It ends when dropped.
pub struct Envoy(cairn_tests::envoy::Envoy);

impl Envoy {
    /// Starts `program` with `module` in front of `upstream`.
    pub async fn start(program: &Path, module: &Module, upstream: &Upstream) -> Result<Self> {
        let listeners = [Version::Http1, Version::Http2].map(|version| listener(version, module));
        Self::run(program, listeners.into(), clusters(upstream)).await
    }

    /// Starts `program` with these listeners and clusters.
    pub async fn run(program: &Path, listeners: Vec<Value>, clusters: Vec<Value>) -> Result<Self> {
        let bootstrap = json!({
            "admin": { "address": loopback(0) },
            "static_resources": { "listeners": listeners, "clusters": clusters },
        });
        let start = Start {
            bootstrap: &bootstrap,
            listeners: listeners.len(),
            flags: &["--component-log-level", "wasm:trace", "--log-format", FORMAT],
            limit: START_MAX,
        };
        cairn_tests::envoy::Envoy::start(program, &start).await.map(Self)
    }

    /// Where requests of this version are sent.
    pub fn address(&self, version: Version) -> Result<SocketAddr> {
        self.listener(&format!("{version:?}"))
    }

    /// Where a listener listens.
    pub fn listener(&self, name: &str) -> Result<SocketAddr> {
        self.0.address(name)
    }

    /// What the plugin of this name logged.
    pub fn lines_of(&self, name: &str) -> Vec<String> {
        let log = self.0.log();
        let entries = log.split("\n%").map(|entry| entry.trim_start_matches('%').trim_end_matches('\n'));
        let told =
            entries.filter_map(|entry| entry.splitn(3, '|').nth(2)?.strip_prefix(GUEST)?.split_once(": "));
        let own = told.filter(|(who, _)| who.split_whitespace().next() == Some(name));
        own.map(|(_, text)| text.to_owned()).collect()
    }

    /// The counters and gauges that the module defined.
    pub async fn metrics(&self) -> Result<BTreeMap<String, String>> {
        let text = self.0.admin("/stats?filter=^wasmcustom%5C.").await?;
        let split = |line: &str| {
            let (name, value) = line.trim_start_matches("wasmcustom.").rsplit_once(": ")?;
            Some((name.to_owned(), value.to_owned()))
        };
        Ok(text.lines().filter_map(split).collect())
    }

    /// Waits until no request is in progress, the last callback of each included.
    pub async fn idle(&self) -> Result<()> {
        wait_until("Envoy's requests end", || async {
            let text = self.0.admin("/stats?filter=downstream_rq_active").await?;
            Ok(text.lines().all(|line| line.ends_with(": 0") || line.contains("http.admin")))
        })
        .await
    }
}

impl Logged for Envoy {
    fn lines(&self) -> Vec<Line> {
        // A module's line may have several lines.
        self.0
            .log()
            .split("\n%")
            .filter_map(|entry| line(entry.trim_start_matches('%').trim_end_matches('\n')))
            .collect()
    }

    fn trouble(&self) -> String {
        let log = self.0.log();
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

fn clusters(upstream: &Upstream) -> Vec<Value> {
    let versions = [Version::Http1, Version::Http2];
    let mut clusters: Vec<Value> =
        versions.map(|version| cluster(&format!("{version:?}"), upstream.address, version)).into();
    for (name, address) in SERVICES.iter().zip(&upstream.services) {
        let version = if *name == "grpcbin" { Version::Http2 } else { Version::Http1 };
        clusters.push(cluster(name, *address, version));
    }
    clusters
}

/// A cluster with one endpoint that speaks this version of HTTP, or no HTTP at all for 1.1.
pub fn cluster(name: &str, address: SocketAddr, version: Version) -> Value {
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
    let filters = filters(version, module.known.root, &module.known.config, &module.file);
    json!({ "name": format!("{version:?}"), "address": loopback(0), "filter_chains": [{ "filters": filters }] })
}

/// The filters of a listener for requests, which a module in `file` sees, and which go to the cluster with the version's name.
pub fn filters(version: Version, root: &str, config: &str, file: &Path) -> Value {
    let http_filters = [
        extension("wasm", "filters.http.wasm.v3.Wasm", plugin(root, config, file)),
        extension("envoy.filters.http.router", "filters.http.router.v3.Router", json!({})),
    ];
    // Istio's routes have no timeout.
    let cluster = format!("{version:?}");
    let route = json!({ "match": { "prefix": "/" }, "route": { "cluster": cluster, "timeout": "0s" } });
    json!([extension(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "modules",
            "generate_request_id": false,
            "skip_xff_append": true,
            "delayed_close_timeout": "0s",
            "http_filters": http_filters,
            "route_config": { "name": "all", "virtual_hosts": [
                { "name": "all", "domains": ["*"], "routes": [route] },
            ] },
        }),
    )])
}

fn plugin(root: &str, config: &str, file: &Path) -> Value {
    let text =
        |text: &str| json!({ "@type": "type.googleapis.com/google.protobuf.StringValue", "value": text });
    json!({ "config": {
        "name": "m",
        "root_id": root,
        "failure_policy": "FAIL_CLOSED",
        "configuration": text(config),
        "vm_config": {
            "runtime": "envoy.wasm.runtime.v8",
            "code": { "local": { "filename": file } },
        },
    } })
}
