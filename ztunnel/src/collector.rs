//! The access log's way to a collector (OTLP over gRPC): a bounded queue that connections leave records in without ever
//! waiting, and a task that sends what waits.

use anyhow::{Context, Result, bail};
use cairn_identity::Roots;
use cairn_proto::opentelemetry::{
    AnyValue, ExportLogsServiceRequest, InstrumentationScope, KeyValue, LogRecord, Resource, ResourceLogs,
    ScopeLogs, any_value,
};
use cairn_telemetry::{Counter, Metrics, TcpRecord, TcpValue};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, AsciiMetadataKey, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic_prost::ProstCodec;

const PATH: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// The most records that wait; further ones are dropped and counted.
const WAITING_MAX: usize = 4096;
/// The most records that are sent at once (OpenTelemetry's default).
const BATCH_MAX: usize = 512;
/// How long a record waits for others (OpenTelemetry's default).
const BATCH_WAIT: Duration = Duration::from_secs(1);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// `INFO` and `ERROR` of OpenTelemetry's severities.
const INFO: i32 = 9;
const ERROR: i32 = 17;

/// Where the collector is, as OpenTelemetry's variables say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectorSettings {
    /// `http://host:port` or `https://host:port` (`OTEL_EXPORTER_OTLP_LOGS_ENDPOINT`, `OTEL_EXPORTER_OTLP_ENDPOINT`).
    pub address: String,
    /// Whom an https collector's certificate is of (`OTEL_EXPORTER_OTLP_CERTIFICATE`). Default: the system's.
    pub roots: Roots,
    /// What each call carries (`OTEL_EXPORTER_OTLP_HEADERS`, `a=b,c=d`).
    pub headers: Vec<(String, String)>,
    /// How long a call may take (`OTEL_EXPORTER_OTLP_TIMEOUT`, in milliseconds). Default: 10 s.
    pub timeout: Duration,
    /// What describes the process (`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`).
    pub resource: Vec<(String, String)>,
}

/// Reads OpenTelemetry's variables; `None` when they name no collector.
///
/// # Errors
/// When one cannot be understood, or asks for another protocol than gRPC.
pub fn settings<'a>(read: impl Fn(&str) -> Option<&'a str>) -> Result<Option<CollectorSettings>> {
    let either = |of_logs, of_all| read(of_logs).or_else(|| read(of_all));
    let Some(address) = either("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT") else {
        return Ok(None);
    };
    match either("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") {
        None | Some("grpc") => {}
        Some(other) => bail!("OTEL_EXPORTER_OTLP_PROTOCOL is `{other}`; logs are sent by grpc"),
    }
    let address = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    Endpoint::from_shared(address.clone())
        .with_context(|| format!("OTEL_EXPORTER_OTLP_ENDPOINT: `{address}` is no address"))?;
    let headers = either("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS").unwrap_or_default();
    let headers: Vec<(String, String)> = pairs(headers).collect();
    for (name, value) in &headers {
        header(name, value).with_context(|| format!("OTEL_EXPORTER_OTLP_HEADERS: `{name}` is no header"))?;
    }
    let timeout =
        match either("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT") {
            None => Duration::from_secs(10),
            Some(text) => Duration::from_millis(text.parse().with_context(|| {
                format!("OTEL_EXPORTER_OTLP_TIMEOUT: `{text}` is no number of milliseconds")
            })?),
        };
    let certificate = either("OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE");
    let mut resource: Vec<(String, String)> =
        pairs(read("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default()).collect();
    let name = read("OTEL_SERVICE_NAME").map(str::to_owned);
    let said = resource.iter().any(|(key, _)| key == "service.name");
    if let Some(name) = name.or_else(|| (!said).then(|| "ztunnel".to_owned())) {
        resource.retain(|(key, _)| key != "service.name");
        resource.insert(0, ("service.name".to_owned(), name));
    }
    let roots = certificate.map_or(Roots::System, Roots::from);
    Ok(Some(CollectorSettings { address, roots, headers, timeout, resource }))
}

/// `a=b,c=d`.
fn pairs(text: &str) -> impl Iterator<Item = (String, String)> {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .filter(|(key, _)| !key.is_empty())
}

fn header(name: &str, value: &str) -> Result<(AsciiMetadataKey, MetadataValue<Ascii>)> {
    Ok((name.to_lowercase().parse()?, value.parse()?))
}

/// Where connections leave records.
pub struct Collector {
    sender: mpsc::Sender<Item>,
    dropped: Counter,
}

enum Item {
    Record(Box<LogRecord>),
    /// What waits is to be sent at once; then this is told.
    Flush(oneshot::Sender<()>),
}

impl Collector {
    /// Starts the task that sends, on the current runtime.
    ///
    /// # Errors
    /// When the roots of the collector's certificate cannot be read.
    pub fn start(settings: &CollectorSettings, metrics: &Metrics) -> Result<Self> {
        let mut endpoint = Endpoint::from_shared(settings.address.clone())?.connect_timeout(CONNECT_TIMEOUT);
        if settings.address.starts_with("https://") {
            let roots = settings.roots.read();
            let roots = roots.with_context(|| format!("cannot read {}", settings.roots.name().display()))?;
            endpoint = endpoint
                .tls_config(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)))
                .context("cannot use TLS towards the collector")?;
        }
        let (sender, waiting) = mpsc::channel(WAITING_MAX);
        let help = "Log records dropped: the queue was full, or the collector did not take them";
        let dropped = metrics.counter("cairn_telemetry_dropped", help);
        let sending = Sending {
            service: Grpc::new(endpoint.connect_lazy()),
            settings: settings.clone(),
            waiting,
            sent: metrics.counter("cairn_telemetry_sent", "Log records that the collector took"),
            dropped: dropped.clone(),
        };
        tokio::spawn(sending.run());
        Ok(Self { sender, dropped })
    }

    /// Leaves a record; it never waits.
    pub fn push(&self, record: &TcpRecord<'_>) {
        match self.sender.try_reserve() {
            Ok(place) => place.send(Item::Record(Box::new(log_record(record)))),
            Err(_) => drop(self.dropped.inc()),
        }
    }

    /// Sends what waits, and returns when that is done, at the latest after so long.
    pub async fn flush(&self, within: Duration) {
        let (done, is_done) = oneshot::channel();
        let flush = async {
            if self.sender.send(Item::Flush(done)).await.is_ok() {
                // An error means that the task has ended, and with it all that waited.
                let _ended = is_done.await;
            }
        };
        if timeout(within, flush).await.is_err() {
            tracing::warn!("the collector did not take all of the access log");
        }
    }
}

/// The other end.
struct Sending {
    service: Grpc<Channel>,
    settings: CollectorSettings,
    waiting: mpsc::Receiver<Item>,
    sent: Counter,
    dropped: Counter,
}

impl Sending {
    /// Sends what comes, until nobody leaves anything any more. What the collector does not take is dropped and counted.
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let mut is_failing = false;
        loop {
            let flush = match self.next(&mut batch).await {
                Next::Over => return,
                Next::Batch => None,
                Next::Flush(done) => Some(done),
            };
            let count = batch.len() as u64;
            if count > 0 {
                let outcome = self.send(std::mem::take(&mut batch)).await;
                match &outcome {
                    Ok(()) => drop(self.sent.inc_by(count)),
                    Err(_) => drop(self.dropped.inc_by(count)),
                }
                if outcome.is_err() != is_failing {
                    is_failing = outcome.is_err();
                    match outcome {
                        Ok(()) => tracing::info!("the collector takes the access log again"),
                        Err(error) => {
                            tracing::warn!(
                                error = format!("{error:#}"),
                                "records of the access log are dropped"
                            )
                        }
                    }
                }
            }
            if let Some(done) = flush {
                // Whoever asked may have given up.
                let _gone = done.send(());
            }
        }
    }

    /// Fills `batch` with the first record and what comes soon after it.
    async fn next(&mut self, batch: &mut Vec<LogRecord>) -> Next {
        let mut deadline = None;
        while batch.len() < BATCH_MAX {
            let item = match deadline {
                None => self.waiting.recv().await,
                Some(deadline) => match timeout_at(deadline, self.waiting.recv()).await {
                    Ok(item) => item,
                    Err(_) => return Next::Batch,
                },
            };
            match item {
                Some(Item::Record(record)) => batch.push(*record),
                Some(Item::Flush(done)) => return Next::Flush(done),
                None if batch.is_empty() => return Next::Over,
                None => return Next::Batch,
            }
            deadline.get_or_insert_with(|| Instant::now() + BATCH_WAIT);
        }
        Next::Batch
    }

    async fn send(&mut self, log_records: Vec<LogRecord>) -> Result<()> {
        let scope =
            InstrumentationScope { name: "access".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
        let attributes = self.settings.resource.iter().map(|(key, value)| text(key, value)).collect();
        let message = ExportLogsServiceRequest {
            resource_logs: vec![ResourceLogs {
                resource: Some(Resource { attributes }),
                scope_logs: vec![ScopeLogs { scope: Some(scope), log_records }],
            }],
        };
        let mut request = tonic::Request::new(message);
        for (name, value) in &self.settings.headers {
            let (name, value) = header(name, value)?;
            request.metadata_mut().insert(name, value);
        }
        let call = async {
            self.service.ready().await.context("cannot connect to the collector")?;
            // Of the answer nothing is of interest.
            let codec = ProstCodec::<ExportLogsServiceRequest, ()>::default();
            let answer = self.service.unary(request, PathAndQuery::from_static(PATH), codec).await;
            answer.map(drop).context("the collector did not take it")
        };
        timeout(self.settings.timeout, call).await.context("the collector did not answer in time")?
    }
}

/// What is to be done.
enum Next {
    Batch,
    /// The same, and then this is told.
    Flush(oneshot::Sender<()>),
    Over,
}

/// A connection as OpenTelemetry has it: the line's message and its fields.
fn log_record(record: &TcpRecord<'_>) -> LogRecord {
    let mut attributes = Vec::with_capacity(20);
    record.for_each_field(|name, value| {
        attributes.push(match value {
            TcpValue::Text(value) | TcpValue::Word(value) => text(name, value),
            TcpValue::Address(value) => text(name, &value.to_string()),
            TcpValue::Number(value) | TcpValue::Milliseconds(value) => number(name, value),
        });
    });
    let (severity_number, severity_text) =
        if record.error.is_empty() { (INFO, "info") } else { (ERROR, "error") };
    let at = nanos(record.started + record.duration);
    LogRecord {
        time_unix_nano: at,
        severity_number,
        severity_text: severity_text.to_owned(),
        body: Some(any(any_value::Value::StringValue("connection complete".to_owned()))),
        attributes,
        trace_id: Vec::new(),
        span_id: Vec::new(),
        observed_time_unix_nano: at,
    }
}

fn nanos(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

fn any(value: any_value::Value) -> AnyValue {
    AnyValue { value: Some(value) }
}

fn text(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(any(any_value::Value::StringValue(value.to_owned()))) }
}

/// The duration is a number of milliseconds here.
fn number(key: &str, value: u64) -> KeyValue {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    KeyValue { key: key.to_owned(), value: Some(any(any_value::Value::IntValue(value))) }
}

#[cfg(test)]
#[path = "collector/tests.rs"]
mod tests;
