//! A request's body in passing: what the client sends goes on as it comes, and is counted.

use crate::grpc::Messages;
use crate::pipe::Reader;
use bytes::Bytes;
use cairn_filter::{BodyBroken, CalloutFeed, Piece};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// How far a request's body has come.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) bytes: AtomicU64,
    /// gRPC messages that have begun.
    pub(crate) messages: AtomicU64,
    /// The client ended it before its end.
    pub(crate) broken: AtomicBool,
}

/// Why a body breaks off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// Whoever sends it broke off.
    #[error("the sender broke off")]
    Sender(#[source] hyper::Error),
    /// It was ended here.
    #[error("the exchange was ended")]
    Ended,
}

/// A request's body on its way upstream.
pub(crate) struct RequestBody {
    /// What was read before it was sent on.
    read: VecDeque<Frame<Bytes>>,
    rest: Rest,
    /// Where in its gRPC messages it is; `None`: it is not gRPC.
    messages: Option<Messages>,
}

/// What comes after that.
enum Rest {
    Nothing,
    /// What the client sends.
    Client {
        incoming: Incoming,
        progress: Arc<Progress>,
        http2: bool,
    },
    /// What filters let pass.
    Filtered(Reader),
    /// What a filter sends of its own in the course of a stream.
    Fed(Box<dyn CalloutFeed>),
}

/// How much is read after an early answer, and for how long.
const ASIDE_BYTES_MAX: usize = 1 << 20;
const ASIDE_MAX: Duration = Duration::from_secs(1);

impl RequestBody {
    pub(crate) fn none() -> Self {
        Self { read: VecDeque::new(), rest: Rest::Nothing, messages: None }
    }

    /// A body made here.
    pub(crate) fn full(bytes: Bytes) -> Self {
        let frame = (!bytes.is_empty()).then(|| Frame::data(bytes));
        Self { read: frame.into_iter().collect(), ..Self::none() }
    }

    /// A body made here that `feed` continues.
    pub(crate) fn fed(first: Bytes, feed: Box<dyn CalloutFeed>) -> Self {
        Self { rest: Rest::Fed(feed), ..Self::full(first) }
    }

    /// A body made here, with trailers unless they are empty.
    pub(crate) fn full_with_trailers(bytes: Bytes, trailers: HeaderMap) -> Self {
        let mut body = Self::full(bytes);
        if !trailers.is_empty() {
            body.read.push_back(Frame::trailers(trailers));
        }
        body
    }

    /// What filters let pass: a first piece, if they were waited for, and what comes after it.
    pub(crate) fn filtered(first: Option<Piece>, rest: Reader) -> Self {
        let read = first.and_then(frame_of).into_iter().collect();
        Self { read, rest: Rest::Filtered(rest), messages: None }
    }

    /// The body of a client that speaks HTTP/2 or an earlier version, and how to follow it if there is one.
    pub(crate) fn new(incoming: Incoming, grpc: bool, http2: bool) -> (Self, Option<Arc<Progress>>) {
        if incoming.is_end_stream() {
            return (Self::none(), None);
        }
        let progress = Arc::new(Progress::default());
        let messages = grpc.then(Messages::default);
        let rest = Rest::Client { incoming, progress: Arc::clone(&progress), http2 };
        (Self { read: VecDeque::new(), rest, messages }, Some(progress))
    }

    /// Reads what a client of HTTP/1.1 still sends after an early answer, aside and within bounds: were the connection
    /// closed with something unread in it, the answer could be lost on its way.
    pub(crate) fn read_aside(self) {
        let Rest::Client { mut incoming, http2: false, .. } = self.rest else { return };
        tokio::spawn(async move {
            let reading = async {
                let mut left = ASIDE_BYTES_MAX;
                while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut incoming).poll_frame(cx)).await {
                    left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                    if left == 0 {
                        return;
                    }
                }
            };
            // Whatever has not come by then is the client's own loss.
            let _over = tokio::time::timeout(ASIDE_MAX, reading).await;
        });
    }

    /// Puts back what was read of it.
    pub(crate) fn put_back(&mut self, pieces: impl Iterator<Item = Piece>) {
        self.read.extend(pieces.filter_map(frame_of));
    }

    fn bytes_read(&self) -> usize {
        self.read.iter().filter_map(Frame::data_ref).map(Bytes::len).sum()
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let (incoming, progress) = match &mut self.rest {
            Rest::Nothing => return Poll::Ready(None),
            Rest::Client { incoming, progress, .. } => (incoming, progress),
            Rest::Fed(feed) => return feed.poll_next(cx).map(|data| data.map(|data| Ok(Frame::data(data)))),
            Rest::Filtered(reader) => loop {
                match ready!(reader.poll(cx)) {
                    None => return Poll::Ready(None),
                    Some(Err(_cut)) => return Poll::Ready(Some(Err(BodyError::Ended))),
                    Some(Ok(piece)) => match frame_of(piece) {
                        Some(frame) => return Poll::Ready(Some(Ok(frame))),
                        None => continue,
                    },
                }
            },
        };
        let frame = ready!(Pin::new(incoming).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                progress.bytes.fetch_add(length as u64, Relaxed);
                if let (Some(messages), Some(data)) = (&mut self.messages, frame.data_ref()) {
                    progress.messages.fetch_add(messages.pass(data), Relaxed);
                }
            }
            Some(Err(_)) => progress.broken.store(true, Relaxed),
            None => {}
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Sender)))
    }
}

/// A piece as the connection writes it; `None`: nothing but the end.
pub(crate) fn frame_of(piece: Piece) -> Option<Frame<Bytes>> {
    match piece {
        Piece::Data { bytes, .. } => (!bytes.is_empty()).then(|| Frame::data(bytes)),
        Piece::Trailers(trailers) => Some(Frame::trailers(trailers)),
    }
}

/// A frame as filters see it, where it is not known whether another follows.
pub(crate) fn piece_of(frame: Frame<Bytes>) -> Option<Piece> {
    match frame.into_data() {
        Ok(bytes) => Some(Piece::Data { bytes, end_of_stream: false }),
        Err(frame) => frame.into_trailers().ok().map(Piece::Trailers),
    }
}

/// The body as filters are shown it. With HTTP/2 the last bytes say that they are the last; before it, the end comes by
/// itself (as in Envoy, which is what plugins were written against).
impl cairn_filter::Body for RequestBody {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        loop {
            let frame = match ready!(self.poll_rest(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(_)) => return Poll::Ready(Err(BodyBroken)),
                None => {
                    self.rest = Rest::Nothing;
                    return Poll::Ready(Ok(Piece::end()));
                }
            };
            let is_over = match &self.rest {
                Rest::Client { incoming, http2, .. } => *http2 && incoming.is_end_stream(),
                Rest::Nothing | Rest::Filtered(_) | Rest::Fed(_) => false,
            };
            match piece_of(frame) {
                Some(Piece::Data { bytes, .. }) if is_over => {
                    self.rest = Rest::Nothing;
                    return Poll::Ready(Ok(Piece::Data { bytes, end_of_stream: true }));
                }
                Some(Piece::Data { bytes, .. }) if bytes.is_empty() => {}
                Some(piece) => {
                    if piece.is_last() {
                        self.rest = Rest::Nothing;
                    }
                    return Poll::Ready(Ok(piece));
                }
                None => {}
            }
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.read.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => self.poll_rest(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty()
            && match &self.rest {
                Rest::Nothing => true,
                Rest::Client { incoming, .. } => incoming.is_end_stream(),
                Rest::Filtered(reader) => reader.is_over(),
                Rest::Fed(_) => false,
            }
    }

    fn size_hint(&self) -> SizeHint {
        let read = self.bytes_read() as u64;
        let rest = match &self.rest {
            Rest::Nothing => SizeHint::with_exact(0),
            Rest::Client { incoming, .. } => incoming.size_hint(),
            Rest::Fed(_) => SizeHint::default(),
            Rest::Filtered(reader) => {
                reader.left().map_or_else(SizeHint::default, |left| SizeHint::with_exact(left as u64))
            }
        };
        let mut whole = SizeHint::new();
        if let Some(upper) = rest.upper() {
            whole.set_upper(upper.saturating_add(read));
        }
        whole.set_lower(rest.lower().saturating_add(read));
        whole
    }
}
