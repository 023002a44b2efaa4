//! A plugin of type NETWORK: it sees the bytes of connections that carry no HTTP, and no exchange.

use super::Plugin;
use super::away::{Call, Standing, WAIT_MAX, copy_of_exchange};
use super::context::StreamState;
use super::filter::{FULL, GONE, TOO_LATE, take_notes};
use crate::bodies::Bodies;
use crate::instance::{Crash, Instance, Outcome};
use crate::metrics::Limit;
use bytes::Bytes;
use cairn_filter::{
    Closer, ConnectionFilter, Exchange, Factory, Filter, Note, Passage, Phases, Side, Wakers, append,
};
use cairn_mesh::FailStrategy;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The plugin in a chain.
pub(crate) struct ConnectionPluginFactory {
    plugin: Arc<Plugin>,
}

impl ConnectionPluginFactory {
    pub(crate) fn new(plugin: Arc<Plugin>) -> Self {
        Self { plugin }
    }
}

impl Factory for ConnectionPluginFactory {
    fn name(&self) -> &str {
        &self.plugin.facts.name
    }

    fn phases(&self) -> Phases {
        Phases::empty()
    }

    fn start(&self, _: &Exchange) -> Option<Box<dyn Filter>> {
        None
    }

    fn connect(&self, exchange: &Exchange, wakers: &Wakers) -> Option<Box<dyn ConnectionFilter>> {
        let (plugin, data) = (Arc::clone(&self.plugin), Arc::<Bodies>::default());
        let worker = match plugin.own_threads.get() {
            Some(threads) => threads.next_lane(),
            None => exchange.connection.worker,
        };
        let context = ConnectionContext {
            plugin: Arc::clone(&plugin),
            worker,
            stream: StreamState::None,
            data: Arc::clone(&data),
            wakers: wakers.clone(),
        };
        Some(Box::new(PluginConnection {
            plugin,
            place: Place::Here(context),
            ways: Default::default(),
            data,
            wakers: wakers.clone(),
            is_told: false,
            failed: false,
        }))
    }
}

/// The plugin at work on one connection.
struct PluginConnection {
    plugin: Arc<Plugin>,
    place: Place,
    /// What the client sends, and what the server does.
    ways: [Way; 2],
    /// What the guest is shown, and holds.
    data: Arc<Bodies>,
    wakers: Wakers,
    /// The guest was told of the connection.
    is_told: bool,
    /// The plugin failed this connection and takes no further part in it.
    failed: bool,
}

/// Where the guest's context for the connection is.
enum Place {
    /// With the connection's task, which enters it.
    Here(ConnectionContext),
    /// With the plugin's own threads, which do, in the lane of its instance.
    Away { lane: usize, context: Arc<Mutex<ConnectionContext>> },
    /// The connection is over.
    Nowhere,
}

/// What goes one way, as far as it is here.
#[derive(Default)]
struct Way {
    /// A call under way on the plugin's own threads.
    call: Option<Arc<Call<ConnectionContext, Told>>>,
    /// The guest holds what it was shown.
    is_held: bool,
    /// What came while a call was under way, and whether that is all.
    next: Bytes,
    is_last: bool,
    /// What the guest let pass, and waits for the rest.
    passed: Bytes,
}

/// What the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// That the connection is here.
    Connection,
    /// What is there of a side.
    Data { end: bool },
    /// Nothing new: it may have let go of what it holds.
    Nothing,
}

/// What came of that.
struct Told {
    outcome: Result<Outcome, &'static str>,
    /// What it lets pass.
    passed: Bytes,
    /// What is to be noted of it.
    notes: Vec<Note>,
    /// How often the stream had been woken before ([`Bodies::wakes`]).
    wakes: u64,
}

/// Why a connection failed that nobody let go.
const TOO_LONG: &str = "it held the connection for too long";

/// The guest's context for one connection, and the way into the instance that it is in.
struct ConnectionContext {
    plugin: Arc<Plugin>,
    worker: usize,
    stream: StreamState,
    data: Arc<Bodies>,
    wakers: Wakers,
}

impl ConnectionContext {
    /// Enters the guest's context for the connection. Runs guest code, and waits for nothing else.
    ///
    /// # Errors
    /// Why the plugin failed the connection.
    fn enter<T>(
        &mut self,
        run: impl FnOnce(&mut Instance, u32) -> Result<T, Crash>,
    ) -> Result<T, &'static str> {
        let plugin = Arc::clone(&self.plugin);
        let slot = plugin.slot(self.worker).ok_or("the plugin is not running")?;
        let mut slot = slot.lock();
        let generation = slot.generation;
        let instance = slot.ready(&plugin, self.worker).ok_or("the plugin is not running")?;
        let result = match self.stream {
            StreamState::Open { generation: ours, .. } if ours != generation => {
                return Err("the plugin crashed in another connection");
            }
            StreamState::Open { context, .. } => run(instance, context),
            StreamState::Closed => return Err("the connection is over"),
            StreamState::None => match instance.open_connection(&self.data, &self.wakers) {
                Ok(Some(context)) => {
                    self.stream = StreamState::Open { generation, context };
                    run(instance, context)
                }
                Ok(None) => return Err("the plugin has too many streams"),
                Err(crash) => Err(crash),
            },
        };
        match result {
            Ok(result) => {
                plugin.run_errands(&mut slot, self.worker);
                Ok(result)
            }
            Err(crash) => {
                plugin.crashed(&mut slot, self.worker, &crash);
                Err("the plugin crashed")
            }
        }
    }

    fn tell(&mut self, exchange: &mut Exchange, side: Side, shown: Shown, is_held: bool) -> Told {
        let data = Arc::clone(&self.data);
        let wakes = data.wakes.load(Ordering::Acquire);
        let outcome = self.enter(|instance, context| match shown {
            Shown::Connection => instance.new_connection(context, exchange),
            Shown::Data { end } => instance.connection_data(context, exchange, (side, end), &data),
            Shown::Nothing => Ok(instance.connection_woken(context, side, is_held)),
        });
        let passes = matches!(outcome, Ok(Outcome::Continue));
        let passed = if passes { data.side(side).take() } else { Bytes::new() };
        Told { outcome, passed, notes: Vec::new(), wakes }
    }

    /// Closes the guest's context, if there is one; without an exchange the guest logs nothing.
    fn close(&mut self, ended: Option<(&mut Exchange, Closer)>) {
        if matches!(self.stream, StreamState::Open { .. }) {
            // A crash has been logged; there is nobody left to refuse.
            let _crashed = self.enter(|instance, context| match ended {
                Some((exchange, by)) => instance.connection_closed(context, exchange, by),
                None => instance.close(context, None),
            });
        }
        self.stream = StreamState::Closed;
    }
}

impl PluginConnection {
    fn way(&mut self, side: Side) -> &mut Way {
        let [request, response] = &mut self.ways;
        match side {
            Side::Request => request,
            Side::Response => response,
        }
    }

    /// Tells the guest something of a side, unless a call is under way about it, and says what becomes of the side.
    fn tell(&mut self, exchange: &mut Exchange, side: Side, shown: Shown) -> Passage {
        if self.plugin.own_threads.get().is_some() {
            return self.tell_away(exchange, side, shown);
        }
        let is_held = self.way(side).is_held;
        let Place::Here(context) = &mut self.place else { return self.fail(side, GONE) };
        let told = context.tell(exchange, side, shown, is_held);
        match self.take_up(side, told) {
            Ok(_) => self.passage(side),
            Err(end) => end,
        }
    }

    /// The same on the plugin's own threads. What comes meanwhile waits until the guest is done with what was before it.
    fn tell_away(&mut self, exchange: &mut Exchange, side: Side, shown: Shown) -> Passage {
        let mut shown = Some(shown);
        if let Some(standing) = self.take_call(side) {
            match standing {
                Standing::UnderWay => return self.under_way(side),
                Standing::Withdrawn => {
                    self.plugin.facts.counters.hit(Limit::QueueWait);
                    return self.fail(side, TOO_LATE);
                }
                Standing::Over(mut told) => {
                    take_notes(exchange, std::mem::take(&mut told.notes));
                    let is_old = match self.take_up(side, *told) {
                        Ok(is_old) => is_old,
                        Err(end) => return end,
                    };
                    // What was asked is answered, unless the guest was woken since.
                    shown =
                        shown.filter(|shown| *shown != Shown::Nothing).or(is_old.then_some(Shown::Nothing));
                }
            }
        }
        let way = self.way(side);
        if way.is_last || !way.next.is_empty() {
            let (bytes, end) = (std::mem::take(&mut way.next), std::mem::take(&mut way.is_last));
            append(&mut self.data.side(side).bytes, bytes);
            shown = Some(Shown::Data { end });
        }
        let Some(shown) = shown else { return self.passage(side) };
        if let Err(why) = self.send(exchange, side, shown) {
            return self.fail(side, why);
        }
        let way = self.way(side);
        // The end goes with the last of what passes, and is not to be taken for that of what passes before.
        match shown {
            Shown::Data { end: false } if !way.passed.is_empty() => {
                Passage::Pass(std::mem::take(&mut way.passed))
            }
            _ => self.under_way(side),
        }
    }

    /// # Errors
    /// Why it cannot be.
    fn send(&mut self, exchange: &Exchange, side: Side, shown: Shown) -> Result<(), &'static str> {
        let is_held = self.way(side).is_held;
        let (over, mut exchange) = (Arc::clone(self.wakers.of(side)), copy_of_exchange(exchange));
        let at = self.away().ok_or(GONE)?;
        let threads = self.plugin.own_threads.get().ok_or(GONE)?;
        let call = Call::send(threads, at, over, move |context: &mut ConnectionContext| {
            let told = context.tell(&mut exchange, side, shown, is_held);
            Told { notes: exchange.notes, ..told }
        });
        if call.is_none() {
            self.plugin.facts.counters.hit(Limit::QueueFull);
        }
        self.way(side).call = Some(call.ok_or(FULL)?);
        Ok(())
    }

    /// Leaves the guest's context to the plugin's own threads, and tells whose lane it is.
    fn away(&mut self) -> Option<(usize, Arc<Mutex<ConnectionContext>>)> {
        self.place = match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Here(context) => {
                Place::Away { lane: context.worker, context: Arc::new(Mutex::new(context)) }
            }
            other => other,
        };
        match &self.place {
            Place::Away { lane, context } => Some((*lane, Arc::clone(context))),
            Place::Here(_) | Place::Nowhere => None,
        }
    }

    fn take_call(&mut self, side: Side) -> Option<Standing<Told>> {
        let way = self.way(side);
        let call = way.call.take()?;
        let standing = call.standing();
        if matches!(standing, Standing::UnderWay) {
            way.call = Some(call);
        }
        Some(standing)
    }

    /// Takes up what came of telling the guest something; true when it may be another by now.
    ///
    /// # Errors
    /// With the end of the connection, or of the plugin's part in it.
    fn take_up(&mut self, side: Side, told: Told) -> Result<bool, Passage> {
        match told.outcome {
            Ok(Outcome::Continue) => {
                let way = self.way(side);
                way.is_held = false;
                append(&mut way.passed, told.passed);
                Ok(false)
            }
            Ok(Outcome::Paused(_)) => {
                self.way(side).is_held = true;
                Ok(self.data.wakes.load(Ordering::Acquire) != told.wakes)
            }
            Ok(Outcome::Reset | Outcome::Reply(_) | Outcome::Incomplete(_)) => {
                Err(Passage::Close(format!("plugin {} closed the connection", self.plugin.facts.name)))
            }
            Err(why) => Err(self.fail(side, why)),
        }
    }

    /// What becomes of a side about which no call is under way.
    fn passage(&mut self, side: Side) -> Passage {
        if self.way(side).is_held {
            return self.hold(side, self.plugin.facts.environment.settings.pause_max);
        }
        Passage::Pass(std::mem::take(&mut self.way(side).passed))
    }

    /// What becomes of one about which a call is: the call ends by itself, or is withdrawn in time.
    fn under_way(&mut self, side: Side) -> Passage {
        let pause_max = self.plugin.facts.environment.settings.pause_max;
        self.hold(side, pause_max + WAIT_MAX + self.plugin.facts.deadline * 2)
    }

    fn hold(&mut self, side: Side, patience: Duration) -> Passage {
        let shown = self.data.side(side).bytes.len();
        let way = self.way(side);
        Passage::Hold { kept: shown + way.next.len() + way.passed.len(), patience }
    }

    /// Lets the connection pass, or ends it, as the plugin's fail strategy says.
    fn fail(&mut self, side: Side, why: &'static str) -> Passage {
        self.failed = true;
        self.plugin.facts.counters.failed_exchanges.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(plugin = %self.plugin.facts.name, why, "the plugin failed a connection");
        // What it holds of the other side goes on as well.
        for side in [Side::Request, Side::Response] {
            self.wakers.of(side).notify_one();
        }
        match self.plugin.fail_strategy {
            FailStrategy::Open => self.released(side),
            FailStrategy::Close | FailStrategy::Reload => {
                // What it failed over goes nowhere.
                self.data.side(side).take();
                Passage::Close(format!("plugin {}: {why}", self.plugin.facts.name))
            }
        }
    }

    /// All that is here of a side, once the plugin has failed. A call that runs has it until it is over.
    fn released(&mut self, side: Side) -> Passage {
        let call = self.way(side).call.take().filter(|call| !call.withdraw());
        if let Some(call) = call {
            match call.standing() {
                Standing::Over(told) => append(&mut self.way(side).passed, told.passed),
                Standing::Withdrawn => {}
                Standing::UnderWay => {
                    self.way(side).call = Some(call);
                    return self.under_way(side);
                }
            }
        }
        let shown = self.data.side(side).take();
        let way = self.way(side);
        let next = std::mem::take(&mut way.next);
        append(&mut way.passed, shown);
        append(&mut way.passed, next);
        Passage::Pass(std::mem::take(&mut way.passed))
    }

    /// Ends the guest's context, here or behind whatever still runs on the plugin's own threads.
    fn close(&mut self, ended: Option<(&mut Exchange, Closer)>) {
        for call in self.ways.iter().filter_map(|way| way.call.as_ref()) {
            // What runs is waited for in its lane.
            let _began = !call.withdraw();
        }
        let is_unseen = match &self.place {
            Place::Here(context) => !matches!(context.stream, StreamState::Open { .. }),
            Place::Away { .. } => false,
            Place::Nowhere => true,
        };
        if !is_unseen && self.plugin.own_threads.get().is_some() {
            if let (Some((lane, context)), Some(threads)) = (self.away(), self.plugin.own_threads.get()) {
                let mut copy = ended.map(|(exchange, by)| (copy_of_exchange(exchange), by));
                // Of connections that are open there is a bounded number.
                let close = move || context.lock().close(copy.as_mut().map(|(exchange, by)| (exchange, *by)));
                threads.push(lane, Box::new(close));
            }
        } else if let Place::Here(context) = &mut self.place {
            context.close(ended);
        }
        self.place = Place::Nowhere;
    }
}

impl ConnectionFilter for PluginConnection {
    fn opened(&mut self, exchange: &mut Exchange) -> Passage {
        if self.failed {
            return self.released(Side::Request);
        }
        let is_told = std::mem::replace(&mut self.is_told, true);
        self.tell(exchange, Side::Request, if is_told { Shown::Nothing } else { Shown::Connection })
    }

    fn data(&mut self, exchange: &mut Exchange, side: Side, bytes: Bytes, end: bool) -> Passage {
        let is_away = self.plugin.own_threads.get().is_some();
        if self.failed || is_away {
            let way = self.way(side);
            append(&mut way.next, bytes);
            way.is_last |= end;
        } else {
            append(&mut self.data.side(side).bytes, bytes);
        }
        if self.failed { self.released(side) } else { self.tell(exchange, side, Shown::Data { end }) }
    }

    fn woken(&mut self, exchange: &mut Exchange, side: Side) -> Passage {
        if self.failed { self.released(side) } else { self.tell(exchange, side, Shown::Nothing) }
    }

    fn overdue(&mut self, _: &mut Exchange, side: Side) -> Passage {
        self.fail(side, TOO_LONG)
    }

    fn closed(&mut self, exchange: &mut Exchange, by: Closer) {
        self.close(Some((exchange, by)));
    }
}

impl Drop for PluginConnection {
    /// A connection whose task was dropped was never closed; its context must not stay in the guest.
    fn drop(&mut self) {
        self.close(None);
    }
}
