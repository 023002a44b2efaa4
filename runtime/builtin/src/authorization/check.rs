//! The single checks that a connection settles once, and how a check that fails is told.

use cairn_filter::Connection;
use cairn_mesh::{Identity, IpMatch, PortMatch, ServiceAccount, TextMatch, Values};
use std::borrow::Cow;
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
    pub(super) fn new<T>(
        field: &'static str,
        found: String,
        values: &Values<T>,
        name: impl Fn(&T) -> String,
    ) -> Self {
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
}
