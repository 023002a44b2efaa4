//! The differences that are meant: each has a name, a reason in the README, and a test that says where it applies.

use crate::custom::BODY_BYTES_MAX;
use crate::ours::Ours;
use crate::scenario::{Ask, Outcome, Scenario};
use anyhow::{Context, Result};
use base64::Engine;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use cairn_mesh::{PathNormalization, normalize_path};
use serde_json::{Value, json};
use std::net::Ipv6Addr;

/// A difference that is meant: its name, and whether it explains what became of a request.
type Intended = (&'static str, fn(&Scenario, &Ask, &Outcome, &Outcome) -> bool);

const INTENDED: [Intended; 12] = [
    ("only-slashes", |scenario, ask, envoy, ours| {
        is_only_slashes(scenario, ask) && (is_of_the_path(scenario, envoy, ours) || is_custom(scenario))
    }),
    ("encoded-dots", |scenario, ask, envoy, ours| {
        let target = ask.target.to_ascii_lowercase();
        target.contains("%2e") && target.contains(';') && is_of_the_path(scenario, envoy, ours)
    }),
    ("no-uri", |_, ask, _, ours| {
        *ours == Outcome::Malformed && (ask.target.contains(['<', '>', '`']) || !ask.target.is_ascii())
    }),
    ("grpc-head", |_, ask, envoy, ours| ask.method == "HEAD" && same_but_for_form(envoy, ours)),
    ("two-tokens", |_, ask, _, ours| {
        ask.to_string().matches(TOKEN_START).count() > 1
            && is_refused_as(ours, "Jwt issuer is not configured")
    }),
    ("cookie-taken", |scenario, _, envoy, ours| {
        asks_for_cookies(scenario) && same_but_for(&["cookie"], envoy, ours)
    }),
    ("strict-base64", |_, ask, _, ours| {
        has_stray_bits(ask) && is_refused_as(ours, "Jwt signature is an invalid Base64url")
    }),
    ("key-kind", |_, _, envoy, ours| {
        (is_refused_as(envoy, "Jwt verification fails")
            || is_refused_as(envoy, "Jwt ED25519 signature is wrong length"))
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
    ("query-order", |scenario, _, envoy, ours| {
        is_custom(scenario) && with_sorted_queries(envoy) == with_sorted_queries(ours)
    }),
    ("cut-body", |scenario, ask, _, ours| {
        let Outcome::Denied { details, .. } = ours else { return false };
        details == "request_payload_too_large" && is_custom(scenario) && ask.body.len() > BODY_BYTES_MAX
    }),
];

/// A difference that is tried out: its name, what scenarios with one request are taken for at Envoy, and whether what we
/// make of that is Envoy's outcome. It explains nothing else.
type Tried = (&'static str, fn(&Scenario) -> Vec<Scenario>, fn(&Outcome, &Outcome) -> bool);

const TRIED: [Tried; 3] = [
    ("mapped-address", without_mapped_address, |envoy, ours| {
        same_but_for(&["x-forwarded-for", "cookie"], envoy, ours)
    }),
    ("repeated-authorization", with_one_authorization, |envoy, ours| same_but_for(&["cookie"], envoy, ours)),
    ("mixed-keys", with_keys_before_edwards, |envoy, ours| {
        same_but_for(&["cookie"], envoy, ours)
            || (is_refused_as(envoy, "") && is_refused_as(ours, "Jwks doesn't have key to match"))
    }),
];

/// What every token with an algorithm begins with.
const TOKEN_START: &str = "eyJhbGciOi";

/// The name of the intended difference between Envoy's outcome and ours for the request of `scenario`; `None` if there is no
/// such reason.
pub async fn intended(
    engine: &Ours,
    scenario: &Scenario,
    envoy: &Outcome,
    ours: &Outcome,
) -> Result<Option<&'static str>> {
    let ask = &scenario.asks[0];
    if let Some((name, _)) = INTENDED.iter().find(|(_, explains)| explains(scenario, ask, envoy, ours)) {
        return Ok(Some(*name));
    }
    for (name, taken_for, explains) in TRIED {
        for other in taken_for(scenario) {
            let site = crate::ours::site(&other).with_context(|| other.to_string())?;
            let ours = engine.ask(&site, 0, &other.asks[0]).await?;
            // What comes to a provider may be out of order besides.
            let sorted = || explains(&with_sorted_queries(envoy), &with_sorted_queries(&ours));
            if explains(envoy, &ours) || (is_custom(scenario) && sorted()) {
                return Ok(Some(name));
            }
        }
    }
    Ok(None)
}

/// With an IPv6 address that is in no block but that of all in place of an IPv4 address written as one, the last of
/// X-Forwarded-For.
fn without_mapped_address(scenario: &Scenario) -> Vec<Scenario> {
    let mut other = scenario.clone();
    let headers = &mut other.asks[0].headers;
    let last = headers.iter_mut().rfind(|(name, _)| name.eq_ignore_ascii_case("x-forwarded-for"));
    let Some((_, value)) = last else { return Vec::new() };
    let (before, last) = value.rsplit_once(',').map_or((None, &**value), |(start, end)| (Some(start), end));
    let is_mapped = last.trim().parse::<Ipv6Addr>().is_ok_and(|ip| ip.to_ipv4_mapped().is_some());
    if !is_mapped {
        return Vec::new();
    }
    *value = before.into_iter().chain(["fe80::7"]).collect::<Vec<_>>().join(",");
    vec![other]
}

/// With all lines of `authorization` in one.
fn with_one_authorization(scenario: &Scenario) -> Vec<Scenario> {
    let mut other = scenario.clone();
    let ask = &mut other.asks[0];
    let lines: Vec<String> = ask.header("authorization").map(str::to_owned).collect();
    if lines.len() < 2 {
        return Vec::new();
    }
    ask.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("authorization"));
    let filled: Vec<String> = lines.into_iter().filter(|line| !line.is_empty()).collect();
    ask.headers.push(("authorization".to_owned(), filled.join(",")));
    vec![other]
}

/// With only those keys that Envoy comes to: an Ed25519 key without `alg` ends its search when the signature has not the
/// length of one. For each token of the request, and for all of them.
fn with_keys_before_edwards(scenario: &Scenario) -> Vec<Scenario> {
    let tokens = tokens(&scenario.asks[0]);
    let ends = |key: &Value, token: &Token| {
        let key_id = key["kid"].as_str().unwrap_or_default();
        let is_tried = key_id.is_empty() || token.key_id.is_empty() || key_id == token.key_id;
        key["crv"] == "Ed25519" && is_tried && token.signature_bytes != 64
    };
    let mut all: Vec<&[Token]> = tokens.iter().map(std::slice::from_ref).collect();
    all.push(&tokens);
    let cut = |tokens: &[Token]| {
        let mut other = scenario.clone();
        let specs = other
            .objects
            .iter_mut()
            .filter_map(|object| object.pointer_mut("/spec/jwtRules")?.as_array_mut());
        for rule in specs.flatten() {
            let set = rule["jwks"].as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
            let keys = set.as_ref().and_then(|set| set["keys"].as_array()).cloned().unwrap_or_default();
            let end = keys.iter().position(|key| tokens.iter().any(|token| ends(key, token)));
            if let Some(end) = end {
                rule["jwks"] = json!({ "keys": keys[..=end] }).to_string().into();
            }
        }
        other
    };
    let changed = all.into_iter().map(cut).filter(|other| other.objects != scenario.objects);
    changed.collect()
}

/// What the head of a token says, and how long its signature is.
struct Token {
    key_id: String,
    signature_bytes: usize,
}

fn tokens(ask: &Ask) -> Vec<Token> {
    let read = |token: String| {
        let mut parts = token.split('.');
        let head = BASE64_URL_SAFE_NO_PAD.decode(parts.next()?).ok()?;
        let head: Value = serde_json::from_slice(&head).ok()?;
        let signature = parts.nth(1)?.trim_end_matches('=');
        let key_id = head["kid"].as_str().unwrap_or_default().to_owned();
        Some(Token { key_id, signature_bytes: signature.len() * 3 / 4 })
    };
    token_texts(ask).into_iter().filter_map(read).collect()
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

/// All tokens in a request.
fn token_texts(ask: &Ask) -> Vec<String> {
    let text = ask.to_string();
    let is_of_token = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
    let tokens = text.match_indices(TOKEN_START).filter_map(|(at, _)| text.get(at..));
    tokens.filter_map(|rest| rest.split(|c| !is_of_token(c)).next().map(str::to_owned)).collect()
}

/// Whether the last character of a signature has bits that belong to no byte.
fn has_stray_bits(ask: &Ask) -> bool {
    let lenient = GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::RequireNone);
    let lenient = GeneralPurpose::new(&URL_SAFE, lenient);
    let signatures =
        token_texts(ask).into_iter().filter_map(|token| Some(token.split('.').nth(2)?.to_owned()));
    signatures.into_iter().any(|signature| {
        BASE64_URL_SAFE_NO_PAD.decode(&signature).is_err() && lenient.decode(&signature).is_ok()
    })
}

/// The rules of all RequestAuthentications.
fn rules(scenario: &Scenario) -> impl Iterator<Item = &Value> {
    scenario.objects.iter().filter_map(|object| object["spec"]["jwtRules"].as_array()).flatten()
}

fn asks_for_cookies(scenario: &Scenario) -> bool {
    serde_json::Value::from(scenario.objects.clone()).to_string().contains("fromCookies")
}

/// Whether all is the same but for these headers that the upstream sees of a request that passes.
fn same_but_for(names: &[&str], envoy: &Outcome, ours: &Outcome) -> bool {
    let without = |outcome: &Outcome| match outcome.clone() {
        Outcome::Allowed { remarks, seen, told } => {
            let seen = seen.into_iter().filter(|(name, _)| !names.contains(name)).collect();
            Outcome::Allowed { remarks, seen, told }
        }
        other => other,
    };
    without(envoy) == without(ours)
}

/// Whether a provider is asked.
pub fn is_custom(scenario: &Scenario) -> bool {
    scenario.objects.iter().any(|object| object["spec"]["action"] == "CUSTOM")
}

/// The same with the parameters of every query in their order, and without `=` behind those that have no value: in the path that
/// the upstream sees, and in what another provider is told of it.
fn with_sorted_queries(outcome: &Outcome) -> Outcome {
    let mut sorted = outcome.clone();
    let texts: Vec<&mut String> = match &mut sorted {
        Outcome::Allowed { seen, told, .. } => seen.iter_mut().chain(told).map(|(_, value)| value).collect(),
        Outcome::Denied { body, grpc, told, .. } => {
            let message = grpc.as_mut().map(|(_, message)| message);
            told.iter_mut().map(|(_, value)| value).chain(message).chain([body]).collect()
        }
        Outcome::Malformed | Outcome::Closed | Outcome::Other(_) => Vec::new(),
    };
    for text in texts {
        *text = sort_queries(text);
    }
    sorted
}

fn sort_queries(text: &str) -> String {
    let mut parts = text.split('?');
    let mut sorted = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(' ').unwrap_or(part.len());
        let (query, rest) = part.split_at(end);
        let mut pairs: Vec<&str> = query.split('&').map(|pair| pair.trim_end_matches('=')).collect();
        pairs.sort_unstable();
        sorted += &format!("?{}{rest}", pairs.join("&"));
    }
    sorted
}

/// Whether a token says RS512, which no key here is for.
fn names_other_algorithm(ask: &Ask) -> bool {
    let start = BASE64_URL_SAFE_NO_PAD.encode(r#"{"alg":"RS512","#);
    ask.to_string().contains(&start)
}

/// Whether a difference is one of the path: upstream sees another, or some rule asks for it.
fn is_of_the_path(scenario: &Scenario, envoy: &Outcome, ours: &Outcome) -> bool {
    let policies = Value::from(scenario.objects.clone()).to_string();
    let asks = ["paths\"", "notPaths\"", "[:path]"].iter().any(|field| policies.contains(field));
    asks || same_but_for(&[":path"], envoy, ours)
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
