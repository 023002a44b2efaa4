//! Who issues tokens to the tests: keys of their own, and a server that gives the public ones out.

// The same signer as in the unit tests of the filter.
#[path = "../../runtime/builtin/src/authentication/testing.rs"]
mod signer;

use anyhow::Result;
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};
use signer::Signer;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// The issuers, with a server that runs until the tests end.
pub struct Issuers {
    /// Signs for `test-issuer-1@istio.io`.
    pub one: Signer,
    /// Signs for `test-issuer-2@istio.io`.
    pub two: Signer,
    /// Will sign for the first, once its keys are out.
    pub successor: Signer,
    /// The keys that are given out at `/rotating`.
    rotating: Mutex<Vec<Value>>,
    /// Where keys are given out over HTTP.
    pub http: SocketAddr,
    /// The port on localhost where they are given out over HTTPS.
    pub https: u16,
    /// The root that the HTTPS server chains to, PEM.
    pub root: String,
}

static ISSUERS: LazyLock<Arc<Issuers>> = LazyLock::new(|| Issuers::start().unwrap());

/// The issuers, started by the first that asks.
pub fn issuers() -> &'static Arc<Issuers> {
    &ISSUERS
}

impl Issuers {
    fn start() -> Result<Arc<Self>> {
        let listen = || -> Result<std::net::TcpListener> {
            let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let (plain, secure) = (listen()?, listen()?);
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
        let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)?;
        let one = Signer::new("RS256", "key-1");
        let issuers = Arc::new(Self {
            rotating: Mutex::new(vec![one.jwk()]),
            one,
            two: Signer::new("ES256", "key-2"),
            successor: Signer::new("EdDSA", "key-3"),
            http: plain.local_addr()?,
            https: secure.local_addr()?.port(),
            root: certificate.pem(),
        });
        let served = Arc::clone(&issuers);
        // Each test has a runtime of its own; this server is for all of them.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let acceptor = TlsAcceptor::from(Arc::new(tls));
                let secure = TcpListener::from_std(secure).unwrap();
                let plain = TcpListener::from_std(plain).unwrap();
                let over_tls = Arc::clone(&served);
                tokio::join!(serve(served, plain), async move {
                    while let Ok((stream, _)) = secure.accept().await {
                        let (issuers, acceptor) = (Arc::clone(&over_tls), acceptor.clone());
                        tokio::spawn(async move {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                answer(&issuers, stream).await;
                            }
                        });
                    }
                });
            });
        });
        Ok(issuers)
    }

    /// Gives out other keys at `/rotating` from now on.
    pub fn rotate(&self, keys: Vec<Value>) {
        *self.rotating.lock().unwrap() = keys;
    }

    /// The issuer whose keys are found through its configuration.
    pub fn realm(&self) -> String {
        format!("http://{}/realm", self.http)
    }

    fn body(&self, path: &str) -> Option<String> {
        Some(match path {
            "/one" | "/slow" | "/realm/keys" => Signer::set(&[self.one.jwk()]),
            "/rotating" => Signer::set(&self.rotating.lock().unwrap()),
            "/realm/.well-known/openid-configuration" => {
                json!({ "issuer": self.realm(), "jwks_uri": format!("{}/keys", self.realm()) }).to_string()
            }
            _ => return None,
        })
    }
}

/// Gives keys out on `listener`.
pub async fn serve(issuers: Arc<Issuers>, listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let issuers = Arc::clone(&issuers);
        tokio::spawn(async move { answer(&issuers, stream).await });
    }
}

/// Answers one request.
async fn answer(issuers: &Issuers, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1).unwrap_or_default();
    if path == "/slow" {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let (status, body) = issuers.body(path).map_or(("404 Not Found", String::new()), |body| ("200 OK", body));
    let length = body.len();
    let text = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
    // Whoever asked may have gone.
    let _gone = stream.write_all(text.as_bytes()).await;
    let _gone = stream.shutdown().await;
}
