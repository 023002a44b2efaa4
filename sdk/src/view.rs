//! Requests, responses, bodies and trailers as handlers see them: handles to what the proxy holds of the exchange at hand,
//! cheap to copy into a future. Values of headers are bytes, as in HTTP: text that is not UTF-8 is no reason for a plugin to
//! die. A change that the proxy refuses is logged and does nothing.

use crate::abi::{Buffer, HostError, Map, Side};
use crate::{Properties, sys};

/// A request whose headers have arrived. `host` is another name of `:authority`.
#[derive(Clone, Copy, Debug)]
pub struct Request(pub(crate) ());

/// A response whose headers have arrived, from the upstream or as a local reply.
#[derive(Clone, Copy, Debug)]
pub struct Response(pub(crate) ());

/// The trailers of a request or response.
///
/// ```
/// use cairn_sdk::{Flow, Plugin, Response, Trailers};
/// # use cairn_sdk::testing::{Proxy, TestRequest, TestResponse};
///
/// struct Status;
///
/// #[cairn_sdk::plugin]
/// impl Plugin for Status {
///     type Config = ();
///     type Exchange = ();
/// #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
///
///     fn on_response_trailers(&self, _: Response, trailers: Trailers, _: &mut ()) -> Flow {
///         trailers.set("x-seen", trailers.get("grpc-status").unwrap_or_default());
///         Flow::Continue
///     }
/// }
/// # let mut proxy = Proxy::<Status>::new("").unwrap();
/// # proxy.upstream(|_| TestResponse::new(200).trailer("grpc-status", "5"));
/// # let outcome = proxy.send(TestRequest::get("/"));
/// # assert_eq!(outcome.trailers[1], ("x-seen".to_owned(), b"5".to_vec()));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Trailers {
    map: Map,
}

/// A whole body.
#[derive(Clone, Copy, Debug)]
pub struct Body {
    side: Side,
}

/// A piece of a body, or of what is sent on a connection, on its way.
#[derive(Debug)]
pub struct Chunk {
    buffer: Buffer,
    length: usize,
    last: bool,
}

impl Request {
    /// The method; empty if the proxy does not say.
    pub fn method(&self) -> String {
        text(self.header(":method"))
    }

    /// The path with its query.
    pub fn path(&self) -> String {
        text(self.header(":path"))
    }

    /// The authority or host.
    pub fn authority(&self) -> String {
        text(self.header(":authority"))
    }

    /// All headers in order, pseudo-headers first.
    pub fn headers(&self) -> Vec<(String, Vec<u8>)> {
        all(Map::RequestHeaders)
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<Vec<u8>> {
        sys::header(Map::RequestHeaders, name).ok()
    }

    /// The first value of a header as text, with what is not UTF-8 replaced.
    pub fn header_text(&self, name: &str) -> Option<String> {
        self.header(name).map(|value| text(Some(value)))
    }

    /// All values of a header.
    pub fn header_values(&self, name: &str) -> Vec<Vec<u8>> {
        values(Map::RequestHeaders, name)
    }

    /// Replaces all values of a header by one.
    pub fn set_header(&self, name: &str, value: impl AsRef<[u8]>) {
        set(Map::RequestHeaders, name, value.as_ref());
    }

    /// Adds a value beside those a header has.
    pub fn add_header(&self, name: &str, value: impl AsRef<[u8]>) {
        add(Map::RequestHeaders, name, value.as_ref());
    }

    /// Takes all values of a header away.
    pub fn remove_header(&self, name: &str) {
        remove(Map::RequestHeaders, name);
    }

    /// What the proxy knows about the exchange.
    pub fn properties(&self) -> Properties {
        Properties(())
    }
}

impl Response {
    /// The status; 0 if the proxy does not say.
    pub fn status(&self) -> u16 {
        text(self.header(":status")).parse().unwrap_or(0)
    }

    /// All headers in order, `:status` first.
    pub fn headers(&self) -> Vec<(String, Vec<u8>)> {
        all(Map::ResponseHeaders)
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<Vec<u8>> {
        sys::header(Map::ResponseHeaders, name).ok()
    }

    /// The first value of a header as text, with what is not UTF-8 replaced.
    pub fn header_text(&self, name: &str) -> Option<String> {
        self.header(name).map(|value| text(Some(value)))
    }

    /// All values of a header.
    pub fn header_values(&self, name: &str) -> Vec<Vec<u8>> {
        values(Map::ResponseHeaders, name)
    }

    /// Replaces all values of a header by one.
    pub fn set_header(&self, name: &str, value: impl AsRef<[u8]>) {
        set(Map::ResponseHeaders, name, value.as_ref());
    }

    /// Adds a value beside those a header has.
    pub fn add_header(&self, name: &str, value: impl AsRef<[u8]>) {
        add(Map::ResponseHeaders, name, value.as_ref());
    }

    /// Takes all values of a header away.
    pub fn remove_header(&self, name: &str) {
        remove(Map::ResponseHeaders, name);
    }

    /// What the proxy knows about the exchange.
    pub fn properties(&self) -> Properties {
        Properties(())
    }
}

impl Trailers {
    pub(crate) fn of(side: Side) -> Self {
        Self { map: side.trailers() }
    }

    /// All of them in order.
    pub fn all(&self) -> Vec<(String, Vec<u8>)> {
        all(self.map)
    }

    /// The first value of one.
    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        sys::header(self.map, name).ok()
    }

    /// Replaces all values of one.
    pub fn set(&self, name: &str, value: impl AsRef<[u8]>) {
        set(self.map, name, value.as_ref());
    }

    /// Adds a value beside those that one has.
    pub fn add(&self, name: &str, value: impl AsRef<[u8]>) {
        add(self.map, name, value.as_ref());
    }

    /// Takes all values of one away.
    pub fn remove(&self, name: &str) {
        remove(self.map, name);
    }
}

impl Body {
    pub(crate) fn of(side: Side) -> Self {
        Self { side }
    }

    /// All of it; nothing, with a warning in the log, if the proxy does not give it.
    pub fn bytes(&self) -> Vec<u8> {
        given(self.read())
    }

    /// All of it, for those who must know that it is.
    ///
    /// # Errors
    /// When the proxy does not give it.
    pub fn read(&self) -> Result<Vec<u8>, HostError> {
        sys::buffer(self.side.body(), 0, usize::MAX)
    }

    /// Puts other bytes in its place. The headers should have asked with [`crate::Flow::EditBody`]. A request or response
    /// without a body cannot be given one by proxies.
    pub fn replace(&self, bytes: impl AsRef<[u8]>) {
        noted("a body", sys::set_buffer(self.side.body(), 0, usize::MAX, bytes.as_ref()));
    }
}

impl Chunk {
    pub(crate) fn new(buffer: Buffer, length: usize, last: bool) -> Self {
        Self { buffer, length, last }
    }

    /// Its bytes; none, with a warning in the log, if the proxy does not give them.
    pub fn bytes(&self) -> Vec<u8> {
        given(self.read())
    }

    /// Its bytes, for those who must know that they are all.
    ///
    /// # Errors
    /// When the proxy does not give them.
    pub fn read(&self) -> Result<Vec<u8>, HostError> {
        sys::buffer(self.buffer, 0, self.length)
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none, as in the last chunk of some bodies.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether the body ends with it, or the sender has no more to send on a connection. Bodies before trailers end without
    /// a last chunk.
    pub fn is_last(&self) -> bool {
        self.last
    }

    /// Puts other bytes in its place. Take `content-length` away in the headers' handler if lengths may change.
    pub fn replace(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        let replaced = sys::set_buffer(self.buffer, 0, self.length, bytes);
        if noted("a piece of a body", replaced) {
            self.length = bytes.len();
        }
    }
}

fn given(bytes: Result<Vec<u8>, HostError>) -> Vec<u8> {
    bytes.unwrap_or_else(|error| {
        log::warn!("the proxy did not give a body: {error}");
        Vec::new()
    })
}

fn all(map: Map) -> Vec<(String, Vec<u8>)> {
    sys::map(map).unwrap_or_default()
}

fn values(map: Map, name: &str) -> Vec<Vec<u8>> {
    let same = all(map).into_iter().filter(|(present, _)| present.eq_ignore_ascii_case(name));
    same.map(|(_, value)| value).collect()
}

fn set(map: Map, name: &str, value: &[u8]) {
    noted(name, sys::set_header(map, name, value));
}

fn add(map: Map, name: &str, value: &[u8]) {
    noted(name, sys::add_header(map, name, value));
}

fn remove(map: Map, name: &str) {
    noted(name, sys::remove_header(map, name));
}

/// Logs what the proxy refused; returns whether it did not.
fn noted(what: &str, result: Result<(), HostError>) -> bool {
    if let Err(error) = &result {
        log::warn!("the proxy did not take a change of {what}: {error}");
    }
    result.is_ok()
}

fn text(value: Option<Vec<u8>>) -> String {
    match String::from_utf8(value.unwrap_or_default()) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    }
}
