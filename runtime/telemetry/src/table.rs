//! The series of one metric family by label set, bounded.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

/// Label sets with their series. Past the bound a label set is replaced by its overflow form, which drops the peers.
#[derive(Debug)]
pub(crate) struct Table<L, S> {
    series_max: usize,
    series: RwLock<HashMap<L, Arc<S>>>,
}

impl<L: Eq + Hash + Clone, S: Default> Table<L, S> {
    pub(crate) fn new(series_max: usize) -> Self {
        Self { series_max, series: RwLock::default() }
    }

    /// The series of `labels`, created if it is new; when the table is full, that of `overflow(labels)`, and `true`.
    pub(crate) fn series(&self, labels: &L, overflow: impl FnOnce(&L) -> L) -> (Arc<S>, bool) {
        if let Some(series) = self.series.read().get(labels) {
            return (Arc::clone(series), false);
        }
        let mut table = self.series.write();
        if table.len() < self.series_max || table.contains_key(labels) {
            return (Arc::clone(table.entry(labels.clone()).or_default()), false);
        }
        (Arc::clone(table.entry(overflow(labels)).or_default()), true)
    }

    /// All series, for a scrape.
    pub(crate) fn list(&self) -> Vec<(L, Arc<S>)> {
        self.series.read().iter().map(|(labels, series)| (labels.clone(), Arc::clone(series))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Table;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    #[test]
    fn a_full_table_counts_new_label_sets_in_the_overflow_series() {
        let table: Table<u32, AtomicU64> = Table::new(2);
        let count = |labels| {
            let (series, full) = table.series(&labels, |_| u32::MAX);
            series.fetch_add(1, Relaxed);
            full
        };
        assert_eq!([1, 2, 3, 4, 1].map(count), [false, false, true, true, false]);
        let mut rows: Vec<(u32, u64)> =
            table.list().iter().map(|(labels, n)| (*labels, n.load(Relaxed))).collect();
        rows.sort_unstable();
        assert_eq!(rows, [(1, 2), (2, 1), (u32::MAX, 2)]);
    }
}
