//! The differences that are meant: each has a name, a reason in the README, and a test that says where it applies.

use crate::scenario::{Ask, Outcome, Scenario};
use std::net::Ipv6Addr;

/// A difference that is meant: its name, and whether it explains what became of a request.
type Intended = (&'static str, fn(&Scenario, &Ask, &Outcome, &Outcome) -> bool);

const INTENDED: [Intended; 4] = [
    ("mapped-address", |scenario, ask, _, _| asks_for_remote_address(scenario) && is_mapped(ask)),
    ("no-uri", |_, ask, _, ours| *ours == Outcome::Malformed && ask.target.contains(['<', '>', '`'])),
    ("grpc-head", |_, ask, envoy, ours| ask.method == "HEAD" && same_but_for_form(envoy, ours)),
    ("repeated-content-type", |_, ask, envoy, ours| {
        ask.header("content-type").count() > 1 && same_but_for_form(envoy, ours)
    }),
];

/// The name of the intended difference between Envoy's outcome and ours; `None` if there is no such reason.
pub fn intended(scenario: &Scenario, ask: &Ask, envoy: &Outcome, ours: &Outcome) -> Option<&'static str> {
    INTENDED.iter().find(|(_, explains)| explains(scenario, ask, envoy, ours)).map(|(name, _)| *name)
}

fn asks_for_remote_address(scenario: &Scenario) -> bool {
    let policies = serde_json::Value::from(scenario.objects.clone()).to_string();
    policies.contains("emoteIpBlocks") || policies.contains("remote.ip")
}

/// Whether the last address of X-Forwarded-For is an IPv4 address written as IPv6.
fn is_mapped(ask: &Ask) -> bool {
    let last = ask.header("x-forwarded-for").last();
    let address = last.and_then(|value| value.rsplit(',').next()?.trim().parse::<Ipv6Addr>().ok());
    address.is_some_and(|address| address.to_ipv4_mapped().is_some())
}

/// Whether the same policy denied, and only the form of the answer is another.
fn same_but_for_form(envoy: &Outcome, ours: &Outcome) -> bool {
    let decision = |outcome: &Outcome| match outcome {
        Outcome::Denied { details, audited, .. } => Some((details.clone(), *audited)),
        _ => None,
    };
    decision(envoy).is_some() && decision(envoy) == decision(ours)
}
