//! Spans as Zipkin's JSON, version 2.

use crate::Own;
use crate::span::{Span, SpanKind};
use serde_json::{Map, Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// A batch of spans.
pub(crate) fn json<'a>(own: &Own, spans: impl Iterator<Item = &'a Span>) -> String {
    let service = own.service_name();
    Value::Array(spans.map(|span| of_span(span, &service)).collect()).to_string()
}

fn of_span(span: &Span, service: &str) -> Value {
    let tags: Map<String, Value> =
        span.tags.iter().map(|(name, value)| (name.to_string(), value.clone().into())).collect();
    let duration = span.end.duration_since(span.start).unwrap_or_default();
    let mut value = json!({
        "traceId": trace_id(span.trace_id),
        "id": format!("{:016x}", span.id),
        "kind": match span.kind {
            SpanKind::Server => "SERVER",
            SpanKind::Client => "CLIENT",
        },
        "name": span.name,
        "timestamp": micros(span.start),
        // Zipkin takes no duration of nothing.
        "duration": u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).max(1),
        "localEndpoint": { "serviceName": service },
        "tags": tags,
    });
    if span.parent_id != 0
        && let Some(fields) = value.as_object_mut()
    {
        fields.insert("parentId".to_owned(), format!("{:016x}", span.parent_id).into());
    }
    value
}

/// Of 16 digits if that is all it needs.
fn trace_id(id: u128) -> String {
    if id <= u128::from(u64::MAX) { format!("{id:016x}") } else { format!("{id:032x}") }
}

fn micros(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}
