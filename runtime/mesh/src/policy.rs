//! AuthorizationPolicy as a waypoint enforces it (`security.istio.io/v1`), read but not compiled.

use crate::{PolicyAction, RequestPrincipal, ResourceName, TextMatch};
use ipnet::IpNet;
use std::sync::Arc;

/// What a policy, plugin or telemetry setting attaches to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TargetRef {
    /// The kind of the target.
    pub kind: TargetKind,
    /// Its name; the namespace is the policy's own.
    pub name: Arc<str>,
}

/// The kinds of targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TargetKind {
    /// A waypoint in the policy's namespace.
    Gateway,
    /// Every waypoint of the class, from the root namespace.
    GatewayClass,
    /// A service in the policy's namespace.
    Service,
    /// A service entry in the policy's namespace.
    ServiceEntry,
}

/// One policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Its name.
    pub name: ResourceName,
    /// What it attaches to. A waypoint enforces only policies with targets.
    pub targets: Vec<TargetRef>,
    /// What a match means.
    pub action: PolicyAction,
    /// Its rules. None: it matches nothing, so ALLOW without rules denies everything.
    pub rules: Vec<PolicyRule>,
    /// It only reports what it would do.
    pub dry_run: bool,
}

/// A policy with action CUSTOM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomPolicy {
    /// The provider that is asked.
    pub provider: Arc<str>,
    /// What it is asked about: what this denies does not pass unless the provider lets it.
    pub policy: AuthorizationPolicy,
}

/// A policy that is attached and cannot be enforced: its target answers 503 with this reason in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unenforceable {
    /// What it is, `RequestAuthentication ns/name`.
    pub what: Arc<str>,
    /// What it attaches to.
    pub targets: Vec<TargetRef>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Why it cannot be enforced.
    pub reason: Arc<str>,
}

/// One rule: any source, and any operation, and every condition.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PolicyRule {
    /// Its index in the policy as written, which names it in logs.
    pub index: usize,
    /// Alternatives; empty: any.
    pub from: Vec<Source>,
    /// Alternatives; empty: any.
    pub to: Vec<Operation>,
    /// All of these.
    pub when: Vec<Condition>,
}

/// Values one of which must match, and values none of which may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Values<T> {
    /// One of these, if any are given.
    pub any: Vec<T>,
    /// None of these.
    pub none: Vec<T>,
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self { any: Vec::new(), none: Vec::new() }
    }
}

impl<T> Values<T> {
    /// Whether nothing is asked.
    pub fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }

    /// Whether `matches` holds for one of `any` (or there are none) and for none of `none`.
    pub fn hold(&self, mut matches: impl FnMut(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&mut matches)) && !self.none.iter().any(matches)
    }
}

/// A service account, by namespace and name, in any trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// An IP block.
pub type IpMatch = IpNet;

/// A port.
pub type PortMatch = u16;

/// A match on the authority, letter case ignored; the text is in lower case.
pub type HostMatch = TextMatch;

/// A match on the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMatch {
    /// Text.
    Text(TextMatch),
    /// A template with `{*}` or `{**}`, checked, as written.
    Template(Arc<str>),
}

/// Where a request comes from: every field set must match.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Source {
    /// The peer's identity without its scheme.
    pub principals: Values<TextMatch>,
    /// The peer's namespace; `*` may stand anywhere in the text.
    pub namespaces: Values<Arc<str>>,
    /// The peer's service account.
    pub service_accounts: Values<ServiceAccount>,
    /// The direct peer's address.
    pub ip_blocks: Values<IpMatch>,
    /// The client's address after X-Forwarded-For.
    pub remote_ip_blocks: Values<IpMatch>,
    /// The peer's trust domain; one `*` at start or end.
    pub trust_domains: Values<TextMatch>,
    /// Issuer and subject of the request's verified token.
    pub request_principals: Values<RequestPrincipal>,
}

/// What a request does: every field set must match.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Operation {
    /// The authority, as the client sent it.
    pub hosts: Values<HostMatch>,
    /// The destination port as the proxy sees it.
    pub ports: Values<PortMatch>,
    /// The method.
    pub methods: Values<TextMatch>,
    /// The normalised path without its query.
    pub paths: Values<PathMatch>,
}

/// Where a claim is found in a token's payload: names of objects inside each other.
pub type ClaimPath = Arc<[Arc<str>]>;

/// What filters before this one know of a request (Envoy's dynamic metadata).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataKey {
    /// The filter, `envoy.filters.http.jwt_authn`.
    pub filter: Arc<str>,
    /// Where the value is found in what it knows.
    pub path: ClaimPath,
}

/// A match on metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetadataMatch {
    /// A text.
    Text(TextMatch),
    /// A list with such a text among its elements, written `[text]`.
    Listed(TextMatch),
}

/// A further condition: what is looked at, and the values it may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `request.headers[name]`, name in lower case.
    RequestHeader(Arc<str>, Values<TextMatch>),
    /// `source.ip`.
    SourceIp(Values<IpMatch>),
    /// `remote.ip`.
    RemoteIp(Values<IpMatch>),
    /// `source.namespace`.
    SourceNamespace(Values<Arc<str>>),
    /// `source.principal`.
    SourcePrincipal(Values<TextMatch>),
    /// `source.serviceAccount`.
    SourceServiceAccount(Values<ServiceAccount>),
    /// `source.trustDomain`.
    SourceTrustDomain(Values<TextMatch>),
    /// `destination.ip`.
    DestinationIp(Values<IpMatch>),
    /// `destination.port`.
    DestinationPort(Values<PortMatch>),
    /// `connection.sni`: empty inside a tunnel.
    ConnectionSni(Values<TextMatch>),
    /// `request.auth.principal`.
    RequestPrincipal(Values<RequestPrincipal>),
    /// `request.auth.audiences`: the claim `aud`.
    RequestAudiences(Values<TextMatch>),
    /// `request.auth.presenter`: the claim `azp`.
    RequestPresenter(Values<TextMatch>),
    /// `request.auth.claims[a][b]`.
    RequestClaim(ClaimPath, Values<TextMatch>),
    /// `experimental.envoy.filters.…[key]`.
    FilterMetadata(MetadataKey, Values<MetadataMatch>),
}
