//! The decision about a request's tokens, over all rules that apply to its destination.

use super::TokenError;
use super::cache::{Tag, TokenCache, Verified};
use super::keys::{KeySource, Keys};
use super::places::{Place, places};
use super::provider::Provider;
use super::token::Jwt;
use cairn_filter::{RequestHead, Token};
use cairn_mesh::{JwtRule, RequestAuthentication, ResourceName};
use http::HeaderName;
use smallvec::SmallVec;
use std::borrow::Cow;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// The RequestAuthentications of one destination, compiled.
pub struct Authenticator {
    /// By issuer, as Istio sorts them.
    providers: Vec<Provider>,
    /// All places that some rule looks at, each once.
    places: Vec<Place>,
    /// Headers that clients may not send, for only a verified token may fill them.
    own_headers: Vec<HeaderName>,
}

/// What became of a request's tokens.
pub enum Judgement {
    /// There are none where any rule looks.
    Anonymous,
    /// A rule accepts all that it sees.
    Accepted(Accepted),
    /// There are tokens, and no rule accepts what it sees.
    Refused(Refused),
    /// It cannot be said before the keys of an issuer have been asked for, which the future does.
    Wait(Pin<Box<dyn Future<Output = ()> + Send>>),
}

/// The tokens that a rule accepted.
pub struct Accepted {
    provider: usize,
    /// With the place of each, in the order in which Envoy verifies them: the last counts.
    tokens: SmallVec<[(usize, Arc<Verified>); 1]>,
}

impl Accepted {
    /// What the token says that counts.
    pub fn token(&self) -> Option<&Arc<Token>> {
        self.tokens.last().map(|(_, verified)| &verified.token)
    }

    /// Who issued it.
    pub fn issuer(&self) -> &str {
        self.tokens.last().map_or("", |(_, verified)| &verified.terms.issuer)
    }
}

/// Why tokens were refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What the client is told.
    pub error: TokenError,
    /// The policy whose rule came nearest, `RequestAuthentication ns/name`.
    pub policy: Arc<str>,
    /// The issuer that this rule is for; empty: any.
    pub issuer: Arc<str>,
}

/// What one rule makes of the tokens that it sees.
struct Failed {
    provider: usize,
    error: TokenError,
    key_id: String,
}

/// When and where a decision is made.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    /// Seconds since 1970.
    pub now: u64,
    /// The worker, whose part of the cache is used.
    pub worker: usize,
    /// Tokens verified before.
    pub cache: &'a TokenCache,
}

/// A token of the request, and what is known of it so far.
struct Presented<'a> {
    place: usize,
    text: &'a str,
    remembered: Option<(Option<Tag>, Option<Arc<Verified>>)>,
    parsed: Option<Result<Jwt<'a>, TokenError>>,
}

impl Authenticator {
    /// Compiles `policies`, which the caller has chosen for this destination. `keys` says where each rule's keys are.
    pub fn compile(
        policies: &[Arc<RequestAuthentication>],
        keys: &mut dyn FnMut(&ResourceName, &JwtRule) -> Arc<dyn KeySource>,
    ) -> Self {
        let mut rules: Vec<(&ResourceName, &JwtRule)> =
            policies.iter().flat_map(|policy| policy.rules.iter().map(|rule| (&policy.name, rule))).collect();
        rules.sort_by(|a, b| a.1.issuer.cmp(&b.1.issuer));
        let mut all_places: Vec<Place> = Vec::new();
        let mut providers = Vec::new();
        for (name, rule) in rules {
            let mut own = Vec::new();
            for place in places(&rule.from) {
                let known = all_places.iter().position(|known| *known == place);
                own.push(known.unwrap_or(all_places.len()));
                if known.is_none() {
                    all_places.push(place);
                }
            }
            providers.push(Provider::new(name, rule, keys(name, rule), own));
        }
        let mut own_headers: Vec<HeaderName> =
            providers.iter().flat_map(Provider::own_headers).cloned().collect();
        own_headers.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        own_headers.dedup();
        Self { providers, places: all_places, own_headers }
    }

    /// Whether there is nothing to verify.
    pub fn is_empty(&self) -> bool {
        self.providers.is_empty()
    }

    /// Takes away the headers that only a verified token may fill.
    pub fn take_own_headers(&self, head: &mut RequestHead) {
        for name in &self.own_headers {
            head.headers.remove(name);
        }
    }

    /// Decides about the tokens of a request. `waited` remembers, from one call for a request to the next, whose keys
    /// were waited for: each at most once.
    pub fn judge(
        &self,
        head: &RequestHead,
        moment: Moment<'_>,
        waited: &mut SmallVec<[usize; 1]>,
    ) -> Judgement {
        let texts = self.texts(head);
        if texts.is_empty() {
            return Judgement::Anonymous;
        }
        let present = |(place, text)| Presented { place, text, remembered: None, parsed: None };
        let texts = texts.iter().map(|(place, text)| (*place, &**text));
        let mut tokens: SmallVec<[Presented<'_>; 2]> = texts.map(present).collect();
        let mut failures: SmallVec<[Failed; 1]> = SmallVec::new();
        for (index, provider) in self.providers.iter().enumerate() {
            match provider.judge(&mut tokens, moment) {
                None => {}
                Some(Ok(tokens)) => return Judgement::Accepted(Accepted { provider: index, tokens }),
                Some(Err((error, key_id))) => {
                    let failed = Failed { provider: index, error, key_id };
                    // Without its keys, nobody knows whether this rule is the one.
                    if error == TokenError::KeysNotFetched
                        && let Some(wait) = self.wait(&failed, waited)
                    {
                        return Judgement::Wait(wait);
                    }
                    failures.push(failed);
                }
            }
        }
        let no_key = failures.iter().filter(|failed| failed.error == TokenError::NoMatchingKey);
        for failed in no_key {
            if let Some(wait) = self.wait(failed, waited) {
                return Judgement::Wait(wait);
            }
        }
        self.outcome(&failures)
    }

    /// Changes the request as the rule that accepted its tokens asks.
    pub fn apply(&self, accepted: &Accepted, head: &mut RequestHead) {
        let Some(provider) = self.providers.get(accepted.provider) else { return };
        for (place, verified) in &accepted.tokens {
            if let Some(place) = self.places.get(*place) {
                provider.apply(verified, place, head);
            }
        }
    }

    fn texts<'a>(&self, head: &'a RequestHead) -> SmallVec<[(usize, Cow<'a, str>); 2]> {
        let mut texts = SmallVec::new();
        for (index, place) in self.places.iter().enumerate() {
            place.find(head, |text| texts.push((index, text)));
        }
        texts
    }

    fn wait(
        &self,
        failed: &Failed,
        waited: &mut SmallVec<[usize; 1]>,
    ) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> {
        if waited.contains(&failed.provider) {
            return None;
        }
        let wait = self.providers.get(failed.provider)?.keys.renew(&failed.key_id)?;
        waited.push(failed.provider);
        Some(wait)
    }

    /// Of several reasons, which one is told. It is what Envoy's nested requirements come to: the first rule that sees a
    /// token decides; where that is only not the token's issuer, the last rule that has a better reason.
    fn outcome(&self, failures: &[Failed]) -> Judgement {
        let is_ours = |failed: &&Failed| failed.error != TokenError::UnknownIssuer;
        let first = failures.first();
        let told = first.filter(is_ours).or_else(|| failures.iter().rfind(is_ours)).or(first);
        let Some((failed, provider)) =
            told.and_then(|failed| Some((failed, self.providers.get(failed.provider)?)))
        else {
            return Judgement::Anonymous;
        };
        Judgement::Refused(Refused {
            error: failed.error,
            policy: Arc::clone(&provider.policy),
            issuer: Arc::clone(&provider.issuer),
        })
    }
}

/// The tokens that a rule accepts, or the first reason not to, with the key that this token names.
type Outcome = Result<SmallVec<[(usize, Arc<Verified>); 1]>, (TokenError, String)>;

impl Provider {
    /// `None` when there is no token where this rule looks. Otherwise all that are there must be good, or an application
    /// could take a bad one for the one that was verified.
    fn judge(&self, tokens: &mut [Presented<'_>], moment: Moment<'_>) -> Option<Outcome> {
        let mut accepted = SmallVec::new();
        for place in self.places.iter().rev() {
            for token in tokens.iter_mut().rev().filter(|token| token.place == *place) {
                match self.check(token, moment) {
                    Ok(verified) => accepted.push((*place, verified)),
                    Err(error) => return Some(Err((error, token.key_id()))),
                }
            }
        }
        (!accepted.is_empty()).then_some(Ok(accepted))
    }

    fn check(&self, token: &mut Presented<'_>, moment: Moment<'_>) -> Result<Arc<Verified>, TokenError> {
        let keys = self.keys.keys();
        let (tag, remembered) = token.remembered(moment);
        if let Some(verified) = remembered {
            self.accepts(&verified.terms, moment.now)?;
            if matches!(&keys, Keys::Known(set) if *set.digest() == verified.keys)
                && self.spaced == verified.spaced
            {
                return Ok(verified);
            }
        }
        let jwt = token.parsed()?;
        self.accepts(&jwt.terms, moment.now)?;
        let set = match keys {
            Keys::Known(set) => set,
            Keys::Unusable => return Err(TokenError::NoValidKeys),
            Keys::Missing => return Err(TokenError::KeysNotFetched),
        };
        self.verify(jwt, &set, moment.now)?;
        let jwt = token.take_parsed()?;
        let verified = Arc::new(Verified::new(jwt, *set.digest(), &self.spaced));
        if let Some(tag) = tag {
            moment.cache.put(moment.worker, tag, &verified);
        }
        Ok(verified)
    }
}

impl<'a> Presented<'a> {
    fn remembered(&mut self, moment: Moment<'_>) -> (Option<Tag>, Option<Arc<Verified>>) {
        let look = || {
            let tag = moment.cache.tag(self.text);
            (tag, tag.and_then(|tag| moment.cache.find(moment.worker, &tag)))
        };
        self.remembered.get_or_insert_with(look).clone()
    }

    fn parsed(&mut self) -> Result<&Jwt<'a>, TokenError> {
        self.parsed.get_or_insert_with(|| Jwt::parse(self.text)).as_ref().map_err(|error| *error)
    }

    /// The same, for whoever has no further use of it here.
    fn take_parsed(&mut self) -> Result<Jwt<'a>, TokenError> {
        self.parsed.take().unwrap_or_else(|| Jwt::parse(self.text))
    }

    fn key_id(&self) -> String {
        let parsed = self.parsed.as_ref().and_then(|parsed| parsed.as_ref().ok());
        parsed.map(|jwt| jwt.key_id.clone()).unwrap_or_default()
    }
}
