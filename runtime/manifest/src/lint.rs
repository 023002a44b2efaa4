//! Lint: what is in effect as written and hardly meant so. Other findings are made where objects are read; these need
//! the whole mesh, and cost too much to be looked for at every edit.
//!
//! Every rule has a code of [`crate::CODES`], where its meaning and mending are.

mod attachment;
mod cors;
mod cover;
mod providers;
mod routes;
mod shadow;
mod tokens;
mod values;

use crate::decode::policy::{self, Policy};
use crate::decode::{decode, target};
use crate::diagnostic::{Diagnostic, Finding, Severity};
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Findings, Node};
use crate::world::{GatewayEntry, World};
use cairn_mesh::{GatewayTarget, MeshSettings, ResourceName, Service, TargetKind, TargetRef};
use serde_json::Value;
use std::collections::BTreeSet;
use target::Attachment;

/// Looks for what is hardly meant so in `objects`, of which `world` was made. What is found is in order of file and
/// line, each thing once.
pub fn lint(objects: &[Object], world: &World, settings: &MeshSettings) -> Vec<Diagnostic> {
    let mut survey = Survey::new(objects, world, settings);
    attachment::look(&mut survey);
    values::look(&mut survey);
    shadow::look(&mut survey);
    routes::look(&mut survey);
    tokens::look(&mut survey);
    cors::look(&mut survey);
    providers::look(&mut survey);
    survey.diagnostics()
}

/// What lints look at, and what they found.
struct Survey<'a> {
    objects: &'a [Object],
    world: &'a World,
    settings: &'a MeshSettings,
    policies: Vec<Written<'a>>,
    found: Vec<Diagnostic>,
}

/// A policy that can be read.
struct Written<'a> {
    object: &'a Object,
    policy: Policy,
}

/// One thing found.
struct Remark<'t> {
    severity: Severity,
    code: &'static str,
    at: &'t FieldPath,
    reason: String,
    fix: String,
}

impl<'a> Survey<'a> {
    fn new(objects: &'a [Object], world: &'a World, settings: &'a MeshSettings) -> Self {
        let policies = objects.iter().filter_map(|object| written(object, settings)).collect();
        Self { objects, world, settings, policies, found: Vec::new() }
    }

    fn say(&mut self, object: &Object, remark: Remark<'_>) {
        let Remark { severity, code, at, reason, fix } = remark;
        let finding = Finding { severity, code, field: at.clone(), reason };
        self.found.push(Diagnostic { fix: Some(fix), ..Diagnostic::at(object, &finding) });
    }

    /// The objects of a kind that are in effect as written.
    fn of(&self, group: &str, kind: &str) -> impl Iterator<Item = &'a Object> {
        let of_kind = self.objects.iter().filter(move |object| object.is(group, kind));
        let good: Vec<&Object> = of_kind.filter(|object| !decode(object, self.settings).broken).collect();
        good.into_iter()
    }

    /// The waypoint in front of a service.
    fn waypoint_of(&self, service: &Service) -> Option<&'a GatewayEntry> {
        let GatewayTarget::Hostname(key) = &service.waypoint.as_ref()?.target else { return None };
        self.world.gateways.iter().find(|gateway| gateway.service == *key)
    }

    /// The services whose requests something in `namespace` with these targets looks at.
    fn services(&self, namespace: &str, targets: &[TargetRef]) -> Vec<&'a Service> {
        let is_target = |service: &&Service| {
            let Some(waypoint) = self.waypoint_of(service) else { return false };
            targets.iter().any(|target| match target.kind {
                TargetKind::GatewayClass => true,
                TargetKind::Gateway => waypoint.name == ResourceName::new(namespace, target.name.clone()),
                TargetKind::Service => *service.name == *target.name && *service.namespace == *namespace,
                TargetKind::ServiceEntry => false,
            })
        };
        self.world.services.iter().filter(is_target).collect()
    }

    /// What an object other than a policy attaches to.
    fn attachment(&self, object: &Object) -> Attachment {
        let mut findings = Findings::default();
        let spec = Node::new(&object.spec, object.root()).any_map(&mut findings);
        target::attachment(&spec, object, self.settings, &mut findings)
    }

    fn diagnostics(mut self) -> Vec<Diagnostic> {
        let mut seen = BTreeSet::new();
        self.found.retain(|one| seen.insert((one.object.clone(), one.field.clone(), one.code)));
        self.found.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
        self.found
    }
}

/// The policy that an object holds, if it is one that means something certain.
fn written<'a>(object: &'a Object, settings: &MeshSettings) -> Option<Written<'a>> {
    if !object.is("security.istio.io", "AuthorizationPolicy") || object.broken.is_some() {
        return None;
    }
    let mut findings = Findings::default();
    let policy = policy::parse(object, settings, &mut findings);
    (!findings.broken).then_some(Written { object, policy })
}

impl<'a> Written<'a> {
    /// The place of a rule.
    fn rule_at(&self, index: usize) -> FieldPath {
        FieldPath::of(&["spec", "rules"]).index(index)
    }

    /// The rules as written.
    fn rules(&self) -> Vec<(FieldPath, &'a Value)> {
        elements(&self.object.spec, "rules", &FieldPath::of(&["spec"]))
    }
}

/// The elements of the list `key` of a map, with their places; none if there is no such list.
fn elements<'v>(map: &'v Value, key: &str, at: &FieldPath) -> Vec<(FieldPath, &'v Value)> {
    let at = at.key(key);
    let items = map.get(key).and_then(Value::as_array).into_iter().flatten();
    items.enumerate().map(|(index, item)| (at.index(index), item)).collect()
}

/// The texts of the list `key` of a map, with their places.
fn texts<'v>(map: &'v Value, key: &str, at: &FieldPath) -> Vec<(FieldPath, &'v str)> {
    let texts = elements(map, key, at).into_iter();
    texts.filter_map(|(at, value)| Some((at, value.as_str()?))).collect()
}

/// The sources, operations or conditions of a rule: `("from", "source")`, `("to", "operation")`, `("when", "")`.
fn parts<'v>(rule: &'v Value, at: &FieldPath, key: &str, inner: &str) -> Vec<(FieldPath, &'v Value)> {
    let elements = elements(rule, key, at).into_iter();
    if inner.is_empty() {
        return elements.collect();
    }
    elements.filter_map(|(at, value)| Some((at.key(inner), value.get(inner)?))).collect()
}

#[cfg(test)]
#[path = "lint/tests.rs"]
mod tests;
