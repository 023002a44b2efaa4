//! CEL expressions of log filters and metric labels, over an exchange that an attacker had a part in.

use super::exchange::Said;
use cairn_mesh::{LogPlan, LogTarget, Metric, MetricsPlan, TagChange, TelemetryPlan};
use cairn_observe::Expression;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The most bytes of a label's value.
const LABEL_BYTES_MAX: usize = 256;

/// An expression, a zero byte, and lines of `name: value` that the peers say.
pub fn cel(data: &[u8]) {
    let at = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (text, said) = (&data[..at], data.get(at + 1..).unwrap_or_default());
    let Ok(text) = std::str::from_utf8(text) else { return };
    if let Err(error) = Expression::parse(text) {
        assert!(!error.to_string().is_empty());
        return;
    }
    let said = Said::read(said);
    let plan = as_label_and_filter(text);
    let (line, values) = said.observed(&plan);
    let (again, values_again) = said.observed(&plan);
    assert_eq!(line.is_empty(), again.is_empty(), "asked twice, the filter says another thing");
    assert_eq!(values, values_again, "asked twice, the label has another value");
    assert!(values.iter().all(|value| value.len() <= LABEL_BYTES_MAX), "a label of any length");
}

fn as_label_and_filter(text: &str) -> TelemetryPlan {
    let tags = BTreeMap::from([(Arc::from("own"), TagChange::Upsert(text.into()))]);
    let metrics = MetricsPlan {
        tags: Metric::ALL.into_iter().map(|(_, metric)| (metric, tags.clone())).collect(),
        ..MetricsPlan::default()
    };
    let log = LogPlan { to: LogTarget::Own, filter: Some(text.into()) };
    TelemetryPlan { logs: vec![log], metrics, ..TelemetryPlan::default() }
}
