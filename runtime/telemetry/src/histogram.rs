//! A histogram over Istio's buckets, or others, that costs two relaxed additions to observe.

use crate::scrape::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Istio's bucket bounds for durations in milliseconds and for bytes (20 rows with `+Inf`), as they are printed.
const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10000.0,
    30000.0,
    60000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// The bounds of a histogram's buckets.
pub(crate) type Bounds = Arc<[f64]>;

/// Istio's.
pub(crate) fn standard() -> Bounds {
    BOUNDS.into()
}

/// A histogram of whole units, of which `PER_PRINTED` make one printed unit.
#[derive(Debug)]
pub(crate) struct Histogram<const PER_PRINTED: u64> {
    bounds: Bounds,
    /// One more than there are bounds: the last is that of everything above.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl<const PER_PRINTED: u64> Histogram<PER_PRINTED> {
    /// One with these bounds, in printed units.
    pub(crate) fn new(bounds: &Bounds) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::default()).collect();
        Self { bounds: Arc::clone(bounds), buckets, sum: AtomicU64::default() }
    }

    /// Adds one value, in whole units.
    pub(crate) fn observe(&self, value: u64) {
        let printed = value as f64 / PER_PRINTED as f64;
        let at = self.bounds.partition_point(|bound| *bound < printed);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.fetch_add(1, Relaxed);
        }
        self.sum.fetch_add(value, Relaxed);
    }

    /// The sum in printed units, and each bound with the count of its bucket alone.
    pub(crate) fn read(&self) -> Read {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets = bounds.zip(&self.buckets).map(|(bound, bucket)| (bound, bucket.load(Relaxed)));
        Read { sum: self.sum.load(Relaxed) as f64 / PER_PRINTED as f64, buckets: buckets.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::{Histogram, Read, standard};

    #[test]
    fn a_value_counts_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        for (name, micros, expected_bound) in [
            ("zero", 0, 0.5),
            ("on a bound", 500, 0.5),
            ("just above a bound", 501, 1.0),
            ("in the middle", 7_000, 10.0),
            ("above all", 3_600_001_000, f64::INFINITY),
        ] {
            let histogram = Histogram::<1000>::new(&standard());
            histogram.observe(micros);
            let Read { sum, buckets } = histogram.read();
            let count: u64 = buckets.iter().map(|row| row.1).sum();
            let hit: Vec<f64> = buckets.iter().filter(|row| row.1 == 1).map(|row| row.0).collect();
            assert_eq!((hit, count, sum), (vec![expected_bound], 1, micros as f64 / 1000.0), "{name}");
        }
    }
}
