//! Stock Envoy as the judge: one process for many scenarios, with a route of its own for each.

use crate::scenario::{
    AUDITED, Answer, Ask, DETAILS, Outcome, PEER, SCENARIO, SEEN, Scenario, TRIAL_ALLOW, TRIAL_DENY,
    seen_name,
};
use crate::{custom, http2, jwt, rbac, tcp};
use anyhow::{Context, Result, bail, ensure};
use cairn_mesh::PathNormalization;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long Envoy may take to start, and to answer.
const START_MAX: Duration = Duration::from_secs(60);
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// Runs a program while its standard input is open, so that it ends with this process, however that ends.
const LIFELINE: &str = r#"
"$@" </dev/null & program=$!
cat >/dev/null
kill -TERM "$program"; wait "$program"
"#;

/// The modes of path normalisation: a listener for each.
const MODES: [PathNormalization; 4] = [
    PathNormalization::None,
    PathNormalization::Base,
    PathNormalization::MergeSlashes,
    PathNormalization::DecodeAndMergeSlashes,
];

/// Where Envoy is, if it is installed.
pub fn program() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/envoy");
    std::env::var_os("ENVOY").map(PathBuf::from).or(Some(installed)).filter(|file| file.exists())
}

/// A running Envoy that knows some scenarios. It ends when dropped.
pub struct Envoy {
    process: Child,
    lifeline: Option<ChildStdin>,
    directory: TempDir,
    /// How many listeners there must be.
    listeners_wanted: usize,
    listeners: HashMap<String, SocketAddr>,
}

impl Envoy {
    /// Starts `program` with `scenarios`.
    pub async fn start(program: &Path, scenarios: &[Scenario]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let configuration = directory.path().join("envoy.json");
        fs::write(&configuration, serde_json::to_vec(&bootstrap(scenarios))?)?;
        let log = File::create(directory.path().join("envoy.log"))?;
        let mut process = Command::new("sh")
            .args(["-c", LIFELINE, "envoy"])
            .arg(program)
            .arg("-c")
            .arg(&configuration)
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"])
            .arg("--admin-address-path")
            .arg(directory.path().join("admin"))
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run sh")?;
        let lifeline = process.stdin.take();
        let listeners_wanted = MODES.len() + scenarios.iter().filter(|scenario| scenario.tcp).count();
        let mut envoy = Self { process, lifeline, directory, listeners_wanted, listeners: HashMap::new() };
        envoy.listeners = envoy.wait_for_listeners().await?;
        Ok(envoy)
    }

    async fn wait_for_listeners(&self) -> Result<HashMap<String, SocketAddr>> {
        let deadline = Instant::now() + START_MAX;
        loop {
            match self.listeners().await {
                Ok(listeners) => return Ok(listeners),
                Err(error) if Instant::now() > deadline || self.log().contains("exiting") => {
                    return Err(error.context(format!("Envoy does not start:\n{}", self.log())));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn listeners(&self) -> Result<HashMap<String, SocketAddr>> {
        let admin: SocketAddr = fs::read_to_string(self.directory.path().join("admin"))?.trim().parse()?;
        let ready = get(admin, "/ready").await?;
        ensure!(ready.trim() == "LIVE", "not ready: {ready}");
        let listeners: Value = serde_json::from_str(&get(admin, "/listeners?format=json").await?)?;
        let list = listeners["listener_statuses"].as_array().context("no listeners")?;
        ensure!(list.len() == self.listeners_wanted, "not all listeners: {listeners}");
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
        fs::read_to_string(self.directory.path().join("envoy.log")).unwrap_or_default()
    }

    /// What becomes of a request to scenario number `index`.
    pub async fn ask(&self, index: usize, normalization: PathNormalization, ask: &Ask) -> Result<Outcome> {
        match self.listeners.get(&tcp::name(index)) {
            Some(listener) => Self::connect(*listener, ask).await,
            None => Ok(Answer::outcome(self.answer(index, normalization, ask).await?, ask)),
        }
    }

    /// What becomes of a connection without HTTP.
    async fn connect(listener: SocketAddr, ask: &Ask) -> Result<Outcome> {
        let asking = async {
            let mut stream = TcpStream::connect(listener).await?;
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            stream.write_all(&[&tcp::proxy_header(ask), tcp::HELLO].concat()).await?;
            let mut back = [0; tcp::HELLO.len()];
            let passes = stream.read_exact(&mut back).await.is_ok() && back == *tcp::HELLO;
            anyhow::Ok(if passes { Outcome::passes() } else { Outcome::Closed })
        };
        tokio::time::timeout(ANSWER_MAX, asking).await.with_context(|| format!("no end of {ask}"))?
    }

    /// The answer itself.
    pub async fn answer(
        &self,
        index: usize,
        normalization: PathNormalization,
        ask: &Ask,
    ) -> Result<Option<Answer>> {
        let listener = self.listeners.get(&format!("{normalization:?}")).context("no such listener")?;
        let asking = async {
            let mut stream = TcpStream::connect(listener).await?;
            // Nothing is left behind when it closes, so that ports do not run out.
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            stream.write_all(proxy_header(ask)?.as_bytes()).await?;
            if ask.http2 {
                return http2::answer(stream, ask, index).await;
            }
            stream.write_all(&ask.bytes(index)).await?;
            let mut answer = Vec::new();
            // A reset after the answer is as good an end as any.
            let _end = stream.read_to_end(&mut answer).await;
            anyhow::Ok(Answer::parse(&answer))
        };
        tokio::time::timeout(ANSWER_MAX, asking).await.with_context(|| format!("no answer to {ask}"))?
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let _status = self.process.wait();
    }
}

async fn get(admin: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(admin).await?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes())
        .await?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await?;
    Ok(Answer::parse(&bytes).context("no answer")?.into_body())
}

/// The PROXY protocol's word for who connects to what.
fn proxy_header(ask: &Ask) -> Result<String> {
    let (source, destination) = (ask.source, ask.destination);
    let family = match (source, destination) {
        (SocketAddr::V4(_), SocketAddr::V4(_)) => "TCP4",
        (SocketAddr::V6(_), SocketAddr::V6(_)) => "TCP6",
        _ => bail!("{source} cannot reach {destination}"),
    };
    let ports = (source.port(), destination.port());
    Ok(format!("PROXY {family} {} {} {} {}\r\n", source.ip(), destination.ip(), ports.0, ports.1))
}

fn bootstrap(scenarios: &[Scenario]) -> Value {
    let of_http = MODES.iter().map(|mode| listener(*mode, scenarios));
    let of_tcp = scenarios.iter().enumerate().filter(|(_, scenario)| scenario.tcp);
    let listeners: Vec<Value> =
        of_http.chain(of_tcp.map(|(index, scenario)| tcp::listener(index, scenario))).collect();
    json!({
        "admin": { "address": loopback() },
        "static_resources": { "listeners": listeners, "clusters": custom::clusters() },
        "layered_runtime": { "layers": [{ "name": "static", "static_layer": {
            // As Istio sets it: a fragment is dropped, not refused.
            "envoy.reloadable_features.http_reject_path_with_fragment": false,
            // `source_ip`, see `rbac.rs`.
            "envoy.features.enable_all_deprecated_features": true,
            "re2.max_program_size.error_level": 32768,
        } }] },
    })
}

/// Any port of loopback.
pub fn loopback() -> Value {
    json!({ "socket_address": { "address": "127.0.0.1", "port_value": 0 } })
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

fn listener(mode: PathNormalization, scenarios: &[Scenario]) -> Value {
    let ours = || {
        scenarios.iter().enumerate().filter(|(_, scenario)| scenario.normalization == mode && !scenario.tcp)
    };
    let routes: Vec<Value> = ours().map(|(index, scenario)| route(index, scenario)).collect();
    let tokens = ours().filter_map(|(index, scenario)| {
        jwt::translate(&scenario.objects, index).map(|(providers, required)| (index, providers, required))
    });
    let slashes = matches!(mode, PathNormalization::MergeSlashes | PathNormalization::DecodeAndMergeSlashes);
    let mut manager = json!({
        "stat_prefix": "differential",
        "use_remote_address": false,
        "delayed_close_timeout": "0s",
        "normalize_path": mode != PathNormalization::None,
        "merge_slashes": slashes,
        "http_filters": filters(tokens),
        "local_reply_config": { "mappers": [{
            "filter": { "status_code_filter": { "comparison": {
                "op": "GE", "value": { "default_value": 0, "runtime_key": "none" },
            } } },
            "headers_to_add": said(),
        }] },
        "route_config": { "name": "scenarios", "virtual_hosts": [
            { "name": "scenarios", "domains": ["*"], "routes": routes },
        ] },
    });
    if mode == PathNormalization::DecodeAndMergeSlashes {
        manager["path_with_escaped_slashes_action"] = "UNESCAPE_AND_FORWARD".into();
    }
    let manager = extension(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        manager,
    );
    json!({
        "name": format!("{mode:?}"),
        "address": loopback(),
        "listener_filters": [proxy_protocol(json!({}))],
        "filter_chains": [{ "filters": [manager] }],
    })
}

/// The filter that knows from the PROXY protocol who connects.
pub fn proxy_protocol(config: Value) -> Value {
    extension("proxy", "filters.listener.proxy_protocol.v3.ProxyProtocol", config)
}

/// The JWT filter's name.
const TOKENS: &str = "envoy.filters.http.jwt_authn";

/// Identity first, then providers, then tokens, then the three decisions in Istio's order. What they decide by stands at the routes.
fn filters(tokens: impl Iterator<Item = (usize, Vec<(String, Value)>, Value)>) -> Vec<Value> {
    let (mut providers, mut requirements) = (json!({}), json!({}));
    for (index, all, required) in tokens {
        all.into_iter().for_each(|(name, provider)| providers[name] = provider);
        requirements[index.to_string()] = required;
    }
    let authentication = json!({
        "providers": providers, "requirement_map": requirements, "bypass_cors_preflight": true,
    });

    let identity = json!({ "on_request_headers": [{
        "object_key": "io.istio.peer_principal",
        "factory_key": "envoy.string",
        "format_string": { "text_format_source": { "inline_string": format!("%REQ({PEER})%") },
                           "omit_empty_values": true },
        "skip_if_empty": true,
    }] });
    let mut filters = vec![extension("identity", "filters.http.set_filter_state.v3.Config", identity)];
    filters.extend(custom::filters());
    let kind = "filters.http.jwt_authn.v3.JwtAuthentication";
    // Where RBAC looks for what a token says.
    filters.push(extension(TOKENS, kind, authentication));
    filters.extend(rbac::ACTIONS.map(|action| extension(action, "filters.http.rbac.v3.RBAC", json!({}))));
    filters.push(extension("envoy.filters.http.router", "filters.http.router.v3.Router", json!({})));
    filters
}

/// What an answer says beside what a client is told.
fn said() -> Vec<Value> {
    let trial = |action: &str| {
        let key = format!("{}shadow_engine_result", rbac::shadow_prefix(action));
        format!("%DYNAMIC_METADATA(envoy.filters.http.rbac:{key})%")
    };
    let add = |name: &str, text: String| json!({ "header": { "key": name, "value": text } });
    let mut all = vec![
        add(DETAILS, "%RESPONSE_CODE_DETAILS%".to_owned()),
        add(AUDITED, "%DYNAMIC_METADATA(envoy.common:access_log_hint)%".to_owned()),
        add(TRIAL_ALLOW, trial("ALLOW")),
        add(TRIAL_DENY, trial("DENY")),
    ];
    all.extend(SEEN.map(|name| add(&seen_name(name), format!("%REQ({name})%"))));
    all
}

fn route(index: usize, scenario: &Scenario) -> Value {
    let mut decisions: serde_json::Map<String, Value> = rbac::ACTIONS
        .iter()
        .map(|action| {
            let rbac = rbac::filter(scenario, action);
            ((*action).to_owned(), typed("filters.http.rbac.v3.RBACPerRoute", json!({ "rbac": rbac })))
        })
        .collect();
    decisions.extend(custom::marks(scenario));
    if jwt::translate(&scenario.objects, index).is_some() {
        let required = json!({ "requirement_name": index.to_string() });
        decisions.insert(TOKENS.to_owned(), typed("filters.http.jwt_authn.v3.PerRouteConfig", required));
    }
    json!({
        "match": {
            "safe_regex": { "regex": ".*" },
            "headers": [{ "name": SCENARIO, "string_match": { "exact": index.to_string() } }],
        },
        "direct_response": { "status": 200 },
        "typed_per_filter_config": decisions,
    })
}
