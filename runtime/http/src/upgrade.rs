//! WebSockets: once both ends have agreed to switch, bytes are copied both ways.

use crate::download::ResponseBody;
use crate::record::{Ending, Record};
use crate::upstream::Lease;
use bytes::Bytes;
use cairn_filter::ResponseHead;
use cairn_net::ByteCounts;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// A client's wish for a WebSocket.
pub(crate) struct Upgrade {
    client: OnUpgrade,
}

impl Upgrade {
    /// Takes the client's half out of its request.
    pub(crate) fn of(request: &mut Request<Incoming>) -> Self {
        Self { client: hyper::upgrade::on(request) }
    }

    /// Puts the wish, which ended at this hop, into the request upstream.
    pub(crate) fn ask(&self, headers: &mut HeaderMap) {
        agree(headers);
    }
}

fn agree(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// Answers 101 and copies until both ends are done, then finishes the record. The copy ends with its connections.
pub(crate) fn switch(
    mut record: Box<Record>,
    mut response: Response<Incoming>,
    lease: Lease,
    upgrade: Upgrade,
) -> Response<ResponseBody> {
    let server = hyper::upgrade::on(&mut response);
    let (parts, _) = response.into_parts();
    let mut head = ResponseHead { status: parts.status, headers: parts.headers };
    agree(&mut head.headers);
    record.exchange.details = "via_upstream".into();
    record.answered(&mut head);
    let mut switched = Response::new(ResponseBody::full(Bytes::new(), None));
    *switched.status_mut() = head.status;
    *switched.headers_mut() = head.headers;
    tokio::spawn(async move {
        let _held = record.served.drain.hold();
        let _lease = lease;
        let counts = ByteCounts::default();
        let copied = copy(upgrade.client, server, &counts).await;
        record.response_body_bytes = counts.sent.load(Relaxed);
        let progress = record.progress.get_or_insert_with(Arc::default);
        progress.bytes.store(counts.received.load(Relaxed), Relaxed);
        record.end(if copied.is_ok() { Ending::Complete } else { Ending::UpstreamCut });
    });
    switched
}

async fn copy(client: OnUpgrade, server: OnUpgrade, counts: &ByteCounts) -> std::io::Result<()> {
    let mut client = TokioIo::new(client.await.map_err(std::io::Error::other)?);
    let mut server = TokioIo::new(server.await.map_err(std::io::Error::other)?);
    cairn_net::copy(&mut client, &mut server, counts).await
}
