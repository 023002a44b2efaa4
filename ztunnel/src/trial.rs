//! What policies on trial (dry run) would do with connections: counted by policy, and now and then said in the log.

use cairn_mesh::{L4Peer, ResourceName, Snapshot, Trial, Workload, on_trial};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// A policy is named in the log at most this often.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// The most policies that are told apart: those on trial are few.
const POLICIES_MAX: usize = 1024;

/// The policies on trial that were asked.
#[derive(Default)]
pub struct Trials(Mutex<BTreeMap<(ResourceName, &'static str), Count>>);

#[derive(Default)]
struct Count {
    connections: u64,
    said: Option<Instant>,
}

impl Trials {
    /// Notes what the policies on trial of `workload` would do with a connection that is decided now.
    pub fn note(&self, snapshot: &Snapshot, workload: &Workload, peer: &L4Peer<'_>, now: Instant) {
        for trial in on_trial(snapshot, workload, peer) {
            if self.count(&trial, now) {
                tracing::info!(
                    source = %peer.source,
                    identity = peer.identity.map_or("", |identity| identity.as_str()),
                    destination = %peer.destination,
                    would = %trial,
                    "policy on trial"
                );
            }
        }
    }

    /// Counts it; whether it is to be said as well.
    fn count(&self, trial: &Trial, now: Instant) -> bool {
        let mut counts = self.0.lock();
        let key = (trial.policy().clone(), trial.decision());
        if counts.len() >= POLICIES_MAX && !counts.contains_key(&key) {
            return false;
        }
        let count = counts.entry(key).or_default();
        count.connections += 1;
        let is_due = count.said.is_none_or(|said| now.duration_since(said) >= SAID_EVERY);
        if is_due {
            count.said = Some(now);
        }
        is_due
    }

    /// The counts, in the Prometheus text format.
    pub fn encode_metrics(&self) -> String {
        const NAME: &str = "cairn_dry_run_connections_total";
        let counts = self.0.lock();
        if counts.is_empty() {
            return String::new();
        }
        let help = "Connections that a policy on trial would have decided on.";
        let mut text = format!("# HELP {NAME} {help}\n# TYPE {NAME} counter\n");
        for ((policy, decision), count) in counts.iter() {
            // Writing to a text cannot fail. Names of objects have nothing that a label must not have.
            let _written = writeln!(
                text,
                "{NAME}{{namespace=\"{}\",policy=\"{}\",decision=\"{decision}\"}} {}",
                policy.namespace, policy.name, count.connections
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_counted_each_time_and_said_now_and_then() {
        let trials = Trials::default();
        let start = Instant::now();
        let would_deny = Trial::WouldDeny(ResourceName::new("shop", "strict"), 0);
        let would_not = Trial::WouldNotAllow(ResourceName::new("shop", "few"));
        for (trial, after, said) in [
            (&would_deny, 0, true),
            (&would_deny, 9, false),
            (&would_not, 9, true),
            (&would_deny, 10, true),
            (&would_deny, 11, false),
        ] {
            assert_eq!(trials.count(trial, start + Duration::from_secs(after)), said, "{trial} {after}");
        }
        let text = trials.encode_metrics();
        for line in [
            "cairn_dry_run_connections_total{namespace=\"shop\",policy=\"few\",decision=\"deny\"} 1",
            "cairn_dry_run_connections_total{namespace=\"shop\",policy=\"strict\",decision=\"deny\"} 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{text}");
        }
    }

    #[test]
    fn policies_are_told_apart_within_a_bound() {
        let trials = Trials::default();
        for number in 0..2 * POLICIES_MAX {
            trials.count(&Trial::WouldNotAllow(ResourceName::new("n", number.to_string())), Instant::now());
        }
        assert_eq!(trials.0.lock().len(), POLICIES_MAX);
    }
}
