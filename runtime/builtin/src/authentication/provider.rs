//! One rule of a RequestAuthentication, compiled: whose tokens it accepts and what it does with them.

use super::TokenError;
use super::cache::Verified;
use super::keys::{KeySet, KeySource};
use super::places::Place;
use super::token::{Jwt, Terms};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use cairn_filter::RequestHead;
use cairn_mesh::{JwtRule, ResourceName};
use http::{HeaderName, HeaderValue};
use serde_json::Value;
use std::sync::Arc;

/// How far clocks may be apart, in seconds (Envoy's default, which Istio leaves).
const CLOCK_SKEW: u64 = 60;

/// Claims that are lists separated by spaces whether a rule says so or not (RFC 8693 §4.2, and Istio).
const SPACED: [&str; 2] = ["scope", "permission"];

/// One rule, compiled.
pub(super) struct Provider {
    /// The policy it is of, as denials name it.
    pub(super) policy: Arc<str>,
    /// Empty: any.
    pub(super) issuer: Arc<str>,
    pub(super) keys: Arc<dyn KeySource>,
    /// Indices of places, in the order in which tokens count.
    pub(super) places: Vec<usize>,
    pub(super) spaced: Arc<[Arc<str>]>,
    audiences: Vec<String>,
    forward: bool,
    payload_header: Option<HeaderName>,
    claim_headers: Vec<(HeaderName, ClaimName)>,
}

/// A claim whose value a header gets.
struct ClaimName {
    /// As written.
    whole: Arc<str>,
    path: Vec<Arc<str>>,
}

impl Provider {
    pub(super) fn new(
        policy: &ResourceName,
        rule: &JwtRule,
        keys: Arc<dyn KeySource>,
        places: Vec<usize>,
    ) -> Self {
        let mut spaced: Vec<Arc<str>> = SPACED.map(Arc::from).to_vec();
        spaced.extend(rule.space_delimited.iter().cloned());
        spaced.sort();
        spaced.dedup();
        let name = |name: &Arc<str>| HeaderName::from_bytes(name.as_bytes()).ok();
        let claim = |claim: &Arc<str>| ClaimName {
            whole: Arc::clone(claim),
            path: claim.split('.').map(Arc::from).collect(),
        };
        Self {
            policy: format!("RequestAuthentication {policy}").into(),
            issuer: Arc::clone(&rule.issuer),
            keys,
            places,
            spaced: spaced.into(),
            audiences: rule.audiences.iter().map(|text| bare_audience(text).to_owned()).collect(),
            forward: rule.forward,
            payload_header: rule.payload_header.as_ref().and_then(name),
            claim_headers: rule
                .claim_headers
                .iter()
                .filter_map(|header| Some((name(&header.header)?, claim(&header.claim))))
                .collect(),
        }
    }

    /// The headers that only this rule may write.
    pub(super) fn own_headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.payload_header.iter().chain(self.claim_headers.iter().map(|(name, _)| name))
    }

    /// Whether a token on these terms is for this rule and holds at `now`, in seconds since 1970.
    pub(super) fn accepts(&self, terms: &Terms, now: u64) -> Result<(), TokenError> {
        if !self.issuer.is_empty() && *terms.issuer != *self.issuer {
            return Err(TokenError::UnknownIssuer);
        }
        terms.hold_at(now, CLOCK_SKEW)?;
        let is_meant = |audience: &String| self.audiences.iter().any(|own| own == bare_audience(audience));
        if !self.audiences.is_empty() && !terms.audiences.iter().any(is_meant) {
            return Err(TokenError::AudienceNotAllowed);
        }
        Ok(())
    }

    /// Whether this rule accepts the token: on its terms, at `now`, and with one of `keys`.
    pub(super) fn verify(&self, jwt: &Jwt<'_>, keys: &KeySet, now: u64) -> Result<(), TokenError> {
        self.accepts(&jwt.terms, now)?;
        keys.verify(jwt)
    }

    /// Changes the request as the rule asks: the token goes, its payload and claims come.
    pub(super) fn apply(&self, verified: &Verified, place: &Place, head: &mut RequestHead) {
        if let Some(name) = &self.payload_header
            && let Ok(value) = HeaderValue::from_str(&verified.payload_text)
        {
            head.headers.append(name, value);
        }
        for (name, claim) in &self.claim_headers {
            // What no header can hold, a line break above all, is left out.
            if let Some(value) =
                claim.of(verified).and_then(|text| HeaderValue::try_from(text.into_bytes()).ok())
            {
                head.headers.append(name, value);
            }
        }
        if !self.forward {
            place.clear(head);
        }
    }
}

impl ClaimName {
    /// The claim as the text of a header.
    fn of(&self, verified: &Verified) -> Option<String> {
        let before = verified.before.iter().find(|(name, _)| *name == self.whole);
        let text = match before {
            Some((_, text)) => text.clone(),
            None => claim_text(verified.token.claim(&self.path)?)?,
        };
        (!text.is_empty()).then_some(text)
    }
}

/// A claim as text, as Envoy writes it: whole numbers from zero up as such, others with six digits after the point, lists
/// and objects as JSON in base64.
fn claim_text(claim: &Value) -> Option<String> {
    match claim {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => {
            let value = number.as_f64()?;
            let is_whole = value >= 0.0 && value < u64::MAX as f64 && value.fract() == 0.0;
            Some(if is_whole { (value as u64).to_string() } else { format!("{value:.6}") })
        }
        Value::Array(_) | Value::Object(_) => Some(BASE64_STANDARD.encode(claim.to_string())),
        Value::Null => None,
    }
}

/// An audience without its scheme and without a slash at its end: Envoy compares them so.
fn bare_audience(audience: &str) -> &str {
    let bare = audience.strip_prefix("http://").or_else(|| audience.strip_prefix("https://"));
    let bare = bare.unwrap_or(audience);
    bare.strip_suffix('/').unwrap_or(bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audiences_are_compared_without_scheme_and_last_slash() {
        for (own, of_token, is_meant) in [
            ("web", "web", true),
            ("https://web.example/", "web.example", true),
            ("web.example", "http://web.example/", true),
            ("web", "Web", false),
            ("web", "web/x", false),
            ("web//", "web/", false),
        ] {
            assert_eq!(bare_audience(own) == bare_audience(of_token), is_meant, "{own} {of_token}");
        }
    }

    #[test]
    fn claims_become_texts_as_envoy_writes_them() {
        for (claim, expected) in [
            (r#""x""#, Some("x")),
            ("true", Some("true")),
            ("0", Some("0")),
            ("1700000000", Some("1700000000")),
            ("3.0", Some("3")),
            ("1.5", Some("1.500000")),
            ("-2", Some("-2.000000")),
            ("null", None),
            ("[1, 2]", Some("WzEsMl0=")),
            (r#"{"a": ["???"]}"#, Some("eyJhIjpbIj8/PyJdfQ==")),
            ("9007199254740993", Some("9007199254740992")),
            ("1e25", Some("10000000000000000905969664.000000")),
        ] {
            let value: Value = serde_json::from_str(claim).unwrap();
            assert_eq!(claim_text(&value).as_deref(), expected, "{claim}");
        }
    }
}
