//! What an exchange tells the plugin in its shadow, and what comes back of it.

use cairn_filter::{Body, BodyBroken, Exchange, Piece, ResponseHead, Side};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker};

/// How much may wait for the plugin: what a filter may hold of a body, of both sides.
const BYTES_MAX: usize = 2 << 20;
/// How much may wait in all exchanges of a plugin together.
const ALL_BYTES_MAX: usize = 64 << 20;
/// What an event counts for beside its bytes.
const EVENT_BYTES: usize = 256;

/// Something that passes by.
pub(super) enum Event {
    Piece(Side, Piece),
    /// The response's head, whether nothing follows it, and what is known of the exchange by then.
    Response(Box<(ResponseHead, bool, Exchange)>),
}

impl Event {
    fn length(&self) -> usize {
        match self {
            Self::Piece(_, piece) => EVENT_BYTES + piece.length(),
            Self::Response(response) => {
                let fields = response.0.headers.iter();
                EVENT_BYTES + fields.map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>()
            }
        }
    }
}

/// What comes next beside pieces of bodies.
pub(super) enum Next {
    Response(Box<(ResponseHead, bool, Exchange)>),
    /// The exchange is over; without what is known of it when its task was dropped.
    End(Option<Box<Exchange>>),
}

/// From an exchange to its shadow, and back.
pub(super) struct Feed(Mutex<Queue>);

struct Queue {
    events: VecDeque<Event>,
    bytes: usize,
    /// What waits in all exchanges of the plugin.
    all_bytes: Arc<AtomicUsize>,
    /// The exchange is over.
    end: Option<Option<Box<Exchange>>>,
    has_ended: bool,
    /// The plugin wants to know no more than the end.
    is_stopped: bool,
    waker: Option<Waker>,
    /// What the plugin would have done, in words.
    notes: Vec<String>,
    /// The plugin has let the request's head pass, or would have ended the exchange.
    has_decided: bool,
}

impl Feed {
    /// `all_bytes` counts what waits in all exchanges of the plugin.
    pub(super) fn new(all_bytes: &Arc<AtomicUsize>) -> Self {
        Self(Mutex::new(Queue {
            events: VecDeque::new(),
            bytes: 0,
            all_bytes: Arc::clone(all_bytes),
            end: None,
            has_ended: false,
            is_stopped: false,
            waker: None,
            notes: Vec::new(),
            has_decided: false,
        }))
    }

    /// False when so much waits that the plugin is given up.
    pub(super) fn push(&self, event: Event) -> bool {
        let mut queue = self.0.lock();
        if queue.has_ended || queue.is_stopped {
            return true;
        }
        let length = event.length();
        queue.bytes += length;
        let all_bytes = queue.all_bytes.fetch_add(length, Relaxed) + length;
        queue.events.push_back(event);
        let has_room = queue.bytes <= BYTES_MAX && all_bytes <= ALL_BYTES_MAX;
        let waker = queue.waker.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
        has_room
    }

    /// Says that the exchange is over. Wakes nobody.
    pub(super) fn end(&self, exchange: Option<Exchange>) {
        let mut queue = self.0.lock();
        if !queue.has_ended {
            queue.has_ended = true;
            queue.end = Some(exchange.map(Box::new));
        }
    }

    /// Keeps nothing any more but the end.
    pub(super) fn stop(&self) {
        let mut queue = self.0.lock();
        queue.is_stopped = true;
        queue.clear();
    }

    /// Ends the play without what has not been told yet.
    pub(super) fn give_up(&self) {
        self.0.lock().clear();
        self.end(None);
        self.wake();
    }

    pub(super) fn wake(&self) {
        let waker = self.0.lock().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Who waits for more.
    pub(super) fn waker(&self) -> Option<Waker> {
        self.0.lock().waker.clone()
    }

    pub(super) fn note(&self, text: String) {
        self.0.lock().notes.push(text);
    }

    pub(super) fn decided(&self) {
        self.0.lock().has_decided = true;
    }

    pub(super) fn has_decided(&self) -> bool {
        self.0.lock().has_decided
    }

    /// Notes down for the exchange what the plugin would have done.
    pub(super) fn take_notes(&self, exchange: &mut Exchange, name: &Arc<str>) {
        for note in std::mem::take(&mut self.0.lock().notes) {
            exchange.note(name, format!("shadow: {note}"));
        }
    }

    /// The response's head, or the end, which waits while the plugin holds something back.
    pub(super) fn poll_next(&self, cx: &mut Context<'_>, is_held: bool) -> Poll<Next> {
        let mut queue = self.0.lock();
        if let Some(Event::Response(response)) = queue.take(|event| matches!(event, Event::Response(_))) {
            return Poll::Ready(Next::Response(response));
        }
        if !is_held && let Some(end) = queue.end.take() {
            return Poll::Ready(Next::End(end));
        }
        queue.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Queue {
    /// The first event of a kind.
    fn take(&mut self, is_wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let at = self.events.iter().position(is_wanted)?;
        let event = self.events.remove(at)?;
        self.bytes -= event.length();
        self.all_bytes.fetch_sub(event.length(), Relaxed);
        Some(event)
    }

    fn clear(&mut self) {
        self.events = VecDeque::new();
        self.all_bytes.fetch_sub(std::mem::take(&mut self.bytes), Relaxed);
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.clear();
    }
}

/// One side's body, as it was told.
pub(super) struct Source<'a>(pub(super) &'a Feed, pub(super) Side);

impl Body for Source<'_> {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        let mut queue = self.0.0.lock();
        let is_ours = |event: &Event| matches!(event, Event::Piece(side, _) if *side == self.1);
        if let Some(Event::Piece(_, piece)) = queue.take(is_ours) {
            return Poll::Ready(Ok(piece));
        }
        if queue.has_ended {
            return Poll::Ready(Err(BodyBroken));
        }
        queue.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}
