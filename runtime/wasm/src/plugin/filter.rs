//! A plugin as a filter: the life of one exchange in it.

use super::Plugin;
use super::away::{Answer, Call, Head, Standing, copy_of_exchange};
use super::context::Context;
use crate::bodies::Bodies;
use crate::instance::{Outcome, Phase};
use crate::metrics::Limit;
use crate::state::number_of;
use cairn_filter::{
    Chunk, Exchange, Factory, Filter, Hold, LocalReply, Note, Part, Phases, RequestHead, ResponseHead, Side,
    Until, Verdict, append,
};
use cairn_mesh::FailStrategy;
use http::StatusCode;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tokio::sync::Notify;

/// The plugin in a chain.
pub(crate) struct PluginFactory {
    plugin: Arc<Plugin>,
    phases: Phases,
}

impl PluginFactory {
    pub(crate) fn new(plugin: Arc<Plugin>) -> Self {
        let exports = plugin.module.exports;
        let mut phases = Phases::empty();
        phases.set(Phases::REQUEST_HEADERS, exports.request_headers);
        phases.set(Phases::RESPONSE_HEADERS, exports.response_headers);
        phases.set(Phases::REQUEST_BODY, exports.body[0]);
        phases.set(Phases::RESPONSE_BODY, exports.body[1]);
        phases.set(Phases::REQUEST_TRAILERS, exports.trailers[0]);
        phases.set(Phases::RESPONSE_TRAILERS, exports.trailers[1]);
        if exports.log || !phases.is_empty() {
            phases |= Phases::FINISH;
        }
        Self { plugin, phases }
    }

    /// Whether the plugin wants to know the end of every exchange.
    pub(crate) fn logs(&self) -> bool {
        self.plugin.module.exports.log
    }

    /// Whether the plugin runs on threads of its own by now.
    pub(crate) fn has_own_threads(&self) -> bool {
        self.plugin.own_threads.get().is_some()
    }
}

impl Factory for PluginFactory {
    fn name(&self) -> &str {
        &self.plugin.facts.name
    }

    fn phases(&self) -> Phases {
        self.phases
    }

    fn start(&self, exchange: &Exchange) -> Option<Box<dyn Filter>> {
        let plugin = Arc::clone(&self.plugin);
        let worker = match plugin.own_threads.get() {
            Some(threads) => threads.next_lane(),
            None => exchange.connection.worker,
        };
        Some(Box::new(PluginFilter {
            place: Place::Here(Context::new(Arc::clone(&plugin), worker)),
            plugin,
            calls: [None, None],
            is_held: [false; 2],
            held_until: [None; 2],
            bodies: None,
            has_changed: [false; 2],
            failed: false,
        }))
    }
}

/// The plugin at work on one exchange.
struct PluginFilter {
    plugin: Arc<Plugin>,
    place: Place,
    /// Calls under way on the plugin's own threads, about the request and about the response.
    calls: [Option<Arc<Call<Context, Answer>>>; 2],
    /// The guest holds the head of the request, or of the response.
    is_held: [bool; 2],
    /// The guest holds the request, or the response, and nothing more will come of it; until then at most.
    held_until: [Option<Instant>; 2],
    /// What the guest was shown of bodies, and holds.
    bodies: Option<Arc<Bodies>>,
    /// It was noted that the guest changed the body of the request, or of the response.
    has_changed: [bool; 2],
    /// The plugin failed this exchange and takes no further part in it.
    failed: bool,
}

/// Where the guest's context for the exchange is.
enum Place {
    /// With the exchange's task, which enters it.
    Here(Context),
    /// With the plugin's own threads, which do, in the lane of its instance.
    Away { lane: usize, context: Arc<Mutex<Context>> },
    /// It is done.
    Nowhere,
}

/// What a guest is shown of a body.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Body,
    Trailers,
    /// Nothing new: it may have let go of what it holds.
    Nothing,
}

/// Resolves when something about a held stream may have changed, or when its time is over; which of the two is found out
/// by who asks then.
fn woken(notify: Arc<Notify>, until: Option<Instant>) -> Until {
    Box::pin(async move {
        match until {
            Some(until) => drop(tokio::time::timeout_at(until.into(), notify.notified()).await),
            None => notify.notified().await,
        }
    })
}

/// Why an exchange failed that nobody let go.
const TOO_LONG: &str = "the plugin held the exchange for too long";

/// Envoy's response code details for an exchange that a plugin failed.
const FAILED: &str = "wasm_fail_stream";

/// Why an exchange failed that found the plugin's own threads busy.
pub(super) const FULL: &str = "too much waits for the plugin's own threads";
pub(super) const TOO_LATE: &str = "the plugin's own threads had no time for it";

/// Why an exchange fails that has been told to the plugin as over.
pub(super) const GONE: &str = "the plugin knows it no more";

/// What asking the guest came to.
enum Asked {
    Now(Result<Outcome, &'static str>),
    /// It will be known when this resolves.
    Later(Until),
}

impl PluginFilter {
    /// Shows the guest a head, or finds out what became of one that it held.
    fn head(&mut self, exchange: &mut Exchange, mut phase: Phase<'_>, end_of_stream: bool) -> Verdict {
        let side = phase.side();
        let asked = match self.take_call(side) {
            _ if self.failed => Asked::Now(Ok(Outcome::Continue)),
            Some(Standing::Over(answer)) => Asked::Now(take_up_head(exchange, *answer, &mut phase)),
            Some(other) => self.not_over(side, other),
            None => self.ask_head(exchange, phase, end_of_stream),
        };
        let outcome = match asked {
            Asked::Later(until) => return Verdict::Wait(until),
            Asked::Now(outcome) => outcome,
        };
        match outcome {
            Ok(Outcome::Paused(notify)) if self.plugin.holds_heads && !end_of_stream => {
                Verdict::Hold(Hold { until: Some(woken(notify, None)), ..Hold::default() })
            }
            Ok(Outcome::Paused(notify)) => match self.held_until(side) {
                Some(until) => {
                    self.is_held[number_of(side)] = true;
                    Verdict::Wait(woken(notify, Some(until)))
                }
                None => self.held_too_long(exchange),
            },
            Ok(outcome) => self.verdict(exchange, side, outcome),
            Err(why) => self.fail(exchange, why),
        }
    }

    fn ask_head(&mut self, exchange: &mut Exchange, phase: Phase<'_>, end_of_stream: bool) -> Asked {
        let side = phase.side();
        let is_held = std::mem::take(&mut self.is_held[number_of(side)]);
        if self.plugin.own_threads.get().is_some() {
            let (mut exchange, mut head) = (copy_of_exchange(exchange), Head::copy_of(&phase));
            return self.send(side, move |context| {
                let outcome = context.enter(|instance, id| match is_held {
                    true => Ok(instance.resumed(id, &mut exchange, head.phase())),
                    false => instance.headers(id, &mut exchange, head.phase(), end_of_stream),
                });
                Answer { outcome, notes: exchange.notes, head: Some(head), chunk: Chunk::default() }
            });
        }
        let Place::Here(context) = &mut self.place else { return Asked::Now(Err(GONE)) };
        Asked::Now(context.enter(|instance, id| match is_held {
            true => Ok(instance.resumed(id, exchange, phase)),
            false => instance.headers(id, exchange, phase, end_of_stream),
        }))
    }

    /// Shows the guest a part of a body, or finds out what became of one that it held.
    fn part(&mut self, exchange: &mut Exchange, mut part: Part<'_>, shown: Shown) -> Verdict {
        let side = part.side;
        let bodies = Arc::clone(self.bodies.get_or_insert_default());
        append(&mut bodies.side(side).bytes, std::mem::take(&mut part.chunk.bytes));
        let asked = match self.take_call(side) {
            _ if self.failed => Asked::Now(Ok(Outcome::Continue)),
            Some(Standing::Over(answer)) => Asked::Now(take_up_part(exchange, *answer, &mut part)),
            Some(other) => self.not_over(side, other),
            None => self.ask_part(exchange, &mut part, shown, &bodies),
        };
        let outcome = match asked {
            Asked::Later(until) => return Verdict::Wait(until),
            Asked::Now(outcome) => outcome,
        };
        let verdict = match outcome {
            Ok(Outcome::Paused(notify)) => {
                let is_last = part.chunk.end_of_stream || part.chunk.trailers.is_some();
                // As long as more is to come, it is the sender's time that passes.
                let until = if is_last { self.held_until(side) } else { None };
                if until.is_some() || !is_last {
                    let body = bodies.side(side);
                    let until = Some(woken(notify, until));
                    return Verdict::Hold(Hold { until, kept: body.bytes.len(), when_full: body.when_full });
                }
                self.held_too_long(exchange)
            }
            Ok(outcome) => self.verdict(exchange, side, outcome),
            Err(why) => self.fail(exchange, why),
        };
        let mut body = bodies.side(side);
        part.chunk.bytes = body.take();
        if std::mem::take(&mut body.is_changed) {
            part.chunk.is_changed = true;
            if std::mem::replace(&mut self.has_changed[number_of(side)], true) {
                return verdict;
            }
            let whose = if side == Side::Request { "request" } else { "response" };
            exchange.note(&self.plugin.facts.name, format!("{whose}: changed the body"));
        }
        verdict
    }

    fn ask_part(
        &mut self,
        exchange: &mut Exchange,
        part: &mut Part<'_>,
        shown: Shown,
        bodies: &Arc<Bodies>,
    ) -> Asked {
        let side = part.side;
        if self.plugin.own_threads.get().is_some() {
            let (mut exchange, mut head) =
                (copy_of_exchange(exchange), part.head.as_ref().map(Head::copy_of_held));
            let (mut chunk, bodies) = (part.chunk.clone(), Arc::clone(bodies));
            return self.send(side, move |context| {
                let mut part = Part { side, head: head.as_mut().map(Head::held), chunk: &mut chunk };
                let outcome = context.enter(|instance, id| match shown {
                    Shown::Nothing => Ok(instance.part_resumed(id, &mut exchange, &mut part)),
                    shown => instance.part(id, &mut exchange, &mut part, shown == Shown::Trailers, &bodies),
                });
                Answer { outcome, notes: exchange.notes, head, chunk }
            });
        }
        let Place::Here(context) = &mut self.place else { return Asked::Now(Err(GONE)) };
        Asked::Now(context.enter(|instance, id| match shown {
            Shown::Nothing => Ok(instance.part_resumed(id, exchange, part)),
            shown => instance.part(id, exchange, part, shown == Shown::Trailers, bodies),
        }))
    }

    /// Has the guest called on the plugin's own threads.
    fn send(&mut self, side: Side, task: impl FnOnce(&mut Context) -> Answer + Send + 'static) -> Asked {
        let Some((context, lane)) = self.away() else { return Asked::Now(Err(GONE)) };
        let Some(threads) = self.plugin.own_threads.get() else { return Asked::Now(Err(GONE)) };
        let Some(call) = Call::send(threads, (lane, context), Arc::default(), task) else {
            self.plugin.facts.counters.hit(Limit::QueueFull);
            return Asked::Now(Err(FULL));
        };
        let over = call.over();
        self.calls[number_of(side)] = Some(call);
        Asked::Later(over)
    }

    /// Leaves the guest's context to the plugin's own threads, and tells whose lane it is.
    fn away(&mut self) -> Option<(Arc<Mutex<Context>>, usize)> {
        self.place = match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Here(context) => {
                Place::Away { lane: context.worker(), context: Arc::new(Mutex::new(context)) }
            }
            other => other,
        };
        match &self.place {
            Place::Away { lane, context } => Some((Arc::clone(context), *lane)),
            Place::Here(_) | Place::Nowhere => None,
        }
    }

    fn take_call(&mut self, side: Side) -> Option<Standing<Answer>> {
        let call = self.calls[number_of(side)].take()?;
        let standing = call.standing();
        if matches!(standing, Standing::UnderWay) {
            self.calls[number_of(side)] = Some(call);
        }
        Some(standing)
    }

    /// A call was asked for that has not come to anything.
    fn not_over(&mut self, side: Side, standing: Standing<Answer>) -> Asked {
        match (standing, &self.calls[number_of(side)]) {
            (Standing::UnderWay, Some(call)) => Asked::Later(call.over()),
            _ => {
                self.plugin.facts.counters.hit(Limit::QueueWait);
                Asked::Now(Err(TOO_LATE))
            }
        }
    }

    fn held_too_long(&mut self, exchange: &mut Exchange) -> Verdict {
        self.plugin.facts.counters.hit(Limit::Pause);
        self.fail(exchange, TOO_LONG)
    }

    /// Until when the guest may hold a side of which nothing more comes; `None` when that time is over.
    fn held_until(&mut self, side: Side) -> Option<Instant> {
        let pause_max = self.plugin.facts.environment.settings.pause_max;
        let until = *self.held_until[number_of(side)].get_or_insert_with(|| Instant::now() + pause_max);
        (Instant::now() < until).then_some(until)
    }

    fn verdict(&mut self, exchange: &mut Exchange, side: Side, outcome: Outcome) -> Verdict {
        self.held_until[number_of(side)] = None;
        match outcome {
            Outcome::Continue | Outcome::Paused(_) => Verdict::Continue,
            Outcome::Reset => Verdict::Reset,
            Outcome::Reply(reply) => {
                exchange.note(&self.plugin.facts.name, format!("answered {}", reply.status.as_u16()));
                Verdict::Reply(reply)
            }
            Outcome::Incomplete(name) => {
                tracing::warn!(plugin = %self.plugin.facts.name, header = name, "the plugin removed a header that is needed");
                let details = format!("filter_removed_required_headers{{{name}}}:{}", self.plugin.facts.name);
                Verdict::Reply(Box::new(LocalReply::text(StatusCode::SERVICE_UNAVAILABLE, "", details)))
            }
        }
    }

    /// Lets the exchange pass, or refuses it, as the plugin's fail strategy says.
    fn fail(&mut self, exchange: &mut Exchange, why: &'static str) -> Verdict {
        self.failed = true;
        self.plugin.facts.counters.failed_exchanges.fetch_add(1, Ordering::Relaxed);
        exchange.note(&self.plugin.facts.name, why);
        tracing::debug!(plugin = %self.plugin.facts.name, why, "the plugin failed an exchange");
        match self.plugin.fail_strategy {
            FailStrategy::Open => Verdict::Continue,
            FailStrategy::Close | FailStrategy::Reload => {
                Verdict::Reply(Box::new(LocalReply::text(StatusCode::SERVICE_UNAVAILABLE, "", FAILED)))
            }
        }
    }

    /// Closes the guest's context. An exchange that was answered before the plugin's turn gets one now, since plugins that
    /// keep an access log count it too (Envoy does the same).
    fn close(&mut self, exchange: Option<&mut Exchange>) {
        if let Some(bodies) = &self.bodies {
            for side in [Side::Request, Side::Response] {
                bodies.side(side).is_at_hand = false;
            }
        }
        let is_unseen = matches!(&self.place, Place::Here(context) if !context.is_open());
        let wants_log = self.plugin.module.exports.log && exchange.is_some() && !self.failed;
        if is_unseen && !wants_log {
            return;
        }
        if self.plugin.own_threads.get().is_some() {
            return self.close_away(exchange, is_unseen, wants_log);
        }
        if let Place::Here(context) = &mut self.place {
            context.close(exchange);
        }
        self.place = Place::Nowhere;
    }

    /// The same on the plugin's own threads, behind whatever still runs there. What the guest does then is noted nowhere.
    fn close_away(&mut self, exchange: Option<&mut Exchange>, is_unseen: bool, wants_log: bool) {
        for call in self.calls.iter().flatten() {
            // What runs is waited for in its lane.
            let _began = !call.withdraw();
        }
        let (Some((context, lane)), Some(threads)) = (self.away(), self.plugin.own_threads.get()) else {
            return;
        };
        let mut copy = exchange.map(|exchange| copy_of_exchange(exchange));
        let close = Box::new(move || {
            let mut context = context.lock();
            if wants_log || context.is_open() {
                context.close(copy.as_mut());
            }
        });
        // Of contexts that are open there is a bounded number.
        if !is_unseen {
            threads.push(lane, close);
        } else if !threads.offer(lane, close) {
            self.plugin.facts.counters.hit(Limit::QueueFull);
        }
        self.place = Place::Nowhere;
    }
}

/// Takes up what the guest made of a head elsewhere.
fn take_up_head(
    exchange: &mut Exchange,
    answer: Answer,
    phase: &mut Phase<'_>,
) -> Result<Outcome, &'static str> {
    take_notes(exchange, answer.notes);
    if let Some(head) = answer.head {
        head.put_back(phase);
    }
    answer.outcome
}

/// Takes up what the guest made of a part of a body elsewhere.
fn take_up_part(
    exchange: &mut Exchange,
    answer: Answer,
    part: &mut Part<'_>,
) -> Result<Outcome, &'static str> {
    take_notes(exchange, answer.notes);
    if let (Some(head), Some(held)) = (answer.head, &mut part.head) {
        head.put_back_held(held);
    }
    part.chunk.trailers = answer.chunk.trailers;
    answer.outcome
}

pub(super) fn take_notes(exchange: &mut Exchange, notes: Vec<Note>) {
    for note in notes {
        exchange.note(&note.filter, note.text);
    }
}

impl Filter for PluginFilter {
    fn request_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut RequestHead,
        end_of_stream: bool,
    ) -> Verdict {
        self.head(exchange, Phase::Request(head), end_of_stream)
    }

    fn response_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut ResponseHead,
        end_of_stream: bool,
    ) -> Verdict {
        self.head(exchange, Phase::Response(head), end_of_stream)
    }

    fn body(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.part(exchange, part, Shown::Body)
    }

    fn trailers(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.part(exchange, part, Shown::Trailers)
    }

    fn resumed(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.part(exchange, part, Shown::Nothing)
    }

    fn finish(&mut self, exchange: &mut Exchange) {
        self.close(Some(exchange));
    }
}

impl Drop for PluginFilter {
    /// An exchange whose task was dropped was never finished; its context must not stay in the guest.
    fn drop(&mut self) {
        let is_left = match &self.place {
            Place::Here(context) => context.is_open(),
            Place::Away { .. } => true,
            Place::Nowhere => false,
        };
        if is_left {
            self.close(None);
        }
    }
}
