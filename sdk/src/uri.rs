//! Paths, queries and cookies of requests, and names of headers in configurations.

use crate::Request;
use serde::Deserialize;
use std::fmt;

impl Request {
    /// The path without its query.
    pub fn path_alone(&self) -> String {
        let mut path = self.path();
        if let Some(end) = path.find(['?', '#']) {
            path.truncate(end);
        }
        path
    }

    /// The query, without the question mark.
    pub fn query(&self) -> Option<String> {
        let path = self.path();
        let (_, query) = path.split_once('?')?;
        Some(query.split('#').next().unwrap_or_default().to_owned())
    }

    /// The first value of a parameter of the query, decoded.
    pub fn query_value(&self, name: &str) -> Option<Vec<u8>> {
        let query = self.query()?;
        query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (form_decode(key.as_bytes()) == name.as_bytes()).then(|| form_decode(value.as_bytes()))
        })
    }

    /// The first value of a cookie.
    pub fn cookie(&self, name: &str) -> Option<String> {
        self.header_values("cookie").iter().find_map(|line| {
            let line = String::from_utf8_lossy(line);
            line.split(';').find_map(|pair| {
                let (key, value) = pair.trim().split_once('=')?;
                (key == name).then(|| value.trim_matches('"').to_owned())
            })
        })
    }
}

/// Decodes `%41` as browsers do: what is no such sequence stays.
///
/// ```
/// assert_eq!(cairn_sdk::percent_decode(b"a%2Fb%zz+"), b"a/b%zz+");
/// ```
pub fn percent_decode(text: &[u8]) -> Vec<u8> {
    let digit = |at: usize| text.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let mut decoded = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        match (byte, digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    decoded
}

/// As [`percent_decode`], where a plus sign is a space.
pub fn form_decode(text: &[u8]) -> Vec<u8> {
    let spaced: Vec<u8> = text.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
    percent_decode(&spaced)
}

/// The name of a header in a configuration, in lower case. What is none is refused with the field's place.
///
/// ```
/// let name: cairn_sdk::HeaderName = serde_json::from_str(r#""X-Team""#).unwrap();
/// assert_eq!(name.as_str(), "x-team");
/// assert!(serde_json::from_str::<cairn_sdk::HeaderName>(r#""x team""#).is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct HeaderName(String);

impl HeaderName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HeaderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for HeaderName {
    type Error = String;

    /// A token (RFC 9110 §5.6.2).
    fn try_from(name: String) -> Result<Self, String> {
        let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        if name.is_empty() || !name.chars().all(is_token) {
            return Err(format!("`{name}` is not the name of a header"));
        }
        Ok(Self(name.to_ascii_lowercase()))
    }
}

/// The value of a header in a configuration: text without control characters.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct HeaderText(String);

impl HeaderText {
    /// The value.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for HeaderText {
    type Error = String;

    fn try_from(value: String) -> Result<Self, String> {
        if value.chars().any(|c| c.is_control() && c != '\t') {
            return Err("a header's value has no control characters".to_owned());
        }
        Ok(Self(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Proxy, TestRequest};
    use crate::{Flow, Plugin};

    struct Parts;

    impl Plugin for Parts {
        type Config = ();
        type Exchange = ();

        fn configure((): ()) -> Result<Self, String> {
            Ok(Self)
        }

        fn on_request(&self, request: Request, (): &mut ()) -> Flow {
            let value = request.query_value("k").map(|value| String::from_utf8_lossy(&value).into_owned());
            let parts = (request.path_alone(), request.query(), value, request.cookie("s"));
            request.set_header("x-parts", format!("{parts:?}"));
            Flow::Continue
        }
    }

    #[test]
    fn requests_have_parts() {
        let cases = [
            ("/a", "", r#"("/a", None, None, None)"#),
            ("/a?k", "s=1", r#"("/a", Some("k"), Some(""), Some("1"))"#),
            (
                "/a?x=1&k=a%20b+c&k=2",
                "a=b; s=\"x=y\"; s=2",
                r#"("/a", Some("x=1&k=a%20b+c&k=2"), Some("a b c"), Some("x=y"))"#,
            ),
            ("/?k=%zz%4", "xs=1;s", r#"("/", Some("k=%zz%4"), Some("%zz%4"), None)"#),
        ];
        let mut proxy = Proxy::<Parts>::new("").unwrap();
        for (path, cookie, parts) in cases {
            let outcome = proxy.send(TestRequest::get(path).header("cookie", cookie));
            assert_eq!(outcome.upstream.unwrap().header("x-parts").as_deref(), Some(parts), "{path}");
        }
    }
}
