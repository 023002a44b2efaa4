//! What a scrape shows.

use super::*;
use crate::labels::{CustomLabels, PeerLabels, Reporter, Security};
use crate::{HttpRecord, HttpScope, TcpConnection};
use cairn_mesh::{Identity, Workload};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

/// A line of a scrape: name, labels in order, value.
type Sample = (String, Vec<(String, String)>, f64);

/// Reads Prometheus' text format strictly: every sample belongs to the family announced last.
fn parse(text: &str) -> Vec<Sample> {
    let mut kinds = BTreeMap::new();
    let mut samples = Vec::new();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().unwrap().to_owned();
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, family, "HELP and TYPE name the same family");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "one TYPE per family: {name}");
            continue;
        }
        assert!(!line.starts_with('#'), "no other comments: {line}");
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        match kinds.get(&family).map(String::as_str) {
            Some("histogram") => {
                let suffix = name.strip_prefix(&*family).unwrap();
                assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{name}");
            }
            Some("counter" | "gauge") => assert_eq!(name, family),
            kind => panic!("{family} is a {kind:?}"),
        }
        samples.push((
            name.to_owned(),
            parse_labels(labels.strip_suffix('}').unwrap()),
            value.parse().unwrap(),
        ));
    }
    samples
}

fn parse_labels(mut text: &str) -> Vec<(String, String)> {
    let mut labels = Vec::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once("=\"").unwrap();
        let end = rest.find('"').unwrap();
        labels.push((name.to_owned(), rest[..end].to_owned()));
        text = rest[end + 1..].trim_start_matches(',');
    }
    labels
}

fn workload(name: &str) -> Arc<Workload> {
    let identity = Identity::new("cluster.local", "shop", name).unwrap();
    Arc::new(Workload::new(format!("uid-{name}"), name, identity))
}

fn peer(name: &str) -> PeerLabels {
    let workload = workload(name);
    PeerLabels::of(Some(&workload), Some(&workload.identity))
}

fn record(status: u16, upstream: Option<&Arc<Workload>>) -> HttpRecord<'_> {
    HttpRecord {
        duration: Duration::from_micros(1_500),
        method: "GET",
        path: "/",
        protocol: "HTTP/1.1",
        status,
        request_bytes: 40,
        response_bytes: 4_000_000,
        upstream_workload: upstream,
        ..HttpRecord::new(
            SystemTime::UNIX_EPOCH,
            "10.0.0.1:4000".parse().unwrap(),
            "10.96.0.1:80".parse().unwrap(),
        )
    }
}

fn values(samples: &[Sample], name: &str) -> Vec<f64> {
    samples.iter().filter(|sample| sample.0 == name).map(|sample| sample.2).collect()
}

#[test]
fn http_metrics_carry_istios_labels_in_istios_order() {
    let metrics = Metrics::new("waypoint", "1.2", MetricsSettings::default());
    let scope = HttpScope::new(&metrics, peer("web"), None);
    let cart = workload("cart");
    for _ in 0..3 {
        scope.count(&record(200, Some(&cart)), None);
    }
    scope.count(&record(404, None), None);
    let samples = parse(&metrics.encode());

    let mut requests = values(&samples, "istio_requests_total");
    requests.sort_by(f64::total_cmp);
    assert_eq!(requests, [1.0, 3.0]);
    let with = |value: &str| {
        let has =
            |sample: &&Sample| sample.1.iter().any(|label| label.0 == "response_code" && label.1 == value);
        samples.iter().filter(|sample| sample.0 == "istio_requests_total").find(has).unwrap()
    };
    let labels: Vec<String> = with("200").1.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(
        labels.join(" "),
        "reporter=waypoint source_workload=web source_canonical_service=web source_canonical_revision=latest \
         source_workload_namespace=shop source_principal=spiffe://cluster.local/ns/shop/sa/web source_app=web \
         source_version=latest source_cluster=Kubernetes destination_workload=cart destination_workload_namespace=shop \
         destination_principal=spiffe://cluster.local/ns/shop/sa/cart destination_app=cart destination_version=latest \
         destination_canonical_service=cart destination_canonical_revision=latest destination_service=unknown \
         destination_service_namespace=unknown destination_service_name=unknown destination_cluster=Kubernetes \
         request_protocol=http response_code=200 grpc_response_status= response_flags=- \
         connection_security_policy=mutual_tls"
    );
    let unrouted = &with("404").1;
    assert!(unrouted.contains(&("destination_workload".into(), "unknown".into())));
    assert!(unrouted.contains(&("connection_security_policy".into(), "none".into())));

    let buckets: Vec<&Sample> = samples
        .iter()
        .filter(|sample| sample.0 == "istio_request_duration_milliseconds_bucket")
        .filter(|sample| sample.1.contains(&("response_code".into(), "200".into())))
        .collect();
    assert_eq!(buckets.len(), 20);
    let cumulative: Vec<f64> = buckets.iter().map(|sample| sample.2).collect();
    assert_eq!(cumulative[..3], [0.0, 0.0, 3.0], "1.5 ms is above 1 and not above 5");
    assert_eq!(cumulative[19], 3.0);
    assert_eq!(buckets[19].1.last().unwrap(), &("le".to_owned(), "+Inf".to_owned()));
    assert!(values(&samples, "istio_response_bytes_sum").contains(&12_000_000.0));
    let build = samples.iter().find(|sample| sample.0 == "istio_build").unwrap();
    assert_eq!(build.1, [("component".into(), "waypoint".into()), ("tag".into(), "1.2".into())]);
}

#[test]
fn pods_of_one_deployment_share_a_series() {
    let metrics = Metrics::new("waypoint", "1", MetricsSettings::default());
    let mut other = (*workload("cart")).clone();
    other.uid = "another-pod".into();
    other.name = "cart-2".into();
    for destination in [workload("cart"), Arc::new(other)] {
        HttpScope::new(&metrics, peer("web"), None).count(&record(200, Some(&destination)), None);
    }
    assert_eq!(values(&parse(&metrics.encode()), "istio_requests_total"), [2.0]);
}

#[test]
fn too_many_series_are_counted_as_unknown_peers() {
    let settings = MetricsSettings { http_series_max: 2, ..MetricsSettings::default() };
    let metrics = Metrics::new("waypoint", "1", settings);
    for name in ["a", "b", "c", "d"] {
        HttpScope::new(&metrics, peer(name), None).count(&record(200, None), None);
    }
    let samples = parse(&metrics.encode());
    let sources: BTreeSet<&str> = samples
        .iter()
        .filter(|sample| sample.0 == "istio_requests_total")
        .flat_map(|sample| &sample.1)
        .filter(|label| label.0 == "source_workload")
        .map(|label| &*label.1)
        .collect();
    assert_eq!(sources, BTreeSet::from(["a", "b", "unknown"]));
    assert_eq!(values(&samples, "istio_requests_total").iter().sum::<f64>(), 4.0);
    assert_eq!(values(&samples, "cairn_metric_series_overflow_total"), [2.0]);
}

#[test]
fn a_connection_counts_bytes_once_however_often_it_reports() {
    let metrics = Metrics::new("ztunnel", "1", MetricsSettings::default());
    let labels = TcpLabels {
        reporter: Reporter::Source,
        source: peer("web"),
        destination: peer("cart"),
        service: None,
        response_flags: "-",
        security: Security::MutualTls,
        custom: CustomLabels::default(),
    };
    let mut connection = TcpConnection::open(&metrics, labels.clone());
    connection.report(10, 100);
    connection.report(15, 100);
    connection.close("-");
    TcpConnection::open(&metrics, labels.clone()).close("CONNECT");
    drop(TcpConnection::open(&metrics, labels.clone()));
    TcpConnection::failed(&metrics, &TcpLabels { response_flags: "DENY", ..labels });

    let samples = parse(&metrics.encode());
    for (name, expected) in [
        ("istio_tcp_connections_opened_total", vec![3.0]),
        ("istio_tcp_connections_closed_total", vec![1.0, 2.0]),
        ("istio_tcp_received_bytes_total", vec![15.0]),
        ("istio_tcp_sent_bytes_total", vec![100.0]),
        ("istio_tcp_connections_failed_total", vec![1.0]),
    ] {
        let mut found = values(&samples, name);
        found.sort_by(f64::total_cmp);
        assert_eq!(found, expected, "{name}");
    }
    let opened = samples.iter().find(|sample| sample.0 == "istio_tcp_connections_opened_total").unwrap();
    let names: Vec<&str> = opened.1.iter().map(|label| &*label.0).collect();
    assert_eq!(names.len(), 27);
    assert_eq!(names[0], "reporter");
    assert_eq!(
        names[20..],
        [
            "request_protocol",
            "response_flags",
            "connection_security_policy",
            "source_region",
            "source_zone",
            "destination_region",
            "destination_zone"
        ]
    );
}
