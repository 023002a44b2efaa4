//! The labels of Istio's standard metrics, in Istio's order.
//!
//! A label set holds the model's own values behind their `Arc`s, so that making one allocates nothing. Missing values
//! are printed as `unknown`.

use crate::shape::{Custom, MetricShape, render};
use cairn_mesh::{Identity, Metric, Service, Workload};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

pub(crate) const UNKNOWN: &str = "unknown";

/// One end of the traffic: its workload, if the mesh knows it, and the identity it proved.
#[derive(Clone, Debug, Default)]
pub struct PeerLabels {
    /// The workload.
    pub workload: Option<Arc<Workload>>,
    /// The identity; for a destination, the one that the chosen endpoint must prove.
    pub principal: Option<Identity>,
}

impl PeerLabels {
    /// The labels of a workload with its own identity.
    pub fn of(workload: Option<&Arc<Workload>>, principal: Option<&Identity>) -> Self {
        Self { workload: workload.cloned(), principal: principal.cloned() }
    }

    fn text(&self, read: impl Fn(&Workload) -> &str) -> &str {
        or_unknown(self.workload.as_deref().map_or("", read))
    }

    fn workload_name(&self) -> &str {
        self.text(|workload| &workload.workload_name)
    }

    fn namespace(&self) -> &str {
        self.text(|workload| &workload.namespace)
    }

    fn canonical_name(&self) -> &str {
        self.text(|workload| &workload.canonical_name)
    }

    fn canonical_revision(&self) -> &str {
        self.text(|workload| &workload.canonical_revision)
    }

    /// The canonical revision as `reporter` prints it: a waypoint says `latest` also of what it does not know.
    fn revision(&self, reporter: Reporter) -> &str {
        match (self.canonical_revision(), reporter) {
            (UNKNOWN, Reporter::Waypoint) => "latest",
            (revision, _) => revision,
        }
    }

    fn cluster(&self) -> &str {
        self.text(|workload| &workload.cluster_id)
    }

    fn principal(&self) -> &str {
        self.principal.as_ref().map_or(UNKNOWN, Identity::as_str)
    }
}

impl PartialEq for PeerLabels {
    fn eq(&self, other: &Self) -> bool {
        let same_workload = match (&self.workload, &other.workload) {
            (Some(one), Some(two)) if Arc::ptr_eq(one, two) => true,
            (None, None) => true,
            // An updated workload, or another pod of the same deployment, is the same series if it prints the same.
            (Some(one), Some(two)) => {
                one.workload_name == two.workload_name
                    && one.namespace == two.namespace
                    && one.canonical_name == two.canonical_name
                    && one.canonical_revision == two.canonical_revision
                    && one.cluster_id == two.cluster_id
                    && one.locality == two.locality
            }
            _ => false,
        };
        same_workload && self.principal == other.principal
    }
}

impl Eq for PeerLabels {}

impl Hash for PeerLabels {
    /// Two of the values tell series apart well enough; equality compares all.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.workload_name().hash(state);
        self.namespace().hash(state);
    }
}

/// Which proxy reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The source's ztunnel.
    Source,
    /// The destination's ztunnel.
    Destination,
    /// A waypoint.
    Waypoint,
}

impl Reporter {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Waypoint => "waypoint",
        }
    }
}

/// How a connection is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Security {
    /// Mutual TLS: both ends are proven.
    MutualTls,
    /// Nothing is proven (a ztunnel prints `unknown`).
    Unknown,
    /// Nothing is proven (a waypoint prints `none`).
    None,
}

impl Security {
    /// What a waypoint prints: mutual TLS if both ends are known by identity.
    pub fn between(source: &PeerLabels, destination: &PeerLabels) -> Self {
        let both = source.principal.is_some() && destination.principal.is_some();
        if both { Self::MutualTls } else { Self::None }
    }

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => UNKNOWN,
            Self::None => "none",
        }
    }
}

/// The labels of `istio_tcp_*`.
#[derive(Clone, Debug)]
pub struct TcpLabels {
    /// Who reports.
    pub reporter: Reporter,
    /// Who connected.
    pub source: PeerLabels,
    /// Who was connected to.
    pub destination: PeerLabels,
    /// The service addressed.
    pub service: Option<Arc<Service>>,
    /// `-`, or why the connection failed: `DENY`, `CONNECT`, `TLS_FAILURE`, `H2_HANDSHAKE_FAILURE` …
    pub response_flags: &'static str,
    /// How it is protected.
    pub security: Security,
    /// How they differ from the standard ones.
    pub custom: CustomLabels,
}

/// How a label set differs from the standard one; by default not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct CustomLabels(pub(crate) Option<Custom>);

impl CustomLabels {
    /// The difference that `shape` describes, with the label set's own values.
    pub fn new(shape: &Arc<MetricShape>, values: impl IntoIterator<Item = Arc<str>>) -> Self {
        if shape.is_standard() {
            return Self(None);
        }
        Self(Some(Custom { shape: Arc::clone(shape), values: values.into_iter().collect() }))
    }

    fn overflow(&self) -> Self {
        Self(self.0.as_ref().map(Custom::overflow))
    }

    /// Whether a metric is counted under this label set.
    pub(crate) fn counts(&self, metric: Metric) -> bool {
        self.0.as_ref().is_none_or(|custom| !custom.shape.form(metric).disabled)
    }
}

impl TcpLabels {
    /// The same without its peers, for when there are too many series.
    pub(crate) fn overflow(&self) -> Self {
        Self {
            source: PeerLabels::default(),
            destination: PeerLabels::default(),
            service: None,
            custom: self.custom.overflow(),
            ..self.clone()
        }
    }

    /// The labels of `metric`, or of one that no resource can change.
    pub(crate) fn print(&self, metric: Option<Metric>) -> String {
        let mut out = String::with_capacity(LABELS_BYTES);
        render(self.custom.0.as_ref(), metric, &mut out, |put| self.standard(put));
        out
    }

    fn standard(&self, put: &mut dyn FnMut(&str, &str)) {
        let to = &self.destination;
        put("reporter", self.reporter.as_str());
        put_source(put, &self.source, self.reporter);
        put_service(put, self.service.as_deref());
        put("destination_workload", to.workload_name());
        put("destination_canonical_service", to.canonical_name());
        put("destination_canonical_revision", to.revision(self.reporter));
        put("destination_workload_namespace", to.namespace());
        put("destination_principal", to.principal());
        put("destination_app", to.canonical_name());
        put("destination_version", to.canonical_revision());
        put("destination_cluster", to.cluster());
        put("request_protocol", "tcp");
        put("response_flags", self.response_flags);
        put("connection_security_policy", self.security.as_str());
        if self.reporter != Reporter::Waypoint {
            if let Some(workload) = &self.source.workload {
                put("source_region", or_unknown(&workload.locality.region));
                put("source_zone", or_unknown(&workload.locality.zone));
            }
            if let Some(workload) = &to.workload {
                put("destination_region", or_unknown(&workload.locality.region));
                put("destination_zone", or_unknown(&workload.locality.zone));
            }
        }
    }
}

/// About as many bytes as a label set prints.
const LABELS_BYTES: usize = 1024;

impl PartialEq for TcpLabels {
    fn eq(&self, other: &Self) -> bool {
        self.reporter == other.reporter
            && self.response_flags == other.response_flags
            && self.security == other.security
            && self.custom == other.custom
            && same_service(self.service.as_ref(), other.service.as_ref())
            && self.source == other.source
            && self.destination == other.destination
    }
}

impl Eq for TcpLabels {}

impl Hash for TcpLabels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.reporter.hash(state);
        self.source.hash(state);
        self.destination.hash(state);
        self.service.as_ref().map(|service| &service.hostname).hash(state);
        self.response_flags.hash(state);
        self.custom.hash(state);
    }
}

/// The labels of `istio_requests_total` and its histograms. The reporter is always a waypoint.
#[derive(Clone, Debug)]
pub(crate) struct HttpLabels {
    pub(crate) source: PeerLabels,
    pub(crate) destination: PeerLabels,
    pub(crate) service: Option<Arc<Service>>,
    /// `http` or `grpc`.
    pub(crate) grpc: bool,
    /// 0 when the client left before an answer.
    pub(crate) response_code: u16,
    /// 0–16, or 255 for a number that is none; printed for gRPC only.
    pub(crate) grpc_status: Option<u8>,
    pub(crate) response_flags: &'static str,
    pub(crate) custom: CustomLabels,
}

impl HttpLabels {
    /// The same without what no metric of its shape prints, so that what such labels would tell apart is one series.
    pub(crate) fn simplified(mut self) -> Self {
        let Some(Custom { shape, .. }) = &self.custom.0 else { return self };
        if shape.drops("response_code") {
            self.response_code = 0;
        }
        if shape.drops("grpc_response_status") {
            self.grpc_status = None;
        }
        if shape.drops("response_flags") {
            self.response_flags = "-";
        }
        if shape.drops("connection_security_policy") {
            if shape.drops("source_principal") {
                self.source.principal = None;
            }
            if shape.drops("destination_principal") {
                self.destination.principal = None;
            }
        }
        self
    }

    /// The same without its peers and finer points, for when there are too many series.
    pub(crate) fn overflow(&self) -> Self {
        Self {
            source: PeerLabels::default(),
            destination: PeerLabels::default(),
            service: None,
            grpc_status: None,
            response_flags: "-",
            custom: self.custom.overflow(),
            ..self.clone()
        }
    }

    /// The labels of `metric`. Those of messages end with the destination's cluster.
    pub(crate) fn print(&self, metric: Metric) -> String {
        let mut out = String::with_capacity(LABELS_BYTES);
        let of_messages = matches!(metric, Metric::GrpcRequestMessages | Metric::GrpcResponseMessages);
        render(self.custom.0.as_ref(), Some(metric), &mut out, |put| {
            self.of_peers(put);
            if !of_messages {
                self.of_exchange(put);
            }
        });
        out
    }

    fn of_peers(&self, put: &mut dyn FnMut(&str, &str)) {
        let to = &self.destination;
        put("reporter", Reporter::Waypoint.as_str());
        put_source(put, &self.source, Reporter::Waypoint);
        put("destination_workload", to.workload_name());
        put("destination_workload_namespace", to.namespace());
        put("destination_principal", to.principal());
        put("destination_app", to.canonical_name());
        put("destination_version", to.canonical_revision());
        put("destination_canonical_service", to.canonical_name());
        put("destination_canonical_revision", to.revision(Reporter::Waypoint));
        put_service(put, self.service.as_deref());
        put("destination_cluster", to.cluster());
    }

    fn of_exchange(&self, put: &mut dyn FnMut(&str, &str)) {
        put("request_protocol", if self.grpc { "grpc" } else { "http" });
        put("response_code", &self.response_code.to_string());
        let status = self.grpc_status.filter(|_| self.grpc).map(|status| status.to_string());
        put("grpc_response_status", status.as_deref().unwrap_or(""));
        put("response_flags", self.response_flags);
        put("connection_security_policy", Security::between(&self.source, &self.destination).as_str());
    }
}

impl PartialEq for HttpLabels {
    fn eq(&self, other: &Self) -> bool {
        self.response_code == other.response_code
            && self.grpc == other.grpc
            && self.grpc_status == other.grpc_status
            && self.response_flags == other.response_flags
            && self.custom == other.custom
            && same_service(self.service.as_ref(), other.service.as_ref())
            && self.source == other.source
            && self.destination == other.destination
    }
}

impl Eq for HttpLabels {}

impl Hash for HttpLabels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.source.hash(state);
        self.destination.hash(state);
        self.service.as_ref().map(|service| &service.hostname).hash(state);
        self.response_code.hash(state);
        self.grpc_status.hash(state);
        self.response_flags.hash(state);
        self.custom.hash(state);
    }
}

fn put_source(put: &mut dyn FnMut(&str, &str), from: &PeerLabels, reporter: Reporter) {
    put("source_workload", from.workload_name());
    put("source_canonical_service", from.canonical_name());
    put("source_canonical_revision", from.revision(reporter));
    put("source_workload_namespace", from.namespace());
    put("source_principal", from.principal());
    put("source_app", from.canonical_name());
    put("source_version", from.canonical_revision());
    put("source_cluster", from.cluster());
}

fn put_service(put: &mut dyn FnMut(&str, &str), service: Option<&Service>) {
    put("destination_service", service.map_or(UNKNOWN, |service| &service.hostname));
    put("destination_service_namespace", service.map_or(UNKNOWN, |service| &service.namespace));
    put("destination_service_name", service.map_or(UNKNOWN, |service| &service.name));
}

fn same_service(one: Option<&Arc<Service>>, two: Option<&Arc<Service>>) -> bool {
    match (one, two) {
        (Some(one), Some(two)) => {
            Arc::ptr_eq(one, two)
                || (one.hostname == two.hostname && one.namespace == two.namespace && one.name == two.name)
        }
        (None, None) => true,
        _ => false,
    }
}

fn or_unknown(text: &str) -> &str {
    if text.is_empty() { UNKNOWN } else { text }
}
