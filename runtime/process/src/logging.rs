//! The process's own log: `tracing` events to standard error, as text or JSON.

use std::sync::Arc;
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
    let (layer, handle) = reload::Layer::new(parse(filter)?);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let registry = tracing_subscriber::registry().with(layer);
    // The second initialisation fails; the first one stays in force, which is what is wanted.
    let _already_set = match format {
        LogFormat::Text => registry.with(lines.with_ansi(false)).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    Ok(LogControl { filter: handle, first: filter.into() })
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
}
