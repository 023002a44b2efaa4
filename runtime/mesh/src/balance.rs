//! Picking an endpoint of a service: in constant time and without allocating, whatever the service prefers.

mod tiers;
mod wheel;

pub(crate) use tiers::Tiers;
pub(crate) use wheel::Wheel;

use crate::{Endpoint, LoadBalancingMode, ServiceState, Workload};
use std::net::IpAddr;

/// Who chooses among endpoints: chance, and what this process knows that the mesh does not. It is passed in, so that
/// decisions stay pure; a closure is one that knows nothing and draws uniform numbers.
pub trait Chooser {
    /// A uniform number below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64;

    /// How busy a workload is, in a unit of the chooser's: of two drawn, the less busy for its capacity is taken.
    /// `None`: chance alone decides.
    fn load(&self, _workload: &Workload) -> Option<u64> {
        None
    }

    /// Whether a port of a workload is not to be picked: it has just failed the connection that is asked for.
    fn is_tried(&self, _workload: &Workload, _port: u16) -> bool {
        false
    }

    /// What DNS says of a name: `None` if it has not been asked, nothing if it knows none.
    fn addresses(&self, _hostname: &str) -> Option<&[IpAddr]> {
        None
    }
}

impl<F: FnMut(u64) -> u64> Chooser for F {
    fn below(&mut self, bound: u64) -> u64 {
        self(bound)
    }
}

/// How many random draws may hit an endpoint that cannot be used before all are scanned.
const DRAWS: usize = 4;

/// What an endpoint must have to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The port, and an address.
    Address,
    /// The port, and any way to it: an address, a name, or a gateway from another network.
    Service,
    /// As `Service`, but of a waypoint: one that takes all tunnels on one port needs no other.
    Waypoint,
}

/// Picks an endpoint of `state` that serves `port`, weighted by capacity, preferring what the service prefers from
/// the viewpoint of `source`. Returns it with its target port, or `None` when there is none.
pub fn pick<'a>(
    state: &'a ServiceState,
    port: u16,
    source: Option<&Workload>,
    chooser: &mut dyn Chooser,
) -> Option<(&'a Endpoint, u16)> {
    Asked { state, port, source, purpose: Purpose::Address }.pick(chooser)
}

/// The endpoints of `state` that [`pick`] picks from.
pub fn candidates<'a>(
    state: &'a ServiceState,
    port: u16,
    source: Option<&Workload>,
) -> Vec<(&'a Endpoint, u16)> {
    let asked = Asked { state, port, source, purpose: Purpose::Address };
    let nobody = |_: u64| 0_u64;
    let usable = |wheel: &Wheel| -> Vec<_> {
        wheel.members().filter_map(|index| asked.usable(index, &nobody)).collect()
    };
    asked.wheels().map(usable).find(|found| !found.is_empty()).unwrap_or_default()
}

/// What is asked of a service.
pub(crate) struct Asked<'a, 's> {
    pub(crate) state: &'a ServiceState,
    pub(crate) port: u16,
    pub(crate) source: Option<&'s Workload>,
    pub(crate) purpose: Purpose,
}

impl<'a> Asked<'a, '_> {
    pub(crate) fn pick(&self, chooser: &mut dyn Chooser) -> Option<(&'a Endpoint, u16)> {
        self.wheels().find_map(|wheel| self.draw(wheel, chooser))
    }

    /// Groups of endpoints, the preferred first; a later one counts only if no earlier one can be used.
    fn wheels(&self) -> impl Iterator<Item = &'a Wheel> {
        let state = self.state;
        let tiers = state.tiers.as_ref().zip(self.source);
        let strict = state.service.load_balancing.mode == LoadBalancingMode::Strict;
        let any = (tiers.is_none() || !strict).then_some(&state.wheel);
        let preferred = tiers.map(|(tiers, source)| tiers.nearest(source, &state.endpoints, strict));
        preferred.into_iter().flatten().chain(any)
    }

    fn draw(&self, wheel: &Wheel, chooser: &mut dyn Chooser) -> Option<(&'a Endpoint, u16)> {
        let mut drawn = None;
        for _ in 0..DRAWS {
            drawn = self.usable(wheel.draw(chooser)?, chooser);
            if drawn.is_some() {
                break;
            }
        }
        let one = match drawn {
            Some(one) => one,
            None => self.scan(wheel, chooser)?,
        };
        let Some(load) = chooser.load(&one.0.workload) else { return Some(one) };
        let other = wheel.draw(chooser).and_then(|index| self.usable(index, chooser));
        let Some(other) = other else { return Some(one) };
        let other_load = chooser.load(&other.0.workload).unwrap_or(0);
        let weighed = |load: u64, against: &Endpoint| load.saturating_mul(against.workload.capacity.into());
        let less = weighed(other_load, one.0) < weighed(load, other.0);
        Some(if less { other } else { one })
    }

    /// Few endpoints can be used: looks at all of them, twice, and draws among those.
    fn scan(&self, wheel: &Wheel, chooser: &mut dyn Chooser) -> Option<(&'a Endpoint, u16)> {
        let capacity = |found: &(&Endpoint, u16)| u64::from(found.0.workload.capacity);
        let usable = |chooser: &dyn Chooser, index| self.usable(index, chooser);
        let total: u64 =
            wheel.members().filter_map(|index| usable(chooser, index)).map(|one| capacity(&one)).sum();
        let mut at = if total == 0 { return None } else { chooser.below(total) };
        wheel.members().filter_map(|index| usable(chooser, index)).find(|found| {
            let here = at < capacity(found);
            at = at.saturating_sub(capacity(found));
            here
        })
    }

    /// An endpoint with the port to use, if it can be used.
    fn usable(&self, index: u32, chooser: &dyn Chooser) -> Option<(&'a Endpoint, u16)> {
        let endpoint = self.state.endpoints.get(index as usize)?;
        let workload = &endpoint.workload;
        if workload.addresses.is_empty() && !self.is_reachable_otherwise(workload, chooser) {
            return None;
        }
        let mapped = endpoint.target_port(&self.state.service, self.port);
        let target = match (self.purpose, &workload.application_tunnel) {
            (Purpose::Waypoint, Some(tunnel)) => mapped.or(tunnel.port.map(|_| self.port)),
            (Purpose::Waypoint, None) => mapped.filter(|_| self.state.service.port(self.port).is_some()),
            (Purpose::Address | Purpose::Service, _) => mapped,
        }?;
        (!chooser.is_tried(workload, target)).then_some((endpoint, target))
    }

    /// Whether there is a way to a workload without addresses. The gateway of its network is none from within that.
    fn is_reachable_otherwise(&self, workload: &Workload, chooser: &dyn Chooser) -> bool {
        if self.purpose == Purpose::Address {
            return false;
        }
        let is_elsewhere = self.source.is_some_and(|source| source.network != workload.network);
        if is_elsewhere && workload.network_gateway.is_some() {
            return true;
        }
        let is_named = !workload.hostname.is_empty();
        is_named && chooser.addresses(&workload.hostname).is_none_or(|found| !found.is_empty())
    }
}

#[cfg(test)]
#[path = "balance/tests.rs"]
mod tests;
