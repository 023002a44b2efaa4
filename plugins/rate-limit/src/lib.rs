//! Limits rates by token buckets in shared data, so that all workers of a proxy count together.
//!
//! ```json
//! {
//!   "limits": [
//!     {"name": "client", "by": [{"header": "x-client"}], "perSecond": 10, "burst": 20},
//!     {"name": "login", "paths": ["/login"], "by": ["address"], "perSecond": 0.2, "burst": 5}
//!   ]
//! }
//! ```

mod bucket;

use bucket::Bucket;
use cairn_sdk::{Counter, Flow, HeaderName, Plugin, Reply, Request, now, shared};
use serde::Deserialize;
use std::time::{Duration, UNIX_EPOCH};

/// Shared data has no end of life, so buckets have a bounded number: keys that fall into the same one share it.
const SLOTS: u64 = 16_384;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    limits: Vec<Limit>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Limit {
    /// The name in metrics and in `ratelimit` headers.
    name: String,
    /// Prefixes of paths; none is all.
    #[serde(default)]
    paths: Vec<String>,
    /// What has a bucket of its own, together; none is one bucket for all.
    #[serde(default)]
    by: Vec<Key>,
    per_second: f64,
    burst: u32,
    #[serde(default = "default_status")]
    status: u16,
}

fn default_status() -> u16 {
    429
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
enum Key {
    Header(HeaderName),
    /// The client's address without its port.
    Address,
    /// The path without its query.
    Path,
    /// The client's identity in the mesh.
    Principal,
}

/// The plugin.
pub struct RateLimit {
    limits: Vec<Limit>,
    requests: Counter,
}

#[cairn_sdk::plugin]
impl Plugin for RateLimit {
    type Config = Config;
    type Exchange = ();

    fn configure(config: Config) -> Result<Self, String> {
        for (index, limit) in config.limits.iter().enumerate() {
            let at = |what: &str| Err(format!("limits[{index}].{what}"));
            if !(limit.per_second > 0.0 && limit.per_second <= 1e6) {
                return at("perSecond: it is above 0 and at most 1000000");
            }
            if limit.burst == 0 {
                return at("burst: it is 1 or more");
            }
            if !(400..600).contains(&limit.status) {
                return at("status: it is no status of failure");
            }
            if config.limits[..index].iter().any(|earlier| earlier.name == limit.name) {
                return at("name: it is there twice");
            }
        }
        let requests = Counter::new("rate_limit_requests_total", &["limit", "decision"]);
        Ok(Self { limits: config.limits, requests })
    }

    fn on_request(&self, request: Request, (): &mut ()) -> Flow {
        let path = request.path_alone();
        let now = now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for limit in self.limits.iter().filter(|limit| limit.is_for(&path)) {
            match limit.take(request, &path, now) {
                Ok(()) => self.requests.add(1, &[&limit.name, "allow"]),
                Err(wait) => {
                    self.requests.add(1, &[&limit.name, "deny"]);
                    let reply = Reply::text(limit.status, "too many requests").with_details("rate_limit");
                    let wait = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
                    return reply.with_header("retry-after", wait.to_string()).with_grpc_status(8).into();
                }
            }
        }
        Flow::Continue
    }
}

impl Limit {
    fn is_for(&self, path: &str) -> bool {
        self.paths.is_empty() || self.paths.iter().any(|prefix| path.starts_with(prefix.as_str()))
    }

    /// Takes a token, or says how long there is none. Shared data that fails does not end the service.
    fn take(&self, request: Request, path: &str, now: Duration) -> Result<(), Duration> {
        let parts = self.by.iter().map(|key| key.of(request, path));
        let slot = parts.fold(FNV_START, |hash, part| fnv(fnv(hash, &part), &[0xff])) % SLOTS;
        let taken = shared::update(&format!("rate-limit/{}/{slot}", self.name), |old| {
            let mut bucket = old.and_then(Bucket::read).unwrap_or_else(|| Bucket::full(self.burst, now));
            let taken = bucket.take(self.per_second, self.burst, now);
            (bucket.write(), taken)
        });
        taken.unwrap_or_else(|error| {
            log_failure(&self.name, error);
            Ok(())
        })
    }
}

fn log_failure(limit: &str, error: cairn_sdk::HostError) {
    cairn_sdk::log::warn!("the limit {limit} could not be counted: {error}");
}

impl Key {
    fn of(&self, request: Request, path: &str) -> Vec<u8> {
        match self {
            Self::Header(name) => request.header(name.as_str()).unwrap_or_default(),
            Self::Address => {
                let address = request.properties().source_address();
                address.map(|address| address.ip().to_string().into_bytes()).unwrap_or_default()
            }
            Self::Path => path.as_bytes().to_vec(),
            Self::Principal => request.properties().source_identity().unwrap_or_default().into_bytes(),
        }
    }
}

/// FNV-1a, 64 bits.
const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest};

    fn proxy(limit: &str) -> Proxy<RateLimit> {
        Proxy::new(&format!(r#"{{"limits": [{limit}]}}"#)).unwrap()
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let mut proxy = proxy(r#"{"name": "all", "perSecond": 2, "burst": 3}"#);
        let passed = |proxy: &mut Proxy<RateLimit>, count: usize| {
            (0..count).filter(|_| proxy.send(TestRequest::get("/")).status == 200).count()
        };
        assert_eq!(passed(&mut proxy, 10), 3);
        proxy.advance(Duration::from_secs(1));
        assert_eq!(passed(&mut proxy, 10), 2);
        proxy.advance(Duration::from_secs(3600));
        assert_eq!(passed(&mut proxy, 10), 3, "a bucket is never more than full");
        let refusal = proxy.send(TestRequest::get("/"));
        assert_eq!((refusal.status, refusal.header("retry-after").as_deref()), (429, Some("1")));
        assert_eq!(proxy.metric("limit=.=all;.;decision=.=allow;.;rate_limit_requests_total"), Some(8));
    }

    #[test]
    fn each_key_has_a_bucket() {
        let limit = r#"{"name": "each", "perSecond": 0.1, "burst": 1, "paths": ["/a"], "status": 503,
            "by": [{"header": "x-client"}, "path", "address"]}"#;
        let mut proxy = proxy(limit);
        let mut send = |path: &str, client: &str, address: &str| {
            proxy.property(&["source", "address"], address);
            proxy.send(TestRequest::get(path).header("x-client", client)).status
        };
        let cases = [
            ("/a", "1", "10.0.0.1:5", 200),
            ("/a?x", "1", "10.0.0.1:6", 503),
            ("/a/b", "1", "10.0.0.1:6", 200),
            ("/a", "2", "10.0.0.1:5", 200),
            ("/a", "1", "10.0.0.2:5", 200),
            ("/b", "1", "10.0.0.1:5", 200),
            ("/b", "1", "10.0.0.1:5", 200),
        ];
        for (path, client, address, status) in cases {
            assert_eq!(send(path, client, address), status, "{path} {client} {address}");
        }
    }

    #[test]
    fn a_proxy_without_shared_data_does_not_end_the_service() {
        let mut proxy = proxy(r#"{"name": "all", "perSecond": 1, "burst": 1}"#);
        proxy.refuse("proxy_set_shared_data", 10);
        assert!((0..3).all(|_| proxy.send(TestRequest::get("/")).status == 200));
        assert_eq!(proxy.logs()[0], "the limit all could not be counted: internal failure");
    }

    #[test]
    fn what_another_worker_left_there_is_survived() {
        let mut proxy = proxy(r#"{"name": "all", "perSecond": 1, "burst": 1}"#);
        let key = format!("rate-limit/all/{}", FNV_START % SLOTS);
        proxy.set_shared(&key, "junk");
        assert_eq!(proxy.send(TestRequest::get("/")).status, 200);
        assert_eq!(proxy.shared(&key).map(|value| value.len()), Some(16));
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let limit = |more: &str| format!(r#"{{"limits": [{{"name": "a", {more}}}]}}"#);
        let cases = [
            (limit(r#""perSecond": 0, "burst": 1"#), "configuration: limits[0].perSecond: "),
            (limit(r#""perSecond": 1, "burst": 0"#), "configuration: limits[0].burst: "),
            (limit(r#""perSecond": 1, "burst": 1, "status": 200"#), "configuration: limits[0].status: "),
            (
                limit(r#""perSecond": 1, "burst": 1, "by": [{"cookie": "a"}]"#),
                "configuration: limits[0].by[0]",
            ),
        ];
        for (json, error) in cases {
            let found = Proxy::<RateLimit>::new(&json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
