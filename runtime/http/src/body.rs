//! Bodies in passing: frames go on as they come, and are counted.

use crate::grpc::Messages;
use crate::record::{Ending, Record};
use crate::upstream::Lease;
use bytes::{Bytes, BytesMut};
use cairn_filter::{BodyBroken, BodyFuture, BodyRead, CalloutFeed};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

/// How far a request's body has come.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) bytes: AtomicU64,
    /// gRPC messages that have begun.
    pub(crate) messages: AtomicU64,
    /// The client ended it before its end.
    pub(crate) broken: AtomicBool,
}

/// A request's body on its way upstream.
pub(crate) struct RequestBody {
    /// What was read before it was sent on.
    read: VecDeque<Frame<Bytes>>,
    /// What comes after that; `None`: nothing does.
    incoming: Option<(Incoming, Arc<Progress>)>,
    /// Where in its gRPC messages it is; `None`: it is not gRPC.
    messages: Option<Messages>,
    /// What a filter sends of its own in the course of a stream.
    fed: Option<Box<dyn CalloutFeed>>,
}

impl RequestBody {
    pub(crate) fn none() -> Self {
        Self { read: VecDeque::new(), incoming: None, messages: None, fed: None }
    }

    /// A body made here.
    pub(crate) fn full(bytes: Bytes) -> Self {
        let frame = (!bytes.is_empty()).then(|| Frame::data(bytes));
        Self { read: frame.into_iter().collect(), incoming: None, messages: None, fed: None }
    }

    /// A body made here that `feed` continues.
    pub(crate) fn fed(first: Bytes, feed: Box<dyn CalloutFeed>) -> Self {
        Self { fed: Some(feed), ..Self::full(first) }
    }

    /// A body made here, with trailers unless they are empty.
    pub(crate) fn full_with_trailers(bytes: Bytes, trailers: HeaderMap) -> Self {
        let mut body = Self::full(bytes);
        if !trailers.is_empty() {
            body.read.push_back(Frame::trailers(trailers));
        }
        body
    }

    /// The body, and how to follow it if there is one.
    pub(crate) fn new(incoming: Incoming, grpc: bool) -> (Self, Option<Arc<Progress>>) {
        if incoming.is_end_stream() {
            return (Self::none(), None);
        }
        let progress = Arc::new(Progress::default());
        let messages = grpc.then(Messages::default);
        let incoming = Some((incoming, Arc::clone(&progress)));
        (Self { read: VecDeque::new(), incoming, messages, fed: None }, Some(progress))
    }

    fn bytes_read(&self) -> usize {
        self.read.iter().filter_map(Frame::data_ref).map(Bytes::len).sum()
    }

    fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Self { incoming, messages, fed, .. } = self;
        if let Some(feed) = fed {
            return feed.poll_next(cx).map(|data| data.map(|data| Ok(Frame::data(data))));
        }
        let Some((incoming, progress)) = incoming else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(incoming).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                progress.bytes.fetch_add(length as u64, Relaxed);
                if let (Some(messages), Some(data)) = (messages, frame.data_ref()) {
                    progress.messages.fetch_add(messages.pass(data), Relaxed);
                }
            }
            Some(Err(_)) => progress.broken.store(true, Relaxed),
            None => {}
        }
        Poll::Ready(frame)
    }
}

impl cairn_filter::Body for RequestBody {
    fn read(&mut self, bytes_max: usize) -> BodyFuture<'_> {
        Box::pin(async move {
            // What is read stays here, to be sent on.
            while self.bytes_read() <= bytes_max {
                match poll_fn(|cx| self.poll_incoming(cx)).await {
                    Some(Ok(frame)) => self.read.push_back(frame),
                    Some(Err(_)) => return Err(BodyBroken),
                    None => {
                        self.incoming = None;
                        break;
                    }
                }
            }
            let is_whole = self.bytes_read() <= bytes_max;
            let mut bytes = BytesMut::new();
            self.read.iter().filter_map(Frame::data_ref).for_each(|data| bytes.extend_from_slice(data));
            bytes.truncate(bytes_max);
            Ok(BodyRead { bytes: bytes.freeze(), is_whole })
        })
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.read.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => self.poll_incoming(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty()
            && self.fed.is_none()
            && self.incoming.as_ref().is_none_or(|(incoming, _)| incoming.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let read = self.bytes_read() as u64;
        let rest =
            self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), |(body, _)| body.size_hint());
        if self.fed.is_some() {
            return SizeHint::new();
        }
        let mut whole = SizeHint::new();
        if let Some(upper) = rest.upper() {
            whole.set_upper(upper.saturating_add(read));
        }
        whole.set_lower(rest.lower().saturating_add(read));
        whole
    }
}

/// A response's body on its way to the client. It holds the exchange's record, which is finished when the body is
/// over or dropped, and the upstream connection, which goes back to the pool when the body is over.
pub(crate) struct ResponseBody {
    content: Content,
    record: Option<Box<Record>>,
    lease: Option<Lease>,
}

enum Content {
    Full(Bytes),
    Upstream(Incoming),
}

impl ResponseBody {
    pub(crate) fn full(bytes: Bytes, record: Option<Box<Record>>) -> Self {
        Self { content: Content::Full(bytes), record, lease: None }
    }

    pub(crate) fn upstream(incoming: Incoming, record: Box<Record>, lease: Lease) -> Self {
        Self { content: Content::Upstream(incoming), record: Some(record), lease: Some(lease) }
    }

    fn is_over(&self) -> bool {
        match &self.content {
            Content::Full(bytes) => bytes.is_empty(),
            Content::Upstream(incoming) => incoming.is_end_stream(),
        }
    }

    fn finish(&mut self, ending: Ending) {
        if let Some(mut record) = self.record.take() {
            record.end(ending);
        }
        if let Some(lease) = self.lease.take().filter(|_| ending == Ending::Complete) {
            lease.put_back();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let frame = match &mut this.content {
            Content::Full(bytes) if bytes.is_empty() => None,
            Content::Full(bytes) => Some(Ok(Frame::data(std::mem::take(bytes)))),
            Content::Upstream(incoming) => ready!(Pin::new(incoming).poll_frame(cx)),
        };
        match &frame {
            None => this.finish(Ending::Complete),
            Some(Err(_)) => this.finish(Ending::UpstreamCut),
            Some(Ok(frame)) => {
                if let Some(record) = &mut this.record {
                    if let Some(data) = frame.data_ref() {
                        record.passed(data);
                    }
                    if let Some(trailers) = frame.trailers_ref() {
                        record.trailed(trailers);
                    }
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Upstream(incoming) => incoming.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // Who reads a body of known length does not ask for its end.
        let ending = if self.is_over() { Ending::Complete } else { Ending::ClientGone };
        self.finish(ending);
    }
}
