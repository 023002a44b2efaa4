//! The life of one exchange, from top to bottom: pin the configuration, find the route, run the request filters, pick
//! an endpoint, send, retry, run the response filters in reverse, and hand the response on with its record.

use crate::body::RequestBody;
use crate::download::{Filtered, Made, ResponseBody, Source};
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
use crate::upload::{Length, Stopped, Upload, alongside, declare};
use crate::upstream::{self, Lease, Unsent};
use crate::{Failure, Site, decision};
use bytes::{Bytes, BytesMut};
use cairn_filter::{Chain, Exchange, LocalReply, Outcome, Piece, Protocol, RequestHead, ResponseHead, Side};
use cairn_mesh::AppProtocol;
use http::header::{CONTENT_LENGTH, EXPECT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use smallvec::SmallVec;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
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
    /// What filters have not seen of the request's body yet.
    upload: Option<Upload>,
}

impl From<Stopped> for Turn {
    /// What ended an exchange whose response has not begun.
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Length => Self::Fail(Failure::LengthChanged),
            Stopped::By(Outcome::Reply(reply)) => Self::Reply(reply),
            Stopped::By(Outcome::TooLarge) => Self::Fail(Failure::RequestTooLarge),
            Stopped::By(Outcome::BodyBroken) => Self::Fail(Failure::ClientGone),
            Stopped::By(Outcome::Reset | Outcome::Continue) => Self::Reset,
        }
    }
}

/// The rule for a request, and of its backends the one whose turn it is.
struct Routed {
    found: Found,
    backend: Result<usize, Failure>,
}

impl Routed {
    /// Where the request goes as it stands; the exchange knows it from then on, as in Envoy, whoever answers in the end.
    fn find(site: &Site, head: &RequestHead, exchange: &mut Exchange) -> Option<Self> {
        let found = site.routes.find(head, exchange.token.as_deref());
        exchange.route = found.as_ref().map(|found| Arc::clone(&found.rule.name));
        exchange.cluster = None;
        let found = found?;
        let chosen = found.rule.backend(|weight| fastrand::u64(..weight));
        let backend = chosen.map(|(index, backend)| {
            exchange.cluster = Some(Arc::clone(&backend.cluster));
            index
        });
        Some(Self { found, backend })
    }
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
    let routed = Routed::find(&site, &head, &mut exchange);
    let chain = if well_formed.is_ok() { &site.chain } else { &Chain::default() };
    let mut running = chain.start(&exchange);
    running.hold_at_most(served.worker.settings.body_held_max);
    served.exchange_began();
    let trace = site.observer.as_ref().and_then(|observer| observer.trace(&mut head.headers));
    let mut record = Box::new(Record::new(exchange, running, Arc::clone(&served), &head));
    record.observe(site.observer.as_ref(), trace, &head);
    record.may_know = decision::may_know(&site.explain_to, &served.connection);
    let is_head = head.method == Method::HEAD;

    let turn = match well_formed {
        Err(failure) => Turn::Fail(failure),
        Ok(()) => go(&site, &mut record, head, routed, body, upgrade.as_ref()).await,
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

impl From<Failure> for Turn {
    fn from(failure: Failure) -> Self {
        Self::Fail(failure)
    }
}

/// The request phase, and the upstream.
async fn go(
    site: &Site,
    record: &mut Record,
    mut head: RequestHead,
    mut routed: Option<Routed>,
    body: Incoming,
    upgrade: Option<&Upgrade>,
) -> Turn {
    let http2 = head.version == Version::HTTP_2;
    let (mut body, progress) = RequestBody::new(body, record.exchange.grpc, http2);
    record.progress = progress;
    let before = (head.method.clone(), head.path.clone(), head.authority.clone());
    let end_of_stream = record.progress.is_none();
    let Record { running, exchange, .. } = record;
    let outcome = running.request_headers(exchange, &mut head, end_of_stream, &mut body).await;
    record.keep_request(&head);
    match outcome {
        Outcome::Continue => {}
        ended => {
            // Who waits to be told to go on has sent nothing, and reading would tell it.
            if !head.headers.contains_key(EXPECT) {
                body.read_aside();
            }
            return Turn::from(Stopped::By(ended));
        }
    }
    let is_touched = site.routes.depends_on_filters()
        || (&head.method, &head.path, &head.authority) != (&before.0, &before.1, &before.2);
    if is_touched && !site.routes.is_implicit() {
        routed = Routed::find(site, &head, &mut record.exchange);
    }
    let Some(Routed { found: Found { rule, prefix }, backend }) = routed else {
        return Turn::Fail(Failure::NoRoute);
    };
    if let Some(reason) = &rule.broken {
        return Turn::Fail(Failure::BrokenRoute(Arc::clone(reason)));
    }
    if let Some(redirect) = &rule.redirect {
        let reply = redirect_reply(redirect, &head, prefix.as_deref(), site.port);
        return Turn::Reply(Box::new(reply));
    }
    let index = match backend {
        Ok(index) => index,
        Err(failure) => return Turn::Fail(failure),
    };
    let Some(backend) = rule.backend_at(index) else { return Turn::Fail(Failure::NoRoute) };
    rule.request.apply_to_request(&mut head);
    backend.request.apply_to_request(&mut head);
    if let Some(rewrite) = &rule.rewrite {
        rewrite.apply(&mut head, prefix.as_deref());
    }
    record.keep_rewritten(&head);
    if let Some(upgrade) = upgrade {
        upgrade.ask(&mut head.headers);
    }
    let (body, mut upload) = if !end_of_stream && record.running.wants_body(Side::Request) {
        match Upload::begin(body, record, &mut head).await {
            Ok(begun) => begun,
            Err(stopped) => return Turn::from(stopped),
        }
    } else {
        body.put_back(record.running.take_read());
        (body, None)
    };
    match send(site, record, backend, head, body, upgrade.is_some(), &mut upload).await {
        Ok((response, lease)) => {
            Turn::Upstream(Box::new(Answered { response, lease, rule, backend: index, upload }))
        }
        Err(turn) => turn,
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
    upload: &mut Option<Upload>,
) -> Result<(Response<Incoming>, Lease), Turn> {
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
        record.attempted(address, workload, request.headers_mut());
        let sent_at = Instant::now();
        let mut sending = pin!(upstream::send(worker, active, request));
        let sent = if upload.is_none() {
            sending.await
        } else {
            alongside(upload, record, |cx, _| sending.as_mut().poll(cx)).await?
        };
        let Unsent { failure, request: unsent } = match sent {
            Ok(answer) => {
                record.upstream_duration = Some(sent_at.elapsed());
                record.sent_at = Some(sent_at);
                record.upstream_local = answer.1.local;
                return Ok(answer);
            }
            Err(unsent) => unsent,
        };
        record.attempt_failed(&failure);
        let is_last = tried.len() >= worker.settings.retries_max;
        let may_retry = failure.answer().retry && !is_last;
        record.retried_in_vain = failure.answer().retry && is_last && !tried.is_empty();
        let Some(unsent) = unsent.filter(|_| may_retry) else { return Err(failure.into()) };
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
    let Answered { response, lease, rule, backend, mut upload } = answered;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return match upgrade {
            Some(upgrade) => Ok(upgrade::switch(record, response, lease, upgrade)),
            // Nobody asked for it.
            None => fail(record, Failure::UpstreamClosed, false).await,
        };
    }
    let version = response.version();
    record.upstream_http1 = version != Version::HTTP_2;
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
    let mut source = Source::new(incoming, version == Version::HTTP_2);
    let outcome = alongside(&mut upload, &mut record, |cx, record| {
        let Record { running, exchange, .. } = record;
        running.poll_response_headers(cx, exchange, &mut head, end_of_stream, &mut source)
    });
    match outcome.await {
        Ok(Outcome::Continue) => {}
        Ok(ended) => return respond_otherwise(record, Stopped::By(ended)),
        Err(stopped) => return stopped_by_request(record, stopped),
    }
    if end_of_stream || !record.running.wants_body(Side::Response) {
        set_own_response_headers(&mut head.headers, record.served.worker.settings.server.as_ref());
        record.answered(&mut head);
        let body = |record| ResponseBody::upstream(source.incoming, record, lease);
        return Ok(response_of(head, |record| with_upload(body(record), upload), record));
    }
    let (filtered, upload) = match begin_download(&mut record, &mut head, source, upload).await {
        Ok(begun) => begun,
        Err(Either::Request(stopped)) => return stopped_by_request(record, stopped),
        Err(Either::Response(stopped)) => return respond_otherwise(record, stopped),
    };
    set_own_response_headers(&mut head.headers, record.served.worker.settings.server.as_ref());
    record.answered(&mut head);
    let body = |record| with_upload(ResponseBody::filtered(filtered, record, lease), upload);
    Ok(response_of(head, body, record))
}

fn with_upload(body: ResponseBody, upload: Option<Upload>) -> ResponseBody {
    match upload {
        Some(upload) => body.with_upload(upload),
        None => body,
    }
}

/// Whose body ended an exchange.
enum Either {
    Request(Stopped),
    Response(Stopped),
}

/// Begins to show the response's body to the filters. Where the head says how long it is, it does not go before the
/// filters let the first piece of the body pass: what they have changed by then, the head can still tell.
async fn begin_download(
    record: &mut Record,
    head: &mut ResponseHead,
    mut source: Source,
    mut upload: Option<Upload>,
) -> Result<(Filtered, Option<Upload>), Either> {
    if !head.headers.contains_key(http::header::CONTENT_LENGTH) {
        return Ok((Filtered::new(source, Length::default()), upload));
    }
    let first = alongside(&mut upload, record, |cx, record| {
        let Record { running, exchange, .. } = record;
        running.poll_response_body(cx, exchange, &mut source)
    });
    let first = first.await.map_err(Either::Request)?;
    let first = first.map_err(|outcome| Either::Response(Stopped::By(outcome)))?;
    let is_changed = record.running.is_body_changed(Side::Response);
    let length = Length { declared: declare(&mut head.headers, &first, is_changed), sent: 0 };
    let mut filtered = Filtered::new(source, length);
    filtered.begins_with(first).map_err(Either::Response)?;
    Ok((filtered, upload))
}

/// What becomes of an upstream's response, whose head is still here, that filters did not let pass.
fn respond_otherwise(mut record: Box<Record>, stopped: Stopped) -> Result<Response<ResponseBody>, Reset> {
    match stopped {
        Stopped::Length => answer_failure(record, &Failure::LengthChanged),
        Stopped::By(Outcome::Reply(reply)) => Ok(answer_with(record, *reply, false)),
        Stopped::By(Outcome::TooLarge) => answer_failure(record, &Failure::ResponseTooLarge),
        Stopped::By(Outcome::BodyBroken) => answer_failure(record, &Failure::UpstreamClosed),
        Stopped::By(Outcome::Reset | Outcome::Continue) => {
            record.end(Ending::FilterReset);
            Err(Reset)
        }
    }
}

/// What ended the request while its response was about to begin.
fn stopped_by_request(mut record: Box<Record>, stopped: Stopped) -> Result<Response<ResponseBody>, Reset> {
    match Turn::from(stopped) {
        Turn::Reply(reply) => Ok(answer_with(record, *reply, false)),
        Turn::Fail(failure) => answer_failure(record, &failure),
        Turn::Reset | Turn::Upstream(_) => {
            record.end(Ending::FilterReset);
            Err(Reset)
        }
    }
}

/// The answer to a failure in the place of a response that filters have seen.
fn answer_failure(mut record: Box<Record>, failure: &Failure) -> Result<Response<ResponseBody>, Reset> {
    record.failed(failure);
    match failure.reply() {
        Some(reply) => Ok(answer_with(record, reply, false)),
        None => Err(Reset),
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
    // The body of an answer to HEAD is not read, so there is none.
    let body = if is_head { Bytes::new() } else { body };
    match show_reply(&mut record, &mut head, body).await {
        Ok(body) => {
            // A filter may have made another body of it.
            if !is_head && head.headers.contains_key(CONTENT_LENGTH) {
                head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
            }
            Ok(finish_reply(record, head, body))
        }
        Err(Outcome::Reply(reply)) => Ok(answer_with(record, *reply, is_head)),
        Err(Outcome::TooLarge) => answer_failure(record, &Failure::ResponseTooLarge),
        Err(Outcome::Reset | Outcome::BodyBroken | Outcome::Continue) => {
            record.end(Ending::FilterReset);
            Err(Reset)
        }
    }
}

/// Runs the response phase over an answer made here; the body that comes of it.
async fn show_reply(record: &mut Record, head: &mut ResponseHead, body: Bytes) -> Result<Bytes, Outcome> {
    let end_of_stream = body.is_empty();
    let Record { running, exchange, .. } = record;
    let mut source = Made(body);
    match running.response_headers(exchange, head, end_of_stream, &mut source).await {
        Outcome::Continue => {}
        ended => return Err(ended),
    }
    if end_of_stream || !running.wants_body(Side::Response) {
        return Ok(source.0);
    }
    let mut whole = BytesMut::new();
    loop {
        match poll_fn(|cx| running.poll_response_body(cx, exchange, &mut source)).await? {
            Piece::Data { bytes, end_of_stream: true } if whole.is_empty() => return Ok(bytes),
            Piece::Data { bytes, end_of_stream } => {
                whole.extend_from_slice(&bytes);
                if end_of_stream {
                    return Ok(whole.freeze());
                }
            }
            // An answer made here has no place for trailers.
            Piece::Trailers(_) => return Ok(whole.freeze()),
        }
    }
}

/// An answer that a filter gave in the response phase: no further filter sees it.
fn answer_with(mut record: Box<Record>, reply: LocalReply, is_head: bool) -> Response<ResponseBody> {
    record.exchange.details = reply.details.clone();
    let (head, body, grpc) = local_response(reply, record.exchange.grpc);
    record.grpc_status = grpc;
    finish_reply(record, head, if is_head { Bytes::new() } else { body })
}

fn finish_reply(mut record: Box<Record>, mut head: ResponseHead, body: Bytes) -> Response<ResponseBody> {
    set_own_response_headers(&mut head.headers, record.served.worker.settings.server.as_ref());
    record.answered(&mut head);
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
        headers.remove(CONTENT_LENGTH);
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
#[path = "exchange/bodies.rs"]
mod bodies;
#[cfg(test)]
#[path = "exchange/harness.rs"]
pub(crate) mod harness;
#[cfg(test)]
#[path = "exchange/observed.rs"]
mod observed;
#[cfg(test)]
#[path = "exchange/tests.rs"]
mod tests;
