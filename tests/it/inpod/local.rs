//! A ztunnel that knows the mesh from a file: tunnels, services and policies are as written there, whatever a control
//! plane says; it has its certificates from the CA all the same.

use super::handover::by_socks;
use super::{SOON, shared};
use crate::netns::{connect_in, exchange, within};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// A service that no control plane knows of.
const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 98, 0, 1)), 81);

const MESH: &str = r#"
workloads:
- { name: alone, namespace: shop, serviceAccount: alone, workloadIps: [10.77.1.31], protocol: HBONE, node: node1 }
- name: far
  namespace: shop
  serviceAccount: far
  workloadIps: [10.77.2.23]
  protocol: HBONE
  node: node2
  services: { shop/local.example: { 81: 8080 } }
services:
- { name: local, namespace: shop, hostname: local.example, vips: [/10.98.0.1], ports: { 81: 8080 } }
policies:
- name: only-client
  namespace: shop
  scope: Namespace
  action: Allow
  rules: [[[{ principals: [{ exact: cluster.local/ns/shop/sa/client }] }]]]
"#;

#[test]
fn a_mesh_in_a_file_is_all_that_a_ztunnel_needs_to_know() {
    let Some(cluster) = shared() else { return };
    let file = cluster.file("local.yaml");
    std::fs::write(&file, MESH).unwrap();
    let environment = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "shop/alone/alone"),
        ("XDS_ADDRESS", ""),
        ("LOCAL_XDS_PATH", &*file.to_string_lossy()),
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
        // There is no redirection here that would bring replies back.
        ("ENABLE_ORIG_SRC", "false"),
    ];
    let ztunnel = cluster.start_ztunnel_with(1, "alone", "alone", &environment).unwrap();
    assert!(within(SOON, || cluster.is_ready_in("alone")), "{}", ztunnel.log());

    by_socks(&cluster.network.file("alone"), SERVICE).unwrap().echo("to a service").unwrap();
    let arrived = cluster.record_with(2, "inbound", |record| record["sourceWorkload"] == "shop/alone");
    assert_eq!(arrived["sourceIdentity"], "spiffe://cluster.local/ns/shop/sa/alone", "{arrived}");
    assert_eq!(arrived["authority"], cluster.application("far").to_string(), "{arrived}");

    cluster.talk("client", cluster.application("alone")).unwrap().echo("as its policy says").unwrap();
    assert!(cluster.talk("near", cluster.application("alone")).is_err(), "its policy is not kept");
}

/// `/quitquitquit` ends a ztunnel as SIGTERM does; what is open until the deadline is cut then, and named.
#[test]
fn connections_open_at_the_deadline_are_cut_and_named() {
    let Some(cluster) = shared() else { return };
    let mesh = MESH.replace("alone", "brief").replace("10.77.1.31", "10.77.2.32").replace("node1", "node2");
    let environment = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "shop/brief/brief"),
        ("XDS_ADDRESS", ""),
        ("LOCAL_XDS", &*mesh),
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
        ("ENABLE_ORIG_SRC", "false"),
        ("CONNECTION_TERMINATION_DEADLINE", "2s"),
    ];
    let mut ztunnel = cluster.start_ztunnel_with(2, "brief", "brief", &environment).unwrap();
    assert!(within(SOON, || cluster.is_ready_in("brief")), "{}", ztunnel.log());
    let mut talk = by_socks(&cluster.network.file("brief"), SERVICE).unwrap();
    talk.echo("before").unwrap();
    let admin = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15000);
    let mut connection = connect_in(&cluster.network.file("brief"), admin).unwrap();
    let asked = Instant::now();
    // What is sent along makes it a POST.
    let answer = exchange(&mut connection, "/quitquitquit", b"x").unwrap();
    assert_eq!((answer.status, &*answer.body), (200, "shutdown now\n"));
    assert!(within(SOON, || ztunnel.log().contains("draining")), "{}", ztunnel.log());
    talk.echo("until the deadline").unwrap();
    assert!(within(SOON, || talk.is_ended()), "{}", ztunnel.log());
    assert!(asked.elapsed() >= Duration::from_secs(2), "cut after {:?}", asked.elapsed());
    let says = |text: &str| ztunnel.log().contains(text);
    assert!(within(SOON, || says("all_ended=false")), "{}", ztunnel.log());
    assert!(says("connection closed due to connection drain") && says("10.77.2.23"), "{}", ztunnel.log());
    ztunnel.terminate();
    assert!(within(SOON, || ztunnel.has_ended()), "{}", ztunnel.log());
}

#[test]
fn a_ztunnel_does_not_start_with_half_a_mesh() {
    let Some(cluster) = shared() else { return };
    let environment = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "shop/alone/alone"),
        ("XDS_ADDRESS", ""),
        ("LOCAL_XDS", "policies: [{ name: a, namespace: shop, scope: Namespace, action: Allow, rule: [] }]"),
    ];
    let mut ztunnel = cluster.start_ztunnel_with(1, "late", "half", &environment).unwrap();
    let says = |text: &str| ztunnel.log().contains(text);
    let is_told = || says("cairn: LOCAL_XDS is not valid") && says("unknown field `rule`");
    assert!(within(SOON, is_told), "{}", ztunnel.log());
    ztunnel.terminate();
    assert!(within(SOON, || ztunnel.has_ended()), "{}", ztunnel.log());
}
