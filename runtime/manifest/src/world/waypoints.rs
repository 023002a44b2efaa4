//! Waypoints, and what is bound to them.

use super::core::{self, GatewayClassSpec, GatewaySpec, Listener};
use super::pods::Pod;
use super::services::Known;
use super::{GATEWAY_GROUP, GatewayEntry, Scene, WaypointFor, selects};
use crate::decode::target::WAYPOINT_CLASS;
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use cairn_mesh::{
    ApplicationTunnel, GatewayAddress, GatewayTarget, Identity, ResourceName, TunnelHandover, Workload,
};
use std::collections::BTreeMap;

/// The port on which a waypoint accepts tunnels.
pub(super) const HBONE_PORT: u16 = 15008;
const USE: &str = "istio.io/use-waypoint";
const USE_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
const FOR: &str = "istio.io/waypoint-for";
/// On a Gateway or its class: how a ztunnel hands the waypoint its tunnels (Istio's annotation).
const BINDING: &str = "ambient.istio.io/waypoint-inbound-binding";
/// On pods and services made for a Gateway.
pub(super) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// The controller of waypoints' classes.
const CONTROLLER: &str = "istio.io/mesh-controller";

/// A waypoint.
#[derive(Debug)]
pub(super) struct Waypoint {
    pub(super) index: usize,
    pub(super) name: ResourceName,
    pub(super) identity: Identity,
    /// Its service, `namespace/hostname`.
    pub(super) service: ResourceName,
    class: String,
    waypoint_for: WaypointFor,
    listeners: Vec<Listener>,
    /// A ztunnel stands before its pods, and hands them what is in the tunnels.
    binding: Option<ApplicationTunnel>,
}

/// A class of waypoints, and what it says of those that do not say it themselves.
#[derive(Clone, Copy, Default)]
struct Class {
    waypoint_for: Option<WaypointFor>,
    binding: Option<ApplicationTunnel>,
}

impl Waypoint {
    pub(super) fn entry(&self, workloads: &[Workload]) -> GatewayEntry {
        let own =
            |workload: &&Workload| workload.services.iter().any(|(service, _)| *service == self.service);
        GatewayEntry {
            name: self.name.clone(),
            class: self.class.clone(),
            identity: self.identity.clone(),
            waypoint_for: self.waypoint_for,
            service: self.service.clone(),
            workloads: workloads.iter().filter(own).map(|workload| workload.uid.to_string()).collect(),
        }
    }

    /// How others refer to it. By name, so that a binding holds before the waypoint has an address.
    fn address(&self) -> GatewayAddress {
        GatewayAddress { target: GatewayTarget::Hostname(self.service.clone()), hbone_port: HBONE_PORT }
    }

    fn takes_services(&self) -> bool {
        matches!(self.waypoint_for, WaypointFor::Service | WaypointFor::All)
    }

    fn takes_workloads(&self) -> bool {
        matches!(self.waypoint_for, WaypointFor::Workload | WaypointFor::All)
    }

    /// Whether what is in `namespace` may use it.
    fn allows(&self, namespace: &str, scene: &Scene<'_>) -> bool {
        if *self.name.namespace == *namespace {
            return true;
        }
        self.listeners.iter().any(|listener| {
            let allowed = &listener.allowed_routes.namespaces;
            match allowed.from.as_str() {
                "All" => true,
                "Selector" if allowed.selector.match_expressions.is_empty() => {
                    let empty = BTreeMap::new();
                    let labels = scene.namespaces.get(namespace).map_or(&empty, |(_, object)| &object.labels);
                    selects(&allowed.selector.match_labels, labels)
                }
                _ => false,
            }
        })
    }
}

/// Finds the waypoints among the Gateways.
pub(super) fn waypoints(scene: &mut Scene<'_>) -> Vec<Waypoint> {
    let mut classes: BTreeMap<String, Class> =
        BTreeMap::from([(WAYPOINT_CLASS.to_owned(), Class::default())]);
    for (index, object) in scene.of(GATEWAY_GROUP, "GatewayClass") {
        let controller = core::read::<GatewayClassSpec>(object).map(|class| class.controller_name);
        if controller.is_ok_and(|controller| controller == CONTROLLER) || *object.name.name == *WAYPOINT_CLASS
        {
            let waypoint_for = object.label(FOR).and_then(waypoint_for);
            let binding = binding(scene, index, object);
            classes.insert(object.name.name.to_string(), Class { waypoint_for, binding });
        }
    }
    let mut found = Vec::new();
    for (index, object) in scene.of(GATEWAY_GROUP, "Gateway") {
        let Ok(spec) = core::read::<GatewaySpec>(object) else { continue };
        let Some(class) = classes.get(&spec.gateway_class_name) else {
            let reason =
                format!("class `{}` is not for waypoints: it has no effect here", spec.gateway_class_name);
            let at = FieldPath::of(&["spec", "gatewayClassName"]);
            scene.note(index, Severity::Info, "not-ours", &at, reason);
            continue;
        };
        let asked = object.label(FOR);
        if asked.is_some_and(|text| waypoint_for(text).is_none()) {
            let at = FieldPath::of(&["metadata", "labels", FOR]);
            let reason = "must be service, workload, all or none: it is taken as service";
            scene.note(index, Severity::Error, "invalid-value", &at, reason);
        }
        if !spec.listeners.iter().any(|listener| listener.port == HBONE_PORT && listener.protocol == "HBONE")
        {
            let at = FieldPath::of(&["spec", "listeners"]);
            let reason = "a waypoint has a listener with protocol HBONE on port 15008: it is served there all the same";
            scene.note(index, Severity::Warning, "no-listener", &at, reason);
        }
        let (namespace, name) = (&object.name.namespace, &object.name.name);
        let Ok(identity) = Identity::new(&scene.settings.trust_domain, namespace, name) else { continue };
        let hostname = format!("{name}.{namespace}.svc.{}", scene.settings.cluster_domain);
        found.push(Waypoint {
            index,
            name: object.name.clone(),
            identity,
            service: ResourceName::new(namespace.clone(), hostname),
            class: spec.gateway_class_name,
            waypoint_for: asked.and_then(waypoint_for).or(class.waypoint_for).unwrap_or(WaypointFor::Service),
            listeners: spec.listeners,
            binding: binding(scene, index, object).or(class.binding),
        });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// How tunnels are handed over to the pods of a waypoint behind a ztunnel: `PROXY/15088`, the protocol and a port.
fn binding(scene: &mut Scene<'_>, index: usize, object: &Object) -> Option<ApplicationTunnel> {
    let text = object.annotations.get(BINDING)?;
    let (protocol, port) = match text.split_once('/') {
        None => (text.as_str(), Some(None)),
        Some((protocol, port)) => (protocol, port.parse::<u16>().ok().filter(|port| *port > 0).map(Some)),
    };
    let handover = match protocol {
        "NONE" => Some(TunnelHandover::None),
        "PROXY" => Some(TunnelHandover::Proxy),
        _ => None,
    };
    if let (Some(handover), Some(port)) = (handover, port) {
        return Some(ApplicationTunnel { handover, port });
    }
    let at = FieldPath::of(&["metadata", "annotations", BINDING]);
    let reason = "must be NONE or PROXY, and may have a port, as in PROXY/15088: it has no effect";
    scene.note(index, Severity::Error, "invalid-value", &at, reason);
    None
}

fn waypoint_for(text: &str) -> Option<WaypointFor> {
    match text {
        "service" => Some(WaypointFor::Service),
        "workload" => Some(WaypointFor::Workload),
        "all" => Some(WaypointFor::All),
        "none" => Some(WaypointFor::None),
        _ => None,
    }
}

/// Sets the waypoint of every service and pod, and tells of labels that name none.
pub(super) fn bind(scene: &mut Scene<'_>, waypoints: &[Waypoint], services: &mut [Known], pods: &mut [Pod]) {
    let labels_at = FieldPath::of(&["metadata", "labels"]);
    let mut namespaces = BTreeMap::new();
    for (name, (index, object)) in scene.namespaces.clone() {
        let bound = named(scene, waypoints, index, name, &object.labels, &labels_at);
        namespaces.insert(name, bound.flatten());
    }
    for known in services.iter_mut().filter(|known| !known.is_gateway) {
        let own = match known.index.and_then(|index| Some((index, scene.objects.get(index)?))) {
            Some((index, object)) => {
                named(scene, waypoints, index, &known.service.namespace, &object.labels, &labels_at)
            }
            None => None,
        };
        let is_own = own.is_some();
        let bound = own.unwrap_or_else(|| namespaces.get(&*known.service.namespace).copied().flatten());
        known.waypoint =
            bound.filter(|waypoint| waypoint.takes_services()).map(|waypoint| waypoint.name.clone());
        known.service.waypoint = bound.filter(|waypoint| waypoint.takes_services()).map(Waypoint::address);
        if let (true, Some(waypoint), None, Some(index)) = (is_own, bound, &known.waypoint, known.index) {
            wrong_traffic(scene, index, &labels_at, waypoint, "services");
        }
    }
    for pod in pods.iter_mut() {
        let own = waypoints.iter().find(|waypoint| pod.gateway.as_ref() == Some(&waypoint.name));
        if let Some(binding) = own.and_then(|waypoint| waypoint.binding) {
            // Its tunnels end at the ztunnel of its node.
            pod.workload.native_tunnel = false;
            pod.workload.application_tunnel = Some(binding);
        }
    }
    for pod in pods.iter_mut().filter(|pod| pod.gateway.is_none()) {
        let Some(index) = pod.index else { continue };
        let own = named(scene, waypoints, index, &pod.workload.namespace, &pod.labels, &pod.labels_at);
        let is_own = own.is_some();
        let bound = own.unwrap_or_else(|| namespaces.get(&*pod.workload.namespace).copied().flatten());
        pod.workload.waypoint = bound.filter(|waypoint| waypoint.takes_workloads()).map(Waypoint::address);
        pod.waypoint =
            bound.filter(|waypoint| waypoint.takes_workloads()).map(|waypoint| waypoint.name.clone());
        if let (true, Some(waypoint), None) = (is_own, bound, &pod.waypoint) {
            wrong_traffic(scene, index, &pod.labels_at.clone(), waypoint, "workloads");
        }
    }
}

fn wrong_traffic(
    scene: &mut Scene<'_>,
    index: usize,
    labels_at: &FieldPath,
    waypoint: &Waypoint,
    what: &str,
) {
    let reason = format!("waypoint {} is not for traffic addressed to {what}: it goes direct", waypoint.name);
    scene.note(index, Severity::Warning, "wrong-waypoint", &labels_at.key(USE), reason);
}

/// The waypoint that `labels` name: `None` when they name none, `Some(None)` when they refuse one or name one that
/// cannot be used.
fn named<'w>(
    scene: &mut Scene<'_>,
    waypoints: &'w [Waypoint],
    index: usize,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    labels_at: &FieldPath,
) -> Option<Option<&'w Waypoint>> {
    let name = labels.get(USE)?;
    if name == "none" {
        return Some(None);
    }
    let home = labels.get(USE_NAMESPACE).map_or(namespace, String::as_str);
    let found =
        waypoints.iter().find(|waypoint| *waypoint.name.name == **name && *waypoint.name.namespace == *home);
    let reason = match found {
        None => format!("there is no waypoint {home}/{name}: traffic goes direct, without L7 policies"),
        Some(waypoint) if !waypoint.allows(namespace, scene) => {
            format!("waypoint {home}/{name} does not allow namespace {namespace}: traffic goes direct")
        }
        Some(waypoint) => return Some(Some(waypoint)),
    };
    scene.note(index, Severity::Error, "dangling-waypoint", &labels_at.key(USE), reason);
    Some(None)
}
