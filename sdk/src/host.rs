//! What a plugin needs of whatever it runs in.

/// Which head of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The request's.
    Request,
    /// The response's.
    Response,
}

/// The proxy as a plugin sees it, or a stand-in for it in tests. Names of headers are lower-case; pseudo-headers such as
/// `:path` are headers here.
pub trait Host {
    /// All headers in order.
    fn headers(&self, side: Side) -> Vec<(String, Vec<u8>)>;

    /// The first value of a header.
    fn header(&self, side: Side, name: &str) -> Option<Vec<u8>>;

    /// Replaces all values of a header by one.
    fn set_header(&mut self, side: Side, name: &str, value: &[u8]);

    /// Adds a value beside those a header has.
    fn add_header(&mut self, side: Side, name: &str, value: &[u8]);

    /// Takes all values of a header away.
    fn remove_header(&mut self, side: Side, name: &str);

    /// A property by the segments of its path.
    fn property(&self, path: &[&str]) -> Option<Vec<u8>>;

    /// Sets a property, for this plugin or later ones to read.
    fn set_property(&mut self, path: &[&str], value: &[u8]);
}
