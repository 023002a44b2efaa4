//! Accepting tunnels: one connection of a peer, and the CONNECTs that arrive on it.

use crate::ahead::ReadAhead;
use crate::keepalive::{Keepalive, KeepaliveSettings};
use crate::revocation::Guard;
use crate::transport::Transport;
use crate::wire::Wire;
use crate::{Authority, Revocation, TunnelError, TunnelStream};
use bytes::Bytes;
use cairn_identity::{WorkloadCertificate, is_in_force, peer_identity};
use cairn_mesh::Identity;
use cairn_net::Drain;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

/// Limits and times of accepted connections. Defaults as in a ztunnel, except where said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings {
    /// Bytes a peer may send on one tunnel before we have read them. Default: 4 MiB.
    pub stream_window: u32,
    /// Bytes a peer may send on all tunnels of a connection before we have read them. Default: 16 MiB.
    pub connection_window: u32,
    /// The largest frame a peer may send. Default: 64 KiB; a frame is held whole until it is complete, so the
    /// ztunnel's 1 MiB would cost that much for each busy connection and gain nothing.
    pub frame_bytes_max: u32,
    /// The largest set of headers a peer may send. Default: 64 KiB.
    pub header_bytes_max: u32,
    /// How many tunnels a connection may have at once. Default: 200.
    pub streams_max: u32,
    /// Bytes queued for sending on one tunnel. Default: 256 KiB.
    pub send_buffer_bytes_max: usize,
    /// How often the peer is asked whether it is there. Default: 10 s.
    pub ping_interval: Duration,
    /// How long it may take to answer. Default: 20 s.
    pub ping_timeout: Duration,
    /// How long TLS and HTTP/2 may take to begin. Default: 10 s.
    pub handshake_timeout: Duration,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame_bytes_max: 64 << 10,
            header_bytes_max: 64 << 10,
            streams_max: 200,
            send_buffer_bytes_max: 256 << 10,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// Why a connection ended badly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The socket was gone before we began.
    #[error("the socket is gone")]
    Socket(#[source] io::Error),
    /// TLS failed: no certificate, one we do not trust, or not TLS at all.
    #[error("TLS handshake failed")]
    Tls(#[source] io::Error),
    /// The peer did not finish beginning.
    #[error("no handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// The certificate has no identity in it.
    #[error("the peer has no identity")]
    NoIdentity,
    /// The peer resumed a session from when its certificate was valid and not revoked, and its trust domain ours.
    #[error("the peer is not believed any more")]
    NotBelieved,
    /// The peer's certificate was revoked while the connection was open.
    #[error("the peer's certificate is revoked")]
    Revoked,
    /// HTTP/2 failed.
    #[error("HTTP/2 failed")]
    Http2(#[source] h2::Error),
    /// The connection broke while sending.
    #[error("cannot send to the peer")]
    Send(#[source] io::Error),
    /// The peer is gone without a word.
    #[error("the peer did not answer a PING within {0:?}")]
    NoAnswer(Duration),
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Downstream {
    /// The peer's address.
    pub address: SocketAddr,
    /// Our address that it connected to.
    pub local: SocketAddr,
    /// Who it has proven to be.
    pub identity: Identity,
}

/// Serves one connection until it is over: TLS with `certificate`, HTTP/2, and `handler` for each CONNECT. `handler` must
/// not block; it spawns. When the drain starts, the peer is told to send no more (GOAWAY), and the tunnels that are open
/// go on; when it is cut, the peer is told and they end. The drain is held until the connection is over.
///
/// # Errors
/// When the handshake fails or the connection ends out of order.
pub async fn serve(
    tcp: TcpStream,
    certificate: Arc<WorkloadCertificate>,
    settings: &ServerSettings,
    drain: Drain,
    handler: impl FnMut(Connect) + Send,
) -> Result<(), ServeError> {
    let _held = drain.hold();
    let timeout = settings.handshake_timeout;
    let handshake = tokio::time::timeout(timeout, handshake(tcp, certificate, settings)).await;
    let begun = handshake.map_err(|_| ServeError::HandshakeTimeout(timeout))??;
    drive(begun, settings, &drain, handler).await
}

/// A connection that has begun.
struct Begun {
    connection: Connection<Wire, Bytes>,
    wire: Wire,
    guard: Guard,
    downstream: Arc<Downstream>,
}

async fn handshake(
    tcp: TcpStream,
    certificate: Arc<WorkloadCertificate>,
    settings: &ServerSettings,
) -> Result<Begun, ServeError> {
    cairn_net::prepare(&tcp).map_err(ServeError::Socket)?;
    let address = canonical(tcp.peer_addr().map_err(ServeError::Socket)?);
    let local = canonical(tcp.local_addr().map_err(ServeError::Socket)?);
    let accepting =
        TlsAcceptor::from(certificate.server_config()).accept(Transport::Tcp(ReadAhead::new(tcp)));
    let wire = Wire::new(accepting.await.map_err(ServeError::Tls)?);
    let identity = wire.with_peer(peer_identity).ok_or(ServeError::NoIdentity)?;
    if !certificate.welcomes(&identity) || !wire.with_peer(is_in_force) {
        return Err(ServeError::NotBelieved);
    }
    let guard = Guard::new(&wire, certificate.watch_client()).map_err(|_| ServeError::NotBelieved)?;
    let mut beginning = pin!(
        h2::server::Builder::new()
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_frame_size(settings.frame_bytes_max)
            .max_header_list_size(settings.header_bytes_max)
            .max_concurrent_streams(settings.streams_max)
            .max_send_buffer_size(settings.send_buffer_bytes_max)
            .handshake(wire.clone())
    );
    let connection = poll_fn(|cx| wire.drive(cx, |cx| beginning.as_mut().poll(cx))).await;
    let connection = connection.map_err(ServeError::Send)?.map_err(ServeError::Http2)?;
    Ok(Begun { connection, wire, guard, downstream: Arc::new(Downstream { address, local, identity }) })
}

async fn drive(
    begun: Begun,
    settings: &ServerSettings,
    drain: &Drain,
    mut handler: impl FnMut(Connect) + Send,
) -> Result<(), ServeError> {
    let Begun { mut connection, wire, mut guard, downstream } = begun;
    let revocation = guard.revocation().clone();
    let ping = KeepaliveSettings { interval: settings.ping_interval, timeout: settings.ping_timeout };
    let mut keepalive = Keepalive::new(connection.ping_pong(), ping);
    let (mut drain_started, mut drain_cut) = (pin!(drain.started()), pin!(drain.cut()));
    let mut draining = false;
    poll_fn(|cx| {
        if !draining && drain_started.as_mut().poll(cx).is_ready() {
            draining = true;
            connection.graceful_shutdown();
        }
        let end = if guard.poll_revoked(cx).is_ready() {
            tracing::info!(
                peer = %downstream.address,
                identity = %downstream.identity,
                "connection cut: the certificate is revoked"
            );
            Some((Reason::INADEQUATE_SECURITY, Err(ServeError::Revoked)))
        } else {
            // Tunnels that the peer has not heard of yet may take another way.
            drain_cut.as_mut().poll(cx).is_ready().then_some((Reason::NO_ERROR, Ok(())))
        };
        if let Some((reason, ended)) = end {
            // Said once, to whoever reads it; nobody is waited for.
            connection.abrupt_shutdown(reason);
            let mut refuse = |connect: Connect| drop(connect);
            let _said =
                wire.drive(cx, |cx| poll_accept(&mut connection, cx, &downstream, &revocation, &mut refuse));
            return Poll::Ready(ended);
        }
        while let Poll::Ready(tick) = keepalive.poll_tick(cx) {
            tick.map_err(|_| ServeError::NoAnswer(settings.ping_timeout))?;
        }
        let driven =
            wire.drive(cx, |cx| poll_accept(&mut connection, cx, &downstream, &revocation, &mut handler));
        driven.map(|result| result.map_err(ServeError::Send)?.map_err(ServeError::Http2))
    })
    .await
}

/// Takes what has arrived. Ready when the connection is over.
fn poll_accept(
    connection: &mut Connection<Wire, Bytes>,
    cx: &mut Context<'_>,
    downstream: &Arc<Downstream>,
    revocation: &Revocation,
    handler: &mut impl FnMut(Connect),
) -> Poll<Result<(), h2::Error>> {
    loop {
        match connection.poll_accept(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(None) => return Poll::Ready(Ok(())),
            Poll::Ready(Some(Err(error))) if error.is_io() => {
                tracing::debug!(%error, peer = %downstream.address, "connection closed by the peer");
                return Poll::Ready(Ok(()));
            }
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
            Poll::Ready(Some(Ok((request, answer)))) => {
                if let Some(connect) = Connect::new(request, answer, downstream, revocation) {
                    handler(connect);
                }
            }
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A CONNECT that waits for its answer. Dropped without one, it is cancelled.
#[derive(Debug)]
pub struct Connect {
    authority: Authority,
    downstream: Arc<Downstream>,
    headers: HeaderMap,
    incoming: RecvStream,
    answer: SendResponse<Bytes>,
    revocation: Revocation,
}

impl Connect {
    /// `None` if the request is no CONNECT to anywhere: it has been answered with 400.
    fn new(
        request: Request<RecvStream>,
        mut answer: SendResponse<Bytes>,
        downstream: &Arc<Downstream>,
        revocation: &Revocation,
    ) -> Option<Self> {
        let (head, incoming) = request.into_parts();
        let authority = head.uri.authority().and_then(|authority| authority.as_str().parse().ok());
        match authority {
            Some(authority) if head.method == Method::CONNECT => Some(Self {
                authority,
                downstream: Arc::clone(downstream),
                headers: head.headers,
                incoming,
                answer,
                revocation: revocation.clone(),
            }),
            _ => {
                tracing::debug!(peer = %downstream.address, method = %head.method, "not a tunnel");
                refuse(&mut answer, StatusCode::BAD_REQUEST);
                None
            }
        }
    }

    /// Where the tunnel shall lead.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Who asks.
    pub fn downstream(&self) -> &Arc<Downstream> {
        &self.downstream
    }

    /// The request's headers: `baggage`, `forwarded`, `traceparent`.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Answers 200 with `headers`.
    ///
    /// # Errors
    /// When the peer has given up.
    pub fn accept(mut self, headers: HeaderMap) -> Result<TunnelStream, TunnelError> {
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let outgoing = self.answer.send_response(response, false).map_err(TunnelError::Gone)?;
        Ok(TunnelStream::new(outgoing, self.incoming, HeaderMap::new(), None, self.revocation))
    }

    /// Answers `status`, which is not 200, and ends the stream.
    pub fn refuse(mut self, status: StatusCode) {
        refuse(&mut self.answer, status);
    }
}

fn refuse(answer: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Err(error) = answer.send_response(response, true) {
        tracing::debug!(%error, "the peer did not wait for its refusal");
    }
}
