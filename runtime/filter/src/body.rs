//! Bodies as filters meet them: pieces on their way, what of them a filter is shown, and where they come from.

use crate::{Phases, RequestHead, ResponseHead};
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A piece of a body on its way. Nothing follows trailers, or data that ends the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Some bytes, or none.
    Data {
        /// The bytes.
        bytes: Bytes,
        /// Whether they are the last, and no trailers follow.
        end_of_stream: bool,
    },
    /// What follows the last bytes.
    Trailers(HeaderMap),
}

impl Piece {
    /// The end of a body that has no trailers.
    pub fn end() -> Self {
        Self::Data { bytes: Bytes::new(), end_of_stream: true }
    }

    /// Whether nothing follows.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Trailers(_) | Self::Data { end_of_stream: true, .. })
    }

    /// How many bytes of the body it has.
    pub fn length(&self) -> usize {
        match self {
            Self::Data { bytes, .. } => bytes.len(),
            Self::Trailers(_) => 0,
        }
    }
}

/// What a filter is shown of a body: what came since it last let something pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The bytes. A filter changes them by putting others here.
    pub bytes: Bytes,
    /// Whether the body ends with them, and no trailers follow.
    pub end_of_stream: bool,
    /// The trailers, in their phase. At the end of a body without trailers, a filter may put some here.
    pub trailers: Option<HeaderMap>,
    /// Set by a filter that put other bytes here.
    pub is_changed: bool,
}

impl Chunk {
    /// Takes up what comes next.
    pub(crate) fn add(&mut self, piece: Piece) {
        match piece {
            Piece::Trailers(trailers) => self.trailers = Some(trailers),
            Piece::Data { bytes, end_of_stream } => {
                self.end_of_stream = end_of_stream;
                append(&mut self.bytes, bytes);
            }
        }
    }

    /// Whether nothing more will come.
    pub(crate) fn is_last(&self) -> bool {
        self.end_of_stream || self.trailers.is_some()
    }
}

/// Puts bytes behind others, in place where nobody else looks at them.
pub fn append(bytes: &mut Bytes, more: Bytes) {
    if bytes.is_empty() {
        *bytes = more;
    } else if !more.is_empty() {
        let held = std::mem::take(bytes);
        let mut joined = held.try_into_mut().unwrap_or_else(|held| BytesMut::from(&held[..]));
        joined.extend_from_slice(&more);
        *bytes = joined.freeze();
    }
}

/// Which way a body goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Upstream.
    Request,
    /// Downstream.
    Response,
}

impl Side {
    /// The phases of bodies and of trailers on this side.
    pub(crate) fn phases(self) -> (Phases, Phases) {
        match self {
            Self::Request => (Phases::REQUEST_BODY, Phases::REQUEST_TRAILERS),
            Self::Response => (Phases::RESPONSE_BODY, Phases::RESPONSE_TRAILERS),
        }
    }
}

/// A head that a filter holds while it is shown the body.
#[derive(Debug)]
pub enum HeldHead<'a> {
    /// Of the request.
    Request(&'a mut RequestHead),
    /// Of the response.
    Response(&'a mut ResponseHead),
}

/// What a filter is asked about in the phases of a body.
#[derive(Debug)]
pub struct Part<'a> {
    /// Whose body it is.
    pub side: Side,
    /// The head, if this filter holds it.
    pub head: Option<HeldHead<'a>>,
    /// What it is shown.
    pub chunk: &'a mut Chunk,
}

/// Something to wait for.
pub type Until = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How a filter holds what it was shown.
#[derive(Default)]
pub struct Hold {
    /// When this resolves, [`crate::Filter::resumed`] is asked. Without it, the filter is only asked again when more
    /// comes; at the end of a body there is no more, so what it holds goes on. It must bound its own waiting.
    pub until: Option<Until>,
    /// Bytes that the filter took out of the chunk and keeps itself.
    pub kept: usize,
    /// What happens when it holds as much as may be held.
    pub when_full: WhenFull,
}

/// What happens when a filter holds as much of a body as may be held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The exchange fails: the body is too large.
    #[default]
    Fail,
    /// No more is read until the filter lets some of it pass.
    Wait,
}

/// What was read of a request's body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BodyRead {
    /// Its first bytes, at most as many as were asked for.
    pub bytes: Bytes,
    /// Whether that is all of it.
    pub is_whole: bool,
}

/// The sender of a body broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sender broke off within its body")]
pub struct BodyBroken;

/// Where a body comes from.
pub trait Body: Send {
    /// The next piece; not called again after the last.
    ///
    /// # Errors
    /// The sender broke off.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>>;
}

/// No body.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoBody;

impl Body for NoBody {
    fn poll_piece(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        Poll::Ready(Ok(Piece::end()))
    }
}
