//! `cairn echo`: the application of the demo. It answers every request with what it saw of it.

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;

/// A request's body is read up to this size, to tell its length.
const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// `cairn echo`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Where to listen. Several addresses may be given.
    #[arg(long, required = true, num_args = 1..)]
    listen: Vec<SocketAddr>,
    /// The name it answers with, such as the pod's.
    #[arg(long, default_value = "echo")]
    name: String,
    /// The version it answers with.
    #[arg(long, default_value = "v1")]
    version: String,
}

/// Serves until the process ends.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let about = Arc::new(About { name: options.name, version: options.version });
    let mut tasks = Vec::new();
    for address in options.listen {
        let listener = cairn_net::listen(address, &cairn_net::ListenOptions::default())
            .with_context(|| format!("cannot listen on {address}"))?;
        tasks.push(tokio::spawn(accept(listener, Arc::clone(&about))));
    }
    for task in tasks {
        task.await?;
    }
    Ok(())
}

struct About {
    name: String,
    version: String,
}

async fn accept(listener: tokio::net::TcpListener, about: Arc<About>) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        let about = Arc::clone(&about);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&about), peer, request));
            let executor = hyper_util::rt::TokioExecutor::new();
            let server = hyper_util::server::conn::auto::Builder::new(executor);
            if let Err(error) = server.serve_connection_with_upgrades(TokioIo::new(stream), service).await {
                tracing::debug!(%error, %peer, "connection ended");
            }
        });
    }
}

async fn answer(
    about: Arc<About>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let length = match Limited::new(body, BODY_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes().len(),
        Err(error) => return Ok(plain(StatusCode::BAD_REQUEST, format!("body: {error}\n"))),
    };
    let asked = head.uri.path().strip_prefix("/status/").and_then(|code| code.parse::<u16>().ok());
    let status = asked.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::OK);
    let mut text = String::new();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let protocol = if head.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" };
    // Writing to a String cannot fail.
    let _infallible = writeln!(text, "name: {}\nversion: {}", about.name, about.version)
        .and_then(|()| writeln!(text, "peer: {}\nrequest: {} {path} {protocol}", peer.ip(), head.method))
        .and_then(|()| writeln!(text, "body-bytes: {length}"));
    write_headers(&mut text, &head.headers);
    let mut response = plain(status, text);
    for (name, value) in [("x-echo-name", &about.name), ("x-echo-version", &about.version)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}

fn write_headers(text: &mut String, headers: &HeaderMap) {
    for (name, value) in headers {
        // Writing to a String cannot fail.
        let _infallible = writeln!(text, "header: {name}: {}", String::from_utf8_lossy(value.as_bytes()));
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
