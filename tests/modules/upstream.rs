//! What stands behind both proxies: an upstream that does what the path says and remembers what it saw, and the services
//! whom modules ask.

use crate::ask::ServiceAnswer;
use crate::client::{Headers, headers};
use anyhow::Result;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// How slow `/slow` is.
const SLOW: Duration = Duration::from_millis(200);

/// The services whom modules may ask, by the names of their clusters in the modules' own documentation.
pub const SERVICES: [&str; 3] = ["httpbin", "web_service", "grpcbin"];

/// A request as the upstream or a service saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Who saw it: `upstream`, or a service.
    pub by: &'static str,
    pub method: String,
    pub uri: String,
    pub headers: Headers,
    pub body: Bytes,
    pub trailers: Headers,
}

/// The upstream and the services of one module. They end when dropped.
pub struct Upstream {
    /// Where the upstream listens; it speaks both versions of HTTP.
    pub address: SocketAddr,
    /// Where each service listens, in the order of [`SERVICES`].
    pub services: Vec<SocketAddr>,
    shared: Arc<Mutex<Shared>>,
    _running: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    seen: Vec<Seen>,
    answer: ServiceAnswer,
}

impl Upstream {
    /// Starts them.
    pub async fn start() -> Result<Self> {
        let (shared, mut running) = (Arc::new(Mutex::new(Shared::default())), JoinSet::new());
        let address = listen("upstream", &shared, &mut running).await?;
        let mut services = Vec::new();
        for name in SERVICES {
            services.push(listen(name, &shared, &mut running).await?);
        }
        Ok(Self { address, services, shared, _running: running })
    }

    /// Sets what services answer, and forgets what was seen.
    pub fn prepare(&self, answer: &ServiceAnswer) {
        *lock(&self.shared) = Shared { seen: Vec::new(), answer: answer.clone() };
    }

    /// What was seen since.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.shared).seen.clone()
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn listen(
    name: &'static str,
    shared: &Arc<Mutex<Shared>>,
    running: &mut JoinSet<()>,
) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (address, shared) = (listener.local_addr()?, Arc::clone(shared));
    running.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(connection(stream, name, Arc::clone(&shared)));
        }
    });
    Ok(address)
}

async fn connection(stream: TcpStream, name: &'static str, shared: Arc<Mutex<Shared>>) {
    let service = service_fn(move |request| respond(name, Arc::clone(&shared), request));
    // A connection that breaks off is the proxy's business.
    let _ended =
        auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
}

/// A broken promise: the connection is closed instead of an answer.
#[derive(Debug, thiserror::Error)]
#[error("closed as asked")]
struct Close;

type Answer = Response<BoxBody<Bytes, Infallible>>;

async fn respond(
    name: &'static str,
    shared: Arc<Mutex<Shared>>,
    request: Request<Incoming>,
) -> Result<Answer, Close> {
    let seen = see(name, request).await?;
    let answer = {
        let mut shared = lock(&shared);
        shared.seen.push(seen.clone());
        shared.answer.clone()
    };
    if name == "upstream" { upstream(&seen, &answer).await } else { Ok(service(&seen, &answer)) }
}

/// What proxies say of themselves and of a request's way, each in its own manner; how a body travels.
const NOT_COMPARED: [&str; 11] = [
    "connection",
    "transfer-encoding",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-envoy-internal",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-external-address",
    "traceparent",
    "tracestate",
];

async fn see(by: &'static str, request: Request<Incoming>) -> Result<Seen, Close> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Close)?;
    let mut list = headers(&parts.headers, &NOT_COMPARED);
    let uri = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    if let Some(authority) = parts.uri.authority() {
        list.insert(0, ("host".to_owned(), authority.to_string()));
    }
    list.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Seen {
        by,
        method: parts.method.to_string(),
        uri,
        headers: list,
        trailers: body.trailers().map(|map| headers(map, &[])).unwrap_or_default(),
        body: body.to_bytes(),
    })
}

fn pieces(pieces: &[&'static str], trailers: Option<HeaderMap>) -> BoxBody<Bytes, Infallible> {
    let data = pieces.iter().map(|piece| Frame::data(Bytes::from(*piece)));
    let frames: Vec<_> = data.chain(trailers.map(Frame::trailers)).map(Ok).collect();
    StreamBody::new(stream::iter(frames)).boxed()
}

fn whole(body: impl Into<Bytes>) -> BoxBody<Bytes, Infallible> {
    Full::new(body.into()).boxed()
}

fn grpc_trailers(status: u16) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(status));
    trailers.insert("grpc-message", HeaderValue::from_static("said so"));
    trailers
}

/// What the upstream answers: the path says it. Without a word for it, what was sent comes back.
async fn upstream(seen: &Seen, answer: &ServiceAnswer) -> Result<Answer, Close> {
    let path = seen.uri.split('?').next().unwrap_or_default();
    let (first, rest) =
        path.trim_start_matches('/').split_once('/').unwrap_or((path.trim_start_matches('/'), ""));
    let mut response = Response::new(match first {
        "close" => return Err(Close),
        "slow" => {
            tokio::time::sleep(SLOW).await;
            whole("slow")
        }
        "empty" | "status" => whole(""),
        "large" => whole(vec![b'y'; crate::ask::LARGE]),
        "pieces" => pieces(&["one piece, ", "another, ", "the last"], None),
        "secret" => whole("this is a secret"),
        "trailers" => {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-answered", HeaderValue::from_static("yes"));
            pieces(&["one piece, ", "the last"], Some(trailers))
        }
        "grpc" => pieces(&["\0\0\0\0\u{3}abc"], Some(grpc_trailers(answer.grpc_status))),
        _ => whole(seen.body.clone()),
    });
    let status = if first == "status" { rest.parse().ok() } else { None };
    *response.status_mut() = match first {
        "empty" => http::StatusCode::NO_CONTENT,
        _ => status.and_then(|code| http::StatusCode::from_u16(code).ok()).unwrap_or_default(),
    };
    let headers = response.headers_mut();
    headers.append("x-upstream", HeaderValue::from_static("one"));
    headers.append("x-upstream", HeaderValue::from_static("two"));
    let kind = if first == "grpc" { "application/grpc" } else { "text/plain" };
    headers.insert("content-type", HeaderValue::from_static(kind));
    Ok(response)
}

/// What a service answers a module.
fn service(seen: &Seen, answer: &ServiceAnswer) -> Answer {
    let is_grpc = seen
        .headers
        .iter()
        .any(|(name, value)| name == "content-type" && value.starts_with("application/grpc"));
    let body = if is_grpc {
        pieces(
            if answer.grpc_status == 0 { &["\0\0\0\0\0"] } else { &[] },
            Some(grpc_trailers(answer.grpc_status)),
        )
    } else {
        whole(answer.body)
    };
    let mut response = Response::new(body);
    if is_grpc {
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    } else {
        *response.status_mut() = http::StatusCode::from_u16(answer.status).unwrap_or_default();
        response.headers_mut().insert("x-service", HeaderValue::from_static(seen.by));
    }
    response
}
