//! Maintenance windows, and faults injected into a share of requests.
//!
//! ```json
//! {
//!   "maintenance": {"from": "2026-11-23T01:00:00Z", "until": "2026-11-23T03:00:00Z", "body": "back at three"},
//!   "faults": [
//!     {"paths": ["/pay"], "percent": 5, "delayMs": 500},
//!     {"header": {"name": "x-chaos", "value": "yes"}, "percent": 100, "status": 503}
//!   ]
//! }
//! ```

mod date;

use cairn_sdk::{Counter, Flow, HeaderName, Plugin, Reply, Request, now, random, sleep};
use date::Date;
use serde::Deserialize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Exchanges that wait cost memory.
const DELAY_MS_MAX: u64 = 60_000;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    maintenance: Option<Maintenance>,
    #[serde(default)]
    faults: Vec<Fault>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Maintenance {
    /// When it begins; none is long ago.
    from: Option<Date>,
    /// When it ends; none is never.
    until: Option<Date>,
    #[serde(flatten)]
    answer: Answer,
}

/// What is answered, and who is let through.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    #[serde(default = "default_status")]
    status: u16,
    #[serde(default)]
    body: String,
    /// Who passes nevertheless.
    except: Option<Header>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Fault {
    /// Prefixes of paths; none is all.
    #[serde(default)]
    paths: Vec<String>,
    /// A header that requests must have.
    header: Option<Header>,
    percent: f64,
    #[serde(default)]
    delay_ms: u64,
    /// The status to answer, after the delay; none goes on.
    status: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    name: HeaderName,
    /// None is any.
    value: Option<String>,
}

fn default_status() -> u16 {
    503
}

/// The plugin.
pub struct Faults {
    maintenance: Option<Maintenance>,
    faults: Vec<Fault>,
    injected: Counter,
}

#[cairn_sdk::plugin]
impl Plugin for Faults {
    type Config = Config;
    type Exchange = ();

    fn configure(config: Config) -> Result<Self, String> {
        let statuses = config.maintenance.iter().map(|one| ("maintenance", one.answer.status));
        let statuses =
            statuses.chain(config.faults.iter().filter_map(|fault| Some(("faults", fault.status?))));
        for (place, status) in statuses {
            if !(200..600).contains(&status) {
                return Err(format!("{place}: {status} is no status to answer with"));
            }
        }
        for (index, fault) in config.faults.iter().enumerate() {
            if !(0.0..=100.0).contains(&fault.percent) {
                return Err(format!("faults[{index}].percent: it is 0 to 100"));
            }
            if fault.delay_ms > DELAY_MS_MAX || (fault.delay_ms == 0 && fault.status.is_none()) {
                return Err(format!("faults[{index}]: a delay of 1 to {DELAY_MS_MAX} ms, a status, or both"));
            }
        }
        let injected = Counter::new("faults_injected_total", &["kind"]);
        Ok(Self { maintenance: config.maintenance, faults: config.faults, injected })
    }

    fn on_request(&self, request: Request, (): &mut ()) -> Flow {
        if let Some(reply) = self.maintenance.as_ref().and_then(|one| one.reply(request, now())) {
            self.injected.add(1, &["maintenance"]);
            return reply.into();
        }
        let Some(fault) = self.faults.iter().find(|fault| fault.hits(request)) else { return Flow::Continue };
        let status = fault.status;
        self.injected.add(1, &[if status.is_some() { "abort" } else { "delay" }]);
        let end = move || match status {
            Some(status) => Reply::text(status, "fault injected").with_details("fault_injected").into(),
            None => Flow::Continue,
        };
        if fault.delay_ms == 0 {
            return end();
        }
        let delay = Duration::from_millis(fault.delay_ms);
        Flow::wait(async move {
            sleep(delay).await;
            end()
        })
    }
}

impl Maintenance {
    fn reply(&self, request: Request, now: SystemTime) -> Option<Reply> {
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let is_open = self.from.is_none_or(|from| seconds >= from.seconds())
            && self.until.is_none_or(|until| seconds < until.seconds());
        if !is_open || self.answer.except.as_ref().is_some_and(|header| header.is_in(request)) {
            return None;
        }
        let reply = Reply::text(self.answer.status, &self.answer.body).with_details("maintenance");
        Some(match self.until {
            Some(until) => reply.with_header("retry-after", (until.seconds() - seconds).to_string()),
            None => reply,
        })
    }
}

impl Fault {
    fn hits(&self, request: Request) -> bool {
        let path = || request.path();
        let is_here =
            self.paths.is_empty() || self.paths.iter().any(|prefix| path().starts_with(prefix.as_str()));
        is_here && self.header.as_ref().is_none_or(|header| header.is_in(request)) && chance() < self.percent
    }
}

impl Header {
    fn is_in(&self, request: Request) -> bool {
        let values = request.header_values(self.name.as_str());
        values.iter().any(|value| self.value.as_ref().is_none_or(|wanted| value == wanted.as_bytes()))
    }
}

/// A number from 0 to below 100.
fn chance() -> f64 {
    (random() >> 32) as f64 / (u64::from(u32::MAX) + 1) as f64 * 100.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest};

    #[test]
    fn a_share_of_requests_fails() {
        let mut proxy =
            Proxy::<Faults>::new(r#"{"faults": [{"paths": ["/pay"], "percent": 25, "status": 500}]}"#)
                .unwrap();
        let failed = (0..2000).filter(|_| proxy.send(TestRequest::get("/pay/1")).status == 500).count();
        assert!((400..600).contains(&failed), "{failed}");
        assert_eq!(proxy.metric("kind=.=abort;.;faults_injected_total"), i64::try_from(failed).ok());
        assert!((0..100).all(|_| proxy.send(TestRequest::get("/")).status == 200));
    }

    #[test]
    fn the_ends_of_the_scale_are_never_and_always() {
        for (percent, status) in [(0, 200), (100, 418)] {
            let config = format!(r#"{{"faults": [{{"percent": {percent}, "status": 418}}]}}"#);
            let mut proxy = Proxy::<Faults>::new(&config).unwrap();
            assert!((0..200).all(|_| proxy.send(TestRequest::get("/")).status == status), "{percent}");
        }
    }

    #[test]
    fn delays_hold_the_request() {
        let config = r#"{"faults": [{"header": {"name": "x-slow"}, "percent": 100, "delayMs": 300},
            {"header": {"name": "x-both", "value": "yes"}, "percent": 100, "delayMs": 300, "status": 503}]}"#;
        let mut proxy = Proxy::<Faults>::new(config).unwrap();
        for (header, value, status, least) in
            [("x-slow", "", 200, 300), ("x-both", "yes", 503, 300), ("x-both", "no", 200, 0)]
        {
            let outcome = proxy.send(TestRequest::get("/").header(header, value));
            assert_eq!(outcome.status, status, "{header}: {value}");
            let took = outcome.took.as_millis();
            assert!(took >= least && took <= least + 20, "{header}: {took}");
        }
    }

    /// The test's clock begins on 2023-11-14 at 22:13:20.
    #[test]
    fn maintenance_has_a_beginning_and_an_end() {
        let config = r#"{"maintenance": {"from": "2023-11-14T22:14:00Z", "until": "2023-11-14T22:15:00Z", "body": "back soon",
            "except": {"name": "x-admin", "value": "1"}}}"#;
        let mut proxy = Proxy::<Faults>::new(config).unwrap();
        assert_eq!(proxy.send(TestRequest::get("/")).status, 200);
        proxy.advance(Duration::from_secs(45));
        let outcome = proxy.send(TestRequest::get("/"));
        assert_eq!(
            (outcome.status, outcome.text(), outcome.header("retry-after")),
            (503, "back soon".into(), Some("55".into()))
        );
        assert_eq!(proxy.send(TestRequest::get("/").header("x-admin", "1")).status, 200);
        proxy.advance(Duration::from_secs(60));
        assert_eq!(proxy.send(TestRequest::get("/")).status, 200);
        let mut proxy = Proxy::<Faults>::new(r#"{"maintenance": {}}"#).unwrap();
        assert_eq!(proxy.send(TestRequest::get("/")).status, 503);
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases = [
            (r#"{"faults": [{"percent": 101, "status": 500}]}"#, "configuration: faults[0].percent: "),
            (r#"{"faults": [{"percent": 1}]}"#, "configuration: faults[0]: a delay"),
            (r#"{"faults": [{"percent": 1, "status": 99}]}"#, "configuration: faults: 99 is no status"),
            (r#"{"maintenance": {"from": "yesterday"}}"#, "configuration: maintenance"),
        ];
        for (json, error) in cases {
            let found = Proxy::<Faults>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
