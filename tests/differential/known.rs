//! The differences that are meant: each has a name, a reason in the README, and a test that says where it applies.

use crate::scenario::{Ask, Outcome, Scenario};
use base64::Engine;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use cairn_mesh::{PathNormalization, normalize_path};
use ipnet::IpNet;
use serde_json::Value;
use std::net::{IpAddr, Ipv6Addr};

/// A difference that is meant: its name, and whether it explains what became of a request.
type Intended = (&'static str, fn(&Scenario, &Ask, &Outcome, &Outcome) -> bool);

const INTENDED: [Intended; 12] = [
    ("mapped-address", |scenario, ask, _, _| is_mapped_into_a_block(scenario, ask)),
    ("only-slashes", |scenario, ask, envoy, ours| {
        is_only_slashes(scenario, ask) && is_of_the_path(scenario, envoy, ours)
    }),
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
    ("strict-base64", |_, ask, _, ours| {
        has_stray_bits(ask) && is_refused_as(ours, "Jwt signature is an invalid Base64url")
    }),
    ("mixed-keys", |scenario, ask, envoy, ours| {
        has_mixed_keys(scenario)
            && !is_of_edwards(ask)
            && (is_refused_as(envoy, "Jwt ED25519 signature is wrong length")
                || says_of_one_of_several(ask, envoy, ours))
    }),
    ("key-kind", |_, _, envoy, ours| {
        is_refused_as(envoy, "Jwt verification fails")
            && is_refused_as(ours, "Jwks doesn't have key to match")
    }),
    ("other-algorithm", |scenario, ask, envoy, ours| {
        names_other_algorithm(ask)
            && (is_refused_as(ours, "Jwks doesn't have key to match")
                || (rules(scenario).count() > 1 && is_refused_as(ours, "") && !is_refused_as(envoy, "")))
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

/// Whether the last address of X-Forwarded-For is an IPv4 address written as IPv6, and some block of remote addresses
/// has it in one of the two forms alone.
fn is_mapped_into_a_block(scenario: &Scenario, ask: &Ask) -> bool {
    let last = ask.header("x-forwarded-for").last();
    let address = last.and_then(|value| value.rsplit(',').next()?.trim().parse::<Ipv6Addr>().ok());
    let Some((mapped, plain)) = address.and_then(|address| Some((address, address.to_ipv4_mapped()?))) else {
        return false;
    };
    let differs = |block: &str| {
        let block = block.parse::<IpNet>().or_else(|_| block.parse::<IpAddr>().map(IpNet::from));
        block.is_ok_and(|block| block.contains(&IpAddr::V4(plain)) != block.contains(&IpAddr::V6(mapped)))
    };
    remote_blocks(scenario).iter().any(|block| differs(block))
}

/// All values of `remoteIpBlocks` and of the condition `remote.ip`, excluded ones among them.
fn remote_blocks(scenario: &Scenario) -> Vec<&str> {
    let rules = scenario.objects.iter().filter_map(|object| object["spec"]["rules"].as_array()).flatten();
    let mut lists = Vec::new();
    for rule in rules {
        for from in rule["from"].as_array().into_iter().flatten() {
            lists.extend([&from["source"]["remoteIpBlocks"], &from["source"]["notRemoteIpBlocks"]]);
        }
        for when in rule["when"].as_array().into_iter().flatten().filter(|when| when["key"] == "remote.ip") {
            lists.extend([&when["values"], &when["notValues"]]);
        }
    }
    lists.into_iter().filter_map(Value::as_array).flatten().filter_map(Value::as_str).collect()
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

/// The signatures of all tokens in a request.
fn signatures(ask: &Ask) -> Vec<String> {
    let text = ask.to_string();
    let is_of_token = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
    let tokens = text.match_indices(TOKEN_START).filter_map(|(at, _)| text.get(at..));
    let tokens = tokens.map(|rest| rest.split(|c| !is_of_token(c)).next().unwrap_or_default());
    tokens.filter_map(|token| Some(token.split('.').nth(2)?.to_owned())).collect()
}

/// Whether the last character of a signature has bits that belong to no byte.
fn has_stray_bits(ask: &Ask) -> bool {
    let lenient = GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::RequireNone);
    let lenient = GeneralPurpose::new(&URL_SAFE, lenient);
    signatures(ask).iter().any(|signature| {
        BASE64_URL_SAFE_NO_PAD.decode(signature).is_err() && lenient.decode(signature).is_ok()
    })
}

/// The rules of all RequestAuthentications.
fn rules(scenario: &Scenario) -> impl Iterator<Item = &Value> {
    scenario.objects.iter().filter_map(|object| object["spec"]["jwtRules"].as_array()).flatten()
}

/// Whether Envoy refuses one of several tokens, and we take one. Which of them its answer is about, it does not say.
fn says_of_one_of_several(ask: &Ask, envoy: &Outcome, ours: &Outcome) -> bool {
    // The first two parts of a token are JSON objects, which begin alike.
    let several = ask.to_string().matches("eyJ").count() > 2;
    several && is_refused_as(envoy, "") && !is_refused_as(ours, "")
}

/// Whether one of the key sets has an Ed25519 key and others.
fn has_mixed_keys(scenario: &Scenario) -> bool {
    let mut sets = rules(scenario).filter_map(|rule| rule["jwks"].as_str());
    sets.any(|set| set.contains("Ed25519") && set.matches("\"kty\"").count() > 1)
}

/// Whether every token is signed with an Ed25519 key, as it says.
fn is_of_edwards(ask: &Ask) -> bool {
    let text = ask.to_string();
    let start = BASE64_URL_SAFE_NO_PAD.encode(r#"{"alg":"EdDSA""#);
    let start = &start[..start.len() - 1];
    text.matches(TOKEN_START).count() == text.matches(start).count()
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

/// Whether a difference is one of the path: upstream sees another, or some rule asks for it.
fn is_of_the_path(scenario: &Scenario, envoy: &Outcome, ours: &Outcome) -> bool {
    let without = |outcome: &Outcome| match outcome {
        Outcome::Allowed { remarks, seen } => {
            let seen = seen.iter().filter(|(name, _)| *name != ":path").cloned().collect::<Vec<_>>();
            Some((remarks.clone(), seen))
        }
        _ => None,
    };
    let policies = Value::from(scenario.objects.clone()).to_string();
    let asks = ["paths\"", "notPaths\"", "[:path]"].iter().any(|field| policies.contains(field));
    asks || (without(envoy).is_some() && without(envoy) == without(ours))
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
