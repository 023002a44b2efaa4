//! Path normalisation: what routing, policies and the upstream see of a request's path
//! (Istio's `MeshConfig.pathNormalization`).

use crate::PathNormalization;
use std::borrow::Cow;

/// Normalises the path of a request target. The query is left as it is and a fragment is dropped, in every mode.
///
/// Percent-encodings of unreserved characters are decoded (in the last mode those of slashes too), characters that no
/// URI has are encoded, `\` becomes `/`, dot segments are resolved, those with parameters too (`..;a`, which servlet
/// containers take for `..`), and then, where asked, runs of `/` become one: in this order, as RFC 3986 §6.2.2 and Envoy
/// have it, but that Envoy leaves dot segments with parameters that were percent-encoded. A target that does not start with
/// `/` only loses its fragment.
///
/// One pass never makes a new percent-encoding out of the pieces of broken ones: the `%` of such a piece is encoded
/// itself. So what an upstream decodes is what was looked at here.
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
            other if is_encoded(other) => false,
            b'.' => !after_slash,
            b'/' => !after_slash || mode == PathNormalization::Base,
            _ => true,
        }
    })
}

fn decode(path: &str, slashes_too: bool) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    // Where in `out` the last `%` stands that begins no percent-encoding.
    let mut broken = None;
    while let Some(at) = rest.find(|character: char| character.is_ascii() && is_special(character as u8)) {
        let (plain, special) = rest.split_at(at);
        out.push_str(plain);
        let after = |count: usize| special.get(count..).unwrap_or_default();
        let byte = special.as_bytes().first().copied().unwrap_or_default();
        rest = match escaped(special) {
            Some(b'/' | b'\\') if slashes_too => {
                out.push('/');
                after(3)
            }
            Some(byte) if is_unreserved(byte) => {
                out.push(char::from(byte));
                mend(&mut out, broken, after(3));
                after(3)
            }
            Some(_) => {
                out.push_str(special.get(..3).unwrap_or_default());
                after(3)
            }
            None if byte == b'%' => {
                broken = Some(out.len());
                out.push('%');
                after(1)
            }
            None if byte == b'\\' => {
                out.push('/');
                after(1)
            }
            None => {
                out.push('%');
                out.extend([byte >> 4, byte & 0xf].map(hexadecimal));
                after(1)
            }
        };
    }
    out.push_str(rest);
    out
}

/// Encodes the `%` at `broken` if the character that was just decoded, last in `out`, makes a percent-encoding of it,
/// alone or with what comes next.
fn mend(out: &mut String, broken: Option<usize>, next: &str) {
    let Some(piece) = broken.and_then(|at| out.get(at..)) else { return };
    let joined = match piece.len() {
        2 => escaped(&format!("{piece}{}", next.get(..1).unwrap_or_default())),
        3 => escaped(piece),
        _ => None,
    };
    if let Some(at) = broken.filter(|_| joined.is_some()) {
        out.insert_str(at + 1, "25");
    }
}

fn is_special(byte: u8) -> bool {
    matches!(byte, b'%' | b'\\') || is_encoded(byte)
}

/// What Envoy encodes where it finds it in a path: what may not stand in a URI (RFC 3986 §2), but for brackets.
fn is_encoded(byte: u8) -> bool {
    matches!(byte, b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}')
}

fn hexadecimal(digit: u8) -> char {
    char::from_digit(u32::from(digit), 16).unwrap_or('0').to_ascii_uppercase()
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

/// RFC 3986 §5.2.4 on an absolute path. Empty segments are segments.
fn resolve_dot_segments(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        let name = segment.split_once(';').map_or(segment, |(name, _)| name);
        match name {
            "." | ".." => {
                if name == ".." {
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
