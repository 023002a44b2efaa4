//! What one destination's telemetry settings ask for beyond the process's own log and metrics.

use crate::{HttpRecord, HttpScope, MetricShape, Trace};
use http::{HeaderMap, HeaderName};
use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

/// How the traffic to one destination is observed, compiled once per configuration and shared by all workers.
pub trait Observe: Debug + Send + Sync {
    /// The headers that records must hold, besides those they always hold.
    fn wants(&self) -> &Wants;

    /// Which metrics are counted, and how their labels differ from the standard ones.
    fn shape(&self) -> &Arc<MetricShape>;

    /// How often long connections and streams report.
    fn interval(&self) -> Duration;

    /// Appends the values of the shape's own labels, as many as it has.
    fn label_values(&self, scope: &HttpScope, record: &HttpRecord<'_>, values: &mut Vec<Arc<str>>);

    /// Begins the trace of a request that arrives with `headers`, and writes its context into them for the upstream.
    fn trace(&self, headers: &mut HeaderMap) -> Option<Box<Trace>>;

    /// Begins the span of an attempt to send a traced request, and writes it into `headers` in place of the exchange's.
    /// `None`: attempts have no spans.
    fn attempt(&self, trace: &Trace, headers: &mut HeaderMap) -> Option<u64>;

    /// Logs a finished exchange or connection and reports its span. It never waits.
    fn finished(&self, scope: &HttpScope, record: &HttpRecord<'_>);
}

/// Which headers a record must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Of the request, as it goes upstream.
    pub request: Wanted,
    /// Of the response, as it goes downstream.
    pub response: Wanted,
    /// Of the response's trailers.
    pub trailers: Wanted,
}

/// Some headers, or all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// These.
    Names(Vec<HeaderName>),
    /// All of them.
    All,
}

impl Default for Wanted {
    fn default() -> Self {
        Self::Names(Vec::new())
    }
}

impl Wanted {
    /// Wants one more.
    pub fn add(&mut self, name: &HeaderName) {
        if let Self::Names(names) = self
            && !names.contains(name)
        {
            names.push(name.clone());
        }
    }

    /// Whether nothing is wanted.
    pub fn is_nothing(&self) -> bool {
        matches!(self, Self::Names(names) if names.is_empty())
    }

    /// What is wanted of `headers`.
    pub fn of(&self, headers: &HeaderMap) -> HeaderMap {
        let names = match self {
            Self::All => return headers.clone(),
            Self::Names(names) => names,
        };
        let mut kept = HeaderMap::with_capacity(names.len());
        for name in names {
            for value in headers.get_all(name) {
                kept.append(name, value.clone());
            }
        }
        kept
    }
}

/// Bytes of a peer as text: as they are if they are UTF-8, else each as the letter of Latin-1 that it is, as Envoy's JSON
/// has them.
pub fn legible(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => bytes.iter().map(|byte| char::from(*byte)).collect::<String>().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn every_value_of_a_header_is_text() {
        for (value, expected) in [(&b"a"[..], "a"), ("ü".as_bytes(), "ü"), (b"a\xffb", "aÿb")] {
            assert_eq!(legible(value), expected);
        }
    }

    #[test]
    fn only_what_is_wanted_is_kept() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("a", "1"), ("a", "2"), ("b", "3")] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let name = |name| HeaderName::from_static(name);
        for (what, wanted, expected) in [
            ("nothing", Wanted::default(), 0),
            ("all values of one", Wanted::Names(vec![name("a")]), 2),
            ("one that is not there", Wanted::Names(vec![name("c")]), 0),
            ("all", Wanted::All, 3),
        ] {
            assert_eq!(wanted.of(&headers).len(), expected, "{what}");
        }
        let mut wanted = Wanted::default();
        wanted.add(&name("a"));
        wanted.add(&name("a"));
        assert_eq!(wanted, Wanted::Names(vec![name("a")]));
    }
}
