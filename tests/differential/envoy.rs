//! Stock Envoy as the judge: one process for many scenarios, with a route of its own for each.

use crate::scenario::{
    AUDITED, Answer, Ask, DETAILS, Outcome, PEER, SCENARIO, SEEN, Scenario, TRIAL_ALLOW, TRIAL_DENY,
    seen_name,
};
use crate::{custom, http2, jwt, rbac, tcp};
use anyhow::{Context, Result, bail};
use cairn_mesh::PathNormalization;
use cairn_tests::envoy::{Start, extension, loopback, typed};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long Envoy may take to start, and to answer.
const START_MAX: Duration = Duration::from_secs(60);
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// The modes of path normalisation: a listener for each.
const MODES: [PathNormalization; 4] = [
    PathNormalization::None,
    PathNormalization::Base,
    PathNormalization::MergeSlashes,
    PathNormalization::DecodeAndMergeSlashes,
];

/// A running Envoy that knows some scenarios. It ends when dropped.
pub struct Envoy(cairn_tests::envoy::Envoy);

impl Envoy {
    /// Starts `program` with `scenarios`.
    pub async fn start(program: &Path, scenarios: &[Scenario]) -> Result<Self> {
        let start = Start {
            bootstrap: &bootstrap(scenarios),
            listeners: MODES.len() + scenarios.iter().filter(|scenario| scenario.tcp).count(),
            flags: &[],
            limit: START_MAX,
        };
        cairn_tests::envoy::Envoy::start(program, &start).await.map(Self)
    }

    /// What becomes of a request to scenario number `index`.
    pub async fn ask(&self, index: usize, normalization: PathNormalization, ask: &Ask) -> Result<Outcome> {
        match self.0.address(&tcp::name(index)) {
            Ok(listener) => Self::connect(listener, ask).await,
            Err(_) => Ok(Answer::outcome(self.answer(index, normalization, ask).await?, ask)),
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
        let listener = self.0.address(&format!("{normalization:?}"))?;
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
        "admin": { "address": loopback(0) },
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
        "address": loopback(0),
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
