//! A plugin whose word counts for nothing: it runs on copies, beside the exchange and not in its way, and what it would have done is
//! counted.
//!
//! The exchange tells a [`Feed`] what passes by; a task on the exchange's worker plays the exchange to the plugin from it, with
//! the chain's own rules about waiting and holding.

mod counts;
mod feed;
mod play;

use crate::engine::Environment;
use crate::metrics::PluginCounters;
use crate::plugin::PluginFactory;
use crate::state::copy_of;
use cairn_filter::{
    Chain, Exchange, Factory, Filter, Part, Phases, Piece, RequestHead, ResponseHead, Side, Verdict,
};
use feed::{Event, Feed};
use parking_lot::Mutex;
use play::{Opening, Play};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

pub use counts::ShadowView;
pub(crate) use counts::{ShadowCounts, encode};

/// The most exchanges of a plugin that are played at a time; more are passed over.
const PLAYS_MAX: usize = 4096;

/// A plugin that costs less than this per exchange is caught up with at the exchange's end, so that what it would have done
/// is told of the exchange; any other is left behind.
const CATCH_UP_MAX: Duration = Duration::from_micros(100);

/// A plugin that is only asked what it would do, in a chain.
pub(crate) struct ShadowFactory {
    phases: Phases,
    shadow: Arc<Shadow>,
}

/// What the plays of one plugin have in common.
struct Shadow {
    name: Arc<str>,
    plugin: Arc<PluginFactory>,
    /// Of the plugin alone.
    chain: Chain,
    environment: Arc<Environment>,
    counters: Arc<PluginCounters>,
    plays: AtomicUsize,
    /// What waits for the plugin in all plays.
    waiting_bytes: Arc<AtomicUsize>,
}

impl ShadowFactory {
    pub(crate) fn new(
        plugin: PluginFactory,
        environment: Arc<Environment>,
        counters: Arc<PluginCounters>,
    ) -> Self {
        let (name, phases, plugin) = (plugin.name().into(), plugin.phases(), Arc::new(plugin));
        let chain = Chain::new(vec![Arc::clone(&plugin) as Arc<dyn Factory>]);
        let (plays, waiting_bytes) = Default::default();
        let shadow = Shadow { name, plugin, chain, environment, counters, plays, waiting_bytes };
        Self { phases, shadow: Arc::new(shadow) }
    }
}

impl Factory for ShadowFactory {
    fn name(&self) -> &str {
        &self.shadow.name
    }

    fn phases(&self) -> Phases {
        self.phases
    }

    fn start(&self, _: &Exchange) -> Option<Box<dyn Filter>> {
        Some(Box::new(ShadowFilter { shadow: Arc::clone(&self.shadow), playing: Playing::Not }))
    }
}

impl Shadow {
    fn counts(&self) -> &ShadowCounts {
        &self.counters.shadow
    }

    /// What a plugin in the shadow is shown of an exchange: the facts, and what others said of it.
    fn copy(exchange: &Exchange) -> Exchange {
        let mut copy = copy_of(exchange);
        copy.metadata = exchange.metadata.clone();
        copy
    }
}

/// Watches one exchange for the plugin.
struct ShadowFilter {
    shadow: Arc<Shadow>,
    playing: Playing,
}

/// The play that belongs to an exchange.
enum Playing {
    /// It has not begun.
    Not,
    Yes {
        feed: Arc<Feed>,
        play: Arc<Mutex<Play>>,
    },
    /// It was given up.
    Over,
}

/// Counts a play for as long as it lasts.
struct Turn(Arc<Shadow>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.plays.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ShadowFilter {
    /// Begins to play the exchange: from its head, or without one when it was answered before the plugin's turn.
    fn begin(&mut self, exchange: &mut Exchange, head: Option<(&RequestHead, bool)>) {
        let turn = Turn(Arc::clone(&self.shadow));
        let is_one_too_many = self.shadow.plays.fetch_add(1, Ordering::Relaxed) >= PLAYS_MAX;
        let Ok(runtime) = self.shadow.environment.places.runtime(exchange.connection.worker) else { return };
        if is_one_too_many {
            return self.give_up(exchange, "shadow: passed over, too many exchanges wait for the plugin");
        }
        self.shadow.counts().exchanges.fetch_add(1, Ordering::Relaxed);
        let feed = Arc::new(Feed::new(&self.shadow.waiting_bytes));
        let exchange = Shadow::copy(exchange);
        let opening = Opening {
            running: self.shadow.chain.start(&exchange),
            exchange,
            head: head.map(|(head, end_of_stream)| (head.clone(), end_of_stream)),
            is_away: self.shadow.plugin.has_own_threads(),
            feed: Arc::clone(&feed),
            counters: Arc::clone(&self.shadow.counters),
        };
        let play = Arc::new(Mutex::new(Play::new(opening)));
        let playing = Arc::clone(&play);
        runtime.spawn(async move {
            let _turn = turn;
            std::future::poll_fn(|cx| playing.lock().poll(cx)).await;
        });
        self.playing = Playing::Yes { feed, play };
    }

    fn give_up(&mut self, exchange: &mut Exchange, why: &'static str) {
        if let Playing::Yes { feed, .. } = std::mem::replace(&mut self.playing, Playing::Over) {
            feed.give_up();
        }
        self.shadow.counts().given_up.fetch_add(1, Ordering::Relaxed);
        exchange.note(&self.shadow.name, why);
    }

    /// Says what passes by, and takes up what the plugin made of what had passed before.
    fn tell(&mut self, exchange: &mut Exchange, event: Event) {
        let Playing::Yes { feed, .. } = &self.playing else { return };
        let has_room = feed.push(event);
        feed.take_notes(exchange, &self.shadow.name);
        if !has_room {
            self.give_up(exchange, "shadow: given up, the plugin holds more than it may");
        }
    }

    fn tell_part(&mut self, exchange: &mut Exchange, part: &Part<'_>, trailers: bool) {
        let chunk = &part.chunk;
        let ends = chunk.end_of_stream && !trailers;
        if !chunk.bytes.is_empty() || ends {
            let piece = Piece::Data { bytes: chunk.bytes.clone(), end_of_stream: ends };
            self.tell(exchange, Event::Piece(part.side, piece));
        }
        if let Some(trailers) = chunk.trailers.as_ref().filter(|_| trailers) {
            self.tell(exchange, Event::Piece(part.side, Piece::Trailers(trailers.clone())));
        }
    }
}

impl Filter for ShadowFilter {
    fn request_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut RequestHead,
        end_of_stream: bool,
    ) -> Verdict {
        self.begin(exchange, Some((head, end_of_stream)));
        Verdict::Continue
    }

    fn response_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut ResponseHead,
        end_of_stream: bool,
    ) -> Verdict {
        if matches!(self.playing, Playing::Not) {
            self.begin(exchange, None);
        }
        let copy = Shadow::copy(exchange);
        self.tell(exchange, Event::Response(Box::new((head.clone(), end_of_stream, copy))));
        Verdict::Continue
    }

    fn body(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        if matches!(self.playing, Playing::Not) {
            self.begin(exchange, None);
        }
        self.tell_part(exchange, &part, false);
        Verdict::Continue
    }

    fn trailers(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.tell_part(exchange, &part, true);
        Verdict::Continue
    }

    fn finish(&mut self, exchange: &mut Exchange) {
        if matches!(self.playing, Playing::Not) && self.shadow.plugin.logs() {
            self.begin(exchange, None);
        }
        let Playing::Yes { feed, play } = std::mem::replace(&mut self.playing, Playing::Over) else { return };
        feed.end(Some(Shadow::copy(exchange)));
        let runtime = self.shadow.environment.places.runtime(exchange.connection.worker);
        if let Ok(runtime) = runtime
            && self.shadow.counts().mean_cost() <= CATCH_UP_MAX
        {
            // Where its timers run, should it be played for the first time.
            let _context = runtime.enter();
            let waker = feed.waker().unwrap_or_else(|| Waker::noop().clone());
            // Its task goes on with what is left.
            let _left = play.lock().poll(&mut Context::from_waker(&waker));
        }
        feed.wake();
        if !feed.has_decided() {
            exchange.note(&self.shadow.name, "shadow: the plugin had not decided when the exchange ended");
        }
        feed.take_notes(exchange, &self.shadow.name);
    }
}

impl Drop for ShadowFilter {
    /// An exchange whose task was dropped was never finished; the plugin must not wait for its end.
    fn drop(&mut self) {
        if let Playing::Yes { feed, .. } = &self.playing {
            feed.end(None);
            feed.wake();
        }
    }
}

/// Which side's head or body it is, as counts name it.
fn index_of(side: Side) -> usize {
    match side {
        Side::Request => 0,
        Side::Response => 1,
    }
}
