//! Endpoints grouped by what a service prefers, so that those nearest to any source are found without looking at each.

use super::Wheel;
use crate::{Endpoint, RoutingScope, Workload};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Kinds of scopes there are.
const SCOPES: usize = 6;

/// Groups of endpoints that are alike in the first scopes of a list, for every length of that beginning.
///
/// A source is matched by as many leading scopes as it is alike in. Where the network is the first scope, endpoints of
/// other networks are ranked among each other by the scopes that remain, and below all of the source's own network
/// (facts: ztunnel's `load_balance`).
#[derive(Debug)]
pub(crate) struct Tiers {
    /// What is preferred, most important first, each once.
    scopes: Vec<RoutingScope>,
    /// Without the network, if that is the first scope; else empty.
    without_network: Vec<RoutingScope>,
    /// By the hash of a beginning's values. What only shares a hash is told apart by its example.
    groups: HashMap<u64, Vec<Group>>,
}

#[derive(Debug)]
struct Group {
    /// Which list, and how long its beginning.
    list: List,
    length: usize,
    /// The index of an endpoint in it.
    example: u32,
    wheel: Wheel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum List {
    All,
    WithoutNetwork,
}

impl Tiers {
    /// `None` when nothing is preferred.
    pub(crate) fn new(preferred: &[RoutingScope], endpoints: &[Endpoint]) -> Option<Self> {
        let mut scopes = Vec::new();
        for scope in preferred {
            if !scopes.contains(scope) {
                scopes.push(*scope);
            }
        }
        let is_network = |scope: &RoutingScope| *scope == RoutingScope::Network;
        let without_network = match scopes.first() {
            None => return None,
            Some(first) if is_network(first) => scopes.iter().skip(1).copied().collect(),
            Some(_) => Vec::new(),
        };
        let mut tiers = Self { scopes, without_network, groups: HashMap::new() };
        for list in [List::All, List::WithoutNetwork] {
            tiers.group(list, endpoints);
        }
        Some(tiers)
    }

    fn scopes(&self, list: List) -> &[RoutingScope] {
        match list {
            List::All => &self.scopes,
            List::WithoutNetwork => &self.without_network,
        }
    }

    fn group(&mut self, list: List, endpoints: &[Endpoint]) {
        let scopes = self.scopes(list).to_vec();
        let mut members: HashMap<u64, Vec<(usize, Vec<u32>)>> = HashMap::new();
        for (index, endpoint) in endpoints.iter().enumerate() {
            let hashes = hashes(list, &scopes, &endpoint.workload);
            for (length, hash) in (1..=scopes.len()).zip(hashes) {
                let alike =
                    |example: &u32| is_alike(&scopes, length, &endpoint.workload, *example, endpoints);
                let known = members.entry(hash).or_default();
                let mut same = known.iter_mut().filter(|(other, _)| *other == length);
                match same.find(|(_, members)| members.first().is_some_and(alike)) {
                    Some((_, members)) => members.push(index as u32),
                    None => known.push((length, vec![index as u32])),
                }
            }
        }
        let capacity = |index: u32| endpoints.get(index as usize).map_or(0, |one| one.workload.capacity);
        for (hash, groups) in members {
            for (length, members) in groups {
                let Some(&example) = members.first() else { continue };
                let wheel = Wheel::new(members, capacity);
                self.groups.entry(hash).or_default().push(Group { list, length, example, wheel });
            }
        }
    }

    /// The groups that `source` is alike to, the one most alike first; with `strict`, only the one that is alike in
    /// everything.
    pub(crate) fn nearest<'a, 's>(
        &'a self,
        source: &'s Workload,
        endpoints: &'a [Endpoint],
        strict: bool,
    ) -> impl Iterator<Item = &'a Wheel> + use<'a, 's> {
        let of = |list| Nearest {
            tiers: self,
            list,
            endpoints,
            hashes: hashes(list, self.scopes(list), source),
            source,
            length: self.scopes(list).len(),
        };
        let other_networks = (!strict).then(|| of(List::WithoutNetwork));
        let all = of(List::All).take(if strict { 1 } else { usize::MAX });
        all.chain(other_networks.into_iter().flatten()).flatten()
    }
}

/// Walks from the longest beginning to the shortest of one scope.
struct Nearest<'a, 's> {
    tiers: &'a Tiers,
    list: List,
    endpoints: &'a [Endpoint],
    hashes: [u64; SCOPES],
    source: &'s Workload,
    length: usize,
}

impl<'a> Iterator for Nearest<'a, '_> {
    /// The group, if there is one.
    type Item = Option<&'a Wheel>;

    fn next(&mut self) -> Option<Self::Item> {
        let length = self.length.checked_sub(1)?;
        let hash = *self.hashes.get(length)?;
        let groups = self.tiers.groups.get(&hash);
        let found = groups.into_iter().flatten().find(|group| {
            let scopes = self.tiers.scopes(self.list);
            group.list == self.list
                && group.length == self.length
                && is_alike(scopes, group.length, self.source, group.example, self.endpoints)
        });
        self.length = length;
        Some(found.map(|group| &group.wheel))
    }
}

/// The hash of each beginning: of one scope, of two …
fn hashes(list: List, scopes: &[RoutingScope], workload: &Workload) -> [u64; SCOPES] {
    let mut hashes = [0; SCOPES];
    let mut before = 0_u64;
    for (place, scope) in hashes.iter_mut().zip(scopes) {
        let mut hasher = DefaultHasher::new();
        (list, before, value(*scope, workload)).hash(&mut hasher);
        before = hasher.finish();
        *place = before;
    }
    hashes
}

fn is_alike(
    scopes: &[RoutingScope],
    length: usize,
    workload: &Workload,
    example: u32,
    endpoints: &[Endpoint],
) -> bool {
    let Some(example) = endpoints.get(example as usize) else { return false };
    scopes.iter().take(length).all(|scope| value(*scope, workload) == value(*scope, &example.workload))
}

fn value(scope: RoutingScope, of: &Workload) -> &str {
    match scope {
        RoutingScope::Region => &of.locality.region,
        RoutingScope::Zone => &of.locality.zone,
        RoutingScope::Subzone => &of.locality.subzone,
        RoutingScope::Node => &of.node,
        RoutingScope::Cluster => &of.cluster_id,
        RoutingScope::Network => &of.network,
    }
}
