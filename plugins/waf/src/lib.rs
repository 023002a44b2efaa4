//! A small web application firewall: what looks like an attack adds up to a score, and too high a score is refused.
//!
//! ```json
//! {
//!   "mode": "block", "threshold": 5,
//!   "inspect": {"body": true, "bodyKilobytes": 64, "headers": ["referer"]},
//!   "disable": ["scanner-agent"], "except": [{"path": "/editor", "rules": ["xss"]}]
//! }
//! ```

mod normalize;
mod rules;

use cairn_sdk::{Body, Counter, Flow, HeaderName, Plugin, Reply, Request, log};
use normalize::normalize;
use rules::{RULES, Rule, Where};
use serde::Deserialize;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    mode: Mode,
    /// The score from which a request is refused. A clear attack scores 5, a hint 2 or 3.
    threshold: u32,
    inspect: Inspect,
    /// Names of rules or of their groups that do not count.
    disable: Vec<String>,
    except: Vec<Exception>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    /// Refuses.
    Block,
    /// Logs, counts, and lets pass.
    Detect,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
struct Inspect {
    /// Whether bodies are looked at that are forms, JSON, XML or text.
    body: bool,
    /// The largest body that is let through to be looked at; larger ones are refused with 413.
    body_kilobytes: usize,
    /// Headers beside `user-agent`, `referer` and `cookie`.
    headers: Vec<HeaderName>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    /// The prefix of paths.
    path: String,
    rules: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Block,
            threshold: 5,
            inspect: Inspect::default(),
            disable: Vec::new(),
            except: Vec::new(),
        }
    }
}

impl Default for Inspect {
    fn default() -> Self {
        Self { body: true, body_kilobytes: 128, headers: Vec::new() }
    }
}

/// The plugin.
pub struct Firewall {
    config: Config,
    hits: Counter,
}

/// What is known of a request when its body comes.
#[derive(Default)]
pub struct Seen {
    score: u32,
    path: String,
    hits: Vec<&'static str>,
}

#[cairn_sdk::plugin]
impl Plugin for Firewall {
    type Config = Config;
    type Exchange = Seen;

    fn configure(config: Config) -> Result<Self, String> {
        let named = config.except.iter().flat_map(|exception| &exception.rules).chain(&config.disable);
        for name in named {
            if !RULES.iter().any(|rule| rule.is_named(name)) {
                return Err(format!("there is no rule or group `{name}`"));
            }
        }
        if config.threshold == 0 {
            return Err("threshold: everything would be refused".to_owned());
        }
        if !(1..=1024).contains(&config.inspect.body_kilobytes) {
            return Err("inspect.bodyKilobytes: it is 1 to 1024".to_owned());
        }
        Ok(Self { config, hits: Counter::new("waf_hits_total", &["rule", "mode"]) })
    }

    fn on_request(&self, request: Request, seen: &mut Seen) -> Flow {
        seen.path = request.path_alone();
        self.look(Where::Path, seen.path.clone().as_bytes(), seen);
        if let Some(query) = request.query() {
            self.look(Where::Query, query.as_bytes(), seen);
        }
        let always = ["user-agent", "referer", "cookie"];
        for name in always.into_iter().chain(self.config.inspect.headers.iter().map(HeaderName::as_str)) {
            let place = if name == "user-agent" { Where::Agent } else { Where::Header };
            for value in request.header_values(name) {
                self.look(place, &value, seen);
            }
        }
        if let Some(reply) = self.verdict(seen) {
            return reply.into();
        }
        self.ask_for_body(request)
    }

    fn on_request_body(&self, _: Request, body: Body, seen: &mut Seen) -> Flow {
        let Ok(bytes) = body.read() else {
            return self.refuse(Reply::text(503, "the body cannot be looked at").with_details("waf_no_body"));
        };
        if bytes.len() > self.config.inspect.body_kilobytes << 10 {
            return self.too_large();
        }
        self.look(Where::Body, &bytes, seen);
        self.verdict(seen).map_or(Flow::Continue, Flow::Reply)
    }
}

impl Firewall {
    fn ask_for_body(&self, request: Request) -> Flow {
        let kind = request.header_text("content-type").unwrap_or_default().to_ascii_lowercase();
        let readable =
            ["form", "json", "xml", "text"].iter().any(|word| kind.contains(word)) || kind.is_empty();
        if !self.config.inspect.body || !readable || ["GET", "HEAD"].contains(&request.method().as_str()) {
            return Flow::Continue;
        }
        let length = request.header_text("content-length").and_then(|length| length.parse::<usize>().ok());
        if length.is_some_and(|length| length > self.config.inspect.body_kilobytes << 10) {
            return self.too_large();
        }
        Flow::ReadBody
    }

    fn too_large(&self) -> Flow {
        self.refuse(Reply::text(413, "the body is too large to be looked at").with_details("waf_body_size"))
    }

    fn refuse(&self, reply: Reply) -> Flow {
        match self.config.mode {
            Mode::Block => reply.into(),
            Mode::Detect => Flow::Continue,
        }
    }

    /// Adds up what a text scores, raw and normalized. A rule counts once per request.
    fn look(&self, place: Where, text: &[u8], seen: &mut Seen) {
        if text.is_empty() {
            return;
        }
        let plain = normalize(text);
        for rule in RULES.iter().filter(|rule| rule.is_for(place)) {
            if !seen.hits.contains(&rule.name) && rule.hits(&plain) && !self.is_off(rule, &seen.path) {
                seen.hits.push(rule.name);
                seen.score += rule.score;
                self.hits
                    .add(1, &[rule.name, if self.config.mode == Mode::Block { "block" } else { "detect" }]);
            }
        }
    }

    fn is_off(&self, rule: &Rule, path: &str) -> bool {
        let here = self.config.except.iter().filter(|exception| path.starts_with(exception.path.as_str()));
        let named = here.flat_map(|exception| &exception.rules).chain(&self.config.disable);
        named.into_iter().any(|name| rule.is_named(name))
    }

    fn verdict(&self, seen: &Seen) -> Option<Reply> {
        if seen.score < self.config.threshold {
            return None;
        }
        // What was sent stays out of the log: it may hold a secret, and it is an attacker's.
        log::warn!("a request scores {} by {}", seen.score, seen.hits.join(", "));
        let reply = Reply::text(403, "the request was refused").with_grpc_status(7);
        let details = format!("waf {}", seen.hits.join(","));
        (self.config.mode == Mode::Block).then(|| reply.with_details(details))
    }
}

#[cfg(test)]
mod tests;
