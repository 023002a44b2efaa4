//! Exchanges from end to end: what client, upstream and record see.

use super::harness::{Body, HOST, Mesh, Plan, Scripted, Upstream, closed_port, full, get, text_of};
use crate::WorkerSettings;
use bytes::Bytes;
use cairn_filter::{Factory, Verdict};
use cairn_mesh::{
    AppProtocol, Backend, BackendKind, HttpRoute, ParentRef, PathRule, Redirect, ResourceName, RouteFilter,
    RouteForm, RouteMatch, RouteRule,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

fn route(rules: Vec<RouteRule>) -> Vec<Arc<HttpRoute>> {
    let parents = vec![ParentRef { service: ResourceName::new("shop", "cart"), port: None }];
    vec![Arc::new(HttpRoute {
        form: RouteForm::HttpRoute,
        name: ResourceName::new("shop", "r"),
        created: "".into(),
        parents,
        rules,
    })]
}

fn rule(prefix: &str, backend: &str) -> RouteRule {
    let path = PathRule::Prefix(prefix.into());
    let matches =
        vec![RouteMatch { path, headers: Vec::new(), claims: Vec::new(), query: Vec::new(), method: None }];
    let kind = BackendKind::Service { service: ResourceName::new("shop", backend), port: 80 };
    let backends = vec![Backend { kind, weight: 1, filters: Vec::new() }];
    RouteRule { name: None, matches, filters: Vec::new(), backends, broken: None }
}

fn scripted(filters: impl IntoIterator<Item = Scripted>) -> Vec<Arc<dyn Factory>> {
    filters.into_iter().map(|filter| Arc::new(filter) as Arc<dyn Factory>).collect()
}

fn set(name: &'static str, value: &'static str) -> impl Fn(&mut HeaderMap) -> Verdict + Send + Sync {
    move |headers| {
        headers.append(name, HeaderValue::from_static(value));
        Verdict::Continue
    }
}

#[tokio::test]
async fn a_request_reaches_the_upstream_and_its_answer_the_client() {
    let upstream = Upstream::telling().await;
    let mesh = Mesh::new(Plan::to(upstream.address));
    let request = Request::builder()
        .uri("/a/../b%41?q=%2F")
        .header("host", "cart:80")
        .header("connection", "x-secret, keep-alive")
        .header("x-secret", "1")
        .header("x-forwarded-client-cert", "By=me")
        .header("te", "gzip")
        .header("user-agent", "test")
        .body(full(""))
        .unwrap();
    let (head, text) = mesh.request(request).await;
    assert_eq!(head.status, 200);
    assert_eq!(head.headers["server"], "istio-envoy");
    assert_eq!(head.headers["x-end"], "2");
    assert!(head.headers.contains_key("x-envoy-upstream-service-time"));
    assert!(!head.headers.contains_key("x-hop"));

    assert!(text.starts_with("GET /bA?q=%2F HTTP/1.1\n"), "{text}");
    assert!(text.contains("host: cart:80\n") && text.contains("x-forwarded-proto: http\n"), "{text}");
    for absent in ["x-secret", "x-forwarded-client-cert", "te:", "connection", "x-forwarded-for"] {
        assert!(!text.contains(absent), "{absent} in {text}");
    }
    let id = text.lines().find_map(|line| line.strip_prefix("x-request-id: ")).unwrap();
    assert_eq!((id.len(), id.as_bytes()[14]), (36, b'4'), "{id}");

    let record = mesh.last();
    assert_eq!(record.request_id, id);
    assert_eq!((record.status, record.flags, &*record.details), (200, "-", "via_upstream"));
    assert_eq!((&*record.method, &*record.path, &*record.authority), ("GET", "/bA?q=%2F", "cart:80"));
    assert_eq!((&*record.route, &*record.cluster), ("default", &*format!("inbound-vip|80|http|{HOST}")));
    assert_eq!(record.upstream, Some(upstream.address));
    assert_eq!(&*record.upstream_workload.unwrap().name, "cart-0");
    assert_eq!(record.source_identity.unwrap().service_account(), "web");
    let metrics = mesh.telemetry.metrics.encode();
    let counted = metrics.lines().find(|line| line.starts_with("istio_requests_total{")).unwrap();
    assert!(counted.ends_with(" 1") && counted.contains("response_code=\"200\""), "{counted}");
}

#[tokio::test]
async fn request_ids_are_kept_and_hosts_are_required() {
    let upstream = Upstream::telling().await;
    let mesh = Mesh::new(Plan::to(upstream.address));
    let mut request = get("/");
    request.headers_mut().insert("x-request-id", HeaderValue::from_static("mine"));
    assert!(mesh.request(request).await.1.contains("x-request-id: mine\n"));

    let mut request = get("/");
    request.headers_mut().remove("host");
    assert_eq!(mesh.request(request).await.0.status, 400);
    assert_eq!(mesh.get("/a%00").await.0.status, 400);
    assert_eq!(mesh.last().details, "path_normalization_failed");
}

#[tokio::test]
async fn bytes_that_are_no_request_are_told_so_whatever_comes_behind_them() {
    let mesh = Mesh::new(Plan::to(Upstream::telling().await.address));
    for behind in ["", "content-length: 4\r\n\r\nbody", "\r\nGET / HTTP/1.1\r\n\r\n"] {
        let mut client = mesh.connect();
        client.write_all(format!("GET /< HTTP/1.1\r\nhost: cart\r\n{behind}").as_bytes()).await.unwrap();
        if behind.is_empty() {
            client.write_all(b"\r\n").await.unwrap();
        }
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{behind:?}: {answer:?}");
    }
}

#[tokio::test]
async fn filters_see_requests_in_order_and_responses_in_reverse() {
    let upstream = Upstream::telling().await;
    let of = |name: &'static str| {
        let (request, response) = (set("x-order", name), set("x-back", name));
        Scripted::new(name)
            .on_request(move |head| request(&mut head.headers))
            .on_response(move |head| response(&mut head.headers))
    };
    let plan = Plan { filters: scripted([of("one"), of("two")]), ..Plan::to(upstream.address) };
    let mesh = Mesh::new(plan);
    let (head, text) = mesh.get("/").await;
    assert!(text.contains("x-order: one\nx-order: two\n"), "{text}");
    let back: Vec<&HeaderValue> = head.headers.get_all("x-back").iter().collect();
    assert_eq!(back, ["two", "one"]);
    let notes: Vec<String> = mesh.last().notes.iter().map(|(name, text)| format!("{name} {text}")).collect();
    assert_eq!(notes, ["one request", "two request", "two response", "one response"]);
}

#[tokio::test]
async fn a_filter_that_waits_is_asked_again() {
    let upstream = Upstream::telling().await;
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let waiter = Scripted::new("waiter").on_request(move |_| {
        if count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0 {
            return Verdict::Wait(Box::pin(tokio::task::yield_now()));
        }
        Verdict::Continue
    });
    let mesh = Mesh::new(Plan { filters: scripted([waiter]), ..Plan::to(upstream.address) });
    assert_eq!(mesh.get("/").await.0.status, 200);
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_local_reply_passes_the_filters_before_it() {
    let upstream = Upstream::telling().await;
    let before = set("x-before", "1");
    let first = Scripted::new("first").on_response(move |head| before(&mut head.headers));
    let plan = Plan { filters: scripted([first, Scripted::replies(403)]), ..Plan::to(upstream.address) };
    let mesh = Mesh::new(plan);
    let (head, text) = mesh.get("/").await;
    assert_eq!((head.status.as_u16(), &*text), (403, "said no"));
    assert_eq!(head.headers["x-before"], "1");
    assert_eq!(head.headers["content-type"], "text/plain");
    let record = mesh.last();
    assert_eq!((record.status, &*record.details, record.upstream), (403, "scripted", None));
    assert_eq!(upstream.connections(), 0);

    let mut request = get("/");
    *request.method_mut() = Method::HEAD;
    assert_eq!(mesh.request(request).await.0.status, 403);
    assert_eq!(mesh.last().flags, "-");
}

#[tokio::test]
async fn a_local_reply_to_grpc_is_a_status() {
    let upstream = Upstream::telling().await;
    let plan = Plan { filters: scripted([Scripted::replies(403)]), ..Plan::to(upstream.address) };
    let mesh = Mesh::new(plan);
    let mut request = Request::new(full(""));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = "http://cart/pkg.Service/Call".parse().unwrap();
    request.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc+proto"));
    let (head, text) = text_of(mesh.http2().await.send_request(request).await.unwrap()).await;
    assert_eq!((head.status.as_u16(), &*text), (200, ""));
    assert_eq!(head.headers["grpc-status"], "7");
    assert_eq!(head.headers["grpc-message"], "said no");
    assert_eq!(mesh.last().grpc_status, Some(7));
}

#[tokio::test]
async fn a_reply_in_the_response_phase_replaces_the_answer() {
    let upstream = Upstream::telling().await;
    let filter = Scripted::new("veto").on_response(|_| {
        let reply = cairn_filter::LocalReply::text(http::StatusCode::BAD_GATEWAY, "vetoed", "veto");
        Verdict::Reply(Box::new(reply))
    });
    let mesh = Mesh::new(Plan { filters: scripted([filter]), ..Plan::to(upstream.address) });
    let (head, text) = mesh.get("/").await;
    assert_eq!((head.status.as_u16(), &*text, &*mesh.last().details), (502, "vetoed", "veto"));
}

#[tokio::test]
async fn a_reset_closes_without_an_answer() {
    let upstream = Upstream::telling().await;
    let filter = Scripted::new("reset").on_request(|_| Verdict::Reset);
    let mesh = Mesh::new(Plan { filters: scripted([filter]), ..Plan::to(upstream.address) });
    assert!(mesh.http1().await.send_request(get("/")).await.is_err());
    assert_eq!((mesh.last().status, &*mesh.last().details), (0, "filter_reset"));
}

#[tokio::test]
async fn what_cannot_be_routed_is_answered_after_authorization() {
    let upstream = Upstream::telling().await;
    let mut broken = rule("/broken", "cart");
    broken.broken = Some("no such filter".into());
    let mut empty = rule("/empty", "cart");
    empty.backends.clear();
    let rules = vec![rule("/ok", "cart"), broken, empty, rule("/missing", "nowhere")];
    let mesh = Mesh::new(Plan { routes: route(rules.clone()), ..Plan::to(upstream.address) });
    for (path, status, flags, details, route) in [
        ("/ok/x", 200, "-", "via_upstream", "shop/r/0"),
        ("/none", 404, "NR", "route_not_found", ""),
        ("/broken", 500, "-", "route_not_usable", "shop/r/1"),
        ("/empty", 500, "NC", "backend_not_usable", "shop/r/2"),
        ("/missing", 500, "NC", "backend_not_usable", "shop/r/3"),
    ] {
        assert_eq!(mesh.get(path).await.0.status, status, "{path}");
        let record = mesh.last();
        let found = (record.status, record.flags, &*record.details, &*record.route);
        assert_eq!(found, (status, flags, details, route), "{path}");
    }
    let plan = Plan {
        routes: route(rules),
        filters: scripted([Scripted::replies(403)]),
        ..Plan::to(upstream.address)
    };
    assert_eq!(Mesh::new(plan).get("/none").await.0.status, 403);
}

#[tokio::test]
async fn a_filter_that_changes_the_path_changes_the_route() {
    let upstream = Upstream::telling().await;
    let filter = Scripted::new("mover").on_request(|head| {
        head.path = "/ok".parse().unwrap();
        Verdict::Continue
    });
    let plan = Plan {
        routes: route(vec![rule("/ok", "cart")]),
        filters: scripted([filter]),
        ..Plan::to(upstream.address)
    };
    let mesh = Mesh::new(plan);
    let (head, text) = mesh.get("/none").await;
    assert_eq!(head.status, 200);
    assert!(text.starts_with("GET /ok "), "{text}");
    assert_eq!(mesh.last().route, "shop/r/0");
}

#[tokio::test]
async fn a_redirect_is_answered_here() {
    let upstream = Upstream::telling().await;
    let mut moved = rule("/old", "cart");
    moved.backends.clear();
    let hostname = Some("new.example".into());
    let redirect = Redirect { scheme: None, hostname, path: None, port: None, status: 301 };
    moved.filters = vec![RouteFilter::Redirect(redirect)];
    let mesh = Mesh::new(Plan { routes: route(vec![moved]), ..Plan::to(upstream.address) });
    let (head, _) = mesh.get("/old/x?q=1").await;
    assert_eq!(head.status, 301);
    assert_eq!(head.headers["location"], "http://new.example/old/x?q=1");
}

#[tokio::test]
async fn an_upstream_that_fails_is_named_by_its_flag() {
    let cut = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cutting = cut.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = cut.accept().await.unwrap();
            let mut read = [0; 1024];
            let _ = stream.read(&mut read).await;
        }
    });
    for (name, endpoints, flags, details) in [
        ("no endpoint", vec![], "UH", "no_healthy_upstream"),
        (
            "nobody listens",
            vec![closed_port().await],
            "URX,UF",
            "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}",
        ),
        (
            "closed before the answer",
            vec![cutting],
            "UC",
            "upstream_reset_before_response_started{connection_termination}",
        ),
    ] {
        let mesh = Mesh::new(Plan::to_all(&endpoints));
        assert_eq!(mesh.get("/").await.0.status, 503, "{name}");
        let record = mesh.last();
        assert_eq!((record.flags, &*record.details), (flags, details), "{name}");
    }
}

#[tokio::test]
async fn an_answer_cut_short_is_recorded() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut read = [0; 1024];
        let _ = stream.read(&mut read).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await.unwrap();
    });
    let mut filter = Scripted::new("watcher");
    let mut finished = filter.finished();
    let mesh = Mesh::new(Plan { filters: scripted([filter]), ..Plan::to(address) });
    let response = mesh.http1().await.send_request(get("/")).await.unwrap();
    assert!(response.into_body().collect().await.is_err());
    assert_eq!(finished.recv().await, Some(200));
    let record = mesh.last();
    assert_eq!((record.status, record.flags), (200, "UPE"));
}

#[tokio::test]
async fn a_connect_failure_is_tried_elsewhere() {
    let upstream = Upstream::echo().await;
    let mesh = Mesh::new(Plan::to_all(&[closed_port().await, upstream.address]));
    let mut sender = mesh.http1().await;
    for round in 0..30 {
        let mut request = get("/");
        *request.method_mut() = Method::POST;
        *request.body_mut() = full(format!("round {round}"));
        sender.ready().await.unwrap();
        let (head, text) = text_of(sender.send_request(request).await.unwrap()).await;
        assert_eq!((head.status.as_u16(), text), (200, format!("round {round}")));
    }
}

#[tokio::test]
async fn connections_are_used_again() {
    let upstream = Upstream::telling().await;
    let mesh = Mesh::new(Plan::to(upstream.address));
    let mut sender = mesh.http1().await;
    for _ in 0..10 {
        sender.ready().await.unwrap();
        assert_eq!(text_of(sender.send_request(get("/")).await.unwrap()).await.0.status, 200);
    }
    assert_eq!(mesh.get("/").await.0.status, 200);
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_costs_no_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            // One answer per connection, which then closes without having said that it would.
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut read = [0; 4096];
            let _ = stream.read(&mut read).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        }
    });
    let mesh = Mesh::new(Plan::to(address));
    for _ in 0..5 {
        assert_eq!(mesh.get("/").await.1, "ok");
        // Let the close arrive; a request sent before it does cannot be told from one that was worked on.
        let host = mesh.worker.hosts.host(address, None);
        while let Some(kept) = host.take_idle() {
            host.put_idle(kept, 1);
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn http2_reaches_http2_with_trailers() {
    let upstream = Upstream::start(|request| {
        Box::pin(async move {
            assert_eq!(request.version(), Version::HTTP_2);
            assert_eq!(request.headers()["te"], "trailers");
            assert_eq!(request.uri().authority().unwrap(), "cart");
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("5"));
            let frames = [Ok(Frame::data(Bytes::from_static(b"message"))), Ok(Frame::trailers(trailers))];
            Response::new(StreamBody::new(futures_util::stream::iter(frames)).boxed())
        })
    })
    .await;
    let plan = Plan { protocol: AppProtocol::Grpc, ..Plan::to(upstream.address) };
    let mesh = Mesh::new(plan);
    let mut sender = mesh.http2().await;
    for _ in 0..3 {
        let request = Request::builder()
            .method("POST")
            .uri("http://cart/pkg.Service/Call")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(full("ask"))
            .unwrap();
        let collected = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap();
        assert_eq!(collected.trailers().unwrap()["grpc-status"], "5");
        assert_eq!(collected.to_bytes(), "message");
    }
    assert_eq!(upstream.connections(), 1);
    let record = mesh.last();
    assert_eq!((record.protocol, record.status, record.grpc_status), ("HTTP/2", 200, Some(5)));
    let metrics = mesh.telemetry.metrics.encode();
    let counted = metrics.lines().find(|line| line.starts_with("istio_requests_total{")).unwrap();
    assert!(counted.contains("request_protocol=\"grpc\"") && counted.contains("grpc_response_status=\"5\""));
}

#[tokio::test]
async fn undeclared_ports_speak_what_the_client_speaks() {
    let upstream = Upstream::telling().await;
    let mesh = Mesh::new(Plan { protocol: AppProtocol::Unknown, ..Plan::to(upstream.address) });
    let (_, text) = mesh.get("/").await;
    assert!(text.contains("HTTP/1.1"), "{text}");
    let request = Request::builder().uri("http://cart/").body(full("")).unwrap();
    let (_, text) = text_of(mesh.http2().await.send_request(request).await.unwrap()).await;
    assert!(text.contains("HTTP/2.0"), "{text}");
}

/// 10 MiB in pieces of 16 KiB.
fn much() -> Body {
    let piece = Bytes::from(vec![7; 16 << 10]);
    let frames = (0..640).map(move |_| Ok(Frame::data(piece.clone())));
    StreamBody::new(futures_util::stream::iter(frames)).boxed()
}

#[tokio::test]
async fn bodies_stream_both_ways_at_once() {
    let upstream = Upstream::echo().await;
    for (name, protocol, http2) in
        [("http/1.1", AppProtocol::Http11, false), ("http/2", AppProtocol::Http2, true)]
    {
        let mesh = Mesh::new(Plan { protocol, ..Plan::to(upstream.address) });
        let uri = if http2 { "http://cart/" } else { "/" };
        let mut builder = Request::builder().method("POST").uri(uri);
        if !http2 {
            builder = builder.header("host", "cart");
        }
        let request = builder.body(much()).unwrap();
        let response = if http2 {
            mesh.http2().await.send_request(request).await.unwrap()
        } else {
            mesh.http1().await.send_request(request).await.unwrap()
        };
        let mut body = response.into_body();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            length +=
                frame.unwrap().data_ref().map_or(0, |data| data.iter().filter(|byte| **byte == 7).count());
        }
        assert_eq!(length, 10 << 20, "{name}");
        let metrics = mesh.telemetry.metrics.encode();
        let sum = |family: &str| {
            let line = metrics.lines().find(|line| line.starts_with(&format!("{family}_sum"))).unwrap();
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        for family in ["istio_request_bytes", "istio_response_bytes"] {
            assert!(sum(family) > f64::from(10 << 20), "{name}: {family} {}", sum(family));
        }
    }
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_exchange_once() {
    let upstream =
        Upstream::start(|_| Box::pin(async { std::future::pending::<Response<Body>>().await })).await;
    let mut filter = Scripted::new("watcher");
    let mut finished = filter.finished();
    let mesh = Mesh::new(Plan { filters: scripted([filter]), ..Plan::to(upstream.address) });
    let mut stream = mesh.connect();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: cart\r\n\r\n").await.unwrap();
    while upstream.connections() == 0 {
        tokio::task::yield_now().await;
    }
    drop(stream);
    assert_eq!(finished.recv().await, Some(0));
    while mesh.telemetry.exchanges.list().is_empty() {
        tokio::task::yield_now().await;
    }
    let record = mesh.last();
    assert_eq!((record.status, record.flags, &*record.details), (0, "DC", "downstream_remote_disconnect"));
    assert!(finished.try_recv().is_err(), "finished once");
}

#[tokio::test]
async fn a_client_that_expects_100_gets_it() {
    let upstream = Upstream::echo().await;
    let mesh = Mesh::new(Plan::to(upstream.address));
    let mut stream = mesh.connect();
    let head = b"POST / HTTP/1.1\r\nhost: cart\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"body").await.unwrap();
    let text = read_until(&mut stream, "\r\n\r\nbody").await;
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
}

async fn read_until(stream: &mut (impl tokio::io::AsyncRead + Unpin), end: &str) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with(end) && stream.read(&mut byte).await.unwrap() == 1 {
        text.push(char::from(byte[0]));
    }
    text
}

#[tokio::test]
async fn http10_is_served_and_closed() {
    let upstream = Upstream::telling().await;
    let mesh = Mesh::new(Plan::to(upstream.address));
    let mut stream = mesh.connect();
    stream.write_all(b"GET /old HTTP/1.0\r\nhost: cart\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.0 200 OK\r\n") && text.contains("GET /old HTTP/1.1"), "{text}");
    assert_eq!(mesh.last().protocol, "HTTP/1.0");
}

#[tokio::test]
async fn a_websocket_passes_and_other_upgrades_do_not() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = read_until(&mut stream, "\r\n\r\n").await;
        assert!(
            head.contains("upgrade: websocket\r\n") && head.contains("connection: upgrade\r\n"),
            "{head}"
        );
        let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let mut ping = [0; 4];
        stream.read_exact(&mut ping).await.unwrap();
        stream.write_all(b"pong!").await.unwrap();
    });
    let mut filter = Scripted::new("watcher");
    let mut finished = filter.finished();
    let mesh = Mesh::new(Plan { filters: scripted([filter]), ..Plan::to(address) });
    let mut stream = mesh.connect();
    let ask = "GET /ws HTTP/1.1\r\nhost: cart\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: websocket\r\n"), "{head}");
    stream.write_all(b"ping").await.unwrap();
    let mut pong = [0; 5];
    stream.read_exact(&mut pong).await.unwrap();
    assert_eq!(&pong, b"pong!");
    drop(stream);
    assert_eq!(finished.recv().await, Some(101));

    for (name, ask) in [
        ("another protocol", "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: tls/1.0\r\n\r\n"),
        ("connect", "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n"),
    ] {
        let mut stream = mesh.connect();
        stream.write_all(ask.as_bytes()).await.unwrap();
        let head = read_until(&mut stream, "\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 403 "), "{name}: {head}");
    }
}

/// An upstream that speaks first, then echoes until the client is done.
async fn greeter() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"hello").await.unwrap();
            let mut said = Vec::new();
            stream.read_to_end(&mut said).await.unwrap();
            stream.write_all(&said).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn other_protocols_are_copied() {
    let address = greeter().await;
    for (name, protocol, said) in [
        ("declared", AppProtocol::Tcp, &b"GET / HTTP/1.1\r\n\r\n"[..]),
        ("declared as TLS", AppProtocol::Tls, b"\x16\x03\x01"),
        ("sniffed", AppProtocol::Unknown, b"\x00\x00\x00\x08"),
    ] {
        let mesh = Mesh::new(Plan { protocol, ..Plan::to(address) });
        let mut stream = mesh.connect();
        stream.write_all(said).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut text = Vec::new();
        stream.read_to_end(&mut text).await.unwrap();
        assert_eq!(text, [b"hello", said].concat(), "{name}");
        while mesh.telemetry.connections.list().is_empty() {
            tokio::task::yield_now().await;
        }
        let record = mesh.telemetry.connections.list().remove(0);
        assert_eq!(
            (record.bytes_received, record.bytes_sent),
            (said.len() as u64, said.len() as u64 + 5),
            "{name}"
        );
        assert_eq!((&*record.error, record.destination), ("", Some(address)), "{name}");
        let metrics = mesh.telemetry.metrics.encode();
        for expected in ["istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"] {
            let line = metrics.lines().find(|line| line.starts_with(expected)).unwrap();
            assert!(line.contains("reporter=\"waypoint\"") && line.ends_with(" 1"), "{name}: {line}");
        }
    }
}

#[tokio::test]
async fn a_silent_client_is_connected_to_a_server_that_speaks_first() {
    let settings = WorkerSettings { sniff_wait: Duration::from_millis(5), ..WorkerSettings::default() };
    let plan = Plan { protocol: AppProtocol::Unknown, settings, ..Plan::to(greeter().await) };
    let mesh = Mesh::new(plan);
    let mut stream = mesh.connect();
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).await.unwrap();
    assert_eq!(&hello, b"hello");
}

#[tokio::test]
async fn a_connection_that_cannot_be_copied_is_counted_as_failed() {
    let plan = Plan { protocol: AppProtocol::Tcp, ..Plan::to(closed_port().await) };
    let mesh = Mesh::new(plan);
    let mut stream = mesh.connect();
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await.unwrap();
    assert!(text.is_empty());
    let metrics = mesh.telemetry.metrics.encode();
    let line = metrics.lines().find(|line| line.starts_with("istio_tcp_connections_failed_total")).unwrap();
    assert!(line.contains("response_flags=\"UF\"") && line.ends_with(" 1"), "{line}");
    assert_eq!(
        mesh.telemetry.connections.list()[0].error,
        "the endpoint cannot be reached: delayed connect error: Connection refused"
    );
}

#[tokio::test]
async fn a_drain_finishes_what_is_in_progress_and_closes() {
    let (started, mut starts) = tokio::sync::mpsc::unbounded_channel();
    let release = Arc::new(tokio::sync::Notify::new());
    let of_upstream = Arc::clone(&release);
    let upstream = Upstream::start(move |_| {
        started.send(()).unwrap();
        let release = Arc::clone(&of_upstream);
        Box::pin(async move {
            release.notified().await;
            Response::new(full("late"))
        })
    })
    .await;
    let mesh = Mesh::new(Plan::to(upstream.address));
    let mut idle = mesh.connect();
    let mut busy = mesh.http1().await;
    let answer = tokio::spawn(async move { text_of(busy.send_request(get("/")).await.unwrap()).await.1 });
    starts.recv().await.unwrap();
    mesh.trigger.start();
    release.notify_one();
    assert_eq!(answer.await.unwrap(), "late");
    assert_eq!(idle.read(&mut [0]).await.unwrap(), 0, "closed by us");
    assert!(mesh.trigger.finished(Duration::from_secs(5)).await);
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_work_is_closed() {
    let settings = WorkerSettings { downstream_idle: Duration::from_secs(60), ..WorkerSettings::default() };
    let upstream = closed_port().await;
    let mesh =
        Mesh::new(Plan { settings, filters: scripted([Scripted::replies(204)]), ..Plan::to(upstream) });
    let mut stream = mesh.connect();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: cart\r\n\r\n").await.unwrap();
    let began = tokio::time::Instant::now();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 204 "), "{text}");
    let idled = began.elapsed().as_secs();
    assert!((60..=120).contains(&idled), "{idled}");
}
