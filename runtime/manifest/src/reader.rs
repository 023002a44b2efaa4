//! Strict reading of policies, routes and plugins: every field is known, every value is checked, and each thing wrong
//! is noted with its exact place. Reading goes on after a mistake, so that one look shows them all.

use crate::diagnostic::{Finding, Severity};
use crate::field::FieldPath;
use serde_json::Value;
use std::time::Duration;

/// What was found while reading one object.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) list: Vec<Finding>,
    /// The object does not mean anything certain: it must not be applied as read.
    pub(crate) broken: bool,
}

impl Findings {
    /// Notes something that leaves the object usable.
    pub(crate) fn note(
        &mut self,
        severity: Severity,
        code: &'static str,
        field: &FieldPath,
        reason: impl Into<String>,
    ) {
        self.list.push(Finding { severity, code, field: field.clone(), reason: reason.into() });
    }

    /// Notes something that makes the object unusable.
    pub(crate) fn refuse(&mut self, code: &'static str, field: &FieldPath, reason: impl Into<String>) {
        self.note(Severity::Error, code, field, reason);
        self.broken = true;
    }
}

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Node<'a> {
    pub(crate) value: &'a Value,
    pub(crate) at: FieldPath,
}

impl<'a> Node<'a> {
    pub(crate) fn new(value: &'a Value, at: FieldPath) -> Self {
        Self { value, at }
    }

    fn wrong(&self, wanted: &str, findings: &mut Findings) {
        let is = match self.value {
            Value::Null => "null",
            Value::Bool(_) => "a bool",
            Value::Number(_) => "a number",
            Value::String(_) => "text",
            Value::Array(_) => "a list",
            Value::Object(_) => "a map",
        };
        findings.refuse("wrong-type", &self.at, format!("must be {wanted}, is {is}"));
    }

    /// The map's entries; all keys must be among `known`.
    pub(crate) fn map(&self, known: &[&str], findings: &mut Findings) -> Entries<'a> {
        let entries = self.any_map(findings);
        if let Some(map) = entries.map {
            for key in map.keys().filter(|key| !known.contains(&key.as_str())) {
                findings.refuse(
                    "unknown-field",
                    &self.at.key(key),
                    format!("unknown field; known are {}", known.join(", ")),
                );
            }
        }
        entries
    }

    /// The map's entries, whatever their keys.
    pub(crate) fn any_map(&self, findings: &mut Findings) -> Entries<'a> {
        let map = self.value.as_object();
        if map.is_none() {
            self.wrong("a map", findings);
        }
        Entries { map, at: self.at.clone() }
    }

    /// The list's elements.
    pub(crate) fn list(&self, findings: &mut Findings) -> Vec<Node<'a>> {
        let Some(items) = self.value.as_array() else {
            self.wrong("a list", findings);
            return Vec::new();
        };
        items.iter().enumerate().map(|(index, value)| Node { value, at: self.at.index(index) }).collect()
    }

    /// The text.
    pub(crate) fn text(&self, findings: &mut Findings) -> Option<&'a str> {
        let text = self.value.as_str();
        if text.is_none() {
            self.wrong("text", findings);
        }
        text
    }

    /// The text, which must not be empty.
    pub(crate) fn filled(&self, findings: &mut Findings) -> Option<&'a str> {
        let text = self.text(findings)?;
        if text.is_empty() {
            findings.refuse("invalid-value", &self.at, "must not be empty");
            return None;
        }
        Some(text)
    }

    /// The whole number within `bounds`. A float without a fraction counts, as `google.protobuf.Struct` has no other
    /// numbers.
    pub(crate) fn integer(
        &self,
        bounds: std::ops::RangeInclusive<i64>,
        findings: &mut Findings,
    ) -> Option<i64> {
        let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64);
        let number = self.value.as_i64().or_else(|| self.value.as_f64().and_then(whole));
        let Some(number) = number else {
            self.wrong("a whole number", findings);
            return None;
        };
        if !bounds.contains(&number) {
            let reason = format!("must be from {} to {}", bounds.start(), bounds.end());
            findings.refuse("invalid-value", &self.at, reason);
            return None;
        }
        Some(number)
    }

    /// `true` or `false`.
    pub(crate) fn flag(&self, findings: &mut Findings) -> Option<bool> {
        let flag = self.value.as_bool();
        if flag.is_none() {
            self.wrong("true or false", findings);
        }
        flag
    }

    /// The length of time, `1.5s`, `100ms`, `1m` or `1h`.
    pub(crate) fn duration(&self, findings: &mut Findings) -> Option<Duration> {
        let text = self.text(findings)?;
        let found = length_of_time(text);
        if found.is_none() {
            let reason = format!("`{text}` is not a length of time, as `1.5s`, `100ms`, `1m`");
            findings.refuse("invalid-value", &self.at, reason);
        }
        found
    }

    /// The port number.
    pub(crate) fn port(&self, findings: &mut Findings) -> Option<u16> {
        self.integer(1..=65_535, findings).and_then(|port| u16::try_from(port).ok())
    }

    /// The value that the text names, out of `choices`.
    pub(crate) fn choice<T: Copy>(&self, choices: &[(&str, T)], findings: &mut Findings) -> Option<T> {
        let text = self.text(findings)?;
        let found = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if found.is_none() {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            findings.refuse(
                "invalid-value",
                &self.at,
                format!("`{text}` is not one of {}", names.join(", ")),
            );
        }
        found
    }
}

/// The entries of a map and its place. Null counts as absent, as in Kubernetes.
#[derive(Clone, Debug)]
pub(crate) struct Entries<'a> {
    map: Option<&'a serde_json::Map<String, Value>>,
    pub(crate) at: FieldPath,
}

impl<'a> Entries<'a> {
    /// The entry `key`.
    pub(crate) fn get(&self, key: &str) -> Option<Node<'a>> {
        let value = self.map?.get(key)?;
        (!value.is_null()).then(|| Node { value, at: self.at.key(key) })
    }

    /// The entry `key`, which must be there.
    pub(crate) fn require(&self, key: &str, findings: &mut Findings) -> Option<Node<'a>> {
        let found = self.get(key);
        if found.is_none() && self.map.is_some() {
            findings.refuse("missing-field", &self.at, format!("must have `{key}`"));
        }
        found
    }

    /// The elements of the list `key`; none when absent.
    pub(crate) fn list(&self, key: &str, findings: &mut Findings) -> Vec<Node<'a>> {
        self.get(key).map(|node| node.list(findings)).unwrap_or_default()
    }

    /// The elements of the list `key`, at most `count_max`.
    pub(crate) fn bounded_list(&self, key: &str, count_max: usize, findings: &mut Findings) -> Vec<Node<'a>> {
        let list = self.list(key, findings);
        if list.len() > count_max {
            findings.refuse(
                "invalid-value",
                &self.at.key(key),
                format!("has more than {count_max} elements"),
            );
        }
        list
    }

    /// The text `key`, if there.
    pub(crate) fn text(&self, key: &str, findings: &mut Findings) -> Option<&'a str> {
        self.get(key)?.text(findings)
    }

    /// Whether it is no map at all.
    pub(crate) fn is_unreadable(&self) -> bool {
        self.map.is_none()
    }

    /// Whether nothing is set.
    pub(crate) fn is_empty(&self) -> bool {
        self.map.is_some_and(|map| map.values().all(Value::is_null))
    }

    /// All entries in order.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&'a String, Node<'a>)> + '_ {
        self.map.into_iter().flatten().map(|(key, value)| (key, Node { value, at: self.at.key(key) }))
    }
}
/// `1.5s`, `100ms`, `1m` or `1h`.
pub(crate) fn length_of_time(text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 4] = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    /// As long as protobuf's durations may be.
    const SECONDS_MAX: f64 = 315_576_000_000.0;
    let seconds = UNITS.iter().find_map(|(unit, seconds)| {
        let number = text.strip_suffix(unit)?;
        let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        plain.then(|| number.parse::<f64>().ok()).flatten().map(|number| number * seconds)
    })?;
    (seconds <= SECONDS_MAX).then(|| Duration::from_secs_f64(seconds))
}
