//! gRPC calls of a plugin on their way: a task for each, on the runtime of the worker whose instance it tells.

use super::Plugin;
use super::outside::Seat;
use crate::grpc::{self, Deframer, Ended, Feed, GrpcEvent, Metadata};
use cairn_filter::{Callout, CalloutError, CalloutPart, CalloutRequest};
use std::future::poll_fn;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// How long a stream may be silent before it is given up.
const SILENCE_MAX: Duration = Duration::from_secs(3600);

/// A stream that is to be opened.
pub(super) struct Opening {
    pub(super) id: u32,
    pub(super) callout: Arc<dyn Callout>,
    pub(super) request: CalloutRequest,
    pub(super) feed: Feed,
}

/// Opens a stream, and tells the guest what happens in it until it ends.
pub(super) fn open(plugin: &Arc<Plugin>, runtime: &Handle, at: Seat, opening: Opening) -> AbortHandle {
    let teller = Teller { plugin: Arc::downgrade(plugin), at, id: opening.id };
    let follow = async move {
        // `None`: the guest does not want to know any more.
        if let Some(ended) = teller.follow(opening).await {
            teller.tell(GrpcEvent::Closed(ended)).await;
        }
    };
    runtime.spawn(follow).abort_handle()
}

/// Tells one guest of one stream.
struct Teller {
    plugin: Weak<Plugin>,
    at: Seat,
    id: u32,
}

impl Teller {
    /// True while the guest wants to know more.
    async fn tell(&self, event: GrpcEvent) -> bool {
        let Some(plugin) = self.plugin.upgrade() else { return false };
        let id = self.id;
        plugin.enter(&self.at, move |instance| instance.grpc_event(id, event)).await.unwrap_or(false)
    }

    /// Tells of a stream, all but its end: a head, messages and trailers, the last two of which may be empty, as in Envoy.
    async fn follow(&self, opening: Opening) -> Option<Ended> {
        let Opening { callout, request, feed, .. } = opening;
        let answer = match callout.open(request, Box::new(feed)).await {
            Ok(answer) => answer,
            Err(error) => {
                let ended = grpc::of_error(&error);
                return self.tell_whole(Metadata::of_end(&ended), ended).await;
            }
        };
        let (head, mut parts) = answer.into_parts();
        let ended = grpc::of_head(head.status, &head.headers);
        let is_of_grpc = ended.is_none() || head.headers.contains_key("grpc-status");
        let head = Metadata { status: Some(head.status), headers: head.headers };
        if let Some(ended) = ended {
            return self.tell_whole(if is_of_grpc { head } else { Metadata::default() }, ended).await;
        }
        if !self.tell(GrpcEvent::Initial(head)).await {
            return None;
        }
        let mut messages = Deframer::default();
        let ended = loop {
            let part = tokio::time::timeout(SILENCE_MAX, poll_fn(|cx| parts.poll_next(cx))).await;
            match part {
                Ok(Some(Ok(CalloutPart::Data(data)))) => match self.tell_messages(&mut messages, &data).await
                {
                    Ok(true) => {}
                    Ok(false) => return None,
                    Err(ended) => break ended,
                },
                Ok(Some(Ok(CalloutPart::Trailers(headers)))) => {
                    let ended = grpc::of_trailers(&headers).unwrap_or_else(grpc::without_status);
                    let trailers = Metadata { status: None, headers };
                    return self.tell(GrpcEvent::Trailing(trailers)).await.then_some(ended);
                }
                Ok(Some(Err(error))) => break grpc::of_error(&error),
                Ok(None) => break grpc::without_status(),
                Err(_) => break grpc::of_error(&CalloutError::Timeout(SILENCE_MAX)),
            }
        };
        self.tell(GrpcEvent::Trailing(Metadata::default())).await.then_some(ended)
    }

    /// Tells of an answer that is trailers only, or none.
    async fn tell_whole(&self, trailers: Metadata, ended: Ended) -> Option<Ended> {
        let goes_on = self.tell(GrpcEvent::Initial(Metadata::default())).await
            && self.tell(GrpcEvent::Trailing(trailers)).await;
        goes_on.then_some(ended)
    }

    /// False when the guest does not want to know any more.
    async fn tell_messages(&self, messages: &mut Deframer, data: &[u8]) -> Result<bool, Ended> {
        messages.push(data);
        while let Some(message) = messages.next()? {
            if !self.tell(GrpcEvent::Message(message)).await {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
