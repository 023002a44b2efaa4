//! Metrics with labels, in Istio's convention for names: `key=.=value;.;name`.

use crate::abi::MetricKind;
use crate::sys;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The most combinations of labels of one metric; later ones are counted with each label `other`.
const SERIES_MAX: usize = 500;

/// A metric's definition, and the proxy's ids of the series used so far.
#[derive(Debug)]
struct Family {
    kind: MetricKind,
    name: String,
    labels: Vec<String>,
    ids: RefCell<BTreeMap<Vec<String>, u32>>,
}

impl Family {
    fn new(kind: MetricKind, name: &str, labels: &[&str]) -> Self {
        let labels = labels.iter().map(|&label| label.to_owned()).collect();
        Self { kind, name: name.to_owned(), labels, ids: RefCell::default() }
    }

    /// The id of a series. Labels that were not given are empty, and superfluous values not counted.
    fn id(&self, values: &[&str]) -> Option<u32> {
        let mut key: Vec<String> = values.iter().map(|&value| value.to_owned()).collect();
        key.resize(self.labels.len(), String::new());
        let mut ids = self.ids.borrow_mut();
        if let Some(id) = ids.get(&key) {
            return Some(*id);
        }
        if ids.len() >= SERIES_MAX {
            key.fill("other".to_owned());
        }
        match sys::define_metric(self.kind, &self.series(&key)) {
            Ok(id) => Some(*ids.entry(key).or_insert(id)),
            Err(error) => {
                log::warn!("the proxy did not define the metric {}: {error}", self.name);
                None
            }
        }
    }

    fn series(&self, values: &[String]) -> String {
        let mut name = String::new();
        for (label, value) in self.labels.iter().zip(values) {
            // The separators of the convention cannot be part of a value.
            let value = value.replace("=.=", "=_=").replace(";.;", ";_;");
            name.push_str(&format!("{label}=.={value};.;"));
        }
        name + &self.name
    }
}

/// A number that grows.
///
/// ```
/// use cairn_sdk::{Counter, Flow, Plugin, Request};
/// # use cairn_sdk::testing::{Proxy, TestRequest};
///
/// struct Methods {
///     requests: Counter,
/// }
///
/// #[cairn_sdk::plugin]
/// impl Plugin for Methods {
///     type Config = ();
///     type Exchange = ();
///
///     fn configure((): ()) -> Result<Self, String> {
///         Ok(Self { requests: Counter::new("requests_seen", &["method"]) })
///     }
///
///     fn on_request(&self, request: Request, _: &mut ()) -> Flow {
///         self.requests.add(1, &[&request.method()]);
///         Flow::Continue
///     }
/// }
/// # let mut proxy = Proxy::<Methods>::new("").unwrap();
/// # proxy.send(TestRequest::get("/"));
/// # proxy.send(TestRequest::get("/"));
/// # assert_eq!(proxy.metric("method=.=GET;.;requests_seen"), Some(2));
/// ```
#[derive(Debug)]
pub struct Counter(Family);

impl Counter {
    /// A counter with labels of these names. The proxy learns of each series when it is first used.
    pub fn new(name: &str, labels: &[&str]) -> Self {
        Self(Family::new(MetricKind::Counter, name, labels))
    }

    /// Adds to the series with these values of the labels.
    pub fn add(&self, count: u32, labels: &[&str]) {
        if count > 0
            && let Some(id) = self.0.id(labels)
        {
            // There is nobody to tell.
            let _ = sys::increment_metric(id, i64::from(count));
        }
    }
}

/// A number that goes up and down.
#[derive(Debug)]
pub struct Gauge(Family);

impl Gauge {
    /// A gauge with labels of these names.
    pub fn new(name: &str, labels: &[&str]) -> Self {
        Self(Family::new(MetricKind::Gauge, name, labels))
    }

    /// Sets the series with these values of the labels.
    pub fn set(&self, value: u64, labels: &[&str]) {
        if let Some(id) = self.0.id(labels) {
            // There is nobody to tell.
            let _ = sys::record_metric(id, value);
        }
    }

    /// Adds to it; negative numbers subtract.
    pub fn add(&self, delta: i64, labels: &[&str]) {
        if let Some(id) = self.0.id(labels) {
            // There is nobody to tell.
            let _ = sys::increment_metric(id, delta);
        }
    }
}

/// Many numbers by their size.
#[derive(Debug)]
pub struct Histogram(Family);

impl Histogram {
    /// A histogram with labels of these names.
    pub fn new(name: &str, labels: &[&str]) -> Self {
        Self(Family::new(MetricKind::Histogram, name, labels))
    }

    /// Files a number into the series with these values of the labels.
    pub fn record(&self, value: u64, labels: &[&str]) {
        if let Some(id) = self.0.id(labels) {
            // There is nobody to tell.
            let _ = sys::record_metric(id, value);
        }
    }
}
