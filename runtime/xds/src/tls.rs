//! TLS at the edge: a gRPC channel to a server whose certificate chains to given roots, and the acceptor of ours.

use futures_util::stream::{FuturesUnordered, Stream, StreamExt, unfold};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::TlsStream};
use tonic::transport::server::{Connected, TcpConnectInfo};
use tonic::transport::{Channel, Endpoint, Uri};
use tracing::{debug, warn};

/// How long TCP and TLS together may take to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client's TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many handshakes may be under way; further clients wait in the listener's backlog.
const HANDSHAKES_MAX: usize = 256;
/// How long to wait after `accept` failed, typically for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a connection to a server did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not `https://host:port`.
    #[error("`{address}` is not https://host:port")]
    Address {
        /// The address.
        address: String,
    },
    /// The roots cannot be read.
    #[error("cannot read roots from {path}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// TLS cannot be set up with these roots.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// TCP, TLS or HTTP/2 failed.
    #[error("cannot connect")]
    Transport(#[from] tonic::transport::Error),
}

/// A server to connect to.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    host: String,
    port: u16,
    name: ServerName<'static>,
}

impl Target {
    /// Reads `https://host:port`; a missing scheme means https.
    pub(crate) fn parse(address: &str) -> Result<Self, ConnectError> {
        let error = || ConnectError::Address { address: address.to_owned() };
        let text = if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
        let uri: Uri = text.parse().map_err(|_| error())?;
        let (Some("https"), Some(host)) = (uri.scheme_str(), uri.host()) else { return Err(error()) };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| error())?;
        Ok(Self { host, port: uri.port_u16().unwrap_or(443), name })
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// Opens a channel to a server that proves its name by a chain to the roots in a PEM file.
pub(crate) async fn connect(
    target: &Target,
    roots: &Path,
    configure: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, ConnectError> {
    let connector = TlsConnector::from(Arc::new(client_config(roots)?));
    let authority = target.authority();
    let uri = |scheme: &str| {
        let address = || ConnectError::Address { address: authority.clone() };
        Uri::try_from(format!("{scheme}://{authority}")).map_err(|_| address())
    };
    // The endpoint itself is plain: the connector below does TLS, the origin says what requests are written with.
    let endpoint = configure(Endpoint::from(uri("http")?).origin(uri("https")?));
    let target = target.clone();
    let open = tower::service_fn(move |_: Uri| {
        let (connector, target) = (connector.clone(), target.clone());
        async move {
            let opening = async {
                let tcp = TcpStream::connect((target.host.as_str(), target.port)).await?;
                tcp.set_nodelay(true)?;
                connector.connect(target.name, tcp).await
            };
            let stream = tokio::time::timeout(CONNECT_TIMEOUT, opening).await??;
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    Ok(endpoint.connect_with_connector(open).await?)
}

fn client_config(roots: &Path) -> Result<ClientConfig, ConnectError> {
    let error = |source| ConnectError::Roots { path: roots.to_owned(), source };
    let pem = std::fs::read(roots).map_err(error)?;
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|source| error(io::Error::other(source)))?;
        store.add(certificate)?;
    }
    if store.is_empty() {
        return Err(error(io::Error::other("no certificate in it")));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

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
