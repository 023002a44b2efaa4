//! What a WasmPlugin may use, from annotations: `WasmPlugin` has no fields for it.

use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::Findings;
use cairn_mesh::PluginLimits;
use std::ops::RangeInclusive;
use std::time::Duration;

/// The longest that one call of the plugin may take: `50ms`, `2s`.
const DEADLINE: &str = "cairn.dev/deadline";
/// The most memory of one instance: `64Mi`.
const MEMORY: &str = "cairn.dev/memory";
/// How many threads of its own it has from the start: `2`.
const OWN_THREADS: &str = "cairn.dev/own-threads";

/// Less than the first is not told from nothing by the clock of plugins, more than the last is no proxy any more.
const DEADLINES: RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_secs(10);
const MEBIBYTE: usize = 1 << 20;
const MEMORIES: RangeInclusive<usize> = MEBIBYTE..=1 << 30;
const THREADS: RangeInclusive<usize> = 1..=64;

/// The limits; what cannot be read is reported, and as if it were not there.
pub(super) fn decode(object: &Object, findings: &mut Findings) -> PluginLimits {
    let mut limits = PluginLimits::default();
    let mut read = |name: &str, expected: &str, take: &mut dyn FnMut(&str) -> Option<()>| {
        let Some(text) = object.annotations.get(name) else { return };
        if take(text.trim()).is_none() {
            let at = FieldPath::of(&["metadata", "annotations", name]);
            let reason = format!("is `{text}`, not {expected}: the default is in force");
            findings.note(Severity::Error, "invalid-value", &at, reason);
        }
    };
    read(DEADLINE, "a time from 5ms to 10s", &mut |text| {
        limits.deadline = Some(duration(text).filter(|deadline| DEADLINES.contains(deadline))?);
        Some(())
    });
    read(MEMORY, "an amount from 1Mi to 1Gi", &mut |text| {
        limits.memory_bytes_max = Some(bytes(text).filter(|bytes| MEMORIES.contains(bytes))?);
        Some(())
    });
    read(OWN_THREADS, "a number from 1 to 64", &mut |text| {
        limits.own_threads = Some(whole(text).filter(|threads| THREADS.contains(threads))?);
        Some(())
    });
    limits
}

fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s')?, 1000),
    };
    Some(Duration::from_millis(u64::try_from(whole(number)?).ok()?.checked_mul(unit)?))
}

fn bytes(text: &str) -> Option<usize> {
    let (number, unit) = match text.strip_suffix("Mi") {
        Some(number) => (number, MEBIBYTE),
        None => (text.strip_suffix("Gi")?, 1 << 30),
    };
    whole(number)?.checked_mul(unit)
}

/// Digits and nothing else.
fn whole(text: &str) -> Option<usize> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{object, short};

    #[test]
    fn limits_are_read_from_annotations_and_what_is_wrong_is_reported() {
        let none = PluginLimits::default();
        let deadline =
            |milliseconds| PluginLimits { deadline: Some(Duration::from_millis(milliseconds)), ..none };
        let memory = |bytes| PluginLimits { memory_bytes_max: Some(bytes), ..none };
        let threads = |count| PluginLimits { own_threads: Some(count), ..none };
        for (annotation, value, expected) in [
            ("deadline", "50ms", deadline(50)),
            ("deadline", "2s", deadline(2000)),
            ("deadline", "4ms", none),
            ("deadline", "11s", none),
            ("deadline", "50", none),
            ("deadline", "1.5s", none),
            ("deadline", "ms", none),
            ("memory", "64Mi", memory(64 << 20)),
            ("memory", "1Gi", memory(1 << 30)),
            ("memory", "2Gi", none),
            ("memory", "0Mi", none),
            ("memory", "64", none),
            ("memory", "99999999999999999999Gi", none),
            ("own-threads", "2", threads(2)),
            ("own-threads", "0", none),
            ("own-threads", "65", none),
            ("own-threads", "-1", none),
        ] {
            let text = format!(
                "apiVersion: extensions.istio.io/v1alpha1\nkind: WasmPlugin\nmetadata: {{name: w, namespace: n, \
                 annotations: {{cairn.dev/{annotation}: '{value}'}}}}"
            );
            let mut findings = Findings::default();
            assert_eq!(decode(&object(&text), &mut findings), expected, "{annotation} {value}");
            let said: Vec<String> = findings.list.iter().map(short).collect();
            let error = format!("error invalid-value metadata.annotations[\"cairn.dev/{annotation}\"]");
            assert_eq!(said, if expected == none { vec![error] } else { vec![] }, "{annotation} {value}");
        }
    }
}
