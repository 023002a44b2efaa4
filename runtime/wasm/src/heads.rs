//! The heads of a request and of a response as header maps with pseudo-headers, the form in which plugins see them.
//!
//! The rules are Envoy's: `:authority`, `:path`, `:method` and `:scheme` come first, `host` means `:authority`, names
//! are lower-cased when written and found in any case.

use cairn_filter::{RequestHead, ResponseHead};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, StatusCode, Version};

/// How a header is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Edit {
    /// Beside those of the same name.
    Add,
    /// In place of those of the same name.
    Replace,
}

/// Why a header is not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EditError {
    /// A line break or NUL: someone tries to write more than one header.
    Injection,
    /// Not valid in HTTP.
    Invalid,
    /// There are too many headers, or it is too long.
    Full,
}

/// A request's head while a plugin may change it.
pub(crate) struct Request {
    pub(crate) head: RequestHead,
    /// Pseudo-headers that the plugin took away. They are needed to go on, so the exchange ends if they stay away.
    pub(crate) no_authority: bool,
    pub(crate) no_path: bool,
    pub(crate) no_method: bool,
}

/// A response's head while a plugin may change it.
pub(crate) struct Response {
    pub(crate) head: ResponseHead,
    /// The plugin took `:status` away.
    pub(crate) no_status: bool,
}

impl Request {
    /// What stands here while there is no request.
    pub(crate) fn none() -> Self {
        let head = RequestHead {
            method: Method::GET,
            scheme: HeaderValue::from_static("http"),
            authority: HeaderValue::from_static(""),
            path: PathAndQuery::from_static("/"),
            headers: HeaderMap::new(),
            version: Version::HTTP_11,
        };
        Self { head, no_authority: false, no_path: false, no_method: false }
    }

    /// All headers, the pseudo-headers first.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let pseudo = [
            (!self.no_authority).then(|| (&b":authority"[..], self.head.authority.as_bytes())),
            (!self.no_path).then(|| (&b":path"[..], self.head.path.as_str().as_bytes())),
            (!self.no_method).then(|| (&b":method"[..], self.head.method.as_str().as_bytes())),
            Some((&b":scheme"[..], self.head.scheme.as_bytes())),
        ];
        pseudo.into_iter().flatten().chain(header_pairs(&self.head.headers))
    }

    /// The number of entries that [`Request::pairs`] gives.
    pub(crate) fn count(&self) -> u32 {
        let removed =
            [self.no_authority, self.no_path, self.no_method].into_iter().filter(|gone| *gone).count();
        (4 - removed + self.head.headers.len()) as u32
    }

    /// The first value of a header.
    pub(crate) fn value(&self, name: &[u8]) -> Option<&[u8]> {
        match pseudo_of(name) {
            Some(Pseudo::Authority) => (!self.no_authority).then(|| self.head.authority.as_bytes()),
            Some(Pseudo::Path) => (!self.no_path).then(|| self.head.path.as_str().as_bytes()),
            Some(Pseudo::Method) => (!self.no_method).then(|| self.head.method.as_str().as_bytes()),
            Some(Pseudo::Scheme) => Some(self.head.scheme.as_bytes()),
            Some(Pseudo::Status) => None,
            None => header_value(&self.head.headers, name),
        }
    }

    /// Writes a header. A pseudo-header has one value, so adding one replaces it.
    pub(crate) fn write(&mut self, name: &[u8], value: &[u8], edit: Edit) -> Result<(), EditError> {
        refuse_injection(name, value)?;
        match pseudo_of(name) {
            Some(Pseudo::Authority) => {
                self.head.authority = header_value_from(value)?;
                self.no_authority = false;
            }
            Some(Pseudo::Path) => {
                if !value.starts_with(b"/") && value != b"*" {
                    return Err(EditError::Invalid);
                }
                self.head.path = PathAndQuery::try_from(value).map_err(|_| EditError::Invalid)?;
                self.no_path = false;
            }
            Some(Pseudo::Method) => {
                self.head.method = Method::from_bytes(value).map_err(|_| EditError::Invalid)?;
                self.no_method = false;
            }
            Some(Pseudo::Scheme) => {
                if value != b"http" && value != b"https" {
                    return Err(EditError::Invalid);
                }
                self.head.scheme = header_value_from(value)?;
            }
            Some(Pseudo::Status) => return Err(EditError::Invalid),
            None => write_header(&mut self.head.headers, name, value, edit)?,
        }
        Ok(())
    }

    /// Takes a header away, all values of it.
    pub(crate) fn remove(&mut self, name: &[u8]) {
        match pseudo_of(name) {
            Some(Pseudo::Authority) => self.no_authority = true,
            Some(Pseudo::Path) => self.no_path = true,
            Some(Pseudo::Method) => self.no_method = true,
            // Without one, a request is sent as it came.
            Some(Pseudo::Scheme | Pseudo::Status) => {}
            None => remove_header(&mut self.head.headers, name),
        }
    }

    /// A pseudo-header that is needed and gone.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        match (self.no_authority, self.no_path, self.no_method) {
            (true, _, _) => Some(":authority"),
            (_, true, _) => Some(":path"),
            (_, _, true) => Some(":method"),
            (false, false, false) => None,
        }
    }

    /// Forgets every header, for a plugin that sends a whole new map.
    pub(crate) fn clear(&mut self) {
        self.head.headers.clear();
        (self.no_authority, self.no_path, self.no_method) = (true, true, true);
    }
}

impl Response {
    /// What stands here while there is no response.
    pub(crate) fn none() -> Self {
        Self { head: ResponseHead { status: StatusCode::OK, headers: HeaderMap::new() }, no_status: false }
    }

    /// All headers, `:status` first.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let status = (!self.no_status).then(|| (&b":status"[..], self.head.status.as_str().as_bytes()));
        status.into_iter().chain(header_pairs(&self.head.headers))
    }

    /// The number of entries that [`Response::pairs`] gives.
    pub(crate) fn count(&self) -> u32 {
        (usize::from(!self.no_status) + self.head.headers.len()) as u32
    }

    /// The first value of a header.
    pub(crate) fn value(&self, name: &[u8]) -> Option<&[u8]> {
        match pseudo_of(name) {
            Some(Pseudo::Status) => (!self.no_status).then(|| self.head.status.as_str().as_bytes()),
            Some(_) if name.starts_with(b":") => None,
            _ => header_value(&self.head.headers, name),
        }
    }

    /// Writes a header.
    pub(crate) fn write(&mut self, name: &[u8], value: &[u8], edit: Edit) -> Result<(), EditError> {
        refuse_injection(name, value)?;
        if name != b":status" {
            return write_header(&mut self.head.headers, name, value, edit);
        }
        let status = StatusCode::from_bytes(value).map_err(|_| EditError::Invalid)?;
        // An interim status cannot end an exchange.
        if status.is_informational() {
            return Err(EditError::Invalid);
        }
        self.head.status = status;
        self.no_status = false;
        Ok(())
    }

    /// Takes a header away, all values of it.
    pub(crate) fn remove(&mut self, name: &[u8]) {
        match name {
            b":status" => self.no_status = true,
            _ => remove_header(&mut self.head.headers, name),
        }
    }

    /// Forgets every header, for a plugin that sends a whole new map.
    pub(crate) fn clear(&mut self) {
        self.head.headers.clear();
        self.no_status = true;
    }
}

enum Pseudo {
    Authority,
    Path,
    Method,
    Scheme,
    Status,
}

fn pseudo_of(name: &[u8]) -> Option<Pseudo> {
    match name {
        b":authority" => Some(Pseudo::Authority),
        b":path" => Some(Pseudo::Path),
        b":method" => Some(Pseudo::Method),
        b":scheme" => Some(Pseudo::Scheme),
        b":status" => Some(Pseudo::Status),
        _ if name.eq_ignore_ascii_case(b"host") => Some(Pseudo::Authority),
        _ => None,
    }
}

pub(crate) fn header_pairs(headers: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
}

pub(crate) fn header_value<'a>(headers: &'a HeaderMap, name: &[u8]) -> Option<&'a [u8]> {
    let name = std::str::from_utf8(name).ok()?;
    headers.get(name).map(HeaderValue::as_bytes)
}

/// The most headers of a map that a plugin may add to, and the longest one that it may write.
const HEADERS_MAX: usize = 1024;
const HEADER_BYTES_MAX: usize = 64 << 10;

pub(crate) fn write_header(
    headers: &mut HeaderMap,
    name: &[u8],
    value: &[u8],
    edit: Edit,
) -> Result<(), EditError> {
    let name = HeaderName::from_bytes(name).map_err(|_| EditError::Invalid)?;
    let grows = edit == Edit::Add || !headers.contains_key(&name);
    if value.len() > HEADER_BYTES_MAX || grows && headers.len() >= HEADERS_MAX {
        return Err(EditError::Full);
    }
    let value = header_value_from(value)?;
    // Both fail only when the map holds its maximum of 24,576 entries.
    match edit {
        Edit::Add => headers.try_append(name, value).map(|_| ()),
        Edit::Replace => headers.try_insert(name, value).map(|_| ()),
    }
    .map_err(|_| EditError::Invalid)
}

pub(crate) fn remove_header(headers: &mut HeaderMap, name: &[u8]) {
    if let Ok(name) = std::str::from_utf8(name) {
        headers.remove(name);
    }
}

fn header_value_from(value: &[u8]) -> Result<HeaderValue, EditError> {
    HeaderValue::from_bytes(value).map_err(|_| EditError::Invalid)
}

/// Refuses what could end a header line early in any peer.
pub(crate) fn refuse_injection(name: &[u8], value: &[u8]) -> Result<(), EditError> {
    let breaks = |bytes: &[u8]| bytes.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0));
    if breaks(name) || breaks(value) { Err(EditError::Injection) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        let mut request = Request::none();
        request.head.authority = HeaderValue::from_static("shop:80");
        request.head.headers.append("x-dup", HeaderValue::from_static("a"));
        request.head.headers.append("x-dup", HeaderValue::from_static("b"));
        request
    }

    #[test]
    fn pseudo_headers_come_first() {
        let request = request();
        let names: Vec<_> =
            request.pairs().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect();
        assert_eq!(names, [":authority", ":path", ":method", ":scheme", "x-dup", "x-dup"]);
        assert_eq!(request.count() as usize, names.len());
    }

    #[test]
    fn names_are_found_in_any_case_and_host_is_the_authority() {
        let mut request = request();
        assert_eq!(request.value(b"X-DUP"), Some(&b"a"[..]));
        assert_eq!(request.value(b"Host"), Some(&b"shop:80"[..]));
        request.write(b"host", b"other", Edit::Add).unwrap();
        assert_eq!(request.value(b":authority"), Some(&b"other"[..]));
        assert!(!request.head.headers.contains_key("host"));
        request.write(b"X-Dup", b"c", Edit::Replace).unwrap();
        assert_eq!(request.head.headers.get_all("x-dup").iter().count(), 1);
    }

    #[test]
    fn what_http_forbids_is_refused() {
        let cases: [(&str, &[u8], &[u8], EditError); 8] = [
            ("line break in a value", b"x", b"a\r\nb: c", EditError::Injection),
            ("line break in a name", b"x\n", b"a", EditError::Injection),
            ("NUL", b"x", b"a\0", EditError::Injection),
            ("space in a name", b"x y", b"a", EditError::Invalid),
            ("unknown pseudo-header", b":protocol", b"websocket", EditError::Invalid),
            ("path without a slash", b":path", b"x", EditError::Invalid),
            ("other scheme", b":scheme", b"ftp", EditError::Invalid),
            ("method with a space", b":method", b"GET /", EditError::Invalid),
        ];
        for (name, header, value, error) in cases {
            let mut request = request();
            let count = request.count();
            assert_eq!(request.write(header, value, Edit::Replace), Err(error), "{name}");
            assert_eq!(request.count(), count, "{name}");
        }
        assert_eq!(Response::none().write(b":status", b"101", Edit::Replace), Err(EditError::Invalid));
        assert_eq!(Response::none().write(b":status", b"2", Edit::Replace), Err(EditError::Invalid));
    }

    #[test]
    fn missing_pseudo_headers_are_told() {
        let mut request = request();
        request.remove(b":path");
        assert_eq!((request.missing(), request.value(b":path")), (Some(":path"), None));
        request.write(b":path", b"/new", Edit::Replace).unwrap();
        assert_eq!(request.missing(), None);
        request.clear();
        assert_eq!(request.missing(), Some(":authority"));
        assert_eq!(request.count(), 1, "the scheme stays");
    }
}
