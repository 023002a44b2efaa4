//! A byte stream through a tunnel: DATA frames both ways, END_STREAM as half close.

use crate::Revocation;
use crate::client::Place;
use bytes::{Buf, Bytes};
use cairn_mesh::Identity;
use cairn_net::{LARGE_BYTES, Side};
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Why a tunnel did not come to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TunnelError {
    /// The peer or the connection is gone.
    #[error("the tunnel's connection is gone")]
    Gone(#[source] h2::Error),
}

/// As much as one write takes at once.
const WRITE_BYTES_MAX: usize = 64 * 1024;

/// Read bytes are returned to the peer's window in lots of this size: less than half of the smallest window in use, the
/// protocol's own 64 KiB. The rest is returned when the stream is dropped.
const RELEASE_BYTES: usize = 16 * 1024;

/// A tunnel of ours that has carried so much, both ways together, is likely to carry more.
const BULK_BYTES: u64 = 32 << 20;

/// One tunnel. It ends for reading when the peer half-closes or cancels, for writing with `shutdown`. Dropping it before
/// both ends cancels it.
pub struct TunnelStream {
    outgoing: SendStream<Bytes>,
    incoming: RecvStream,
    /// Received and not read yet.
    chunk: Bytes,
    /// Read and not yet returned to the peer's window.
    unreleased: usize,
    shut: bool,
    headers: HeaderMap,
    /// Bytes carried, both ways together.
    carried: u64,
    /// What the stream keeps alive: its place in a pool.
    held: Option<Place>,
    revocation: Revocation,
}

impl TunnelStream {
    pub(crate) fn new(
        outgoing: SendStream<Bytes>,
        incoming: RecvStream,
        headers: HeaderMap,
        held: Option<Place>,
        revocation: Revocation,
    ) -> Self {
        let chunk = Bytes::new();
        Self { outgoing, incoming, chunk, unreleased: 0, shut: false, headers, carried: 0, held, revocation }
    }

    /// The headers of the peer's answer, such as its `baggage`; of a tunnel we accepted, none.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Who has proven to be at the other end; of a tunnel we accepted, nobody: its [`crate::Downstream`] says.
    pub fn peer(&self) -> Option<&Identity> {
        self.held.as_ref().and_then(Place::peer)
    }

    /// Tells when the tunnel ends because the peer's certificate is revoked.
    pub fn revocation(&self) -> &Revocation {
        &self.revocation
    }

    fn carry(&mut self, count: usize) {
        self.carried += count as u64;
        if self.carried >= BULK_BYTES
            && let Some(place) = &mut self.held
        {
            place.mark_bulky();
        }
    }

    /// The next received bytes, without copying them; `None` at the end.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            if !self.chunk.is_empty() {
                let chunk = std::mem::take(&mut self.chunk);
                return Poll::Ready(Some(self.release(chunk.len()).map(|()| chunk)));
            }
            match ready!(self.poll_chunk(cx)) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(None),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    /// Waits until some bytes can be sent at once, at most `wanted`. Returns how many.
    pub fn poll_capacity(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        if self.shut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let wanted = wanted.clamp(1, WRITE_BYTES_MAX);
        if self.outgoing.capacity() < wanted {
            self.outgoing.reserve_capacity(wanted);
        }
        loop {
            let capacity = self.outgoing.capacity();
            if capacity > 0 {
                return Poll::Ready(Ok(capacity.min(wanted)));
            }
            match ready!(self.outgoing.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(write_error(error))),
                None => return Poll::Ready(Err(self.closed(cx))),
            }
        }
    }

    /// Sends bytes without copying them. Ask [`Self::poll_capacity`] first: whatever exceeds it is queued.
    ///
    /// # Errors
    /// When the tunnel has ended.
    pub fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        self.carry(bytes.len());
        self.outgoing.send_data(bytes, false).map_err(write_error)
    }

    /// Fetches the next chunk. Returns false at the end.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        Poll::Ready(match ready!(self.incoming.poll_data(cx)) {
            None => Ok(false),
            Some(Ok(chunk)) => {
                self.chunk = chunk;
                Ok(true)
            }
            Some(Err(error)) => match reset_reason(&error) {
                Some(Reason::NO_ERROR | Reason::CANCEL) => Ok(false),
                Some(Reason::STREAM_CLOSED) => Err(io::Error::new(io::ErrorKind::BrokenPipe, error)),
                _ => Err(io_error(error)),
            },
        })
    }

    fn release(&mut self, count: usize) -> io::Result<()> {
        self.carry(count);
        self.unreleased += count;
        if self.unreleased >= RELEASE_BYTES {
            let unreleased = std::mem::take(&mut self.unreleased);
            self.incoming.flow_control().release_capacity(unreleased).map_err(io_error)?;
        }
        Ok(())
    }

    /// Why nothing more can be sent.
    fn closed(&mut self, cx: &mut Context<'_>) -> io::Error {
        match self.outgoing.poll_reset(cx) {
            Poll::Ready(Err(error)) => io_error(error),
            Poll::Ready(Ok(reason)) => io::Error::new(io::ErrorKind::BrokenPipe, reason.description()),
            Poll::Pending => io::ErrorKind::BrokenPipe.into(),
        }
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        // What has arrived is read as far as it fits: fewer, larger writes on the other side.
        while buffer.remaining() > 0 {
            if self.chunk.is_empty() {
                match self.poll_chunk(cx) {
                    Poll::Ready(Ok(true)) => continue,
                    _ if buffer.filled().len() > before => break,
                    Poll::Ready(Ok(false)) => break,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            let count = self.chunk.len().min(buffer.remaining());
            buffer.put_slice(self.chunk.get(..count).unwrap_or_default());
            self.chunk.advance(count);
            self.release(count)?;
        }
        Poll::Ready(Ok(()))
    }
}

/// As much as one piece holds: what is taken is returned to the peer's window before it is written.
const PIECE_BYTES_MAX: usize = 256 * 1024;

impl Side for TunnelStream {
    fn take_large(&mut self, cx: &mut Context<'_>) -> io::Result<Option<Bytes>> {
        if self.chunk.is_empty()
            && let Poll::Ready(Err(error)) = self.poll_chunk(cx)
        {
            return Err(error);
        }
        if self.chunk.len() < LARGE_BYTES {
            return Ok(None);
        }
        let piece = self.chunk.split_to(self.chunk.len().min(PIECE_BYTES_MAX));
        self.release(piece.len())?;
        Ok(Some(piece))
    }

    fn keeps_written(&self) -> bool {
        true
    }

    fn poll_write_piece(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<usize>> {
        let count = ready!(self.poll_capacity(cx, bytes.len()))?;
        self.send(bytes.split_to(count))?;
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let count = ready!(self.poll_capacity(cx, bytes.len()))?;
        self.send(Bytes::copy_from_slice(bytes.get(..count).unwrap_or_default()))?;
        Poll::Ready(Ok(count))
    }

    /// Nothing to do: the connection's task sends what is queued.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shut {
            return Poll::Ready(Ok(()));
        }
        self.shut = true;
        match self.outgoing.send_data(Bytes::new(), true) {
            Ok(()) => Poll::Ready(Ok(())),
            // The peer has ended the tunnel already; there is nobody to tell.
            Err(_) => match self.outgoing.poll_reset(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(io_error(error))),
                _ => Poll::Ready(Ok(())),
            },
        }
    }
}

fn reset_reason(error: &h2::Error) -> Option<Reason> {
    error.reason().filter(|_| error.is_reset())
}

/// A write fails because the peer has ended the tunnel, in order or not.
fn write_error(error: h2::Error) -> io::Error {
    if error.is_io() { io_error(error) } else { io::Error::new(io::ErrorKind::BrokenPipe, error) }
}

fn io_error(error: h2::Error) -> io::Error {
    if let Some(io) = error.get_io() {
        return io::Error::new(io.kind(), error);
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
