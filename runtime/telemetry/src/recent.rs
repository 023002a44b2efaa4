//! The last few records of a kind, for people who ask what happened to a request.

use parking_lot::Mutex;

/// A record that can take the place of an older one without allocating.
pub trait Slot: Default + Clone {}

impl<T: Default + Clone> Slot for T {}

/// A ring of the last records. Slots are reused, so that a push in the steady state copies and does not allocate.
#[derive(Debug)]
pub struct Recent<T> {
    capacity: usize,
    ring: Mutex<Ring<T>>,
}

#[derive(Debug)]
struct Ring<T> {
    slots: Vec<T>,
    next: usize,
}

impl<T: Slot> Recent<T> {
    /// A ring of `capacity` records; 0 keeps none.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, ring: Mutex::new(Ring { slots: Vec::new(), next: 0 }) }
    }

    /// Adds a record: `fill` writes it over the oldest one.
    pub fn push(&self, fill: impl FnOnce(&mut T)) {
        if self.capacity == 0 {
            return;
        }
        let mut ring = self.ring.lock();
        let at = ring.next;
        ring.next = (at + 1) % self.capacity;
        if at == ring.slots.len() {
            ring.slots.push(T::default());
        }
        if let Some(slot) = ring.slots.get_mut(at) {
            fill(slot);
        }
    }

    /// The records, newest first.
    pub fn list(&self) -> Vec<T> {
        let ring = self.ring.lock();
        let (newer, older) = ring.slots.split_at(ring.next.min(ring.slots.len()));
        newer.iter().rev().chain(older.iter().rev()).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Recent;

    fn pushed(capacity: usize, count: u32) -> Vec<u32> {
        let recent = Recent::new(capacity);
        for value in 0..count {
            recent.push(|slot| *slot = value);
        }
        recent.list()
    }

    #[test]
    fn keeps_the_newest_first_and_forgets_the_oldest() {
        for (name, capacity, count, expected) in [
            ("empty", 3, 0, vec![]),
            ("partly filled", 3, 2, vec![1, 0]),
            ("exactly full", 3, 3, vec![2, 1, 0]),
            ("wrapped", 3, 5, vec![4, 3, 2]),
            ("keeps none", 0, 5, vec![]),
        ] {
            assert_eq!(pushed(capacity, count), expected, "{name}");
        }
    }
}
