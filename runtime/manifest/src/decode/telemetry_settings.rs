//! What MeshConfig says of metrics, access logs and traces: providers and their defaults.

use super::telemetry::percent;
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{
    AlsLog, FileLog, LogFormat, LogValue, OtelLog, OtelTrace, OtelTransport, ProviderAddress,
    TelemetryDefaults, TelemetryProvider, TelemetryProviderKind, ZipkinTrace,
};
use cairn_observe::Format;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// The most providers of a mesh (Istio's limit).
const PROVIDERS_MAX: usize = 1000;
/// The most headers of a call, further headers of a log, and keys of a JSON log.
const HEADERS_MAX: usize = 64;
/// How deep a JSON log may be nested.
const DEPTH_MAX: usize = 16;
/// Envoy's `max_path_tag_length`.
const TAG_BYTES_MAX: usize = 256;
/// How long a call over gRPC may take where nobody says (OpenTelemetry's default).
const GRPC_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads the parts of MeshConfig that are about telemetry, over `before`.
pub(super) fn decode(
    entries: &Entries<'_>,
    before: &Arc<TelemetryDefaults>,
    findings: &mut Findings,
) -> Arc<TelemetryDefaults> {
    let mut read = TelemetryDefaults::clone(before);
    for node in entries.bounded_list("extensionProviders", PROVIDERS_MAX, findings) {
        let Some(provider) = provider(&node, findings) else { continue };
        // One of ours, such as `prometheus`, may be said anew.
        read.providers.retain(|known| !known.name.eq_ignore_ascii_case(&provider.name));
        read.providers.push(Arc::new(provider));
    }
    if let Some(node) = entries.get("defaultProviders") {
        let defaults = node.map(&["metrics", "accessLogging", "tracing"], findings);
        let mut names = |key| {
            let list = defaults.get(key)?.list(findings);
            let names = list.iter().filter_map(|node| node.filled(findings)).map(Arc::from);
            Some(names.collect::<Vec<Arc<str>>>())
        };
        let (metrics, logs, tracing) = (names("metrics"), names("accessLogging"), names("tracing"));
        known(&read, &defaults, findings);
        read.metrics = metrics.unwrap_or(read.metrics);
        read.access_logging = logs.or(read.access_logging);
        read.tracing = tracing.unwrap_or(read.tracing);
    }
    if let Some(file) = mesh_file(entries, findings) {
        read.file = Some(Arc::new(file));
    }
    legacy_tracing(entries, &mut read, findings);
    Arc::new(read)
}

/// Reports default providers that are not there.
fn known(read: &TelemetryDefaults, defaults: &Entries<'_>, findings: &mut Findings) {
    for (key, list) in defaults.all() {
        let names = list.value.as_array().into_iter().flatten();
        for (index, name) in names.enumerate() {
            if let Some(name) = name.as_str().filter(|name| read.provider(name).is_none()) {
                let at = defaults.at.key(key).index(index);
                let reason = format!("extensionProviders has no `{name}` that telemetry can be sent to");
                findings.note(Severity::Warning, "unknown-provider", &at, reason);
            }
        }
    }
}

/// `accessLogFile`, `accessLogFormat` and `accessLogEncoding`.
fn mesh_file(entries: &Entries<'_>, findings: &mut Findings) -> Option<FileLog> {
    const ENCODINGS: [(&str, bool); 2] = [("TEXT", false), ("JSON", true)];
    let encoding = entries.get("accessLogEncoding").and_then(|node| node.choice(&ENCODINGS, findings));
    let json = encoding.unwrap_or(false);
    let format_node = entries.get("accessLogFormat");
    let text = format_node.as_ref().and_then(|node| node.text(findings)).unwrap_or_default();
    let format = match (&format_node, json, text) {
        (None, false, _) | (_, false, "") => LogFormat::DefaultText,
        (None, true, _) | (_, true, "") => LogFormat::DefaultJson,
        (Some(node), false, _) => text_format(node, findings).map_or(LogFormat::DefaultText, LogFormat::Text),
        (Some(node), true, text) => match serde_json::from_str::<Value>(text) {
            Ok(value) => labels(&Node::new(&value, node.at.clone()), findings),
            Err(error) => {
                findings.refuse("bad-format", &node.at, format!("is not JSON: {error}"));
                LogFormat::DefaultJson
            }
        },
    };
    let path = entries.get("accessLogFile")?.text(findings)?;
    Some(FileLog { path: path.into(), format, omit_empty: false })
}

/// What MeshConfig says of tracing beside providers.
fn legacy_tracing(entries: &Entries<'_>, read: &mut TelemetryDefaults, findings: &mut Findings) {
    let enabled = entries.get("enableTracing").and_then(|node| node.flag(findings));
    let tracing = entries
        .get("defaultConfig")
        .and_then(|node| node.any_map(findings).get("tracing"))
        .map(|node| node.any_map(findings));
    let mut unsupported = |at: FieldPath, reason: &str| {
        findings.note(Severity::Warning, "not-supported", &at, format!("{reason}: it has no effect"));
    };
    if enabled == Some(true) && read.tracing.is_empty() && tracing.is_none() {
        let reason = "no collector is named: name one in extensionProviders and defaultProviders.tracing";
        unsupported(entries.at.key("enableTracing"), reason);
    }
    let Some(tracing) = tracing else { return };
    for (key, node) in tracing.all().filter(|(key, _)| *key != "sampling") {
        let reason = format!("`{key}` is not read here: use extensionProviders and a Telemetry resource");
        unsupported(node.at, &reason);
    }
    if let Some(node) = tracing.get("sampling") {
        read.sampling = percent(&node, findings).unwrap_or(read.sampling);
    }
}

fn provider(node: &Node<'_>, findings: &mut Findings) -> Option<TelemetryProvider> {
    let entries = node.any_map(findings);
    let name = entries.require("name", findings)?.filled(findings)?;
    let mut kinds = entries.all().filter(|(key, _)| *key != "name");
    let (kind, config) = kinds.next()?;
    if let Some((other, node)) = kinds.next() {
        findings.refuse("invalid-value", &node.at, format!("`{kind}` and `{other}`: one kind per provider"));
    }
    let kind = match kind.as_str() {
        "prometheus" => {
            config.map(&[], findings);
            TelemetryProviderKind::Prometheus
        }
        "envoyFileAccessLog" => TelemetryProviderKind::File(file_log(&config, findings)),
        "envoyHttpAls" | "envoyTcpAls" | "envoyOtelAls" | "opentelemetry" | "zipkin" => {
            remote(kind, &config, findings)?
        }
        // These are authorization's.
        "envoyExtAuthzHttp" | "envoyExtAuthzGrpc" => return None,
        other => {
            let reason = format!("providers of kind `{other}` are not supported: it has no effect");
            findings.note(Severity::Warning, "not-supported", &config.at, reason);
            return None;
        }
    };
    Some(TelemetryProvider { name: name.into(), kind })
}

/// A provider that is sent to over the network.
fn remote(kind: &str, config: &Node<'_>, findings: &mut Findings) -> Option<TelemetryProviderKind> {
    Some(match kind {
        "envoyHttpAls" => TelemetryProviderKind::Als(als(config, false, findings)?),
        "envoyTcpAls" => TelemetryProviderKind::Als(als(config, true, findings)?),
        "envoyOtelAls" => TelemetryProviderKind::OtelLog(otel_log(config, findings)?),
        "opentelemetry" => TelemetryProviderKind::OtelTrace(otel_trace(config, findings)?),
        _ => TelemetryProviderKind::Zipkin(zipkin(config, findings)?),
    })
}

fn file_log(node: &Node<'_>, findings: &mut Findings) -> FileLog {
    let entries = node.map(&["path", "logFormat", "omitEmptyValues"], findings);
    let path = entries.get("path").and_then(|node| node.filled(findings)).unwrap_or("/dev/stdout");
    let mut log = FileLog { path: path.into(), format: LogFormat::DefaultText, omit_empty: false };
    log.omit_empty = entries.get("omitEmptyValues").and_then(|node| node.flag(findings)).unwrap_or_default();
    if let Some(node) = entries.get("logFormat") {
        let format = node.map(&["text", "labels"], findings);
        match (format.get("text"), format.get("labels")) {
            (Some(_), Some(labels)) => {
                findings.refuse("invalid-value", &labels.at, "`text` is set too: one of them");
            }
            (Some(node), None) if node.value.as_str() != Some("") => {
                log.format = text_format(&node, findings).map_or(LogFormat::DefaultText, LogFormat::Text);
            }
            (None, Some(node)) => log.format = labels(&node, findings),
            _ => {}
        }
    }
    log
}

fn text_format(node: &Node<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let text = node.text(findings)?;
    if let Err(error) = Format::parse(text) {
        findings.refuse("bad-format", &node.at, error.to_string());
    }
    Some(text.into())
}

fn labels(node: &Node<'_>, findings: &mut Findings) -> LogFormat {
    let entries = log_map(node, DEPTH_MAX, findings);
    if entries.is_empty() { LogFormat::DefaultJson } else { LogFormat::Json(entries) }
}

fn log_map(node: &Node<'_>, depth: usize, findings: &mut Findings) -> Vec<(Arc<str>, LogValue)> {
    let entries = node.any_map(findings);
    if entries.all().count() > HEADERS_MAX * 4 {
        findings.refuse("invalid-value", &node.at, format!("has more than {} entries", HEADERS_MAX * 4));
        return Vec::new();
    }
    let read = |(key, node): (&String, Node<'_>)| {
        Some((Arc::from(key.as_str()), log_value(&node, depth, findings)?))
    };
    entries.all().filter_map(read).collect()
}

fn log_value(node: &Node<'_>, depth: usize, findings: &mut Findings) -> Option<LogValue> {
    let Some(below) = depth.checked_sub(1) else {
        findings.refuse("invalid-value", &node.at, "is nested too deep");
        return None;
    };
    Some(match node.value {
        Value::String(_) => LogValue::Text(text_format(node, findings)?),
        Value::Array(_) => {
            let items = node.list(findings);
            LogValue::List(items.iter().filter_map(|node| log_value(node, below, findings)).collect())
        }
        Value::Object(_) => LogValue::Map(log_map(node, below, findings)),
        literal => LogValue::Literal(literal.to_string().into()),
    })
}

/// `service` and `port`.
fn address(entries: &Entries<'_>, findings: &mut Findings) -> Option<ProviderAddress> {
    let service = entries.require("service", findings)?;
    let port = entries.require("port", findings)?.port(findings);
    let text = service.filled(findings)?;
    let (namespace, host) = match text.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, text),
    };
    if namespace == Some("") || host.is_empty() || host.contains(['/', ':', ' ']) {
        findings.refuse("invalid-value", &service.at, "must be `hostname` or `namespace/hostname`");
        return None;
    }
    Some(ProviderAddress { host: host.into(), namespace: namespace.map(Arc::from), port: port? })
}

/// Reports what is set and not honoured.
fn unsupported(entries: &Entries<'_>, keys: &[&str], findings: &mut Findings) {
    for node in keys.iter().filter_map(|key| entries.get(key)) {
        findings.note(Severity::Warning, "not-supported", &node.at, "is not supported yet: it has no effect");
    }
}

fn als(node: &Node<'_>, tcp: bool, findings: &mut Findings) -> Option<AlsLog> {
    let mut known_keys = vec!["service", "port", "logName", "filterStateObjectsToLog"];
    let http = [
        "additionalRequestHeadersToLog",
        "additionalResponseHeadersToLog",
        "additionalResponseTrailersToLog",
    ];
    if !tcp {
        known_keys.extend(http);
    }
    let entries = node.map(&known_keys, findings);
    unsupported(&entries, &["filterStateObjectsToLog"], findings);
    let mut names = |key: &str| {
        let list = entries.bounded_list(key, HEADERS_MAX, findings);
        list.iter().filter_map(|node| header_name(node, findings)).collect::<Vec<Arc<str>>>()
    };
    let [request_headers, response_headers, response_trailers] = http.map(&mut names);
    let default = if tcp { "tcp_envoy_accesslog" } else { "http_envoy_accesslog" };
    let log_name = entries.get("logName").and_then(|node| node.filled(findings)).unwrap_or(default);
    Some(AlsLog {
        at: address(&entries, findings)?,
        log_name: log_name.into(),
        tcp,
        request_headers,
        response_headers,
        response_trailers,
    })
}

fn header_name(node: &Node<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let text = node.filled(findings)?.to_ascii_lowercase();
    if !cairn_observe::is_header_name(&text) {
        findings.refuse("invalid-value", &node.at, format!("`{text}` cannot be the name of a header"));
        return None;
    }
    Some(text.into())
}

fn otel_log(node: &Node<'_>, findings: &mut Findings) -> Option<OtelLog> {
    let entries = node.map(&["service", "port", "logName", "logFormat"], findings);
    let log_name = entries.get("logName").and_then(|node| node.filled(findings));
    let (mut body, mut attributes) = (None, Vec::new());
    if let Some(node) = entries.get("logFormat") {
        let format = node.map(&["text", "labels"], findings);
        body =
            format.get("text").and_then(|node| text_format(&node, findings)).filter(|text| !text.is_empty());
        if let Some(node) = format.get("labels") {
            attributes = log_map(&node, DEPTH_MAX, findings);
        }
    }
    attributes.sort_by(|a, b| a.0.cmp(&b.0));
    Some(OtelLog {
        at: address(&entries, findings)?,
        log_name: log_name.unwrap_or("otel_envoy_accesslog").into(),
        body,
        attributes,
    })
}

fn tag_bytes(entries: &Entries<'_>, findings: &mut Findings) -> usize {
    let length = entries.get("maxTagLength").and_then(|node| node.integer(0..=65_536, findings));
    match length {
        Some(length) if length > 0 => length as usize,
        _ => TAG_BYTES_MAX,
    }
}

/// Headers of calls, `[{name, value}]`. What comes from the environment is not known here.
fn headers(node: Option<Node<'_>>, findings: &mut Findings) -> Vec<(Arc<str>, Arc<str>)> {
    let Some(node) = node else { return Vec::new() };
    let mut read = BTreeMap::new();
    for node in node.list(findings).into_iter().take(HEADERS_MAX) {
        let entries = node.map(&["name", "value", "envName"], findings);
        unsupported(&entries, &["envName"], findings);
        let name = entries.require("name", findings).and_then(|node| header_name(&node, findings));
        let value = entries.get("value").and_then(|node| node.text(findings));
        if let (Some(name), Some(value)) = (name, value) {
            read.insert(name, Arc::from(value));
        }
    }
    read.into_iter().collect()
}

fn http_path(entries: &Entries<'_>, default: &str, findings: &mut Findings) -> Arc<str> {
    let Some(node) = entries.get("path") else { return default.into() };
    match node.filled(findings) {
        Some(path) if path.starts_with('/') && path.bytes().all(|byte| (b'!'..=b'~').contains(&byte)) => {
            path.into()
        }
        Some(_) => {
            findings.refuse("invalid-value", &node.at, "must begin with `/`");
            default.into()
        }
        None => default.into(),
    }
}

fn timeout(entries: &Entries<'_>, default: Duration, findings: &mut Findings) -> Duration {
    let given = entries.get("timeout").and_then(|node| node.duration(findings));
    given.filter(|timeout| !timeout.is_zero()).unwrap_or(default)
}

fn otel_trace(node: &Node<'_>, findings: &mut Findings) -> Option<OtelTrace> {
    const KNOWN: [&str; 8] = [
        "service",
        "port",
        "maxTagLength",
        "http",
        "grpc",
        "resourceDetectors",
        "dynatraceSampler",
        "serviceAttributeEnrichment",
    ];
    let entries = node.map(&KNOWN, findings);
    unsupported(&entries, &["dynatraceSampler", "serviceAttributeEnrichment"], findings);
    let mut environment_detector = false;
    if let Some(node) = entries.get("resourceDetectors") {
        let detectors = node.map(&["environment", "dynatrace"], findings);
        environment_detector = detectors.get("environment").is_some();
        unsupported(&detectors, &["dynatrace"], findings);
    }
    let transport = match (entries.get("http"), entries.get("grpc")) {
        (Some(_), Some(grpc)) => {
            findings.refuse("invalid-value", &grpc.at, "`http` is set too: one of them");
            return None;
        }
        (Some(node), None) => {
            let http = node.map(&["path", "timeout", "headers"], findings);
            OtelTransport::Http {
                path: http_path(&http, "/v1/traces", findings),
                timeout: timeout(&http, Duration::from_secs(3), findings),
                headers: headers(http.get("headers"), findings),
            }
        }
        (None, grpc) => {
            let grpc = grpc.map(|node| node.map(&["timeout", "initialMetadata"], findings));
            let (mut wait, mut metadata) = (GRPC_TIMEOUT, Vec::new());
            if let Some(grpc) = grpc {
                wait = timeout(&grpc, wait, findings);
                metadata = headers(grpc.get("initialMetadata"), findings);
            }
            OtelTransport::Grpc { timeout: wait, headers: metadata }
        }
    };
    Some(OtelTrace {
        at: address(&entries, findings)?,
        transport,
        tag_bytes_max: tag_bytes(&entries, findings),
        environment_detector,
    })
}

fn zipkin(node: &Node<'_>, findings: &mut Findings) -> Option<ZipkinTrace> {
    const KNOWN: [&str; 8] = [
        "service",
        "port",
        "maxTagLength",
        "enable64bitTraceId",
        "path",
        "traceContextOption",
        "timeout",
        "headers",
    ];
    const CONTEXTS: [(&str, bool); 2] = [("USE_B3", false), ("USE_B3_WITH_W3C_PROPAGATION", true)];
    let entries = node.map(&KNOWN, findings);
    let narrow = entries.get("enable64bitTraceId").and_then(|node| node.flag(findings)).unwrap_or(false);
    let context = entries.get("traceContextOption").and_then(|node| node.choice(&CONTEXTS, findings));
    Some(ZipkinTrace {
        at: address(&entries, findings)?,
        path: http_path(&entries, "/api/v2/spans", findings),
        tag_bytes_max: tag_bytes(&entries, findings),
        wide_ids: !narrow,
        with_w3c: context.unwrap_or(false),
        timeout: timeout(&entries, Duration::from_secs(5), findings),
        headers: headers(entries.get("headers"), findings),
    })
}
