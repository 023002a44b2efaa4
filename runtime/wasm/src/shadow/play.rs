//! Playing an exchange to a plugin.

use super::feed::{Feed, Next, Source};
use super::index_of;
use crate::metrics::PluginCounters;
use cairn_filter::{Exchange, Outcome, Piece, RequestHead, ResponseHead, Running, Side};
use rustix::time::{ClockId, clock_gettime};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

/// What a play begins with.
pub(super) struct Opening {
    pub(super) running: Running,
    pub(super) exchange: Exchange,
    /// The request's head and whether nothing follows it; `None` when the exchange was answered before.
    pub(super) head: Option<(RequestHead, bool)>,
    /// The guest runs on threads of the plugin's own: any call of it is waited for, held or not.
    pub(super) is_away: bool,
    pub(super) feed: Arc<Feed>,
    pub(super) counters: Arc<PluginCounters>,
}

/// A play, and what it costs.
pub(super) struct Play {
    acts: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    counters: Arc<PluginCounters>,
}

impl Play {
    pub(super) fn new(opening: Opening) -> Self {
        let counters = Arc::clone(&opening.counters);
        Self { acts: Some(Box::pin(opening.play())), counters }
    }

    /// Goes on as far as it can.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(acts) = &mut self.acts else { return Poll::Ready(()) };
        let before = cpu_nanos();
        let polled = acts.as_mut().poll(cx);
        if polled.is_ready() {
            self.acts = None;
        }
        let nanos = cpu_nanos().saturating_sub(before);
        self.counters.shadow.cpu_nanos.fetch_add(nanos, Ordering::Relaxed);
        polled
    }
}

/// The CPU time of this thread.
fn cpu_nanos() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let nanos = i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec);
    u64::try_from(nanos).unwrap_or(0)
}

/// What has come of a play by now. What is counted has been noted before, so that who sees a count finds the note.
struct Scene {
    opening: Opening,
    /// The sides whose bodies are under way.
    flows: [bool; 2],
    /// It was told that a body was changed.
    changed: [bool; 2],
    /// The plugin would have ended the exchange.
    is_stopped: bool,
}

impl Opening {
    async fn play(mut self) {
        let head = self.head.take();
        let mut scene = Scene { opening: self, flows: [false; 2], changed: [false; 2], is_stopped: false };
        match head {
            Some((head, end_of_stream)) => scene.request(head, end_of_stream).await,
            None => {
                scene.flows[0] = scene.opening.running.wants_body(Side::Request);
                scene.opening.feed.decided();
            }
        }
        loop {
            scene.take_notes();
            match poll_fn(|cx| scene.poll(cx)).await {
                Act::Passed(side, piece) => scene.passed(side, &piece),
                Act::Stopped(outcome, side) => scene.stopped(&outcome, side),
                Act::Next(Next::Response(response)) => {
                    let (head, end_of_stream, exchange) = *response;
                    scene.take_up(exchange);
                    scene.response(head, end_of_stream).await;
                }
                Act::Next(Next::End(exchange)) => return scene.end(exchange),
            }
        }
    }
}

/// What happens next in a play.
enum Act {
    Passed(Side, Piece),
    Stopped(Outcome, Side),
    Next(Next),
}

impl Scene {
    async fn request(&mut self, before: RequestHead, end_of_stream: bool) {
        let mut head = before.clone();
        let Opening { running, exchange, feed, .. } = &mut self.opening;
        let mut source = Source(feed, Side::Request);
        let mut is_held = false;
        let outcome = poll_fn(|cx| {
            let polled = running.poll_request_headers(cx, exchange, &mut head, end_of_stream, &mut source);
            is_held |= polled.is_pending();
            polled
        });
        let outcome = outcome.await;
        self.take_notes();
        self.opening.feed.decided();
        if is_held && !self.opening.is_away {
            self.count(|counts| &counts.held);
        }
        self.flows[0] = !end_of_stream && self.opening.running.wants_body(Side::Request);
        if !is_same(&before, &head) {
            self.count(|counts| &counts.changed_heads[0]);
        }
        self.concluded(&outcome, Side::Request);
    }

    async fn response(&mut self, before: ResponseHead, end_of_stream: bool) {
        if self.is_stopped {
            return;
        }
        let mut head = before.clone();
        let Opening { running, exchange, feed, .. } = &mut self.opening;
        let mut source = Source(feed, Side::Response);
        let mut is_held = false;
        let outcome = poll_fn(|cx| {
            let polled = running.poll_response_headers(cx, exchange, &mut head, end_of_stream, &mut source);
            is_held |= polled.is_pending();
            polled
        });
        let outcome = outcome.await;
        self.take_notes();
        if is_held && !self.opening.is_away {
            self.count(|counts| &counts.held);
        }
        self.flows[1] = !end_of_stream && self.opening.running.wants_body(Side::Response);
        if before.status != head.status || before.headers != head.headers {
            self.count(|counts| &counts.changed_heads[1]);
        }
        self.concluded(&outcome, Side::Response);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Act> {
        let Opening { running, exchange, feed, .. } = &mut self.opening;
        let mut is_held = false;
        for side in [Side::Request, Side::Response] {
            if !self.flows[index_of(side)] || self.is_stopped {
                continue;
            }
            let mut source = Source(feed, side);
            let polled = match side {
                Side::Request => running.poll_request_body(cx, exchange, &mut source),
                Side::Response => running.poll_response_body(cx, exchange, &mut source),
            };
            match polled {
                Poll::Ready(Ok(piece)) => return Poll::Ready(Act::Passed(side, piece)),
                Poll::Ready(Err(outcome)) => return Poll::Ready(Act::Stopped(outcome, side)),
                // Once the exchange is over, more does not come: the plugin waits for something else.
                Poll::Pending => is_held = true,
            }
        }
        feed.poll_next(cx, is_held).map(Act::Next)
    }

    fn passed(&mut self, side: Side, piece: &Piece) {
        self.take_notes();
        self.flows[index_of(side)] &= !piece.is_last();
        self.see_changes(side);
    }

    fn see_changes(&mut self, side: Side) {
        let index = index_of(side);
        if self.opening.running.is_body_changed(side) && !std::mem::replace(&mut self.changed[index], true) {
            self.count(|counts| &counts.changed_bodies[index]);
        }
    }

    fn concluded(&mut self, outcome: &Outcome, side: Side) {
        self.see_changes(side);
        if !matches!(outcome, Outcome::Continue) {
            self.stopped(outcome, side);
        }
    }

    /// The plugin would have ended the exchange, or the exchange has ended within a body.
    fn stopped(&mut self, outcome: &Outcome, side: Side) {
        self.is_stopped = true;
        self.opening.feed.stop();
        self.take_notes();
        let status = match outcome {
            Outcome::Reply(reply) => reply.status.as_u16(),
            // Envoy's answers to too much that is held.
            Outcome::TooLarge if side == Side::Request => 413,
            Outcome::TooLarge => 500,
            Outcome::Reset => {
                self.opening.feed.note("would have ended the exchange without an answer".to_owned());
                self.count(|counts| &counts.reset);
                return;
            }
            Outcome::Continue | Outcome::BodyBroken => return,
        };
        self.opening.feed.note(format!("would have answered {status}"));
        self.opening.counters.shadow.answered(status).fetch_add(1, Ordering::Relaxed);
    }

    /// Takes up what has become known of the exchange, but for what the plugin itself has said of it.
    fn take_up(&mut self, mut known: Exchange) {
        known.notes = std::mem::take(&mut self.opening.exchange.notes);
        known.metadata.merge_all(std::mem::take(&mut self.opening.exchange.metadata));
        self.opening.exchange = known;
    }

    fn end(mut self, exchange: Option<Box<Exchange>>) {
        if let Some(exchange) = exchange {
            self.take_up(*exchange);
            self.opening.running.finish(&mut self.opening.exchange);
        }
        self.take_notes();
    }

    /// Passes on what the plugin did, in its own words.
    fn take_notes(&mut self) {
        for note in self.opening.exchange.notes.drain(..) {
            if !note.text.starts_with("answered ") {
                self.opening.feed.note(note.text.into_owned());
            }
        }
    }

    fn count(&self, which: impl FnOnce(&super::ShadowCounts) -> &std::sync::atomic::AtomicU64) {
        which(&self.opening.counters.shadow).fetch_add(1, Ordering::Relaxed);
    }
}

fn is_same(a: &RequestHead, b: &RequestHead) -> bool {
    a.method == b.method
        && a.scheme == b.scheme
        && a.authority == b.authority
        && a.path == b.path
        && a.headers == b.headers
}
