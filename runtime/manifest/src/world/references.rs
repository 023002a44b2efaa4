//! What L7 objects refer to: which waypoints get each of them, and what is not there.

use super::pods::Pod;
use super::services::Known;
use super::waypoints::Waypoint;
use super::{GATEWAY_GROUP, Scene};
use crate::decode::{decode, resource_key, target, virtual_service};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Findings, Node};
use cairn_mesh::{Kind, ResourceName, TargetKind, TargetRef};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// What there is to refer to.
struct Scenery<'a> {
    waypoints: &'a [Waypoint],
    services: &'a [Known],
    pods: &'a [Pod],
}

impl Scenery<'_> {
    fn all(&self) -> BTreeSet<ResourceName> {
        self.waypoints.iter().map(|waypoint| waypoint.name.clone()).collect()
    }

    fn service(&self, name: &ResourceName) -> Option<&Known> {
        self.services.iter().find(|known| known.name() == *name)
    }

    /// The waypoints that stand in a namespace or before something in it.
    fn of_namespace(&self, namespace: &str) -> BTreeSet<ResourceName> {
        let own = self.waypoints.iter().map(|waypoint| &waypoint.name);
        let own = own.filter(|name| *name.namespace == *namespace);
        let services = self.services.iter().filter(|known| *known.service.namespace == *namespace);
        let services = services.filter_map(|known| known.waypoint.as_ref());
        let pods = self.pods.iter().filter(|pod| *pod.workload.namespace == *namespace);
        own.chain(services).chain(pods.filter_map(|pod| pod.waypoint.as_ref())).cloned().collect()
    }
}

/// Which waypoints get which objects. An object that none gets is not listed.
pub(super) fn scope(
    scene: &mut Scene<'_>,
    waypoints: &[Waypoint],
    services: &[Known],
    pods: &[Pod],
) -> Vec<(usize, Vec<ResourceName>)> {
    let scenery = Scenery { waypoints, services, pods };
    let mut scoped = Vec::new();
    for (index, object) in scene.objects.iter().enumerate() {
        let Some(key) = resource_key(&object.group, &object.kind, &object.name) else { continue };
        let gateways = match key.kind {
            Kind::Gateway => scenery.all().into_iter().filter(|name| *name == object.name).collect(),
            Kind::HttpRoute => route(scene, index, object, &scenery),
            Kind::VirtualService => virtual_service(scene, index, object, &scenery),
            Kind::AuthorizationPolicy | Kind::RequestAuthentication | Kind::WasmPlugin => {
                attached(scene, index, object, &scenery)
            }
            Kind::Telemetry => telemetry(scene, index, object, &scenery),
            Kind::MeshConfig => scenery.all(),
            // Below, when it is known who gets the plugins that name it.
            Kind::PullSecret => BTreeSet::new(),
        };
        if !gateways.is_empty() {
            scoped.push((index, gateways.into_iter().collect()));
        }
    }
    scoped.extend(pull_secrets(scene, &scoped));
    scoped
}

/// Each pull secret goes to the waypoints of the plugins that name it, and to no other.
fn pull_secrets(
    scene: &mut Scene<'_>,
    scoped: &[(usize, Vec<ResourceName>)],
) -> Vec<(usize, Vec<ResourceName>)> {
    let is_secret = |object: &&Object| object.is("", "Secret") && object.broken.is_none();
    let mut wanted: BTreeMap<usize, BTreeSet<ResourceName>> = BTreeMap::new();
    for (plugin_index, gateways) in scoped {
        let Some(plugin) = scene.objects.get(*plugin_index).filter(|object| object.kind == "WasmPlugin")
        else {
            continue;
        };
        let named = plugin.spec.get("imagePullSecret").and_then(Value::as_str).unwrap_or_default();
        if named.is_empty() || plugin.broken.is_some() {
            continue;
        }
        let name = ResourceName::new(plugin.name.namespace.clone(), named);
        let found = scene.objects.iter().position(|object| is_secret(&object) && object.name == name);
        let usable = |index: &usize| {
            let object = scene.objects.get(*index);
            object.is_some_and(|object| !decode(object, scene.settings).changes.is_empty())
        };
        match found.filter(usable) {
            Some(index) => wanted.entry(index).or_default().extend(gateways.iter().cloned()),
            None => {
                let reason = format!(
                    "there is no Secret {name} of type kubernetes.io/dockerconfigjson: the registry is asked as nobody"
                );
                scene.note(
                    *plugin_index,
                    Severity::Error,
                    "secret-not-found",
                    &plugin.root().key("imagePullSecret"),
                    reason,
                );
            }
        }
    }
    wanted.into_iter().map(|(index, gateways)| (index, gateways.into_iter().collect())).collect()
}

/// The waypoints of what a policy or plugin attaches to.
fn attached(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    scenery: &Scenery<'_>,
) -> BTreeSet<ResourceName> {
    let mut findings = Findings::default();
    let nothing = Value::Object(serde_json::Map::new());
    let spec = if object.spec.is_null() { &nothing } else { &object.spec };
    let spec = Node::new(spec, object.root()).any_map(&mut findings);
    let attachment = target::attachment(&spec, object, scene.settings, &mut findings);
    if attachment.uncertain || object.broken.is_some() {
        let everywhere = object.name.namespace == scene.settings.root_namespace;
        return if everywhere { scenery.all() } else { scenery.of_namespace(&object.name.namespace) };
    }
    let mut gateways = BTreeSet::new();
    for (target, place) in attachment.targets.iter().zip(&attachment.places) {
        gateways.extend(one_target(scene, index, object, target, place, scenery));
    }
    gateways
}

/// The waypoints of a Telemetry: those of its targets, or of its namespace, or all from the root namespace. Of several
/// for one namespace only the oldest counts.
fn telemetry(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    scenery: &Scenery<'_>,
) -> BTreeSet<ResourceName> {
    let is_general = |object: &Object| {
        ["targetRefs", "targetRef", "selector"]
            .iter()
            .all(|key| object.spec.get(key).is_none_or(Value::is_null))
    };
    if object.broken.is_some() {
        return BTreeSet::new();
    }
    if !is_general(object) {
        return if object.spec.get("selector").is_some_and(|selector| !selector.is_null()) {
            BTreeSet::new()
        } else {
            attached(scene, index, object, scenery)
        };
    }
    let age = |object: &Object| (object.created.clone(), object.name.clone());
    let others = scene.of("telemetry.istio.io", "Telemetry").into_iter().map(|(_, other)| other);
    let mut general =
        others.filter(|other| is_general(other) && other.name.namespace == object.name.namespace);
    if let Some(older) = general.find(|other| age(other) < age(object)) {
        let reason = format!("{} is for the same namespace and older: this has no effect", older.name);
        scene.note(index, Severity::Warning, "not-attached", &object.root(), reason);
    }
    if object.name.namespace == scene.settings.root_namespace {
        scenery.all()
    } else {
        scenery.of_namespace(&object.name.namespace)
    }
}

fn one_target(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    target: &TargetRef,
    place: &FieldPath,
    scenery: &Scenery<'_>,
) -> BTreeSet<ResourceName> {
    let name = ResourceName::new(object.name.namespace.clone(), target.name.clone());
    let (code, reason) = match target.kind {
        TargetKind::GatewayClass => return scenery.all(),
        TargetKind::Gateway => {
            if scenery.waypoints.iter().any(|waypoint| waypoint.name == name) {
                return BTreeSet::from([name]);
            }
            if scene.objects.iter().any(|other| other.is(GATEWAY_GROUP, "Gateway") && other.name == name) {
                ("target-not-bound", format!("Gateway {name} is not a waypoint: this has no effect here"))
            } else {
                ("target-not-found", format!("there is no Gateway {name}: this has no effect"))
            }
        }
        TargetKind::Service => match scenery.service(&name) {
            None => ("target-not-found", format!("there is no Service {name}: this has no effect")),
            Some(Known { waypoint: Some(waypoint), .. }) => return BTreeSet::from([waypoint.clone()]),
            Some(_) => {
                let reason = format!(
                    "Service {name} has no waypoint (label istio.io/use-waypoint): this has no effect"
                );
                ("target-not-bound", reason)
            }
        },
        TargetKind::ServiceEntry => {
            ("not-supported", "ServiceEntry is not supported yet: this has no effect".to_owned())
        }
    };
    scene.note(index, Severity::Error, code, place, reason);
    BTreeSet::new()
}

/// The waypoints of a route's parents. Looked at as written, for the places, once the route is known to be readable.
fn route(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    scenery: &Scenery<'_>,
) -> BTreeSet<ResourceName> {
    if object.broken.is_some() || decode(object, scene.settings).broken {
        return BTreeSet::new();
    }
    let spec = object.root();
    let mut gateways = BTreeSet::new();
    for (at, reference) in references(&object.spec, "parentRefs", &spec) {
        if reference.get("kind").and_then(Value::as_str) == Some("Service") {
            gateways.extend(parent(scene, index, object, reference, &at, scenery));
        }
    }
    for (rule_at, rule) in references(&object.spec, "rules", &spec) {
        for (at, reference) in references(rule, "backendRefs", &rule_at) {
            backend(scene, index, object, reference, &at, scenery);
        }
    }
    gateways
}

/// The waypoints of a VirtualService's hosts.
fn virtual_service(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    scenery: &Scenery<'_>,
) -> BTreeSet<ResourceName> {
    if object.broken.is_some() || decode(object, scene.settings).broken {
        return BTreeSet::new();
    }
    let spec = object.root();
    // As a route refers to it.
    let reference = |host: &Value, port: Option<&Value>, settings| {
        let service = virtual_service::service(host.as_str()?, object, settings)?;
        Some(
            json!({ "kind": "Service", "namespace": &*service.namespace, "name": &*service.name, "port": port }),
        )
    };
    let mut gateways = BTreeSet::new();
    for (at, host) in references(&object.spec, "hosts", &spec) {
        let Some(reference) = reference(host, None, scene.settings) else { continue };
        gateways.extend(parent(scene, index, object, &reference, &at, scenery));
    }
    for (rule_at, rule) in references(&object.spec, "http", &spec) {
        for (at, share) in references(rule, "route", &rule_at) {
            let Some(destination) = share.get("destination") else { continue };
            let port = destination.get("port").and_then(|port| port.get("number"));
            let host = destination.get("host").unwrap_or(&Value::Null);
            let Some(reference) = reference(host, port, scene.settings) else { continue };
            backend(scene, index, object, &reference, &at.key("destination"), scenery);
        }
    }
    gateways
}

/// The elements of a list and their places.
fn references<'v>(map: &'v Value, key: &str, at: &FieldPath) -> Vec<(FieldPath, &'v Value)> {
    let at = at.key(key);
    let items = map.get(key).and_then(Value::as_array).into_iter().flatten();
    items.enumerate().map(|(index, item)| (at.index(index), item)).collect()
}

fn referred(object: &Object, reference: &Value) -> Option<ResourceName> {
    let text = |key| reference.get(key).and_then(Value::as_str);
    let namespace = text("namespace").unwrap_or(&object.name.namespace);
    Some(ResourceName::new(namespace, text("name")?))
}

fn port(reference: &Value) -> Option<u16> {
    reference.get("port").and_then(Value::as_f64).map(|port| port as u16)
}

fn parent(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    reference: &Value,
    at: &FieldPath,
    scenery: &Scenery<'_>,
) -> Option<ResourceName> {
    let name = referred(object, reference)?;
    let Some(known) = scenery.service(&name) else {
        let reason = format!("there is no Service {name}: the route has no effect on it");
        scene.note(index, Severity::Error, "parent-not-found", at, reason);
        return None;
    };
    if known.is_headless {
        let reason = format!(
            "Service {name} is headless, and its pods are addressed past it: the route has no effect"
        );
        scene.note(index, Severity::Error, "parent-not-bound", at, reason);
    } else if port(reference).is_some_and(|port| known.service.port(port).is_none()) {
        let reason = format!("Service {name} has no such port: the route has no effect on it");
        scene.note(index, Severity::Error, "parent-not-found", &at.key("port"), reason);
    }
    if known.waypoint.is_none() {
        let reason = format!(
            "Service {name} has no waypoint (label istio.io/use-waypoint): the route has no effect on it"
        );
        scene.note(index, Severity::Error, "parent-not-bound", at, reason);
    }
    known.waypoint.clone()
}

fn backend(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    reference: &Value,
    at: &FieldPath,
    scenery: &Scenery<'_>,
) {
    let kind = reference.get("kind").and_then(Value::as_str).unwrap_or("Service");
    let (Some(name), "Service") = (referred(object, reference), kind) else { return };
    let port = port(reference);
    let consequence = "its share of the requests is answered 500";
    match scenery.service(&name) {
        None => {
            let reason = format!("there is no Service {name}: {consequence}");
            scene.note(index, Severity::Error, "backend-not-found", at, reason);
        }
        Some(known) => {
            let Some(port) = port.filter(|port| known.service.port(*port).is_none()) else { return };
            let reason = format!("Service {name} has no port {port}: {consequence}");
            scene.note(index, Severity::Error, "backend-not-found", &at.key("port"), reason);
        }
    }
}
