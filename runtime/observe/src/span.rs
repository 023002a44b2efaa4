//! Spans: which requests are traced, and what is said of them.

use crate::facts::{Facts, PeerField, Side, text_of};
use crate::trace_context::Propagation;
use crate::{Format, Own};
use cairn_mesh::{SpanTag, TelemetryProviderKind, TracingPlan};
use cairn_telemetry::{Trace, Try, Wants, legible};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::borrow::Cow;
use std::time::SystemTime;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client that names its own trace wants it (Envoy's "client forced").
const CLIENT_TRACE_ID: HeaderName = HeaderName::from_static("x-client-trace-id");
/// A service that forces a trace (Envoy's "service forced").
const FORCE_TRACE: HeaderName = HeaderName::from_static("x-envoy-force-trace");

/// All of them, in hundredths of a percent.
const ALL: u64 = 10_000;

/// Whose span it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpanKind {
    /// The exchange's.
    Server,
    /// That of an attempt to send it.
    Client,
}

/// A finished span.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) kind: SpanKind,
    pub(crate) trace_id: u128,
    pub(crate) id: u64,
    pub(crate) parent_id: u64,
    pub(crate) state: String,
    pub(crate) name: String,
    pub(crate) start: SystemTime,
    pub(crate) end: SystemTime,
    pub(crate) is_error: bool,
    pub(crate) tags: Vec<(Cow<'static, str>, String)>,
}

/// Decides on traces and makes spans, as one plan says.
#[derive(Debug)]
pub(crate) struct Tracer {
    propagation: Propagation,
    /// New trace ids are of 128 bits.
    wide_ids: bool,
    sampling: u64,
    use_request_id: bool,
    propagate: bool,
    pub(crate) report: bool,
    istio_tags: bool,
    client_spans: bool,
    tag_bytes_max: usize,
    tags: Vec<(String, Value)>,
}

/// Where a tag's value comes from.
#[derive(Debug)]
enum Value {
    Literal(String),
    Header(HeaderName, String),
    Format(Format),
}

impl Tracer {
    /// Compiles a plan. A format that cannot be used was reported when it was read, and has no tag.
    pub(crate) fn compile(plan: &TracingPlan) -> Option<Self> {
        let (propagation, wide_ids, tag_bytes_max) = match &plan.provider.kind {
            TelemetryProviderKind::OtelTrace(otel) => (Propagation::W3c, true, otel.tag_bytes_max),
            TelemetryProviderKind::Zipkin(zipkin) => {
                let kind = if zipkin.with_w3c { Propagation::B3AndW3c } else { Propagation::B3 };
                (kind, zipkin.wide_ids, zipkin.tag_bytes_max)
            }
            _ => return None,
        };
        let tags = plan.tags.iter().filter_map(|(name, tag)| {
            let value = match tag {
                SpanTag::Literal(text) => Value::Literal(text.to_string()),
                SpanTag::Environment(name, default) => {
                    Value::Literal(std::env::var(&**name).unwrap_or_else(|_| default.to_string()))
                }
                SpanTag::Header(name, default) => {
                    Value::Header(HeaderName::from_bytes(name.as_bytes()).ok()?, default.to_string())
                }
                SpanTag::Formatter(text) => Value::Format(Format::parse(text).ok()?),
            };
            Some((name.to_string(), value))
        });
        Some(Self {
            propagation,
            wide_ids,
            sampling: u64::from(plan.sampling),
            use_request_id: plan.use_request_id,
            propagate: plan.propagate,
            report: plan.report,
            istio_tags: plan.istio_tags,
            client_spans: plan.client_spans,
            tag_bytes_max,
            tags: tags.collect(),
        })
    }

    /// Asks for the headers it needs.
    pub(crate) fn want(&self, wants: &mut Wants) {
        for (_, value) in &self.tags {
            match value {
                Value::Header(name, _) => wants.request.add(name),
                Value::Format(format) => format.want(wants),
                Value::Literal(_) => {}
            }
        }
    }

    /// Begins the exchange's span, and writes its context into the headers for the upstream.
    pub(crate) fn begin(&self, headers: &mut HeaderMap) -> Trace {
        let caller = self.propagation.extract(headers);
        let sampled = caller.sampled.unwrap_or_else(|| self.is_sampled(headers));
        let (trace_id, parent_id) = caller.ids.unwrap_or_else(|| (self.new_trace_id(), 0));
        let narrow = if caller.ids.is_some() { caller.narrow } else { !self.wide_ids };
        let (span_id, state) = (fastrand::u64(1..), caller.state);
        let trace = Trace { trace_id, span_id, parent_id, sampled, narrow, state };
        if self.propagate {
            self.propagation.inject(&trace, headers);
        }
        trace
    }

    /// Begins the span of an attempt to send the request, if attempts have spans and the trace is to be reported, and
    /// writes it into the headers in place of the exchange's.
    pub(crate) fn attempt(&self, trace: &Trace, headers: &mut HeaderMap) -> Option<u64> {
        if !(self.client_spans && self.report && trace.sampled) {
            return None;
        }
        let span_id = fastrand::u64(1..);
        if self.propagate {
            let of_attempt = Trace { span_id, parent_id: trace.span_id, ..trace.clone() };
            self.propagation.inject(&of_attempt, headers);
        }
        Some(span_id)
    }

    fn new_trace_id(&self) -> u128 {
        if self.wide_ids { fastrand::u128(1..) } else { u128::from(fastrand::u64(1..)) }
    }

    /// Decides on a request whose caller has not: whoever forces a trace has it; else the request's id decides, so that
    /// all proxies on its way come to the same, or chance.
    fn is_sampled(&self, headers: &mut HeaderMap) -> bool {
        let forced = headers.contains_key(CLIENT_TRACE_ID) || headers.contains_key(FORCE_TRACE);
        let id = headers.get(REQUEST_ID).and_then(|id| RequestId::of(id.as_bytes()));
        let Some(id) = id.filter(|_| self.use_request_id) else {
            return forced || fastrand::u64(..ALL) < self.sampling;
        };
        if id.is_traced() {
            return true;
        }
        let sampled = forced || id.number() % ALL < self.sampling;
        if sampled && let Ok(marked) = HeaderValue::from_bytes(&id.marked()) {
            headers.insert(REQUEST_ID, marked);
        }
        sampled
    }

    /// The span of a finished exchange.
    pub(crate) fn span(&self, trace: &Trace, facts: &Facts<'_>) -> Span {
        let record = facts.record;
        let is_error =
            record.status >= 500 || record.status == 0 || record.grpc_status.is_some_and(is_grpc_error);
        let mut tags = self.standard_tags(facts);
        if is_error {
            tags.push(("error".into(), "true".to_owned()));
        }
        if self.istio_tags {
            istio_tags(facts, &mut tags);
        }
        for (name, value) in &self.tags {
            let value = match value {
                Value::Literal(text) => Some(text.clone()),
                Value::Header(name, default) => text_of(record.request_headers, name)
                    .map(Cow::into_owned)
                    .or_else(|| (!default.is_empty()).then(|| default.clone())),
                Value::Format(format) => format.text(facts),
            };
            if let Some(value) = value {
                tags.push((Cow::Owned(name.clone()), value));
            }
        }
        Span {
            kind: SpanKind::Server,
            trace_id: trace.trace_id,
            id: trace.span_id,
            parent_id: trace.parent_id,
            state: trace.state.clone(),
            name: span_name(facts),
            start: record.started,
            end: record.started + record.duration,
            is_error,
            tags,
        }
    }

    /// The span of an attempt, named as Envoy names what a router sends.
    pub(crate) fn client_span(&self, trace: &Trace, attempt: (usize, &Try), facts: &Facts<'_>) -> Span {
        let record = facts.record;
        let (number, attempt) = attempt;
        // What answered is the last attempt; those before it failed.
        let is_last = number + 1 == record.tries.len();
        let status = if is_last && attempt.flags == "-" { record.status } else { 0 };
        let flags = if is_last { record.flags } else { attempt.flags };
        let is_error = status == 0 || status >= 500;
        let mut tags = Vec::with_capacity(12);
        let mut put = |name: &'static str, value: String| tags.push((Cow::Borrowed(name), value));
        put("component", "proxy".to_owned());
        put("http.protocol", record.protocol.to_owned());
        put("upstream_cluster", or_dash(record.cluster));
        put("upstream_cluster.name", or_dash(record.cluster));
        put("upstream_address", attempt.upstream.to_string());
        put("peer.address", attempt.upstream.to_string());
        put("response_flags", flags.to_owned());
        put("http.status_code", status.to_string());
        if number > 0 {
            put("retry.count", number.to_string());
        }
        if is_error {
            put("error", "true".to_owned());
        }
        if self.istio_tags {
            workload_tags("destination", |field| Some(field.of(&attempt.workload)), &mut tags);
        }
        let start = record.started + attempt.after;
        let rest = record.duration.saturating_sub(attempt.after);
        Span {
            kind: SpanKind::Client,
            trace_id: trace.trace_id,
            id: attempt.span_id,
            parent_id: trace.span_id,
            state: trace.state.clone(),
            name: format!("router {} egress", record.cluster),
            start,
            end: start + attempt.duration.unwrap_or(rest),
            is_error,
            tags,
        }
    }

    fn standard_tags(&self, facts: &Facts<'_>) -> Vec<(Cow<'static, str>, String)> {
        let record = facts.record;
        let path_end = record.path.floor_char_boundary(self.tag_bytes_max);
        let path = record.path.get(..path_end).unwrap_or_default();
        let mut tags = Vec::with_capacity(32);
        let mut put = |name: &'static str, value: String| tags.push((Cow::Borrowed(name), value));
        put("component", "proxy".to_owned());
        put("node_id", facts.own.node_id.to_string());
        put("http.method", record.method.to_owned());
        put("http.url", format!("http://{}{path}", record.authority));
        put("http.protocol", record.protocol.to_owned());
        put("http.status_code", record.status.to_string());
        put("request_size", record.request_body_bytes.to_string());
        put("response_size", record.response_body_bytes.to_string());
        put("response_flags", record.flags.to_owned());
        put("user_agent", record.user_agent.map_or("-".into(), legible).into_owned());
        put("guid:x-request-id", legible(record.request_id.unwrap_or_default()).into_owned());
        put("peer.address", record.downstream.ip().to_string());
        put("downstream_cluster", "-".to_owned());
        put("upstream_cluster", or_dash(record.cluster));
        put("upstream_cluster.name", or_dash(record.cluster));
        if let Some(upstream) = record.upstream {
            put("upstream_address", upstream.to_string());
        }
        if let Some(status) = record.grpc_status {
            put("grpc.status_code", status.to_string());
        }
        tags
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// What is a server's fault (OpenTelemetry's semantic conventions for RPC servers).
fn is_grpc_error(status: u8) -> bool {
    matches!(status, 2 | 4 | 12 | 13 | 14 | 15)
}

/// Istio's name of a span: the route's decorator, `host:port/*`, or the path where there is no service.
fn span_name(facts: &Facts<'_>) -> String {
    match facts.scope.service() {
        Some(service) => format!("{}:{}/*", service.hostname, facts.record.local.port()),
        None => facts.record.path.split('?').next().unwrap_or_default().to_owned(),
    }
}

fn istio_tags(facts: &Facts<'_>, tags: &mut Vec<(Cow<'static, str>, String)>) {
    let Own { namespace, name, cluster_id, mesh_id, .. } = facts.own;
    for (tag, value) in [
        ("istio.canonical_service", &**name),
        ("istio.canonical_revision", "latest"),
        ("istio.mesh_id", mesh_id),
        ("istio.namespace", namespace),
        ("istio.cluster_id", cluster_id),
    ] {
        tags.push((tag.into(), value.to_owned()));
    }
    for (action, what, key) in DRY_RUN {
        let said = facts.record.metadata.and_then(|all| all.get(RBAC)?.get(key)?.as_str());
        if let Some(said) = said {
            let tag = format!("istio.authorization.dry_run.{action}_policy.{what}");
            tags.push((Cow::Owned(tag), said.to_owned()));
        }
    }
    for (end, side) in [("source", Side::Downstream), ("destination", Side::Upstream)] {
        workload_tags(end, |field| facts.peer(side, field), tags);
    }
}

/// What policies on trial came to: the namespace in which RBAC says so, and its keys.
const RBAC: &str = "envoy.filters.http.rbac";
const DRY_RUN: [(&str, &str, &str); 4] = [
    ("allow", "name", "istio_dry_run_allow_shadow_effective_policy_id"),
    ("allow", "result", "istio_dry_run_allow_shadow_engine_result"),
    ("deny", "name", "istio_dry_run_deny_shadow_effective_policy_id"),
    ("deny", "result", "istio_dry_run_deny_shadow_engine_result"),
];

/// Istio's tags of one end of the traffic.
fn workload_tags<'a>(
    end: &str,
    read: impl Fn(PeerField) -> Option<&'a str>,
    tags: &mut Vec<(Cow<'static, str>, String)>,
) {
    let fields = [
        ("workload", PeerField::Workload),
        ("namespace", PeerField::Namespace),
        ("cluster_id", PeerField::Cluster),
        ("canonical_service", PeerField::Service),
        ("canonical_revision", PeerField::Revision),
        ("app", PeerField::App),
        ("app_version", PeerField::Version),
        ("workload_type", PeerField::Type),
        ("instance_name", PeerField::Name),
    ];
    for (field, of) in fields {
        if let Some(value) = read(of) {
            tags.push((Cow::Owned(format!("istio.{end}_{field}")), value.to_owned()));
        }
    }
}

/// A request id that is a UUID: Envoy keeps in its fifteenth letter why it is traced.
struct RequestId([u8; 36]);

/// Where the reason stands, and what it is.
const REASON_AT: usize = 14;
const SAMPLED: u8 = b'9';

impl RequestId {
    fn of(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 36] = bytes.try_into().ok()?;
        let fits = |(at, byte): (usize, &u8)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        };
        bytes.iter().enumerate().all(fits).then_some(Self(bytes))
    }

    /// Sampled, or forced by a service (`a`) or a client (`b`).
    fn is_traced(&self) -> bool {
        matches!(self.0[REASON_AT], SAMPLED | b'a' | b'b')
    }

    /// A number that is the same wherever the id is seen.
    fn number(&self) -> u64 {
        let text = std::str::from_utf8(&self.0[..8]).unwrap_or_default();
        u64::from_str_radix(text, 16).unwrap_or_default()
    }

    fn marked(mut self) -> [u8; 36] {
        self.0[REASON_AT] = SAMPLED;
        self.0
    }
}

#[cfg(test)]
#[path = "span/tests.rs"]
mod tests;
