//! Answers that a plugin gives in place of the upstream.

/// A local reply.
///
/// ```
/// use cairn_sdk::Reply;
///
/// let reply = Reply::text(429, "slow down").with_header("retry-after", "3").with_details("over the limit");
/// assert_eq!((reply.status, reply.body.as_slice()), (429, &b"slow down"[..]));
/// let problem = Reply::json(400, r#"{"title":"no"}"#).with_grpc_status(3);
/// assert_eq!(problem.headers[0], ("content-type".to_owned(), b"application/json".to_vec()));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The HTTP status, 200 to 599.
    pub status: u16,
    /// Headers beside those that the proxy sets.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body; the message for gRPC.
    pub body: Vec<u8>,
    /// Why, for the access log (`response_code_details`).
    pub details: String,
    /// The status for gRPC clients. None leaves it to the proxy.
    pub grpc_status: Option<u32>,
}

impl Reply {
    /// A reply without a body.
    pub fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), details: String::new(), grpc_status: None }
    }

    /// A reply with a text body.
    pub fn text(status: u16, body: impl Into<String>) -> Self {
        Self { body: body.into().into_bytes(), ..Self::empty(status) }
    }

    /// A reply with a body that is JSON.
    pub fn json(status: u16, body: impl Into<String>) -> Self {
        Self::text(status, body).with_header("content-type", "application/json")
    }

    /// The same with one more header.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.into(), value.as_ref().to_vec()));
        self
    }

    /// The same with a reason for the access log.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// The same with a status for gRPC clients.
    #[must_use]
    pub fn with_grpc_status(mut self, status: u32) -> Self {
        self.grpc_status = Some(status);
        self
    }
}
