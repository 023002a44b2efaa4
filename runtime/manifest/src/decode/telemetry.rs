//! Telemetry.

use super::target;
use crate::diagnostic::Severity;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{
    AccessLogging, Change, MeshSettings, Metric, MetricOverride, MetricsChange, ResourceKey, SpanTag,
    TagChange, TelemetryPolicy, TelemetryProviderKind, TracingChange,
};
use cairn_observe::{Expression, Format};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bounds of lists that Istio leaves open.
const ENTRIES_MAX: usize = 64;
const TAGS_MAX: usize = 64;

/// What a waypoint does with the resource.
pub(super) fn decode(
    object: &Object,
    key: &ResourceKey,
    settings: &MeshSettings,
    findings: &mut Findings,
) -> Vec<Change> {
    const KNOWN: [&str; 6] = ["selector", "targetRef", "targetRefs", "tracing", "metrics", "accessLogging"];
    // One that says nothing is as good as none, and may stand for its namespace.
    let nothing = Value::Object(Map::new());
    let spec = if object.spec.is_null() { &nothing } else { &object.spec };
    let spec = Node::new(spec, object.root()).map(&KNOWN, findings);
    let attachment = target::attachment(&spec, object, settings, findings);
    let reader = Reader { settings };
    let policy = TelemetryPolicy {
        name: object.name.clone(),
        created: object.created.as_str().into(),
        targets: attachment.targets,
        access_logging: reader.entries(&spec, "accessLogging", Reader::access_logging, findings),
        metrics: reader.entries(&spec, "metrics", Reader::metrics, findings),
        tracing: reader.entries(&spec, "tracing", Reader::tracing, findings),
    };
    if findings.broken {
        return Vec::new();
    }
    if attachment.selector.is_some() {
        let reason =
            "selects workloads: waypoints take Telemetry of namespaces and with targetRefs, ztunnels none";
        findings.note(Severity::Warning, "not-attached", &spec.at.key("selector"), reason);
        return vec![Change::L7Removed(key.clone())];
    }
    vec![Change::Telemetry(policy)]
}

/// What a provider is named for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Metrics,
    Logs,
    Spans,
}

struct Reader<'a> {
    settings: &'a MeshSettings,
}

impl Reader<'_> {
    fn entries<T>(
        &self,
        spec: &Entries<'_>,
        key: &str,
        read: impl Fn(&Self, &Node<'_>, &mut Findings) -> Option<T>,
        findings: &mut Findings,
    ) -> Vec<T> {
        let list = spec.bounded_list(key, ENTRIES_MAX, findings);
        list.iter().filter_map(|node| read(self, node, findings)).collect()
    }

    fn access_logging(&self, node: &Node<'_>, findings: &mut Findings) -> Option<AccessLogging> {
        let entries = node.map(&["match", "providers", "disabled", "filter"], findings);
        let entry = AccessLogging {
            providers: self.providers(&entries, Use::Logs, findings),
            disabled: entries.get("disabled").and_then(|node| node.flag(findings)),
            filter: entries.get("filter").and_then(|node| filter(&node, findings)),
        };
        is_for_servers(&entries, findings).then_some(entry)
    }

    fn metrics(&self, node: &Node<'_>, findings: &mut Findings) -> Option<MetricsChange> {
        let entries = node.map(&["providers", "overrides", "reportingInterval"], findings);
        let interval = entries.get("reportingInterval").and_then(|node| {
            let interval = node.duration(findings)?;
            if interval.is_zero() {
                findings.refuse("invalid-value", &node.at, "must be longer than nothing");
            }
            Some(interval)
        });
        let overrides = entries.bounded_list("overrides", ENTRIES_MAX, findings);
        Some(MetricsChange {
            providers: self.providers(&entries, Use::Metrics, findings),
            interval,
            overrides: overrides.iter().filter_map(|node| metric_override(node, findings)).collect(),
        })
    }

    fn tracing(&self, node: &Node<'_>, findings: &mut Findings) -> Option<TracingChange> {
        const KNOWN: [&str; 8] = [
            "match",
            "providers",
            "randomSamplingPercentage",
            "disableSpanReporting",
            "disableContextPropagation",
            "customTags",
            "useRequestIdForTraceSampling",
            "enableIstioTags",
        ];
        let entries = node.map(&KNOWN, findings);
        let mut flag = |key: &str| entries.get(key).and_then(|node| node.flag(findings));
        let (reporting, propagation) = (flag("disableSpanReporting"), flag("disableContextPropagation"));
        let (use_request_id, istio_tags) = (flag("useRequestIdForTraceSampling"), flag("enableIstioTags"));
        let providers = self.providers(&entries, Use::Spans, findings);
        if providers.len() > 1 {
            let reason = "only the first provider is used, as in Istio";
            findings.note(Severity::Warning, "not-supported", &entries.at.key("providers"), reason);
        }
        let change = TracingChange {
            providers,
            sampling: entries.get("randomSamplingPercentage").and_then(|node| percent(&node, findings)),
            disable_reporting: reporting,
            disable_propagation: propagation,
            tags: entries.get("customTags").map(|node| span_tags(&node, findings)),
            use_request_id,
            istio_tags,
        };
        is_for_servers(&entries, findings).then_some(change)
    }

    /// The names of providers. One that the mesh does not have, or that is not for this, is reported and left out by
    /// the merge.
    fn providers(&self, entries: &Entries<'_>, purpose: Use, findings: &mut Findings) -> Vec<Arc<str>> {
        let mut names = Vec::new();
        for node in entries.bounded_list("providers", ENTRIES_MAX, findings) {
            let name = node.map(&["name"], findings).require("name", findings);
            let Some((at, name)) = name.and_then(|node| Some((node.at.clone(), node.filled(findings)?)))
            else {
                continue;
            };
            match self.settings.telemetry.provider(name) {
                None => {
                    let reason = format!(
                        "MeshConfig.extensionProviders has no `{name}` that telemetry can be sent to: it has no effect"
                    );
                    findings.note(Severity::Warning, "unknown-provider", &at, reason);
                }
                Some(provider) if !serves(&provider.kind, purpose) => {
                    let what = match purpose {
                        Use::Metrics => "metrics",
                        Use::Logs => "access logs",
                        Use::Spans => "traces",
                    };
                    let reason = format!("provider `{name}` takes no {what}: it has no effect");
                    findings.note(Severity::Warning, "unknown-provider", &at, reason);
                }
                Some(_) => {}
            }
            names.push(name.into());
        }
        names
    }
}

fn serves(kind: &TelemetryProviderKind, purpose: Use) -> bool {
    match purpose {
        Use::Metrics => matches!(kind, TelemetryProviderKind::Prometheus),
        Use::Logs => kind.takes_logs(),
        Use::Spans => kind.takes_spans(),
    }
}

/// The modes of traffic, and whether a waypoint's is among them: it stands on the server's side.
const MODES: [(&str, bool); 3] = [("CLIENT_AND_SERVER", true), ("CLIENT", false), ("SERVER", true)];

/// Whether `match` takes what a waypoint does.
fn is_for_servers(entries: &Entries<'_>, findings: &mut Findings) -> bool {
    let Some(matches) = entries.get("match") else { return true };
    let mode = matches.map(&["mode"], findings).get("mode");
    is_server_mode(mode.as_ref(), findings)
}

fn is_server_mode(mode: Option<&Node<'_>>, findings: &mut Findings) -> bool {
    let Some(node) = mode else { return true };
    let server = node.choice(&MODES, findings).unwrap_or(true);
    if !server {
        let reason = "is for clients only, and a waypoint stands on the server's side: it has no effect";
        findings.note(Severity::Warning, "not-attached", &node.at, reason);
    }
    server
}

fn filter(node: &Node<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let node = node.map(&["expression"], findings).get("expression")?;
    let text = node.text(findings).filter(|text| !text.is_empty())?;
    if let Err(error) = Expression::parse(text) {
        findings.refuse("bad-expression", &node.at, error.to_string());
    }
    Some(text.into())
}

fn metric_override(node: &Node<'_>, findings: &mut Findings) -> Option<MetricOverride> {
    let entries = node.map(&["match", "disabled", "tagOverrides"], findings);
    let mut found = MetricOverride { metric: None, disabled: None, tags: BTreeMap::new() };
    let mut applies = true;
    if let Some(matches) = entries.get("match") {
        let matches = matches.map(&["metric", "customMetric", "mode"], findings);
        applies = is_server_mode(matches.get("mode").as_ref(), findings);
        match metric(&matches, findings) {
            Some(metric) => found.metric = metric,
            None => applies = false,
        }
    }
    found.disabled = entries.get("disabled").and_then(|node| node.flag(findings));
    if let Some(node) = entries.get("tagOverrides") {
        found.tags = tag_changes(&node, findings);
    }
    applies.then_some(found)
}

/// The metric meant: `Some(None)` is all, `None` one that there is not.
fn metric(matches: &Entries<'_>, findings: &mut Findings) -> Option<Option<Metric>> {
    if let Some(node) = matches.get("metric") {
        let mut choices = vec![("ALL_METRICS", None)];
        choices.extend(Metric::ALL.map(|(name, metric)| (name, Some(metric))));
        if let Some(other) = matches.get("customMetric") {
            findings.refuse("invalid-value", &other.at, "`metric` is set too: one of them");
        }
        return node.choice(&choices, findings);
    }
    let Some(node) = matches.get("customMetric") else { return Some(None) };
    let name = node.filled(findings)?;
    let reason = format!("there is no metric `{name}` here beside the standard ones: it has no effect");
    findings.note(Severity::Warning, "not-supported", &node.at, reason);
    None
}

fn tag_changes(node: &Node<'_>, findings: &mut Findings) -> BTreeMap<Arc<str>, TagChange> {
    const OPERATIONS: [(&str, bool); 2] = [("UPSERT", true), ("REMOVE", false)];
    let mut changes = BTreeMap::new();
    let entries = node.any_map(findings);
    if entries.all().count() > TAGS_MAX {
        findings.refuse("invalid-value", &node.at, format!("has more than {TAGS_MAX} entries"));
    }
    for (name, node) in entries.all() {
        if !is_label(name) {
            findings.refuse("invalid-value", &node.at, format!("`{name}` cannot be the name of a label"));
        }
        let change = node.map(&["operation", "value"], findings);
        let upsert = change.get("operation").and_then(|node| node.choice(&OPERATIONS, findings));
        let value = change.get("value").and_then(|node| node.text(findings)).unwrap_or_default();
        let change = match (upsert.unwrap_or(true), value) {
            (true, "") => {
                findings.refuse("missing-field", &change.at, "UPSERT needs a `value`");
                continue;
            }
            (true, value) => {
                if let Err(error) = Expression::parse(value) {
                    let reason = format!("{error}: the label is `unknown`");
                    findings.note(Severity::Error, "bad-expression", &change.at.key("value"), reason);
                }
                TagChange::Upsert(value.into())
            }
            (false, "") => TagChange::Remove,
            (false, _) => {
                findings.refuse("invalid-value", &change.at.key("value"), "REMOVE takes no value");
                continue;
            }
        };
        changes.insert(name.as_str().into(), change);
    }
    changes
}

/// Prometheus' names of labels.
fn is_label(name: &str) -> bool {
    let starts = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
    starts && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') && name != "le"
}

/// A percentage as hundredths of a percent.
pub(super) fn percent(node: &Node<'_>, findings: &mut Findings) -> Option<u16> {
    let number = node.value.as_f64().filter(|number| (0.0..=100.0).contains(number));
    if number.is_none() {
        findings.refuse("invalid-value", &node.at, "must be a number from 0 to 100");
    }
    number.map(|number| (number * 100.0).round() as u16)
}

fn span_tags(node: &Node<'_>, findings: &mut Findings) -> BTreeMap<Arc<str>, SpanTag> {
    let mut tags = BTreeMap::new();
    let entries = node.any_map(findings);
    if entries.all().count() > TAGS_MAX {
        findings.refuse("invalid-value", &node.at, format!("has more than {TAGS_MAX} entries"));
    }
    for (name, node) in entries.all() {
        let kinds = ["literal", "environment", "header", "formatter"];
        let tag = node.map(&kinds, findings);
        let mut set = kinds.iter().filter_map(|kind| tag.get(kind).map(|node| (*kind, node)));
        let (Some((kind, value)), None) = (set.next(), set.next()) else {
            let reason = format!("must have one of {}", kinds.join(", "));
            findings.refuse("invalid-value", &node.at, reason);
            continue;
        };
        if let Some(tag) = span_tag(kind, &value, findings) {
            tags.insert(name.as_str().into(), tag);
        }
    }
    tags
}

fn span_tag(kind: &str, node: &Node<'_>, findings: &mut Findings) -> Option<SpanTag> {
    if matches!(kind, "literal" | "formatter") {
        let value = node.map(&["value"], findings).require("value", findings)?;
        let text = value.filled(findings)?;
        if kind == "literal" {
            return Some(SpanTag::Literal(text.into()));
        }
        if let Err(error) = Format::parse(text) {
            findings.refuse("bad-format", &value.at, error.to_string());
        }
        return Some(SpanTag::Formatter(text.into()));
    }
    let entries = node.map(&["name", "defaultValue"], findings);
    let name_node = entries.require("name", findings)?;
    let name = name_node.filled(findings)?;
    let default = entries.text("defaultValue", findings).unwrap_or_default().into();
    if kind == "environment" {
        return Some(SpanTag::Environment(name.into(), default));
    }
    let lower = name.to_ascii_lowercase();
    if !cairn_observe::is_header_name(&lower) {
        findings.refuse("invalid-value", &name_node.at, format!("`{name}` cannot be the name of a header"));
    }
    Some(SpanTag::Header(lower.into(), default))
}

#[cfg(test)]
#[path = "telemetry/tests.rs"]
mod tests;
