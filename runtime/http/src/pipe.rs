//! Hands the pieces of a body from the task that runs filters to the one that writes them to a connection. Bounded:
//! who sends waits for room.

use cairn_filter::Piece;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// Bytes that may be on their way; one piece more may be.
const BYTES_MAX: usize = 64 << 10;

/// Nobody reads any more.
#[derive(Debug)]
pub(crate) struct Closed;

/// The sender ended before the body did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut;

#[derive(Default)]
struct State {
    pieces: VecDeque<Piece>,
    bytes: usize,
    /// The last piece was sent.
    is_over: bool,
    is_cut: bool,
    is_closed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// The sending end; dropped before the last piece was sent, it cuts the body.
pub(crate) struct Writer(Arc<Mutex<State>>);

/// The receiving end.
pub(crate) struct Reader(Arc<Mutex<State>>);

/// Both ends.
pub(crate) fn pipe() -> (Writer, Reader) {
    let state = Arc::new(Mutex::new(State::default()));
    (Writer(Arc::clone(&state)), Reader(state))
}

impl Writer {
    /// Resolves when there is room.
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        let mut state = self.0.lock();
        if state.is_closed {
            return Poll::Ready(Err(Closed));
        }
        if state.bytes < BYTES_MAX {
            return Poll::Ready(Ok(()));
        }
        state.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Resolves when nobody reads any more.
    pub(crate) fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.0.lock();
        if state.is_closed {
            return Poll::Ready(());
        }
        state.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Sends a piece.
    pub(crate) fn send(&self, piece: Piece) {
        let mut state = self.0.lock();
        state.bytes += piece.length();
        state.is_over = piece.is_last();
        state.pieces.push_back(piece);
        wake(state.reader.take());
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.is_cut = !state.is_over;
        wake(state.reader.take());
    }
}

impl Reader {
    /// The next piece; `None` after the last.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Piece, Cut>>> {
        let mut state = self.0.lock();
        if let Some(piece) = state.pieces.pop_front() {
            state.bytes -= piece.length();
            wake(state.writer.take());
            return Poll::Ready(Some(Ok(piece)));
        }
        if state.is_over {
            return Poll::Ready(None);
        }
        if state.is_cut {
            return Poll::Ready(Some(Err(Cut)));
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// The bytes that are still to come, if that is known.
    pub(crate) fn left(&self) -> Option<usize> {
        let state = self.0.lock();
        state.is_over.then_some(state.bytes)
    }

    /// Whether nothing is to come.
    pub(crate) fn is_over(&self) -> bool {
        let state = self.0.lock();
        let is_nothing = |piece: &Piece| matches!(piece, Piece::Data { bytes, .. } if bytes.is_empty());
        state.is_over && state.pieces.iter().all(is_nothing)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.is_closed = true;
        wake(state.writer.take());
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn piece(text: &'static str, end_of_stream: bool) -> Piece {
        Piece::Data { bytes: Bytes::from_static(text.as_bytes()), end_of_stream }
    }

    #[test]
    fn pieces_come_out_in_order_until_the_last() {
        let mut cx = Context::from_waker(Waker::noop());
        let (writer, reader) = pipe();
        assert!(reader.poll(&mut cx).is_pending());
        writer.send(piece("a", false));
        assert_eq!((reader.left(), reader.is_over()), (None, false));
        writer.send(piece("bc", true));
        assert_eq!((reader.left(), reader.is_over()), (Some(3), false));
        drop(writer);
        for expected in [piece("a", false), piece("bc", true)] {
            assert!(matches!(reader.poll(&mut cx), Poll::Ready(Some(Ok(found))) if found == expected));
        }
        assert!(reader.is_over() && matches!(reader.poll(&mut cx), Poll::Ready(None)));
    }

    #[test]
    fn who_sends_waits_for_room_and_hears_that_nobody_reads() {
        let mut cx = Context::from_waker(Waker::noop());
        let (writer, reader) = pipe();
        writer.send(Piece::Data { bytes: vec![0; BYTES_MAX].into(), end_of_stream: false });
        assert!(writer.poll_room(&mut cx).is_pending());
        assert!(matches!(reader.poll(&mut cx), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(writer.poll_room(&mut cx), Poll::Ready(Ok(()))));
        drop(reader);
        assert!(matches!(writer.poll_room(&mut cx), Poll::Ready(Err(Closed))));
    }

    #[test]
    fn a_sender_that_ends_early_cuts_the_body() {
        let mut cx = Context::from_waker(Waker::noop());
        let (writer, reader) = pipe();
        writer.send(piece("a", false));
        drop(writer);
        assert!(matches!(reader.poll(&mut cx), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(reader.poll(&mut cx), Poll::Ready(Some(Err(Cut)))));
    }
}
