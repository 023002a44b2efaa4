//! What is counted of plugins' delivery, in the Prometheus text format.

use super::{Loader, View};
use std::fmt::Write;
use std::sync::atomic::Ordering;

/// Modules asked for, plugins by how they stand, and versions that have run.
pub fn encode_metrics(loader: &Loader, plugins: &[View]) -> String {
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, u64)]| {
        // Writing to a text cannot fail.
        let _written = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in samples {
            let _written = writeln!(text, "{name}{labels} {value}");
        }
    };
    let counts = &loader.puller.counts;
    let pulls = [("fetched", &counts.fetched), ("present", &counts.present), ("failed", &counts.failed)];
    let pulls =
        pulls.map(|(result, count)| (format!("{{result=\"{result}\"}}"), count.load(Ordering::Relaxed)));
    family("cairn_wasm_pulls_total", "counter", "Modules that plugins asked for.", &pulls);
    let states = ["ready", "loading", "failed"].map(|state| {
        let count = plugins.iter().filter(|plugin| plugin.state == state).count();
        (format!("{{state=\"{state}\"}}"), count as u64)
    });
    family("cairn_wasm_plugins", "gauge", "Plugins, by how they stand.", &states);
    let versions: Vec<(String, u64)> =
        plugins.iter().map(|plugin| (format!("{{plugin=\"{}\"}}", plugin.name), plugin.versions)).collect();
    let help = "Versions of a plugin that have run: each but the first was swapped in.";
    family("cairn_wasm_plugin_versions_total", "counter", help, &versions);
    text
}
