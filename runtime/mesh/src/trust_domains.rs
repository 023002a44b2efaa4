//! The names of the mesh's trust domain, and what policies mean that are written for one of them
//! (facts: Istio `pilot/pkg/security/trustdomain/bundle.go`).

use crate::{AuthorizationPolicy, Condition, TextMatch, Values};
use std::sync::Arc;

/// Trust domains that are one: the mesh's own and its aliases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustDomains(Arc<[Arc<str>]>);

/// What a mesh is called that was not given a name: policies may always say it.
const DEFAULT: &str = "cluster.local";

impl TrustDomains {
    /// The trust domains of `names`, each once.
    pub fn new(names: impl IntoIterator<Item = Arc<str>>) -> Self {
        let mut each = Vec::new();
        for name in names {
            if !each.contains(&name) {
                each.push(name);
            }
        }
        Self(each.into())
    }

    /// `policy`, as it is meant: who it names in one of these trust domains is named in all of them.
    pub fn expand(&self, policy: &AuthorizationPolicy) -> AuthorizationPolicy {
        let mut expanded = policy.clone();
        for rule in &mut expanded.rules {
            for source in &mut rule.from {
                source.principals = self.principals(&source.principals);
                source.trust_domains = self.trust_domains(&source.trust_domains);
            }
            for condition in &mut rule.when {
                match condition {
                    Condition::SourcePrincipal(values) => *values = self.principals(values),
                    Condition::SourceTrustDomain(values) => *values = self.trust_domains(values),
                    _ => {}
                }
            }
        }
        expanded
    }

    /// The principals that `values` mean.
    pub fn principals(&self, values: &Values<TextMatch>) -> Values<TextMatch> {
        each(values, |value| self.principal(value))
    }

    /// The trust domains that `values` mean: a value that is exactly one of these means all of them.
    fn trust_domains(&self, values: &Values<TextMatch>) -> Values<TextMatch> {
        each(values, |value| match value {
            TextMatch::Exact(name) if self.0.contains(name) => {
                self.0.iter().map(|name| TextMatch::Exact(Arc::clone(name))).collect()
            }
            other => vec![other.clone()],
        })
    }

    fn principal(&self, value: &TextMatch) -> Vec<TextMatch> {
        let text = value.to_string();
        let Some((domain, rest)) = text.split_once('/').filter(|(_, rest)| rest.split('/').count() == 4)
        else {
            // Not of the form that names a trust domain.
            return vec![value.clone()];
        };
        if domain.is_empty() || domain != DEFAULT && !self.0.iter().any(|name| are_related(domain, name)) {
            return vec![value.clone()];
        }
        let mut meant: Vec<TextMatch> = Vec::new();
        for name in self.0.iter() {
            let one = match domain.strip_prefix('*') {
                // It covers this one as it stands.
                Some(suffix) if name.ends_with(suffix) => value.clone(),
                _ => TextMatch::parse(&format!("{name}/{rest}")),
            };
            if !meant.contains(&one) {
                meant.push(one);
            }
        }
        meant
    }
}

/// Whether one matches the other, read as a pattern with one `*` at its start or end.
fn are_related(a: &str, b: &str) -> bool {
    let covers = |pattern: &str, text: &str| {
        pattern.strip_suffix('*').is_some_and(|prefix| text.starts_with(prefix))
            || pattern.strip_prefix('*').is_some_and(|suffix| text.ends_with(suffix))
    };
    a == b || covers(a, b) || covers(b, a)
}

fn each(values: &Values<TextMatch>, meant: impl Fn(&TextMatch) -> Vec<TextMatch>) -> Values<TextMatch> {
    let all = |list: &[TextMatch]| list.iter().flat_map(&meant).collect();
    Values { any: all(&values.any), none: all(&values.none) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PolicyAction, PolicyRule, ResourceName, Source};

    fn domains(names: &[&str]) -> TrustDomains {
        TrustDomains::new(names.iter().map(|name| Arc::from(*name)))
    }

    fn texts(values: &[&str]) -> Vec<TextMatch> {
        values.iter().map(|value| TextMatch::parse(value)).collect()
    }

    #[test]
    fn who_is_named_in_one_trust_domain_is_named_in_all() {
        for (name, mesh, written, meant) in [
            ("no alias", &["td1"][..], &["td1/ns/foo/sa/bar"][..], &["td1/ns/foo/sa/bar"][..]),
            (
                "one alias",
                &["td1", "td2"],
                &["td1/ns/foo/sa/bar"],
                &["td1/ns/foo/sa/bar", "td2/ns/foo/sa/bar"],
            ),
            (
                "written by the alias",
                &["td1", "td2"],
                &["td2/ns/foo/sa/bar"],
                &["td1/ns/foo/sa/bar", "td2/ns/foo/sa/bar"],
            ),
            (
                "several aliases, several principals",
                &["new-td", "old-td", "older-td"],
                &["old-td/ns/a/sa/x", "new-td/ns/b/sa/y"],
                &[
                    "new-td/ns/a/sa/x",
                    "old-td/ns/a/sa/x",
                    "older-td/ns/a/sa/x",
                    "new-td/ns/b/sa/y",
                    "old-td/ns/b/sa/y",
                    "older-td/ns/b/sa/y",
                ],
            ),
            ("foreign", &["td1", "td2"], &["other/ns/foo/sa/bar"], &["other/ns/foo/sa/bar"]),
            (
                "the default name means the mesh",
                &["td1", "td2"],
                &["cluster.local/ns/foo/sa/bar"],
                &["td1/ns/foo/sa/bar", "td2/ns/foo/sa/bar"],
            ),
            ("any trust domain", &["td1", "td2"], &["*/ns/foo/sa/bar"], &["*/ns/foo/sa/bar"]),
            (
                "a wildcard that covers all",
                &["old-td", "new-td"],
                &["*-td/ns/foo/sa/bar"],
                &["*-td/ns/foo/sa/bar"],
            ),
            (
                "a wildcard that covers one",
                &["td1", "local"],
                &["*cal/ns/foo/sa/bar"],
                &["td1/ns/foo/sa/bar", "*cal/ns/foo/sa/bar"],
            ),
            (
                "a wildcard at the end",
                &["td1", "other"],
                &["td*/ns/foo/sa/bar"],
                &["td1/ns/foo/sa/bar", "other/ns/foo/sa/bar"],
            ),
            (
                "a wildcard in the account",
                &["td1", "td2"],
                &["td1/ns/foo/sa/*"],
                &["td1/ns/foo/sa/*", "td2/ns/foo/sa/*"],
            ),
            (
                "another form",
                &["td1", "td2"],
                &["*", "td1/ns/foo", "td1/*", "*/sa/bar"],
                &["*", "td1/ns/foo", "td1/*", "*/sa/bar"],
            ),
            (
                "each name once",
                &["td1", "td1", "td2"],
                &["td1/ns/a/sa/b"],
                &["td1/ns/a/sa/b", "td2/ns/a/sa/b"],
            ),
        ] {
            let values = Values { any: texts(written), none: texts(written) };
            let found = domains(mesh).principals(&values);
            assert_eq!(found.any, texts(meant), "{name}");
            assert_eq!(found.none, texts(meant), "{name}");
        }
    }

    #[test]
    fn trust_domains_mean_their_aliases_only_when_written_out() {
        for (written, meant) in [
            (&["td1"][..], &["td1", "td2"][..]),
            (&["td*"], &["td*"]),
            (&["other"], &["other"]),
            (&["cluster.local"], &["cluster.local"]),
        ] {
            let values = Values { any: texts(written), none: Vec::new() };
            assert_eq!(domains(&["td1", "td2"]).trust_domains(&values).any, texts(meant), "{written:?}");
        }
    }

    #[test]
    fn every_place_that_names_a_principal_is_expanded() {
        let values = || Values { any: texts(&["td1/ns/a/sa/b"]), none: Vec::new() };
        let source = Source { principals: values(), ..Source::default() };
        let when = vec![
            Condition::SourcePrincipal(values()),
            Condition::SourceTrustDomain(Values { any: Vec::new(), none: texts(&["td2"]) }),
        ];
        let rule = PolicyRule { from: vec![source], when, ..PolicyRule::default() };
        let policy = AuthorizationPolicy {
            name: ResourceName::new("n", "p"),
            targets: Vec::new(),
            action: PolicyAction::Allow,
            rules: vec![rule],
            dry_run: false,
        };
        let expanded = domains(&["td1", "td2"]).expand(&policy);
        let rule = &expanded.rules[0];
        let both = texts(&["td1/ns/a/sa/b", "td2/ns/a/sa/b"]);
        assert_eq!(rule.from[0].principals.any, both);
        assert!(matches!(&rule.when[0], Condition::SourcePrincipal(values) if values.any == both));
        assert!(
            matches!(&rule.when[1], Condition::SourceTrustDomain(values) if values.none == texts(&["td1", "td2"]))
        );
    }
}
