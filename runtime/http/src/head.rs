//! Heads between hyper's form and the filters' form, and the headers that belong to a hop or to the proxy.

use crate::Failure;
use cairn_filter::RequestHead;
use cairn_mesh::{PathNormalization, normalize_path};
use http::header::{CONNECTION, COOKIE, EXPECT, HOST, HeaderName, SERVER, TE, TRANSFER_ENCODING, UPGRADE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Uri, Version, request};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// What a request that asks for another protocol asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Nothing: plain HTTP.
    Nothing,
    /// A WebSocket.
    WebSocket,
    /// CONNECT, or any other upgrade.
    Unsupported,
}

/// What the request asks for besides HTTP. A cleartext upgrade to HTTP/2 is an offer that may be ignored.
pub(crate) fn wish(method: &Method, version: Version, headers: &HeaderMap) -> Wish {
    if *method == Method::CONNECT {
        return Wish::Unsupported;
    }
    let Some(upgrade) = headers.get(UPGRADE).filter(|_| version == Version::HTTP_11) else {
        return Wish::Nothing;
    };
    if upgrade.as_bytes().eq_ignore_ascii_case(b"websocket") {
        Wish::WebSocket
    } else if upgrade.as_bytes().eq_ignore_ascii_case(b"h2c") {
        Wish::Nothing
    } else {
        Wish::Unsupported
    }
}

/// The request's head in the filters' form: host and path in their fields, path normalised, headers of the hop gone,
/// the proxy's own headers in place. On failure the head comes along, as far as it is known, for the record.
pub(crate) fn request_head(
    parts: request::Parts,
    normalization: PathNormalization,
) -> (RequestHead, Result<(), Failure>) {
    let request::Parts { method, uri, version, mut headers, .. } = parts;
    let uri = uri.into_parts();
    let host = headers.remove(HOST);
    let authority = match uri.authority {
        // What the request line says wins over the header (RFC 9112 §3.2.2).
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok().or(host),
        None => host,
    };
    let named = authority.is_some() || version == Version::HTTP_10;
    let scheme = match uri.scheme {
        Some(scheme) if scheme == Scheme::HTTPS => HeaderValue::from_static("https"),
        _ => HeaderValue::from_static("http"),
    };
    let as_sent = uri.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
    let normal = normalized(&as_sent, normalization);
    let path_is_bad = normal.is_err();
    strip_hop(&mut headers, version);
    if version == Version::HTTP_2 {
        join_cookies(&mut headers);
    }
    set_own_request_headers(&mut headers);
    let head = RequestHead {
        method,
        scheme,
        authority: authority.unwrap_or_else(|| HeaderValue::from_static("")),
        path: normal.unwrap_or(as_sent),
        headers,
        version,
    };
    let outcome = match (named, path_is_bad) {
        (false, _) => Err(Failure::NoHost),
        (_, true) => Err(Failure::BadPath),
        (true, false) => Ok(()),
    };
    (head, outcome)
}

fn normalized(path: &PathAndQuery, mode: PathNormalization) -> Result<PathAndQuery, Failure> {
    // Upstreams do not agree on what such bytes mean, and Envoy refuses them too.
    if !path.as_str().is_ascii() {
        return Err(Failure::BadPath);
    }
    // An encoded NUL has no honest use, and ends the text in some upstreams.
    if mode != PathNormalization::None && path.path().contains("%00") {
        return Err(Failure::BadPath);
    }
    match normalize_path(path.as_str(), mode) {
        std::borrow::Cow::Borrowed(same) if same.len() == path.as_str().len() => Ok(path.clone()),
        changed => PathAndQuery::try_from(&*changed).map_err(|_| Failure::BadPath),
    }
}

/// Removes the headers that speak of the connection they came on (RFC 9110 §7.6.1).
pub(crate) fn strip_hop(headers: &mut HeaderMap, version: Version) {
    if version != Version::HTTP_2 {
        if let Some(named) = headers.remove(CONNECTION) {
            for name in named.to_str().unwrap_or("").split(',') {
                let name = name.trim();
                // Nobody but us may take these away.
                if !name.eq_ignore_ascii_case("host") && !name.eq_ignore_ascii_case("content-length") {
                    headers.remove(name);
                }
            }
        }
        for name in [&KEEP_ALIVE, &PROXY_CONNECTION, &TRANSFER_ENCODING, &UPGRADE] {
            headers.remove(name);
        }
    }
    if headers.get(TE).is_some_and(|te| te != "trailers") {
        headers.remove(TE);
    }
}

fn set_own_request_headers(headers: &mut HeaderMap) {
    // Waiting for a 100 is between us and the client: hyper sends it when the upstream begins to take the body.
    headers.remove(EXPECT);
    headers.remove(FORWARDED_CLIENT_CERT);
    headers.entry(FORWARDED_PROTO).or_insert_with(|| HeaderValue::from_static("http"));
    // An empty one counts as none, as in Envoy.
    if headers.get(REQUEST_ID).is_none_or(HeaderValue::is_empty) {
        headers.insert(REQUEST_ID, new_request_id());
    }
}

/// Makes one line of cookies of those that HTTP/2 lets a client send apart (RFC 9113 §8.2.3). Over HTTP/1.1 several lines
/// stay several, as in Envoy.
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let lines: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    // What was allowed in two headers is allowed in one.
    if let Ok(joined) = HeaderValue::from_bytes(&lines.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// A random UUID of version 4.
fn new_request_id() -> HeaderValue {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let random = fastrand::u128(..) & !(0xf << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let mut text = [b'-'; 36];
    let mut shift = 128;
    for (at, byte) in text.iter_mut().enumerate() {
        if !matches!(at, 8 | 13 | 18 | 23) {
            shift -= 4;
            *byte = HEX.get((random >> shift & 0xf) as usize).copied().unwrap_or(b'0');
        }
    }
    HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// The request line of an HTTP/1.1 or HTTP/2 request upstream, with the `host` header put back for the former.
pub(crate) fn upstream_parts(
    head: RequestHead,
    upstream: Version,
) -> Result<http::request::Builder, Failure> {
    let RequestHead { method, scheme, authority, path, mut headers, .. } = head;
    let mut uri = Uri::builder().path_and_query(path);
    if upstream == Version::HTTP_2 {
        let authority = Authority::try_from(authority.as_bytes()).map_err(|_| Failure::NoHost)?;
        uri = uri.scheme(if scheme == "https" { Scheme::HTTPS } else { Scheme::HTTP }).authority(authority);
    } else {
        headers.insert(HOST, authority);
        headers.remove(TE);
    }
    let uri = uri.build().map_err(|_| Failure::BadPath)?;
    let mut builder = http::Request::builder().method(method).uri(uri).version(upstream);
    if let Some(of_request) = builder.headers_mut() {
        *of_request = headers;
    }
    Ok(builder)
}

/// Puts the proxy's own headers on a response.
pub(crate) fn set_own_response_headers(headers: &mut HeaderMap, server: Option<&HeaderValue>) {
    if let Some(server) = server {
        headers.insert(SERVER, server.clone());
    }
}

/// Says how long the upstream took.
pub(crate) fn set_service_time(headers: &mut HeaderMap, millis: u64) {
    headers.insert(SERVICE_TIME, HeaderValue::from(millis));
}

/// The bytes of a head as HTTP/1.1 would write it, beside its first line.
pub(crate) fn header_bytes(headers: &HeaderMap) -> u64 {
    // ": " and CRLF.
    headers.iter().map(|(name, value)| (name.as_str().len() + value.len() + 4) as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_that_http_2_sent_apart_are_one_line() {
        let cookies = |version| {
            let mut request = http::Request::builder().uri("http://h/").version(version);
            for cookie in ["a=b", "c=d", "e=\u{e9}"] {
                request = request.header(COOKIE, cookie.as_bytes());
            }
            let (parts, ()) = request.body(()).unwrap().into_parts();
            let (head, outcome) = request_head(parts, PathNormalization::None);
            assert!(outcome.is_ok());
            head.headers.get_all(COOKIE).iter().map(|value| value.as_bytes().to_vec()).collect::<Vec<_>>()
        };
        assert_eq!(cookies(Version::HTTP_2), ["a=b; c=d; e=\u{e9}".as_bytes()]);
        assert_eq!(cookies(Version::HTTP_11), [&b"a=b"[..], b"c=d", "e=\u{e9}".as_bytes()]);
    }
}
