//! A request's body, for filters that ask for it.

use bytes::Bytes;
use std::future::Future;
use std::pin::Pin;

/// What was read of a request's body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BodyRead {
    /// Its first bytes, at most as many as were asked for.
    pub bytes: Bytes,
    /// Whether that is all of it.
    pub is_whole: bool,
}

/// The client broke off within its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client broke off within its request")]
pub struct BodyBroken;

/// A body on its way.
pub type BodyFuture<'a> = Pin<Box<dyn Future<Output = Result<BodyRead, BodyBroken>> + Send + 'a>>;

/// A request's body before it goes upstream. What is read of it is kept, and goes upstream as it came.
pub trait Body: Send {
    /// Reads until its end, or until there is more than `bytes_max`. It may be asked again, for more or less.
    fn read(&mut self, bytes_max: usize) -> BodyFuture<'_>;
}

/// No body.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoBody;

impl Body for NoBody {
    fn read(&mut self, _bytes_max: usize) -> BodyFuture<'_> {
        Box::pin(std::future::ready(Ok(BodyRead { bytes: Bytes::new(), is_whole: true })))
    }
}
