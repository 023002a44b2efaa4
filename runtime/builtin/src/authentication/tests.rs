//! What becomes of requests with tokens.

use super::testing::Signer;
use super::*;
use base64::Engine;
use cairn_filter::{Connection, NoCallout, Peer, Protocol};
use cairn_mesh::{ClaimHeader, KeyPlace, TokenHeader, TokenPlaces};
use http::uri::PathAndQuery;
use http::{HeaderMap, Version};
use serde_json::{Value, json};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// When the requests of these tests come, in seconds since 1970.
const NOW: u64 = 1_700_000_000;

const ONE: &str = "test-issuer-1@istio.io";
const TWO: &str = "test-issuer-2@istio.io";

fn exchange() -> Exchange {
    let address = SocketAddr::from(([10, 0, 0, 1], 1));
    let connection = Connection {
        id: 1,
        worker: 0,
        source: Peer { address, identity: None, workload: None },
        destination: address,
        service: None,
        local: None,
        callout: Arc::new(NoCallout),
    };
    let wall = UNIX_EPOCH + Duration::from_secs(NOW);
    Exchange::new(Arc::new(connection), Protocol::Http11, Instant::now(), wall)
}

fn head(path: &str, headers: &[(&str, &str)]) -> RequestHead {
    let mut map = HeaderMap::new();
    map.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    for (name, value) in headers {
        map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
    }
    RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop"),
        path: PathAndQuery::try_from(path).unwrap(),
        headers: map,
        version: Version::HTTP_11,
    }
}

fn policy(name: &str, rules: Vec<JwtRule>) -> Arc<RequestAuthentication> {
    let name = ResourceName::new("shop", name);
    Arc::new(RequestAuthentication { name, targets: Vec::new(), rules })
}

fn rule(issuer: &str, signer: &Signer) -> JwtRule {
    JwtRule::new(issuer, KeyPlace::Inline(Signer::set(&[signer.jwk()]).into()))
}

fn inline(_: &ResourceName, rule: &JwtRule) -> Arc<dyn KeySource> {
    match &rule.keys {
        KeyPlace::Inline(text) => inline_keys(text),
        other => panic!("{other:?}"),
    }
}

fn filter(policies: &[Arc<RequestAuthentication>]) -> Arc<dyn Factory> {
    authentication(policies, &mut inline, &Arc::default())
}

/// What became of one request.
struct Answer {
    reply: Option<LocalReply>,
    exchange: Exchange,
    head: RequestHead,
}

impl Answer {
    fn status(&self) -> u16 {
        self.reply.as_ref().map_or(200, |reply| reply.status.as_u16())
    }

    fn body(&self) -> &str {
        self.reply.as_ref().map_or("", |reply| std::str::from_utf8(&reply.body).unwrap())
    }

    fn header(&self, name: &str) -> Vec<&str> {
        self.head
            .headers
            .get_all(name)
            .iter()
            .map(|value| std::str::from_utf8(value.as_bytes()).unwrap())
            .collect()
    }

    fn principal(&self) -> Option<&str> {
        self.exchange.token.as_ref().map(|token| token.principal())
    }
}

fn ask(factory: &Arc<dyn Factory>, mut head: RequestHead) -> Answer {
    let mut exchange = exchange();
    let mut filter = factory.start(&exchange).unwrap();
    match filter.request_headers(&mut exchange, &mut head, true) {
        Verdict::Continue => Answer { reply: None, exchange, head },
        Verdict::Reply(reply) => Answer { reply: Some(*reply), exchange, head },
        _ => panic!("these keys are here"),
    }
}

fn bearer(token: &str) -> RequestHead {
    head("/", &[("authorization", &format!("Bearer {token}"))])
}

fn claims(issuer: &str) -> Value {
    json!({ "iss": issuer, "sub": "sub-1", "exp": NOW + 100 })
}

#[test]
fn every_algorithm_verifies_its_own_and_no_other() {
    const ALL: [&str; 13] = [
        "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256",
        "HS384", "HS512",
    ];
    for algorithm in ALL {
        let signer = Signer::new(algorithm, "k");
        let of_key = filter(&[policy("a", vec![rule(ONE, &signer)])]);
        let token = signer.sign(&claims(ONE));
        let answer = ask(&of_key, bearer(&token));
        assert_eq!(
            (answer.status(), answer.principal()),
            (200, Some("test-issuer-1@istio.io/sub-1")),
            "{algorithm}"
        );

        // A changed payload, a changed signature, no signature worth the name.
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let (header, _) = signed.split_once('.').unwrap();
        let (_, other) = signer
            .sign(&json!({ "iss": ONE, "sub": "root" }))
            .split_once('.')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .unwrap();
        let (payload, _) = other.split_once('.').unwrap();
        let mut bytes = token::BASE64.decode(signature).unwrap();
        bytes[3] ^= 1;
        let flipped = token::BASE64.encode(&bytes);
        for (name, forged) in [
            ("another payload", format!("{header}.{payload}.{signature}")),
            ("another signature", format!("{signed}.{flipped}")),
            ("a short signature", format!("{signed}.AAAA")),
        ] {
            let answer = ask(&of_key, bearer(&forged));
            let short_edwards = algorithm == "EdDSA" && name == "a short signature";
            let text = if short_edwards {
                "Jwt ED25519 signature is wrong length"
            } else {
                "Jwt verification fails"
            };
            assert_eq!((answer.status(), answer.body()), (401, text), "{algorithm}: {name}");
            assert!(answer.exchange.token.is_none());
        }

        // The same signature under another algorithm's name.
        for other in ALL.iter().filter(|other| **other != algorithm) {
            let token = signer.sign_as(&json!({ "alg": other, "kid": "k" }), &claims(ONE));
            assert_eq!(ask(&of_key, bearer(&token)).status(), 401, "{algorithm} as {other}");
        }
    }
}

#[test]
fn what_is_wrong_is_told_as_envoy_tells_it() {
    let (signer, stranger) = (Signer::new("ES256", "k"), Signer::new("ES256", "other"));
    let audience = JwtRule { audiences: vec!["web".into()], ..rule(ONE, &signer) };
    let of = filter(&[policy("a", vec![audience])]);
    let with = |change: &[(&str, Value)]| {
        let mut claims = json!({ "iss": ONE, "sub": "me", "aud": "web", "exp": NOW + 10 });
        for (name, value) in change {
            claims[*name] = value.clone();
        }
        signer.sign(&claims)
    };
    for (name, token, status, text) in [
        ("expired", with(&[("exp", json!(NOW - 61))]), 401, "Jwt is expired"),
        (
            "expired, wrong audience and issuer",
            with(&[("exp", json!(NOW - 61)), ("aud", json!("x")), ("iss", json!("x"))]),
            401,
            "Jwt issuer is not configured",
        ),
        (
            "expired and wrong audience",
            with(&[("exp", json!(NOW - 61)), ("aud", json!("x"))]),
            401,
            "Jwt is expired",
        ),
        ("not yet valid", with(&[("nbf", json!(NOW + 61))]), 401, "Jwt not yet valid"),
        ("another issuer", with(&[("iss", json!("who"))]), 401, "Jwt issuer is not configured"),
        ("another audience", with(&[("aud", json!(["a", "b"]))]), 403, "Audiences in Jwt are not allowed"),
        ("no audience", with(&[("aud", json!([]))]), 403, "Audiences in Jwt are not allowed"),
        ("another key", stranger.sign(&claims(ONE)), 403, "Audiences in Jwt are not allowed"),
        (
            "an unknown key",
            stranger.sign(&json!({ "iss": ONE, "aud": "web" })),
            401,
            "Jwks doesn't have key to match kid or alg from Jwt",
        ),
        (
            "a known key's name",
            stranger.sign_as(&json!({ "alg": "ES256", "kid": "k" }), &json!({ "iss": ONE, "aud": "web" })),
            401,
            "Jwt verification fails",
        ),
        (
            "no token at all",
            "x".to_owned(),
            401,
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        ("good at the very end", with(&[("exp", json!(NOW - 60))]), 200, ""),
        ("good from the very start", with(&[("nbf", json!(NOW + 60))]), 200, ""),
        ("one of its audiences", with(&[("aud", json!(["x", "https://web/"]))]), 200, ""),
        (
            "no key named",
            signer.sign_as(&json!({ "alg": "ES256" }), &json!({ "iss": ONE, "aud": "web" })),
            200,
            "",
        ),
    ] {
        let mut head = bearer(&token);
        head.path = PathAndQuery::try_from(format!("/a?b={}", "c".repeat(300))).unwrap();
        let answer = ask(&of, head);
        assert_eq!((answer.status(), answer.body()), (status, text), "{name}");
        let Some(reply) = &answer.reply else { continue };
        let challenge = reply.headers["www-authenticate"].to_str().unwrap();
        let expected =
            format!("Bearer realm=\"http://shop/a?b={}\", error=\"invalid_token\"", "c".repeat(251));
        assert_eq!(challenge, expected, "{name}");
        assert_eq!(reply.details, format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_")), "{name}");
        let denial = answer.exchange.denial.unwrap();
        assert_eq!(denial.policy, "RequestAuthentication shop/a", "{name}");
        assert_eq!(denial.reason, format!("{text} (its rule for tokens of {ONE})"), "{name}");
    }
}

#[test]
fn a_token_may_miss_and_a_preflight_has_none() {
    let signer = Signer::new("ES256", "k");
    let of = filter(&[policy("a", vec![rule(ONE, &signer)])]);
    let expired = format!("Bearer {}", signer.sign(&json!({ "iss": ONE, "exp": 1 })));
    let preflight =
        [("origin", "http://a"), ("access-control-request-method", "GET"), ("authorization", &*expired)];
    for (name, method, headers, status) in [
        ("none", Method::GET, &[][..], 200),
        ("another scheme", Method::GET, &[("authorization", "Basic eA==")], 200),
        ("preflight", Method::OPTIONS, &preflight, 200),
        ("no origin", Method::OPTIONS, &preflight[1..], 401),
        ("no method asked for", Method::OPTIONS, &[preflight[0], preflight[2]], 401),
        ("not OPTIONS", Method::GET, &preflight, 401),
        ("an empty origin", Method::OPTIONS, &[("origin", ""), preflight[1], preflight[2]], 401),
    ] {
        let answer = ask(&of, RequestHead { method, ..head("/", headers) });
        assert_eq!(answer.status(), status, "{name}");
        assert!(answer.exchange.token.is_none(), "{name}");
    }
}

#[test]
fn rules_are_alternatives_and_the_best_reason_is_told() {
    let (one, two) = (Signer::new("ES256", "1"), Signer::new("RS256", "2"));
    let needs =
        |issuer, signer, audience: &str| JwtRule { audiences: vec![audience.into()], ..rule(issuer, signer) };
    let of = filter(&[
        policy("a", vec![needs(TWO, &two, "bar"), needs(ONE, &one, "foo")]),
        policy("b", vec![rule(TWO, &two)]),
    ]);
    let token = |signer: &Signer, change: Value| {
        let mut claims = claims(if signer.jwk()["kid"] == "1" { ONE } else { TWO });
        change.as_object().unwrap().iter().for_each(|(name, value)| claims[name] = value.clone());
        signer.sign(&claims)
    };
    for (name, token, status, text) in [
        ("first without its audience", token(&one, json!({})), 403, "Audiences in Jwt are not allowed"),
        ("first with its audience", token(&one, json!({ "aud": "foo" })), 200, ""),
        ("second without: another rule takes it", token(&two, json!({})), 200, ""),
        (
            "second expired: a better reason than an issuer",
            token(&two, json!({ "exp": 1 })),
            401,
            "Jwt is expired",
        ),
        ("nobody's", token(&two, json!({ "iss": "x" })), 401, "Jwt issuer is not configured"),
        (
            "first by the second's key",
            two.sign(&json!({ "iss": ONE, "aud": "foo" })),
            401,
            "Jwks doesn't have key to match kid or alg from Jwt",
        ),
        ("none", "".to_owned(), 200, ""),
    ] {
        let request = if token.is_empty() { head("/", &[]) } else { bearer(&token) };
        let answer = ask(&of, request);
        assert_eq!((answer.status(), answer.body()), (status, text), "{name}");
    }
}

#[test]
fn a_rule_without_an_issuer_takes_any() {
    let signer = Signer::new("ES256", "k");
    let of = filter(&[policy("a", vec![rule("", &signer)])]);
    for claims in [json!({}), json!({ "iss": "x", "sub": "y" })] {
        let answer = ask(&of, bearer(&signer.sign(&claims)));
        assert_eq!(answer.status(), 200, "{claims}");
    }
}

#[test]
fn all_tokens_that_a_rule_sees_must_be_good() {
    let (signer, other) = (Signer::new("ES256", "k"), Signer::new("ES256", "k"));
    let from = TokenPlaces {
        headers: vec![
            TokenHeader { name: "x-jwt-token".into(), prefix: "Value ".into() },
            TokenHeader { name: "auth-token".into(), prefix: "Token ".into() },
        ],
        params: vec!["token".into(), "secondary_token".into()],
        cookies: vec!["session".into()],
    };
    let of = filter(&[policy("a", vec![JwtRule { from, ..rule(ONE, &signer) }])]);
    let good = signer.sign(&claims(ONE));
    let good_too = signer.sign(&json!({ "iss": ONE, "sub": "sub-2" }));
    let bad = other.sign(&claims(ONE));
    let (value, token) = (format!("Value {good}"), format!("Token {good_too}"));
    let cookie = format!("a=b; session={good}");
    for (name, path, headers, status, principal) in [
        ("one header", "/".to_owned(), &[("x-jwt-token", &*value)][..], 200, Some("sub-1")),
        ("the other", "/".into(), &[("auth-token", &token)], 200, Some("sub-2")),
        (
            "both: the first by name counts",
            "/".into(),
            &[("x-jwt-token", &value), ("auth-token", &token)],
            200,
            Some("sub-2"),
        ),
        ("a parameter", format!("/?token={good}"), &[], 200, Some("sub-1")),
        ("the other parameter", format!("/?a&secondary_token={good}"), &[], 200, Some("sub-1")),
        ("both parameters", format!("/?token={good}&secondary_token={good_too}"), &[], 200, Some("sub-2")),
        ("one of them bad", format!("/?token={good}&secondary_token={bad}"), &[], 401, None),
        ("the other of them bad", format!("/?token={bad}&secondary_token={good}"), &[], 401, None),
        ("a header good, a parameter bad", format!("/?token={bad}"), &[("x-jwt-token", &value)], 401, None),
        ("a cookie", "/".into(), &[("cookie", &cookie)], 200, Some("sub-1")),
        (
            "the usual header is not looked at",
            "/".into(),
            &[("authorization", &format!("Bearer {bad}"))],
            200,
            None,
        ),
        ("nor another parameter", format!("/?token_value={bad}"), &[], 200, None),
    ] {
        let answer = ask(&of, head(&path, headers));
        assert_eq!(answer.status(), status, "{name}");
        let subject =
            answer.principal().map(|principal| principal.strip_prefix("test-issuer-1@istio.io/").unwrap());
        assert_eq!(subject, principal, "{name}");
        let left = format!("{:?} {}", answer.head.headers, answer.head.path);
        if status == 200 && principal.is_some() {
            assert!(!left.contains(&good) && !left.contains(&good_too), "{name}: the token goes no further");
        }
    }
}

#[test]
fn the_request_carries_what_the_rule_asks_and_nothing_that_a_client_made_up() {
    let signer = Signer::new("ES256", "k");
    let claim = |header: &str, claim: &str| ClaimHeader { header: header.into(), claim: claim.into() };
    let output = JwtRule {
        payload_header: Some("x-test-payload".into()),
        claim_headers: vec![
            claim("x-jwt-iss", "iss"),
            claim("x-jwt-iat", "iat"),
            claim("x-jwt-nested-key", "nested.nested-2.key2"),
            claim("x-jwt-list", "groups"),
            claim("x-jwt-scope", "scope"),
            claim("x-jwt-dotted", "a.b"),
            claim("x-jwt-accent", "accent"),
            claim("x-jwt-lines", "lines"),
            claim("x-jwt-none", "none"),
            claim("x-jwt-flag", "flag"),
        ],
        ..rule(ONE, &signer)
    };
    let keep = JwtRule { forward: true, ..output.clone() };
    let claims = json!({
        "iss": ONE, "sub": "sub-1", "iat": 1_562_182_722, "groups": ["a"], "scope": "write read", "a.b": "dots",
        "accent": "é", "lines": "a\nb", "flag": true, "nested": { "nested-2": { "key2": "valueC" } },
    });
    let token = signer.sign(&claims);
    let sent = format!("Bearer {token}");
    let made_up = [
        ("authorization", &*sent),
        ("x-jwt-nested-key", "value_to_be_replaced"),
        ("x-test-payload", "admin"),
        ("x-jwt-none", "admin"),
        ("x-jwt-none", "root"),
        ("x-other", "kept"),
    ];
    for (rule, forward) in [(output, false), (keep, true)] {
        let of = filter(&[policy("a", vec![rule])]);
        let kept: Vec<&str> = if forward { vec![&sent] } else { vec![] };
        // A second time it comes from the cache.
        for _ in 0..2 {
            let answer = ask(&of, head("/", &made_up));
            for (name, expected) in [
                ("x-test-payload", &[token.split('.').nth(1).unwrap()][..]),
                ("x-jwt-iss", &[ONE]),
                ("x-jwt-iat", &["1562182722"]),
                ("x-jwt-nested-key", &["valueC"]),
                ("x-jwt-list", &["WyJhIl0="]),
                ("x-jwt-scope", &["write read"]),
                ("x-jwt-dotted", &[]),
                ("x-jwt-accent", &["é"]),
                ("x-jwt-lines", &[]),
                ("x-jwt-none", &[]),
                ("x-jwt-flag", &["true"]),
                ("x-other", &["kept"]),
                ("authorization", kept.as_slice()),
            ] {
                assert_eq!(answer.header(name), expected, "{name}");
            }
            let token = answer.exchange.token.unwrap();
            assert_eq!(token.payload()["scope"], json!(["write", "read"]));
        }
        let answer = ask(&of, head("/", &made_up[1..]));
        assert_eq!(answer.header("x-jwt-none"), [""; 0], "without a token, too");
        assert_eq!(answer.header("x-test-payload"), [""; 0], "without a token, too");
        let preflight = [("origin", "a"), ("access-control-request-method", "GET"), ("x-jwt-none", "admin")];
        let answer = ask(&of, RequestHead { method: Method::OPTIONS, ..head("/", &preflight) });
        assert_eq!(answer.header("x-jwt-none"), [""; 0], "on a preflight, too");
    }
}

#[test]
fn texts_that_are_lists_become_lists() {
    let signer = Signer::new("ES256", "k");
    let spaced = JwtRule { space_delimited: vec!["custom_scope".into()], ..rule(ONE, &signer) };
    let of = filter(&[policy("a", vec![spaced])]);
    let claims =
        json!({ "iss": ONE, "permission": "read  write", "custom_scope": "admin user", "other": "a b" });
    let answer = ask(&of, bearer(&signer.sign(&claims)));
    let token = answer.exchange.token.unwrap();
    assert_eq!(token.payload()["permission"], json!(["read", "write"]));
    assert_eq!(token.payload()["custom_scope"], json!(["admin", "user"]));
    assert_eq!(token.payload()["other"], json!("a b"));
}

#[test]
fn keys_that_cannot_be_used_refuse_every_token() {
    let signer = Signer::new("ES256", "k");
    for jwks in
        ["", "{}", r#"{"keys":1}"#, r#"{"keys":[]}"#, r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}"#]
    {
        let of = filter(&[policy("a", vec![JwtRule::new(ONE, KeyPlace::Inline(jwks.into()))])]);
        for (claims, status, text) in [
            (claims(ONE), 401, "Jwks doesn't have any valid public key"),
            (json!({ "iss": ONE, "exp": 1 }), 401, "Jwt is expired"),
        ] {
            let answer = ask(&of, bearer(&signer.sign(&claims)));
            assert_eq!((answer.status(), answer.body()), (status, text), "{jwks}");
        }
        assert_eq!(ask(&of, head("/", &[])).status(), 200, "{jwks}");
    }
}

#[test]
fn a_remembered_token_is_refused_when_its_time_or_its_key_is_over() {
    let (signer, successor) = (Signer::new("ES256", "k"), Signer::new("ES256", "k"));
    let cache: Arc<TokenCache> = Arc::default();
    let of = |signer: &Signer| authentication(&[policy("a", vec![rule(ONE, signer)])], &mut inline, &cache);
    let token = signer.sign(&claims(ONE));
    let (before, after) = (of(&signer), of(&successor));
    for _ in 0..2 {
        assert_eq!(ask(&before, bearer(&token)).status(), 200);
    }
    assert_eq!(cache.counts(), (1, 1), "the second time it is remembered");
    assert_eq!(ask(&after, bearer(&token)).body(), "Jwt verification fails", "another key");
    assert_eq!(ask(&before, bearer(&token)).status(), 200);

    let mut late = exchange();
    late.started_at = UNIX_EPOCH + Duration::from_secs(NOW + 161);
    let mut filter = before.start(&late).unwrap();
    let Verdict::Reply(reply) = filter.request_headers(&mut late, &mut bearer(&token), true) else {
        panic!("it is expired");
    };
    assert_eq!(&*reply.body, b"Jwt is expired");
}

/// Keys that come when they are asked for.
struct Late {
    keys: Mutex<Vec<Keys>>,
    asked: AtomicUsize,
}

impl KeySource for Late {
    fn keys(&self) -> Keys {
        self.keys.lock().unwrap()[0].clone()
    }

    fn renew(&self, _key_id: &str) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut keys = self.keys.lock().unwrap();
        if keys.len() > 1 {
            keys.remove(0);
        }
        Some(Box::pin(std::future::ready(())))
    }
}

#[test]
fn keys_are_waited_for_once_and_only_for_tokens_that_need_them() {
    let (old, new) = (Signer::new("ES256", "old"), Signer::new("ES256", "new"));
    let set = |signer: &Signer| {
        Keys::Known(Arc::new(KeySet::parse(Signer::set(&[signer.jwk()]).as_bytes()).unwrap()))
    };
    let (by_old, by_new) = (old.sign(&claims(ONE)), new.sign(&claims(ONE)));
    let expired = new.sign(&json!({ "iss": ONE, "exp": 1 }));
    for (name, keys, token, waits, asked, text) in [
        ("known", vec![set(&old)], &by_old, 0, 0, ""),
        ("an unknown key that comes", vec![set(&old), set(&new)], &by_new, 1, 1, ""),
        (
            "an unknown key that does not come",
            vec![set(&old)],
            &by_new,
            1,
            1,
            "Jwks doesn't have key to match kid or alg from Jwt",
        ),
        ("the first keys", vec![Keys::Missing, set(&new)], &by_new, 1, 1, ""),
        ("no keys", vec![Keys::Missing], &by_new, 1, 1, "Jwks remote fetch is failed"),
        (
            "first keys, then newer",
            vec![Keys::Missing, set(&old), set(&new)],
            &by_new,
            1,
            1,
            "Jwks doesn't have key to match kid or alg from Jwt",
        ),
        ("expired before all", vec![Keys::Missing], &expired, 0, 0, "Jwt is expired"),
        (
            "malformed before all",
            vec![Keys::Missing],
            &"x.y".to_owned(),
            0,
            0,
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
    ] {
        let source = Arc::new(Late { keys: Mutex::new(keys), asked: AtomicUsize::new(0) });
        let given = Arc::clone(&source);
        let rules = vec![JwtRule::new(ONE, KeyPlace::Discovery)];
        let mut keys = move |_: &ResourceName, _: &JwtRule| Arc::clone(&given) as Arc<dyn KeySource>;
        let of = authentication(&[policy("a", rules)], &mut keys, &Arc::default());
        let mut exchange = exchange();
        let mut head = bearer(token);
        let mut filter = of.start(&exchange).unwrap();
        let mut waited = 0;
        let body = loop {
            match filter.request_headers(&mut exchange, &mut head, true) {
                Verdict::Wait(_) => waited += 1,
                Verdict::Continue => break String::new(),
                Verdict::Reply(reply) => break String::from_utf8(reply.body.to_vec()).unwrap(),
                _ => panic!("{name}"),
            }
        };
        assert_eq!((waited, source.asked.load(Ordering::Relaxed), &*body), (waits, asked, text), "{name}");
    }
}

#[test]
fn keys_are_chosen_by_name_and_algorithm() {
    let signer = Signer::new("ES256", "k");
    let nameless = Signer::new("ES256", "");
    let with = |signer: &Signer, name: &str, value: &str| {
        let mut jwk = signer.jwk();
        jwk[name] = value.into();
        jwk
    };
    let token = signer.sign(&claims(ONE));
    for (name, keys, token, text) in [
        ("its own", vec![signer.jwk()], &token, ""),
        ("among others", vec![nameless.jwk(), json!({ "kty": "?" }), signer.jwk()], &token, ""),
        (
            "another name",
            vec![with(&signer, "kid", "x")],
            &token,
            "Jwks doesn't have key to match kid or alg from Jwt",
        ),
        ("no name", vec![with(&signer, "kid", "")], &token, ""),
        ("its algorithm", vec![with(&signer, "alg", "ES256")], &token, ""),
        (
            "an algorithm of another curve",
            vec![with(&signer, "alg", "ES384")],
            &token,
            "Jwks doesn't have any valid public key",
        ),
        (
            "an algorithm of another kind",
            vec![with(&signer, "alg", "RS256")],
            &token,
            "Jwks doesn't have any valid public key",
        ),
        ("no curve named", vec![with(&signer, "crv", "")], &token, ""),
        ("a token without a name", vec![signer.jwk(), nameless.jwk()], &nameless.sign(&claims(ONE)), ""),
        (
            "a point that is not on the curve",
            vec![with(&signer, "x", "AAAA")],
            &token,
            "Jwks doesn't have any valid public key",
        ),
        ("no list entry is an object", vec![json!(1)], &token, "Jwks doesn't have any valid public key"),
    ] {
        let rules = vec![JwtRule::new(ONE, KeyPlace::Inline(Signer::set(&keys).into()))];
        let answer = ask(&filter(&[policy("a", rules)]), bearer(token));
        assert_eq!(answer.body(), text, "{name}");
    }
}

#[test]
fn nothing_asked_is_nothing_done() {
    let of = filter(&[policy("a", Vec::new())]);
    assert!(of.start(&exchange()).is_none());
}
