//! Which rule a request meets, and what a rule that cannot be honoured does.

use super::*;
use cairn_mesh::{
    Backend as MeshBackend, ClaimMatch, HeaderChange, HeaderChanges, NameMatch, ParentRef, PathRule,
    Redirect, RouteMatch, ValueMatch,
};
use http::{HeaderMap, HeaderValue, Method, Version};

fn path(text: &str) -> RouteMatch {
    let path = match text.strip_prefix('=') {
        Some(exact) => PathRule::Exact(exact.into()),
        None => match text.strip_prefix('~') {
            Some(expression) => PathRule::Regex(expression.into()),
            None => PathRule::Prefix(text.into()),
        },
    };
    RouteMatch { path, headers: Vec::new(), claims: Vec::new(), query: Vec::new(), method: None }
}

fn exact(name: &str, value: &str) -> NameMatch {
    NameMatch { name: name.into(), value: ValueMatch::Exact(value.into()), inverted: false }
}

fn regex(name: &str, value: &str) -> NameMatch {
    NameMatch { name: name.into(), value: ValueMatch::Regex(value.into()), inverted: false }
}

fn to(service: &str, weight: u32) -> MeshBackend {
    let kind = BackendKind::Service { service: ResourceName::new("shop", service), port: 80 };
    MeshBackend { kind, weight, filters: Vec::new() }
}

fn rule(matches: Vec<RouteMatch>) -> RouteRule {
    RouteRule { name: None, matches, filters: Vec::new(), backends: vec![to("v1", 1)], broken: None }
}

fn route(name: &str, created: &str, rules: Vec<RouteRule>) -> Arc<HttpRoute> {
    let parents = vec![ParentRef { service: ResourceName::new("shop", "cart"), port: None }];
    Arc::new(HttpRoute {
        form: RouteForm::HttpRoute,
        name: ResourceName::new("shop", name),
        created: created.into(),
        parents,
        rules,
    })
}

fn head(method: &str, path: &str, headers: &[(&'static str, &str)]) -> RequestHead {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, HeaderValue::from_str(value).unwrap());
    }
    RequestHead {
        method: Method::from_bytes(method.as_bytes()).unwrap(),
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("cart"),
        path: path.parse().unwrap(),
        headers: map,
        version: Version::HTTP_11,
    }
}

fn table(routes: &[Arc<HttpRoute>]) -> RouteTable {
    RouteTable::compile(routes, None, 80, "cluster.local")
}

/// Whether a single alternative matches.
fn check(name: &str, rule_match: RouteMatch, head: &RequestHead, expected: bool) {
    let table = table(&[route("r", "", vec![rule(vec![rule_match])])]);
    assert_eq!(table.find(head, None).is_some(), expected, "{name}");
}

#[test]
fn a_path_matches_as_the_gateway_api_says() {
    for (rule, sent, expected) in [
        ("/foo", "/foo", true),
        ("/foo", "/foo/", true),
        ("/foo", "/foo/bar", true),
        ("/foo", "/foo?x=/y", true),
        ("/foo", "/foobar", false),
        ("/foo", "/Foo", false),
        ("/foo/", "/foo", true),
        ("/foo/", "/foo/bar", true),
        ("/foo/", "/foobar", false),
        ("/", "/", true),
        ("/", "/anything", true),
        ("=/foo", "/foo", true),
        ("=/foo", "/foo?q", true),
        ("=/foo", "/foo/", false),
        ("=/foo", "/FOO", false),
        ("~/v[0-9]+/x", "/v12/x", true),
        ("~/v[0-9]+", "/v12/x", false),
        ("~v[0-9]+", "/v12", false),
        ("~/a|/b", "/b", true),
        ("~/a|/b", "/b/c", false),
    ] {
        check(&format!("{rule} on {sent}"), path(rule), &head("GET", sent, &[]), expected);
    }
}

#[test]
fn everything_that_is_set_must_match() {
    let with_method = RouteMatch { method: Some("POST".into()), ..path("/") };
    check("the method", with_method.clone(), &head("POST", "/", &[]), true);
    check("another method", with_method, &head("GET", "/", &[]), false);

    let with_headers = RouteMatch { headers: vec![exact("x-a", "1"), regex("x-b", "v[0-9]")], ..path("/") };
    for (name, headers, expected) in [
        ("all headers", &[("x-a", "1"), ("x-b", "v2")][..], true),
        ("one missing", &[("x-a", "1")][..], false),
        ("one different", &[("x-a", "2"), ("x-b", "v2")][..], false),
        ("an expression matches the whole", &[("x-a", "1"), ("x-b", "v22")][..], false),
        ("values of a repeated header are joined", &[("x-a", "1"), ("x-a", "1"), ("x-b", "v2")][..], false),
    ] {
        check(name, with_headers.clone(), &head("GET", "/", headers), expected);
    }
    let joined = RouteMatch { headers: vec![exact("x-a", "1,2")], ..path("/") };
    check("joined by commas", joined, &head("GET", "/", &[("x-a", "1"), ("x-a", "2")]), true);

    let with_query = RouteMatch { query: vec![exact("animal", "whale"), regex("n", "[0-9]+")], ..path("/") };
    for (name, sent, expected) in [
        ("both parameters", "/?animal=whale&n=12", true),
        ("in any order, among others", "/?n=1&x&animal=whale", true),
        ("one missing", "/?animal=whale", false),
        ("names are case-sensitive", "/?Animal=whale&n=1", false),
        ("the first value counts", "/?animal=dog&animal=whale&n=1", false),
        ("no query", "/", false),
    ] {
        check(name, with_query.clone(), &head("GET", sent, &[]), expected);
    }
}

#[test]
fn the_most_specific_alternative_wins() {
    let method = |rule: RouteMatch| RouteMatch { method: Some("GET".into()), ..rule };
    let headers = |rule: RouteMatch, count: usize| RouteMatch {
        headers: [exact("x-a", "1"), exact("x-b", "2")].into_iter().take(count).collect(),
        ..rule
    };
    let query = |rule: RouteMatch| RouteMatch { query: vec![exact("q", "1")], ..rule };
    let request = head("GET", "/foo/bar?q=1", &[("x-a", "1"), ("x-b", "2")]);
    for (name, loser, winner) in [
        ("exact over prefix", path("/foo/bar"), path("=/foo/bar")),
        ("exact over a prefix with more conditions", headers(method(path("/foo/bar")), 2), path("=/foo/bar")),
        ("the longer prefix", method(path("/foo")), path("/foo/bar")),
        ("a prefix over an expression", path("~/foo/.*"), path("/foo")),
        ("a method", path("/foo"), method(path("/foo"))),
        ("a method over headers", headers(path("/foo"), 2), method(path("/foo"))),
        ("more headers", headers(path("/foo"), 1), headers(path("/foo"), 2)),
        ("headers over query", query(path("/foo")), headers(path("/foo"), 1)),
        ("a query", path("/foo"), query(path("/foo"))),
    ] {
        for swapped in [false, true] {
            let mut rules = vec![rule(vec![loser.clone()]), rule(vec![winner.clone()])];
            if swapped {
                rules.reverse();
            }
            let found = table(&[route("r", "", rules)]).find(&request, None).unwrap();
            let expected = if swapped { "shop/r/0" } else { "shop/r/1" };
            assert_eq!(&*found.rule.name, expected, "{name}, swapped: {swapped}");
        }
    }
}

#[test]
fn ties_go_to_age_then_name_then_order() {
    let of =
        |name: &str, created: &str| route(name, created, vec![rule(vec![path("/")]), rule(vec![path("/")])]);
    let request = head("GET", "/", &[]);
    for (name, routes, expected) in [
        ("older", vec![of("a", "2024-01-02T00:00:00Z"), of("b", "2024-01-01T00:00:00Z")], "shop/b/0"),
        ("known age", vec![of("a", ""), of("b", "2024-01-01T00:00:00Z")], "shop/b/0"),
        ("name", vec![of("b", ""), of("a", "")], "shop/a/0"),
    ] {
        assert_eq!(&*table(&routes).find(&request, None).unwrap().rule.name, expected, "{name}");
    }
}

#[test]
fn without_routes_everything_goes_to_what_was_addressed() {
    let found = table(&[]).find(&head("GET", "/x", &[]), None).unwrap();
    assert_eq!(&*found.rule.name, "default");
    let (_, backend) = found.rule.backend(|_| 0).unwrap();
    assert_eq!((&backend.target, &*backend.cluster), (&Target::Addressed, "encap"));
    assert!(
        table(&[route("r", "", vec![rule(vec![path("/only")])])])
            .find(&head("GET", "/x", &[]), None)
            .is_none()
    );
}

#[test]
fn requests_are_shared_by_weight() {
    let mut weighted = rule(vec![path("/")]);
    weighted.backends = vec![to("a", 1), to("none", 0), to("b", 3)];
    let found = table(&[route("r", "", vec![weighted])]).find(&head("GET", "/", &[]), None).unwrap();
    let clusters: Vec<&str> =
        (0..4).map(|at| &*found.rule.backend(|total| at % total).unwrap().1.cluster).collect();
    let name = |service: &str| format!("outbound|80||{service}.shop.svc.cluster.local");
    assert_eq!(clusters, [name("a"), name("b"), name("b"), name("b")]);
}

#[test]
fn a_rule_without_a_share_fails() {
    for (name, backends) in [("no backends", vec![]), ("no weight", vec![to("a", 0), to("b", 0)])] {
        let mut empty = rule(vec![path("/")]);
        empty.backends = backends;
        let found = table(&[route("r", "", vec![empty])]).find(&head("GET", "/", &[]), None).unwrap();
        assert!(matches!(found.rule.backend(|_| 0), Err(Failure::InvalidBackend(_))), "{name}");
    }
}

#[test]
fn a_rule_that_cannot_be_honoured_is_broken_and_still_matches() {
    let filters = |filters: Vec<RouteFilter>| RouteRule { filters, ..rule(vec![path("/")]) };
    let header = |name: &str, value: &str| {
        RouteFilter::RequestHeaders(HeaderChanges {
            set: vec![HeaderChange { name: name.into(), value: value.into() }],
            ..HeaderChanges::default()
        })
    };
    let redirect = Redirect { scheme: None, hostname: None, path: None, port: None, status: 302 };
    let rewrite = cairn_mesh::Rewrite { hostname: None, path: None };
    let mut backend_filter = rule(vec![path("/")]);
    backend_filter.backends[0].filters = vec![RouteFilter::Redirect(redirect.clone())];
    for (name, rule) in [
        ("as read", RouteRule { broken: Some("unknown filter".into()), ..rule(vec![path("/")]) }),
        ("a bad expression in the path", rule(vec![path("~(")])),
        (
            "a bad expression in a header",
            rule(vec![RouteMatch { headers: vec![regex("a", "[")], ..path("/") }]),
        ),
        (
            "a bad expression in the query",
            rule(vec![RouteMatch { query: vec![regex("a", "[")], ..path("/") }]),
        ),
        ("a bad header name", filters(vec![header("a b", "x")])),
        ("a bad header value", filters(vec![header("a", "x\ny")])),
        (
            "redirect and rewrite",
            filters(vec![RouteFilter::Redirect(redirect), RouteFilter::Rewrite(rewrite)]),
        ),
        ("a redirect of one backend", backend_filter),
    ] {
        let found = table(&[route("r", "", vec![rule])]).find(&head("GET", "/", &[]), None);
        assert!(found.is_some_and(|found| found.rule.broken.is_some()), "{name}");
    }
}

fn token(claims: serde_json::Value) -> Token {
    let serde_json::Value::Object(payload) = claims else { panic!("claims are an object") };
    Token::new(payload)
}

fn claim(path: &[&str], value: ValueMatch) -> ClaimMatch {
    let path = path.iter().map(|name| Arc::from(*name)).collect();
    ClaimMatch { path, value, inverted: false }
}

fn without(path: &[&str], value: &str) -> ClaimMatch {
    ClaimMatch { inverted: true, ..claim(path, ValueMatch::Exact(value.into())) }
}

/// Istio's table of routing by claims.
#[test]
fn a_route_may_ask_for_claims() {
    let values = serde_json::json!(["valueA", "valueB"]);
    let nested_1 = serde_json::json!({
        "iss": "test-issuer-1@istio.io", "sub": "sub-1", "age": 7,
        "nested": { "key1": values, "nested-2": { "key1": values } },
    });
    let collision = serde_json::json!({
        "test-issuer-1@istio.io/simple": "valueC", "test-issuer-1@istio.io/nested": { "key1": "valueC" },
    });
    let exact = |value: &str| ValueMatch::Exact(value.into());
    let prefix = |value: &str| ValueMatch::Prefix(value.into());
    let regex = |value: &str| ValueMatch::Regex(value.into());
    let key: &[&str] = &["nested", "key1"];
    for (name, claims, payload, found) in [
        ("exact, one of a list", vec![claim(key, exact("valueA"))], Some(&nested_1), true),
        ("prefix", vec![claim(&["sub"], prefix("sub"))], Some(&nested_1), true),
        (
            "two expressions",
            vec![claim(&["sub"], regex("sub-[12]")), claim(key, regex("value[AB]"))],
            Some(&nested_1),
            true,
        ),
        ("expressions match the whole", vec![claim(&["sub"], regex("sub"))], Some(&nested_1), false),
        (
            "exact and prefix",
            vec![claim(key, exact("valueB")), claim(&["sub"], prefix("s"))],
            Some(&nested_1),
            true,
        ),
        ("without another value", vec![without(key, "value-not-matched")], Some(&nested_1), true),
        ("without its value", vec![without(key, "valueA")], Some(&nested_1), false),
        ("without a claim that is not there", vec![without(&["none"], "x")], Some(&nested_1), true),
        (
            "with one and without two",
            vec![claim(&["sub"], prefix("sub")), without(key, "x"), without(&["y"], "z")],
            Some(&nested_1),
            true,
        ),
        (
            "one of two wrong",
            vec![claim(key, exact("valueA")), claim(&["sub"], prefix("x"))],
            Some(&nested_1),
            false,
        ),
        ("wrong", vec![claim(&["sub"], exact("sub-2"))], Some(&nested_1), false),
        ("an object has no value", vec![claim(&["nested"], prefix(""))], Some(&nested_1), false),
        ("a number has no text", vec![claim(&["age"], exact("7"))], Some(&nested_1), false),
        ("no token", vec![claim(&["sub"], prefix(""))], None, false),
        (
            "names with dots",
            vec![claim(&["test-issuer-1@istio.io/simple"], exact("valueC"))],
            Some(&collision),
            true,
        ),
        (
            "names with dots, further in",
            vec![claim(&["test-issuer-1@istio.io/nested", "key1"], exact("valueC"))],
            Some(&collision),
            true,
        ),
        (
            "names with dots, another value",
            vec![claim(&["test-issuer-1@istio.io/simple"], exact("valueA"))],
            Some(&collision),
            false,
        ),
    ] {
        let token = payload.map(|payload| token(payload.clone()));
        let table = table(&[route("r", "", vec![rule(vec![RouteMatch { claims, ..path("/") }])])]);
        assert!(table.depends_on_filters(), "{name}: it is looked up again when the token is verified");
        // No header stands for a claim.
        let request = head("GET", "/", &[("sub", "sub-1")]);
        assert_eq!(table.find(&request, token.as_ref()).is_some(), found, "{name}");
    }
}

#[test]
fn a_claim_counts_as_a_header() {
    let with_claim =
        rule(vec![RouteMatch { claims: vec![claim(&["sub"], ValueMatch::Prefix("s".into()))], ..path("/") }]);
    let routes = [route("a", "", vec![rule(vec![path("/")])]), route("b", "", vec![with_claim])];
    let token = token(serde_json::json!({ "sub": "s" }));
    let request = head("GET", "/", &[]);
    assert_eq!(&*table(&routes).find(&request, Some(&token)).unwrap().rule.name, "shop/b/0");
    assert_eq!(&*table(&routes).find(&request, None).unwrap().rule.name, "shop/a/0");
}

#[test]
fn rules_of_a_virtual_service_are_tried_as_written() {
    let written =
        |rules| Arc::new(HttpRoute { form: RouteForm::VirtualService, ..(*route("r", "", rules)).clone() });
    let table = table(&[written(vec![rule(vec![path("/")]), rule(vec![path("=/exact")])])]);
    assert_eq!(&*table.find(&head("GET", "/exact", &[]), None).unwrap().rule.name, "shop/r/0");
}

#[test]
fn a_virtual_service_asks_for_headers_its_own_way() {
    let without = |value| {
        let name = "end-user".into();
        RouteMatch { headers: vec![NameMatch { name, value, inverted: true }], ..path("/") }
    };
    let regex = |text: &str| ValueMatch::Regex(text.into());
    let text_prefix = RouteMatch { path: PathRule::TextPrefix("/foo".into()), ..path("/") };
    let present = RouteMatch {
        headers: vec![NameMatch { name: "end-user".into(), value: ValueMatch::Present, inverted: false }],
        ..path("/")
    };
    for (name, asked, sent, headers, expected) in [
        ("a prefix ends anywhere", text_prefix.clone(), "/foobar", &[][..], true),
        ("and is one", text_prefix, "/fo", &[], false),
        ("present", present.clone(), "/", &[("end-user", "")], true),
        ("not present", present, "/", &[], false),
        (
            "the value excluded",
            without(ValueMatch::Exact("jason".into())),
            "/",
            &[("end-user", "jason")],
            false,
        ),
        ("another", without(ValueMatch::Exact("jason".into())), "/", &[("end-user", "other")], true),
        ("none", without(ValueMatch::Exact("jason".into())), "/", &[], true),
        ("any excluded: one", without(ValueMatch::Present), "/", &[("end-user", "x")], false),
        ("any excluded: an empty one", without(ValueMatch::Present), "/", &[("end-user", "")], false),
        ("any excluded: none", without(ValueMatch::Present), "/", &[], true),
        ("an expression for all: one", without(regex(".*")), "/", &[("end-user", "x")], false),
        ("an expression for all: none counts as empty", without(regex(".*")), "/", &[], false),
    ] {
        check(name, asked, &head("GET", sent, headers), expected);
    }
}
