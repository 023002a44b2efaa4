//! What modules are asked: requests, and what their authors expect of the answers.

use bytes::Bytes;
use std::fmt;

/// How large a body is that does not fit into one read.
pub const LARGE: usize = 300 << 10;

/// The version of HTTP that a request is sent with, from the client and to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Ask {
    pub version: Version,
    pub method: &'static str,
    pub path: String,
    pub headers: Vec<(&'static str, String)>,
    /// The pieces of its body; a single one is sent with its length, several without.
    pub body: Vec<Bytes>,
    pub trailers: Vec<(&'static str, &'static str)>,
    /// What services answer whom a module asks meanwhile.
    pub service: ServiceAnswer,
    /// What the module's author expects.
    pub expected: Vec<Expected>,
}

/// What a service answers a module.
#[derive(Clone, Debug)]
pub struct ServiceAnswer {
    pub status: u16,
    pub body: &'static str,
    /// The gRPC status, for those who ask by gRPC.
    pub grpc_status: u16,
}

impl Default for ServiceAnswer {
    fn default() -> Self {
        Self { status: 200, body: "0", grpc_status: 0 }
    }
}

/// What is expected of an answer.
#[derive(Clone, Debug)]
pub enum Expected {
    Status(u16),
    Header(&'static str, &'static str),
    Body(&'static str),
    /// A line in the module's log.
    Logged(&'static str),
    /// What the upstream got as the body.
    UpstreamBody(&'static str),
    /// The request did not go upstream.
    NotUpstream,
}

impl Ask {
    /// A `GET` over HTTP/1.1.
    pub fn get(path: &str) -> Self {
        Self {
            version: Version::Http1,
            method: "GET",
            path: path.to_owned(),
            headers: Vec::new(),
            body: Vec::new(),
            trailers: Vec::new(),
            service: ServiceAnswer::default(),
            expected: Vec::new(),
        }
    }

    /// A `POST` over HTTP/1.1 of a body with its length.
    pub fn post(path: &str, body: impl Into<Bytes>) -> Self {
        Self { method: "POST", body: vec![body.into()], ..Self::get(path) }
    }

    pub fn method(self, method: &'static str) -> Self {
        Self { method, ..self }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn http2(self) -> Self {
        Self { version: Version::Http2, ..self }
    }

    /// The body in pieces, without a length.
    pub fn pieces(self, pieces: &[&'static str]) -> Self {
        Self { body: pieces.iter().map(|piece| Bytes::from(*piece)).collect(), ..self }
    }

    pub fn trailer(mut self, name: &'static str, value: &'static str) -> Self {
        self.trailers.push((name, value));
        self
    }

    pub fn service(self, status: u16, body: &'static str) -> Self {
        Self { service: ServiceAnswer { status, body, ..ServiceAnswer::default() }, ..self }
    }

    pub fn grpc_service(self, grpc_status: u16) -> Self {
        Self { service: ServiceAnswer { grpc_status, ..ServiceAnswer::default() }, ..self }
    }

    pub fn expect(mut self, expected: Expected) -> Self {
        self.expected.push(expected);
        self
    }

    pub fn expect_status(self, status: u16) -> Self {
        self.expect(Expected::Status(status))
    }

    pub fn expect_body(self, body: &'static str) -> Self {
        self.expect(Expected::Body(body))
    }

    pub fn expect_header(self, name: &'static str, value: &'static str) -> Self {
        self.expect(Expected::Header(name, value))
    }
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} {}", self.version, self.method, self.path)?;
        for (name, value) in &self.headers {
            write!(f, " {name}: {value};")?;
        }
        let sizes: Vec<usize> = self.body.iter().map(Bytes::len).collect();
        write!(f, " body of {sizes:?} bytes, trailers {:?}", self.trailers)
    }
}

/// What every module is asked, whatever it does, with a body of so many bytes among others. Paths say what the upstream does
/// (see `upstream.rs`).
pub fn of_all(large: usize) -> Vec<Ask> {
    let large = || "x".repeat(large);
    let grpc = |ask: Ask| ask.http2().header("content-type", "application/grpc").header("te", "trailers");
    vec![
        Ask::get("/echo"),
        Ask::get("/echo?a=1&b=two%20words"),
        Ask::get("/echo").header("x-double", "one").header("x-double", "two"),
        Ask::get("/echo").header("x-empty", ""),
        Ask::get("/echo").method("HEAD"),
        Ask::get("/large"),
        Ask::get("/pieces"),
        Ask::get("/empty"),
        Ask::get("/status/404"),
        Ask::get("/status/503"),
        Ask::get("/close"),
        Ask::get("/slow"),
        Ask::post("/echo", "a small body").header("content-type", "text/plain"),
        Ask::post("/echo", large()),
        Ask::post("/echo", "").pieces(&["one piece, ", "another, ", "the last"]),
        Ask::get("/echo").http2(),
        Ask::post("/echo", "a small body").http2(),
        Ask::post("/trailers", "").pieces(&["one piece, ", "the last"]).http2().trailer("x-checksum", "123"),
        grpc(Ask::post("/grpc/Service/Method", "\0\0\0\0\u{3}abc")),
        grpc(Ask::post("/grpc/Service/Method", "\0\0\0\0\u{3}abc")).grpc_service(7),
    ]
}
