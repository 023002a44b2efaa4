//! The heads of a request and of a response as filters see them: one form for HTTP/1.1 and HTTP/2.

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};

/// A request's head. What HTTP/2 carries in pseudo-headers and HTTP/1.1 in the request line and `Host` is in the
/// typed fields; `headers` never holds `host`.
#[derive(Clone, Debug)]
pub struct RequestHead {
    /// `:method`.
    pub method: Method,
    /// `:scheme`, `http` unless the client said otherwise.
    pub scheme: HeaderValue,
    /// `:authority` or `Host`, verbatim, a port included if the client sent one.
    pub authority: HeaderValue,
    /// `:path` with its query, after path normalisation.
    pub path: PathAndQuery,
    /// All other headers.
    pub headers: HeaderMap,
    /// The version the client spoke.
    pub version: Version,
}

impl RequestHead {
    /// Whether this is a gRPC request: `content-type: application/grpc`, alone or followed by `+` and more. Local
    /// replies to it are written as gRPC statuses. A type with parameters is none to Envoy, so it is none here.
    pub fn is_grpc(&self) -> bool {
        let Some(value) = self.headers.get(http::header::CONTENT_TYPE) else { return false };
        let Some(rest) = value.as_bytes().strip_prefix(b"application/grpc") else { return false };
        rest.is_empty() || rest[0] == b'+'
    }
}

/// A response's head.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// `:status`.
    pub status: StatusCode,
    /// All headers.
    pub headers: HeaderMap,
}
