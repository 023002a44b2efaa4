//! Tests of callouts: to a service of the mesh, to an address, and everything that ends without an answer.

use super::*;
use crate::WorkerSettings;
use crate::exchange::harness::{HOST, Mesh, PORT, Plan, Upstream, closed_port, full};
use cairn_mesh::AppProtocol;
use futures_util::FutureExt;
use http::{Method, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use std::time::Duration;

fn request(host: &str, http2: bool) -> CalloutRequest {
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{host}/check?a=b"))
        .header("x-team", "red")
        .body(Bytes::from_static(b"hello"))
        .unwrap();
    CalloutRequest {
        host: host.into(),
        namespace: None,
        port: PORT,
        http2,
        request,
        trailers: HeaderMap::new(),
        timeout: Duration::from_secs(5),
        answer_bytes_max: 1000,
    }
}

async fn ask_mesh(mesh: &Mesh, request: CalloutRequest) -> Result<CalloutAnswer, CalloutError> {
    let destination = SocketAddr::from(([10, 96, 0, 1], PORT));
    MeshCallout::new(Arc::clone(&mesh.worker), Arc::clone(&mesh.site), destination).call(request).await
}

#[tokio::test]
async fn a_service_is_asked_over_either_version_of_http() {
    let upstream = Upstream::telling().await;
    let mesh = Mesh::new(Plan::to(upstream.address));
    for (http2, line) in [
        (false, "POST /check?a=b HTTP/1.1"),
        (true, "POST http://cart.shop.svc.cluster.local/check?a=b HTTP/2.0"),
    ] {
        for namespace in [None, Some(Arc::from("shop"))] {
            let answer = ask_mesh(&mesh, CalloutRequest { namespace, ..request(HOST, http2) }).await.unwrap();
            assert_eq!(answer.response.status(), StatusCode::OK);
            let told = String::from_utf8(answer.response.into_body().to_vec()).unwrap();
            assert!(told.starts_with(line), "{told}");
            assert!(told.contains("x-team: red") && told.ends_with("hello"), "{told}");
        }
    }
    assert_eq!(upstream.connections(), 2, "connections are kept for the next question");
}

#[tokio::test]
async fn trailers_are_kept() {
    let upstream = Upstream::start(|_| {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("7"));
        let frames = [Ok(Frame::data(Bytes::from_static(b"body"))), Ok(Frame::trailers(trailers))];
        async move { Response::new(StreamBody::new(futures_util::stream::iter(frames)).boxed()) }.boxed()
    })
    .await;
    let mesh = Mesh::new(Plan { protocol: AppProtocol::Grpc, ..Plan::to(upstream.address) });
    let answer = ask_mesh(&mesh, request(HOST, true)).await.unwrap();
    assert_eq!(answer.trailers["grpc-status"], "7");
    assert_eq!(&**answer.response.body(), b"body");
}

#[tokio::test]
async fn a_service_and_its_protocol_are_known_before_it_is_asked() {
    let mesh = |protocol| Mesh::new(Plan { protocol, ..Plan::to(SocketAddr::from(([127, 0, 0, 1], 1))) });
    for (protocol, version) in [
        (AppProtocol::Unknown, Version::HTTP_11),
        (AppProtocol::Http11, Version::HTTP_11),
        (AppProtocol::Http2, Version::HTTP_2),
        (AppProtocol::Grpc, Version::HTTP_2),
    ] {
        let mesh = mesh(protocol);
        let destination = SocketAddr::from(([10, 96, 0, 1], PORT));
        let callout = MeshCallout::new(Arc::clone(&mesh.worker), Arc::clone(&mesh.site), destination);
        for (host, namespace, port, expected) in [
            (HOST, None, PORT, Some(version)),
            (HOST, Some("shop"), PORT, Some(version)),
            (HOST, Some("other"), PORT, None),
            (HOST, None, PORT + 1, None),
            ("other.example", None, PORT, None),
            ("127.0.0.1", None, PORT, None),
        ] {
            assert_eq!(callout.version(host, namespace, port), expected, "{host} {namespace:?} {port}");
        }
    }
}

#[tokio::test]
async fn an_address_outside_the_mesh_is_asked_plainly() {
    let upstream = Upstream::telling().await;
    let mesh = Mesh::new(Plan::to_all(&[]));
    let asked = CalloutRequest { port: upstream.address.port(), ..request("127.0.0.1", false) };
    assert_eq!(ask_mesh(&mesh, asked).await.unwrap().response.status(), StatusCode::OK);
}

#[tokio::test]
async fn what_ends_without_an_answer_says_why() {
    let long = Upstream::start(|_| async { Response::new(full("long".repeat(500))) }.boxed()).await;
    let silent = Upstream::start(|_| futures_util::future::pending().boxed()).await;
    let halting = Upstream::start(|_| {
        let first = futures_util::stream::iter([Ok(Frame::data(Bytes::from_static(b"half")))]);
        let body =
            StreamBody::new(futures_util::StreamExt::chain(first, futures_util::stream::pending())).boxed();
        async { Response::new(body) }.boxed()
    })
    .await;
    let (none, gone) = (Mesh::new(Plan::to_all(&[])), Mesh::new(Plan::to(closed_port().await)));
    let quick = CalloutRequest { timeout: Duration::from_millis(50), ..request(HOST, false) };
    let elsewhere = CalloutRequest { namespace: Some("other".into()), ..request(HOST, false) };
    let no_port = CalloutRequest { port: 81, ..request(HOST, false) };
    for (name, mesh, asked, expected) in [
        (
            "unknown",
            &none,
            request("other.example", false),
            CalloutError::UnknownService("other.example:80".to_owned()),
        ),
        ("another namespace's", &none, elsewhere, CalloutError::UnknownService(format!("{HOST}:80"))),
        ("unknown port", &none, no_port, CalloutError::UnknownService(format!("{HOST}:81"))),
        ("no endpoint", &none, request(HOST, false), CalloutError::NoEndpoint(HOST.to_owned())),
        (
            "nobody listens",
            &gone,
            request(HOST, true),
            CalloutError::Unreachable(
                "the endpoint cannot be reached: delayed connect error: Connection refused".to_owned(),
            ),
        ),
        ("too long", &Mesh::new(Plan::to(long.address)), request(HOST, false), CalloutError::TooLong(1000)),
        (
            "too late",
            &Mesh::new(Plan::to(silent.address)),
            quick,
            CalloutError::Timeout(Duration::from_millis(50)),
        ),
        (
            "half of it in time",
            &Mesh::new(Plan::to(halting.address)),
            CalloutRequest { timeout: Duration::from_secs(2), ..request(HOST, false) },
            CalloutError::BrokenOff("not whole within 2s".to_owned()),
        ),
    ] {
        assert_eq!(ask_mesh(mesh, asked).await.unwrap_err(), expected, "{name}");
    }
}

#[tokio::test]
async fn a_connection_that_was_closed_while_kept_is_replaced() {
    let upstream = Upstream::start(|_| {
        async { Response::builder().header("connection", "close").body(full("once")).unwrap() }.boxed()
    })
    .await;
    let settings = WorkerSettings::default();
    let mesh = Mesh::new(Plan { settings, ..Plan::to(upstream.address) });
    for _ in 0..3 {
        let answer = ask_mesh(&mesh, request(HOST, false)).await.unwrap();
        assert_eq!(&**answer.response.body(), b"once");
    }
}
