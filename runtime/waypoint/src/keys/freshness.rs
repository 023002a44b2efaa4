//! How long a key set may be used without asking again, as its server says (RFC 9111 §4.2, §5.2.2), within bounds.

use http::header::{AGE, CACHE_CONTROL, DATE, EXPIRES};
use http::{HeaderMap, HeaderName};
use std::time::{Duration, SystemTime};

/// However short a server makes the time: it is not asked more often for being asked.
const MIN: Duration = Duration::from_secs(60);
/// However long it makes it: keys that were taken back are gone after that.
const MAX: Duration = Duration::from_secs(60 * 60);

/// When to ask again; `None` when the server says nothing that is understood.
pub(super) fn of(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let fresh = max_age(headers).or_else(|| until_expiry(headers, now))?;
    Some(fresh.clamp(MIN, MAX))
}

/// `no-store` and `no-cache` mean at once; else `max-age`, less the age that the answer already has.
fn max_age(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all(CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let directives = values.flat_map(|value| value.split(',')).map(str::trim);
    let mut found = None;
    for directive in directives {
        let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
        match name.to_ascii_lowercase().as_str() {
            "no-store" | "no-cache" => return Some(Duration::ZERO),
            "max-age" => found = value.trim_matches('"').parse().ok().map(Duration::from_secs),
            _ => {}
        }
    }
    let age = text(headers, AGE)
        .and_then(|age| age.trim().parse().ok())
        .map_or(Duration::ZERO, Duration::from_secs);
    found.map(|found| found.saturating_sub(age))
}

/// `Expires`, counted from `Date`. A time that cannot be read is over (RFC 9111 §5.3).
fn until_expiry(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let expires = text(headers, EXPIRES)?;
    let from = text(headers, DATE).and_then(|date| httpdate::parse_http_date(date).ok()).unwrap_or(now);
    let until = httpdate::parse_http_date(expires).ok();
    Some(until.and_then(|until| until.duration_since(from).ok()).unwrap_or_default())
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_server_says_how_long_its_keys_are_fresh() {
        const DATE: (&str, &str) = ("date", "Sun, 06 Nov 1994 08:00:00 GMT");
        for (name, headers, seconds) in [
            ("nothing", &[][..], None),
            ("max-age", &[("cache-control", "public, max-age=600, must-revalidate")], Some(600)),
            ("in quotes", &[("cache-control", "max-age=\"600\"")], Some(600)),
            ("less its age", &[("cache-control", "max-age=600"), ("age", "100")], Some(500)),
            ("an age that is more", &[("cache-control", "max-age=600"), ("age", "700")], Some(60)),
            ("at least a minute", &[("cache-control", "max-age=1")], Some(60)),
            ("at most an hour", &[("cache-control", "max-age=86400")], Some(3600)),
            ("not to be kept", &[("cache-control", "no-store, max-age=600")], Some(60)),
            ("to be asked for each time", &[("cache-control", "No-Cache")], Some(60)),
            ("several lines", &[("cache-control", "private"), ("cache-control", "max-age=300")], Some(300)),
            ("no number", &[("cache-control", "max-age=x")], None),
            ("expiry", &[DATE, ("expires", "Sun, 06 Nov 1994 08:10:00 GMT")], Some(600)),
            ("expiry without date", &[("expires", "Sun, 06 Nov 1994 08:20:00 GMT")], Some(600)),
            ("expired", &[DATE, ("expires", "0")], Some(60)),
            (
                "max-age before expiry",
                &[DATE, ("expires", "Sun, 06 Nov 1994 08:10:00 GMT"), ("cache-control", "max-age=120")],
                Some(120),
            ),
        ] {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(*name, HeaderValue::from_static(value));
            }
            let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:10:00 GMT").unwrap();
            assert_eq!(of(&map, now), seconds.map(Duration::from_secs), "{name}");
        }
    }
}
