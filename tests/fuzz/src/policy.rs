//! The policy compiler: manifests are decoded and compiled, and a request is decided on.

use cairn_builtin::{Authorizer, ConnectionFacts, Decision};
use cairn_filter::RequestHead;
use cairn_manifest::{Loaded, decode};
use cairn_mesh::{AuthorizationPolicy, Change, MeshSettings, PolicyAction, PolicyRule, ResourceName};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// A text of manifests, a zero byte, and a request: one thing per line, see [`request`].
pub fn policy(data: &[u8]) {
    let at = data.iter().position(|byte| *byte == 0);
    let (manifests, request_text) = match at {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &b""[..]),
    };
    let manifests = String::from_utf8_lossy(manifests);
    let loaded = Loaded::from_text(&manifests, MeshSettings::default());
    let policies: Vec<Arc<AuthorizationPolicy>> = loaded
        .objects
        .iter()
        .flat_map(|object| decode(object, &loaded.settings).changes)
        .filter_map(|change| match change {
            Change::Policy(policy) => Some(Arc::new(policy)),
            _ => None,
        })
        .collect();
    let (facts, head) = request(&String::from_utf8_lossy(request_text));
    decide(&policies, &loaded.settings, facts, &head);
}

fn decide(
    policies: &[Arc<AuthorizationPolicy>],
    settings: &MeshSettings,
    facts: ConnectionFacts,
    head: &RequestHead,
) {
    let domains = settings.trust_domains();
    let decision = |policies: &[Arc<AuthorizationPolicy>]| {
        let authorizer = Authorizer::compile(policies, &domains);
        let standing = authorizer.settle(facts.clone());
        let remarks = authorizer.remarks(&standing, head, None);
        assert!(remarks.lines.iter().all(|remark| !remark.is_empty()));
        let decision = authorizer.decide(&standing, head, None);
        assert_eq!(authorizer.decide(&standing, head, None), decision, "asked again, it is another");
        decision
    };
    let is_allowed = |decision: &Decision| matches!(decision, Decision::Allow { .. });
    let plain = decision(policies);
    let with = |action| [policies, &[Arc::new(everything(action))]].concat();
    assert!(!is_allowed(&decision(&with(PolicyAction::Deny))), "DENY of everything does not deny");
    let wider = decision(&with(PolicyAction::Allow));
    assert!(!is_allowed(&plain) || is_allowed(&wider), "ALLOW of everything denies");
    let by_rule = |decision: &Decision| matches!(decision, Decision::Deny { policy: Some(_), .. });
    assert_eq!(by_rule(&plain), by_rule(&wider), "an ALLOW policy decides what DENY says");
}

fn everything(action: PolicyAction) -> AuthorizationPolicy {
    AuthorizationPolicy {
        name: ResourceName::new("fuzz", "everything"),
        targets: Vec::new(),
        action,
        rules: vec![PolicyRule::default()],
        dry_run: false,
    }
}

/// Lines: the peer's identity, its address, the destination, the method, the target, the authority, and then a header
/// each. What cannot be read is as if it were not said.
fn request(text: &str) -> (ConnectionFacts, RequestHead) {
    let mut lines = text.lines();
    let mut next = || lines.next().unwrap_or_default();
    let (identity, source, destination) = (next(), next(), next());
    let facts = ConnectionFacts {
        identity: identity.parse().ok(),
        source: source.parse().unwrap_or(Ipv4Addr::LOCALHOST.into()),
        destination: destination.parse().unwrap_or(SocketAddr::from(([10, 0, 0, 1], 80))),
    };
    let (method, target, authority) = (next(), next(), next());
    let mut headers = HeaderMap::new();
    for line in lines.take(64) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let name = HeaderName::from_bytes(name.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
            headers.append(name, value);
        }
    }
    let head = RequestHead {
        method: Method::from_bytes(method.as_bytes()).unwrap_or(Method::GET),
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_str(authority).unwrap_or(HeaderValue::from_static("")),
        path: PathAndQuery::try_from(target).unwrap_or(PathAndQuery::from_static("/")),
        headers,
        version: Version::HTTP_11,
    };
    (facts, head)
}
