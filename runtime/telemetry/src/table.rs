//! The series of one metric family by label set, bounded, and forgotten when nothing counts them for long.

use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much a series has counted: while it does not change, nothing happens.
pub(crate) trait Activity {
    fn activity(&self) -> u64;
}

/// Label sets with their series. Past the bound a label set is replaced by its overflow form, which drops the peers.
#[derive(Debug)]
pub(crate) struct Table<L, S> {
    series_max: usize,
    /// How long a series may be idle until it is forgotten.
    idle_max: Mutex<Option<Duration>>,
    series: RwLock<HashMap<L, Arc<S>>>,
    /// What each series had counted when it last changed, and when that was seen.
    seen: Mutex<HashMap<L, (u64, Instant)>>,
}

impl<L: Eq + Hash + Clone, S: Activity> Table<L, S> {
    pub(crate) fn new(series_max: usize, idle_max: Option<Duration>) -> Self {
        let idle_max = Mutex::new(idle_max);
        Self { series_max, idle_max, series: RwLock::default(), seen: Mutex::default() }
    }

    /// Forgets from now on what idles for so long.
    pub(crate) fn set_idle_max(&self, idle_max: Option<Duration>) {
        *self.idle_max.lock() = idle_max;
    }

    /// Forgets all series.
    pub(crate) fn clear(&self) {
        self.series.write().clear();
        self.seen.lock().clear();
    }

    /// The series of `labels`, which `make` makes if it is new; when the table is full, that of `overflow(labels)`, and
    /// `true`.
    pub(crate) fn series(
        &self,
        labels: &L,
        make: impl FnOnce() -> S,
        overflow: impl FnOnce(&L) -> L,
    ) -> (Arc<S>, bool) {
        if let Some(series) = self.series.read().get(labels) {
            return (Arc::clone(series), false);
        }
        let mut table = self.series.write();
        if table.len() < self.series_max || table.contains_key(labels) {
            return (Arc::clone(table.entry(labels.clone()).or_insert_with(|| Arc::new(make()))), false);
        }
        (Arc::clone(table.entry(overflow(labels)).or_insert_with(|| Arc::new(make()))), true)
    }

    /// All series, for a scrape at `now`.
    pub(crate) fn list(&self, now: Instant) -> Vec<(L, Arc<S>)> {
        let idle_max = *self.idle_max.lock();
        if let Some(idle_max) = idle_max {
            self.forget(idle_max, now);
        }
        self.series.read().iter().map(|(labels, series)| (labels.clone(), Arc::clone(series))).collect()
    }

    /// Forgets series that have not changed for `idle_max`. One that an open connection holds stays: it may count
    /// again at any time without asking the table.
    fn forget(&self, idle_max: Duration, now: Instant) {
        let mut seen = self.seen.lock();
        let mut table = self.series.write();
        table.retain(|labels, series| {
            let activity = series.activity();
            let (before, since) = seen.entry(labels.clone()).or_insert((activity, now));
            if *before != activity {
                (*before, *since) = (activity, now);
            }
            Arc::strong_count(series) > 1 || now.saturating_duration_since(*since) < idle_max
        });
        seen.retain(|labels, _| table.contains_key(labels));
    }
}

#[cfg(test)]
mod tests {
    use super::{Activity, Table};
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::{Duration, Instant};

    impl Activity for AtomicU64 {
        fn activity(&self) -> u64 {
            self.load(Relaxed)
        }
    }

    #[test]
    fn a_series_that_idles_is_forgotten_unless_it_is_held() {
        let table: Table<u32, AtomicU64> = Table::new(10, Some(Duration::from_secs(60)));
        let start = Instant::now();
        let held = table.series(&1, AtomicU64::default, |_| 0).0;
        let counted = |labels: u32| table.series(&labels, AtomicU64::default, |_| 0).0.fetch_add(1, Relaxed);
        let left = |seconds| {
            let list = table.list(start + Duration::from_secs(seconds));
            let mut left: Vec<u32> = list.into_iter().map(|(labels, _)| labels).collect();
            left.sort_unstable();
            left
        };
        counted(2);
        counted(3);
        assert_eq!(left(0), [1, 2, 3]);
        counted(3);
        assert_eq!(left(30), [1, 2, 3]);
        assert_eq!(left(60), [1, 3], "2 has not counted since the first look, 1 is held");
        assert_eq!(left(90), [1], "3 counted before the look at 30");
        drop(held);
        assert!(left(91).is_empty());
    }

    #[test]
    fn a_full_table_counts_new_label_sets_in_the_overflow_series() {
        let table: Table<u32, AtomicU64> = Table::new(2, None);
        let count = |labels| {
            let (series, full) = table.series(&labels, AtomicU64::default, |_| u32::MAX);
            series.fetch_add(1, Relaxed);
            full
        };
        assert_eq!([1, 2, 3, 4, 1].map(count), [false, false, true, true, false]);
        let mut rows: Vec<(u32, u64)> =
            table.list(Instant::now()).iter().map(|(labels, n)| (*labels, n.load(Relaxed))).collect();
        rows.sort_unstable();
        assert_eq!(rows, [(1, 2), (2, 1), (u32::MAX, 2)]);
    }
}
