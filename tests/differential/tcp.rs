//! Connections that carry no HTTP: for Envoy a listener for each scenario, with the network filters of Istio's inbound
//! chain, and the translation of policies that Istio does for it.

use crate::envoy::proxy_protocol;
use crate::rbac;
use crate::scenario::{Ask, Scenario};
use cairn_tests::envoy::{extension, loopback, typed};
use serde_json::{Value, json};
use std::net::IpAddr;

/// What is sent, and sent back by what lets it pass.
pub const HELLO: &[u8] = b"\0hello";

/// The type of the PROXY protocol's field in which the peer's identity is told (the first for own use).
const IDENTITY: u8 = 0xE0;

/// The listener of a scenario.
pub fn name(index: usize) -> String {
    format!("tcp-{index}")
}

/// Its configuration: who connects is known from the PROXY protocol.
pub fn listener(index: usize, scenario: &Scenario) -> Value {
    let told = json!({ "rules": [{
        "tlv_type": IDENTITY,
        "on_tlv_present": { "metadata_namespace": "differential", "key": "peer" },
    }] });
    let identity = json!({ "on_new_connection": [{
        "object_key": "io.istio.peer_principal",
        "factory_key": "envoy.string",
        "format_string": { "text_format_source": { "inline_string": "%DYNAMIC_METADATA(differential:peer)%" },
                           "omit_empty_values": true },
        "skip_if_empty": true,
    }] });
    let mut filters = vec![extension("identity", "filters.network.set_filter_state.v3.Config", identity)];
    filters.extend(["DENY", "ALLOW"].map(|action| {
        let mut rbac = rbac::connection_filter(scenario, action);
        rbac["stat_prefix"] = "differential".into();
        json!({ "name": action, "typed_config": typed("filters.network.rbac.v3.RBAC", rbac) })
    }));
    filters.push(extension("echo", "filters.network.echo.v3.Echo", json!({})));
    json!({
        "name": name(index),
        "address": loopback(0),
        "listener_filters": [proxy_protocol(told)],
        "filter_chains": [{ "filters": filters }],
    })
}

/// The PROXY protocol's word, version 2, for who connects to what.
pub fn proxy_header(ask: &Ask) -> Vec<u8> {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut rest = [octets(ask.source.ip()), octets(ask.destination.ip())].concat();
    rest.extend(ask.source.port().to_be_bytes());
    rest.extend(ask.destination.port().to_be_bytes());
    if let Some(peer) = &ask.peer {
        rest.push(IDENTITY);
        rest.extend(u16::try_from(peer.len()).expect("a short identity").to_be_bytes());
        rest.extend(peer.as_bytes());
    }
    let family = if ask.source.is_ipv4() { 0x11 } else { 0x21 };
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([0x21, family]);
    header.extend(u16::try_from(rest.len()).expect("a short header").to_be_bytes());
    header.extend(rest);
    header
}
