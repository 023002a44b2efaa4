//! A plugin of type NETWORK: it sees the bytes of connections that carry no HTTP, and no exchange.

use super::Plugin;
use crate::bodies::Bodies;
use crate::instance::{Crash, Instance, Outcome};
use bytes::Bytes;
use cairn_filter::{
    Closer, ConnectionFilter, Exchange, Factory, Filter, Passage, Phases, Side, Wakers, append,
};
use cairn_mesh::FailStrategy;
use std::sync::Arc;
use std::sync::atomic::Ordering;

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
        Some(Box::new(PluginConnection {
            plugin: Arc::clone(&self.plugin),
            worker: exchange.connection.worker,
            stream: StreamState::None,
            data: Arc::default(),
            wakers: wakers.clone(),
            is_told: false,
            is_held: [false; 2],
            failed: false,
        }))
    }
}

/// The plugin at work on one connection.
struct PluginConnection {
    plugin: Arc<Plugin>,
    worker: usize,
    stream: StreamState,
    /// What the guest is shown, and holds.
    data: Arc<Bodies>,
    wakers: Wakers,
    /// The guest was told of the connection.
    is_told: bool,
    /// The guest holds what the client, or what the server sent.
    is_held: [bool; 2],
    /// The plugin failed this connection and takes no further part in it.
    failed: bool,
}

/// The guest's context for the connection.
#[derive(Clone, Copy)]
enum StreamState {
    /// There is none yet.
    None,
    Open {
        generation: u64,
        context: u32,
    },
    /// It was closed.
    Closed,
}

/// Why a connection failed that nobody let go.
const TOO_LONG: &str = "it held the connection for too long";

impl PluginConnection {
    /// Enters the guest's context for the connection.
    ///
    /// # Errors
    /// Why the plugin failed the connection.
    fn with_guest<T>(
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

    /// What becomes of what the guest was shown of a side.
    fn passage(&mut self, side: Side, outcome: Result<Outcome, &'static str>) -> Passage {
        let is_held = matches!(outcome, Ok(Outcome::Paused(_)));
        self.is_held[crate::state::number_of(side)] = is_held;
        match outcome {
            Ok(Outcome::Continue) => Passage::Pass(self.data.side(side).take()),
            Ok(Outcome::Paused(_)) => {
                let patience = self.plugin.facts.environment.settings.pause_max;
                Passage::Hold { kept: self.data.side(side).bytes.len(), patience }
            }
            Ok(Outcome::Reset | Outcome::Reply(_) | Outcome::Incomplete(_)) => {
                Passage::Close(format!("plugin {} closed the connection", self.plugin.facts.name))
            }
            Err(why) => self.fail(side, why),
        }
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
            FailStrategy::Open => Passage::Pass(self.data.side(side).take()),
            FailStrategy::Close | FailStrategy::Reload => {
                Passage::Close(format!("plugin {}: {why}", self.plugin.facts.name))
            }
        }
    }
}

impl ConnectionFilter for PluginConnection {
    fn opened(&mut self, exchange: &mut Exchange) -> Passage {
        if self.failed {
            return Passage::Pass(Bytes::new());
        }
        let is_told = std::mem::replace(&mut self.is_told, true);
        let outcome = self.with_guest(|instance, context| match is_told {
            true => Ok(instance.connection_woken(context, Side::Request, true)),
            false => instance.new_connection(context, exchange),
        });
        self.passage(Side::Request, outcome)
    }

    fn data(&mut self, exchange: &mut Exchange, side: Side, bytes: Bytes, end: bool) -> Passage {
        if self.failed {
            return Passage::Pass(bytes);
        }
        let data = Arc::clone(&self.data);
        append(&mut data.side(side).bytes, bytes);
        let outcome = self
            .with_guest(|instance, context| instance.connection_data(context, exchange, (side, end), &data));
        self.passage(side, outcome)
    }

    fn woken(&mut self, _: &mut Exchange, side: Side) -> Passage {
        if self.failed {
            return Passage::Pass(self.data.side(side).take());
        }
        let is_held = self.is_held[crate::state::number_of(side)];
        let outcome =
            self.with_guest(|instance, context| Ok(instance.connection_woken(context, side, is_held)));
        self.passage(side, outcome)
    }

    fn overdue(&mut self, _: &mut Exchange, side: Side) -> Passage {
        self.fail(side, TOO_LONG)
    }

    fn closed(&mut self, exchange: &mut Exchange, by: Closer) {
        let was_open = matches!(self.stream, StreamState::Open { .. });
        if was_open {
            // A crash has been logged; there is nobody left to refuse.
            let _crashed =
                self.with_guest(|instance, context| instance.connection_closed(context, exchange, by));
        }
        self.stream = StreamState::Closed;
    }
}

impl Drop for PluginConnection {
    /// A connection whose task was dropped was never closed; its context must not stay in the guest.
    fn drop(&mut self) {
        if matches!(self.stream, StreamState::Open { .. }) {
            let _crashed = self.with_guest(|instance, context| instance.close(context, None));
        }
    }
}
