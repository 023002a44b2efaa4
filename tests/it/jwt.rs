//! RequestAuthentication at the waypoint: the tables of Istio's own tests, through a whole mesh, with issuers that really
//! give out keys.

use crate::client::{Answer, Client, Who, metrics, record, request};
use crate::harness::Mesh;
use crate::issuers::{issuers, serve};
use anyhow::{Context, Result, anyhow};
use http::Method;
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};
use tokio::net::TcpListener;

const ONE: &str = "test-issuer-1@istio.io";
const TWO: &str = "test-issuer-2@istio.io";

static TOKENS: LazyLock<Result<Mesh>> = LazyLock::new(|| {
    let issuers = issuers();
    let set = |jwk: Value| format!("'{}'", json!({ "keys": [jwk] }));
    let keys_one = set(issuers.one.jwk());
    let dots =
        include_str!("manifests/claims.yaml").replace("KEYS_ONE", &keys_one).replace("SERVICE", "dots");
    let brackets = dots
        .replace("claims.nested.nested-2.key1", "claims[nested][nested-2][key1]")
        .replace("claims.nested.key1", "claims[nested][key1]")
        .replace("claims.sub", "claims[sub]")
        .replace("dots", "brackets");
    let manifest = include_str!("manifests/jwt.yaml")
        .replace("KEYS_ONE", &keys_one)
        .replace("KEYS_TWO", &set(issuers.two.jwk()))
        .replace("HTTPS/", &format!("https://localhost:{}/", issuers.https))
        .replace("HTTP/", &format!("http://{}/", issuers.http));
    let root = tempfile::NamedTempFile::new()?;
    std::fs::write(root.path(), &issuers.root)?;
    let (_file, root) = root.keep()?;
    let environment = [("CAIRN_JWKS_ROOTS", root.as_os_str())];
    let manifests = [("jwt.yaml", &*manifest), ("dots.yaml", &dots), ("brackets.yaml", &brackets)];
    Mesh::start_with(&manifests, &[], &environment)
});

fn mesh() -> Result<&'static Mesh> {
    TOKENS.as_ref().map_err(|error| anyhow!("the mesh of tokens is not there: {error:#}"))
}

/// What Istio's tests call these tokens.
fn token(name: &str) -> String {
    let nested = json!({ "key1": ["valueA", "valueB"], "nested-2": { "key1": ["valueA", "valueB"] } });
    let claims = match name {
        "none" => return String::new(),
        "garbage" => return "not.a.token".to_owned(),
        "issuer-2" => {
            let claims = json!({ "iss": TWO, "sub": "sub-2", "groups": ["group-2"] });
            return issuers().two.sign(&claims);
        }
        "custom" => {
            let claims = json!({ "iss": TWO, "sub": "sub-2", "custom_scope": "admin user" });
            return issuers().two.sign(&claims);
        }
        "issuer-3" => json!({ "iss": "test-issuer-3@istio.io", "sub": "sub-1" }),
        "realm" => json!({ "iss": issuers().realm(), "sub": "sub-1" }),
        "successor" => return issuers().successor.sign(&json!({ "iss": ONE, "sub": "sub-1" })),
        "issuer-1" => json!({ "groups": ["group-1"], "iat": 1_562_182_722 }),
        "expired" => json!({ "exp": 1_562_182_722 }),
        "audience" => json!({ "aud": "foo" }),
        "audiences" => json!({ "aud": ["foo", "buzz"] }),
        "presenter" => json!({ "azp": "bar" }),
        "permission" => json!({ "permission": "read write", "scope": "write read" }),
        "nested-1" => json!({ "nested": nested }),
        "nested-2" => json!({ "nested": { "key2": "valueC", "nested-2": { "key2": "valueC" } } }),
        "collision" => json!({
            "test-issuer-1@istio.io/simple": "valueC",
            "test-issuer-1@istio.io/nested": { "key1": "valueC" },
        }),
        other => panic!("{other}"),
    };
    let mut whole = json!({ "iss": ONE, "sub": "sub-1", "exp": 4_000_000_000_u64 });
    claims.as_object().unwrap().iter().for_each(|(name, value)| whole[name] = value.clone());
    issuers().one.sign(&whole)
}

async fn client(service: &str) -> Result<Client> {
    let service = if service.contains('/') { service.to_owned() } else { format!("tokens/{service}") };
    Client::open(Who::Pod(mesh()?.pod("tokens/web")?), mesh()?.service(&service, 8000)?).await
}

async fn ask(client: &mut Client, path: &str, token: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    let value = format!("Bearer {token}");
    let mut all = headers.to_vec();
    if !token.is_empty() {
        all.push(("authorization", &value));
    }
    client.send(request(Method::GET, path, &all)).await
}

/// Asks a service for each path with each token.
async fn check(service: &str, rows: &[(&str, &str, u16)]) -> Result<()> {
    let mut client = client(service).await?;
    for (path, name, status) in rows {
        let answer = ask(&mut client, path, &token(name), &[]).await?;
        assert_eq!(answer.status, *status, "{service}{path} {name}: {}", answer.body);
    }
    Ok(())
}

#[tokio::test]
async fn policies_ask_for_tokens_and_claims() -> Result<()> {
    let rows = [
        ("/token1", ["none 403", "issuer-1 200", "issuer-2 403"].as_slice()),
        ("/token2", &["none 403", "issuer-1 403", "issuer-2 200"]),
        ("/token3", &["issuer-1 403", "issuer-2 200", "none 200"]),
        ("/tokenAny", &["none 403", "issuer-1 200", "issuer-2 200"]),
        ("/permission", &["none 403", "issuer-1 403", "issuer-2 403", "permission 200"]),
        ("/scope", &["permission 200", "issuer-1 403"]),
        ("/otherscope", &["permission 403"]),
        ("/custom-scope-admin", &["none 403", "issuer-1 403", "custom 200"]),
        ("/custom-scope-user", &["none 403", "issuer-1 403", "custom 200"]),
        ("/nested-key1", &["nested-1 200", "nested-2 403"]),
        ("/nested-key2", &["nested-1 403", "nested-2 200"]),
        ("/nested-2-key1", &["nested-1 200", "nested-2 403"]),
        ("/nested-non-exist", &["nested-1 403", "nested-2 403"]),
        ("/audiences", &["audience 200", "audiences 200", "issuer-1 403"]),
        ("/presenter", &["presenter 200", "issuer-1 403"]),
    ];
    for (path, cells) in rows {
        let cells = cells.iter().map(|cell| cell.split_once(' ').unwrap());
        let rows: Vec<_> = cells.map(|(name, status)| (path, name, status.parse().unwrap())).collect();
        check("authorized", &rows).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_application_sees_what_the_rule_says_and_no_token() -> Result<()> {
    let mut client = client("output").await?;
    let nested = issuers().one.sign(&json!({
        "iss": ONE, "sub": "sub-1", "iat": 1_562_182_722, "nested": { "nested-2": { "key2": "valueC" } },
    }));
    let made_up = [("x-jwt-nested-key", "value_to_be_replaced"), ("x-test-payload", "made up")];
    let answer = ask(&mut client, "/", &nested, &made_up).await?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.seen("authorization"), None);
    assert_eq!(answer.seen("x-test-payload"), nested.split('.').nth(1));
    assert_eq!(answer.seen("x-jwt-iss"), Some(ONE));
    assert_eq!(answer.seen("x-jwt-iat"), Some("1562182722"));
    assert_eq!(answer.seen("x-jwt-nested-key"), Some("valueC"));

    let answer = ask(&mut client, "/", "", &made_up).await?;
    assert_eq!((answer.status, answer.seen("x-jwt-nested-key")), (200, None), "{}", answer.body);

    let expired = token("expired");
    let answer = ask(&mut client, "/a?b", &expired, &[]).await?;
    assert_eq!((answer.status, &*answer.body), (401, "Jwt is expired"));
    let host = mesh()?.service("tokens/output", 8000)?;
    let challenge = format!("Bearer realm=\"http://{host}/a?b\", error=\"invalid_token\"");
    assert_eq!(answer.header("www-authenticate"), challenge);

    let value = format!("Bearer {expired}");
    let preflight =
        [("access-control-request-method", "GET"), ("authorization", &*value), ("origin", "http://a")];
    for (headers, status) in [(&preflight[..], 200), (&preflight[..2], 401)] {
        let answer = client.send(request(Method::OPTIONS, "/", headers)).await?;
        assert_eq!(answer.status, status, "{headers:?}: {}", answer.body);
    }

    let mut kept = self::client("forwarded").await?;
    let answer = ask(&mut kept, "/", &nested, &[]).await?;
    assert_eq!((answer.status, answer.seen("authorization")), (200, Some(&*format!("Bearer {nested}"))));
    Ok(())
}

#[tokio::test]
async fn grpc_clients_are_told_in_their_own_way() -> Result<()> {
    let to = mesh()?.service("tokens/audiences", 8000)?;
    let mut client = Client::open_http2(Who::Pod(mesh()?.pod("tokens/web")?), to).await?;
    for (name, status, message) in
        [("expired", "16", "Jwt is expired"), ("issuer-1", "7", "Audiences in Jwt are not allowed")]
    {
        let value = format!("Bearer {}", token(name));
        let headers = [("content-type", "application/grpc"), ("authorization", &*value)];
        let answer = client.send(request(Method::POST, "/a.B/C", &headers)).await?;
        let seen = (answer.status, answer.header("grpc-status"), answer.header("grpc-message"));
        assert_eq!(seen, (200, status, message), "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn a_refusal_is_explained_without_the_token() -> Result<()> {
    let mut client = client("required").await?;
    let expired = token("expired");
    let answer = ask(&mut client, "/explained", &expired, &[]).await?;
    assert_eq!(answer.status, 401);
    let waypoint = mesh()?.waypoint("tokens/tokens-waypoint")?;
    let record = record(waypoint, "/exchanges", |record| record["path"] == "/explained").await?;
    assert_eq!(record["deniedBy"], "RequestAuthentication tokens/required");
    assert_eq!(record["deniedBecause"], format!("Jwt is expired (its rule for tokens of {ONE})"));
    assert_eq!(record["details"], "jwt_authn_access_denied{Jwt_is_expired}");
    assert!(!record.to_string().contains(&expired));
    assert!(!mesh()?.log("waypoint")?.contains(&expired));
    Ok(())
}

#[tokio::test]
async fn a_token_may_be_required_by_a_policy() -> Result<()> {
    check("required", &[("/", "issuer-1", 200), ("/", "expired", 401), ("/", "none", 403)]).await
}

#[tokio::test]
async fn audiences_are_looked_at_rule_by_rule() -> Result<()> {
    check("audiences", &[("/", "issuer-1", 403), ("/", "audience", 200), ("/", "issuer-2", 200)]).await
}

#[tokio::test]
async fn keys_that_cannot_be_used_refuse_tokens_and_nothing_else() -> Result<()> {
    check("invalid", &[("/", "issuer-1", 401), ("/", "expired", 401), ("/", "none", 200)]).await?;
    check("unreachable", &[("/", "issuer-1", 401), ("/", "none", 200)]).await
}

#[tokio::test]
async fn tokens_are_found_where_the_rule_says() -> Result<()> {
    let mut client = client("places").await?;
    let (good, expired) = (token("issuer-1"), token("expired"));
    for (name, path, headers, status) in [
        ("header", "/".to_owned(), [("x-jwt-token", format!("Value {good}"))].as_slice(), 200),
        ("other header", "/".into(), &[("auth-token", format!("Token {good}"))], 200),
        ("parameter", format!("/?token={good}"), &[], 200),
        ("other parameter", format!("/?secondary_token={good}"), &[], 200),
        ("cookie", "/".into(), &[("cookie", format!("session={good}"))], 200),
        ("parameter that is not looked at", format!("/?token_value={good}"), &[], 403),
        ("header that is not looked at", "/".into(), &[("x-other", format!("Value {good}"))], 403),
        ("usual header is not looked at", "/".into(), &[("authorization", format!("Bearer {good}"))], 403),
        ("two parameters", format!("/?token={good}&secondary_token={good}"), &[], 200),
        ("one of two expired", format!("/?token={good}&secondary_token={expired}"), &[], 401),
    ] {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, &**value)).collect();
        let answer = client.send(request(Method::GET, &path, &headers)).await?;
        assert_eq!(answer.status, status, "{name}: {}", answer.body);
        assert!(status != 200 || !answer.body.contains(&good), "{name}: the token went on: {}", answer.body);
    }
    Ok(())
}

#[tokio::test]
async fn keys_are_fetched_from_where_they_are() -> Result<()> {
    let good = [("/", "issuer-1", 200), ("/", "expired", 401), ("/", "none", 200), ("/", "garbage", 401)];
    check("remote", &good).await?;
    check("secure", &good).await?;
    check("discovered", &[("/", "realm", 200), ("/", "issuer-1", 401), ("/", "none", 200)]).await?;
    // Without an issuer, whatever the keys have signed.
    check("nameless", &[("/", "issuer-1", 200), ("/", "issuer-3", 200), ("/", "expired", 401)]).await?;
    check("nameless-unreachable", &[("/", "issuer-1", 401), ("/", "none", 200)]).await?;
    check("slow", &[("/", "issuer-1", 401), ("/", "none", 200)]).await?;
    let text = metrics(mesh()?.waypoint("tokens/tokens-waypoint")?).await?;
    let of_slow = format!("cairn_jwks_fetch_failures_total{{source=\"http://{}/slow\"}}", issuers().http);
    let line = text.lines().find(|line| line.starts_with(&of_slow)).context("no such metric")?;
    assert!(!line.ends_with(" 0"), "{line}");
    Ok(())
}

#[tokio::test]
async fn keys_of_a_service_in_the_mesh_are_fetched_through_the_mesh() -> Result<()> {
    // Nobody listened there when the waypoint first asked.
    let listener = TcpListener::bind(mesh()?.twin("auth/keys", 9000)?).await?;
    let server = tokio::spawn(serve(Arc::clone(issuers()), listener));
    check("meshed", &[("/", "issuer-1", 200), ("/", "expired", 401)]).await?;
    server.abort();
    Ok(())
}

#[tokio::test]
async fn a_new_key_is_taken_up_with_its_first_token() -> Result<()> {
    check("rotating", &[("/", "issuer-1", 200), ("/", "successor", 401)]).await?;
    issuers().rotate(vec![issuers().one.jwk(), issuers().successor.jwk()]);
    let again =
        issuers().successor.sign_as(&json!({ "alg": "EdDSA" }), &json!({ "iss": ONE, "sub": "sub-1" }));
    // A key that was asked for in vain is not asked for again at once; a token that names none asks anew.
    let mut client = client("rotating").await?;
    let answer = ask(&mut client, "/", &again, &[]).await?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    check("rotating", &[("/", "successor", 200), ("/", "issuer-1", 200)]).await
}

#[tokio::test]
async fn a_waypoint_takes_what_names_it() -> Result<()> {
    let rows = [
        ("/", "none", 403),
        ("/", "issuer-1", 200),
        ("/", "issuer-3", 401),
        ("/", "issuer-2", 403),
        ("/", "expired", 401),
        ("/healthz", "none", 200),
    ];
    check("gate/gated", &rows).await
}

#[tokio::test]
async fn routes_ask_for_claims() -> Result<()> {
    let rows = [
        ("/exact", "nested-1", 200),
        ("/exact", "nested-2", 404),
        ("/exact", "none", 404),
        ("/exact", "expired", 401),
        ("/both", "nested-1", 200),
        ("/both", "issuer-1", 404),
        ("/wrong", "nested-1", 404),
        ("/dots", "collision", 200),
        ("/dots", "nested-1", 404),
    ];
    check("routed", &rows).await?;
    check("unverified", &[("/exact", "nested-1", 404)]).await?;
    // A header that a claim is copied to is the claim's alone.
    let mut client = client("copied").await?;
    for (name, sent, status) in
        [("nested-2", "another", 200), ("nested-1", "valueC", 404), ("none", "valueC", 404)]
    {
        let answer = ask(&mut client, "/", &token(name), &[("x-jwt-nested-key", sent)]).await?;
        assert_eq!(answer.status, status, "{name}: {}", answer.body);
    }
    Ok(())
}

#[tokio::test]
async fn virtual_services_ask_for_claims() -> Result<()> {
    for service in ["dots", "brackets"] {
        let rows = [
            ("/exact", "nested-1", 200),
            ("/prefix", "nested-1", 200),
            ("/regex", "nested-1", 200),
            ("/exact-and-prefix", "nested-1", 200),
            ("/without-another", "nested-1", 200),
            ("/without-its-own", "nested-1", 404),
            ("/without-its-own", "none", 200),
            ("/with-and-without", "nested-1", 200),
            ("/prefix-wrong", "nested-1", 404),
            ("/sub-wrong", "nested-1", 404),
            ("/exact", "expired", 401),
            ("/without-another", "expired", 401),
            ("/exact", "none", 404),
            ("/prefix", "none", 404),
            ("/exact", "nested-2", 404),
            ("/simple", "collision", 200),
            ("/simple", "nested-1", 404),
            ("/simple-wrong", "collision", 404),
            ("/nested", "collision", 200),
            ("/nested-wrong", "collision", 404),
            ("/delayed", "none", 500),
            ("/elsewhere", "nested-1", 404),
        ];
        check(service, &rows).await?;
        check(&format!("{service}-open"), &[("/exact", "nested-1", 404)]).await?;
        let mut client = client(service).await?;
        let same_text = [("request.auth.claims.nested.key1", "valueA"), ("nested.key1", "valueA")];
        let answer = ask(&mut client, "/exact", "", &same_text).await?;
        assert_eq!(answer.status, 404, "{service}: a header is no claim: {}", answer.body);
    }
    Ok(())
}
