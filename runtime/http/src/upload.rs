//! A request's body under the eyes of filters: taken from the client, shown to the filters, and handed to the upstream
//! connection, all in the task of the exchange, so that filters are never run by two tasks.

use crate::body::RequestBody;
use crate::pipe::{Closed, Writer, pipe};
use crate::record::Record;
use cairn_filter::{Outcome, Piece, RequestHead, Side};
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderValue};
use std::future::poll_fn;
use std::task::{Context, Poll, ready};

/// What ends an exchange within its body.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// A filter, or the sender.
    By(Outcome),
    /// The body is not as long as its head said, which is gone.
    Length,
}

/// A request's body on its way through the filters.
pub(crate) struct Upload {
    source: RequestBody,
    writer: Writer,
    length: Length,
}

/// How long a body is said to be, and how long it has become.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Length {
    pub(crate) declared: Option<u64>,
    pub(crate) sent: u64,
}

impl Length {
    /// Counts a piece.
    ///
    /// # Errors
    /// There is more than was declared, or less at the end.
    pub(crate) fn count(&mut self, piece: &Piece) -> Result<(), Stopped> {
        self.sent += piece.length() as u64;
        match self.declared {
            Some(declared) if self.sent > declared => Err(Stopped::Length),
            Some(declared) if piece.is_last() && self.sent < declared => Err(Stopped::Length),
            _ => Ok(()),
        }
    }

    /// Whether all that was declared is sent.
    pub(crate) fn is_reached(&self) -> bool {
        self.declared == Some(self.sent)
    }
}

impl Upload {
    /// Begins to show the body to the filters. Where the head says how long it is, it does not go before the filters let
    /// the first piece of the body pass: what they have changed by then, the head can still tell.
    pub(crate) async fn begin(
        mut source: RequestBody,
        record: &mut Record,
        head: &mut RequestHead,
    ) -> Result<(RequestBody, Option<Self>), Stopped> {
        let mut length = Length::default();
        let mut first = None;
        if head.headers.contains_key(CONTENT_LENGTH) {
            let Record { running, exchange, .. } = record;
            let piece = poll_fn(|cx| running.poll_request_body(cx, exchange, &mut source)).await;
            let piece = piece.map_err(Stopped::By)?;
            length.declared = declare(&mut head.headers, &piece, running.is_body_changed(Side::Request));
            length.count(&piece)?;
            match piece {
                Piece::Data { bytes, end_of_stream: true } => return Ok((RequestBody::full(bytes), None)),
                piece if piece.is_last() => {
                    let mut body = RequestBody::none();
                    body.put_back(std::iter::once(piece));
                    return Ok((body, None));
                }
                piece => first = Some(piece),
            }
        }
        let (writer, reader) = pipe();
        let body = RequestBody::filtered(first, reader);
        Ok((body, Some(Self { source, writer, length })))
    }

    /// Goes on as far as it gets; resolves when nothing is left to do.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, record: &mut Record) -> Poll<Result<(), Stopped>> {
        loop {
            if let Err(Closed) = ready!(self.writer.poll_room(cx)) {
                // Who was told the length does not ask for the end, but the filters wait for it.
                if !self.length.is_reached() {
                    return Poll::Ready(Ok(()));
                }
            }
            let Record { running, exchange, .. } = &mut *record;
            let piece = ready!(running.poll_request_body(cx, exchange, &mut self.source));
            let piece = piece.map_err(Stopped::By)?;
            self.length.count(&piece)?;
            let is_last = piece.is_last();
            self.writer.send(piece);
            if is_last {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// Goes on with an upload, if there is one, while something else is waited for.
pub(crate) async fn alongside<T>(
    upload: &mut Option<Upload>,
    record: &mut Record,
    mut other: impl FnMut(&mut Context<'_>, &mut Record) -> Poll<T>,
) -> Result<T, Stopped> {
    poll_fn(|cx| {
        if let Some(going) = upload {
            match going.poll(cx, record) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => *upload = None,
                Poll::Ready(Err(stopped)) => {
                    *upload = None;
                    return Poll::Ready(Err(stopped));
                }
            }
        }
        other(cx, record).map(Ok)
    })
    .await
}

/// Makes the head say how long the body is, as far as that is known when its first piece is here. Returns what it says.
pub(crate) fn declare(headers: &mut HeaderMap, first: &Piece, is_changed: bool) -> Option<u64> {
    match first {
        Piece::Data { bytes, end_of_stream: true } => {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
            Some(bytes.len() as u64)
        }
        Piece::Data { .. } if !is_changed => headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok(),
        // Nobody knows what else will be changed.
        Piece::Data { .. } | Piece::Trailers(_) => {
            headers.remove(CONTENT_LENGTH);
            None
        }
    }
}
