//! The single checks that rules are made of: those that a connection settles once, and those that each request needs.

use super::template::Template;
use cairn_filter::{Connection, RequestHead};
use cairn_mesh::{HostMatch, Identity, IpMatch, PathMatch, PortMatch, ServiceAccount, TextMatch, Values};
use http::HeaderName;
use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What is the same for all requests of one connection.
#[derive(Clone, Debug)]
pub struct ConnectionFacts {
    /// The identity the client proved; `None` for plaintext.
    pub identity: Option<Identity>,
    /// The client's own address.
    pub source: IpAddr,
    /// Where the client meant to go.
    pub destination: SocketAddr,
}

impl ConnectionFacts {
    /// The facts of `connection`.
    pub fn of(connection: &Connection) -> Self {
        Self {
            identity: connection.source.identity.clone(),
            source: connection.source.address.ip().to_canonical(),
            destination: connection.destination,
        }
    }
}

/// A check that looks at the connection only.
#[derive(Debug)]
pub(super) enum OfConnection {
    /// The peer's identity without its scheme.
    Principal(Values<TextMatch>),
    /// The peer's namespace.
    Namespace(Values<Arc<str>>),
    /// The peer's service account, in any trust domain.
    ServiceAccount(Values<ServiceAccount>),
    /// The peer's trust domain.
    TrustDomain(Values<TextMatch>),
    /// The peer's address.
    SourceIp(Values<IpMatch>),
    /// The address the client meant to reach.
    DestinationIp(Values<IpMatch>),
    /// And its port.
    DestinationPort(Values<PortMatch>),
    /// The server name of TLS, of which there is none inside a tunnel.
    Sni(Values<TextMatch>),
}

impl OfConnection {
    /// Whether it holds. A peer without identity matches no value of any kind.
    pub(super) fn holds(&self, facts: &ConnectionFacts) -> bool {
        let identity = facts.identity.as_ref();
        let is = |test: &dyn Fn(&Identity) -> bool| identity.is_some_and(test);
        let destination = facts.destination;
        match self {
            Self::Principal(values) => values.hold(|text| is(&|peer| text.matches(peer.principal()))),
            Self::Namespace(values) => values.hold(|pattern| is(&|peer| glob(pattern, peer.namespace()))),
            Self::ServiceAccount(values) => values.hold(|account| {
                is(&|peer| {
                    *account.namespace == *peer.namespace() && *account.name == *peer.service_account()
                })
            }),
            Self::TrustDomain(values) => values.hold(|text| is(&|peer| text.matches(peer.trust_domain()))),
            Self::SourceIp(values) => values.hold(|block| block.contains(&facts.source)),
            Self::DestinationIp(values) => {
                values.hold(|block| block.contains(&destination.ip().to_canonical()))
            }
            Self::DestinationPort(values) => values.hold(|port| *port == destination.port()),
            Self::Sni(values) => values.hold(|text| text.matches("")),
        }
    }

    /// What it looks at and finds instead, when it does not hold.
    pub(super) fn miss(&self, facts: &ConnectionFacts) -> Miss {
        let found = |part: fn(&Identity) -> String| match &facts.identity {
            Some(identity) => part(identity),
            None => "a peer without identity".to_owned(),
        };
        let destination = facts.destination;
        match self {
            Self::Principal(values) => {
                Miss::new("principal", found(|peer| peer.principal().to_owned()), values, ToString::to_string)
            }
            Self::Namespace(values) => {
                Miss::new("namespace", found(|peer| peer.namespace().to_owned()), values, ToString::to_string)
            }
            Self::ServiceAccount(values) => {
                let found = found(|peer| format!("{}/{}", peer.namespace(), peer.service_account()));
                let name = |account: &ServiceAccount| format!("{}/{}", account.namespace, account.name);
                Miss::new("service account", found, values, name)
            }
            Self::TrustDomain(values) => Miss::new(
                "trust domain",
                found(|peer| peer.trust_domain().to_owned()),
                values,
                ToString::to_string,
            ),
            Self::SourceIp(values) => {
                Miss::new("source ip", facts.source.to_string(), values, ToString::to_string)
            }
            Self::DestinationIp(values) => {
                let found = destination.ip().to_canonical().to_string();
                Miss::new("destination ip", found, values, ToString::to_string)
            }
            Self::DestinationPort(values) => {
                Miss::new("port", destination.port().to_string(), values, ToString::to_string)
            }
            Self::Sni(values) => {
                Miss::new("sni", "a tunnelled connection".to_owned(), values, ToString::to_string)
            }
        }
    }
}

/// A check that looks at the request.
#[derive(Debug)]
pub(super) enum OfRequest {
    /// The authority as sent, letter case ignored.
    Host(Values<HostMatch>),
    /// The method.
    Method(Values<TextMatch>),
    /// The path without its query.
    Path(Values<Path>),
    /// A header, all its values joined by `,`.
    Header(Header, Values<TextMatch>),
    /// The client's address as proxies before this one report it.
    RemoteIp(Values<IpMatch>),
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
    /// Whether it holds. `source` is the client's own address.
    pub(super) fn holds(&self, head: &RequestHead, source: IpAddr) -> bool {
        match self {
            Self::Host(values) => {
                let host = String::from_utf8_lossy(head.authority.as_bytes());
                values.hold(|text| host_matches(text, &host))
            }
            Self::Method(values) => values.hold(|text| text.matches(head.method.as_str())),
            Self::Path(values) => values.hold(|path| path.matches(head.path.path())),
            Self::Header(header, values) => {
                let value = header.value(head);
                values.hold(|text| value.as_ref().is_some_and(|value| header_matches(text, value)))
            }
            Self::RemoteIp(values) => {
                let remote = remote_ip(head, source);
                values.hold(|block| block.contains(&remote))
            }
        }
    }

    /// What it looks at and finds instead, when it does not hold. Values of headers may be secrets, so they are not
    /// told.
    pub(super) fn miss(&self, head: &RequestHead, source: IpAddr) -> Miss {
        match self {
            Self::Host(values) => {
                let host = String::from_utf8_lossy(head.authority.as_bytes()).into_owned();
                Miss::new("host", host, values, ToString::to_string)
            }
            Self::Method(values) => Miss::new("method", head.method.to_string(), values, ToString::to_string),
            Self::Path(values) => Miss::new("path", head.path.path().to_owned(), values, ToString::to_string),
            Self::Header(header, values) => {
                let text = match (header.value(head).is_some(), values.any.is_empty()) {
                    (false, _) => "it is absent",
                    (true, true) => "its value is excluded",
                    (true, false) => "its value is none of those asked for",
                };
                Miss { field: format!("header {}", header.name).into(), text: text.to_owned() }
            }
            Self::RemoteIp(values) => {
                Miss::new("remote ip", remote_ip(head, source).to_string(), values, ToString::to_string)
            }
        }
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

    fn value<'a>(&self, head: &'a RequestHead) -> Option<Cow<'a, str>> {
        match &self.place {
            Place::Named(name) => {
                let mut values =
                    head.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
                let first = values.next()?;
                Some(values.fold(first, |joined, value| Cow::Owned(format!("{joined},{value}"))))
            }
            Place::Method => Some(head.method.as_str().into()),
            Place::Authority => Some(String::from_utf8_lossy(head.authority.as_bytes())),
            Place::Path => Some(head.path.as_str().into()),
            Place::Scheme => Some(String::from_utf8_lossy(head.scheme.as_bytes())),
            Place::Nowhere => None,
        }
    }
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

/// Whether `text` matches `pattern`, in which `*` stands for any number of characters anywhere.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut pieces = rest.split('*');
    let last = pieces.next_back().unwrap_or_default();
    for piece in pieces {
        let Some(at) = text.find(piece) else { return false };
        text = text.get(at + piece.len()..).unwrap_or_default();
    }
    text.ends_with(last)
}

/// The last address of `x-forwarded-for`, which the nearest proxy wrote; without a readable one the peer's own
/// (Envoy with `use_remote_address` off and no trusted hops, as Istio sets its waypoints).
fn remote_ip(head: &RequestHead, source: IpAddr) -> IpAddr {
    let last = head.headers.get_all("x-forwarded-for").iter().next_back();
    let text = last.and_then(|value| value.to_str().ok()).and_then(|value| value.rsplit(',').next());
    text.and_then(|text| text.trim().parse::<IpAddr>().ok()).map_or(source, |ip| ip.to_canonical())
}

/// What a check looked at and did not find.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Miss {
    /// `method`, `header x-foo` …
    pub(super) field: Cow<'static, str>,
    /// `POST is not GET`.
    pub(super) text: String,
}

/// The most values of a policy that one sentence names.
const VALUES_NAMED_MAX: usize = 3;

/// The most characters of a request that one sentence repeats.
const SUBJECT_CHARS_MAX: usize = 128;

impl Miss {
    fn new<T>(field: &'static str, found: String, values: &Values<T>, name: impl Fn(&T) -> String) -> Self {
        let found: String = found.chars().take(SUBJECT_CHARS_MAX).collect();
        let (verb, wanted) =
            if values.any.is_empty() { ("excluded by", &values.none) } else { ("not", &values.any) };
        let named: Vec<String> = wanted.iter().take(VALUES_NAMED_MAX).map(name).collect();
        let more = wanted.len() - named.len();
        let more = if more > 0 { format!(" or {more} more") } else { String::new() };
        Self { field: field.into(), text: format!("{found} is {verb} {}{more}", named.join(" or ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_may_stand_anywhere_in_a_namespace() {
        for (pattern, namespace, expected) in [
            ("prod", "prod", true),
            ("prod", "prod2", false),
            ("ns-*", "ns-a", true),
            ("ns-*", "ns", false),
            ("*-prod", "eu-prod", true),
            ("*-prod", "eu-prod-2", false),
            ("a.*.b", "a.x.b", true),
            ("a.*.b", "a.b", false),
            ("a*a", "a", false),
            ("a*b*c", "axbxc", true),
            ("a*b*c", "acb", false),
            ("*", "any", true),
            ("**", "any", true),
        ] {
            assert_eq!(glob(pattern, namespace), expected, "{pattern} {namespace}");
        }
    }

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
