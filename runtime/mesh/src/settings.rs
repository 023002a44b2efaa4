//! Settings of the whole mesh: the parts of Istio's MeshConfig that Cairn reads.

use crate::{AuthorizationProvider, TelemetryDefaults, TrustDomains};
use std::sync::Arc;

/// How request paths are normalised before anything looks at them (`MeshConfig.pathNormalization`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PathNormalization {
    /// Not at all.
    None,
    /// Dot segments, unreserved percent-encodings and backslashes; the default.
    #[default]
    Base,
    /// As base, and `//` becomes `/`.
    MergeSlashes,
    /// Encoded slashes are decoded first, then as merge slashes.
    DecodeAndMergeSlashes,
}

/// Settings of the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    /// The trust domain of every workload that does not say another.
    pub trust_domain: Arc<str>,
    /// Other names of the same trust domain: who policies name by one of them is meant by all.
    pub trust_domain_aliases: Vec<Arc<str>>,
    /// The namespace whose policies apply everywhere.
    pub root_namespace: Arc<str>,
    /// The DNS domain of services.
    pub cluster_domain: Arc<str>,
    /// The cluster's name.
    pub cluster_id: Arc<str>,
    /// Services that policies with action CUSTOM ask.
    pub authorization_providers: Vec<Arc<AuthorizationProvider>>,
    /// Path normalisation.
    pub path_normalization: PathNormalization,
    /// Providers of metrics, access logs and traces, and their defaults.
    pub telemetry: Arc<TelemetryDefaults>,
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            root_namespace: "istio-system".into(),
            cluster_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            authorization_providers: Vec::new(),
            path_normalization: PathNormalization::Base,
            telemetry: Arc::default(),
        }
    }
}

impl MeshSettings {
    /// The mesh's trust domain and its aliases, each once.
    pub fn trust_domains(&self) -> TrustDomains {
        TrustDomains::new(std::iter::once(&self.trust_domain).chain(&self.trust_domain_aliases).cloned())
    }
}
