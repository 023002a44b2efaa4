//! RequestAuthentication as a waypoint enforces it (`security.istio.io/v1`), read but not compiled.

use crate::{ResourceName, TargetRef};
use std::sync::Arc;
use std::time::Duration;

/// One RequestAuthentication: whose tokens are accepted. It asks for no token, but refuses bad ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestAuthentication {
    /// Its name.
    pub name: ResourceName,
    /// What it attaches to. A waypoint enforces only those with targets.
    pub targets: Vec<TargetRef>,
    /// Alternatives: a token must satisfy one of them.
    pub rules: Vec<JwtRule>,
}

/// One issuer of tokens, and what is done with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtRule {
    /// What `iss` must be; empty: anything.
    pub issuer: Arc<str>,
    /// One of these must be in `aud`; empty: any audience, or none.
    pub audiences: Vec<Arc<str>>,
    /// Where the issuer's keys are.
    pub keys: KeyPlace,
    /// Where tokens are looked for. Nowhere means the usual places: `Authorization: Bearer` and the query parameter
    /// `access_token`.
    pub from: TokenPlaces,
    /// The token stays on the request that goes upstream.
    pub forward: bool,
    /// The header that gets the payload as it was sent, base64url; in lower case.
    pub payload_header: Option<Arc<str>>,
    /// Headers that get single claims.
    pub claim_headers: Vec<ClaimHeader>,
    /// How long the issuer's keys are waited for.
    pub timeout: Duration,
    /// Claims, beside `scope` and `permission`, whose text is a list separated by spaces.
    pub space_delimited: Vec<Arc<str>>,
}

impl JwtRule {
    /// How long keys are waited for unless the rule says otherwise (Istio's default).
    pub const TIMEOUT: Duration = Duration::from_secs(5);

    /// A rule for the tokens of `issuer`, with keys at `keys` and everything else as by default.
    pub fn new(issuer: impl Into<Arc<str>>, keys: KeyPlace) -> Self {
        Self {
            issuer: issuer.into(),
            audiences: Vec::new(),
            keys,
            from: TokenPlaces::default(),
            forward: false,
            payload_header: None,
            claim_headers: Vec::new(),
            timeout: Self::TIMEOUT,
            space_delimited: Vec::new(),
        }
    }
}

/// Where an issuer's keys are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeyPlace {
    /// Here: a JWK Set as JSON.
    Inline(Arc<str>),
    /// At this URI, `http` or `https`.
    Uri(Arc<str>),
    /// Where the issuer's OpenID configuration says.
    Discovery,
}

/// Where tokens are looked for.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TokenPlaces {
    /// Headers.
    pub headers: Vec<TokenHeader>,
    /// Query parameters.
    pub params: Vec<Arc<str>>,
    /// Cookies.
    pub cookies: Vec<Arc<str>>,
}

impl TokenPlaces {
    /// Whether nothing is named, which means the usual places.
    pub fn is_empty(&self) -> bool {
        self.headers.is_empty() && self.params.is_empty() && self.cookies.is_empty()
    }
}

/// A header in which a token is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenHeader {
    /// Its name in lower case.
    pub name: Arc<str>,
    /// What stands before the token, a space included if there is one.
    pub prefix: Arc<str>,
}

/// A header that gets a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimHeader {
    /// Its name in lower case.
    pub header: Arc<str>,
    /// The claim; dots lead into objects.
    pub claim: Arc<str>,
}
