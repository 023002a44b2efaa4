//! Pods: those written, those that a Deployment or StatefulSet would start, and those of waypoints.

use super::core::{self, Controller, PodSpec, PodStatus};
use super::waypoints::{GATEWAY_NAME, Waypoint};
use super::{Addressing, Scene};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::{Object, Owner};
use cairn_mesh::{Health, Identity, ResourceName, TunnelProtocol, Workload, WorkloadKind};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// How many pods one manifest may ask for.
const REPLICAS_MAX: u32 = 1000;
const MODE: &str = "istio.io/dataplane-mode";
/// With the value `http`: the pod speaks HBONE itself, and no ztunnel serves it (Istio's label).
const TUNNEL: &str = "networking.istio.io/tunnel";
/// The node of pods that no manifest places.
const NODE: &str = "node";

/// A pod, on its way to become a workload.
#[derive(Debug)]
pub(super) struct Pod {
    /// The object it comes from.
    pub(super) index: Option<usize>,
    /// Its labels, and where in the object they are.
    pub(super) labels: BTreeMap<String, String>,
    pub(super) labels_at: FieldPath,
    /// Its named ports.
    pub(super) ports: BTreeMap<String, u16>,
    /// The waypoint it is an instance of.
    pub(super) gateway: Option<ResourceName>,
    /// The waypoint in front of it.
    pub(super) waypoint: Option<ResourceName>,
    pub(super) workload: Workload,
}

/// What a pod is made of.
struct Draft<'a> {
    index: usize,
    namespace: &'a str,
    name: String,
    labels: &'a BTreeMap<String, String>,
    annotations: &'a BTreeMap<String, String>,
    /// Path of the metadata in the object.
    metadata_at: FieldPath,
    spec: &'a PodSpec,
    status: PodStatus,
    kind: WorkloadKind,
    workload_name: String,
}

/// Makes all pods.
pub(super) fn pods(
    scene: &mut Scene<'_>,
    waypoints: &[Waypoint],
    addressing: &mut dyn Addressing,
) -> Vec<Pod> {
    let mut pods = Vec::new();
    let owners = Owners::new(scene);
    let mut controlled: BTreeSet<(&str, String, String)> = BTreeSet::new();
    for (index, object) in scene.of("", "Pod") {
        let Ok(pod) = core::read::<core::Pod>(object) else { continue };
        let owner = object.owner.as_ref().map(|owner| owners.top(object, owner));
        let (kind, workload_name) = match &owner {
            Some(owner) => (workload_kind(&owner.kind), owner.name.clone()),
            None => (WorkloadKind::Pod, object.name.name.to_string()),
        };
        if let Some(owner) = owner {
            controlled.insert((&object.name.namespace, owner.kind, owner.name));
        }
        if matches!(pod.status.phase.as_str(), "Succeeded" | "Failed") {
            continue;
        }
        let draft = Draft {
            index,
            namespace: &object.name.namespace,
            name: object.name.name.to_string(),
            labels: &object.labels,
            annotations: &object.annotations,
            metadata_at: FieldPath::of(&["metadata"]),
            spec: &pod.spec,
            status: pod.status,
            kind,
            workload_name,
        };
        pods.extend(make(scene, draft, addressing));
    }
    for kind in ["Deployment", "StatefulSet", "ReplicaSet"] {
        for (index, object) in scene.of("apps", kind) {
            let namespace = &*object.name.namespace;
            let has_pods = controlled.contains(&(namespace, kind.to_owned(), object.name.name.to_string()));
            let has_owner = object.owner.is_some();
            if let (Ok(controller), false, false) = (core::read::<Controller>(object), has_pods, has_owner) {
                pods.extend(replicas(scene, index, object, &controller, addressing));
            }
        }
    }
    for waypoint in waypoints {
        if !pods.iter().any(|pod| pod.gateway.as_ref() == Some(&waypoint.name)) {
            pods.extend(gateway_pod(scene, waypoint, addressing));
        }
    }
    unique(scene, pods)
}

/// What controls what, upwards from ReplicaSets.
struct Owners<'a> {
    replica_sets: BTreeMap<&'a ResourceName, &'a Owner>,
}

impl<'a> Owners<'a> {
    fn new(scene: &Scene<'a>) -> Self {
        let sets = scene.of("apps", "ReplicaSet").into_iter();
        Self { replica_sets: sets.filter_map(|(_, set)| Some((&set.name, set.owner.as_ref()?))).collect() }
    }

    /// What controls `object` in the end. A ReplicaSet that is not among the manifests is taken to be of the
    /// Deployment whose name comes before the template's hash.
    fn top(&self, object: &Object, owner: &Owner) -> Owner {
        if owner.kind != "ReplicaSet" {
            return owner.clone();
        }
        let name = ResourceName::new(object.name.namespace.clone(), owner.name.as_str());
        if let Some(above) = self.replica_sets.get(&name) {
            return (*above).clone();
        }
        let hash = object.label("pod-template-hash");
        let deployment = hash.and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-'));
        match deployment {
            Some(name) => Owner { kind: "Deployment".to_owned(), name: name.to_owned() },
            None => owner.clone(),
        }
    }
}

fn workload_kind(kind: &str) -> WorkloadKind {
    match kind {
        "Deployment" => WorkloadKind::Deployment,
        "CronJob" => WorkloadKind::CronJob,
        "Job" => WorkloadKind::Job,
        _ => WorkloadKind::Pod,
    }
}

fn replicas(
    scene: &mut Scene<'_>,
    index: usize,
    object: &Object,
    controller: &Controller,
    addressing: &mut dyn Addressing,
) -> Vec<Pod> {
    let wanted = controller.spec.replicas.unwrap_or(1);
    if wanted > REPLICAS_MAX {
        let at = FieldPath::of(&["spec", "replicas"]);
        let reason = format!("at most {REPLICAS_MAX} pods are made of one manifest");
        scene.note(index, Severity::Error, "invalid-value", &at, reason);
    }
    let template = &controller.spec.template;
    let make_one = |replica| Draft {
        index,
        namespace: &object.name.namespace,
        name: format!("{}-{replica}", object.name.name),
        labels: &template.metadata.labels,
        annotations: &template.metadata.annotations,
        metadata_at: FieldPath::of(&["spec", "template", "metadata"]),
        spec: &template.spec,
        status: PodStatus::default(),
        kind: workload_kind(&object.kind),
        workload_name: object.name.name.to_string(),
    };
    (0..wanted.min(REPLICAS_MAX)).filter_map(|replica| make(scene, make_one(replica), addressing)).collect()
}

fn make(scene: &mut Scene<'_>, draft: Draft<'_>, addressing: &mut dyn Addressing) -> Option<Pod> {
    let Draft { index, namespace, labels, .. } = draft;
    let account = draft.spec.service_account_name.as_deref().unwrap_or("default");
    let identity = match Identity::new(&scene.settings.trust_domain, namespace, account) {
        Ok(identity) => identity,
        Err(error) => {
            scene.note(index, Severity::Error, "invalid-value", &draft.metadata_at, error.to_string());
            return None;
        }
    };
    let addresses = addresses(&draft, addressing);
    if addresses.is_empty() {
        let reason = format!("pod {} has no address yet: it is left out", draft.name);
        scene.note(index, Severity::Info, "no-address", &draft.metadata_at, reason);
        return None;
    }
    let gateway = labels.get(GATEWAY_NAME).map(|name| ResourceName::new(namespace, name.as_str()));
    let native_tunnel = gateway.is_some() || labels.get(TUNNEL).is_some_and(|value| value == "http");
    let protocol = protocol(scene, &draft, native_tunnel);
    let label =
        |names: [&str; 3]| names.iter().find_map(|name| labels.get(*name)).filter(|value| !value.is_empty());
    let canonical_name = label(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = label(["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    let uid = format!("{}//Pod/{namespace}/{}", scene.settings.cluster_id, draft.name);
    let workload = Workload {
        addresses,
        protocol,
        node: draft.spec.node_name.as_deref().unwrap_or(NODE).into(),
        canonical_name: canonical_name.unwrap_or(&draft.workload_name).as_str().into(),
        canonical_revision: revision.map_or("latest", String::as_str).into(),
        kind: draft.kind,
        workload_name: draft.workload_name.as_str().into(),
        native_tunnel,
        health: health(&draft.status),
        cluster_id: scene.settings.cluster_id.clone(),
        ..Workload::new(uid, draft.name.as_str(), identity)
    };
    let ports = draft.spec.containers.iter().flat_map(|container| &container.ports);
    Some(Pod {
        index: Some(index),
        labels: labels.clone(),
        labels_at: draft.metadata_at.key("labels"),
        ports: ports.filter_map(|port| Some((port.name.clone()?, port.container_port))).collect(),
        gateway,
        waypoint: None,
        workload,
    })
}

fn addresses(draft: &Draft<'_>, addressing: &mut dyn Addressing) -> Vec<IpAddr> {
    let mut own: Vec<IpAddr> = draft.status.pod_ips.iter().map(|ip| ip.ip).collect();
    if let Some(first) = draft.status.pod_ip.filter(|first| !own.contains(first)) {
        own.insert(0, first);
    }
    if own.is_empty() {
        own.extend(addressing.pod(draft.namespace, &draft.name));
    }
    own
}

/// In the mesh: as the pod speaks HBONE itself, or by its own label, else its namespace's. A pod on the node's network
/// cannot be captured.
fn protocol(scene: &Scene<'_>, draft: &Draft<'_>, native_tunnel: bool) -> TunnelProtocol {
    let mode = draft.labels.get(MODE).map(String::as_str);
    let mode = mode.or_else(|| scene.namespace_label(draft.namespace, MODE));
    let captured =
        draft.annotations.get("ambient.istio.io/redirection").is_some_and(|value| value == "enabled");
    if native_tunnel || (!draft.spec.host_network && (captured || mode == Some("ambient"))) {
        TunnelProtocol::Hbone
    } else {
        TunnelProtocol::None
    }
}

fn health(status: &PodStatus) -> Health {
    match status.conditions.iter().find(|condition| condition.kind == "Ready") {
        Some(ready) if ready.status != "True" => Health::Unhealthy,
        _ => Health::Healthy,
    }
}

/// The pod that a Gateway would start.
fn gateway_pod(scene: &mut Scene<'_>, waypoint: &Waypoint, addressing: &mut dyn Addressing) -> Option<Pod> {
    let (namespace, gateway) = (&*waypoint.name.namespace, &*waypoint.name.name);
    let labels = BTreeMap::from([(GATEWAY_NAME.to_owned(), gateway.to_owned())]);
    let spec = PodSpec { service_account_name: Some(gateway.to_owned()), ..PodSpec::default() };
    let draft = Draft {
        index: waypoint.index,
        namespace,
        name: format!("{gateway}-0"),
        labels: &labels,
        annotations: &BTreeMap::new(),
        metadata_at: FieldPath::of(&["metadata"]),
        spec: &spec,
        status: PodStatus::default(),
        kind: WorkloadKind::Deployment,
        workload_name: gateway.to_owned(),
    };
    make(scene, draft, addressing)
}

/// Each pod once: a written one before a made one.
fn unique(scene: &mut Scene<'_>, pods: Vec<Pod>) -> Vec<Pod> {
    let mut seen = BTreeSet::new();
    let mut kept = Vec::new();
    for pod in pods {
        if seen.insert(pod.workload.uid.clone()) {
            kept.push(pod);
        } else if let Some(index) = pod.index {
            let reason = format!("there already is a pod {}/{}", pod.workload.namespace, pod.workload.name);
            scene.note(
                index,
                Severity::Error,
                "duplicate-object",
                &FieldPath::of(&["metadata", "name"]),
                reason,
            );
        }
    }
    kept
}
