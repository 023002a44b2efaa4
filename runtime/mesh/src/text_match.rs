//! Matching of one text: what `istio.security.StringMatch` and the strings of an AuthorizationPolicy mean.

use std::fmt;
use std::sync::Arc;

/// A pattern over a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Begins with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// Not empty.
    Present,
}

impl TextMatch {
    /// Reads an AuthorizationPolicy value: `*` is presence, `*x` a suffix (even when it also ends in `*`), `x*` a
    /// prefix, anything else exact (facts: Istio `pilot/pkg/security/authz/matcher`).
    pub fn parse(value: &str) -> Self {
        if value == "*" {
            Self::Present
        } else if let Some(suffix) = value.strip_prefix('*') {
            Self::Suffix(suffix.into())
        } else if let Some(prefix) = value.strip_suffix('*') {
            Self::Prefix(prefix.into())
        } else {
            Self::Exact(value.into())
        }
    }

    /// Whether `text` matches, letter case included.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => !text.is_empty(),
        }
    }
}

impl fmt::Display for TextMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Present => f.write_str("*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::TextMatch;

    #[test]
    fn value_matches_as_istio_reads_it() {
        for (name, value, text, expected) in [
            ("exact", "/a", "/a", true),
            ("exact is case-sensitive", "/a", "/A", false),
            ("prefix", "/a*", "/ab", true),
            ("suffix", "*/a", "/b/a", true),
            ("presence", "*", "x", true),
            ("presence needs one character", "*", "", false),
            ("a leading star wins: the trailing one is literal", "*/productpage*", "/productpage", false),
            ("a leading star wins: literal star", "*/productpage*", "x/productpage*", true),
            ("a star in the middle is literal", "/service/*health", "/service/ahealth", false),
        ] {
            assert_eq!(TextMatch::parse(value).matches(text), expected, "{name}");
        }
    }
}
