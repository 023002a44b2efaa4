//! One module, both hosts, the same requests: what each did, and where they differ.

use crate::ask::{self, Ask, Expected};
use crate::client::{self, Answer, Told};
use crate::envoy::Envoy;
use crate::known;
use crate::module::Module;
use crate::ours::Ours;
use crate::upstream::{Seen, Upstream};
use anyhow::{Context, Result, ensure};
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long both may take to have logged the same, once their answers are here.
const LOG_MAX: Duration = Duration::from_secs(2);

/// How long a timer may take to fire, and an exchange to end.
const TICK_MAX: Duration = Duration::from_secs(15);

/// A line that a module logged.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    pub level: String,
    pub text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.level, self.text)
    }
}

/// Who keeps what a module logs.
pub trait Logged {
    /// All of it so far.
    fn lines(&self) -> Vec<Line>;

    /// What the host itself said last, for the report of a difference.
    fn trouble(&self) -> String;
}

/// What a request came to in one host.
#[derive(Clone, Debug)]
pub struct Observed {
    pub told: Told,
    pub seen: Vec<Seen>,
    pub lines: Vec<Line>,
}

/// Something in which both differ.
#[derive(Clone, Debug)]
pub struct Difference {
    pub what: &'static str,
    pub envoy: String,
    pub ours: String,
}

/// What a run came to.
#[derive(Debug, Default)]
pub struct Report {
    pub requests: usize,
    pub lines: usize,
    /// Differences that are meant, by name.
    pub intended: std::collections::BTreeMap<&'static str, usize>,
    pub unexplained: Vec<String>,
}

/// Runs `module` in both.
pub async fn compare(program: &Path, module: &Module) -> Result<Report> {
    let upstream = Upstream::start().await?;
    let (ours, envoy) =
        tokio::try_join!(Ours::start(module, &upstream), Envoy::start(program, module, &upstream))?;
    let mut report = Report::default();
    let start = Observed { told: Told::Closed, seen: Vec::new(), lines: started(module, &envoy) };
    let start_ours = Observed { lines: started(module, &ours), ..start.clone() };
    report.add(module, None, &start, &start_ours, String::new);
    let mut of_all = if module.known.serves { ask::of_all(module.known.large) } else { Vec::new() };
    of_all.retain(|ask| ask.body.is_empty() || !module.known.promises_bodies);
    for ask in of_all.iter().chain(&module.known.asks) {
        let run = Run { module, upstream: &upstream, envoy: &envoy, ours: &ours };
        let (theirs, own) = run.ask(ask).await.with_context(|| ask.to_string())?;
        let trouble = || format!("\n  Envoy said:\n{}\n  we said:\n{}", envoy.trouble(), ours.trouble());
        report.add(module, Some(ask), &theirs, &own, trouble);
        let missed = ask.expected.iter().filter(|expected| !holds(expected, &own));
        report
            .unexplained
            .extend(missed.map(|expected| format!("{ask}\n  expected {expected:?} of {own:?}")));
    }
    report.unexplained.extend(loose(module, &envoy, &ours).await);
    report.unexplained.extend(metrics(&envoy, &ours).await?);
    Ok(report)
}

/// Lines of the start, each once: Envoy starts a module several times.
fn started(module: &Module, host: &impl Logged) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for line in module.of_requests(host.lines()) {
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

struct Run<'a> {
    module: &'a Module,
    upstream: &'a Upstream,
    envoy: &'a Envoy,
    ours: &'a Ours,
}

impl Run<'_> {
    async fn ask(&self, ask: &Ask) -> Result<(Observed, Observed)> {
        let before = (self.lines(self.envoy).len(), self.lines(self.ours).len());
        self.upstream.prepare(&ask.service);
        let told = client::send(self.envoy.address(ask.version)?, ask).await?;
        self.envoy.idle().await?;
        let theirs = Observed { told, seen: self.seen(), lines: Vec::new() };
        self.upstream.prepare(&ask.service);
        let told = client::send(self.ours.address(ask.version)?, ask).await?;
        self.ours.idle().await?;
        let own = Observed { told, seen: self.seen(), lines: Vec::new() };
        let deadline = Instant::now() + LOG_MAX;
        loop {
            let lines = |host: Vec<Line>, from| host.get(from..).unwrap_or_default().to_vec();
            let theirs = Observed { lines: lines(self.lines(self.envoy), before.0), ..theirs.clone() };
            let own = Observed { lines: lines(self.lines(self.ours), before.1), ..own.clone() };
            let same = self.module.comparable(&theirs.lines) == self.module.comparable(&own.lines);
            if same || Instant::now() > deadline || known::explains(self.module, &theirs, &own) {
                return Ok((theirs, own));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What was seen; services are also asked by timers, if the module has any.
    fn seen(&self) -> Vec<Seen> {
        let mut seen = self.upstream.seen();
        if !self.module.known.loose.is_empty() {
            seen.retain(|seen| seen.by == "upstream");
        }
        seen
    }

    fn lines(&self, host: &impl Logged) -> Vec<Line> {
        let mut lines = self.module.of_requests(host.lines());
        lines.iter_mut().for_each(|line| line.text = without_chance(&line.text));
        lines
    }
}

/// A line of coraza's names its transaction by random letters, when it was, and by which address and port it came.
fn without_chance(text: &str) -> String {
    const TEXTS: [&str; 7] = [
        "tx_id=\"",
        "[unique_id \"",
        "[hostname \"",
        "\"timestamp\":\"",
        "\"id\":\"",
        "\"host_ip\":\"",
        "\"stopwatch\":\"",
    ];
    const NUMBERS: [&str; 3] = ["\"unix_timestamp\":", "\"client_port\":", "\"host_port\":"];
    let mut masked = text.to_owned();
    let all = TEXTS.iter().map(|before| (before, &['"'][..]));
    for (before, ends) in all.chain(NUMBERS.iter().map(|before| (before, &[',', '}'][..]))) {
        let Some(start) = masked.find(before).map(|at| at + before.len()) else { continue };
        let length = masked.get(start..).and_then(|rest| rest.find(ends)).unwrap_or_default();
        masked.replace_range(start..start + length, "…");
    }
    masked
}

impl Report {
    fn add(
        &mut self,
        module: &Module,
        ask: Option<&Ask>,
        envoy: &Observed,
        ours: &Observed,
        trouble: impl Fn() -> String,
    ) {
        self.requests += usize::from(ask.is_some());
        self.lines += ours.lines.len();
        for difference in differences(module, envoy, ours) {
            match known::name(module, envoy, ours, &difference) {
                Some(name) => *self.intended.entry(name).or_default() += 1,
                None => {
                    let asked = ask.map_or_else(|| "the start".to_owned(), ToString::to_string);
                    let Difference { what, envoy, ours } = difference;
                    let trouble = trouble();
                    self.unexplained
                        .push(format!("{asked}\n  {what}\n  Envoy: {envoy}\n  ours:  {ours}{trouble}"));
                }
            }
        }
    }
}

/// In what two observations differ.
pub fn differences(module: &Module, envoy: &Observed, ours: &Observed) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut differ = |what, envoy: String, ours: String| {
        if envoy != ours {
            found.push(Difference { what, envoy, ours });
        }
    };
    match (&envoy.told, &ours.told) {
        (Told::Answer(envoy), Told::Answer(ours)) => {
            differ("status", envoy.status.to_string(), ours.status.to_string());
            differ("headers", format!("{:?}", envoy.headers), format!("{:?}", ours.headers));
            differ("body", text(&envoy.body), text(&ours.body));
            differ("trailers", format!("{:?}", envoy.trailers), format!("{:?}", ours.trailers));
        }
        (envoy, ours) => differ("answer", brief(envoy), brief(ours)),
    }
    let seen = |observed: &Observed| observed.seen.iter().map(sight).collect::<Vec<_>>().join("; ");
    differ("seen upstream", seen(envoy), seen(ours));
    let lines = |observed: &Observed| {
        let lines = module.comparable(&observed.lines);
        lines.iter().map(|line| format!("\n    {line}")).collect::<String>()
    };
    differ("log", lines(envoy), lines(ours));
    found
}

/// A body, shortened in a way that keeps different ones different.
fn text(body: &[u8]) -> String {
    let start = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
    let sum = body.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()));
    format!("{} bytes, sum {sum:x}: {start:?}", body.len())
}

fn brief(told: &Told) -> String {
    match told {
        Told::Closed => "closed".to_owned(),
        Told::Answer(Answer { status, headers, body, .. }) => format!("{status} {headers:?} {}", text(body)),
    }
}

fn sight(seen: &Seen) -> String {
    let Seen { by, method, uri, headers, body, trailers } = seen;
    format!("{by}: {method} {uri} {headers:?} {} {trailers:?}", text(body))
}

fn holds(expected: &Expected, observed: &Observed) -> bool {
    let upstream = || observed.seen.iter().find(|seen| seen.by == "upstream");
    let answer = match &observed.told {
        Told::Answer(answer) => Some(answer),
        Told::Closed => None,
    };
    match expected {
        Expected::Status(status) => answer.is_some_and(|answer| answer.status == *status),
        Expected::Header(name, value) => answer.is_some_and(|answer| {
            answer.headers.iter().any(|header| header.0 == *name && header.1 == *value)
        }),
        Expected::Body(body) => answer.is_some_and(|answer| answer.body == body.as_bytes()),
        Expected::Logged(text) => observed.lines.iter().any(|line| line.text.contains(text)),
        Expected::UpstreamBody(body) => upstream().is_some_and(|seen| seen.body == body.as_bytes()),
        Expected::NotUpstream => upstream().is_none(),
    }
}

/// Lines that come whenever they come must come in both.
async fn loose(module: &Module, envoy: &Envoy, ours: &Ours) -> Vec<String> {
    let deadline = Instant::now() + TICK_MAX;
    loop {
        let has = |host: &dyn Logged, text: &str| host.lines().iter().any(|line| line.text.contains(text));
        let missing = |host: &dyn Logged, name: &str| {
            let absent = module.known.loose.iter().filter(|text| !has(host, text));
            absent.map(|text| format!("{name} never logged {text:?}")).collect::<Vec<_>>()
        };
        let all = [missing(envoy, "Envoy"), missing(ours, "ours")].concat();
        if all.is_empty() || Instant::now() > deadline {
            return all;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Every metric that the module defined in Envoy has the same value here.
async fn metrics(envoy: &Envoy, ours: &Ours) -> Result<Vec<String>> {
    let own = ours.metrics();
    let mut missing = Vec::new();
    for (name, value) in envoy.metrics().await? {
        let known: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let line = own.lines().find(|line| line.contains(&known) && !line.starts_with('#'));
        let same = line.and_then(|line| line.rsplit(' ').next()).is_some_and(|text| text == value);
        if !same {
            missing.push(format!("metric {name}\n  Envoy: {value}\n  ours:  {line:?}"));
        }
    }
    Ok(missing)
}

/// Waits until `done` says so.
///
/// # Errors
/// When that takes too long.
pub async fn wait_until<F: Future<Output = Result<bool>>>(
    what: &str,
    mut done: impl FnMut() -> F,
) -> Result<()> {
    let deadline = Instant::now() + TICK_MAX;
    while !done().await? {
        ensure!(Instant::now() < deadline, "{what}: not within {TICK_MAX:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
