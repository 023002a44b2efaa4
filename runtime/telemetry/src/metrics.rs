//! The process's metrics: Istio's standard families, and whatever else a crate registers.

use crate::histogram::{self, Bounds};
use crate::http_record::HttpSeries;
use crate::labels::{HttpLabels, TcpLabels};
use crate::scrape::{Family, Read};
use crate::shape::put;
use crate::table::Table;
use crate::tcp_record::TcpSeries;
use cairn_mesh::Metric;
use parking_lot::Mutex;
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Bounds of the metrics.
#[derive(Clone, Copy, Debug)]
pub struct MetricsSettings {
    /// The most label sets of HTTP metrics; each is about 60 lines of a scrape. Default: 4,096.
    pub http_series_max: usize,
    /// The most label sets of TCP metrics. Default: 16,384.
    pub tcp_series_max: usize,
    /// How long a label set of either may count nothing until it is forgotten. Default: for ever, as in Istio.
    pub idle_max: Option<Duration>,
}

impl Default for MetricsSettings {
    fn default() -> Self {
        Self { http_series_max: 4096, tcp_series_max: 16_384, idle_max: None }
    }
}

/// The bounds of each histogram.
#[derive(Debug, PartialEq)]
pub(crate) struct HttpBounds {
    pub(crate) duration: Bounds,
    pub(crate) request_bytes: Bounds,
    pub(crate) response_bytes: Bounds,
}

impl Default for HttpBounds {
    fn default() -> Self {
        Self::of(&[])
    }
}

impl HttpBounds {
    fn of(buckets: &[(Arc<str>, Arc<[f64]>)]) -> Self {
        let of = |name: &str| {
            let name = format!("istiocustom.{name}");
            let fits = buckets.iter().filter(|(prefix, _)| name.starts_with(&**prefix));
            let longest = fits.max_by_key(|(prefix, _)| prefix.len());
            longest.map_or_else(histogram::standard, |(_, bounds)| Arc::clone(bounds))
        };
        Self { duration: of(DURATION), request_bytes: of(REQUEST_BYTES), response_bytes: of(RESPONSE_BYTES) }
    }
}

const DURATION: &str = "istio_request_duration_milliseconds";
const REQUEST_BYTES: &str = "istio_request_bytes";
const RESPONSE_BYTES: &str = "istio_response_bytes";

/// The metrics of one process.
pub struct Metrics {
    registry: Mutex<Registry>,
    standard: Standard,
    bounds: Mutex<Arc<HttpBounds>>,
    /// Counts how often the bounds changed, after which all series begin anew.
    epoch: AtomicU64,
    /// Times a new label set was counted in an overflow series, whose peers are `unknown`.
    overflows: Counter,
}

impl Metrics {
    /// The metrics of `component` in version `tag`: `istio_build{component,tag} 1` and the standard families.
    pub fn new(component: &str, tag: &str, settings: MetricsSettings) -> Arc<Self> {
        let mut registry = Registry::default();
        let standard = Standard {
            component: component.to_owned(),
            tag: tag.to_owned(),
            http: Table::new(settings.http_series_max, settings.idle_max),
            tcp: Table::new(settings.tcp_series_max, settings.idle_max),
        };
        let overflows = Counter::default();
        registry.register(
            "cairn_metric_series_overflow",
            "Label sets counted as unknown peers, because there are too many",
            overflows.clone(),
        );
        let bounds = Mutex::default();
        Arc::new(Self {
            registry: Mutex::new(registry),
            standard,
            bounds,
            epoch: AtomicU64::new(0),
            overflows,
        })
    }

    /// Takes over other bounds of histograms, by the beginning of their names with `istiocustom.` before them, as in
    /// Envoy, the longest winning; and how long a series may count nothing. Series of other bounds begin anew: samples of
    /// one family must not differ in them.
    pub fn configure(&self, buckets: &[(Arc<str>, Arc<[f64]>)], idle_max: Option<Duration>) {
        self.standard.http.set_idle_max(idle_max);
        self.standard.tcp.set_idle_max(idle_max);
        let bounds = HttpBounds::of(buckets);
        let mut known = self.bounds.lock();
        if **known != bounds {
            *known = Arc::new(bounds);
            self.standard.http.clear();
            self.epoch.fetch_add(1, Relaxed);
        }
    }

    /// Whose handles are of another epoch must ask for them anew.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Relaxed)
    }

    /// A counter of its own, without labels. `name` has no `_total`; it is printed with one.
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        let counter = Counter::default();
        self.registry.lock().register(name, help, counter.clone());
        counter
    }

    /// A gauge of its own, without labels.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        let gauge = Gauge::default();
        self.registry.lock().register(name, help, gauge.clone());
        gauge
    }

    /// Constant facts, printed as `<name>_info{…} 1`.
    pub fn info(&self, name: &str, help: &str, labels: Vec<(String, String)>) {
        self.registry.lock().register(name, help, Info::new(labels));
    }

    /// Registers families with labels.
    pub fn register(&self, register: impl FnOnce(&mut Registry)) {
        register(&mut self.registry.lock());
    }

    /// All metrics in Prometheus' text format, version 0.0.4.
    pub fn encode(&self) -> String {
        let mut open_metrics = String::new();
        let encoded = text::encode_registry(&mut open_metrics, &self.registry.lock());
        if encoded.is_err() {
            // Writing to a String cannot fail; a collector that does has left what it wrote, which is still valid.
            tracing::error!("metrics are incomplete");
        }
        let mut out = prometheus_text(&open_metrics);
        self.standard.print(&mut out, Instant::now());
        out
    }

    pub(crate) fn http_series(&self, labels: &HttpLabels) -> Arc<HttpSeries> {
        // Held while the table is asked, so that no series of old bounds comes after the table was cleared.
        let bounds = self.bounds.lock();
        let make = || HttpSeries::new(&bounds);
        let (series, full) = self.standard.http.series(labels, make, HttpLabels::overflow);
        if full {
            self.overflows.inc();
        }
        series
    }

    pub(crate) fn tcp_series(&self, labels: &TcpLabels) -> Arc<TcpSeries> {
        let (series, full) = self.standard.tcp.series(labels, TcpSeries::default, TcpLabels::overflow);
        if full {
            self.overflows.inc();
        }
        series
    }
}

/// OpenMetrics names a counter's family without `_total`; Prometheus' older text format wants the family to be named
/// like its samples, and knows neither units nor an end mark.
fn prometheus_text(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len() + 256);
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap_or((rest, "untyped"));
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                other => ("", other),
            };
            if let Some((name, help)) = help.take() {
                out.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            out.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            out.extend([line, "\n"]);
        }
    }
    out
}

/// Istio's standard families, which share their label sets: one series holds the values of all of them.
struct Standard {
    component: String,
    tag: String,
    http: Table<HttpLabels, HttpSeries>,
    tcp: Table<TcpLabels, TcpSeries>,
}

impl Standard {
    fn print(&self, out: &mut String, now: Instant) {
        let mut labels = String::new();
        put(&mut labels, "component", &self.component);
        put(&mut labels, "tag", &self.tag);
        let mut build = Family::new();
        build.add(labels, 1);
        build.print(out, "istio_build", "What runs here", "gauge");
        self.print_http(out, now);
        self.print_tcp(out, now);
    }

    fn print_http(&self, out: &mut String, now: Instant) {
        type Counter = (Metric, &'static str, &'static str, fn(&HttpSeries) -> &AtomicU64);
        let counters: [Counter; 3] = [
            (Metric::RequestCount, "istio_requests_total", "HTTP requests", |values| &values.requests),
            (
                Metric::GrpcRequestMessages,
                "istio_request_messages_total",
                "gRPC messages of clients",
                |values| &values.request_messages,
            ),
            (
                Metric::GrpcResponseMessages,
                "istio_response_messages_total",
                "gRPC messages of servers",
                |values| &values.response_messages,
            ),
        ];
        type Distribution = (Metric, &'static str, &'static str, fn(&HttpSeries) -> Read);
        let distributions: [Distribution; 3] = [
            (Metric::RequestDuration, DURATION, "Duration of HTTP requests", |values| values.duration.read()),
            (Metric::RequestSize, REQUEST_BYTES, "Size of HTTP requests, headers included", |values| {
                values.request_bytes.read()
            }),
            (Metric::ResponseSize, RESPONSE_BYTES, "Size of HTTP responses, headers included", |values| {
                values.response_bytes.read()
            }),
        ];
        let series = self.http.list(now);
        for (metric, name, help, column) in counters {
            let mut family = Family::new();
            for (labels, values) in &series {
                let count = column(values).load(Relaxed);
                if count > 0 && labels.custom.counts(metric) {
                    family.add(labels.print(metric), count);
                }
            }
            family.print(out, name, help, "counter");
        }
        for (metric, name, help, column) in distributions {
            let mut family = Family::new();
            for (labels, values) in &series {
                if values.requests.load(Relaxed) > 0 && labels.custom.counts(metric) {
                    family.add(labels.print(metric), column(values));
                }
            }
            family.print(out, name, help);
        }
    }

    fn print_tcp(&self, out: &mut String, now: Instant) {
        type Counter = (Option<Metric>, &'static str, &'static str, fn(&TcpSeries) -> &AtomicU64);
        let counters: [Counter; 5] = [
            (
                Some(Metric::TcpOpened),
                "istio_tcp_connections_opened_total",
                "TCP connections opened",
                |values| &values.opened,
            ),
            (
                Some(Metric::TcpClosed),
                "istio_tcp_connections_closed_total",
                "TCP connections closed",
                |values| &values.closed,
            ),
            (
                Some(Metric::TcpReceived),
                "istio_tcp_received_bytes_total",
                "Bytes from client to server",
                |values| &values.received,
            ),
            (Some(Metric::TcpSent), "istio_tcp_sent_bytes_total", "Bytes from server to client", |values| {
                &values.sent
            }),
            (None, "istio_tcp_connections_failed_total", "TCP connections that failed", |values| {
                &values.failed
            }),
        ];
        let series = self.tcp.list(now);
        for (metric, name, help, column) in counters {
            let mut family = Family::new();
            for (labels, values) in &series {
                let count = column(values).load(Relaxed);
                // A failed connection has labels of its own, under which nothing was opened: print what was counted.
                if count > 0 && metric.is_none_or(|metric| labels.custom.counts(metric)) {
                    family.add(labels.print(metric), count);
                }
            }
            family.print(out, name, help, "counter");
        }
    }
}

#[cfg(test)]
#[path = "metrics/tests.rs"]
mod tests;
