//! Applications that tests run themselves, where the mesh expects one.

use crate::harness::SOON;
use anyhow::{Context, Result};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// A server that sends back what it receives. It ends when dropped.
pub struct TcpEcho(JoinHandle<()>);

impl Drop for TcpEcho {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl TcpEcho {
    /// Starts one.
    pub async fn start(at: SocketAddr) -> Result<Self> {
        let listener = listen(at).await?;
        Ok(Self(tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    // A client that breaks off has had what it wanted.
                    let _broken = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        })))
    }
}

/// A server that answers every HTTP request in the same words. It ends when dropped.
pub struct Parrot(JoinHandle<()>);

impl Drop for Parrot {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Parrot {
    /// Starts one whose answers are `words`, head and body.
    pub async fn start(at: SocketAddr, words: &'static str) -> Result<Self> {
        let listener = listen(at).await?;
        Ok(Self(tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut request = Vec::new();
                    while stream.read_buf(&mut request).await.is_ok_and(|count| count > 0) {
                        if request.ends_with(b"\r\n\r\n") {
                            request.clear();
                            stream.write_all(words.as_bytes()).await?;
                        }
                    }
                    Ok::<_, std::io::Error>(())
                });
            }
        })))
    }
}

/// A server that answers one HTTP request, when told to.
pub struct Slow {
    asked: Arc<Notify>,
    answer: Arc<Notify>,
    task: JoinHandle<Result<()>>,
}

impl Slow {
    /// Starts one.
    pub async fn start(at: SocketAddr) -> Result<Self> {
        let listener = listen(at).await?;
        let (asked, answer) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (has_asked, may_answer) = (Arc::clone(&asked), Arc::clone(&answer));
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                anyhow::ensure!(stream.read_buf(&mut request).await? > 0, "half a request");
            }
            has_asked.notify_one();
            may_answer.notified().await;
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nslow\n").await?;
            // The client closes when it has read.
            stream.read_buf(&mut request).await?;
            Ok(())
        });
        Ok(Self { asked, answer, task })
    }

    /// Waits until a request has arrived.
    pub async fn asked(&self) {
        self.asked.notified().await;
    }

    /// Answers it.
    pub fn answer(&self) {
        self.answer.notify_one();
    }

    /// Whether it served its request well.
    pub async fn wait(self) -> Result<()> {
        self.task.await?
    }
}

/// Listens as soon as the address is free: the test before may still be putting its server away.
async fn listen(at: SocketAddr) -> Result<TcpListener> {
    let deadline = Instant::now() + SOON;
    loop {
        match TcpListener::bind(at).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => return Err(error).with_context(|| format!("cannot listen on {at}")),
        }
    }
}
