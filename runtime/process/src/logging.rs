//! The process's own log: `tracing` events to standard error, as text or JSON.

use cairn_telemetry::{AccessLog, Counter};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt};

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// Why logging was not set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoggingError {
    /// The filter does not parse.
    #[error("log filter `{filter}` is not valid")]
    Filter {
        /// The text given.
        filter: String,
        /// Why.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
}

/// Changes which events are logged while the process runs.
#[derive(Clone)]
pub struct LogControl {
    filter: Handle<EnvFilter, Registry>,
    first: Arc<str>,
    queue: Option<Queue>,
}

/// Lines on their way to standard error.
#[derive(Clone)]
struct Queue {
    lines: Arc<AccessLog>,
    dropped: Counter,
}

impl LogControl {
    /// The filter in force.
    pub fn filter(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Adds directives to the filter in force; of two about the same, the later one counts.
    ///
    /// # Errors
    /// When they do not parse; then nothing changes.
    pub fn add(&self, directives: &str) -> Result<(), LoggingError> {
        self.set(&format!("{},{directives}", self.filter()))
    }

    /// Returns to the filter that the process began with.
    ///
    /// # Errors
    /// Never in practice: it was parsed before.
    pub fn reset(&self) -> Result<(), LoggingError> {
        self.set(&self.first)
    }

    /// Lines that were dropped because whatever reads standard error is too slow.
    pub fn dropped(&self) -> u64 {
        self.queue.as_ref().map_or(0, |queue| queue.dropped.get())
    }

    /// Waits until what was logged before is written, at most so long: call it before the process ends.
    pub fn flush(&self, within: Duration) {
        if let Some(queue) = &self.queue {
            // What is not written by then is lost, and there is nobody left to tell.
            let _is_written = queue.lines.flush(within);
        }
    }

    fn set(&self, filter: &str) -> Result<(), LoggingError> {
        let parsed = parse(filter)?;
        // Fails when logging has ended, with the process.
        let _over = self.filter.reload(parsed);
        Ok(())
    }
}

fn parse(filter: &str) -> Result<EnvFilter, LoggingError> {
    EnvFilter::try_new(filter).map_err(|source| LoggingError::Filter { filter: filter.to_owned(), source })
}

/// Sends `tracing` events that pass `filter` (`info`, or `info,cairn_xds=debug`) to standard error. A second call in
/// one process changes nothing, and what it returns has no effect.
///
/// # Errors
/// When the filter does not parse.
pub fn init_logging(filter: &str, format: LogFormat) -> Result<LogControl, LoggingError> {
    init(filter, format, io::stderr, None)
}

/// The same through a queue that never makes anybody wait who logs: when it is full, lines are dropped and counted. For
/// processes that carry traffic; they must call [`LogControl::flush`] before they end.
///
/// # Errors
/// When the filter does not parse.
pub fn init_queued_logging(filter: &str, format: LogFormat) -> Result<LogControl, LoggingError> {
    let dropped = Counter::default();
    let lines = Arc::new(AccessLog::start(io::stderr(), dropped.clone()));
    init(filter, format, Lines(Arc::clone(&lines)), Some(Queue { lines, dropped }))
}

fn init<W>(
    filter: &str,
    format: LogFormat,
    writer: W,
    queue: Option<Queue>,
) -> Result<LogControl, LoggingError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (layer, handle) = reload::Layer::new(parse(filter)?);
    let lines = fmt::layer().with_writer(writer);
    let registry = tracing_subscriber::registry().with(layer);
    // The second initialisation fails; the first one stays in force, which is what is wanted.
    let _already_set = match format {
        LogFormat::Text => registry.with(lines.with_ansi(false)).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    Ok(LogControl { filter: handle, first: filter.into(), queue })
}

/// Writes each event as one line of the queue: the formatter hands over whole lines.
#[derive(Clone)]
struct Lines(Arc<AccessLog>);

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write_raw(|out| out.extend_from_slice(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_can_be_changed_and_be_as_it_was() {
        let log = init_logging("info,h2=warn", LogFormat::Text).unwrap();
        log.add("cairn_xds=trace").unwrap();
        let filter = log.filter();
        for directive in ["info", "h2=warn", "cairn_xds=trace"] {
            assert!(filter.split(',').any(|one| one == directive), "{filter}");
        }
        assert!(log.add("cairn_xds=loud").is_err());
        assert_eq!(log.filter(), filter, "what does not parse changes nothing");
        log.add("debug").unwrap();
        assert!(!log.filter().split(',').any(|one| one == "info"), "{}", log.filter());
        log.reset().unwrap();
        assert!(!log.filter().contains("cairn_xds"), "{}", log.filter());
    }

    /// Hands blocks over when asked to, and until then holds the writer up.
    struct Held(std::sync::mpsc::Receiver<std::sync::mpsc::Sender<Vec<u8>>>);

    impl io::Write for Held {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let to = self.0.recv().map_err(io::Error::other)?;
            to.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn whoever_logs_never_waits_for_whoever_reads() {
        let (ask, asked) = std::sync::mpsc::channel();
        let dropped = Counter::default();
        let lines = Lines(Arc::new(AccessLog::start(Held(asked), dropped.clone())));
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(lines.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(number = 7, "first");
            for _ in 0..4000 {
                tracing::info!(text = "x".repeat(1000), "many");
            }
        });
        assert!(dropped.get() > 1000, "{}", dropped.get());
        let (sender, blocks) = std::sync::mpsc::channel();
        ask.send(sender).unwrap();
        let first = String::from_utf8(blocks.recv().unwrap()).unwrap();
        let line = first.lines().next().unwrap();
        assert!(line.contains("first") && line.contains("number=7"), "{line}");
        // The writer ends when nobody asks any more.
        drop(ask);
    }
}
