//! What is asked of DNS, and what the mesh answers to it.

use super::*;
use cairn_mesh::{Change, Identity, NetworkAddress, ResourceName, Service, Store};

fn workload(namespace: &str, name: &str, addresses: &[&str]) -> Workload {
    Workload {
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        ..Workload::new(
            format!("Kubernetes//Pod/{namespace}/{name}"),
            name,
            Identity::new("cluster.local", namespace, "x").unwrap(),
        )
    }
}

fn service(namespace: &str, hostname: &str, vips: &[&str]) -> Service {
    Service {
        name: hostname.split('.').next().unwrap().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        vips: vips
            .iter()
            .map(|vip| NetworkAddress { network: "".into(), address: vip.parse().unwrap() })
            .collect(),
        ports: vec![ServicePort { port: 80, target_port: 8080, protocol: AppProtocol::Http11 }],
        canonical: hostname.ends_with(".svc.cluster.local"),
        ..Service::default()
    }
}

fn snapshot() -> Snapshot {
    let mut store = Store::new();
    let headless = "db.a.svc.cluster.local";
    let mut pods = vec![
        workload("a", "db-0", &["10.0.0.1", "fd00::1"]),
        workload("a", "db-1", &["10.0.0.2"]),
        workload("a", "both-0", &["10.0.0.9", "fd00::9"]),
        workload("a", "client", &["10.0.0.3"]),
    ];
    let behind = |name: &str| (ResourceName::new("a", name), Vec::new());
    for pod in pods.iter_mut().take(2) {
        pod.services = vec![behind(headless)];
    }
    pods[2].services = vec![behind("four.a.svc.cluster.local"), behind("six.a.svc.cluster.local")];
    store.apply(pods.into_iter().map(Change::Workload));
    store.apply(
        [
            service("a", headless, &[]),
            Service { ip_families: IpFamilies::V4, ..service("a", "four.a.svc.cluster.local", &[]) },
            Service { ip_families: IpFamilies::V6, ..service("a", "six.a.svc.cluster.local", &[]) },
            service("a", "echo.a.svc.cluster.local", &["10.96.0.1", "fd96::1"]),
            service("b", "echo.b.svc.cluster.local", &["10.96.0.2"]),
            service("b", "api.example.com", &["10.96.0.3"]),
            service("a", "shared.example.com", &["10.96.0.4"]),
            service("b", "shared.example.com", &["10.96.0.5"]),
            service("b", "*.wild.example.com", &["10.96.0.6"]),
            service("b", "nowhere.example.com", &[]),
        ]
        .map(Change::Service),
    );
    store.snapshot()
}

fn told(name: &str, kind: u16) -> Option<String> {
    let snapshot = snapshot();
    let client = workload("a", "client", &["10.0.0.3"]);
    let records = lookup(&snapshot, &client, name, kind, &mut |_: u64| 0)?;
    let mut texts: Vec<String> = records
        .into_iter()
        .map(|(owner, record)| {
            let record = match record {
                Record::A(address) => address.to_string(),
                Record::Aaaa(address) => address.to_string(),
                Record::Cname(name) => format!("={name}"),
                Record::Srv(port, host) => format!("{host}:{port}"),
            };
            if owner == name { record } else { format!("{owner} {record}") }
        })
        .collect();
    texts.sort();
    Some(texts.join(", "))
}

#[test]
fn names_are_answered_as_kubernetes_would_find_them() {
    for (name, kind, expected) in [
        // In full.
        ("echo.a.svc.cluster.local", A, Some("10.96.0.1")),
        ("echo.a.svc.cluster.local", AAAA, Some("fd96::1")),
        ("echo.b.svc.cluster.local", A, Some("10.96.0.2")),
        ("echo.b.svc.cluster.local", AAAA, Some("")),
        ("api.example.com", A, Some("10.96.0.3")),
        // Shorter.
        ("echo", A, Some("10.96.0.1")),
        ("echo.a", A, Some("10.96.0.1")),
        ("echo.b", A, Some("10.96.0.2")),
        ("echo.b.svc", A, Some("10.96.0.2")),
        // With a search domain, as a pod's resolver tries them.
        ("echo.b.a.svc.cluster.local", A, Some("=echo.b, echo.b 10.96.0.2")),
        ("echo.b.svc.svc.cluster.local", A, Some("=echo.b.svc, echo.b.svc 10.96.0.2")),
        ("api.example.com.a.svc.cluster.local", A, Some("=api.example.com, api.example.com 10.96.0.3")),
        ("api.example.com.svc.cluster.local", A, Some("=api.example.com, api.example.com 10.96.0.3")),
        ("api.example.com.cluster.local", A, Some("=api.example.com, api.example.com 10.96.0.3")),
        ("api.example.com.cluster.local", AAAA, Some("")),
        // One's own namespace first.
        ("shared.example.com", A, Some("10.96.0.4")),
        // Patterns, at any depth, and never with another name for it.
        ("x.wild.example.com", A, Some("10.96.0.6")),
        ("y.x.wild.example.com", A, Some("10.96.0.6")),
        ("x.wild.example.com.a.svc.cluster.local", A, Some("10.96.0.6")),
        ("wild.example.com", A, None),
        // Headless: its pods, together and one by one.
        ("db", A, Some("10.0.0.1, 10.0.0.2")),
        ("db.a.svc.cluster.local", AAAA, Some("fd00::1")),
        ("db-0.db.a.svc.cluster.local", A, Some("10.0.0.1")),
        ("db-0.db.a.svc.cluster.local", AAAA, Some("fd00::1")),
        ("db-1.db.a.svc.cluster.local", AAAA, Some("")),
        ("db-1.db", A, Some("10.0.0.2")),
        ("db-1.db.a", A, Some("10.0.0.2")),
        ("db-1.db.a.svc", A, Some("10.0.0.2")),
        ("10-0-0-2.db.a.svc.cluster.local", A, Some("10.0.0.2")),
        ("db-2.db.a.svc.cluster.local", A, None),
        ("db-0.echo.a.svc.cluster.local", A, None),
        // Of its families only, whatever else its pods have.
        ("four", A, Some("10.0.0.9")),
        ("four", AAAA, Some("")),
        ("six", A, Some("")),
        ("six", AAAA, Some("fd00::9")),
        ("both-0.six.a", A, Some("")),
        ("both-0.six.a", AAAA, Some("fd00::9")),
        // Ports, by what they carry or by number.
        ("_http._tcp.echo.a.svc.cluster.local", SRV, Some("echo.a.svc.cluster.local:80")),
        ("_80._tcp.api.example.com", SRV, Some("api.example.com:80")),
        ("_http._tcp.db", SRV, Some("db-0.db.a.svc.cluster.local:8080, db-1.db.a.svc.cluster.local:8080")),
        ("_web._tcp.echo.a.svc.cluster.local", SRV, None),
        ("_http._udp.echo.a.svc.cluster.local", SRV, None),
        ("echo.a.svc.cluster.local", SRV, None),
        // Others'.
        ("nowhere.example.com", A, None),
        ("www.example.com", A, None),
        ("missing.a.svc.cluster.local", A, None),
        ("echo.a.svc.cluster.local", 16, None),
        ("", A, None),
        ("echo\\046a", A, None),
    ] {
        assert_eq!(told(name, kind).as_deref(), expected, "{name} {kind}");
    }
}

#[test]
fn every_address_comes_first_now_and_then() {
    let snapshot = snapshot();
    let client = workload("a", "client", &["10.0.0.3"]);
    let first = |seed: u64| {
        let mut random = fastrand::Rng::with_seed(seed);
        let records = lookup(&snapshot, &client, "db", A, &mut |bound: u64| random.u64(..bound)).unwrap();
        format!("{:?}", records.first().unwrap().1)
    };
    let seen: std::collections::BTreeSet<String> = (0..64).map(first).collect();
    assert_eq!(seen.len(), 2, "{seen:?}");
}
