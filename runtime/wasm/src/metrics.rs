//! Metrics that plugins define, and what the host counts about plugins: process-wide, bounded, and written out in the
//! Prometheus text format for the waypoint to append to its own.

use crate::abi::Status;
use crate::log::Sampled;
use crate::shadow::{self, ShadowCounts};
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The most metrics plugins may define together; later ones are counted into one that is not shown.
const METRICS_MAX: usize = 10_000;
/// The most that one of them may define, so that there is room for others.
const METRICS_OF_ONE_MAX: u64 = 2000;
/// The longest name, Istio's labels in it included.
const NAME_BYTES_MAX: usize = 2048;
/// The most plugins whose counters are kept.
const PLUGINS_MAX: usize = 1000;
/// Upper bounds of histogram buckets: Envoy's defaults, in whatever unit the plugin records (`envoy.config.metrics.v3`).
const BUCKETS: [u64; 18] = [
    1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 600_000, 1_800_000,
    3_600_000,
];

/// What a metric does with numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

impl MetricKind {
    fn from_abi(number: u32) -> Result<Self, Status> {
        match number {
            0 => Ok(Self::Counter),
            1 => Ok(Self::Gauge),
            2 => Ok(Self::Histogram),
            _ => Err(Status::BadArgument),
        }
    }
}

/// One metric. Guests hold its id, instances a handle, so that counting takes no lock.
pub(crate) struct Metric {
    kind: MetricKind,
    /// The counter's sum, the gauge's value (two's complement), or the histogram's sum.
    value: AtomicU64,
    buckets: Box<[AtomicU64]>,
}

impl Metric {
    fn new(kind: MetricKind) -> Self {
        let buckets = if kind == MetricKind::Histogram { BUCKETS.len() + 1 } else { 0 };
        Self { kind, value: AtomicU64::new(0), buckets: (0..buckets).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The low bits of its id.
    pub(crate) fn kind_number(&self) -> u32 {
        self.kind as u32
    }

    /// `proxy_increment_metric`: counters only grow, gauges go both ways, histograms do not count.
    pub(crate) fn increment(&self, delta: i64) -> Result<(), Status> {
        let allowed = match self.kind {
            MetricKind::Counter => delta > 0,
            MetricKind::Gauge => true,
            MetricKind::Histogram => false,
        };
        if !allowed {
            return Err(Status::BadArgument);
        }
        self.value.fetch_add(delta as u64, Ordering::Relaxed);
        Ok(())
    }

    /// `proxy_record_metric`: adds to a counter, sets a gauge, files into a histogram.
    pub(crate) fn record(&self, value: u64) {
        match self.kind {
            MetricKind::Gauge => self.value.store(value, Ordering::Relaxed),
            MetricKind::Counter => {
                self.value.fetch_add(value, Ordering::Relaxed);
            }
            MetricKind::Histogram => {
                self.value.fetch_add(value, Ordering::Relaxed);
                let bucket = BUCKETS.partition_point(|bound| *bound < value);
                if let Some(count) = self.buckets.get(bucket) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// `proxy_get_metric`.
    pub(crate) fn value(&self) -> Result<u64, Status> {
        match self.kind {
            MetricKind::Histogram => Err(Status::BadArgument),
            MetricKind::Counter | MetricKind::Gauge => Ok(self.value.load(Ordering::Relaxed)),
        }
    }
}

/// A bound that a plugin ran into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// A call took a tenth of its deadline.
    Slow,
    /// A call was ended at its deadline.
    Deadline,
    /// It wanted more memory than it may have.
    Memory,
    /// It used up its stack.
    Stack,
    /// It called the host too often in one call.
    HostCalls,
    /// It had the host copy too much in one call.
    HostBytes,
    /// It has as many calls of other services under way as it may, or as many bytes in them.
    Calls,
    /// An exchange found as much waiting for its threads as may wait.
    QueueFull,
    /// An exchange waited for its threads for as long as it may.
    QueueWait,
    /// Too many exchanges at a time.
    Streams,
    /// It held an exchange for too long.
    Pause,
    /// A header or a metric more than it may have.
    Entries,
}

impl Limit {
    const ALL: [Self; 12] = [
        Self::Slow,
        Self::Deadline,
        Self::Memory,
        Self::Stack,
        Self::HostCalls,
        Self::HostBytes,
        Self::Calls,
        Self::QueueFull,
        Self::QueueWait,
        Self::Streams,
        Self::Pause,
        Self::Entries,
    ];

    /// The word for it in metrics and on the admin port.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Slow => "slow",
            Self::Deadline => "deadline",
            Self::Memory => "memory",
            Self::Stack => "stack",
            Self::HostCalls => "host_calls",
            Self::HostBytes => "host_bytes",
            Self::Calls => "calls",
            Self::QueueFull => "queue_full",
            Self::QueueWait => "queue_wait",
            Self::Streams => "streams",
            Self::Pause => "pause",
            Self::Entries => "entries",
        }
    }
}

/// What the host counts about one plugin, over all its versions.
#[derive(Default)]
pub(crate) struct PluginCounters {
    limits: [AtomicU64; Limit::ALL.len()],
    /// Metrics that it was the first to define.
    metrics: AtomicU64,
    /// Bytes of memory that its instances have.
    pub(crate) memory_bytes: AtomicU64,
    /// Threads of its own; 0: it runs on the workers.
    pub(crate) own_threads: AtomicU64,
    /// Instances that are paused, for they crashed again and again.
    pub(crate) paused: AtomicU64,
    pub(crate) traps: AtomicU64,
    pub(crate) failed_exchanges: AtomicU64,
    pub(crate) starts: AtomicU64,
    pub(crate) log_lines_dropped: AtomicU64,
    pub(crate) calls: AtomicU64,
    /// Exchanges that had no instance of their own because too many had one.
    pub(crate) instances_refused: AtomicU64,
    /// What it would have done, if it is only asked that.
    pub(crate) shadow: ShadowCounts,
}

impl PluginCounters {
    /// Counts a bound that it ran into.
    pub(crate) fn hit(&self, limit: Limit) {
        if let Some(count) = self.limits.get(limit as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The bounds that it ran into, and how often.
    pub(crate) fn limits(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Limit::ALL
            .iter()
            .zip(&self.limits)
            .map(|(limit, count)| (limit.as_str(), count.load(Ordering::Relaxed)))
    }

    /// Counts a call of another service.
    pub(crate) fn count_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }
}

/// All metrics of all plugins of the process.
pub(crate) struct Registry {
    defined: RwLock<Defined>,
    plugins: Mutex<BTreeMap<Arc<str>, Arc<PluginCounters>>>,
    /// Says that there are too many.
    said_full: Sampled,
}

impl Default for Registry {
    fn default() -> Self {
        let said_full = Sampled::every(Duration::from_secs(60));
        Self { defined: RwLock::default(), plugins: Mutex::default(), said_full }
    }
}

#[derive(Default)]
struct Defined {
    metrics: Vec<(Box<str>, Arc<Metric>)>,
    ids: HashMap<(MetricKind, Box<str>), u32>,
}

impl Registry {
    /// `proxy_define_metric`: the same kind and name is the same metric in every plugin, as in Envoy. Ids count up
    /// from 4 in steps of 4, with the kind in their low bits.
    pub(crate) fn define(&self, kind: u32, name: &[u8], by: &PluginCounters) -> Result<u32, Status> {
        let kind = MetricKind::from_abi(kind)?;
        let name = String::from_utf8_lossy(&name[..name.len().min(NAME_BYTES_MAX)]);
        let mut defined = self.defined.write();
        let key = (kind, Box::from(&*name));
        if let Some(id) = defined.ids.get(&key) {
            return Ok(*id);
        }
        let is_full = defined.metrics.len() >= METRICS_MAX;
        if is_full || by.metrics.fetch_add(1, Ordering::Relaxed) >= METRICS_OF_ONE_MAX {
            if self.said_full.passes() {
                tracing::warn!(metric = %name, "too many plugin metrics, this one is not kept");
            }
            by.hit(Limit::Entries);
            return Ok((METRICS_MAX as u32 + 1) << 2 | kind as u32);
        }
        defined.metrics.push((key.1.clone(), Arc::new(Metric::new(kind))));
        let id = (defined.metrics.len() as u32) << 2 | kind as u32;
        defined.ids.insert(key, id);
        Ok(id)
    }

    /// The metric with this id.
    pub(crate) fn find(&self, id: u32) -> Option<Arc<Metric>> {
        let index = ((id >> 2) as usize).checked_sub(1)?;
        let defined = self.defined.read();
        let metric = match defined.metrics.get(index) {
            Some((_, metric)) => Arc::clone(metric),
            None if index == METRICS_MAX => return kind_of(id).map(|kind| Arc::new(Metric::new(kind))),
            None => return None,
        };
        (metric.kind as u32 == id & 3).then_some(metric)
    }

    /// The counters of the plugin with this name.
    pub(crate) fn plugin(&self, name: &Arc<str>) -> Arc<PluginCounters> {
        let mut plugins = self.plugins.lock();
        if let Some(counters) = plugins.get(name) {
            return Arc::clone(counters);
        }
        let counters = Arc::new(PluginCounters::default());
        if plugins.len() < PLUGINS_MAX {
            plugins.insert(Arc::clone(name), Arc::clone(&counters));
        }
        counters
    }

    /// All of it in the Prometheus text format.
    pub(crate) fn encode(&self) -> String {
        let mut text = String::new();
        self.encode_plugins(&mut text);
        let defined = self.defined.read();
        let mut families: BTreeMap<String, (MetricKind, Vec<Series<'_>>)> = BTreeMap::new();
        for (name, metric) in &defined.metrics {
            let (family, labels) = family_and_labels(name);
            let (kind, series) = families.entry(family).or_insert_with(|| (metric.kind, Vec::new()));
            // One name has one type in Prometheus: the first definition wins.
            if *kind == metric.kind && series.iter().all(|(present, _)| *present != labels) {
                series.push((labels, metric));
            }
        }
        for (family, (kind, series)) in &families {
            encode_family(&mut text, family, *kind, series);
        }
        text
    }

    fn encode_plugins(&self, text: &mut String) {
        let plugins = self.plugins.lock();
        if !plugins.is_empty() {
            line(text, format_args!("# TYPE cairn_wasm_limit_hits_total counter"));
        }
        for (plugin, counters) in plugins.iter() {
            let plugin = escape(plugin);
            for (limit, count) in counters.limits().filter(|(_, count)| *count > 0) {
                line(
                    text,
                    format_args!(
                        "cairn_wasm_limit_hits_total{{plugin=\"{plugin}\",limit=\"{limit}\"}} {count}"
                    ),
                );
            }
        }
        let mut family = |name: &str, value: fn(&PluginCounters) -> &AtomicU64| {
            let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
            if !plugins.is_empty() {
                line(text, format_args!("# TYPE cairn_wasm_{name} {kind}"));
            }
            for (plugin, counters) in plugins.iter() {
                let value = value(counters).load(Ordering::Relaxed);
                line(text, format_args!("cairn_wasm_{name}{{plugin=\"{}\"}} {value}", escape(plugin)));
            }
        };
        family("traps_total", |counters| &counters.traps);
        family("failed_exchanges_total", |counters| &counters.failed_exchanges);
        family("instance_starts_total", |counters| &counters.starts);
        family("log_lines_dropped_total", |counters| &counters.log_lines_dropped);
        family("calls_total", |counters| &counters.calls);
        family("memory_bytes", |counters| &counters.memory_bytes);
        family("own_threads", |counters| &counters.own_threads);
        family("paused_instances", |counters| &counters.paused);
        family("exchange_instances_refused_total", |counters| &counters.instances_refused);
        shadow::encode(text, plugins.iter().map(|(name, counters)| (escape(name), &counters.shadow)));
    }
}

/// The labels of one metric of a family, and the metric.
type Series<'a> = (String, &'a Metric);

fn kind_of(id: u32) -> Option<MetricKind> {
    MetricKind::from_abi(id & 3).ok()
}

fn encode_family(text: &mut String, family: &str, kind: MetricKind, series: &[Series<'_>]) {
    let word = match kind {
        MetricKind::Counter => "counter",
        MetricKind::Gauge => "gauge",
        MetricKind::Histogram => "histogram",
    };
    line(text, format_args!("# TYPE {family} {word}"));
    for (labels, metric) in series {
        let value = metric.value.load(Ordering::Relaxed);
        match kind {
            MetricKind::Counter => line(text, format_args!("{family}{} {value}", braced(labels))),
            MetricKind::Gauge => line(text, format_args!("{family}{} {}", braced(labels), value as i64)),
            MetricKind::Histogram => encode_histogram(text, family, labels, metric),
        }
    }
}

fn encode_histogram(text: &mut String, family: &str, labels: &str, metric: &Metric) {
    let separator = if labels.is_empty() { "" } else { "," };
    let mut count = 0;
    for (index, bucket) in metric.buckets.iter().enumerate() {
        count += bucket.load(Ordering::Relaxed);
        match BUCKETS.get(index) {
            Some(le) => {
                line(text, format_args!("{family}_bucket{{{labels}{separator}le=\"{le}\"}} {count}"));
            }
            None => line(text, format_args!("{family}_bucket{{{labels}{separator}le=\"+Inf\"}} {count}")),
        }
    }
    let sum = metric.value.load(Ordering::Relaxed);
    line(text, format_args!("{family}_sum{} {sum}", braced(labels)));
    line(text, format_args!("{family}_count{} {count}", braced(labels)));
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{arguments}");
}

fn braced(labels: &str) -> String {
    if labels.is_empty() { String::new() } else { format!("{{{labels}}}") }
}

/// Splits Istio's naming convention `key=.=value;.;key=.=value;.;name` into the family and its labels.
fn family_and_labels(name: &str) -> (String, String) {
    let mut labels = String::new();
    let mut family = String::new();
    for part in name.split(";.;") {
        match part.split_once("=.=") {
            Some((key, value)) => {
                let separator = if labels.is_empty() { "" } else { "," };
                let key = sanitized(key.trim_start_matches("istiocustom."));
                // Writing to a String cannot fail.
                let _ = write!(labels, "{separator}{key}=\"{}\"", escape(value));
            }
            None => family.push_str(part),
        }
    }
    let family = if labels.is_empty() { family.as_str() } else { family.trim_start_matches(['_', '.']) };
    (sanitized(family), labels)
}

/// A name with everything that Prometheus does not allow in names replaced by `_`.
fn sanitized(name: &str) -> String {
    let mut clean: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect();
    if clean.is_empty() || clean.starts_with(|c: char| c.is_ascii_digit()) {
        clean.insert(0, '_');
    }
    clean
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_follow_envoy() {
        let (registry, by) = (Registry::default(), PluginCounters::default());
        let counter = registry.define(0, b"c", &by).unwrap();
        assert_eq!(counter, 4);
        assert_eq!(registry.define(0, b"c", &by).unwrap(), counter);
        let gauge = registry.define(1, b"g", &by).unwrap();
        assert_eq!(gauge, 9);
        let histogram = registry.define(2, b"h", &by).unwrap();
        assert_eq!(registry.define(3, b"x", &by), Err(Status::BadArgument));

        let metric = registry.find(counter).unwrap();
        assert_eq!(metric.increment(5), Ok(()));
        assert_eq!(metric.increment(0), Err(Status::BadArgument));
        assert_eq!(metric.increment(-2), Err(Status::BadArgument));
        metric.record(7);
        assert_eq!(metric.value(), Ok(12));
        let metric = registry.find(gauge).unwrap();
        assert_eq!(metric.increment(-2), Ok(()));
        metric.record(7);
        assert_eq!(metric.value(), Ok(7));
        let metric = registry.find(histogram).unwrap();
        assert_eq!(metric.increment(1), Err(Status::BadArgument));
        assert_eq!(metric.value(), Err(Status::BadArgument));
        assert!(registry.find(counter + 1).is_none(), "the low bits are the kind");
        assert!(registry.find(0).is_none());
        assert!(registry.find(u32::MAX).is_none());
    }

    #[test]
    fn text_has_one_type_per_name_and_istio_labels() {
        let (registry, by) = (Registry::default(), PluginCounters::default());
        let id = registry.define(0, b"reporter=.=destination;.;app=.=a\"b;.;_requests.total", &by).unwrap();
        registry.find(id).unwrap().record(3);
        let id = registry.define(2, b"9 lives", &by).unwrap();
        registry.find(id).unwrap().record(7);
        let text = registry.encode();
        assert!(text.contains("# TYPE requests_total counter\n"), "{text}");
        assert!(text.contains("requests_total{reporter=\"destination\",app=\"a\\\"b\"} 3\n"), "{text}");
        assert!(text.contains("_9_lives_bucket{le=\"5\"} 0\n"), "{text}");
        assert!(text.contains("_9_lives_bucket{le=\"10\"} 1\n"), "{text}");
        assert!(text.contains("_9_lives_bucket{le=\"+Inf\"} 1\n"), "{text}");
        assert!(text.contains("_9_lives_sum 7\n_9_lives_count 1\n"), "{text}");
    }
}
