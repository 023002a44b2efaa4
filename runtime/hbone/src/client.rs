//! One connection to a peer: how it begins, the task that drives it, and the places for tunnels on it.

use crate::ahead::ReadAhead;
use crate::keepalive::{Keepalive, KeepaliveSettings};
use crate::wire::Wire;
use crate::{ConnectError, PoolSettings, PoolTarget, TunnelStream};
use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Ping, PingPong};
use http::uri::Authority;
use http::{HeaderMap, Method, Request, StatusCode, Version};
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::SystemTime;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

type Connection = h2::client::Connection<Wire, Bytes>;

/// A connection in a pool. When the last handle is gone, and with it the last tunnel, it closes itself.
pub(crate) struct Client {
    requests: SendRequest<Bytes>,
    /// When the certificate it was opened with begins: a newer certificate wants a new connection.
    pub(crate) not_before: SystemTime,
    streams: AtomicUsize,
    streams_max: usize,
    broken: AtomicBool,
    idle_since: Mutex<Instant>,
}

/// Why a CONNECT on this connection failed.
pub(crate) enum OpenError {
    /// The peer has certainly not seen it: another connection may try.
    NotSent(h2::Error),
    /// For good.
    Failed(ConnectError),
}

impl Client {
    /// Connects to `target`. The task returned must be spawned: nothing moves without it.
    pub(crate) async fn connect(
        target: &PoolTarget,
        settings: &PoolSettings,
    ) -> Result<(Arc<Self>, Driver), ConnectError> {
        let tcp = cairn_net::connect(target.connect, &target.options).await;
        let tcp = tcp.map_err(|error| ConnectError::Tcp(Arc::new(error)))?;
        let handshake =
            tokio::time::timeout(settings.handshake_timeout, handshake(tcp, target, settings)).await;
        let (requests, driver) = handshake.unwrap_or(Err(ConnectError::Timeout))?;
        let client = Arc::new(Self {
            requests,
            not_before: target.certificate.not_before,
            streams: AtomicUsize::new(0),
            streams_max: settings.streams_per_connection,
            broken: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
        });
        Ok((client, driver))
    }

    /// Whether new tunnels can be opened: neither broken nor told to go away.
    pub(crate) fn is_usable(&self) -> bool {
        let ready = self.requests.clone().poll_ready(&mut Context::from_waker(Waker::noop()));
        matches!(ready, Poll::Ready(Ok(()))) && !self.broken.load(Ordering::Relaxed)
    }

    /// Since when it has no tunnel; `None` while it has one.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        (self.streams.load(Ordering::Acquire) == 0).then(|| *self.idle_since.lock())
    }

    pub(crate) fn mark_broken(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }

    /// A place for one tunnel, if there is one within our limit and the peer's. Only the pool calls this, under its
    /// lock.
    pub(crate) fn take_place(self: &Arc<Self>) -> Option<Place> {
        // A peer that allows none yet still gets one, which waits its turn in HTTP/2.
        let maximum = self.streams_max.min(self.requests.current_max_send_streams()).max(1);
        if self.streams.load(Ordering::Acquire) >= maximum {
            return None;
        }
        self.streams.fetch_add(1, Ordering::AcqRel);
        Some(Place { client: Arc::clone(self) })
    }
}

/// A place for one tunnel on a connection; free again when dropped.
pub(crate) struct Place {
    client: Arc<Client>,
}

impl Place {
    pub(crate) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Sends the CONNECT and waits for the answer.
    pub(crate) async fn open(
        self,
        authority: &Authority,
        headers: &HeaderMap,
        settings: &PoolSettings,
    ) -> Result<TunnelStream, OpenError> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = authority.clone().into();
        *request.headers_mut() = headers.clone();
        let mut requests = self.client.requests.clone();
        let (answer, outgoing) = requests.send_request(request, false).map_err(OpenError::NotSent)?;
        let answered = tokio::time::timeout(settings.answer_timeout, answer).await;
        let response = match answered {
            Err(_) => return Err(OpenError::Failed(ConnectError::Timeout)),
            Ok(Err(error)) if is_unprocessed(&error) => return Err(OpenError::NotSent(error)),
            Ok(Err(error)) => return Err(OpenError::Failed(ConnectError::Http2(Arc::new(error)))),
            Ok(Ok(response)) => response,
        };
        let (head, incoming) = response.into_parts();
        if head.status != StatusCode::OK {
            return Err(OpenError::Failed(ConnectError::Refused(head.status)));
        }
        Ok(TunnelStream::new(outgoing, incoming, head.headers, Some(self)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Noted first, so that nobody sees no streams and an old time.
        *self.client.idle_since.lock() = Instant::now();
        self.client.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The peer has said that it did not touch this stream (RFC 9113 §8.7).
fn is_unprocessed(error: &h2::Error) -> bool {
    let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
    error.is_remote() && (refused || error.is_go_away())
}

async fn handshake(
    tcp: TcpStream,
    target: &PoolTarget,
    settings: &PoolSettings,
) -> Result<(SendRequest<Bytes>, Driver), ConnectError> {
    let config = target.certificate.client_config(&target.identities);
    // The name plays no part: the verifier looks for an identity, and nothing is sent.
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    let tls = TlsConnector::from(config).connect(name, ReadAhead::new(tcp)).await;
    let wire = Wire::new(tls.map_err(tls_error)?);
    let mut beginning = pin!(
        h2::client::Builder::new()
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_frame_size(settings.frame_bytes_max)
            .max_header_list_size(settings.header_bytes_max)
            .max_send_buffer_size(settings.send_buffer_bytes_max)
            .initial_max_send_streams(settings.streams_per_connection)
            .enable_push(false)
            .handshake(wire.clone())
    );
    let begun = poll_fn(|cx| wire.drive(cx, |cx| beginning.as_mut().poll(cx))).await;
    let (requests, mut connection) = begun.map_err(tls_error)?.map_err(begin_error)?;
    let mut ping = connection.ping_pong();
    if let Some(ping) = &mut ping {
        confirm(&mut connection, &wire, ping).await?;
    }
    let keepalive = KeepaliveSettings { interval: settings.ping_interval, timeout: settings.ping_timeout };
    Ok((requests, Driver { connection, wire, keepalive: Keepalive::new(ping, keepalive) }))
}

/// Waits for the peer's first word, by a PING. In TLS 1.3 the client is done before the server has looked at its
/// certificate, and in HTTP/2 it may send before it knows how many streams it may open; after this, both are certain.
async fn confirm(connection: &mut Connection, wire: &Wire, ping: &mut PingPong) -> Result<(), ConnectError> {
    ping.send_ping(Ping::opaque()).map_err(begin_error)?;
    poll_fn(|cx| {
        if let Poll::Ready(Ok(_)) = ping.poll_pong(cx) {
            return Poll::Ready(Ok(()));
        }
        let ended = ready!(wire.drive(cx, |cx| Pin::new(&mut *connection).poll(cx)));
        Poll::Ready(match ended {
            Err(error) => Err(tls_error(error)),
            Ok(Err(error)) => Err(begin_error(error)),
            Ok(Ok(())) => Err(tls_error(io::ErrorKind::UnexpectedEof.into())),
        })
    })
    .await
}

fn tls_error(error: io::Error) -> ConnectError {
    ConnectError::Tls(Arc::new(error))
}

/// Before the peer's first word, a connection that breaks is the peer's way of refusing our certificate.
fn begin_error(error: h2::Error) -> ConnectError {
    if error.is_io()
        && let Some(error) = error.get_io()
    {
        return tls_error(io::Error::new(error.kind(), error.to_string()));
    }
    ConnectError::Http2(Arc::new(error))
}

/// What moves the bytes of a connection.
pub(crate) struct Driver {
    connection: Connection,
    wire: Wire,
    keepalive: Keepalive,
}

impl Driver {
    /// Runs until the connection is over. Calls `tick` about every ping interval.
    pub(crate) async fn run(mut self, mut tick: impl FnMut()) -> Result<(), DriveError> {
        poll_fn(|cx| {
            while let Poll::Ready(ticked) = self.keepalive.poll_tick(cx) {
                ticked.map_err(|_| DriveError::NoAnswer)?;
                tick();
            }
            let connection = &mut self.connection;
            let driven = self.wire.drive(cx, |cx| Pin::new(&mut *connection).poll(cx));
            driven.map(|result| result.map_err(DriveError::Send)?.map_err(DriveError::Http2))
        })
        .await
    }
}

/// Why a connection ended out of order.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriveError {
    #[error("cannot send to the peer")]
    Send(#[source] io::Error),
    #[error("HTTP/2 failed")]
    Http2(#[source] h2::Error),
    #[error("the peer did not answer a PING")]
    NoAnswer,
}
