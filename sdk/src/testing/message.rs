//! What tests send, answer and look at.

use crate::abi::Pairs;
use std::time::Duration;

/// A request that a test sends, to the authority `test`.
#[derive(Clone, Debug)]
pub struct TestRequest {
    pub(crate) headers: Pairs,
    pub(crate) chunks: Vec<Vec<u8>>,
    pub(crate) trailers: Pairs,
}

impl TestRequest {
    /// A request without a body.
    pub fn new(method: &str, path: &str) -> Self {
        let pseudo = [(":authority", "test"), (":path", path), (":method", method), (":scheme", "http")];
        let headers = pseudo.map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec())).to_vec();
        Self { headers, chunks: Vec::new(), trailers: Pairs::new() }
    }

    /// A `GET`.
    pub fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    /// A `POST` of this body.
    pub fn post(path: &str, body: impl AsRef<[u8]>) -> Self {
        Self::new("POST", path).body(body)
    }

    /// The same with one more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        push(&mut self.headers, canonical(name), value.as_ref());
        self
    }

    /// The same with this body, in one piece.
    #[must_use]
    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.chunks = vec![body.as_ref().to_vec()];
        self
    }

    /// The same with its body cut into pieces of this many bytes.
    #[must_use]
    pub fn cut(mut self, size: usize) -> Self {
        self.chunks = cut(&self.chunks, size);
        self
    }

    /// The same with one more trailer.
    #[must_use]
    pub fn trailer(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        push(&mut self.trailers, name.to_ascii_lowercase(), value.as_ref());
        self
    }
}

/// What an upstream or a cluster answers in a test.
#[derive(Clone, Debug)]
pub struct TestResponse {
    pub(crate) headers: Pairs,
    pub(crate) chunks: Vec<Vec<u8>>,
    pub(crate) trailers: Pairs,
    pub(crate) delay: Duration,
    pub(crate) fails: bool,
}

impl TestResponse {
    /// A response without a body.
    pub fn new(status: u16) -> Self {
        let headers = vec![(":status".to_owned(), status.to_string().into_bytes())];
        Self { headers, chunks: Vec::new(), trailers: Pairs::new(), delay: Duration::ZERO, fails: false }
    }

    /// No response: what a callout meets whose connection breaks. As an upstream's response it is a 503.
    pub fn failure() -> Self {
        Self { fails: true, ..Self::new(503) }
    }

    /// The same with one more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        push(&mut self.headers, name.to_ascii_lowercase(), value.as_ref());
        self
    }

    /// The same with this body.
    #[must_use]
    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.chunks = vec![body.as_ref().to_vec()];
        self
    }

    /// The same with its body cut into pieces of this many bytes.
    #[must_use]
    pub fn cut(mut self, size: usize) -> Self {
        self.chunks = cut(&self.chunks, size);
        self
    }

    /// The same with one more trailer.
    #[must_use]
    pub fn trailer(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        push(&mut self.trailers, name.to_ascii_lowercase(), value.as_ref());
        self
    }

    /// The same after this time; a callout that waits for less is answered with 504, as proxies do.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }
}

/// What an upstream or a cluster received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// The headers in order, pseudo-headers first.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body.
    pub body: Vec<u8>,
    /// The trailers.
    pub trailers: Vec<(String, Vec<u8>)>,
}

impl Sent {
    /// The first value of a header as text.
    pub fn header(&self, name: &str) -> Option<String> {
        self.header_values(name).into_iter().next()
    }

    /// All values of a header as text.
    pub fn header_values(&self, name: &str) -> Vec<String> {
        values(&self.headers, &canonical(name))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// How an exchange ended for the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The status of the response.
    pub status: u16,
    /// Its headers in order, `:status` first.
    pub headers: Vec<(String, Vec<u8>)>,
    /// Its body.
    pub body: Vec<u8>,
    /// Its trailers.
    pub trailers: Vec<(String, Vec<u8>)>,
    /// The details of a plugin's reply.
    pub details: String,
    /// The gRPC status of a plugin's reply.
    pub grpc_status: Option<u32>,
    /// What the upstream received; `None` if the plugin answered.
    pub upstream: Option<Sent>,
    /// How long it took, by the test's clock.
    pub took: Duration,
}

impl Outcome {
    /// The first value of a header as text.
    pub fn header(&self, name: &str) -> Option<String> {
        self.header_values(name).into_iter().next()
    }

    /// All values of a header as text.
    pub fn header_values(&self, name: &str) -> Vec<String> {
        values(&self.headers, &name.to_ascii_lowercase())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Proxies take `host` for `:authority`, and lower-case names.
pub(crate) fn canonical(name: &str) -> String {
    match name.to_ascii_lowercase() {
        name if name == "host" => ":authority".to_owned(),
        name => name,
    }
}

fn values(pairs: &Pairs, name: &str) -> Vec<String> {
    let same = pairs.iter().filter(|(present, _)| present == name);
    same.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect()
}

fn push(pairs: &mut Pairs, name: String, value: &[u8]) {
    pairs.push((name, value.to_vec()));
}

fn cut(chunks: &[Vec<u8>], size: usize) -> Vec<Vec<u8>> {
    chunks.concat().chunks(size.max(1)).map(<[u8]>::to_vec).collect()
}
