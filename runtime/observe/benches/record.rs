//! What telemetry costs a request: metrics and an access log line, as the default, and as Telemetry resources may ask.
//!
//! The target is 3 µs for metrics and log together. Each is beside a fixed loop that stands for the machine's speed.

// What does not hold ends the benchmark.
#![allow(clippy::unwrap_used)]

use cairn_mesh::{
    FileLog, Identity, LogFormat, LogPlan, LogTarget, Metric, MetricsPlan, TagChange, TelemetryPlan, Workload,
};
use cairn_observe::{Observer, Outputs, Own};
use cairn_telemetry::{HttpRecord, HttpScope, Observe, PeerLabels, Telemetry, TelemetrySettings};
use divan::{Bencher, black_box};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

fn main() {
    divan::main();
}

fn workload(name: &str) -> Arc<Workload> {
    Arc::new(Workload::new(name, name, Identity::new("cluster.local", "shop", name).unwrap()))
}

fn measure(bencher: Bencher<'_, '_>, plan: Option<TelemetryPlan>) {
    let telemetry = Telemetry::new("waypoint", "1", &TelemetrySettings::default(), std::io::sink());
    let outputs = Outputs::new(Arc::clone(&telemetry), Arc::default(), drop);
    let observer = plan.map(|plan| Observer::compile(&plan, &Arc::new(Own::default()), &outputs));
    let (source, upstream) = (workload("web"), workload("cart"));
    let scope =
        HttpScope::new(&telemetry.metrics, PeerLabels::of(Some(&source), Some(&source.identity)), None);
    let record = HttpRecord {
        duration: Duration::from_micros(12_900),
        upstream_duration: Some(Duration::from_millis(11)),
        request_id: Some(b"0a1b2c3d-0000-4000-8000-000000000000"),
        method: "GET",
        path: "/catalog/items?page=2",
        protocol: "HTTP/1.1",
        authority: "catalog.shop.svc.cluster.local:8000",
        user_agent: Some(b"curl/8.9"),
        status: 200,
        details: "via_upstream",
        request_bytes: 203,
        response_body_bytes: 1024,
        response_bytes: 1200,
        upstream: Some("10.0.0.2:8080".parse().unwrap()),
        upstream_workload: Some(&upstream),
        cluster: "inbound-vip|8000|http|catalog.shop.svc.cluster.local",
        route: "default",
        ..HttpRecord::new(
            SystemTime::now(),
            "10.0.0.1:40000".parse().unwrap(),
            "10.96.0.1:8000".parse().unwrap(),
        )
    };
    bencher.bench_local(|| {
        telemetry.record_http(
            black_box(&scope),
            black_box(&record),
            observer.as_ref().map(|observer| observer as &dyn Observe),
        );
    });
    assert!(telemetry.metrics.encode().contains("istio_requests_total{"));
}

fn logged(format: LogFormat, filter: Option<&str>) -> TelemetryPlan {
    let file = FileLog { path: "/dev/stdout".into(), format, omit_empty: false };
    let log = LogPlan { to: LogTarget::File(Arc::new(file)), filter: filter.map(Arc::from) };
    TelemetryPlan { logs: vec![log], ..TelemetryPlan::default() }
}

/// The machine's speed: a hash of 4 KiB, byte by byte.
#[divan::bench]
fn reference() -> u64 {
    let bytes = black_box([7_u8; 4096]);
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Standard metrics and Istio's default line.
#[divan::bench]
fn standard(bencher: Bencher<'_, '_>) {
    measure(bencher, None);
}

/// A text format of one's own.
#[divan::bench]
fn custom_text(bencher: Bencher<'_, '_>) {
    let text = "[%START_TIME%] %REQ(:METHOD)% %REQ(:PATH)% %RESPONSE_CODE% %DURATION% %UPSTREAM_HOST% %REQ(USER-AGENT)%";
    measure(bencher, Some(logged(LogFormat::Text(text.into()), None)));
}

/// Istio's default keys as JSON.
#[divan::bench]
fn default_json(bencher: Bencher<'_, '_>) {
    measure(bencher, Some(logged(LogFormat::DefaultJson, None)));
}

/// The default line behind a filter that is true.
#[divan::bench]
fn filtered(bencher: Bencher<'_, '_>) {
    let filter = "response.code >= 200 && request.url_path.startsWith('/catalog')";
    measure(bencher, Some(logged(LogFormat::DefaultText, Some(filter))));
}

/// A constant label and one that is computed, on every metric.
#[divan::bench]
fn two_labels(bencher: Bencher<'_, '_>) {
    let upsert = |name: &str, value: &str| (Arc::from(name), TagChange::Upsert(value.into()));
    let tags = BTreeMap::from([upsert("constant", "'test'"), upsert("method", "request.method")]);
    let tags = Metric::ALL.into_iter().map(|(_, metric)| (metric, tags.clone())).collect();
    let metrics = MetricsPlan { tags, ..MetricsPlan::default() };
    measure(bencher, Some(TelemetryPlan { metrics, ..logged(LogFormat::DefaultText, None) }));
}
