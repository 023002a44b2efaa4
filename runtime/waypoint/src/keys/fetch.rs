//! Getting a key set from where a rule says it is: from a service of the mesh as any request goes there, from anywhere else
//! over HTTP or HTTPS. Redirects are not followed, addresses of the machine's own network are not asked.

use super::freshness;
use bytes::{Bytes, BytesMut};
use cairn_builtin::{KeySet, KeySetError};
use cairn_filter::{Callout, CalloutError, CalloutRequest};
use cairn_net::{ConnectOptions, NetError};
use http::header::{ACCEPT, CONNECTION, HOST};
use http::uri::Scheme;
use http::{HeaderMap, Request, StatusCode, Uri};
use http_body::Body;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;

/// Larger answers are not read. Providers with many keys stay far below.
const ANSWER_BYTES_MAX: usize = 512 * 1024;

/// How many addresses of one name are tried.
const ADDRESSES_MAX: usize = 4;

/// Why a key set was not got.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum FetchError {
    #[error("`{0}` is not a URI of scheme http or https")]
    Uri(String),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("a service of the mesh cannot be asked")]
    Callout(#[source] CalloutError),
    #[error("`{host}` cannot be resolved")]
    Resolve {
        host: String,
        #[source]
        source: std::io::Error,
    },
    #[error("`{0}` is at no address that may be asked")]
    Address(String),
    #[error("cannot connect")]
    Connect(#[source] NetError),
    #[error("the file of root certificates cannot be read")]
    Roots(#[source] rustls::pki_types::pem::Error),
    #[error("`{0}` is not a name that a certificate can have")]
    Name(String),
    #[error("TLS failed")]
    Tls(#[source] std::io::Error),
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
    #[error("HTTP failed")]
    Http(#[source] hyper::Error),
    #[error("the answer has status {0}")]
    Status(StatusCode),
    #[error("the answer has more than {ANSWER_BYTES_MAX} bytes")]
    TooLong,
    #[error("the issuer's configuration names no jwks_uri")]
    Discovery,
    #[error("the issuer's configuration came over https and names keys without")]
    Downgrade,
    #[error("the answer is no key set")]
    Keys(#[source] KeySetError),
}

/// Where a key set is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    /// As the rule says, for logs and metrics.
    name: Arc<str>,
    uri: Uri,
    /// The URI is of a document that says where the keys are.
    discovery: bool,
    /// Where short names of services are looked for.
    namespace: Arc<str>,
    cluster_domain: Arc<str>,
}

impl Place {
    /// The place at `uri`, or, with `discovery`, the one that the issuer `uri` names in its configuration (OpenID Connect
    /// Discovery §4); `None` when the URI cannot be asked.
    pub(super) fn new(
        uri: &Arc<str>,
        discovery: bool,
        namespace: &Arc<str>,
        cluster_domain: &str,
    ) -> Option<Self> {
        let text = if discovery {
            format!("{}/.well-known/openid-configuration", uri.trim_end_matches('/'))
        } else {
            uri.to_string()
        };
        Some(Self {
            name: Arc::clone(uri),
            uri: web_uri(&text).ok()?,
            discovery,
            namespace: Arc::clone(namespace),
            cluster_domain: cluster_domain.into(),
        })
    }

    /// As the rule says it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What tells it from other places.
    pub(super) fn key(&self) -> String {
        format!("{} {}.{}", self.uri, self.namespace, self.cluster_domain)
    }

    /// What a service of the mesh that this host may mean is called.
    fn services(&self, host: &str) -> Vec<String> {
        let Self { namespace, cluster_domain, .. } = self;
        let host = host.trim_end_matches('.');
        match host.matches('.').count() {
            0 => vec![format!("{host}.{namespace}.svc.{cluster_domain}")],
            1 => vec![host.to_owned(), format!("{host}.svc.{cluster_domain}")],
            _ if host.ends_with(".svc") => vec![format!("{host}.{cluster_domain}")],
            _ => vec![host.to_owned()],
        }
    }
}

fn web_uri(text: &str) -> Result<Uri, FetchError> {
    let bad = || FetchError::Uri(text.to_owned());
    let uri: Uri = text.parse().map_err(|_| bad())?;
    let is_web = uri.scheme() == Some(&Scheme::HTTP) || uri.scheme() == Some(&Scheme::HTTPS);
    let is_plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if is_web && is_plain { Ok(uri) } else { Err(bad()) }
}

/// A key set that was got.
pub(super) struct Fetched {
    pub(super) set: KeySet,
    /// As it came.
    pub(super) text: Bytes,
    /// When to ask again, if the server says so.
    pub(super) fresh: Option<Duration>,
}

/// An answer that is good.
struct Answer {
    headers: HeaderMap,
    body: Bytes,
}

/// Gets key sets.
pub(super) struct Fetcher {
    callout: Arc<dyn Callout>,
    roots: Option<PathBuf>,
    /// Made when it is first needed: the system's roots take time and memory.
    tls: OnceCell<Arc<ClientConfig>>,
}

impl Fetcher {
    pub(super) fn new(callout: Arc<dyn Callout>, roots: Option<PathBuf>) -> Self {
        Self { callout, roots, tls: OnceCell::new() }
    }

    /// Gets the key set. The caller bounds the time.
    pub(super) async fn keys(&self, place: &Place) -> Result<Fetched, FetchError> {
        let answer = self.get(&place.uri, place).await?;
        let answer = if place.discovery {
            let uri = keys_uri(&answer.body)?;
            if place.uri.scheme() == Some(&Scheme::HTTPS) && uri.scheme() != Some(&Scheme::HTTPS) {
                return Err(FetchError::Downgrade);
            }
            self.get(&uri, place).await?
        } else {
            answer
        };
        let set = KeySet::parse(&answer.body).map_err(FetchError::Keys)?;
        Ok(Fetched { set, text: answer.body, fresh: freshness::of(&answer.headers, SystemTime::now()) })
    }

    async fn get(&self, uri: &Uri, place: &Place) -> Result<Answer, FetchError> {
        let is_tls = uri.scheme() == Some(&Scheme::HTTPS);
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let is_name = host.parse::<IpAddr>().is_err();
        if is_name && !is_tls {
            for service in place.services(host) {
                match self.ask_mesh(uri, &service, port).await {
                    Err(FetchError::Callout(CalloutError::UnknownService(_))) => {}
                    answered => return answered,
                }
            }
        }
        let stream = connect(host, port).await?;
        if !is_tls {
            return exchange(stream, uri).await;
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|_| FetchError::Name(host.to_owned()))?;
        let tls = self.tls.get_or_try_init(|| async { self.tls_config() }).await?;
        let stream = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
        exchange(stream.map_err(FetchError::Tls)?, uri).await
    }

    async fn ask_mesh(&self, uri: &Uri, service: &str, port: u16) -> Result<Answer, FetchError> {
        let mut request = Request::new(Bytes::new());
        *request.uri_mut() = uri.clone();
        request.headers_mut().insert(ACCEPT, ACCEPTED);
        let asked = self.callout.call(CalloutRequest {
            host: service.into(),
            namespace: None,
            port,
            http2: false,
            request,
            trailers: http::HeaderMap::new(),
            // The whole fetch is bounded by the issuer's timeout, which is shorter.
            timeout: Duration::from_secs(60),
            answer_bytes_max: ANSWER_BYTES_MAX,
        });
        let response = asked.await.map_err(FetchError::Callout)?.response;
        match response.status() {
            StatusCode::OK => {
                let (parts, body) = response.into_parts();
                Ok(Answer { headers: parts.headers, body })
            }
            other => Err(FetchError::Status(other)),
        }
    }

    fn tls_config(&self) -> Result<Arc<ClientConfig>, FetchError> {
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::warn!(%error, "a root certificate of the system cannot be read");
        }
        roots.add_parsable_certificates(system.certs);
        if let Some(file) = &self.roots {
            let own = CertificateDer::pem_file_iter(file).map_err(FetchError::Roots)?;
            let own: Vec<_> = own.collect::<Result<_, _>>().map_err(FetchError::Roots)?;
            roots.add_parsable_certificates(own);
        }
        // What the process has settled on, if it has.
        let provider = CryptoProvider::get_default().cloned();
        let provider = provider.unwrap_or_else(|| Arc::new(aws_lc_rs::default_provider()));
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(FetchError::Setup)?;
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

const ACCEPTED: http::HeaderValue =
    http::HeaderValue::from_static("application/json, application/jwk-set+json");

/// Where an issuer's configuration says that its keys are.
fn keys_uri(document: &[u8]) -> Result<Uri, FetchError> {
    let document: serde_json::Value = serde_json::from_slice(document).map_err(|_| FetchError::Discovery)?;
    web_uri(document.get("jwks_uri").and_then(serde_json::Value::as_str).ok_or(FetchError::Discovery)?)
}

async fn connect(host: &str, port: u16) -> Result<tokio::net::TcpStream, FetchError> {
    let resolved = tokio::net::lookup_host((host, port)).await;
    let resolved = resolved.map_err(|source| FetchError::Resolve { host: host.to_owned(), source })?;
    let allowed = resolved.filter(|address| cairn_net::may_be_asked(address.ip())).take(ADDRESSES_MAX);
    let mut last = FetchError::Address(host.to_owned());
    for address in allowed {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        match cairn_net::connect(address, &ConnectOptions::default()).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = FetchError::Connect(error),
        }
    }
    Err(last)
}

async fn exchange<S>(stream: S, uri: &Uri) -> Result<Answer, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(FetchError::Http)?;
    let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request =
        Request::get(path).header(HOST, authority).header(ACCEPT, ACCEPTED).header(CONNECTION, "close");
    let request = request.body(Empty::<Bytes>::new()).map_err(|_| FetchError::Uri(uri.to_string()))?;
    // Both go on together, so that nothing is left behind when this future is dropped.
    let mut connection = pin!(connection);
    let mut answer = pin!(async {
        let response = sender.send_request(request).await.map_err(FetchError::Http)?;
        match response.status() {
            StatusCode::OK => {
                let (parts, incoming) = response.into_parts();
                Ok(Answer { headers: parts.headers, body: body(incoming).await? })
            }
            other => Err(FetchError::Status(other)),
        }
    });
    let mut is_open = true;
    loop {
        tokio::select! {
            answer = &mut answer => return answer,
            // An error shows in the answer, too.
            _ended = &mut connection, if is_open => is_open = false,
        }
    }
}

async fn body(body: Incoming) -> Result<Bytes, FetchError> {
    let mut body = pin!(body);
    let mut bytes = BytesMut::new();
    while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        let Ok(data) = frame.map_err(FetchError::Http)?.into_data() else { continue };
        if bytes.len() + data.len() > ANSWER_BYTES_MAX {
            return Err(FetchError::TooLong);
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_services_as_in_the_cluster() {
        let place = Place::new(&"http://x/".into(), false, &"shop".into(), "cluster.local").unwrap();
        for (host, expected) in [
            ("keys", &["keys.shop.svc.cluster.local"][..]),
            ("keys.auth", &["keys.auth", "keys.auth.svc.cluster.local"]),
            ("keys.auth.svc", &["keys.auth.svc.cluster.local"]),
            ("keys.auth.svc.cluster.local", &["keys.auth.svc.cluster.local"]),
            ("issuer.example.com", &["issuer.example.com"]),
        ] {
            assert_eq!(place.services(host), expected, "{host}");
        }
    }

    #[test]
    fn places_are_on_the_web() {
        let namespace: Arc<str> = "shop".into();
        for (uri, discovery, expected) in [
            ("https://a/keys?x=1", false, Some("https://a/keys?x=1")),
            ("https://a/realm/", true, Some("https://a/realm/.well-known/openid-configuration")),
            ("https://a", true, Some("https://a/.well-known/openid-configuration")),
            ("me@example", true, None),
            ("ftp://a/keys", false, None),
            ("https://user:secret@a/keys", false, None),
            ("", false, None),
        ] {
            let place = Place::new(&uri.into(), discovery, &namespace, "cluster.local");
            assert_eq!(place.map(|place| place.uri.to_string()).as_deref(), expected, "{uri}");
        }
    }
}
