//! One client's stream on our server, without its I/O: requests in, responses out when there is something to say.
//!
//! A client is brought from generation to generation, every type it subscribed to in each, also those without a
//! change: so it knows when it has a generation whole. Generations published faster than a client takes them are
//! skipped, never queued.

use crate::published::{Difference, Held, Published, Resources, difference};
use crate::session::{generation_text, refused_resources};
use crate::tokens::Role;
use crate::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use cairn_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// At most so many responses wait for their answer; then the client is not told anything new.
const UNANSWERED_MAX: usize = 64;
/// At most so many types per stream.
const SUBSCRIPTIONS_MAX: usize = 64;

/// At most so many names per stream.
const NAMES_MAX: usize = 1 << 20;
/// What stands for every name.
const EVERYTHING: &str = "*";

/// What a request came to.
#[derive(Debug, PartialEq)]
pub(crate) enum Heard {
    /// A subscription, or nothing of interest.
    Nothing,
    /// An answer: what is refused of this type now, and what of it is fine.
    Answer { type_url: Arc<str>, refused: Vec<(String, String)>, taken: Vec<String> },
    /// More subscriptions or names than allowed.
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
    /// What is asked for by name; `None`: everything.
    names: Option<BTreeSet<String>>,
    /// Which of these have been asked for and not been answered.
    asked: Vec<String>,
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
    /// everything of a type, whatever names they give; but one to workloads and services that begins by unsubscribing from
    /// everything is to the names that it gives, then and later.
    pub(crate) fn hear(&mut self, request: DeltaDiscoveryRequest) -> Heard {
        if !request.response_nonce.is_empty() {
            return self.answer(request);
        }
        if request.type_url.is_empty() {
            return Heard::Nothing;
        }
        if let Some(known) = self.subscriptions.iter_mut().find(|it| *it.type_url == *request.type_url) {
            return known.ask(request);
        }
        if self.subscriptions.len() >= SUBSCRIPTIONS_MAX {
            return Heard::TooMany;
        }
        self.subscriptions.push(Subscription::new(request));
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
        let is_due = |it: &&mut Subscription| it.told != Some(generation) || !it.asked.is_empty();
        let subscription = self.subscriptions.iter_mut().find(is_due)?;
        let now = match &subscription.names {
            None => self.target.resources(&subscription.type_url),
            Some(names) => self.target.named(names.iter()),
        };
        let mut difference = difference(&subscription.held, &now, &self.role);
        subscription.answer(&self.target, &now, &mut difference);
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

impl Subscription {
    fn new(first: DeltaDiscoveryRequest) -> Self {
        let everything = |names: &[String]| names.iter().any(|name| name == EVERYTHING);
        let is_named = first.type_url == ADDRESS_TYPE && everything(&first.resource_names_unsubscribe);
        let mut subscription = Self {
            type_url: first.type_url.as_str().into(),
            held: Held::Claimed(BTreeMap::new()),
            told: None,
            names: is_named.then(BTreeSet::new),
            asked: Vec::new(),
        };
        let versions = first.initial_resource_versions;
        if let Some(names) = &mut subscription.names {
            // What has no version is not held but waited for.
            let (waited, held): (BTreeMap<_, _>, BTreeMap<_, _>) =
                versions.into_iter().partition(|(_, version)| version.is_empty());
            names.extend(held.keys().cloned());
            subscription.held = Held::Claimed(held);
            subscription.subscribe(waited.into_keys().chain(first.resource_names_subscribe));
        } else {
            subscription.held = Held::Claimed(versions);
        }
        subscription
    }

    /// More names, or fewer.
    fn ask(&mut self, request: DeltaDiscoveryRequest) -> Heard {
        let Some(names) = &mut self.names else { return Heard::Nothing };
        for name in request.resource_names_unsubscribe {
            names.remove(&name);
            self.asked.retain(|asked| *asked != name);
        }
        self.subscribe(request.resource_names_subscribe.into_iter());
        match self.names.as_ref().is_some_and(|names| names.len() > NAMES_MAX) {
            true => Heard::TooMany,
            false => Heard::Nothing,
        }
    }

    fn subscribe(&mut self, more: impl Iterator<Item = String>) {
        let Some(names) = &mut self.names else { return };
        for name in more.filter(|name| name != EVERYTHING) {
            if !self.asked.contains(&name) {
                self.asked.push(name.clone());
            }
            names.insert(name);
        }
    }

    /// Answers what was asked for by name, whether it was sent before or not: with itself, or with its absence. What is
    /// sent says by which of the names it was asked for.
    fn answer(&mut self, target: &Published, now: &Resources, difference: &mut Difference) {
        for asked in std::mem::take(&mut self.asked) {
            let found = target.look_up(&asked);
            if found.is_empty() {
                difference.removed.push(asked);
                continue;
            }
            for name in found {
                if !difference.put.iter().any(|resource| *resource.name == *name)
                    && let Some(entry) = now.get(&name)
                {
                    difference.put.push(entry.to_resource(&name));
                }
                let sent = difference.put.iter_mut().find(|resource| *resource.name == *name);
                let Some(resource) = sent else { continue };
                if *resource.name != *asked {
                    resource.aliases.push(asked.clone());
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "subscriber/tests.rs"]
mod tests;
