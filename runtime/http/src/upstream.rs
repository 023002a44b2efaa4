//! Sending a request to the chosen endpoint: on a connection kept open, or on a new one, plain or through a tunnel.

use crate::body::RequestBody;
use crate::host::{Active, Host, Kept, Opened, Shared};
use crate::stream::Upstream;
use crate::{Failure, Worker};
use cairn_hbone::{ConnectError, PoolTarget};
use cairn_mesh::Identity;
use cairn_net::NetError;
use http::{HeaderMap, Request, Response, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tracing::{debug, warn};

/// The port on which a meshed workload's ztunnel accepts tunnels.
const HBONE_PORT: u16 = 15008;

/// HTTP/2 flow control windows: enough for a fast peer across a zone, and a bound on what one stream may buffer.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// A request that got no response.
pub(crate) struct Unsent {
    pub(crate) failure: Failure,
    /// The request, when nothing of it has left and it can be sent again.
    pub(crate) request: Option<Request<RequestBody>>,
}

/// An upstream connection in use.
pub(crate) struct Lease {
    active: Active,
    carrier: Carrier,
    /// Our end of it, if it is a socket of its own.
    pub(crate) local: Option<SocketAddr>,
}

/// A byte stream to an endpoint, and our end of it, if it is a socket of its own.
pub(crate) struct Open {
    pub(crate) stream: Upstream,
    pub(crate) local: Option<SocketAddr>,
}

enum Carrier {
    Http1 { sender: http1::SendRequest<RequestBody>, idle_max: usize },
    Http2(Stream),
}

/// A stream in progress on a shared connection.
struct Stream(Shared);

impl Stream {
    fn new(shared: Shared) -> Self {
        shared.streams.fetch_add(1, Relaxed);
        Self(shared)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Relaxed);
    }
}

impl Lease {
    /// The response is over: the connection may serve another request. Dropped instead, it is closed.
    pub(crate) fn put_back(self) {
        match self.carrier {
            Carrier::Http1 { sender, idle_max } => {
                self.active.host().put_idle((sender, self.local), idle_max);
            }
            Carrier::Http2(stream) => drop(stream),
        }
    }
}

/// Sends `request`, whose version says which protocol the endpoint speaks.
pub(crate) async fn send(
    worker: &Worker,
    active: Active,
    request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Lease), Unsent> {
    if request.version() == Version::HTTP_2 {
        send_http2(worker, active, request).await
    } else {
        send_http1(worker, active, request).await
    }
}

async fn send_http1(
    worker: &Worker,
    active: Active,
    mut request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Lease), Unsent> {
    let idle_max = worker.settings.upstream_idle_max;
    loop {
        let ((mut sender, local), is_fresh) = match active.host().take_idle() {
            Some(kept) => (kept, false),
            None => match open_http1(worker, active.host()).await {
                Ok(opened) => (opened, true),
                Err(failure) => return Err(Unsent { failure, request: Some(request) }),
            },
        };
        match sender.try_send_request(request).await {
            Ok(response) => {
                let carrier = Carrier::Http1 { sender, idle_max };
                return Ok((response, Lease { active, carrier, local }));
            }
            Err(mut error) => {
                debug!(endpoint = %active.host().address, error = %error.error(), "no response");
                match error.take_message() {
                    // The endpoint had closed a connection that was kept; nothing was sent.
                    Some(unsent) if !is_fresh => request = unsent,
                    request => {
                        let failure = failure_of(error.error(), request.is_some());
                        return Err(Unsent { failure, request });
                    }
                }
            }
        }
    }
}

async fn send_http2(
    worker: &Worker,
    active: Active,
    request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Lease), Unsent> {
    let shared = match shared_http2(worker, active.host()).await {
        Ok(shared) => shared,
        Err(failure) => return Err(Unsent { failure, request: Some(request) }),
    };
    // A stream that is refused was not worked on, and a request without a body can be made again.
    let spare = request.body().is_end_stream().then(|| without_body(&request));
    let mut sender = shared.sender.clone();
    let local = shared.local;
    let stream = Stream::new(shared);
    match sender.try_send_request(request).await {
        Ok(response) => Ok((response, Lease { active, carrier: Carrier::Http2(stream), local })),
        Err(mut error) => {
            debug!(endpoint = %active.host().address, error = %error.error(), "no response");
            let unsent = error.take_message();
            let failure = failure_of(error.error(), unsent.is_some());
            let request = unsent.or(spare.filter(|_| failure == Failure::Refused));
            Err(Unsent { failure, request })
        }
    }
}

fn without_body(request: &Request<RequestBody>) -> Request<RequestBody> {
    let mut copy = Request::new(RequestBody::none());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    copy
}

fn failure_of(error: &hyper::Error, is_unsent: bool) -> Failure {
    if is_unsent {
        // The connection went away before the request was written to it.
        return Failure::Refused;
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(http2) = cause.downcast_ref::<h2::Error>() {
            let refused = http2.reason() == Some(h2::Reason::REFUSED_STREAM);
            return if refused { Failure::Refused } else { Failure::UpstreamClosed };
        }
        source = cause.source();
    }
    Failure::UpstreamClosed
}

async fn open_http1(worker: &Worker, host: &Arc<Host>) -> Result<Kept, Failure> {
    let opened = Opened::new(host, worker.settings.upstream_connections_max).ok_or(Failure::Overflow)?;
    let Open { stream, local } = open(worker, host).await?;
    let (sender, connection) = http1::Builder::new()
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| Failure::Connect("HTTP/1.1 failed"))?;
    // It ends when its sender is dropped, which the pool does after the idle time, or when the endpoint closes.
    tokio::spawn(async move {
        let _opened = opened;
        if let Err(error) = connection.with_upgrades().await {
            debug!(%error, "upstream connection ended");
        }
    });
    Ok((sender, local))
}

async fn shared_http2(worker: &Worker, host: &Arc<Host>) -> Result<Shared, Failure> {
    if let Some(shared) = host.shared() {
        return Ok(shared);
    }
    let _one_at_a_time = host.opening.lock().await;
    if let Some(shared) = host.shared() {
        return Ok(shared);
    }
    let opened = Opened::new(host, worker.settings.upstream_connections_max).ok_or(Failure::Overflow)?;
    let Open { stream, local } = open(worker, host).await?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| Failure::Connect("HTTP/2 failed"))?;
    tokio::spawn(async move {
        let _opened = opened;
        if let Err(error) = connection.await {
            debug!(%error, "upstream connection ended");
        }
    });
    Ok(host.put_shared(sender, local))
}

/// Opens a byte stream to an endpoint: a tunnel to exactly its identity, or plain TCP.
pub(crate) async fn open(worker: &Worker, host: &Host) -> Result<Open, Failure> {
    let opened = match &host.identity {
        Some(identity) => open_tunnel(worker, host.address, identity).await,
        None => open_plain(worker, host.address).await,
    };
    if let Err(failure) = &opened {
        debug!(endpoint = %host.address, %failure, "endpoint not reached");
    }
    opened
}

async fn open_plain(worker: &Worker, address: SocketAddr) -> Result<Open, Failure> {
    match cairn_net::connect(address, &worker.connect_options()).await {
        Ok(stream) => Ok(Open { local: stream.local_addr().ok(), stream: Box::new(stream) }),
        Err(error) => Err(failure_to_connect(&error)),
    }
}

/// Envoy's words for what the operating system says most often.
fn failure_to_connect(error: &NetError) -> Failure {
    let source = match error {
        NetError::ConnectTimeout { .. } => return Failure::ConnectTimeout,
        NetError::Connect { source, .. } => source,
        _ => return Failure::Connect("socket error"),
    };
    Failure::Connect(match source.kind() {
        ErrorKind::ConnectionRefused => "delayed connect error: Connection refused",
        ErrorKind::HostUnreachable => "delayed connect error: No route to host",
        ErrorKind::NetworkUnreachable => "immediate connect error: Network is unreachable",
        ErrorKind::ConnectionReset => "delayed connect error: Connection reset by peer",
        ErrorKind::AddrNotAvailable => "immediate connect error: Cannot assign requested address",
        _ => "delayed connect error",
    })
}

async fn open_tunnel(worker: &Worker, address: SocketAddr, identity: &Identity) -> Result<Open, Failure> {
    let Some(tunnels) = &worker.tunnels else {
        warn!(endpoint = %address, "an endpoint inside the mesh, and no identity to reach it with");
        return Err(Failure::Connect("no identity of our own"));
    };
    let certificate = match tunnels.certificates.current(&tunnels.identity) {
        Some(certificate) => certificate,
        None => tunnels.certificates.get(&tunnels.identity).await.map_err(|error| {
            warn!(%error, "no certificate of our own");
            Failure::Connect("no certificate of our own")
        })?,
    };
    let target = PoolTarget {
        certificate,
        connect: SocketAddr::new(address.ip(), HBONE_PORT),
        workload: None,
        identities: vec![identity.clone()],
        options: worker.connect_options(),
        authority: address.to_string(),
    };
    match tunnels.pool.connect(&target, HeaderMap::new()).await {
        Ok(tunnel) => Ok(Open { stream: Box::new(tunnel), local: None }),
        Err(ConnectError::Timeout) => Err(Failure::ConnectTimeout),
        Err(ConnectError::Full) => Err(Failure::Overflow),
        Err(error) => {
            debug!(endpoint = %address, %error, "no tunnel");
            Err(match &error {
                ConnectError::Tcp(error) => failure_to_connect(error),
                ConnectError::Tls(_) => Failure::Connect("TLS error: the peer is not who it must be"),
                ConnectError::Refused(_) => Failure::Connect("the peer refused the tunnel"),
                _ => Failure::Connect("no tunnel"),
            })
        }
    }
}
