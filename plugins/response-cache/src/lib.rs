//! Keeps responses in bounded memory and answers `If-None-Match` with 304.
//!
//! ```json
//! {"paths": ["/static"], "megabytes": 16, "entryKilobytes": 256, "ttl": 60, "vary": ["accept-encoding"]}
//! ```
//!
//! What is kept, and for how long, follows RFC 9111 as far as a shared cache without revalidation needs it: `cache-control` of
//! both sides, `authorization`, `set-cookie`, `vary`. Bodies are collected as they pass by and hold up nobody.

mod policy;

use cairn_sdk::{Cache, Chunk, Counter, Flow, HeaderName, Plugin, Reply, Request, Response, now};
use policy::{is_fresh_wanted, lifetime};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct Config {
    /// Prefixes of paths; none is all.
    paths: Vec<String>,
    /// How much memory each worker may use.
    megabytes: usize,
    /// The largest body that is kept.
    entry_kilobytes: usize,
    /// How long responses are kept whose upstream does not say, in seconds; 0 does not keep them.
    ttl: u64,
    /// Request headers that tell responses apart. A response that varies by others is not kept.
    vary: Vec<HeaderName>,
}

impl Default for Config {
    fn default() -> Self {
        Self { paths: Vec::new(), megabytes: 16, entry_kilobytes: 256, ttl: 0, vary: Vec::new() }
    }
}

/// The plugin.
pub struct ResponseCache {
    config: Config,
    kept: RefCell<Cache<String, Rc<Kept>>>,
    requests: Counter,
}

struct Kept {
    status: u16,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    etag: Vec<u8>,
    since: SystemTime,
}

/// A response on its way to be kept.
pub struct Collected {
    key: String,
    response: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    lasts: Duration,
}

/// What becomes of an exchange's response.
#[derive(Default)]
pub enum Fate {
    /// It is of no interest.
    #[default]
    Passes,
    /// It may be kept under this key.
    Awaited(String),
    /// It is being collected.
    Collected(Collected),
}

#[cairn_sdk::plugin]
impl Plugin for ResponseCache {
    type Config = Config;
    type Exchange = Fate;

    fn configure(config: Config) -> Result<Self, String> {
        if config.megabytes == 0 || config.megabytes > 128 {
            return Err("megabytes: it is 1 to 128".to_owned());
        }
        if config.entry_kilobytes == 0 || config.entry_kilobytes > config.megabytes * 1024 {
            return Err("entryKilobytes: it is at least 1 and no more than fits".to_owned());
        }
        let kept = RefCell::new(Cache::new(config.megabytes << 20));
        Ok(Self { config, kept, requests: Counter::new("response_cache_requests_total", &["result"]) })
    }

    fn on_request(&self, request: Request, fate: &mut Fate) -> Flow {
        let is_head = request.method() == "HEAD";
        if !(is_head || request.method() == "GET")
            || !self.is_for(&request.path())
            || !is_fresh_wanted(request)
        {
            return Flow::Continue;
        }
        let key = self.key(request);
        let kept = self.kept.borrow_mut().get(&key).cloned();
        match kept {
            Some(kept) => {
                let matches = request
                    .header("if-none-match")
                    .is_some_and(|wanted| policy::matches(&wanted, &kept.etag));
                self.requests.add(1, &[if matches { "not_modified" } else { "hit" }]);
                kept.reply(matches, is_head).into()
            }
            None => {
                self.requests.add(1, &["miss"]);
                // The answer to HEAD has no body to keep.
                if !is_head {
                    *fate = Fate::Awaited(key);
                }
                Flow::Continue
            }
        }
    }

    fn on_response(&self, response: Response, fate: &mut Fate) -> Flow {
        let Fate::Awaited(key) = std::mem::take(fate) else { return Flow::Continue };
        let headers = response.headers();
        let length = response.header_text("content-length").and_then(|length| length.parse::<usize>().ok());
        let fits = length.is_none_or(|length| length <= self.config.entry_kilobytes << 10);
        if let Some(lasts) = lifetime(&headers, self.config.ttl, &self.config.vary).filter(|_| fits) {
            *fate = Fate::Collected(Collected { key, response: headers, body: Vec::new(), lasts });
        }
        Flow::Continue
    }

    fn on_response_chunk(&self, _: Response, chunk: &mut Chunk, fate: &mut Fate) -> Result<(), Reply> {
        let Fate::Collected(collected) = fate else { return Ok(()) };
        let Ok(bytes) = chunk.read() else {
            *fate = Fate::Passes;
            return Ok(());
        };
        collected.body.extend_from_slice(&bytes);
        if collected.body.len() > self.config.entry_kilobytes << 10 {
            *fate = Fate::Passes;
        } else if chunk.is_last()
            && let Fate::Collected(collected) = std::mem::take(fate)
        {
            self.keep(collected);
        }
        Ok(())
    }
}

impl ResponseCache {
    fn is_for(&self, path: &str) -> bool {
        self.config.paths.is_empty()
            || self.config.paths.iter().any(|prefix| path.starts_with(prefix.as_str()))
    }

    /// Lengths keep parts apart.
    fn key(&self, request: Request) -> String {
        let mut key = format!("{} {}", request.authority(), request.path());
        for header in &self.config.vary {
            let values = request.header_values(header.as_str());
            key.push_str(&format!("\n{values:?}"));
        }
        key
    }

    fn keep(&self, Collected { key, response, body, lasts }: Collected) {
        let find =
            |name: &str| response.iter().find(|(present, _)| present == name).map(|(_, value)| value.clone());
        // A body cut short is none.
        let length =
            find("content-length").and_then(|value| String::from_utf8(value).ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length != body.len()) {
            return;
        }
        let etag = find("etag").unwrap_or_else(|| digest(&body).into_bytes());
        let weight = key.len()
            + body.len()
            + response.iter().map(|(name, value)| name.len() + value.len() + 64).sum::<usize>();
        let own = ["connection", "content-length", "date", "transfer-encoding", "etag"];
        let is_told = |name: &str| !name.starts_with(':') && !own.contains(&name);
        let headers = response.into_iter().filter(|(name, _)| is_told(name)).collect();
        let kept = Kept { status: 200, headers, body, etag, since: now() };
        self.kept.borrow_mut().insert(key, Rc::new(kept), weight + 256, lasts);
    }
}

impl Kept {
    fn reply(&self, is_known: bool, is_head: bool) -> Reply {
        let status = if is_known { 304 } else { self.status };
        let mut reply = Reply::empty(status).with_details("response_cache");
        for (name, value) in &self.headers {
            // What describes a body does not belong where there is none (RFC 9110 §15.4.5).
            if !(is_known && name.starts_with("content-")) {
                reply = reply.with_header(name, value);
            }
        }
        let age = now().duration_since(self.since).unwrap_or_default().as_secs();
        reply = reply.with_header("etag", &self.etag).with_header("age", age.to_string());
        if !is_known && !is_head {
            reply.body.clone_from(&self.body);
        }
        reply
    }
}

/// An entity tag for a body whose upstream gave none.
fn digest(body: &[u8]) -> String {
    let hash = Sha256::digest(body);
    format!("\"{}\"", hash[..12].iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

#[cfg(test)]
mod tests;
