//! The record of one exchange: kept while it lives, handed to telemetry exactly once, also when the client goes away.

use crate::body::Progress;
use crate::failure::grpc_status_of;
use crate::grpc::Messages;
use crate::head::{FORWARDED_FOR, REQUEST_ID, header_bytes};
use crate::reply::{GRPC_STATUS, grpc_status};
use crate::serve::Served;
use crate::{Failure, decision};
use bytes::Bytes;
use cairn_filter::{Exchange, Measures, RequestHead, ResponseHead, Running};
use cairn_mesh::Workload;
use cairn_telemetry::{HttpRecord, Observe, Trace, Try, Wanted, legible};
use http::header::USER_AGENT;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The whole response is on its way.
    Complete,
    /// The upstream broke off within its response.
    UpstreamCut,
    /// A filter ended it.
    FilterReset,
    /// A filter held more of the response than may be held.
    TooLarge,
    /// A filter made a body longer or shorter than its head says, which is gone.
    LengthChanged,
    /// The client went away: what is assumed of an exchange that was dropped.
    ClientGone,
}

/// How often the messages of a long stream are counted where no observer says (Istio's default).
pub(crate) const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Headers that are kept for an observer.
#[derive(Default)]
struct Kept {
    request: HeaderMap,
    response: HeaderMap,
    trailers: HeaderMap,
}

/// The record of an exchange, its filters, and what the access log says of the request.
pub(crate) struct Record {
    pub(crate) exchange: Exchange,
    pub(crate) running: Running,
    pub(crate) served: Arc<Served>,
    /// Whether the client may know what decided.
    pub(crate) may_know: bool,
    /// Set while the response is on its way.
    pub(crate) flags: &'static str,
    pub(crate) grpc_status: Option<u8>,
    pub(crate) response_body_bytes: u64,
    pub(crate) progress: Option<Arc<Progress>>,
    pub(crate) upstream_duration: Option<Duration>,
    /// What answered speaks HTTP/1.
    pub(crate) upstream_http1: bool,
    /// When the request was sent that was answered.
    pub(crate) sent_at: Option<Instant>,
    /// Our end of the connection on which it was.
    pub(crate) upstream_local: Option<SocketAddr>,
    /// Why there was no such connection.
    upstream_failure: &'static str,
    /// It was sent as often as it may be, more than once.
    pub(crate) retried_in_vain: bool,
    /// How often the request was sent.
    pub(crate) attempts: u32,
    messages: Messages,
    response_messages: u64,
    /// Messages of requests and responses that were counted while the stream went on, and when.
    counted: (u64, u64, Option<Instant>),
    observer: Option<Arc<dyn Observe>>,
    trace: Option<Box<Trace>>,
    /// Attempts to send it that have spans of their own.
    tries: Vec<Try>,
    kept: Option<Box<Kept>>,
    ended: bool,
    method: Method,
    path: PathAndQuery,
    /// The path before the route changed it.
    original_path: Option<PathAndQuery>,
    authority: HeaderValue,
    request_id: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    forwarded_for: Option<HeaderValue>,
    request_head_bytes: u64,
    response_head_bytes: u64,
}

impl Record {
    pub(crate) fn new(exchange: Exchange, running: Running, served: Arc<Served>, head: &RequestHead) -> Self {
        // "GET / HTTP/1.1" and its line end, "host: x" and its own, and the empty line.
        let line = head.method.as_str().len() + head.path.as_str().len() + head.authority.len() + 22;
        Self {
            exchange,
            running,
            served,
            may_know: false,
            flags: "-",
            grpc_status: None,
            response_body_bytes: 0,
            progress: None,
            upstream_duration: None,
            upstream_http1: false,
            sent_at: None,
            upstream_local: None,
            upstream_failure: "",
            retried_in_vain: false,
            attempts: 0,
            messages: Messages::default(),
            response_messages: 0,
            counted: (0, 0, None),
            observer: None,
            trace: None,
            tries: Vec::new(),
            kept: None,
            ended: false,
            method: head.method.clone(),
            path: head.path.clone(),
            original_path: None,
            authority: as_text(&head.authority),
            request_id: head.headers.get(REQUEST_ID).cloned(),
            user_agent: all_of(&head.headers, &USER_AGENT),
            forwarded_for: all_of(&head.headers, &FORWARDED_FOR),
            request_head_bytes: line as u64 + header_bytes(&head.headers),
            response_head_bytes: 0,
        }
    }

    /// Is observed by `observer` from now on.
    pub(crate) fn observe(
        &mut self,
        observer: Option<&Arc<dyn Observe>>,
        trace: Option<Box<Trace>>,
        head: &RequestHead,
    ) {
        let Some(observer) = observer else { return };
        self.trace = trace;
        let wants = observer.wants();
        let wanted = [&wants.request, &wants.response, &wants.trailers].into_iter();
        if !wanted.into_iter().all(Wanted::is_nothing) {
            self.kept = Some(Box::default());
        }
        self.observer = Some(Arc::clone(observer));
        self.keep_request(head);
    }

    /// Keeps what its observer wants of the request, as it is by now, and its path: a token that a filter has taken out of
    /// the query is not logged (Envoy's `%REQ(:PATH)%` is the changed one, too).
    pub(crate) fn keep_request(&mut self, head: &RequestHead) {
        if self.path != head.path {
            self.path.clone_from(&head.path);
        }
        if self.authority != head.authority {
            self.authority = as_text(&head.authority);
        }
        for (kept, name) in [
            (&mut self.request_id, &REQUEST_ID),
            (&mut self.user_agent, &USER_AGENT),
            (&mut self.forwarded_for, &FORWARDED_FOR),
        ] {
            if kept.as_ref() != head.headers.get(name) {
                *kept = all_of(&head.headers, name);
            }
        }
        if let (Some(observer), Some(kept)) = (&self.observer, &mut self.kept) {
            kept.request = observer.wants().request.of(&head.headers);
        }
    }

    /// Keeps the request as the route has changed it; logs show its path as it was.
    pub(crate) fn keep_rewritten(&mut self, head: &RequestHead) {
        if self.path != head.path {
            self.original_path = Some(self.path.clone());
        }
        self.keep_request(head);
    }

    /// Notes that the request, with `headers`, is about to be sent to an endpoint. Where attempts have spans, the
    /// headers say so.
    pub(crate) fn attempted(
        &mut self,
        upstream: SocketAddr,
        workload: Arc<Workload>,
        headers: &mut HeaderMap,
    ) {
        self.attempts += 1;
        if let (Some(observer), Some(trace)) = (&self.observer, &self.trace)
            && let Some(span_id) = observer.attempt(trace, headers)
        {
            self.tries.push(Try {
                span_id,
                after: self.exchange.started.elapsed(),
                duration: None,
                upstream,
                workload: Arc::clone(&workload),
                flags: "-",
            });
        }
        self.exchange.upstream = Some(upstream);
        self.exchange.upstream_workload = Some(workload);
    }

    /// Notes that the last attempt came to nothing.
    pub(crate) fn attempt_failed(&mut self, failure: &Failure) {
        if let Some(last) = self.tries.last_mut() {
            last.duration = Some(self.exchange.started.elapsed().saturating_sub(last.after));
            last.flags = failure.answer().flags;
        }
    }

    /// Notes bytes of the response's body.
    pub(crate) fn passed(&mut self, data: &Bytes) {
        self.response_body_bytes += data.len() as u64;
        if self.exchange.grpc {
            self.response_messages += self.messages.pass(data);
            self.count_messages();
        }
    }

    /// Notes the response's trailers.
    pub(crate) fn trailed(&mut self, trailers: &HeaderMap) {
        if let Some(status) = trailers.get(GRPC_STATUS) {
            self.grpc_status = Some(grpc_status(status));
        }
        if let (Some(observer), Some(kept)) = (&self.observer, &mut self.kept) {
            kept.trailers = observer.wants().trailers.of(trailers);
        }
    }

    /// Counts the messages of a stream that has gone on for another reporting interval.
    fn count_messages(&mut self) {
        let now = Instant::now();
        let last = self.counted.2.unwrap_or(self.exchange.started);
        let interval = self.observer.as_ref().map_or(REPORT_EVERY, |observer| observer.interval());
        if now.duration_since(last) < interval {
            return;
        }
        let requests = self.request_messages();
        let new = (requests - self.counted.0, self.response_messages - self.counted.1);
        let record = self.as_told(now);
        self.served.scope.count_messages(&record, self.observer.as_deref(), new.0, new.1);
        self.counted = (requests, self.response_messages, Some(now));
    }

    fn request_messages(&self) -> u64 {
        self.progress.as_ref().map_or(0, |progress| progress.messages.load(Relaxed))
    }

    /// Notes the response that the client is about to get, and puts the decision on it if the client may know.
    pub(crate) fn answered(&mut self, head: &mut ResponseHead) {
        decision::set(&mut head.headers, &self.exchange, self.may_know);
        self.exchange.status = Some(head.status);
        if let (Some(observer), Some(kept)) = (&self.observer, &mut self.kept) {
            kept.response = observer.wants().response.of(&head.headers);
        }
        // "HTTP/1.1 200 OK" and the like, its line end, and the empty line.
        self.response_head_bytes = 19 + header_bytes(&head.headers);
    }

    /// Notes why there is no answer from upstream.
    pub(crate) fn failed(&mut self, failure: &Failure) {
        let answer = failure.answer();
        self.flags = if self.retried_in_vain { failure.flags_of_last_attempt() } else { answer.flags };
        self.upstream_failure = failure.transport();
        self.exchange.details = failure.details();
    }

    /// Whether the client broke off its own request.
    pub(crate) fn request_is_broken(&self) -> bool {
        self.progress.as_ref().is_some_and(|progress| progress.broken.load(Relaxed))
    }

    /// The end. Later calls do nothing.
    pub(crate) fn end(&mut self, ending: Ending) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        match ending {
            Ending::Complete => {}
            // HTTP/1 has no other word for a cut than that the message is not whole.
            Ending::UpstreamCut if self.upstream_http1 => self.failed(&Failure::UpstreamBroken),
            Ending::UpstreamCut => self.failed(&Failure::UpstreamCut),
            Ending::FilterReset => self.failed(&Failure::FilterReset),
            Ending::TooLarge => self.failed(&Failure::ResponseTooLarge),
            Ending::LengthChanged => self.failed(&Failure::LengthChanged),
            Ending::ClientGone => self.failed(&Failure::ClientGone),
        }
        self.exchange.measures = Some(self.measures());
        self.running.finish(&mut self.exchange);
        self.served.exchange_ended();
        self.tell();
    }

    fn measures(&self) -> Measures {
        let body_bytes = self.progress.as_ref().map_or(0, |progress| progress.bytes.load(Relaxed));
        Measures {
            request_body_bytes: body_bytes,
            request_bytes: self.request_head_bytes + body_bytes,
            response_body_bytes: self.response_body_bytes,
            response_bytes: self.response_head_bytes + self.response_body_bytes,
            attempts: self.attempts,
            upstream_duration: self.upstream_duration,
            flags: self.flags,
            grpc_status: self.grpc_status,
        }
    }

    fn tell(&self) {
        let record = self.as_told(Instant::now());
        let telemetry = self.served.worker.telemetry();
        telemetry.record_http(&self.served.scope, &record, self.observer.as_deref());
    }

    /// The gRPC status of an answer to a gRPC client that names none, once it is over: that of its HTTP status.
    fn implied_grpc_status(&self) -> Option<u8> {
        let status = self.exchange.status.filter(|_| self.ended && self.exchange.grpc)?;
        Some(grpc_status_of(status))
    }

    fn as_told(&self, now: Instant) -> HttpRecord<'_> {
        let exchange = &self.exchange;
        let connection = &exchange.connection;
        let body_bytes = self.progress.as_ref().map_or(0, |progress| progress.bytes.load(Relaxed));
        let kept = self.kept.as_deref();
        HttpRecord {
            started: exchange.started_at,
            duration: now.saturating_duration_since(exchange.started),
            upstream_duration: self.upstream_duration,
            first_byte: self
                .sent_at
                .zip(self.upstream_duration)
                .map(|(sent_at, answered)| sent_at.saturating_duration_since(exchange.started) + answered),
            backend_latency: self.sent_at.map(|sent_at| now.saturating_duration_since(sent_at)),
            request_id: self.request_id.as_ref().map(HeaderValue::as_bytes),
            method: self.method.as_str(),
            path: self.path.as_str(),
            original_path: self.original_path.as_ref().map_or("", PathAndQuery::as_str),
            protocol: exchange.protocol.as_str(),
            authority: std::str::from_utf8(self.authority.as_bytes()).unwrap_or_default(),
            user_agent: self.user_agent.as_ref().map(HeaderValue::as_bytes),
            forwarded_for: self.forwarded_for.as_ref().map(HeaderValue::as_bytes),
            status: exchange.status.map_or(0, |status| status.as_u16()),
            flags: self.flags,
            details: &exchange.details,
            grpc: exchange.grpc,
            grpc_status: self.grpc_status.or_else(|| self.implied_grpc_status()),
            request_body_bytes: body_bytes,
            response_body_bytes: self.response_body_bytes,
            request_bytes: self.request_head_bytes + body_bytes,
            response_bytes: self.response_head_bytes + self.response_body_bytes,
            request_messages: self.request_messages() - self.counted.0,
            response_messages: self.response_messages - self.counted.1,
            attempts: self.attempts,
            request_headers: kept.map(|kept| &kept.request),
            response_headers: kept.map(|kept| &kept.response),
            response_trailers: kept.map(|kept| &kept.trailers),
            claims: exchange.token.as_ref().map(|token| token.payload()),
            token_principal: exchange.token.as_ref().map_or("", |token| token.principal()),
            metadata: exchange.metadata.all(),
            trace: self.trace.as_deref(),
            tries: &self.tries,
            connection_id: connection.id,
            http: true,
            downstream: connection.source.address,
            local: connection.destination,
            upstream: exchange.upstream,
            upstream_local: self.upstream_local,
            upstream_failure: self.upstream_failure,
            upstream_workload: exchange.upstream_workload.as_ref(),
            cluster: exchange.cluster.as_deref().unwrap_or(""),
            route: exchange.route.as_deref().unwrap_or(""),
            allowed_by: exchange.allowed_by.as_deref().unwrap_or(""),
            denial: exchange.denial.as_ref().map(|denial| (&*denial.policy, &*denial.reason)),
            notes: exchange.notes.iter().map(|note| (&*note.filter, &*note.text)).collect(),
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.end(Ending::ClientGone);
    }
}

/// A host that is text: what is no UTF-8 is taken for Latin-1.
fn as_text(host: &HeaderValue) -> HeaderValue {
    match legible(host.as_bytes()) {
        Cow::Borrowed(_) => host.clone(),
        Cow::Owned(text) => HeaderValue::from_bytes(text.as_bytes()).unwrap_or_else(|_| host.clone()),
    }
}

/// The values of a header that Envoy keeps in one, with commas between them.
fn all_of(headers: &HeaderMap, name: &HeaderName) -> Option<HeaderValue> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?;
    let Some(second) = values.next() else { return Some(first.clone()) };
    let all: Vec<&[u8]> = [first, second].into_iter().chain(values).map(HeaderValue::as_bytes).collect();
    HeaderValue::from_bytes(&all.join(&b',')).ok()
}
