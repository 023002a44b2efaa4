//! Policies as they judge connections that carry no HTTP (Istio: a rule that asks about a request is left out of ALLOW,
//! which then allows less, and is kept without that question in DENY, which then denies more).

use cairn_filter::RequestHead;
use cairn_mesh::{AuthorizationPolicy, Condition, Operation, PolicyAction, PolicyRule, Source, Values};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Version};
use std::sync::Arc;

/// The policies without questions about requests.
pub(crate) fn policies(policies: &[Arc<AuthorizationPolicy>]) -> Vec<Arc<AuthorizationPolicy>> {
    policies.iter().map(|policy| Arc::new(of_connections(policy))).collect()
}

/// A request that says nothing: no rule of [`policies`] looks at it.
pub(crate) fn no_request() -> RequestHead {
    RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static(""),
        authority: HeaderValue::from_static(""),
        path: PathAndQuery::from_static("/"),
        headers: HeaderMap::new(),
        version: Version::HTTP_11,
    }
}

fn of_connections(policy: &AuthorizationPolicy) -> AuthorizationPolicy {
    let rules = policy.rules.iter();
    let rules = match policy.action {
        PolicyAction::Allow => rules.filter(|rule| !asks_about_request(rule)).cloned().collect(),
        PolicyAction::Deny | PolicyAction::Audit => rules.map(without_request).collect(),
    };
    AuthorizationPolicy { rules, ..policy.clone() }
}

fn asks_about_request(rule: &PolicyRule) -> bool {
    rule.from.iter().any(source_asks)
        || rule.to.iter().any(operation_asks)
        || rule.when.iter().any(condition_asks)
}

fn source_asks(source: &Source) -> bool {
    !source.request_principals.is_empty()
}

fn operation_asks(operation: &Operation) -> bool {
    !(operation.hosts.is_empty() && operation.methods.is_empty() && operation.paths.is_empty())
}

fn condition_asks(condition: &Condition) -> bool {
    match condition {
        Condition::RequestHeader(..)
        | Condition::RequestPrincipal(_)
        | Condition::RequestAudiences(_)
        | Condition::RequestPresenter(_)
        | Condition::RequestClaim(..) => true,
        // What filters know can be asked of connections too; it is nothing there.
        Condition::FilterMetadata(..)
        | Condition::SourceIp(_)
        | Condition::RemoteIp(_)
        | Condition::SourceNamespace(_)
        | Condition::SourcePrincipal(_)
        | Condition::SourceServiceAccount(_)
        | Condition::SourceTrustDomain(_)
        | Condition::DestinationIp(_)
        | Condition::DestinationPort(_)
        | Condition::ConnectionSni(_) => false,
    }
}

fn without_request(rule: &PolicyRule) -> PolicyRule {
    let to: Vec<Operation> = rule
        .to
        .iter()
        .map(|operation| Operation { ports: operation.ports.clone(), ..Operation::default() })
        .collect();
    let from: Vec<Source> = rule
        .from
        .iter()
        .map(|source| Source { request_principals: Values::default(), ..source.clone() })
        .collect();
    // An alternative of which nothing is left matches every connection, and so does the list that holds it.
    let any_to = to.iter().any(|operation| operation.ports.is_empty());
    let any_from = from.contains(&Source::default());
    PolicyRule {
        from: if any_from { Vec::new() } else { from },
        to: if any_to { Vec::new() } else { to },
        when: rule.when.iter().filter(|condition| !condition_asks(condition)).cloned().collect(),
        ..rule.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ConnectionFacts, Decision};
    use super::*;
    use crate::Authorizer;
    use cairn_mesh::{Identity, MeshSettings, PathMatch, RequestPrincipal, ResourceName, TextMatch};

    fn rule(namespace: Option<&str>, path: Option<&str>, port: Option<u16>) -> PolicyRule {
        let any = |value: &str| Values { any: vec![value.into()], none: Vec::new() };
        let source = namespace.map(|name| Source { namespaces: any(name), ..Source::default() });
        let paths = path.map(|path| PathMatch::Text(TextMatch::parse(path))).into_iter().collect();
        let ports = port.into_iter().collect();
        let operation = Operation {
            paths: Values { any: paths, none: Vec::new() },
            ports: Values { any: ports, none: Vec::new() },
            ..Operation::default()
        };
        let asks = path.is_some() || port.is_some();
        PolicyRule {
            from: source.into_iter().collect(),
            to: if asks { vec![operation] } else { vec![] },
            ..PolicyRule::default()
        }
    }

    fn check(action: PolicyAction, rule: PolicyRule) -> bool {
        let name = ResourceName::new("shop", "p");
        let policy =
            AuthorizationPolicy { name, targets: Vec::new(), action, rules: vec![rule], dry_run: false };
        let authorizer =
            Authorizer::compile(&policies(&[Arc::new(policy)]), &MeshSettings::default().trust_domains());
        let facts = ConnectionFacts {
            identity: Some(Identity::new("cluster.local", "shop", "web").unwrap()),
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.1.0.1:80".parse().unwrap(),
        };
        matches!(authorizer.decide(&authorizer.settle(facts), &no_request(), None), Decision::Allow { .. })
    }

    #[test]
    fn a_question_about_tokens_is_one_about_requests() {
        use PolicyAction::{Allow, Deny};
        let of_token = |namespaces: Values<Arc<str>>| PolicyRule {
            from: vec![Source {
                namespaces,
                request_principals: Values { any: vec![RequestPrincipal::parse("*")], none: Vec::new() },
                ..Source::default()
            }],
            ..PolicyRule::default()
        };
        let other = || Values { any: vec!["other".into()], none: Vec::new() };
        let when = |condition| PolicyRule { when: vec![condition], ..PolicyRule::default() };
        let texts = || Values { any: vec![TextMatch::Present], none: Vec::new() };
        for (name, action, rule, passes) in [
            ("allow with a token is left out", Allow, of_token(Values::default()), false),
            ("deny with a token alone denies everybody", Deny, of_token(Values::default()), false),
            ("deny with a token keeps the rest", Deny, of_token(other()), true),
            ("deny with a claim", Deny, when(Condition::RequestClaim(["a".into()].into(), texts())), false),
            ("allow with a claim", Allow, when(Condition::RequestClaim(["a".into()].into(), texts())), false),
            ("deny with an audience", Deny, when(Condition::RequestAudiences(texts())), false),
        ] {
            assert_eq!(check(action, rule), passes, "{name}");
        }
    }

    #[test]
    fn a_rule_about_requests_allows_less_and_denies_more() {
        use PolicyAction::{Allow, Deny};
        for (name, action, rule, passes) in [
            ("allow its namespace", Allow, rule(Some("shop"), None, None), true),
            ("allow another namespace", Allow, rule(Some("other"), None, None), false),
            ("allow with a path is left out", Allow, rule(Some("shop"), Some("/a"), None), false),
            ("allow its port", Allow, rule(None, None, Some(80)), true),
            ("deny its namespace", Deny, rule(Some("shop"), None, None), false),
            ("deny another namespace", Deny, rule(Some("other"), None, None), true),
            ("deny with a path loses the path", Deny, rule(None, Some("/a"), None), false),
            ("deny another namespace's path", Deny, rule(Some("other"), Some("/a"), None), true),
            ("deny path and port keeps the port", Deny, rule(None, Some("/a"), Some(81)), true),
        ] {
            assert_eq!(check(action, rule), passes, "{name}");
        }
    }
}
