//! Calls of a guest for one exchange or connection that run on the plugin's own threads, while the worker goes on with others.
//!
//! What the guest may see goes there as a copy, and what it made of it comes back. So an exchange that ends meanwhile leaves
//! nothing behind but a call whose result nobody takes, and one that waited too long goes on as it was.

use crate::instance::{Outcome, Phase};
use crate::state::copy_of;
use crate::threads::OwnThreads;
use cairn_filter::{Chunk, Exchange, HeldHead, Note, RequestHead, ResponseHead, Until};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// The longest that a call waits for its turn. One whose turn comes later does not begin.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(1);

/// What one call of the guest for an exchange came to.
pub(super) struct Answer {
    pub(super) outcome: Result<Outcome, &'static str>,
    /// What is to be noted of it.
    pub(super) notes: Vec<Note>,
    /// The head, as the guest left it.
    pub(super) head: Option<Head>,
    /// What the guest was shown of a body, as it left it.
    pub(super) chunk: Chunk,
}

/// Runs the guest in a context of type `C`; the answer is an `A`.
type Task<C, A> = Box<dyn FnOnce(&mut C) -> A + Send>;

/// A call on its way.
pub(super) struct Call<C, A> {
    progress: Mutex<Progress<C, A>>,
    sent: Instant,
    /// It is over, or will never begin.
    over: Arc<Notify>,
}

enum Progress<C, A> {
    Waits(Task<C, A>),
    Runs,
    Over(Box<A>),
    /// It will not run, or nobody takes what it came to.
    Withdrawn,
}

/// How a call stands.
pub(super) enum Standing<A> {
    /// It is over.
    Over(Box<A>),
    /// It was withdrawn before it began.
    Withdrawn,
    /// It waits or runs.
    UnderWay,
}

impl<C: Send + 'static, A: Send + 'static> Call<C, A> {
    /// Sends a call on its way; `None` when too many are waiting. `over` is notified when it is over, or will never begin.
    pub(super) fn send(
        threads: &OwnThreads,
        (lane, context): (usize, Arc<Mutex<C>>),
        over: Arc<Notify>,
        task: impl FnOnce(&mut C) -> A + Send + 'static,
    ) -> Option<Arc<Self>> {
        let progress = Mutex::new(Progress::Waits(Box::new(task)));
        let call = Arc::new(Self { progress, sent: Instant::now(), over });
        let running = Arc::clone(&call);
        threads.offer(lane, Box::new(move || running.run(&context))).then_some(call)
    }

    fn run(&self, context: &Mutex<C>) {
        if let Some(task) = self.begin() {
            let answer = Box::new(task(&mut context.lock()));
            *self.progress.lock() = Progress::Over(answer);
        }
        self.over.notify_one();
    }

    fn begin(&self) -> Option<Task<C, A>> {
        let mut progress = self.progress.lock();
        match std::mem::replace(&mut *progress, Progress::Runs) {
            Progress::Waits(_) if self.sent.elapsed() > WAIT_MAX => {
                *progress = Progress::Withdrawn;
                None
            }
            Progress::Waits(task) => Some(task),
            other => {
                *progress = other;
                None
            }
        }
    }

    /// Withdraws a call that has not begun; false when it has.
    pub(super) fn withdraw(&self) -> bool {
        let mut progress = self.progress.lock();
        let is_waiting = matches!(*progress, Progress::Waits(_));
        if is_waiting {
            *progress = Progress::Withdrawn;
        }
        is_waiting
    }

    /// How it stands. What it came to is taken.
    pub(super) fn standing(&self) -> Standing<A> {
        let mut progress = self.progress.lock();
        match std::mem::replace(&mut *progress, Progress::Withdrawn) {
            Progress::Over(answer) => Standing::Over(answer),
            Progress::Withdrawn => Standing::Withdrawn,
            under_way => {
                *progress = under_way;
                Standing::UnderWay
            }
        }
    }

    /// Resolves when the call is over, or was withdrawn since its turn did not come in time. Once it runs, it has a
    /// deadline.
    pub(super) fn over(self: &Arc<Self>) -> Until {
        let (call, until) = (Arc::clone(self), Instant::now() + WAIT_MAX);
        Box::pin(async move {
            let in_time = tokio::time::timeout_at(until.into(), call.over.notified()).await;
            if in_time.is_err() && !call.withdraw() {
                call.over.notified().await;
            }
        })
    }
}

/// A head that is the call's own.
pub(super) enum Head {
    Request(RequestHead),
    Response(ResponseHead),
}

impl Head {
    pub(super) fn copy_of(phase: &Phase<'_>) -> Self {
        match phase {
            Phase::Request(head) => Self::Request((*head).clone()),
            Phase::Response(head) => Self::Response((*head).clone()),
        }
    }

    pub(super) fn copy_of_held(head: &HeldHead<'_>) -> Self {
        match head {
            HeldHead::Request(head) => Self::Request((*head).clone()),
            HeldHead::Response(head) => Self::Response((*head).clone()),
        }
    }

    pub(super) fn phase(&mut self) -> Phase<'_> {
        match self {
            Self::Request(head) => Phase::Request(head),
            Self::Response(head) => Phase::Response(head),
        }
    }

    pub(super) fn held(&mut self) -> HeldHead<'_> {
        match self {
            Self::Request(head) => HeldHead::Request(head),
            Self::Response(head) => HeldHead::Response(head),
        }
    }

    /// Puts it in the place of the one that it is a copy of.
    pub(super) fn put_back(self, phase: &mut Phase<'_>) {
        match (self, phase) {
            (Self::Request(ours), Phase::Request(head)) => **head = ours,
            (Self::Response(ours), Phase::Response(head)) => **head = ours,
            (Self::Request(_), Phase::Response(_)) | (Self::Response(_), Phase::Request(_)) => {}
        }
    }

    /// The same where it is held.
    pub(super) fn put_back_held(self, held: &mut HeldHead<'_>) {
        match (self, held) {
            (Self::Request(ours), HeldHead::Request(head)) => **head = ours,
            (Self::Response(ours), HeldHead::Response(head)) => **head = ours,
            (Self::Request(_), HeldHead::Response(_)) | (Self::Response(_), HeldHead::Request(_)) => {}
        }
    }
}

/// The exchange as a guest may see it elsewhere. All that comes back of it are notes.
pub(super) fn copy_of_exchange(exchange: &Exchange) -> Exchange {
    let mut copy = copy_of(exchange);
    copy.metadata = exchange.metadata.clone();
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(age: Duration) -> Arc<Call<(), ()>> {
        let progress = Mutex::new(Progress::Waits(Box::new(|(): &mut ()| ()) as Task<(), ()>));
        Arc::new(Call { progress, sent: Instant::now() - age, over: Arc::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_withdrawn_when_its_turn_does_not_come() {
        let call = call(Duration::ZERO);
        let begun = tokio::time::Instant::now();
        assert!(matches!(call.standing(), Standing::UnderWay));
        call.over().await;
        assert!(begun.elapsed() >= WAIT_MAX);
        assert!(matches!(call.standing(), Standing::Withdrawn));
        assert!(call.begin().is_none(), "and never begins");
    }

    #[tokio::test]
    async fn a_call_whose_turn_comes_too_late_does_not_begin() {
        let call = call(WAIT_MAX + Duration::from_millis(1));
        call.run(&Mutex::new(()));
        call.over.notified().await;
        assert!(matches!(call.standing(), Standing::Withdrawn));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_runs_is_waited_for() {
        let call = call(Duration::ZERO);
        assert!(call.begin().is_some() && !call.withdraw());
        let mut over = call.over();
        assert!(tokio::time::timeout(WAIT_MAX * 3, &mut over).await.is_err());
        call.over.notify_one();
        over.await;
        assert!(matches!(call.standing(), Standing::UnderWay));
    }
}
