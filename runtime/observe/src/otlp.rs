//! Spans and log lines in OpenTelemetry's protocol.

use crate::Own;
use crate::span::{Span, SpanKind};
use cairn_proto::opentelemetry::{
    AnyValue, ArrayValue, ExportLogsServiceRequest, ExportTraceServiceRequest, InstrumentationScope,
    KeyValue, KeyValueList, LogRecord, Resource, ResourceLogs, ResourceSpans, ScopeLogs, ScopeSpans,
    Span as WireSpan, Status, any_value,
};
use serde_json::Value;
use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) const TRACE_PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
pub(crate) const LOGS_PATH: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// `SPAN_KIND_SERVER` and `SPAN_KIND_CLIENT`.
const SERVER: i32 = 2;
const CLIENT: i32 = 3;
/// `STATUS_CODE_ERROR`.
const ERROR: i32 = 2;

/// A log line to be sent.
#[derive(Clone, Debug)]
pub(crate) struct LogLine {
    pub(crate) at: SystemTime,
    pub(crate) body: String,
    pub(crate) attributes: serde_json::Map<String, Value>,
    /// Trace and span, if the exchange is traced.
    pub(crate) trace: Option<(u128, u64)>,
}

/// A batch of spans.
pub(crate) fn spans<'a>(
    own: &Own,
    with_environment: bool,
    spans: impl Iterator<Item = &'a Span>,
) -> ExportTraceServiceRequest {
    let mut attributes = vec![text("service.name", own.service_name())];
    if with_environment {
        let set = std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
        attributes.extend(environment(&set).map(|(key, value)| text(key, value.to_owned())));
    }
    let scope_spans = ScopeSpans { scope: Some(scope("cairn")), spans: spans.map(span).collect() };
    let resource = Some(Resource { attributes });
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans { resource, scope_spans: vec![scope_spans] }],
    }
}

/// The pairs of `OTEL_RESOURCE_ATTRIBUTES`, `a=b,c=d`.
fn environment(set: &str) -> impl Iterator<Item = (&str, &str)> {
    let pairs = set.split(',').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.trim(), value.trim())).filter(|(key, _)| !key.is_empty())
}

/// A batch of log lines.
pub(crate) fn logs<'a>(log_name: &str, lines: impl Iterator<Item = &'a LogLine>) -> ExportLogsServiceRequest {
    let scope_logs = ScopeLogs { scope: Some(scope(log_name)), log_records: lines.map(line).collect() };
    ExportLogsServiceRequest {
        resource_logs: vec![ResourceLogs {
            resource: Some(Resource::default()),
            scope_logs: vec![scope_logs],
        }],
    }
}

fn scope(name: &str) -> InstrumentationScope {
    InstrumentationScope { name: name.to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() }
}

fn span(span: &Span) -> WireSpan {
    WireSpan {
        trace_id: span.trace_id.to_be_bytes().to_vec(),
        span_id: span.id.to_be_bytes().to_vec(),
        trace_state: span.state.clone(),
        parent_span_id: if span.parent_id == 0 { Vec::new() } else { span.parent_id.to_be_bytes().to_vec() },
        name: span.name.clone(),
        kind: match span.kind {
            SpanKind::Server => SERVER,
            SpanKind::Client => CLIENT,
        },
        start_time_unix_nano: nanos(span.start),
        end_time_unix_nano: nanos(span.end),
        attributes: span.tags.iter().map(|(key, value)| text(key, value.clone())).collect(),
        status: Some(Status { message: String::new(), code: if span.is_error { ERROR } else { 0 } }),
        // Sampled.
        flags: 1,
    }
}

fn line(line: &LogLine) -> LogRecord {
    let at = nanos(line.at);
    let (trace_id, span_id) = match line.trace {
        Some((trace, span)) => (trace.to_be_bytes().to_vec(), span.to_be_bytes().to_vec()),
        None => (Vec::new(), Vec::new()),
    };
    LogRecord {
        time_unix_nano: at,
        severity_number: 0,
        severity_text: String::new(),
        body: Some(any(any_value::Value::StringValue(line.body.clone()))),
        attributes: line.attributes.iter().map(|(key, value)| pair(key, value)).collect(),
        trace_id,
        span_id,
        observed_time_unix_nano: at,
    }
}

fn nanos(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

fn any(value: any_value::Value) -> AnyValue {
    AnyValue { value: Some(value) }
}

fn text(key: &str, value: String) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(any(any_value::Value::StringValue(value))) }
}

fn pair(key: &str, value: &Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(of_json(value)) }
}

/// Attributes of logs are text, as Envoy writes them, but for lists and maps.
fn of_json(value: &Value) -> AnyValue {
    any(match value {
        Value::Null => any_value::Value::StringValue("-".to_owned()),
        Value::Bool(flag) => any_value::Value::StringValue(flag.to_string()),
        Value::Number(number) => any_value::Value::StringValue(number.to_string()),
        Value::String(text) => any_value::Value::StringValue(text.clone()),
        Value::Array(items) => {
            any_value::Value::ArrayValue(ArrayValue { values: items.iter().map(of_json).collect() })
        }
        Value::Object(fields) => any_value::Value::KvlistValue(KeyValueList {
            values: fields.iter().map(|(key, value)| pair(key, value)).collect(),
        }),
    })
}
