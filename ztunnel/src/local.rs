//! The mesh from a file instead of a control plane, in the form that Istio's ztunnel reads (`LOCAL_XDS_PATH`,
//! `LOCAL_XDS`): workloads, services and policies, read once at the start.
//!
//! What is written becomes the workload API's own messages and goes through their reader, so that a file means what a
//! control plane would.

use crate::settings::LocalState;
use anyhow::{Context, Result, bail, ensure};
use cairn_mesh::{Change, MeshSettings, Snapshot, Store};
use cairn_proto::{security, workload as wire};
use cairn_xds::authorization::authorization_from_bytes;
use cairn_xds::workload::{service_from_proto, workload_from_proto};
use prost::Message;
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

/// A larger file is not read.
const BYTES_MAX: u64 = 256 << 20;

/// Reads the state of a mesh with these settings.
///
/// # Errors
/// When it is not there, or any of it cannot be understood: half a mesh would let through what the other half forbids.
pub fn read(source: &LocalState, settings: &MeshSettings) -> Result<Snapshot> {
    let (name, text) = match source {
        LocalState::File(path) => (path.display().to_string(), text_of(path)?),
        LocalState::Text(text) => ("LOCAL_XDS".to_owned(), text.clone()),
    };
    let local: Local = serde_saphyr::from_str(&text).with_context(|| format!("{name} is not valid"))?;
    let changes = local.changes().with_context(|| format!("{name} is not valid"))?;
    let mut store = Store::new();
    store.apply([Change::Settings(settings.clone())]);
    store.apply(changes);
    Ok(store.snapshot())
}

fn text_of(path: &Path) -> Result<String> {
    let mut text = String::new();
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let read = file.take(BYTES_MAX + 1).read_to_string(&mut text);
    let size = read.with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(size as u64 <= BYTES_MAX, "{} is larger than {BYTES_MAX} bytes", path.display());
    Ok(text)
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Local {
    workloads: Vec<Workload>,
    policies: Vec<Policy>,
    services: Vec<Service>,
}

impl Local {
    /// Policies first: a workload that names one which is not there is denied.
    fn changes(self) -> Result<Vec<Change>> {
        let policies =
            each("policies", self.policies, |of| format!("{}/{}", of.namespace, of.name), Policy::change)?;
        let services = each(
            "services",
            self.services,
            |of| format!("{}/{}", of.namespace, of.hostname),
            Service::change,
        )?;
        let workloads = each("workloads", self.workloads, Workload::uid, Workload::change)?;
        Ok(policies.into_iter().chain(services).chain(workloads).collect())
    }
}

/// The changes that the entries of a list bring, each of which is there once by its name.
fn each<T>(
    list: &str,
    entries: Vec<T>,
    name: fn(&T) -> String,
    change: fn(T) -> Result<Change>,
) -> Result<Vec<Change>> {
    let mut known = HashSet::new();
    let read = entries.into_iter().enumerate().map(|(index, entry)| {
        let name = name(&entry);
        let place = format!("{list}[{index}] ({name})");
        ensure!(known.insert(name), "{place} is there twice");
        change(entry).context(place)
    });
    read.collect()
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Workload {
    uid: String,
    name: String,
    namespace: String,
    service_account: String,
    trust_domain: String,
    workload_ips: Vec<IpAddr>,
    hostname: String,
    network: String,
    node: String,
    #[serde(deserialize_with = "tunnel_protocol")]
    protocol: wire::TunnelProtocol,
    #[serde(deserialize_with = "network_mode")]
    network_mode: wire::NetworkMode,
    workload_name: String,
    #[serde(deserialize_with = "workload_type")]
    workload_type: wire::WorkloadType,
    canonical_name: String,
    canonical_revision: String,
    cluster_id: String,
    locality: Place,
    capacity: Option<u32>,
    #[serde(deserialize_with = "status")]
    status: wire::WorkloadStatus,
    native_tunnel: bool,
    authorization_policies: Vec<String>,
    waypoint: Option<Gateway>,
    network_gateway: Option<Gateway>,
    application_tunnel: Option<ApplicationTunnel>,
    services: BTreeMap<String, BTreeMap<u16, u16>>,
}

impl Workload {
    /// As written, or as a pod of this name would be called.
    fn uid(&self) -> String {
        if self.uid.is_empty() {
            format!("{}//Pod/{}/{}", self.cluster_id, self.namespace, self.name)
        } else {
            self.uid.clone()
        }
    }

    fn change(self) -> Result<Change> {
        let uid = self.uid();
        let locality = wire::Locality {
            region: self.locality.region,
            zone: self.locality.zone,
            subzone: self.locality.subzone,
        };
        let ports =
            |ports: BTreeMap<u16, u16>| wire::PortList { ports: ports.into_iter().map(port).collect() };
        let tunnel = |tunnel: ApplicationTunnel| wire::ApplicationTunnel {
            protocol: tunnel.protocol.into(),
            port: tunnel.port.unwrap_or_default().into(),
        };
        let workload = wire::Workload {
            uid,
            name: self.name,
            namespace: self.namespace,
            service_account: self.service_account,
            trust_domain: self.trust_domain,
            addresses: self.workload_ips.iter().map(bytes).collect(),
            hostname: self.hostname,
            network: self.network,
            node: self.node,
            tunnel_protocol: self.protocol.into(),
            network_mode: self.network_mode.into(),
            workload_name: self.workload_name,
            workload_type: self.workload_type.into(),
            canonical_name: self.canonical_name,
            canonical_revision: self.canonical_revision,
            cluster_id: self.cluster_id,
            locality: Some(locality),
            capacity: self.capacity,
            status: self.status.into(),
            native_tunnel: self.native_tunnel,
            authorization_policies: self.authorization_policies,
            waypoint: self.waypoint.map(Gateway::message).transpose()?,
            network_gateway: self.network_gateway.map(Gateway::message).transpose()?,
            application_tunnel: self.application_tunnel.map(tunnel),
            services: self.services.into_iter().map(|(name, of)| (name, ports(of))).collect(),
            extensions: Vec::new(),
        };
        Ok(Change::Workload(workload_from_proto(workload)?))
    }
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Place {
    region: String,
    zone: String,
    subzone: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ApplicationTunnel {
    #[serde(default, deserialize_with = "tunnel_handover")]
    protocol: wire::application_tunnel::Protocol,
    port: Option<u16>,
}

/// `network/address`, or `namespace/hostname`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Gateway {
    destination: String,
    hbone_mtls_port: u16,
}

impl Gateway {
    fn message(self) -> Result<wire::GatewayAddress> {
        use wire::gateway_address::Destination;
        let Some((before, behind)) = self.destination.split_once('/') else {
            bail!("the destination `{}` is not network/address or namespace/hostname", self.destination);
        };
        let destination = match behind.parse::<IpAddr>() {
            Ok(ip) => Destination::Address(address(before, ip, None)),
            Err(_) => Destination::Hostname(wire::NamespacedHostname {
                namespace: before.to_owned(),
                hostname: behind.to_owned(),
            }),
        };
        Ok(wire::GatewayAddress {
            destination: Some(destination),
            hbone_mtls_port: self.hbone_mtls_port.into(),
        })
    }
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Service {
    name: String,
    namespace: String,
    hostname: String,
    vips: Vec<String>,
    cidr_vips: Vec<String>,
    ports: BTreeMap<u16, u16>,
    subject_alt_names: Vec<String>,
    waypoint: Option<Gateway>,
    weighted_waypoints: Vec<Weighted>,
    load_balancer: Option<LoadBalancer>,
    #[serde(deserialize_with = "ip_families")]
    ip_families: wire::IpFamilies,
    canonical: bool,
    #[serde(deserialize_with = "visibility")]
    visibility: wire::Visibility,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Weighted {
    destination: Gateway,
    weight: u32,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct LoadBalancer {
    #[serde(deserialize_with = "scopes")]
    routing_preferences: Vec<wire::load_balancing::Scope>,
    #[serde(deserialize_with = "mode")]
    mode: wire::load_balancing::Mode,
    #[serde(deserialize_with = "health_policy")]
    health_policy: wire::load_balancing::HealthPolicy,
}

impl Service {
    fn change(self) -> Result<Change> {
        let exact = self.vips.iter().map(|text| vip(text));
        let blocks = self.cidr_vips.iter().map(|text| block_vip(text));
        let weighted = |of: Weighted| {
            Ok(wire::WeightedWaypoint { destination: Some(of.destination.message()?), weight: of.weight })
        };
        let balancing = |of: LoadBalancer| wire::LoadBalancing {
            routing_preference: of.routing_preferences.into_iter().map(i32::from).collect(),
            mode: of.mode.into(),
            health_policy: of.health_policy.into(),
        };
        let service = wire::Service {
            addresses: exact.chain(blocks).collect::<Result<_>>()?,
            name: self.name,
            namespace: self.namespace,
            hostname: self.hostname,
            ports: self.ports.into_iter().map(port).collect(),
            subject_alt_names: self.subject_alt_names,
            waypoint: self.waypoint.map(Gateway::message).transpose()?,
            weighted_waypoints: self.weighted_waypoints.into_iter().map(weighted).collect::<Result<_>>()?,
            load_balancing: self.load_balancer.map(balancing),
            ip_families: self.ip_families.into(),
            canonical: self.canonical,
            visibility: self.visibility.into(),
            ..wire::Service::default()
        };
        Ok(Change::Service(service_from_proto(service)?))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Policy {
    name: String,
    namespace: String,
    #[serde(deserialize_with = "scope")]
    scope: security::Scope,
    #[serde(deserialize_with = "action")]
    action: security::Action,
    #[serde(default)]
    dry_run: bool,
    /// Any of these, of which all of these must hold, of each of which any may.
    #[serde(default)]
    rules: Vec<Vec<Vec<Match>>>,
}

impl Policy {
    fn change(self) -> Result<Change> {
        let clause = |matches: Vec<Match>| security::Clause {
            matches: matches.into_iter().map(Match::message).collect(),
        };
        let rule =
            |clauses: Vec<Vec<Match>>| security::Rule { clauses: clauses.into_iter().map(clause).collect() };
        let policy = security::Authorization {
            name: self.name,
            namespace: self.namespace,
            scope: self.scope.into(),
            action: self.action.into(),
            rules: self.rules.into_iter().map(rule).collect(),
            dry_run: self.dry_run,
            extensions: Vec::new(),
        };
        let read = authorization_from_bytes(&policy.encode_to_vec())?;
        ensure!(read.not_understood.is_empty(), "{}", read.not_understood.join("; "));
        Ok(Change::Authorization(read.policy))
    }
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Match {
    namespaces: Vec<Text>,
    not_namespaces: Vec<Text>,
    principals: Vec<Text>,
    not_principals: Vec<Text>,
    service_accounts: Vec<Account>,
    not_service_accounts: Vec<Account>,
    source_ips: Vec<Block>,
    not_source_ips: Vec<Block>,
    destination_ips: Vec<Block>,
    not_destination_ips: Vec<Block>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

impl Match {
    fn message(self) -> security::Match {
        let texts = |of: Vec<Text>| of.into_iter().map(Text::message).collect();
        let accounts = |of: Vec<Account>| {
            let account = |of: Account| security::ServiceAccountMatch {
                namespace: of.namespace,
                service_account: of.service_account,
            };
            of.into_iter().map(account).collect()
        };
        let blocks = |of: Vec<Block>| of.into_iter().map(Block::message).collect();
        let ports = |of: Vec<u16>| of.into_iter().map(u32::from).collect();
        security::Match {
            namespaces: texts(self.namespaces),
            not_namespaces: texts(self.not_namespaces),
            principals: texts(self.principals),
            not_principals: texts(self.not_principals),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            source_ips: blocks(self.source_ips),
            not_source_ips: blocks(self.not_source_ips),
            destination_ips: blocks(self.destination_ips),
            not_destination_ips: blocks(self.not_destination_ips),
            destination_ports: ports(self.destination_ports),
            not_destination_ports: ports(self.not_destination_ports),
            extensions: Vec::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum Text {
    #[serde(alias = "Exact")]
    Exact(String),
    #[serde(alias = "Prefix")]
    Prefix(String),
    #[serde(alias = "Suffix")]
    Suffix(String),
    #[serde(alias = "Presence")]
    Presence,
}

impl Text {
    fn message(self) -> security::StringMatch {
        use security::string_match::MatchType;
        let kind = match self {
            Self::Exact(text) => MatchType::Exact(text),
            Self::Prefix(text) => MatchType::Prefix(text),
            Self::Suffix(text) => MatchType::Suffix(text),
            Self::Presence => MatchType::Presence(()),
        };
        security::StringMatch { match_type: Some(kind) }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Account {
    namespace: String,
    service_account: String,
}

/// An address, or a block of them.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Block(IpAddr, u8);

impl TryFrom<String> for Block {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let whole = |ip: IpAddr| if ip.is_ipv4() { 32 } else { 128 };
        let read = match text.split_once('/') {
            None => text.parse().ok().map(|ip| Self(ip, whole(ip))),
            Some((ip, length)) => {
                ip.parse().ok().zip(length.parse().ok()).map(|(ip, length)| Self(ip, length))
            }
        };
        read.filter(|Self(ip, length)| *length <= whole(*ip))
            .ok_or_else(|| format!("`{text}` is not a block of addresses"))
    }
}

impl Block {
    fn message(self) -> security::Address {
        security::Address { address: bytes(&self.0), length: self.1.into() }
    }
}

fn bytes(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn port((service_port, target_port): (u16, u16)) -> wire::Port {
    wire::Port { service_port: service_port.into(), target_port: target_port.into(), app_protocol: 0 }
}

fn address(network: &str, ip: IpAddr, length: Option<u32>) -> wire::NetworkAddress {
    wire::NetworkAddress { network: network.to_owned(), address: bytes(&ip), length }
}

/// `network/address`; the network's name may be empty.
fn vip(text: &str) -> Result<wire::NetworkAddress> {
    let read = text.split_once('/').and_then(|(network, ip)| Some(address(network, ip.parse().ok()?, None)));
    read.with_context(|| format!("the vip `{text}` is not network/address"))
}

/// `network/address/length`.
fn block_vip(text: &str) -> Result<wire::NetworkAddress> {
    let read = text.split_once('/').and_then(|(network, block)| {
        let Block(ip, length) = Block::try_from(block.to_owned()).ok()?;
        Some(address(network, ip, Some(length.into())))
    });
    read.with_context(|| format!("the cidrVip `{text}` is not network/address/length"))
}

/// A value by its name in the workload API, however that is written: `HOST_NETWORK`, `HostNetwork`, `hostNetwork`.
fn value<'de, D: Deserializer<'de>, T>(from: D, named: fn(&str) -> Option<T>) -> Result<T, D::Error> {
    let text = String::deserialize(from)?;
    let mut name = String::with_capacity(text.len() + 2);
    let mut was_lower = false;
    for letter in text.chars() {
        if was_lower && letter.is_ascii_uppercase() {
            name.push('_');
        }
        was_lower = letter.is_ascii_lowercase() || letter.is_ascii_digit();
        name.push(letter.to_ascii_uppercase());
    }
    named(&name)
        .ok_or_else(|| serde::de::Error::custom(format!("`{text}` is not a value that can stand here")))
}

fn tunnel_protocol<'de, D: Deserializer<'de>>(from: D) -> Result<wire::TunnelProtocol, D::Error> {
    // Istio's file calls it TCP when there is no tunnel.
    value(from, |name| wire::TunnelProtocol::from_str_name(if name == "TCP" { "NONE" } else { name }))
}

/// A reader for each enumeration of the API.
macro_rules! values {
    ($($name:ident: $type:ty;)*) => {
        $(fn $name<'de, D: Deserializer<'de>>(from: D) -> Result<$type, D::Error> {
            value(from, <$type>::from_str_name)
        })*
    };
}

values! {
    network_mode: wire::NetworkMode;
    workload_type: wire::WorkloadType;
    status: wire::WorkloadStatus;
    tunnel_handover: wire::application_tunnel::Protocol;
    visibility: wire::Visibility;
    health_policy: wire::load_balancing::HealthPolicy;
    scope: security::Scope;
    action: security::Action;
}

fn ip_families<'de, D: Deserializer<'de>>(from: D) -> Result<wire::IpFamilies, D::Error> {
    // Istio's file names the only one.
    value(from, |name| match name {
        "IPV4" => Some(wire::IpFamilies::Ipv4Only),
        "IPV6" => Some(wire::IpFamilies::Ipv6Only),
        other => wire::IpFamilies::from_str_name(other),
    })
}

fn mode<'de, D: Deserializer<'de>>(from: D) -> Result<wire::load_balancing::Mode, D::Error> {
    // Istio's file calls it Standard when nothing is preferred.
    value(from, |name| match name {
        "STANDARD" => Some(wire::load_balancing::Mode::UnspecifiedMode),
        other => wire::load_balancing::Mode::from_str_name(other),
    })
}

fn scopes<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<wire::load_balancing::Scope>, D::Error> {
    #[derive(Deserialize)]
    struct One(#[serde(deserialize_with = "one")] wire::load_balancing::Scope);
    fn one<'de, D: Deserializer<'de>>(from: D) -> Result<wire::load_balancing::Scope, D::Error> {
        value(from, wire::load_balancing::Scope::from_str_name)
    }
    Ok(Vec::<One>::deserialize(from)?.into_iter().map(|One(scope)| scope).collect())
}

#[cfg(test)]
#[path = "local/tests.rs"]
mod tests;
