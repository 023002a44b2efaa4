//! Copying both ways between a client and a server until both are done.

use crate::Buffer;
use bytes::{Buf, Bytes};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

/// One side of [`copy_sides`]. What has bytes of its own passes them on, if they are many, instead of having them copied.
pub trait Side: AsyncRead + AsyncWrite + Unpin {
    /// Takes received bytes as they are, if at least [`LARGE_BYTES`] are there in one piece; fewer are read.
    ///
    /// # Errors
    /// As reading.
    fn take_large(&mut self, _cx: &mut Context<'_>) -> io::Result<Option<Bytes>> {
        Ok(None)
    }

    /// Whether written bytes are kept until they are sent, so that a piece of one's own spares their copy.
    fn keeps_written(&self) -> bool {
        false
    }

    /// Writes the beginning of `bytes` and takes it away from them. Returns how many that were.
    fn poll_write_piece(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(self).poll_write(cx, bytes))?;
        bytes.advance(written);
        Poll::Ready(Ok(written))
    }
}

/// So many bytes cost more to copy than to write by themselves.
pub const LARGE_BYTES: usize = 16 * 1024;

impl Side for TcpStream {}

/// A side of which nothing is known.
struct Plain<'a, T>(&'a mut T);

impl<T: AsyncRead + AsyncWrite + Unpin> Side for Plain<'_, T> {}

impl<T: AsyncRead + Unpin> AsyncRead for Plain<'_, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Plain<'_, T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}

/// Bytes copied so far. The words are Istio's: a proxy *received* what the client sent.
#[derive(Debug, Default)]
pub struct ByteCounts {
    /// Server to client.
    pub sent: AtomicU64,
    /// Client to server.
    pub received: AtomicU64,
}

/// How long a connection may be silent of which one side has ended: the other is likely gone without a word.
pub const HALF_CLOSED_MAX: Duration = Duration::from_secs(60 * 60);

/// Copies between `client` and `server` until both have ended. When one side ends, the other is told (half close)
/// and may go on sending, with pauses of up to an hour. Bytes are counted when they have been written on.
///
/// # Errors
/// The first error of either side; what was counted has arrived there, the rest is lost.
pub async fn copy<A, B>(client: &mut A, server: &mut B, counts: &ByteCounts) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    copy_sides(&mut Plain(client), &mut Plain(server), counts).await
}

/// The same between sides that may spare copies.
///
/// # Errors
/// As [`copy`].
pub async fn copy_sides<A, B>(client: &mut A, server: &mut B, counts: &ByteCounts) -> io::Result<()>
where
    A: Side,
    B: Side,
{
    copy_within(client, server, counts, HALF_CLOSED_MAX).await
}

async fn copy_within<A, B>(
    client: &mut A,
    server: &mut B,
    counts: &ByteCounts,
    half_closed_max: Duration,
) -> io::Result<()>
where
    A: Side,
    B: Side,
{
    let mut up = Direction::default();
    let mut down = Direction::default();
    let mut half_closed: Option<HalfClosed> = None;
    poll_fn(|cx| {
        let up = up.poll_copy(cx, client, server, &counts.received)?;
        let down = down.poll_copy(cx, server, client, &counts.sent)?;
        match (up.is_ready(), down.is_ready()) {
            (true, true) => Poll::Ready(Ok(())),
            (false, false) => Poll::Pending,
            (true, false) | (false, true) => {
                let moved = counts.received.load(Ordering::Relaxed) + counts.sent.load(Ordering::Relaxed);
                let half_closed = half_closed.get_or_insert_with(|| HalfClosed::new(half_closed_max, moved));
                half_closed
                    .poll_silent(cx, half_closed_max, moved)
                    .map(|()| Err(io::ErrorKind::TimedOut.into()))
            }
        }
    })
    .await
}

/// Watches a connection of which one side has ended.
struct HalfClosed {
    timer: Pin<Box<Sleep>>,
    /// Bytes that had been copied when the timer was set.
    moved: u64,
}

impl HalfClosed {
    fn new(after: Duration, moved: u64) -> Self {
        Self { timer: Box::pin(tokio::time::sleep(after)), moved }
    }

    /// Ready when nothing has moved for at least `after`.
    fn poll_silent(&mut self, cx: &mut Context<'_>, after: Duration, moved: u64) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            if self.moved == moved {
                return Poll::Ready(());
            }
            self.moved = moved;
            self.timer.as_mut().reset(Instant::now() + after);
        }
    }
}

/// How many reads one poll may do before other tasks get their turn.
const READS_PER_POLL: usize = 16;

/// One direction of a copy. A buffer is borrowed until all its bytes have been written on, so an idle connection has none
/// and a busy one reads a full buffer at a time.
#[derive(Default)]
struct Direction {
    /// Bytes `start..end` of the buffer are read and not yet written; `None` when there are none.
    kept: Option<Buffer>,
    start: usize,
    end: usize,
    /// A piece that is not yet written.
    piece: Bytes,
    needs_flush: bool,
    phase: Phase,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Copying,
    /// The reader has ended; the writer is being told.
    Closing,
    Done,
}

/// The read part of a buffer, which goes back to its thread when it has been sent.
struct Filled {
    buffer: Buffer,
    end: usize,
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        self.buffer.get(..self.end).unwrap_or_default()
    }
}

impl Direction {
    fn poll_copy<R: Side, W: Side>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        count: &AtomicU64,
    ) -> Poll<io::Result<()>> {
        if self.phase == Phase::Copying {
            ready!(self.poll_until_end(cx, reader, writer, count))?;
            self.phase = Phase::Closing;
        }
        if self.phase == Phase::Closing {
            match ready!(Pin::new(writer).poll_shutdown(cx)) {
                // The receiver is gone already: nothing to tell it.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                other => other?,
            }
            self.phase = Phase::Done;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_until_end<R: Side, W: Side>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        count: &AtomicU64,
    ) -> Poll<io::Result<()>> {
        for _ in 0..READS_PER_POLL {
            ready!(self.poll_write(cx, writer, count))?;
            if let Some(piece) = reader.take_large(cx)? {
                self.piece = piece;
                continue;
            }
            let mut buffer = Buffer::take();
            let mut read = ReadBuf::new(&mut buffer);
            let Poll::Ready(result) = Pin::new(&mut *reader).poll_read(cx, &mut read) else {
                drop(buffer);
                ready!(self.poll_flush(cx, writer))?;
                return Poll::Pending;
            };
            result?;
            let end = read.filled().len();
            if end == 0 {
                return Poll::Ready(Ok(()));
            }
            // A writer holds all of a buffer for what it keeps of it: never much more than that.
            if end >= buffer.len() / 4 && writer.keeps_written() {
                self.piece = Bytes::from_owner(Filled { buffer, end });
            } else {
                (self.kept, self.start, self.end) = (Some(buffer), 0, end);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what has been read.
    fn poll_write<W: Side>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
        count: &AtomicU64,
    ) -> Poll<io::Result<()>> {
        let wrote = |written: usize| {
            count.fetch_add(written as u64, Ordering::Relaxed);
            if written == 0 { Err(io::Error::from(io::ErrorKind::WriteZero)) } else { Ok(written) }
        };
        while !self.piece.is_empty() {
            wrote(ready!(writer.poll_write_piece(cx, &mut self.piece))?)?;
            self.needs_flush = true;
            if self.piece.is_empty() {
                // What is empty may still hold what it was a part of.
                self.piece = Bytes::new();
            }
        }
        while let Some(unwritten @ [_, ..]) =
            self.kept.as_deref().and_then(|all| all.get(self.start..self.end))
        {
            self.start += wrote(ready!(Pin::new(&mut *writer).poll_write(cx, unwritten))?)?;
            self.needs_flush = true;
        }
        self.kept = None;
        Poll::Ready(Ok(()))
    }

    /// Sends what the writer still buffers: only when there is nothing more to read at once.
    fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Poll<io::Result<()>> {
        if self.needs_flush {
            ready!(Pin::new(writer).poll_flush(cx))?;
            self.needs_flush = false;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::task::JoinHandle;

    impl Side for DuplexStream {}

    struct Pair {
        client: DuplexStream,
        server: DuplexStream,
        copying: JoinHandle<(io::Result<()>, ByteCounts)>,
    }

    fn start(pipe_bytes: usize) -> Pair {
        let (client, mut client_side) = duplex(pipe_bytes);
        let (server, mut server_side) = duplex(pipe_bytes);
        let copying = tokio::spawn(async move {
            let counts = ByteCounts::default();
            let result = copy(&mut client_side, &mut server_side, &counts).await;
            (result, counts)
        });
        Pair { client, server, copying }
    }

    #[tokio::test]
    async fn client_half_close_lets_the_server_answer() {
        let Pair { mut client, mut server, copying } = start(64);
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        server.write_all(b"the answer").await.unwrap();
        server.shutdown().await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "the answer");
        let (result, counts) = copying.await.unwrap();
        result.unwrap();
        assert_eq!(counts.received.load(Ordering::Relaxed), 8);
        assert_eq!(counts.sent.load(Ordering::Relaxed), 10);
    }

    #[tokio::test]
    async fn large_transfer_through_a_narrow_pipe_arrives_whole() {
        let Pair { client, server, copying } = start(1000);
        let data: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        let (mut client_read, mut client_write) = tokio::io::split(client);
        let (mut server_read, mut server_write) = tokio::io::split(server);
        let sent = data.clone();
        let send = tokio::spawn(async move {
            client_write.write_all(&sent).await.unwrap();
            client_write.shutdown().await.unwrap();
        });
        let echo = tokio::spawn(async move {
            tokio::io::copy(&mut server_read, &mut server_write).await.unwrap();
            server_write.shutdown().await.unwrap();
        });
        let mut back = Vec::new();
        client_read.read_to_end(&mut back).await.unwrap();
        assert!(back == data);
        send.await.unwrap();
        echo.await.unwrap();
        let (result, counts) = copying.await.unwrap();
        result.unwrap();
        assert_eq!(counts.sent.load(Ordering::Relaxed), 3_000_000);
        assert_eq!(counts.received.load(Ordering::Relaxed), 3_000_000);
    }

    #[tokio::test]
    async fn a_side_that_is_silent_after_the_other_has_ended_is_not_waited_for() {
        let (mut client, mut client_side) = duplex(64);
        let (mut server, mut server_side) = duplex(64);
        let copying = tokio::spawn(async move {
            let counts = ByteCounts::default();
            copy_within(&mut client_side, &mut server_side, &counts, Duration::from_millis(20)).await
        });
        client.shutdown().await.unwrap();
        // What still comes is carried; then there is silence.
        server.write_all(b"late").await.unwrap();
        let mut late = [0; 4];
        client.read_exact(&mut late).await.unwrap();
        assert_eq!(copying.await.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(server);
    }

    #[tokio::test]
    async fn vanished_server_is_an_error() {
        let Pair { mut client, server, copying } = start(64);
        drop(server);
        client.write_all(b"hello").await.unwrap();
        let (result, _) = copying.await.unwrap();
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    /// Holds written bytes back until flushed, as a TLS stream may.
    struct Lazy {
        inner: DuplexStream,
        held: Vec<u8>,
    }

    impl AsyncRead for Lazy {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_read(cx, buffer)
        }
    }

    impl AsyncWrite for Lazy {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.held.extend_from_slice(bytes);
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            let Self { inner, held } = self.get_mut();
            while !held.is_empty() {
                let written = ready!(Pin::new(&mut *inner).poll_write(cx, held))?;
                held.drain(..written);
            }
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            ready!(self.as_mut().poll_flush(cx))?;
            Pin::new(&mut self.inner).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn writer_that_buffers_is_flushed_before_waiting() {
        let (mut client, mut client_side) = duplex(64);
        let (mut server, server_side) = duplex(64);
        let mut server_side = Lazy { inner: server_side, held: Vec::new() };
        tokio::spawn(async move { copy(&mut client_side, &mut server_side, &ByteCounts::default()).await });
        client.write_all(b"ping").await.unwrap();
        let mut ping = [0; 4];
        server.read_exact(&mut ping).await.unwrap();
        assert_eq!(&ping, b"ping");
    }

    #[tokio::test]
    async fn idle_connection_holds_no_buffer() {
        let (mut client, mut client_side) = duplex(64);
        let (mut server, mut server_side) = duplex(64);
        let mut direction = Direction::default();
        let count = AtomicU64::new(0);
        client.write_all(b"ping").await.unwrap();
        poll_fn(|cx| {
            assert!(direction.poll_copy(cx, &mut client_side, &mut server_side, &count).is_pending());
            Poll::Ready(())
        })
        .await;
        let mut ping = [0; 4];
        server.read_exact(&mut ping).await.unwrap();
        assert!(direction.kept.is_none());
        assert_eq!(count.load(Ordering::Relaxed), 4);
    }
}
