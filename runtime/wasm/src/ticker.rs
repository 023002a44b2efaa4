//! The clock that bounds guests: a thread that advances the engine's epoch. It rests until a plugin is used, and while
//! none is.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};
use wasmtime::EngineWeak;

/// How often the epoch advances: the shortest deadline there may be. Every wake-up interrupts a worker of a busy machine, and
/// at 2 ms a twentieth of what an empty plugin cost was that.
pub(crate) const TICK: Duration = Duration::from_millis(5);
/// How long no guest was called before the thread rests. Longer than any deadline, and guests that run on beyond theirs
/// are looked at, which counts as a call: whatever was called before has ended.
const REST_AFTER: Duration = Duration::from_secs(15);

/// The number of ticks in a deadline.
pub(crate) fn ticks(deadline: Duration) -> u64 {
    (deadline.as_millis() / TICK.as_millis()) as u64
}

/// The thread and its switch. Ends the thread when dropped.
pub(crate) struct Ticker {
    shared: Arc<Switch>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Switch {
    /// What ticks beside the engine that the thread was started for.
    more: Mutex<Vec<EngineWeak>>,
    /// A guest was called since the thread last looked.
    used: AtomicBool,
    resting: AtomicBool,
    ended: AtomicBool,
}

impl Ticker {
    /// Starts the thread.
    pub(crate) fn start(engine: EngineWeak) -> std::io::Result<Self> {
        let shared = Arc::new(Switch::default());
        let switch = Arc::clone(&shared);
        let thread = Builder::new()
            .name("wasm-clock".into())
            .stack_size(128 << 10)
            .spawn(move || tick(&engine, &switch))?;
        Ok(Self { shared, thread })
    }

    /// Advances the epoch of another engine too, for as long as it lives.
    pub(crate) fn tick_too(&self, engine: EngineWeak) {
        self.shared.more.lock().push(engine);
    }

    /// Says that a guest is about to be called. Almost always one load of a line that nobody writes.
    #[inline]
    pub(crate) fn wake(&self) {
        if !self.shared.used.load(Ordering::Relaxed) {
            self.shared.used.store(true, Ordering::SeqCst);
            if self.shared.resting.load(Ordering::SeqCst) {
                self.thread.thread().unpark();
            }
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.thread.thread().unpark();
    }
}

fn tick(engine: &EngineWeak, switch: &Switch) {
    rest(switch);
    let mut looked = Instant::now();
    while !switch.ended.load(Ordering::Relaxed) {
        std::thread::sleep(TICK);
        let Some(engine) = engine.upgrade() else { return };
        engine.increment_epoch();
        drop(engine);
        switch.more.lock().retain(|engine| engine.upgrade().map(|e| e.increment_epoch()).is_some());
        if looked.elapsed() < REST_AFTER {
            continue;
        }
        looked = Instant::now();
        if !switch.used.swap(false, Ordering::SeqCst) {
            rest(switch);
            looked = Instant::now();
        }
    }
}

/// Parks until [`Ticker::wake`] sees `resting`, or has set `used` before it could.
fn rest(switch: &Switch) {
    switch.resting.store(true, Ordering::SeqCst);
    while !switch.used.load(Ordering::SeqCst) && !switch.ended.load(Ordering::SeqCst) {
        std::thread::park();
    }
    switch.resting.store(false, Ordering::SeqCst);
}
