//! Bytes written by hand from the wire's tables, decoded and encoded again.

use crate::{ca, discovery, mcp, security, workload};
use prost::Message;
use std::fmt::Debug;

/// `golden` is exactly what `expected` looks like on the wire.
#[track_caller]
fn check<M: Message + Default + PartialEq + Debug>(golden: &[u8], expected: M) {
    assert_eq!(M::decode(golden).expect("golden bytes decode"), expected);
    assert_eq!(expected.encode_to_vec(), golden);
}

/// One length-delimited field.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let key = u32::from(number) << 3 | 2;
    let mut bytes = varint(key);
    bytes.extend(varint(u32::try_from(content.len()).expect("short")));
    bytes.extend_from_slice(content);
    bytes
}

/// One integer field.
fn number(number: u8, value: u32) -> Vec<u8> {
    let mut bytes = varint(u32::from(number) << 3);
    bytes.extend(varint(value));
    bytes
}

fn varint(mut value: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

#[test]
fn field_helper_writes_what_the_encoding_says() {
    assert_eq!(field(2, b"testing"), b"\x12\x07testing");
    assert_eq!(number(1, 150), [0x08, 0x96, 0x01]);
}

#[test]
fn discovery_request_has_the_numbers_of_delta_ads() {
    let golden = [
        field(1, &field(1, b"ztunnel~1.1.1.1")),
        field(2, b"t/x"),
        field(3, b"a"),
        field(4, b"*"),
        field(5, &[field(1, b"n"), field(2, b"v")].concat()),
        field(6, b"n1"),
        field(7, &[number(1, 3), field(2, b"bad")].concat()),
    ];
    check(
        &golden.concat(),
        discovery::DeltaDiscoveryRequest {
            node: Some(discovery::Node { id: "ztunnel~1.1.1.1".into(), ..Default::default() }),
            type_url: "t/x".into(),
            resource_names_subscribe: vec!["a".into()],
            resource_names_unsubscribe: vec!["*".into()],
            initial_resource_versions: [("n".to_owned(), "v".to_owned())].into(),
            response_nonce: "n1".into(),
            error_detail: Some(discovery::Status { code: 3, message: "bad".into(), details: Vec::new() }),
        },
    );
}

#[test]
fn discovery_response_has_the_numbers_of_delta_ads() {
    let any = [field(1, b"t/x"), field(2, b"\x08\x01")].concat();
    let golden = [
        field(1, b"g7"),
        field(2, &[field(1, b"v1"), field(2, &any), field(3, b"ns/n"), field(4, b"al")].concat()),
        field(4, b"t/x"),
        field(5, b"nonce"),
        field(6, b"gone"),
    ];
    check(
        &golden.concat(),
        discovery::DeltaDiscoveryResponse {
            system_version_info: "g7".into(),
            resources: vec![discovery::Resource {
                version: "v1".into(),
                resource: Some(prost_types::Any { type_url: "t/x".into(), value: vec![8, 1] }),
                name: "ns/n".into(),
                aliases: vec!["al".into()],
            }],
            type_url: "t/x".into(),
            nonce: "nonce".into(),
            removed_resources: vec!["gone".into()],
        },
    );
}

#[test]
fn status_detail_names_the_resources() {
    let golden = field(1, &[field(1, b"ns/n"), field(2, b"why")].concat());
    let violation =
        discovery::bad_request::FieldViolation { field: "ns/n".into(), description: "why".into() };
    check(&golden, discovery::BadRequest { field_violations: vec![violation] });
}

#[test]
fn workload_has_the_numbers_of_the_workload_api() {
    let gateway = [field(1, &[field(1, b"ns"), field(2, b"wp.ns")].concat()), number(3, 15008)].concat();
    let ports = field(1, &[number(1, 80), number(2, 8080), number(3, 1)].concat());
    let content = [
        field(1, b"echo-1"),
        field(2, b"b"),
        field(3, &[10, 0, 2, 7]),
        field(4, b"net"),
        number(5, 1),
        field(6, b"td"),
        field(7, b"echo"),
        field(8, &gateway),
        field(9, b"node"),
        field(10, b"echo"),
        field(11, b"v1"),
        number(12, 2),
        field(13, b"echo"),
        number(14, 1),
        field(16, b"b/allow"),
        number(17, 1),
        field(18, b"Kubernetes"),
        field(20, b"Kubernetes//Pod/b/echo-1"),
        field(21, b"host"),
        field(22, &[field(1, b"b/echo.b"), field(2, &ports)].concat()),
        field(23, &[number(1, 1), number(2, 9)].concat()),
        field(24, &[field(1, b"r"), field(2, b"z"), field(3, b"s")].concat()),
        number(25, 1),
        field(27, &number(1, 5)),
    ];
    let port = workload::Port { service_port: 80, target_port: 8080, app_protocol: 1 };
    let hostname = workload::NamespacedHostname { namespace: "ns".into(), hostname: "wp.ns".into() };
    let expected = workload::Workload {
        name: "echo-1".into(),
        namespace: "b".into(),
        addresses: vec![vec![10, 0, 2, 7]],
        network: "net".into(),
        tunnel_protocol: workload::TunnelProtocol::Hbone.into(),
        trust_domain: "td".into(),
        service_account: "echo".into(),
        waypoint: Some(workload::GatewayAddress {
            hbone_mtls_port: 15008,
            destination: Some(workload::gateway_address::Destination::Hostname(hostname)),
        }),
        node: "node".into(),
        canonical_name: "echo".into(),
        canonical_revision: "v1".into(),
        workload_type: workload::WorkloadType::Pod.into(),
        workload_name: "echo".into(),
        native_tunnel: true,
        authorization_policies: vec!["b/allow".into()],
        status: workload::WorkloadStatus::Unhealthy.into(),
        cluster_id: "Kubernetes".into(),
        network_gateway: None,
        uid: "Kubernetes//Pod/b/echo-1".into(),
        hostname: "host".into(),
        services: [("b/echo.b".to_owned(), workload::PortList { ports: vec![port] })].into(),
        application_tunnel: Some(workload::ApplicationTunnel { protocol: 1, port: 9 }),
        locality: Some(workload::Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() }),
        network_mode: workload::NetworkMode::HostNetwork.into(),
        extensions: Vec::new(),
        capacity: Some(5),
    };
    let address = workload::Address { r#type: Some(workload::address::Type::Workload(expected)) };
    check(&field(1, &content.concat()), address);
}

#[test]
fn service_has_the_numbers_of_the_workload_api() {
    let vip = [field(1, b"net"), field(2, &[10, 96, 0, 10]), number(3, 32)].concat();
    let gateway = [field(2, &field(2, &[10, 0, 3, 3])), number(3, 15008)].concat();
    let content = [
        field(1, b"echo"),
        field(2, b"b"),
        field(3, b"echo.b"),
        field(4, &vip),
        field(5, &[number(1, 80), number(2, 8080)].concat()),
        field(6, b"spiffe://td/ns/b/sa/echo"),
        field(7, &gateway),
        field(8, &[field(1, &[6, 1]), number(2, 2), number(3, 1)].concat()),
        number(9, 3),
        field(10, &field(1, b"ext")),
        number(11, 1),
        number(12, 1),
        field(13, &[field(1, &number(3, 1)), number(2, 7)].concat()),
        number(14, 1),
    ];
    let address = workload::NetworkAddress { address: vec![10, 0, 3, 3], ..Default::default() };
    let expected = workload::Service {
        name: "echo".into(),
        namespace: "b".into(),
        hostname: "echo.b".into(),
        addresses: vec![workload::NetworkAddress {
            network: "net".into(),
            address: vec![10, 96, 0, 10],
            length: Some(32),
        }],
        ports: vec![workload::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        subject_alt_names: vec!["spiffe://td/ns/b/sa/echo".into()],
        waypoint: Some(workload::GatewayAddress {
            hbone_mtls_port: 15008,
            destination: Some(workload::gateway_address::Destination::Address(address)),
        }),
        load_balancing: Some(workload::LoadBalancing {
            routing_preference: vec![
                workload::load_balancing::Scope::Network.into(),
                workload::load_balancing::Scope::Region.into(),
            ],
            mode: workload::load_balancing::Mode::Failover.into(),
            health_policy: workload::load_balancing::HealthPolicy::AllowAll.into(),
        }),
        ip_families: workload::IpFamilies::Dual.into(),
        extensions: vec![workload::Extension { name: "ext".into(), config: None }],
        canonical: true,
        ingress_use_waypoint: true,
        weighted_waypoints: vec![workload::WeightedWaypoint {
            destination: Some(workload::GatewayAddress { hbone_mtls_port: 1, destination: None }),
            weight: 7,
        }],
        visibility: workload::Visibility::Namespace.into(),
    };
    let address = workload::Address { r#type: Some(workload::address::Type::Service(expected)) };
    check(&field(2, &content.concat()), address);
}

#[test]
fn authorization_has_the_numbers_of_the_security_api() {
    let text = |kind: u8, value: &[u8]| field(kind, value);
    let address = [field(1, &[10, 0, 0, 0]), number(2, 8)].concat();
    let account = [field(1, b"ns"), field(2, b"sa")].concat();
    let one = [
        field(1, &text(1, b"e")),
        field(2, &text(2, b"p")),
        field(3, &text(3, b"s")),
        field(4, &text(4, b"")),
        field(5, &address),
        field(6, &address),
        field(7, &address),
        field(8, &address),
        field(9, &[80]),
        field(10, &[81]),
        field(11, &account),
        field(12, &account),
        field(13, &field(1, b"ext")),
    ];
    let rule = field(1, &field(2, &one.concat()));
    let golden =
        [field(1, b"n"), field(2, b"ns"), number(3, 2), number(4, 1), field(5, &rule), number(6, 1)].concat();

    use security::string_match::MatchType;
    let text = |kind| vec![security::StringMatch { match_type: Some(kind) }];
    let block = || vec![security::Address { address: vec![10, 0, 0, 0], length: 8 }];
    let account =
        || vec![security::ServiceAccountMatch { namespace: "ns".into(), service_account: "sa".into() }];
    let expected = security::Match {
        namespaces: text(MatchType::Exact("e".into())),
        not_namespaces: text(MatchType::Prefix("p".into())),
        principals: text(MatchType::Suffix("s".into())),
        not_principals: text(MatchType::Presence(())),
        source_ips: block(),
        not_source_ips: block(),
        destination_ips: block(),
        not_destination_ips: block(),
        destination_ports: vec![80],
        not_destination_ports: vec![81],
        service_accounts: account(),
        not_service_accounts: account(),
        extensions: vec![workload::Extension { name: "ext".into(), config: None }],
    };
    check(
        &golden,
        security::Authorization {
            name: "n".into(),
            namespace: "ns".into(),
            scope: security::Scope::WorkloadSelector.into(),
            action: security::Action::Deny.into(),
            rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![expected] }] }],
            dry_run: true,
            extensions: Vec::new(),
        },
    );
}

#[test]
fn certificate_messages_have_the_numbers_of_the_ca() {
    let value = field(3, b"spiffe://td/ns/a/sa/x");
    let entry = [field(1, b"ImpersonatedIdentity"), field(2, &value)].concat();
    let golden = [field(1, b"PEM"), number(3, 86_400), field(4, &field(1, &entry))].concat();
    let kind = prost_types::value::Kind::StringValue("spiffe://td/ns/a/sa/x".into());
    let value = prost_types::Value { kind: Some(kind) };
    check(
        &golden,
        ca::IstioCertificateRequest {
            csr: "PEM".into(),
            validity_duration: 86_400,
            metadata: Some(prost_types::Struct {
                fields: [("ImpersonatedIdentity".to_owned(), value)].into(),
            }),
        },
    );
    let golden = [field(1, b"leaf"), field(1, b"root")].concat();
    check(&golden, ca::IstioCertificateResponse { cert_chain: vec!["leaf".into(), "root".into()] });
}

#[test]
fn envelope_has_the_numbers_of_mcp() {
    let label = [field(1, b"app"), field(2, b"echo")].concat();
    let metadata =
        [field(1, b"ns/n"), field(2, &number(1, 60)), field(3, b"v1"), field(4, &label), field(5, &label)];
    let body = [field(1, b"t/x"), field(2, b"\x08\x01")].concat();
    let golden = [field(1, &metadata.concat()), field(2, &body)].concat();
    let map = || [("app".to_owned(), "echo".to_owned())].into();
    check(
        &golden,
        mcp::Resource {
            metadata: Some(mcp::Metadata {
                name: "ns/n".into(),
                create_time: Some(prost_types::Timestamp { seconds: 60, nanos: 0 }),
                version: "v1".into(),
                labels: map(),
                annotations: map(),
            }),
            body: Some(prost_types::Any { type_url: "t/x".into(), value: vec![8, 1] }),
        },
    );
}
