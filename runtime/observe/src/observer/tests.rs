//! What a compiled plan counts, under which labels, and what it writes.

use super::*;
use crate::testing::Exchange;
use cairn_mesh::Metric;
use cairn_telemetry::{Telemetry, TelemetrySettings};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io::Write;

/// Memory in place of standard output.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What is written and scraped when an exchange is over.
fn observed(plan: &TelemetryPlan, change: impl FnOnce(&mut HttpRecord<'_>)) -> (String, String) {
    let (written, exchange) = (Written::default(), Exchange::new());
    let telemetry = Telemetry::new("proxy", "1", &TelemetrySettings::default(), written.clone());
    let own = Arc::new(exchange.own().clone());
    let outputs = Outputs::new(Arc::clone(&telemetry), Arc::clone(&own), drop);
    let observer = Observer::compile(plan, &own, &outputs);
    let mut record = exchange.record();
    change(&mut record);
    let source = crate::testing::workload("web");
    let labels = cairn_telemetry::PeerLabels::of(Some(&source), Some(&source.identity));
    let scope = HttpScope::new(&telemetry.metrics, labels, None);
    telemetry.record_http(&scope, &record, Some(&observer));
    let scraped = telemetry.metrics.encode();
    // The log's thread has written all once nobody can add to it.
    drop((observer, outputs, telemetry, scope));
    let lines = String::from_utf8(std::mem::take(&mut *written.0.lock())).unwrap();
    (lines, scraped)
}

fn tagged(metrics: &[Metric], tags: &[(&str, Option<&str>)]) -> TelemetryPlan {
    let change = |(name, value): &(&str, Option<&str>)| {
        let change = value.map_or(TagChange::Remove, |value| TagChange::Upsert(value.into()));
        (Arc::from(*name), change)
    };
    let tags: BTreeMap<Arc<str>, TagChange> = tags.iter().map(change).collect();
    let tags = metrics.iter().map(|metric| (*metric, tags.clone())).collect();
    TelemetryPlan { metrics: MetricsPlan { tags, ..MetricsPlan::default() }, ..TelemetryPlan::default() }
}

fn sample<'a>(scraped: &'a str, name: &str) -> &'a str {
    let is_it = |line: &&str| line.starts_with(&format!("{name}{{"));
    scraped.lines().find(is_it).unwrap_or_else(|| panic!("no {name} in {scraped}"))
}

#[test]
fn labels_of_ones_own_have_values_or_are_unknown() {
    let long = format!("'{}'", "x".repeat(LABEL_BYTES_MAX + 9));
    let cut = format!("\"{}\"", "x".repeat(LABEL_BYTES_MAX));
    for (name, expression, expected) in [
        ("a constant", "'test'", "\"test\""),
        ("an attribute", "request.method", "\"GET\""),
        ("a number", "response.code", "\"200\""),
        ("a truth", "response.code == 200", "\"true\""),
        ("the node", "node.metadata['CLUSTER_ID']", "\"c1\""),
        ("a peer", "upstream_peer.workload", "\"cart\""),
        ("a filter state", "filter_state['downstream_peer'].workload", "\"web\""),
        ("a header that is not there", "request.headers['x-missing']", "\"unknown\""),
        ("no expression", "((", "\"unknown\""),
        ("no attribute", "request.nothing", "\"unknown\""),
        ("a long value", &long, &cut),
    ] {
        let plan = tagged(&[Metric::RequestCount], &[("own", Some(expression))]);
        let (_, scraped) = observed(&plan, |_| ());
        let line = sample(&scraped, "istio_requests_total");
        assert!(line.contains(&format!("own={expected}")), "{name}: {line}");
        assert!(!sample(&scraped, "istio_request_bytes_sum").contains("own="), "{name}: of that metric only");
    }
}

#[test]
fn standard_labels_are_replaced_or_left_out_of_the_metric_that_says_so() {
    let plan = tagged(
        &[Metric::RequestDuration],
        &[("request_protocol", Some("request.protocol")), ("source_principal", None)],
    );
    let (_, scraped) = observed(&plan, |_| ());
    let (changed, other) = (
        sample(&scraped, "istio_request_duration_milliseconds_sum"),
        sample(&scraped, "istio_requests_total"),
    );
    assert!(
        changed.contains("request_protocol=\"HTTP/1.1\"") && !changed.contains("source_principal"),
        "{changed}"
    );
    assert_eq!(changed.matches("request_protocol").count(), 1, "{changed}");
    assert!(
        other.contains("request_protocol=\"http\"") && other.contains("source_principal=\"spiffe://"),
        "{other}"
    );
}

#[test]
fn what_is_disabled_is_not_counted() {
    let families = [
        (Metric::RequestCount, "istio_requests_total{"),
        (Metric::RequestDuration, "istio_request_duration_milliseconds_sum{"),
        (Metric::RequestSize, "istio_request_bytes_sum{"),
        (Metric::ResponseSize, "istio_response_bytes_sum{"),
        (Metric::GrpcRequestMessages, "istio_request_messages_total{"),
        (Metric::GrpcResponseMessages, "istio_response_messages_total{"),
    ];
    let stream = |record: &mut HttpRecord<'_>| {
        (record.grpc, record.request_messages, record.response_messages) = (true, 1, 1);
    };
    for (off, name) in families {
        let metrics = MetricsPlan { disabled: vec![off], ..MetricsPlan::default() };
        let (_, scraped) = observed(&TelemetryPlan { metrics, ..TelemetryPlan::default() }, stream);
        for (metric, family) in families {
            assert_eq!(scraped.contains(family), metric != off, "{name} off: {family}");
        }
    }
    let metrics = MetricsPlan { enabled: false, ..MetricsPlan::default() };
    let (_, scraped) = observed(&TelemetryPlan { metrics, ..TelemetryPlan::default() }, stream);
    assert!(families.iter().all(|(_, family)| !scraped.contains(family)), "{scraped}");
}

fn logged(format: LogFormat, omit_empty: bool, filter: Option<&str>) -> TelemetryPlan {
    let file = FileLog { path: "/dev/stdout".into(), format, omit_empty };
    let log = LogPlan { to: LogTarget::File(Arc::new(file)), filter: filter.map(Arc::from) };
    TelemetryPlan { logs: vec![log], ..TelemetryPlan::default() }
}

#[test]
fn each_form_of_a_line_is_written() {
    let own = || LogFormat::Text("%REQ(x-missing)%|%PROTOCOL%\n".into());
    let key = || LogFormat::Json(vec![("a".into(), cairn_mesh::LogValue::Text("%REQ(x-missing)%".into()))]);
    let line = |format, omit| observed(&logged(format, omit, None), |_| ()).0;
    assert_eq!(line(own(), false), "-|HTTP/1.1\n");
    assert_eq!(line(own(), true), "|HTTP/1.1\n");
    assert_eq!(line(LogFormat::Text("no end".into()), false), "no end\n");
    assert_eq!(line(key(), false), "{\"a\":null}\n");
    assert_eq!(line(key(), true), "{}\n");
    assert!(
        line(LogFormat::DefaultText, false)
            .contains(" 200 - via_upstream - \"-\" 3 5 12 11 \"-\" \"curl/8\" ")
    );
    assert!(
        line(LogFormat::DefaultText, true).contains(" 200 - via_upstream  \"\" 3 5 12 11 \"\" \"curl/8\" ")
    );
    assert!(line(LogFormat::DefaultJson, false).contains("\"x_forwarded_for\":null"));
    assert!(!line(LogFormat::DefaultJson, true).contains("null"));
    assert_eq!(observed(&TelemetryPlan::default(), |_| ()).0, "", "no log, no line");
}

#[test]
fn only_what_a_filter_is_true_of_is_logged() {
    for (filter, expected) in [
        ("response.code == 200", true),
        ("response.code >= 400", false),
        ("request.headers['x-missing'] == 'a'", false),
        ("request.method", false),
        ("((", false),
    ] {
        let (lines, _) = observed(&logged(LogFormat::DefaultText, false, Some(filter)), |_| ());
        assert_eq!(!lines.is_empty(), expected, "{filter}");
    }
}
