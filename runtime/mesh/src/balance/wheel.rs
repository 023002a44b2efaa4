//! Drawing by weight in constant time (Vose's alias method, in whole numbers so that shares are exact).

use super::Chooser;

/// Endpoints to draw from, by index, each as likely as its capacity says. Those of capacity 0 are not on it.
#[derive(Debug, Default)]
pub(crate) struct Wheel {
    members: Box<[u32]>,
    /// One for each member; none when all are equally likely.
    slots: Box<[Slot]>,
    /// The sum of all capacities.
    total: u64,
}

/// A member's slot: below `cut` of `total` it is that member's, above it another's.
#[derive(Clone, Copy, Debug)]
struct Slot {
    cut: u64,
    other: u32,
}

impl Wheel {
    /// A wheel of the members whose capacity is not 0.
    pub(crate) fn new(members: impl IntoIterator<Item = u32>, capacity: impl Fn(u32) -> u32) -> Self {
        let members: Box<[u32]> = members.into_iter().filter(|index| capacity(*index) > 0).collect();
        let Some(first) = members.first().map(|index| capacity(*index)) else { return Self::default() };
        let weights = || members.iter().map(|index| u64::from(capacity(*index)));
        // At most 2^32 members of at most 2^32 each: their sum could wrap only if all were the largest.
        let total = weights().fold(0, u64::saturating_add);
        if weights().all(|weight| weight == u64::from(first)) {
            return Self { members, slots: Box::default(), total };
        }
        let slots = slots(weights().collect(), total);
        Self { members, slots, total }
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = u32> {
        self.members.iter().copied()
    }

    /// A member, with the likelihood of its capacity.
    pub(crate) fn draw(&self, chooser: &mut dyn Chooser) -> Option<u32> {
        let count = self.members.len() as u64;
        if count == 0 {
            return None;
        }
        let at = usize::try_from(chooser.below(count)).ok()?;
        let at = match self.slots.get(at) {
            Some(slot) if chooser.below(self.total) >= slot.cut => slot.other as usize,
            _ => at,
        };
        self.members.get(at).copied()
    }
}

/// Fills what is missing in the slots of small weights with what large ones have too much. Each slot has room for
/// `total`, and weights are counted `count` times.
fn slots(weights: Vec<u64>, total: u64) -> Box<[Slot]> {
    let count = weights.len() as u64;
    let mut scaled: Vec<u128> =
        weights.iter().map(|weight| u128::from(*weight) * u128::from(count)).collect();
    let room = u128::from(total);
    let (mut small, mut large): (Vec<usize>, Vec<usize>) =
        (0..scaled.len()).partition(|index| scaled.get(*index).is_some_and(|weight| *weight < room));
    let mut slots: Vec<Slot> = (0..weights.len()).map(|_| Slot { cut: total, other: 0 }).collect();
    while let (Some(&one), Some(&from)) = (small.last(), large.last()) {
        small.pop();
        let (Some(&weight), Some(slot)) = (scaled.get(one), slots.get_mut(one)) else { break };
        *slot = Slot { cut: u64::try_from(weight).unwrap_or(total), other: from as u32 };
        let Some(left) = scaled.get_mut(from) else { break };
        *left -= room - weight;
        if *left < room {
            large.pop();
            small.push(from);
        }
    }
    slots.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How much of all that can be drawn falls to each member: `count × total` equally likely draws.
    fn shares(wheel: &Wheel) -> Vec<u64> {
        let mut shares = vec![0; 64];
        let total = if wheel.slots.is_empty() { 1 } else { wheel.total };
        for at in 0..wheel.members.len() as u64 {
            for point in 0..total {
                let mut draws = [at, point].into_iter();
                let member = wheel.draw(&mut |_| draws.next().unwrap()).unwrap();
                shares[member as usize] += 1;
            }
        }
        shares
    }

    proptest! {
        #[test]
        fn each_is_as_likely_as_its_capacity(capacities in proptest::collection::vec(0_u32..12, 0..24)) {
            let wheel = Wheel::new(0..capacities.len() as u32, |index| capacities[index as usize]);
            let shares = shares(&wheel);
            let all: u64 = shares.iter().sum();
            let weights: u64 = capacities.iter().map(|weight| u64::from(*weight)).sum();
            for (index, weight) in capacities.iter().enumerate() {
                prop_assert_eq!(shares[index] * weights, all * u64::from(*weight), "{}", index);
            }
        }
    }

    #[test]
    fn the_largest_capacities_do_not_overflow() {
        let wheel = Wheel::new(0..3, |index| if index == 1 { u32::MAX - 1 } else { u32::MAX });
        assert!((0..3).all(|at| wheel.draw(&mut |bound: u64| at.min(bound - 1)).is_some()));
        assert_eq!(Wheel::new(0..3, |_| 0).draw(&mut |_| 0), None);
    }
}
