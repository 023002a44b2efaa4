//! One client's stream on our server, without its I/O: requests in, responses out when there is something to say.
//!
//! A client is brought from generation to generation, every type it subscribed to in each, also those without a
//! change: so it knows when it has a generation whole. Generations published faster than a client takes them are
//! skipped, never queued.

use crate::AUTHORIZATION_TYPE;
use crate::published::{Held, Published, difference};
use crate::session::{generation_text, refused_resources};
use crate::tokens::Role;
use cairn_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use std::collections::HashMap;
use std::sync::Arc;

/// At most so many responses wait for their answer; then the client is not told anything new.
const UNANSWERED_MAX: usize = 64;
/// At most so many types per stream.
const SUBSCRIPTIONS_MAX: usize = 64;

/// What a request came to.
#[derive(Debug, PartialEq)]
pub(crate) enum Heard {
    /// A subscription, or nothing of interest.
    Nothing,
    /// An answer: what is refused of this type now, and what of it is fine.
    Answer { type_url: Arc<str>, refused: Vec<(String, String)>, taken: Vec<String> },
    /// More subscriptions than allowed.
    TooMany,
}

/// A stream's state.
pub(crate) struct Subscriber {
    role: Role,
    subscriptions: Vec<Subscription>,
    /// The responses without an answer, by nonce.
    unanswered: HashMap<String, Unanswered>,
    next_nonce: u64,
    /// The generation being told.
    target: Arc<Published>,
}

struct Subscription {
    type_url: Arc<str>,
    held: Held,
    /// The generation last told.
    told: Option<u64>,
}

struct Unanswered {
    type_url: Arc<str>,
    names: Vec<String>,
}

impl Subscriber {
    /// A client that has asked nothing yet.
    pub(crate) fn new(role: Role, now: Arc<Published>) -> Self {
        Self { role, subscriptions: Vec::new(), unanswered: HashMap::new(), next_nonce: 1, target: now }
    }

    /// Whether every subscription has been told the target, so that a newer one may begin. Of generation 0, before
    /// anything was published, there is nothing to tell.
    pub(crate) fn is_told(&self) -> bool {
        let generation = self.target.generation;
        generation == 0 || self.subscriptions.iter().all(|subscription| subscription.told == Some(generation))
    }

    /// Begins to tell a newer generation.
    pub(crate) fn advance(&mut self, to: Arc<Published>) {
        self.target = to;
    }

    /// Takes a request: a first one for a type subscribes, with a nonce it answers a response. Subscriptions are to
    /// everything of a type, whatever names they give.
    pub(crate) fn hear(&mut self, request: DeltaDiscoveryRequest) -> Heard {
        if !request.response_nonce.is_empty() {
            return self.answer(request);
        }
        let known = self.subscriptions.iter().any(|it| *it.type_url == *request.type_url);
        if known || request.type_url.is_empty() {
            return Heard::Nothing;
        }
        if self.subscriptions.len() >= SUBSCRIPTIONS_MAX {
            return Heard::TooMany;
        }
        self.subscriptions.push(Subscription {
            type_url: request.type_url.into(),
            held: Held::Claimed(request.initial_resource_versions),
            told: None,
        });
        // Policies are told before what they guard.
        self.subscriptions.sort_by_key(|it| *it.type_url != *AUTHORIZATION_TYPE);
        Heard::Nothing
    }

    fn answer(&mut self, request: DeltaDiscoveryRequest) -> Heard {
        let Some(response) = self.unanswered.remove(&request.response_nonce) else { return Heard::Nothing };
        let refused = request.error_detail.as_ref().map(refused_resources).unwrap_or_default();
        let is_refused = |name: &String| refused.iter().any(|(refused, _)| refused == name);
        let taken = response.names.into_iter().filter(|name| !is_refused(name)).collect();
        Heard::Answer { type_url: response.type_url, refused, taken }
    }

    /// The next response, if there is anything to say and the client keeps up.
    pub(crate) fn next(&mut self) -> Option<DeltaDiscoveryResponse> {
        let generation = self.target.generation;
        if generation == 0 || self.unanswered.len() >= UNANSWERED_MAX {
            return None;
        }
        let subscription = self.subscriptions.iter_mut().find(|it| it.told != Some(generation))?;
        let now = self.target.resources(&subscription.type_url);
        let difference = difference(&subscription.held, &now, &self.role);
        subscription.held = Held::Sent(now);
        subscription.told = Some(generation);
        let nonce = self.next_nonce.to_string();
        self.next_nonce += 1;
        let names = difference.put.iter().map(|resource| resource.name.clone());
        let names = names.chain(difference.removed.iter().cloned()).collect();
        let unanswered = Unanswered { type_url: Arc::clone(&subscription.type_url), names };
        self.unanswered.insert(nonce.clone(), unanswered);
        Some(DeltaDiscoveryResponse {
            system_version_info: generation_text(generation),
            resources: difference.put,
            type_url: subscription.type_url.to_string(),
            nonce,
            removed_resources: difference.removed,
        })
    }
}

#[cfg(test)]
#[path = "subscriber/tests.rs"]
mod tests;
