//! What a waypoint reads of its own Gateway.

use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Findings, length_of_time};
use cairn_mesh::{Change, GatewayTelemetry, TextMatch};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;

/// The annotation that names, separated by commas, principals of clients who are told what decided their requests.
const EXPLAIN_TO: &str = "cairn.dev/explain-to";

/// The annotation that gives each attempt to send a traced request a span.
const CLIENT_SPANS: &str = "cairn.dev/client-spans";
/// Istio's annotations for bounds of histograms, and for how long a series may be idle.
const BUCKETS: &str = "sidecar.istio.io/statsHistogramBuckets";
const EVICTION: &str = "sidecar.istio.io/statsEvictionInterval";

/// The most bounds of a histogram, each of which is a line of a scrape for every series, and the most prefixes.
const BOUNDS_MAX: usize = 64;
const PREFIXES_MAX: usize = 16;

/// The most principals that it may name: each request is compared with all of them.
const PRINCIPALS_MAX: usize = 32;

/// The Gateway's name, and whom its waypoint explains decisions to: nobody that is not certain.
pub(super) fn decode(object: &Object, findings: &mut Findings) -> Vec<Change> {
    let text = object.annotations.get(EXPLAIN_TO).map_or("", String::as_str);
    let at = FieldPath::of(&["metadata", "annotations", EXPLAIN_TO]);
    let mut principals = Vec::new();
    for principal in text.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        if principal.starts_with("spiffe://") || principal.contains(char::is_whitespace) {
            let reason = format!("`{principal}` is no principal: write it without `spiffe://` and spaces");
            findings.note(Severity::Error, "invalid-value", &at, reason);
        } else if principals.len() == PRINCIPALS_MAX {
            let reason = format!("names more than {PRINCIPALS_MAX} principals: the rest is told nothing");
            findings.note(Severity::Error, "invalid-value", &at, reason);
            break;
        } else {
            principals.push(TextMatch::parse(principal));
        }
    }
    if principals.contains(&TextMatch::Present) {
        let reason = "every client with an identity is told which policy decided and why";
        findings.note(Severity::Warning, "explains-to-all", &at, reason);
    }
    let telemetry = Change::GatewayTelemetry(telemetry(object, findings));
    vec![Change::Gateway(object.name.clone()), telemetry, Change::ExplainTo(principals)]
}

/// What its annotations say of telemetry. One that cannot be read is reported and has no effect: the waypoint stays.
fn telemetry(object: &Object, findings: &mut Findings) -> GatewayTelemetry {
    let mut said = GatewayTelemetry::default();
    if let Some((text, at)) = annotation(object, CLIENT_SPANS) {
        match text {
            "true" => said.client_spans = true,
            "false" => {}
            other => {
                findings.note(
                    Severity::Error,
                    "invalid-value",
                    &at,
                    format!("is `{other}`, not true or false"),
                );
            }
        }
    }
    if let Some((text, at)) = annotation(object, BUCKETS) {
        match buckets(text) {
            Ok(buckets) => said.buckets = buckets,
            Err(reason) => findings.note(Severity::Error, "invalid-value", &at, reason),
        }
    }
    if let Some((text, at)) = annotation(object, EVICTION) {
        said.eviction = length_of_time(text).filter(|length| *length >= Duration::from_secs(1));
        if said.eviction.is_none() {
            let reason =
                format!("`{text}` is not a length of time of a second or more, as `90s`, `1.5m`, `1h`");
            findings.note(Severity::Error, "invalid-value", &at, reason);
        }
    }
    said
}

/// An annotation of the Gateway's pods: Istio gives them those of `spec.infrastructure`, else the Gateway's own.
fn annotation<'a>(object: &'a Object, name: &'static str) -> Option<(&'a str, FieldPath)> {
    let of_pods = object.spec.get("infrastructure").and_then(|it| it.get("annotations")?.get(name)?.as_str());
    if let Some(text) = of_pods {
        return Some((text, FieldPath::of(&["spec", "infrastructure", "annotations", name])));
    }
    let text = object.annotations.get(name)?;
    Some((text.as_str(), FieldPath::of(&["metadata", "annotations", name])))
}

/// Bounds by the beginning of a name.
type Buckets = Vec<(Arc<str>, Arc<[f64]>)>;

/// `{"prefix": [bound, …]}`: bounds rise, and are what Prometheus can tell apart.
fn buckets(text: &str) -> Result<Buckets, String> {
    let all: Map<String, Value> = serde_json::from_str(text)
        .map_err(|_| "is not JSON of the form {\"prefix\": [1, 5, 10]}".to_owned())?;
    if all.len() > PREFIXES_MAX {
        return Err(format!("has more than {PREFIXES_MAX} prefixes"));
    }
    let mut read = Vec::with_capacity(all.len());
    for (prefix, list) in all {
        let numbers =
            list.as_array().map(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        let Some(Some(bounds)) = numbers else {
            return Err(format!("`{prefix}`: must be a list of numbers"));
        };
        if prefix.is_empty() || bounds.is_empty() || bounds.len() > BOUNDS_MAX {
            return Err(format!("`{prefix}`: must have a name and from 1 to {BOUNDS_MAX} bounds"));
        }
        let rises = bounds.is_sorted_by(|one, next| one < next);
        if !rises || bounds.first().is_none_or(|first| *first <= 0.0) {
            return Err(format!("`{prefix}`: bounds must be above zero and rise"));
        }
        read.push((prefix.into(), bounds.into()));
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{object, short};

    #[test]
    fn only_certain_principals_are_told() {
        for (name, text, expected, said) in [
            ("none", "", &[][..], &[][..]),
            (
                "two",
                "cluster.local/ns/a/sa/b, cluster.local/ns/ops/*",
                &["cluster.local/ns/a/sa/b", "cluster.local/ns/ops/*"],
                &[],
            ),
            ("a whole id", "spiffe://cluster.local/ns/a/sa/b,x", &["x"], &["error invalid-value"]),
            ("two in one", "a b", &[], &["error invalid-value"]),
            ("everyone", "*", &["*"], &["warning explains-to-all"]),
        ] {
            let object = object(&format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: g, namespace: n, annotations: \
                 {{cairn.dev/explain-to: '{text}'}}}}\n"
            ));
            let mut findings = Findings::default();
            let changes = decode(&object, &mut findings);
            let [Change::Gateway(_), Change::GatewayTelemetry(_), Change::ExplainTo(principals)] =
                changes.as_slice()
            else {
                panic!("{changes:?}")
            };
            assert_eq!(principals.iter().map(ToString::to_string).collect::<Vec<_>>(), expected, "{name}");
            let place = " metadata.annotations[\"cairn.dev/explain-to\"]";
            let told: Vec<String> = findings.list.iter().map(|one| short(one).replace(place, "")).collect();
            assert_eq!(told, said, "{name}");
            assert!(!findings.broken, "{name}: the waypoint stays");
        }
        let many = vec!["a"; PRINCIPALS_MAX + 1].join(",");
        let object = object(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: g, annotations: \
             {{cairn.dev/explain-to: '{many}'}}}}\n"
        ));
        let changes = decode(&object, &mut Findings::default());
        let Some(Change::ExplainTo(principals)) = changes.last() else { panic!("{changes:?}") };
        assert_eq!(principals.len(), PRINCIPALS_MAX);
    }

    fn said(annotations: &str) -> (GatewayTelemetry, Vec<String>) {
        let object = object(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: g, namespace: n, annotations: \
             {{{annotations}}}}}\n"
        ));
        let mut findings = Findings::default();
        let changes = decode(&object, &mut findings);
        let [_, Change::GatewayTelemetry(said), _] = changes.as_slice() else { panic!("{changes:?}") };
        assert!(!findings.broken, "{annotations}: the waypoint stays");
        (said.clone(), findings.list.iter().map(short).collect())
    }

    #[test]
    fn annotations_say_what_a_waypoint_observes() {
        let nothing = GatewayTelemetry::default;
        let buckets = |bounds: &[f64]| GatewayTelemetry {
            buckets: vec![("istiocustom".into(), bounds.into())],
            ..nothing()
        };
        for (text, expected) in [
            ("", nothing()),
            ("cairn.dev/client-spans: 'true'", GatewayTelemetry { client_spans: true, ..nothing() }),
            ("cairn.dev/client-spans: 'false'", nothing()),
            (
                "sidecar.istio.io/statsEvictionInterval: 90s",
                GatewayTelemetry { eviction: Some(Duration::from_secs(90)), ..nothing() },
            ),
            (
                "sidecar.istio.io/statsHistogramBuckets: '{\"istiocustom\": [1, 5, 10.5]}'",
                buckets(&[1.0, 5.0, 10.5]),
            ),
        ] {
            assert_eq!(said(text), (expected, Vec::new()), "{text}");
        }
        let many = format!("{{\"a\": {:?}}}", (1..=BOUNDS_MAX + 1).collect::<Vec<_>>());
        for (name, value) in [
            ("cairn.dev/client-spans", "yes"),
            ("sidecar.istio.io/statsEvictionInterval", "soon"),
            ("sidecar.istio.io/statsEvictionInterval", "0s"),
            ("sidecar.istio.io/statsHistogramBuckets", "[1]"),
            ("sidecar.istio.io/statsHistogramBuckets", "{\"a\": []}"),
            ("sidecar.istio.io/statsHistogramBuckets", "{\"\": [1]}"),
            ("sidecar.istio.io/statsHistogramBuckets", "{\"a\": [\"1\"]}"),
            ("sidecar.istio.io/statsHistogramBuckets", "{\"a\": [2, 1]}"),
            ("sidecar.istio.io/statsHistogramBuckets", "{\"a\": [1, 1]}"),
            ("sidecar.istio.io/statsHistogramBuckets", "{\"a\": [0]}"),
            ("sidecar.istio.io/statsHistogramBuckets", &many),
        ] {
            let expected = vec![format!("error invalid-value metadata.annotations[\"{name}\"]")];
            assert_eq!(said(&format!("{name}: '{value}'")), (nothing(), expected), "{name}: {value}");
        }
    }

    #[test]
    fn annotations_of_pods_win() {
        let object = object(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: g, namespace: n, annotations: \
             {sidecar.istio.io/statsEvictionInterval: 1h}}\nspec: {infrastructure: {annotations: \
             {sidecar.istio.io/statsEvictionInterval: 2h}}}\n",
        );
        let said = telemetry(&object, &mut Findings::default());
        assert_eq!(said.eviction, Some(Duration::from_secs(7200)));
    }
}
