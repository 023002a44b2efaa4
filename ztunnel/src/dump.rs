//! What the ztunnel knows, in the form that `istioctl ztunnel-config` reads.
//!
//! Names and shapes are those of Istio's ztunnel; what Istio does not have stands beside them.

use crate::Proxy;
use crate::open::Open;
use cairn_identity::{CertificateState, CertificateView, WorkloadCertificate};
use cairn_mesh::{
    ApplicationTunnel, Authorization, Clause, GatewayAddress, GatewayTarget, HealthPolicy, IpFamilies,
    L4Match, LoadBalancingMode, NetworkMode, RoutingScope, Scope, Service, ServiceAccount, ServiceState,
    TextMatch, TunnelHandover, TunnelProtocol, Visibility, WeightedWaypoint, Workload,
};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Everything, for `GET /config_dump`.
pub fn dump(proxy: &Proxy) -> Value {
    let snapshot = proxy.mesh.snapshot();
    let mut workloads: Vec<&Arc<Workload>> = snapshot.workloads().collect();
    workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
    let mut services: Vec<_> = snapshot.services().collect();
    services.sort_by_key(|state| state.service.key());
    let mut policies: Vec<_> = snapshot.authorizations().collect();
    policies.sort_by(|a, b| a.name.cmp(&b.name));
    let mut certificates = proxy.certificates.states();
    certificates.sort_by(|(a, _), (b, _)| a.cmp(b));
    json!({
        "generation": snapshot.generation(),
        "restored": proxy.mesh.restored().map(date),
        "version": { "version": env!("CARGO_PKG_VERSION"), "component": "cairn" },
        "workloads": workloads.into_iter().map(|workload| view_workload(workload)).collect::<Vec<_>>(),
        "services": services.into_iter().map(|state| view_service(state)).collect::<Vec<_>>(),
        "policies": policies.into_iter().map(|policy| view_policy(policy)).collect::<Vec<_>>(),
        "stagedServices": {},
        "staticConfig": {},
        "config": view_config(proxy),
        "certificates": certificates.iter().map(|(identity, state)| {
            let mut view = view_certificate(state);
            view.insert("identity".to_owned(), identity.as_str().into());
            Value::Object(view)
        }).collect::<Vec<_>>(),
        "workloadState": view_pods(proxy),
        "openInbound": proxy.live.len(),
    })
}

fn view_config(proxy: &Proxy) -> Value {
    let settings = &proxy.settings;
    json!({
        "localNode": settings.node,
        "clusterId": settings.cluster_id,
        "xdsAddress": settings.xds.as_ref().map(|xds| &xds.address),
        "caAddress": settings.ca.address,
        "numWorkerThreads": settings.workers,
        "secretTtl": format!("{:?}", settings.certificate_ttl),
        "selfTerminationDeadline": format!("{:?}", settings.drain),
    })
}

fn view_workload(workload: &Workload) -> Value {
    json!({
        "uid": workload.uid,
        "name": workload.name,
        "namespace": workload.namespace,
        "serviceAccount": workload.identity.service_account(),
        "workloadIps": workload.addresses,
        "network": workload.network,
        "protocol": if workload.protocol == TunnelProtocol::Hbone { "HBONE" } else { "TCP" },
        "hostname": workload.hostname,
        "waypoint": workload.waypoint.as_ref().map(view_gateway),
        "networkGateway": workload.network_gateway.as_ref().map(view_gateway),
        "node": workload.node,
        "status": format!("{:?}", workload.health),
        "authorizationPolicies": workload.authorization_policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "canonicalName": workload.canonical_name,
        "canonicalRevision": workload.canonical_revision,
        "workloadName": workload.workload_name,
        "workloadType": workload.kind.as_str(),
        "trustDomain": workload.identity.trust_domain(),
        "clusterId": workload.cluster_id,
        "capacity": workload.capacity,
        "nativeTunnel": workload.native_tunnel,
        "applicationTunnel": workload.application_tunnel.as_ref().map(view_application_tunnel),
        "networkMode": match workload.network_mode {
            NetworkMode::Own => "Standard",
            NetworkMode::Host => "HostNetwork",
        },
        "locality": {
            "region": workload.locality.region,
            "zone": workload.locality.zone,
            "subzone": workload.locality.subzone,
        },
    })
}

fn view_application_tunnel(tunnel: &ApplicationTunnel) -> Value {
    let handover = match tunnel.handover {
        TunnelHandover::None => "NONE",
        TunnelHandover::Proxy => "PROXY",
    };
    json!({ "protocol": handover, "port": tunnel.port })
}

/// `namespace/hostname` or `network/address`, and the port beside it.
fn view_gateway(gateway: &GatewayAddress) -> Value {
    let destination = match &gateway.target {
        GatewayTarget::Hostname(name) => name.to_string(),
        GatewayTarget::Address(at) => format!("{}/{}", at.network, at.address),
    };
    json!({ "destination": destination, "hboneMtlsPort": gateway.hbone_port })
}

fn view_service(state: &ServiceState) -> Value {
    let service: &Service = &state.service;
    let ports: BTreeMap<String, u16> =
        service.ports.iter().map(|port| (port.port.to_string(), port.target_port)).collect();
    let endpoints: Map<String, Value> = state
        .endpoints
        .iter()
        .map(|endpoint| {
            let ports = service.ports.iter();
            let ports: BTreeMap<String, Option<u16>> = ports
                .map(|port| (port.port.to_string(), endpoint.target_port(service, port.port)))
                .collect();
            let view = json!({
                "workloadUid": endpoint.workload.uid,
                "service": service.key().to_string(),
                "address": endpoint.workload.network_addresses().next().map(|at| format!("{}/{}", at.network, at.address)),
                "port": ports,
                "status": format!("{:?}", endpoint.workload.health),
            });
            (endpoint.workload.uid.to_string(), view)
        })
        .collect();
    json!({
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "vips": service.vips.iter().map(|vip| format!("{}/{}", vip.network, vip.address)).collect::<Vec<_>>(),
        "cidrVips": service.blocks.iter().map(|range| format!("{}/{}", range.network, range.block)).collect::<Vec<_>>(),
        "ports": ports,
        "endpoints": endpoints,
        "subjectAltNames": service.subject_alt_names.iter().map(|identity| identity.as_str()).collect::<Vec<_>>(),
        "waypoint": service.waypoint.as_ref().map(view_gateway),
        "weightedWaypoints": service.weighted_waypoints.iter().map(view_weighted).collect::<Vec<_>>(),
        "loadBalancer": view_balancing(service),
        "ipFamilies": view_families(service.ip_families),
        "visibility": match service.visibility {
            Visibility::Public => "Public",
            Visibility::Namespace => "Namespace",
        },
        "canonical": service.canonical,
        "readyEndpoints": state.endpoints.len(),
        "knownEndpoints": state.endpoints_known,
    })
}

fn view_weighted(weighted: &WeightedWaypoint) -> Value {
    json!({ "waypoint": view_gateway(&weighted.waypoint), "weight": weighted.weight })
}

/// `null` where nothing is declared.
fn view_families(families: IpFamilies) -> Option<&'static str> {
    match families {
        IpFamilies::Automatic => None,
        IpFamilies::V4 => Some("IPv4"),
        IpFamilies::V6 => Some("IPv6"),
        IpFamilies::Dual => Some("Dual"),
    }
}

/// `null` where nothing is preferred, as istioctl expects.
fn view_balancing(service: &Service) -> Value {
    let balancing = &service.load_balancing;
    if balancing.mode == LoadBalancingMode::Standard && balancing.health == HealthPolicy::OnlyHealthy {
        return Value::Null;
    }
    let scopes: Vec<&str> = balancing
        .scopes
        .iter()
        .map(|scope| match scope {
            RoutingScope::Region => "Region",
            RoutingScope::Zone => "Zone",
            RoutingScope::Subzone => "Subzone",
            RoutingScope::Node => "Node",
            RoutingScope::Cluster => "Cluster",
            RoutingScope::Network => "Network",
        })
        .collect();
    json!({
        "mode": format!("{:?}", balancing.mode),
        "routingPreferences": scopes,
        "healthPolicy": match balancing.health {
            HealthPolicy::OnlyHealthy => "OnlyHealthy",
            HealthPolicy::AllowAll => "AllowAll",
        },
    })
}

fn view_policy(policy: &Authorization) -> Value {
    let rules: Vec<Vec<Value>> =
        policy.rules.iter().map(|rule| rule.clauses.iter().map(view_clause).collect()).collect();
    json!({
        "name": policy.name.name,
        "namespace": policy.name.namespace,
        "scope": match policy.scope {
            Scope::Global => "Global",
            Scope::Namespace => "Namespace",
            Scope::WorkloadSelector => "WorkloadSelector",
        },
        "action": format!("{:?}", policy.action),
        "rules": rules,
        "dryRun": policy.dry_run,
    })
}

fn view_clause(clause: &Clause) -> Value {
    clause.matches.iter().map(view_match).collect()
}

/// Only what is set.
fn view_match(one: &L4Match) -> Value {
    fn put<T>(view: &mut Map<String, Value>, name: &str, values: &[T], show: impl Fn(&T) -> Value) {
        if !values.is_empty() {
            view.insert(name.to_owned(), values.iter().map(show).collect());
        }
    }
    let text = |value: &TextMatch| match value {
        TextMatch::Exact(text) => json!({ "Exact": text }),
        TextMatch::Prefix(text) => json!({ "Prefix": text }),
        TextMatch::Suffix(text) => json!({ "Suffix": text }),
        TextMatch::Present => json!("Presence"),
    };
    let mut view = Map::new();
    put(&mut view, "namespaces", &one.namespaces.any, text);
    put(&mut view, "notNamespaces", &one.namespaces.none, text);
    put(&mut view, "principals", &one.principals.any, text);
    put(&mut view, "notPrincipals", &one.principals.none, text);
    let account =
        |account: &ServiceAccount| json!({ "namespace": account.namespace, "serviceAccount": account.name });
    put(&mut view, "serviceAccounts", &one.service_accounts.any, account);
    put(&mut view, "notServiceAccounts", &one.service_accounts.none, account);
    put(&mut view, "sourceIps", &one.source_ips.any, |block| block.to_string().into());
    put(&mut view, "notSourceIps", &one.source_ips.none, |block| block.to_string().into());
    put(&mut view, "destinationIps", &one.destination_ips.any, |block| block.to_string().into());
    put(&mut view, "notDestinationIps", &one.destination_ips.none, |block| block.to_string().into());
    put(&mut view, "destinationPorts", &one.destination_ports.any, |port| (*port).into());
    put(&mut view, "notDestinationPorts", &one.destination_ports.none, |port| (*port).into());
    Value::Object(view)
}

fn view_certificate(state: &CertificateState) -> Map<String, Value> {
    let (word, certificate, error) = match state {
        CertificateState::Available(certificate) => ("Available", Some(certificate), None),
        CertificateState::Initializing => ("Initializing", None, None),
        CertificateState::Unavailable(error) => ("Unavailable", None, Some(error)),
    };
    let views = |read: fn(&WorkloadCertificate) -> Vec<CertificateView>| -> Value {
        certificate.map_or_else(Vec::new, |certificate| read(certificate)).iter().map(view_x509).collect()
    };
    let mut view = Map::new();
    view.insert("state".to_owned(), word.into());
    view.insert("certChain".to_owned(), views(WorkloadCertificate::chain_views));
    view.insert("rootCerts".to_owned(), views(WorkloadCertificate::root_views));
    if let Some(error) = error {
        view.insert("error".to_owned(), error.as_str().into());
    }
    view
}

fn view_x509(certificate: &CertificateView) -> Value {
    json!({
        "pem": certificate.pem_base64,
        "serialNumber": certificate.serial,
        "validFrom": date(certificate.not_before),
        "expirationTime": date(certificate.not_after),
    })
}

/// RFC 3339, whole seconds, in UTC.
fn date(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time).replace_nanosecond(0);
    // A year that the format does not have belongs to no certificate that is valid.
    time.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// The pods that istio-cni has named, with their connections.
fn view_pods(proxy: &Proxy) -> Value {
    let open = proxy.open.list();
    let of = |name: &crate::PodName, is_inbound: bool| -> Vec<Value> {
        let own =
            open.iter().filter(|one| one.is_inbound == is_inbound && one.is_of(&name.namespace, &name.name));
        own.map(view_open).collect()
    };
    let pods = proxy.enrolled.list().into_iter().map(|(uid, view)| {
        let state = json!({
            "state": if view.is_up { "Up" } else { "Pending" },
            "info": {
                "name": view.name.name,
                "namespace": view.name.namespace,
                "serviceAccount": view.name.service_account,
            },
            "connections": { "inbound": of(&view.name, true), "outbound": of(&view.name, false) },
        });
        (uid.to_string(), state)
    });
    Value::Object(pods.collect())
}

fn view_open(open: &Open) -> Value {
    json!({
        "src": open.source,
        "originalDst": open.original,
        "actualDst": open.actual,
        "protocol": if open.is_tunnelled { "HBONE" } else { "TCP" },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::{Change, Identity, L4Rule, NetworkBlock, PolicyAction, ResourceName, Store, Values};

    #[test]
    fn a_policy_is_written_as_rules_of_clauses_of_matches() {
        let one = L4Match {
            principals: Values {
                any: vec![TextMatch::Exact("td/ns/a/sa/x".into())],
                none: vec![TextMatch::Present],
            },
            destination_ports: Values { any: vec![80], none: Vec::new() },
            ..L4Match::default()
        };
        let policy = Authorization {
            name: ResourceName::new("a", "few"),
            scope: Scope::WorkloadSelector,
            action: PolicyAction::Deny,
            rules: vec![L4Rule { clauses: vec![Clause { matches: vec![one] }] }],
            dry_run: false,
        };
        assert_eq!(
            view_policy(&policy),
            json!({
                "name": "few",
                "namespace": "a",
                "scope": "WorkloadSelector",
                "action": "Deny",
                "rules": [[[{
                    "principals": [{ "Exact": "td/ns/a/sa/x" }],
                    "notPrincipals": ["Presence"],
                    "destinationPorts": [80],
                }]]],
                "dryRun": false,
            })
        );
    }

    #[test]
    fn what_steers_traffic_is_shown_as_istioctl_reads_it() {
        let tunnel = ApplicationTunnel { handover: TunnelHandover::Proxy, port: Some(15088) };
        let workload = Workload {
            hostname: "db.example.com".into(),
            application_tunnel: Some(tunnel),
            network_mode: NetworkMode::Host,
            ..Workload::new("w", "w", Identity::new("td", "a", "x").unwrap())
        };
        let view = view_workload(&workload);
        assert_eq!(view["hostname"], "db.example.com");
        assert_eq!(view["applicationTunnel"], json!({ "protocol": "PROXY", "port": 15088 }));
        assert_eq!(view["networkMode"], "HostNetwork");
        let service = Service {
            blocks: vec![NetworkBlock { network: "".into(), block: "10.1.0.0/16".parse().unwrap() }],
            ip_families: IpFamilies::V6,
            visibility: Visibility::Namespace,
            ..Service::default()
        };
        let mut store = Store::new();
        store.apply([Change::Service(service)]);
        let view = view_service(store.current().services().next().unwrap());
        assert_eq!(view["cidrVips"], json!(["/10.1.0.0/16"]));
        assert_eq!((&view["ipFamilies"], &view["visibility"]), (&json!("IPv6"), &json!("Namespace")));
    }

    #[test]
    fn dates_are_whole_seconds() {
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_999);
        assert_eq!(date(time), "2023-11-14T22:13:20Z");
    }
}
