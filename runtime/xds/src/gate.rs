//! Decides when what has arrived becomes one snapshot.
//!
//! Delta ADS brings each type alone. Our own server stamps one generation on what belongs together; changes wait
//! until every type has reached it, at most [`GENERATION_WAIT`]. Another server's changes do not wait, once every
//! type has been heard of. Within what is published together, policies come first and their removal last.

use cairn_mesh::{Authorization, Change, ResourceName};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long changes wait for the other types of their generation.
pub(crate) const GENERATION_WAIT: Duration = Duration::from_millis(500);

/// Changes that have arrived and are not published yet.
pub(crate) struct Gate {
    types: Vec<Arrived>,
    /// The last word on each policy: there, or gone.
    policies: BTreeMap<ResourceName, Option<Authorization>>,
    others: Vec<Change>,
    deadline: Option<Instant>,
}

#[derive(Clone, Default)]
struct Arrived {
    /// Something of this type has ever arrived.
    ever: bool,
    /// The generation it has reached on this connection.
    generation: Option<u64>,
}

/// Whether to publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Publish {
    /// Not yet.
    Wait,
    /// Now, and it is whole.
    Whole,
    /// Now, though other types have not reached the generation.
    Overdue,
}

impl Gate {
    /// A gate for so many types.
    pub(crate) fn new(type_count: usize) -> Self {
        Self {
            types: vec![Arrived::default(); type_count],
            policies: BTreeMap::new(),
            others: Vec::new(),
            deadline: None,
        }
    }

    /// Nothing need be heard of the type at `index` before anything is published.
    pub(crate) fn expect_nothing_of(&mut self, index: usize) {
        if let Some(arrived) = self.types.get_mut(index) {
            arrived.ever = true;
        }
    }

    /// A new connection: generations of the previous one mean nothing on it.
    pub(crate) fn reconnected(&mut self) {
        for arrived in &mut self.types {
            arrived.generation = None;
        }
    }

    /// Whether every type has been heard of.
    pub(crate) fn is_complete(&self) -> bool {
        self.types.iter().all(|arrived| arrived.ever)
    }

    /// When to call [`Self::overdue`].
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Takes what a response for the type at `index` brought.
    pub(crate) fn add(
        &mut self,
        index: usize,
        generation: Option<u64>,
        changes: Vec<Change>,
        now: Instant,
    ) -> Publish {
        if let Some(arrived) = self.types.get_mut(index) {
            *arrived = Arrived { ever: true, generation };
        }
        for change in changes {
            match change {
                Change::Authorization(policy) => {
                    drop(self.policies.insert(policy.name.clone(), Some(policy)))
                }
                Change::AuthorizationRemoved(name) => drop(self.policies.insert(name, None)),
                other => self.others.push(other),
            }
        }
        if !self.is_complete() {
            return Publish::Wait;
        }
        if generation.is_none() || self.types.iter().all(|arrived| arrived.generation == generation) {
            return Publish::Whole;
        }
        let deadline = *self.deadline.get_or_insert(now + GENERATION_WAIT);
        if now >= deadline { Publish::Overdue } else { Publish::Wait }
    }

    /// Whether the other types of the generation have been waited for long enough.
    pub(crate) fn overdue(&self, now: Instant) -> Publish {
        match self.deadline {
            Some(deadline) if now >= deadline => Publish::Overdue,
            _ => Publish::Wait,
        }
    }

    /// Takes everything out, in the order to apply it.
    pub(crate) fn take(&mut self) -> Vec<Change> {
        self.deadline = None;
        let mut changes = Vec::with_capacity(self.policies.len() + self.others.len());
        let mut removals = Vec::new();
        for (name, policy) in std::mem::take(&mut self.policies) {
            match policy {
                Some(policy) => changes.push(Change::Authorization(policy)),
                None => removals.push(Change::AuthorizationRemoved(name)),
            }
        }
        changes.append(&mut self.others);
        changes.append(&mut removals);
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::{PolicyAction, Scope};

    fn policy(name: &str) -> Change {
        Change::Authorization(Authorization {
            name: ResourceName::new("ns", name),
            scope: Scope::Namespace,
            action: PolicyAction::Allow,
            rules: Vec::new(),
            dry_run: false,
        })
    }

    fn policy_gone(name: &str) -> Change {
        Change::AuthorizationRemoved(ResourceName::new("ns", name))
    }

    fn workload_gone(uid: &str) -> Change {
        Change::WorkloadRemoved(uid.into())
    }

    #[test]
    fn changes_wait_for_all_types_of_their_generation() {
        use Publish::{Overdue, Wait, Whole};
        let start = Instant::now();
        for (name, steps) in [
            ("both reach it", &[(0, Some(1), 0, Wait), (1, Some(1), 0, Whole)][..]),
            (
                "unstamped waits for the first of each only",
                &[(0, None, 0, Wait), (1, None, 0, Whole), (0, None, 0, Whole)],
            ),
            (
                "the second generation waits again",
                &[
                    (0, Some(1), 0, Wait),
                    (1, Some(1), 0, Whole),
                    (0, Some(2), 0, Wait),
                    (1, Some(2), 0, Whole),
                ],
            ),
            (
                "a type that lags is waited for 500 ms",
                &[
                    (0, Some(1), 0, Wait),
                    (1, Some(1), 0, Whole),
                    (0, Some(2), 0, Wait),
                    (0, Some(3), 500, Overdue),
                ],
            ),
            ("the first state waits without end", &[(0, Some(1), 0, Wait), (0, Some(2), 9_000, Wait)]),
        ] {
            let mut gate = Gate::new(2);
            for (step, (index, generation, at, expected)) in steps.iter().enumerate() {
                let now = start + Duration::from_millis(*at);
                let publish = gate.add(*index, *generation, vec![workload_gone("u")], now);
                assert_eq!(publish, *expected, "{name}, step {step}");
                if publish != Wait {
                    gate.take();
                    assert_eq!(gate.deadline(), None, "{name}, step {step}");
                }
            }
        }
    }

    #[test]
    fn generations_start_over_with_a_connection() {
        let now = Instant::now();
        let mut gate = Gate::new(2);
        gate.add(0, Some(7), Vec::new(), now);
        assert_eq!(gate.add(1, Some(7), Vec::new(), now), Publish::Whole);
        gate.reconnected();
        assert_eq!(
            gate.add(0, Some(7), Vec::new(), now),
            Publish::Wait,
            "the other type may have changed meanwhile"
        );
        assert_eq!(gate.overdue(now), Publish::Wait);
        assert_eq!(gate.overdue(now + GENERATION_WAIT), Publish::Overdue);
    }

    #[test]
    fn policies_come_first_and_their_removal_last() {
        let mut gate = Gate::new(1);
        let changes = vec![policy_gone("a"), workload_gone("u"), policy("b"), policy_gone("c"), policy("c")];
        gate.add(0, None, changes, Instant::now());
        let order: Vec<String> = gate
            .take()
            .iter()
            .map(|change| match change {
                Change::Authorization(policy) => format!("+{}", policy.name),
                Change::AuthorizationRemoved(name) => format!("-{name}"),
                Change::WorkloadRemoved(uid) => uid.to_string(),
                other => panic!("unexpected {other:?}"),
            })
            .collect();
        assert_eq!(order, ["+ns/b", "+ns/c", "u", "-ns/a"], "a policy that comes back is not removed");
        assert!(gate.take().is_empty());
    }
}
