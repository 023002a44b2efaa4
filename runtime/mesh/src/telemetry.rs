//! Telemetry as a waypoint honours it (`telemetry.istio.io/v1`): the resources, the providers of the mesh, and the
//! merge of both into one plan per destination.

use crate::{ResourceName, TargetRef};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// One Telemetry resource. What is only for clients is left out: a waypoint stands on the server's side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetryPolicy {
    /// Its name.
    pub name: ResourceName,
    /// When it was created, RFC 3339; empty if unknown, which counts as the oldest.
    pub created: Arc<str>,
    /// What it attaches to; none: the whole namespace, and from the root namespace the mesh.
    pub targets: Vec<TargetRef>,
    /// Access logs.
    pub access_logging: Vec<AccessLogging>,
    /// Metrics.
    pub metrics: Vec<MetricsChange>,
    /// Traces.
    pub tracing: Vec<TracingChange>,
}

/// One entry of `accessLogging`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct AccessLogging {
    /// The providers it speaks of; none: those in force.
    pub providers: Vec<Arc<str>>,
    /// `disabled`, if it is said.
    pub disabled: Option<bool>,
    /// A CEL expression: only what it is true of is logged.
    pub filter: Option<Arc<str>>,
}

/// The standard metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// `istio_requests_total`.
    RequestCount,
    /// `istio_request_duration_milliseconds`.
    RequestDuration,
    /// `istio_request_bytes`.
    RequestSize,
    /// `istio_response_bytes`.
    ResponseSize,
    /// `istio_tcp_connections_opened_total`.
    TcpOpened,
    /// `istio_tcp_connections_closed_total`.
    TcpClosed,
    /// `istio_tcp_sent_bytes_total`.
    TcpSent,
    /// `istio_tcp_received_bytes_total`.
    TcpReceived,
    /// `istio_request_messages_total`.
    GrpcRequestMessages,
    /// `istio_response_messages_total`.
    GrpcResponseMessages,
}

impl Metric {
    /// All of them, with the names that Telemetry resources give them.
    pub const ALL: [(&'static str, Self); 10] = [
        ("REQUEST_COUNT", Self::RequestCount),
        ("REQUEST_DURATION", Self::RequestDuration),
        ("REQUEST_SIZE", Self::RequestSize),
        ("RESPONSE_SIZE", Self::ResponseSize),
        ("TCP_OPENED_CONNECTIONS", Self::TcpOpened),
        ("TCP_CLOSED_CONNECTIONS", Self::TcpClosed),
        ("TCP_SENT_BYTES", Self::TcpSent),
        ("TCP_RECEIVED_BYTES", Self::TcpReceived),
        ("GRPC_REQUEST_MESSAGES", Self::GrpcRequestMessages),
        ("GRPC_RESPONSE_MESSAGES", Self::GrpcResponseMessages),
    ];
}

/// One entry of `metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct MetricsChange {
    /// The providers it speaks of; none: those in force.
    pub providers: Vec<Arc<str>>,
    /// How often long connections and streams report.
    pub interval: Option<Duration>,
    /// Changes of metrics. Those of all metrics come first, whatever their place, so that one metric's own wins.
    pub overrides: Vec<MetricOverride>,
}

/// One entry of `overrides`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricOverride {
    /// Which metric; `None`: all.
    pub metric: Option<Metric>,
    /// `disabled`, if it is said.
    pub disabled: Option<bool>,
    /// Changes of labels, by name.
    pub tags: BTreeMap<Arc<str>, TagChange>,
}

/// What happens to a label.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TagChange {
    /// It has the value of this CEL expression.
    Upsert(Arc<str>),
    /// It is left out.
    Remove,
}

/// One entry of `tracing`. What is `None` stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TracingChange {
    /// The providers, of which the first is used.
    pub providers: Vec<Arc<str>>,
    /// The share of requests traced, in hundredths of a percent.
    pub sampling: Option<u16>,
    /// Trace context is passed on, and no span is reported.
    pub disable_reporting: Option<bool>,
    /// Trace context is not passed on.
    pub disable_propagation: Option<bool>,
    /// Further tags of spans, by name. An entry that has any replaces all those before.
    pub tags: Option<BTreeMap<Arc<str>, SpanTag>>,
    /// The decision about a request without context depends on its request id.
    pub use_request_id: Option<bool>,
    /// Spans have Istio's own tags.
    pub istio_tags: Option<bool>,
}

/// Where the value of a span's tag comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpanTag {
    /// It is this.
    Literal(Arc<str>),
    /// An environment variable of the waypoint, or this.
    Environment(Arc<str>, Arc<str>),
    /// A header of the request, or this.
    Header(Arc<str>, Arc<str>),
    /// An access log format.
    Formatter(Arc<str>),
}

/// Something that metrics, logs or traces are sent to (`MeshConfig.extensionProviders`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetryProvider {
    /// Its name.
    pub name: Arc<str>,
    /// What it is.
    pub kind: TelemetryProviderKind,
}

/// The kinds of providers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TelemetryProviderKind {
    /// Metrics on the scrape port.
    Prometheus,
    /// Access logs in a file.
    File(FileLog),
    /// Access logs to Envoy's access log service.
    Als(AlsLog),
    /// Access logs as OpenTelemetry log records.
    OtelLog(OtelLog),
    /// Spans over OTLP.
    OtelTrace(OtelTrace),
    /// Spans as Zipkin's JSON.
    Zipkin(ZipkinTrace),
}

impl TelemetryProviderKind {
    /// Whether it takes access logs.
    pub fn takes_logs(&self) -> bool {
        matches!(self, Self::File(_) | Self::Als(_) | Self::OtelLog(_))
    }

    /// Whether it takes spans.
    pub fn takes_spans(&self) -> bool {
        matches!(self, Self::OtelTrace(_) | Self::Zipkin(_))
    }
}

/// Where a provider listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderAddress {
    /// Its hostname: a service of the mesh, or a DNS name.
    pub host: Arc<str>,
    /// The namespace in which the hostname is meant.
    pub namespace: Option<Arc<str>>,
    /// Its port.
    pub port: u16,
}

/// The form of log lines.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Istio's default line.
    #[default]
    DefaultText,
    /// A line of this format.
    Text(Arc<str>),
    /// Istio's default keys as JSON.
    DefaultJson,
    /// JSON with these keys, each value a format.
    Json(Vec<(Arc<str>, LogValue)>),
}

/// A value of a JSON log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogValue {
    /// A format.
    Text(Arc<str>),
    /// A number, `true`, `false` or `null`, as it is written.
    Literal(Arc<str>),
    /// A list.
    List(Vec<LogValue>),
    /// A map.
    Map(Vec<(Arc<str>, LogValue)>),
}

/// Logs in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileLog {
    /// The file.
    pub path: Arc<str>,
    /// The form of lines.
    pub format: LogFormat,
    /// Values that are not there are left out of JSON.
    pub omit_empty: bool,
}

/// Logs to Envoy's access log service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlsLog {
    /// Where it listens.
    pub at: ProviderAddress,
    /// The log's name.
    pub log_name: Arc<str>,
    /// Whether it is for connections rather than requests.
    pub tcp: bool,
    /// Further headers to send.
    pub request_headers: Vec<Arc<str>>,
    /// Further headers to send.
    pub response_headers: Vec<Arc<str>>,
    /// Further trailers to send.
    pub response_trailers: Vec<Arc<str>>,
}

/// Logs as OpenTelemetry log records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtelLog {
    /// Where the collector listens.
    pub at: ProviderAddress,
    /// The log's name.
    pub log_name: Arc<str>,
    /// The body; `None`: Istio's default line.
    pub body: Option<Arc<str>>,
    /// Attributes.
    pub attributes: Vec<(Arc<str>, LogValue)>,
}

/// Spans over OTLP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtelTrace {
    /// Where the collector listens.
    pub at: ProviderAddress,
    /// How it is spoken to.
    pub transport: OtelTransport,
    /// The most bytes of the path in a tag.
    pub tag_bytes_max: usize,
    /// Attributes of `OTEL_RESOURCE_ATTRIBUTES` are added.
    pub environment_detector: bool,
}

/// How a collector is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OtelTransport {
    /// gRPC.
    Grpc {
        /// How long a call may take.
        timeout: Duration,
        /// Metadata of each call.
        headers: Vec<(Arc<str>, Arc<str>)>,
    },
    /// HTTP with protobuf bodies.
    Http {
        /// The path.
        path: Arc<str>,
        /// How long a call may take.
        timeout: Duration,
        /// Headers of each call.
        headers: Vec<(Arc<str>, Arc<str>)>,
    },
}

/// Spans as Zipkin's JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZipkinTrace {
    /// Where the collector listens.
    pub at: ProviderAddress,
    /// The path.
    pub path: Arc<str>,
    /// The most bytes of the path in a tag.
    pub tag_bytes_max: usize,
    /// New traces have ids of 128 bits.
    pub wide_ids: bool,
    /// `traceparent` is read and written beside B3.
    pub with_w3c: bool,
    /// How long a call may take.
    pub timeout: Duration,
    /// Headers of each call.
    pub headers: Vec<(Arc<str>, Arc<str>)>,
}

/// What the mesh's settings say of telemetry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetryDefaults {
    /// The providers.
    pub providers: Vec<Arc<TelemetryProvider>>,
    /// Providers of metrics where no resource names any.
    pub metrics: Vec<Arc<str>>,
    /// Providers of access logs where no resource names any; `None`: `file`, or the waypoint's own log.
    pub access_logging: Option<Vec<Arc<str>>>,
    /// Providers of traces where no resource names any.
    pub tracing: Vec<Arc<str>>,
    /// `accessLogFile` with its format, where neither resources nor default providers speak of access logs. A file
    /// without a name switches the log off.
    pub file: Option<Arc<FileLog>>,
    /// The share of requests traced where no resource says, in hundredths of a percent.
    pub sampling: u16,
}

impl Default for TelemetryDefaults {
    /// As Istio has it when its ConfigMap says nothing: metrics for Prometheus, one percent sampled.
    fn default() -> Self {
        let provider = |name: &str, kind| Arc::new(TelemetryProvider { name: name.into(), kind });
        let stdout =
            FileLog { path: "/dev/stdout".into(), format: LogFormat::DefaultText, omit_empty: false };
        Self {
            providers: vec![
                provider("prometheus", TelemetryProviderKind::Prometheus),
                provider("envoy", TelemetryProviderKind::File(stdout)),
            ],
            metrics: vec!["prometheus".into()],
            access_logging: None,
            tracing: Vec::new(),
            file: None,
            sampling: 100,
        }
    }
}

impl TelemetryDefaults {
    /// The provider of this name, letter case ignored as in Istio.
    pub fn provider(&self, name: &str) -> Option<&Arc<TelemetryProvider>> {
        self.providers.iter().find(|provider| provider.name.eq_ignore_ascii_case(name))
    }
}

/// What is observed of the traffic to one destination.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TelemetryPlan {
    /// Where access logs go.
    pub logs: Vec<LogPlan>,
    /// Which metrics are counted, and how.
    pub metrics: MetricsPlan,
    /// Whether and how requests are traced.
    pub tracing: Option<TracingPlan>,
}

/// One access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogPlan {
    /// Where it goes.
    pub to: LogTarget,
    /// The filter, a CEL expression.
    pub filter: Option<Arc<str>>,
}

/// Where an access log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// The waypoint's own log, if that is on: nobody said anything else.
    Own,
    /// A file.
    File(Arc<FileLog>),
    /// A provider.
    Provider(Arc<TelemetryProvider>),
}

/// Which metrics are counted, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsPlan {
    /// Metrics go to Prometheus at all.
    pub enabled: bool,
    /// How often long connections and streams report.
    pub interval: Duration,
    /// Metrics that are not counted.
    pub disabled: Vec<Metric>,
    /// Changed labels.
    pub tags: BTreeMap<Metric, BTreeMap<Arc<str>, TagChange>>,
}

/// How often long connections report (Istio's default).
const INTERVAL: Duration = Duration::from_secs(5);

impl Default for MetricsPlan {
    fn default() -> Self {
        Self { enabled: true, interval: INTERVAL, disabled: Vec::new(), tags: BTreeMap::new() }
    }
}

/// How requests are traced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracingPlan {
    /// Where spans go.
    pub provider: Arc<TelemetryProvider>,
    /// The share of requests traced, in hundredths of a percent.
    pub sampling: u16,
    /// Spans are reported.
    pub report: bool,
    /// Context is passed on.
    pub propagate: bool,
    /// Further tags of spans.
    pub tags: BTreeMap<Arc<str>, SpanTag>,
    /// The decision about a request without context depends on its request id.
    pub use_request_id: bool,
    /// Spans have Istio's own tags.
    pub istio_tags: bool,
    /// Attempts to send a request have spans of their own, which is the Gateway's to say.
    pub client_spans: bool,
}

/// What a Gateway's annotations say of its waypoint's telemetry.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct GatewayTelemetry {
    /// Each attempt to send a traced request has a span (`cairn.dev/client-spans`). Istio's waypoints have none.
    pub client_spans: bool,
    /// Bounds of histograms by the beginning of their names (`sidecar.istio.io/statsHistogramBuckets`).
    pub buckets: Vec<(Arc<str>, Arc<[f64]>)>,
    /// How long a series may count nothing until it is forgotten (`sidecar.istio.io/statsEvictionInterval`); `None`: as
    /// the process was told.
    pub eviction: Option<Duration>,
}

impl TelemetryPlan {
    /// The same with what the waypoint's own Gateway says.
    pub fn at(mut self, gateway: &GatewayTelemetry) -> Self {
        if let Some(tracing) = &mut self.tracing {
            tracing.client_spans = gateway.client_spans;
        }
        self
    }

    /// The plan of a destination: `policies` are those that apply, most general first, over the mesh's settings.
    /// Providers that the mesh does not know are left out.
    pub fn merge(policies: &[Arc<TelemetryPolicy>], defaults: &TelemetryDefaults) -> Self {
        Self {
            logs: logs(policies, defaults),
            metrics: metrics(policies, defaults),
            tracing: tracing(policies, defaults),
        }
    }
}

/// A log while resources are merged.
#[derive(Clone)]
struct Standing {
    /// `None`: what the mesh's settings say without a provider's name.
    provider: Option<Arc<str>>,
    disabled: bool,
    filter: Option<Arc<str>>,
}

impl Standing {
    fn new(provider: Option<Arc<str>>) -> Self {
        Self { provider, disabled: false, filter: None }
    }

    fn is(&self, name: &str) -> bool {
        self.provider.as_ref().is_some_and(|provider| provider.eq_ignore_ascii_case(name))
    }
}

fn logs(policies: &[Arc<TelemetryPolicy>], defaults: &TelemetryDefaults) -> Vec<LogPlan> {
    let mut standing: Vec<Standing> = match &defaults.access_logging {
        Some(names) if !names.is_empty() => {
            names.iter().map(|name| Standing::new(Some(Arc::clone(name)))).collect()
        }
        _ => vec![Standing::new(None)],
    };
    for policy in policies {
        // Providers that a resource names take the place of those before it.
        let named: Vec<&Arc<str>> = policy.access_logging.iter().flat_map(|one| &one.providers).collect();
        if !named.is_empty() {
            let before = std::mem::take(&mut standing);
            for name in named {
                if standing.iter().any(|one| one.is(name)) {
                    continue;
                }
                let kept = before.iter().find(|one| one.is(name)).cloned();
                standing.push(kept.unwrap_or_else(|| Standing::new(Some(Arc::clone(name)))));
            }
        }
        for entry in &policy.access_logging {
            let meant = |one: &&mut Standing| {
                entry.providers.is_empty() || entry.providers.iter().any(|name| one.is(name))
            };
            for one in standing.iter_mut().filter(meant) {
                one.disabled = entry.disabled.unwrap_or(false);
                if entry.filter.is_some() || !entry.providers.is_empty() {
                    one.filter.clone_from(&entry.filter);
                }
            }
        }
    }
    let on = standing.into_iter().filter(|one| !one.disabled);
    on.filter_map(|one| {
        let to = match &one.provider {
            Some(name) => {
                let provider = defaults.provider(name).filter(|found| found.kind.takes_logs())?;
                LogTarget::Provider(Arc::clone(provider))
            }
            None => match &defaults.file {
                Some(file) if file.path.is_empty() => return None,
                Some(file) => LogTarget::File(Arc::clone(file)),
                None => LogTarget::Own,
            },
        };
        Some(LogPlan { to, filter: one.filter })
    })
    .collect()
}

fn metrics(policies: &[Arc<TelemetryPolicy>], defaults: &TelemetryDefaults) -> MetricsPlan {
    let mut plan = MetricsPlan::default();
    let mut providers: Vec<Arc<str>> = defaults.metrics.clone();
    let mut disabled: BTreeMap<Metric, bool> = BTreeMap::new();
    let is_prometheus = |name: &Arc<str>| {
        defaults.provider(name).is_some_and(|provider| provider.kind == TelemetryProviderKind::Prometheus)
    };
    for policy in policies {
        let named: Vec<Arc<str>> =
            policy.metrics.iter().flat_map(|change| change.providers.iter().cloned()).collect();
        if !named.is_empty() {
            providers = named;
        }
        for change in &policy.metrics {
            if !change.providers.is_empty() && !change.providers.iter().any(is_prometheus) {
                continue;
            }
            plan.interval = change.interval.unwrap_or(plan.interval);
            let all_first = change.overrides.iter().filter(|one| one.metric.is_none());
            for one in all_first.chain(change.overrides.iter().filter(|one| one.metric.is_some())) {
                for (_, metric) in Metric::ALL {
                    if one.metric.is_some_and(|only| only != metric) {
                        continue;
                    }
                    if let Some(off) = one.disabled {
                        disabled.insert(metric, off);
                    }
                    if !one.tags.is_empty() {
                        let tags = one.tags.iter().map(|(name, change)| (Arc::clone(name), change.clone()));
                        plan.tags.entry(metric).or_default().extend(tags);
                    }
                }
            }
        }
    }
    plan.disabled = disabled.into_iter().filter(|(_, off)| *off).map(|(metric, _)| metric).collect();
    plan.enabled = providers.iter().any(is_prometheus) && plan.disabled.len() < Metric::ALL.len();
    plan
}

fn tracing(policies: &[Arc<TelemetryPolicy>], defaults: &TelemetryDefaults) -> Option<TracingPlan> {
    let mut merged = TracingChange { providers: defaults.tracing.clone(), ..TracingChange::default() };
    for change in policies.iter().flat_map(|policy| &policy.tracing) {
        if !change.providers.is_empty() {
            merged.providers.clone_from(&change.providers);
        }
        merged.sampling = change.sampling.or(merged.sampling);
        merged.disable_reporting = change.disable_reporting.or(merged.disable_reporting);
        merged.disable_propagation = change.disable_propagation.or(merged.disable_propagation);
        merged.tags = change.tags.clone().or(merged.tags);
        merged.use_request_id = change.use_request_id.or(merged.use_request_id);
        merged.istio_tags = change.istio_tags.or(merged.istio_tags);
    }
    let provider = defaults.provider(merged.providers.first()?)?;
    provider.kind.takes_spans().then(|| TracingPlan {
        provider: Arc::clone(provider),
        sampling: merged.sampling.unwrap_or(defaults.sampling),
        report: !merged.disable_reporting.unwrap_or(false),
        propagate: !merged.disable_propagation.unwrap_or(false),
        tags: merged.tags.unwrap_or_default(),
        use_request_id: merged.use_request_id.unwrap_or(true),
        istio_tags: merged.istio_tags.unwrap_or(true),
        client_spans: false,
    })
}

#[cfg(test)]
#[path = "telemetry/tests.rs"]
mod tests;
