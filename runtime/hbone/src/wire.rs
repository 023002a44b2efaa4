//! Between HTTP/2 and TLS: many frames become one record and one system call.
//!
//! `h2` flushes after every larger frame, since it cannot know that another stream writes next. We do: the task that
//! drives a connection writes all that its streams have queued in one poll. So a flush does nothing here, bytes gather
//! in a borrowed buffer, and the driver ([`Wire::drive`]) sends them when HTTP/2 has no more to say.

use crate::transport::Transport;
use cairn_net::Buffer;
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsStream;

/// Writes from this size on are not gathered, but go to TLS together with what was gathered before them.
const DIRECT_BYTES_MIN: usize = 8 * 1024;

/// A handle of a connection's byte stream; `h2` holds one, the driver the other. Both live in one task, so the lock is
/// never contended.
#[derive(Clone)]
pub(crate) struct Wire {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    tls: TlsStream<Transport>,
    gathered: Option<Buffer>,
    start: usize,
    end: usize,
    needs_flush: bool,
}

impl Wire {
    pub(crate) fn new(tls: impl Into<TlsStream<Transport>>) -> Self {
        let shared = Shared { tls: tls.into(), gathered: None, start: 0, end: 0, needs_flush: false };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }

    /// The certificates by which the peer has proven who it is, its leaf first.
    pub(crate) fn with_peer<T>(&self, read: impl FnOnce(&[CertificateDer<'static>]) -> T) -> T {
        let shared = self.shared.lock();
        read(shared.tls.get_ref().1.peer_certificates().unwrap_or_default())
    }

    /// Polls HTTP/2 with `poll`, then sends what it has gathered. The outer error is that of sending.
    pub(crate) fn drive<T>(
        &self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<io::Result<T>> {
        let polled = poll(cx);
        match (polled, self.poll_send(cx)) {
            // Over, and HTTP/2 has said so to the peer as well as it could.
            (Poll::Ready(value), _) => Poll::Ready(Ok(value)),
            (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
            (Poll::Pending, _) => Poll::Pending,
        }
    }

    fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.lock().poll_send(cx)
    }
}

impl Shared {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.start < self.end {
            ready!(self.poll_pass(cx, &[]))?;
        }
        self.gathered = None;
        if self.needs_flush {
            ready!(Pin::new(&mut self.tls).poll_flush(cx))?;
            self.needs_flush = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Takes `bytes`, all or some: small ones are gathered.
    fn poll_take(&mut self, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let total: usize = bytes.iter().map(|part| part.len()).sum();
        if total >= DIRECT_BYTES_MIN {
            return self.poll_take_direct(cx, bytes);
        }
        let buffer = self.gathered.get_or_insert_with(Buffer::take);
        if buffer.len() - self.end < total {
            ready!(self.poll_send(cx))?;
        }
        // Sending gave the buffer back.
        let buffer = self.gathered.get_or_insert_with(Buffer::take);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        for part in bytes {
            let Some(room) = buffer.get_mut(self.end..self.end + part.len()) else { break };
            room.copy_from_slice(part);
            self.end += part.len();
        }
        Poll::Ready(Ok(total))
    }

    fn poll_take_direct(&mut self, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            let taken = ready!(self.poll_pass(cx, bytes))?;
            if taken > 0 {
                return Poll::Ready(Ok(taken));
            }
        }
    }

    /// Gives what was gathered, and then `bytes`, to TLS. Returns how many of `bytes` it took.
    fn poll_pass(&mut self, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let gathered =
            self.gathered.as_deref().and_then(|buffer| buffer.get(self.start..self.end)).unwrap_or(&[]);
        let mut parts = [IoSlice::new(&[]); 4];
        let mut count = 0;
        for part in std::iter::once(&IoSlice::new(gathered)).chain(bytes).filter(|part| !part.is_empty()) {
            let Some(place) = parts.get_mut(count) else { break };
            *place = *part;
            count += 1;
        }
        let parts = parts.get(..count).unwrap_or_default();
        let written = ready!(Pin::new(&mut self.tls).poll_write_vectored(cx, parts))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.needs_flush = true;
        let of_gathered = written.min(self.end - self.start);
        self.start += of_gathered;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        Poll::Ready(Ok(written - of_gathered))
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.shared.lock().tls).poll_read(cx, buffer)) {
            // A peer that closes TCP without closing TLS first: HTTP/2 has its own end, so this is only rude.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
            other => Poll::Ready(other),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.shared.lock().poll_take(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.shared.lock().poll_take(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing: see the module's documentation.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.shared.lock();
        ready!(shared.poll_send(cx))?;
        Pin::new(&mut shared.tls).poll_shutdown(cx)
    }
}
