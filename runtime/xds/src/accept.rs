//! How clients reach our server: accept, TLS handshake, and only then gRPC.

use futures_util::stream::{FuturesUnordered, Stream, StreamExt, unfold};
use rustls::ServerConfig;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{debug, warn};

/// How long a client's TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many handshakes may be under way; further clients wait in the listener's backlog.
const HANDSHAKES_MAX: usize = 256;
/// How long to wait after `accept` failed, typically for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A client's connection after its handshake.
pub(crate) struct Accepted(TlsStream<TcpStream>);

impl Connected for Accepted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.0.get_ref().0.connect_info()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

type Handshake = Pin<Box<dyn Future<Output = Option<Accepted>> + Send>>;

struct Acceptor {
    listener: TcpListener,
    tls: TlsAcceptor,
    handshakes: FuturesUnordered<Handshake>,
}

/// The connections that a listener accepts, each after its handshake; those that fail are left out. It never ends.
pub(crate) fn incoming(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
) -> impl Stream<Item = Result<Accepted, io::Error>> + Send {
    let acceptor = Acceptor { listener, tls: tls.into(), handshakes: FuturesUnordered::new() };
    unfold(acceptor, |mut acceptor| async move {
        let accepted = acceptor.next().await;
        Some((Ok(accepted), acceptor))
    })
}

impl Acceptor {
    async fn next(&mut self) -> Accepted {
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if self.handshakes.len() < HANDSHAKES_MAX => match accepted {
                    Ok((tcp, _)) => self.handshakes.push(Box::pin(handshake(self.tls.clone(), tcp))),
                    Err(error) => {
                        warn!(%error, "cannot accept");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(done) = self.handshakes.next(), if !self.handshakes.is_empty() => {
                    if let Some(accepted) = done {
                        return accepted;
                    }
                }
            }
        }
    }
}

async fn handshake(tls: TlsAcceptor, tcp: TcpStream) -> Option<Accepted> {
    // Without it only latency is lost.
    let _ = tcp.set_nodelay(true);
    let peer = tcp.peer_addr().ok();
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(tcp)).await {
        Ok(Ok(stream)) => return Some(Accepted(stream)),
        Ok(Err(error)) => debug!(?peer, %error, "handshake failed"),
        Err(_) => debug!(?peer, "handshake took too long"),
    }
    None
}
