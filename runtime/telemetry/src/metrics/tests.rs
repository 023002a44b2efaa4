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

/// Each label of `istio_requests_total`: what it says of ends that the mesh knows, and of an exchange of which nothing
/// is known.
#[test]
fn each_label_has_its_value_and_its_default() {
    let known = |name: &str| {
        let mut workload = (*workload(name)).clone();
        workload.workload_name = format!("{name}-deployment").into();
        workload.canonical_name = format!("{name}-app").into();
        workload.canonical_revision = "v2".into();
        workload.cluster_id = "c1".into();
        Arc::new(workload)
    };
    let service = Arc::new(cairn_mesh::Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart.shop.svc.cluster.local".into(),
        canonical: true,
        ..cairn_mesh::Service::default()
    });
    let (web, cart) = (known("web"), known("cart"));
    let labels = |source: PeerLabels, service, record: &HttpRecord<'_>| {
        let metrics = Metrics::new("waypoint", "1", MetricsSettings::default());
        HttpScope::new(&metrics, source, service).count(record, None);
        let samples = parse(&metrics.encode());
        let sample = samples.iter().find(|sample| sample.0 == "istio_requests_total").unwrap();
        sample.1.iter().cloned().collect::<BTreeMap<String, String>>()
    };
    let of_all = labels(
        PeerLabels::of(Some(&web), Some(&web.identity)),
        Some(service),
        &HttpRecord { grpc: true, grpc_status: Some(0), flags: "UF", ..record(200, Some(&cart)) },
    );
    let of_nothing = labels(PeerLabels::default(), None, &record(0, None));
    let table = [
        ("reporter", "waypoint", "waypoint"),
        ("source_workload", "web-deployment", "unknown"),
        ("source_canonical_service", "web-app", "unknown"),
        ("source_canonical_revision", "v2", "latest"),
        ("source_workload_namespace", "shop", "unknown"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/web", "unknown"),
        ("source_app", "web-app", "unknown"),
        ("source_version", "v2", "unknown"),
        ("source_cluster", "c1", "unknown"),
        ("destination_workload", "cart-deployment", "unknown"),
        ("destination_workload_namespace", "shop", "unknown"),
        ("destination_principal", "spiffe://cluster.local/ns/shop/sa/cart", "unknown"),
        ("destination_app", "cart-app", "unknown"),
        ("destination_version", "v2", "unknown"),
        ("destination_service", "cart.shop.svc.cluster.local", "unknown"),
        ("destination_canonical_service", "cart-app", "unknown"),
        ("destination_canonical_revision", "v2", "latest"),
        ("destination_service_name", "cart", "unknown"),
        ("destination_service_namespace", "shop", "unknown"),
        ("destination_cluster", "c1", "unknown"),
        ("request_protocol", "grpc", "http"),
        ("response_code", "200", "0"),
        ("grpc_response_status", "0", ""),
        ("response_flags", "UF", "-"),
        ("connection_security_policy", "mutual_tls", "none"),
    ];
    for (label, known, unknown) in table {
        assert_eq!((&*of_all[label], &*of_nothing[label]), (known, unknown), "{label}");
    }
    assert_eq!((of_all.len(), of_nothing.len()), (table.len(), table.len()));
}

#[test]
fn both_ends_must_be_proven_for_mutual_tls() {
    let (proven, bare) = (peer("web"), PeerLabels { principal: None, ..peer("web") });
    for (source, destination, expected) in [
        (&proven, &proven, "mutual_tls"),
        (&bare, &proven, "none"),
        (&proven, &bare, "none"),
        (&bare, &bare, "none"),
    ] {
        assert_eq!(Security::between(source, destination).as_str(), expected);
    }
}

/// Which labels each family has, of a waypoint: connections have no codes, and messages end with the cluster.
#[test]
fn each_family_has_its_labels() {
    let metrics = Metrics::new("waypoint", "1", MetricsSettings::default());
    let cart = workload("cart");
    let stream =
        HttpRecord { grpc: true, request_messages: 2, response_messages: 3, ..record(200, Some(&cart)) };
    HttpScope::new(&metrics, peer("web"), None).count(&stream, None);
    let labels = TcpLabels {
        reporter: Reporter::Waypoint,
        source: peer("web"),
        destination: peer("cart"),
        service: None,
        response_flags: "-",
        security: Security::MutualTls,
        custom: CustomLabels::default(),
    };
    let mut connection = TcpConnection::open(&metrics, labels);
    connection.report(1, 1);
    connection.close("-");
    let samples = parse(&metrics.encode());
    let has = |name: &str, label: &str| {
        let sample = samples.iter().find(|sample| sample.0 == name).unwrap_or_else(|| panic!("no {name}"));
        sample.1.iter().any(|(known, _)| known == label)
    };
    for (name, count, code, grpc, flags) in [
        ("istio_requests_total", 25, true, true, true),
        ("istio_request_duration_milliseconds_sum", 25, true, true, true),
        ("istio_request_bytes_sum", 25, true, true, true),
        ("istio_response_bytes_sum", 25, true, true, true),
        ("istio_request_messages_total", 20, false, false, false),
        ("istio_response_messages_total", 20, false, false, false),
        ("istio_tcp_connections_opened_total", 23, false, false, true),
        ("istio_tcp_connections_closed_total", 23, false, false, true),
        ("istio_tcp_sent_bytes_total", 23, false, false, true),
        ("istio_tcp_received_bytes_total", 23, false, false, true),
    ] {
        let found =
            (has(name, "response_code"), has(name, "grpc_response_status"), has(name, "response_flags"));
        assert_eq!(found, (code, grpc, flags), "{name}");
        let sample = samples.iter().find(|sample| sample.0 == name).unwrap();
        assert_eq!(sample.1.len(), count, "{name}: {:?}", sample.1);
    }
    assert_eq!(values(&samples, "istio_request_messages_total"), [2.0]);
    assert_eq!(values(&samples, "istio_response_messages_total"), [3.0]);
}

#[test]
fn histograms_have_the_bounds_that_the_longest_prefix_says() {
    let metrics = Metrics::new("waypoint", "1", MetricsSettings::default());
    let scope = HttpScope::new(&metrics, peer("web"), None);
    let rows = |metric: &str| {
        let name = format!("istio_{metric}_bucket");
        values(&parse(&metrics.encode()), &name).len()
    };
    scope.count(&record(200, None), None);
    let all = ["request_duration_milliseconds", "request_bytes", "response_bytes"];
    assert_eq!(all.map(rows), [20, 20, 20]);
    let bounds = |prefix: &str, list: &[f64]| (Arc::from(prefix), Arc::from(list));
    let nine = [1.0, 5.0, 10.0, 50.0, 100.0, 500.0, 1000.0, 5000.0, 10_000.0];
    for (name, said, expected) in [
        ("all of Istio's", vec![bounds("istiocustom", &nine)], [10, 10, 10]),
        (
            "the longest prefix",
            vec![bounds("istio", &[1.0]), bounds("istiocustom.istio_request_bytes", &[1.0, 2.0])],
            [2, 3, 2],
        ),
        ("a prefix of nothing", vec![bounds("cluster.", &[1.0])], [20, 20, 20]),
        ("none again", vec![], [20, 20, 20]),
    ] {
        metrics.configure(&said, None);
        // A connection that was open before counts in the new series, too.
        scope.count(&record(200, None), None);
        assert_eq!(all.map(rows), expected, "{name}");
    }
    let before = values(&parse(&metrics.encode()), "istio_requests_total");
    metrics.configure(&[], Some(Duration::from_secs(9)));
    assert_eq!(values(&parse(&metrics.encode()), "istio_requests_total"), before, "nothing changed");
    metrics.configure(&[bounds("istio", &[0.5])], None);
    scope.count(&record(200, None), None);
    let text = metrics.encode();
    assert!(
        text.contains("istio_request_duration_milliseconds_bucket{") && text.contains("le=\"0.5\"} 0"),
        "{text}"
    );
}

#[test]
fn series_that_idle_are_forgotten_when_it_is_said() {
    let metrics = Metrics::new("waypoint", "1", MetricsSettings::default());
    HttpScope::new(&metrics, peer("web"), None).count(&record(200, None), None);
    let count = || values(&parse(&metrics.encode()), "istio_requests_total").len();
    assert_eq!((count(), count()), (1, 1), "by default for ever");
    metrics.configure(&[], Some(Duration::ZERO));
    assert_eq!(count(), 0);
}
