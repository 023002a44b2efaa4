//! The standard families in Prometheus' text format, version 0.0.4. Label sets that print the same under one metric,
//! because it leaves out what tells them apart, are one sample: they are added up.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Write;

/// What is added up of a counter or a histogram.
pub(crate) trait Sum {
    fn add(&mut self, other: Self);
}

impl Sum for u64 {
    fn add(&mut self, other: Self) {
        *self += other;
    }
}

/// A histogram as it is printed.
pub(crate) struct Read {
    pub(crate) sum: f64,
    /// Each bound with the count of its bucket alone.
    pub(crate) buckets: Vec<(f64, u64)>,
}

impl Sum for Read {
    fn add(&mut self, other: Self) {
        self.sum += other.sum;
        for (mine, theirs) in self.buckets.iter_mut().zip(other.buckets) {
            mine.1 += theirs.1;
        }
    }
}

/// The samples of one family, in the order they were met.
pub(crate) struct Family<T> {
    places: HashMap<String, usize>,
    samples: Vec<(String, T)>,
}

impl<T: Sum> Family<T> {
    pub(crate) fn new() -> Self {
        Self { places: HashMap::new(), samples: Vec::new() }
    }

    pub(crate) fn add(&mut self, labels: String, value: T) {
        match self.places.entry(labels) {
            Entry::Occupied(place) => {
                if let Some((_, sum)) = self.samples.get_mut(*place.get()) {
                    sum.add(value);
                }
            }
            Entry::Vacant(place) => {
                self.samples.push((place.key().clone(), value));
                place.insert(self.samples.len() - 1);
            }
        }
    }
}

fn head(out: &mut String, name: &str, help: &str, kind: &str) {
    out.extend(["# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind, "\n"]);
}

impl Family<u64> {
    /// Prints a family that has samples, as a `counter` or `gauge`.
    pub(crate) fn print(self, out: &mut String, name: &str, help: &str, kind: &str) {
        if self.samples.is_empty() {
            return;
        }
        head(out, name, help, kind);
        for (labels, value) in self.samples {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{name}{{{labels}}} {value}");
        }
    }
}

impl Family<Read> {
    /// Prints a family that has samples.
    pub(crate) fn print(self, out: &mut String, name: &str, help: &str) {
        if self.samples.is_empty() {
            return;
        }
        head(out, name, help, "histogram");
        for (labels, read) in self.samples {
            let comma = if labels.is_empty() { "" } else { "," };
            let mut count = 0;
            for (bound, own) in read.buckets {
                count += own;
                let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
                // Writing to a String cannot fail.
                let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}");
            }
            let _ = writeln!(out, "{name}_sum{{{labels}}} {}\n{name}_count{{{labels}}} {count}", read.sum);
        }
    }
}
