//! One connection to a peer: how it begins, the task that drives it, and the places for tunnels on it.

use crate::ahead::ReadAhead;
use crate::keepalive::{Keepalive, KeepaliveSettings};
use crate::revocation::Guard;
use crate::transport::Transport;
use crate::wire::Wire;
use crate::{ConnectError, PoolSettings, PoolTarget, Revocation, TunnelStream};
use bytes::Bytes;
use cairn_identity::{WorkloadCertificate, peer_identity};
use cairn_mesh::Identity;
use h2::client::SendRequest;
use h2::{Ping, PingPong};
use http::uri::Authority;
use http::{HeaderMap, Method, Request, StatusCode, Version};
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use std::future::{Future, poll_fn};
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
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
    /// Tunnels that have carried much.
    bulky: AtomicUsize,
    broken: AtomicBool,
    idle_since: Mutex<Instant>,
    /// Who the peer has proven to be.
    peer: Option<Identity>,
    /// Tells the driver that the peer may be gone.
    suspect: Mutex<Option<oneshot::Sender<()>>>,
    revocation: Revocation,
}

/// How long a peer that may be gone has for saying that it is not.
const SUSPECT_TIMEOUT: Duration = Duration::from_secs(3);

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
        let transport = Transport::Tcp(ReadAhead::new(tcp));
        let PoolTarget { certificate, identities, connect, .. } = target;
        let begun = Self::begin(transport, certificate, identities, connect.ip(), settings);
        tokio::time::timeout(settings.handshake_timeout, begun).await.unwrap_or(Err(ConnectError::Timeout))
    }

    /// Begins TLS and HTTP/2. Sessions are resumed by `name`, which is not sent. The task returned must be spawned.
    pub(crate) async fn begin(
        transport: Transport,
        certificate: &WorkloadCertificate,
        identities: &[Identity],
        name: IpAddr,
        settings: &PoolSettings,
    ) -> Result<(Arc<Self>, Driver), ConnectError> {
        let begun = handshake(transport, certificate.client_config(identities), name, settings).await?;
        let guard = Guard::new(&begun.wire, certificate.watch_server());
        let guard = guard.map_err(|_| ConnectError::Revoked)?;
        let (suspect, suspected) = oneshot::channel();
        let client = Arc::new(Self {
            requests: begun.requests,
            not_before: certificate.not_before,
            streams: AtomicUsize::new(0),
            streams_max: settings.streams_per_connection,
            bulky: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
            peer: begun.wire.with_peer(peer_identity),
            suspect: Mutex::new(Some(suspect)),
            revocation: guard.revocation().clone(),
        });
        let Begun { connection, wire, keepalive, .. } = begun;
        Ok((client, Driver { connection, wire, keepalive, suspected: Some(suspected), guard }))
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

    /// How many of its tunnels have carried much.
    pub(crate) fn bulky(&self) -> usize {
        self.bulky.load(Ordering::Relaxed)
    }

    /// The peer may be gone: it is asked at once, and its tunnels end unless it answers soon.
    pub(crate) fn suspect(&self) {
        if let Some(suspect) = self.suspect.lock().take() {
            // A driver that has ended knows already.
            let _ = suspect.send(());
        }
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
        Some(Place { client: Arc::clone(self), is_bulky: false })
    }
}

/// A place for one tunnel on a connection; free again when dropped.
pub(crate) struct Place {
    client: Arc<Client>,
    is_bulky: bool,
}

impl Place {
    pub(crate) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Who is at the other end of the connection.
    pub(crate) fn peer(&self) -> Option<&Identity> {
        self.client.peer.as_ref()
    }

    /// Its tunnel carries much: others had better take another connection.
    pub(crate) fn mark_bulky(&mut self) {
        if !std::mem::replace(&mut self.is_bulky, true) {
            self.client.bulky.fetch_add(1, Ordering::Relaxed);
        }
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
        let revocation = self.client.revocation.clone();
        Ok(TunnelStream::new(outgoing, incoming, head.headers, Some(self), revocation))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_bulky {
            self.client.bulky.fetch_sub(1, Ordering::Relaxed);
        }
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

/// A connection that has begun.
struct Begun {
    requests: SendRequest<Bytes>,
    connection: Connection,
    wire: Wire,
    keepalive: Keepalive,
}

async fn handshake(
    transport: Transport,
    config: Arc<rustls::ClientConfig>,
    name: IpAddr,
    settings: &PoolSettings,
) -> Result<Begun, ConnectError> {
    // The name plays no part in who is accepted: the verifier looks for an identity, and no address is sent.
    let tls = TlsConnector::from(config).connect(ServerName::IpAddress(name.into()), transport).await;
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
    Ok(Begun { requests, connection, wire, keepalive: Keepalive::new(ping, keepalive) })
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
    /// Resolves when the peer may be gone.
    suspected: Option<oneshot::Receiver<()>>,
    guard: Guard,
}

impl Driver {
    /// Runs until the connection is over. Calls `tick` about every ping interval.
    pub(crate) async fn run(mut self, mut tick: impl FnMut()) -> Result<(), DriveError> {
        poll_fn(|cx| {
            if self.guard.poll_revoked(cx).is_ready() {
                return Poll::Ready(Err(DriveError::Revoked));
            }
            if let Some(suspected) = &mut self.suspected
                && let Poll::Ready(told) = Pin::new(suspected).poll(cx)
            {
                self.suspected = None;
                if told.is_ok() {
                    self.keepalive.ask_now(SUSPECT_TIMEOUT);
                }
            }
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
    #[error("the peer's certificate is revoked")]
    Revoked,
}
