//! What an observer is asked and told: attempts, what they say upstream, and what is counted of a stream that goes on.

use super::harness::{Body, Mesh, Plan, Upstream, closed_port, full, get};
use bytes::Bytes;
use cairn_mesh::AppProtocol;
use cairn_telemetry::{HttpRecord, HttpScope, MetricShape, Observe, Trace, Wants};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

/// What an attempt is told to be: its span, endpoint, flags, and whether its end is known.
type Told = (u64, SocketAddr, &'static str, bool);

/// Traces every request, and gives each attempt a span: 101, 102 and so on. What goes on reports at once.
#[derive(Debug)]
struct Tracing {
    wants: Wants,
    shape: Arc<MetricShape>,
    attempts: AtomicU64,
    told: Mutex<mpsc::UnboundedSender<Vec<Told>>>,
}

impl Observe for Tracing {
    fn wants(&self) -> &Wants {
        &self.wants
    }

    fn shape(&self) -> &Arc<MetricShape> {
        &self.shape
    }

    fn interval(&self) -> Duration {
        Duration::ZERO
    }

    fn label_values(&self, _: &HttpScope, _: &HttpRecord<'_>, _: &mut Vec<Arc<str>>) {}

    fn trace(&self, headers: &mut HeaderMap) -> Option<Box<Trace>> {
        headers.insert("x-span", http::HeaderValue::from(1_u64));
        let state = String::new();
        Some(Box::new(Trace { trace_id: 9, span_id: 1, parent_id: 0, sampled: true, narrow: false, state }))
    }

    fn attempt(&self, trace: &Trace, headers: &mut HeaderMap) -> Option<u64> {
        assert_eq!((trace.trace_id, trace.span_id), (9, 1));
        let span = 101 + self.attempts.fetch_add(1, Relaxed);
        headers.insert("x-span", http::HeaderValue::from(span));
        Some(span)
    }

    fn finished(&self, _: &HttpScope, record: &HttpRecord<'_>) {
        let told =
            |one: &cairn_telemetry::Try| (one.span_id, one.upstream, one.flags, one.duration.is_some());
        self.told.lock().unwrap().send(record.tries.iter().map(told).collect()).unwrap();
    }
}

fn tracing(told: mpsc::UnboundedSender<Vec<Told>>) -> Arc<dyn Observe> {
    Arc::new(Tracing {
        wants: Wants::default(),
        shape: Arc::default(),
        attempts: AtomicU64::new(0),
        told: Mutex::new(told),
    })
}

/// The sum of a family's samples.
fn sum(mesh: &Mesh, name: &str) -> u64 {
    let text = mesh.telemetry.metrics.encode();
    let samples = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    samples.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

#[tokio::test]
async fn messages_of_a_stream_are_counted_while_it_goes_on_and_once() {
    let (message, messages) = mpsc::unbounded_channel::<Bytes>();
    let messages = Arc::new(Mutex::new(Some(messages)));
    let upstream = Upstream::start(move |request| {
        let mut messages = messages.lock().unwrap().take().unwrap();
        Box::pin(async move {
            drop(request.into_body().collect().await.unwrap());
            let frames = futures_util::stream::poll_fn(move |cx| {
                messages
                    .poll_recv(cx)
                    .map(|bytes| bytes.map(|bytes| Ok::<_, hyper::Error>(Frame::data(bytes))))
            });
            Response::new(StreamBody::new(frames).boxed())
        })
    })
    .await;
    let (sender, mut told) = mpsc::unbounded_channel();
    let plan =
        Plan { protocol: AppProtocol::Grpc, observer: Some(tracing(sender)), ..Plan::to(upstream.address) };
    let mesh = Mesh::new(plan);
    let asked: Request<Body> = Request::post("http://cart/s/m")
        .header("content-type", "application/grpc")
        .body(full(&b"\0\0\0\0\0"[..]))
        .unwrap();
    let mut body = mesh.http2().await.send_request(asked).await.unwrap().into_body();
    for count in 1..=3 {
        message.send(Bytes::from_static(b"\0\0\0\0\0")).unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 5);
        assert_eq!(sum(&mesh, "istio_response_messages_total"), count, "while it goes on");
        assert_eq!(sum(&mesh, "istio_request_messages_total"), 1);
    }
    assert_eq!(sum(&mesh, "istio_requests_total"), 0, "it is not over");
    drop(message);
    while let Some(frame) = body.frame().await {
        assert!(frame.unwrap().into_data().unwrap().is_empty(), "nothing but the end");
    }
    told.recv().await.unwrap();
    assert_eq!(sum(&mesh, "istio_response_messages_total"), 3);
    assert_eq!(sum(&mesh, "istio_request_messages_total"), 1);
    assert_eq!(sum(&mesh, "istio_requests_total"), 1);
    // Nobody said a gRPC status: it is that of the answer's.
    let text = mesh.telemetry.metrics.encode();
    assert!(text.contains("grpc_response_status=\"2\""), "{text}");
}

#[tokio::test]
async fn each_attempt_has_a_span_and_the_upstream_sees_that_of_its_own() {
    let (upstream, closed) = (Upstream::telling().await, closed_port().await);
    let (sender, mut told) = mpsc::unbounded_channel();
    let observer = Some(tracing(sender));
    let plan = Plan { observer, ..Plan::to_all(&[closed, upstream.address]) };
    let mesh = Mesh::new(plan);
    // Which endpoint is tried first is chance: both have been before long.
    let (mut once, mut twice) = (false, false);
    for _ in 0..200 {
        let (_, body) = mesh.request(get("/")).await;
        let attempts = told.recv().await.unwrap();
        let last = attempts.last().copied().unwrap();
        assert!(body.contains(&format!("x-span: {}\n", last.0)), "{body}");
        assert_eq!(
            (last.1, last.2, last.3),
            (upstream.address, "-", false),
            "the last ends with the exchange"
        );
        match attempts.as_slice() {
            [_] => once = true,
            [first, _] => {
                assert_eq!((first.0 + 1, first.1, first.2, first.3), (last.0, closed, "UF", true));
                twice = true;
            }
            other => panic!("{other:?}"),
        }
        if once && twice {
            return;
        }
    }
    panic!("one of the endpoints was never tried first");
}
