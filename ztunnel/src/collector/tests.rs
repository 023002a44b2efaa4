//! A collector of the test, which takes what is sent as far as it is told to.

use super::*;
use crate::access::tests::{record, web};
use cairn_telemetry::MetricsSettings;
use http::{HeaderMap, HeaderValue, Response};
use prost::Message;
use std::collections::HashMap;
use tokio::net::TcpListener;

/// What no test should ever take.
const LONG: Duration = Duration::from_secs(30);

fn settings_of(address: String) -> CollectorSettings {
    CollectorSettings {
        address,
        roots: Roots::System,
        headers: vec![("X-Tenant".to_owned(), "shop".to_owned())],
        timeout: LONG,
        resource: vec![("service.name".to_owned(), "ztunnel".to_owned())],
    }
}

/// Calls that arrived, each with its headers.
type Calls = mpsc::UnboundedReceiver<(HeaderMap, ExportLogsServiceRequest)>;

/// A collector that answers each call with a gRPC status.
async fn collector(status: &'static str) -> (String, Calls) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (sender, calls) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let mut connection = h2::server::handshake(tcp).await.unwrap();
            while let Some(Ok((request, mut answer))) = connection.accept().await {
                let sender = sender.clone();
                tokio::spawn(async move {
                    let (head, mut body) = request.into_parts();
                    let mut bytes = Vec::new();
                    while let Some(Ok(chunk)) = body.data().await {
                        body.flow_control().release_capacity(chunk.len()).unwrap();
                        bytes.extend_from_slice(&chunk);
                    }
                    assert_eq!(head.uri.path(), PATH);
                    // A byte says that it is not compressed, four how long it is.
                    let message = ExportLogsServiceRequest::decode(&bytes[5..]).unwrap();
                    let response =
                        Response::builder().header("content-type", "application/grpc").body(()).unwrap();
                    let mut stream = answer.send_response(response, false).unwrap();
                    if status == "0" {
                        stream.send_data(vec![0, 0, 0, 0, 0].into(), false).unwrap();
                    }
                    let trailers =
                        [(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static(status))];
                    stream.send_trailers(trailers.into_iter().collect()).unwrap();
                    // The test may be over.
                    let _over = sender.send((head.headers, message));
                });
            }
        }
    });
    (address, calls)
}

fn counted(metrics: &Metrics, name: &str) -> u64 {
    let text = metrics.encode();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn connections_arrive_in_batches_with_the_fields_of_the_line() {
    let (address, mut calls) = collector("0").await;
    let metrics = Metrics::new("ztunnel", "test", MetricsSettings::default());
    let collector = Collector::start(&settings_of(address), &metrics).unwrap();
    let web = web();
    collector.push(&record(&web, ""));
    collector.push(&record(&web, "broken pipe"));
    collector.flush(LONG).await;
    let (headers, message) = calls.recv().await.unwrap();
    assert_eq!(headers["x-tenant"], "shop");
    let [of_resource] = message.resource_logs.as_slice() else { panic!("{message:?}") };
    let resource = &of_resource.resource.as_ref().unwrap().attributes;
    assert_eq!(resource[0], text("service.name", "ztunnel"));
    let [well, badly] = of_resource.scope_logs[0].log_records.as_slice() else { panic!("{message:?}") };
    assert_eq!((well.severity_number, badly.severity_number), (INFO, ERROR));
    assert_eq!(well.time_unix_nano, 3_500_000_000, "when it was over");
    let fields: HashMap<&str, &KeyValue> =
        badly.attributes.iter().map(|pair| (pair.key.as_str(), pair)).collect();
    for expected in [
        text("src.addr", "10.0.0.1:1000"),
        text("src.workload", "web"),
        text("src.identity", "spiffe://cluster.local/ns/shop/sa/web"),
        text("direction", "inbound"),
        number("bytes_sent", 7),
        number("duration", 2500),
        text("error", "broken pipe"),
    ] {
        assert_eq!(fields[expected.key.as_str()], &expected);
    }
    assert_eq!(counted(&metrics, "cairn_telemetry_sent_total"), 2);
    assert_eq!(counted(&metrics, "cairn_telemetry_dropped_total"), 0);
}

#[tokio::test]
async fn what_a_collector_refuses_is_dropped_and_counted() {
    let (address, mut calls) = collector("8").await;
    let metrics = Metrics::new("ztunnel", "test", MetricsSettings::default());
    let collector = Collector::start(&settings_of(address), &metrics).unwrap();
    let web = web();
    for _ in 0..3 {
        collector.push(&record(&web, ""));
    }
    collector.flush(LONG).await;
    assert_eq!(calls.recv().await.unwrap().1.resource_logs.len(), 1);
    assert_eq!(counted(&metrics, "cairn_telemetry_dropped_total"), 3);
    assert_eq!(counted(&metrics, "cairn_telemetry_sent_total"), 0);
}

#[tokio::test]
async fn a_collector_that_says_nothing_costs_records_and_never_time() {
    // It accepts connections as far as the kernel does, and reads nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let metrics = Metrics::new("ztunnel", "test", MetricsSettings::default());
    let collector = Collector::start(&settings_of(address), &metrics).unwrap();
    let web = web();
    // Without an await in between the task gets no turn.
    for _ in 0..WAITING_MAX + 100 {
        collector.push(&record(&web, ""));
    }
    assert_eq!(counted(&metrics, "cairn_telemetry_dropped_total"), 100);
    let began = Instant::now();
    collector.flush(Duration::from_millis(10)).await;
    assert!(began.elapsed() < LONG / 2, "the flush has its bound");
}

#[test]
fn the_collector_is_where_opentelemetrys_variables_say() {
    let of = |pairs: &[(&str, &'static str)]| {
        let pairs: HashMap<String, &'static str> =
            pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        settings(|name| pairs.get(name).copied())
    };
    assert_eq!(of(&[]).unwrap(), None);
    let all = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://all:4317"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant = shop,other=1"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
        ("OTEL_RESOURCE_ATTRIBUTES", "k8s.node.name=n1"),
    ];
    let read = of(&all).unwrap().unwrap();
    assert_eq!((read.address.as_str(), read.timeout), ("http://all:4317", Duration::from_millis(2500)));
    assert_eq!(read.headers, [("x-tenant".into(), "shop".into()), ("other".into(), "1".into())]);
    let named =
        |name: &str| vec![("service.name".into(), name.into()), ("k8s.node.name".into(), "n1".into())];
    assert_eq!(read.resource, named("ztunnel"));
    let with = |name, value| of(&[&all[..], &[(name, value)]].concat());
    let logs = with("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "logs:4317").unwrap().unwrap();
    assert_eq!(logs.address, "http://logs:4317", "what is for logs alone wins");
    assert_eq!(with("OTEL_SERVICE_NAME", "mesh").unwrap().unwrap().resource, named("mesh"));
    for (name, value) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a b=1"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://a b"),
    ] {
        let error = with(name, value).unwrap_err();
        assert!(format!("{error:#}").contains("OTEL_EXPORTER_OTLP"), "{name}: {error:#}");
    }
}
