//! What plugins log: levels, a limit on the rate, and the lines kept for the report of a failed start.

use parking_lot::Mutex;
use std::time::{Duration, Instant};
use tracing::Level;

/// The tracing target of lines that plugins write.
pub(crate) const TARGET: &str = "plugin";

/// The most lines per second of one plugin; more are counted and dropped.
const LINES_PER_SECOND: u32 = 1000;
/// The longest line.
const LINE_BYTES_MAX: usize = 8 << 10;
/// The last lines of a start that are kept, and how much of each.
const KEPT_LINES_MAX: usize = 20;
const KEPT_LINE_BYTES_MAX: usize = 512;

/// The limit on the log lines of one plugin, over all its instances.
#[derive(Default)]
pub(crate) struct LogRate(Mutex<Second>);

#[derive(Default)]
struct Second {
    began: Option<Instant>,
    lines: u32,
    dropped: u64,
}

impl LogRate {
    /// Whether one more line may be written.
    fn passes(&self, plugin: &str) -> bool {
        let mut second = self.0.lock();
        if second.lines < LINES_PER_SECOND && second.began.is_some() {
            second.lines += 1;
            return true;
        }
        let now = Instant::now();
        if second.began.is_some_and(|began| now.duration_since(began) < Duration::from_secs(1)) {
            second.dropped += 1;
            return false;
        }
        let dropped =
            std::mem::replace(&mut *second, Second { began: Some(now), lines: 1, dropped: 0 }).dropped;
        drop(second);
        if dropped > 0 {
            tracing::warn!(target: TARGET, plugin, dropped, "the plugin logs too much");
        }
        true
    }
}

/// Lets something be said once in a while.
pub(crate) struct Sampled {
    period: Duration,
    last: Mutex<Option<Instant>>,
}

impl Sampled {
    pub(crate) fn every(period: Duration) -> Self {
        Self { period, last: Mutex::default() }
    }

    /// Whether it is time again.
    pub(crate) fn passes(&self) -> bool {
        let mut last = self.last.lock();
        let now = Instant::now();
        let passes = last.is_none_or(|last| now.duration_since(last) >= self.period);
        if passes {
            *last = Some(now);
        }
        passes
    }
}

/// What one instance logs.
#[derive(Default)]
pub(crate) struct LogGate {
    /// The lines of the start, while it lasts.
    kept: Option<Vec<String>>,
}

impl LogGate {
    /// Starts keeping lines for a report.
    pub(crate) fn keep(&mut self) {
        self.kept = Some(Vec::new());
    }

    /// The lines kept since [`LogGate::keep`], and no more keeping.
    pub(crate) fn take_kept(&mut self) -> Vec<String> {
        self.kept.take().unwrap_or_default()
    }

    /// Whether a line of this level would go anywhere.
    pub(crate) fn wants(&self, level: Level) -> bool {
        self.kept.is_some() || enabled(level)
    }

    /// Logs a line of `plugin`; false when it was dropped.
    pub(crate) fn write(&mut self, rate: &LogRate, plugin: &str, level: Level, bytes: &[u8]) -> bool {
        let passes = rate.passes(plugin);
        if !passes && self.kept.is_none() {
            return false;
        }
        let line = printable(&bytes[..bytes.len().min(LINE_BYTES_MAX)]);
        if let Some(kept) = &mut self.kept {
            if kept.len() == KEPT_LINES_MAX {
                kept.remove(0);
            }
            kept.push(line.chars().take(KEPT_LINE_BYTES_MAX).collect());
        }
        if !passes {
            return false;
        }
        match level {
            Level::TRACE => tracing::trace!(target: TARGET, plugin, "{line}"),
            Level::DEBUG => tracing::debug!(target: TARGET, plugin, "{line}"),
            Level::INFO => tracing::info!(target: TARGET, plugin, "{line}"),
            Level::WARN => tracing::warn!(target: TARGET, plugin, "{line}"),
            _ => tracing::error!(target: TARGET, plugin, "{line}"),
        }
        true
    }
}

/// Whether anybody listens to plugins at this level.
fn enabled(level: Level) -> bool {
    match level {
        Level::TRACE => tracing::enabled!(target: TARGET, Level::TRACE),
        Level::DEBUG => tracing::enabled!(target: TARGET, Level::DEBUG),
        Level::INFO => tracing::enabled!(target: TARGET, Level::INFO),
        Level::WARN => tracing::enabled!(target: TARGET, Level::WARN),
        _ => tracing::enabled!(target: TARGET, Level::ERROR),
    }
}

/// The tracing level of an ABI log level, 0 (trace) to 5 (critical).
pub(crate) fn level_of(number: u32) -> Option<Level> {
    match number {
        0 => Some(Level::TRACE),
        1 => Some(Level::DEBUG),
        2 => Some(Level::INFO),
        3 => Some(Level::WARN),
        4 | 5 => Some(Level::ERROR),
        _ => None,
    }
}

/// The lowest ABI level that is logged; 5 when nothing is.
pub(crate) fn threshold() -> u32 {
    (0..5).find(|number| level_of(*number).is_some_and(enabled)).unwrap_or(5)
}

/// Text with control characters written out, so that a plugin cannot forge log lines.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut line = String::with_capacity(text.len());
    for c in text.trim_end_matches(['\n', '\r']).chars() {
        if c.is_control() && c != '\t' { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_cannot_be_forged() {
        assert_eq!(printable(b"a\nlevel=error b\x1b[31m\n"), "a\\nlevel=error b\\u{1b}[31m");
        assert_eq!(printable(b"\xff"), "\u{fffd}");
    }

    #[test]
    fn too_many_lines_are_dropped() {
        // Two instances of one plugin.
        let (rate, mut gates) = (LogRate::default(), [LogGate::default(), LogGate::default()]);
        let lines = (0..3 * LINES_PER_SECOND).map(|number| number as usize % 2);
        let written = lines.filter(|gate| gates[*gate].write(&rate, "p", Level::TRACE, b"x")).count();
        assert!((1000..3000).contains(&written), "{written}");
    }

    #[test]
    fn what_is_sampled_is_said_once_in_a_while() {
        let often = Sampled::every(Duration::ZERO);
        assert!(often.passes() && often.passes());
        let seldom = Sampled::every(Duration::from_secs(3600));
        assert!(seldom.passes() && !seldom.passes());
    }

    #[test]
    fn the_last_lines_of_a_start_are_kept() {
        let (rate, mut gate) = (LogRate::default(), LogGate::default());
        gate.keep();
        for number in 0..KEPT_LINES_MAX + 1 {
            gate.write(&rate, "p", Level::INFO, number.to_string().as_bytes());
        }
        let kept = gate.take_kept();
        assert_eq!((kept.len(), kept.first().map(String::as_str)), (KEPT_LINES_MAX, Some("1")));
        assert!(gate.take_kept().is_empty());
    }
}
