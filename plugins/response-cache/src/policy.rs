//! What may be kept, for how long, and which tags match (RFC 9110 and 9111).

use cairn_sdk::{HeaderName, Request};
use std::time::Duration;

/// Whether the client takes what was kept: credentials make responses personal, and some clients want fresh ones.
pub(crate) fn is_fresh_wanted(request: Request) -> bool {
    let personal = ["authorization", "range", "if-match", "if-unmodified-since"];
    let control = request.header_text("cache-control").unwrap_or_default().to_ascii_lowercase();
    let wants_new = directives(&control).any(|(name, value)| {
        name == "no-cache" || name == "no-store" || (name == "max-age" && value == Some("0"))
    });
    !wants_new && personal.iter().all(|name| request.header(name).is_none())
}

/// How long a response may be kept; `None` if not at all.
pub(crate) fn lifetime(headers: &[(String, Vec<u8>)], ttl: u64, vary: &[HeaderName]) -> Option<Duration> {
    let values = |name: &'static str| {
        let same = headers.iter().filter(move |(present, _)| present == name);
        same.map(|(_, value)| String::from_utf8_lossy(value).to_ascii_lowercase())
            .collect::<Vec<_>>()
            .join(",")
    };
    if values(":status") != "200" || !values("set-cookie").is_empty() || !values("content-range").is_empty() {
        return None;
    }
    let varies = values("vary");
    let is_keyed = |name: &str| name.is_empty() || vary.iter().any(|keyed| keyed.as_str() == name);
    if !varies.split(',').map(str::trim).all(is_keyed) {
        return None;
    }
    let control = values("cache-control");
    let mut seconds = ttl;
    let mut shared = None;
    for (name, value) in directives(&control) {
        match name {
            "no-store" | "private" | "no-cache" => return None,
            "s-maxage" => shared = value,
            "max-age" => seconds = value?.parse().ok()?,
            _ => {}
        }
    }
    if let Some(value) = shared {
        seconds = value.parse().ok()?;
    }
    (seconds > 0).then(|| Duration::from_secs(seconds.min(31_536_000)))
}

fn directives(control: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    control.split(',').map(|directive| match directive.trim().split_once('=') {
        Some((name, value)) => (name.trim(), Some(value.trim().trim_matches('"'))),
        None => (directive.trim(), None),
    })
}

/// Whether `If-None-Match` names a tag; weakly, as it asks (RFC 9110 §13.1.2).
pub(crate) fn matches(wanted: &[u8], etag: &[u8]) -> bool {
    let strong = |tag: &[u8]| tag.strip_prefix(b"W/").unwrap_or(tag).to_vec();
    let etag = strong(etag);
    wanted.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).any(|tag| tag == b"*" || strong(tag) == etag)
}
