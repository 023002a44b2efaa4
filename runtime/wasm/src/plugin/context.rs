//! The guest's context for one exchange, and the way into the instance that it is in.

use super::Plugin;
use super::own::Own;
use crate::instance::{Crash, Instance, Outcome};
use crate::metrics::Limit;
use cairn_filter::Exchange;
use std::sync::Arc;

/// One exchange's place in a plugin.
pub(super) struct Context {
    plugin: Arc<Plugin>,
    pub(super) worker: usize,
    pub(super) stream: StreamState,
    /// The exchange's own instance, if it has one.
    pub(super) own: Option<Arc<Own>>,
}

/// The guest's context for the exchange.
#[derive(Clone, Copy)]
pub(super) enum StreamState {
    /// There is none yet.
    None,
    Open {
        generation: u64,
        context: u32,
    },
    /// It was closed.
    Closed,
}

impl Context {
    /// None yet, in the instance of this worker.
    pub(super) fn new(plugin: Arc<Plugin>, worker: usize) -> Self {
        Self { plugin, worker, stream: StreamState::None, own: None }
    }

    /// The place of its instance.
    pub(super) fn worker(&self) -> usize {
        self.worker
    }

    /// Whether the guest has a context that is to be closed.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.stream, StreamState::Open { .. })
    }

    /// Enters the guest's context for the exchange. Runs guest code, and waits for nothing else.
    ///
    /// # Errors
    /// Why the plugin failed the exchange.
    pub(super) fn enter(
        &mut self,
        run: impl FnOnce(&mut Instance, u32) -> Result<Outcome, Crash>,
    ) -> Result<Outcome, &'static str> {
        let plugin = Arc::clone(&self.plugin);
        if let Some(clones) = &plugin.clones {
            return self.enter_own(&plugin, clones, run);
        }
        let Some(slot) = plugin.slot(self.worker) else { return Ok(Outcome::Continue) };
        let mut slot = slot.lock();
        let generation = slot.generation;
        let Some(instance) = slot.ready(&plugin, self.worker) else {
            return Err("the plugin is not running");
        };
        let outcome = match self.stream {
            StreamState::Open { generation: ours, .. } if ours != generation => {
                return Err("the plugin crashed in another exchange");
            }
            StreamState::Open { context, .. } => run(instance, context),
            StreamState::Closed => return Ok(Outcome::Continue),
            StreamState::None => match instance.open() {
                Ok(Some(context)) => {
                    self.stream = StreamState::Open { generation, context };
                    run(instance, context)
                }
                Ok(None) => {
                    plugin.facts.counters.hit(Limit::Streams);
                    return Err("the plugin has too many streams");
                }
                Err(crash) => Err(crash),
            },
        };
        match outcome {
            Ok(outcome) => {
                plugin.run_errands(&mut slot, self.worker);
                Ok(outcome)
            }
            Err(crash) => {
                plugin.crashed(&mut slot, self.worker, &crash);
                Err("the plugin crashed")
            }
        }
    }

    /// Closes the guest's context; one that was never opened is opened first. Without an exchange the guest logs nothing.
    pub(super) fn close(&mut self, exchange: Option<&mut Exchange>) {
        let plugin = Arc::clone(&self.plugin);
        if let Some(clones) = &plugin.clones {
            return self.close_own(&plugin, clones, exchange);
        }
        let Some(slot) = plugin.slot(self.worker) else { return };
        let mut slot = slot.lock();
        let generation = slot.generation;
        let Some(instance) = slot.instance.as_deref_mut() else { return };
        let closed = match std::mem::replace(&mut self.stream, StreamState::Closed) {
            StreamState::Open { generation: ours, context } if ours == generation => {
                instance.close(context, exchange)
            }
            StreamState::None => instance.open().and_then(|context| match context {
                Some(context) => instance.close(context, exchange),
                None => Ok(()),
            }),
            StreamState::Open { .. } | StreamState::Closed => Ok(()),
        };
        if let Err(crash) = closed {
            plugin.crashed(&mut slot, self.worker, &crash);
        }
        plugin.run_errands(&mut slot, self.worker);
    }
}
