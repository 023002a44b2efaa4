//! Which kinds of objects are read, and what is said of the others.

use crate::diagnostic::{Finding, Severity};
use crate::field::FieldPath;
use crate::object::{Object, ObjectId};

/// Whether objects of the kind guard traffic, so that one that cannot be read is a reason to refuse it.
pub(crate) fn is_guard(id: &ObjectId) -> bool {
    matches!(
        (id.group.as_str(), id.kind.as_str()),
        ("security.istio.io", "AuthorizationPolicy" | "RequestAuthentication" | "PeerAuthentication")
            | ("extensions.istio.io", "WasmPlugin")
    )
}

/// What is said of an object that nothing reads.
pub(crate) fn unread(object: &Object) -> Option<Finding> {
    let (severity, code, reason) = match (object.group.as_str(), object.kind.as_str()) {
        (
            "",
            "Namespace"
            | "Pod"
            | "Service"
            | "ServiceAccount"
            | "ConfigMap"
            | "Secret"
            | "PersistentVolumeClaim"
            | "PersistentVolume"
            | "Node"
            | "Event"
            | "Endpoints"
            | "ResourceQuota"
            | "LimitRange",
        )
        | ("discovery.k8s.io", "EndpointSlice")
        | ("apps", "Deployment" | "StatefulSet" | "ReplicaSet")
        | ("gateway.networking.k8s.io", "Gateway" | "GatewayClass" | "HTTPRoute")
        | ("networking.istio.io", "VirtualService")
        | ("security.istio.io", "AuthorizationPolicy" | "RequestAuthentication" | "PeerAuthentication")
        | ("telemetry.istio.io", "Telemetry")
        | ("extensions.istio.io", "WasmPlugin") => return None,
        (
            "gateway.networking.k8s.io" | "networking.istio.io" | "security.istio.io" | "extensions.istio.io",
            kind,
        ) => (Severity::Warning, "not-supported", format!("{kind} is not supported yet: it has no effect")),
        (_, kind) => (Severity::Info, "unknown-kind", format!("{kind} is not read: it has no effect here")),
    };
    Some(Finding { severity, code, field: FieldPath::root(), reason })
}
