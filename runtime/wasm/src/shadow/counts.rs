//! What plugins in the shadow would have done.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What one plugin would have done, over all its versions.
#[derive(Default)]
pub(crate) struct ShadowCounts {
    /// Exchanges that it was shown.
    pub(crate) exchanges: AtomicU64,
    /// Answers by the first digit of their status, from 2.
    answers: [AtomicU64; 4],
    pub(crate) reset: AtomicU64,
    /// Of requests and of responses.
    pub(crate) changed_heads: [AtomicU64; 2],
    pub(crate) changed_bodies: [AtomicU64; 2],
    /// Heads that would have waited.
    pub(crate) held: AtomicU64,
    /// Exchanges that it was not shown, or not to their end.
    pub(crate) given_up: AtomicU64,
    pub(crate) cpu_nanos: AtomicU64,
}

/// What a plugin in the shadow would have done, by name, and what that cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowView {
    /// Exchanges that it was shown.
    pub exchanges: u64,
    /// How many of them it would have answered, changed and so on.
    pub verdicts: Vec<(&'static str, u64)>,
    /// How often it crashed.
    pub crashes: u64,
    /// The processor time that all that took.
    pub cpu: Duration,
}

impl ShadowCounts {
    /// Where an answer is counted.
    pub(crate) fn answered(&self, status: u16) -> &AtomicU64 {
        let [two, three, four, five] = &self.answers;
        match status / 100 {
            2 => two,
            3 => three,
            4 => four,
            _ => five,
        }
    }

    /// The mean processor time of one exchange.
    pub(crate) fn mean_cost(&self) -> Duration {
        let exchanges = self.exchanges.load(Ordering::Relaxed).max(1);
        Duration::from_nanos(self.cpu_nanos.load(Ordering::Relaxed) / exchanges)
    }

    fn verdicts(&self) -> [(&'static str, &AtomicU64); 11] {
        let [two, three, four, five] = &self.answers;
        let ([request_head, response_head], [request_body, response_body]) =
            (&self.changed_heads, &self.changed_bodies);
        [
            ("answer_2xx", two),
            ("answer_3xx", three),
            ("answer_4xx", four),
            ("answer_5xx", five),
            ("reset", &self.reset),
            ("change_request_head", request_head),
            ("change_response_head", response_head),
            ("change_request_body", request_body),
            ("change_response_body", response_body),
            ("hold", &self.held),
            ("given_up", &self.given_up),
        ]
    }

    pub(crate) fn view(&self, crashes: u64) -> ShadowView {
        let verdicts = self.verdicts().map(|(verdict, count)| (verdict, count.load(Ordering::Relaxed)));
        ShadowView {
            exchanges: self.exchanges.load(Ordering::Relaxed),
            verdicts: verdicts.to_vec(),
            crashes,
            cpu: Duration::from_nanos(self.cpu_nanos.load(Ordering::Relaxed)),
        }
    }
}

/// In the Prometheus text format, of plugins that have been shown anything. `plugins` are names, fit for labels, and counts.
pub(crate) fn encode<'a>(text: &mut String, plugins: impl Iterator<Item = (String, &'a ShadowCounts)>) {
    let views: Vec<_> = plugins.map(|(name, counts)| (name, counts.view(0))).collect();
    let views: Vec<_> = views
        .iter()
        .filter(|(_, view)| view.exchanges > 0 || view.verdicts.iter().any(|(_, count)| *count > 0))
        .collect();
    if views.is_empty() {
        return;
    }
    let mut line = |line: String| {
        // Writing to a text cannot fail.
        let _written = writeln!(text, "{line}");
    };
    line("# TYPE cairn_wasm_shadow_exchanges_total counter".to_owned());
    for (plugin, view) in &views {
        line(format!("cairn_wasm_shadow_exchanges_total{{plugin=\"{plugin}\"}} {}", view.exchanges));
    }
    line("# TYPE cairn_wasm_shadow_verdicts_total counter".to_owned());
    for (plugin, view) in &views {
        for (verdict, count) in &view.verdicts {
            let labels = format!("plugin=\"{plugin}\",verdict=\"{verdict}\"");
            line(format!("cairn_wasm_shadow_verdicts_total{{{labels}}} {count}"));
        }
    }
    line("# TYPE cairn_wasm_shadow_cpu_seconds_total counter".to_owned());
    for (plugin, view) in &views {
        let seconds = view.cpu.as_secs_f64();
        line(format!("cairn_wasm_shadow_cpu_seconds_total{{plugin=\"{plugin}\"}} {seconds}"));
    }
}
