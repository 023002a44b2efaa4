//! Tokens that were verified, remembered by each worker for itself, so that a token that comes with every request is
//! verified once.

use super::token::{Jwt, Terms};
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand;
use cairn_filter::Token;
use parking_lot::Mutex;
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// How many workers have caches of their own; workers beyond share.
const WORKERS: usize = 64;

/// How many tokens a worker remembers: sets of ways.
const SETS: usize = 512;
const WAYS: usize = 4;

/// Longer tokens are not remembered: what is remembered is bounded in bytes, too.
const TOKEN_BYTES_MAX: usize = 8 * 1024;

/// What a token is remembered by: its GMAC under a key of this process (NIST SP 800-38D). Two tokens of at most
/// [`TOKEN_BYTES_MAX`] share one with a probability below 2⁻¹¹⁸, and nobody who does not know the key, or never sees a tag,
/// can look for two that do. It costs a third of SHA-256.
pub(super) type Tag = [u8; 16];

/// A token whose signature was verified.
#[derive(Debug)]
pub(super) struct Verified {
    /// Whether it holds for a rule and at a time is decided each time.
    pub(super) terms: Terms,
    /// The payload as it was sent.
    pub(super) payload_text: Box<str>,
    /// What it says, with lists in place of texts for the claims in `spaced`.
    pub(super) token: Arc<Token>,
    /// The texts that became lists.
    pub(super) before: Vec<(Arc<str>, String)>,
    /// The keys that verified it, by their digest.
    pub(super) keys: [u8; 32],
    /// The claims that are lists separated by spaces.
    pub(super) spaced: Arc<[Arc<str>]>,
}

impl Verified {
    /// What `jwt`, which `keys` have verified, says.
    pub(super) fn new(jwt: Jwt<'_>, keys: [u8; 32], spaced: &Arc<[Arc<str>]>) -> Self {
        let Jwt { terms, payload_text, mut payload, .. } = jwt;
        let mut before = Vec::new();
        for name in spaced.iter() {
            let Some(Value::String(text)) = payload.get(&**name) else { continue };
            let text = text.clone();
            let list = text.split(' ').filter(|part| !part.is_empty()).map(Value::from).collect();
            payload.insert(name.to_string(), Value::Array(list));
            before.push((Arc::clone(name), text));
        }
        Self {
            terms,
            payload_text: payload_text.into(),
            token: Arc::new(Token::new(payload)),
            before,
            keys,
            spaced: Arc::clone(spaced),
        }
    }
}

/// Verified tokens, by worker. One for all destinations of a process. Forgetting is always right: what is not here is
/// verified anew.
pub struct TokenCache {
    /// `None`: nothing is remembered, by choice or because the system has no randomness to give.
    key: Option<LessSafeKey>,
    workers: Box<[Mutex<Vec<Slot>>]>,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Clone, Default)]
struct Slot {
    entry: Option<(Tag, Arc<Verified>)>,
    /// When it was used, counted in look-ups of its worker.
    used: u64,
}

impl Default for TokenCache {
    fn default() -> Self {
        let workers = (0..WORKERS).map(|_| Mutex::default()).collect();
        let mut bytes = [0; 16];
        let key = rand::fill(&mut bytes).and_then(|()| UnboundKey::new(&AES_128_GCM, &bytes));
        Self {
            key: key.ok().map(LessSafeKey::new),
            workers,
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }
}

impl TokenCache {
    /// A cache that remembers nothing: every token is verified each time.
    pub fn off() -> Self {
        Self { key: None, workers: Box::default(), hits: AtomicU64::new(0), misses: AtomicU64::new(0) }
    }

    /// How many tokens were found, and how many were not.
    pub fn counts(&self) -> (u64, u64) {
        (self.hits.load(Relaxed), self.misses.load(Relaxed))
    }

    /// What a token is remembered by; `None` if it is not to be remembered.
    pub(super) fn tag(&self, token: &str) -> Option<Tag> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        // One nonce will do: it only masks tags, and nobody sees them.
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        let aad = Aad::from(token.as_bytes());
        let tag = self.key.as_ref()?.seal_in_place_separate_tag(nonce, aad, &mut []).ok()?;
        Tag::try_from(tag.as_ref()).ok()
    }

    /// The token with this tag.
    pub(super) fn find(&self, worker: usize, tag: &Tag) -> Option<Arc<Verified>> {
        let found = self.workers.get(worker % WORKERS).and_then(|slots| find(&mut slots.lock(), tag));
        if found.is_some() { &self.hits } else { &self.misses }.fetch_add(1, Relaxed);
        found
    }

    /// Remembers a verified token in place of the one of its set that was longest not used.
    pub(super) fn put(&self, worker: usize, tag: Tag, verified: &Arc<Verified>) {
        let Some(slots) = self.workers.get(worker % WORKERS) else { return };
        let mut slots = slots.lock();
        if slots.is_empty() {
            slots.resize(SETS * WAYS, Slot::default());
        }
        let Some(set) = set_of(&mut slots, &tag) else { return };
        let now = set.iter().map(|slot| slot.used).max().unwrap_or(0) + 1;
        let is_same = |slot: &Slot| slot.entry.as_ref().is_some_and(|(known, _)| *known == tag);
        let place = set.iter().position(is_same).or_else(|| {
            let oldest = set.iter().enumerate().min_by_key(|(_, slot)| (slot.entry.is_some(), slot.used));
            oldest.map(|(at, _)| at)
        });
        if let Some(slot) = place.and_then(|at| set.get_mut(at)) {
            *slot = Slot { entry: Some((tag, Arc::clone(verified))), used: now };
        }
    }
}

fn find(slots: &mut [Slot], tag: &Tag) -> Option<Arc<Verified>> {
    let set = set_of(slots, tag)?;
    let now = set.iter().map(|slot| slot.used).max().unwrap_or(0) + 1;
    set.iter_mut().find_map(|slot| {
        let (known, verified) = slot.entry.as_ref()?;
        if known != tag {
            return None;
        }
        slot.used = now;
        Some(Arc::clone(verified))
    })
}

/// The slots in which a tag may be. Its first bytes are as random as any.
fn set_of<'a>(slots: &'a mut [Slot], tag: &Tag) -> Option<&'a mut [Slot]> {
    let [first, second, ..] = tag;
    let set = usize::from(u16::from_le_bytes([*first, *second])) % SETS;
    slots.get_mut(set * WAYS..(set + 1) * WAYS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified() -> Arc<Verified> {
        Arc::new(Verified {
            terms: Terms::default(),
            payload_text: "".into(),
            token: Arc::default(),
            before: Vec::new(),
            keys: [0; 32],
            spaced: [].into(),
        })
    }

    /// Tags of one set.
    fn tag(last: u8) -> Tag {
        let mut tag = [7; 16];
        tag[15] = last;
        tag
    }

    #[test]
    fn what_was_longest_not_used_is_forgotten() {
        let cache = TokenCache::default();
        let (one, other) = (verified(), verified());
        cache.put(0, tag(0), &one);
        for last in 1..WAYS as u8 {
            cache.put(0, tag(last), &other);
        }
        assert!(Arc::ptr_eq(&cache.find(0, &tag(0)).unwrap(), &one));
        cache.put(0, tag(100), &other);
        assert!(cache.find(0, &tag(0)).is_some(), "it was used last");
        assert!(cache.find(0, &tag(1)).is_none(), "it was not used");
        assert!(cache.find(0, &tag(100)).is_some());
        assert_eq!(cache.counts(), (3, 1));
    }

    #[test]
    fn each_worker_remembers_for_itself_and_no_long_tokens() {
        let cache = TokenCache::default();
        cache.put(0, tag(0), &verified());
        assert!(cache.find(1, &tag(0)).is_none());
        assert!(cache.tag(&"a".repeat(TOKEN_BYTES_MAX)).is_some());
        assert!(cache.tag(&"a".repeat(TOKEN_BYTES_MAX + 1)).is_none());
    }

    #[test]
    fn tags_tell_tokens_apart_and_caches_too() {
        let (cache, other) = (TokenCache::default(), TokenCache::default());
        let long = "a".repeat(1000);
        assert_eq!(cache.tag(&long), cache.tag(&long));
        assert_ne!(cache.tag(&long), other.tag(&long));
        let mut seen = std::collections::HashSet::from([cache.tag(&long)]);
        for at in 0..long.len() {
            let mut changed = long.clone();
            changed.replace_range(at..=at, "b");
            assert!(seen.insert(cache.tag(&changed)) && seen.insert(cache.tag(&long[..at])), "{at}");
        }
    }

    #[test]
    fn what_is_put_again_takes_the_place_of_the_first() {
        let cache = TokenCache::default();
        cache.put(0, tag(0), &verified());
        let new = verified();
        cache.put(0, tag(0), &new);
        assert!(Arc::ptr_eq(&cache.find(0, &tag(0)).unwrap(), &new));
        let known = cache.workers[0].lock().iter().filter(|slot| slot.entry.is_some()).count();
        assert_eq!(known, 1);
    }
}
