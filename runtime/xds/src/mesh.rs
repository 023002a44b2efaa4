//! The mesh as one process knows it: the current snapshot for readers, and the one writer behind it.

use crate::counts::Counts;
use crate::demand::{Demand, DemandError};
use crate::gate::{Gate, Publish};
use crate::session::{Problem, Received};
use arc_swap::ArcSwap;
use cairn_mesh::{Change, MeshSettings, Snapshot, Store, Wanted};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;
use tracing::{info, warn};

/// How long a workload keeps its previous policies while a policy that it names is not known.
pub const POLICY_WAIT: Duration = Duration::from_secs(5);
/// States that were replaced are kept, at most so many, until only their writer has them: the last to let go of a large one
/// frees it, which takes milliseconds, and a worker has none to spare.
const RETIRED_MAX: usize = 16;
/// How often it is looked whether somebody else still has them.
const RETIRED_LOOK: Duration = Duration::from_secs(1);
/// At most so many problems are kept for the operator; further ones are only logged.
const PROBLEMS_MAX: usize = 1000;

/// The current state of the mesh, shared by the one that writes it and all who read it.
pub struct Mesh {
    snapshot: ArcSwap<Snapshot>,
    changes: watch::Sender<u64>,
    ready: watch::Sender<bool>,
    problems: Mutex<BTreeMap<(Arc<str>, String), Problem>>,
    settings: MeshSettings,
    counts: Counts,
    /// When what is shown was written to disk, while no control plane has confirmed it.
    restored: Mutex<Option<SystemTime>>,
    /// When the state was last kept on disk.
    kept: Mutex<Option<SystemTime>>,
    /// Workloads and services are asked for by name.
    demand: Option<Demand>,
}

impl Mesh {
    /// An empty mesh that is not ready.
    pub fn new() -> Arc<Self> {
        Self::with(MeshSettings::default(), None)
    }

    /// An empty mesh that is not ready. These are its settings, unless the control plane sends others.
    pub fn with_settings(settings: MeshSettings) -> Arc<Self> {
        Self::with(settings, None)
    }

    /// The same, of which only policies are followed: workloads and services are known when they were asked for
    /// ([`Self::ask`]).
    pub fn on_demand(settings: MeshSettings) -> Arc<Self> {
        Self::with(settings, Some(Demand::new()))
    }

    fn with(settings: MeshSettings, demand: Option<Demand>) -> Arc<Self> {
        Arc::new(Self {
            demand,
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            changes: watch::Sender::new(0),
            ready: watch::Sender::new(false),
            problems: Mutex::new(BTreeMap::new()),
            settings,
            counts: Counts::default(),
            restored: Mutex::new(None),
            kept: Mutex::new(None),
        })
    }

    /// The state now. Take it once per decision.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Tells of every publication, by its generation. Publications that follow each other quickly are told once.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Waits until the first full state of every type has been published.
    pub async fn ready(&self) {
        // An error would mean that the sender is gone, which `self` holds.
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// Whether the first full state has been published.
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Whether workloads and services are known only when they were asked for.
    pub fn is_on_demand(&self) -> bool {
        self.demand.is_some()
    }

    /// Asks the control plane for something that is not known, and waits until it has said what there is. Then it is known,
    /// or is not there. Of a mesh that is followed whole there is nothing to ask.
    ///
    /// # Errors
    /// When the control plane does not answer in time, or too many ask.
    pub async fn ask(&self, wanted: &Wanted) -> Result<(), DemandError> {
        match &self.demand {
            Some(demand) => demand.ask(wanted).await,
            None => Ok(()),
        }
    }

    /// Asks for something that would be good to know, if it is not, without waiting for it.
    pub fn mention(&self, wanted: &Wanted) {
        if let Some(demand) = &self.demand
            && !wanted.is_known(&self.snapshot())
        {
            // What cannot be asked for now is asked for by the next who would like to know.
            let _answer = demand.begin(wanted, Instant::now());
        }
    }

    pub(crate) fn demand(&self) -> Option<&Demand> {
        self.demand.as_ref()
    }

    /// When the state that is shown was written to disk; `None` when a control plane has said it, or there is none.
    pub fn restored(&self) -> Option<SystemTime> {
        *self.restored.lock()
    }

    /// When the state was last kept on disk.
    pub fn kept(&self) -> Option<SystemTime> {
        *self.kept.lock()
    }

    pub(crate) fn note_kept(&self, at: SystemTime) {
        *self.kept.lock() = Some(at);
    }

    /// What is wrong with resources now, for the operator: at most a thousand.
    pub fn problems(&self) -> Vec<Problem> {
        self.problems.lock().values().cloned().collect()
    }

    /// What happened on the way to the control plane, in the Prometheus text format.
    pub fn encode_metrics(&self) -> String {
        self.counts.encode()
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Publishes a state and declares the mesh ready: for one who has another source of it than [`crate::follow`].
    pub fn publish(&self, snapshot: Snapshot) {
        self.show(snapshot);
        self.ready.send_replace(true);
    }

    /// Shows a state and returns the one before.
    fn show(&self, snapshot: Snapshot) -> Arc<Snapshot> {
        let generation = snapshot.generation();
        let before = self.snapshot.swap(Arc::new(snapshot));
        self.changes.send_replace(generation);
        before
    }

    fn note(&self, type_url: Option<Arc<str>>, settled: Vec<String>, problems: Vec<Problem>) {
        let mut known = self.problems.lock();
        if let (Some(type_url), false) = (type_url, known.is_empty()) {
            for name in settled {
                known.remove(&(Arc::clone(&type_url), name));
            }
        }
        for problem in problems {
            let Problem { type_url, name, reason, .. } = &problem;
            if problem.refused {
                warn!(%type_url, %name, %reason, "resource refused");
            } else {
                warn!(%type_url, %name, %reason, "policy understood in part");
            }
            let key = (Arc::clone(type_url), name.clone());
            if known.len() < PROBLEMS_MAX || known.contains_key(&key) {
                known.insert(key, problem);
            }
        }
    }
}

/// The one writer of a [`Mesh`]: takes what arrives, and publishes it when it belongs together.
pub(crate) struct Writer {
    mesh: Arc<Mesh>,
    store: Store,
    gate: Gate,
    /// Until when each workload waits for its policies.
    waiting: HashMap<Arc<str>, Instant>,
    /// A state that was kept, and until when the control plane is waited for before it is shown.
    restored: Option<(SystemTime, Instant)>,
    /// States that were replaced and that somebody still reads, the oldest first.
    retired: VecDeque<Arc<Snapshot>>,
    /// When to look at them again.
    look_at: Option<Instant>,
}

impl Writer {
    pub(crate) fn new(mesh: Arc<Mesh>, type_count: usize) -> Self {
        let mut store = Store::new();
        store.apply([Change::Settings(mesh.settings.clone())]);
        Self {
            mesh,
            store,
            gate: Gate::new(type_count),
            waiting: HashMap::new(),
            restored: None,
            retired: VecDeque::new(),
            look_at: None,
        }
    }

    /// Nothing need be heard of the type at `index` before the mesh is ready.
    pub(crate) fn expect_nothing_of(&mut self, index: usize) {
        self.gate.expect_nothing_of(index);
    }

    /// Whether all that has arrived is shown.
    pub(crate) fn is_settled(&self) -> bool {
        self.gate.is_complete() && self.gate.deadline().is_none()
    }

    /// Whether a control plane has said its first word of every type.
    pub(crate) fn is_live(&self) -> bool {
        self.gate.is_complete()
    }

    /// Takes a state that was kept at `written`. It is shown at `show_at`, unless the control plane comes first.
    pub(crate) fn restore(&mut self, received: Vec<Received>, written: SystemTime, show_at: Instant) {
        let changes = received.into_iter().flat_map(|received| received.changes);
        // Policies come first: a workload that names one which is not there is denied.
        let (policies, others): (Vec<_>, Vec<_>) =
            changes.partition(|change| matches!(change, Change::Authorization(_)));
        self.store.apply(policies.into_iter().chain(others));
        self.restored = Some((written, show_at));
    }

    /// Shows what was kept.
    fn show_restored(&mut self, now: Instant) {
        let Some((written, _)) = self.restored.take_if(|(_, show_at)| *show_at <= now) else { return };
        let age = SystemTime::now().duration_since(written).unwrap_or_default();
        warn!(?age, "the control plane does not answer: the state that was kept is in force");
        *self.mesh.restored.lock() = Some(written);
        self.mesh.publish(self.store.snapshot());
    }

    /// A new connection stands.
    pub(crate) fn reconnected(&mut self) {
        self.gate.reconnected();
    }

    /// Takes what a response brought.
    pub(crate) fn take(&mut self, received: Received, now: Instant) {
        let type_url = received.subscription.is_some().then(|| received.answer.type_url.as_str().into());
        self.mesh.note(type_url, received.settled, received.problems);
        let Some(index) = received.subscription else { return };
        let publish = self.gate.add(index, received.generation, received.changes, now);
        self.publish(publish, now);
    }

    /// When [`Self::tick`] has something to do next.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let show_at = self.restored.map(|(_, show_at)| show_at);
        self.waiting.values().copied().chain(self.gate.deadline()).chain(show_at).chain(self.look_at).min()
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.look_at.is_some_and(|at| at <= now) {
            self.free_retired(now);
        }
        self.show_restored(now);
        let overdue = self.gate.overdue(now);
        self.publish(overdue, now);
        let expired: Vec<Arc<str>> =
            self.waiting.iter().filter(|(_, at)| **at <= now).map(|(uid, _)| Arc::clone(uid)).collect();
        if expired.is_empty() {
            return;
        }
        for uid in &expired {
            self.waiting.remove(uid);
            warn!(%uid, "a policy of this workload did not arrive: what names it is denied");
        }
        self.store.give_up(&expired);
        self.show(now);
    }

    fn publish(&mut self, publish: Publish, now: Instant) {
        match publish {
            Publish::Wait => return,
            Publish::Whole => {}
            Publish::Overdue => warn!("published before every type had reached the generation"),
        }
        let changes = self.gate.take();
        if !changes.is_empty() {
            self.apply(changes, now);
        }
        self.restored = None;
        if self.mesh.restored.lock().take().is_some() {
            info!("the control plane has replaced the state that was kept");
        }
        if !self.mesh.is_ready() {
            info!(generation = self.store.current().generation(), "the mesh is known");
            self.mesh.publish(self.store.snapshot());
        }
    }

    fn apply(&mut self, changes: Vec<Change>, now: Instant) {
        let applied = self.store.apply(changes);
        let previous = std::mem::take(&mut self.waiting);
        let deadline = |uid: Arc<str>| {
            let at = previous.get(&uid).copied().unwrap_or(now + POLICY_WAIT);
            (uid, at)
        };
        self.waiting = applied.waiting.into_iter().map(deadline).collect();
        self.show(now);
    }

    fn show(&mut self, now: Instant) {
        self.retired.push_back(self.mesh.show(self.store.snapshot()));
        self.free_retired(now);
    }

    /// Frees the states that nobody reads any more.
    fn free_retired(&mut self, now: Instant) {
        self.retired.retain(|state| Arc::strong_count(state) > 1);
        while self.retired.len() > RETIRED_MAX {
            self.retired.pop_front();
        }
        self.look_at = (!self.retired.is_empty()).then(|| now + RETIRED_LOOK);
    }
}

#[cfg(test)]
#[path = "mesh/tests.rs"]
mod tests;
