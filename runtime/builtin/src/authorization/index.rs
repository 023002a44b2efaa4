//! Finds the rules that a path can reach, so that a thousand rules on paths cost what a few do.

use super::request::{OfRequest, Path};
use super::rule::Rule;
use cairn_mesh::{TextMatch, Values};
use std::collections::{BTreeSet, HashMap};

/// Rules by the paths they ask for.
#[derive(Debug, Default)]
pub(super) struct PathIndex {
    exact: HashMap<String, Vec<u32>>,
    prefixes: HashMap<String, Vec<u32>>,
    /// The lengths of the prefixes there are.
    lengths: Vec<usize>,
    /// Rules that any path may match.
    others: Vec<u32>,
}

enum Key<'a> {
    Exact(&'a str),
    Prefix(&'a str),
}

impl PathIndex {
    /// Indexes `rules` by their position.
    pub(super) fn new(rules: &[Rule]) -> Self {
        let mut index = Self::default();
        let mut lengths = BTreeSet::new();
        for (rule, position) in rules.iter().zip(0..) {
            let Some(keys) = keys(rule) else {
                index.others.push(position);
                continue;
            };
            for key in keys {
                let (map, text) = match key {
                    Key::Exact(text) => (&mut index.exact, text),
                    Key::Prefix(text) => {
                        lengths.insert(text.len());
                        (&mut index.prefixes, text)
                    }
                };
                let positions = map.entry(text.to_owned()).or_default();
                if positions.last() != Some(&position) {
                    positions.push(position);
                }
            }
        }
        index.lengths = lengths.into_iter().collect();
        index
    }

    /// The positions of all rules whose paths may match `path`, each at least once.
    pub(super) fn candidates<'a>(&'a self, path: &'a str) -> impl Iterator<Item = u32> + 'a {
        // A length may fall inside a character.
        let prefixes = self.lengths.iter().filter_map(|length| path.get(..*length));
        let of_prefixes = prefixes.filter_map(|prefix| self.prefixes.get(prefix));
        self.exact.get(path).into_iter().chain(of_prefixes).flatten().chain(&self.others).copied()
    }
}

/// The texts one of which a path must equal or begin with to match `rule`; `None` when other paths may match too.
fn keys(rule: &Rule) -> Option<Vec<Key<'_>>> {
    if rule.to.is_empty() {
        return None;
    }
    let mut keys = Vec::new();
    for operation in &rule.to {
        let paths = operation.request.iter().find_map(|check| match check {
            OfRequest::Path(Values { any, .. }) if !any.is_empty() => Some(any),
            _ => None,
        })?;
        for path in paths {
            keys.push(match path {
                Path::Text(TextMatch::Exact(text)) => Key::Exact(text),
                Path::Text(TextMatch::Prefix(text)) => Key::Prefix(text),
                Path::Template(template) => Key::Prefix(template.as_str().split('{').next()?),
                Path::Text(TextMatch::Suffix(_) | TextMatch::Present) => return None,
            });
        }
    }
    Some(keys)
}
