//! The single checks that each request needs.

use super::check::{ConnectionFacts, Miss};
use super::template::Template;
use cairn_filter::{Exchange, Metadata as Said, RequestHead, Token};
use cairn_mesh::{
    ClaimPath, HostMatch, IpMatch, MetadataKey, MetadataMatch, PathMatch, RequestPrincipal, TextMatch,
    Values, is_joined_header,
};
use http::HeaderName;
use serde_json::Value;
use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// A check that looks at the request.
#[derive(Debug)]
pub(super) enum OfRequest {
    /// The authority as sent, letter case ignored.
    Host(Values<HostMatch>),
    /// The method.
    Method(Values<TextMatch>),
    /// The path without its query.
    Path(Values<Path>),
    /// A header: any of its values, see [`any_value`].
    Header(Header, Values<TextMatch>),
    /// The client's address as proxies before this one report it.
    RemoteIp(Values<IpMatch>),
    /// Who the token speaks for.
    RequestPrincipal(Values<RequestPrincipal>),
    /// A claim of the token: a text, or a list that holds one.
    Claim(Claim, Values<TextMatch>),
    /// What an earlier filter knows.
    Metadata(Metadata, Values<MetadataMatch>),
}

/// Where a condition on a token finds its value.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) path: ClaimPath,
    name: Box<str>,
}

impl Claim {
    /// The claim of `request.auth.claims[…]`.
    pub(super) fn new(path: &ClaimPath) -> Self {
        let brackets: String = path.iter().map(|name| format!("[{name}]")).collect();
        Self { path: Arc::clone(path), name: format!("claim {brackets}").into() }
    }

    /// The claim that Istio gives a name of its own.
    pub(super) fn named(claim: &str, name: &str) -> Self {
        Self { path: [Arc::from(claim)].into(), name: name.into() }
    }
}

/// Where a condition on metadata finds its value.
#[derive(Debug)]
pub(super) struct Metadata {
    place: MetadataPlace,
    name: Box<str>,
}

#[derive(Debug)]
enum MetadataPlace {
    /// A claim of the token.
    Claim(ClaimPath),
    /// What another filter wrote.
    Filter(MetadataKey),
}

impl Metadata {
    pub(super) fn new(key: &MetadataKey) -> Self {
        let brackets: String = key.path.iter().map(|name| format!("[{name}]")).collect();
        let known =
            *key.filter == *TOKEN_FILTER && key.path.first().is_some_and(|first| **first == *TOKEN_KEY);
        let place = if known {
            MetadataPlace::Claim(key.path.iter().skip(1).cloned().collect())
        } else {
            MetadataPlace::Filter(key.clone())
        };
        Self { place, name: format!("metadata {}{brackets}", key.filter).into() }
    }

    fn value<'a>(&self, asked: &Asked<'a>) -> Option<&'a Value> {
        match &self.place {
            MetadataPlace::Claim(path) => asked.claim(path),
            MetadataPlace::Filter(key) => asked.known.metadata?.get(&key.filter, &key.path),
        }
    }
}

/// The metadata of verified tokens, by Envoy's names.
const TOKEN_FILTER: &str = "envoy.filters.http.jwt_authn";
const TOKEN_KEY: &str = "payload";

/// What an explanation says in place of a principal.
const NO_TOKEN: &str = "a request without token";

/// A request, with what is known of who sent it.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    /// What its connection knows.
    pub(super) facts: &'a ConnectionFacts,
    pub(super) head: &'a RequestHead,
    pub(super) known: Known<'a>,
}

/// What filters before authorization found out about a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// What its verified token says.
    pub(super) token: Option<&'a Token>,
    /// What filters said of it.
    pub(super) metadata: Option<&'a Said>,
}

impl<'a> From<&'a Exchange> for Known<'a> {
    fn from(exchange: &'a Exchange) -> Self {
        Self { token: exchange.token.as_deref(), metadata: Some(&exchange.metadata) }
    }
}

impl<'a> From<Option<&'a Token>> for Known<'a> {
    fn from(token: Option<&'a Token>) -> Self {
        Self { token, metadata: None }
    }
}

impl<'a> Asked<'a> {
    /// Issuer and subject of the token, as far as it has them.
    pub(super) fn issuer_and_subject(&self) -> (Option<&'a str>, Option<&'a str>) {
        let text = |name: &str| self.known.token.and_then(|token| token.payload().get(name)?.as_str());
        (text("iss"), text("sub"))
    }

    /// The authority as sent.
    pub(super) fn host(&self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.head.authority.as_bytes())
    }

    /// Calls `each` with what conditions on a header compare with.
    pub(super) fn header(&self, name: &HeaderName, mut each: impl FnMut(&str)) {
        any_value(self.head, name, |value| {
            each(value);
            false
        });
    }

    pub(super) fn claim(&self, path: &ClaimPath) -> Option<&'a Value> {
        self.known.token?.claim(path)
    }

    /// The last address of `x-forwarded-for`, which the nearest proxy wrote; without a readable one the peer's own
    /// (Envoy with `use_remote_address` off and no trusted hops, as Istio sets its waypoints).
    pub(super) fn remote_ip(&self) -> IpAddr {
        let last = self.head.headers.get_all("x-forwarded-for").iter().next_back();
        let text = last.and_then(|value| value.to_str().ok()).and_then(|value| value.rsplit(',').next());
        let told = text.and_then(|text| text.trim().parse::<IpAddr>().ok());
        told.map_or(self.facts.source, |ip| ip.to_canonical())
    }
}

/// Whether a claim is a text that matches, or a list with one. Numbers and truths are no texts.
fn is_or_holds(value: &Value, text: &TextMatch) -> bool {
    match value {
        Value::String(value) => text.matches(value),
        Value::Array(values) => {
            values.iter().any(|value| value.as_str().is_some_and(|value| text.matches(value)))
        }
        _ => false,
    }
}

fn metadata_matches(value: &Value, wanted: &MetadataMatch) -> bool {
    match wanted {
        MetadataMatch::Text(text) => value.as_str().is_some_and(|value| text.matches(value)),
        MetadataMatch::Listed(text) => value.is_array() && is_or_holds(value, text),
    }
}

/// A compiled match on the path.
#[derive(Debug)]
pub(super) enum Path {
    /// Text.
    Text(TextMatch),
    /// A template.
    Template(Template),
}

impl Path {
    pub(super) fn new(path: &PathMatch) -> Self {
        match path {
            PathMatch::Text(text) => Self::Text(text.clone()),
            PathMatch::Template(text) => Self::Template(Template::new(text)),
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Text(text) => text.matches(path),
            Self::Template(template) => template.matches(path),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => text.fmt(f),
            Self::Template(template) => f.write_str(template.as_str()),
        }
    }
}

impl OfRequest {
    /// Whether it holds.
    pub(super) fn holds(&self, asked: &Asked<'_>) -> bool {
        let head = asked.head;
        match self {
            Self::Host(values) => {
                let host = asked.host();
                values.hold(|text| host_matches(text, &host))
            }
            Self::Method(values) => values.hold(|text| text.matches(head.method.as_str())),
            Self::Path(values) => values.hold(|path| path.matches(head.path.path())),
            Self::Header(header, values) => {
                values.hold(|text| header.any_value(head, |value| header_matches(text, value)))
            }
            Self::RemoteIp(values) => {
                let remote = asked.remote_ip();
                values.hold(|block| block.contains(&remote))
            }
            Self::RequestPrincipal(values) => {
                let (issuer, subject) = asked.issuer_and_subject();
                values.hold(|principal| principal.matches(issuer, subject))
            }
            Self::Claim(claim, values) => {
                let value = asked.claim(&claim.path);
                values.hold(|text| value.is_some_and(|value| is_or_holds(value, text)))
            }
            Self::Metadata(key, values) => {
                let value = key.value(asked);
                values.hold(|wanted| value.is_some_and(|value| metadata_matches(value, wanted)))
            }
        }
    }

    /// What it looks at and finds instead, when it does not hold. Values of headers and claims may be secrets, so they
    /// are not told.
    pub(super) fn miss(&self, asked: &Asked<'_>) -> Miss {
        let head = asked.head;
        match self {
            Self::Host(values) => Miss::new("host", asked.host().into_owned(), values, ToString::to_string),
            Self::Method(values) => Miss::new("method", head.method.to_string(), values, ToString::to_string),
            Self::Path(values) => Miss::new("path", head.path.path().to_owned(), values, ToString::to_string),
            Self::Header(header, values) => {
                let text = untold(header.any_value(head, |_| true), values);
                Miss { field: format!("header {}", header.name).into(), text: text.to_owned() }
            }
            Self::RemoteIp(values) => {
                Miss::new("remote ip", asked.remote_ip().to_string(), values, ToString::to_string)
            }
            Self::RequestPrincipal(values) => {
                let found = match asked.known.token {
                    Some(token) => token.principal().to_owned(),
                    None => NO_TOKEN.to_owned(),
                };
                Miss::new("request principal", found, values, ToString::to_string)
            }
            Self::Claim(claim, values) => {
                let text = match asked.known.token {
                    Some(_) => untold(asked.claim(&claim.path).is_some(), values),
                    None => "the request has no token",
                };
                Miss { field: Cow::Owned(claim.name.to_string()), text: text.to_owned() }
            }
            Self::Metadata(key, values) => {
                let value = key.value(asked);
                let text = untold(value.is_some(), values);
                Miss { field: Cow::Owned(key.name.to_string()), text: text.to_owned() }
            }
        }
    }
}

/// What is said in place of a value.
fn untold<T>(is_there: bool, values: &Values<T>) -> &'static str {
    match (is_there, values.any.is_empty()) {
        (false, _) => "it is absent",
        (true, true) => "its value is excluded",
        (true, false) => "its value is none of those asked for",
    }
}

/// Where a condition on `request.headers[name]` finds its value.
#[derive(Debug)]
pub(super) struct Header {
    name: Arc<str>,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Named(HeaderName),
    Method,
    Authority,
    Path,
    Scheme,
    /// The name can be no header's.
    Nowhere,
}

impl Header {
    pub(super) fn new(name: &Arc<str>) -> Self {
        let place = match &**name {
            ":method" => Place::Method,
            // Envoy keeps one value for both.
            ":authority" | "host" => Place::Authority,
            ":path" => Place::Path,
            ":scheme" => Place::Scheme,
            other => HeaderName::from_bytes(other.as_bytes()).map_or(Place::Nowhere, Place::Named),
        };
        Self { name: Arc::clone(name), place }
    }

    /// Its name, if it is a header of the map.
    pub(super) fn name_in_map(&self) -> Option<&HeaderName> {
        match &self.place {
            Place::Named(name) => Some(name),
            Place::Method | Place::Authority | Place::Path | Place::Scheme | Place::Nowhere => None,
        }
    }

    /// Whether `test` holds for one of its values.
    fn any_value(&self, head: &RequestHead, mut test: impl FnMut(&str) -> bool) -> bool {
        match &self.place {
            Place::Named(name) => any_value(head, name, test),
            Place::Method => test(head.method.as_str()),
            Place::Authority => test(&String::from_utf8_lossy(head.authority.as_bytes())),
            Place::Path => test(head.path.as_str()),
            Place::Scheme => test(&String::from_utf8_lossy(head.scheme.as_bytes())),
            Place::Nowhere => false,
        }
    }
}

/// Whether `test` holds for one of a header's values: each line's by itself, so that a second line neither hides from a
/// DENY rule what the first says nor is hidden by it; but all in one for the headers that Envoy keeps in one.
fn any_value(head: &RequestHead, name: &HeaderName, mut test: impl FnMut(&str) -> bool) -> bool {
    let mut lines = head.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
    let Some(first) = lines.next() else { return false };
    let Some(second) = lines.next() else { return test(&first) };
    if !is_joined_header(name.as_str()) {
        return test(&first) || test(&second) || lines.any(|line| test(&line));
    }
    let lines = [first, second].into_iter().chain(lines).filter(|line| !line.is_empty());
    test(&lines.collect::<Vec<_>>().join(","))
}

/// A header that is there and empty counts as present, unlike any other empty text (Envoy's header matcher).
fn header_matches(text: &TextMatch, value: &str) -> bool {
    *text == TextMatch::Present || text.matches(value)
}

fn host_matches(text: &TextMatch, host: &str) -> bool {
    let begins =
        |prefix: &str| host.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    let ends = |suffix: &str| {
        let end = host.len().checked_sub(suffix.len()).and_then(|at| host.get(at..));
        end.is_some_and(|end| end.eq_ignore_ascii_case(suffix))
    };
    match text {
        TextMatch::Exact(exact) => host.eq_ignore_ascii_case(exact),
        TextMatch::Prefix(prefix) => begins(prefix),
        TextMatch::Suffix(suffix) => ends(suffix),
        TextMatch::Present => !host.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_match_in_any_letter_case_and_with_their_port() {
        for (value, host, expected) in [
            ("a.com", "A.Com", true),
            ("a.com", "a.com:8080", false),
            ("a.com*", "A.COM:8080", true),
            ("*.a.com", "B.a.COM", true),
            ("*.a.com", "a.com", false),
            ("prefix.*", "PREFIX.x", true),
            ("prefix.*", "pre", false),
            ("*", "x", true),
            ("*", "", false),
            ("*é", "é", true),
            ("*b", "é", false),
        ] {
            assert_eq!(host_matches(&TextMatch::parse(value), host), expected, "{value} {host}");
        }
    }
}
