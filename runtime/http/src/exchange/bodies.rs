//! Exchanges whose filters look at bodies: what client, upstream and record see of what filters do.

use super::harness::{Body, Mesh, Plan, Scripted, Upstream, closed_port, full, get, text_of};
use crate::WorkerSettings;
use bytes::Bytes;
use cairn_filter::{Factory, Hold, LocalReply, Part, Piece, Side, Verdict};
use cairn_mesh::AppProtocol;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

fn scripted(filters: impl IntoIterator<Item = Scripted>) -> Vec<Arc<dyn Factory>> {
    filters.into_iter().map(|filter| Arc::new(filter) as Arc<dyn Factory>).collect()
}

/// Holds a body of this side to its end and puts it in brackets.
fn bracket(side: Side) -> impl Fn(Part<'_>) -> Verdict + Send + Sync {
    move |part| {
        if part.side != side {
            return Verdict::Continue;
        }
        if !part.chunk.end_of_stream && part.chunk.trailers.is_none() {
            return Verdict::Hold(Hold::default());
        }
        part.chunk.bytes = [b"[", &part.chunk.bytes[..], b"]"].concat().into();
        part.chunk.is_changed = true;
        Verdict::Continue
    }
}

/// Marks each piece that passes.
fn mark(part: Part<'_>) -> Verdict {
    if !part.chunk.bytes.is_empty() {
        let letter = if part.side == Side::Request { b"q" } else { b"r" };
        part.chunk.bytes = [&part.chunk.bytes[..], letter].concat().into();
        part.chunk.is_changed = true;
    }
    Verdict::Continue
}

fn post(body: Body) -> Request<Body> {
    let mut request = get("http://cart/x");
    *request.method_mut() = Method::POST;
    *request.body_mut() = body;
    request
}

/// A body of unknown length whose pieces are sent through a channel.
fn streamed() -> (mpsc::UnboundedSender<Frame<Bytes>>, Body) {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let frames = futures_util::stream::poll_fn(move |cx| {
        receiver.poll_recv(cx).map(|frame| frame.map(Ok::<_, hyper::Error>))
    });
    (sender, StreamBody::new(frames).boxed())
}

fn data(text: &'static str) -> Frame<Bytes> {
    Frame::data(Bytes::from_static(text.as_bytes()))
}

async fn send(mesh: &Mesh, http2: bool, request: Request<Body>) -> Result<Response<Incoming>, hyper::Error> {
    if http2 {
        mesh.http2().await.send_request(request).await
    } else {
        mesh.http1().await.send_request(request).await
    }
}

/// An upstream that echoes, with the length where it is known, for clients of both versions.
async fn echo() -> Upstream {
    Upstream::start(|request| {
        Box::pin(async move {
            let length = request.headers().get("content-length").cloned();
            let mut response = Response::new(request.into_body().boxed());
            if let Some(length) = length {
                response.headers_mut().insert("content-length", length.clone());
                response.headers_mut().insert("x-request-length", length);
            }
            response
        })
    })
    .await
}

async fn plan(filters: impl IntoIterator<Item = Scripted>) -> (Upstream, Plan) {
    let upstream = echo().await;
    let plan = Plan { filters: scripted(filters), ..Plan::to(upstream.address) };
    (upstream, plan)
}

#[tokio::test]
async fn a_body_that_is_replaced_has_the_length_that_its_head_says() {
    for http2 in [false, true] {
        for (side, request_length) in [(Side::Request, "6"), (Side::Response, "4")] {
            let (_upstream, plan) = plan([Scripted::new("b").on_body(bracket(side))]).await;
            let mesh = Mesh::new(plan);
            let (head, text) = text_of(send(&mesh, http2, post(full("body"))).await.unwrap()).await;
            assert_eq!(text, "[body]", "{side:?}");
            assert_eq!(
                (&head.headers["x-request-length"], &head.headers["content-length"]),
                (&HeaderValue::from_static(request_length), &HeaderValue::from_static("6")),
                "{side:?}"
            );
            assert_eq!(mesh.last().flags, "-");
        }
    }
}

#[tokio::test]
async fn filters_see_bodies_in_their_order_and_pass_them_piece_by_piece() {
    for http2 in [false, true] {
        let brackets = Scripted::new("brackets").on_body(bracket(Side::Request));
        let (_upstream, plan) = plan([Scripted::new("mark").on_body(mark), brackets]).await;
        let mesh = Mesh::new(plan);
        let (sender, body) = streamed();
        let response = tokio::spawn(send_owned(mesh, http2, post(body)));
        for text in ["1", "2", "3"] {
            sender.send(data(text)).unwrap();
            tokio::task::yield_now().await;
        }
        drop(sender);
        let (head, text) = response.await.unwrap();
        // How the client's pieces are cut is up to the connection.
        let unmarked: String = text.chars().filter(|c| !matches!(c, 'q' | 'r')).collect();
        assert_eq!(unmarked, "[123]", "{text}");
        assert!(
            text.contains("q]") && text.ends_with('r') && !head.headers.contains_key("content-length"),
            "{text}"
        );
    }
}

async fn send_owned(mesh: Mesh, http2: bool, request: Request<Body>) -> (http::response::Parts, String) {
    text_of(send(&mesh, http2, request).await.unwrap()).await
}

fn refuse(part: Part<'_>) -> Verdict {
    match part.side {
        Side::Request => Verdict::Reply(Box::new(LocalReply::text(StatusCode::FORBIDDEN, "no", "refused"))),
        Side::Response => Verdict::Continue,
    }
}

#[tokio::test]
async fn an_answer_within_the_request_is_given_whether_the_upstream_has_begun_or_not() {
    for http2 in [false, true] {
        let (upstream, plan) = plan([Scripted::new("r").on_body(refuse)]).await;
        let mesh = Mesh::new(plan);
        let (head, text) = text_of(send(&mesh, http2, post(full("body"))).await.unwrap()).await;
        assert_eq!((head.status.as_u16(), &*text, upstream.connections()), (403, "no", 0));
        assert_eq!((mesh.last().status, &*mesh.last().details), (403, "refused"));

        let (sender, body) = streamed();
        sender.send(data("more to come")).unwrap();
        let (head, text) = text_of(send(&mesh, http2, post(body)).await.unwrap()).await;
        assert_eq!((head.status.as_u16(), &*text), (403, "no"));
        assert_eq!(&*mesh.last().details, "refused");
    }
}

#[tokio::test]
async fn more_than_may_be_held_is_refused() {
    for http2 in [false, true] {
        for (side, status, details) in [
            (Side::Request, 413, "request_payload_too_large"),
            (Side::Response, 500, "response_payload_too_large"),
        ] {
            let (_upstream, plan) = plan([Scripted::new("b").on_body(bracket(side))]).await;
            let settings = WorkerSettings { body_held_max: 50_000, ..WorkerSettings::default() };
            let mesh = Mesh::new(Plan { settings, ..plan });
            let (head, _) = text_of(send(&mesh, http2, post(full("x".repeat(70_000)))).await.unwrap()).await;
            assert_eq!((head.status.as_u16(), &*mesh.last().details), (status, details), "{http2}");
            let (head, _) = text_of(send(&mesh, http2, post(full("x".repeat(50_000)))).await.unwrap()).await;
            assert_eq!(head.status, 200);
        }
    }
}

#[tokio::test]
async fn a_length_that_became_a_lie_ends_the_exchange() {
    for (side, status) in [(Side::Request, 500), (Side::Response, 200)] {
        // The first piece passes as it is, so the head goes with its length; then there is more.
        let lies = Scripted::new("b").on_body(move |part| {
            if part.side == side && part.chunk.end_of_stream {
                part.chunk.bytes = Bytes::from_static(b"more");
            }
            Verdict::Continue
        });
        let (_upstream, plan) = plan([lies]).await;
        let mesh = Mesh::new(plan);
        let response = mesh.http1().await.send_request(post(full("body"))).await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{side:?}");
        let body = response.into_body().collect().await;
        assert!(side == Side::Request || body.is_err() || body.is_ok_and(|body| body.to_bytes() == "body"));
        assert_eq!(&*mesh.last().details, "filter_changed_length_after_head", "{side:?}");
    }
}

fn trailer() -> HeaderMap {
    HeaderMap::from_iter([(http::HeaderName::from_static("x-t"), HeaderValue::from_static("1"))])
}

#[tokio::test]
async fn trailers_pass_and_can_be_added() {
    let adds = |part: Part<'_>| {
        if part.side == Side::Response {
            let mut trailers = part.chunk.trailers.take().unwrap_or_default();
            if part.chunk.end_of_stream || !trailers.is_empty() {
                trailers.insert("x-added", HeaderValue::from_static("1"));
                part.chunk.trailers = Some(trailers);
            }
        }
        Verdict::Continue
    };
    let upstream = Upstream::echo().await;
    let plan = Plan {
        protocol: AppProtocol::Http2,
        filters: scripted([Scripted::new("adds").on_body(adds)]),
        ..Plan::to(upstream.address)
    };
    let mesh = Mesh::new(plan);
    for sends in [false, true] {
        let (sender, body) = streamed();
        sender.send(data("x")).unwrap();
        if sends {
            sender.send(Frame::trailers(trailer())).unwrap();
        }
        drop(sender);
        let response = mesh.http2().await.send_request(post(body)).await.unwrap();
        let collected = response.into_body().collect().await.unwrap();
        let trailers = collected.trailers().unwrap();
        assert_eq!((trailers.contains_key("x-t"), trailers.contains_key("x-added")), (sends, true));
        assert_eq!(collected.to_bytes(), "x");
    }
}

#[tokio::test]
async fn both_bodies_go_on_at_once() {
    let upstream = Upstream::echo().await;
    let plan = Plan {
        protocol: AppProtocol::Http2,
        filters: scripted([Scripted::new("mark").on_body(mark)]),
        ..Plan::to(upstream.address)
    };
    let mesh = Mesh::new(plan);
    let (sender, body) = streamed();
    let mut client = mesh.http2().await;
    let response = client.send_request(post(body)).await.unwrap();
    let mut body = response.into_body();
    for text in ["a", "b", "c"] {
        sender.send(data(text)).unwrap();
        let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(frame, format!("{text}qr"));
    }
    drop(sender);
    assert!(body.collect().await.unwrap().to_bytes().is_empty());
    let record = mesh.last();
    assert_eq!((record.status, record.flags), (200, "-"));
}

/// An upstream that never answers.
async fn silent() -> Upstream {
    Upstream::start(|request| {
        Box::pin(async move {
            let _kept = request;
            std::future::pending().await
        })
    })
    .await
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_exchange_once() {
    for answers in [false, true] {
        let upstream = if answers { Upstream::echo().await } else { silent().await };
        let (seen, mut seeing) = mpsc::unbounded_channel();
        let mut filter = Scripted::new("mark").on_body(move |part| {
            seen.send(part.side).unwrap();
            mark(part)
        });
        let mut finished = filter.finished();
        let mesh = Mesh::new(Plan { filters: scripted([filter]), ..Plan::to(upstream.address) });
        let mut client = mesh.connect();
        let request = b"POST / HTTP/1.1\r\nhost: cart\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n";
        client.write_all(request).await.unwrap();
        let awaited = if answers { Side::Response } else { Side::Request };
        while seeing.recv().await.unwrap() != awaited {}
        drop(client);
        let status = tokio::time::timeout(Duration::from_secs(10), finished.recv()).await.unwrap();
        assert_eq!(status, Some(if answers { 200 } else { 0 }));
        assert_eq!(mesh.last().flags, "DC");
        assert!(finished.try_recv().is_err(), "once");
    }
}

#[tokio::test]
async fn what_has_not_been_sent_is_tried_elsewhere() {
    let upstream = echo().await;
    let filters = || scripted([Scripted::new("mark").on_body(mark)]);
    let endpoints = [closed_port().await, upstream.address];
    let mesh = Mesh::new(Plan { filters: filters(), ..Plan::to_all(&endpoints) });
    for round in 0..20 {
        let (sender, streaming) = streamed();
        sender.send(data("body")).unwrap();
        drop(sender);
        let body = if round % 2 == 0 { full("body") } else { streaming };
        let (head, text) = text_of(send(&mesh, false, post(body)).await.unwrap()).await;
        assert_eq!((head.status.as_u16(), &*text), (200, "bodyqr"));
    }
}

#[tokio::test]
async fn exchanges_without_bodies_are_not_disturbed() {
    let upstream = Upstream::start(|request| {
        Box::pin(async move {
            let status = request.uri().path().trim_start_matches('/').parse().unwrap();
            Response::builder()
                .status(status)
                .header("content-length", "7")
                .body(full(match status {
                    200 => "1234567",
                    _ => "",
                }))
                .unwrap()
        })
    })
    .await;
    let filters = scripted([Scripted::new("b").on_body(bracket(Side::Response))]);
    let mesh = Mesh::new(Plan { filters, ..Plan::to(upstream.address) });
    for (method, path) in [(Method::HEAD, "/200"), (Method::GET, "/304")] {
        let mut request = get(path);
        *request.method_mut() = method.clone();
        let (head, text) = text_of(send(&mesh, false, request).await.unwrap()).await;
        assert_eq!(head.headers.contains_key("content-length"), method == Method::HEAD, "{path}");
        assert_eq!((&*text, mesh.last().flags), ("", "-"));
    }
    let (head, text) = mesh.get("/200").await;
    assert_eq!((&*text, &head.headers["content-length"]), ("[1234567]", &HeaderValue::from_static("9")));
}

#[tokio::test]
async fn an_answer_made_here_passes_the_filters_with_its_body() {
    let filters = [Scripted::new("b").on_body(bracket(Side::Response)), Scripted::replies(403)];
    let (_upstream, plan) = plan(filters).await;
    let mesh = Mesh::new(plan);
    let (head, text) = mesh.get("/").await;
    assert_eq!((head.status.as_u16(), &*text), (403, "[said no]"));
    let mut request = get("/");
    *request.method_mut() = Method::HEAD;
    assert_eq!(mesh.request(request).await.0.status, 403);
}

#[tokio::test]
async fn a_response_can_be_answered_otherwise_while_its_head_is_here() {
    let veto = Scripted::new("veto").on_body(|part| match part.side {
        Side::Request => Verdict::Continue,
        Side::Response => {
            Verdict::Reply(Box::new(LocalReply::text(StatusCode::BAD_GATEWAY, "vetoed", "veto")))
        }
    });
    let (_upstream, plan) = plan([veto]).await;
    let mesh = Mesh::new(plan);
    let (head, text) = text_of(send(&mesh, false, post(full("body"))).await.unwrap()).await;
    assert_eq!((head.status.as_u16(), &*text, &*mesh.last().details), (502, "vetoed", "veto"));

    // Without a length the head is gone.
    let (sender, body) = streamed();
    sender.send(data("body")).unwrap();
    let response = send(&mesh, true, post(body)).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.map(|body| body.to_bytes());
    assert!(status == 200 && body.is_err(), "{status} {body:?}");
    assert_eq!((mesh.last().status, &*mesh.last().details), (200, "filter_reset"));
}

#[tokio::test]
async fn a_held_head_goes_with_what_the_body_decided() {
    let router = Scripted::new("router").on_request(|_| Verdict::Hold(Hold::default())).on_body(|part| {
        let Part { side: Side::Request, head: Some(cairn_filter::HeldHead::Request(head)), chunk } = part
        else {
            return Verdict::Continue;
        };
        if !chunk.end_of_stream {
            return Verdict::Hold(Hold::default());
        }
        head.headers.insert("x-seen", HeaderValue::from_bytes(&chunk.bytes).unwrap());
        Verdict::Continue
    });
    let upstream = Upstream::telling().await;
    let mesh = Mesh::new(Plan { filters: scripted([router]), ..Plan::to(upstream.address) });
    for http2 in [false, true] {
        let (_, text) = text_of(send(&mesh, http2, post(full("model-7"))).await.unwrap()).await;
        assert!(text.contains("x-seen: model-7\n") && text.ends_with("model-7"), "{text}");
    }
}

#[tokio::test]
async fn large_bodies_pass_with_little_in_between() {
    let (_upstream, plan) = plan([Scripted::new("pass").on_body(|_| Verdict::Continue)]).await;
    let mesh = Mesh::new(plan);
    let large = "0123456789abcdef".repeat(1 << 18);
    for http2 in [false, true] {
        let (_, text) = text_of(send(&mesh, http2, post(full(large.clone()))).await.unwrap()).await;
        assert!(text == large, "{} bytes", text.len());
        let (sender, body) = streamed();
        for part in large.as_bytes().chunks(100_000) {
            sender.send(Frame::data(Bytes::copy_from_slice(part))).unwrap();
        }
        drop(sender);
        let (_, text) = text_of(send(&mesh, http2, post(body)).await.unwrap()).await;
        assert!(text == large, "{} bytes", text.len());
    }
}

#[test]
fn the_end_of_a_body_is_no_frame() {
    assert!(crate::body::frame_of(Piece::end()).is_none());
}
