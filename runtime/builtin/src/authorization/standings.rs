//! What is remembered of open connections between their requests.

use super::{Authorizer, ConnectionFacts, Standing};
use cairn_filter::Connection;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The standings of connections that are open, found again for each of their requests. What is not here is settled
/// anew, so it may forget.
pub(crate) struct Standings {
    /// By worker, so that workers do not wait for each other; workers beyond share.
    workers: Box<[Mutex<Vec<Slot>>]>,
}

/// How many workers have standings of their own.
const WORKERS: usize = 64;

/// How many connections of one worker are remembered: a power of two that covers what is busy at one time.
const CONNECTIONS: u64 = 128;

/// A connection and its standing. Its address cannot be another's as long as the `Weak` lives.
type Slot = Option<(Weak<Connection>, Arc<Standing>)>;

impl Standings {
    pub(crate) fn new() -> Self {
        Self { workers: (0..WORKERS).map(|_| Mutex::new(Vec::new())).collect() }
    }

    /// What `authorizer` left of the connection.
    pub(crate) fn of(&self, connection: &Arc<Connection>, authorizer: &Authorizer) -> Arc<Standing> {
        let settle = || Arc::new(authorizer.settle(ConnectionFacts::of(connection)));
        let Some(slots) = self.workers.get(connection.worker % WORKERS) else { return settle() };
        let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.is_empty() {
            slots.resize_with(CONNECTIONS as usize, || None);
        }
        let Some(slot) = slots.get_mut((connection.id % CONNECTIONS) as usize) else { return settle() };
        match slot {
            Some((known, standing)) if std::ptr::eq(known.as_ptr(), Arc::as_ptr(connection)) => {
                Arc::clone(standing)
            }
            _ => {
                let standing = settle();
                *slot = Some((Arc::downgrade(connection), Arc::clone(&standing)));
                standing
            }
        }
    }
}
