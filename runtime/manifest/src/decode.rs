//! Objects into changes of a waypoint's configuration. The directory checks manifests with it before anything is
//! served, and a waypoint reads with it what it receives over xDS.

mod gateway;
mod plugin;
mod plugin_limits;
pub(crate) mod policy;
mod provider;
mod pull_secret;
mod request_authentication;
mod route;
mod settings;
pub(crate) mod target;
mod telemetry;
mod telemetry_settings;
pub(crate) mod virtual_service;

pub use settings::written_mesh_config;

use crate::diagnostic::{Finding, Severity};
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::Findings;
use cairn_mesh::{Change, Kind, MeshSettings, ResourceKey, ResourceName, TargetRef, Unenforceable};
pub(crate) use settings::mesh_config;
use target::Attachment;

/// What an object means for a waypoint.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// To be applied, also when something is wrong: a policy that cannot be read certainly is replaced by a refusal
    /// of what it guards.
    pub changes: Vec<Change>,
    /// What was found on the way.
    pub findings: Vec<Finding>,
    /// The object as written means nothing certain: an earlier good version of it should stay in its place.
    pub broken: bool,
}

/// The key under which the L7 pipeline knows an object; `None` for kinds that it does not read.
pub fn resource_key(group: &str, kind: &str, name: &ResourceName) -> Option<ResourceKey> {
    let is_settings = kind == "MeshConfig" || (kind == "ConfigMap" && &*name.name == "istio");
    let kind = match (group, kind) {
        ("gateway.networking.k8s.io", "Gateway") => Kind::Gateway,
        ("gateway.networking.k8s.io", "HTTPRoute") => Kind::HttpRoute,
        ("networking.istio.io", "VirtualService") => Kind::VirtualService,
        ("security.istio.io", "AuthorizationPolicy") => Kind::AuthorizationPolicy,
        ("security.istio.io", "RequestAuthentication") => Kind::RequestAuthentication,
        ("telemetry.istio.io", "Telemetry") => Kind::Telemetry,
        ("extensions.istio.io", "WasmPlugin") => Kind::WasmPlugin,
        ("", "Secret") => Kind::PullSecret,
        (_, _) if is_settings && &*name.namespace == "istio-system" => Kind::MeshConfig,
        _ => return None,
    };
    Some(ResourceKey { kind, name: name.clone() })
}

/// Reads an object. Kinds that the L7 pipeline does not read change nothing.
pub fn decode(object: &Object, settings: &MeshSettings) -> Decoded {
    let mut findings = Findings::default();
    let Some(key) = resource_key(&object.group, &object.kind, &object.name) else {
        return Decoded { changes: Vec::new(), findings: Vec::new(), broken: false };
    };
    let changes = if let Some(reason) = &object.broken {
        findings.broken = true;
        unreadable(object, &key, reason)
    } else {
        look_for_trial(object, key.kind, &mut findings);
        match key.kind {
            Kind::Gateway => gateway::decode(object, &mut findings),
            Kind::HttpRoute => route::decode(object, &mut findings),
            Kind::VirtualService => virtual_service::decode(object, settings, &mut findings),
            Kind::AuthorizationPolicy => policy::decode(object, &key, settings, &mut findings),
            Kind::RequestAuthentication => {
                request_authentication::decode(object, &key, settings, &mut findings)
            }
            Kind::Telemetry => telemetry::decode(object, &key, settings, &mut findings),
            Kind::WasmPlugin => plugin::decode(object, &key, settings, &mut findings),
            Kind::PullSecret => pull_secret::decode(object, &mut findings),
            Kind::MeshConfig => settings::decode(object, settings, &mut findings),
        }
    };
    Decoded { changes, findings: findings.list, broken: findings.broken }
}

/// Notes that what was meant to be on trial is in effect: of what guards traffic only AuthorizationPolicy can be tried.
fn look_for_trial(object: &Object, kind: Kind, findings: &mut Findings) {
    let is_guard = matches!(kind, Kind::RequestAuthentication | Kind::WasmPlugin);
    if is_guard && object.annotations.contains_key(policy::DRY_RUN) {
        let at = FieldPath::of(&["metadata", "annotations", policy::DRY_RUN]);
        let reason = "only an AuthorizationPolicy can be tried without effect: this is in effect";
        findings.note(Severity::Error, "invalid-value", &at, reason);
    }
}

/// A document that is not YAML: what it would guard in its namespace is refused.
fn unreadable(object: &Object, key: &ResourceKey, reason: &str) -> Vec<Change> {
    match key.kind {
        Kind::AuthorizationPolicy | Kind::RequestAuthentication | Kind::WasmPlugin => {
            vec![unenforceable(object, key, Vec::new(), format!("it cannot be read: {reason}"))]
        }
        Kind::Gateway
        | Kind::HttpRoute
        | Kind::VirtualService
        | Kind::PullSecret
        | Kind::Telemetry
        | Kind::MeshConfig => Vec::new(),
    }
}

fn unenforceable(object: &Object, key: &ResourceKey, targets: Vec<TargetRef>, reason: String) -> Change {
    let namespace = object.name.namespace.clone();
    let what = object.to_string().into();
    Change::Unenforceable(key.clone(), Unenforceable { what, targets, namespace, reason: reason.into() })
}

/// The refusal that stands for a policy that was refused in reading.
fn refusal(object: &Object, key: &ResourceKey, attachment: &Attachment, findings: &Findings) -> Vec<Change> {
    if !attachment.guards_waypoints() {
        return vec![Change::L7Removed(key.clone())];
    }
    let first = findings.list.iter().find(|finding| finding.severity == Severity::Error);
    let reason = first.map_or_else(|| "it cannot be read".to_owned(), Finding::to_string);
    vec![unenforceable(object, key, attachment.certain_targets(), reason)]
}

#[cfg(test)]
#[path = "decode/tests.rs"]
mod tests;
