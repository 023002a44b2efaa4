//! Path normalisation: what routing, policies and the upstream see of a request's path
//! (Istio's `MeshConfig.pathNormalization`).

use crate::PathNormalization;
use std::borrow::Cow;

/// Normalises the path of a request target. The query is left as it is and a fragment is dropped, in every mode.
///
/// Percent-encodings of unreserved characters are decoded (in the last mode those of slashes too), `\` becomes `/`,
/// dot segments are resolved, and then, where asked, runs of `/` become one: in this order, as RFC 3986 §6.2.2 and
/// Envoy have it. A target that does not start with `/` only loses its fragment.
///
/// One pass never makes a new percent-encoding out of the pieces of broken ones, so what an upstream decodes is what
/// was looked at here.
pub fn normalize_path(target: &str, mode: PathNormalization) -> Cow<'_, str> {
    let target = target.split_once('#').map_or(target, |(before, _)| before);
    let (path, query) = match target.find('?') {
        Some(at) => target.split_at(at),
        None => (target, ""),
    };
    if mode == PathNormalization::None || !path.starts_with('/') || is_normal(path, mode) {
        return Cow::Borrowed(target);
    }
    let decoded = decode(path, mode == PathNormalization::DecodeAndMergeSlashes);
    let mut normal = resolve_dot_segments(&decoded);
    if mode != PathNormalization::Base {
        merge_slashes(&mut normal);
    }
    normal.push_str(query);
    Cow::Owned(normal)
}

/// Whether nothing can change: the common case, decided without an allocation.
fn is_normal(path: &str, mode: PathNormalization) -> bool {
    let mut before = 0;
    path.bytes().all(|byte| {
        let after_slash = std::mem::replace(&mut before, byte) == b'/';
        match byte {
            b'%' | b'\\' => false,
            b'.' => !after_slash,
            b'/' => !after_slash || mode == PathNormalization::Base,
            _ => true,
        }
    })
}

fn decode(path: &str, slashes_too: bool) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find(['%', '\\']) {
        let (plain, special) = rest.split_at(at);
        out.push_str(plain);
        let (decoded, consumed) = match escaped(special) {
            Some(byte) if (byte == b'/' || byte == b'\\') && slashes_too => ('/', 3),
            Some(byte) if is_unreserved(byte) && !continues_an_escape(&out) => (char::from(byte), 3),
            _ if special.starts_with('\\') => ('/', 1),
            _ => ('%', 1),
        };
        out.push(decoded);
        rest = special.get(consumed..).unwrap_or_default();
    }
    out.push_str(rest);
    out
}

/// The byte that `text` begins with, when it begins with a percent-encoding.
fn escaped(text: &str) -> Option<u8> {
    let &[b'%', high, low, ..] = text.as_bytes() else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(high)? * 16 + digit(low)?).ok()
}

/// RFC 3986 §2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// Whether one or two more characters would complete a percent-encoding at the end of `out`: a whole encoding that
/// was kept has its `%` three characters back.
fn continues_an_escape(out: &str) -> bool {
    let bytes = out.as_bytes();
    bytes.last() == Some(&b'%') || bytes.len().checked_sub(2).and_then(|at| bytes.get(at)) == Some(&b'%')
}

/// RFC 3986 §5.2.4 on an absolute path. Empty segments are segments.
fn resolve_dot_segments(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    out.truncate(out.rfind('/').unwrap_or(0));
                }
                if is_last {
                    out.push('/');
                }
            }
            _ => {
                out.push('/');
                out.push_str(segment);
            }
        }
    }
    out
}

fn merge_slashes(path: &mut String) {
    let mut before = ' ';
    path.retain(|character| {
        let is_repeated = character == '/' && before == '/';
        before = character;
        !is_repeated
    });
}

#[cfg(test)]
#[path = "path/tests.rs"]
mod tests;
