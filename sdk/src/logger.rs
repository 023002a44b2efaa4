//! The `log` crate's macros write to the proxy's log.

use crate::sys;
use log::{Level, LevelFilter, Log, Metadata, Record};

struct Logger;

static LOGGER: Logger = Logger;

/// Levels that only the proxy has.
const CRITICAL: u32 = 5;

/// Installs the logger, and makes panics tell where they were.
pub(crate) fn install() {
    install_quietly();
    std::panic::set_hook(Box::new(|panic| sys::log(CRITICAL, &panic.to_string())));
}

/// Installs the logger.
pub(crate) fn install_quietly() {
    // It fails only if there is a logger already: this one, or one that a test has chosen.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Logs what the proxy wants logged.
pub(crate) fn ask_level() {
    let Ok(level) = sys::log_level() else { return };
    log::set_max_level(match level {
        0 => LevelFilter::Trace,
        1 => LevelFilter::Debug,
        2 => LevelFilter::Info,
        3 => LevelFilter::Warn,
        _ => LevelFilter::Error,
    });
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let level = match record.level() {
            Level::Trace => 0,
            Level::Debug => 1,
            Level::Info => 2,
            Level::Warn => 3,
            Level::Error => 4,
        };
        match record.args().as_str() {
            Some(text) => sys::log(level, text),
            None => sys::log(level, &record.args().to_string()),
        }
    }

    fn flush(&self) {}
}
