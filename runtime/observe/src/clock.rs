//! Times in access logs: `strftime` with Envoy's specifiers for parts of a second.

use cairn_telemetry::append_timestamp;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;

/// How a time is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TimeFormat {
    /// `2026-01-02T03:04:05.678Z`, Envoy's default.
    Default,
    /// Texts and specifiers.
    Parts(Vec<Part>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Text(String),
    Specifier(char),
    /// The first digits of the second's fraction.
    Fraction(u32),
}

/// The specifiers of `strftime` that make sense without a locale, times being in UTC.
const SPECIFIERS: &str = "YmdeHIMSpjaAbBhyCDFTRzZsuwnt";

impl TimeFormat {
    /// Parses a format; empty: the default.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::Default);
        }
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut letters = text.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                plain.push(letter);
                continue;
            }
            let specifier = letters.next().ok_or_else(|| "ends with `%`".to_owned())?;
            if specifier == '%' {
                plain.push('%');
                continue;
            }
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain)));
            }
            parts.push(match specifier {
                '1'..='9' => {
                    if letters.next() != Some('f') {
                        return Err(format!("`%{specifier}` must be followed by `f`"));
                    }
                    Part::Fraction(specifier.to_digit(10).unwrap_or(9))
                }
                'f' => Part::Fraction(9),
                known if SPECIFIERS.contains(known) => Part::Specifier(known),
                other => return Err(format!("there is no specifier `%{other}`")),
            });
        }
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Self::Parts(parts))
    }

    /// Appends a time.
    pub(crate) fn write(&self, out: &mut Vec<u8>, at: SystemTime) {
        let Self::Parts(parts) = self else { return append_timestamp(out, at, 3) };
        let date = OffsetDateTime::from(at);
        for part in parts {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Fraction(digits) => {
                    let value = date.nanosecond() / 10_u32.pow(9 - (*digits).min(9));
                    let width = *digits as usize;
                    // Writing to a Vec cannot fail.
                    drop(write!(out, "{value:0width$}"));
                }
                Part::Specifier(letter) => specifier(out, *letter, date, at),
            }
        }
    }
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

fn specifier(out: &mut Vec<u8>, letter: char, date: OffsetDateTime, at: SystemTime) {
    let month = u8::from(date.month());
    let month_name = MONTHS.get(usize::from(month) - 1).copied().unwrap_or_default();
    let weekday = date.weekday().number_days_from_sunday();
    let day_name = DAYS.get(usize::from(weekday)).copied().unwrap_or_default();
    let (year, day, hour, minute, second) =
        (date.year(), date.day(), date.hour(), date.minute(), date.second());
    let hour12 = (hour + 11) % 12 + 1;
    let short = |name: &'static str| name.get(..3).unwrap_or_default();
    let written = match letter {
        'Y' => write!(out, "{year}"),
        'C' => write!(out, "{:02}", year / 100),
        'y' => write!(out, "{:02}", year % 100),
        'm' => write!(out, "{month:02}"),
        'd' => write!(out, "{day:02}"),
        'e' => write!(out, "{day:2}"),
        'H' => write!(out, "{hour:02}"),
        'I' => write!(out, "{hour12:02}"),
        'M' => write!(out, "{minute:02}"),
        'S' => write!(out, "{second:02}"),
        'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
        'j' => write!(out, "{:03}", date.ordinal()),
        'a' => write!(out, "{}", short(day_name)),
        'A' => write!(out, "{day_name}"),
        'b' | 'h' => write!(out, "{}", short(month_name)),
        'B' => write!(out, "{month_name}"),
        'D' => write!(out, "{month:02}/{day:02}/{:02}", year % 100),
        'F' => write!(out, "{year}-{month:02}-{day:02}"),
        'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
        'R' => write!(out, "{hour:02}:{minute:02}"),
        'z' => write!(out, "+0000"),
        'Z' => write!(out, "UTC"),
        's' => write!(out, "{}", at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())),
        'u' => write!(out, "{}", (weekday + 6) % 7 + 1),
        'w' => write!(out, "{weekday}"),
        'n' => writeln!(out),
        't' => write!(out, "\t"),
        _ => Ok(()),
    };
    // Writing to a Vec cannot fail.
    drop(written);
}

/// A duration as Envoy writes it, in its largest units: `1.5ms`, `906.189us`, `1m30.25s`, `0`.
pub(crate) fn duration_text(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    let part = |unit: u128, digits: usize, name: &str| {
        let (whole, rest) = (nanos / unit, nanos % unit);
        if rest == 0 {
            return format!("{whole}{name}");
        }
        let fraction = format!("{rest:0digits$}");
        format!("{whole}.{}{name}", fraction.trim_end_matches('0'))
    };
    match nanos {
        0 => "0".to_owned(),
        1..1_000 => part(1, 0, "ns"),
        1_000..1_000_000 => part(1_000, 3, "us"),
        1_000_000..1_000_000_000 => part(1_000_000, 6, "ms"),
        _ => {
            let seconds = duration.as_secs();
            let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
            let mut text = String::new();
            if hours > 0 {
                text.push_str(&format!("{hours}h"));
            }
            if minutes > 0 {
                text.push_str(&format!("{minutes}m"));
            }
            let fraction = format!("{:09}", duration.subsec_nanos());
            match (seconds % 60, fraction.trim_end_matches('0')) {
                (0, "") => {}
                (seconds, "") => text.push_str(&format!("{seconds}s")),
                (seconds, fraction) => text.push_str(&format!("{seconds}.{fraction}s")),
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_envoy_writes_them() {
        for (nanos, expected) in [
            (0, "0"),
            (7, "7ns"),
            (906_189, "906.189us"),
            (896_120, "896.12us"),
            (1_257_538, "1.257538ms"),
            (34_389_034, "34.389034ms"),
            (500_000_000, "500ms"),
            (1_500_000_000, "1.5s"),
            (90_000_000_000, "1m30s"),
            (3_600_000_000_000, "1h"),
            (3_661_000_000_001, "1h1m1.000000001s"),
        ] {
            assert_eq!(duration_text(Duration::from_nanos(nanos)), expected);
        }
    }

    #[test]
    fn times_are_written_as_strftime_writes_them() {
        // Tuesday.
        let at = UNIX_EPOCH + Duration::new(1_767_686_645, 67_891_234);
        for (format, expected) in [
            ("", "2026-01-06T08:04:05.067Z"),
            ("%Y/%m/%dT%H:%M:%S%z %s", "2026/01/06T08:04:05+0000 1767686645"),
            ("%s.%3f", "1767686645.067"),
            ("%6f %f %1f", "067891 067891234 0"),
            ("%a %A %b %B %e %j %p %I", "Tue Tuesday Jan January  6 006 AM 08"),
            ("%F %T %D %R %Z %u %w", "2026-01-06 08:04:05 01/06/26 08:04 UTC 2 2"),
            ("100%% %y%C", "100% 2620"),
        ] {
            let mut out = Vec::new();
            TimeFormat::parse(format).unwrap().write(&mut out, at);
            assert_eq!(String::from_utf8(out).unwrap(), expected, "{format}");
        }
        for wrong in ["%", "%Q", "%3", "%3x", "%E"] {
            assert!(TimeFormat::parse(wrong).is_err(), "{wrong}");
        }
    }
}
