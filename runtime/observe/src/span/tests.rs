//! Which requests are traced, what goes upstream, and what spans say.

use super::*;
use crate::testing::Exchange;
use cairn_mesh::{OtelTrace, OtelTransport, ProviderAddress, TelemetryProvider, ZipkinTrace};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

fn at() -> ProviderAddress {
    ProviderAddress { host: "collector".into(), namespace: None, port: 4317 }
}

fn plan(kind: TelemetryProviderKind, sampling: u16) -> TracingPlan {
    TracingPlan {
        provider: Arc::new(TelemetryProvider { name: "p".into(), kind }),
        sampling,
        report: true,
        propagate: true,
        tags: BTreeMap::new(),
        use_request_id: true,
        istio_tags: true,
        client_spans: false,
    }
}

fn otel() -> TelemetryProviderKind {
    let transport = OtelTransport::Grpc { timeout: Duration::from_secs(1), headers: Vec::new() };
    TelemetryProviderKind::OtelTrace(OtelTrace {
        at: at(),
        transport,
        tag_bytes_max: 4,
        environment_detector: false,
    })
}

fn zipkin(wide_ids: bool) -> TelemetryProviderKind {
    TelemetryProviderKind::Zipkin(ZipkinTrace {
        at: at(),
        path: "/".into(),
        tag_bytes_max: 256,
        wide_ids,
        with_w3c: false,
        timeout: Duration::from_secs(1),
        headers: Vec::new(),
    })
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
}

/// Its number is 0, so that any share but none takes it.
const FIRST_ID: &str = "00000000-0000-4000-8000-000000000000";
/// Its number is 9,999, so that only all takes it.
const LAST_ID: &str = "0000270f-0000-4000-8000-000000000000";
const MARKED_ID: &str = "0000270f-0000-9000-8000-000000000000";

#[test]
fn the_callers_decision_counts_then_force_then_the_share() {
    let parent = |flags| match flags {
        1 => ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        _ => ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"),
    };
    for (name, sampling, pairs, expected) in [
        ("the caller traces", 0, vec![parent(1)], true),
        ("the caller does not", 10_000, vec![parent(0)], false),
        ("the caller does not, though forced", 10_000, vec![parent(0), ("x-envoy-force-trace", "1")], false),
        ("all", 10_000, vec![], true),
        ("none", 0, vec![], false),
        ("forced by a client", 0, vec![("x-client-trace-id", "1")], true),
        ("forced by a service", 0, vec![("x-envoy-force-trace", "1")], true),
        ("within the share", 1, vec![("x-request-id", FIRST_ID)], true),
        ("outside the share", 9_999, vec![("x-request-id", LAST_ID)], false),
        ("all, whatever the id", 10_000, vec![("x-request-id", LAST_ID)], true),
        ("none, whatever the id", 0, vec![("x-request-id", FIRST_ID)], false),
        ("marked before", 0, vec![("x-request-id", MARKED_ID)], true),
        ("an id that is no UUID, all", 10_000, vec![("x-request-id", "mine")], true),
        ("an id that is no UUID, none", 0, vec![("x-request-id", "mine")], false),
    ] {
        let tracer = Tracer::compile(&plan(otel(), sampling)).unwrap();
        assert_eq!(tracer.begin(&mut headers(&pairs)).sampled, expected, "{name}");
    }
}

#[test]
fn without_request_ids_only_chance_decides() {
    let by_chance = |sampling| TracingPlan { use_request_id: false, ..plan(otel(), sampling) };
    let share = |sampling, id| {
        let tracer = Tracer::compile(&by_chance(sampling)).unwrap();
        let traced = (0..4000).filter(|_| tracer.begin(&mut headers(&[("x-request-id", id)])).sampled);
        traced.count()
    };
    assert_eq!(share(0, MARKED_ID), 0, "marks of ids are not looked at");
    assert_eq!(share(10_000, LAST_ID), 4000);
    let half = share(5_000, LAST_ID);
    assert!((1700..2300).contains(&half), "{half} of 4000");
}

#[test]
fn a_sampled_request_is_marked_in_its_id() {
    let tracer = Tracer::compile(&plan(otel(), 10_000)).unwrap();
    let mut sent = headers(&[("x-request-id", LAST_ID)]);
    tracer.begin(&mut sent);
    assert_eq!(sent["x-request-id"], MARKED_ID);
}

#[test]
fn context_goes_on_whether_sampled_or_not_unless_it_must_not() {
    for (sampling, flags) in [(10_000, "01"), (0, "00")] {
        let mut sent = HeaderMap::new();
        let trace = Tracer::compile(&plan(otel(), sampling)).unwrap().begin(&mut sent);
        let expected = format!("00-{:032x}-{:016x}-{flags}", trace.trace_id, trace.span_id);
        assert_eq!(sent["traceparent"], expected.as_str());
    }
    let silent = TracingPlan { propagate: false, ..plan(otel(), 10_000) };
    let mut sent = HeaderMap::new();
    Tracer::compile(&silent).unwrap().begin(&mut sent);
    assert!(sent.is_empty());
}

#[test]
fn a_span_belongs_to_its_callers_trace() {
    let mut sent = headers(&[("b3", "00000000000000ab-00000000000000cd-1")]);
    let trace = Tracer::compile(&plan(zipkin(true), 0)).unwrap().begin(&mut sent);
    assert_eq!((trace.trace_id, trace.parent_id, trace.sampled), (0xab, 0xcd, true));
    assert_eq!(sent["x-b3-traceid"], "00000000000000ab", "as wide as the caller's");
    assert_eq!(sent["x-b3-parentspanid"], "00000000000000cd");
    assert_ne!(trace.span_id, 0xcd);
    let narrow = Tracer::compile(&plan(zipkin(false), 0)).unwrap().begin(&mut HeaderMap::new());
    assert!(narrow.trace_id <= u128::from(u64::MAX));
}

fn tags_of(
    plan: &TracingPlan,
    change: impl FnOnce(&mut cairn_telemetry::HttpRecord<'_>),
) -> (Span, BTreeMap<String, String>) {
    let trace =
        Trace { trace_id: 1, span_id: 2, parent_id: 3, sampled: true, narrow: false, state: String::new() };
    let span = Exchange::new().with(change, |facts| Tracer::compile(plan).unwrap().span(&trace, facts));
    let tags = span.tags.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
    (span, tags)
}

#[test]
fn spans_have_the_standard_tags_and_istios() {
    let (span, tags) = tags_of(&plan(otel(), 0), |_| ());
    assert_eq!((span.trace_id, span.id, span.parent_id, span.is_error), (1, 2, 3, false));
    assert_eq!(span.name, "/a/b");
    assert_eq!(span.end.duration_since(span.start).unwrap(), Duration::from_micros(12_900));
    for (name, expected) in [
        ("component", "proxy"),
        ("http.method", "GET"),
        ("http.url", "http://cart:80/a/b"),
        ("http.protocol", "HTTP/1.1"),
        ("http.status_code", "200"),
        ("request_size", "3"),
        ("response_size", "5"),
        ("response_flags", "-"),
        ("user_agent", "curl/8"),
        ("guid:x-request-id", "0a1b"),
        ("peer.address", "10.0.0.1"),
        ("upstream_cluster", "inbound-vip|80|http|cart"),
        ("upstream_cluster.name", "inbound-vip|80|http|cart"),
        ("node_id", "waypoint~10.0.0.9~wp-0.shop~shop.svc.cluster.local"),
        ("istio.namespace", "shop"),
        ("istio.mesh_id", "cluster.local"),
        ("istio.cluster_id", "c1"),
        ("istio.canonical_service", "wp"),
        ("istio.canonical_revision", "latest"),
        ("istio.source_workload", "web"),
        ("istio.source_namespace", "shop"),
        ("istio.source_instance_name", "web-0"),
        ("istio.destination_workload", "cart"),
        ("istio.destination_canonical_service", "cart-app"),
        ("istio.destination_canonical_revision", "v1"),
        ("istio.destination_workload_type", "pod"),
    ] {
        assert_eq!(tags.get(name).map(String::as_str), Some(expected), "{name}");
    }
    assert!(!tags.contains_key("error"));
    let without = TracingPlan { istio_tags: false, ..plan(otel(), 0) };
    assert!(!tags_of(&without, |_| ()).1.keys().any(|name| name.starts_with("istio.")));
}

#[test]
fn a_failure_is_an_error() {
    for (name, status, grpc, expected) in [
        ("an answer", 200, None, false),
        ("not found", 404, None, false),
        ("a server's fault", 503, None, true),
        ("no answer", 0, None, true),
        ("gRPC's internal error", 200, Some(13), true),
        ("gRPC's not found", 200, Some(5), false),
    ] {
        let (span, tags) =
            tags_of(&plan(otel(), 0), |record| (record.status, record.grpc_status) = (status, grpc));
        assert_eq!((span.is_error, tags.contains_key("error")), (expected, expected), "{name}");
    }
}

#[test]
fn custom_tags_come_from_where_they_say() {
    let tag = |name: &str, tag| (Arc::from(name), tag);
    let tags = BTreeMap::from([
        tag("literal", SpanTag::Literal("x".into())),
        tag("environment", SpanTag::Environment("CAIRN_IS_NOT_SET".into(), "default".into())),
        tag("header", SpanTag::Header("x-team".into(), "nobody".into())),
        tag("no-header", SpanTag::Header("x-missing".into(), "nobody".into())),
        tag("nothing", SpanTag::Header("x-missing".into(), "".into())),
        tag("format", SpanTag::Formatter("%PROTOCOL%/%RESPONSE_CODE%".into())),
    ]);
    let plan = TracingPlan { tags, ..plan(otel(), 0) };
    let (_, tags) = tags_of(&plan, |_| ());
    for (name, expected) in [
        ("literal", Some("x")),
        ("environment", Some("default")),
        ("header", Some("blue")),
        ("no-header", Some("nobody")),
        ("nothing", None),
        ("format", Some("HTTP/1.1/200")),
    ] {
        assert_eq!(tags.get(name).map(String::as_str), expected, "{name}");
    }
    let mut wants = Wants::default();
    Tracer::compile(&plan).unwrap().want(&mut wants);
    assert_ne!(wants.request, Default::default());
}

#[test]
fn attempts_have_spans_where_the_gateway_asks() {
    let asked = |sampling| TracingPlan { client_spans: true, ..plan(otel(), sampling) };
    for (name, plan, expected) in [
        ("by default", plan(otel(), 10_000), false),
        ("asked", asked(10_000), true),
        ("not sampled", asked(0), false),
        ("not reported", TracingPlan { report: false, ..asked(10_000) }, false),
    ] {
        let tracer = Tracer::compile(&plan).unwrap();
        let mut sent = HeaderMap::new();
        let trace = tracer.begin(&mut sent);
        let attempt = tracer.attempt(&trace, &mut sent);
        assert_eq!(attempt.is_some(), expected, "{name}");
        let told = format!("{:016x}", attempt.unwrap_or(trace.span_id));
        assert_eq!(sent["traceparent"].to_str().unwrap().split('-').nth(2), Some(&*told), "{name}");
    }
    let silent = TracingPlan { propagate: false, ..asked(10_000) };
    let tracer = Tracer::compile(&silent).unwrap();
    let mut sent = HeaderMap::new();
    let trace = tracer.begin(&mut sent);
    assert!(tracer.attempt(&trace, &mut sent).is_some() && sent.is_empty(), "a span that nobody is told of");
}

#[test]
fn an_attempts_context_names_the_exchange_as_its_parent_in_b3() {
    let tracer = Tracer::compile(&TracingPlan { client_spans: true, ..plan(zipkin(true), 10_000) }).unwrap();
    let mut sent = headers(&[("b3", "00000000000000ab-00000000000000cd-1")]);
    let trace = tracer.begin(&mut sent);
    let first = tracer.attempt(&trace, &mut sent).unwrap();
    let second = tracer.attempt(&trace, &mut sent).unwrap();
    assert_ne!(first, second);
    assert_eq!(sent["x-b3-spanid"], format!("{second:016x}").as_str());
    assert_eq!(sent["x-b3-parentspanid"], format!("{:016x}", trace.span_id).as_str());
    assert_eq!(sent["b3"], format!("00000000000000ab-{second:016x}-1").as_str());
}

#[test]
fn an_attempts_span_is_its_exchanges_child() {
    let cart = crate::testing::workload("cart");
    let attempt = |span_id, after, duration, flags| Try {
        span_id,
        after: Duration::from_millis(after),
        duration,
        upstream: "10.0.0.2:8080".parse().unwrap(),
        workload: Arc::clone(&cart),
        flags,
    };
    let failed = attempt(7, 1, Some(Duration::from_millis(2)), "UF");
    let tries = [failed, attempt(8, 4, None, "-")];
    let exchange = Exchange::new();
    let mut record = exchange.record();
    record.tries = &tries;
    let trace = record.trace.unwrap();
    let plan = TracingPlan { client_spans: true, ..plan(otel(), 0) };
    let tracer = Tracer::compile(&plan).unwrap();
    let spans: Vec<Span> = exchange.see(&record, |facts| {
        tries.iter().enumerate().map(|one| tracer.client_span(trace, one, facts)).collect()
    });
    let millis = |span: &Span| {
        let since = |at: SystemTime| at.duration_since(record.started).unwrap().as_micros();
        (since(span.start), since(span.end))
    };
    let [first, second] = spans.as_slice() else { panic!("{spans:?}") };
    assert_eq!((first.kind, first.id, first.parent_id), (SpanKind::Client, 7, trace.span_id));
    assert_eq!((second.id, second.parent_id, second.trace_id), (8, trace.span_id, trace.trace_id));
    assert_eq!(millis(first), (1000, 3000));
    assert_eq!(millis(second), (4000, 12_900), "to the exchange's end");
    assert_eq!((first.is_error, second.is_error), (true, false));
    assert_eq!(second.name, "router inbound-vip|80|http|cart egress");
    let tag = |span: &Span, name: &str| {
        span.tags.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()).unwrap_or_default()
    };
    for (name, of_first, of_second) in [
        ("component", "proxy", "proxy"),
        ("http.protocol", "HTTP/1.1", "HTTP/1.1"),
        ("upstream_cluster", "inbound-vip|80|http|cart", "inbound-vip|80|http|cart"),
        ("upstream_cluster.name", "inbound-vip|80|http|cart", "inbound-vip|80|http|cart"),
        ("upstream_address", "10.0.0.2:8080", "10.0.0.2:8080"),
        ("peer.address", "10.0.0.2:8080", "10.0.0.2:8080"),
        ("response_flags", "UF", "-"),
        ("http.status_code", "0", "200"),
        ("retry.count", "", "1"),
        ("error", "true", ""),
        ("istio.destination_workload", "cart", "cart"),
    ] {
        assert_eq!((&*tag(first, name), &*tag(second, name)), (of_first, of_second), "{name}");
    }
}

#[test]
fn policies_on_trial_are_told() {
    let said = serde_json::json!({"envoy.filters.http.rbac": {
        "istio_dry_run_allow_shadow_engine_result": "denied",
        "istio_dry_run_allow_shadow_effective_policy_id": "ns[a]-policy[b]-rule[0]",
        "istio_dry_run_deny_shadow_engine_result": "allowed",
    }});
    let exchange = Exchange::new();
    let mut record = exchange.record();
    record.metadata = said.as_object();
    let tags = |plan: &TracingPlan| {
        let tracer = Tracer::compile(plan).unwrap();
        let span = exchange.see(&record, |facts| tracer.span(record.trace.unwrap(), facts));
        let of_trial = |(name, _): &(Cow<'static, str>, String)| name.contains("dry_run");
        span.tags
            .into_iter()
            .filter(of_trial)
            .map(|(name, value)| format!("{name}={value}"))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        tags(&plan(otel(), 0)),
        [
            "istio.authorization.dry_run.allow_policy.name=ns[a]-policy[b]-rule[0]",
            "istio.authorization.dry_run.allow_policy.result=denied",
            "istio.authorization.dry_run.deny_policy.result=allowed",
        ]
    );
    assert!(tags(&TracingPlan { istio_tags: false, ..plan(otel(), 0) }).is_empty());
}

#[test]
fn a_path_is_cut_where_the_provider_says() {
    for (most, expected) in
        [(4, "http://cart:80/a/b"), (256, "http://cart:80/a/b?c=d"), (0, "http://cart:80")]
    {
        let mut kind = otel();
        if let TelemetryProviderKind::OtelTrace(otel) = &mut kind {
            otel.tag_bytes_max = most;
        }
        assert_eq!(tags_of(&plan(kind, 0), |_| ()).1["http.url"], expected, "{most}");
    }
}
