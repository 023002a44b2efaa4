//! The record of one exchange: kept while it lives, handed to telemetry exactly once, also when the client goes away.

use crate::Failure;
use crate::body::Progress;
use crate::head::{FORWARDED_FOR, REQUEST_ID, header_bytes};
use crate::serve::Served;
use cairn_filter::{Exchange, RequestHead, ResponseHead, Running};
use cairn_telemetry::HttpRecord;
use http::header::USER_AGENT;
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Method};
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
    /// The client went away: what is assumed of an exchange that was dropped.
    ClientGone,
}

/// The record of an exchange, its filters, and what the access log says of the request.
pub(crate) struct Record {
    pub(crate) exchange: Exchange,
    pub(crate) running: Running,
    pub(crate) served: Arc<Served>,
    /// Set while the response is on its way.
    pub(crate) flags: &'static str,
    pub(crate) grpc_status: Option<u8>,
    pub(crate) response_body_bytes: u64,
    pub(crate) progress: Option<Arc<Progress>>,
    pub(crate) upstream_duration: Option<Duration>,
    ended: bool,
    method: Method,
    path: PathAndQuery,
    authority: HeaderValue,
    request_id: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    forwarded_for: Option<HeaderValue>,
    request_head_bytes: u64,
    response_head_bytes: u64,
}

impl Record {
    pub(crate) fn new(exchange: Exchange, running: Running, served: Arc<Served>, head: &RequestHead) -> Self {
        let kept = |name: HeaderName| head.headers.get(name).cloned();
        // "GET / HTTP/1.1" and its line end, "host: x" and its own, and the empty line.
        let line = head.method.as_str().len() + head.path.as_str().len() + head.authority.len() + 22;
        Self {
            exchange,
            running,
            served,
            flags: "-",
            grpc_status: None,
            response_body_bytes: 0,
            progress: None,
            upstream_duration: None,
            ended: false,
            method: head.method.clone(),
            path: head.path.clone(),
            authority: head.authority.clone(),
            request_id: kept(REQUEST_ID),
            user_agent: kept(USER_AGENT),
            forwarded_for: kept(FORWARDED_FOR),
            request_head_bytes: line as u64 + header_bytes(&head.headers),
            response_head_bytes: 0,
        }
    }

    /// Notes the response that the client is about to get.
    pub(crate) fn answered(&mut self, head: &ResponseHead) {
        self.exchange.status = Some(head.status);
        // "HTTP/1.1 200 OK" and the like, its line end, and the empty line.
        self.response_head_bytes = 19 + header_bytes(&head.headers);
    }

    /// Notes why there is no answer from upstream.
    pub(crate) fn failed(&mut self, failure: &Failure) {
        let answer = failure.answer();
        self.flags = answer.flags;
        self.exchange.details = answer.details.into();
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
            Ending::UpstreamCut => self.failed(&Failure::UpstreamCut),
            Ending::FilterReset => self.failed(&Failure::FilterReset),
            Ending::ClientGone => self.failed(&Failure::ClientGone),
        }
        self.running.finish(&mut self.exchange);
        self.served.exchange_ended();
        self.tell();
    }

    fn tell(&self) {
        let exchange = &self.exchange;
        let connection = &exchange.connection;
        let body_bytes = self.progress.as_ref().map_or(0, |progress| progress.bytes.load(Relaxed));
        let record = HttpRecord {
            started: exchange.started_at,
            duration: Instant::now().saturating_duration_since(exchange.started),
            upstream_duration: self.upstream_duration,
            request_id: text(self.request_id.as_ref()),
            method: self.method.as_str(),
            path: self.path.as_str(),
            protocol: exchange.protocol.as_str(),
            authority: text(Some(&self.authority)),
            user_agent: text(self.user_agent.as_ref()),
            forwarded_for: text(self.forwarded_for.as_ref()),
            status: exchange.status.map_or(0, |status| status.as_u16()),
            flags: self.flags,
            details: &exchange.details,
            grpc: exchange.grpc,
            grpc_status: self.grpc_status,
            request_body_bytes: body_bytes,
            response_body_bytes: self.response_body_bytes,
            request_bytes: self.request_head_bytes + body_bytes,
            response_bytes: self.response_head_bytes + self.response_body_bytes,
            downstream: connection.source.address,
            local: connection.destination,
            upstream: exchange.upstream,
            upstream_workload: exchange.upstream_workload.as_ref(),
            cluster: exchange.cluster.as_deref().unwrap_or(""),
            route: exchange.route.as_deref().unwrap_or(""),
            allowed_by: exchange.allowed_by.as_deref().unwrap_or(""),
            denial: exchange.denial.as_ref().map(|denial| (&*denial.policy, &*denial.reason)),
            notes: exchange.notes.iter().map(|note| (&*note.filter, &*note.text)).collect(),
        };
        self.served.worker.telemetry().record_http(&self.served.scope, &record);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.end(Ending::ClientGone);
    }
}

fn text(value: Option<&HeaderValue>) -> &str {
    value.and_then(|value| value.to_str().ok()).unwrap_or("")
}
