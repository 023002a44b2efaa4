//! Telemetry resources: each changes what is observed of what it names, and of nothing else, soon after an edit.

use crate::client::{Answer, Client, Who, metrics, request, wait_for};
use crate::edits::SMALL;
use crate::harness::{Mesh, SOON};
use crate::peers;
use anyhow::{Context, Result, ensure};
use http::Method;
use serde_json::Value;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// A second service of the same pods.
const SIBLING: (&str, &str) = (
    "sibling.yaml",
    "apiVersion: v1
kind: Service
metadata: { name: sibling, namespace: shop }
spec:
  selector: { app: catalog }
  ports: [{ name: http, port: 8000, targetPort: 8080 }]
",
);

/// The mesh with annotations on the waypoint's Gateway.
fn annotated(annotations: &str) -> Result<String> {
    let plain = "metadata: { name: gate, namespace: shop, labels:";
    ensure!(SMALL.1.contains(plain), "no such Gateway");
    Ok(SMALL.1.replace(
        plain,
        &format!("metadata: {{ name: gate, namespace: shop, annotations: {{ {annotations} }}, labels:"),
    ))
}

/// A Telemetry of the catalog.
fn of_catalog(spec: &str) -> String {
    format!(
        "apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{ name: of-catalog, namespace: shop }}
spec:
  targetRefs: [{{ group: \"\", kind: Service, name: catalog }}]
{spec}"
    )
}

pub fn mesh_config(text: &str) -> String {
    let text: String = text.lines().map(|line| format!("    {line}\n")).collect();
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: istio, namespace: istio-system }}\ndata:\n  mesh: |\n{text}"
    )
}

struct Shop {
    mesh: Mesh,
    web: Who,
    waypoint: IpAddr,
}

impl Shop {
    fn start(manifests: &[(&str, &str)]) -> Result<Self> {
        let mut all = vec![SMALL, SIBLING];
        all.extend(manifests);
        let mesh = Mesh::start(&all, &[])?;
        let (web, waypoint) = (Who::Pod(mesh.pod("shop/web")?), mesh.waypoint("shop/gate")?);
        Ok(Self { mesh, web, waypoint })
    }

    async fn get(&self, service: &str, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let to = self.mesh.service(&format!("shop/{service}"), 8000)?;
        let mut client = Client::open(self.web, to).await?;
        let answer = client.send(request(Method::GET, path, headers)).await?;
        ensure!(answer.status == 200, "{service}{path}: {}", answer.status);
        Ok(answer)
    }

    /// Lines of a file in the mesh's own directory.
    fn lines(&self, file: &str) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(self.mesh.state().join(file)).unwrap_or_default();
        Ok(text.lines().map(str::to_owned).collect())
    }
}

/// Does something again and again until it has come to what is wanted: an edit takes its time.
pub async fn until_true<F: Future<Output = Result<bool>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !attempt().await? {
        ensure!(Instant::now() < deadline, "{what}: not within {SOON:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn sum(text: &str, name: &str, labels: &[&str]) -> u64 {
    let series = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    let has_all = |line: &&str| labels.iter().all(|label| line.contains(label));
    series.filter(has_all).filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

#[tokio::test]
async fn a_service_has_logs_of_its_own_and_edits_take_effect() -> Result<()> {
    let shop = Shop::start(&[])?;
    let file = |name: &str| shop.mesh.state().join(name).display().to_string();
    shop.mesh.write(
        "mesh-config.yaml",
        &mesh_config(&format!(
            "extensionProviders:
- name: text
  envoyFileAccessLog: {{ path: {}, logFormat: {{ text: \"%REQ(:METHOD)% %REQ(:PATH)% %REQ(X-TEAM)% %RESPONSE_CODE%\\n\" }} }}
- name: json
  envoyFileAccessLog: {{ path: {}, logFormat: {{ labels: {{ path: \"%REQ(:PATH)%\", code: \"%RESPONSE_CODE%\" }} }} }}
",
            file("text.log"),
            file("json.log")
        )),
    )?;
    shop.mesh.write("telemetry.yaml", &of_catalog("  accessLogging: [{ providers: [{ name: text }] }]\n"))?;
    let team = [("x-team", "blue")];
    until_true("a line in the service's own file", || async {
        shop.get("catalog", "/mine", &team).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        Ok(shop.lines("text.log")?.contains(&"GET /mine blue 200".to_owned()))
    })
    .await?;
    // Its sibling logs as before, and not there.
    shop.get("sibling", "/its-siblings", &[]).await?;
    wait_for("the sibling's line", || shop.mesh.log("waypoint"), |log| log.contains("/its-siblings")).await?;
    assert!(!shop.lines("text.log")?.iter().any(|line| line.contains("its-siblings")));

    // Another provider, and a filter.
    let filtered = "  accessLogging: [{ providers: [{ name: json }], filter: { expression: \"request.path == '/kept'\" } }]\n";
    shop.mesh.write("telemetry.yaml", &of_catalog(filtered))?;
    until_true("a line of JSON", || async {
        shop.get("catalog", "/left-out", &[]).await?;
        shop.get("catalog", "/kept", &[]).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        Ok(!shop.lines("json.log")?.is_empty())
    })
    .await?;
    let lines = shop.lines("json.log")?;
    assert!(lines.iter().all(|line| line == "{\"code\":200,\"path\":\"/kept\"}"), "{lines:?}");

    // A mistake is said, with its place, and what was in effect stays.
    let broken = filtered.replace("request.path ==", "request.pass ==");
    shop.mesh.write("telemetry.yaml", &of_catalog(&broken))?;
    wait_for(
        "the mistake",
        || shop.mesh.up_log(),
        |log| {
            log.contains("telemetry.yaml:")
                && log.contains("request.pass")
                && log.contains("spec.accessLogging[0].filter.expression")
        },
    )
    .await?;
    let before = shop.lines("json.log")?.len();
    shop.get("catalog", "/kept", &[]).await?;
    until_true("the last good filter", || async { Ok(shop.lines("json.log")?.len() > before) }).await?;

    // Switched off.
    shop.mesh.write("telemetry.yaml", &of_catalog("  accessLogging: [{ disabled: true }]\n"))?;
    until_true("no line", || async {
        let before = shop.lines("json.log")?.len();
        shop.get("catalog", "/kept", &[]).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(shop.lines("json.log")?.len() == before)
    })
    .await
}

#[tokio::test]
async fn a_service_has_labels_of_its_own_that_prometheus_reads() -> Result<()> {
    let shop = Shop::start(&[(
        "telemetry.yaml",
        &of_catalog(
            "  metrics:
  - overrides:
    - match: { metric: REQUEST_COUNT }
      tagOverrides:
        custom_dimension: { value: \"'test'\" }
        source_principal: { operation: REMOVE }
        team: { value: \"request.headers['x-team']\" }
    - match: { metric: REQUEST_SIZE }
      disabled: true
",
        ),
    )])?;
    shop.get("catalog", "/", &[("x-team", "blue")]).await?;
    shop.get("catalog", "/", &[]).await?;
    shop.get("sibling", "/", &[]).await?;
    let of = |service: &str| format!("destination_service_name=\"{service}\"");
    let count = "istio_requests_total";
    until_true("three requests", || async {
        Ok(sum(&metrics(shop.waypoint).await?, count, &["source_workload=\"web\""]) >= 3)
    })
    .await?;
    let text = metrics(shop.waypoint).await?;
    for (labels, expected) in [
        (vec!["custom_dimension=\"test\"", "team=\"blue\""], 1),
        (vec!["custom_dimension=\"test\"", "team=\"unknown\""], 1),
        (vec!["source_principal"], 0),
    ] {
        let mut labels = labels;
        let own = of("catalog");
        labels.push(&own);
        assert_eq!(sum(&text, count, &labels), expected, "{labels:?}\n{text}");
    }
    let sibling = of("sibling");
    assert_eq!(sum(&text, count, &[&sibling, "source_principal=\"spiffe://"]), 1, "{text}");
    assert_eq!(sum(&text, count, &[&sibling, "custom_dimension"]), 0, "{text}");
    assert_eq!(sum(&text, "istio_request_bytes_count", &[&of("catalog")]), 0, "{text}");
    assert_eq!(sum(&text, "istio_request_bytes_count", &[&sibling]), 1, "{text}");
    assert_eq!(sum(&text, "istio_response_bytes_count", &[&of("catalog")]), 2, "{text}");

    let Some(samples) = peers::scrape(&text)? else { return Ok(()) };
    let requests: Vec<&Value> = samples.iter().filter(|sample| sample["name"] == count).collect();
    assert_eq!(requests.len(), 3, "{requests:#?}");
    assert!(requests.iter().all(|sample| sample["type"] == "counter"));
    let buckets = samples.iter().filter(|sample| {
        sample["name"] == "istio_request_duration_milliseconds_bucket"
            && sample["labels"]["destination_service_name"] == "sibling"
    });
    assert_eq!(buckets.count(), 20);
    let labels = requests
        .iter()
        .find(|sample| sample["labels"]["destination_service_name"] == "sibling")
        .and_then(|sample| sample["labels"].as_object())
        .context("the sibling's series")?;
    assert_eq!(labels.len(), 25, "{labels:?}");

    // Bounds of its own, and series that are forgotten when nobody counts.
    let said = "sidecar.istio.io/statsHistogramBuckets: '{\"istiocustom\": [1, 5, 10, 50, 100, 500, 1000, 5000, 10000]}', \
                sidecar.istio.io/statsEvictionInterval: 1s";
    shop.mesh.write("small.yaml", &annotated(said)?)?;
    until_true("ten buckets", || async {
        shop.get("sibling", "/", &[]).await?;
        let text = metrics(shop.waypoint).await?;
        let is_bucket = |line: &&str| {
            line.starts_with("istio_request_duration_milliseconds_bucket{") && line.contains(&sibling)
        };
        Ok(text.lines().filter(is_bucket).count() == 10)
    })
    .await?;
    until_true("no series", || async { Ok(!metrics(shop.waypoint).await?.contains("istio_requests_total{")) })
        .await
}

/// Providers at a collector's ports: by address, and by a name that only DNS knows.
fn collectors(grpc: u16, http: u16) -> String {
    mesh_config(&format!(
        "extensionProviders:
- name: otel-grpc
  opentelemetry: {{ service: 127.0.0.1, port: {grpc}, grpc: {{ initialMetadata: [{{ name: x-key, value: secret }}] }} }}
- name: otel-http
  opentelemetry: {{ service: localhost, port: {http}, http: {{ path: /v1/traces, headers: [{{ name: x-key, value: secret }}] }} }}
- name: zipkin
  zipkin: {{ service: 127.0.0.1, port: {http}, traceContextOption: USE_B3_WITH_W3C_PROPAGATION }}
- name: otel-log
  envoyOtelAls: {{ service: 127.0.0.1, port: {grpc}, logFormat: {{ text: \"%REQ(:PATH)%\", labels: {{ code: \"%RESPONSE_CODE%\" }} }} }}
- name: als
  envoyHttpAls: {{ service: 127.0.0.1, port: {grpc}, additionalRequestHeadersToLog: [x-team] }}
"
    ))
}

fn traced(provider: &str) -> String {
    of_catalog(&format!(
        "  tracing:
  - providers: [{{ name: {provider} }}]
    randomSamplingPercentage: 100
    customTags: {{ customAttribute: {{ literal: {{ value: \"provider={provider}\" }} }}, team: {{ header: {{ name: x-team }} }} }}
  accessLogging: [{{ providers: [{{ name: otel-log }}, {{ name: als }}] }}]
"
    ))
}

#[tokio::test]
async fn spans_and_logs_arrive_at_real_collectors() -> Result<()> {
    let Some(collector) = peers::Collector::start()? else { return Ok(()) };
    let config = collectors(collector.grpc, collector.http);
    let shop = Shop::start(&[("mesh-config.yaml", &config), ("telemetry.yaml", &traced("otel-grpc"))])?;
    let team = ("x-team", "blue");
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{trace}-b7ad6b7169203331-01");

    // The caller's trace goes on, through the waypoint's span.
    let answer =
        shop.get("catalog", "/otlp", &[team, ("traceparent", &parent), ("tracestate", "a=1")]).await?;
    let span = collector.wait("otlp-grpc", |span| span["trace"] == trace).await?;
    assert_eq!((&span["parent"], &span["state"]), (&"b7ad6b7169203331".into(), &"a=1".into()), "{span:#}");
    let sent = format!("00-{trace}-{}-01", span["span"].as_str().unwrap_or_default());
    assert_eq!(answer.seen("traceparent"), Some(&*sent));
    assert_eq!(span["metadata"]["x-key"], "secret", "{span:#}");
    assert_eq!(span["resource"]["service.name"]["stringValue"], "gate.shop", "{span:#}");
    assert_eq!(span["server"], true, "{span:#}");
    for (tag, expected) in [
        ("customAttribute", "provider=otel-grpc"),
        ("team", "blue"),
        ("http.status_code", "200"),
        ("http.method", "GET"),
        ("component", "proxy"),
        ("istio.source_workload", "web"),
        ("istio.destination_workload", "catalog"),
    ] {
        assert_eq!(span["tags"][tag]["stringValue"], expected, "{tag}: {span:#}");
    }

    // Logs of the same request.
    let log = collector.wait("otlp-log", |log| log["body"] == "/otlp").await?;
    assert_eq!(
        (&log["attributes"]["code"]["stringValue"], &log["trace"]),
        (&"200".into(), &trace.into()),
        "{log:#}"
    );
    let entry = collector.wait("als-http", |entry| entry["entry"]["request"]["path"] == "/otlp").await?;
    assert_eq!(entry["log"], "http_envoy_accesslog", "{entry:#}");
    assert_eq!(entry["entry"]["response"]["responseCode"], 200, "{entry:#}");
    assert_eq!(entry["entry"]["request"]["requestHeaders"]["x-team"], "blue", "{entry:#}");

    // The sibling is neither traced nor logged there.
    shop.get("sibling", "/sibling", &[("traceparent", &parent)]).await?;

    // Other providers.
    shop.mesh.write("telemetry.yaml", &traced("otel-http"))?;
    until_true("a span over HTTP, by a DNS name", || async {
        shop.get("catalog", "/http", &[team]).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(!collector.all("otlp-http").is_empty())
    })
    .await?;
    let span = collector.wait("otlp-http", |_| true).await?;
    assert_eq!((&span["metadata"]["x-key"], &span["parent"]), (&"secret".into(), &"".into()), "{span:#}");

    shop.mesh.write("telemetry.yaml", &traced("zipkin"))?;
    let b3 = [("x-b3-traceid", trace), ("x-b3-spanid", "b7ad6b7169203331"), ("x-b3-sampled", "1")];
    until_true("a span in Zipkin's form", || async {
        let answer = shop.get("catalog", "/zipkin", &b3).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(answer.seen("x-b3-parentspanid") == Some("b7ad6b7169203331"))
    })
    .await?;
    let span = collector.wait("zipkin", |span| span["traceId"] == trace).await?;
    assert_eq!(
        (&span["side"], &span["parentId"]),
        (&"SERVER".into(), &"b7ad6b7169203331".into()),
        "{span:#}"
    );
    assert_eq!(span["name"], "catalog.shop.svc.cluster.local:8000/*", "{span:#}");
    assert_eq!(span["tags"]["customAttribute"], "provider=zipkin", "{span:#}");

    // Who says no is not traced, and neither was the sibling.
    shop.get("catalog", "/not-sampled", &[("x-b3-sampled", "0")]).await?;
    shop.get("catalog", "/last", &b3).await?;
    let is_last = |span: &Value| span["tags"]["http.url"].as_str().is_some_and(|url| url.ends_with("/last"));
    collector.wait("zipkin", is_last).await?;
    for kind in ["zipkin", "otlp-grpc", "otlp-http", "otlp-log", "als-http"] {
        let text = serde_json::to_string(&collector.all(kind))?;
        assert!(!text.contains("/sibling"), "{kind}: {text}");
        assert!(!kind.starts_with('z') || !text.contains("/not-sampled"), "{text}");
        assert!(!text.contains("CLIENT") && !text.contains("\"client\":true"), "{kind}: {text}");
    }

    // Where the Gateway asks, each attempt has a span, and that is what the upstream sees.
    shop.mesh.write("small.yaml", &annotated("cairn.dev/client-spans: \"true\"")?)?;
    until_true("an attempt's context", || async {
        Ok(shop.get("catalog", "/b3", &b3).await?.seen("x-b3-parentspanid") != Some("b7ad6b7169203331"))
    })
    .await?;
    let answer = shop.get("catalog", "/b3-attempt", &b3).await?;
    let (id, parent_id) = (answer.seen("x-b3-spanid"), answer.seen("x-b3-parentspanid"));
    let attempt = collector.wait("zipkin", |span| span["id"].as_str() == id).await?;
    assert_eq!(
        (&attempt["side"], attempt["parentId"].as_str()),
        (&"CLIENT".into(), parent_id),
        "{attempt:#}"
    );
    let server = collector.wait("zipkin", |span| span["id"].as_str() == parent_id).await?;
    assert_eq!(
        (&server["side"], &server["parentId"]),
        (&"SERVER".into(), &"b7ad6b7169203331".into()),
        "{server:#}"
    );

    shop.mesh.write("telemetry.yaml", &traced("otel-grpc"))?;
    let caller = [("traceparent", &*parent)];
    // A Zipkin tracer writes a traceparent as well, so only what arrives says that it is the other's turn.
    until_true("an attempt's span", || async {
        shop.get("catalog", "/attempt", &caller).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(collector.all("otlp-grpc").iter().any(|span| span["client"] == true))
    })
    .await?;
    let answer = shop.get("catalog", "/attempt", &caller).await?;
    let id = answer.seen("traceparent").and_then(|sent| sent.split('-').nth(2)).context("no traceparent")?;
    let attempt = collector.wait("otlp-grpc", |span| span["span"] == id).await?;
    assert_eq!((&attempt["client"], &attempt["trace"]), (&true.into(), &trace.into()), "{attempt:#}");
    assert_eq!(
        attempt["tags"]["upstream_cluster"]["stringValue"],
        "inbound-vip|8000|http|catalog.shop.svc.cluster.local"
    );
    let server = collector.wait("otlp-grpc", |span| span["span"] == attempt["parent"]).await?;
    assert_eq!(
        (&server["server"], &server["parent"]),
        (&true.into(), &"b7ad6b7169203331".into()),
        "{server:#}"
    );
    Ok(())
}
