//! Answers that a plugin gives in place of the upstream.

/// A local reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The HTTP status, 200 to 599.
    pub status: u16,
    /// Headers beside those the proxy sets. Text, since the official crate sends no other.
    pub headers: Vec<(String, String)>,
    /// The body; the message for gRPC.
    pub body: Vec<u8>,
}

impl Reply {
    /// A reply with a text body.
    pub fn text(status: u16, body: impl Into<String>) -> Self {
        Self { status, headers: Vec::new(), body: body.into().into_bytes() }
    }

    /// The same with one more header.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}
