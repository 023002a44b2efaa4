//! Telling HTTP from anything else by the first bytes of a connection.

/// What the first bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sniffed {
    /// HTTP/1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// Something else.
    Other,
    /// Too few to tell.
    Undecided,
}

/// How a client begins HTTP/2 with prior knowledge (RFC 9113 §3.4).
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Longer than any method in the IANA registry (`UPDATEREDIRECTREF`, 17).
const METHOD_BYTES_MAX: usize = 24;

/// A request line this long is taken for HTTP without having seen its end.
const LINE_BYTES_MAX: usize = 2048;

/// Classifies the first bytes. HTTP/1 begins with a method, a target that looks like one, and `HTTP/1.` and a digit.
pub(crate) fn sniff(bytes: &[u8]) -> Sniffed {
    let compared = bytes.len().min(PREFACE.len());
    if bytes.get(..compared) == PREFACE.get(..compared) {
        return if compared == PREFACE.len() { Sniffed::Http2 } else { Sniffed::Undecided };
    }
    // Servers skip empty lines before a request (RFC 9112 §2.2), so what follows them counts.
    let start = bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(bytes.len());
    let bytes = bytes.get(start..).unwrap_or_default();
    let is_method = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let Some(method_end) = bytes.iter().position(|byte| !is_method(byte)) else {
        return if bytes.len() > METHOD_BYTES_MAX { Sniffed::Other } else { Sniffed::Undecided };
    };
    let (method, rest) = bytes.split_at(method_end);
    let [b' ', target @ ..] = rest else { return Sniffed::Other };
    if method.is_empty() || method.len() > METHOD_BYTES_MAX {
        return Sniffed::Other;
    }
    match target.first() {
        None => return Sniffed::Undecided,
        Some(b'/' | b'*' | b'h' | b'H') => {}
        Some(_) if method == b"CONNECT" => {}
        Some(_) => return Sniffed::Other,
    }
    match target.iter().position(|byte| *byte == b'\n') {
        Some(end) => {
            let line = target.get(..end).unwrap_or_default();
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let version = line.len().checked_sub(9).and_then(|at| line.get(at..)).unwrap_or_default();
            if version.starts_with(b" HTTP/1.") { Sniffed::Http1 } else { Sniffed::Other }
        }
        None if bytes.len() >= LINE_BYTES_MAX => Sniffed::Http1,
        None => Sniffed::Undecided,
    }
}

/// The answer when no more bytes come in time.
pub(crate) fn sniff_no_more(bytes: &[u8]) -> Sniffed {
    match sniff(bytes) {
        // A target has begun: a slow HTTP client.
        Sniffed::Undecided if bytes.contains(&b'/') => Sniffed::Http1,
        Sniffed::Undecided => Sniffed::Other,
        decided => decided,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_tell_http_from_the_rest() {
        use Sniffed::{Http1, Http2, Other, Undecided};
        for (name, bytes, expected) in [
            ("nothing yet", &b""[..], Undecided),
            ("a request line", b"GET / HTTP/1.1\r\n", Http1),
            ("http/1.0", b"GET /a?b HTTP/1.0\r\nhost: x\r\n", Http1),
            ("a bare line feed", b"GET / HTTP/1.1\n", Http1),
            ("absolute form", b"GET http://a/ HTTP/1.1\r\n", Http1),
            ("options for all", b"OPTIONS * HTTP/1.1\r\n", Http1),
            ("connect", b"CONNECT a:1 HTTP/1.1\r\n", Http1),
            ("a method of its own", b"M-SEARCH /x HTTP/1.1\r\n", Http1),
            ("half a method", b"GE", Undecided),
            ("half a line", b"GET /index", Undecided),
            ("the preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Http2),
            ("half a preface", b"PRI * HT", Undecided),
            ("a word that begins like the preface", b"PRINT /x HTTP/1.1\r\n", Http1),
            ("an empty line first", b"\r\n\r\nGET / HTTP/1.1\r\n", Http1),
            ("only empty lines", b"\r\n", Undecided),
            ("a method in lower case", b"get / HTTP/1.1\r\n", Http1),
            ("http/0.9", b"GET /\r\n", Other),
            ("redis", b"GET key\r\n", Other),
            ("redis array", b"*1\r\n$4\r\nPING\r\n", Other),
            ("tls", b"\x16\x03\x01\x02\x00", Other),
            ("postgres", b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Other),
            ("a long word", b"ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEF", Other),
        ] {
            assert_eq!(sniff(bytes), expected, "{name}");
        }
        let long = [b"GET /".as_slice(), &[b'a'; LINE_BYTES_MAX]].concat();
        assert_eq!(sniff(&long), Http1, "a target of 2 KiB");
    }

    #[test]
    fn silence_decides() {
        for (name, bytes, expected) in [
            ("nothing: the server speaks first", &b""[..], Sniffed::Other),
            ("half a method", b"GE", Sniffed::Other),
            ("a slow request line", b"GET /in", Sniffed::Http1),
        ] {
            assert_eq!(sniff_no_more(bytes), expected, "{name}");
        }
    }
}
