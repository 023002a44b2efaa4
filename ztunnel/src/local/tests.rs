//! What is written in a file is what the mesh is.

use super::*;
use cairn_mesh::{GatewayTarget, Health, LoadBalancingMode, NetworkMode, PolicyAction, TunnelProtocol};
use std::path::PathBuf;

fn text(text: &str) -> Result<Snapshot> {
    read(&LocalState::Text(text.to_owned()), &MeshSettings::default())
}

/// Why a text is refused, from the outermost reason to the innermost.
fn refused(of: &str) -> String {
    let Err(error) = text(of) else { panic!("{of} is taken") };
    format!("{error:#}")
}

const MESH: &str = r#"
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: web
  workloadIps: [10.0.0.1, "2001:db8::1"]
  network: net
  node: here
  protocol: HBONE
  workloadType: deployment
  networkMode: HostNetwork
  status: Unhealthy
  capacity: 3
  authorizationPolicies: [default/only-web]
  waypoint: { destination: net/10.0.0.9, hboneMtlsPort: 15008 }
  networkGateway: { destination: istio-gateways/east.example.com, hboneMtlsPort: 15009 }
  applicationTunnel: { protocol: PROXY, port: 15088 }
  locality: { region: r, zone: z }
  services: { default/example.com: { 80: 8080 } }
- name: plain
  namespace: default
  workloadIps: [10.0.0.2]
  protocol: TCP
services:
- name: example
  namespace: default
  hostname: example.com
  vips: [net/10.1.0.1, /10.1.0.2]
  cidrVips: [net/10.2.0.0/16]
  ports: { 80: 8080, 443: 8443 }
  subjectAltNames: ["spiffe://cluster.local/ns/default/sa/web"]
  loadBalancer: { routingPreferences: [Network, Region], mode: Failover, healthPolicy: AllowAll }
  ipFamilies: Ipv4Only
  weightedWaypoints: [{ destination: { destination: default/waypoint.example.com, hboneMtlsPort: 15008 }, weight: 7 }]
  canonical: true
  visibility: Namespace
policies:
- name: only-web
  namespace: default
  scope: WorkloadSelector
  action: Allow
  rules:
  - - - principals: [{ exact: cluster.local/ns/default/sa/web }, { Prefix: cluster.local/ns/a }]
        notNamespaces: [{ suffix: -test }]
        serviceAccounts: [{ namespace: default, serviceAccount: web }]
      - sourceIps: [10.0.0.0/8, "2001:db8::2"]
    - - destinationPorts: [8080]
"#;

#[test]
fn a_mesh_is_read_whole() {
    let mesh = text(MESH).unwrap();
    let ip = |text: &str| NetworkAddressOf("net", text).get();
    let local = mesh.workload_at(&ip("10.0.0.1")).unwrap();
    assert_eq!(mesh.workload_at(&ip("2001:db8::1")).unwrap().uid, local.uid);
    assert_eq!(local.identity.as_str(), "spiffe://cluster.local/ns/default/sa/web");
    assert_eq!((local.protocol, local.network_mode), (TunnelProtocol::Hbone, NetworkMode::Host));
    assert_eq!((local.health, local.capacity, &*local.node), (Health::Unhealthy, 3, "here"));
    let waypoint = local.waypoint.as_ref().unwrap();
    assert_eq!((&waypoint.target, waypoint.hbone_port), (&GatewayTarget::Address(ip("10.0.0.9")), 15008));
    let gateway = local.network_gateway.as_ref().unwrap();
    assert!(matches!(&gateway.target, GatewayTarget::Hostname(name) if &*name.name == "east.example.com"));
    assert_eq!(local.application_tunnel.as_ref().unwrap().port, Some(15088));
    let (name, ports) = local.services.first().unwrap();
    assert_eq!(
        (name.to_string().as_str(), ports[0].service_port, ports[0].target_port),
        ("default/example.com", 80, 8080)
    );

    let plain = mesh.workload_at(&NetworkAddressOf("", "10.0.0.2").get()).unwrap();
    assert_eq!((&*plain.uid, plain.protocol), ("//Pod/default/plain", TunnelProtocol::None));
    assert_eq!(plain.identity.service_account(), "default");

    let service = &mesh.service(&cairn_mesh::ResourceName::new("default", "example.com")).unwrap().service;
    assert_eq!(service.ports.len(), 2);
    assert_eq!(service.load_balancing.mode, LoadBalancingMode::Failover);
    assert_eq!((service.weighted_waypoints.len(), service.weighted_waypoints[0].weight), (1, 7));
    let found = |network, text| mesh.service_at(&NetworkAddressOf(network, text).get(), "default").is_some();
    assert!(found("net", "10.1.0.1") && found("", "10.1.0.2") && found("net", "10.2.3.4"));
    assert!(!found("net", "10.3.0.1"));
}

/// An address in a network.
struct NetworkAddressOf<'a>(&'a str, &'a str);

impl NetworkAddressOf<'_> {
    fn get(&self) -> cairn_mesh::NetworkAddress {
        cairn_mesh::NetworkAddress { network: self.0.into(), address: self.1.parse().unwrap() }
    }
}

#[test]
fn what_cannot_be_understood_is_refused_with_its_place() {
    let policy =
        |more: &str| format!("policies: [{{ name: a, namespace: b, scope: Global, action: Deny, {more} }}]");
    for (text, reasons) in [
        ("workload: []", &["workload"][..]),
        ("workloads: [{ name: a, namespace: b, workloadIp: 10.0.0.1 }]", &["workloadIp"]),
        ("workloads: [{ name: a, namespace: b, workloadIps: [10.0.0] }]", &["LOCAL_XDS"]),
        ("workloads: [{ name: a, namespace: b, protocol: LEGACY }]", &["`LEGACY`"]),
        (
            "workloads: [{ uid: x, namespace: b, authorizationPolicies: [a] }]",
            &["workloads[0] (x)", "authorization_policies"],
        ),
        ("workloads: [{ uid: x, namespace: b }, { uid: x, namespace: b }]", &["workloads[1] (x)", "twice"]),
        (
            "workloads: [{ uid: x, namespace: b, waypoint: { destination: here, hboneMtlsPort: 1 } }]",
            &["workloads[0]", "`here`"],
        ),
        ("services: [{ name: a, namespace: b }]", &["services[0]", "hostname"]),
        ("services: [{ namespace: b, hostname: c, vips: [10.0.0.1] }]", &["services[0] (b/c)", "`10.0.0.1`"]),
        (
            "services: [{ namespace: b, hostname: c, cidrVips: [/10.0.0.0/33] }]",
            &["services[0]", "`/10.0.0.0/33`"],
        ),
        (
            "services: [{ namespace: b, hostname: c }, { namespace: b, hostname: c }]",
            &["services[1] (b/c)", "twice"],
        ),
        (&policy("rules: [[[{ sourceIps: [10.0.0.0/x] }]]]"), &["10.0.0.0/x"]),
        (&policy("rules: [[[{ principal: [] }]]]"), &["principal"]),
        (&policy("rules: [[[{ principals: [{ regex: a }] }]]]"), &["regex"]),
        ("policies: [{ name: a, namespace: b, action: Deny }]", &["scope"]),
    ] {
        let refused = refused(text);
        for reason in reasons {
            assert!(refused.contains(reason), "{text}: {refused} does not say {reason}");
        }
    }
}

#[test]
fn a_policy_reads_as_the_control_plane_would_have_sent_it() {
    let local: Local = serde_saphyr::from_str(MESH).unwrap();
    let changes = local.changes().unwrap();
    let Some(Change::Authorization(policy)) = changes.first() else { panic!("policies come first") };
    assert_eq!((policy.action, policy.rules.len()), (PolicyAction::Allow, 1));
    let clauses = &policy.rules[0].clauses;
    assert_eq!((clauses.len(), clauses[0].matches.len(), clauses[1].matches.len()), (2, 2, 1));
    let sent = cairn_xds::authorization::authorization_to_proto(policy).unwrap();
    let first = &sent.rules[0].clauses[0].matches[0];
    assert_eq!((first.principals.len(), first.not_namespaces.len(), first.service_accounts.len()), (2, 1, 1));
    assert_eq!(
        sent.rules[0].clauses[0].matches[1].source_ips.iter().map(|ip| ip.length).collect::<Vec<_>>(),
        [8, 128]
    );
    assert_eq!(sent.rules[0].clauses[1].matches[0].destination_ports, [8080]);
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let missing = LocalState::File(PathBuf::from("/nowhere/mesh.yaml"));
    let Err(error) = read(&missing, &MeshSettings::default()) else { panic!("it is there") };
    assert!(format!("{error:#}").contains("/nowhere/mesh.yaml"), "{error:#}");
}
