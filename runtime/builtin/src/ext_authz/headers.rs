//! Changes that a provider makes of headers, and which headers it is not let near.

use cairn_mesh::TextMatch;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue};

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeaderChange {
    pub(super) name: HeaderName,
    pub(super) value: HeaderValue,
    pub(super) how: How,
}

/// What happens to values that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// They stay, and this comes after them.
    Append,
    /// They stay, and this is put after the first of them, on the same line, if there are any.
    AppendIfPresent,
    /// They stay, and this is left out.
    AddIfAbsent,
    /// This replaces them.
    Overwrite,
    /// The same, but only if there are any.
    OverwriteIfPresent,
}

impl HeaderChange {
    /// The change, unless the header is none that a provider may set.
    pub(super) fn new(name: &str, value: &[u8], how: How) -> Result<Self, String> {
        let known = HeaderName::from_bytes(name.as_bytes()).ok().filter(is_free);
        match (known, HeaderValue::from_bytes(value)) {
            (Some(name), Ok(value)) => Ok(Self { name, value, how }),
            _ => Err(format!("header {}", name.escape_debug())),
        }
    }

    pub(super) fn apply(self, headers: &mut HeaderMap) {
        let Self { name, value, how } = self;
        match (how, headers.get_mut(&name)) {
            (How::Append, _) => drop(headers.append(name, value)),
            (How::AppendIfPresent, Some(first)) => {
                let line = [first.as_bytes(), value.as_bytes()].join(&b","[..]);
                // What was allowed in two headers is allowed in one.
                if let Ok(line) = HeaderValue::from_bytes(&line) {
                    *first = line;
                }
            }
            (How::AddIfAbsent, Some(_)) | (How::AppendIfPresent | How::OverwriteIfPresent, None) => {}
            (How::AddIfAbsent, None) | (How::Overwrite, _) | (How::OverwriteIfPresent, Some(_)) => {
                headers.insert(name, value);
            }
        }
    }
}

/// Whether the header says nothing of where the message goes, how long it is, or of the connection it is on.
pub(super) fn is_free(name: &HeaderName) -> bool {
    ![CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE].contains(name)
        && !matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

/// Whether one of `patterns` matches the header's name.
pub(super) fn is_named(patterns: &[TextMatch], name: &HeaderName) -> bool {
    patterns.iter().any(|pattern| pattern.matches(name.as_str()))
}
