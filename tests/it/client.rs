//! How tests talk to a mesh: as a pod, through its SOCKS5 port, or as nobody, straight.

use crate::harness::SOON;
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Version};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Whatever a test asks, it has its answer within this, or the test fails.
pub const ANSWER_MAX: Duration = Duration::from_secs(15);

/// Who speaks.
#[derive(Clone, Copy, Debug)]
pub enum Who {
    /// Nobody that the mesh knows.
    Nobody,
    /// The pod at this address.
    Pod(IpAddr),
}

/// Why a SOCKS5 port refused: its reply code (RFC 1928 §6).
#[derive(Debug, thiserror::Error)]
#[error("SOCKS5 reply {0}")]
pub struct Refused(pub u8);

/// An answer, read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// HTTP/1.1 or HTTP/2.
    pub version: Version,
    /// The headers.
    pub headers: HeaderMap,
    /// The body as text.
    pub body: String,
}

impl Answer {
    /// A header of the answer; empty if it has none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// What the echo application says of a header of the request.
    pub fn seen(&self, name: &str) -> Option<&str> {
        let prefix = format!("header: {name}: ");
        self.body.lines().find_map(|line| line.strip_prefix(&prefix))
    }

    /// What the echo application says of the request line: method, path and protocol.
    pub fn seen_request(&self) -> &str {
        self.body.lines().find_map(|line| line.strip_prefix("request: ")).unwrap_or_default()
    }
}

/// Opens a connection.
pub async fn connect(who: Who, to: SocketAddr) -> Result<TcpStream> {
    let IpAddr::V4(ip) = to.ip() else { bail!("only IPv4 here") };
    match who {
        Who::Nobody => Ok(timeout(ANSWER_MAX, TcpStream::connect(to)).await??),
        Who::Pod(pod) => {
            let mut target = vec![1];
            target.extend(ip.octets());
            socks(pod, &target, to.port()).await
        }
    }
}

/// Opens a connection to a name, which the mesh resolves.
pub async fn connect_to_name(pod: IpAddr, name: &str, port: u16) -> Result<TcpStream> {
    let mut target = vec![3, u8::try_from(name.len())?];
    target.extend(name.as_bytes());
    socks(pod, &target, port).await
}

async fn socks(pod: IpAddr, target: &[u8], port: u16) -> Result<TcpStream> {
    let asking = async {
        let mut stream = TcpStream::connect((pod, 15080)).await.context("no SOCKS5 port")?;
        let mut ask = vec![5, 1, 0, 5, 1, 0];
        ask.extend(target);
        ask.extend(port.to_be_bytes());
        stream.write_all(&ask).await?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.context("the SOCKS5 port closed the connection")?;
        ensure!(answer[..3] == [5, 0, 5], "not SOCKS5: {answer:?}");
        if answer[3] != 0 {
            return Err(Refused(answer[3]).into());
        }
        Ok(stream)
    };
    timeout(ANSWER_MAX, asking).await.context("the SOCKS5 port did not answer in time")?
}

/// A connection that speaks HTTP.
pub struct Client {
    sender: Sender,
    host: String,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Client {
    /// Opens a connection that speaks HTTP/1.1.
    pub async fn open(who: Who, to: SocketAddr) -> Result<Self> {
        Self::on(connect(who, to).await?, &to.to_string()).await
    }

    /// Speaks HTTP/1.1 on a connection that is open.
    pub async fn on(stream: TcpStream, host: &str) -> Result<Self> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Its outcome is the outcome of the requests on it.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender: Sender::Http1(sender), host: host.to_owned() })
    }

    /// Opens a connection that speaks HTTP/2 without being asked whether it may (prior knowledge).
    pub async fn open_http2(who: Who, to: SocketAddr) -> Result<Self> {
        let stream = TokioIo::new(connect(who, to).await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender: Sender::Http2(sender), host: to.to_string() })
    }

    /// Sends a request whose `uri` is a path, or a whole URL to say which host is meant.
    pub async fn send(&mut self, request: Request<&'static str>) -> Result<Answer> {
        let (mut head, body) = request.into_parts();
        let host = head.uri.host().map_or_else(|| self.host.clone(), str::to_owned);
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let body = Full::new(Bytes::from_static(body.as_bytes()));
        let sending = async {
            let response = match &mut self.sender {
                Sender::Http1(sender) => {
                    head.uri = path.parse()?;
                    head.headers.entry("host").or_insert(host.parse()?);
                    sender.ready().await.context("the connection is closed")?;
                    sender.send_request(Request::from_parts(head, body)).await
                }
                Sender::Http2(sender) => {
                    head.uri = format!("http://{host}{path}").parse()?;
                    sender.ready().await.context("the connection is closed")?;
                    sender.send_request(Request::from_parts(head, body)).await
                }
            };
            let (head, body) = response.context("no answer")?.into_parts();
            let body = body.collect().await.context("the answer broke off")?.to_bytes();
            let body = String::from_utf8_lossy(&body).into_owned();
            Ok(Answer { status: head.status.as_u16(), version: head.version, headers: head.headers, body })
        };
        timeout(ANSWER_MAX, sending).await.context("no answer in time")?
    }

    /// Gets a path.
    pub async fn get(&mut self, uri: &str) -> Result<Answer> {
        self.send(request(Method::GET, uri, &[])).await
    }
}

/// A request without a body.
pub fn request(method: Method, uri: &str, headers: &[(&str, &str)]) -> Request<&'static str> {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body("").unwrap_or_else(|error| panic!("{uri} {headers:?}: {error}"))
}

/// Gets a path on a connection of its own.
pub async fn get(who: Who, to: SocketAddr, uri: &str) -> Result<Answer> {
    Client::open(who, to).await?.get(uri).await
}

/// Reads JSON from an admin port.
pub async fn admin(proxy: IpAddr, path: &str) -> Result<Value> {
    let answer = get(Who::Nobody, SocketAddr::new(proxy, 15000), path).await?;
    ensure!(answer.status == 200, "http://{proxy}:15000{path}: {}", answer.status);
    serde_json::from_str(&answer.body).with_context(|| format!("http://{proxy}:15000{path}"))
}

/// Reads the metrics of a proxy.
pub async fn metrics(proxy: IpAddr) -> Result<String> {
    Ok(get(Who::Nobody, SocketAddr::new(proxy, 15020), "/metrics").await?.body)
}

/// Finds a record of an exchange (`/exchanges`) or a connection (`/connections`): it is there a moment after its answer.
pub async fn record(proxy: IpAddr, path: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        let records = admin(proxy, path).await?;
        let found = records.as_array().into_iter().flatten().find(|record| is_it(record));
        if let Some(found) = found {
            return Ok(found.clone());
        }
        ensure!(tokio::time::Instant::now() < deadline, "no such record among {records:#}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until a text that is read anew each time contains `part`.
pub async fn wait_for_text(part: &str, read: impl Fn() -> Result<String>) -> Result<()> {
    let has_part = |text: &str| text.contains(part);
    wait_for(&format!("`{part}`"), read, has_part).await
}

/// Waits until a text that is read anew each time has `what`. Others of the test's tasks go on meanwhile.
pub async fn wait_for(
    what: &str,
    read: impl Fn() -> Result<String>,
    is_there: impl Fn(&str) -> bool,
) -> Result<()> {
    let deadline = tokio::time::Instant::now() + SOON;
    while !is_there(&read()?) {
        ensure!(tokio::time::Instant::now() < deadline, "{what} does not appear in:\n{}", read()?);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
