//! Buffers of a thread: borrowed while bytes wait in them, so that idle connections have none.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::Once;

/// The size of a [`Buffer`]. Larger ones gain little: 64 KiB are four TLS records, and they stay in the L2 cache.
pub const BUFFER_BYTES: usize = 64 * 1024;

/// How many idle buffers a thread keeps. Few are in use at once: only a slow receiver keeps one between two polls.
const SPARE_MAX: usize = 8;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// 64 KiB that go back to their thread when dropped. What they hold at first is whatever was in them before.
#[derive(Debug)]
pub struct Buffer {
    bytes: Box<[u8]>,
}

impl Buffer {
    /// A spare buffer of this thread, or a new one.
    pub fn take() -> Self {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        Self { bytes: spare.unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice()) }
    }
}

/// What other allocations of up to so many bytes leave is used again instead of being given back to the system.
const KEPT_BYTES: usize = 1 << 20;

/// Has the allocator keep what is freed from now on, up to 2 MiB for each thread that allocates. Reading a bulk transfer takes
/// blocks of some hundred KiB: glibc gives such back at once and asks for them again, and in some runs a third of the
/// transfer's time went there. It learns from the largest block of the system's that it sees freed (mallopt(3),
/// M_MMAP_THRESHOLD, "dynamic"). Other allocators take no notice.
pub(crate) fn keep_freed_memory() {
    static LEARNT: Once = Once::new();
    LEARNT.call_once(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(KEPT_BYTES))));
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        // A thread that is ending has no spares any more: then the buffer is just freed.
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < SPARE_MAX {
                spare.push(bytes);
            }
        });
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_goes_back_to_its_thread() {
        let first = Buffer::take();
        let address = first.as_ptr();
        drop(first);
        assert_eq!(Buffer::take().as_ptr(), address);
    }

    #[test]
    fn thread_keeps_few_spares() {
        drop((0..2 * SPARE_MAX).map(|_| Buffer::take()).collect::<Vec<_>>());
        assert_eq!(SPARE.with_borrow(Vec::len), SPARE_MAX);
    }
}
