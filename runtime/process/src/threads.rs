//! Threads: one current-thread runtime per worker, and one for control work.
//!
//! A connection lives on one worker with everything it owns. Work stealing would cost more than it brings: a
//! cross-core wake-up is dearer than the work of a small request.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::mpsc;

/// Connections handed to a worker and not yet taken up; more make the acceptor wait.
const HANDED_OVER_MAX: usize = 1024;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;
type Job = Box<dyn FnOnce(usize) -> Task + Send>;

/// Why threads could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start thread {name}")]
pub struct ThreadError {
    /// The thread.
    name: String,
    /// Why.
    #[source]
    source: io::Error,
}

/// The worker threads. Dropping the last copy ends them when their connections have ended or are dropped.
#[derive(Clone)]
pub struct Workers {
    workers: Arc<[Worker]>,
}

struct Worker {
    jobs: mpsc::Sender<Job>,
    load: Arc<AtomicUsize>,
    runtime: Handle,
}

/// Counts a connection of a worker while it lives.
struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Workers {
    /// Starts `count` workers (at least one) with threads named `worker-N`.
    ///
    /// # Errors
    /// When the system refuses a thread or an event queue.
    pub fn start(count: usize) -> Result<Self, ThreadError> {
        let workers: Result<Vec<Worker>, ThreadError> = (0..count.max(1)).map(start_worker).collect();
        Ok(Self { workers: workers?.into() })
    }

    /// How many there are; workers are numbered from 0.
    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// The workers' runtimes, in order, for tasks that belong to a certain one.
    pub fn runtimes(&self) -> Vec<Handle> {
        self.workers.iter().map(|worker| worker.runtime.clone()).collect()
    }

    /// How many tasks each worker has now.
    pub fn loads(&self) -> Vec<usize> {
        self.workers.iter().map(|worker| worker.load.load(Ordering::Relaxed)).collect()
    }

    /// Runs a task on the worker that has the fewest; `start` gets that worker's number and makes the task there.
    /// Waits while that worker's queue is full.
    pub async fn run<F, T>(&self, start: F)
    where
        F: FnOnce(usize) -> T + Send + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let least = self.workers.iter().min_by_key(|worker| worker.load.load(Ordering::Relaxed));
        let Some(worker) = least else { return };
        worker.load.fetch_add(1, Ordering::Relaxed);
        let load = Load(Arc::clone(&worker.load));
        let job: Job = Box::new(move |index| {
            // In a place of its own: what is awaited by name is kept twice.
            let task = Box::pin(start(index));
            Box::pin(async move {
                let _load = load;
                task.await;
            })
        });
        // A worker ends only when every `Workers` is gone, and this is one.
        let _gone = worker.jobs.send(job).await;
    }
}

fn start_worker(index: usize) -> Result<Worker, ThreadError> {
    let name = format!("worker-{index}");
    let error = |source| ThreadError { name: format!("worker-{index}"), source };
    let runtime = runtime().map_err(error)?;
    let handle = runtime.handle().clone();
    let (jobs, mut queue) = mpsc::channel::<Job>(HANDED_OVER_MAX);
    let work = move || {
        runtime.block_on(async move {
            while let Some(job) = queue.recv().await {
                tokio::spawn(job(index));
            }
        });
    };
    std::thread::Builder::new().name(name).spawn(work).map_err(error)?;
    Ok(Worker { jobs, load: Arc::default(), runtime: handle })
}

/// A runtime for control work (xDS, certificates, operators' servers) on the thread that calls `block_on`.
///
/// # Errors
/// When the system refuses an event queue.
pub fn control_runtime() -> io::Result<Runtime> {
    runtime()
}

/// The most threads for what blocks: files, and names that the system's resolver is asked for. They are there only while they
/// are needed.
const BLOCKING_THREADS_MAX: usize = 20;

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING_THREADS_MAX).build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_least_loaded_worker_takes_the_next_task() {
        let workers = Workers::start(3).unwrap();
        let runtime = control_runtime().unwrap();
        let numbers = runtime.block_on(async {
            let (tell, mut told) = mpsc::channel(3);
            for _ in 0..3 {
                let tell = tell.clone();
                let task = move |index| async move {
                    tell.send(index).await.unwrap();
                    // Held open so that the next task finds this worker busy.
                    std::future::pending::<()>().await;
                };
                workers.run(task).await;
            }
            let mut numbers = BTreeSet::new();
            for _ in 0..3 {
                numbers.insert(told.recv().await.unwrap());
            }
            numbers
        });
        assert_eq!(numbers, BTreeSet::from([0, 1, 2]));
        assert_eq!(workers.loads(), [1, 1, 1]);
    }
}
