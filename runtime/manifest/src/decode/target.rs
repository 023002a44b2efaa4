//! What a policy attaches to: `targetRefs`, or a `selector`.

use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{MeshSettings, TargetKind, TargetRef};
use std::collections::BTreeMap;

/// The API group of Gateways and routes.
pub(crate) const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
/// The class of waypoints.
pub(crate) const WAYPOINT_CLASS: &str = "istio-waypoint";
/// Istio's limit on targets of one policy.
const TARGETS_MAX: usize = 16;

/// What a policy attaches to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attachment {
    /// The targets that could be read.
    pub(crate) targets: Vec<TargetRef>,
    /// Where each of them is written.
    pub(crate) places: Vec<FieldPath>,
    /// Labels of the workloads selected; `None` without a selector or with an empty one.
    pub(crate) selector: Option<BTreeMap<String, String>>,
    /// It has targets, readable or not.
    pub(crate) has_targets: bool,
    /// What it attaches to is not certain: everything in its namespace is meant then.
    pub(crate) uncertain: bool,
}

impl Attachment {
    /// Whether waypoints are to take it.
    pub(crate) fn guards_waypoints(&self) -> bool {
        self.has_targets || self.uncertain
    }

    /// Whether ztunnels are to take it.
    pub(crate) fn guards_workloads(&self) -> bool {
        !self.has_targets || self.uncertain || self.selector.is_some()
    }

    /// The targets, or none, which means the whole namespace, when they are not certain.
    pub(crate) fn certain_targets(&self) -> Vec<TargetRef> {
        if self.uncertain { Vec::new() } else { self.targets.clone() }
    }
}

/// Reads `selector`, `targetRef` and `targetRefs`.
pub(crate) fn attachment(
    spec: &Entries<'_>,
    object: &Object,
    settings: &MeshSettings,
    findings: &mut Findings,
) -> Attachment {
    let outer = std::mem::take(findings);
    let mut found = Attachment { uncertain: outer.broken && spec.is_unreadable(), ..Attachment::default() };
    *findings = Findings { list: outer.list, broken: false };
    let mut refs = spec.bounded_list("targetRefs", TARGETS_MAX, findings);
    refs.extend(spec.get("targetRef"));
    for node in &refs {
        if let Some(target) = target_ref(node, object, settings, findings) {
            found.targets.push(target);
            found.places.push(node.at.clone());
        }
    }
    found.has_targets = !refs.is_empty() || spec.get("targetRefs").is_some();
    found.selector = spec.get("selector").and_then(|node| selector(&node, findings));
    found.uncertain |= findings.broken;
    if found.selector.is_some() && found.has_targets {
        let reason =
            "`selector` and `targetRefs` are both set: a policy is for workloads or for waypoints, not both";
        findings.refuse("selector-and-target-refs", &spec.at.key("selector"), reason);
    } else if found.has_targets && refs.is_empty() {
        findings.refuse("invalid-value", &spec.at.key("targetRefs"), "must not be empty");
        found.uncertain = true;
    }
    findings.broken |= outer.broken;
    found
}

fn target_ref(
    node: &Node<'_>,
    object: &Object,
    settings: &MeshSettings,
    findings: &mut Findings,
) -> Option<TargetRef> {
    let entries = node.map(&["group", "kind", "name", "namespace", "sectionName"], findings);
    let group = entries.text("group", findings).unwrap_or_default();
    let kind = entries.require("kind", findings)?.text(findings)?;
    let name = entries.require("name", findings)?.filled(findings)?;
    for refused in ["namespace", "sectionName"] {
        if let Some(value) = entries.get(refused).filter(|node| node.value.as_str() != Some("")) {
            findings.refuse(
                "invalid-value",
                &value.at,
                "must not be set: a target is in the policy's own namespace",
            );
        }
    }
    let kind = match (group, kind) {
        (GATEWAY_GROUP, "Gateway") => TargetKind::Gateway,
        (GATEWAY_GROUP, "GatewayClass") => TargetKind::GatewayClass,
        ("" | "core", "Service") => TargetKind::Service,
        ("networking.istio.io", "ServiceEntry") => TargetKind::ServiceEntry,
        _ => {
            let reason = format!("`{kind}` of group `{group}` cannot be a target");
            findings.refuse("invalid-value", &node.at, reason);
            return None;
        }
    };
    if kind == TargetKind::GatewayClass {
        if object.name.namespace != settings.root_namespace {
            let reason = format!("only policies in {} may target a GatewayClass", settings.root_namespace);
            findings.refuse("invalid-value", &node.at, reason);
        } else if name != WAYPOINT_CLASS {
            findings.refuse("invalid-value", &node.at, format!("the class of waypoints is {WAYPOINT_CLASS}"));
        }
    }
    Some(TargetRef { kind, name: name.into() })
}

/// Reads a label selector; an empty one counts as none.
pub(crate) fn selector(node: &Node<'_>, findings: &mut Findings) -> Option<BTreeMap<String, String>> {
    let labels = node.map(&["matchLabels"], findings).get("matchLabels")?;
    let mut wanted = BTreeMap::new();
    for (name, value) in labels.any_map(findings).all() {
        if let Some(text) = value.text(findings) {
            wanted.insert(name.clone(), text.to_owned());
        }
    }
    (!wanted.is_empty()).then_some(wanted)
}
