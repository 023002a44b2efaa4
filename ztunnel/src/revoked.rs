//! What the lists of revoked certificates have done, for operators.

use cairn_identity::RevocationCounts;
use std::fmt::Write;

/// The counts in the Prometheus text format. The first family is Istio's.
pub fn encode_metrics(counts: &RevocationCounts) -> String {
    let mut text = String::new();
    let refused = [
        ("{reporter=\"destination\"}", counts.clients_refused),
        ("{reporter=\"source\"}", counts.servers_refused),
    ];
    let count = |count: usize| [("", count as u64)];
    for (name, kind, help, samples) in [
        (
            "istio_crl_policy_rejections_total",
            "counter",
            "Peers refused or cut because their certificates are revoked.",
            &refused[..],
        ),
        ("cairn_crl_lists", "gauge", "Lists of revoked certificates in force.", &count(counts.lists)[..]),
        (
            "cairn_crl_certificates",
            "gauge",
            "Certificates that they revoke.",
            &count(counts.certificates)[..],
        ),
        (
            "cairn_crl_overdue_lists",
            "gauge",
            "Lists in force of which there should be newer ones.",
            &count(counts.overdue)[..],
        ),
        (
            "cairn_crl_failures_total",
            "counter",
            "Times that the lists could not be read; those before stayed in force.",
            &[("", counts.failures)][..],
        ),
    ] {
        // Writing to a text cannot fail.
        let _written = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _written = writeln!(text, "{name}{labels} {value}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_refused_is_told_by_the_end_that_refused() {
        let counts =
            RevocationCounts { clients_refused: 2, servers_refused: 1, lists: 3, ..Default::default() };
        let text = encode_metrics(&counts);
        for line in [
            "istio_crl_policy_rejections_total{reporter=\"destination\"} 2",
            "istio_crl_policy_rejections_total{reporter=\"source\"} 1",
            "# TYPE cairn_crl_lists gauge",
            "cairn_crl_lists 3",
            "cairn_crl_failures_total 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
