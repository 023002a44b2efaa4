//! The process's metrics: Istio's standard families, and whatever else a crate registers.

use crate::http_record::HttpSeries;
use crate::labels::{HttpLabels, TcpLabels};
use crate::table::Table;
use crate::tcp_record::TcpSeries;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bounds of the metrics.
#[derive(Clone, Copy, Debug)]
pub struct MetricsSettings {
    /// The most label sets of HTTP metrics; each is about 60 lines of a scrape. Default: 4,096.
    pub http_series_max: usize,
    /// The most label sets of TCP metrics. Default: 16,384.
    pub tcp_series_max: usize,
}

impl Default for MetricsSettings {
    fn default() -> Self {
        Self { http_series_max: 4096, tcp_series_max: 16_384 }
    }
}

/// The metrics of one process.
pub struct Metrics {
    registry: Mutex<Registry>,
    standard: Arc<Standard>,
    /// Times a new label set was counted in an overflow series, whose peers are `unknown`.
    overflows: Counter,
}

impl Metrics {
    /// The metrics of `component` in version `tag`: `istio_build{component,tag} 1` and the standard families.
    pub fn new(component: &str, tag: &str, settings: MetricsSettings) -> Arc<Self> {
        let mut registry = Registry::default();
        let standard = Arc::new(Standard {
            component: component.to_owned(),
            tag: tag.to_owned(),
            http: Table::new(settings.http_series_max),
            tcp: Table::new(settings.tcp_series_max),
        });
        registry.register_collector(Box::new(Arc::clone(&standard)));
        let overflows = Counter::default();
        registry.register(
            "cairn_metric_series_overflow",
            "Label sets counted as unknown peers, because there are too many",
            overflows.clone(),
        );
        Arc::new(Self { registry: Mutex::new(registry), standard, overflows })
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
        prometheus_text(&open_metrics)
    }

    pub(crate) fn http_series(&self, labels: &HttpLabels) -> Arc<HttpSeries> {
        let (series, full) = self.standard.http.series(labels, HttpLabels::overflow);
        if full {
            self.overflows.inc();
        }
        series
    }

    pub(crate) fn tcp_series(&self, labels: &TcpLabels) -> Arc<TcpSeries> {
        let (series, full) = self.standard.tcp.series(labels, TcpLabels::overflow);
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

impl fmt::Debug for Standard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standard").field("component", &self.component).finish_non_exhaustive()
    }
}

impl Collector for Standard {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let labels = [("component", self.component.as_str()), ("tag", self.tag.as_str())];
        encoder
            .encode_descriptor("istio_build", "What runs here", None, MetricType::Gauge)?
            .encode_family(&labels)?
            .encode_gauge(&1_i64)?;
        self.encode_http(&mut encoder)?;
        self.encode_tcp(&mut encoder)
    }
}

impl Standard {
    fn encode_http(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let series = self.http.list();
        if series.is_empty() {
            return Ok(());
        }
        let mut family =
            encoder.encode_descriptor("istio_requests", "HTTP requests", None, MetricType::Counter)?;
        for (labels, values) in &series {
            let count = values.requests.load(Relaxed);
            family.encode_family(labels)?.encode_counter::<NoLabelSet, u64, u64>(&count, None)?;
        }
        let mut family = encoder.encode_descriptor(
            "istio_request_duration_milliseconds",
            "Duration of HTTP requests",
            None,
            MetricType::Histogram,
        )?;
        for (labels, values) in &series {
            let (sum, count, buckets) = values.duration.read();
            family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        let mut family = encoder.encode_descriptor(
            "istio_request_bytes",
            "Size of HTTP requests, headers included",
            None,
            MetricType::Histogram,
        )?;
        for (labels, values) in &series {
            let (sum, count, buckets) = values.request_bytes.read();
            family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        let mut family = encoder.encode_descriptor(
            "istio_response_bytes",
            "Size of HTTP responses, headers included",
            None,
            MetricType::Histogram,
        )?;
        for (labels, values) in &series {
            let (sum, count, buckets) = values.response_bytes.read();
            family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn encode_tcp(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        type Column = fn(&TcpSeries) -> &AtomicU64;
        let columns: [(&str, &str, Column); 5] = [
            ("istio_tcp_connections_opened", "TCP connections opened", |values| &values.opened),
            ("istio_tcp_connections_closed", "TCP connections closed", |values| &values.closed),
            ("istio_tcp_received_bytes", "Bytes from client to server", |values| &values.received),
            ("istio_tcp_sent_bytes", "Bytes from server to client", |values| &values.sent),
            ("istio_tcp_connections_failed", "TCP connections that failed", |values| &values.failed),
        ];
        let series = self.tcp.list();
        for (name, help, column) in columns {
            // A failed connection has labels of its own, under which nothing was opened: print what was counted.
            let counted = || series.iter().filter(|(_, values)| column(values).load(Relaxed) > 0);
            if counted().next().is_none() {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, values) in counted() {
                let count = column(values).load(Relaxed);
                family.encode_family(labels)?.encode_counter::<NoLabelSet, u64, u64>(&count, None)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "metrics/tests.rs"]
mod tests;
