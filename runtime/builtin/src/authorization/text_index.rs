//! Rules by a text that they ask for: exact, by how it begins, or by how it ends.

use super::index::Key;
use std::cmp::Ordering;
use std::collections::HashMap;

/// Positions of rules by text.
#[derive(Debug, Default)]
pub(super) struct TextIndex {
    exact: HashMap<Box<str>, Vec<u32>>,
    prefixes: Affixes,
    /// Read from their end, so that they are prefixes too.
    suffixes: Affixes,
}

/// Prefixes in order, each with the longest other one that it begins with: one search finds all that a text has.
#[derive(Debug, Default)]
struct Affixes {
    sorted: Vec<Affix>,
}

#[derive(Debug)]
struct Affix {
    bytes: Box<[u8]>,
    rules: Vec<u32>,
    /// The longest shorter one that this begins with.
    within: Option<usize>,
}

impl TextIndex {
    /// Files the rule at `position` under `key`. Positions must not fall.
    pub(super) fn insert(&mut self, key: Key<'_>, position: u32) {
        let rules = match key {
            Key::Exact(text) => self.exact.entry(text.into()).or_default(),
            Key::Prefix(text) => self.prefixes.rules_of(text.bytes().collect()),
            Key::Suffix(text) => self.suffixes.rules_of(text.bytes().rev().collect()),
            // No text is in a block of addresses.
            Key::Block(_) => return,
        };
        if rules.last() != Some(&position) {
            rules.push(position);
        }
    }

    /// To be called when everything has been inserted, and before anything is looked up.
    pub(super) fn seal(&mut self) {
        self.prefixes.seal();
        self.suffixes.seal();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.prefixes.sorted.is_empty() && self.suffixes.sorted.is_empty()
    }

    /// Calls `each` with the rules of every key that `text` matches.
    pub(super) fn find(&self, text: &str, each: &mut impl FnMut(&[u32])) {
        if !self.exact.is_empty()
            && let Some(rules) = self.exact.get(text)
        {
            each(rules);
        }
        self.prefixes.find(|| text.bytes(), each);
        self.suffixes.find(|| text.bytes().rev(), each);
    }
}

impl Affixes {
    fn rules_of(&mut self, bytes: Box<[u8]>) -> &mut Vec<u32> {
        let at = match self.sorted.binary_search_by(|affix| affix.bytes.cmp(&bytes)) {
            Ok(at) => at,
            Err(at) => {
                self.sorted.insert(at, Affix { bytes, rules: Vec::new(), within: None });
                at
            }
        };
        &mut self.sorted[at].rules
    }

    fn seal(&mut self) {
        let mut around: Vec<usize> = Vec::new();
        for at in 0..self.sorted.len() {
            while around
                .last()
                .is_some_and(|outer| !self.sorted[at].bytes.starts_with(&self.sorted[*outer].bytes))
            {
                around.pop();
            }
            self.sorted[at].within = around.last().copied();
            around.push(at);
        }
    }

    /// Everything that `text` begins with sorts before it, and what sorts between the two begins with it as well. So
    /// the last one that does not sort after the text has them all around it.
    fn find<B: Iterator<Item = u8>>(&self, text: impl Fn() -> B, each: &mut impl FnMut(&[u32])) {
        let after =
            self.sorted.partition_point(|affix| affix.bytes.iter().copied().cmp(text()) != Ordering::Greater);
        let mut next = after.checked_sub(1);
        while let Some(affix) = next.and_then(|at| self.sorted.get(at)) {
            let mut bytes = text();
            if affix.bytes.iter().all(|byte| bytes.next() == Some(*byte)) {
                each(&affix.rules);
            }
            next = affix.within;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(keys: &[Key<'_>], text: &str) -> Vec<u32> {
        let mut index = TextIndex::default();
        for (key, position) in keys.iter().zip(0..) {
            index.insert(*key, position);
        }
        index.seal();
        let mut found = Vec::new();
        index.find(text, &mut |rules| found.extend(rules));
        found.sort_unstable();
        found
    }

    #[test]
    fn every_key_that_a_text_matches_is_found() {
        use Key::{Exact, Prefix, Suffix};
        let keys = [
            Exact("/a/b"),
            Prefix("/a"),
            Prefix(""),
            Prefix("/a/c"),
            Suffix("b"),
            Suffix("/b"),
            Suffix("a/b"),
            Prefix("/b"),
            Prefix("/a/b/"),
            Prefix("/a/"),
            Suffix(""),
        ];
        for (text, expected) in [
            ("/a/b", &[0, 1, 2, 4, 5, 6, 9, 10][..]),
            ("/a/b/c", &[1, 2, 8, 9, 10]),
            ("/", &[2, 10]),
            ("", &[2, 10]),
            ("/bb", &[2, 4, 7, 10]),
            ("é/b", &[2, 4, 5, 10]),
        ] {
            assert_eq!(found(&keys, text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn the_index_finds_what_trying_finds(
            keys in prop::collection::vec((0..3, "[ab]{0,4}"), 0..30),
            text in "[abc]{0,6}",
        ) {
            let keys: Vec<Key<'_>> = keys.iter().map(|(kind, key)| match kind {
                0 => Key::Exact(key),
                1 => Key::Prefix(key),
                _ => Key::Suffix(key),
            }).collect();
            let tried: Vec<u32> = keys.iter().zip(0..).filter(|(key, _)| match key {
                Key::Exact(key) => *key == text,
                Key::Prefix(key) => text.starts_with(key),
                Key::Suffix(key) => text.ends_with(key),
                Key::Block(_) => false,
            }).map(|(_, position)| position).collect();
            prop_assert_eq!(found(&keys, &text), tried);
        }
    }
}
