//! Local replies as responses: plain for HTTP, a headers-only status for gRPC.

use bytes::Bytes;
use cairn_filter::{LocalReply, ResponseHead};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, percent_encode};

use crate::failure::grpc_status_of;

pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// What gRPC's `grpc-message` escapes: all but printable ASCII, and the percent sign (gRPC `PROTOCOL-HTTP2.md`); the tilde
/// because Envoy does.
const MESSAGE: &AsciiSet = &CONTROLS.add(b'%').add(b'~');

/// The response for `reply`, and its gRPC status if that is what it carries.
pub(crate) fn local_response(reply: LocalReply, grpc: bool) -> (ResponseHead, Bytes, Option<u8>) {
    let LocalReply { status, grpc_status, body, mut headers, .. } = reply;
    headers.remove(CONTENT_LENGTH);
    if !grpc {
        if !body.is_empty() && !headers.contains_key(CONTENT_TYPE) {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        // Filters see it, as in Envoy, and so does who asks by HEAD.
        if !body.is_empty() {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        return (ResponseHead { status, headers }, body, None);
    }
    let code = grpc_status.unwrap_or_else(|| grpc_status_of(status));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from(u16::from(code)));
    if !body.is_empty() {
        let message = percent_encode(&body, MESSAGE).to_string();
        if let Ok(message) = HeaderValue::try_from(message) {
            headers.insert(GRPC_MESSAGE, message);
        }
    }
    (ResponseHead { status: StatusCode::OK, headers }, Bytes::new(), Some(code))
}

/// A `grpc-status` as a number; 255 when it is none of the seventeen.
pub(crate) fn grpc_status(value: &HeaderValue) -> u8 {
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    number.filter(|number| *number <= 16).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_client_gets_a_status_without_a_body() {
        for (name, status, given, expected) in [
            ("bad request", 400, None, 13),
            ("unauthorized", 401, None, 16),
            ("forbidden", 403, None, 7),
            ("not found", 404, None, 12),
            ("too many requests", 429, None, 14),
            ("bad gateway", 502, None, 14),
            ("unavailable", 503, None, 14),
            ("timeout", 504, None, 14),
            ("anything else", 500, None, 2),
            ("what the filter says", 403, Some(8), 8),
        ] {
            let mut reply = LocalReply::text(StatusCode::from_u16(status).unwrap(), "50% of ~é\n", "d");
            reply.grpc_status = given;
            let (head, body, code) = local_response(reply, true);
            assert_eq!((head.status.as_u16(), body.len(), code), (200, 0, Some(expected)), "{name}");
            assert_eq!(head.headers["grpc-status"], expected.to_string().as_str(), "{name}");
            assert_eq!(head.headers["grpc-message"], "50%25 of %7E%C3%A9%0A", "{name}");
            assert_eq!(head.headers["content-type"], "application/grpc", "{name}");
        }
    }

    #[test]
    fn others_get_the_text_as_it_is() {
        let (head, body, code) = local_response(LocalReply::access_denied("d"), false);
        assert_eq!((head.status.as_u16(), &*body, code), (403, &b"RBAC: access denied"[..], None));
        assert_eq!(head.headers["content-type"], "text/plain");
        assert_eq!(head.headers["content-length"], "19");
    }
}
