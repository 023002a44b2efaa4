//! Access log lines: Istio's default text for exchanges, ztunnel's for connections.

use crate::http_record::HttpRecord;
use crate::tcp_record::TcpRecord;
use std::io::Write;
use std::net::SocketAddr;
use std::time::SystemTime;
use time::OffsetDateTime;

/// Appends Istio's default text line (`meshConfig.accessLogFormat`, its default), without a line feed.
pub(crate) fn http(out: &mut Vec<u8>, record: &HttpRecord<'_>) {
    out.push(b'[');
    append_timestamp(out, record.started, 3);
    out.extend_from_slice(b"] \"");
    append_or_dash(out, record.method);
    out.push(b' ');
    append_or_dash(out, record.logged_path());
    out.push(b' ');
    append_or_dash(out, record.protocol);
    out.extend_from_slice(b"\" ");
    append_number(out, u64::from(record.status));
    out.push(b' ');
    append_or_dash(out, record.flags);
    out.push(b' ');
    append_reason(out, record.details);
    // Connection termination details: an exchange outlives its connection only when nobody ended it.
    out.extend_from_slice(b" - \"");
    append_reason(out, record.upstream_failure);
    out.extend_from_slice(b"\" ");
    append_number(out, record.request_body_bytes);
    out.push(b' ');
    append_number(out, record.response_body_bytes);
    out.push(b' ');
    append_number(out, record.duration.as_millis() as u64);
    out.push(b' ');
    match record.upstream_duration {
        Some(duration) => append_number(out, duration.as_millis() as u64),
        None => out.push(b'-'),
    }
    for header in [record.forwarded_for, record.user_agent, record.request_id] {
        out.extend_from_slice(b" \"");
        append_bytes(out, header.unwrap_or(b"-"));
        out.push(b'"');
    }
    out.extend_from_slice(b" \"");
    append_or_dash(out, record.authority);
    out.extend_from_slice(b"\" \"");
    match record.upstream {
        Some(upstream) => append_address(out, upstream),
        None => out.push(b'-'),
    }
    out.extend_from_slice(b"\" ");
    append_or_dash(out, record.cluster);
    out.push(b' ');
    match record.upstream_local {
        Some(local) => append_address(out, local),
        None => out.push(b'-'),
    }
    out.push(b' ');
    append_address(out, record.local);
    out.push(b' ');
    append_address(out, record.downstream);
    // SNI: none inside a tunnel.
    out.extend_from_slice(b" - ");
    append_or_dash(out, record.route);
}

/// A value of ztunnel's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpValue<'a> {
    /// A text; it may hold anything.
    Text(&'a str),
    /// The same, written without quotes in a text line.
    Word(&'a str),
    /// An address with its port.
    Address(SocketAddr),
    /// A number of bytes.
    Number(u64),
    /// A time.
    Milliseconds(u64),
}

impl TcpRecord<'_> {
    /// Every field that [`TcpRecord::for_each_field`] may give.
    pub const FIELDS: [&'static str; 17] = [
        "src.addr",
        "src.workload",
        "src.namespace",
        "src.identity",
        "src.cluster",
        "dst.addr",
        "dst.hbone_addr",
        "dst.service",
        "dst.workload",
        "dst.namespace",
        "dst.identity",
        "dst.cluster",
        "direction",
        "bytes_sent",
        "bytes_recv",
        "duration",
        "error",
    ];

    /// The fields of ztunnel's line, in order; what there is nothing to say of is left out.
    pub fn for_each_field(&self, put: impl FnMut(&'static str, TcpValue<'_>)) {
        tcp_fields(self, put);
    }
}

fn tcp_fields(record: &TcpRecord<'_>, mut put: impl FnMut(&'static str, TcpValue<'_>)) {
    put("src.addr", TcpValue::Address(record.source));
    if let Some(workload) = record.source_workload {
        put("src.workload", TcpValue::Text(&workload.name));
        put("src.namespace", TcpValue::Text(&workload.namespace));
    }
    if let Some(identity) = record.source_identity {
        put("src.identity", TcpValue::Text(identity.as_str()));
    }
    if let Some(workload) = record.source_workload {
        put("src.cluster", TcpValue::Text(&workload.cluster_id));
    }
    put("dst.addr", TcpValue::Address(record.destination));
    if !record.hbone_authority.is_empty() {
        put("dst.hbone_addr", TcpValue::Word(record.hbone_authority));
    }
    if let Some(service) = record.service {
        put("dst.service", TcpValue::Text(&service.hostname));
    }
    if let Some(workload) = record.destination_workload {
        put("dst.workload", TcpValue::Text(&workload.name));
        put("dst.namespace", TcpValue::Text(&workload.namespace));
    }
    if let Some(identity) = record.destination_identity {
        put("dst.identity", TcpValue::Text(identity.as_str()));
    }
    if let Some(workload) = record.destination_workload {
        put("dst.cluster", TcpValue::Text(&workload.cluster_id));
    }
    put("direction", TcpValue::Text(record.direction.as_str()));
    put("bytes_sent", TcpValue::Number(record.bytes_sent));
    put("bytes_recv", TcpValue::Number(record.bytes_received));
    put("duration", TcpValue::Milliseconds(record.duration.as_millis() as u64));
    if !record.error.is_empty() {
        put("error", TcpValue::Text(record.error));
    }
}

fn level(record: &TcpRecord<'_>) -> &'static str {
    if record.error.is_empty() { "info" } else { "error" }
}

/// Appends ztunnel's line, without a line feed.
pub(crate) fn tcp(out: &mut Vec<u8>, record: &TcpRecord<'_>) {
    append_timestamp(out, record.started + record.duration, 6);
    out.push(b'\t');
    out.extend_from_slice(level(record).as_bytes());
    out.extend_from_slice(b"\taccess\tconnection complete\t");
    let mut is_first = true;
    tcp_fields(record, |name, value| {
        if !std::mem::take(&mut is_first) {
            out.push(b' ');
        }
        out.extend_from_slice(name.as_bytes());
        out.push(b'=');
        match value {
            TcpValue::Text(text) => quoted(out, |out| append_text(out, text)),
            TcpValue::Word(text) => append_text(out, text),
            TcpValue::Address(address) => append_address(out, address),
            TcpValue::Number(number) => append_number(out, number),
            TcpValue::Milliseconds(number) => quoted(out, |out| append_milliseconds(out, number)),
        }
    });
}

/// Appends ztunnel's line as one JSON object, without a line feed.
pub(crate) fn tcp_json(out: &mut Vec<u8>, record: &TcpRecord<'_>) {
    out.extend_from_slice(b"{\"level\":\"");
    out.extend_from_slice(level(record).as_bytes());
    out.extend_from_slice(b"\",\"time\":\"");
    append_timestamp(out, record.started + record.duration, 6);
    out.extend_from_slice(b"\",\"scope\":\"access\",\"message\":\"connection complete\"");
    tcp_fields(record, |name, value| {
        out.extend_from_slice(b",\"");
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"\":");
        match value {
            TcpValue::Text(text) | TcpValue::Word(text) => {
                // Writing to a Vec cannot fail, nor can a text as JSON.
                let _ = serde_json::to_writer(&mut *out, text);
            }
            TcpValue::Address(address) => quoted(out, |out| append_address(out, address)),
            TcpValue::Number(number) => append_number(out, number),
            TcpValue::Milliseconds(number) => quoted(out, |out| append_milliseconds(out, number)),
        }
    });
    out.push(b'}');
}

fn append_milliseconds(out: &mut Vec<u8>, number: u64) {
    append_number(out, number);
    out.extend_from_slice(b"ms");
}

fn quoted(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    out.push(b'"');
    write(out);
    out.push(b'"');
}

/// Why something failed, or what decided: as Envoy writes it, without spaces; `-` if there is nothing to say.
fn append_reason(out: &mut Vec<u8>, reason: &str) {
    let before = out.len();
    append_or_dash(out, reason);
    for byte in out.iter_mut().skip(before).filter(|byte| **byte == b' ') {
        *byte = b'_';
    }
}

fn append_or_dash(out: &mut Vec<u8>, value: &str) {
    if value.is_empty() {
        out.push(b'-');
    } else {
        append_bytes(out, value.as_bytes());
    }
}

/// A value as Envoy writes it: as it is, quotes and what is no UTF-8 included. Only what no header can hold, and what
/// could end a line, is escaped: a token's claim or a plugin's word might hold a line feed.
pub fn append_bytes(out: &mut Vec<u8>, value: &[u8]) {
    let ends_a_line = |byte: u8| byte < b' ' && byte != b'\t';
    if !value.iter().copied().any(ends_a_line) {
        out.extend_from_slice(value);
        return;
    }
    for byte in value.iter().copied() {
        if ends_a_line(byte) {
            // Writing to a Vec cannot fail.
            let _ = write!(out, "\\x{byte:02x}");
        } else {
            out.push(byte);
        }
    }
}

/// A text of a ztunnel's line: what could end a line or a field is escaped; `-` if empty.
fn append_text(out: &mut Vec<u8>, value: &str) {
    if value.is_empty() {
        out.push(b'-');
        return;
    }
    let plain = |byte: u8| byte >= b' ' && byte != 0x7f && byte != b'"' && byte != b'\\';
    if value.bytes().all(plain) {
        out.extend_from_slice(value.as_bytes());
        return;
    }
    for byte in value.bytes() {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            byte if plain(byte) => out.push(byte),
            byte => {
                // Writing to a Vec cannot fail.
                let _ = write!(out, "\\x{byte:02x}");
            }
        }
    }
}

/// `10.0.0.1:80`, `[::1]:80`.
pub fn append_address(out: &mut Vec<u8>, address: SocketAddr) {
    let SocketAddr::V4(v4) = address else {
        // Writing to a Vec cannot fail.
        let _ = write!(out, "{address}");
        return;
    };
    for (index, octet) in v4.ip().octets().into_iter().enumerate() {
        if index > 0 {
            out.push(b'.');
        }
        append_number(out, u64::from(octet));
    }
    out.push(b':');
    append_number(out, u64::from(v4.port()));
}

/// A number in decimal.
pub fn append_number(out: &mut Vec<u8>, mut value: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
        at -= 1;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(at..).unwrap_or_default());
}

fn padded(out: &mut Vec<u8>, value: u32, width: u32) {
    for place in (0..width).rev() {
        out.push(b'0' + (value / 10_u32.pow(place) % 10) as u8);
    }
}

/// RFC 3339 in UTC with 3 or 6 digits of a second.
pub fn append_timestamp(out: &mut Vec<u8>, at: SystemTime, digits: u32) {
    let at = OffsetDateTime::from(at);
    padded(out, u32::try_from(at.year()).unwrap_or(0), 4);
    for (separator, value) in [
        (b'-', u8::from(at.month())),
        (b'-', at.day()),
        (b'T', at.hour()),
        (b':', at.minute()),
        (b':', at.second()),
    ] {
        out.push(separator);
        padded(out, u32::from(value), 2);
    }
    out.push(b'.');
    padded(out, at.nanosecond() / 10_u32.pow(9 - digits), digits);
    out.push(b'Z');
}

#[cfg(test)]
#[path = "line/tests.rs"]
mod tests;
