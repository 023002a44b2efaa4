//! What a guest is told of its gRPC calls, however they end: single ones and streams, of a service that does what it likes, in
//! stock Envoy and here.

use crate::ask::{Ask, Version};
use crate::client;
use crate::envoy::Envoy;
use crate::module::Module;
use crate::ours::Ours;
use crate::run::Logged;
use crate::upstream::{SERVICES, Upstream};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Empty, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::future::pending;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// What the service does.
#[derive(Clone, Copy)]
struct Answer {
    name: &'static str,
    status: u16,
    /// In the head, where there is nothing more.
    head: &'static [(&'static str, &'static str)],
    body: &'static [&'static [u8]],
    ends: Ends,
}

/// How an answer ends.
#[derive(Clone, Copy)]
enum Ends {
    /// With these trailers.
    Trailers(&'static [(&'static str, &'static str)]),
    /// Without.
    Plainly,
    /// The stream is reset.
    Reset,
    /// Never.
    Never,
    /// Before it began: the stream is reset.
    Refused,
    /// Before it began, and never.
    Silent,
}
use Ends::{Never, Plainly, Refused, Reset, Silent, Trailers};

const fn answer(name: &'static str, body: &'static [&'static [u8]], ends: Ends) -> Answer {
    Answer { name, status: 200, head: &[], body, ends }
}

const fn http(name: &'static str, status: u16) -> Answer {
    Answer { name, status, head: &[], body: &[b"no"], ends: Plainly }
}

const fn only(name: &'static str, status: u16, head: &'static [(&'static str, &'static str)]) -> Answer {
    Answer { name, status, head, body: &[], ends: Plainly }
}

const FINE: Ends = Trailers(&[("grpc-status", "0")]);
const HI: &[u8] = b"\0\0\0\0\x02hi";

const ANSWERS: &[Answer] = &[
    answer("fine", &[HI], FINE),
    answer("status", &[], Trailers(&[("grpc-status", "7"), ("grpc-message", "no")])),
    answer("late", &[HI], Trailers(&[("grpc-status", "7")])),
    only("only", 200, &[("grpc-status", "5")]),
    only("only.fine", 200, &[("grpc-status", "0")]),
    only("only.odd", 503, &[("grpc-status", "5")]),
    answer("none", &[HI], Plainly),
    answer("odd", &[HI], Trailers(&[("grpc-status", "x")])),
    answer("large", &[HI], Trailers(&[("grpc-status", "17")])),
    answer("negative", &[HI], Trailers(&[("grpc-status", "-1")])),
    http("http.400", 400),
    http("http.401", 401),
    http("http.403", 403),
    http("http.404", 404),
    http("http.429", 429),
    http("http.500", 500),
    http("http.502", 502),
    http("http.503", 503),
    http("http.504", 504),
    answer("empty", &[b"\0\0\0\0\0"], FINE),
    answer("nothing", &[], FINE),
    answer("two", &[HI, b"\0\0\0\0\x03two"], FINE),
    answer("half", &[b"\0\0\0\0\x09hi"], FINE),
    answer("compressed", &[b"\x01\0\0\0\x02hi"], FINE),
    answer("broken", &[HI], Reset),
    answer("halting", &[HI], Never),
    answer("refused", &[], Refused),
    answer("silent", &[], Silent),
];

/// What comes of a stream that never ends is not waited for.
fn is_endless(answer: &Answer) -> bool {
    matches!(answer.ends, Never | Silent)
}

/// Asks as the request's headers say, and logs what it is told.
const GUEST: &str = include_str!("grpc.wat");

/// How long both may take to be told the same.
const TOLD_MAX: Duration = Duration::from_secs(30);

#[tokio::test]
async fn guests_are_told_of_grpc_calls_what_they_are_told_in_envoy() -> Result<()> {
    let Some(program) = cairn_tests::envoy::program() else {
        cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    };
    let file = tempfile::Builder::new().prefix("grpc").suffix(".wasm").tempfile()?;
    std::fs::write(file.path(), wat::parse_str(GUEST)?)?;
    let module = Module::at(file.path())?;
    let (address, _running) = serve().await?;
    let mut upstream = Upstream::start().await?;
    let service =
        SERVICES.iter().position(|name| *name == "grpcbin").context("a service that speaks gRPC")?;
    upstream.services[service] = address;
    let (ours, envoy) =
        tokio::try_join!(Ours::start(&module, &upstream), Envoy::start(&program, &module, &upstream))?;
    let mut wrong = Vec::new();
    let mut count = 0;
    for is_stream in [false, true] {
        for answer in ANSWERS.iter().filter(|answer| !is_stream || !is_endless(answer)) {
            count += 1;
            let kind = if is_stream { "stream" } else { "call" };
            let ask = Ask::get("/echo").header("x-service", answer.name).header("x-kind", kind);
            let before = (envoy.lines().len(), ours.lines().len());
            client::send(envoy.address(Version::Http1)?, &ask).await?;
            client::send(ours.address(Version::Http1)?, &ask).await?;
            let (theirs, own) = told(&envoy, &ours, before).await;
            if theirs != own {
                wrong.push(format!(
                    "{kind} {}\n  Envoy\n    {}\n  ours\n    {}",
                    answer.name,
                    theirs.join("\n    "),
                    own.join("\n    ")
                ));
            }
        }
    }
    ensure!(wrong.is_empty(), "{} of {count} differ\n\n{}", wrong.len(), wrong.join("\n\n"));
    println!("{count} calls without a difference");
    Ok(())
}

/// What both are told of a call, once both know its end.
async fn told(envoy: &Envoy, ours: &Ours, before: (usize, usize)) -> (Vec<String>, Vec<String>) {
    let deadline = Instant::now() + TOLD_MAX;
    loop {
        let lines = |host: &dyn Logged, from: usize| -> Vec<String> {
            host.lines().split_off(from).into_iter().map(|line| line.text).collect()
        };
        let (theirs, own) = (lines(envoy, before.0), lines(ours, before.1));
        let is_over = |lines: &[String]| {
            lines.iter().any(|line| line.starts_with("close") || line.starts_with("answer"))
        };
        if (theirs == own && is_over(&own)) || Instant::now() > deadline {
            return (theirs, own);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The service. It ends when dropped.
async fn serve() -> Result<(SocketAddr, JoinSet<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (address, mut running) = (listener.local_addr()?, JoinSet::new());
    running.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let service = service_fn(respond);
                let server = http2::Builder::new(TokioExecutor::new());
                // A connection that breaks off is the proxy's business.
                let _ended = server.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    Ok((address, running))
}

/// Resets a stream.
#[derive(Debug, thiserror::Error)]
#[error("reset as asked")]
struct Broken;

async fn respond(request: Request<Incoming>) -> Result<Response<BoxBody<Bytes, Broken>>, Broken> {
    let name = request.uri().path().split('/').nth(1).unwrap_or_default().to_owned();
    let answer = *ANSWERS.iter().find(|answer| answer.name == name).ok_or(Broken)?;
    match answer.ends {
        Refused => return Err(Broken),
        Silent => pending().await,
        Trailers(_) | Plainly | Reset | Never => {}
    }
    let data: Vec<Result<Frame<Bytes>, Broken>> =
        answer.body.iter().map(|piece| Ok(Frame::data(Bytes::from_static(piece)))).collect();
    let data = stream::iter(data);
    let body = match answer.ends {
        Trailers(list) => data.chain(stream::iter([Ok(Frame::trailers(map(list)))])).boxed_body(),
        // Time for what was sent before to arrive.
        Reset => data.chain(stream::once(broken())).boxed_body(),
        Never | Silent => data.chain(stream::pending()).boxed_body(),
        // The head is the end.
        Plainly if answer.body.is_empty() => BodyExt::boxed(Empty::new().map_err(|never| match never {})),
        Plainly | Refused => data.boxed_body(),
    };
    let mut response = Response::new(body);
    *response.status_mut() = http::StatusCode::from_u16(answer.status).unwrap_or_default();
    *response.headers_mut() = map(answer.head);
    let kind =
        if answer.status == 200 || !answer.head.is_empty() { "application/grpc" } else { "text/plain" };
    response.headers_mut().insert("content-type", HeaderValue::from_static(kind));
    Ok(response)
}

async fn broken() -> Result<Frame<Bytes>, Broken> {
    tokio::time::sleep(Duration::from_millis(50)).await;
    Err(Broken)
}

fn map(list: &[(&'static str, &'static str)]) -> HeaderMap {
    list.iter()
        .filter_map(|(name, value)| Some((name.parse().ok()?, HeaderValue::from_static(value))))
        .collect()
}

trait BoxedBody {
    fn boxed_body(self) -> BoxBody<Bytes, Broken>;
}

impl<S: stream::Stream<Item = Result<Frame<Bytes>, Broken>> + Send + Sync + 'static> BoxedBody for S {
    fn boxed_body(self) -> BoxBody<Bytes, Broken> {
        BodyExt::boxed(StreamBody::new(self))
    }
}
