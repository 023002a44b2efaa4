//! The way out to a collector: a bounded queue that requests append to, and a task that sends what waits in batches.

use crate::als::Entry;
use crate::otlp::LogLine;
use crate::span::Span;
use crate::{Own, als, otlp, zipkin};
use bytes::{BufMut, Bytes, BytesMut};
use cairn_filter::{Callout, CalloutAnswer, CalloutRequest};
use cairn_mesh::{OtelTransport, ProviderAddress, TelemetryProvider, TelemetryProviderKind};
use cairn_telemetry::Counter;
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderName, HeaderValue, Request, StatusCode};
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// The most items that wait for one collector; further ones are dropped and counted.
const WAITING_MAX: usize = 4096;
/// The most items sent at once (OpenTelemetry's default).
const BATCH_MAX: usize = 512;
/// How long an item waits for others.
const BATCH_WAIT: Duration = Duration::from_secs(1);
/// How long a call to an access log service may take.
const ALS_TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes of an answer that are looked at.
const ANSWER_BYTES_MAX: usize = 64 << 10;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// What is sent.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    Span(Box<Span>),
    Log(Box<LogLine>),
    Entry(Box<Entry>),
}

/// Where requests leave items. When the last is dropped, what waits is sent and the task ends.
#[derive(Debug)]
pub(crate) struct Exporter {
    sender: mpsc::Sender<Item>,
    dropped: Counter,
}

impl Exporter {
    /// Leaves an item; it never waits.
    pub(crate) fn push(&self, item: Item) {
        if self.sender.try_send(item).is_err() {
            self.dropped.inc();
        }
    }
}

/// The other end: to be run where collectors can be reached from.
pub struct Feed {
    provider: Arc<TelemetryProvider>,
    own: Arc<Own>,
    waiting: mpsc::Receiver<Item>,
    sent: Counter,
    dropped: Counter,
}

/// A queue for a provider.
pub(crate) fn queue(
    provider: &Arc<TelemetryProvider>,
    own: &Arc<Own>,
    sent: &Counter,
    dropped: &Counter,
) -> (Exporter, Feed) {
    let (sender, waiting) = mpsc::channel(WAITING_MAX);
    let feed = Feed {
        provider: Arc::clone(provider),
        own: Arc::clone(own),
        waiting,
        sent: sent.clone(),
        dropped: dropped.clone(),
    };
    (Exporter { sender, dropped: dropped.clone() }, feed)
}

impl Feed {
    /// Sends what comes, until nobody leaves anything any more. What a collector does not take is dropped and counted.
    pub async fn run(mut self, callout: Arc<dyn Callout>) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let mut is_failing = false;
        while self.next(&mut batch).await {
            let outcome = match request(&self.provider, &self.own, &batch) {
                Some(request) => send(&*callout, request).await,
                None => Err("the provider's address cannot be written".to_owned()),
            };
            match &outcome {
                Ok(()) => drop(self.sent.inc_by(batch.len() as u64)),
                Err(_) => drop(self.dropped.inc_by(batch.len() as u64)),
            }
            if outcome.is_err() != is_failing {
                is_failing = outcome.is_err();
                match outcome {
                    Ok(()) => {
                        tracing::info!(provider = &*self.provider.name, "the collector takes telemetry again")
                    }
                    Err(reason) => {
                        tracing::warn!(
                            provider = &*self.provider.name,
                            reason,
                            "telemetry is dropped: not taken"
                        );
                    }
                }
            }
            batch.clear();
        }
    }

    /// Fills `batch`; `false` when nothing comes any more.
    async fn next(&mut self, batch: &mut Vec<Item>) -> bool {
        if self.waiting.recv_many(batch, BATCH_MAX).await == 0 {
            return false;
        }
        let deadline = Instant::now() + BATCH_WAIT;
        while batch.len() < BATCH_MAX {
            let room = BATCH_MAX - batch.len();
            match timeout_at(deadline, self.waiting.recv_many(batch, room)).await {
                // The queue is closed, or the time is over: what there is goes.
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        true
    }
}

async fn send(callout: &dyn Callout, request: CalloutRequest) -> Result<(), String> {
    let is_grpc = request.http2;
    let answer = callout.call(request).await.map_err(|error| error.to_string())?;
    let CalloutAnswer { response, trailers } = answer;
    if !response.status().is_success() {
        return Err(format!("the collector answered {}", response.status()));
    }
    if !is_grpc {
        return Ok(());
    }
    let status = trailers.get(GRPC_STATUS).or_else(|| response.headers().get(GRPC_STATUS));
    match status.map(HeaderValue::as_bytes) {
        Some(b"0") => Ok(()),
        Some(other) => Err(format!("the collector answered gRPC status {}", String::from_utf8_lossy(other))),
        None => Err(format!("the collector answered {} without a gRPC status", StatusCode::OK)),
    }
}

/// The call that carries a batch.
fn request(provider: &TelemetryProvider, own: &Own, batch: &[Item]) -> Option<CalloutRequest> {
    match &provider.kind {
        TelemetryProviderKind::OtelTrace(otel) => {
            let message = otlp::spans(own, otel.environment_detector, spans(batch));
            match &otel.transport {
                OtelTransport::Grpc { timeout, headers } => {
                    grpc(&otel.at, otlp::TRACE_PATH, headers, &message, *timeout)
                }
                OtelTransport::Http { path, timeout, headers } => {
                    let body = Bytes::from(message.encode_to_vec());
                    plain(&otel.at, path, "application/x-protobuf", headers, body, *timeout)
                }
            }
        }
        TelemetryProviderKind::Zipkin(zipkin) => {
            let body = Bytes::from(zipkin::json(own, spans(batch)));
            plain(&zipkin.at, &zipkin.path, "application/json", &zipkin.headers, body, zipkin.timeout)
        }
        TelemetryProviderKind::OtelLog(log) => {
            let lines = batch.iter().filter_map(|item| match item {
                Item::Log(line) => Some(&**line),
                _ => None,
            });
            grpc(&log.at, otlp::LOGS_PATH, &[], &otlp::logs(&log.log_name, lines), ALS_TIMEOUT)
        }
        TelemetryProviderKind::Als(log) => {
            let entries = batch.iter().filter_map(|item| match item {
                Item::Entry(entry) => Some((**entry).clone()),
                _ => None,
            });
            grpc(&log.at, als::PATH, &[], &als::message(own, log, entries), ALS_TIMEOUT)
        }
        TelemetryProviderKind::Prometheus | TelemetryProviderKind::File(_) => None,
    }
}

fn spans(batch: &[Item]) -> impl Iterator<Item = &Span> {
    batch.iter().filter_map(|item| match item {
        Item::Span(span) => Some(&**span),
        _ => None,
    })
}

type Headers = [(Arc<str>, Arc<str>)];

/// A gRPC call with one message (gRPC `PROTOCOL-HTTP2.md`).
fn grpc(
    at: &ProviderAddress,
    path: &str,
    headers: &Headers,
    message: &impl Message,
    timeout: Duration,
) -> Option<CalloutRequest> {
    let length = message.encoded_len();
    let mut body = BytesMut::with_capacity(length + 5);
    body.put_u8(0);
    body.put_u32(u32::try_from(length).ok()?);
    message.encode(&mut body).ok()?;
    let mut call = plain(at, path, "application/grpc", headers, body.freeze(), timeout)?;
    call.request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    call.http2 = true;
    Some(call)
}

fn plain(
    at: &ProviderAddress,
    path: &str,
    content_type: &'static str,
    headers: &Headers,
    body: Bytes,
    timeout: Duration,
) -> Option<CalloutRequest> {
    let uri = format!("http://{}:{}{path}", at.host, at.port);
    let mut request = Request::post(uri).header(CONTENT_TYPE, content_type);
    for (name, value) in headers {
        request = request.header(&**name, &**value);
    }
    Some(CalloutRequest {
        host: Arc::clone(&at.host),
        namespace: at.namespace.clone(),
        port: at.port,
        http2: false,
        request: request.body(body).ok()?,
        trailers: http::HeaderMap::new(),
        timeout,
        answer_bytes_max: ANSWER_BYTES_MAX,
    })
}

#[cfg(test)]
#[path = "export/tests.rs"]
mod tests;
