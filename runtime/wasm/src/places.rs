//! Where plugins do what outlasts a callback: timers, and calls to other services.

use cairn_filter::{Callout, NoCallout};
use parking_lot::Mutex;
use std::sync::Arc;
use std::thread::Builder;
use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;

/// Where one worker's plugins do what outlasts a callback.
#[derive(Clone, Debug)]
pub struct WorkerPlace {
    /// The worker's own runtime, on which guests are entered.
    pub runtime: Handle,
    /// How plugins ask other services when no exchange is at hand.
    pub callout: Arc<dyn Callout>,
}

/// All places, and a thread for workers that have none.
#[derive(Default)]
pub(crate) struct Places {
    given: Vec<WorkerPlace>,
    own: Mutex<Option<Own>>,
}

/// A thread with a runtime; it ends when this is dropped.
struct Own {
    runtime: Handle,
    _ends_when_dropped: oneshot::Sender<()>,
}

impl Places {
    pub(crate) fn new(given: Vec<WorkerPlace>) -> Self {
        Self { given, own: Mutex::default() }
    }

    /// How the plugins of a worker ask when no exchange is at hand.
    pub(crate) fn callout(&self, worker: usize) -> Arc<dyn Callout> {
        match self.place(worker) {
            Some(place) => Arc::clone(&place.callout),
            None => Arc::new(NoCallout),
        }
    }

    /// The runtime of a worker.
    ///
    /// # Errors
    /// When it has none and the system refuses a thread for it.
    pub(crate) fn runtime(&self, worker: usize) -> std::io::Result<Handle> {
        if let Some(place) = self.place(worker) {
            return Ok(place.runtime.clone());
        }
        let mut own = self.own.lock();
        if let Some(own) = &*own {
            return Ok(own.runtime.clone());
        }
        let started = start()?;
        Ok(own.insert(started).runtime.clone())
    }

    fn place(&self, worker: usize) -> Option<&WorkerPlace> {
        self.given.get(worker % self.given.len().max(1))
    }
}

fn start() -> std::io::Result<Own> {
    let runtime = runtime::Builder::new_current_thread().enable_time().build()?;
    let handle = runtime.handle().clone();
    let (ends_when_dropped, end) = oneshot::channel::<()>();
    // Nothing is ever sent: the channel closes.
    let work = move || drop(runtime.block_on(end));
    Builder::new().name("wasm-worker".into()).spawn(work)?;
    Ok(Own { runtime: handle, _ends_when_dropped: ends_when_dropped })
}
