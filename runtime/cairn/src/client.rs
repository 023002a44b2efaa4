//! A small HTTP client for one machine: to ports for operators, and through a pod's SOCKS5 port as that pod.

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use cairn_net::{ConnectOptions, Namespace};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A whole request takes at most this long.
const REQUEST_MAX: Duration = Duration::from_secs(15);

/// Answers are read up to this size.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The port on which a pod's ztunnel speaks SOCKS5.
const SOCKS_PORT: u16 = 15080;

/// The port on which a proxy says whether it is ready.
pub const READINESS_PORT: u16 = 15021;

/// How a connection is made.
#[derive(Clone, Debug)]
pub enum Way {
    /// Straight, from a namespace if one is given.
    Direct(Option<Namespace>),
    /// Through the SOCKS5 port of the pod at this address.
    As(IpAddr),
}

/// A request to be sent.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// The method.
    pub method: Method,
    /// Where to.
    pub to: SocketAddr,
    /// The `Host` header.
    pub host: &'a str,
    /// The path and query.
    pub path: &'a str,
    /// Further headers.
    pub headers: &'a [(&'a str, &'a str)],
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

/// Sends one request on a connection of its own.
///
/// # Errors
/// When the connection is refused or breaks, or the answer takes too long.
pub async fn send(way: &Way, ask: &Ask<'_>) -> Result<Answer> {
    let exchange = async {
        let stream = connect(way, ask.to).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("cannot speak HTTP")?;
        let connection = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(&ask.method)
            .uri(ask.path)
            .header("host", ask.host)
            .header("connection", "close");
        for (name, value) in ask.headers {
            request = request.header(*name, *value);
        }
        let response =
            sender.send_request(request.body(Empty::<Bytes>::new())?).await.context("no answer")?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("{error}")).context("answer broke off")?.to_bytes();
        connection.abort();
        Ok(Answer { status: head.status, headers: head.headers, body })
    };
    tokio::time::timeout(REQUEST_MAX, exchange).await.context("no answer in time")?
}

/// Fetches JSON from a port for operators.
///
/// # Errors
/// When it cannot be had or is not JSON.
pub async fn get_json(way: &Way, address: SocketAddr, path: &str) -> Result<serde_json::Value> {
    let host = address.to_string();
    let ask = Ask { method: Method::GET, to: address, host: &host, path, headers: &[] };
    let answer = send(way, &ask).await.with_context(|| format!("http://{address}{path}"))?;
    ensure!(answer.status.is_success(), "http://{address}{path}: {}", answer.status);
    serde_json::from_slice(&answer.body).with_context(|| format!("http://{address}{path}"))
}

/// Waits until a process reports that it is ready.
///
/// # Errors
/// When it is not within `limit`; the error says what it was still waiting for.
pub async fn wait_ready(way: &Way, address: IpAddr, limit: Duration) -> Result<()> {
    let deadline = tokio::time::Instant::now() + limit;
    let at = SocketAddr::new(address, READINESS_PORT);
    let host = at.to_string();
    loop {
        let ask = Ask { method: Method::GET, to: at, host: &host, path: "/healthz/ready", headers: &[] };
        let state = match send(way, &ask).await {
            Ok(answer) if answer.status == StatusCode::OK => return Ok(()),
            Ok(answer) => String::from_utf8_lossy(&answer.body).trim().to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if tokio::time::Instant::now() > deadline {
            bail!("{address} is not ready: {state}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Opens a connection.
///
/// # Errors
/// When it is refused.
pub async fn connect(way: &Way, to: SocketAddr) -> Result<TcpStream> {
    match way {
        Way::Direct(namespace) => {
            let options = ConnectOptions { namespace: namespace.clone(), ..ConnectOptions::default() };
            Ok(cairn_net::connect(to, &options).await?)
        }
        Way::As(pod) => {
            let proxy = SocketAddr::new(*pod, SOCKS_PORT);
            let mut stream = cairn_net::connect(proxy, &ConnectOptions::default()).await?;
            greet(&mut stream, to).await?;
            Ok(stream)
        }
    }
}

async fn greet(stream: &mut TcpStream, to: SocketAddr) -> Result<()> {
    let IpAddr::V4(ip) = to.ip() else { bail!("only IPv4 here") };
    let [a, b, c, d] = ip.octets();
    let [high, low] = to.port().to_be_bytes();
    stream.write_all(&[5, 1, 0, 5, 1, 0, 1, a, b, c, d, high, low]).await?;
    let mut method = [0; 2];
    stream.read_exact(&mut method).await.context("the SOCKS5 port closed the connection")?;
    ensure!(method == [5, 0], "the SOCKS5 port wants a password");
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).await.context("the SOCKS5 port closed the connection")?;
    match reply[1] {
        0 => Ok(()),
        2 => bail!("refused: policy does not allow the connection"),
        4 => bail!("refused: no ready endpoint, or the name is not known"),
        code => bail!("refused: SOCKS5 reply {code}"),
    }
}
