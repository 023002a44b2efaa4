//! Policies with action CUSTOM: made up, and as Envoy knows them: per provider a filter that marks what its policies match,
//! and one that asks about what is marked.

use crate::generate::Generator;
use crate::known::is_custom;
use crate::provider::{DECIDE, DECISIONS};
use crate::rbac;
use crate::scenario::{Ask, Outcome, Scenario};
use cairn_manifest::Loaded;
use cairn_mesh::{AuthorizationProvider, MeshSettings};
use cairn_tests::envoy::{extension, typed};
use serde_json::{Map, Value, json};
use std::sync::{Arc, LazyLock};

/// The providers, as MeshConfig has them. All are one server.
const MESH_CONFIG: &str = r#"{ "extensionProviders": [
    { "name": "grpc", "envoyExtAuthzGrpc": {
        "service": "authz.example", "port": 9000, "timeout": "10s", "statusOnError": "500" } },
    { "name": "grpc-body", "envoyExtAuthzGrpc": {
        "service": "authz.example", "port": 9000, "timeout": "10s", "failOpen": true,
        "includeRequestBodyInCheck": { "maxRequestBytes": 8, "allowPartialMessage": true, "packAsBytes": true } } },
    { "name": "http", "envoyExtAuthzHttp": {
        "service": "authz.example", "port": 8000, "timeout": "10s", "statusOnError": "503", "pathPrefix": "/check",
        "includeRequestHeadersInCheck": ["X-Decide", "x-te*", "*-none"],
        "includeAdditionalHeadersInCheck": { "x-from": "mesh" },
        "headersToUpstreamOnAllow": ["x-user", "x-set*"],
        "headersToDownstreamOnDeny": ["x-why"],
        "headersToDownstreamOnAllow": ["*-seen"] } },
    { "name": "open", "envoyExtAuthzHttp": {
        "service": "authz.example", "port": 8000, "timeout": "10s", "failOpen": true,
        "includeRequestHeadersInCheck": ["x-decide"],
        "includeRequestBodyInCheck": { "maxRequestBytes": 8 } } }
] }"#;

/// The most bytes of a body that they are told.
pub const BODY_BYTES_MAX: usize = 8;

/// What they are called; the last is not there.
const NAMES: [&str; 5] = ["grpc", "grpc-body", "http", "open", "unknown"];

/// As both sides are told them.
static PROVIDERS: LazyLock<(Vec<Value>, Vec<Arc<AuthorizationProvider>>)> = LazyLock::new(|| {
    let config: Value = serde_json::from_str(MESH_CONFIG).expect("JSON");
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "istio", "namespace": "istio-system" },
        "data": { "mesh": MESH_CONFIG },
    });
    let ours = Loaded::from_text(&map.to_string(), MeshSettings::default()).settings.authorization_providers;
    let theirs = config["extensionProviders"].as_array().cloned().unwrap_or_default();
    assert_eq!((theirs.len(), ours.len()), (NAMES.len() - 1, NAMES.len() - 1), "providers are read");
    (theirs, ours)
});

/// The provider of this name, as we know it.
pub fn provider(name: &str) -> Option<Arc<AuthorizationProvider>> {
    PROVIDERS.1.iter().find(|provider| *provider.name == *name).cloned()
}

/// Whether a provider is asked in this scenario, and `outcome` is what becomes of a request whose provider is gone.
pub fn may_have_lost_its_provider(scenario: &Scenario, outcome: &Outcome) -> bool {
    is_custom(scenario)
        && match outcome {
            Outcome::Denied { details, .. } => details.contains("ext_authz_error"),
            // It fails open.
            Outcome::Allowed { .. } => true,
            Outcome::Malformed | Outcome::Closed | Outcome::Other(_) => false,
        }
}

/// A scenario about providers with this many requests.
pub fn scenario(generator: &mut Generator, asks: usize) -> Scenario {
    let mut scenario = generator.scenario(asks);
    let count = generator.number(1..=2);
    scenario.objects.truncate(generator.number(0..=1));
    scenario.objects.extend((0..count).map(|index| policy(generator, index)));
    for ask in &mut scenario.asks {
        decorate(generator, ask);
    }
    scenario
}

fn policy(generator: &mut Generator, index: usize) -> Value {
    let rules: Vec<Value> = (0..generator.number(1..=2)).map(|_| rule(generator)).collect();
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": { "name": format!("custom{index}"), "namespace": "shop" },
        "spec": {
            "targetRefs": [
                { "kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint" },
            ],
            "action": "CUSTOM",
            "provider": { "name": if generator.chance(5) { "unknown" } else { *generator.pick(&NAMES[..4]) } },
            "rules": rules,
        },
    })
}

/// Mostly one that matches much, so that the provider is asked.
fn rule(generator: &mut Generator) -> Value {
    match generator.number(0..=3) {
        0 => json!({}),
        1 => json!({ "to": [{ "operation": { "notMethods": ["PUT"] } }] }),
        2 => json!({ "when": [{ "key": "request.headers[x-foo]", "values": ["*"] }] }),
        _ => json!({ "to": [{ "operation": { "paths": [generator.pick(&["/a*", "*"])] } }] }),
    }
}

fn decorate(generator: &mut Generator, ask: &mut Ask) {
    let mut add = |name: &str, value: &str| ask.headers.push((name.to_owned(), value.to_owned()));
    if generator.chance(90) {
        let decision: &str = generator.pick::<&str>(&DECISIONS);
        add(DECIDE, decision);
    }
    for (name, value) in [
        ("x-team", "blue"),
        ("x-team", "green"),
        ("x-user", "forged"),
        ("x-set-a", "sent"),
        ("x-set-b", "sent"),
        ("x-remove", "me"),
        ("x-seen", "sent"),
    ] {
        if generator.chance(25) {
            add(name, value);
        }
    }
    if generator.chance(20) && !ask.target.contains(['?', '#']) {
        ask.target += *generator.pick(&["?gone=1&team=blue", "?a=b&gone", "?team", "?"]);
    }
    if matches!(&*ask.method, "POST" | "PUT" | "PATCH") && generator.chance(60) {
        ask.body = (*generator.pick(&["short", "12345678", "longer than it may be"])).to_owned();
    }
}

/// The filters of all providers, in the order in which they are asked.
pub fn filters() -> Vec<Value> {
    let mut filters = Vec::new();
    for name in NAMES {
        filters.push(extension(&mark(name), "filters.http.rbac.v3.RBAC", json!({})));
        let provider = PROVIDERS.0.iter().find(|provider| provider["name"] == name);
        filters.extend(provider.map(|provider| asking(name, provider)));
    }
    filters
}

/// The name of the filter that marks what a provider is asked about.
fn mark(provider: &str) -> String {
    format!("mark-{provider}")
}

/// What marks a request in a scenario, by filter.
pub fn marks(scenario: &Scenario) -> Map<String, Value> {
    let marked = |name: &&str| {
        let is_known = provider(name).is_some();
        let policies = rbac::custom(scenario, name, is_known)?;
        let rbac = match is_known {
            true => json!({ "shadow_rules": policies, "shadow_rules_stat_prefix": prefix(name) }),
            false => json!({ "rules": policies }),
        };
        Some((mark(name), typed("filters.http.rbac.v3.RBACPerRoute", json!({ "rbac": rbac }))))
    };
    NAMES.iter().filter_map(marked).collect()
}

fn prefix(provider: &str) -> String {
    format!("istio_ext_authz_{provider}_")
}

fn asking(name: &str, provider: &Value) -> Value {
    let (kind, settings) = match provider.get("envoyExtAuthzGrpc") {
        Some(grpc) => ("grpc", grpc),
        None => ("http", &provider["envoyExtAuthzHttp"]),
    };
    let timeout = &settings["timeout"];
    let status = settings["statusOnError"].as_str().and_then(|text| text.parse::<u16>().ok());
    let mut config = json!({
        "transport_api_version": "V3",
        "failure_mode_allow": settings["failOpen"].as_bool().unwrap_or_default(),
        "status_on_error": { "code": status.unwrap_or(403) },
        "filter_enabled_metadata": {
            "filter": "envoy.filters.http.rbac",
            "path": [{ "key": format!("{}shadow_effective_policy_id", prefix(name)) }],
            "value": { "string_match": { "prefix": format!("istio-ext-authz-{name}-") } },
        },
    });
    if kind == "grpc" {
        config["grpc_service"] = json!({ "envoy_grpc": { "cluster_name": "grpc" }, "timeout": timeout });
    } else {
        let added = settings["includeAdditionalHeadersInCheck"].as_object().into_iter().flatten();
        let added: Vec<Value> = added.map(|(key, value)| json!({ "key": key, "value": value })).collect();
        config["http_service"] = json!({
            "server_uri": { "uri": "http://authz.example", "cluster": "http", "timeout": timeout },
            "path_prefix": settings["pathPrefix"].as_str().unwrap_or_default(),
            "authorization_request": { "headers_to_add": added },
            "authorization_response": {},
        });
        for (field, list) in [
            ("allowed_upstream_headers", "headersToUpstreamOnAllow"),
            ("allowed_client_headers", "headersToDownstreamOnDeny"),
            ("allowed_client_headers_on_success", "headersToDownstreamOnAllow"),
        ] {
            if let Some(patterns) = patterns(&settings[list]) {
                config["http_service"]["authorization_response"][field] = patterns;
            }
        }
        if let Some(patterns) = patterns(&settings["includeRequestHeadersInCheck"]) {
            config["allowed_headers"] = patterns;
        }
    }
    let body = &settings["includeRequestBodyInCheck"];
    if body.is_object() {
        config["with_request_body"] = json!({
            "max_request_bytes": body["maxRequestBytes"],
            "allow_partial_message": body["allowPartialMessage"].as_bool().unwrap_or_default(),
            "pack_as_bytes": body["packAsBytes"].as_bool().unwrap_or_default(),
        });
    }
    extension(&format!("ask-{name}"), "filters.http.ext_authz.v3.ExtAuthz", config)
}

/// Names of headers, in any letter case.
fn patterns(list: &Value) -> Option<Value> {
    let pattern = |text: &Value| {
        let text = text.as_str().unwrap_or_default();
        let (kind, text) = match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(end), _) => ("suffix", end),
            (None, Some(start)) => ("prefix", start),
            (None, None) => ("exact", text),
        };
        json!({ kind: text, "ignore_case": true })
    };
    Some(json!({ "patterns": list.as_array()?.iter().map(pattern).collect::<Vec<_>>() }))
}

/// Where Envoy finds the providers.
pub fn clusters() -> Value {
    let at = crate::provider::address();
    let address = json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } });
    let cluster = |name: &str| {
        json!({
            "name": name,
            "type": "STATIC",
            "connect_timeout": "10s",
            "load_assignment": { "cluster_name": name, "endpoints": [
                { "lb_endpoints": [{ "endpoint": { "address": address } }] },
            ] },
        })
    };
    let mut grpc = cluster("grpc");
    let options = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    grpc["typed_extension_protocol_options"] = json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": options, "explicit_http_config": { "http2_protocol_options": {} },
        },
    });
    json!([cluster("http"), grpc])
}
