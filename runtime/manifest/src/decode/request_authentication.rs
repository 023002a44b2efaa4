//! RequestAuthentication, read whole and checked as Istio's admission does.

use super::{refusal, target};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{
    Change, ClaimHeader, JwtRule, KeyPlace, MeshSettings, RequestAuthentication, ResourceKey, TokenHeader,
    TokenPlaces,
};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// Istio's limit on rules of one resource.
const RULES_MAX: usize = 4096;
/// Istio's limit on claims that are lists separated by spaces.
const SPACE_DELIMITED_MAX: usize = 64;
/// Ours, on anything else that is a list.
const LIST_MAX: usize = 256;
/// The longest that a request may be made to wait for keys.
const TIMEOUT_MAX: Duration = Duration::from_secs(60);

const RULE_FIELDS: [&str; 13] = [
    "issuer",
    "audiences",
    "jwksUri",
    "jwks_uri",
    "jwks",
    "fromHeaders",
    "fromParams",
    "fromCookies",
    "forwardOriginalToken",
    "outputPayloadToHeader",
    "outputClaimToHeaders",
    "timeout",
    "spaceDelimitedClaims",
];

/// What a waypoint does with the resource.
pub(super) fn decode(
    object: &Object,
    key: &ResourceKey,
    settings: &MeshSettings,
    findings: &mut Findings,
) -> Vec<Change> {
    let nothing = serde_json::json!({});
    let spec = if object.spec.is_null() { &nothing } else { &object.spec };
    let known = ["selector", "targetRef", "targetRefs", "jwtRules"];
    let spec = Node::new(spec, object.root()).map(&known, findings);
    let attachment = target::attachment(&spec, object, settings, findings);
    let nodes = spec.bounded_list("jwtRules", RULES_MAX, findings);
    let rules: Vec<JwtRule> = nodes.iter().filter_map(|node| rule(node, findings)).collect();
    if findings.broken {
        return refusal(object, key, &attachment, findings);
    }
    if attachment.targets.is_empty() {
        let reason = "has no targetRefs, so no waypoint takes it, and a ztunnel verifies no tokens";
        findings.note(Severity::Warning, "not-attached", &spec.at, reason);
        return vec![Change::L7Removed(key.clone())];
    }
    vec![Change::RequestAuthentication(RequestAuthentication {
        name: object.name.clone(),
        targets: attachment.targets,
        rules,
    })]
}

fn rule(node: &Node<'_>, findings: &mut Findings) -> Option<JwtRule> {
    let entries = node.map(&RULE_FIELDS, findings);
    let issuer: Arc<str> = entries.text("issuer", findings).unwrap_or_default().into();
    let keys = key_place(&entries, &issuer, findings)?;
    let forward = entries.get("forwardOriginalToken").is_some_and(|node| flag(&node, findings));
    let timeout = entries.get("timeout").and_then(|node| duration(&node, findings));
    let payload_header = entries.get("outputPayloadToHeader").and_then(|node| header_name(&node, findings));
    Some(JwtRule {
        audiences: texts(&entries, "audiences", LIST_MAX, findings),
        from: TokenPlaces {
            headers: token_headers(&entries, findings),
            params: texts(&entries, "fromParams", LIST_MAX, findings),
            cookies: texts(&entries, "fromCookies", LIST_MAX, findings),
        },
        forward,
        payload_header,
        claim_headers: claim_headers(&entries, findings),
        timeout: timeout.unwrap_or(JwtRule::TIMEOUT),
        space_delimited: texts(&entries, "spaceDelimitedClaims", SPACE_DELIMITED_MAX, findings),
        ..JwtRule::new(issuer, keys)
    })
}

/// Where the keys are. What cannot give a key is in effect nevertheless: every token is refused then.
fn key_place(entries: &Entries<'_>, issuer: &str, findings: &mut Findings) -> Option<KeyPlace> {
    let uri = entries.get("jwksUri").or_else(|| entries.get("jwks_uri"));
    let inline = entries.get("jwks").filter(|node| node.value.as_str() != Some(""));
    let uri = uri.filter(|node| node.value.as_str() != Some(""));
    match (uri, inline) {
        (Some(uri), Some(_)) => {
            findings.refuse("invalid-value", &uri.at, "`jwksUri` and `jwks` cannot both be set");
            None
        }
        (Some(uri), None) => {
            let text = uri.filled(findings)?;
            if !is_web_address(text) {
                let reason = format!("`{text}` is not a URI with scheme `http` or `https` and a host");
                findings.refuse("invalid-value", &uri.at, reason);
            }
            Some(KeyPlace::Uri(text.into()))
        }
        (None, Some(inline)) => {
            let text = inline.text(findings)?;
            look_at_keys(text, &inline.at, findings);
            if issuer.is_empty() {
                let reason = "without `jwksUri` there must be an `issuer`";
                findings.refuse("missing-field", &entries.at, reason);
            }
            Some(KeyPlace::Inline(text.into()))
        }
        (None, None) if issuer.is_empty() => {
            findings.refuse("missing-field", &entries.at, "must have `issuer` or `jwksUri`");
            None
        }
        (None, None) => {
            if !is_web_address(issuer) {
                let reason = "is no URI where the issuer's configuration could be, and there is neither `jwksUri` nor \
                              `jwks`: every token is refused";
                findings.note(Severity::Error, "no-keys", &entries.at.key("issuer"), reason);
            }
            Some(KeyPlace::Discovery)
        }
    }
}

fn is_web_address(text: &str) -> bool {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let host = rest.and_then(|rest| rest.split(['/', '?', '#']).next());
    host.is_some_and(|host| !host.is_empty() && !host.contains('@') && !host.contains(char::is_whitespace))
}

/// Says what is odd about a JWK Set.
fn look_at_keys(text: &str, at: &FieldPath, findings: &mut Findings) {
    let set: Option<Value> = serde_json::from_str(text).ok();
    let keys = set.as_ref().and_then(|set| set.get("keys")?.as_array()).filter(|keys| !keys.is_empty());
    let Some(keys) = keys else {
        let reason = "is not a JWK Set with at least one key: every token is refused";
        return findings.note(Severity::Error, "no-keys", at, reason);
    };
    // `d` is the private part of every kind of key pair.
    if keys.iter().any(|key| key.get("d").is_some()) {
        let reason = "holds a private key: whoever reads this can sign tokens";
        findings.note(Severity::Warning, "private-key", at, reason);
    }
}

fn token_headers(entries: &Entries<'_>, findings: &mut Findings) -> Vec<TokenHeader> {
    let mut headers = Vec::new();
    for node in entries.bounded_list("fromHeaders", LIST_MAX, findings) {
        let one = node.map(&["name", "prefix"], findings);
        let name = one.require("name", findings).and_then(|node| header_name(&node, findings));
        let prefix = one.text("prefix", findings).unwrap_or_default().into();
        headers.extend(name.map(|name| TokenHeader { name, prefix }));
    }
    headers
}

fn claim_headers(entries: &Entries<'_>, findings: &mut Findings) -> Vec<ClaimHeader> {
    let mut headers = Vec::new();
    for node in entries.bounded_list("outputClaimToHeaders", LIST_MAX, findings) {
        let one = node.map(&["header", "claim"], findings);
        let header = one.require("header", findings).and_then(|node| header_name(&node, findings));
        let claim = one.require("claim", findings).and_then(|node| node.filled(findings));
        headers.extend(header.zip(claim).map(|(header, claim)| ClaimHeader { header, claim: claim.into() }));
    }
    headers
}

/// The header's name in lower case. Istio takes letters, digits, `-` and `_` only.
fn header_name(node: &Node<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let name = node.filled(findings)?;
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
        let reason = format!("`{name}` is not the name of a header: letters, digits, `-` and `_`");
        findings.refuse("invalid-value", &node.at, reason);
        return None;
    }
    Some(name.to_ascii_lowercase().into())
}

fn texts(entries: &Entries<'_>, key: &str, count_max: usize, findings: &mut Findings) -> Vec<Arc<str>> {
    let nodes = entries.bounded_list(key, count_max, findings);
    nodes.iter().filter_map(|node| node.filled(findings).map(Arc::from)).collect()
}

fn flag(node: &Node<'_>, findings: &mut Findings) -> bool {
    let flag = node.value.as_bool();
    if flag.is_none() {
        findings.refuse("wrong-type", &node.at, "must be true or false");
    }
    flag.unwrap_or_default()
}

/// A duration as Kubernetes writes it, `5s` or `1m30s`, from a millisecond to a minute.
fn duration(node: &Node<'_>, findings: &mut Findings) -> Option<Duration> {
    let text = node.text(findings)?;
    let found =
        parse_duration(text).filter(|duration| (Duration::from_millis(1)..=TIMEOUT_MAX).contains(duration));
    if found.is_none() {
        let reason = format!("`{text}` is not a duration from 1ms to {}s", TIMEOUT_MAX.as_secs());
        findings.refuse("invalid-value", &node.at, reason);
    }
    found
}

fn parse_duration(mut text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 6] =
        [("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let mut seconds = 0.0;
    if text.is_empty() {
        return None;
    }
    while !text.is_empty() {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, rest) = text.split_at(digits);
        let number: f64 = number.parse().ok()?;
        let (unit, factor) = UNITS.iter().find(|(unit, _)| rest.starts_with(unit))?;
        seconds += number * factor;
        text = rest.strip_prefix(unit)?;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Decoded, decode};
    use crate::testing::{object, short};
    use cairn_mesh::TargetKind;

    fn read(spec: &str) -> Decoded {
        let indented: String = spec.lines().map(|line| format!("  {line}\n")).collect();
        let head = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: a, namespace: n}";
        decode(&object(&format!("{head}\nspec:\n{indented}")), &MeshSettings::default())
    }

    const TARGET: &str = "targetRefs: [{kind: Service, name: web}]\n";
    const KEYS: &str = "jwks: '{\"keys\":[{\"kty\":\"oct\",\"k\":\"a2V5\"}]}'";

    fn rule(fields: &str) -> Decoded {
        let lines: Vec<&str> = fields.lines().collect();
        read(&format!("{TARGET}jwtRules:\n- {}\n", lines.join("\n  ")))
    }

    fn the_rule(decoded: &Decoded) -> &JwtRule {
        match decoded.changes.as_slice() {
            [Change::RequestAuthentication(read)] => &read.rules[0],
            other => panic!("{other:?}: {:?}", decoded.findings),
        }
    }

    #[test]
    fn every_field_is_read() {
        let decoded = rule(
            "issuer: https://issuer.example\naudiences: [web, other]\njwksUri: https://keys.example/set\n\
             fromHeaders: [{name: X-Token, prefix: \"Token \"}, {name: x-raw}]\nfromParams: [token]\n\
             fromCookies: [session]\nforwardOriginalToken: true\noutputPayloadToHeader: X-Payload\n\
             outputClaimToHeaders: [{header: X-User, claim: user.name}]\ntimeout: 1s500ms\n\
             spaceDelimitedClaims: [roles]",
        );
        let header = |name: &str, prefix: &str| TokenHeader { name: name.into(), prefix: prefix.into() };
        let keys = KeyPlace::Uri("https://keys.example/set".into());
        let expected = JwtRule {
            audiences: vec!["web".into(), "other".into()],
            from: TokenPlaces {
                headers: vec![header("x-token", "Token "), header("x-raw", "")],
                params: vec!["token".into()],
                cookies: vec!["session".into()],
            },
            forward: true,
            payload_header: Some("x-payload".into()),
            claim_headers: vec![ClaimHeader { header: "x-user".into(), claim: "user.name".into() }],
            timeout: Duration::from_millis(1500),
            space_delimited: vec!["roles".into()],
            ..JwtRule::new("https://issuer.example", keys)
        };
        assert_eq!(*the_rule(&decoded), expected);
        assert_eq!(decoded.findings.iter().map(short).collect::<Vec<_>>(), [""; 0]);
    }

    #[test]
    fn keys_are_inline_at_a_uri_or_found_through_the_issuer() {
        for (name, fields, place, findings) in [
            ("inline", format!("issuer: me\n{KEYS}"), "Inline", &[][..]),
            ("at a URI, of any issuer", "jwksUri: http://keys/set".into(), "Uri", &[]),
            ("the other spelling", "jwks_uri: http://keys/set".into(), "Uri", &[]),
            ("through the issuer", "issuer: https://issuer".into(), "Discovery", &[]),
            ("an empty URI is none", "issuer: https://issuer\njwksUri: ''".into(), "Discovery", &[]),
            (
                "an issuer that is no URI",
                "issuer: me@example".into(),
                "Discovery",
                &["error no-keys spec.jwtRules[0].issuer"],
            ),
            (
                "no JSON",
                "issuer: me\njwks: nonsense".into(),
                "Inline",
                &["error no-keys spec.jwtRules[0].jwks"],
            ),
            (
                "a private key",
                "issuer: me\njwks: '{\"keys\":[{\"kty\":\"RSA\",\"d\":\"x\"}]}'".into(),
                "Inline",
                &["warning private-key spec.jwtRules[0].jwks"],
            ),
        ] {
            let decoded = rule(&fields);
            assert!(format!("{:?}", the_rule(&decoded).keys).starts_with(place), "{name}");
            assert_eq!(decoded.findings.iter().map(short).collect::<Vec<_>>(), findings, "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_refused_at_the_exact_field() {
        let at = "spec.jwtRules[0]";
        for (name, fields, expected) in [
            ("no issuer and no URI", "audiences: [a]".to_owned(), format!("missing-field {at}")),
            ("keys inline of nobody", KEYS.to_owned(), format!("missing-field {at}")),
            ("two places", format!("jwksUri: http://a\n{KEYS}"), format!("invalid-value {at}.jwksUri")),
            ("ftp", "jwksUri: ftp://a/b".into(), format!("invalid-value {at}.jwksUri")),
            ("no host", "jwksUri: https:///b".into(), format!("invalid-value {at}.jwksUri")),
            ("a password", "jwksUri: https://u:p@a/b".into(), format!("invalid-value {at}.jwksUri")),
            (
                "empty audience",
                "issuer: a\naudiences: ['']".into(),
                format!("invalid-value {at}.audiences[0]"),
            ),
            (
                "empty parameter",
                "issuer: a\nfromParams: ['']".into(),
                format!("invalid-value {at}.fromParams[0]"),
            ),
            (
                "empty cookie",
                "issuer: a\nfromCookies: ['']".into(),
                format!("invalid-value {at}.fromCookies[0]"),
            ),
            (
                "empty claim",
                "issuer: a\noutputClaimToHeaders: [{header: x, claim: ''}]".into(),
                format!("invalid-value {at}.outputClaimToHeaders[0].claim"),
            ),
            (
                "bad header",
                "issuer: a\noutputClaimToHeaders: [{header: 'x y', claim: c}]".into(),
                format!("invalid-value {at}.outputClaimToHeaders[0].header"),
            ),
            (
                "no header",
                "issuer: a\noutputClaimToHeaders: [{claim: c}]".into(),
                format!("missing-field {at}.outputClaimToHeaders[0]"),
            ),
            (
                "bad token header",
                "issuer: a\nfromHeaders: [{name: 'a:b'}]".into(),
                format!("invalid-value {at}.fromHeaders[0].name"),
            ),
            (
                "bad payload header",
                "issuer: a\noutputPayloadToHeader: ''".into(),
                format!("invalid-value {at}.outputPayloadToHeader"),
            ),
            ("no duration", "issuer: a\ntimeout: soon".into(), format!("invalid-value {at}.timeout")),
            ("zero", "issuer: a\ntimeout: 0s".into(), format!("invalid-value {at}.timeout")),
            ("too long", "issuer: a\ntimeout: 2m".into(), format!("invalid-value {at}.timeout")),
            (
                "a text for a flag",
                "issuer: a\nforwardOriginalToken: 'yes'".into(),
                format!("wrong-type {at}.forwardOriginalToken"),
            ),
            ("unknown field", "issuer: a\nrequireJwt: true".into(), format!("unknown-field {at}.requireJwt")),
            (
                "too many delimited claims",
                format!("issuer: a\nspaceDelimitedClaims: [{}]", vec!["c"; 65].join(", ")),
                format!("invalid-value {at}.spaceDelimitedClaims"),
            ),
        ] {
            let decoded = rule(&fields);
            let errors: Vec<String> = decoded
                .findings
                .iter()
                .filter(|finding| finding.severity == Severity::Error && finding.code != "no-keys")
                .map(short)
                .collect();
            assert_eq!(errors, [format!("error {expected}")], "{name}");
            assert!(decoded.broken, "{name}");
            let [Change::Unenforceable(_, what)] = decoded.changes.as_slice() else {
                panic!("{name}: {:?}", decoded.changes)
            };
            assert_eq!(
                (what.targets[0].kind, &*what.targets[0].name),
                (TargetKind::Service, "web"),
                "{name}"
            );
        }
    }

    #[test]
    fn what_selects_workloads_has_no_effect_and_says_so() {
        let decoded = read("selector: {matchLabels: {app: web}}\njwtRules: [{issuer: 'https://a'}]\n");
        assert_eq!(decoded.findings.iter().map(short).collect::<Vec<_>>(), ["warning not-attached spec"]);
        assert!(matches!(decoded.changes.as_slice(), [Change::L7Removed(_)]));
    }

    #[test]
    fn without_rules_it_asks_nothing() {
        let decoded = read(TARGET);
        let [Change::RequestAuthentication(read)] = decoded.changes.as_slice() else { panic!("it is read") };
        assert!(read.rules.is_empty());
    }

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, expected) in [
            ("5s", Some(5_000)),
            ("10ms", Some(10)),
            ("1m30s", Some(90_000)),
            ("0.25s", Some(250)),
            ("1h", Some(3_600_000)),
            ("", None),
            ("5", None),
            ("s", None),
            ("-5s", None),
            ("5 s", None),
        ] {
            let expected = expected.map(Duration::from_millis);
            assert_eq!(parse_duration(text), expected, "{text}");
        }
    }
}
