//! Requests and responses as handlers see them. Values of headers are bytes, as in HTTP: text that is not UTF-8 is no
//! reason for a plugin to die.

use crate::{Host, Properties, Side};

/// A request whose headers have arrived.
pub struct Request<'a> {
    host: &'a mut dyn Host,
}

impl<'a> Request<'a> {
    /// The request at hand in `host`.
    pub fn new(host: &'a mut dyn Host) -> Self {
        Self { host }
    }

    /// The method; empty if the host does not say.
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
        self.host.headers(Side::Request)
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<Vec<u8>> {
        self.host.header(Side::Request, name)
    }

    /// Replaces all values of a header by one.
    pub fn set_header(&mut self, name: &str, value: impl AsRef<[u8]>) {
        self.host.set_header(Side::Request, name, value.as_ref());
    }

    /// Adds a value beside those a header has.
    pub fn add_header(&mut self, name: &str, value: impl AsRef<[u8]>) {
        self.host.add_header(Side::Request, name, value.as_ref());
    }

    /// Takes all values of a header away.
    pub fn remove_header(&mut self, name: &str) {
        self.host.remove_header(Side::Request, name);
    }

    /// What the proxy knows about the exchange.
    pub fn properties(&self) -> Properties<'_> {
        Properties::new(self.host)
    }

    /// Sets a property of the exchange.
    pub fn set_property(&mut self, path: &[&str], value: impl AsRef<[u8]>) {
        self.host.set_property(path, value.as_ref());
    }
}

/// A response whose headers have arrived, from the upstream or as a local reply.
pub struct Response<'a> {
    host: &'a mut dyn Host,
}

impl<'a> Response<'a> {
    /// The response at hand in `host`.
    pub fn new(host: &'a mut dyn Host) -> Self {
        Self { host }
    }

    /// The status; 0 if the host does not say.
    pub fn status(&self) -> u16 {
        text(self.header(":status")).parse().unwrap_or(0)
    }

    /// All headers in order, `:status` first.
    pub fn headers(&self) -> Vec<(String, Vec<u8>)> {
        self.host.headers(Side::Response)
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<Vec<u8>> {
        self.host.header(Side::Response, name)
    }

    /// Replaces all values of a header by one.
    pub fn set_header(&mut self, name: &str, value: impl AsRef<[u8]>) {
        self.host.set_header(Side::Response, name, value.as_ref());
    }

    /// Adds a value beside those a header has.
    pub fn add_header(&mut self, name: &str, value: impl AsRef<[u8]>) {
        self.host.add_header(Side::Response, name, value.as_ref());
    }

    /// Takes all values of a header away.
    pub fn remove_header(&mut self, name: &str) {
        self.host.remove_header(Side::Response, name);
    }

    /// What the proxy knows about the exchange.
    pub fn properties(&self) -> Properties<'_> {
        Properties::new(self.host)
    }

    /// Sets a property of the exchange.
    pub fn set_property(&mut self, path: &[&str], value: impl AsRef<[u8]>) {
        self.host.set_property(path, value.as_ref());
    }
}

fn text(value: Option<Vec<u8>>) -> String {
    value.map(|value| String::from_utf8_lossy(&value).into_owned()).unwrap_or_default()
}
