//! A response's body on its way to the client: as it comes from upstream, or through filters that want to see it.

use crate::body::{BodyError, frame_of, piece_of};
use crate::pipe::{Reader, Writer, pipe};
use crate::record::{Ending, Record};
use crate::upload::{Length, Stopped, Upload};
use crate::upstream::Lease;
use bytes::Bytes;
use cairn_filter::{BodyBroken, Outcome, Piece};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// What the upstream sends, as filters are shown it. With HTTP/2 the last bytes say that they are the last; before it,
/// the end comes by itself (as in Envoy).
pub(crate) struct Source {
    pub(crate) incoming: Incoming,
    pub(crate) http2: bool,
    /// There is no need to ask for the end.
    is_over: bool,
}

impl Source {
    pub(crate) fn new(incoming: Incoming, http2: bool) -> Self {
        Self { incoming, http2, is_over: false }
    }
}

impl cairn_filter::Body for Source {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        loop {
            if self.is_over {
                return Poll::Ready(Ok(Piece::end()));
            }
            let frame = match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(_)) => return Poll::Ready(Err(BodyBroken)),
                None => return Poll::Ready(Ok(Piece::end())),
            };
            self.is_over = self.incoming.is_end_stream();
            match piece_of(frame) {
                Some(Piece::Data { bytes, .. }) if self.is_over && self.http2 => {
                    return Poll::Ready(Ok(Piece::Data { bytes, end_of_stream: true }));
                }
                Some(Piece::Data { bytes, .. }) if bytes.is_empty() => {}
                Some(piece) => return Poll::Ready(Ok(piece)),
                None => {}
            }
        }
    }
}

/// A body made here, as filters are shown it.
pub(crate) struct Made(pub(crate) Bytes);

impl cairn_filter::Body for Made {
    fn poll_piece(&mut self, _: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        Poll::Ready(Ok(Piece::Data { bytes: std::mem::take(&mut self.0), end_of_stream: true }))
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
    Filtered(Box<Filtered>),
    /// From a task that also looks after the request's body.
    Piped(Reader),
}

/// A body on its way through the filters.
pub(crate) struct Filtered {
    source: Source,
    /// What the filters let pass and is not written yet.
    ready: VecDeque<Piece>,
    length: Length,
    /// The filters let the last piece pass.
    is_over: bool,
    /// What came of the filters, for when all that passed before it is written.
    stopped: Option<Stopped>,
}

impl Filtered {
    pub(crate) fn new(source: Source, length: Length) -> Self {
        Self { source, ready: VecDeque::new(), length, is_over: false, stopped: None }
    }

    /// What the filters let pass first, before the head went.
    pub(crate) fn begins_with(&mut self, piece: Piece) -> Result<(), Stopped> {
        self.take(piece)
    }

    fn take(&mut self, piece: Piece) -> Result<(), Stopped> {
        self.length.count(&piece)?;
        self.is_over = piece.is_last();
        if piece.length() > 0 || matches!(piece, Piece::Trailers(_)) {
            self.ready.push_back(piece);
        }
        Ok(())
    }

    /// Asks the filters for more.
    fn poll_more(&mut self, cx: &mut Context<'_>, record: &mut Record) -> Poll<()> {
        if self.is_over || self.stopped.is_some() {
            return Poll::Ready(());
        }
        let Record { running, exchange, .. } = record;
        let piece = ready!(running.poll_response_body(cx, exchange, &mut self.source));
        self.stopped = piece.map_err(Stopped::By).and_then(|piece| self.take(piece)).err();
        Poll::Ready(())
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        record: &mut Record,
    ) -> Poll<Option<Result<Frame<Bytes>, Ending>>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                let Some(frame) = frame_of(piece) else { continue };
                // Who was told the length does not ask for the end, but the filters wait for it.
                if self.length.is_reached() && self.ready.is_empty() {
                    let _may_be_pending = self.poll_more(cx, record);
                }
                return Poll::Ready(Some(Ok(frame)));
            }
            if let Some(stopped) = &self.stopped {
                return Poll::Ready(Some(Err(ending(stopped))));
            }
            if self.is_over {
                return Poll::Ready(None);
            }
            ready!(self.poll_more(cx, record));
        }
    }
}

/// How an exchange ends whose response has begun.
pub(crate) fn ending(stopped: &Stopped) -> Ending {
    match stopped {
        Stopped::Length => Ending::LengthChanged,
        Stopped::By(Outcome::BodyBroken) => Ending::UpstreamCut,
        Stopped::By(Outcome::TooLarge) => Ending::TooLarge,
        Stopped::By(Outcome::Reply(_) | Outcome::Reset | Outcome::Continue) => Ending::FilterReset,
    }
}

impl ResponseBody {
    pub(crate) fn full(bytes: Bytes, record: Option<Box<Record>>) -> Self {
        Self { content: Content::Full(bytes), record, lease: None }
    }

    pub(crate) fn upstream(incoming: Incoming, record: Box<Record>, lease: Lease) -> Self {
        Self { content: Content::Upstream(incoming), record: Some(record), lease: Some(lease) }
    }

    pub(crate) fn filtered(filtered: Filtered, record: Box<Record>, lease: Lease) -> Self {
        Self { content: Content::Filtered(Box::new(filtered)), record: Some(record), lease: Some(lease) }
    }

    /// A body that comes while the request's is still on its way: a task looks after both, until they or the client end.
    pub(crate) fn with_upload(self, upload: Upload) -> Self {
        let (writer, reader) = pipe();
        tokio::spawn(both(self, upload, writer));
        Self { content: Content::Piped(reader), record: None, lease: None }
    }

    fn is_over(&self) -> bool {
        match &self.content {
            Content::Full(bytes) => bytes.is_empty(),
            Content::Upstream(incoming) => incoming.is_end_stream(),
            Content::Filtered(filtered) => filtered.is_over && filtered.ready.is_empty(),
            Content::Piped(reader) => reader.is_over(),
        }
    }

    /// How the exchange ends when nobody asks for more: who reads a body of known length does not ask for its end.
    fn ending_now(&self) -> Ending {
        let is_delivered = match &self.content {
            Content::Filtered(filtered) => match &filtered.stopped {
                Some(stopped) => return ending(stopped),
                None => filtered.ready.is_empty() && (filtered.is_over || filtered.length.is_reached()),
            },
            Content::Full(_) | Content::Upstream(_) | Content::Piped(_) => self.is_over(),
        };
        if is_delivered { Ending::Complete } else { Ending::ClientGone }
    }

    fn finish(&mut self, ending: Ending) {
        if let Some(mut record) = self.record.take() {
            record.end(ending);
        }
        if let Some(lease) = self.lease.take().filter(|_| ending == Ending::Complete) {
            lease.put_back();
        }
    }

    fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let (frame, ending) = match &mut self.content {
            Content::Full(bytes) if bytes.is_empty() => (None, Ending::Complete),
            Content::Full(bytes) => (Some(Ok(Frame::data(std::mem::take(bytes)))), Ending::Complete),
            Content::Upstream(incoming) => {
                let frame = ready!(Pin::new(incoming).poll_frame(cx));
                let ending = if frame.is_none() { Ending::Complete } else { Ending::UpstreamCut };
                (frame.map(|frame| frame.map_err(BodyError::Sender)), ending)
            }
            Content::Piped(reader) => loop {
                match ready!(reader.poll(cx)) {
                    None => return Poll::Ready(None),
                    Some(Err(_cut)) => return Poll::Ready(Some(Err(BodyError::Ended))),
                    Some(Ok(piece)) => {
                        if let Some(frame) = frame_of(piece) {
                            return Poll::Ready(Some(Ok(frame)));
                        }
                    }
                }
            },
            Content::Filtered(filtered) => {
                let Some(record) = &mut self.record else { return Poll::Ready(None) };
                match ready!(filtered.poll_frame(cx, record)) {
                    None => (None, Ending::Complete),
                    Some(Ok(frame)) => (Some(Ok(frame)), Ending::Complete),
                    Some(Err(ending)) => (Some(Err(BodyError::Ended)), ending),
                }
            }
        };
        match &frame {
            None | Some(Err(_)) => self.finish(ending),
            Some(Ok(frame)) => {
                if let Some(record) = &mut self.record {
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
}

/// Looks after both bodies of an exchange.
async fn both(mut response: ResponseBody, upload: Upload, writer: Writer) {
    let mut upload = Some(upload);
    poll_fn(|cx| {
        loop {
            if let (Some(going), Some(record)) = (&mut upload, &mut response.record) {
                match going.poll(cx, record) {
                    Poll::Pending => {}
                    Poll::Ready(Ok(())) => upload = None,
                    Poll::Ready(Err(Stopped::By(Outcome::BodyBroken))) => {
                        response.finish(Ending::ClientGone);
                        return Poll::Ready(());
                    }
                    Poll::Ready(Err(stopped)) => {
                        response.finish(ending(&stopped));
                        return Poll::Ready(());
                    }
                }
            }
            if writer.poll_closed(cx).is_ready() {
                return Poll::Ready(());
            }
            if ready!(writer.poll_room(cx)).is_err() {
                return Poll::Ready(());
            }
            match ready!(response.poll_content(cx)) {
                None => {
                    writer.send(Piece::end());
                    return Poll::Ready(());
                }
                Some(Err(_)) => return Poll::Ready(()),
                Some(Ok(frame)) => {
                    let piece = piece_of(frame);
                    let is_last = piece.as_ref().is_some_and(Piece::is_last);
                    if let Some(piece) = piece {
                        writer.send(piece);
                    }
                    if is_last {
                        response.finish(Ending::Complete);
                        return Poll::Ready(());
                    }
                }
            }
        }
    })
    .await;
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.poll_content(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Upstream(incoming) => incoming.size_hint(),
            Content::Filtered(_) => SizeHint::default(),
            Content::Piped(reader) => {
                reader.left().map_or_else(SizeHint::default, |left| SizeHint::with_exact(left as u64))
            }
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        let ending = self.ending_now();
        self.finish(ending);
    }
}
