//! HTTPRoute (`gateway.networking.k8s.io/v1`), and what is read of VirtualService (`networking.istio.io/v1`), not
//! compiled.

use crate::{Kind, ResourceKey, ResourceName};
use std::cmp::Reverse;
use std::sync::Arc;

/// What a route is attached to: a Service of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRef {
    /// The service.
    pub service: ResourceName,
    /// Only this port of it, if set.
    pub port: Option<u16>,
}

/// What a route was written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteForm {
    /// An HTTPRoute: the most specific alternative of all its rules is tried first.
    HttpRoute,
    /// A VirtualService: its rules are tried as written. Where HTTPRoutes are attached too, they alone count.
    VirtualService,
}

/// One HTTPRoute or VirtualService.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRoute {
    /// What it was written as.
    pub form: RouteForm,
    /// Its name.
    pub name: ResourceName,
    /// When it was created, as RFC 3339 text, which sorts by time; empty when unknown.
    pub created: Arc<str>,
    /// What it is attached to.
    pub parents: Vec<ParentRef>,
    /// Its rules.
    pub rules: Vec<RouteRule>,
}

impl HttpRoute {
    /// What names it among all resources.
    pub fn key(&self) -> ResourceKey {
        let kind = match self.form {
            RouteForm::HttpRoute => Kind::HttpRoute,
            RouteForm::VirtualService => Kind::VirtualService,
        };
        ResourceKey { kind, name: self.name.clone() }
    }

    /// Its place among the routes of a destination where their rules are equal: the oldest first, then by name; routes
    /// of unknown age count as the youngest.
    pub fn precedence(&self) -> (bool, &Arc<str>, &ResourceName) {
        (self.created.is_empty(), &self.created, &self.name)
    }
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteRule {
    /// Its optional name.
    pub name: Option<Arc<str>>,
    /// Alternatives; never empty (the default is path prefix `/`).
    pub matches: Vec<RouteMatch>,
    /// What is done to request and response.
    pub filters: Vec<RouteFilter>,
    /// Where it goes.
    pub backends: Vec<Backend>,
    /// The rule cannot be honoured: requests it matches are answered 500, with this reason in the log.
    pub broken: Option<Arc<str>>,
}

/// One alternative of a rule: everything set must match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteMatch {
    /// The path.
    pub path: PathRule,
    /// Headers, names in lower case.
    pub headers: Vec<NameMatch>,
    /// Claims of the verified token.
    pub claims: Vec<ClaimMatch>,
    /// Query parameters.
    pub query: Vec<NameMatch>,
    /// The method.
    pub method: Option<Arc<str>>,
}

/// Where an alternative stands among all of a destination: lower is tried first.
pub type Precedence = (u8, Reverse<usize>, Reverse<bool>, Reverse<usize>, Reverse<usize>);

impl RouteMatch {
    /// Its place: exact paths, then prefixes, then expressions, each longer first; then with a method, more headers,
    /// more query parameters (facts: Istio's order for HTTPRoutes; the Gateway API leaves expressions open).
    pub fn precedence(&self) -> Precedence {
        let (rank, length) = match &self.path {
            PathRule::Exact(path) => (0, path.len()),
            PathRule::Prefix(prefix) => (1, prefix.trim_end_matches('/').len()),
            PathRule::TextPrefix(prefix) => (1, prefix.len()),
            PathRule::Regex(expression) => (2, expression.len()),
        };
        let has_method = self.method.is_some();
        // A claim is written as a header, and counts as one.
        let headers = self.headers.len() + self.claims.len();
        (rank, Reverse(length), Reverse(has_method), Reverse(headers), Reverse(self.query.len()))
    }
}

/// A match on the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRule {
    /// Equal, letter case included.
    Exact(Arc<str>),
    /// By whole segments; a trailing `/` does not count.
    Prefix(Arc<str>),
    /// By its first characters, wherever a segment ends (VirtualService).
    TextPrefix(Arc<str>),
    /// The whole path matches the expression.
    Regex(Arc<str>),
}

/// A header or query parameter and what its value must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameMatch {
    /// Its name.
    pub name: Arc<str>,
    /// Its value.
    pub value: ValueMatch,
    /// The match is that the value is another; one that is missing counts as empty (VirtualService `withoutHeaders`).
    pub inverted: bool,
}

/// A claim of the verified token and what its value, or one of the values of a list, must be. Without a token there is
/// no claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimMatch {
    /// The names that lead to it, from the outermost.
    pub path: Vec<Arc<str>>,
    /// Its value.
    pub value: ValueMatch,
    /// The match is that there is no such value, the claim missing included (VirtualService `withoutHeaders`).
    pub inverted: bool,
}

/// A match on a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueMatch {
    /// There is one, whatever it is.
    Present,
    /// Equal.
    Exact(Arc<str>),
    /// Begins with.
    Prefix(Arc<str>),
    /// The whole value matches the expression.
    Regex(Arc<str>),
}

/// One thing done to request or response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteFilter {
    /// Changes to the request's headers.
    RequestHeaders(HeaderChanges),
    /// Changes to the response's headers.
    ResponseHeaders(HeaderChanges),
    /// An answer in place of the backend.
    Redirect(Redirect),
    /// Changes to host and path.
    Rewrite(Rewrite),
}

/// Changes to headers: set, then add, then remove.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HeaderChanges {
    /// Replaced or created.
    pub set: Vec<HeaderChange>,
    /// Appended.
    pub add: Vec<HeaderChange>,
    /// Removed, names in lower case.
    pub remove: Vec<Arc<str>>,
}

/// One header and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderChange {
    /// Its name in lower case.
    pub name: Arc<str>,
    /// Its value.
    pub value: Arc<str>,
}

/// An answer in place of the backend. Parts not set are the request's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<Arc<str>>,
    /// The host.
    pub hostname: Option<Arc<str>>,
    /// The path.
    pub path: Option<PathRewrite>,
    /// The port.
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// Changes to host and path before the request goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The new authority.
    pub hostname: Option<Arc<str>>,
    /// The new path.
    pub path: Option<PathRewrite>,
}

/// How a path changes. The query stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRewrite {
    /// The whole path.
    Full(Arc<str>),
    /// The prefix that the rule matched.
    Prefix(Arc<str>),
}

/// Where a share of a rule's requests goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The service and its port.
    pub kind: BackendKind,
    /// Its share, relative to the other backends; 0: none.
    pub weight: u32,
    /// Header changes for this backend only.
    pub filters: Vec<RouteFilter>,
}

/// What a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A service of the mesh, by namespace and name.
    Service {
        /// Which.
        service: ResourceName,
        /// Its port.
        port: u16,
    },
    /// A service of the mesh, at the port that the client addressed (a VirtualService that names none).
    SamePort(ResourceName),
    /// Something that cannot be used: its share is answered 500, with this reason in the log.
    Invalid(Arc<str>),
}
