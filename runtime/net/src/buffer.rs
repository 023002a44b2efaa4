//! Buffers of a thread: borrowed while bytes wait in them, so that idle connections have none.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

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
