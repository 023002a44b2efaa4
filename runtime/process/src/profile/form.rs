//! The form of a profile: pprof's `profile.proto`, as much of it as is filled in.

use pprof::{Report, Symbol};
use prost::Message;
use std::collections::HashMap;
use std::time::Duration;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Profile {
    #[prost(message, repeated, tag = "1")]
    pub(super) sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    pub(super) sample: Vec<Sample>,
    #[prost(message, repeated, tag = "4")]
    pub(super) location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    pub(super) function: Vec<Function>,
    /// What all others name by its place here; the first is empty.
    #[prost(string, repeated, tag = "6")]
    pub(super) string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    pub(super) time_nanos: i64,
    #[prost(int64, tag = "10")]
    pub(super) duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    pub(super) period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    pub(super) period: i64,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct ValueType {
    #[prost(int64, tag = "1")]
    r#type: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Sample {
    /// From the innermost to the outermost.
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    /// How often it was met, and what time that stands for.
    #[prost(int64, repeated, tag = "2")]
    pub(super) value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    str: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    /// What was inlined into what, the innermost first.
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

/// Gives each text its place in the table.
struct Texts {
    table: Vec<String>,
    places: HashMap<String, i64>,
}

impl Texts {
    fn place(&mut self, text: &str) -> i64 {
        if let Some(place) = self.places.get(text) {
            return *place;
        }
        let place = self.table.len() as i64;
        self.table.push(text.to_owned());
        self.places.insert(text.to_owned(), place);
        place
    }

    fn value_type(&mut self, name: &str, unit: &str) -> ValueType {
        ValueType { r#type: self.place(name), unit: self.place(unit) }
    }
}

impl Profile {
    /// What was met, when threads were looked at so often from `begun` (since 1970) for `period`.
    pub(super) fn of(report: &Report, begun: Duration, period: Duration, frequency: u32) -> Self {
        let nanos = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        let between = 1_000_000_000 / i64::from(frequency.max(1));
        let mut texts = Texts { table: vec![String::new()], places: HashMap::from([(String::new(), 0)]) };
        let sample_type = vec![texts.value_type("samples", "count"), texts.value_type("cpu", "nanoseconds")];
        let mut profile = Self {
            period_type: sample_type.last().copied(),
            sample_type,
            time_nanos: nanos(begun),
            duration_nanos: nanos(period),
            period: between,
            ..Self::default()
        };
        let mut functions = HashMap::new();
        let thread_key = texts.place("thread");
        for (frames, count) in &report.data {
            let mut location_id = Vec::with_capacity(frames.frames.len());
            for symbols in &frames.frames {
                let line = symbols.iter().map(|symbol| profile.line(symbol, &mut functions, &mut texts));
                let line = line.collect();
                let id = profile.location.len() as u64 + 1;
                profile.location.push(Location { id, line });
                location_id.push(id);
            }
            let count = *count as i64;
            profile.sample.push(Sample {
                location_id,
                value: vec![count, count.saturating_mul(between)],
                label: vec![Label { key: thread_key, str: texts.place(&frames.thread_name_or_id()) }],
            });
        }
        profile.string_table = texts.table;
        profile
    }

    fn line(&mut self, symbol: &Symbol, functions: &mut HashMap<String, u64>, texts: &mut Texts) -> Line {
        let name = symbol.name();
        let next = self.function.len() as u64 + 1;
        let function_id = *functions.entry(name).or_insert_with_key(|name| {
            let function =
                Function { id: next, name: texts.place(name), filename: texts.place(&symbol.filename()) };
            self.function.push(function);
            next
        });
        Line { function_id, line: i64::from(symbol.lineno()) }
    }
}
