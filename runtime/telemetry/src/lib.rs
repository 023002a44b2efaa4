//! One record of an exchange or connection, turned into metrics, an access log line and an explanation.
//!
//! The data plane hands over one [`HttpRecord`] per exchange and one [`TcpRecord`] per connection, once each, when it
//! is over. [`Telemetry`] is the process's one instance: [`Metrics`] counts, [`AccessLog`] writes lines through a
//! bounded queue that never makes a request wait, and [`Recent`] keeps the last few records for the explain endpoint.

mod access_log;
mod denials;
mod histogram;
mod http_record;
mod labels;
mod line;
mod metrics;
mod observe;
mod recent;
mod scrape;
mod shape;
mod table;
mod tcp_record;
mod trace;

pub use access_log::AccessLog;
pub use denials::{Denials, Denied, is_service};
pub use http_record::{HttpExplanation, HttpRecord, HttpScope};
pub use labels::{CustomLabels, PeerLabels, Reporter, Security, TcpLabels};
pub use line::{TcpValue, append_address, append_bytes, append_number, append_timestamp};
pub use metrics::{Metrics, MetricsSettings};
pub use observe::{Observe, Wanted, Wants, legible};
pub use prometheus_client::metrics::counter::Counter;
pub use prometheus_client::metrics::gauge::Gauge;
pub use recent::{Recent, Slot};
pub use shape::{MetricForm, MetricShape};
pub use tcp_record::{Direction, TcpConnection, TcpExplanation, TcpRecord};
pub use trace::{Trace, Try};

use std::io::Write;
use std::sync::Arc;

/// How a process observes itself.
#[derive(Clone, Copy, Debug)]
pub struct TelemetrySettings {
    /// Bounds of the metrics.
    pub metrics: MetricsSettings,
    /// Whether access log lines are written. Default: yes.
    pub access_log: bool,
    /// Whether lines of connections are JSON. Default: no.
    pub json: bool,
    /// How many records of each kind are kept for explanations. Default: 256.
    pub recent: usize,
}

impl Default for TelemetrySettings {
    fn default() -> Self {
        Self { metrics: MetricsSettings::default(), access_log: true, json: false, recent: 256 }
    }
}

/// Everything that observes the traffic of one process.
pub struct Telemetry {
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Access log lines.
    pub access_log: Arc<AccessLog>,
    json: bool,
    /// Access log lines dropped, of this log and of others.
    pub lines_dropped: Counter,
    /// The last HTTP exchanges.
    pub exchanges: Recent<HttpExplanation>,
    /// The last connections.
    pub connections: Recent<TcpExplanation>,
    /// The last denials of each service.
    pub denials: Denials,
}

impl Telemetry {
    /// Telemetry of `component` (`waypoint`, `ztunnel`) in version `tag`, whose access log goes to `out`.
    pub fn new(
        component: &str,
        tag: &str,
        settings: &TelemetrySettings,
        out: impl Write + Send + 'static,
    ) -> Arc<Self> {
        let metrics = Metrics::new(component, tag, settings.metrics);
        let lines_dropped = metrics
            .counter("cairn_access_log_dropped", "Access log lines dropped, because the writer was too slow");
        let access_log = match settings.access_log {
            true => AccessLog::start(out, lines_dropped.clone()),
            false => AccessLog::off(),
        };
        Arc::new(Self {
            metrics,
            access_log: Arc::new(access_log),
            json: settings.json,
            lines_dropped,
            exchanges: Recent::new(settings.recent),
            connections: Recent::new(settings.recent),
            denials: Denials::default(),
        })
    }

    /// Records a finished exchange of the connection that `scope` belongs to: as `observer` says, or without one in
    /// the process's own log and under the standard labels.
    pub fn record_http(&self, scope: &HttpScope, record: &HttpRecord<'_>, observer: Option<&dyn Observe>) {
        scope.count(record, observer);
        match observer {
            None => self.access_log.write(|out| line::http(out, record)),
            Some(observer) => observer.finished(scope, record),
        }
        self.exchanges.push(|slot| slot.refill(scope, record));
        self.denials.push_http(scope, record);
    }

    /// Records a finished connection, whose bytes its [`TcpConnection`] counted, in the process's own log.
    pub fn record_tcp(&self, record: &TcpRecord<'_>) {
        self.log_tcp(record);
        self.keep_tcp(record);
    }

    /// Writes a finished connection into the process's own log.
    pub fn log_tcp(&self, record: &TcpRecord<'_>) {
        self.access_log.write(|out| match self.json {
            true => line::tcp_json(out, record),
            false => line::tcp(out, record),
        });
    }

    /// Keeps a finished connection for explanations, when it is logged elsewhere.
    pub fn keep_tcp(&self, record: &TcpRecord<'_>) {
        self.connections.push(|slot| slot.refill(record));
        self.denials.push_tcp(record);
    }
}

/// Appends Istio's default line of an exchange, without a line feed.
pub fn append_default_line(out: &mut Vec<u8>, record: &HttpRecord<'_>) {
    line::http(out, record);
}
