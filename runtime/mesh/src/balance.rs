//! Picking an endpoint of a service.

use crate::{Endpoint, LoadBalancingMode, RoutingScope, ServiceState, Workload};

/// A source of randomness, passed in so that decisions stay pure.
pub trait Random {
    /// A uniform number below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64;
}

impl<F: FnMut(u64) -> u64> Random for F {
    fn below(&mut self, bound: u64) -> u64 {
        self(bound)
    }
}

/// How many random draws may hit an endpoint that does not serve the port before all are scanned.
const DRAWS: usize = 4;

/// Picks an endpoint of `state` that serves `port`, weighted by capacity, preferring what the service prefers from
/// the viewpoint of `source`. Returns it with its target port, or `None` when there is none.
pub fn pick<'a>(
    state: &'a ServiceState,
    port: u16,
    source: Option<&Workload>,
    random: &mut dyn Random,
) -> Option<(&'a Endpoint, u16)> {
    let serves = |endpoint: &'a Endpoint| serving(state, endpoint, port);
    let Some(source) = source.filter(|_| prefers(state)) else {
        return pick_any(state, serves, random);
    };
    let candidates = nearest(state, source, serves);
    let total: u64 = candidates.iter().map(|(endpoint, _)| u64::from(endpoint.workload.capacity)).sum();
    let mut at = random.below(total.max(1));
    candidates.into_iter().find(|(endpoint, _)| {
        let capacity = u64::from(endpoint.workload.capacity);
        let here = at < capacity;
        at = at.saturating_sub(capacity);
        here
    })
}

/// The endpoints of `state` that [`pick`] picks from.
pub fn candidates<'a>(
    state: &'a ServiceState,
    port: u16,
    source: Option<&Workload>,
) -> Vec<(&'a Endpoint, u16)> {
    let serves = |endpoint: &'a Endpoint| serving(state, endpoint, port);
    let mut all = match source.filter(|_| prefers(state)) {
        Some(source) => nearest(state, source, serves),
        None => state.endpoints.iter().filter_map(serves).collect(),
    };
    all.retain(|(endpoint, _)| endpoint.workload.capacity > 0);
    all
}

/// Whether some endpoints are preferred to others.
fn prefers(state: &ServiceState) -> bool {
    state.service.load_balancing.mode != LoadBalancingMode::Standard
}

/// An endpoint with its target port, if it can be reached and serves `port`.
fn serving<'a>(state: &ServiceState, endpoint: &'a Endpoint, port: u16) -> Option<(&'a Endpoint, u16)> {
    let target = endpoint.target_port(&state.service, port)?;
    (!endpoint.workload.addresses.is_empty()).then_some((endpoint, target))
}

/// The endpoints that match most of what the service prefers, from the viewpoint of `source`.
fn nearest<'a>(
    state: &'a ServiceState,
    source: &Workload,
    serves: impl Fn(&'a Endpoint) -> Option<(&'a Endpoint, u16)>,
) -> Vec<(&'a Endpoint, u16)> {
    let scopes = &state.service.load_balancing.scopes;
    let strict = state.service.load_balancing.mode == LoadBalancingMode::Strict;
    let mut best = if strict { scopes.len() } else { 0 };
    let mut candidates = Vec::new();
    for found in state.endpoints.iter().filter_map(serves) {
        let rank = scopes.iter().take_while(|scope| same(**scope, source, &found.0.workload)).count();
        if rank > best {
            best = rank;
            candidates.clear();
        }
        if rank == best {
            candidates.push(found);
        }
    }
    candidates
}

fn pick_any<'a>(
    state: &'a ServiceState,
    serves: impl Fn(&'a Endpoint) -> Option<(&'a Endpoint, u16)>,
    random: &mut dyn Random,
) -> Option<(&'a Endpoint, u16)> {
    let count = state.endpoints.len();
    if count == 0 {
        return None;
    }
    let mut at = 0;
    for _ in 0..DRAWS {
        at = match state.weights.last() {
            None => random.below(count as u64) as usize,
            Some(0) => return None,
            Some(total) => {
                let point = random.below(*total);
                state.weights.partition_point(|sum| *sum <= point)
            }
        };
        if let Some(found) = state.endpoints.get(at).and_then(&serves) {
            return Some(found);
        }
    }
    // Few endpoints serve this port: take the next one that does.
    let usable = |endpoint: &&Endpoint| endpoint.workload.capacity > 0;
    let (before, after) = state.endpoints.split_at(at.min(count));
    after.iter().chain(before).filter(usable).find_map(serves)
}

fn same(scope: RoutingScope, source: &Workload, target: &Workload) -> bool {
    match scope {
        RoutingScope::Region => source.locality.region == target.locality.region,
        RoutingScope::Zone => source.locality.zone == target.locality.zone,
        RoutingScope::Subzone => source.locality.subzone == target.locality.subzone,
        RoutingScope::Node => source.node == target.node,
        RoutingScope::Cluster => source.cluster_id == target.cluster_id,
        RoutingScope::Network => source.network == target.network,
    }
}

#[cfg(test)]
#[path = "balance/tests.rs"]
mod tests;
