//! What a filter answers in place of the upstream, and who decided it.

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use std::borrow::Cow;

/// An answer made here instead of upstream. The HTTP engine turns it into the response: plain for HTTP, a
/// headers-only gRPC status for gRPC requests (see `http/src/failure.rs`).
#[derive(Clone, Debug)]
pub struct LocalReply {
    /// The HTTP status for a client that does not speak gRPC.
    pub status: StatusCode,
    /// The gRPC status, 0–16, or `None` to derive it from `status`.
    pub grpc_status: Option<u8>,
    /// The body; becomes `grpc-message` for gRPC.
    pub body: Bytes,
    /// Headers beside the ones the engine sets. A `content-type` here replaces `text/plain`.
    pub headers: HeaderMap,
    /// Envoy's `%RESPONSE_CODE_DETAILS%`: one word, white space replaced by `_`.
    pub details: Cow<'static, str>,
}

impl LocalReply {
    /// A reply with `status` and a text body.
    pub fn text(status: StatusCode, body: impl Into<Bytes>, details: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            grpc_status: None,
            body: body.into(),
            headers: HeaderMap::new(),
            details: details.into(),
        }
    }

    /// The answer to a request that authorization denies: 403 `RBAC: access denied`, as Envoy's RBAC filter words it.
    /// The peer learns no more than that; what decided is in the [`Denial`] of the exchange.
    pub fn access_denied(details: impl Into<Cow<'static, str>>) -> Self {
        Self::text(StatusCode::FORBIDDEN, Bytes::from_static(b"RBAC: access denied"), details)
    }
}

/// Which policy denied, and why: for the log and the explain endpoint, never for the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The policy as Istio names it, `ns[x]-policy[y]-rule[0]`, or `none` when no ALLOW policy matched.
    pub policy: Cow<'static, str>,
    /// One sentence: what was looked for and not found.
    pub reason: String,
}
