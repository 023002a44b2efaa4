//! A ztunnel that knows the mesh from a file: tunnels, services and policies are as written there, whatever a control
//! plane says; it has its certificates from the CA all the same.

use super::handover::by_socks;
use super::{SOON, shared};
use crate::netns::within;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

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
