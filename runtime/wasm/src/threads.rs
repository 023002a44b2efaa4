//! Threads of one plugin's own. Its work stands in lanes, one for each instance: of one lane one piece runs at a time and
//! in order, so that a thread never waits for an instance that another is in.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

/// A piece of work.
pub(crate) type Work = Box<dyn FnOnce() + Send>;

/// The most pieces that wait before more are refused.
pub(crate) const QUEUE_MAX: usize = 1024;
/// How much the threads give way to the workers, whose exchanges do not run this plugin.
const NICENESS: i32 = 10;
/// What a guest may use of a stack, and the host on top of it.
const STACK_BYTES: usize = 4 << 20;

/// Threads and what they are to do. When it is dropped, they end once that is done.
pub(crate) struct OwnThreads {
    shared: Arc<Shared>,
    threads: usize,
    lane_count: usize,
    /// The lane that the next exchange is given.
    next: AtomicUsize,
}

struct Shared {
    lanes: Mutex<Lanes>,
    more: Condvar,
}

struct Lanes {
    lanes: Box<[Lane]>,
    /// Pieces that wait.
    waiting: usize,
    /// The lane that is looked at first, so that each has its turn.
    turn: usize,
    ended: bool,
}

#[derive(Default)]
struct Lane {
    work: VecDeque<Work>,
    is_busy: bool,
}

impl OwnThreads {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system refuses one.
    pub(crate) fn start(threads: usize, lane_count: usize) -> std::io::Result<Self> {
        let lanes = (0..lane_count.max(1)).map(|_| Lane::default()).collect();
        let lanes = Mutex::new(Lanes { lanes, waiting: 0, turn: 0, ended: false });
        let shared = Arc::new(Shared { lanes, more: Condvar::new() });
        // Dropped on an error, it ends those that were started.
        let (threads, lane_count) = (threads.max(1), lane_count.max(1));
        let own = Self { shared, threads, lane_count, next: AtomicUsize::new(0) };
        for _ in 0..threads {
            let shared = Arc::clone(&own.shared);
            Builder::new().name("wasm-own".into()).stack_size(STACK_BYTES).spawn(move || work(&shared))?;
        }
        Ok(own)
    }

    pub(crate) fn count(&self) -> usize {
        self.threads
    }

    /// How many pieces wait.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.lanes.lock().waiting
    }

    /// A lane, each in its turn.
    pub(crate) fn next_lane(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % self.lane_count
    }

    /// Takes work of an exchange; false when too much is waiting already.
    #[must_use]
    pub(crate) fn offer(&self, lane: usize, work: Work) -> bool {
        let mut lanes = self.shared.lanes.lock();
        if lanes.waiting >= QUEUE_MAX {
            return false;
        }
        lanes.put(lane, work);
        drop(lanes);
        self.shared.more.notify_one();
        true
    }

    /// Takes work that must be done and of which there is a bounded amount: the end of a stream, the answer to a call.
    pub(crate) fn push(&self, lane: usize, work: Work) {
        self.shared.lanes.lock().put(lane, work);
        self.shared.more.notify_one();
    }
}

impl Drop for OwnThreads {
    fn drop(&mut self) {
        self.shared.lanes.lock().ended = true;
        self.shared.more.notify_all();
    }
}

impl Lanes {
    fn put(&mut self, lane: usize, work: Work) {
        let count = self.lanes.len();
        if let Some(lane) = self.lanes.get_mut(lane % count.max(1)) {
            lane.work.push_back(work);
            self.waiting += 1;
        }
    }

    /// Work of a lane in which nothing runs.
    fn take(&mut self) -> Option<(usize, Work)> {
        let count = self.lanes.len();
        for step in 0..count {
            let index = (self.turn + step) % count;
            let Some(lane) = self.lanes.get_mut(index).filter(|lane| !lane.is_busy) else { continue };
            if let Some(work) = lane.work.pop_front() {
                lane.is_busy = true;
                self.waiting -= 1;
                self.turn = index + 1;
                return Some((index, work));
            }
        }
        None
    }

    fn done(&mut self, lane: usize) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.is_busy = false;
        }
    }
}

fn work(shared: &Shared) {
    // Of this thread alone, on Linux. Where it is not allowed, the plugin is as important as all else.
    let _polite = rustix::process::setpriority_process(None, NICENESS);
    let mut lanes = shared.lanes.lock();
    loop {
        if let Some((lane, work)) = lanes.take() {
            let is_more = lanes.waiting > 0;
            drop(lanes);
            if is_more {
                shared.more.notify_one();
            }
            // Whatever becomes of one piece, its lane and the thread go on.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
                tracing::error!("a call of a plugin on its own threads panicked; its exchange ends");
            }
            lanes = shared.lanes.lock();
            lanes.done(lane);
        } else if lanes.ended {
            return;
        } else {
            shared.more.wait(&mut lanes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Longer than a starved machine needs.
    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn a_lane_keeps_its_order_and_does_not_wait_for_another() {
        let threads = OwnThreads::start(2, 2).unwrap();
        let (go, gate) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let first = tell.clone();
        threads.push(
            0,
            Box::new(move || {
                gate.recv_timeout(SOON).unwrap();
                first.send("first").unwrap();
            }),
        );
        for (lane, name) in [(0, "second"), (1, "other")] {
            let tell = tell.clone();
            assert!(threads.offer(lane, Box::new(move || tell.send(name).unwrap())), "{name}");
        }
        assert_eq!(told.recv_timeout(SOON), Ok("other"));
        go.send(()).unwrap();
        assert_eq!(told.recv_timeout(SOON), Ok("first"));
        assert_eq!(told.recv_timeout(SOON), Ok("second"));
    }

    #[test]
    fn a_panic_costs_neither_lane_nor_thread() {
        let threads = OwnThreads::start(1, 1).unwrap();
        let (tell, told) = mpsc::channel();
        threads.push(0, Box::new(|| panic!("meant")));
        threads.push(0, Box::new(move || tell.send("next").unwrap()));
        assert_eq!(told.recv_timeout(SOON), Ok("next"));
    }

    #[test]
    fn what_waits_is_bounded_and_done_before_the_threads_end() {
        let threads = OwnThreads::start(1, 1).unwrap();
        let (go, gate) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let (begun, begins) = mpsc::channel();
        threads.push(
            0,
            Box::new(move || {
                begun.send(()).unwrap();
                gate.recv_timeout(SOON).unwrap();
            }),
        );
        begins.recv_timeout(SOON).unwrap();
        for number in 0..QUEUE_MAX {
            let tell = tell.clone();
            assert!(threads.offer(0, Box::new(move || tell.send(number).unwrap())));
        }
        assert_eq!(threads.waiting(), QUEUE_MAX);
        assert!(!threads.offer(0, Box::new(|| ())));
        threads.push(0, Box::new(move || tell.send(QUEUE_MAX).unwrap()));
        drop(threads);
        go.send(()).unwrap();
        let all: Vec<usize> = std::iter::from_fn(|| told.recv_timeout(SOON).ok()).collect();
        assert!(all.into_iter().eq(0..=QUEUE_MAX));
    }

    #[test]
    fn lanes_are_given_in_turn() {
        let threads = OwnThreads::start(1, 3).unwrap();
        let lanes: Vec<usize> = (0..4).map(|_| threads.next_lane()).collect();
        assert_eq!(lanes, [0, 1, 2, 0]);
    }
}
