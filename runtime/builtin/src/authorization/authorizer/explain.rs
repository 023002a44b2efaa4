//! Every rule that a request is held against, and what it fails on.

use super::{Authorizer, Ruleset, Standing};
use crate::authorization::request::{Asked, Known};
use cairn_filter::{Considered, RequestHead};

/// The most rules that are told of.
const CONSIDERED_MAX: usize = 256;

impl Authorizer {
    /// The rules in the order in which they are asked, DENY first, each with what it says to a request.
    pub fn consider<'a>(
        &self,
        standing: &'a Standing,
        head: &'a RequestHead,
        known: impl Into<Known<'a>>,
    ) -> Vec<Considered> {
        let asked = &Asked { facts: &standing.facts, head, known: known.into() };
        let sets = [
            ("DENY", &self.deny),
            ("ALLOW", &self.allow),
            ("AUDIT", &self.audit),
            ("dry run: DENY", &self.dry_deny),
            ("dry run: ALLOW", &self.dry_allow),
        ];
        let all = sets.into_iter().flat_map(|(action, set)| set.consider(action, asked));
        all.take(CONSIDERED_MAX).collect()
    }
}

impl Ruleset {
    fn consider(&self, action: &str, asked: &Asked<'_>) -> Vec<Considered> {
        if self.rules.is_empty() {
            let empty = |name| Considered {
                what: format!("{action} {name}"),
                matched: false,
                because: "it has no rule".to_owned(),
            };
            return self.policies.iter().map(empty).collect();
        }
        let rules = self.rules.iter().zip(0..).take(CONSIDERED_MAX);
        rules
            .map(|(rule, position)| {
                let open = rule.open(position, asked.facts);
                let matched = open.is_some_and(|open| rule.matches(&open, asked));
                let miss = if matched { None } else { rule.first_miss(asked) };
                Considered {
                    what: format!("{action} {} rule {}", rule.policy, rule.index),
                    matched,
                    because: miss.map_or_else(String::new, |miss| format!("{}: {}", miss.field, miss.text)),
                }
            })
            .collect()
    }
}
