//! The access log's way out: a bounded buffer that requests append to and one thread writes.

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// The most bytes that wait to be written; lines beyond are dropped and counted.
const BUFFER_BYTES_MAX: usize = 1 << 20;

/// A line is cut at this length, so that one long path does not fill the buffer.
const LINE_BYTES_MAX: usize = 16 << 10;

/// Lines are written when this much waits (Envoy `min_flush_size_kb`, 64) …
const FLUSH_BYTES: usize = 64 << 10;

/// … or this long after the first one, so that a quiet log is current.
const FLUSH_AFTER: Duration = Duration::from_millis(100);

/// The access log. Appending never waits for the writer: a full buffer drops the line.
pub struct AccessLog {
    /// `None`: switched off.
    queue: Option<Arc<Queue>>,
    writer: Option<JoinHandle<()>>,
}

struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// A block has been written.
    written: Condvar,
    dropped: Counter,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LineEnd {
    Always,
    IfMissing,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    closed: bool,
    /// What is written to is to be opened anew.
    reopen: bool,
    /// The writer has a block in its hands.
    writing: bool,
    /// Somebody waits for all of it to be written.
    flush: bool,
}

/// Opens what is written to.
type Open = Box<dyn FnMut() -> io::Result<Box<dyn Write + Send>> + Send>;

impl AccessLog {
    /// A log that writes nothing.
    pub fn off() -> Self {
        Self { queue: None, writer: None }
    }

    /// Starts the thread that writes to `out`. It ends, after writing what waits, when the log is dropped.
    /// Lines that it must drop are counted in `dropped`.
    pub fn start(out: impl Write + Send + 'static, dropped: Counter) -> Self {
        Self::run(Box::new(out), None, dropped)
    }

    /// The same with what `open` opens, which [`AccessLog::reopen`] has opened anew.
    ///
    /// # Errors
    /// When it cannot be opened now.
    pub fn open<W: Write + Send + 'static>(
        mut open: impl FnMut() -> io::Result<W> + Send + 'static,
        dropped: Counter,
    ) -> io::Result<Self> {
        let out = Box::new(open()?);
        let open: Open = Box::new(move || -> io::Result<Box<dyn Write + Send>> { Ok(Box::new(open()?)) });
        Ok(Self::run(out, Some(open), dropped))
    }

    fn run(out: Box<dyn Write + Send>, open: Option<Open>, dropped: Counter) -> Self {
        let queue = Arc::new(Queue {
            waiting: Mutex::default(),
            changed: Condvar::new(),
            written: Condvar::new(),
            dropped,
        });
        let of_writer = Arc::clone(&queue);
        let writer =
            std::thread::Builder::new().name("access-log".into()).spawn(move || of_writer.drain(out, open));
        match writer {
            Ok(writer) => Self { queue: Some(queue), writer: Some(writer) },
            Err(error) => {
                tracing::error!(%error, "no access log: its thread cannot start");
                Self::off()
            }
        }
    }

    /// Has what is written to opened anew, soon: its name may by now stand for another file. Lines that wait go to the
    /// new one; if there can be none, everything goes where it went before.
    pub fn reopen(&self) {
        if let Some(queue) = &self.queue {
            queue.waiting.lock().reopen = true;
            queue.changed.notify_one();
        }
    }

    /// Waits until what was appended before is written, at most so long. Returns whether it is.
    pub fn flush(&self, within: Duration) -> bool {
        let Some(queue) = &self.queue else { return true };
        let mut waiting = queue.waiting.lock();
        waiting.flush = true;
        queue.changed.notify_one();
        let is_busy = |waiting: &mut Waiting| waiting.writing || !waiting.bytes.is_empty();
        !queue.written.wait_while_for(&mut waiting, is_busy, within).timed_out()
    }

    /// Whether anything is written.
    pub fn is_on(&self) -> bool {
        self.queue.is_some()
    }

    /// Appends one line: `format` writes it, without its line feed.
    pub fn write(&self, format: impl FnOnce(&mut Vec<u8>)) {
        self.append(format, LineEnd::Always);
    }

    /// Appends what `format` writes: a custom format brings its line feed with it, or does not (as in Envoy, whose
    /// own default line ends with one). A line that has none gets one, so that lines never run together.
    pub fn write_raw(&self, format: impl FnOnce(&mut Vec<u8>)) {
        self.append(format, LineEnd::IfMissing);
    }

    fn append(&self, format: impl FnOnce(&mut Vec<u8>), end: LineEnd) {
        let Some(queue) = &self.queue else { return };
        let mut waiting = queue.waiting.lock();
        let before = waiting.bytes.len();
        if before >= BUFFER_BYTES_MAX {
            drop(waiting);
            queue.dropped.inc();
            return;
        }
        format(&mut waiting.bytes);
        waiting.bytes.truncate(before + LINE_BYTES_MAX);
        if end == LineEnd::Always || waiting.bytes.last() != Some(&b'\n') {
            waiting.bytes.push(b'\n');
        }
        let after = waiting.bytes.len();
        drop(waiting);
        // The writer needs to hear of the first line, and of the one that fills a block; not of every line.
        if before == 0 || (before < FLUSH_BYTES && after >= FLUSH_BYTES) {
            queue.changed.notify_one();
        }
    }
}

/// What the writer was told beside the lines.
struct Taken {
    /// This block is the last.
    closed: bool,
    /// It belongs into what is opened anew.
    reopen: bool,
}

impl Queue {
    fn drain(&self, mut out: Box<dyn Write + Send>, mut open: Option<Open>) {
        let mut block = Vec::new();
        loop {
            let Taken { closed, reopen } = self.take(&mut block);
            if let (true, Some(open)) = (reopen, &mut open) {
                match open() {
                    Ok(new) => out = new,
                    Err(error) => tracing::warn!(%error, "an access log cannot be opened anew"),
                }
            }
            if let Err(error) = out.write_all(&block).and_then(|()| out.flush()) {
                tracing::warn!(%error, "access log lines are lost");
            }
            block.clear();
            if closed {
                return;
            }
        }
    }

    /// Waits for a block and swaps it for the empty `block`.
    fn take(&self, block: &mut Vec<u8>) -> Taken {
        let mut waiting = self.waiting.lock();
        waiting.writing = false;
        if waiting.bytes.is_empty() {
            waiting.flush = false;
            self.written.notify_all();
        }
        let is_told = |waiting: &Waiting| waiting.closed || waiting.reopen || waiting.flush;
        self.changed.wait_while(&mut waiting, |waiting| waiting.bytes.is_empty() && !is_told(waiting));
        let small = |waiting: &mut Waiting| waiting.bytes.len() < FLUSH_BYTES && !is_told(waiting);
        // Woken early or not, what waits is written now.
        let _timed_out = self.changed.wait_while_for(&mut waiting, small, FLUSH_AFTER);
        std::mem::swap(&mut waiting.bytes, block);
        waiting.writing = true;
        Taken { closed: waiting.closed, reopen: std::mem::take(&mut waiting.reopen) }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        if let Some(queue) = &self.queue {
            queue.waiting.lock().closed = true;
            queue.changed.notify_one();
        }
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the access log's thread failed");
        }
    }
}

impl std::fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessLog").field("on", &self.is_on()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Hands every block to the test, which thereby holds the writer up.
    struct Handed(mpsc::SyncSender<Vec<u8>>);

    impl Write for Handed {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(std::io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_arrive_in_order_and_dropping_the_log_writes_the_rest() {
        let (sender, blocks) = mpsc::sync_channel(100);
        let log = AccessLog::start(Handed(sender), Counter::default());
        for number in 0..10 {
            log.write(|out| out.extend_from_slice(format!("line {number}").as_bytes()));
        }
        drop(log);
        let text = String::from_utf8(blocks.iter().flatten().collect()).unwrap();
        let expected: String = (0..10).map(|number| format!("line {number}\n")).collect();
        assert_eq!(text, expected);
    }

    #[test]
    fn what_is_opened_anew_gets_what_waits_and_what_follows() {
        let (sender, blocks) = mpsc::sync_channel(100);
        let mut opened = 0;
        let open = move || {
            opened += 1;
            match opened {
                // It cannot be opened now: lines go where they went.
                2 => Err(io::Error::other("no")),
                _ => Ok(Named(opened, sender.clone())),
            }
        };
        let log = AccessLog::open(open, Counter::default()).unwrap();
        let line = |text: &'static str| {
            log.write(|out| out.extend_from_slice(text.as_bytes()));
            blocks.recv().unwrap()
        };
        assert_eq!(line("a"), "1 a\n");
        log.reopen();
        assert_eq!(line("b"), "1 b\n");
        log.reopen();
        assert_eq!(line("c"), "3 c\n");
        assert_eq!(line("d"), "3 d\n");
        assert!(AccessLog::open(|| Err::<Handed, _>(io::Error::other("no")), Counter::default()).is_err());
    }

    #[test]
    fn a_flush_waits_for_what_was_appended_and_not_for_ever() {
        let (sender, blocks) = mpsc::sync_channel(0);
        let log = AccessLog::start(Handed(sender), Counter::default());
        assert!(log.flush(Duration::from_secs(60)), "there is nothing to write");
        log.write(|out| out.extend_from_slice(b"a"));
        assert!(!log.flush(Duration::from_millis(1)), "nobody takes it");
        let reader = std::thread::spawn(move || blocks.iter().collect::<Vec<_>>());
        assert!(log.flush(Duration::from_secs(60)));
        log.write(|out| out.extend_from_slice(b"b"));
        assert!(log.flush(Duration::from_secs(60)));
        drop(log);
        assert_eq!(reader.join().unwrap().concat(), b"a\nb\n");
    }

    /// Hands blocks over with a number before them.
    struct Named(u32, mpsc::SyncSender<String>);

    impl Write for Named {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = format!("{} {}", self.0, String::from_utf8_lossy(bytes));
            self.1.send(text).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_writer_costs_lines_and_never_time() {
        let (sender, blocks) = mpsc::sync_channel(0);
        let log = AccessLog::start(Handed(sender), Counter::default());
        let line = vec![b'x'; 1023];
        let lines = 4 * BUFFER_BYTES_MAX / 1024;
        for _ in 0..lines {
            log.write(|out| out.extend_from_slice(&line));
        }
        let dropped = log.queue.as_ref().map_or(0, |queue| queue.dropped.get()) as usize;
        let reader = std::thread::spawn(move || blocks.iter().map(|block| block.len()).sum::<usize>());
        drop(log);
        let written = reader.join().unwrap() / 1024;
        assert!(dropped >= lines / 4, "{dropped} of {lines}");
        assert_eq!(written + dropped, lines);
    }
}
