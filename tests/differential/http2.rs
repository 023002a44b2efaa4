//! The same requests over HTTP/2.

use crate::scenario::{Answer, Ask, PEER, SCENARIO};
use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Request, Uri, Version};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};

/// The request with the same target, byte for byte; `None` if the library does not take it (a fragment, `<`).
pub fn request(ask: &Ask, scenario: usize) -> Option<Request<Full<Bytes>>> {
    let host = ask.header("host").next()?;
    let uri = Uri::builder().scheme("http").authority(host).path_and_query(&*ask.target).build().ok()?;
    if uri.path_and_query()?.as_str() != ask.target {
        return None;
    }
    let mut request = Request::builder().method(&*ask.method).uri(uri).version(Version::HTTP_2);
    for (name, value) in ask.headers.iter().filter(|(name, _)| name != "host") {
        request = request.header(&**name, value.as_bytes());
    }
    if let Some(peer) = &ask.peer {
        request = request.header(PEER, peer);
    }
    request.header(SCENARIO, scenario).body(Full::from(ask.body.clone())).ok()
}

/// The answer on `stream`; `None` if the stream of the request was reset, as HTTP/2 refuses what is malformed.
pub async fn answer<S>(stream: S, ask: &Ask, scenario: usize) -> Result<Option<Answer>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = request(ask, scenario).context("not for HTTP/2")?;
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let running = tokio::spawn(connection);
    let answer = match sender.send_request(request).await {
        Ok(response) => {
            let (head, body) = response.into_parts();
            let body = body.collect().await.context("the answer broke off")?.to_bytes();
            Some(Answer::new(&head, &body))
        }
        Err(_reset) => None,
    };
    drop(sender);
    // However it ends, the answer is here.
    let _ended = running.await?;
    Ok(answer)
}
