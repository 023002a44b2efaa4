//! What goes to collectors, when, and what becomes of what they do not take.

use super::*;
use crate::als::{self, Further};
use crate::testing::Exchange;
use cairn_filter::{CalloutError, CalloutFuture};
use cairn_mesh::{AlsLog, OtelTrace, ZipkinTrace};
use cairn_proto::accesslog::StreamAccessLogsMessage;
use cairn_proto::opentelemetry::ExportTraceServiceRequest;
use http::Response;
use parking_lot::Mutex;
use std::time::UNIX_EPOCH;

/// A collector that keeps what it is asked and answers as it is told.
#[derive(Debug)]
struct Fake {
    asked: Mutex<Vec<CalloutRequest>>,
    answer: fn() -> Result<CalloutAnswer, CalloutError>,
}

impl Callout for Fake {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        self.asked.lock().push(request);
        Box::pin(std::future::ready((self.answer)()))
    }
}

fn answer(status: u16, grpc: Option<&'static str>) -> Result<CalloutAnswer, CalloutError> {
    let mut trailers = http::HeaderMap::new();
    trailers.extend(grpc.map(|status| (GRPC_STATUS, HeaderValue::from_static(status))));
    Ok(CalloutAnswer { response: Response::builder().status(status).body(Bytes::new()).unwrap(), trailers })
}

fn at() -> ProviderAddress {
    ProviderAddress { host: "collector.obs".into(), namespace: Some("obs".into()), port: 4317 }
}

fn provider(kind: TelemetryProviderKind) -> Arc<TelemetryProvider> {
    Arc::new(TelemetryProvider { name: "p".into(), kind })
}

fn otel(transport: OtelTransport) -> TelemetryProviderKind {
    TelemetryProviderKind::OtelTrace(OtelTrace {
        at: at(),
        transport,
        tag_bytes_max: 256,
        environment_detector: false,
    })
}

fn headers() -> Vec<(Arc<str>, Arc<str>)> {
    vec![("x-key".into(), "secret".into())]
}

fn over_grpc() -> TelemetryProviderKind {
    otel(OtelTransport::Grpc { timeout: Duration::from_secs(7), headers: headers() })
}

fn span(id: u64) -> Item {
    Item::Span(Box::new(Span {
        kind: crate::span::SpanKind::Server,
        trace_id: 0xab,
        id,
        parent_id: 0,
        state: String::new(),
        name: "n".to_owned(),
        start: UNIX_EPOCH,
        end: UNIX_EPOCH + Duration::from_millis(2),
        is_error: false,
        tags: vec![("a".into(), "b".to_owned())],
    }))
}

/// Sends spans and returns what was asked, and how many items were sent and dropped.
async fn exported(
    kind: TelemetryProviderKind,
    count: u64,
    answer: fn() -> Result<CalloutAnswer, CalloutError>,
) -> (Vec<CalloutRequest>, u64, u64) {
    let (sent, dropped) = (Counter::default(), Counter::default());
    let own = Arc::new(Own { name: "wp".into(), namespace: "shop".into(), ..Own::default() });
    let (exporter, feed) = queue(&provider(kind), &own, &sent, &dropped);
    (1..=count).for_each(|id| exporter.push(span(id)));
    drop(exporter);
    let fake = Arc::new(Fake { asked: Mutex::default(), answer });
    feed.run(Arc::clone(&fake) as Arc<dyn Callout>).await;
    let asked = fake.asked.lock().clone();
    (asked, sent.get(), dropped.get())
}

#[tokio::test]
async fn spans_go_over_grpc_in_batches() {
    let count = BATCH_MAX as u64 + 3;
    let (asked, sent, dropped) = exported(over_grpc(), count, || answer(200, Some("0"))).await;
    assert_eq!((asked.len(), sent, dropped), (2, count, 0));
    let first = &asked[0];
    assert_eq!((&*first.host, first.namespace.as_deref(), first.port), ("collector.obs", Some("obs"), 4317));
    assert!(first.http2 && first.timeout == Duration::from_secs(7));
    let request = &first.request;
    assert_eq!(request.uri().path(), "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
    assert_eq!(request.headers()["content-type"], "application/grpc");
    assert_eq!(
        (&request.headers()["te"], &request.headers()["x-key"]),
        (&"trailers".parse().unwrap(), &"secret".parse().unwrap())
    );
    let body = request.body();
    assert_eq!(body[..5], [&[0][..], &u32::try_from(body.len() - 5).unwrap().to_be_bytes()].concat());
    let message = ExportTraceServiceRequest::decode(&body[5..]).unwrap();
    let resource = &message.resource_spans[0];
    assert_eq!(resource.scope_spans[0].spans.len(), BATCH_MAX);
    let span = &resource.scope_spans[0].spans[0];
    assert_eq!((span.trace_id.len(), span.span_id.as_slice()), (16, &[0, 0, 0, 0, 0, 0, 0, 1][..]));
    assert!(span.parent_span_id.is_empty());
}

#[tokio::test]
async fn what_is_not_taken_is_counted() {
    type Answer = fn() -> Result<CalloutAnswer, CalloutError>;
    let answers: [(&str, Answer); 4] = [
        ("an HTTP error", || answer(503, None)),
        ("a gRPC error", || answer(200, Some("14"))),
        ("no status", || answer(200, None)),
        ("nobody there", || Err(CalloutError::NoEndpoint("x".into()))),
    ];
    for (name, answer) in answers {
        let (_, sent, dropped) = exported(over_grpc(), 3, answer).await;
        assert_eq!((sent, dropped), (0, 3), "{name}");
    }
}

#[test]
fn a_full_queue_drops_and_never_waits() {
    let dropped = Counter::default();
    let (exporter, _feed) = queue(&provider(over_grpc()), &Arc::default(), &Counter::default(), &dropped);
    (0..WAITING_MAX as u64 + 5).for_each(|id| exporter.push(span(id)));
    assert_eq!(dropped.get(), 5);
}

#[tokio::test]
async fn spans_go_over_http_as_protobuf_and_to_zipkin_as_json() {
    let http = OtelTransport::Http {
        path: "/v1/traces".into(),
        timeout: Duration::from_secs(1),
        headers: headers(),
    };
    let (asked, sent, _) = exported(otel(http), 1, || answer(200, None)).await;
    assert_eq!((asked.len(), sent), (1, 1));
    assert_eq!(asked[0].request.uri(), "http://collector.obs:4317/v1/traces");
    assert_eq!(asked[0].request.headers()["content-type"], "application/x-protobuf");
    assert!(!asked[0].http2);
    assert!(ExportTraceServiceRequest::decode(asked[0].request.body().clone()).is_ok());

    let zipkin = TelemetryProviderKind::Zipkin(ZipkinTrace {
        at: at(),
        path: "/api/v2/spans".into(),
        tag_bytes_max: 256,
        wide_ids: true,
        with_w3c: false,
        timeout: Duration::from_secs(1),
        headers: Vec::new(),
    });
    let (asked, _, _) = exported(zipkin, 1, || answer(202, None)).await;
    let spans: serde_json::Value = serde_json::from_slice(asked[0].request.body()).unwrap();
    assert_eq!(
        spans,
        serde_json::json!([{
            "traceId": "00000000000000ab", "id": "0000000000000001", "kind": "SERVER", "name": "n",
            "timestamp": 0, "duration": 2000, "localEndpoint": {"serviceName": "wp.shop"}, "tags": {"a": "b"},
        }])
    );
}

fn als_log(tcp: bool) -> AlsLog {
    AlsLog {
        at: at(),
        log_name: "log".into(),
        tcp,
        request_headers: vec!["x-team".into()],
        response_headers: vec!["x-out".into()],
        response_trailers: vec!["x-end".into()],
    }
}

#[test]
fn entries_say_what_envoys_say() {
    let exchange = Exchange::new();
    let log = als_log(false);
    let entry =
        exchange.with(|record| record.flags = "UF", |facts| als::entry(facts, &Further::of(&log), false));
    let message: StreamAccessLogsMessage = als::message(exchange.own(), &log, entry.into_iter());
    let identifier = message.identifier.unwrap();
    assert_eq!(identifier.log_name, "log");
    use cairn_proto::accesslog::stream_access_logs_message::LogEntries;
    let Some(LogEntries::HttpLogs(entries)) = message.log_entries else { panic!("no entries") };
    let entry = &entries.log_entry[0];
    let common = entry.common_properties.as_ref().unwrap();
    let address = common.downstream_remote_address.as_ref().unwrap().socket_address.as_ref().unwrap();
    assert_eq!((&*address.address, address.port_value), ("10.0.0.1", 4000));
    assert!(common.response_flags.as_ref().unwrap().upstream_connection_failure);
    assert_eq!(common.route_name, "shop/r/0");
    let request = entry.request.as_ref().unwrap();
    assert_eq!((request.request_method, &*request.path, &*request.authority), (1, "/a/b?c=d", "cart:80"));
    assert_eq!(request.request_headers["x-team"], "blue");
    let response = entry.response.as_ref().unwrap();
    assert_eq!((response.response_code, response.response_body_bytes), (Some(200), 5));
    assert_eq!((&*response.response_headers["x-out"], &*response.response_trailers["x-end"]), ("1", "2"));
    assert_eq!((entry.protocol_version, response.response_code_details.as_str()), (2, "via_upstream"));

    let of_tcp = |http: bool| {
        let log = als_log(true);
        exchange.with(|record| record.http = http, |facts| als::entry(facts, &Further::of(&log), true))
    };
    assert!(of_tcp(true).is_none(), "requests are for the other log");
    assert!(matches!(of_tcp(false), Some(als::Entry::Tcp(_))));
}
