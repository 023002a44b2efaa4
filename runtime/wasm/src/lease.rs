//! What all instances of single exchanges have together: how many there are, and their memory.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// All instances of single exchanges of an engine.
#[derive(Debug)]
pub(crate) struct Leases {
    instances_max: usize,
    /// The most memory that they may have. What they begin with counts, though they share it until they write to it: a
    /// collector of garbage writes to all of it.
    memory_max: usize,
    instances: AtomicUsize,
    memory_bytes: AtomicUsize,
}

impl Leases {
    pub(crate) fn new(instances_max: usize, memory_max: usize) -> Self {
        let zero = AtomicUsize::default;
        Self { instances_max, memory_max, instances: zero(), memory_bytes: zero() }
    }

    /// How many instances there are, and the bytes of their memories. Those never written to are the snapshot's, once for all.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.instances.load(Ordering::Relaxed), self.memory_bytes.load(Ordering::Relaxed))
    }

    /// In the Prometheus text format.
    pub(crate) fn encode(&self, text: &mut String) {
        let (instances, bytes) = self.size();
        for (name, help, value) in [
            ("instances", "Exchanges that have an instance of a plugin of their own.", instances),
            ("memory_bytes", "The memories of those instances, what they share with others included.", bytes),
        ] {
            let name = format!("cairn_wasm_exchange_{name}");
            // Writing to a text cannot fail.
            let _written = write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n");
        }
    }

    /// A share for one more instance; `None` when there are as many as there may be.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Lease> {
        let lease = Lease { all: Arc::clone(self), memory_bytes: 0, was_refused: false };
        // Dropping the lease takes back what is one too many.
        (self.instances.fetch_add(1, Ordering::Relaxed) < self.instances_max).then_some(lease)
    }
}

/// One instance's share, given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    all: Arc<Leases>,
    memory_bytes: usize,
    was_refused: bool,
}

impl Lease {
    /// Whether it wanted more memory than was left.
    pub(crate) fn was_refused(&self) -> bool {
        self.was_refused
    }

    /// Counts memory that an instance begins with or gets; false when that is too much for all of them.
    pub(crate) fn grow(&mut self, now: usize, desired: usize) -> bool {
        let more = desired.saturating_sub(now);
        if self.all.memory_bytes.fetch_add(more, Ordering::Relaxed) + more > self.all.memory_max {
            self.all.memory_bytes.fetch_sub(more, Ordering::Relaxed);
            self.was_refused = true;
            return false;
        }
        self.memory_bytes += more;
        true
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.all.instances.fetch_sub(1, Ordering::Relaxed);
        self.all.memory_bytes.fetch_sub(self.memory_bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_and_their_memory_are_bounded_and_given_back() {
        let leases = Arc::new(Leases::new(2, 2100));
        let mut first = leases.take().unwrap();
        let mut second = leases.take().unwrap();
        assert!(leases.take().is_none(), "there are two");
        assert!(first.grow(0, 1000) && second.grow(0, 1000));
        assert!(first.grow(1000, 1060));
        assert!(!second.grow(1000, 1060), "together they may have 2100");
        assert!(second.was_refused() && !first.was_refused());
        assert_eq!(leases.size(), (2, 2060));
        drop(first);
        assert!(second.grow(1000, 1060));
        assert_eq!(leases.size(), (1, 1060));
        let mut third = leases.take().unwrap();
        assert!(!third.grow(0, 1100), "what it begins with counts");
        drop((second, third));
        assert_eq!(leases.size(), (0, 0));
    }
}
