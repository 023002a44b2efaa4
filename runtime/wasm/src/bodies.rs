//! The bodies of one exchange, or what was sent on a connection, as far as the guest looks at them or holds them. They belong to the exchange as well as to
//! the guest's context, so that a guest that crashes takes nothing of them along.

use crate::abi::Status;
use bytes::{Bytes, BytesMut};
use cairn_filter::{Side, WhenFull};
use parking_lot::{Mutex, MutexGuard};
use std::sync::atomic::AtomicU64;

/// Both bodies of one exchange.
#[derive(Default)]
pub(crate) struct Bodies {
    sides: [Mutex<Body>; 2],
    /// How often the guest, or its end, woke the stream: who learnt how it stood learns from this whether that is old.
    pub(crate) wakes: AtomicU64,
}

/// What the guest is shown of a body, and may change.
#[derive(Default)]
pub(crate) struct Body {
    pub(crate) bytes: Bytes,
    /// The guest put other bytes in the place of those that came.
    pub(crate) is_changed: bool,
    /// The guest's callback runs, or the guest holds the body.
    pub(crate) is_at_hand: bool,
    /// What the guest, which holds the body, wants to happen when that is as much as may be held.
    pub(crate) when_full: WhenFull,
}

/// The most bytes that a guest may make of a body before it passes some of it on.
const BYTES_MAX: usize = 32 << 20;

impl Bodies {
    pub(crate) fn side(&self, side: Side) -> MutexGuard<'_, Body> {
        let [request, response] = &self.sides;
        match side {
            Side::Request => request.lock(),
            Side::Response => response.lock(),
        }
    }
}

impl Body {
    /// Takes what is there, to pass it on.
    pub(crate) fn take(&mut self) -> Bytes {
        self.is_at_hand = false;
        std::mem::take(&mut self.bytes)
    }

    /// Puts `with` in the place of `size` bytes at `start`: at the beginning, or behind the end. Anything in between is
    /// refused, as in Envoy.
    pub(crate) fn set(&mut self, start: usize, size: usize, with: &[u8]) -> Result<(), Status> {
        let length = self.bytes.len();
        let kept = match (start, size) {
            (0, size) => self.bytes.slice(size.min(length)..),
            (start, _) if start >= length => Bytes::new(),
            _ => return Err(Status::BadArgument),
        };
        let before = if start == 0 { &[][..] } else { &self.bytes };
        let new_length = before.len() + with.len() + kept.len();
        if new_length > BYTES_MAX {
            return Err(Status::InternalFailure);
        }
        let mut bytes = BytesMut::with_capacity(new_length);
        for part in [before, with, &kept] {
            bytes.extend_from_slice(part);
        }
        self.bytes = bytes.freeze();
        self.is_changed = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_put_at_the_beginning_or_the_end() {
        for (name, start, size, expected) in [
            ("before", 0, 0, Ok("newbody")),
            ("in place of the first", 0, 2, Ok("newdy")),
            ("in place of all", 0, 4, Ok("new")),
            ("in place of more", 0, usize::MAX, Ok("new")),
            ("behind", 4, 0, Ok("bodynew")),
            ("far behind", usize::MAX, 7, Ok("bodynew")),
            ("in the middle", 2, 1, Err(Status::BadArgument)),
        ] {
            let mut body = Body { bytes: Bytes::from_static(b"body"), ..Body::default() };
            let done = body.set(start, size, b"new");
            assert_eq!(done.map(|()| std::str::from_utf8(&body.bytes).unwrap()), expected, "{name}");
            assert_eq!(body.is_changed, expected.is_ok(), "{name}");
        }
        let mut body = Body { bytes: vec![0; BYTES_MAX].into(), ..Body::default() };
        assert_eq!(body.set(0, 0, b"x"), Err(Status::InternalFailure));
        assert_eq!(body.set(0, 1, b"x"), Ok(()));
    }
}
