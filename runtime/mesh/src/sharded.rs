//! A map in shards behind `Arc`s: a copy shares all of them, and a write copies only the shard it touches.
//!
//! That is what makes publishing one change among 100,000 workloads cost microseconds: the new snapshot and the old
//! one differ in a few shards of about a hundred entries.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

/// Shards of a map. At 100,000 entries each holds about 200: a write then copies 200 entries, and publishing copies
/// 512 pointers.
const SHARDS: usize = 512;

type Shard<K, V> = Option<Arc<HashMap<K, V>>>;

/// A map whose copies are cheap.
#[derive(Clone)]
pub struct Sharded<K, V> {
    shards: Arc<[Shard<K, V>]>,
    hasher: RandomState,
    len: usize,
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| None).collect(), hasher: RandomState::new(), len: 0 }
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Sharded<K, V> {
    fn index<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        self.hasher.hash_one(key) as usize % SHARDS
    }

    /// The value at `key`.
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[self.index(key)].as_ref()?.get(key)
    }

    /// Sets the value at `key` and returns the one before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let index = self.index(&key);
        let shard = Arc::make_mut(&mut self.shards)[index].get_or_insert_default();
        let before = Arc::make_mut(shard).insert(key, value);
        self.len += usize::from(before.is_none());
        before
    }

    /// Removes the value at `key`.
    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let index = self.index(key);
        if !self.shards[index].as_ref()?.contains_key(key) {
            return None;
        }
        let shard = Arc::make_mut(&mut self.shards)[index].as_mut()?;
        let before = Arc::make_mut(shard).remove(key);
        self.len -= usize::from(before.is_some());
        before
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flatten().flat_map(|shard| shard.iter())
    }

    /// How many entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::Sharded;
    use std::sync::Arc;

    #[test]
    fn a_write_copies_one_shard_and_shares_the_others() {
        let mut map: Sharded<u32, u32> = Sharded::default();
        for key in 0..5_000 {
            map.insert(key, key);
        }
        let copy = map.clone();
        assert!(Arc::ptr_eq(&map.shards, &copy.shards), "a copy alone copies nothing");
        map.insert(7, 8);
        let differ = |(a, b): &(&super::Shard<u32, u32>, &super::Shard<u32, u32>)| match (a, b) {
            (Some(a), Some(b)) => !Arc::ptr_eq(a, b),
            (a, b) => a.is_some() != b.is_some(),
        };
        assert_eq!(map.shards.iter().zip(copy.shards.iter()).filter(differ).count(), 1);
    }

    #[test]
    fn a_copy_does_not_see_later_writes() {
        let mut map: Sharded<u32, u32> = Sharded::default();
        for key in 0..5_000 {
            assert_eq!(map.insert(key, key), None);
        }
        let copy = map.clone();
        assert_eq!(map.insert(7, 8), Some(7));
        assert_eq!(map.remove(&9), Some(9));
        assert_eq!(map.remove(&9), None);
        assert_eq!((copy.get(&7), copy.get(&9), copy.len()), (Some(&7), Some(&9), 5_000));
        assert_eq!((map.get(&7), map.get(&9), map.len()), (Some(&8), None, 4_999));
        assert_eq!(map.iter().count(), 4_999);
    }
}
