//! Whether our decisions are Envoy's: policies and requests made up from a seed are given to stock Envoy, in a
//! translation of our own, and to our engine, and what becomes of each request is compared.
//!
//! `README.md` beside this file says how to run it for longer and which differences are meant.

// All of it is a test, helpers included: what does not hold ends it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod custom;
mod envoy;
#[path = "../fuzz/src/lib.rs"]
mod fuzz;
mod generate;
mod goldens;
mod http2;
mod jwt;
mod known;
mod ours;
mod provider;
mod rbac;
mod scenario;
mod seeds;
mod shrink;
#[path = "../../runtime/builtin/src/authentication/testing.rs"]
mod signer;
mod tcp;
mod token;
mod yaml;

use anyhow::{Context, Result, ensure};
use envoy::Envoy;
use generate::Generator;
use ours::Ours;
use scenario::{Ask, Outcome, Scenario};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use token::Issuers;
use tokio::task::JoinSet;

/// How many requests there are to the policies of one scenario.
const ASKS: usize = 10;

/// How many scenarios one Envoy knows at a time.
const SCENARIOS_MAX: usize = 200;

/// How many requests are asked of Envoy at a time.
const AT_ONCE: usize = 16;

/// How many differences are made small and printed.
const SHOWN_MAX: usize = 5;

/// How many steps making one small may take.
const STEPS_MAX: usize = 40;

#[tokio::test]
async fn authorization_decides_as_envoy_does() -> Result<()> {
    compare(PAIRS * 3 / 5, &["denied by a rule", "denied by default"], Generator::scenario).await
}

#[tokio::test]
async fn connections_are_judged_as_envoy_judges_them() -> Result<()> {
    compare(PAIRS / 5, &["closed"], Generator::connections).await
}

#[tokio::test]
async fn tokens_are_judged_as_envoy_judges_them() -> Result<()> {
    let issuers = Issuers::new();
    let scenario = |generator: &mut Generator, asks| issuers.scenario(generator, asks);
    compare(PAIRS * 2 / 5, &["refused token", "denied by default"], scenario).await
}

#[tokio::test]
async fn providers_are_asked_as_envoy_asks_them() -> Result<()> {
    compare(PAIRS / 5, &["refused by a provider"], custom::scenario).await
}

/// How many pairs both tests have together, unless more are asked for.
const PAIRS: usize = 500;

/// Compares `pairs` pairs of what `scenario` makes up. Requests that pass, and those of `kinds`, must be among them.
async fn compare(
    pairs: usize,
    kinds: &[&str],
    mut scenario: impl FnMut(&mut Generator, usize) -> Scenario,
) -> Result<()> {
    let Some(program) = cairn_tests::envoy::program() else {
        cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    };
    let seed = number("CAIRN_DIFFERENTIAL_SEED", 1)?;
    let pairs = usize::try_from(number("CAIRN_DIFFERENTIAL_PAIRS", pairs as u64)?)?;
    let mut generator = Generator::new(seed);
    let ours = Arc::new(Ours::new());
    let mut tally = Tally::default();
    while tally.pairs < pairs && tally.differences.len() < SHOWN_MAX {
        let count = (pairs - tally.pairs).div_ceil(ASKS).min(SCENARIOS_MAX);
        let scenarios = (0..count).map(|_| scenario(&mut generator, ASKS)).collect::<Vec<_>>();
        let judged = judge(&program, &ours, &scenarios).await?;
        tally.add(&program, &ours, &scenarios, &judged).await?;
    }
    println!("seed {seed}: {tally}");
    let mut shown = String::new();
    for difference in tally.differences.iter().take(SHOWN_MAX) {
        let small = shrink(&program, &ours, difference.clone()).await?;
        shown += &format!("\n\n{small}\n# Envoy: {:?}\n# ours: {:?}", small.envoy, small.ours);
    }
    ensure!(tally.differences.is_empty(), "seed {seed}: decisions differ{shown}");
    tally.is_telling(kinds)
}

fn number(variable: &str, default: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable} is not a number: {text}")),
        Err(_) => Ok(default),
    }
}

/// What became of each request of a scenario: at Envoy, and at ours.
type Judged = Vec<(Outcome, Outcome)>;

/// Asks everything of both sides.
async fn judge(program: &Path, ours: &Arc<Ours>, scenarios: &[Scenario]) -> Result<Vec<Judged>> {
    let envoy = Arc::new(Envoy::start(program, scenarios).await?);
    let mut judged = Vec::with_capacity(scenarios.len());
    let mut running = JoinSet::new();
    for (index, scenario) in scenarios.iter().enumerate() {
        let site = ours::site(scenario).with_context(|| scenario.to_string())?;
        let mut outcomes = Vec::with_capacity(scenario.asks.len());
        for (number, ask) in scenario.asks.iter().enumerate() {
            outcomes.push((Outcome::Closed, ours.ask(&site, index, ask).await?));
            let (envoy, ask, normalization) = (Arc::clone(&envoy), ask.clone(), scenario.normalization);
            running.spawn(async move { (index, number, envoy.ask(index, normalization, &ask).await) });
        }
        judged.push(outcomes);
        while running.len() > AT_ONCE {
            take(&mut running, &mut judged).await?;
        }
    }
    while !running.is_empty() {
        take(&mut running, &mut judged).await?;
    }
    Ok(judged)
}

async fn take(running: &mut JoinSet<(usize, usize, Result<Outcome>)>, judged: &mut [Judged]) -> Result<()> {
    if let Some(ended) = running.join_next().await {
        let (index, number, outcome) = ended?;
        judged[index][number].0 = outcome?;
    }
    Ok(())
}

/// A request on which both sides disagree.
#[derive(Clone, Debug)]
struct Difference {
    /// With this request alone.
    scenario: Scenario,
    envoy: Outcome,
    ours: Outcome,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.scenario.fmt(f)
    }
}

/// What has been seen so far.
#[derive(Debug, Default)]
struct Tally {
    pairs: usize,
    kinds: BTreeMap<String, usize>,
    intended: BTreeMap<&'static str, usize>,
    /// How often Envoy lost its provider, and did not when it was asked again.
    fallen_out: usize,
    differences: Vec<Difference>,
}

/// Whether Envoy's exchange with its provider came to nothing, which happens to one in some thousand on a busy machine
/// (Envoy does not ask twice): asked again, it says what ours said both times.
async fn fell_out(
    program: &Path,
    engine: &Arc<Ours>,
    scenario: &Scenario,
    envoy: &Outcome,
    ours: &Outcome,
) -> Result<bool> {
    if !custom::may_have_lost_its_provider(scenario, envoy) {
        return Ok(false);
    }
    let again = judge(program, engine, std::slice::from_ref(scenario)).await?;
    Ok(
        matches!(&again[..], [outcomes] if matches!(&outcomes[..], [(second, same)] if second == ours && same == ours)),
    )
}

impl Tally {
    async fn add(
        &mut self,
        program: &Path,
        engine: &Arc<Ours>,
        scenarios: &[Scenario],
        judged: &[Judged],
    ) -> Result<()> {
        for (scenario, outcomes) in scenarios.iter().zip(judged) {
            for (ask, (envoy, ours)) in scenario.asks.iter().zip(outcomes) {
                self.pairs += 1;
                *self.kinds.entry(kind(envoy)).or_default() += 1;
                if envoy == ours {
                    continue;
                }
                let scenario = only(scenario, ask);
                match known::intended(engine, &scenario, envoy, ours).await? {
                    Some(name) => *self.intended.entry(name).or_default() += 1,
                    None if fell_out(program, engine, &scenario, envoy, ours).await? => self.fallen_out += 1,
                    None => {
                        let (envoy, ours) = (envoy.clone(), ours.clone());
                        self.differences.push(Difference { scenario, envoy, ours });
                    }
                }
            }
        }
        Ok(())
    }

    /// Fails when the requests were all of one kind, so that agreement would mean little.
    fn is_telling(&self, kinds: &[&str]) -> Result<()> {
        for kind in ["allowed"].iter().chain(kinds) {
            let share = self.kinds.get(*kind).copied().unwrap_or_default() * 100 / self.pairs.max(1);
            ensure!(share >= 5, "only {share} % of requests were {kind}: {self}");
        }
        ensure!(self.fallen_out * 20 <= self.pairs, "Envoy's provider is hardly ever there: {self}");
        Ok(())
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { pairs, kinds, intended, fallen_out, differences } = self;
        write!(
            f,
            "{pairs} pairs, {} differences; Envoy: {kinds:?}; intended: {intended:?}; provider lost once: {fallen_out}",
            differences.len()
        )
    }
}

fn kind(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Allowed { .. } => "allowed".to_owned(),
        Outcome::Denied { details, .. } if details.starts_with("jwt") => "refused token".to_owned(),
        Outcome::Denied { details, .. } if details.starts_with("ext_authz") => {
            "refused by a provider".to_owned()
        }
        Outcome::Denied { details, .. } if details.contains("[none]") => "denied by default".to_owned(),
        Outcome::Denied { .. } => "denied by a rule".to_owned(),
        Outcome::Malformed => "malformed".to_owned(),
        Outcome::Closed => "closed".to_owned(),
        Outcome::Other(text) => text.clone(),
    }
}

fn only(scenario: &Scenario, ask: &Ask) -> Scenario {
    Scenario { asks: vec![ask.clone()], ..scenario.clone() }
}

/// Makes a difference small: takes the first smaller scenario on which both sides still disagree in the same way.
async fn shrink(program: &Path, ours: &Arc<Ours>, difference: Difference) -> Result<Difference> {
    let mut smallest = difference;
    for _ in 0..STEPS_MAX {
        let readable =
            |scenario: &Scenario| token::forges_what_is_written(scenario) && ours::site(scenario).is_ok();
        let candidates: Vec<Scenario> =
            shrink::smaller(&smallest.scenario).into_iter().filter(readable).take(SCENARIOS_MAX).collect();
        let judged = judge(program, ours, &candidates).await?;
        let same = |(envoy, ours): &(Outcome, Outcome)| {
            (kind(envoy), kind(ours)) == (kind(&smallest.envoy), kind(&smallest.ours)) && envoy != ours
        };
        let mut found = None;
        for (scenario, mut outcomes) in candidates.into_iter().zip(judged) {
            let Some((envoy, own)) = outcomes.pop().filter(same) else { continue };
            if known::intended(ours, &scenario, &envoy, &own).await?.is_none() {
                found = Some(Difference { scenario, envoy, ours: own });
                break;
            }
        }
        match found {
            Some(smaller) => smallest = smaller,
            None => break,
        }
    }
    Ok(smallest)
}
