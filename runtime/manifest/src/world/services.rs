//! Services, and the pods and addresses behind them.

use super::core::{self, EndpointSlice, SliceEndpoint, SlicePort, TargetPort};
use super::pods::Pod;
use super::waypoints::{GATEWAY_NAME, HBONE_PORT, Waypoint};
use super::{Addressing, Scene, selects};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use cairn_mesh::{
    AppProtocol, Health, HealthPolicy, Identity, LoadBalancing, LoadBalancingMode, NetworkAddress,
    PortMapping, ResourceName, RoutingScope, Service, ServicePort, Workload,
};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// On an EndpointSlice: its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// A service while the mesh is built.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) service: Service,
    /// The object it comes from; `None` for a waypoint's own.
    pub(super) index: Option<usize>,
    /// It belongs to a waypoint, and so has none.
    pub(super) is_gateway: bool,
    pub(super) is_headless: bool,
    /// The waypoint in front of it.
    pub(super) waypoint: Option<ResourceName>,
    selector: BTreeMap<String, String>,
    ports: Vec<Port>,
}

#[derive(Debug)]
struct Port {
    name: String,
    number: u16,
    target: TargetPort,
}

impl Known {
    /// `namespace/name`, as other objects refer to it.
    pub(super) fn name(&self) -> ResourceName {
        ResourceName::new(self.service.namespace.clone(), self.service.name.clone())
    }
}

/// Makes all services, in order of their names.
pub(super) fn services(
    scene: &mut Scene<'_>,
    waypoints: &[Waypoint],
    addressing: &mut dyn Addressing,
) -> Vec<Known> {
    let mut services: Vec<Known> = Vec::new();
    for (index, object) in scene.of("", "Service") {
        let Ok(read) = core::read::<core::Service>(object) else { continue };
        services.extend(service(scene, index, object, read.spec, addressing));
    }
    for waypoint in waypoints {
        if !services.iter().any(|known| known.name() == waypoint.name) {
            services.push(gateway_service(scene, waypoint, addressing));
        }
    }
    services.sort_by_key(Known::name);
    services
}

fn service(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    spec: core::ServiceSpec,
    addressing: &mut dyn Addressing,
) -> Option<Known> {
    if spec.kind == "ExternalName" {
        let at = FieldPath::of(&["spec", "type"]);
        scene.note(index, Severity::Info, "not-supported", &at, "ExternalName services are left to DNS");
        return None;
    }
    let is_headless = spec.cluster_ip.as_deref() == Some("None");
    let vips = if is_headless { Vec::new() } else { vips(scene, index, object, &spec, addressing) };
    let mut ports = Vec::new();
    let mut published = Vec::new();
    for port in spec.ports {
        if port.protocol.as_deref().is_some_and(|protocol| protocol != "TCP") {
            continue;
        }
        let target = port.target_port.unwrap_or(TargetPort::Number(port.port));
        let target_port = match &target {
            TargetPort::Number(number) => *number,
            TargetPort::Name(_) => 0,
        };
        let protocol = app_protocol(port.app_protocol.as_deref(), &port.name);
        published.push(ServicePort { port: port.port, target_port, protocol });
        ports.push(Port { name: port.name, number: port.port, target });
    }
    let health =
        if spec.publish_not_ready_addresses { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    let load_balancing =
        LoadBalancing { health, ..load_balancing(&spec.internal_traffic_policy, &spec.traffic_distribution) };
    let (namespace, name) = (&object.name.namespace, &object.name.name);
    Some(Known {
        service: Service {
            name: name.clone(),
            namespace: namespace.clone(),
            hostname: format!("{name}.{namespace}.svc.{}", scene.settings.cluster_domain).into(),
            vips,
            ports: published,
            subject_alt_names: Vec::new(),
            waypoint: None,
            load_balancing,
            canonical: true,
            ..Service::default()
        },
        index: Some(index),
        is_gateway: object.label(GATEWAY_NAME).is_some(),
        is_headless,
        waypoint: None,
        selector: spec.selector,
        ports,
    })
}

fn vips(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    spec: &core::ServiceSpec,
    addressing: &mut dyn Addressing,
) -> Vec<NetworkAddress> {
    let mut written: Vec<&String> = spec.cluster_ips.iter().collect();
    if let Some(first) =
        spec.cluster_ip.as_ref().filter(|first| !first.is_empty() && !written.contains(first))
    {
        written.insert(0, first);
    }
    let mut addresses = Vec::new();
    for text in &written {
        match text.parse::<IpAddr>() {
            Ok(address) => addresses.push(address),
            Err(_) => {
                let at = FieldPath::of(&["spec", "clusterIP"]);
                scene.note(
                    index,
                    Severity::Error,
                    "invalid-value",
                    &at,
                    format!("`{text}` is not an IP address"),
                );
            }
        }
    }
    if written.is_empty() {
        addresses.extend(addressing.service(&object.name.namespace, &object.name.name));
    }
    addresses.into_iter().map(local).collect()
}

fn local(address: IpAddr) -> NetworkAddress {
    NetworkAddress { network: "".into(), address }
}

/// What a port carries: `appProtocol` wins over the prefix of the name (Istio `pkg/config/kube`, `ConvertProtocol`).
fn app_protocol(declared: Option<&str>, name: &str) -> AppProtocol {
    let known = |text: &str| match text {
        "http" | "kubernetes.io/ws" => Some(AppProtocol::Http11),
        "http2" | "kubernetes.io/h2c" => Some(AppProtocol::Http2),
        "grpc" | "grpc-web" => Some(AppProtocol::Grpc),
        "tcp" | "mongo" | "mysql" | "redis" => Some(AppProtocol::Tcp),
        "https" | "tls" | "kubernetes.io/wss" => Some(AppProtocol::Tls),
        _ => None,
    };
    if let Some(declared) = declared {
        return known(&declared.to_ascii_lowercase()).unwrap_or_default();
    }
    let name = name.to_ascii_lowercase();
    if name.starts_with("grpc-web") {
        return AppProtocol::Grpc;
    }
    known(name.split('-').next().unwrap_or_default()).unwrap_or_default()
}

fn load_balancing(internal_policy: &str, distribution: &str) -> LoadBalancing {
    use RoutingScope::{Network, Node, Region, Subzone, Zone};
    let (mode, scopes) = match (internal_policy, distribution) {
        ("Local", _) => (LoadBalancingMode::Strict, vec![Node]),
        (_, "PreferClose" | "PreferSameZone") => (LoadBalancingMode::Failover, vec![Network, Region, Zone]),
        (_, "PreferSameNode") => (LoadBalancingMode::Failover, vec![Network, Region, Zone, Subzone, Node]),
        _ => (LoadBalancingMode::Standard, Vec::new()),
    };
    LoadBalancing { mode, scopes, ..LoadBalancing::default() }
}

/// The service that a Gateway would make.
fn gateway_service(scene: &Scene<'_>, waypoint: &Waypoint, addressing: &mut dyn Addressing) -> Known {
    let ResourceName { namespace, name } = &waypoint.name;
    let vip = addressing.service(namespace, name);
    Known {
        service: Service {
            name: name.clone(),
            namespace: namespace.clone(),
            hostname: format!("{name}.{namespace}.svc.{}", scene.settings.cluster_domain).into(),
            vips: vip.into_iter().map(local).collect(),
            ports: vec![ServicePort {
                port: HBONE_PORT,
                target_port: HBONE_PORT,
                protocol: AppProtocol::Unknown,
            }],
            subject_alt_names: Vec::new(),
            waypoint: None,
            load_balancing: LoadBalancing::default(),
            canonical: true,
            ..Service::default()
        },
        index: None,
        is_gateway: true,
        is_headless: false,
        waypoint: None,
        selector: BTreeMap::from([(GATEWAY_NAME.to_owned(), name.to_string())]),
        ports: vec![Port { name: String::new(), number: HBONE_PORT, target: TargetPort::Number(HBONE_PORT) }],
    }
}

/// Puts pods and addresses behind services.
pub(super) fn connect(scene: &mut Scene<'_>, services: &mut [Known], pods: &mut Vec<Pod>) {
    for known in services.iter() {
        if !known.selector.is_empty() {
            for pod in pods.iter_mut().filter(|pod| pod.workload.namespace == known.service.namespace) {
                if selects(&known.selector, &pod.labels) {
                    let ports = mappings(known, &pod.ports);
                    pod.workload.services.push((known.service.key(), ports));
                }
            }
        }
    }
    for (index, object) in scene.of("discovery.k8s.io", "EndpointSlice") {
        let Ok(slice) = core::read::<EndpointSlice>(object) else { continue };
        let service =
            object.label(SERVICE_NAME).map(|name| ResourceName::new(object.name.namespace.clone(), name));
        let Some(known) = services.iter().find(|known| Some(known.name()) == service) else {
            let reason = format!("its label {SERVICE_NAME} names no service");
            scene.note(
                index,
                Severity::Warning,
                "no-service",
                &FieldPath::of(&["metadata", "labels"]),
                reason,
            );
            continue;
        };
        // The endpoints of a service with a selector are known from its pods.
        if known.selector.is_empty() {
            let ports = slice_mappings(known, &slice.ports);
            for endpoint in &slice.endpoints {
                place(scene, index, object, known, endpoint, &ports, pods);
            }
        }
    }
}

fn mappings(known: &Known, named: &BTreeMap<String, u16>) -> Vec<PortMapping> {
    let mapping = |port: &Port| {
        let target_port = match &port.target {
            TargetPort::Number(number) => *number,
            TargetPort::Name(name) => *named.get(name)?,
        };
        Some(PortMapping { service_port: port.number, target_port })
    };
    known.ports.iter().filter_map(mapping).collect()
}

/// A slice's ports go with the service's ports of the same name.
fn slice_mappings(known: &Known, ports: &[SlicePort]) -> Vec<PortMapping> {
    let mapping = |port: &Port| {
        let target_port = ports.iter().find(|own| own.name == port.name)?.port?;
        Some(PortMapping { service_port: port.number, target_port })
    };
    known.ports.iter().filter_map(mapping).collect()
}

/// Puts an endpoint of a slice behind its service: the pod at the address, or a workload outside the mesh.
fn place(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    known: &Known,
    endpoint: &SliceEndpoint,
    ports: &[PortMapping],
    pods: &mut Vec<Pod>,
) {
    for text in &endpoint.addresses {
        let Ok(address) = text.parse::<IpAddr>() else {
            let at = FieldPath::of(&["endpoints"]);
            scene.note(
                index,
                Severity::Error,
                "invalid-value",
                &at,
                format!("`{text}` is not an IP address"),
            );
            continue;
        };
        let key = known.service.key();
        let at_address = pods.iter_mut().find(|pod| pod.workload.addresses.contains(&address));
        if let Some(pod) = at_address {
            if !pod.workload.services.iter().any(|(service, _)| *service == key) {
                pod.workload.services.push((key, ports.to_vec()));
            }
            continue;
        }
        let namespace = &object.name.namespace;
        let Ok(identity) = Identity::new(&scene.settings.trust_domain, namespace, "default") else {
            continue;
        };
        let cluster = &scene.settings.cluster_id;
        let uid =
            format!("{cluster}/discovery.k8s.io/EndpointSlice/{namespace}/{}/{address}", object.name.name);
        let ready = endpoint.conditions.ready.unwrap_or(true);
        let workload = Workload {
            addresses: vec![address],
            node: endpoint.node_name.as_deref().unwrap_or_default().into(),
            health: if ready { Health::Healthy } else { Health::Unhealthy },
            cluster_id: cluster.clone(),
            services: vec![(key, ports.to_vec())],
            ..Workload::new(uid, object.name.name.clone(), identity)
        };
        pods.push(Pod {
            index: None,
            labels: BTreeMap::new(),
            labels_at: FieldPath::root(),
            ports: BTreeMap::new(),
            gateway: None,
            waypoint: None,
            workload,
        });
    }
}
