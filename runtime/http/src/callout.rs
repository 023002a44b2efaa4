//! How filters ask other services: over the worker's own upstream connections, to an endpoint chosen as for any backend.

use crate::body::RequestBody;
use crate::endpoint::{Reach, choose};
use crate::host::Active;
use crate::route::Target;
use crate::upstream::{self, Lease};
use crate::{Failure, SiteHandle, Worker};
use bytes::{Bytes, BytesMut};
use cairn_filter::{
    Callout, CalloutAnswer, CalloutError, CalloutFeed, CalloutFuture, CalloutOpening, CalloutPart,
    CalloutParts, CalloutRequest,
};
use cairn_mesh::{AppProtocol, ResourceName, Snapshot};
use http::header::{CONTENT_LENGTH, HOST};
use http::{HeaderMap, HeaderValue, Request, Response, Uri, Version, request};
use http_body::Body;
use hyper::body::Incoming;
use smallvec::SmallVec;
use std::fmt;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::time::{Instant, timeout};

/// Asks services of the mesh on behalf of one connection, and addresses outside it over plain TCP.
pub struct MeshCallout {
    worker: Arc<Worker>,
    site: SiteHandle,
    destination: SocketAddr,
}

impl MeshCallout {
    /// Asks over `worker`'s connections, for a connection to `destination`, which `site` serves.
    pub fn new(worker: Arc<Worker>, site: SiteHandle, destination: SocketAddr) -> Self {
        Self { worker, site, destination }
    }
}

impl fmt::Debug for MeshCallout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeshCallout").field("destination", &self.destination).finish_non_exhaustive()
    }
}

impl Callout for MeshCallout {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        let (worker, site) = (Arc::clone(&self.worker), Arc::clone(&self.site));
        let destination = self.destination;
        Box::pin(async move {
            let (wait, begun) = (request.timeout, Instant::now());
            let place = Place::of(&request);
            let asked = with_body(request.request.clone(), request.trailers.clone(), request.http2)?;
            let sent = timeout(wait, send(&worker, &site, destination, &place, asked)).await;
            let (response, lease) = sent.unwrap_or(Err(CalloutError::Timeout(wait)))?;
            let left = wait.saturating_sub(begun.elapsed());
            let answered = timeout(left, answer(response, lease, request.answer_bytes_max)).await;
            answered.unwrap_or_else(|_| Err(CalloutError::BrokenOff(format!("not whole within {wait:?}"))))
        })
    }

    fn open(&self, request: CalloutRequest, feed: Box<dyn CalloutFeed>) -> CalloutOpening {
        let (worker, site) = (Arc::clone(&self.worker), Arc::clone(&self.site));
        let destination = self.destination;
        Box::pin(async move {
            let wait = request.timeout;
            let place = Place::of(&request);
            let (parts, body) = request.request.clone().into_parts();
            let mut streamed = Request::from_parts(parts, RequestBody::fed(body, feed));
            *streamed.version_mut() = Version::HTTP_2;
            let sent = send(&worker, &site, destination, &place, streamed);
            let sent = tokio::time::timeout(wait, sent).await;
            let (response, lease) = sent.unwrap_or(Err(CalloutError::Timeout(wait)))?;
            let streamed = |body| Box::new(Parts { body, lease: Some(lease) }) as Box<dyn CalloutParts>;
            Ok(response.map(streamed))
        })
    }

    fn version(&self, host: &str, namespace: Option<&str>, port: u16) -> Option<Version> {
        let snapshot = self.worker.snapshot();
        let place = Place { host: &Arc::from(host), namespace, port };
        let key = place.service(&snapshot)?;
        match snapshot.service(&key)?.service.port(port)?.protocol {
            AppProtocol::Http2 | AppProtocol::Grpc => Some(Version::HTTP_2),
            AppProtocol::Unknown | AppProtocol::Http11 | AppProtocol::Tcp | AppProtocol::Tls => {
                Some(Version::HTTP_11)
            }
        }
    }
}

/// How often a request is sent, when nothing of it left the time before: a connection that was kept may be gone.
const SENDS_MAX: usize = 2;

/// Sends a request to an endpoint of the service, and another time if nothing of it left.
async fn send(
    worker: &Worker,
    site: &SiteHandle,
    destination: SocketAddr,
    place: &Place<'_>,
    mut request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Lease), CalloutError> {
    let mut tried: SmallVec<[SocketAddr; 3]> = SmallVec::new();
    loop {
        let active = place.endpoint(worker, site, destination, &tried)?;
        tried.push(active.host().address);
        match upstream::send(worker, active, request).await {
            Ok(sent) => return Ok(sent),
            Err(upstream::Unsent { request: Some(unsent), .. }) if tried.len() < SENDS_MAX => {
                request = unsent
            }
            Err(upstream::Unsent { failure: Failure::Refused | Failure::UpstreamClosed, .. }) => {
                return Err(CalloutError::Closed);
            }
            Err(upstream::Unsent { failure, .. }) => {
                return Err(CalloutError::Unreachable(failure.to_string()));
            }
        }
    }
}

/// Whom a filter asks.
struct Place<'a> {
    host: &'a Arc<str>,
    namespace: Option<&'a str>,
    port: u16,
}

impl<'a> Place<'a> {
    fn of(request: &'a CalloutRequest) -> Self {
        Self { host: &request.host, namespace: request.namespace.as_deref(), port: request.port }
    }

    fn endpoint(
        &self,
        worker: &Worker,
        site: &SiteHandle,
        destination: SocketAddr,
        tried: &[SocketAddr],
    ) -> Result<Active, CalloutError> {
        let Some(key) = self.service(&worker.snapshot()) else {
            // An address says itself where it is, so nothing is guessed; a name that nobody knows might be anybody's.
            let address = self.host.parse::<IpAddr>().map_err(|_| self.unknown())?;
            let host = worker.hosts.host(SocketAddr::new(address, self.port), None);
            return Ok(Active::new(host));
        };
        let target = Target::Service { key, port: self.port };
        let site = site.load();
        let reach = Reach { worker, viewpoint: site.viewpoint.as_deref(), destination };
        match choose(&reach, &target, tried) {
            Ok(chosen) => Ok(chosen.active),
            Err(Failure::NoEndpoint) => Err(CalloutError::NoEndpoint(self.host.to_string())),
            Err(_) => Err(self.unknown()),
        }
    }

    fn service(&self, snapshot: &Snapshot) -> Option<ResourceName> {
        let state = match self.namespace {
            Some(namespace) => snapshot.service(&ResourceName::new(namespace, Arc::clone(self.host))),
            None => snapshot.service_named(self.host, ""),
        };
        state.map(|state| state.service.key())
    }

    fn unknown(&self) -> CalloutError {
        CalloutError::UnknownService(format!("{}:{}", self.host, self.port))
    }
}

/// The request as the endpoint's protocol writes it.
fn with_body(
    request: Request<Bytes>,
    trailers: HeaderMap,
    http2: bool,
) -> Result<Request<RequestBody>, CalloutError> {
    let bad = |what: &str| CalloutError::Unreachable(format!("the request has no {what}"));
    let (mut parts, body) = request.into_parts();
    if http2 {
        parts.version = Version::HTTP_2;
        return Ok(Request::from_parts(parts, RequestBody::full_with_trailers(body, trailers)));
    }
    let authority = parts.uri.authority().ok_or_else(|| bad("authority"))?;
    let host = HeaderValue::from_str(authority.as_str()).map_err(|_| bad("authority"))?;
    let path = parts.uri.path_and_query().cloned().ok_or_else(|| bad("path"))?;
    parts.headers.insert(HOST, host);
    parts.uri = Uri::from(path);
    parts.version = Version::HTTP_11;
    set_length(&mut parts, body.len());
    Ok(Request::from_parts(parts, RequestBody::full(body)))
}

/// A length is said also when it is nothing: the request may be of a method that has a body.
fn set_length(parts: &mut request::Parts, length: usize) {
    parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
}

async fn answer(
    response: Response<Incoming>,
    lease: Lease,
    bytes_max: usize,
) -> Result<CalloutAnswer, CalloutError> {
    let (parts, body) = response.into_parts();
    let mut body = pin!(body);
    let mut bytes = BytesMut::new();
    let mut trailers = HeaderMap::new();
    while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        let frame = frame.map_err(|error| CalloutError::BrokenOff(error.to_string()))?;
        match frame.into_data() {
            Ok(data) if bytes.len() + data.len() > bytes_max => return Err(CalloutError::TooLong(bytes_max)),
            Ok(data) => bytes.extend_from_slice(&data),
            Err(other) => trailers = other.into_trailers().unwrap_or_default(),
        }
    }
    lease.put_back();
    Ok(CalloutAnswer { response: Response::from_parts(parts, bytes.freeze()), trailers })
}

/// The rest of a streamed answer, and the stream it comes on.
struct Parts {
    body: Incoming,
    lease: Option<Lease>,
}

impl CalloutParts for Parts {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<CalloutPart, CalloutError>>> {
        loop {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    return Poll::Ready(Some(Err(CalloutError::BrokenOff(error.to_string()))));
                }
                None => {
                    if let Some(lease) = self.lease.take() {
                        lease.put_back();
                    }
                    return Poll::Ready(None);
                }
            };
            match frame.into_data() {
                Ok(data) => return Poll::Ready(Some(Ok(CalloutPart::Data(data)))),
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        return Poll::Ready(Some(Ok(CalloutPart::Trailers(trailers))));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "callout/tests.rs"]
mod tests;
