//! Objects as they come from our own control plane, turned into changes of the mesh by the manifests' decoder.

use cairn_manifest::{Object, Severity, decode, resource_key};
use cairn_mesh::{Change, Kind, MeshSettings};
use cairn_xds::{ObjectDecoder, ObjectEvent};
use parking_lot::Mutex;
use std::sync::Arc;

/// The types that a waypoint subscribes to, beside workloads and services.
pub const OBJECT_TYPES: [&str; 9] = [
    "mesh.istio.io/v1alpha1/MeshConfig",
    "gateway.networking.k8s.io/v1/Gateway",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "networking.istio.io/v1/VirtualService",
    "security.istio.io/v1/AuthorizationPolicy",
    "security.istio.io/v1/RequestAuthentication",
    "telemetry.istio.io/v1/Telemetry",
    "extensions.istio.io/v1alpha1/WasmPlugin",
    "/v1/Secret",
];

/// The annotation by which the control plane says that a document could not be read, and why: its target is refused
/// rather than left without it.
pub const BROKEN: &str = "cairn.dev/broken";

/// A decoder that remembers the mesh's settings, which some kinds are read by.
pub fn decoder() -> ObjectDecoder {
    let settings = Mutex::new(MeshSettings::default());
    Box::new(move |event| match event {
        ObjectEvent::Removed { type_url, name } => {
            let (group, kind) = match *type_url.split('/').collect::<Vec<_>>() {
                [group, _, kind] => (group, kind),
                _ => return Err(format!("type `{type_url}` is not group/version/Kind")),
            };
            let key =
                resource_key(group, kind, name).ok_or_else(|| format!("type `{type_url}` is not known"))?;
            if key.kind == Kind::MeshConfig {
                *settings.lock() = MeshSettings::default();
                return Ok(vec![Change::Settings(MeshSettings::default())]);
            }
            Ok(vec![Change::L7Removed(key)])
        }
        ObjectEvent::Put(object) => {
            let object = from_wire(object);
            // Settings are read over the defaults: what a manifest no longer says is no longer so.
            let is_settings = object.kind == "MeshConfig";
            let known = if is_settings { MeshSettings::default() } else { settings.lock().clone() };
            let decoded = decode(&object, &known);
            for finding in &decoded.findings {
                if finding.severity == Severity::Error {
                    tracing::warn!(kind = object.kind, name = %object.name, field = %finding.field,
                        reason = %finding.reason, "resource is not valid");
                }
            }
            for change in &decoded.changes {
                if let Change::Settings(new) = change {
                    *settings.lock() = new.clone();
                }
            }
            Ok(decoded.changes)
        }
    })
}

fn from_wire(object: &cairn_xds::Object) -> Object {
    let mut annotations = object.annotations.clone();
    let broken = annotations.remove(BROKEN).map(Arc::from);
    Object {
        group: object.group.clone(),
        version: object.version.clone(),
        kind: object.kind.clone(),
        name: object.name.clone(),
        labels: object.labels.clone(),
        annotations,
        created: object.created.clone(),
        owner: None,
        spec: object.spec.clone(),
        broken,
        origin: None,
    }
}
