//! The differences that are meant: each has a name, a reason in the README, and a test that says where it applies.

use crate::scenario::{Ask, Outcome, Scenario};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use cairn_mesh::{PathNormalization, normalize_path};
use std::net::Ipv6Addr;

/// A difference that is meant: its name, and whether it explains what became of a request.
type Intended = (&'static str, fn(&Scenario, &Ask, &Outcome, &Outcome) -> bool);

const INTENDED: [Intended; 12] = [
    ("mapped-address", |scenario, ask, _, _| asks_for_remote_address(scenario) && is_mapped(ask)),
    ("only-slashes", |scenario, ask, _, _| is_only_slashes(scenario, ask)),
    ("no-uri", |_, ask, _, ours| *ours == Outcome::Malformed && ask.target.contains(['<', '>', '`'])),
    ("grpc-head", |_, ask, envoy, ours| ask.method == "HEAD" && same_but_for_form(envoy, ours)),
    ("repeated-authorization", |_, ask, envoy, _| {
        ask.header("authorization").count() > 1 && is_refused_as(envoy, "Jwt")
    }),
    ("two-tokens", |_, ask, _, ours| {
        ask.to_string().matches(TOKEN_START).count() > 1
            && is_refused_as(ours, "Jwt issuer is not configured")
    }),
    ("cookie-taken", |scenario, _, envoy, ours| {
        asks_for_cookies(scenario) && same_but_for_cookie(envoy, ours)
    }),
    ("strict-base64", |_, _, _, ours| is_refused_as(ours, "Jwt signature is an invalid Base64url")),
    ("mixed-keys", |_, _, envoy, _| is_refused_as(envoy, "Jwt ED25519 signature is wrong length")),
    ("key-kind", |_, _, envoy, ours| {
        is_refused_as(envoy, "Jwt verification fails")
            && is_refused_as(ours, "Jwks doesn't have key to match")
    }),
    ("other-algorithm", |_, ask, _, ours| {
        names_other_algorithm(ask) && is_refused_as(ours, "Jwks doesn't have key to match")
    }),
    ("repeated-content-type", |_, ask, envoy, ours| {
        ask.header("content-type").count() > 1 && same_but_for_form(envoy, ours)
    }),
];

/// What every token with an algorithm begins with.
const TOKEN_START: &str = "eyJhbGciOi";

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

/// Whether a token was refused with details that begin so.
fn is_refused_as(outcome: &Outcome, text: &str) -> bool {
    let text = format!("jwt_authn_access_denied{{{}", text.replace(' ', "_"));
    matches!(outcome, Outcome::Denied { details, .. } if details.starts_with(&text))
}

fn asks_for_cookies(scenario: &Scenario) -> bool {
    serde_json::Value::from(scenario.objects.clone()).to_string().contains("fromCookies")
}

/// Whether both passed, and upstream sees the same but for cookies.
fn same_but_for_cookie(envoy: &Outcome, ours: &Outcome) -> bool {
    let without = |outcome: &Outcome| match outcome {
        Outcome::Allowed { remarks, seen } => {
            let seen = seen.iter().filter(|(name, _)| *name != "cookie").cloned().collect::<Vec<_>>();
            Some((remarks.clone(), seen))
        }
        _ => None,
    };
    without(envoy).is_some() && without(envoy) == without(ours)
}

/// Whether a token says RS512, which no key here is for.
fn names_other_algorithm(ask: &Ask) -> bool {
    let start = BASE64_URL_SAFE_NO_PAD.encode(r#"{"alg":"RS512","#);
    ask.to_string().contains(&start)
}

/// Whether nothing but slashes is left of the path, and they become one.
fn is_only_slashes(scenario: &Scenario, ask: &Ask) -> bool {
    let merges = matches!(
        scenario.normalization,
        PathNormalization::MergeSlashes | PathNormalization::DecodeAndMergeSlashes
    );
    let path = |text: &str| text.split(['?', '#']).next().unwrap_or_default().to_owned();
    let normal = path(&normalize_path(&ask.target, scenario.normalization));
    merges && normal == "/" && path(&ask.target) != "/"
}
