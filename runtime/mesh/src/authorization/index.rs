//! Rules by what a connection must have for them to match, so that few of many are looked at.
//!
//! A rule matches only if each of its clauses does. One clause is enough to find the rule by: that in which every
//! match names values that are looked up, of the field that tells most connections apart. Rules without such a clause
//! are looked at always.

use super::{Authorization, Clause, L4Match, L4Peer, L4Rule};
use crate::{Identity, ResourceName, TextMatch};
use ipnet::IpNet;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// Positions of rules, ascending.
type Positions = Vec<u32>;

/// Rules of one action, in the order of their policies.
#[derive(Debug, Default)]
pub(super) struct Index {
    rules: Vec<(Arc<Authorization>, u32)>,
    always: Positions,
    principals: Texts,
    namespaces: Texts,
    accounts: HashMap<Arc<str>, HashMap<Arc<str>, Positions>>,
    sources: Blocks,
    destinations: Blocks,
    ports: HashMap<u16, Positions>,
}

/// Fields by which rules are found, those that tell most connections apart first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Field {
    Principal,
    Account,
    Source,
    Namespace,
    Destination,
    Port,
}

impl Index {
    pub(super) fn new(policies: impl Iterator<Item = Arc<Authorization>>) -> Self {
        let mut index = Self::default();
        for policy in policies {
            for (number, rule) in policy.rules.iter().enumerate() {
                let position = index.rules.len() as u32;
                index.rules.push((Arc::clone(&policy), number as u32));
                index.add(rule, position);
            }
        }
        index
    }

    fn add(&mut self, rule: &L4Rule, position: u32) {
        let found_by = rule.clauses.iter().filter_map(|clause| Some((least(clause)?, clause)));
        let Some((_, clause)) = found_by.min_by_key(|(field, _)| *field) else {
            return self.always.push(position);
        };
        for one in &clause.matches {
            // What can never match needs not be found.
            if let (false, Some(field)) = (one.never, best(one)) {
                self.add_match(one, field, position);
            }
        }
    }

    fn add_match(&mut self, one: &L4Match, field: Field, position: u32) {
        match field {
            Field::Principal => self.principals.add(&one.principals.any, position),
            Field::Namespace => self.namespaces.add(&one.namespaces.any, position),
            Field::Source => self.sources.add(&one.source_ips.any, position),
            Field::Destination => self.destinations.add(&one.destination_ips.any, position),
            Field::Account => {
                for account in &one.service_accounts.any {
                    let names = self.accounts.entry(Arc::clone(&account.namespace)).or_default();
                    put(names.entry(Arc::clone(&account.name)).or_default(), position);
                }
            }
            Field::Port => {
                for port in &one.destination_ports.any {
                    put(self.ports.entry(*port).or_default(), position);
                }
            }
        }
    }

    /// The first rule that matches: its policy, and its number in that.
    pub(super) fn first_match(&self, peer: &L4Peer<'_>) -> Option<(&ResourceName, usize)> {
        let mut first = u32::MAX;
        let mut look = |positions: &Positions| {
            for position in positions {
                if *position >= first {
                    return;
                }
                let rule = self.rules.get(*position as usize);
                let rule = rule.and_then(|(policy, number)| policy.rules.get(*number as usize));
                if rule.is_some_and(|rule| rule.matches(peer)) {
                    first = *position;
                }
            }
        };
        look(&self.always);
        if let Some(identity) = peer.identity {
            self.principals.find(identity.principal(), &mut look);
            let names = self.accounts.get(identity.namespace());
            names.and_then(|names| names.get(identity.service_account())).into_iter().for_each(&mut look);
        }
        self.namespaces.find(peer.identity.map_or("", Identity::namespace), &mut look);
        self.sources.find(peer.source.ip().to_canonical(), &mut look);
        self.destinations.find(peer.destination.ip().to_canonical(), &mut look);
        self.ports.get(&peer.destination.port()).into_iter().for_each(&mut look);
        let (policy, number) = self.rules.get(first as usize)?;
        Some((&policy.name, *number as usize))
    }
}

/// The field that tells fewest connections apart among those by which the clause's matches are found; `None` if one of
/// them cannot be.
fn least(clause: &Clause) -> Option<Field> {
    if clause.matches.is_empty() {
        return None;
    }
    let mut least = Field::Principal;
    for one in clause.matches.iter().filter(|one| !one.never && !one.is_empty()) {
        least = least.max(best(one)?);
    }
    Some(least)
}

/// The field by which a match is found.
fn best(one: &L4Match) -> Option<Field> {
    let texts = |values: &[TextMatch]| !values.is_empty() && values.iter().all(is_telling);
    if texts(&one.principals.any) {
        Some(Field::Principal)
    } else if !one.service_accounts.any.is_empty() {
        Some(Field::Account)
    } else if !one.source_ips.any.is_empty() {
        Some(Field::Source)
    } else if texts(&one.namespaces.any) {
        Some(Field::Namespace)
    } else if !one.destination_ips.any.is_empty() {
        Some(Field::Destination)
    } else {
        (!one.destination_ports.any.is_empty()).then_some(Field::Port)
    }
}

/// Whether a text tells connections apart at all.
fn is_telling(text: &TextMatch) -> bool {
    match text {
        TextMatch::Exact(_) => true,
        TextMatch::Prefix(part) | TextMatch::Suffix(part) => !part.is_empty(),
        TextMatch::Present => false,
    }
}

/// Adds a position; each list is filled in ascending order.
fn put(positions: &mut Positions, position: u32) {
    if positions.last() != Some(&position) {
        positions.push(position);
    }
}

/// Rules by a text, or by its beginning or end.
#[derive(Debug, Default)]
struct Texts {
    exact: HashMap<Arc<str>, Positions>,
    prefixes: HashMap<Arc<str>, Positions>,
    suffixes: HashMap<Arc<str>, Positions>,
    /// Lengths of beginnings and ends that there are.
    prefix_lengths: BTreeSet<usize>,
    suffix_lengths: BTreeSet<usize>,
}

impl Texts {
    fn add(&mut self, texts: &[TextMatch], position: u32) {
        for text in texts {
            let (map, part) = match text {
                TextMatch::Exact(text) => (&mut self.exact, text),
                TextMatch::Prefix(part) => {
                    self.prefix_lengths.insert(part.len());
                    (&mut self.prefixes, part)
                }
                TextMatch::Suffix(part) => {
                    self.suffix_lengths.insert(part.len());
                    (&mut self.suffixes, part)
                }
                TextMatch::Present => continue,
            };
            put(map.entry(Arc::clone(part)).or_default(), position);
        }
    }

    fn find(&self, text: &str, look: &mut impl FnMut(&Positions)) {
        self.exact.get(text).into_iter().for_each(&mut *look);
        let beginnings = self.prefix_lengths.iter().filter_map(|length| text.get(..*length));
        beginnings.filter_map(|part| self.prefixes.get(part)).for_each(&mut *look);
        let ends =
            self.suffix_lengths.iter().filter_map(|length| text.get(text.len().checked_sub(*length)?..));
        ends.filter_map(|part| self.suffixes.get(part)).for_each(&mut *look);
    }
}

/// Rules by a range of addresses.
#[derive(Debug, Default)]
struct Blocks {
    blocks: HashMap<IpNet, Positions>,
    lengths: BTreeSet<u8>,
}

impl Blocks {
    fn add(&mut self, blocks: &[IpNet], position: u32) {
        for block in blocks {
            self.lengths.insert(block.prefix_len());
            put(self.blocks.entry(block.trunc()).or_default(), position);
        }
    }

    fn find(&self, address: IpAddr, look: &mut impl FnMut(&Positions)) {
        let around = self.lengths.iter().filter_map(|length| IpNet::new(address, *length).ok());
        around.filter_map(|block| self.blocks.get(&block.trunc())).for_each(look);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PolicyAction, Scope, ServiceAccount, Values};
    use proptest::prelude::*;

    const TEXTS: [&str; 9] =
        ["*", "td/ns/a/sa/x", "td/ns/b/sa/y", "td/ns/a/*", "*/sa/x", "*sa/y", "t*", "a", "b"];
    const BLOCKS: [&str; 6] = ["10.0.0.1/32", "10.0.0.0/24", "10.0.0.0/8", "0.0.0.0/0", "fd00::/8", "::/0"];

    fn values<T: Clone + std::fmt::Debug + 'static>(of: Vec<T>) -> impl Strategy<Value = Values<T>> {
        let some = proptest::sample::subsequence(of.clone(), 0..3);
        let rarely = prop_oneof![4 => Just(Vec::new()), 1 => proptest::sample::subsequence(of, 1..3)];
        let any = prop_oneof![2 => Just(Vec::new()), 1 => some];
        (any, rarely).prop_map(|(any, none)| Values { any, none })
    }

    fn one_match() -> impl Strategy<Value = L4Match> {
        let texts: Vec<TextMatch> = TEXTS.iter().map(|text| TextMatch::parse(text)).collect();
        let blocks: Vec<IpNet> = BLOCKS.iter().map(|block| block.parse().unwrap()).collect();
        let accounts = [("a", "x"), ("b", "y")]
            .map(|(namespace, name)| ServiceAccount { namespace: namespace.into(), name: name.into() });
        let texts = (values(texts.clone()), values(texts), values(accounts.to_vec()));
        let places = (values(blocks.clone()), values(blocks), values(vec![80, 81]));
        (texts, places, prop::bool::weighted(0.05)).prop_map(|(texts, places, never)| L4Match {
            namespaces: texts.0,
            principals: texts.1,
            service_accounts: texts.2,
            source_ips: places.0,
            destination_ips: places.1,
            destination_ports: places.2,
            never,
        })
    }

    fn rule() -> impl Strategy<Value = L4Rule> {
        let clause = proptest::collection::vec(one_match(), 0..3).prop_map(|matches| Clause { matches });
        proptest::collection::vec(clause, 0..3).prop_map(|clauses| L4Rule { clauses })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        /// What the index finds is what looking at every rule finds.
        #[test]
        fn the_first_rule_that_matches_is_found(
            policies in proptest::collection::vec(proptest::collection::vec(rule(), 0..4), 0..6),
            who in 0..4_usize,
            source in 0..3_usize,
            port in 79..82_u16,
        ) {
            let who = ["", "spiffe://td/ns/a/sa/x", "spiffe://td/ns/b/sa/y", "spiffe://tx/ns/c/sa/z"][who];
            let identity: Option<Identity> = who.parse().ok();
            let source = ["10.0.0.1", "10.1.0.1", "fd00::1"][source].parse::<IpAddr>().unwrap();
            let peer = L4Peer {
                identity: identity.as_ref(),
                source: (source, 4000).into(),
                destination: ([10, 0, 0, 2], port).into(),
            };
            let policies: Vec<_> = policies
                .into_iter()
                .enumerate()
                .map(|(number, rules)| Arc::new(Authorization {
                    name: ResourceName::new("ns", format!("p{number}")),
                    scope: Scope::Namespace,
                    action: PolicyAction::Deny,
                    rules,
                    dry_run: false,
                }))
                .collect();
            let slowly = policies.iter().find_map(|policy| Some((&policy.name, policy.matching_rule(&peer)?)));
            let index = Index::new(policies.iter().cloned());
            prop_assert_eq!(index.first_match(&peer), slowly);
        }
    }
}
