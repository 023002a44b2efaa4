//! Whether one rule matches everything that another matches: what can be told from how they are written. A `false`
//! means "not certain".

use cairn_mesh::{Condition, Operation, PathMatch, PolicyRule, ServiceAccount, Source, TextMatch, Values};
use ipnet::IpNet;
use std::sync::Arc;

/// Whether every request that matches `narrow` matches `wide`.
pub(super) fn rule(wide: &PolicyRule, narrow: &PolicyRule) -> bool {
    alternatives(&wide.from, &narrow.from, source)
        && alternatives(&wide.to, &narrow.to, operation)
        && wide.when.iter().all(|asked| narrow.when.iter().any(|given| condition(asked, given)))
}

/// Whether one of `wide` holds whenever one of `narrow` does. No alternatives ask for nothing.
fn alternatives<T>(wide: &[T], narrow: &[T], covers: impl Fn(&T, &T) -> bool) -> bool {
    let some_covers = |one: &T| wide.iter().any(|other| covers(other, one));
    wide.is_empty() || (!narrow.is_empty() && narrow.iter().all(some_covers))
}

fn source(wide: &Source, narrow: &Source) -> bool {
    // What is not known here must be asked for in the same words, or not at all.
    let rest = |source: &Source| {
        let mut rest = source.clone();
        rest.principals = Values::default();
        rest.namespaces = Values::default();
        rest.service_accounts = Values::default();
        rest.ip_blocks = Values::default();
        rest.remote_ip_blocks = Values::default();
        rest.trust_domains = Values::default();
        rest
    };
    let asks_no_more = rest(wide) == Source::default() || rest(wide) == rest(narrow);
    asks_no_more
        && texts(&wide.principals, &narrow.principals)
        && namespaces(&wide.namespaces, &narrow.namespaces)
        && accounts(&wide.service_accounts, &narrow.service_accounts)
        && blocks(&wide.ip_blocks, &narrow.ip_blocks)
        && blocks(&wide.remote_ip_blocks, &narrow.remote_ip_blocks)
        && texts(&wide.trust_domains, &narrow.trust_domains)
}

fn operation(wide: &Operation, narrow: &Operation) -> bool {
    let rest = |operation: &Operation| {
        let mut rest = operation.clone();
        rest.hosts = Values::default();
        rest.ports = Values::default();
        rest.methods = Values::default();
        rest.paths = Values::default();
        rest
    };
    let asks_no_more = rest(wide) == Operation::default() || rest(wide) == rest(narrow);
    asks_no_more
        && texts(&wide.hosts, &narrow.hosts)
        && ports(&wide.ports, &narrow.ports)
        && texts(&wide.methods, &narrow.methods)
        && values(&wide.paths, &narrow.paths, path_within, |a, b| path_apart(a, b) || path_apart(b, a))
}

/// Whether what `given` asks for is enough for `asked`.
fn condition(asked: &Condition, given: &Condition) -> bool {
    match (asked, given) {
        (Condition::RequestHeader(name, wide), Condition::RequestHeader(other, narrow)) => {
            name == other && texts(wide, narrow)
        }
        (Condition::SourceIp(wide), Condition::SourceIp(narrow))
        | (Condition::RemoteIp(wide), Condition::RemoteIp(narrow))
        | (Condition::DestinationIp(wide), Condition::DestinationIp(narrow)) => blocks(wide, narrow),
        (Condition::SourceNamespace(wide), Condition::SourceNamespace(narrow)) => namespaces(wide, narrow),
        (Condition::SourcePrincipal(wide), Condition::SourcePrincipal(narrow))
        | (Condition::SourceTrustDomain(wide), Condition::SourceTrustDomain(narrow)) => texts(wide, narrow),
        (Condition::DestinationPort(wide), Condition::DestinationPort(narrow)) => ports(wide, narrow),
        // Claims may be lists, of which one element can be asked for and another excluded.
        (asked, given) => asked == given,
    }
}

/// Whether whatever `narrow` lets through `wide` lets through: each value asked for lies `within` one that `wide`
/// asks for, and nothing that `wide` excludes can be among them.
fn values<T>(
    wide: &Values<T>,
    narrow: &Values<T>,
    within: impl Fn(&T, &T) -> bool,
    apart: impl Fn(&T, &T) -> bool,
) -> bool {
    let asked = |one: &T| wide.any.iter().any(|other| within(one, other));
    let asked_all = wide.any.is_empty() || (!narrow.any.is_empty() && narrow.any.iter().all(asked));
    let out_of_reach = |excluded: &T| {
        narrow.none.iter().any(|other| within(excluded, other))
            || (!narrow.any.is_empty() && narrow.any.iter().all(|one| apart(one, excluded)))
    };
    asked_all && wide.none.iter().all(out_of_reach)
}

fn texts(wide: &Values<TextMatch>, narrow: &Values<TextMatch>) -> bool {
    values(wide, narrow, text_within, text_apart)
}

fn ports(wide: &Values<u16>, narrow: &Values<u16>) -> bool {
    values(wide, narrow, |a, b| a == b, |a, b| a != b)
}

fn blocks(wide: &Values<IpNet>, narrow: &Values<IpNet>) -> bool {
    values(wide, narrow, |a, b| b.contains(a), |a, b| !a.contains(b) && !b.contains(a))
}

fn accounts(wide: &Values<ServiceAccount>, narrow: &Values<ServiceAccount>) -> bool {
    values(wide, narrow, |a, b| a == b, |a, b| a != b)
}

fn namespaces(wide: &Values<Arc<str>>, narrow: &Values<Arc<str>>) -> bool {
    let is_plain = |text: &str| !text.contains('*');
    let within = |a: &Arc<str>, b: &Arc<str>| {
        // With one star at an end it is a prefix or suffix; other patterns are compared as they are.
        let ends = b.matches('*').count() == 1 && (b.starts_with('*') || b.ends_with('*'));
        a == b || &**b == "*" || (ends && is_plain(a) && TextMatch::parse(b).matches(a))
    };
    values(wide, narrow, within, |a, b| is_plain(a) && is_plain(b) && a != b)
}

/// Whether all texts that match `a` match `b`.
fn text_within(a: &TextMatch, b: &TextMatch) -> bool {
    match (a, b) {
        (TextMatch::Exact(text), b) => b.matches(text),
        (TextMatch::Prefix(_) | TextMatch::Suffix(_) | TextMatch::Present, TextMatch::Present) => true,
        (TextMatch::Prefix(longer), TextMatch::Prefix(shorter)) => longer.starts_with(&**shorter),
        (TextMatch::Suffix(longer), TextMatch::Suffix(shorter)) => longer.ends_with(&**shorter),
        _ => false,
    }
}

/// Whether no text matches both.
fn text_apart(a: &TextMatch, b: &TextMatch) -> bool {
    match (a, b) {
        (TextMatch::Exact(text), other) | (other, TextMatch::Exact(text)) => !other.matches(text),
        (TextMatch::Prefix(a), TextMatch::Prefix(b)) => !a.starts_with(&**b) && !b.starts_with(&**a),
        (TextMatch::Suffix(a), TextMatch::Suffix(b)) => !a.ends_with(&**b) && !b.ends_with(&**a),
        _ => false,
    }
}

/// What every path of a template begins with.
fn literal_head(template: &str) -> &str {
    template.split('{').next().unwrap_or_default()
}

fn path_within(a: &PathMatch, b: &PathMatch) -> bool {
    match (a, b) {
        (PathMatch::Text(a), PathMatch::Text(b)) => text_within(a, b),
        (PathMatch::Template(a), PathMatch::Text(TextMatch::Prefix(b))) => literal_head(a).starts_with(&**b),
        (PathMatch::Template(_), PathMatch::Text(TextMatch::Present)) => true,
        (a, b) => a == b,
    }
}

fn path_apart(a: &PathMatch, b: &PathMatch) -> bool {
    match (a, b) {
        (PathMatch::Text(a), PathMatch::Text(b)) => text_apart(a, b),
        (PathMatch::Text(TextMatch::Exact(text)), PathMatch::Template(template)) => {
            !text.starts_with(literal_head(template))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::policy;
    use crate::reader::Findings;
    use crate::testing::object;
    use cairn_mesh::MeshSettings;

    fn read(text: &str) -> PolicyRule {
        let object = object(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: n}}\nspec:\n  \
             rules: [{text}]\n"
        ));
        let mut findings = Findings::default();
        let mut policy = policy::parse(&object, &MeshSettings::default(), &mut findings);
        assert!(!findings.broken, "{text}: {:?}", findings.list);
        policy.rules.remove(0).rule
    }

    #[test]
    fn a_rule_covers_what_it_surely_matches_too() {
        for (name, wide, narrow, expected) in [
            ("everything", "{}", "{to: [{operation: {methods: [GET]}}]}", true),
            ("not by less", "{to: [{operation: {methods: [GET]}}]}", "{}", false),
            ("itself", "{to: [{operation: {paths: [/a]}}]}", "{to: [{operation: {paths: [/a]}}]}", true),
            (
                "prefix",
                "{to: [{operation: {paths: [/a*]}}]}",
                "{to: [{operation: {paths: [/a/b, /ab*]}}]}",
                true,
            ),
            (
                "other prefix",
                "{to: [{operation: {paths: [/a*]}}]}",
                "{to: [{operation: {paths: [/a/b, /b]}}]}",
                false,
            ),
            (
                "suffix",
                "{to: [{operation: {paths: ['*.js']}}]}",
                "{to: [{operation: {paths: [/x.js, '*.min.js']}}]}",
                true,
            ),
            (
                "presence",
                "{to: [{operation: {methods: ['*']}}]}",
                "{to: [{operation: {methods: [GET, 'P*']}}]}",
                true,
            ),
            (
                "template",
                "{to: [{operation: {paths: [/a/*]}}]}",
                "{to: [{operation: {paths: ['/a/{*}/b']}}]}",
                true,
            ),
            (
                "text in a template",
                "{to: [{operation: {paths: ['/a/{*}']}}]}",
                "{to: [{operation: {paths: [/a/b]}}]}",
                false,
            ),
            (
                "more fields",
                "{to: [{operation: {methods: [GET]}}]}",
                "{to: [{operation: {methods: [GET], ports: ['80']}}]}",
                true,
            ),
            (
                "one alternative is not covered",
                "{to: [{operation: {methods: [GET]}}]}",
                "{to: [{operation: {methods: [GET]}}, {operation: {ports: ['80']}}]}",
                false,
            ),
            (
                "exclusion that cannot matter",
                "{to: [{operation: {paths: [/a*], notPaths: [/a/x]}}]}",
                "{to: [{operation: {paths: [/a/b]}}]}",
                true,
            ),
            (
                "exclusion that matters",
                "{to: [{operation: {paths: [/a*], notPaths: [/a/x]}}]}",
                "{to: [{operation: {paths: [/a/*]}}]}",
                false,
            ),
            (
                "excludes as much",
                "{to: [{operation: {notPaths: [/a/x]}}]}",
                "{to: [{operation: {notPaths: [/a*]}}]}",
                true,
            ),
            (
                "namespace",
                "{from: [{source: {namespaces: ['a-*']}}]}",
                "{from: [{source: {namespaces: [a-b]}}]}",
                true,
            ),
            (
                "inner star",
                "{from: [{source: {namespaces: ['a*b']}}]}",
                "{from: [{source: {namespaces: [axb]}}]}",
                false,
            ),
            (
                "block",
                "{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}",
                "{from: [{source: {ipBlocks: [10.1.0.0/16]}}]}",
                true,
            ),
            (
                "other block",
                "{from: [{source: {ipBlocks: [10.1.0.0/16]}}]}",
                "{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}",
                false,
            ),
            (
                "condition",
                "{when: [{key: 'request.headers[x]', values: ['a*']}]}",
                "{when: [{key: 'request.headers[X]', values: [ab]}, {key: source.ip, values: [1.1.1.1]}]}",
                true,
            ),
            (
                "condition not asked",
                "{when: [{key: 'request.headers[x]', values: ['a*']}]}",
                "{when: [{key: 'request.headers[y]', values: [ab]}]}",
                false,
            ),
        ] {
            assert_eq!(rule(&read(wide), &read(narrow)), expected, "{name}");
        }
    }
}
