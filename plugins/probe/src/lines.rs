//! The lines that are logged: what the host gave, written so that two hosts can be compared.

use crate::abi::{self, Given, log};
use std::fmt::Write;

/// The most bytes of a value that are written out.
const SHOWN_MAX: usize = 160;

/// Bytes as text if they are, else in hexadecimal and as text.
pub(crate) fn show(bytes: &[u8]) -> String {
    if !bytes.is_empty() && bytes.iter().all(|byte| (32..127).contains(byte)) {
        return format!("\"{}\"", String::from_utf8_lossy(bytes));
    }
    let shown = &bytes[..bytes.len().min(SHOWN_MAX)];
    let mut text = String::new();
    for byte in shown {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    format!("hex[{}]:{text} ~{:?}", bytes.len(), String::from_utf8_lossy(shown))
}

/// A property. Segments are separated by dots here, and a bar stands for a dot within one.
pub(crate) fn property(path: &str) {
    let Given { status, bytes, .. } = abi::property(path.replace('.', "\0").replace('|', ".").as_bytes());
    let shown = if status == 0 { show(&bytes) } else { String::new() };
    log(&format!("PROP {path} st={status} len={} {shown}", bytes.len()));
}

/// A serialised map.
pub(crate) fn map(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = (pairs.len() as u32).to_le_bytes().to_vec();
    for (name, value) in pairs {
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend((value.len() as u32).to_le_bytes());
    }
    for part in pairs.iter().flat_map(|(name, value)| [name, value]) {
        bytes.extend(part.as_bytes());
        bytes.push(0);
    }
    bytes
}

/// A header map as the host gives it: status, entries, and the bytes of its serialised form.
pub(crate) fn entries(map: u32) -> (u32, Vec<(String, String)>, usize) {
    let Given { status, bytes, .. } = abi::pairs(map);
    let number = |at: usize| {
        bytes.get(at..at + 4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]) as usize)
    };
    let count = number(0).unwrap_or_default();
    let mut at = 4 + 8 * count;
    let mut entries = Vec::new();
    let text = |at: usize, length: usize| {
        bytes.get(at..at + length).map(|part| String::from_utf8_lossy(part).into_owned())
    };
    for index in 0..count {
        let (Some(name), Some(value)) = (number(4 + 8 * index), number(8 + 8 * index)) else { break };
        let (Some(first), Some(second)) = (text(at, name), text(at + name + 1, value)) else { break };
        entries.push((first, second));
        at += name + value + 2;
    }
    (status, entries, bytes.len())
}

/// The value of a header.
pub(crate) fn value(map: u32, name: &str) -> String {
    let Given { status, bytes, null } = abi::value(map, name);
    let shown = if status == 0 { show(&bytes) + " " } else { String::new() };
    format!("st={status} {shown}null={null}")
}

/// A part of a buffer, and its status.
pub(crate) fn buffer(buffer: u32, start: usize, max: usize) -> String {
    let Given { status, bytes, null } = abi::buffer(buffer, start, max);
    let (known, length, flags) = abi::buffer_status(buffer);
    let shown = if status == 0 { show(&bytes) } else { String::new() };
    format!("bytes st={status} null={null} {shown} | status st={known} len={length} flags={flags}")
}

/// All maps and buffers, and some that are none.
pub(crate) fn phase(name: &str) {
    for map in 0..9 {
        let (status, entries, bytes) = entries(map);
        let (known, size) = abi::map_size(map);
        log(&format!(
            "MAP {name} type={map} pairs st={status} n={} bytes={bytes} | size st={known} {size} | value(absent) {} | value(:path) {}",
            entries.len(),
            value(map, "nope"),
            value(map, ":path")
        ));
    }
    for number in 0..10 {
        log(&format!("BUF {name} type={number} {}", buffer(number, 0, 40)));
    }
}
