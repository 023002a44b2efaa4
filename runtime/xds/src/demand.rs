//! What is asked of the control plane by name, by a process that does not follow the whole mesh.
//!
//! Connections ask ([`Demand::ask`]) and wait; the session's loop sends what is asked and says what was answered. What is
//! there is remembered by the mesh itself; what is not is remembered here for a while, while the control plane tells if it
//! comes to be.

use cairn_mesh::{Snapshot, Wanted};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// How long an answer is waited for; a ztunnel waits for ever.
pub const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// At most so many names wait for their answer.
const WAITING_MAX: usize = 4096;
/// How long the absence of something is remembered.
const ABSENT_FOR: Duration = Duration::from_secs(300);
/// At most so many absences are remembered.
const ABSENT_MAX: usize = 4096;
/// What the session's loop has not yet sent; every name that waits has room, and as many are given up.
const ORDERS_MAX: usize = WAITING_MAX + ABSENT_MAX;

/// Why it is not known what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DemandError {
    /// The control plane did not answer.
    #[error("the control plane did not answer within {0:?}")]
    Unanswered(Duration),
    /// Too many ask.
    #[error("too many names wait for the control plane")]
    Full,
}

/// What the session's loop is to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Ask for this.
    Ask(Wanted),
    /// It is of no interest any more.
    GiveUp(Wanted),
}

/// What is asked for, and what came of it.
pub(crate) struct Demand {
    orders: mpsc::Sender<Order>,
    received: Mutex<Option<mpsc::Receiver<Order>>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By name. The sender says that it is answered.
    waiting: HashMap<String, (Wanted, watch::Sender<bool>)>,
    /// Until when each is held to be absent.
    absent: HashMap<String, (Wanted, Instant)>,
    /// The same in the order of their ends. An entry may be older than what `absent` says of its name.
    ends: VecDeque<(Instant, String)>,
}

impl Demand {
    pub(crate) fn new() -> Self {
        let (orders, received) = mpsc::channel(ORDERS_MAX);
        Self { orders, received: Mutex::new(Some(received)), state: Mutex::default() }
    }

    /// What the session's loop is to send. The first who takes it has it.
    pub(crate) fn orders(&self) -> Option<mpsc::Receiver<Order>> {
        self.received.lock().take()
    }

    /// Asks for something, unless it is known not to be there.
    pub(crate) async fn ask(&self, wanted: &Wanted) -> Result<(), DemandError> {
        let Some(mut answered) = self.begin(wanted, Instant::now())? else { return Ok(()) };
        let answer = tokio::time::timeout(ANSWER_WAIT, answered.wait_for(|answered| *answered)).await;
        if matches!(answer, Ok(Ok(_))) {
            return Ok(());
        }
        drop(answer);
        drop(answered);
        self.leave(wanted);
        Err(DemandError::Unanswered(ANSWER_WAIT))
    }

    /// Asks; `None` when nothing is to be waited for.
    pub(crate) fn begin(
        &self,
        wanted: &Wanted,
        now: Instant,
    ) -> Result<Option<watch::Receiver<bool>>, DemandError> {
        let name = wanted.to_string();
        let mut state = self.state.lock();
        if state.absent.get(&name).is_some_and(|(_, until)| *until > now) {
            return Ok(None);
        }
        if let Some((_, answer)) = state.waiting.get(&name) {
            return Ok(Some(answer.subscribe()));
        }
        if state.waiting.len() >= WAITING_MAX {
            return Err(DemandError::Full);
        }
        self.orders.try_send(Order::Ask(wanted.clone())).map_err(|_| DemandError::Full)?;
        let (answer, answered) = watch::channel(false);
        state.waiting.insert(name, (wanted.clone(), answer));
        Ok(Some(answered))
    }

    /// Nobody waits for it any more, unless somebody else does.
    fn leave(&self, wanted: &Wanted) {
        let name = wanted.to_string();
        let mut state = self.state.lock();
        if state.waiting.get(&name).is_some_and(|(_, answer)| answer.receiver_count() == 0) {
            state.waiting.remove(&name);
            // Without room the control plane goes on telling, which does no harm.
            let _no_room = self.orders.try_send(Order::GiveUp(wanted.clone()));
        }
    }

    /// A new connection: the names that wait, for it to be asked for. Of what is absent it is not told when it comes to be,
    /// so that is forgotten.
    pub(crate) fn reconnected(&self) -> Vec<String> {
        let mut state = self.state.lock();
        state.absent.clear();
        state.ends.clear();
        state.waiting.keys().cloned().collect()
    }

    /// The control plane has said what there is by this name, if anything.
    pub(crate) fn answered(&self, name: &str, is_there: bool, now: Instant) {
        let mut state = self.state.lock();
        let waiting = state.waiting.remove(name);
        if is_there {
            state.absent.remove(name);
        } else if let Some((wanted, _)) = &waiting {
            let until = now + ABSENT_FOR;
            state.absent.insert(name.to_owned(), (wanted.clone(), until));
            state.ends.push_back((until, name.to_owned()));
        }
        if let Some((_, answer)) = waiting {
            answer.send_replace(true);
        }
    }

    /// Forgets absences whose time has come, and the oldest of too many. Those that have come to be are no longer absent,
    /// and stay subscribed.
    pub(crate) fn expire(&self, snapshot: &Snapshot, now: Instant) {
        let mut state = self.state.lock();
        let State { waiting, absent, ends } = &mut *state;
        while ends.front().is_some_and(|(until, _)| *until <= now) || ends.len() > ABSENT_MAX {
            let Some((until, name)) = ends.pop_front() else { return };
            let Some((wanted, last)) = absent.get(&name) else { continue };
            if *last != until {
                continue;
            }
            if !wanted.is_known(snapshot) && !waiting.contains_key(&name) {
                // Without room the control plane goes on telling, which does no harm.
                let _no_room = self.orders.try_send(Order::GiveUp(wanted.clone()));
            }
            absent.remove(&name);
        }
    }
}

#[cfg(test)]
#[path = "demand/tests.rs"]
mod tests;
