//! Workloads and services through the wire and back, and what is refused or defaulted on the way in.

use super::*;
use proptest::prelude::*;

fn identity() -> Identity {
    Identity::new("td", "b", "echo").unwrap()
}

fn full_workload() -> Workload {
    Workload {
        addresses: vec!["10.0.2.7".parse().unwrap(), "fd00::7".parse().unwrap()],
        network: "net".into(),
        protocol: TunnelProtocol::Hbone,
        waypoint: Some(GatewayAddress {
            target: GatewayTarget::Hostname(ResourceName::new("b", "wp.b")),
            hbone_port: 15008,
        }),
        network_gateway: Some(GatewayAddress {
            target: GatewayTarget::Address(NetworkAddress {
                network: "n2".into(),
                address: "10.9.9.9".parse().unwrap(),
            }),
            hbone_port: 15009,
        }),
        node: "node-1".into(),
        canonical_name: "echo".into(),
        canonical_revision: "v1".into(),
        kind: WorkloadKind::Deployment,
        workload_name: "echo".into(),
        native_tunnel: true,
        authorization_policies: vec![ResourceName::new("b", "allow")],
        health: Health::Unhealthy,
        cluster_id: "c1".into(),
        locality: Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() },
        services: vec![(
            ResourceName::new("b", "echo.b"),
            vec![PortMapping { service_port: 80, target_port: 8080 }],
        )],
        capacity: 7,
        hostname: "echo.example".into(),
        application_tunnel: Some(ApplicationTunnel { handover: TunnelHandover::Proxy, port: Some(15088) }),
        network_mode: NetworkMode::Host,
        ..Workload::new("c1//Pod/b/echo-1", "echo-1", identity())
    }
}

fn full_service() -> Service {
    Service {
        name: "echo".into(),
        namespace: "b".into(),
        hostname: "echo.b".into(),
        vips: vec![NetworkAddress { network: "net".into(), address: "10.96.0.10".parse().unwrap() }],
        ports: vec![
            ServicePort { port: 80, target_port: 8080, protocol: AppProtocol::Http11 },
            ServicePort { port: 81, target_port: 0, protocol: AppProtocol::Grpc },
        ],
        subject_alt_names: vec![identity()],
        waypoint: full_workload().network_gateway,
        load_balancing: LoadBalancing {
            mode: LoadBalancingMode::Failover,
            scopes: vec![RoutingScope::Network, RoutingScope::Region, RoutingScope::Node],
            health: HealthPolicy::AllowAll,
        },
        canonical: true,
        blocks: vec![NetworkBlock { network: "net".into(), block: "10.97.0.0/16".parse().unwrap() }],
        weighted_waypoints: vec![
            WeightedWaypoint { waypoint: full_workload().waypoint.unwrap(), weight: 90 },
            WeightedWaypoint { waypoint: full_workload().network_gateway.unwrap(), weight: 10 },
        ],
        ip_families: IpFamilies::V6,
        visibility: Visibility::Namespace,
        ingress_use_waypoint: true,
    }
}

#[test]
fn workloads_survive_the_wire() {
    for (name, workload) in [
        ("every field", full_workload()),
        ("as few fields as possible", Workload::new("u", "n", identity())),
        ("capacity 0", Workload { capacity: 0, ..full_workload() }),
        ("cron job", Workload { kind: WorkloadKind::CronJob, ..full_workload() }),
        ("job", Workload { kind: WorkloadKind::Job, ..full_workload() }),
        (
            "a tunnel to its own port",
            Workload {
                application_tunnel: Some(ApplicationTunnel { handover: TunnelHandover::None, port: None }),
                ..full_workload()
            },
        ),
    ] {
        assert_eq!(workload_from_proto(workload_to_proto(&workload)).unwrap(), workload, "{name}");
    }
}

#[test]
fn services_survive_the_wire() {
    let modes = [LoadBalancingMode::Standard, LoadBalancingMode::Strict, LoadBalancingMode::Passthrough];
    let with = |mode| Service {
        load_balancing: LoadBalancing { mode, ..LoadBalancing::default() },
        ..full_service()
    };
    let families = [IpFamilies::Automatic, IpFamilies::V4, IpFamilies::Dual];
    let of_families = families.map(|ip_families| Service { ip_families, ..full_service() });
    let plain = Service { hostname: "echo".into(), namespace: "b".into(), ..Service::default() };
    for service in modes.map(with).into_iter().chain(of_families).chain([full_service(), plain]) {
        assert_eq!(service_from_proto(service_to_proto(&service)).unwrap(), service);
    }
}

#[test]
fn what_is_not_said_has_istios_defaults() {
    let workload = workload_from_proto(wire::Workload {
        uid: "u".into(),
        namespace: "ns".into(),
        ..wire::Workload::default()
    })
    .unwrap();
    assert_eq!(workload.identity.as_str(), "spiffe://cluster.local/ns/ns/sa/default");
    assert_eq!(&*workload.cluster_id, "Kubernetes");
    assert_eq!(workload.capacity, 1);
    assert_eq!(workload.protocol, TunnelProtocol::None);
}

#[test]
fn unusable_workloads_are_refused() {
    let good = || workload_to_proto(&full_workload());
    let port = |service_port| wire::PortList {
        ports: vec![wire::Port { service_port, target_port: 1, app_protocol: 0 }],
    };
    for (name, workload) in [
        ("no uid", wire::Workload { uid: String::new(), ..good() }),
        ("no namespace", wire::Workload { namespace: String::new(), ..good() }),
        ("an address of 5 bytes", wire::Workload { addresses: vec![vec![0; 5]], ..good() }),
        ("Istio's legacy mTLS", wire::Workload { tunnel_protocol: 2, ..good() }),
        ("a tunnel of the future", wire::Workload { tunnel_protocol: 9, ..good() }),
        ("a policy without namespace", wire::Workload { authorization_policies: vec!["p".into()], ..good() }),
        (
            "a port above 65535",
            wire::Workload { services: [("a/b".to_owned(), port(65_536))].into(), ..good() },
        ),
        (
            "a service without namespace",
            wire::Workload { services: [("b".to_owned(), port(1))].into(), ..good() },
        ),
        ("a gateway nowhere", wire::Workload { waypoint: Some(wire::GatewayAddress::default()), ..good() }),
    ] {
        assert!(workload_from_proto(workload).is_err(), "{name}");
    }
    assert!(address_from_proto(wire::Address { r#type: None }).is_err());
}

#[test]
fn unknown_values_that_harm_nothing_are_tolerated() {
    let from = wire::Workload {
        workload_type: 77,
        status: 78,
        network_mode: 79,
        ..workload_to_proto(&full_workload())
    };
    let workload = workload_from_proto(from).unwrap();
    assert_eq!((workload.kind, workload.health), (WorkloadKind::Deployment, Health::Healthy));
    let from = wire::Service {
        subject_alt_names: vec!["spiffe://other/form".into(), identity().to_string()],
        visibility: 9,
        ..service_to_proto(&full_service())
    };
    assert_eq!(service_from_proto(from).unwrap().subject_alt_names, [identity()]);
}

#[test]
fn addresses_with_a_prefix_are_ranges() {
    for (name, address, length, expected) in [
        ("no length", vec![10, 0, 0, 1], None, Some("10.0.0.1")),
        ("full length", vec![10, 0, 0, 1], Some(32), Some("10.0.0.1")),
        ("a range", vec![10, 0, 0, 9], Some(24), Some("10.0.0.0/24")),
        ("everything", vec![0, 0, 0, 0], Some(0), Some("0.0.0.0/0")),
        ("full length of IPv6", vec![0; 16], Some(128), Some("::")),
        ("a range of IPv6", vec![0; 16], Some(32), Some("::/32")),
        (
            "IPv4 in IPv6",
            "::ffff:10.0.0.0".parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec(),
            Some(120),
            Some("10.0.0.0/24"),
        ),
        ("a prefix too long", vec![10, 0, 0, 1], Some(33), None),
        ("a prefix out of all proportion", vec![10, 0, 0, 1], Some(u32::MAX), None),
    ] {
        let vip = wire::NetworkAddress { network: String::new(), address, length };
        let from = wire::Service { addresses: vec![vip], ..service_to_proto(&full_service()) };
        let found = service_from_proto(from).ok().map(|service| {
            let vips = service.vips.iter().map(|vip| vip.address.to_string());
            vips.chain(service.blocks.iter().map(|one| one.block.to_string())).collect::<Vec<_>>().join(" ")
        });
        assert_eq!(found.as_deref(), expected, "{name}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        use prost::Message;
        if let Ok(address) = wire::Address::decode(bytes.as_slice()) {
            // What comes of it is judged elsewhere.
            let _ = address_from_proto(address);
        }
    }

    #[test]
    fn generated_workloads_survive_the_wire(
        name in "[a-z]{1,8}",
        octets in any::<[u8; 4]>(),
        capacity in any::<u32>(),
        ports in proptest::collection::vec(any::<(u16, u16)>(), 0..4),
    ) {
        let mapping = |(service_port, target_port)| PortMapping { service_port, target_port };
        let workload = Workload {
            addresses: vec![octets.into()],
            capacity,
            services: vec![(ResourceName::new("b", name.as_str()), ports.into_iter().map(mapping).collect())],
            ..Workload::new(name.as_str(), name.as_str(), identity())
        };
        prop_assert_eq!(workload_from_proto(workload_to_proto(&workload)).unwrap(), workload);
    }
}
