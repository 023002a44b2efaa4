//! Noticing that a peer is gone: a PING now and then, and an end if it is not answered.

use h2::{Ping, PingPong};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// How often to ask, and how long to wait for the answer (facts §2.4: 10 s and 20 s).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeepaliveSettings {
    pub(crate) interval: Duration,
    pub(crate) timeout: Duration,
}

/// The peer is gone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoAnswer;

/// The PINGs of one connection, on one timer.
pub(crate) struct Keepalive {
    settings: KeepaliveSettings,
    ping: Option<PingPong>,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
}

impl Keepalive {
    pub(crate) fn new(ping: Option<PingPong>, settings: KeepaliveSettings) -> Self {
        Self { settings, ping, timer: Box::pin(tokio::time::sleep(settings.interval)), waiting: false }
    }

    /// Asks the peer at once, and gives it no longer than `timeout` to answer.
    pub(crate) fn ask_now(&mut self, timeout: Duration) {
        let Some(ping) = &mut self.ping else { return };
        let end = Instant::now() + timeout;
        if self.waiting {
            if self.timer.deadline() > end {
                self.timer.as_mut().reset(end);
            }
        } else if ping.send_ping(Ping::opaque()).is_ok() {
            self.waiting = true;
            self.timer.as_mut().reset(end);
        }
    }

    /// Sends a PING when it is time. Ready once for each tick of the interval, and when the peer is gone. Poll it
    /// until pending, and then the connection, which carries the PINGs.
    pub(crate) fn poll_tick(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NoAnswer>> {
        let Some(ping) = &mut self.ping else { return Poll::Pending };
        loop {
            if self.waiting {
                match ping.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => {
                        self.waiting = false;
                        self.timer.as_mut().reset(Instant::now() + self.settings.interval);
                        continue;
                    }
                    // The connection has ended and says so itself.
                    Poll::Ready(Err(_)) => return Poll::Pending,
                    Poll::Pending => {}
                }
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if self.waiting {
                return Poll::Ready(Err(NoAnswer));
            }
            if ping.send_ping(Ping::opaque()).is_err() {
                return Poll::Pending;
            }
            self.waiting = true;
            self.timer.as_mut().reset(Instant::now() + self.settings.timeout);
            return Poll::Ready(Ok(()));
        }
    }
}
