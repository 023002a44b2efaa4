//! Keys from issuers that really listen: got, renewed, kept, refused.

use super::*;
use cairn_builtin::KeySet;
use cairn_filter::{CalloutAnswer, CalloutError, CalloutFuture, CalloutRequest, NoCallout};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const SOON: Duration = Duration::from_secs(10);

/// A set with one secret key of this name.
fn set(key_id: &str) -> String {
    format!(r#"{{"keys":[{{"kty":"oct","kid":"{key_id}","k":"c2VjcmV0"}}]}}"#)
}

fn answer(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// A server that answers each request with the current text, and counts them by path.
struct Server {
    at: SocketAddr,
    text: Arc<Mutex<HashMap<String, String>>>,
    asked: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let text: Arc<Mutex<HashMap<String, String>>> = Arc::default();
        let asked = Arc::new(AtomicUsize::new(0));
        let (answers, count) = (Arc::clone(&text), Arc::clone(&asked));
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (answers, count) = (Arc::clone(&answers), Arc::clone(&count));
                tokio::spawn(async move {
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                    let request = String::from_utf8_lossy(&request).into_owned();
                    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                    let text = answers.lock().get(&path).cloned();
                    tokio::time::sleep(delay).await;
                    let text =
                        text.unwrap_or_else(|| "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".into());
                    let _gone = stream.write_all(text.as_bytes()).await;
                });
            }
        });
        Self { at, text, asked, task }
    }

    fn answers(&self, path: &str, text: impl Into<String>) {
        self.text.lock().insert(path.to_owned(), text.into());
    }

    fn uri(&self, path: &str) -> String {
        format!("http://{}{path}", self.at)
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

fn keyring() -> Keyring {
    Keyring::new(Arc::new(NoCallout), None, TokenCache::default())
}

fn rule(keys: KeyPlace, issuer: &str, timeout: Duration) -> JwtRule {
    JwtRule { timeout, ..JwtRule::new(issuer, keys) }
}

fn source(keyring: &Keyring, uri: &str, timeout: Duration) -> Arc<dyn KeySource> {
    let rule = rule(KeyPlace::Uri(uri.into()), "me", timeout);
    keyring.source(&ResourceName::new("shop", "a"), &rule, "cluster.local")
}

/// Waits for what the source has under way, and returns its keys.
async fn after_renewal(source: &Arc<dyn KeySource>, key_id: &str) -> Option<Arc<KeySet>> {
    if let Some(wait) = source.renew(key_id) {
        wait.await;
    }
    match source.keys() {
        Keys::Known(set) => Some(set),
        Keys::Missing | Keys::Unusable => None,
    }
}

#[tokio::test]
async fn keys_are_got_from_a_uri_or_through_the_issuer() {
    let server = Server::start(Duration::ZERO).await;
    server.answers("/keys", answer(&set("k")));
    server.answers(
        "/r/.well-known/openid-configuration",
        answer(&format!(r#"{{"jwks_uri":"{}"}}"#, server.uri("/keys"))),
    );
    let keyring = keyring();
    let by_uri = source(&keyring, &server.uri("/keys"), SOON);
    assert_eq!(after_renewal(&by_uri, "k").await.unwrap().count(), 1);
    let discovery = rule(KeyPlace::Discovery, &server.uri("/r/"), SOON);
    let through_issuer = keyring.source(&ResourceName::new("shop", "a"), &discovery, "cluster.local");
    assert_eq!(after_renewal(&through_issuer, "k").await.unwrap().count(), 1);
    assert_eq!(server.asked(), 3);
    let again = source(&keyring, &server.uri("/keys"), SOON);
    assert!(Arc::ptr_eq(&again, &by_uri), "one place is asked once for all destinations");
    let metrics = keyring.encode_metrics();
    let line = format!("cairn_jwks_fetches_total{{source=\"{}\"}} 1", server.uri("/keys"));
    assert!(metrics.contains(&line), "{metrics}");
    assert!(
        metrics.contains(&format!("cairn_jwks_age_seconds{{source=\"{}\"}} ", server.uri("/keys"))),
        "{metrics}"
    );
}

#[tokio::test]
async fn what_is_no_good_answer_gives_no_keys() {
    let server = Server::start(Duration::ZERO).await;
    let long = " ".repeat(600 * 1024);
    server.answers("/keys", answer(&set("k")));
    server.answers(
        "/moved",
        format!("HTTP/1.1 302 Found\r\nlocation: {}\r\ncontent-length: 0\r\n\r\n", server.uri("/keys")),
    );
    server.answers("/long", answer(&(set("k") + &long)));
    server.answers("/html", answer("<html>"));
    server.answers("/empty", answer(r#"{"keys":[]}"#));
    server.answers("/half", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{");
    server.answers("/noise", "hello\r\n\r\n");
    let keyring = keyring();
    for path in ["/moved", "/long", "/html", "/empty", "/half", "/noise", "/missing"] {
        let source = source(&keyring, &server.uri(path), SOON);
        assert!(after_renewal(&source, "k").await.is_none(), "{path}");
        let line = format!("cairn_jwks_fetch_failures_total{{source=\"{}\"}} 1", server.uri(path));
        assert!(keyring.encode_metrics().contains(&line), "{path}");
    }
    let metadata = source(&keyring, "http://169.254.169.254/keys", SOON);
    let began = Instant::now();
    assert!(after_renewal(&metadata, "k").await.is_none());
    assert!(began.elapsed() < SOON, "it is not even asked");
    let nowhere = rule(KeyPlace::Discovery, "me@example", SOON);
    let nowhere = keyring.source(&ResourceName::new("shop", "a"), &nowhere, "cluster.local");
    assert!(nowhere.renew("k").is_none() && matches!(nowhere.keys(), Keys::Missing));
}

#[tokio::test]
async fn who_waits_for_a_slow_issuer_waits_no_longer_than_the_rule_says() {
    let server = Server::start(Duration::from_secs(30)).await;
    server.answers("/keys", answer(&set("k")));
    let keyring = keyring();
    let source = source(&keyring, &server.uri("/keys"), Duration::from_millis(10));
    let began = Instant::now();
    assert!(after_renewal(&source, "k").await.is_none());
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_unknown_key_is_asked_for_once_and_old_keys_stay_while_the_issuer_is_down() {
    let server = Server::start(Duration::from_millis(50)).await;
    server.answers("/keys", answer(&set("old")));
    let keyring = keyring();
    let source = source(&keyring, &server.uri("/keys"), SOON);
    let old = after_renewal(&source, "old").await.unwrap();
    assert_eq!(server.asked(), 1);

    // Many requests at once, one question.
    server.answers("/keys", answer(&set("new")));
    let waits: Vec<_> = (0..20).map(|_| source.renew("new").expect("it is asked, or about to be")).collect();
    for wait in waits {
        wait.await;
    }
    assert_eq!(server.asked(), 2);
    let new = after_renewal(&source, "new").await.unwrap();
    assert!(!Arc::ptr_eq(&old, &new), "the keys are the new ones");
    assert_eq!(server.asked(), 2, "a key that was asked for is not asked for again");

    server.answers("/keys", "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n");
    let kept = after_renewal(&source, "third").await.unwrap();
    assert!(Arc::ptr_eq(&kept, &new), "what was good stays");
    assert_eq!(server.asked(), 3);
}

#[tokio::test]
async fn an_issuer_is_forgotten_with_its_last_rule() {
    let server = Server::start(Duration::ZERO).await;
    server.answers("/keys", answer(&set("k")));
    let keyring = keyring();
    let held = source(&keyring, &server.uri("/keys"), SOON);
    after_renewal(&held, "k").await.unwrap();
    drop(held);
    assert!(!keyring.encode_metrics().contains("/keys"), "it has no metrics any more");
    let inline = KeyPlace::Inline(set("k").into());
    let held =
        keyring.source(&ResourceName::new("shop", "a"), &rule(inline.clone(), "me", SOON), "cluster.local");
    let again = keyring.source(&ResourceName::new("shop", "b"), &rule(inline, "me", SOON), "cluster.local");
    assert!(Arc::ptr_eq(&held, &again), "equal keys are read once");
}

/// A mesh that knows one service.
#[derive(Debug)]
struct OneService;

impl Callout for OneService {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        let known = (&*request.host, request.port) == ("keys.shop.svc.cluster.local", 8000);
        let path = request.request.uri().path().to_owned();
        Box::pin(async move {
            match (known, &*path) {
                (true, "/jwks") => Ok(CalloutAnswer {
                    response: http::Response::new(set("k").into()),
                    trailers: Default::default(),
                }),
                (true, _) => {
                    let mut response = http::Response::new(Default::default());
                    *response.status_mut() = http::StatusCode::NOT_FOUND;
                    Ok(CalloutAnswer { response, trailers: Default::default() })
                }
                (false, _) => Err(CalloutError::UnknownService(request.host.to_string())),
            }
        })
    }
}

#[tokio::test]
async fn a_service_of_the_mesh_is_asked_as_such() {
    let keyring = Keyring::new(Arc::new(OneService), None, TokenCache::default());
    for (uri, is_got) in [
        ("http://keys:8000/jwks", true),
        ("http://keys.shop:8000/jwks", true),
        ("http://keys.shop.svc.cluster.local:8000/jwks", true),
        ("http://keys.shop.svc.cluster.local:8000/other", false),
    ] {
        let source = source(&keyring, uri, SOON);
        assert_eq!(after_renewal(&source, "k").await.is_some(), is_got, "{uri}");
    }
}

#[tokio::test]
async fn a_server_with_tls_must_prove_its_name() {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            let _gone = stream.write_all(answer(&set("k")).as_bytes()).await;
            let _gone = stream.shutdown().await;
        }
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), certificate.pem()).unwrap();
    for (name, host, roots, is_got) in [
        ("its own root", "localhost", Some(file.path().to_owned()), true),
        ("another name", "127.0.0.1", Some(file.path().to_owned()), false),
        ("an unknown root", "localhost", None, false),
        ("no such file", "localhost", Some("/nonexistent".into()), false),
    ] {
        let keyring = Keyring::new(Arc::new(NoCallout), roots, TokenCache::default());
        let source = source(&keyring, &format!("https://{host}:{port}/keys"), SOON);
        assert_eq!(after_renewal(&source, "k").await.is_some(), is_got, "{name}");
    }
    server.abort();
}

#[tokio::test]
async fn keys_are_known_at_a_start_while_the_issuer_is_down() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(Duration::ZERO).await;
    server.answers("/keys", answer(&set("k")));
    let uri = server.uri("/keys");
    let before = source(&keyring().keeping(directory.path().to_owned()), &uri, SOON);
    assert!(after_renewal(&before, "k").await.is_some());
    drop((before, server));

    let after = source(&keyring().keeping(directory.path().to_owned()), &uri, SOON);
    assert!(matches!(after.keys(), Keys::Known(set) if set.count() == 1), "kept");
    let elsewhere = source(&keyring().keeping(directory.path().to_owned()), &format!("{uri}/other"), SOON);
    assert!(matches!(elsewhere.keys(), Keys::Missing), "of another place");
    let without = source(&keyring(), &uri, SOON);
    assert!(matches!(without.keys(), Keys::Missing), "without a directory");
}
