//! A client that keeps what it is answered, trailers included.

use crate::ask::{Ask, Version};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// What identifies every request.
const REQUEST_ID: &str = "7f4a1c52-9f0e-4d53-8f0b-0c6a3f8f1d11";

/// A request's body.
pub type Body = BoxBody<Bytes, Infallible>;

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    Answer(Answer),
    /// The connection or stream ended before the answer had.
    Closed,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub headers: Headers,
    pub body: Bytes,
    pub trailers: Headers,
}

/// Headers by name; those of one name in their order.
pub type Headers = Vec<(String, String)>;

/// The headers that are compared: all but those named.
pub fn headers(map: &HeaderMap, but: &[&str]) -> Headers {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let all = map.iter().filter(|(name, _)| !but.contains(&name.as_str()));
    let mut list: Headers = all.map(|(name, value)| (name.to_string(), text(value))).collect();
    list.sort_by(|a, b| a.0.cmp(&b.0));
    list
}

/// Sends `ask` to `to`, on a connection of its own.
pub async fn send(to: SocketAddr, ask: &Ask) -> Result<Told> {
    let request = request(ask)?;
    let asking = async {
        let stream = TcpStream::connect(to).await?;
        // Nothing is left behind when it closes, so that ports do not run out.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        match ask.version {
            Version::Http1 => {
                let (mut sender, connection) = http1::handshake::<_, Body>(io).await?;
                let running = tokio::spawn(connection);
                let told = told(sender.send_request(request).await).await;
                running.abort();
                anyhow::Ok(told)
            }
            Version::Http2 => {
                let (mut sender, connection) =
                    http2::handshake::<_, _, Body>(TokioExecutor::new(), io).await?;
                let running = tokio::spawn(connection);
                let told = told(sender.send_request(request).await).await;
                running.abort();
                anyhow::Ok(told)
            }
        }
    };
    tokio::time::timeout(ANSWER_MAX, asking).await.with_context(|| format!("no answer to {ask}"))?
}

async fn told(answer: hyper::Result<Response<Incoming>>) -> Told {
    let Ok(answer) = answer else { return Told::Closed };
    let (parts, body) = answer.into_parts();
    let Ok(body) = body.collect().await else { return Told::Closed };
    // A server says when it answered and what it is; how a body travels is between the two ends of a connection.
    let but = ["date", "server", "connection", "transfer-encoding", "x-envoy-upstream-service-time"];
    let trailers = body.trailers().map(|map| headers(map, &[])).unwrap_or_default();
    Told::Answer(Answer {
        status: parts.status.as_u16(),
        headers: headers(&parts.headers, &but),
        body: body.to_bytes(),
        trailers,
    })
}

fn request(ask: &Ask) -> Result<Request<Body>> {
    let uri = match ask.version {
        Version::Http1 => ask.path.clone(),
        Version::Http2 => format!("http://echo.test{}", ask.path),
    };
    let mut request = Request::builder().method(ask.method).uri(uri);
    if ask.version == Version::Http1 {
        request = request.header("host", "echo.test");
    }
    // Without one, each proxy makes one up.
    request = request.header("x-request-id", REQUEST_ID);
    for (name, value) in &ask.headers {
        request = request.header(*name, value);
    }
    ensure!(ask.trailers.is_empty() || ask.version == Version::Http2, "trailers travel over HTTP/2");
    Ok(request.body(body(ask))?)
}

fn body(ask: &Ask) -> Body {
    if ask.trailers.is_empty() && ask.body.len() < 2 {
        return Full::new(ask.body.first().cloned().unwrap_or_default()).boxed();
    }
    let trailers: HeaderMap = ask
        .trailers
        .iter()
        .filter_map(|(name, value)| Some((name.parse().ok()?, value.parse().ok()?)))
        .collect::<Vec<(http::HeaderName, http::HeaderValue)>>()
        .into_iter()
        .collect();
    let end = (!trailers.is_empty()).then(|| Frame::trailers(trailers));
    let frames = ask.body.iter().cloned().map(Frame::data).chain(end).map(Ok);
    StreamBody::new(futures_util::stream::iter(frames.collect::<Vec<_>>())).boxed()
}
