//! Names of workloads that DNS was asked for because a connection needed them, counted as Istio's ztunnel does.

use cairn_mesh::Workload;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Write;

/// The most label sets; each is a client of this node and a name that it wanted.
const SERIES_MAX: usize = 4096;

/// The counts, by their labels.
#[derive(Default)]
pub struct OnDemandDns(Mutex<BTreeMap<String, u64>>);

impl OnDemandDns {
    /// DNS is asked for `hostname` on behalf of `source`.
    pub fn count(&self, source: &Workload, hostname: &str) {
        let labels = labels(source, hostname);
        let mut counts = self.0.lock();
        if counts.len() < SERIES_MAX || counts.contains_key(&labels) {
            *counts.entry(labels).or_default() += 1;
        }
    }

    /// The counts in the Prometheus text format.
    pub fn encode_metrics(&self) -> String {
        const NAME: &str = "istio_on_demand_dns_total";
        let counts = self.0.lock();
        if counts.is_empty() {
            return String::new();
        }
        let mut text =
            format!("# HELP {NAME} Names of workloads that DNS was asked for\n# TYPE {NAME} counter\n");
        for (labels, count) in counts.iter() {
            // Writing to a text cannot fail.
            let _written = writeln!(text, "{NAME}{{{labels}}} {count}");
        }
        text
    }
}

fn labels(source: &Workload, hostname: &str) -> String {
    let mut text = String::new();
    for (name, value) in [
        ("source_workload", &*source.workload_name),
        ("source_canonical_service", &*source.canonical_name),
        ("source_canonical_revision", &*source.canonical_revision),
        ("source_workload_namespace", &*source.namespace),
        ("source_principal", source.identity.as_str()),
        ("source_app", &*source.canonical_name),
        ("source_version", &*source.canonical_revision),
        ("source_cluster", &*source.cluster_id),
        ("hostname", hostname),
    ] {
        let value = if value.is_empty() { "unknown" } else { value };
        let separator = if text.is_empty() { "" } else { "," };
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        // Writing to a text cannot fail.
        let _written = write!(text, "{separator}{name}=\"{value}\"");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::Identity;

    #[test]
    fn each_client_and_name_is_counted_within_a_bound() {
        let web = Workload::new("web", "web", Identity::new("cluster.local", "shop", "web").unwrap());
        let asked = OnDemandDns::default();
        assert_eq!(asked.encode_metrics(), "");
        for name in ["db.example", "db.example", "odd\"name"] {
            asked.count(&web, name);
        }
        let text = asked.encode_metrics();
        let has = |hostname: &str, count: u64| {
            text.lines().any(|line| {
                line.contains("source_principal=\"spiffe://cluster.local/ns/shop/sa/web\"")
                    && line.ends_with(&format!("hostname=\"{hostname}\"}} {count}"))
            })
        };
        assert!(has("db.example", 2) && has("odd\\\"name", 1), "{text}");
        for number in 0..2 * SERIES_MAX {
            asked.count(&web, &number.to_string());
        }
        assert_eq!(asked.0.lock().len(), SERIES_MAX);
    }
}
