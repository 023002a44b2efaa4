//! What happened on the way to the control plane, counted for metrics.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The most types that are told apart; a control plane sends only those that were asked for.
const TYPES_MAX: usize = 64;

/// How a connection to the control plane ended (facts: the reasons that Istio's ztunnel tells).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Termination {
    /// It did not come about.
    ConnectionError,
    /// It broke.
    Error,
    /// The control plane wants it anew, as it does from time to time.
    Reconnect,
    /// The control plane has ended it in order.
    Complete,
}

impl Termination {
    const ALL: [Self; 4] = [Self::ConnectionError, Self::Error, Self::Reconnect, Self::Complete];

    fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

/// Connections to the control plane that ended, and what it sent.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    terminations: [AtomicU64; Termination::ALL.len()],
    /// Messages and their bytes, by type.
    messages: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl Counts {
    pub(crate) fn ended(&self, how: Termination) {
        if let Some(count) = self.terminations.get(how as usize) {
            count.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn received(&self, type_url: &str, bytes: usize) {
        let mut messages = self.messages.lock();
        if !messages.contains_key(type_url) {
            if messages.len() >= TYPES_MAX {
                return;
            }
            messages.insert(type_url.to_owned(), (0, 0));
        }
        if let Some((count, sum)) = messages.get_mut(type_url) {
            *count += 1;
            *sum += bytes as u64;
        }
    }

    /// The counts in the Prometheus text format, named as Istio's ztunnel names them.
    pub(crate) fn encode(&self) -> String {
        const TERMINATIONS: &str = "istio_xds_connection_terminations_total";
        const MESSAGES: &str = "istio_xds_message_total";
        const BYTES: &str = "istio_xds_message_bytes_total";
        let mut text = String::new();
        let head = |text: &mut String, name: &str, help: &str| {
            // Writing to a text cannot fail.
            let _written = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
        };
        head(&mut text, TERMINATIONS, "Connections to the control plane that ended");
        for (how, count) in Termination::ALL.iter().zip(&self.terminations) {
            let count = count.load(Relaxed);
            let _written = writeln!(text, "{TERMINATIONS}{{reason=\"{}\"}} {count}", how.as_str());
        }
        let messages = self.messages.lock();
        let mut family = |name: &str, help: &str, read: fn(&(u64, u64)) -> u64| {
            head(&mut text, name, help);
            for (type_url, counts) in messages.iter() {
                let url = type_url.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
                let _written = writeln!(text, "{name}{{url=\"{url}\"}} {}", read(counts));
            }
        };
        family(MESSAGES, "Messages of the control plane", |(count, _)| *count);
        family(BYTES, "Bytes of messages of the control plane", |(_, bytes)| *bytes);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_and_each_type_is_counted_by_itself() {
        let counts = Counts::default();
        for how in [Termination::Error, Termination::Reconnect, Termination::Reconnect] {
            counts.ended(how);
        }
        counts.received("a", 10);
        counts.received("a", 5);
        counts.received("b\"", 1);
        let text = counts.encode();
        for line in [
            "istio_xds_connection_terminations_total{reason=\"ConnectionError\"} 0",
            "istio_xds_connection_terminations_total{reason=\"Error\"} 1",
            "istio_xds_connection_terminations_total{reason=\"Reconnect\"} 2",
            "istio_xds_message_total{url=\"a\"} 2",
            "istio_xds_message_bytes_total{url=\"a\"} 15",
            "istio_xds_message_total{url=\"b\\\"\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }

    #[test]
    fn types_are_told_apart_within_a_bound() {
        let counts = Counts::default();
        for number in 0..2 * TYPES_MAX {
            counts.received(&number.to_string(), 1);
        }
        assert_eq!(counts.messages.lock().len(), TYPES_MAX);
    }
}
