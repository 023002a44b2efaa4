//! What does a decision cost a request, and does it depend on how many rules there are?
//!
//! Shapes of policy, each with 10, 100 and 1,000 rules of which the last allows: rules that differ in who may call, in path,
//! header, host, claim or address behind a proxy, and all of these mixed. They are meant to cost at most twice as much at
//! the largest size as at the smallest, and less than a microsecond. The reference is a fixed loop, to compare machines by.

// A benchmark's own inputs are right or it must stop.
#![allow(clippy::expect_used)]

use cairn_builtin::{Authorizer, ConnectionFacts, Decision, Standing};
use cairn_filter::{RequestHead, Token};
use cairn_mesh::{
    AuthorizationPolicy, Condition, MeshSettings, Operation, PathMatch, PolicyAction, PolicyRule,
    RequestPrincipal, ResourceName, Source, TextMatch, Values,
};
use divan::{Bencher, black_box};
use http::{HeaderMap, HeaderValue, Method, Version};
use serde_json::{Map, Value};
use std::net::IpAddr;
use std::sync::Arc;

const SIZES: [usize; 3] = [10, 100, 1_000];

fn main() {
    divan::main();
}

fn any<T>(value: T) -> Values<T> {
    Values { any: vec![value], none: Vec::new() }
}

fn exact(text: String) -> TextMatch {
    TextMatch::Exact(text.into())
}

fn authorizer(count: usize, rule: impl Fn(usize) -> PolicyRule) -> Authorizer {
    let rules = (0..count).map(|index| PolicyRule { index, ..rule(index) }).collect();
    let name = ResourceName::new("shop", "allow");
    let action = PolicyAction::Allow;
    let policy = AuthorizationPolicy { name, targets: Vec::new(), action, rules, dry_run: false };
    Authorizer::compile(&[Arc::new(policy)], &MeshSettings::default().trust_domains())
}

fn identity_rule(index: usize) -> PolicyRule {
    let principals = any(exact(format!("cluster.local/ns/shop/sa/client-{index}")));
    let methods = any(exact("GET".to_owned()));
    PolicyRule {
        from: vec![Source { principals, ..Source::default() }],
        to: vec![Operation { methods, ..Operation::default() }],
        ..PolicyRule::default()
    }
}

fn path_rule(index: usize) -> PolicyRule {
    let paths = any(PathMatch::Text(TextMatch::Prefix(format!("/api/{index}/").into())));
    PolicyRule { to: vec![Operation { paths, ..Operation::default() }], ..PolicyRule::default() }
}

fn header_rule(index: usize) -> PolicyRule {
    let condition = Condition::RequestHeader("x-tenant".into(), any(exact(format!("tenant-{index}"))));
    PolicyRule { when: vec![condition], ..PolicyRule::default() }
}

fn host_rule(index: usize) -> PolicyRule {
    let hosts = any(exact(format!("shop-{index}.example")));
    PolicyRule { to: vec![Operation { hosts, ..Operation::default() }], ..PolicyRule::default() }
}

fn claim_rule(index: usize) -> PolicyRule {
    let condition = Condition::RequestClaim(["groups".into()].into(), any(exact(format!("group-{index}"))));
    PolicyRule { when: vec![condition], ..PolicyRule::default() }
}

fn request_principal_rule(index: usize) -> PolicyRule {
    let request_principals = any(RequestPrincipal::parse(&format!("https://issuer.example/user-{index}")));
    PolicyRule { from: vec![Source { request_principals, ..Source::default() }], ..PolicyRule::default() }
}

fn address(index: usize) -> IpAddr {
    let [.., third, fourth] = index.to_be_bytes();
    [10, 1, third, fourth].into()
}

fn remote_ip_rule(index: usize) -> PolicyRule {
    let remote_ip_blocks = any(address(index).into());
    PolicyRule { from: vec![Source { remote_ip_blocks, ..Source::default() }], ..PolicyRule::default() }
}

/// Who may call, and one more thing, another in each rule.
fn mixed_rule(index: usize) -> PolicyRule {
    let shapes = [path_rule, header_rule, host_rule, claim_rule, request_principal_rule, remote_ip_rule];
    let rule = shapes[index % shapes.len()](index);
    let methods = any(exact("GET".to_owned()));
    let namespaces = any(Arc::from("shop"));
    let mut to = rule.to;
    to.resize_with(1, Operation::default);
    let to = to.into_iter().map(|operation| Operation { methods: methods.clone(), ..operation }).collect();
    let source = rule.from.into_iter().next().unwrap_or_default();
    PolicyRule { from: vec![Source { namespaces, ..source }], to, ..rule }
}

fn facts(client: usize) -> ConnectionFacts {
    ConnectionFacts {
        identity: format!("spiffe://cluster.local/ns/shop/sa/client-{client}").parse().ok(),
        source: [10, 0, 0, 1].into(),
        destination: ([10, 96, 0, 10], 80).into(),
    }
}

fn head(count: usize) -> RequestHead {
    let mut headers = HeaderMap::new();
    headers.insert("x-tenant", format!("tenant-{}", count - 1).parse().expect("a header value"));
    headers.insert("x-forwarded-for", address(count - 1).to_string().parse().expect("a header value"));
    RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: format!("shop-{}.example", count - 1).parse().expect("a host"),
        path: format!("/api/{}/items?page=2", count - 1).parse().expect("a path"),
        headers,
        version: Version::HTTP_11,
    }
}

fn token(count: usize) -> Token {
    let mut payload = Map::new();
    let mut claim = |name: &str, value: Value| payload.insert(name.to_owned(), value);
    claim("iss", "https://issuer.example".into());
    claim("sub", format!("user-{}", count - 1).into());
    claim("groups", vec!["everybody".to_owned(), format!("group-{}", count - 1)].into());
    Token::new(payload)
}

fn decide(bencher: Bencher, count: usize, rule: fn(usize) -> PolicyRule) {
    let authorizer = authorizer(count, rule);
    let standing = authorizer.settle(facts(count - 1));
    let head = head(count);
    let token = token(count);
    let decide = || authorizer.decide(black_box(&standing), black_box(&head), black_box(Some(&token)));
    let last = format!("ns[shop]-policy[allow]-rule[{}]", count - 1);
    assert_eq!(decide(), Decision::Allow { by: Some(last.into()) });
    bencher.counter(1_u32).bench(decide);
}

/// A request when rules differ in who may call.
#[divan::bench(args = SIZES)]
fn rules_on_identities(bencher: Bencher, count: usize) {
    decide(bencher, count, identity_rule);
}

/// A request when rules differ in the path.
#[divan::bench(args = SIZES)]
fn rules_on_paths(bencher: Bencher, count: usize) {
    decide(bencher, count, path_rule);
}

/// A request when rules differ in a header.
#[divan::bench(args = SIZES)]
fn rules_on_headers(bencher: Bencher, count: usize) {
    decide(bencher, count, header_rule);
}

/// A request when rules differ in the host.
#[divan::bench(args = SIZES)]
fn rules_on_hosts(bencher: Bencher, count: usize) {
    decide(bencher, count, host_rule);
}

/// A request when rules differ in a claim.
#[divan::bench(args = SIZES)]
fn rules_on_claims(bencher: Bencher, count: usize) {
    decide(bencher, count, claim_rule);
}

/// A request when rules differ in whom the token speaks for.
#[divan::bench(args = SIZES)]
fn rules_on_request_principals(bencher: Bencher, count: usize) {
    decide(bencher, count, request_principal_rule);
}

/// A request when rules differ in the address that a proxy reports.
#[divan::bench(args = SIZES)]
fn rules_on_remote_addresses(bencher: Bencher, count: usize) {
    decide(bencher, count, remote_ip_rule);
}

/// A request when rules differ in different things.
#[divan::bench(args = SIZES)]
fn rules_mixed(bencher: Bencher, count: usize) {
    decide(bencher, count, mixed_rule);
}

/// What a machine is worth: a thousand dependent multiplications.
#[divan::bench]
fn reference(bencher: Bencher) {
    let spin = || {
        (0..1_000_u64).fold(black_box(1_u64), |sum, step| {
            sum.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step)
        })
    };
    bencher.counter(1_u32).bench(spin);
}

/// A request that no rule allows, with the search for the nearest miss.
#[divan::bench(args = SIZES)]
fn denied_by_identity(bencher: Bencher, count: usize) {
    let authorizer = authorizer(count, identity_rule);
    let standing = authorizer.settle(facts(count));
    let head = head(count);
    let decide = || authorizer.decide(black_box(&standing), black_box(&head), None);
    assert!(matches!(decide(), Decision::Deny { policy: None, .. }));
    bencher.counter(1_u32).bench(decide);
}

/// What a new connection costs once.
#[divan::bench(args = SIZES)]
fn new_connection(bencher: Bencher, count: usize) {
    let authorizer = authorizer(count, identity_rule);
    let facts = facts(count - 1);
    let settle = || -> Standing { authorizer.settle(black_box(&facts).clone()) };
    assert!(matches!(authorizer.decide(&settle(), &head(count), None), Decision::Allow { by: Some(_) }));
    bencher.counter(1_u32).bench(settle);
}
