//! Access log formats: texts of whoever may write a Telemetry, with values of whoever may send a request.

use super::exchange::Said;
use cairn_mesh::{FileLog, LogFormat, LogPlan, LogTarget, LogValue, TelemetryPlan};
use cairn_observe::Format;
use serde_json::Value;
use std::sync::Arc;

/// Longer formats are cut, so that no line is.
const FORMAT_BYTES_MAX: usize = 512;

/// A format, a zero byte, and lines of `name: value` that the peers say.
pub fn format(data: &[u8]) {
    let at = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (text, said) = (&data[..at.min(FORMAT_BYTES_MAX)], data.get(at + 1..).unwrap_or_default());
    let Ok(text) = std::str::from_utf8(text) else { return };
    if let Err(error) = Format::parse(text) {
        assert!(!error.to_string().is_empty());
        return;
    }
    let said = Said::read(said);
    check_text(text, &said);
    check_json(text, &said);
}

/// Nothing that peers say makes a line more.
fn check_text(text: &str, said: &Said) {
    let lines = |said: &Said| {
        let (written, _) = said.observed(&logged(LogFormat::Text(text.into())));
        assert_eq!(written.last(), Some(&b'\n'), "the line does not end");
        written.iter().filter(|byte| **byte == b'\n').count()
    };
    assert_eq!(lines(said), lines(&Said::read(b"")), "peers changed the number of lines");
}

/// A JSON line is one line, one object, and has the key.
fn check_json(text: &str, said: &Said) {
    let entries = vec![(Arc::from("key"), LogValue::Text(text.into()))];
    let (written, _) = said.observed(&logged(LogFormat::Json(entries)));
    let line = written.strip_suffix(b"\n").unwrap_or_default();
    assert!(!line.contains(&b'\n'), "a JSON line of several lines");
    let object: Option<Value> = serde_json::from_slice(line).ok();
    assert!(object.is_some_and(|object| object.get("key").is_some()), "not JSON: {}", line.escape_ascii());
}

fn logged(format: LogFormat) -> TelemetryPlan {
    let file = FileLog { path: "/dev/stdout".into(), format, omit_empty: false };
    let log = LogPlan { to: LogTarget::File(Arc::new(file)), filter: None };
    TelemetryPlan { logs: vec![log], ..TelemetryPlan::default() }
}
