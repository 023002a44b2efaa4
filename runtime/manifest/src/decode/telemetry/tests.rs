//! Each field of Telemetry and of MeshConfig's providers: what it becomes, or which finding it makes.

use crate::decode::{Decoded, decode};
use crate::testing::{object, short};
use cairn_mesh::{
    AccessLogging, Change, FileLog, LogFormat, LogValue, MeshSettings, Metric, OtelTransport, SpanTag,
    TagChange, TelemetryDefaults, TelemetryPolicy, TelemetryProviderKind, TracingChange,
};
use std::sync::Arc;
use std::time::Duration;

fn indented(spec: &str) -> String {
    spec.lines().map(|line| format!("  {line}\n")).collect()
}

fn mesh_config(text: &str) -> Decoded {
    let head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n";
    decode(
        &object(&format!("{head}data:\n  mesh: |\n{}", indented(&indented(text)))),
        &MeshSettings::default(),
    )
}

fn settings(text: &str) -> Arc<TelemetryDefaults> {
    let decoded = mesh_config(text);
    match decoded.changes.as_slice() {
        [Change::Settings(settings)] => Arc::clone(&settings.telemetry),
        other => panic!("{other:?} {:?}", shorts(&decoded)),
    }
}

const PROVIDERS: &str = "extensionProviders:
- {name: Zip, zipkin: {service: ns/zipkin.obs, port: 9411}}
- {name: otel, opentelemetry: {service: collector, port: 4317}}
- {name: file, envoyFileAccessLog: {path: /tmp/log}}
";

fn telemetry(spec: &str) -> Decoded {
    let head =
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: t, namespace: n}\nspec:\n";
    let known = MeshSettings { telemetry: settings(PROVIDERS), ..MeshSettings::default() };
    decode(&object(&format!("{head}{}", indented(spec))), &known)
}

fn shorts(decoded: &Decoded) -> Vec<String> {
    decoded.findings.iter().map(short).collect()
}

fn the_policy(decoded: Decoded) -> TelemetryPolicy {
    assert_eq!(shorts(&decoded), [""; 0]);
    match decoded.changes.into_iter().next() {
        Some(Change::Telemetry(policy)) => policy,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_field_of_a_telemetry_is_read() {
    let policy = the_policy(telemetry(
        "targetRefs: [{kind: Service, name: web}]
accessLogging:
- match: {mode: SERVER}
  providers: [{name: file}]
  disabled: true
  filter: {expression: response.code >= 400}
metrics:
- providers: [{name: prometheus}]
  reportingInterval: 1.5s
  overrides:
  - match: {metric: REQUEST_COUNT, mode: CLIENT_AND_SERVER}
    disabled: false
    tagOverrides:
      team: {value: \"request.headers['x-team']\"}
      source_principal: {operation: REMOVE}
  - disabled: true
tracing:
- match: {mode: CLIENT_AND_SERVER}
  providers: [{name: zip}]
  randomSamplingPercentage: 12.34
  disableSpanReporting: true
  disableContextPropagation: false
  useRequestIdForTraceSampling: false
  enableIstioTags: true
  customTags:
    a: {literal: {value: x}}
    b: {environment: {name: HOME, defaultValue: none}}
    c: {header: {name: X-User, defaultValue: nobody}}
    d: {formatter: {value: \"%PROTOCOL%\"}}
",
    ));
    assert_eq!(policy.targets.len(), 1);
    let log = AccessLogging {
        providers: vec!["file".into()],
        disabled: Some(true),
        filter: Some("response.code >= 400".into()),
    };
    assert_eq!(policy.access_logging, [log]);
    let metrics = &policy.metrics[0];
    assert_eq!(metrics.interval, Some(Duration::from_millis(1500)));
    let [count, all] = metrics.overrides.as_slice() else { panic!("{metrics:?}") };
    assert_eq!((count.metric, count.disabled), (Some(Metric::RequestCount), Some(false)));
    assert_eq!(count.tags["team"], TagChange::Upsert("request.headers['x-team']".into()));
    assert_eq!(count.tags["source_principal"], TagChange::Remove);
    assert_eq!((all.metric, all.disabled), (None, Some(true)));
    let TracingChange {
        sampling,
        disable_reporting,
        disable_propagation,
        use_request_id,
        istio_tags,
        tags,
        ..
    } = &policy.tracing[0];
    assert_eq!(*sampling, Some(1234));
    assert_eq!((*disable_reporting, *disable_propagation), (Some(true), Some(false)));
    assert_eq!((*use_request_id, *istio_tags), (Some(false), Some(true)));
    let tags = tags.as_ref().unwrap();
    assert_eq!(tags["a"], SpanTag::Literal("x".into()));
    assert_eq!(tags["b"], SpanTag::Environment("HOME".into(), "none".into()));
    assert_eq!(tags["c"], SpanTag::Header("x-user".into(), "nobody".into()));
    assert_eq!(tags["d"], SpanTag::Formatter("%PROTOCOL%".into()));
}

#[test]
fn every_metric_has_its_name() {
    let all = "metrics: [{overrides: [{match: {metric: ALL_METRICS}, disabled: true}]}]";
    assert_eq!(the_policy(telemetry(all)).metrics[0].overrides[0].metric, None);
    for (name, metric) in Metric::ALL {
        let spec = format!("metrics: [{{overrides: [{{match: {{metric: {name}}}, disabled: true}}]}}]");
        let policy = the_policy(telemetry(&spec));
        assert_eq!(policy.metrics[0].overrides[0].metric, Some(metric));
    }
}

#[test]
fn wrong_telemetry_is_refused_at_the_exact_field() {
    for (name, spec, expected) in [
        ("unknown field", "traces: []", "error unknown-field spec.traces"),
        ("unknown field within", "tracing: [{provider: []}]", "error unknown-field spec.tracing[0].provider"),
        (
            "ill-typed",
            "accessLogging: [{disabled: \"yes\"}]",
            "error wrong-type spec.accessLogging[0].disabled",
        ),
        (
            "bad filter",
            "accessLogging: [{filter: {expression: \"1 +\"}}]",
            "error bad-expression spec.accessLogging[0].filter.expression",
        ),
        (
            "no such attribute",
            "accessLogging: [{filter: {expression: response.kode == 1}}]",
            "error bad-expression spec.accessLogging[0].filter.expression",
        ),
        (
            "no such metric",
            "metrics: [{overrides: [{match: {metric: REQUESTS}}]}]",
            "error invalid-value spec.metrics[0].overrides[0].match.metric",
        ),
        (
            "upsert without value",
            "metrics: [{overrides: [{tagOverrides: {a: {}}}]}]",
            "error missing-field spec.metrics[0].overrides[0].tagOverrides.a",
        ),
        (
            "not a label",
            "metrics: [{overrides: [{tagOverrides: {a-b: {value: \"'x'\"}}}]}]",
            "error invalid-value spec.metrics[0].overrides[0].tagOverrides.a-b",
        ),
        (
            "interval of nothing",
            "metrics: [{reportingInterval: 0s}]",
            "error invalid-value spec.metrics[0].reportingInterval",
        ),
        (
            "interval without unit",
            "metrics: [{reportingInterval: \"5\"}]",
            "error invalid-value spec.metrics[0].reportingInterval",
        ),
        (
            "more than all",
            "tracing: [{randomSamplingPercentage: 101}]",
            "error invalid-value spec.tracing[0].randomSamplingPercentage",
        ),
        (
            "a tag of two kinds",
            "tracing: [{customTags: {a: {literal: {value: x}, header: {name: y}}}}]",
            "error invalid-value spec.tracing[0].customTags.a",
        ),
        (
            "a format with an unknown operator",
            "tracing: [{customTags: {a: {formatter: {value: \"%NOPE%\"}}}}]",
            "error bad-format spec.tracing[0].customTags.a.formatter.value",
        ),
        (
            "a selector beside targets",
            "selector: {matchLabels: {a: b}}\ntargetRefs: [{kind: Service, name: web}]",
            "error selector-and-target-refs spec.selector",
        ),
    ] {
        let decoded = telemetry(spec);
        assert_eq!(shorts(&decoded), [expected], "{name}");
        assert!(decoded.broken && decoded.changes.is_empty(), "{name}");
    }
}

#[test]
fn what_has_no_effect_is_reported_and_the_rest_applies() {
    for (name, spec, expected) in [
        (
            "unknown provider",
            "accessLogging: [{providers: [{name: nobody}]}]",
            "warning unknown-provider spec.accessLogging[0].providers[0].name",
        ),
        (
            "provider of another kind",
            "tracing: [{providers: [{name: file}]}]",
            "warning unknown-provider spec.tracing[0].providers[0].name",
        ),
        (
            "for clients",
            "accessLogging: [{match: {mode: CLIENT}}]",
            "warning not-attached spec.accessLogging[0].match.mode",
        ),
        (
            "a metric that there is not",
            "metrics: [{overrides: [{match: {customMetric: mine}}]}]",
            "warning not-supported spec.metrics[0].overrides[0].match.customMetric",
        ),
        (
            "a second tracing provider",
            "tracing: [{providers: [{name: otel}, {name: zip}]}]",
            "warning not-supported spec.tracing[0].providers",
        ),
        (
            "a label that cannot be computed",
            "metrics: [{overrides: [{tagOverrides: {a: {value: \"((\"}}}]}]",
            "error bad-expression spec.metrics[0].overrides[0].tagOverrides.a.value",
        ),
    ] {
        let decoded = telemetry(spec);
        assert_eq!(shorts(&decoded), [expected], "{name}");
        assert!(matches!(decoded.changes.as_slice(), [Change::Telemetry(_)]), "{name}");
    }
    let selects = telemetry("selector: {matchLabels: {app: web}}");
    assert_eq!(shorts(&selects), ["warning not-attached spec.selector"]);
    assert!(matches!(selects.changes.as_slice(), [Change::L7Removed(_)]));
}

#[test]
fn settings_that_say_nothing_leave_istios_defaults() {
    assert_eq!(*settings("trustDomain: td"), TelemetryDefaults::default());
    let defaults = TelemetryDefaults::default();
    assert_eq!(defaults.provider("prometheus").unwrap().kind, TelemetryProviderKind::Prometheus);
    let stdout = FileLog { path: "/dev/stdout".into(), format: LogFormat::DefaultText, omit_empty: false };
    assert_eq!(defaults.provider("envoy").unwrap().kind, TelemetryProviderKind::File(stdout));
}

#[test]
fn the_legacy_log_is_read() {
    let file = |text: &str| settings(text).file.as_deref().cloned();
    let log = |path: &str, format| Some(FileLog { path: path.into(), format, omit_empty: false });
    let json =
        vec![("a".into(), LogValue::Text("%PROTOCOL%".into())), ("n".into(), LogValue::Literal("1".into()))];
    for (text, expected) in [
        ("accessLogEncoding: JSON", None),
        ("accessLogFile: /x", log("/x", LogFormat::DefaultText)),
        ("accessLogFile: \"\"", log("", LogFormat::DefaultText)),
        ("accessLogFile: /x\naccessLogEncoding: JSON", log("/x", LogFormat::DefaultJson)),
        (
            "accessLogFile: /x\naccessLogFormat: \"%PROTOCOL%\"",
            log("/x", LogFormat::Text("%PROTOCOL%".into())),
        ),
        (
            "accessLogFile: /x\naccessLogEncoding: JSON\naccessLogFormat: '{\"a\": \"%PROTOCOL%\", \"n\": 1}'",
            log("/x", LogFormat::Json(json)),
        ),
    ] {
        assert_eq!(file(text), expected, "{text}");
    }
}

fn provider(kind: &str) -> TelemetryProviderKind {
    let defaults = settings(&format!("extensionProviders: [{{name: p, {kind}}}]"));
    defaults.provider("P").unwrap().kind.clone()
}

#[test]
fn providers_have_istios_defaults() {
    let at = "service: ns/host.example, port: 1";
    let TelemetryProviderKind::File(file) = provider("envoyFileAccessLog: {}") else { panic!() };
    assert_eq!((&*file.path, file.format, file.omit_empty), ("/dev/stdout", LogFormat::DefaultText, false));
    let TelemetryProviderKind::Als(als) = provider(&format!("envoyHttpAls: {{{at}}}")) else { panic!() };
    assert_eq!(
        (&*als.log_name, als.tcp, als.at.namespace.as_deref()),
        ("http_envoy_accesslog", false, Some("ns"))
    );
    assert_eq!((&*als.at.host, als.at.port), ("host.example", 1));
    let TelemetryProviderKind::Als(als) = provider(&format!("envoyTcpAls: {{{at}}}")) else { panic!() };
    assert_eq!((&*als.log_name, als.tcp), ("tcp_envoy_accesslog", true));
    let TelemetryProviderKind::OtelLog(log) = provider(&format!("envoyOtelAls: {{{at}}}")) else { panic!() };
    assert_eq!((&*log.log_name, log.body, log.attributes), ("otel_envoy_accesslog", None, Vec::new()));
    let TelemetryProviderKind::OtelTrace(otel) = provider(&format!("opentelemetry: {{{at}}}")) else {
        panic!()
    };
    assert_eq!((otel.tag_bytes_max, otel.environment_detector), (256, false));
    assert!(matches!(otel.transport, OtelTransport::Grpc { headers, .. } if headers.is_empty()));
    let http = provider(&format!("opentelemetry: {{{at}, http: {{headers: [{{name: X-Key, value: v}}]}}}}"));
    let TelemetryProviderKind::OtelTrace(otel) = http else { panic!() };
    let OtelTransport::Http { path, timeout, headers } = otel.transport else { panic!() };
    assert_eq!((&*path, timeout), ("/v1/traces", Duration::from_secs(3)));
    assert_eq!(headers, [("x-key".into(), "v".into())]);
    let TelemetryProviderKind::Zipkin(zipkin) = provider(&format!("zipkin: {{{at}}}")) else { panic!() };
    assert_eq!((&*zipkin.path, zipkin.timeout), ("/api/v2/spans", Duration::from_secs(5)));
    assert_eq!((zipkin.wide_ids, zipkin.with_w3c), (true, false));
    let w3c = format!(
        "zipkin: {{{at}, enable64bitTraceId: true, traceContextOption: USE_B3_WITH_W3C_PROPAGATION}}"
    );
    let TelemetryProviderKind::Zipkin(zipkin) = provider(&w3c) else { panic!() };
    assert_eq!((zipkin.wide_ids, zipkin.with_w3c), (false, true));
}

#[test]
fn labels_of_a_log_may_be_nested() {
    let kind = provider(
        "envoyFileAccessLog: {path: /x, omitEmptyValues: true, logFormat: {labels: {a: [x, {b: 1.5}], c: true}}}",
    );
    let TelemetryProviderKind::File(FileLog { format: LogFormat::Json(entries), omit_empty: true, .. }) =
        kind
    else {
        panic!("{kind:?}")
    };
    let text = |text: &str| LogValue::Text(text.into());
    let literal = |text: &str| LogValue::Literal(text.into());
    let map = LogValue::Map(vec![("b".into(), literal("1.5"))]);
    assert_eq!(entries, [("a".into(), LogValue::List(vec![text("x"), map])), ("c".into(), literal("true"))]);
}

#[test]
fn wrong_settings_are_refused_at_the_exact_field() {
    for (name, text, expected) in [
        (
            "unknown operator",
            "extensionProviders: [{name: p, envoyFileAccessLog: {logFormat: {text: \"%WHAT%\"}}}]",
            "error bad-format data.mesh.extensionProviders[0].envoyFileAccessLog.logFormat.text",
        ),
        (
            "two formats",
            "extensionProviders: [{name: p, envoyFileAccessLog: {logFormat: {text: x, labels: {a: b}}}}]",
            "error invalid-value data.mesh.extensionProviders[0].envoyFileAccessLog.logFormat.labels",
        ),
        (
            "unknown field",
            "extensionProviders: [{name: p, zipkin: {service: s, port: 1, nope: 1}}]",
            "error unknown-field data.mesh.extensionProviders[0].zipkin.nope",
        ),
        (
            "no port",
            "extensionProviders: [{name: p, prometheus: {}, zipkin: {}}]",
            "error invalid-value data.mesh.extensionProviders[0].zipkin",
        ),
        ("no file name", "accessLogFile: 1", "error wrong-type data.mesh.accessLogFile"),
        (
            "a format that is no JSON",
            "accessLogEncoding: JSON\naccessLogFormat: x",
            "error bad-format data.mesh.accessLogFormat",
        ),
        (
            "a path without a slash",
            "extensionProviders: [{name: p, zipkin: {service: s, port: 1, path: x}}]",
            "error invalid-value data.mesh.extensionProviders[0].zipkin.path",
        ),
    ] {
        let decoded = mesh_config(text);
        let errors: Vec<String> =
            shorts(&decoded).into_iter().filter(|one| one.starts_with("error")).collect();
        assert_eq!(errors, [expected], "{name}");
        assert!(decoded.broken && decoded.changes.is_empty(), "{name}");
    }
}

#[test]
fn settings_that_have_no_effect_are_reported() {
    for (name, text, expected) in [
        (
            "a kind that is not supported",
            "extensionProviders: [{name: p, datadog: {}}]",
            "warning not-supported data.mesh.extensionProviders[0].datadog",
        ),
        (
            "a default that is not there",
            "defaultProviders: {tracing: [nobody]}",
            "warning unknown-provider data.mesh.defaultProviders.tracing[0]",
        ),
        ("tracing to nowhere", "enableTracing: true", "warning not-supported data.mesh.enableTracing"),
        (
            "a legacy collector",
            "defaultConfig: {tracing: {zipkin: {address: x}}}",
            "warning not-supported data.mesh.defaultConfig.tracing.zipkin",
        ),
    ] {
        let decoded = mesh_config(text);
        assert_eq!(shorts(&decoded), [expected], "{name}");
        assert!(!decoded.broken, "{name}");
    }
    assert_eq!(settings("defaultConfig: {tracing: {sampling: 50}}").sampling, 5000);
    let defaults = settings("defaultProviders: {metrics: [], accessLogging: [envoy], tracing: []}");
    assert_eq!((defaults.metrics.len(), defaults.access_logging.as_ref().map(Vec::len)), (0, Some(1)));
}
