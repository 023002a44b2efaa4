//! HTTP as far as fetching needs it: one request per connection, every wait and every answer bounded, redirects followed,
//! and no address asked that belongs to the machine itself.

use crate::error::FetchError;
use crate::tls;
use bytes::{Bytes, BytesMut};
use cairn_net::ConnectOptions;
use http::header::{AUTHORIZATION, CONNECTION, HOST, LOCATION, USER_AGENT};
use http::uri::Scheme;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;

/// How many addresses of one name are tried.
const ADDRESSES_MAX: usize = 4;

/// Redirects followed; registries need one or two.
const REDIRECTS_MAX: usize = 5;

/// What is read of an answer that is not the one wanted.
const REFUSAL_BYTES_MAX: u64 = 64 * 1024;

/// What a server is to prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// That it has a certificate for its name.
    Verified,
    /// Nothing.
    Any,
}

/// A request, which may be sent again.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trust: Trust,
    /// Of an answer that is a success.
    pub(crate) answer_bytes_max: u64,
}

impl Call {
    pub(crate) fn get(uri: Uri, trust: Trust, answer_bytes_max: u64) -> Self {
        let (headers, body) = (HeaderMap::new(), Bytes::new());
        Self { method: Method::GET, uri, headers, body, trust, answer_bytes_max }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }
}

/// An answer, whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// A header's text.
    pub(crate) fn header(&self, name: HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Sends requests.
pub(crate) struct Web {
    /// Root certificates beside the system's.
    roots: Option<PathBuf>,
    /// Addresses that are not asked, beside those that never are.
    blocked: Vec<IpNet>,
    /// How long a server may be silent.
    silence_max: Duration,
    /// Made when they are first needed: the system's roots take time and memory.
    verified: OnceCell<Arc<ClientConfig>>,
    unverified: OnceCell<Arc<ClientConfig>>,
}

impl Web {
    pub(crate) fn new(roots: Option<PathBuf>, blocked: Vec<IpNet>, silence_max: Duration) -> Self {
        Self { roots, blocked, silence_max, verified: OnceCell::new(), unverified: OnceCell::new() }
    }

    /// Sends a request, and again to where the answer says it should go.
    pub(crate) async fn call(&self, call: Call) -> Result<Answer, FetchError> {
        let mut call = call;
        for _ in 0..=REDIRECTS_MAX {
            let answer = self.once(&call).await?;
            let is_read = matches!(call.method, Method::GET | Method::HEAD);
            if !is_read || !matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            call = redirected(call, &answer)?;
        }
        Err(FetchError::Redirect("there are too many of them"))
    }

    async fn once(&self, call: &Call) -> Result<Answer, FetchError> {
        let is_tls = call.uri.scheme() == Some(&Scheme::HTTPS);
        let host = host(&call.uri);
        let port = call.uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let stream = self.connect(host, port).await?;
        if !is_tls {
            return self.exchange(stream, call, host).await;
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|_| FetchError::Name(host.to_owned()))?;
        let handshake = TlsConnector::from(self.tls(call.trust).await?).connect(name, stream);
        let stream = self.not_silent(host, handshake).await?;
        let stream = stream.map_err(|source| FetchError::Tls { host: host.to_owned(), source })?;
        self.exchange(stream, call, host).await
    }

    async fn tls(&self, trust: Trust) -> Result<Arc<ClientConfig>, FetchError> {
        let config = match trust {
            Trust::Verified => {
                let roots = self.roots.as_deref();
                self.verified.get_or_try_init(|| async { tls::verified(roots).map(Arc::new) }).await?
            }
            Trust::Any => {
                self.unverified.get_or_try_init(|| async { tls::unverified().map(Arc::new) }).await?
            }
        };
        Ok(Arc::clone(config))
    }

    async fn connect(&self, host: &str, port: u16) -> Result<tokio::net::TcpStream, FetchError> {
        let resolved = self.not_silent(host, tokio::net::lookup_host((host, port))).await?;
        let resolved = resolved.map_err(|source| FetchError::Resolve { host: host.to_owned(), source })?;
        let canonical = resolved.map(|address| SocketAddr::new(address.ip().to_canonical(), address.port()));
        let allowed = canonical.filter(|address| {
            let ip = address.ip();
            cairn_net::may_be_asked(ip) && !self.blocked.iter().any(|block| block.contains(&ip))
        });
        let mut last = FetchError::Address(host.to_owned());
        for address in allowed.take(ADDRESSES_MAX) {
            match cairn_net::connect(address, &ConnectOptions::default()).await {
                Ok(stream) => return Ok(stream),
                Err(source) => last = FetchError::Connect { host: host.to_owned(), source },
            }
        }
        Err(last)
    }

    async fn exchange<S>(&self, stream: S, call: &Call, host: &str) -> Result<Answer, FetchError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let failed = |source| FetchError::Http { host: host.to_owned(), source };
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(failed)?;
        let request = request(call).map_err(|_| FetchError::Redirect("it names no address"))?;
        // Both go on together, so that nothing is left behind when this future is dropped.
        let mut connection = pin!(connection);
        let mut answer = pin!(async {
            // What is sent takes its time, too: at least 1 MiB per second is expected.
            let sending = Duration::from_secs(call.body.len() as u64 >> 20);
            let response =
                tokio::time::timeout(self.silence_max + sending, sender.send_request(request)).await;
            let silent = |_| FetchError::Silent { host: host.to_owned(), after: self.silence_max + sending };
            let (head, body) = response.map_err(silent)?.map_err(failed)?.into_parts();
            let body = match head.status.is_success() {
                true => self.body(body, call.answer_bytes_max, host).await?,
                // What a refusal says is a help; that it can be read whole is not needed.
                false => self.body(body, REFUSAL_BYTES_MAX, host).await.unwrap_or_default(),
            };
            Ok(Answer { status: head.status, headers: head.headers, body })
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

    async fn body(&self, body: Incoming, bytes_max: u64, host: &str) -> Result<Bytes, FetchError> {
        let failed = |source| FetchError::Http { host: host.to_owned(), source };
        let too_large = FetchError::TooLarge { bytes_max };
        let announced = body.size_hint().lower();
        if announced > bytes_max {
            return Err(too_large);
        }
        let mut body = pin!(body);
        let mut bytes = BytesMut::new();
        while let Some(frame) = self.not_silent(host, poll_fn(|cx| body.as_mut().poll_frame(cx))).await? {
            let Ok(data) = frame.map_err(failed)?.into_data() else { continue };
            if (bytes.len() + data.len()) as u64 > bytes_max {
                return Err(too_large);
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes.freeze())
    }

    async fn not_silent<F: Future>(&self, host: &str, wait: F) -> Result<F::Output, FetchError> {
        let after = self.silence_max;
        let ended = tokio::time::timeout(after, wait).await;
        ended.map_err(|_| FetchError::Silent { host: host.to_owned(), after })
    }
}

/// The host of a URI, without the brackets of IPv6.
pub(crate) fn host(uri: &Uri) -> &str {
    uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
}

fn request(call: &Call) -> Result<Request<Full<Bytes>>, http::Error> {
    let authority = call.uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
    let path = call.uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::builder().method(call.method.clone()).uri(path);
    let mut request = request.body(Full::new(call.body.clone()))?;
    *request.headers_mut() = call.headers.clone();
    request.headers_mut().insert(HOST, HeaderValue::from_str(authority)?);
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    request
        .headers_mut()
        .insert(USER_AGENT, HeaderValue::from_static(concat!("cairn/", env!("CARGO_PKG_VERSION"))));
    Ok(request)
}

/// The request that a redirect asks for. Whom it leads to does not learn who we are, and what began with TLS goes on with it.
fn redirected(call: Call, answer: &Answer) -> Result<Call, FetchError> {
    let location = answer.header(LOCATION).ok_or(FetchError::Redirect("it has no location"))?;
    let uri =
        resolve(&call.uri, location).ok_or(FetchError::Redirect("its location is no URL of the web"))?;
    if call.uri.scheme() == Some(&Scheme::HTTPS) && uri.scheme() != Some(&Scheme::HTTPS) {
        return Err(FetchError::Redirect("it leads from https to http"));
    }
    let mut headers = call.headers;
    if uri.authority() != call.uri.authority() {
        headers.remove(AUTHORIZATION);
    }
    Ok(Call { uri, headers, ..call })
}

/// The URL that `location` means in an answer from `base`: whole, or a path.
pub(crate) fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let whole = match location {
        path if path.starts_with("//") => format!("{}:{path}", base.scheme_str()?),
        path if path.starts_with('/') => format!("{}://{}{path}", base.scheme_str()?, base.authority()?),
        whole => whole.to_owned(),
    };
    let uri: Uri = whole.parse().ok()?;
    let is_web = uri.scheme() == Some(&Scheme::HTTP) || uri.scheme() == Some(&Scheme::HTTPS);
    let is_plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    (is_web && is_plain).then_some(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_keep_what_may_be_kept() {
        for (from, location, expected) in [
            ("https://a/x", "https://a/y?z=1", Ok(("https://a/y?z=1", true))),
            ("https://a/x", "/y", Ok(("https://a/y", true))),
            ("https://a/x", "//b/y", Ok(("https://b/y", false))),
            ("https://a/x", "https://b/y", Ok(("https://b/y", false))),
            ("https://a/x", "https://a:8443/y", Ok(("https://a:8443/y", false))),
            ("http://a/x", "https://a/y", Ok(("https://a/y", true))),
            ("https://a/x", "http://a/y", Err("it leads from https to http")),
            ("https://a/x", "ftp://a/y", Err("its location is no URL of the web")),
            ("https://a/x", "https://me:word@a/y", Err("its location is no URL of the web")),
        ] {
            let call = Call::get(from.parse().unwrap(), Trust::Verified, 1);
            let call = call.header(AUTHORIZATION, HeaderValue::from_static("Bearer x"));
            let headers = HeaderMap::from_iter([(LOCATION, HeaderValue::from_static(location))]);
            let answer = Answer { status: StatusCode::FOUND, headers, body: Bytes::new() };
            let went = redirected(call, &answer);
            match (went, expected) {
                (Ok(call), Ok((uri, keeps))) => {
                    assert_eq!(call.uri.to_string(), uri, "{from} {location}");
                    assert_eq!(call.headers.contains_key(AUTHORIZATION), keeps, "{from} {location}");
                }
                (Err(FetchError::Redirect(why)), Err(expected)) => assert_eq!(why, expected),
                (other, _) => panic!("{from} {location}: {other:?}"),
            }
        }
    }
}
