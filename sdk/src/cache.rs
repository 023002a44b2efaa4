//! A bounded map whose entries expire, for verdicts and answers that are worth keeping in an instance's memory.

use crate::sys;
use std::collections::BTreeMap;
use std::time::Duration;

/// Keeps values for a time, as long as they weigh no more together than allowed; the least recently used go first. Each worker
/// has a cache of its own.
///
/// ```
/// use cairn_sdk::Cache;
/// use std::time::Duration;
///
/// let mut cache = Cache::new(2);
/// for (key, value) in [("a", 1), ("b", 2)] {
///     cache.insert(key, value, 1, Duration::from_secs(60));
/// }
/// assert_eq!(cache.get(&"a"), Some(&1));
/// cache.insert("c", 3, 1, Duration::from_secs(60));
/// assert_eq!(["a", "b", "c"].map(|key| cache.get(&key).copied()), [Some(1), None, Some(3)]);
/// ```
#[derive(Debug)]
pub struct Cache<K, V> {
    weight_max: usize,
    weight: usize,
    uses: u64,
    entries: BTreeMap<K, Entry<V>>,
    by_use: BTreeMap<u64, K>,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    weight: usize,
    used: u64,
    expires: u64,
}

impl<K: Ord + Clone, V> Cache<K, V> {
    /// An empty one for values of this weight together: their number, if each weighs one, or their bytes.
    pub fn new(weight_max: usize) -> Self {
        Self { weight_max, weight: 0, uses: 0, entries: BTreeMap::new(), by_use: BTreeMap::new() }
    }

    /// A value that has not expired.
    pub fn get(&mut self, key: &K) -> Option<&V> {
        let now = sys::now();
        if self.entries.get(key).is_some_and(|entry| entry.expires <= now) {
            self.remove(key);
        }
        let entry = self.entries.get_mut(key)?;
        self.by_use.remove(&entry.used);
        self.uses += 1;
        entry.used = self.uses;
        self.by_use.insert(entry.used, key.clone());
        Some(&entry.value)
    }

    /// Keeps a value. One that is too heavy by itself is not kept.
    pub fn insert(&mut self, key: K, value: V, weight: usize, lasts: Duration) {
        self.remove(&key);
        if weight > self.weight_max || lasts.is_zero() {
            return;
        }
        while self.weight + weight > self.weight_max {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            self.remove(&oldest);
        }
        self.uses += 1;
        let nanos = u64::try_from(lasts.as_nanos()).unwrap_or(u64::MAX);
        let expires = sys::now().saturating_add(nanos);
        self.by_use.insert(self.uses, key.clone());
        self.entries.insert(key, Entry { value, weight, used: self.uses, expires });
        self.weight += weight;
    }

    /// Forgets a value.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.remove(key)?;
        self.by_use.remove(&entry.used);
        self.weight -= entry.weight;
        Some(entry.value)
    }

    /// How many values there are, expired ones included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_by_weight() {
        let mut cache = Cache::new(10);
        let minute = Duration::from_secs(60);
        for key in 0..100 {
            cache.insert(key, key, 3, minute);
            assert!(cache.weight <= 10 && cache.len() <= 3 && cache.by_use.len() == cache.len());
        }
        cache.insert(1000, 0, 11, minute);
        assert_eq!((cache.get(&1000).copied(), cache.get(&99).copied()), (None, Some(99)));
        cache.insert(99, 1, 10, minute);
        assert_eq!((cache.len(), cache.weight), (1, 10));
        assert_eq!(cache.remove(&99), Some(1));
        assert!(cache.is_empty() && cache.weight == 0);
    }
}
