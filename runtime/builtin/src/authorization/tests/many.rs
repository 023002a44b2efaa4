//! More rules than are tried one by one: the index must find what trying each finds.

use super::*;
use serde_json::json;

fn some_texts(texts: &'static [&'static str]) -> impl Strategy<Value = Values<TextMatch>> {
    prop::collection::vec(prop::sample::select(texts), 0..3)
        .prop_map(|list| any(list.into_iter().map(TextMatch::parse)))
}

fn some_operation() -> impl Strategy<Value = Operation> {
    const PATHS: [&str; 14] = [
        "/a",
        "/ab",
        "/abb*",
        "/ab*",
        "*bb",
        "*é",
        "/é*",
        "/b*",
        "*",
        "/no*",
        "/a/{*}",
        "/{**}/b",
        "/a/{**}",
        "/{*}/{**}",
    ];
    let operation = (
        prop::collection::vec(prop::sample::select(&PATHS[..]), 0..3),
        some_texts(&["GET", "POST", "P*", "PUT"]),
        some_texts(&["shop.example", "shop*", "*.example", "other"]),
    );
    operation.prop_map(|(some_paths, methods, hosts)| {
        let paths = any(some_paths.into_iter().flat_map(|path| paths([path])));
        Operation { paths, methods, hosts, ..Operation::default() }
    })
}

fn some_condition() -> impl Strategy<Value = Condition> {
    let values = some_texts(&["a", "b", "a*", "*b", "*", "ab"]);
    (0..8, values, some_blocks()).prop_map(|(kind, values, some_blocks)| match kind {
        7 => Condition::RemoteIp(any(some_blocks)),
        0 => Condition::RequestHeader("x-a".into(), values),
        1 => Condition::RequestHeader("x-b".into(), values),
        2 => Condition::RequestHeader(":method".into(), any(texts(["GET"]))),
        3 => Condition::RequestHeader("x-a".into(), Values { any: Vec::new(), none: values.any }),
        4 => Condition::RequestClaim([Arc::from("c")].into(), values),
        5 => Condition::RequestClaim(["o".into(), "c".into()].into(), values),
        _ => Condition::RequestAudiences(values),
    })
}

fn some_blocks() -> impl Strategy<Value = Vec<cairn_mesh::IpMatch>> {
    const BLOCKS: [&str; 6] = ["10.0.0.1", "10.0.0.0/8", "10.9.0.0/8", "172.16.0.0/12", "::/0", "0.0.0.0/0"];
    prop::sample::subsequence(&BLOCKS[..], 0..3)
        .prop_map(|some| some.into_iter().flat_map(|one| blocks([one])).collect())
}

fn some_source() -> impl Strategy<Value = Source> {
    let principals = prop::sample::subsequence(&["i/a", "i/*", "*/b", "j/a", "*"][..], 0..3);
    let namespaces = prop::sample::subsequence(&["ns1", "ns2"][..], 0..2);
    (principals, namespaces, some_blocks()).prop_map(|(principals, namespaces, some_blocks)| Source {
        remote_ip_blocks: any(some_blocks),
        request_principals: any(principals.into_iter().map(RequestPrincipal::parse)),
        namespaces: any(namespaces.into_iter().map(Arc::from)),
        ..Source::default()
    })
}

prop_compose! {
    fn some_rule()(
        from in prop::collection::vec(some_source(), 0..3),
        to in prop::collection::vec(some_operation(), 0..3),
        when in prop::collection::vec(some_condition(), 0..3),
    ) -> PolicyRule {
        PolicyRule { from, to, when, ..PolicyRule::default() }
    }
}

prop_compose! {
    fn some_request()(
        path in "/(a|ab|abb|b|é|éb|a/b|a/|)",
        method in prop::sample::select(&["GET", "POST"][..]),
        host in prop::sample::select(&["shop.example", "SHOP.example", "x.example", "other:80"][..]),
        headers in prop::collection::vec(("x-(a|b|c|d)", "(a|b|ab|)"), 0..4),
        claims in prop::option::of(("[ij]", "[ab]", "(a|b|ab)", "(a|b|ab)")),
        client in prop::sample::select(&[A, B, PLAINTEXT][..]),
        forwarded in prop::option::of(prop::sample::select(&["172.17.0.1", "fd00::1", "10.9.9.9", "unknown"][..])),
    ) -> Request {
        let mut request = get(&path).method(method).host(host).by(client);
        if let Some(forwarded) = forwarded {
            request = request.header("x-forwarded-for", forwarded);
        }
        for (name, value) in headers {
            request.head.headers.append(HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        }
        match claims {
            Some((issuer, subject, c, d)) => request.token(json!({
                "iss": issuer, "sub": subject, "c": [c, 1], "o": { "c": d }, "aud": c,
            })),
            None => request,
        }
    }
}

proptest! {
    #[test]
    fn the_first_by_id_of_many_rules_is_found(
        rules in prop::collection::vec(some_rule(), 9..60),
        request in some_request(),
    ) {
        let alone = |rule: &PolicyRule| !request.passes(&[deny(vec![rule.clone()])]);
        let matching = rules.iter().zip(0..).filter(|(rule, _)| alone(rule));
        let expected = matching.map(|(_, index)| format!("ns[shop]-policy[deny]-rule[{index}]")).min();
        let found = match request.decide(&[deny(rules)]) {
            Decision::Deny { policy, .. } => policy.map(|id| id.to_string()),
            Decision::Allow { .. } => None,
        };
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn rules_are_named_in_the_order_of_their_ids_as_texts() {
    let paths_of = |index: usize| if index == 2 || index == 10 { "/both" } else { "/other" };
    let rules =
        (0..12).map(|index| to(Operation { paths: any(paths([paths_of(index)])), ..Operation::default() }));
    let decision = get("/both").decide(&[allow(rules.collect())]);
    assert_eq!(decision, Decision::Allow { by: Some("ns[shop]-policy[allow]-rule[10]".into()) });
}
