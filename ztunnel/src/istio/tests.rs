//! Every variable that is followed changes what the ztunnel does.

use super::*;

fn environment(pairs: &[(&str, &str)]) -> Environment {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn of(pairs: &[(&str, &str)]) -> Settings {
    settings(&environment(pairs)).unwrap()
}

/// A variable, a value for it, and others that it needs beside it.
type Example = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

/// A value for each variable that is followed.
const EXAMPLES: &[Example] = &[
    ("ENABLE_PROXY", "false", &[]),
    ("PROXY_MODE", "dedicated", &[("PROXY_WORKLOAD_INFO", "a/web/x")]),
    ("PROXY_WORKLOAD_INFO", "b/web/x", &[("PROXY_MODE", "dedicated")]),
    ("NODE_NAME", "node-1", &[]),
    ("ISTIO_META_CLUSTER_ID", "east", &[]),
    ("CLUSTER_ID", "east", &[]),
    ("POD_NAME", "ztunnel-x", &[("POD_NAMESPACE", "istio-system"), ("SERVICE_ACCOUNT", "ztunnel")]),
    ("POD_NAMESPACE", "istio-system", &[("POD_NAME", "ztunnel-x"), ("SERVICE_ACCOUNT", "ztunnel")]),
    ("SERVICE_ACCOUNT", "ztunnel", &[("POD_NAME", "ztunnel-x"), ("POD_NAMESPACE", "istio-system")]),
    ("INSTANCE_IP", "10.0.0.9", &[]),
    ("XDS_ADDRESS", "istiod.example:15012", &[]),
    ("CA_ADDRESS", "ca.example:15012", &[]),
    ("XDS_ROOT_CA", "SYSTEM", &[]),
    ("CA_ROOT_CA", "/roots.pem", &[]),
    ("ALT_XDS_HOSTNAME", "istiod", &[]),
    ("ALT_CA_HOSTNAME", "istiod", &[]),
    ("AUTH_TOKEN", "/token", &[]),
    ("XDS_HEADER_*", "1", &[]),
    ("CA_HEADER_*", "1", &[]),
    ("SECRET_TTL", "1h", &[]),
    ("CRL_PATH", "/crl.pem", &[]),
    ("COMPLIANCE_POLICY", "pqc", &[]),
    ("LOCAL_XDS_PATH", "/mesh.yaml", &[("XDS_ADDRESS", "")]),
    ("LOCAL_XDS", "workloads: []", &[("XDS_ADDRESS", "")]),
    ("TRUST_DOMAIN", "corp", &[]),
    ("TRUST_DOMAIN_ALIASES", "old", &[]),
    ("CLUSTER_DOMAIN", "corp.example", &[]),
    ("ISTIO_META_DNS_CAPTURE", "false", &[("ISTIO_META_X", "1")]),
    ("ISTIO_META_*", "x", &[]),
    ("ISTIO_METAJSON_*", "{\"a\": 1}", &[]),
    ("PROXY_CONFIG", "discoveryAddress: other:15012", &[]),
    ("ZTUNNEL_WORKER_THREADS", "777", &[]),
    ("ZTUNNEL_CPU_LIMIT", "4000", &[]),
    ("ZTUNNEL_RESOURCE_CPU_LIMIT", "999", &[]),
    ("ZTUNNEL_RESOURCE_CPU_REQUEST", "998", &[]),
    ("PACKET_MARK", "7", &[]),
    ("INPOD_UDS", "/cni.sock", &[]),
    ("INPOD_PORT_REUSE", "false", &[]),
    ("ENABLE_ORIG_SRC", "false", &[]),
    ("IPV6_ENABLED", "false", &[]),
    ("HTTP2_STREAM_WINDOW_SIZE", "65536", &[]),
    ("HTTP2_CONNECTION_WINDOW_SIZE", "65536", &[]),
    ("HTTP2_FRAME_SIZE", "65536", &[]),
    ("POOL_MAX_STREAMS_PER_CONNECTION", "10", &[]),
    ("POOL_UNUSED_RELEASE_TIMEOUT", "10s", &[]),
    ("CONNECTION_TERMINATION_DEADLINE", "1m", &[]),
    ("TERMINATION_GRACE_PERIOD_SECONDS", "30", &[]),
    ("UNSTABLE_ENABLE_SOCKS5", "true", &[]),
    ("CAIRN_ACCESS_LOG_FILTER", "direction=inbound", &[]),
    ("CAIRN_ACCESS_LOG_SHARE", "10%", &[]),
    ("CAIRN_HANDOVER_SOCKET", "/handover.sock", &[]),
    ("CAIRN_XDS_SNAPSHOT", "/state", &[]),
    ("CAIRN_XDS_SNAPSHOT_SECONDS", "60", &[("CAIRN_XDS_SNAPSHOT", "/state")]),
    ("CAIRN_XDS_SNAPSHOT_WAIT_SECONDS", "0", &[("CAIRN_XDS_SNAPSHOT", "/state")]),
    ("XDS_ON_DEMAND", "true", &[("ISTIO_META_DNS_CAPTURE", "false")]),
    ("RUST_LOG", "debug", &[]),
    ("LOG_FORMAT", "json", &[]),
];

#[test]
fn every_variable_does_what_the_table_says() {
    for (name, usage) in VARIABLES {
        let example = EXAMPLES.iter().find(|(of, ..)| of == name);
        let set = name.replace('*', "EXAMPLE");
        match (usage, example) {
            (Followed, Some((_, value, beside))) => {
                let with: Vec<_> = beside.iter().copied().chain([(set.as_str(), *value)]).collect();
                let without = settings(&environment(beside));
                assert_ne!(Some(of(&with)), without.ok(), "{name} is not followed");
            }
            (Without(_), None) => {
                // Node metadata is passed on in any case.
                let without_metadata =
                    |pairs: &[(&str, &str)]| Settings { metadata: Vec::new(), ..of(pairs) };
                let (with, without) = (without_metadata(&[(&set, "1")]), without_metadata(&[]));
                assert_eq!(with, without, "{name} is followed");
            }
            (usage, example) => panic!("{name}: {usage:?}, {example:?}"),
        }
    }
    let known = |name: &&str| VARIABLES.iter().any(|(of, _)| of == name);
    assert!(EXAMPLES.iter().all(|(name, ..)| known(name)));
    assert_eq!(
        of(&[("ANYTHING_ELSE", "1"), ("KUBERNETES_PORT", "tcp://")]),
        of(&[]),
        "unknown ones are ignored"
    );
}

#[test]
fn a_mesh_in_a_file_stands_alone() {
    let file = ("LOCAL_XDS_PATH", "/mesh.yaml");
    for (beside, reason) in [
        (&[][..], "XDS_ADDRESS"),
        (&[("XDS_ADDRESS", "istiod:15012")], "XDS_ADDRESS"),
        (&[("XDS_ADDRESS", ""), ("LOCAL_XDS", "{}")], "both"),
        (
            &[("XDS_ADDRESS", ""), ("XDS_ON_DEMAND", "true"), ("ISTIO_META_DNS_CAPTURE", "false")],
            "XDS_ON_DEMAND",
        ),
        (&[("XDS_ADDRESS", ""), ("CAIRN_XDS_SNAPSHOT", "/state")], "CAIRN_XDS_SNAPSHOT"),
    ] {
        let with: Vec<_> = beside.iter().copied().chain([file]).collect();
        let refused = settings(&environment(&with)).unwrap_err().to_string();
        assert!(refused.contains(reason), "{beside:?}: {refused}");
    }
    assert_eq!(of(&[("XDS_ADDRESS", ""), file]).local, Some(LocalState::File("/mesh.yaml".into())));
}

/// What the chart sets, as a pod of the DaemonSet sees it.
#[test]
fn the_charts_environment_makes_a_ztunnel_of_its_node() {
    let chart = of(&[
        ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
        ("RUST_LOG", "info"),
        ("RUST_BACKTRACE", "1"),
        ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", "ztunnel-abc"),
        ("POD_NAMESPACE", "istio-system"),
        ("NODE_NAME", "node-1"),
        ("INSTANCE_IP", "10.0.0.9"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("ZTUNNEL_CPU_LIMIT", "8"),
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
    ]);
    let xds = chart.xds.clone().unwrap();
    assert_eq!(xds.address, "https://istiod.istio-system.svc:15012");
    assert_eq!(xds.roots, Roots::from("./var/run/secrets/istio/root-cert.pem"));
    assert_eq!(chart.ca, xds);
    assert_eq!(chart.token, Some(Token::from("./var/run/secrets/tokens/istio-token")));
    assert_eq!(chart.pods, PodSource::Cni(InPod::default()));
    assert_eq!((chart.workers, chart.drain), (2, Duration::from_secs(25)));
    assert_eq!((chart.admin_port, chart.metrics_port), (15000, 15020));
    assert!(chart.admin_address.is_loopback() && chart.address.is_unspecified());
    let told =
        |key: &str| chart.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
    for (key, value) in [
        ("NAME", "ztunnel-abc"),
        ("NAMESPACE", "istio-system"),
        ("INSTANCE_IPS", "10.0.0.9"),
        ("CLUSTER_ID", "Kubernetes"),
        ("ENABLE_HBONE", "true"),
    ] {
        assert_eq!(told(key), Some(value.into()), "{key}");
    }
}

#[test]
fn addresses_default_as_in_istio() {
    let kubernetes = ("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    let discovery = ("PROXY_CONFIG", "discoveryAddress: other:15012");
    for (name, pairs, xds, ca) in [
        ("elsewhere", vec![], Some("https://localhost:15012"), "https://localhost:15012"),
        (
            "in a cluster",
            vec![kubernetes],
            Some("https://istiod.istio-system.svc:15012"),
            "https://istiod.istio-system.svc:15012",
        ),
        (
            "the proxy's configuration is about xDS only",
            vec![kubernetes, discovery],
            Some("https://other:15012"),
            "https://istiod.istio-system.svc:15012",
        ),
        ("none", vec![("XDS_ADDRESS", "")], None, "https://localhost:15012"),
    ] {
        let found = of(&pairs);
        assert_eq!(found.xds.map(|xds| xds.address).as_deref(), xds, "{name}");
        assert_eq!(found.ca.address, ca, "{name}");
    }
}

#[test]
fn roots_and_tokens_are_files_or_themselves() {
    let pem = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----";
    assert_eq!(roots(Some(pem)), Roots::Text(pem.to_owned()));
    assert_eq!(roots(Some("SYSTEM")), Roots::System);
    assert_eq!(token(Some("./token")), Token::from("./token"));
    assert_eq!(token(Some("eyJhbGciOi")), Token::Text("eyJhbGciOi".to_owned()));
}

#[test]
fn workers_are_counted_as_in_istio() {
    for (name, pairs, expected) in [
        ("a quarter, at least two", vec![("ZTUNNEL_CPU_LIMIT", "4")], 2),
        ("a quarter, rounded up", vec![("ZTUNNEL_CPU_LIMIT", "13")], 4),
        (
            "the request if more",
            vec![("ZTUNNEL_CPU_LIMIT", "4"), ("ZTUNNEL_RESOURCE_CPU_REQUEST", "2500m")],
            3,
        ),
        ("the limit", vec![("ZTUNNEL_CPU_LIMIT", "64"), ("ZTUNNEL_RESOURCE_CPU_LIMIT", "500m")], 1),
        ("a number", vec![("ZTUNNEL_WORKER_THREADS", "5")], 5),
        ("all", vec![("ZTUNNEL_CPU_LIMIT", "6"), ("ZTUNNEL_WORKER_THREADS", "0")], 6),
        ("a share", vec![("ZTUNNEL_CPU_LIMIT", "10"), ("ZTUNNEL_WORKER_THREADS", "25%")], 3),
        ("the proxy's configuration", vec![("PROXY_CONFIG", "concurrency: 4")], 4),
        ("all by configuration", vec![("ZTUNNEL_CPU_LIMIT", "6"), ("PROXY_CONFIG", "concurrency: 0")], 6),
    ] {
        assert_eq!(of(&pairs).workers, expected, "{name}");
    }
}

#[test]
fn the_drain_ends_before_the_grace_period() {
    let grace = "TERMINATION_GRACE_PERIOD_SECONDS";
    for (pairs, seconds) in [
        (vec![], 5),
        (vec![(grace, "30")], 25),
        (vec![(grace, "11")], 6),
        (vec![(grace, "10")], 9),
        (vec![(grace, "1")], 0),
        (vec![(grace, "0")], 0),
        (vec![(grace, "30"), ("CONNECTION_TERMINATION_DEADLINE", "2m")], 120),
    ] {
        assert_eq!(of(&pairs).drain, Duration::from_secs(seconds), "{pairs:?}");
    }
}

#[test]
fn what_cannot_be_understood_is_refused() {
    let on_demand = [("XDS_ON_DEMAND", "true"), ("ISTIO_META_DNS_CAPTURE", "false")];
    assert!(of(&on_demand).on_demand);
    let with_file: Vec<_> = on_demand.into_iter().chain([("CAIRN_XDS_SNAPSHOT", "/state")]).collect();
    assert!(settings(&environment(&with_file)).is_err(), "no state is kept of what is asked for");
    for pair in [
        ("XDS_ON_DEMAND", "true"),
        ("PROXY_MODE", "both"),
        ("PROXY_MODE", "dedicated"),
        ("IPV6_ENABLED", "perhaps"),
        ("SECRET_TTL", "soon"),
        ("SECRET_TTL", "5"),
        ("INSTANCE_IP", "here"),
        ("ZTUNNEL_WORKER_THREADS", "200%"),
        ("PROXY_CONFIG", "concurrency: many"),
        ("ISTIO_METAJSON_X", "{"),
        ("HTTP2_STREAM_WINDOW_SIZE", "2147483648"),
        ("HTTP2_CONNECTION_WINDOW_SIZE", "0"),
        ("HTTP2_FRAME_SIZE", "8192"),
        ("HTTP2_FRAME_SIZE", "16777216"),
    ] {
        assert!(settings(&environment(&[pair])).is_err(), "{pair:?}");
    }
    for (text, expected) in [("1h30m", 5400), ("1d", 86_400), ("90s", 90)] {
        assert_eq!(duration(text), Some(Duration::from_secs(expected)), "{text}");
    }
    assert_eq!(duration("250ms"), Some(Duration::from_millis(250)));
}

#[test]
fn the_names_of_the_trust_domain_are_the_meshs_unless_the_environment_says_others() {
    let mesh: MeshConfig = serde_saphyr::from_str(
        "trustDomain: corp\ntrustDomainAliases: [old, older]\ndefaultConfig: {concurrency: 3}\nother: 1",
    )
    .unwrap();
    assert_eq!(mesh.default_config.concurrency, Some(3));
    for (what, pairs, domain, aliases) in [
        ("the file", &[][..], "corp", &["old", "older"][..]),
        ("other aliases", &[("TRUST_DOMAIN_ALIASES", " a, b,,")], "corp", &["a", "b"]),
        ("another name", &[("TRUST_DOMAIN", "new")], "new", &["old", "older"]),
    ] {
        let environment = environment(pairs);
        let read = mesh_settings(&Reader(&environment), &mesh);
        assert_eq!(&*read.trust_domain, domain, "{what}");
        assert_eq!(
            read.trust_domain_aliases.iter().map(|alias| &**alias).collect::<Vec<_>>(),
            aliases,
            "{what}"
        );
    }
    let plain = of(&[]).mesh;
    assert_eq!(plain, MeshSettings::default());
}

#[test]
fn a_ztunnel_that_was_succeeded_stays_where_it_would_be_started_anew() {
    let socket = ("CAIRN_HANDOVER_SOCKET", "/run/handover.sock");
    for (name, pairs, expected) in [
        ("not asked for", vec![], None),
        ("on a machine", vec![socket], Some(Afterwards::End)),
        ("in a cluster", vec![socket, ("KUBERNETES_SERVICE_HOST", "10.96.0.1")], Some(Afterwards::Stay)),
    ] {
        let handover = of(&pairs).handover;
        assert_eq!(handover.map(|handover| handover.afterwards), expected, "{name}");
    }
}
