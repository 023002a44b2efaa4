//! Who a token speaks for, as policies name it: `issuer/subject`.

use crate::TextMatch;
use std::fmt;
use std::sync::Arc;

/// A pattern over issuer and subject of a verified token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestPrincipal {
    text: Arc<str>,
    issuer: TextMatch,
    subject: TextMatch,
}

impl RequestPrincipal {
    /// Reads a value of `requestPrincipals`. The last `/` separates issuer and subject, and one `*` at one end is a
    /// wildcard of the part that it stands in; whatever else looks like one is literal (facts: Istio
    /// `pilot/pkg/security/authz/model/generator.go`).
    pub fn parse(value: &str) -> Self {
        let (issuer, subject) = parts(value);
        Self { text: value.into(), issuer, subject }
    }

    /// Whether a token of `issuer` about `subject` matches. A claim that is missing matches nothing.
    pub fn matches(&self, issuer: Option<&str>, subject: Option<&str>) -> bool {
        issuer.is_some_and(|text| self.issuer.matches(text))
            && subject.is_some_and(|text| self.subject.matches(text))
    }

    /// The pattern over the issuer.
    pub fn issuer(&self) -> &TextMatch {
        &self.issuer
    }

    /// The pattern over the subject.
    pub fn subject(&self) -> &TextMatch {
        &self.subject
    }
}

fn parts(value: &str) -> (TextMatch, TextMatch) {
    let exact = |text: &str| TextMatch::Exact(text.into());
    if value == "*" {
        return (TextMatch::Present, TextMatch::Present);
    }
    match (value.rsplit_once('/'), value.starts_with('*'), value.ends_with('*')) {
        (Some((issuer, subject)), true, _) => (TextMatch::parse(issuer), exact(subject)),
        (Some((issuer, subject)), false, true) => (exact(issuer), TextMatch::parse(subject)),
        (Some((issuer, subject)), false, false) => (exact(issuer), exact(subject)),
        (None, true, _) => (TextMatch::Present, TextMatch::parse(value)),
        (None, false, true) => (TextMatch::parse(value), TextMatch::Present),
        (None, false, false) => (exact(value), exact("")),
    }
}

impl fmt::Display for RequestPrincipal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::RequestPrincipal;

    #[test]
    fn value_is_read_as_istio_reads_it() {
        for (value, issuer, subject, expected) in [
            ("*", "i", "s", true),
            ("*", "", "s", false),
            ("*", "i", "", false),
            ("foo*", "foobar", "any", true),
            ("foo*", "xfoo", "any", false),
            ("foo*", "foobar", "", false),
            ("*foo", "any", "barfoo", true),
            ("*foo", "any", "foobar", false),
            ("*foo", "", "foo", false),
            ("foo/*", "foo", "any", true),
            ("foo/*", "foo", "", false),
            ("foo/*", "foobar", "any", false),
            ("foo/bar*", "foo", "bar", true),
            ("foo/bar*", "foo", "barn", true),
            ("foo/bar*", "foo", "ba", false),
            ("*/foo", "any", "foo", true),
            ("*/foo", "", "foo", false),
            ("*/foo", "any", "food", false),
            ("*bar/foo", "foobar", "foo", true),
            ("*bar/foo", "foobarn", "foo", false),
            ("foo/bar", "foo", "bar", true),
            ("foo/bar", "foo", "barn", false),
            ("https://i.example/sub", "https://i.example", "sub", true),
            ("https://i.example/sub", "https:", "/i.example/sub", false),
            ("foo", "foo", "", true),
            ("foo", "foo", "any", false),
            ("*/*", "any", "any", false),
            ("*/*", "any", "*", true),
            ("*bar/foo*", "foobar", "foo*", true),
            ("*bar/foo*", "foobar", "food", false),
        ] {
            let principal = RequestPrincipal::parse(value);
            assert_eq!(
                principal.matches(Some(issuer), Some(subject)),
                expected,
                "{value}: {issuer} {subject}"
            );
            assert_eq!(principal.to_string(), value);
        }
    }

    #[test]
    fn a_claim_that_is_missing_matches_nothing() {
        for value in ["*", "foo", "foo/*", "*/foo"] {
            let principal = RequestPrincipal::parse(value);
            assert!(!principal.matches(Some("foo"), None), "{value}");
            assert!(!principal.matches(None, Some("foo")), "{value}");
        }
    }
}
