//! Modules from files and from servers of files.

use super::server::{Certificate, Server, answer};
use super::{digest, module, outcome, quick, refused, wanted};
use crate::pack::{archive, gzip};
use crate::{Digest, FetchSettings, Fetcher, Wanted};
use http::{HeaderValue, Response};
use http_body_util::Full;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

#[tokio::test]
async fn files_are_read_and_held_against_their_digest() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("file://{}/{name}", folder.path().display());
    std::fs::write(folder.path().join("bare"), module(1)).unwrap();
    std::fs::write(folder.path().join("pressed"), gzip(&module(1)).unwrap()).unwrap();
    std::fs::write(folder.path().join("text"), "<html>").unwrap();
    std::fs::write(folder.path().join("large"), vec![0; 2000]).unwrap();
    let fetcher = Fetcher::new(FetchSettings { module_bytes_max: 1000, ..quick() });
    for name in ["bare", "pressed"] {
        assert_eq!(outcome(&fetcher, &wanted(&at(name))).await.unwrap().digest, digest(1), "{name}");
    }
    let pinned = |name: &str, pinned| Wanted { pinned: Some(pinned), ..wanted(&at(name)) };
    assert!(outcome(&fetcher, &pinned("bare", digest(1))).await.is_ok());
    assert!(outcome(&fetcher, &pinned("pressed", digest(1))).await.is_ok());
    assert!(outcome(&fetcher, &pinned("pressed", Digest::of(&gzip(&module(1)).unwrap()))).await.is_ok());
    refused(outcome(&fetcher, &pinned("bare", digest(2))).await, "is wanted");
    refused(outcome(&fetcher, &wanted(&at("text"))).await, "no WebAssembly module");
    refused(outcome(&fetcher, &wanted(&at("large"))).await, "more than 1000 bytes");
    refused(outcome(&fetcher, &wanted(&at("missing"))).await, "cannot read");
    refused(outcome(&fetcher, &wanted("file:///dev/zero")).await, "is not a file");
}

#[tokio::test]
async fn servers_of_files_are_asked() {
    let server = Server::start(None, |request| match request.uri().path() {
        "/bare" => answer(200, module(1)),
        "/gzip" => answer(200, gzip(&module(2)).unwrap()),
        "/tar" => answer(200, archive(&[("x", &module(3))]).unwrap()),
        "/tgz" => answer(200, gzip(&archive(&[("x", &module(4))]).unwrap()).unwrap()),
        "/html" => answer(200, "<html>"),
        "/large" => answer(200, vec![0; 2000]),
        "/moved" => moved("/bare"),
        "/around" => moved("/around"),
        "/metadata" => moved("http://169.254.169.254/latest/meta-data"),
        _ => answer(404, "nothing"),
    })
    .await;
    let fetcher = Fetcher::new(FetchSettings { module_bytes_max: 1500, ..quick() });
    let at = |path: &str| wanted(&format!("http://{}{path}", server.address));
    for (path, mark) in [("/bare", 1), ("/gzip", 2), ("/tgz", 4), ("/moved", 1)] {
        assert_eq!(outcome(&fetcher, &at(path)).await.unwrap().digest, digest(mark), "{path}");
    }
    // An archive is larger than what is in it.
    let roomy = Fetcher::new(quick());
    assert_eq!(outcome(&roomy, &at("/tar")).await.unwrap().digest, digest(3));
    for (path, why) in [
        ("/html", "no WebAssembly module"),
        ("/large", "more than 1500 bytes"),
        ("/around", "too many"),
        ("/metadata", "at no address that may be asked"),
        ("/missing", "answered 404 Not Found"),
    ] {
        refused(outcome(&fetcher, &at(path)).await, why);
    }
    let pinned = Wanted { pinned: Some(digest(9)), ..at("/bare") };
    refused(outcome(&fetcher, &pinned).await, "is wanted");
}

fn moved(to: &str) -> Response<Full<bytes::Bytes>> {
    let mut response = answer(307, "");
    response.headers_mut().insert("location", HeaderValue::from_str(to).unwrap());
    response
}

#[tokio::test]
async fn a_server_that_fails_is_asked_again_and_one_that_refuses_is_not() {
    for (status, failures, expected) in
        [(503, 5, Ok(6)), (503, 6, Err(6)), (501, 1, Err(1)), (404, 1, Err(1))]
    {
        let asked = Arc::new(AtomicU32::new(0));
        let server = Server::start(None, {
            let asked = Arc::clone(&asked);
            move |_| match asked.fetch_add(1, Ordering::Relaxed) < failures {
                true => answer(status, "no"),
                false => answer(200, module(1)),
            }
        })
        .await;
        let ended = outcome(&Fetcher::new(quick()), &wanted(&format!("http://{}/", server.address))).await;
        let asked = asked.load(Ordering::Relaxed);
        assert_eq!(ended.map(|_| asked).map_err(|_| asked), expected, "{status} {failures} times");
    }
}

#[tokio::test]
async fn servers_prove_who_they_are() {
    let certificate = Certificate::new();
    let server = Server::start(Some(certificate.server()), |_| answer(200, module(1))).await;
    let roots = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(roots.path(), &certificate.root_pem).unwrap();
    let at = wanted(&format!("https://localhost:{}/", server.address.port()));
    let knowing = Fetcher::new(FetchSettings { roots: Some(roots.path().to_owned()), ..quick() });
    assert_eq!(outcome(&knowing, &at).await.unwrap().digest, digest(1));
    let unknowing = Fetcher::new(FetchSettings { retries: 0, ..quick() });
    refused(outcome(&unknowing, &at).await, "TLS with `localhost` failed");
}

#[tokio::test]
async fn addresses_that_are_blocked_are_not_asked() {
    let server = Server::start(None, |_| answer(200, module(1))).await;
    let at = wanted(&format!("http://{}/", server.address));
    let blocking = FetchSettings { blocked: vec!["127.0.0.0/8".parse().unwrap()], ..quick() };
    refused(outcome(&Fetcher::new(blocking), &at).await, "no address that may be asked");
    refused(
        outcome(&Fetcher::new(quick()), &wanted("http://169.254.1.1/")).await,
        "no address that may be asked",
    );
}

#[tokio::test]
async fn a_server_that_says_nothing_is_not_waited_for() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = wanted(&format!("http://{}/", listener.local_addr().unwrap()));
    let settings = FetchSettings { silence_max: Duration::from_millis(50), retries: 1, ..quick() };
    refused(outcome(&Fetcher::new(settings), &at).await, "was silent for 50ms");
}
