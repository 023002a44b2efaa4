//! Between TLS and the socket: reading ahead.
//!
//! `rustls` asks the socket for 4 KiB at a time, which are four or five system calls for each full record. Here one
//! call reads what has arrived, up to 64 KiB, into a borrowed buffer, which goes back once TLS has taken everything.

use cairn_net::Buffer;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A socket that reads ahead.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    tcp: TcpStream,
    /// Bytes `start..end` are read and not taken yet; `None` when there are none.
    held: Option<Buffer>,
    start: usize,
    end: usize,
}

impl ReadAhead {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        Self { tcp, held: None, start: 0, end: 0 }
    }

    fn take_held(&mut self, buffer: Buffer, into: &mut ReadBuf<'_>) {
        let count = into.remaining().min(self.end - self.start);
        into.put_slice(buffer.get(self.start..self.start + count).unwrap_or_default());
        self.start += count;
        if self.start < self.end {
            self.held = Some(buffer);
        }
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(buffer) = this.held.take() {
            this.take_held(buffer, into);
            return Poll::Ready(Ok(()));
        }
        let mut buffer = Buffer::take();
        let mut read = ReadBuf::new(&mut buffer);
        ready!(Pin::new(&mut this.tcp).poll_read(cx, &mut read))?;
        (this.start, this.end) = (0, read.filled().len());
        this.take_held(buffer, into);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn bytes_come_in_order_and_the_buffer_goes_back() {
        let listener = cairn_net::listen("127.0.0.1:0".parse().unwrap(), &Default::default()).unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut reader = ReadAhead::new(listener.accept().await.unwrap().0);
        let data: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
        let sent = data.clone();
        let sending = tokio::spawn(async move {
            sender.write_all(&sent).await.unwrap();
            sender
        });
        let (mut back, mut held) = (Vec::new(), 0);
        while back.len() < data.len() {
            let mut part = [0; 4096];
            let count = reader.read(&mut part).await.unwrap();
            assert_ne!(count, 0);
            back.extend_from_slice(&part[..count]);
            held += usize::from(reader.held.is_some());
        }
        assert!(back == data);
        assert_ne!(held, 0, "nothing was read ahead");
        assert!(reader.held.is_none());
        drop(sending.await.unwrap());
        assert_eq!(reader.read(&mut [0; 16]).await.unwrap(), 0);
    }
}
