//! Conditions: the keys of Istio's table, and what each may be compared with.

use super::Rule;
use super::values::{
    ip_block, port, principal, request_principal, service_account, text, text_match, trust_domain, values,
};
use crate::diagnostic::Severity;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{ClaimPath, Condition, MetadataKey, MetadataMatch, TextMatch, Values};
use std::sync::Arc;

/// The filters whose metadata there is: of the one the token's payload, under this key; of the other what providers of
/// external authorization say.
const TOKEN_FILTER: &str = "envoy.filters.http.jwt_authn";
const TOKEN_KEY: &str = "payload";
const PROVIDERS: &str = "envoy.filters.http.ext_authz";

/// Reads a condition, and notes in `rule` when a ztunnel cannot hold it.
pub(super) fn read(
    node: &Node<'_>,
    object: &Object,
    rule: &mut Rule,
    findings: &mut Findings,
) -> Option<Condition> {
    let entries = node.map(&["key", "values", "notValues"], findings);
    let key_node = entries.require("key", findings)?;
    let key = key_node.filled(findings)?;
    if entries.get("values").is_none() && entries.get("notValues").is_none() {
        findings.refuse("missing-field", &node.at, "must have `values` or `notValues`");
    }
    let e = &entries;
    let condition = match key {
        "source.ip" => Condition::SourceIp(both(e, findings, ip_block)),
        "source.namespace" => Condition::SourceNamespace(both(e, findings, text)),
        "source.principal" => Condition::SourcePrincipal(both(e, findings, principal)),
        "destination.ip" => Condition::DestinationIp(both(e, findings, ip_block)),
        "destination.port" => Condition::DestinationPort(both(e, findings, port)),
        l7 => {
            rule.l7.push(key_node.at.clone());
            match of_waypoints(l7, &key_node, e, object, findings) {
                Some(condition) => condition,
                None => {
                    let reason = format!("`{key}` is not a key of conditions");
                    findings.refuse("invalid-value", &key_node.at, reason);
                    return None;
                }
            }
        }
    };
    Some(condition)
}

/// The conditions that only a waypoint holds; `None` when the key is unknown.
fn of_waypoints(
    key: &str,
    at: &Node<'_>,
    e: &Entries<'_>,
    object: &Object,
    findings: &mut Findings,
) -> Option<Condition> {
    let account =
        |node: &Node<'_>, text: &str, findings: &mut Findings| service_account(node, text, object, findings);
    Some(match key {
        "remote.ip" => Condition::RemoteIp(both(e, findings, ip_block)),
        "source.serviceAccount" => Condition::SourceServiceAccount(both(e, findings, account)),
        "source.trustDomain" => Condition::SourceTrustDomain(both(e, findings, trust_domain)),
        "connection.sni" => Condition::ConnectionSni(both(e, findings, text_match)),
        "request.auth.principal" => Condition::RequestPrincipal(both(e, findings, request_principal)),
        "request.auth.audiences" => Condition::RequestAudiences(both(e, findings, text_match)),
        "request.auth.presenter" => Condition::RequestPresenter(both(e, findings, text_match)),
        _ => {
            if let Some(name) = bracketed(key, "request.headers") {
                if name.contains(['[', ']']) {
                    return None;
                }
                Condition::RequestHeader(name.to_ascii_lowercase().into(), both(e, findings, text_match))
            } else if let Some(names) = bracketed(key, "request.auth.claims") {
                Condition::RequestClaim(claim_path(names), both(e, findings, text_match))
            } else {
                let key = metadata_key(key)?;
                let is_token = *key.filter == *TOKEN_FILTER
                    && key.path.first().is_some_and(|first| **first == *TOKEN_KEY);
                if !is_token && *key.filter != *PROVIDERS {
                    let reason = format!(
                        "the only metadata there is are {TOKEN_FILTER}[{TOKEN_KEY}][…] and {PROVIDERS}[…]: this finds \
                         nothing, so `values` never match and `notValues` always hold"
                    );
                    findings.note(Severity::Warning, "not-supported", &at.at, reason);
                }
                Condition::FilterMetadata(key, both(e, findings, metadata_match))
            }
        }
    })
}

/// The text in `prefix[text]`, if it is one and not empty.
fn bracketed<'a>(key: &'a str, prefix: &str) -> Option<&'a str> {
    let name = key.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']')?;
    (!name.is_empty()).then_some(name)
}

/// The names in `[a][b]`, of which the outer brackets are gone: only `][` separates.
fn claim_path(names: &str) -> ClaimPath {
    names.split("][").map(Arc::from).collect()
}

/// Reads `experimental.envoy.filters.a.b[key]`: the filter is `envoy.filters.a.b`.
fn metadata_key(key: &str) -> Option<MetadataKey> {
    let key = key.strip_prefix("experimental.").filter(|key| key.starts_with("envoy.filters."))?;
    let (filter, _) = key.split_once('[')?;
    let path = claim_path(bracketed(key, filter)?);
    Some(MetadataKey { filter: filter.into(), path })
}

fn metadata_match(_: &Node<'_>, text: &str, _: &mut Findings) -> Option<MetadataMatch> {
    let listed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    Some(match listed {
        Some(text) => MetadataMatch::Listed(TextMatch::parse(text)),
        None => MetadataMatch::Text(TextMatch::parse(text)),
    })
}

/// Reads `values` and `notValues` of a condition.
fn both<T>(
    entries: &Entries<'_>,
    findings: &mut Findings,
    parse: impl Fn(&Node<'_>, &str, &mut Findings) -> Option<T>,
) -> Values<T> {
    values(entries, "values", "notValues", findings, parse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_named_as_istio_reads_them() {
        for (brackets, expected) in [
            ("[good]", Some(&["good"][..])),
            ("[a][b][c]", Some(&["a", "b", "c"])),
            ("[[good]", Some(&["[good"])),
            ("[good]]", Some(&["good]"])),
            ("[[good]]", Some(&["[good]"])),
            ("[a]x[b]", Some(&["a]x[b"])),
            // An empty name is no name (Istio's admission).
            ("[]", None),
            ("x[bad]", None),
            ("[bad", None),
            ("bad]", None),
            ("bad", None),
            ("[", None),
        ] {
            let key = format!("request.auth.claims{brackets}");
            let path = bracketed(&key, "request.auth.claims").map(claim_path);
            let names: Option<Vec<&str>> =
                path.as_ref().map(|path| path.iter().map(|name| &**name).collect());
            assert_eq!(names.as_deref(), expected, "{brackets}");
        }
    }

    #[test]
    fn metadata_is_named_by_filter_and_key() {
        for (key, expected) in [
            ("experimental.envoy.filters.a.b[c]", Some(("envoy.filters.a.b", &["c"][..]))),
            (
                "experimental.envoy.filters.http.jwt_authn[payload][groups]",
                Some(("envoy.filters.http.jwt_authn", &["payload", "groups"])),
            ),
            ("experimental.envoy.filters.a.b", None),
            ("experimental.envoy.filters.a.b[]", None),
            ("experimental.other[c]", None),
            ("envoy.filters.a.b[c]", None),
        ] {
            let found = metadata_key(key);
            let found =
                found.as_ref().map(|key| (&*key.filter, key.path.iter().map(|n| &**n).collect::<Vec<_>>()));
            assert_eq!(found, expected.map(|(filter, path)| (filter, path.to_vec())), "{key}");
        }
    }
}
