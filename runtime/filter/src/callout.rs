//! How a filter asks another service: external authorization, keys of an issuer, calls of plugins.

use bytes::Bytes;
use http::{HeaderMap, Request, Response, Version};
use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// One question to another service.
#[derive(Clone, Debug)]
pub struct CalloutRequest {
    /// The service's hostname.
    pub host: Arc<str>,
    /// The namespace in which the hostname is meant; `None`: wherever there is one.
    pub namespace: Option<Arc<str>>,
    /// The service's port.
    pub port: u16,
    /// Whether to speak HTTP/2, as gRPC needs, or HTTP/1.1.
    pub http2: bool,
    /// What is asked. Its URI has scheme, authority and path.
    pub request: Request<Bytes>,
    /// What follows the body. Sent over HTTP/2; HTTP/1.1 has no place for it beside a length.
    pub trailers: HeaderMap,
    /// How long the whole answer may take.
    pub timeout: Duration,
    /// The most bytes of the answer's body.
    pub answer_bytes_max: usize,
}

/// The answer, whole.
#[derive(Clone, Debug)]
pub struct CalloutAnswer {
    /// Status, headers and body.
    pub response: Response<Bytes>,
    /// Trailers, where gRPC has its status; empty if there were none.
    pub trailers: HeaderMap,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CalloutError {
    /// The mesh does not know the service.
    #[error("service `{0}` is not known")]
    UnknownService(String),
    /// It has no endpoint that can be used.
    #[error("service `{0}` has no endpoint")]
    NoEndpoint(String),
    /// The endpoint could not be reached.
    #[error("the endpoint did not answer: {0}")]
    Unreachable(String),
    /// The endpoint was reached and ended the connection or the stream before it answered.
    #[error("the endpoint closed before it answered")]
    Closed,
    /// The answer began and was not whole.
    #[error("the answer broke off: {0}")]
    BrokenOff(String),
    /// It took too long.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The answer is longer than allowed.
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
}

/// An answer on its way.
pub type CalloutFuture = Pin<Box<dyn Future<Output = Result<CalloutAnswer, CalloutError>> + Send>>;

/// What a filter sends in the course of a stream.
pub trait CalloutFeed: Send {
    /// The next bytes; `None`: that was all.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>>;
}

/// A part of an answer that comes in the course of a stream.
#[derive(Clone, Debug)]
pub enum CalloutPart {
    /// Bytes of the body.
    Data(Bytes),
    /// What follows the body.
    Trailers(HeaderMap),
}

/// The rest of an answer that comes in the course of a stream. Dropping it ends the stream.
pub trait CalloutParts: Send {
    /// The next part; `None`: that was all.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<CalloutPart, CalloutError>>>;
}

/// The head of a streamed answer on its way, with the rest of it as its body.
pub type CalloutOpening =
    Pin<Box<dyn Future<Output = Result<Response<Box<dyn CalloutParts>>, CalloutError>> + Send>>;

/// How filters reach other services from the worker that owns the connection. The HTTP engine implements it over its
/// pooled upstream connections.
pub trait Callout: Debug + Send + Sync {
    /// Asks once, without retry. The future bounds its own waiting; dropping it abandons the question.
    fn call(&self, request: CalloutRequest) -> CalloutFuture;

    /// Opens a stream over HTTP/2: what `feed` gives follows the request's own body, and the answer comes in parts. The
    /// timeout bounds the wait for the answer's head only.
    fn open(&self, request: CalloutRequest, feed: Box<dyn CalloutFeed>) -> CalloutOpening {
        drop(feed);
        Box::pin(std::future::ready(Err(CalloutError::UnknownService(request.host.to_string()))))
    }

    /// The version of HTTP that a service of the mesh speaks on this port, or `None` when there is no such service or
    /// port. For those who must know before they ask.
    fn version(&self, host: &str, namespace: Option<&str>, port: u16) -> Option<Version> {
        let _ = (host, namespace, port);
        None
    }
}

/// A callout for where nothing can be reached: it knows no service.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCallout;

impl Callout for NoCallout {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        Box::pin(std::future::ready(Err(CalloutError::UnknownService(request.host.to_string()))))
    }
}
