//! RequestAuthentication as a filter: tokens of a request are verified, a bad one is refused, none is fine.

mod authenticator;
mod cache;
mod failure;
mod json;
mod keys;
mod places;
mod provider;
#[cfg(test)]
mod testing;
mod token;

pub use authenticator::{Accepted, Authenticator, Judgement, Moment, Refused};
pub use cache::TokenCache;
pub use failure::TokenError;
pub use keys::{KeySet, KeySetError, KeySource, Keys, inline_keys};
pub use token::{Algorithm, Jwt, Terms};

use cairn_filter::{Denial, Exchange, Factory, Filter, LocalReply, Phases, Rehearsal, RequestHead, Verdict};
use cairn_mesh::{JwtRule, RequestAuthentication, ResourceName};
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, WWW_AUTHENTICATE};
use http::{HeaderName, HeaderValue, Method};
use smallvec::SmallVec;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

const NAME: &str = "authentication";
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// How much of a request's path a challenge repeats, in bytes (Envoy).
const REALM_PATH_BYTES_MAX: usize = 256;

/// A filter that enforces `policies`, which the caller has already chosen for this destination. `keys` says where the keys
/// of a rule are; `cache` is one for all destinations.
pub fn authentication(
    policies: &[Arc<RequestAuthentication>],
    keys: &mut dyn FnMut(&ResourceName, &JwtRule) -> Arc<dyn KeySource>,
    cache: &Arc<TokenCache>,
) -> Arc<dyn Factory> {
    let authenticator = Authenticator::compile(policies, keys);
    let cache = Arc::clone(cache);
    Arc::new(Authenticate { shared: Arc::new(Shared { name: NAME.into(), authenticator, cache }) })
}

struct Authenticate {
    shared: Arc<Shared>,
}

struct Shared {
    name: Arc<str>,
    authenticator: Authenticator,
    cache: Arc<TokenCache>,
}

impl Factory for Authenticate {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn phases(&self) -> Phases {
        Phases::REQUEST_HEADERS
    }

    fn start(&self, _exchange: &Exchange) -> Option<Box<dyn Filter>> {
        if self.shared.authenticator.is_empty() {
            return None;
        }
        Some(Box::new(Authentication { shared: Arc::clone(&self.shared), waited: SmallVec::new() }))
    }

    fn rehearse(&self, _exchange: &Exchange, _head: &RequestHead) -> Rehearsal {
        Rehearsal::Run(Vec::new())
    }
}

struct Authentication {
    shared: Arc<Shared>,
    /// The rules whose keys were waited for.
    waited: SmallVec<[usize; 1]>,
}

impl Filter for Authentication {
    fn request_headers(&mut self, exchange: &mut Exchange, head: &mut RequestHead, _end: bool) -> Verdict {
        let Shared { name, authenticator, cache } = &*self.shared;
        authenticator.take_own_headers(head);
        if is_preflight(head) {
            exchange.note(name, "a CORS preflight carries no token: passed");
            return Verdict::Continue;
        }
        let now = exchange.started_at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let moment = Moment { now, worker: exchange.connection.worker, cache };
        match authenticator.judge(head, moment, &mut self.waited) {
            Judgement::Anonymous => Verdict::Continue,
            Judgement::Accepted(accepted) => {
                authenticator.apply(&accepted, head);
                exchange.note(name, format!("a token of {} is good", accepted.issuer()));
                exchange.token = accepted.token().cloned();
                Verdict::Continue
            }
            Judgement::Refused(refused) => Verdict::Reply(Box::new(refuse(exchange, head, refused))),
            Judgement::Wait(until) => Verdict::Wait(until),
        }
    }
}

/// A browser's question before the request, which never carries credentials (Fetch §4.8).
fn is_preflight(head: &RequestHead) -> bool {
    let is_filled = |name: &HeaderName| head.headers.get(name).is_some_and(|value| !value.is_empty());
    head.method == Method::OPTIONS && is_filled(&ORIGIN) && is_filled(&ACCESS_CONTROL_REQUEST_METHOD)
}

/// The answer to a request with a bad token, as Envoy words it.
fn refuse(exchange: &mut Exchange, head: &RequestHead, refused: Refused) -> LocalReply {
    let Refused { error, policy, issuer } = refused;
    let of = if issuer.is_empty() { "any issuer" } else { &*issuer };
    let reason = format!("{error} (its rule for tokens of {of})");
    exchange.denial = Some(Denial { policy: policy.to_string().into(), reason });
    let mut reply = LocalReply::text(error.status(), error.to_string(), error.details());
    if let Some(challenge) = challenge(head) {
        reply.headers.insert(WWW_AUTHENTICATE, challenge);
    }
    reply
}

/// What the client is asked for (RFC 6750 §3): a token for this URI, and not the one it sent.
fn challenge(head: &RequestHead) -> Option<HeaderValue> {
    let path = head.path.as_str();
    let path = path.get(..REALM_PATH_BYTES_MAX).unwrap_or(path);
    let scheme = head.headers.get(&FORWARDED_PROTO).unwrap_or(&head.scheme);
    let mut text = b"Bearer realm=\"".to_vec();
    for part in [scheme.as_bytes(), b"://", head.authority.as_bytes(), path.as_bytes()] {
        // What would end the quotation has no place in a URI.
        text.extend(part.iter().filter(|byte| !matches!(byte, b'"' | b'\\')));
    }
    text.extend_from_slice(b"\", error=\"invalid_token\"");
    HeaderValue::from_bytes(&text).ok()
}

#[cfg(test)]
#[path = "authentication/tests.rs"]
mod tests;
