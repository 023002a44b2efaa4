//! Names of resources.

use std::fmt;
use std::sync::Arc;

/// A namespaced name, written `namespace/name`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceName {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name; for services on the wire, the hostname.
    pub name: Arc<str>,
}

impl ResourceName {
    /// `namespace/name`.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// Splits at the first `/`; `None` without one or with an empty half.
    pub fn parse(text: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/')?;
        (!namespace.is_empty() && !name.is_empty()).then(|| Self::new(namespace, name))
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The kinds of resources that configure a waypoint's L7 pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `gateway.networking.k8s.io/v1 Gateway`.
    Gateway,
    /// `gateway.networking.k8s.io/v1 HTTPRoute`.
    HttpRoute,
    /// `networking.istio.io/v1 VirtualService`.
    VirtualService,
    /// `security.istio.io/v1 AuthorizationPolicy`.
    AuthorizationPolicy,
    /// `security.istio.io/v1 RequestAuthentication`.
    RequestAuthentication,
    /// `telemetry.istio.io/v1 Telemetry`.
    Telemetry,
    /// `extensions.istio.io/v1alpha1 WasmPlugin`.
    WasmPlugin,
    /// A Secret of type `kubernetes.io/dockerconfigjson`.
    PullSecret,
    /// Mesh settings: the ConfigMap `istio`.
    MeshConfig,
}

/// Names one resource of the L7 pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceKey {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: ResourceName,
}
