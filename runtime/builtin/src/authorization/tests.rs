//! Tests of authorization: what Istio's own tests expect of a waypoint, at the matcher.

use super::*;
use cairn_filter::{Peer, Protocol, Token};
use cairn_mesh::{
    ClaimPath, Condition, Identity, MeshSettings, MetadataKey, MetadataMatch, Operation, PathMatch,
    PathNormalization, PolicyAction, PolicyRule, RequestPrincipal, ResourceName, ServiceAccount, Source,
    TextMatch, TrustDomains, Values, normalize_path,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use proptest::prelude::*;
use std::net::SocketAddr;
use std::time::{Instant, SystemTime};

fn policy(name: &str, action: PolicyAction, rules: Vec<PolicyRule>) -> Arc<AuthorizationPolicy> {
    let rules = rules.into_iter().zip(0..).map(|(rule, index)| PolicyRule { index, ..rule }).collect();
    let name = ResourceName::new("shop", name);
    Arc::new(AuthorizationPolicy { name, targets: Vec::new(), action, rules, dry_run: false })
}

fn allow(rules: Vec<PolicyRule>) -> Arc<AuthorizationPolicy> {
    policy("allow", PolicyAction::Allow, rules)
}

fn deny(rules: Vec<PolicyRule>) -> Arc<AuthorizationPolicy> {
    policy("deny", PolicyAction::Deny, rules)
}

fn on_trial(policy: &AuthorizationPolicy) -> Arc<AuthorizationPolicy> {
    Arc::new(AuthorizationPolicy { dry_run: true, ..policy.clone() })
}

fn from(source: Source) -> PolicyRule {
    PolicyRule { from: vec![source], ..PolicyRule::default() }
}

fn to(operation: Operation) -> PolicyRule {
    PolicyRule { to: vec![operation], ..PolicyRule::default() }
}

fn when(condition: Condition) -> PolicyRule {
    PolicyRule { when: vec![condition], ..PolicyRule::default() }
}

fn any<T>(values: impl IntoIterator<Item = T>) -> Values<T> {
    Values { any: values.into_iter().collect(), none: Vec::new() }
}

fn none<T>(values: impl IntoIterator<Item = T>) -> Values<T> {
    Values { any: Vec::new(), none: values.into_iter().collect() }
}

fn texts<const N: usize>(values: [&str; N]) -> [TextMatch; N] {
    values.map(TextMatch::parse)
}

fn paths<const N: usize>(values: [&str; N]) -> [PathMatch; N] {
    values.map(|value| match value.contains("{*") {
        true => PathMatch::Template(value.into()),
        false => PathMatch::Text(TextMatch::parse(value)),
    })
}

fn blocks<const N: usize>(values: [&str; N]) -> [cairn_mesh::IpMatch; N] {
    values.map(|value| match value.parse() {
        Ok(block) => block,
        Err(_) => cairn_mesh::IpMatch::from(value.parse::<std::net::IpAddr>().unwrap()),
    })
}

fn account(namespace: &str, name: &str) -> ServiceAccount {
    ServiceAccount { namespace: namespace.into(), name: name.into() }
}

/// A request on a connection of client `a` of namespace `ns1` to port 80.
#[derive(Debug)]
struct Request {
    facts: ConnectionFacts,
    head: RequestHead,
    token: Option<Token>,
}

/// The trust domains of a mesh that says nothing of them.
fn domains() -> TrustDomains {
    MeshSettings::default().trust_domains()
}

fn get(path: &str) -> Request {
    let facts = ConnectionFacts {
        identity: Some("spiffe://mesh/ns/ns1/sa/a".parse().unwrap()),
        source: [10, 0, 0, 1].into(),
        destination: ([10, 96, 0, 10], 80).into(),
    };
    let head = RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop.example"),
        path: path.parse().unwrap(),
        headers: HeaderMap::new(),
        version: Version::HTTP_11,
    };
    Request { facts, head, token: None }
}

impl Request {
    fn by(mut self, identity: &str) -> Self {
        self.facts.identity = identity.parse::<Identity>().ok();
        self
    }

    fn method(mut self, method: &str) -> Self {
        self.head.method = method.parse().unwrap();
        self
    }

    fn host(mut self, host: &str) -> Self {
        self.head.authority = host.parse().unwrap();
        self
    }

    fn header(mut self, name: &'static str, value: &str) -> Self {
        self.head.headers.append(HeaderName::from_static(name), value.parse().unwrap());
        self
    }

    fn source(mut self, ip: &str) -> Self {
        self.facts.source = ip.parse().unwrap();
        self
    }

    fn destination(mut self, address: &str) -> Self {
        self.facts.destination = address.parse().unwrap();
        self
    }

    fn token(mut self, payload: serde_json::Value) -> Self {
        let serde_json::Value::Object(payload) = payload else { panic!("an object") };
        self.token = Some(Token::new(payload));
        self
    }

    fn decide(&self, policies: &[Arc<AuthorizationPolicy>]) -> Decision {
        self.decide_among(policies, &domains())
    }

    fn decide_among(&self, policies: &[Arc<AuthorizationPolicy>], domains: &TrustDomains) -> Decision {
        let authorizer = Authorizer::compile(policies, domains);
        authorizer.decide(&authorizer.settle(self.facts.clone()), &self.head, self.token.as_ref())
    }

    fn passes(&self, policies: &[Arc<AuthorizationPolicy>]) -> bool {
        matches!(self.decide(policies), Decision::Allow { .. })
    }
}

/// Client A is allowed by some attribute, client B is another.
const A: &str = "spiffe://mesh/ns/ns1/sa/a";
const B: &str = "spiffe://mesh/ns/ns2/sa/b";
const PLAINTEXT: &str = "";

const ECHO: &str = "/proto.EchoTestService/Echo";

#[test]
fn allows_by_every_form_of_identity() {
    let sources = [
        Source { principals: any(texts(["mesh/ns/ns1/sa/a"])), ..Source::default() },
        Source { principals: any(texts(["*/ns/ns1/sa/a"])), ..Source::default() },
        Source { principals: any(texts(["mesh/ns/ns1/*"])), ..Source::default() },
        Source { service_accounts: any([account("ns1", "a")]), ..Source::default() },
        Source { namespaces: any(["ns1".into()]), ..Source::default() },
        Source { namespaces: any(["*s1".into()]), ..Source::default() },
    ];
    for source in sources {
        let rule = |operation| PolicyRule { to: vec![operation], ..from(source.clone()) };
        let policies = [allow(vec![
            rule(Operation {
                paths: any(paths(["/allow"])),
                methods: any(texts(["GET"])),
                ..Operation::default()
            }),
            rule(Operation {
                paths: any(paths([ECHO])),
                methods: any(texts(["POST"])),
                ..Operation::default()
            }),
            rule(Operation { ports: any([9000]), ..Operation::default() }),
        ])];
        for (client, expected) in [(A, true), (B, false), (PLAINTEXT, false)] {
            for path in ["/allow", "/allow?param=value"] {
                assert_eq!(get(path).by(client).passes(&policies), expected, "{source:?} {client} {path}");
            }
            assert!(!get("/deny").by(client).passes(&policies), "{source:?} {client}");
            let echo = get(ECHO).method("POST").by(client);
            assert_eq!(echo.passes(&policies), expected, "{source:?} {client}");
            let tcp = get("/any").destination("10.96.0.10:9000").by(client);
            assert_eq!(tcp.passes(&policies), expected, "{source:?} {client}");
        }
    }
}

#[test]
fn allows_by_trust_domain() {
    let rule = |path, trust_domains| PolicyRule {
        to: vec![Operation { paths: any(paths([path])), ..Operation::default() }],
        ..from(Source { trust_domains, ..Source::default() })
    };
    let policies = [allow(vec![
        rule("/allow", any(texts(["mesh"]))),
        rule("/prefix", any(texts(["me*"]))),
        rule("/deny", any(texts(["foreign"]))),
        rule("/not-trust-domain", none(texts(["mesh"]))),
        rule("/not-deny", none(texts(["foreign"]))),
    ])];
    for (path, expected) in [
        ("/allow", true),
        ("/prefix", true),
        ("/deny", false),
        ("/not-trust-domain", false),
        ("/not-deny", true),
    ] {
        for client in [A, B] {
            assert_eq!(get(path).by(client).passes(&policies), expected, "{path} {client}");
        }
    }
}

#[test]
fn denies_by_identity_and_for_everybody() {
    let identities = [
        Source { principals: any(texts(["mesh/ns/ns1/sa/a"])), ..Source::default() },
        Source { namespaces: any(["ns1".into()]), ..Source::default() },
    ];
    for source in identities {
        let operation = Operation {
            paths: Values { any: paths(["/deny*"]).into(), none: paths(["/deny/allow"]).into() },
            ..Operation::default()
        };
        let everybody = Operation {
            paths: Values {
                any: paths(["/global-deny*"]).into(),
                none: paths(["/global-deny/allow"]).into(),
            },
            ports: any([80]),
            ..Operation::default()
        };
        let echo = Operation { paths: any(paths([ECHO])), ..Operation::default() };
        let policies = [
            deny(vec![PolicyRule { to: vec![operation, echo], ..from(source.clone()) }]),
            policy("global", PolicyAction::Deny, vec![to(everybody)]),
        ];
        for (path, denied_client, other_client) in [
            ("/deny", false, true),
            ("/deny?x=y", false, true),
            ("/deny/allow", true, true),
            ("/allow", true, true),
            ("/global-deny", false, false),
            ("/global-deny?x=y", false, false),
            ("/global-deny/allow", true, true),
            (ECHO, false, true),
        ] {
            assert_eq!(get(path).by(A).passes(&policies), denied_client, "{source:?} {path}");
            assert_eq!(get(path).by(B).passes(&policies), other_client, "{source:?} {path}");
        }
        assert!(get("/global-deny").destination("10.96.0.10:81").passes(&policies));
    }
}

#[test]
fn negations_hold_when_nothing_matches() {
    let not_ns1 = deny(vec![from(Source { namespaces: none(["ns1".into()]), ..Source::default() })]);
    let not_host = allow(vec![to(Operation { hosts: none(texts(["deny.host"])), ..Operation::default() })]);
    let not_put = allow(vec![to(Operation { methods: none(texts(["PUT"])), ..Operation::default() })]);
    let not_port = allow(vec![to(Operation { ports: none([80]), ..Operation::default() })]);
    let plaintext = deny(vec![from(Source { principals: none(texts(["*"])), ..Source::default() })]);
    let account =
        deny(vec![from(Source { service_accounts: none([account("ns1", "a")]), ..Source::default() })]);
    for (name, policy, request, expected) in [
        ("DENY notNamespaces: from it", &not_ns1, get("/").by(A), true),
        ("DENY notNamespaces: from another", &not_ns1, get("/").by(B), false),
        ("ALLOW notHosts: another", &not_host, get("/").host("allow.host"), true),
        ("ALLOW notHosts: it", &not_host, get("/").host("deny.host"), false),
        ("ALLOW notMethods: another", &not_put, get("/"), true),
        ("ALLOW notMethods: it", &not_put, get("/").method("PUT"), false),
        ("ALLOW notPorts: another", &not_port, get("/").destination("10.96.0.10:81"), true),
        ("ALLOW notPorts: it", &not_port, get("/"), false),
        ("DENY notPrincipals *: mTLS", &plaintext, get("/").by(A), true),
        ("DENY notPrincipals *: plaintext", &plaintext, get("/").by(PLAINTEXT), false),
        ("DENY notServiceAccounts: it", &account, get("/").by(A), true),
        ("DENY notServiceAccounts: another", &account, get("/").by(B), false),
    ] {
        assert_eq!(request.passes(std::slice::from_ref(policy)), expected, "{name}");
    }
}

#[test]
fn deny_wins_over_allow() {
    let path = |path| to(Operation { paths: any(paths([path])), ..Operation::default() });
    let policies = [allow(vec![path("/allow*")]), deny(vec![path("/allow/admin")])];
    for (path, expected) in
        [("/allow/admin", false), ("/allow/admin?p=v", false), ("/allow", true), ("/allow?p=v", true)]
    {
        assert_eq!(get(path).passes(&policies), expected, "{path}");
    }
}

#[test]
fn hosts_match_in_any_letter_case() {
    let hosts = any(texts(["deny.x", "prefix.*", "*.suffix.x"]));
    let policies = [deny(vec![to(Operation { hosts, ..Operation::default() })])];
    for host in ["deny.x", "DENY.X", "Deny.x", "prefix.y", "PREFIX.y", "a.suffix.x", "A.SUFFIX.X"] {
        assert!(!get("/").host(host).passes(&policies), "{host}");
    }
    for host in ["www.x", "x.prefix.y", "suffix.x", "deny.x:8080"] {
        assert!(get("/").host(host).passes(&policies), "{host}");
    }
}

#[test]
fn remote_addresses_are_what_the_nearest_proxy_reports() {
    let remote = |blocks| deny(vec![from(Source { remote_ip_blocks: blocks, ..Source::default() })]);
    let policy = remote(any(blocks(["172.17.72.46", "192.168.4.0/23"])));
    let inverse = remote(none(blocks(["172.23.240.0/22"])));
    let condition = deny(vec![when(Condition::RemoteIp(any(blocks(["10.242.5.7", "10.124.99.0/24"]))))]);
    for (name, policy, forwarded, expected) in [
        ("address", &policy, "172.17.72.46", false),
        ("block", &policy, "192.168.5.233", false),
        ("other", &policy, "10.4.5.6", true),
        ("only the last of several counts", &policy, "172.17.72.46, 10.4.5.6", true),
        ("unreadable: the peer's own", &policy, "unknown", true),
        ("not in block", &inverse, "10.2.3.4", false),
        ("in block", &inverse, "172.23.242.188", true),
        ("condition: address", &condition, "10.242.5.7", false),
        ("condition: block", &condition, "10.124.99.9", false),
        ("condition: other", &condition, "10.124.98.9", true),
    ] {
        let request = get("/").header("x-forwarded-for", forwarded);
        assert_eq!(request.passes(std::slice::from_ref(policy)), expected, "{name}");
    }
    assert!(!get("/").source("192.168.4.4").passes(&[policy]), "without a report it is the peer's own");
}

#[test]
fn conditions_hold_by_value_and_by_exclusion() {
    let foo = || "x-foo".into();
    let rows = [
        ("header", when(Condition::RequestHeader(foo(), any(texts(["foo"]))))),
        ("source.ip", when(Condition::SourceIp(any(blocks(["10.0.0.0/24"]))))),
        ("source.namespace", when(Condition::SourceNamespace(any(["ns1".into()])))),
        ("source.principal", when(Condition::SourcePrincipal(any(texts(["mesh/ns/ns1/sa/a"]))))),
        ("source.serviceAccount", when(Condition::SourceServiceAccount(any([account("ns1", "a")])))),
        ("source.trustDomain", when(Condition::SourceTrustDomain(any(texts(["mesh"]))))),
        ("destination.ip", when(Condition::DestinationIp(any(blocks(["10.96.0.10"]))))),
        ("destination.port", when(Condition::DestinationPort(any([80])))),
    ];
    let good = || get("/").header("x-foo", "foo");
    let bad = || {
        get("/")
            .header("x-foo", "bar")
            .by("spiffe://foreign/ns/ns2/sa/b")
            .source("10.0.1.1")
            .destination("10.96.0.11:81")
    };
    for (name, rule) in rows {
        let inverse = PolicyRule { when: rule.when.iter().map(invert).collect(), ..PolicyRule::default() };
        assert!(good().passes(&[allow(vec![rule.clone()])]), "{name}");
        assert!(!bad().passes(&[allow(vec![rule])]), "{name}");
        assert!(!good().passes(&[allow(vec![inverse.clone()])]), "{name} inverse");
        assert!(bad().passes(&[allow(vec![inverse])]), "{name} inverse");
    }
    let sni = |values| allow(vec![when(Condition::ConnectionSni(values))]);
    assert!(!good().passes(&[sni(any(texts(["shop.example"])))]));
    assert!(good().passes(&[sni(none(texts(["shop.example"])))]));
}

fn invert(condition: &Condition) -> Condition {
    fn swap<T: Clone>(values: &Values<T>) -> Values<T> {
        Values { any: values.none.clone(), none: values.any.clone() }
    }
    match condition {
        Condition::RequestHeader(name, values) => Condition::RequestHeader(name.clone(), swap(values)),
        Condition::SourceIp(values) => Condition::SourceIp(swap(values)),
        Condition::RemoteIp(values) => Condition::RemoteIp(swap(values)),
        Condition::SourceNamespace(values) => Condition::SourceNamespace(swap(values)),
        Condition::SourcePrincipal(values) => Condition::SourcePrincipal(swap(values)),
        Condition::SourceServiceAccount(values) => Condition::SourceServiceAccount(swap(values)),
        Condition::SourceTrustDomain(values) => Condition::SourceTrustDomain(swap(values)),
        Condition::DestinationIp(values) => Condition::DestinationIp(swap(values)),
        Condition::DestinationPort(values) => Condition::DestinationPort(swap(values)),
        Condition::ConnectionSni(values) => Condition::ConnectionSni(swap(values)),
        Condition::RequestPrincipal(values) => Condition::RequestPrincipal(swap(values)),
        Condition::RequestAudiences(values) => Condition::RequestAudiences(swap(values)),
        Condition::RequestPresenter(values) => Condition::RequestPresenter(swap(values)),
        Condition::RequestClaim(path, values) => Condition::RequestClaim(path.clone(), swap(values)),
        Condition::FilterMetadata(key, values) => Condition::FilterMetadata(key.clone(), swap(values)),
    }
}

#[test]
fn a_service_account_is_one_of_a_namespace() {
    let policies = [allow(vec![from(Source {
        service_accounts: any([account("my-ns", "my-sa")]),
        ..Source::default()
    })])];
    for (identity, expected) in [
        ("spiffe://td/ns/my-ns/sa/my-sa", true),
        ("spiffe://other/ns/my-ns/sa/my-sa", true),
        ("spiffe://td/ns/my-ns/sa/my-sa-suffix", false),
        ("spiffe://td/ns/my-ns-suffix/sa/my-sa", false),
        ("td/ns/my-ns/sa/my-sa", false),
        ("spiffe://ns/my-ns/sa/my-sa", false),
        ("spiffe://td/ns/my-ns", false),
        ("spiffe://td/sa/my-sa", false),
        // Istio's expression lets further parts stand anywhere. Here an identity has exactly the three that Istio gives,
        // so that none of them can hide in another: such a certificate is refused in the handshake.
        ("spiffe://td/ns/my-ns/sa/my-sa/extra/attr", false),
        ("spiffe://td/extra/attr/ns/my-ns/sa/my-sa", false),
        ("spiffe://td/ns/my-ns/extra/attr/sa/my-sa", false),
        ("spiffe://td/x/y/ns/my-ns/x/y/sa/my-sa/x/y", false),
    ] {
        assert_eq!(get("/").by(identity).passes(&policies), expected, "{identity}");
    }
}

#[test]
fn headers_match_by_any_of_their_lines_and_pseudo_headers_too() {
    let header = |name: &str, values| allow(vec![when(Condition::RequestHeader(name.into(), values))]);
    for (name, policy, request, expected) in [
        ("absent", header("x-foo", any(texts(["foo"]))), get("/"), false),
        ("absent and excluded", header("x-foo", none(texts(["bar"]))), get("/"), true),
        ("excluded", header("x-foo", none(texts(["bar"]))), get("/").header("x-foo", "bar"), false),
        ("empty is present", header("x-foo", any(texts(["*"]))), get("/").header("x-foo", ""), true),
        ("absent is not present", header("x-foo", any(texts(["*"]))), get("/"), false),
        (
            "a second line hides nothing",
            header("x-foo", any(texts(["foo"]))),
            get("/").header("x-foo", "bar").header("x-foo", "foo"),
            true,
        ),
        (
            "nor does it from what is excluded",
            header("x-foo", none(texts(["foo"]))),
            get("/").header("x-foo", "bar").header("x-foo", "foo"),
            false,
        ),
        (
            "lines are not joined",
            header("x-foo", any(texts(["foo,bar"]))),
            get("/").header("x-foo", "foo").header("x-foo", "bar"),
            false,
        ),
        (
            "but for headers that Envoy keeps in one",
            header("user-agent", any(texts(["foo,bar"]))),
            get("/").header("user-agent", "foo").header("user-agent", "").header("user-agent", "bar"),
            true,
        ),
        ("method", header(":method", any(texts(["GET"]))), get("/"), true),
        ("path with its query", header(":path", any(texts(["/a?b"]))), get("/a?b"), true),
        ("authority", header(":authority", any(texts(["shop.example"]))), get("/"), true),
        ("host is the authority", header("host", any(texts(["shop.example"]))), get("/"), true),
        ("a name that no header has", header("no name", any(texts(["*"]))), get("/"), false),
    ] {
        assert_eq!(request.passes(&[policy]), expected, "{name}");
    }
}

#[test]
fn templates_allow_what_istio_expects() {
    let templates = ["/allow/admin/{**}", "/foo/{*}/bar/{**}", "/store/{**}/cart"];
    let policies = [allow(vec![to(Operation { paths: any(paths(templates)), ..Operation::default() })])];
    for (path, expected) in [
        ("/allow/admin", false),
        ("/allow/admin/", true),
        ("/allow/admin?param=value", false),
        ("/allow/admin/temp", true),
        ("/allow/admin/temp.txt", true),
        ("/allow/admin/foo/temp.txt", true),
        ("/allow", false),
        ("/allow/user/", false),
        ("/foo/buzz/bar/bat.txt", true),
        ("/foo/buzz/bar/bat.temp.txt", true),
        ("/foo/buzz/bar/bat/fuzz.txt", true),
        ("/foo/buzz/bar/bat", true),
        ("/foo/bar/bat.txt", false),
        ("/foo//bar/bat.txt", false),
        ("/store/cart", false),
        ("/store//cart", true),
        ("/store/foo/cart", true),
        ("/store/foo/bar/cart", true),
        ("/other", false),
    ] {
        assert_eq!(get(path).passes(&policies), expected, "{path}");
    }
}

#[test]
fn a_normalised_path_cannot_climb_out_of_what_is_allowed() {
    let operation =
        Operation { paths: any(paths(["/public*"])), methods: any(texts(["GET"])), ..Operation::default() };
    let policies = [allow(vec![to(operation)])];
    for (path, expected) in [
        ("/public/../public", true),
        ("/public/../private", false),
        ("/public/%2e%2e/private", false),
        ("/public/%2E./private", false),
        ("/public/.%2e/private", false),
        ("/public/%2e%2E/private", false),
    ] {
        let normal = normalize_path(path, PathNormalization::Base);
        assert_eq!(get(&normal).passes(&policies), expected, "{path}");
    }
}

#[test]
fn emptiness_means_nothing_or_everything() {
    let everything = PolicyRule::default;
    let denied = |reason: &str| Decision::Deny { policy: None, reason: reason.to_owned() };
    let allowed = |by: Option<&str>| Decision::Allow { by: by.map(Into::into) };
    assert_eq!(get("/").decide(&[]), allowed(None));
    assert_eq!(get("/").decide(&[allow(vec![])]), denied("ALLOW allow has no rule, so it allows nothing"));
    assert_eq!(get("/").decide(&[deny(vec![])]), allowed(None));
    assert_eq!(
        get("/").decide(&[allow(vec![everything()])]),
        allowed(Some("ns[shop]-policy[allow]-rule[0]"))
    );
    assert_eq!(
        get("/").decide(&[deny(vec![everything()])]),
        Decision::Deny {
            policy: Some("ns[shop]-policy[deny]-rule[0]".into()),
            reason: "DENY deny rule 0 matched".to_owned()
        }
    );
    assert_eq!(
        get("/").decide(&[allow(vec![]), policy("other", PolicyAction::Allow, vec![everything()])]),
        allowed(Some("ns[shop]-policy[other]-rule[0]")),
        "any ALLOW policy may match"
    );
}

#[test]
fn alternatives_and_conditions_combine() {
    let rule = PolicyRule {
        from: vec![
            Source {
                namespaces: any(["ns1".into()]),
                ip_blocks: any(blocks(["10.0.0.1"])),
                ..Source::default()
            },
            Source { namespaces: any(["ns2".into()]), ..Source::default() },
        ],
        to: vec![
            Operation { methods: any(texts(["GET"])), paths: any(paths(["/a"])), ..Operation::default() },
            Operation { methods: any(texts(["POST"])), ports: any([81]), ..Operation::default() },
        ],
        when: vec![Condition::RequestHeader("x-foo".into(), any(texts(["foo"])))],
        ..PolicyRule::default()
    };
    let policies = [allow(vec![rule])];
    for (name, request, expected) in [
        ("first and first", get("/a"), true),
        ("second source", get("/a").by(B), true),
        ("first source, wrong address", get("/a").source("10.0.0.2"), false),
        ("second operation", get("/b").method("POST").destination("10.96.0.10:81"), true),
        ("second operation, wrong port", get("/b").method("POST"), false),
        ("parts of both operations", get("/b").destination("10.96.0.10:81"), false),
    ] {
        assert_eq!(request.header("x-foo", "foo").passes(&policies), expected, "{name}");
    }
    assert!(!get("/a").passes(&policies), "without the header");
}

#[test]
fn reason_names_the_nearest_miss() {
    let get_only = |source| {
        let operation = Operation {
            methods: any(texts(["GET"])),
            paths: any(paths(["/items*"])),
            ..Operation::default()
        };
        let rule = PolicyRule { to: vec![operation], ..from(source) };
        policy("get-only", PolicyAction::Allow, vec![rule])
    };
    let ours = || get_only(Source { namespaces: any(["ns1".into()]), ..Source::default() });
    let header = || when(Condition::RequestHeader("x-key".into(), any(texts(["s3cret"]))));
    let far = || {
        let principals = any(texts(["mesh/ns/x/sa/1", "mesh/ns/x/sa/2", "mesh/ns/x/sa/3", "mesh/ns/x/sa/4"]));
        let source = from(Source { principals, ..Source::default() });
        policy("far", PolicyAction::Allow, vec![PolicyRule { when: header().when, ..source }])
    };
    for (policies, request, expected) in [
        (
            vec![ours()],
            get("/items").method("POST"),
            "ALLOW get-only rule 0 failed on method: POST is not GET",
        ),
        (
            vec![ours(), far()],
            get("/items/1").by(B),
            "ALLOW get-only rule 0 failed on namespace: ns2 is not ns1",
        ),
        (
            vec![ours()],
            get("/items").by(PLAINTEXT),
            "ALLOW get-only rule 0 failed on namespace: a peer without identity is not ns1",
        ),
        (vec![ours()], get("/other"), "ALLOW get-only rule 0 failed on path: /other is not /items*"),
        (
            vec![far()],
            get("/").header("x-key", "s3cret"),
            "ALLOW far rule 0 failed on principal: mesh/ns/ns1/sa/a is not mesh/ns/x/sa/1 or mesh/ns/x/sa/2 or \
             mesh/ns/x/sa/3 or 1 more",
        ),
        (vec![allow(vec![header()])], get("/"), "ALLOW allow rule 0 failed on header x-key: it is absent"),
        (
            vec![allow(vec![header()])],
            get("/").header("x-key", "guess"),
            "ALLOW allow rule 0 failed on header x-key: its value is none of those asked for",
        ),
        (
            vec![allow(vec![from(Source { namespaces: none(["ns*".into()]), ..Source::default() })])],
            get("/"),
            "ALLOW allow rule 0 failed on namespace: ns1 is excluded by ns*",
        ),
    ] {
        let expected = Decision::Deny { policy: None, reason: expected.to_owned() };
        assert_eq!(request.decide(&policies), expected);
    }
}

#[test]
fn policies_on_trial_and_audit_only_remark() {
    let everything = || vec![PolicyRule::default()];
    let never = || vec![to(Operation { methods: any(texts(["PUT"])), ..Operation::default() })];
    for (policies, expected) in [
        (
            vec![policy("audit", PolicyAction::Audit, everything())],
            vec!["audit: ns[shop]-policy[audit]-rule[0] matched"],
        ),
        (vec![policy("audit", PolicyAction::Audit, never())], vec![]),
        (
            vec![on_trial(&deny(everything()))],
            vec![
                "dry run: ns[shop]-policy[deny]-rule[0] would deny",
                "dry run: with the policies in force it would be denied",
            ],
        ),
        (vec![on_trial(&deny(never()))], vec!["dry run: with the policies in force it would be allowed"]),
        (
            vec![on_trial(&allow(everything()))],
            vec![
                "dry run: ns[shop]-policy[allow]-rule[0] would allow",
                "dry run: with the policies in force it would be allowed",
            ],
        ),
        (
            vec![on_trial(&allow(everything())), on_trial(&deny(everything()))],
            vec![
                "dry run: ns[shop]-policy[deny]-rule[0] would deny",
                "dry run: ns[shop]-policy[allow]-rule[0] would allow",
                "dry run: with the policies in force it would be denied",
            ],
        ),
        (
            vec![on_trial(&allow(never()))],
            vec![
                "dry run: would deny, ALLOW allow rule 0 failed on method: GET is not PUT",
                "dry run: with the policies in force it would be denied",
            ],
        ),
    ] {
        let request = get("/");
        let authorizer = Authorizer::compile(&policies, &domains());
        let standing = authorizer.settle(request.facts.clone());
        assert_eq!(authorizer.remarks(&standing, &request.head, None).lines, expected);
        assert_eq!(authorizer.decide(&standing, &request.head, None), Decision::Allow { by: None });
    }
}

#[path = "tests/many.rs"]
mod many;
#[path = "tests/tokens.rs"]
mod tokens;

fn connection(id: u64, identity: &str) -> Arc<Connection> {
    Arc::new(Connection {
        id,
        worker: 0,
        source: Peer {
            address: SocketAddr::from(([10, 0, 0, 1], 40000)),
            identity: identity.parse().ok(),
            workload: None,
        },
        destination: SocketAddr::from(([10, 96, 0, 10], 80)),
        service: None,
        local: None,
        callout: Arc::new(cairn_filter::NoCallout),
    })
}

fn exchange(connection: &Arc<Connection>) -> Exchange {
    Exchange::new(Arc::clone(connection), Protocol::Http11, Instant::now(), SystemTime::now())
}

fn run(factory: &dyn Factory, exchange: &mut Exchange) -> Option<LocalReply> {
    let mut filter = factory.start(exchange)?;
    match filter.request_headers(exchange, &mut get("/").head, true) {
        Verdict::Continue => None,
        Verdict::Reply(reply) => Some(*reply),
        Verdict::Reset | Verdict::Wait(_) | Verdict::Hold(_) | Verdict::ReadBody { .. } => {
            panic!("it decides at once")
        }
    }
}

#[test]
fn filter_answers_403_and_tells_the_peer_nothing_more() {
    let factory = authorization(&[deny(vec![PolicyRule::default()])], &domains());
    let mut denied = exchange(&connection(1, A));
    let reply = run(&*factory, &mut denied).unwrap();
    assert_eq!(reply.status, StatusCode::FORBIDDEN);
    assert_eq!(&*reply.body, b"RBAC: access denied");
    assert_eq!(reply.details, "rbac_access_denied_matched_policy[ns[shop]-policy[deny]-rule[0]]");
    let denial = denied.denial.unwrap();
    assert_eq!(denial.policy, "ns[shop]-policy[deny]-rule[0]");
    assert_eq!(denial.reason, "DENY deny rule 0 matched");

    let factory = authorization(&[allow(vec![])], &domains());
    let mut denied = exchange(&connection(1, A));
    let reply = run(&*factory, &mut denied).unwrap();
    assert_eq!(reply.details, "rbac_access_denied_matched_policy[none]");
    assert_eq!(denied.denial.unwrap().policy, "none");
}

#[test]
fn filter_records_who_allowed_and_what_was_remarked() {
    let everything = || vec![PolicyRule::default()];
    let factory = authorization(&[allow(everything()), on_trial(&deny(everything()))], &domains());
    let mut allowed = exchange(&connection(1, A));
    assert!(run(&*factory, &mut allowed).is_none());
    assert_eq!(allowed.allowed_by.as_deref(), Some("ns[shop]-policy[allow]-rule[0]"));
    let notes: Vec<_> = allowed.notes.iter().map(|note| (&*note.filter, &*note.text)).collect();
    let expected = [
        ("authorization", "dry run: ns[shop]-policy[deny]-rule[0] would deny"),
        ("authorization", "dry run: with the policies in force it would be denied"),
    ];
    assert_eq!(notes, expected);
}

#[test]
fn filter_writes_what_envoy_would_of_policies_that_decide_nothing() {
    let to_path = |path| vec![to(Operation { paths: any(paths([path])), ..Operation::default() })];
    let trials = [
        on_trial(&deny(to_path("/deny"))),
        on_trial(&allow(to_path("/allow"))),
        policy("audit", PolicyAction::Audit, to_path("/audit")),
    ];
    let key = |action: &str, name: &str| format!("istio_dry_run_{action}_shadow_{name}");
    for (path, allowed, denying, allowing, audited) in [
        ("/deny", ("denied", "denied"), Some("ns[shop]-policy[deny]-rule[0]"), None, false),
        ("/allow", ("allowed", "allowed"), None, Some("ns[shop]-policy[allow]-rule[0]"), false),
        ("/audit", ("allowed", "denied"), None, None, true),
    ] {
        let factory = authorization(&trials, &domains());
        let mut asked = exchange(&connection(1, A));
        let mut filter = factory.start(&asked).unwrap();
        assert!(matches!(filter.request_headers(&mut asked, &mut get(path).head, true), Verdict::Continue));
        let said =
            |name: String| asked.metadata.get("envoy.filters.http.rbac", &[name]).and_then(|v| v.as_str());
        assert_eq!(said(key("deny", "engine_result")), Some(allowed.0), "{path}");
        assert_eq!(said(key("allow", "engine_result")), Some(allowed.1), "{path}");
        assert_eq!(said(key("deny", "effective_policy_id")), denying, "{path}");
        assert_eq!(said(key("allow", "effective_policy_id")), allowing, "{path}");
        let hint = asked.metadata.get("envoy.common", &["access_log_hint"]);
        assert_eq!(hint.is_some_and(|hint| hint == true), audited, "{path}");
    }
}

#[test]
fn what_another_filter_said_can_be_asked_for() {
    let key = MetadataKey { filter: "envoy.filters.http.ext_authz".into(), path: ["team".into()].into() };
    let red = any([MetadataMatch::Text(TextMatch::parse("red"))]);
    let factory = authorization(&[allow(vec![when(Condition::FilterMetadata(key, red))])], &domains());
    for (team, passes) in [(Some("red"), true), (Some("blue"), false), (None, false)] {
        let mut asked = exchange(&connection(1, A));
        if let Some(team) = team {
            asked.metadata.set("envoy.filters.http.ext_authz", "team", team);
        }
        assert_eq!(run(&*factory, &mut asked).is_none(), passes, "{team:?}");
    }
}

#[test]
fn filter_does_not_start_without_policies() {
    assert!(authorization(&[], &domains()).start(&exchange(&connection(1, A))).is_none());
}

#[test]
fn connections_never_share_a_standing_by_mistake() {
    let factory = authorization(
        &[allow(vec![from(Source { namespaces: any(["ns1".into()]), ..Source::default() })])],
        &domains(),
    );
    let mut closed = Vec::new();
    for round in 0..300 {
        // The same slot again and again, by clients of either kind, old connections open or closed.
        let (allowed, denied) = (connection(5, A), connection(5 + 128, B));
        for _ in 0..2 {
            assert!(run(&*factory, &mut exchange(&allowed)).is_none());
            assert!(run(&*factory, &mut exchange(&denied)).is_some());
        }
        if round % 2 == 0 {
            closed.push(allowed);
        }
    }
}

/// The rules in plain words, without compilation, standings or index.
fn matches_plainly(rule: &PolicyRule, request: &Request) -> bool {
    let identity = request.facts.identity.as_ref();
    let principal = identity.map(|identity| identity.principal());
    let from = rule.from.iter().any(|source| {
        source.principals.hold(|text| principal.is_some_and(|principal| text.matches(principal)))
            && source.remote_ip_blocks.hold(|block| block.contains(&request.facts.source))
    });
    let to = rule.to.iter().any(|operation| {
        operation.methods.hold(|text| text.matches(request.head.method.as_str()))
            && operation.ports.hold(|port| *port == request.facts.destination.port())
            && operation.paths.hold(|path| match path {
                PathMatch::Text(text) => text.matches(request.head.path.path()),
                PathMatch::Template(_) => panic!("no templates here"),
            })
    });
    (rule.from.is_empty() || from) && (rule.to.is_empty() || to)
}

fn some_values<T: std::fmt::Debug + Clone + 'static>(values: Vec<T>) -> impl Strategy<Value = Values<T>> {
    let some = move || prop::collection::vec(prop::sample::select(values.clone()), 0..2);
    (some(), some()).prop_map(|(any, none)| Values { any, none })
}

prop_compose! {
    fn some_rule()(
        principals in some_values(texts(["mesh/ns/ns1/sa/a", "mesh/ns/ns2/sa/b", "mesh/*", "*"]).to_vec()),
        remote_ip_blocks in some_values(blocks(["10.0.0.0/8", "172.17.0.0/16"]).to_vec()),
        methods in some_values(texts(["GET", "POST"]).to_vec()),
        ports in some_values(vec![80, 81]),
        some_paths in some_values(paths(["/a", "/ab", "/a*", "/ab*", "*b", "*", "/é*", "/b"]).to_vec()),
        has_from: bool,
        to_count in 0..3_usize,
    ) -> PolicyRule {
        let source = Source { principals, remote_ip_blocks, ..Source::default() };
        let operation = Operation { methods, ports, paths: some_paths.clone(), ..Operation::default() };
        let other = Operation { paths: Values { any: some_paths.none, none: some_paths.any }, ..Operation::default() };
        let mut to = vec![operation, other];
        to.truncate(to_count);
        PolicyRule { from: has_from.then_some(source).into_iter().collect(), to, ..PolicyRule::default() }
    }
}

proptest! {
    #[test]
    fn compiled_rules_decide_as_the_plain_words_do(
        denied in prop::collection::vec(some_rule(), 0..20),
        allowed in prop::collection::vec(some_rule(), 1..40),
        path in "/(a|ab|abb|b|é|éb|)",
        client in prop::sample::select(vec![A, B, PLAINTEXT]),
        is_post: bool,
    ) {
        let request = get(&path).by(client).method(if is_post { "POST" } else { "GET" });
        let first = |rules: &[PolicyRule]| rules.iter().position(|rule| matches_plainly(rule, &request));
        let (first_denied, first_allowed) = (first(&denied), first(&allowed));
        let decision = request.decide(&[deny(denied), allow(allowed)]);
        match (first_denied, first_allowed) {
            (Some(_), _) => {
                prop_assert!(matches!(decision, Decision::Deny { policy: Some(_), .. }), "{:?}", decision);
            }
            (None, None) => {
                prop_assert!(matches!(decision, Decision::Deny { policy: None, .. }), "{:?}", decision);
            }
            (None, Some(_)) => {
                prop_assert!(matches!(decision, Decision::Allow { by: Some(_) }), "{:?}", decision);
            }
        }
    }

    #[test]
    fn any_request_is_decided(
        path in "/\\PC{0,20}",
        host in prop::collection::vec(any_byte(), 0..20),
        value in prop::collection::vec(any_byte(), 0..20),
        pattern in "\\PC{0,8}",
        template in "/(a|\\{\\*\\}|\\{\\*\\*\\}|/){0,6}",
    ) {
        let mut request = get("/");
        let Ok(path) = path.parse() else { return Ok(()) };
        request.head.path = path;
        if let (Ok(host), Ok(value)) = (HeaderValue::from_bytes(&host), HeaderValue::from_bytes(&value)) {
            request.head.authority = host;
            request.head.headers.insert("x-forwarded-for", value.clone());
            request.head.headers.insert("x-foo", value);
        }
        let text = || any(texts([pattern.as_str()]));
        let rule = PolicyRule {
            from: vec![Source {
                principals: text(),
                namespaces: any([pattern.as_str().into()]),
                remote_ip_blocks: any(blocks(["10.0.0.0/8"])),
                ..Source::default()
            }],
            to: vec![Operation {
                hosts: text(),
                paths: any([PathMatch::Template(template.as_str().into()), PathMatch::Text(TextMatch::parse(&pattern))]),
                ..Operation::default()
            }],
            when: vec![Condition::RequestHeader(pattern.as_str().into(), text())],
            ..PolicyRule::default()
        };
        let policies = [policy("p", PolicyAction::Deny, vec![rule.clone()]), allow(vec![rule])];
        let again = request.decide(&policies);
        prop_assert_eq!(request.decide(&policies), again);
    }
}

fn any_byte() -> impl Strategy<Value = u8> {
    prop::num::u8::ANY
}
