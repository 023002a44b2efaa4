//! The life of one exchange, from top to bottom: pin the configuration, find the route, run the request filters, pick
//! an endpoint, send, retry, run the response filters in reverse, and hand the response on with its record.

use crate::body::{RequestBody, ResponseBody};
use crate::endpoint::{Chosen, Reach, choose};
use crate::head::{
    Wish, request_head, set_own_response_headers, set_service_time, strip_hop, upstream_parts, wish,
};
use crate::record::{Ending, Record};
use crate::reply::{GRPC_STATUS, grpc_status, local_response};
use crate::rewrite::redirect_reply;
use crate::route::{Backend, Found, Rule};
use crate::serve::Served;
use crate::upgrade::{self, Upgrade};
use crate::upstream::{self, Lease, Unsent};
use crate::{Failure, Site, decision};
use bytes::Bytes;
use cairn_filter::{Chain, Exchange, LocalReply, Outcome, Protocol, RequestHead, ResponseHead};
use cairn_mesh::AppProtocol;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use smallvec::SmallVec;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// The exchange ends without an answer: the stream is reset, or the connection closed.
#[derive(Debug, thiserror::Error)]
#[error("the exchange was ended")]
pub(crate) struct Reset;

/// What became of the request phase and the upstream.
enum Turn {
    /// The upstream's answer.
    Upstream(Box<Answered>),
    /// An answer made here.
    Reply(Box<LocalReply>),
    /// The same for a failure, which the log names.
    Fail(Failure),
    /// No answer.
    Reset,
}

struct Answered {
    response: Response<Incoming>,
    lease: Lease,
    rule: Arc<Rule>,
    backend: usize,
}

/// Runs one exchange.
pub(crate) async fn run(
    served: Arc<Served>,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Reset> {
    let site = served.site.load_full();
    let wish = wish(request.method(), request.version(), request.headers());
    let upgrade = (wish == Wish::WebSocket).then(|| Upgrade::of(&mut request));
    let (parts, body) = request.into_parts();
    let (mut head, well_formed) = request_head(parts, site.normalization);
    let well_formed = if wish == Wish::Unsupported { Err(Failure::Upgrade) } else { well_formed };

    let now = (Instant::now(), SystemTime::now());
    let mut exchange = Exchange::new(Arc::clone(&served.connection), protocol(head.version), now.0, now.1);
    exchange.grpc = head.is_grpc();
    // The filter list belongs to the destination: what matches no route is still authorized before it is answered.
    let found = site.routes.find(&head, None);
    exchange.route = found.as_ref().map(|found| Arc::clone(&found.rule.name));
    let chain = if well_formed.is_ok() { &site.chain } else { &Chain::default() };
    let running = chain.start(&exchange);
    served.exchange_began();
    let trace = site.observer.as_ref().and_then(|observer| observer.trace(&mut head.headers));
    let mut record = Box::new(Record::new(exchange, running, Arc::clone(&served), &head));
    record.observe(site.observer.as_ref(), trace, &head);
    record.may_know = decision::may_know(&site.explain_to, &served.connection);
    let is_head = head.method == Method::HEAD;

    let turn = match well_formed {
        Err(failure) => Turn::Fail(failure),
        Ok(()) => go(&site, &mut record, head, found, body, upgrade.as_ref()).await,
    };
    match turn {
        Turn::Upstream(answered) => respond(record, *answered, upgrade).await,
        Turn::Reply(reply) => reply_here(record, *reply, is_head).await,
        Turn::Fail(failure) => fail(record, failure, is_head).await,
        Turn::Reset => {
            record.end(Ending::FilterReset);
            Err(Reset)
        }
    }
}

/// The request phase, and the upstream.
async fn go(
    site: &Site,
    record: &mut Record,
    mut head: RequestHead,
    mut found: Option<Found>,
    body: Incoming,
    upgrade: Option<&Upgrade>,
) -> Turn {
    let (mut body, progress) = RequestBody::new(body, record.exchange.grpc);
    record.progress = progress;
    let before = (head.method.clone(), head.path.clone(), head.authority.clone());
    let end_of_stream = record.progress.is_none();
    let Record { running, exchange, .. } = record;
    let outcome = running.request_headers(exchange, &mut head, end_of_stream, &mut body).await;
    record.keep_request(&head);
    match outcome {
        Outcome::Continue => {}
        Outcome::Reply(reply) => return Turn::Reply(reply),
        Outcome::Reset => return Turn::Reset,
        Outcome::ClientGone => return Turn::Fail(Failure::ClientGone),
    }
    let is_touched = site.routes.depends_on_filters()
        || (&head.method, &head.path, &head.authority) != (&before.0, &before.1, &before.2);
    if is_touched && !site.routes.is_implicit() {
        found = site.routes.find(&head, record.exchange.token.as_deref());
        record.exchange.route = found.as_ref().map(|found| Arc::clone(&found.rule.name));
    }
    let Some(Found { rule, prefix }) = found else { return Turn::Fail(Failure::NoRoute) };
    if let Some(reason) = &rule.broken {
        return Turn::Fail(Failure::BrokenRoute(Arc::clone(reason)));
    }
    if let Some(redirect) = &rule.redirect {
        let reply = redirect_reply(redirect, &head, prefix.as_deref(), site.port);
        return Turn::Reply(Box::new(reply));
    }
    let (index, backend) = match rule.backend(|weight| fastrand::u64(..weight)) {
        Ok(found) => found,
        Err(failure) => return Turn::Fail(failure),
    };
    record.exchange.cluster = Some(Arc::clone(&backend.cluster));
    rule.request.apply_to_request(&mut head);
    backend.request.apply_to_request(&mut head);
    if let Some(rewrite) = &rule.rewrite {
        rewrite.apply(&mut head, prefix.as_deref());
    }
    record.keep_request(&head);
    if let Some(upgrade) = upgrade {
        upgrade.ask(&mut head.headers);
    }
    match send(site, record, backend, head, body, upgrade.is_some()).await {
        Ok((response, lease)) => Turn::Upstream(Box::new(Answered { response, lease, rule, backend: index })),
        Err(failure) => Turn::Fail(failure),
    }
}

/// Sends the request to an endpoint, and to another if the first has not begun to work on it.
async fn send(
    site: &Site,
    record: &mut Record,
    backend: &Backend,
    head: RequestHead,
    body: RequestBody,
    is_upgrade: bool,
) -> Result<(Response<Incoming>, Lease), Failure> {
    let served = Arc::clone(&record.served);
    let worker = &*served.worker;
    let mut tried: SmallVec<[SocketAddr; 3]> = SmallVec::new();
    let destination = served.connection.destination;
    let reach = Reach { worker, viewpoint: site.viewpoint.as_deref(), destination };
    let mut chosen = choose(&reach, &backend.target, &tried)?;
    let version = upstream_version(chosen.protocol, head.version, is_upgrade);
    let mut request = upstream_parts(head, version)?.body(body).map_err(|_| Failure::BadPath)?;
    loop {
        let Chosen { active, workload, .. } = chosen;
        let address = active.host().address;
        record.exchange.upstream = Some(address);
        record.exchange.upstream_workload = Some(workload);
        record.attempts += 1;
        let sent_at = Instant::now();
        let Unsent { failure, request: unsent } = match upstream::send(worker, active, request).await {
            Ok(answer) => {
                record.upstream_duration = Some(sent_at.elapsed());
                record.sent_at = Some(sent_at);
                record.upstream_local = answer.1.local;
                return Ok(answer);
            }
            Err(unsent) => unsent,
        };
        let is_last = tried.len() >= worker.settings.retries_max;
        let may_retry = failure.answer().retry && !is_last;
        record.retried_in_vain = failure.answer().retry && is_last && !tried.is_empty();
        let Some(unsent) = unsent.filter(|_| may_retry) else { return Err(failure) };
        request = unsent;
        tried.push(address);
        chosen = choose(&reach, &backend.target, &tried)?;
        if tried.contains(&chosen.active.host().address) {
            // There is no other: give it a moment (Envoy's base interval, 25 ms, doubling, with jitter).
            let most = 25_u64 << tried.len().min(4);
            tokio::time::sleep(Duration::from_millis(fastrand::u64(1..=most))).await;
        }
    }
}

/// HTTP/2 where the port declares it, HTTP/1.1 where it declares that, else what the client speaks.
fn upstream_version(declared: AppProtocol, downstream: Version, is_upgrade: bool) -> Version {
    match declared {
        _ if is_upgrade => Version::HTTP_11,
        AppProtocol::Http2 | AppProtocol::Grpc => Version::HTTP_2,
        AppProtocol::Unknown if downstream == Version::HTTP_2 => Version::HTTP_2,
        AppProtocol::Unknown | AppProtocol::Http11 | AppProtocol::Tcp | AppProtocol::Tls => Version::HTTP_11,
    }
}

/// The response phase of an upstream's answer.
async fn respond(
    mut record: Box<Record>,
    answered: Answered,
    upgrade: Option<Upgrade>,
) -> Result<Response<ResponseBody>, Reset> {
    let Answered { response, lease, rule, backend } = answered;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return match upgrade {
            Some(upgrade) => Ok(upgrade::switch(record, response, lease, upgrade)),
            // Nobody asked for it.
            None => fail(record, Failure::UpstreamClosed, false).await,
        };
    }
    let version = response.version();
    let (parts, incoming) = response.into_parts();
    let mut head = ResponseHead { status: parts.status, headers: parts.headers };
    strip_hop(&mut head.headers, version);
    if let Some(backend) = rule.backend_at(backend) {
        backend.response.apply(&mut head.headers);
    }
    rule.response.apply(&mut head.headers);
    let millis = record.upstream_duration.map_or(0, |duration| duration.as_millis() as u64);
    set_service_time(&mut head.headers, millis);
    if record.exchange.grpc {
        record.grpc_status = head.headers.get(GRPC_STATUS).map(grpc_status);
    }
    record.exchange.status = Some(head.status);
    record.exchange.details = "via_upstream".into();
    let end_of_stream = http_body::Body::is_end_stream(&incoming);
    let Record { running, exchange, .. } = &mut *record;
    match running.response_headers(exchange, &mut head, end_of_stream).await {
        Outcome::Continue => {
            set_own_response_headers(&mut head.headers, record.served.worker.settings.server.as_ref());
            record.answered(&mut head);
            Ok(response_of(head, |record| ResponseBody::upstream(incoming, record, lease), record))
        }
        Outcome::Reply(reply) => Ok(answer_with(record, *reply, false)),
        Outcome::Reset | Outcome::ClientGone => {
            record.end(Ending::FilterReset);
            Err(Reset)
        }
    }
}

/// The answer to a failure.
async fn fail(
    mut record: Box<Record>,
    failure: Failure,
    is_head: bool,
) -> Result<Response<ResponseBody>, Reset> {
    tracing::debug!(%failure, source = %record.exchange.connection.source.address, "exchange failed");
    if record.request_is_broken() {
        record.end(Ending::ClientGone);
        return Err(Reset);
    }
    record.failed(&failure);
    match failure.reply() {
        Some(reply) => reply_here(record, reply, is_head).await,
        None => Err(Reset),
    }
}

/// The response phase of an answer made here.
async fn reply_here(
    mut record: Box<Record>,
    reply: LocalReply,
    is_head: bool,
) -> Result<Response<ResponseBody>, Reset> {
    record.exchange.details = reply.details.clone();
    if reply.details.starts_with("ext_authz_") {
        record.flags = "UAEX";
    }
    let (mut head, body, grpc) = local_response(reply, record.exchange.grpc);
    record.grpc_status = grpc;
    record.exchange.status = Some(head.status);
    let Record { running, exchange, .. } = &mut *record;
    match running.response_headers(exchange, &mut head, body.is_empty()).await {
        Outcome::Continue => Ok(finish_reply(record, head, body, is_head)),
        Outcome::Reply(reply) => Ok(answer_with(record, *reply, is_head)),
        Outcome::Reset | Outcome::ClientGone => {
            record.end(Ending::FilterReset);
            Err(Reset)
        }
    }
}

/// An answer that a filter gave in the response phase: no further filter sees it.
fn answer_with(mut record: Box<Record>, reply: LocalReply, is_head: bool) -> Response<ResponseBody> {
    record.exchange.details = reply.details.clone();
    let (head, body, grpc) = local_response(reply, record.exchange.grpc);
    record.grpc_status = grpc;
    finish_reply(record, head, body, is_head)
}

fn finish_reply(
    mut record: Box<Record>,
    mut head: ResponseHead,
    body: Bytes,
    is_head: bool,
) -> Response<ResponseBody> {
    set_own_response_headers(&mut head.headers, record.served.worker.settings.server.as_ref());
    record.answered(&mut head);
    // The body of an answer to HEAD is not read, so it must not wait to be.
    let body = if is_head { Bytes::new() } else { body };
    response_of(head, |record| ResponseBody::full(body, Some(record)), record)
}

fn response_of(
    head: ResponseHead,
    body: impl FnOnce(Box<Record>) -> ResponseBody,
    record: Box<Record>,
) -> Response<ResponseBody> {
    let ResponseHead { status, headers } = head;
    let mut response = Response::new(body(record));
    *response.status_mut() = status;
    *response.headers_mut() = without_length_of_another_body(headers, status);
    response
}

/// A status without a body has no length to declare but what the upstream says of a GET.
fn without_length_of_another_body(mut headers: HeaderMap, status: StatusCode) -> HeaderMap {
    if status.is_informational() || status == StatusCode::NO_CONTENT {
        headers.remove(http::header::CONTENT_LENGTH);
    }
    headers
}

fn protocol(version: Version) -> Protocol {
    match version {
        Version::HTTP_2 => Protocol::Http2,
        Version::HTTP_09 | Version::HTTP_10 => Protocol::Http10,
        _ => Protocol::Http11,
    }
}

#[cfg(test)]
#[path = "exchange/harness.rs"]
pub(crate) mod harness;
#[cfg(test)]
#[path = "exchange/tests.rs"]
mod tests;
