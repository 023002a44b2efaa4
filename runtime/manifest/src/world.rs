//! The mesh that a set of objects describes: workloads, services, L4 policies, and which waypoint reads what.
//!
//! Read in the order of [`World::build`]: what is there (pods, waypoints, services), how it hangs together (bindings,
//! endpoints), what guards it (L4 policies), and what does not fit (references).

mod core;
mod l4;
mod peer;
mod pods;
mod references;
mod services;
mod waypoints;

use crate::diagnostic::{Diagnostic, Finding, Severity};
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::Findings;
use cairn_mesh::{Authorization, Identity, MeshSettings, ResourceName, Service, Workload};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The group of Gateways and their classes.
const GATEWAY_GROUP: &str = crate::decode::target::GATEWAY_GROUP;

/// Gives addresses to what has none in its manifest.
pub trait Addressing {
    /// The address of a pod; `None`: it has none yet, and is left out.
    fn pod(&mut self, namespace: &str, name: &str) -> Option<IpAddr>;
    /// The address of a service; `None`: it has none, and is found by its name only.
    fn service(&mut self, namespace: &str, name: &str) -> Option<IpAddr>;
}

/// What traffic a waypoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaypointFor {
    /// Traffic addressed to services.
    Service,
    /// Traffic addressed to workloads themselves.
    Workload,
    /// Both.
    All,
    /// None.
    None,
}

/// One waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayEntry {
    /// The Gateway's name.
    pub name: ResourceName,
    /// Its class.
    pub class: String,
    /// Who its pods are: the service account is named as the Gateway.
    pub identity: Identity,
    /// What traffic it is for.
    pub waypoint_for: WaypointFor,
    /// Its service, `namespace/hostname`.
    pub service: ResourceName,
    /// The uids of its pods.
    pub workloads: Vec<String>,
}

/// The mesh that a set of objects describes.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// All workloads, by uid.
    pub workloads: Vec<Workload>,
    /// All services, by namespace and name.
    pub services: Vec<Service>,
    /// All L4 policies, by name.
    pub authorizations: Vec<Authorization>,
    /// All waypoints, by name.
    pub gateways: Vec<GatewayEntry>,
    /// Objects that waypoints read, by their index among the objects given, and the waypoints that get each.
    pub scoped: Vec<(usize, Vec<ResourceName>)>,
    /// What does not fit together.
    pub diagnostics: Vec<Diagnostic>,
}

impl World {
    /// Builds the mesh that `objects` describe. What is wrong within one object was said when it was read, so it is
    /// not said again here; a policy that cannot be read refuses what it guards.
    pub fn build(objects: &[Object], addressing: &mut dyn Addressing, settings: &MeshSettings) -> Self {
        let mut scene = Scene::new(objects, settings);
        let waypoints = waypoints::waypoints(&mut scene);
        let mut pods = pods::pods(&mut scene, &waypoints, addressing);
        let mut services = services::services(&mut scene, &waypoints, addressing);
        services::connect(&mut scene, &mut services, &mut pods);
        waypoints::bind(&mut scene, &waypoints, &mut services, &mut pods);
        let mut authorizations = l4::policies(&mut scene, &waypoints, &mut pods);
        authorizations.extend(peer::policies(&mut scene, &mut pods));
        authorizations.sort_by(|a, b| a.name.cmp(&b.name));
        let scoped = references::scope(&mut scene, &waypoints, &services, &pods);
        let mut workloads: Vec<Workload> = pods.into_iter().map(|pod| pod.workload).collect();
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        Self {
            gateways: waypoints.iter().map(|waypoint| waypoint.entry(&workloads)).collect(),
            workloads,
            services: services.into_iter().map(|service| service.service).collect(),
            authorizations,
            scoped,
            diagnostics: scene.diagnostics(),
        }
    }
}

/// What is known of the objects while the mesh is built.
struct Scene<'a> {
    objects: &'a [Object],
    settings: &'a MeshSettings,
    namespaces: BTreeMap<&'a str, (usize, &'a Object)>,
    findings: Vec<(usize, Finding)>,
}

impl<'a> Scene<'a> {
    fn new(objects: &'a [Object], settings: &'a MeshSettings) -> Self {
        let is_namespace = |(_, object): &(usize, &Object)| object.is("", "Namespace");
        let namespaces = objects.iter().enumerate().filter(is_namespace);
        let namespaces = namespaces.map(|(index, object)| (&*object.name.name, (index, object))).collect();
        Self { objects, settings, namespaces, findings: Vec::new() }
    }

    /// The objects of a kind that can be read, with their indices.
    fn of(&self, group: &str, kind: &str) -> Vec<(usize, &'a Object)> {
        let objects = self.objects.iter().enumerate();
        objects.filter(|(_, object)| object.is(group, kind) && object.broken.is_none()).collect()
    }

    /// A label of a namespace.
    fn namespace_label(&self, namespace: &str, label: &str) -> Option<&'a str> {
        self.namespaces.get(namespace)?.1.label(label)
    }

    fn note(
        &mut self,
        index: usize,
        severity: Severity,
        code: &'static str,
        field: &FieldPath,
        reason: impl Into<String>,
    ) {
        self.findings.push((index, Finding { severity, code, field: field.clone(), reason: reason.into() }));
    }

    /// What was found, each thing once, in the order of files and lines.
    fn diagnostics(self) -> Vec<Diagnostic> {
        let mut seen = BTreeSet::new();
        let mut diagnostics: Vec<Diagnostic> = Vec::new();
        for (index, finding) in &self.findings {
            if seen.insert((index, &finding.field, finding.code)) {
                diagnostics.extend(self.objects.get(*index).map(|object| Diagnostic::at(object, finding)));
            }
        }
        diagnostics.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
        diagnostics
    }
}

/// Whether `labels` have everything that `wanted` asks.
fn selects(wanted: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(name, value)| labels.get(name) == Some(value))
}

/// What is wrong within an object of the kinds that only the world reads.
pub(crate) fn check(object: &Object, settings: &MeshSettings) -> Findings {
    let mut findings = Findings::default();
    let checked = match (object.group.as_str(), object.kind.as_str()) {
        ("", "Pod") => core::read::<core::Pod>(object).map(drop),
        ("", "Service") => core::read::<core::Service>(object).map(drop),
        ("apps", "Deployment" | "StatefulSet" | "ReplicaSet") => {
            core::read::<core::Controller>(object).map(drop)
        }
        ("discovery.k8s.io", "EndpointSlice") => core::read::<core::EndpointSlice>(object).map(drop),
        (GATEWAY_GROUP, "Gateway") => core::read::<core::GatewaySpec>(object).map(drop),
        (GATEWAY_GROUP, "GatewayClass") => core::read::<core::GatewayClassSpec>(object).map(drop),
        ("security.istio.io", "PeerAuthentication") => {
            peer::parse(object, settings, &mut findings);
            Ok(())
        }
        _ => Ok(()),
    };
    if let Err(finding) = checked {
        findings.list.push(finding);
        findings.broken = true;
    }
    findings
}

#[cfg(test)]
#[path = "world/tests.rs"]
mod tests;
