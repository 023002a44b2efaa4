//! A telemetry plan, compiled: what the HTTP engine asks of a destination when it counts, and tells when it is over.

use crate::als::{self, Further};
use crate::export::{Exporter, Item};
use crate::facts::Facts;
use crate::json::JsonFormat;
use crate::otlp::LogLine;
use crate::span::Tracer;
use crate::{Expression, Format, Outputs, Own};
use cairn_mesh::{
    FileLog, LogFormat, LogPlan, LogTarget, MetricsPlan, TagChange, TelemetryPlan, TelemetryProviderKind,
};
use cairn_telemetry::{
    AccessLog, HttpRecord, HttpScope, MetricForm, MetricShape, Observe, Trace, Wants, append_default_line,
};
use http::HeaderMap;
use std::sync::Arc;
use std::time::Duration;

/// How the traffic to one destination is observed.
#[derive(Debug)]
pub struct Observer {
    own: Arc<Own>,
    wants: Wants,
    shape: Arc<MetricShape>,
    interval: Duration,
    /// The expressions of the shape's own values; `None`: one that could not be parsed.
    values: Vec<Option<Expression>>,
    logs: Vec<Log>,
    tracing: Option<(Tracer, Arc<Exporter>)>,
}

#[derive(Debug)]
struct Log {
    filter: Option<Expression>,
    to: Sink,
}

/// Where a log goes, and in which form.
#[derive(Debug)]
enum Sink {
    File(Arc<AccessLog>, Line),
    /// The body, Istio's default line if `None`, and attributes.
    Otel(Arc<Exporter>, Option<Format>, JsonFormat),
    Als {
        to: Arc<Exporter>,
        further: Further,
        tcp: bool,
    },
}

/// The form of a line.
#[derive(Debug)]
enum Line {
    Istio,
    Text(Format, bool),
    Json(JsonFormat),
}

impl Observer {
    /// Compiles a plan. What cannot be compiled was reported when it was read; of it, a label is `unknown` and a log
    /// is left out.
    pub fn compile(plan: &TelemetryPlan, own: &Arc<Own>, outputs: &Outputs) -> Self {
        let (shape, values) = shape(&plan.metrics);
        let logs: Vec<Log> = plan.logs.iter().filter_map(|plan| log(plan, outputs)).collect();
        let mut wants = Wants::default();
        values.iter().flatten().for_each(|expression| expression.want(&mut wants));
        for log in &logs {
            log.want(&mut wants);
        }
        let tracing = plan.tracing.as_ref().and_then(|plan| {
            let tracer = Tracer::compile(plan)?;
            tracer.want(&mut wants);
            Some((tracer, outputs.queue(&plan.provider)))
        });
        let interval = plan.metrics.interval;
        Self { own: Arc::clone(own), wants, shape: Arc::new(shape), interval, values, logs, tracing }
    }
}

/// The shape of the metrics, and the expressions of its values: each once, however many labels have it.
fn shape(plan: &MetricsPlan) -> (MetricShape, Vec<Option<Expression>>) {
    let mut texts: Vec<&Arc<str>> = Vec::new();
    for change in plan.tags.values().flat_map(|tags| tags.values()) {
        if let TagChange::Upsert(text) = change
            && !texts.contains(&text)
        {
            texts.push(text);
        }
    }
    let shape = MetricShape::new(texts.len(), |metric| {
        let mut form = MetricForm {
            disabled: !plan.enabled || plan.disabled.contains(&metric),
            ..MetricForm::default()
        };
        for (name, change) in plan.tags.get(&metric).into_iter().flatten() {
            match change {
                TagChange::Remove => form.removed.push(Arc::clone(name)),
                TagChange::Upsert(text) => {
                    let index = texts.iter().position(|known| *known == text).unwrap_or_default();
                    form.set.push((Arc::clone(name), index));
                }
            }
        }
        form
    });
    let values = texts.into_iter().map(|text| Expression::parse(text).ok()).collect();
    (shape, values)
}

fn log(plan: &LogPlan, outputs: &Outputs) -> Option<Log> {
    let filter = match &plan.filter {
        None => None,
        Some(text) => match Expression::parse(text) {
            Ok(filter) => Some(filter),
            Err(error) => {
                tracing::warn!(filter = &**text, %error, "access log is not written: its filter cannot be used");
                return None;
            }
        },
    };
    let to = match &plan.to {
        LogTarget::Own => Sink::File(outputs.own(), Line::Istio),
        LogTarget::File(file) => Sink::File(outputs.file(&file.path)?, line(file)?),
        LogTarget::Provider(provider) => match &provider.kind {
            TelemetryProviderKind::File(file) => Sink::File(outputs.file(&file.path)?, line(file)?),
            TelemetryProviderKind::OtelLog(log) => {
                let body = match &log.body {
                    Some(text) => Some(Format::parse(text).ok()?),
                    None => None,
                };
                let attributes = JsonFormat::new(&log.attributes, false).ok()?;
                Sink::Otel(outputs.queue(provider), body, attributes)
            }
            TelemetryProviderKind::Als(log) => {
                Sink::Als { to: outputs.queue(provider), further: Further::of(log), tcp: log.tcp }
            }
            _ => return None,
        },
    };
    Some(Log { filter, to })
}

fn line(file: &FileLog) -> Option<Line> {
    let form = match &file.format {
        LogFormat::DefaultText if file.omit_empty => Format::istio().map(|format| Line::Text(format, true)),
        LogFormat::DefaultText => Ok(Line::Istio),
        LogFormat::Text(text) => Format::parse(text).map(|format| Line::Text(format, file.omit_empty)),
        LogFormat::DefaultJson => JsonFormat::istio(file.omit_empty).map(Line::Json),
        LogFormat::Json(entries) => JsonFormat::new(entries, file.omit_empty).map(Line::Json),
    };
    form.inspect_err(|error| {
        tracing::warn!(path = &*file.path, %error, "access log is not written: its format cannot be used");
    })
    .ok()
}

impl Log {
    fn want(&self, wants: &mut Wants) {
        if let Some(filter) = &self.filter {
            filter.want(wants);
        }
        match &self.to {
            Sink::File(_, Line::Istio) => {}
            Sink::File(_, Line::Text(format, _)) => format.want(wants),
            Sink::File(_, Line::Json(format)) => format.want(wants),
            Sink::Otel(_, body, attributes) => {
                body.iter().for_each(|body| body.want(wants));
                attributes.want(wants);
            }
            Sink::Als { further, .. } => further.want(wants),
        }
    }

    fn write(&self, facts: &Facts<'_>) {
        if self.filter.as_ref().is_some_and(|filter| !filter.is_true(facts)) {
            return;
        }
        match &self.to {
            Sink::File(to, Line::Istio) => to.write(|out| append_default_line(out, facts.record)),
            Sink::File(to, Line::Text(format, omit_empty)) => {
                to.write_raw(|out| format.write(out, facts, *omit_empty));
            }
            Sink::File(to, Line::Json(format)) => to.write(|out| format.write(out, facts)),
            Sink::Otel(to, body, attributes) => {
                let line = log_line(facts, body.as_ref(), attributes);
                to.push(Item::Log(Box::new(line)));
            }
            Sink::Als { to, further, tcp } => {
                if let Some(entry) = als::entry(facts, further, *tcp) {
                    to.push(Item::Entry(Box::new(entry)));
                }
            }
        }
    }
}

/// The most bytes of a label's value: it may come from a peer, and series are kept.
const LABEL_BYTES_MAX: usize = 256;

fn short(text: Arc<str>) -> Arc<str> {
    if text.len() <= LABEL_BYTES_MAX {
        return text;
    }
    text.get(..text.floor_char_boundary(LABEL_BYTES_MAX)).unwrap_or_default().into()
}

fn log_line(facts: &Facts<'_>, body: Option<&Format>, attributes: &JsonFormat) -> LogLine {
    let record = facts.record;
    let body = match body {
        Some(format) => format.text(facts).unwrap_or_default(),
        None => {
            let mut line = Vec::new();
            append_default_line(&mut line, record);
            String::from_utf8_lossy(&line).into_owned()
        }
    };
    LogLine {
        at: record.started,
        body,
        attributes: attributes.values(facts),
        trace: record.trace.map(|trace| (trace.trace_id, trace.span_id)),
    }
}

impl Observe for Observer {
    fn wants(&self) -> &Wants {
        &self.wants
    }

    fn shape(&self) -> &Arc<MetricShape> {
        &self.shape
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn label_values(&self, scope: &HttpScope, record: &HttpRecord<'_>, values: &mut Vec<Arc<str>>) {
        let facts = Facts { own: &self.own, scope, record };
        for expression in &self.values {
            let text = expression.as_ref().and_then(|expression| expression.text(&facts)).map(short);
            values.push(text.unwrap_or_else(|| "unknown".into()));
        }
    }

    fn trace(&self, headers: &mut HeaderMap) -> Option<Box<Trace>> {
        self.tracing.as_ref().map(|(tracer, _)| Box::new(tracer.begin(headers)))
    }

    fn attempt(&self, trace: &Trace, headers: &mut HeaderMap) -> Option<u64> {
        self.tracing.as_ref().and_then(|(tracer, _)| tracer.attempt(trace, headers))
    }

    fn finished(&self, scope: &HttpScope, record: &HttpRecord<'_>) {
        let facts = Facts { own: &self.own, scope, record };
        self.logs.iter().for_each(|log| log.write(&facts));
        if let (Some((tracer, queue)), Some(trace)) = (&self.tracing, record.trace)
            && trace.sampled
            && tracer.report
        {
            queue.push(Item::Span(Box::new(tracer.span(trace, &facts))));
            for attempt in record.tries.iter().enumerate() {
                queue.push(Item::Span(Box::new(tracer.client_span(trace, attempt, &facts))));
            }
        }
    }
}

#[cfg(test)]
#[path = "observer/tests.rs"]
mod tests;
