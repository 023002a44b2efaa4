//! Modules to and from a registry of images: with and without logins, over HTTP and HTTPS.

use super::peer::Registry;
use super::server::{Certificate, Server, answer};
use super::{digest, module, outcome, quick, refused, wanted};
use crate::manifest::{Descriptor, Manifest, Platform};
use crate::registry::{Access, Session};
use crate::web::Web;
use crate::{
    Credentials, Digest, FetchSettings, Fetcher, ImageFormat, Login, Reference, Source, Wanted, pack,
};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn reference(text: &str) -> Reference {
    Reference::parse(text).unwrap()
}

/// `me`, whose password is `open sesame`.
const HTPASSWD: &str = "me:$2b$04$9QRXD55yfJKXrBhwTSQFxOm7MjfHbFFa4z.f4cVULiHyf28twWzB.\n";

fn me(registry: &str, password: &str) -> Credentials {
    Credentials::single(registry, Login::Password { user: "me".into(), password: password.into() })
}

#[tokio::test]
async fn what_is_pushed_is_fetched_in_every_format() {
    let Some(registry) = Registry::start("", "", &[]) else { return };
    let fetcher = Fetcher::new(quick());
    let formats = [ImageFormat::Compat, ImageFormat::Docker, ImageFormat::Artifact, ImageFormat::Cncf];
    let nobody = Credentials::default();
    for (mark, format) in (1..).zip(formats) {
        let image = format!("{}/team/tag:v{mark}", registry.address);
        let pushed = fetcher.push(&module(mark), format, &reference(&image), &nobody).await.unwrap();
        let fetched = outcome(&fetcher, &wanted(&image)).await.unwrap();
        assert_eq!(fetched.digest, digest(mark), "{format:?}");
        assert_eq!((fetched.manifest, fetched.resolved), (Some(pushed), Some(pushed)), "{format:?}");
        assert_eq!(fetcher.resolve(&reference(&image), &nobody).await.unwrap(), pushed, "{format:?}");
        // Again, by what it is.
        let pinned = format!("oci://{}/team/tag@{}", registry.address, pushed.qualified());
        assert_eq!(outcome(&fetcher, &wanted(&pinned)).await.unwrap().digest, digest(mark), "{format:?}");
        let checked = Wanted { pinned: Some(pushed), ..wanted(&image) };
        assert!(outcome(&fetcher, &checked).await.is_ok());
        refused(
            outcome(&fetcher, &Wanted { pinned: Some(digest(mark)), ..wanted(&image) }).await,
            "is wanted",
        );
    }
    let missing = |image: &str| wanted(&format!("{}/{image}", registry.address));
    refused(outcome(&fetcher, &missing("team/tag:v9")).await, "answered 404 Not Found (MANIFEST_UNKNOWN)");
    let elsewhere = format!("team/tag@{}", digest(1).qualified());
    refused(outcome(&fetcher, &missing(&elsewhere)).await, "answered 404 Not Found (MANIFEST_UNKNOWN)");
    let narrow = Fetcher::new(FetchSettings { module_bytes_max: 10, ..quick() });
    refused(outcome(&narrow, &missing("team/tag:v4")).await, "more than 10 bytes");
    let (text, image) = (Bytes::from_static(b"text"), reference("localhost:1/a"));
    let no_module = fetcher.push(&text, ImageFormat::Compat, &image, &nobody);
    assert!(no_module.await.unwrap_err().to_string().contains("no WebAssembly module"));
}

#[tokio::test]
async fn of_several_platforms_the_one_for_wasm_is_taken() {
    let Some(registry) = Registry::start("", "", &[]) else { return };
    let fetcher = Fetcher::new(quick());
    let nobody = Credentials::default();
    let mut manifests = Vec::new();
    for (mark, architecture) in [(1, "amd64"), (2, "wasm"), (3, "arm64")] {
        let image = reference(&format!("{}/many:{architecture}", registry.address));
        let pushed = fetcher.push(&module(mark), ImageFormat::Compat, &image, &nobody).await.unwrap();
        manifests.push((pushed, architecture));
    }
    let size = pack::image(&module(1), ImageFormat::Compat).unwrap().manifest.len() as u64;
    let describe = |(digest, architecture): &(Digest, &str)| Descriptor {
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        digest: digest.qualified(),
        size,
        platform: Some(Platform { architecture: (*architecture).into(), os: "linux".into() }),
    };
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = Manifest {
        schema_version: 2,
        media_type: Some(media_type.into()),
        manifests: manifests.iter().map(describe).collect(),
        ..Manifest::default()
    };
    let all = reference(&format!("{}/many:all", registry.address));
    let image =
        pack::Image { blobs: Vec::new(), manifest: serde_json::to_vec(&index).unwrap().into(), media_type };
    let web = Web::new(None, Vec::new(), Duration::from_secs(5));
    let mut session = Session::open(&web, &all, None, Access::Push, false).await.unwrap();
    let pushed = session.push(&image).await.unwrap();
    let fetched = outcome(&fetcher, &wanted(&all.to_string())).await.unwrap();
    assert_eq!(fetched.digest, digest(2));
    assert_eq!((fetched.manifest, fetched.resolved), (Some(manifests[1].0), Some(pushed)));
    // The pin may be of either.
    for pin in [pushed, manifests[1].0] {
        assert!(outcome(&fetcher, &Wanted { pinned: Some(pin), ..wanted(&all.to_string()) }).await.is_ok());
    }
    let other = Wanted { pinned: Some(manifests[0].0), ..wanted(&all.to_string()) };
    refused(outcome(&fetcher, &other).await, "is wanted");
}

#[tokio::test]
async fn a_registry_with_its_own_root_and_passwords() {
    let certificate = Certificate::new();
    let files = [
        ("cert.pem", certificate.chain_pem.clone()),
        ("key.pem", certificate.key.serialize_pem()),
        ("htpasswd", HTPASSWD.to_owned()),
    ];
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let tls = ", tls: {certificate: HOME/cert.pem, key: HOME/key.pem}";
    let auth = "auth: {htpasswd: {realm: x, path: HOME/htpasswd}}";
    let Some(registry) = Registry::start(tls, auth, &files) else { return };
    let roots = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(roots.path(), &certificate.root_pem).unwrap();
    let host = registry.address.to_string();
    let image = format!("{host}/team/tag:1");
    let knowing = Fetcher::new(FetchSettings { roots: Some(roots.path().to_owned()), retries: 0, ..quick() });
    let right = me(&format!("https://{host}"), "open sesame");
    let pushed = knowing.push(&module(1), ImageFormat::Compat, &reference(&image), &right).await;
    assert_eq!(Some(pushed.unwrap()), outcome(&knowing, &as_me(&image, &right)).await.unwrap().manifest);
    refused(outcome(&knowing, &wanted(&image)).await, "answered 401 Unauthorized (UNAUTHORIZED)");
    refused(outcome(&knowing, &as_me(&image, &me(&host, "wrong"))).await, "answered 401 Unauthorized");
    refused(outcome(&knowing, &as_me(&image, &me("other.example", "open sesame"))).await, "answered 401");
    // Without the root the registry proves nothing, unless it need not.
    let unknowing = Fetcher::new(FetchSettings { retries: 0, ..quick() });
    refused(outcome(&unknowing, &as_me(&image, &right)).await, "TLS with `127.0.0.1` failed");
    let trusting = FetchSettings { insecure_registries: vec![host.clone()], ..quick() };
    assert!(outcome(&Fetcher::new(trusting), &as_me(&image, &right)).await.is_ok());
    let trusting = FetchSettings { insecure_registries: vec!["*".into()], ..quick() };
    assert!(outcome(&Fetcher::new(trusting), &as_me(&image, &right)).await.is_ok());
}

fn as_me(image: &str, credentials: &Credentials) -> Wanted {
    Wanted { credentials: credentials.clone(), ..wanted(image) }
}

/// What the registry's own tokens look like (distribution's token specification).
fn token(certificate: &Certificate, scope: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let chain: String = certificate.chain_pem.lines().filter(|line| !line.starts_with('-')).collect();
    let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [chain] });
    let mut parts = scope.splitn(3, ':');
    let (kind, name) = (parts.next().unwrap(), parts.next().unwrap());
    let actions: Vec<&str> = parts.next().unwrap().split(',').collect();
    let claims = json!({
        "iss": "test", "aud": "registry", "sub": "me", "jti": "1", "exp": now + 60, "nbf": now - 10, "iat": now - 10,
        "access": [{ "type": kind, "name": name, "actions": actions }],
    });
    let encode = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", encode(&header), encode(&claims));
    let key =
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &certificate.key.serialize_der()).unwrap();
    let signature = key.sign(&SystemRandom::new(), text.as_bytes()).unwrap();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
}

#[tokio::test]
async fn a_registry_that_wants_tokens() {
    let certificate = Arc::new(Certificate::new());
    let right = format!("Basic {}", STANDARD.encode("me:open sesame"));
    let given = Arc::new(AtomicU32::new(0));
    let tokens = Server::start(None, {
        let (certificate, given) = (Arc::clone(&certificate), Arc::clone(&given));
        move |request| {
            if request.headers().get("authorization").is_none_or(|value| *value != *right) {
                return answer(401, r#"{"errors": [{"code": "DENIED", "message": "secret"}]}"#);
            }
            given.fetch_add(1, Ordering::Relaxed);
            let query =
                percent_encoding::percent_decode_str(request.uri().query().unwrap()).decode_utf8().unwrap();
            assert!(query.contains("service=registry"), "{query}");
            let scope = query.split("scope=").nth(1).unwrap();
            answer(200, json!({ "token": token(&certificate, scope), "expires_in": 60 }).to_string())
        }
    })
    .await;
    let auth = format!(
        "auth: {{token: {{realm: 'http://{}/token', service: registry, issuer: test, rootcertbundle: HOME/root.pem}}}}",
        tokens.address
    );
    let Some(registry) = Registry::start("", &auth, &[("root.pem", &certificate.root_pem)]) else { return };
    let host = registry.address.to_string();
    let image = format!("{host}/team/tag:1");
    let fetcher = Fetcher::new(quick());
    let me_here = me(&host, "open sesame");
    let pushed = fetcher.push(&module(1), ImageFormat::Cncf, &reference(&image), &me_here).await.unwrap();
    assert_eq!(given.swap(0, Ordering::Relaxed), 1, "one token for all of a push");
    assert_eq!(outcome(&fetcher, &as_me(&image, &me_here)).await.unwrap().manifest, Some(pushed));
    assert_eq!(given.load(Ordering::Relaxed), 1, "one token for all of a fetch");
    refused(outcome(&fetcher, &wanted(&image)).await, "answered 401 Unauthorized (DENIED)");
    refused(
        outcome(&fetcher, &as_me(&image, &me(&host, "wrong"))).await,
        "answered 401 Unauthorized (DENIED)",
    );
}

#[tokio::test]
async fn passwords_are_not_sent_where_the_registry_must_not_send_them() {
    let certificate = Certificate::new();
    for (challenge, why) in [
        (r#"Bearer realm="http://127.0.0.1:9/token""#, "tokens to be got without TLS"),
        (r#"Bearer realm="https://169.254.169.254/token""#, "no address that may be asked"),
        (r#"Bearer realm="https://me:word@127.0.0.1/token""#, "no place where tokens are given"),
        ("Negotiate", "answered 401"),
    ] {
        let server = Server::start(Some(certificate.server()), move |_| {
            let mut response = answer(401, "");
            response.headers_mut().insert("www-authenticate", challenge.parse().unwrap());
            response
        })
        .await;
        let roots = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(roots.path(), &certificate.root_pem).unwrap();
        let fetcher = Fetcher::new(FetchSettings { roots: Some(roots.path().to_owned()), ..quick() });
        let host = format!("localhost:{}", server.address.port());
        let asked = outcome(&fetcher, &as_me(&format!("{host}/a"), &me(&host, "x"))).await;
        refused(asked, why);
    }
    assert!(matches!(Source::parse("localhost:1/a").unwrap(), Source::Oci(_)));
}

#[tokio::test]
async fn an_identity_token_is_exchanged_and_a_registry_token_sent() {
    let bearer = |request: &http::Request<hyper::body::Incoming>| {
        request.headers().get("authorization").and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let server = Server::start(None, move |request| match (request.uri().path(), bearer(request)) {
        ("/token", None) if request.method() == "POST" => answer(200, r#"{"access_token": "exchanged"}"#),
        (_, Some(token)) if token == "Bearer exchanged" || token == "Bearer given" => answer(404, ""),
        _ => {
            let realm =
                format!(r#"Bearer realm="http://{}/token""#, request.headers()["host"].to_str().unwrap());
            let mut response = answer(401, "");
            response.headers_mut().insert("www-authenticate", realm.parse().unwrap());
            response
        }
    })
    .await;
    let host = server.address.to_string();
    for (login, expected) in [
        (Login::IdentityToken("mine".into()), "answered 404"),
        (Login::RegistryToken("given".into()), "answered 404"),
        (Login::RegistryToken("other".into()), "answered 401"),
    ] {
        let credentials = Credentials::single(&host, login);
        refused(outcome(&Fetcher::new(quick()), &as_me(&format!("{host}/a"), &credentials)).await, expected);
    }
}
