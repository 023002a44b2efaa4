//! What is asked of a request's token.

use super::*;
use serde_json::json;

fn principals<const N: usize>(values: [&str; N]) -> [RequestPrincipal; N] {
    values.map(RequestPrincipal::parse)
}

fn path<const N: usize>(names: [&str; N]) -> ClaimPath {
    names.into_iter().map(Arc::from).collect()
}

fn claim<const N: usize>(names: [&str; N], values: Values<TextMatch>) -> Condition {
    Condition::RequestClaim(path(names), values)
}

fn of_token(request_principals: Values<RequestPrincipal>) -> PolicyRule {
    from(Source { request_principals, ..Source::default() })
}

/// Tokens as Istio's tests have them.
fn tokens() -> Vec<(&'static str, Request)> {
    let with = |payload| get("/").token(payload);
    vec![
        ("none", get("/")),
        ("1", with(json!({ "iss": "issuer-1", "sub": "sub-1", "groups": ["group-1"] }))),
        ("2", with(json!({ "iss": "issuer-2", "sub": "sub-2", "groups": ["group-2"] }))),
        ("aud", with(json!({ "iss": "issuer-1", "sub": "sub-1", "aud": "foo" }))),
        ("auds", with(json!({ "iss": "issuer-1", "sub": "sub-1", "aud": ["foo", "buzz"] }))),
        ("azp", with(json!({ "iss": "issuer-1", "sub": "sub-1", "azp": "bar" }))),
        (
            "nested",
            with(json!({
                "iss": "issuer-1", "sub": "sub-1",
                "nested": { "key1": ["valueA", "valueB"], "nested-2": { "key1": ["valueA", "valueB"] } },
            })),
        ),
        ("text", with(json!({ "iss": "issuer-1", "sub": "sub-1", "nested": { "key2": "valueC" } }))),
        ("scope", with(json!({ "iss": "issuer-1", "sub": "sub-1", "scope": ["read", "write"] }))),
        (
            "odd",
            with(
                json!({ "iss": 1, "sub": "sub-1", "n": 1, "b": true, "o": { "x": "1" }, "l": [1, { "x": "1" }] }),
            ),
        ),
    ]
}

#[test]
fn tokens_allow_by_principal_and_claims() {
    let any_texts = |value: &str| any(texts([value]));
    for (name, rule, allowed) in [
        ("its principal", of_token(any(principals(["issuer-1/sub-1"]))), "1 aud auds azp nested text scope"),
        ("not its principal", of_token(none(principals(["issuer-1/sub-1"]))), "none 2 odd"),
        ("any principal", of_token(any(principals(["*"]))), "1 2 aud auds azp nested text scope"),
        ("no principal", of_token(none(principals(["*"]))), "none odd"),
        ("an issuer's", of_token(any(principals(["issuer-2/*"]))), "2"),
        ("condition on the principal", when(Condition::RequestPrincipal(any(principals(["*/sub-2"])))), "2"),
        ("element of a list", when(claim(["groups"], any_texts("group-2"))), "2"),
        ("prefix of an element", when(claim(["groups"], any_texts("group*"))), "1 2"),
        ("one of two values", when(claim(["scope"], any(texts(["append", "write"])))), "scope"),
        ("audience", when(Condition::RequestAudiences(any_texts("foo"))), "aud auds"),
        ("presenter", when(Condition::RequestPresenter(any_texts("bar"))), "azp"),
        ("nested", when(claim(["nested", "key1"], any_texts("valueB"))), "nested"),
        ("nested text", when(claim(["nested", "key2"], any_texts("valueC"))), "text"),
        ("nested deeper", when(claim(["nested", "nested-2", "key1"], any_texts("valueA"))), "nested"),
        ("nested and not there", when(claim(["nested", "nope"], any_texts("*"))), ""),
        ("an object is no text", when(claim(["nested"], any_texts("*"))), ""),
        ("a number is no text", when(claim(["n"], any_texts("*"))), ""),
        ("a truth is no text", when(claim(["b"], any_texts("true"))), ""),
        ("inside an object", when(claim(["o", "x"], any_texts("1"))), "odd"),
        ("inside a list's object", when(claim(["l", "x"], any_texts("1"))), ""),
        ("numbers of a list", when(claim(["l"], any_texts("1"))), ""),
        (
            "excluded",
            when(claim(["groups"], none(texts(["group-1"])))),
            "none 2 aud auds azp nested text scope odd",
        ),
    ] {
        let policies = [allow(vec![rule])];
        let passing: Vec<&str> = tokens()
            .into_iter()
            .filter(|(_, request)| request.passes(&policies))
            .map(|(name, _)| name)
            .collect();
        assert_eq!(passing.join(" "), allowed, "{name}");
    }
}

#[test]
fn metadata_is_the_tokens_payload_and_nothing_else() {
    let metadata = |filter: &str, names: ClaimPath, matching| {
        let key = MetadataKey { filter: filter.into(), path: names };
        allow(vec![when(Condition::FilterMetadata(key, matching))])
    };
    const TOKENS: &str = "envoy.filters.http.jwt_authn";
    let text = |value: &str| any([MetadataMatch::Text(TextMatch::parse(value))]);
    let listed = |value: &str| any([MetadataMatch::Listed(TextMatch::parse(value))]);
    for (name, policy, allowed) in [
        ("text", metadata(TOKENS, path(["payload", "azp"]), text("bar")), "azp"),
        ("a list is no text", metadata(TOKENS, path(["payload", "groups"]), text("group-1")), ""),
        ("list", metadata(TOKENS, path(["payload", "groups"]), listed("group-1")), "1"),
        ("a text is no list", metadata(TOKENS, path(["payload", "azp"]), listed("bar")), ""),
        ("another key", metadata(TOKENS, path(["azp"]), text("bar")), ""),
        ("another filter", metadata("envoy.filters.x", path(["payload", "azp"]), text("*")), ""),
        (
            "another filter, excluded",
            metadata(
                "envoy.filters.x",
                path(["payload", "azp"]),
                none([MetadataMatch::Text(TextMatch::Present)]),
            ),
            "none 1 2 aud auds azp nested text scope odd",
        ),
    ] {
        let passing: Vec<&str> = tokens()
            .into_iter()
            .filter(|(_, request)| request.passes(std::slice::from_ref(&policy)))
            .map(|(name, _)| name)
            .collect();
        assert_eq!(passing.join(" "), allowed, "{name}");
    }
}

#[test]
fn reason_names_the_claim_and_never_its_value() {
    let group = || allow(vec![when(claim(["groups"], any(texts(["s3cret"]))))]);
    let with = |payload| get("/").token(payload);
    let mine = json!({ "iss": "i", "sub": "s", "groups": ["mine"] });
    for (policy, request, expected) in [
        (
            allow(vec![of_token(any(principals(["a/b"])))]),
            get("/"),
            "request principal: a request without token is not a/b",
        ),
        (
            allow(vec![of_token(any(principals(["a/b"])))]),
            with(mine.clone()),
            "request principal: i/s is not a/b",
        ),
        (
            allow(vec![of_token(none(principals(["*"])))]),
            with(mine.clone()),
            "request principal: i/s is excluded by *",
        ),
        (group(), get("/"), "claim [groups]: the request has no token"),
        (group(), with(json!({ "iss": "i" })), "claim [groups]: it is absent"),
        (group(), with(mine.clone()), "claim [groups]: its value is none of those asked for"),
        (
            allow(vec![when(Condition::RequestAudiences(any(texts(["x"]))))]),
            with(mine.clone()),
            "audience: it is absent",
        ),
        (allow(vec![when(claim(["a", "b"], any(texts(["x"]))))]), with(mine), "claim [a][b]: it is absent"),
    ] {
        let reason = format!("ALLOW allow rule 0 failed on {expected}");
        assert_eq!(request.decide(&[policy]), Decision::Deny { policy: None, reason });
    }
}

#[test]
fn filter_asks_the_exchanges_token() {
    let factory = authorization(&[allow(vec![of_token(any(principals(["i/s"])))])], &domains());
    let mut anonymous = exchange(&connection(1, A));
    assert!(run(&*factory, &mut anonymous).is_some());
    let mut known = exchange(&connection(1, A));
    known.token = get("/").token(json!({ "iss": "i", "sub": "s" })).token.map(Arc::new);
    assert!(run(&*factory, &mut known).is_none());
}

#[test]
fn aliases_are_the_same_trust_domain() {
    let mesh = TrustDomains::new(["mesh".into(), "old".into()]);
    let old = get("/").by("spiffe://old/ns/ns1/sa/a");
    let foreign = get("/").by("spiffe://foreign/ns/ns1/sa/a");
    for (name, rule, by_own, by_old, by_foreign) in [
        (
            "principal",
            from(Source { principals: any(texts(["mesh/ns/ns1/sa/a"])), ..Source::default() }),
            true,
            true,
            false,
        ),
        (
            "excluded principal",
            from(Source { principals: none(texts(["old/ns/ns1/sa/a"])), ..Source::default() }),
            false,
            false,
            true,
        ),
        (
            "condition",
            when(Condition::SourcePrincipal(any(texts(["cluster.local/ns/ns1/sa/a"])))),
            true,
            true,
            false,
        ),
        (
            "trust domain",
            from(Source { trust_domains: any(texts(["old"])), ..Source::default() }),
            true,
            true,
            false,
        ),
        (
            "trust domain with a star",
            from(Source { trust_domains: any(texts(["ol*"])), ..Source::default() }),
            false,
            true,
            false,
        ),
    ] {
        let policies = [allow(vec![rule])];
        let passes =
            |request: &Request| matches!(request.decide_among(&policies, &mesh), Decision::Allow { .. });
        assert_eq!(
            (passes(&get("/")), passes(&old), passes(&foreign)),
            (by_own, by_old, by_foreign),
            "{name}"
        );
    }
}
