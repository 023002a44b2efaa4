//! Makes up RequestAuthentications, tokens good and bad, and policies that ask about tokens.

use crate::generate::Generator;
use crate::scenario::{Ask, Scenario};
use crate::signer::Signer;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use cairn_mesh::PathNormalization;
use serde_json::{Map, Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// The issuers, each with a key of its own, and one key that nobody knows. Each scenario has the keys of one of several
/// sets, so that all algorithms are seen and tokens still meet their keys.
pub struct Issuers {
    sets: Vec<Signers>,
    stranger: Signer,
    now: u64,
}

type Signers = Vec<(&'static str, Signer)>;

/// The issuers' names, and the names of their keys; one has none.
const ISSUERS: [(&str, &str); 4] = [("one", "k1"), ("two", ""), ("three", "k3"), ("four/x", "k4")];

/// The issuers' algorithms, one set after the other. RS512 is nobody's: a token may say it all the same.
const ALGORITHMS: [[&str; 4]; 4] = [
    ["ES256", "EdDSA", "RS256", "ES384"],
    ["PS256", "ES512", "HS256", "RS384"],
    ["RS384", "HS512", "PS384", "ES256"],
    ["HS384", "PS512", "EdDSA", "RS256"],
];

/// Claims of which a policy or a header may ask.
const CLAIMS: [&str; 9] =
    ["sub", "groups", "scope", "custom", "number", "flag", "nested.key", "nested.list", "nested"];

impl Issuers {
    /// New keys for all of them.
    pub fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let signer = |((name, id), algorithm): ((&'static str, &'static str), &'static str)| {
            (name, Signer::new(algorithm, id))
        };
        let set = |algorithms: [&'static str; 4]| -> Signers {
            ISSUERS.into_iter().zip(algorithms).map(signer).collect()
        };
        Self { sets: ALGORITHMS.into_iter().map(set).collect(), stranger: Signer::new("ES256", "k1"), now }
    }

    /// A scenario about tokens with this many requests.
    pub fn scenario(&self, generator: &mut Generator, asks: usize) -> Scenario {
        // The first has what is usual, so it is seen most.
        let signers = &self.sets[*generator.pick(&[0, 0, 0, 1, 2, 3])];
        let count = generator.number(1..=2);
        let mut objects: Vec<Value> =
            (0..count).map(|index| authentication(generator, signers, index)).collect();
        for index in 0..generator.number(0..=2) {
            objects.push(policy(generator, index));
        }
        let forged = written(&objects);
        let asks = (0..asks).map(|_| self.ask(generator, signers, &forged)).collect();
        let trust_domains = vec!["cluster.local".to_owned()];
        Scenario { normalization: PathNormalization::Base, trust_domains, tcp: false, objects, asks }
    }

    fn ask(&self, generator: &mut Generator, signers: &Signers, forged: &[&str]) -> Ask {
        let mut ask = generator.plain_ask();
        ask.headers.retain(|(name, _)| name != "authorization" && name != "cookie" && name != "content-type");
        if generator.chance(30) {
            let forged = forged.iter().map(|name| ((*name).to_owned(), "forged".to_owned()));
            ask.headers.extend(forged);
        }
        if generator.chance(10) {
            ask.method = "OPTIONS".to_owned();
            for (name, value) in [("origin", "https://a"), ("access-control-request-method", "GET")] {
                if generator.chance(80) {
                    ask.headers.push((name.to_owned(), value.to_owned()));
                }
            }
        }
        let count = *generator.pick(&[0, 1, 1, 1, 1, 1, 2]);
        for _ in 0..count {
            let token = self.token(generator, signers);
            place(generator, &mut ask, &token);
        }
        ask
    }

    fn token(&self, generator: &mut Generator, signers: &Signers) -> String {
        let (issuer, signer) = generator.pick(signers);
        let payload = self.payload(generator, issuer);
        let good = signer.sign(&payload);
        let parts: Vec<&str> = good.split('.').collect();
        match generator.number(0..=24) {
            0 => self.stranger.sign(&payload),
            1 => generator.pick(signers).1.sign(&payload),
            2 => good[..good.len() - 10].to_owned(),
            3 => format!("{}.{}", parts[0], parts[1]),
            4 => format!("{}.{}.", parts[0], parts[1]),
            5 => format!("{good}.x"),
            6 => format!("{}.{}!.{}", parts[0], parts[1], parts[2]),
            7 => format!("{}.{}.{}", BASE64.encode("not json"), parts[1], parts[2]),
            8 => format!("{}.{}.{}", parts[0], BASE64.encode("[1]"), parts[2]),
            9 => signer.sign_as(&json!({ "alg": "none" }), &payload),
            10 => signer.sign_as(&json!({ "alg": "RS512", "kid": "k9" }), &payload),
            11 => signer.sign_as(&json!({ "kid": "k1" }), &payload),
            12 => (*generator.pick(&["x", "a.b.c", "..", "e30.e30.e30"])).to_owned(),
            _ => good,
        }
    }

    fn payload(&self, generator: &mut Generator, issuer: &str) -> Value {
        let mut claims = Map::new();
        if generator.chance(95) {
            let other = if generator.chance(10) { "nobody" } else { issuer };
            claims.insert("iss".to_owned(), other.into());
        }
        let now = self.now;
        let options: [(&str, u32, Vec<Value>); 10] = [
            ("sub", 85, vec!["sub-1".into(), "sub-2".into(), "a/b".into(), "".into()]),
            ("aud", 50, vec!["foo".into(), json!(["foo", "bar"]), "bar".into(), json!([]), json!(7)]),
            ("exp", 60, vec![(now + 3600).into(), (now + 3600).into(), (now - 3600).into(), "x".into()]),
            ("nbf", 20, vec![(now - 3600).into(), (now + 3600).into()]),
            ("azp", 20, vec!["foo".into(), "bar".into()]),
            ("groups", 40, vec![json!(["group-1", "group-2"]), "group-1".into(), json!([1, "group-2"])]),
            ("scope", 40, vec!["read write".into(), "write".into(), "".into(), " read  write ".into()]),
            ("custom", 30, vec!["a b".into(), json!(["a", "b c"])]),
            ("number", 20, vec![7.into(), 7.5.into(), (-1).into(), 1_600_000_000.into()]),
            ("flag", 20, vec![true.into(), false.into(), Value::Null]),
        ];
        for (name, percent, values) in options {
            if generator.chance(percent) {
                claims.insert(name.to_owned(), generator.pick(&values).clone());
            }
        }
        if generator.chance(40) {
            claims.insert(
                "nested".to_owned(),
                json!({ "key": "v1", "list": ["v1", "v2"], "deep": { "x": 1 } }),
            );
        }
        claims.into()
    }
}

fn authentication(generator: &mut Generator, signers: &Signers, index: usize) -> Value {
    let count = generator.number(1..=2);
    let rules: Vec<Value> = (0..count).map(|_| token_rule(generator, signers)).collect();
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": { "name": format!("r{index}"), "namespace": "shop" },
        "spec": {
            "targetRefs": [
                { "kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint" },
            ],
            "jwtRules": rules,
        },
    })
}

fn token_rule(generator: &mut Generator, signers: &Signers) -> Value {
    let (issuer, signer) = generator.pick(signers);
    let mut keys = vec![signer.jwk()];
    if generator.chance(30) {
        keys.insert(0, generator.pick(signers).1.jwk());
    }
    let mut rule = json!({ "issuer": issuer, "jwks": Signer::set(&keys) });
    let mut set = |field: &str, percent: u32, value: Value| {
        if generator.chance(percent) {
            rule[field] = value;
        }
    };
    set("audiences", 25, json!(["foo", "other"]));
    set("fromHeaders", 25, json!([{ "name": "x-jwt", "prefix": "Value " }, { "name": "x-auth" }]));
    set("fromParams", 20, json!(["token", "second"]));
    set("fromCookies", 15, json!(["session"]));
    set("forwardOriginalToken", 40, json!(true));
    set("outputPayloadToHeader", 30, json!("x-payload"));
    set("spaceDelimitedClaims", 30, json!(["custom"]));
    if generator.chance(40) {
        let claim = *generator.pick(&CLAIMS);
        rule["outputClaimToHeaders"] = json!([
            { "header": "x-claim", "claim": claim },
            { "header": "X-Issuer", "claim": "iss" },
        ]);
    }
    rule
}

/// Puts a token where some rule may look for it.
fn place(generator: &mut Generator, ask: &mut Ask, token: &str) {
    let mut header = |name: &str, value: String| ask.headers.push((name.to_owned(), value));
    match generator.number(0..=11) {
        0..=4 => header("authorization", format!("Bearer {token}")),
        5 => header("authorization", format!("bearer {token}")),
        6 => header("x-jwt", format!("Value {token}")),
        7 => header("x-auth", token.to_owned()),
        8 => header("cookie", format!("a=b; session={token}; c=d")),
        other => {
            let name = ["access_token", "token", "second"][other - 9];
            let (path, rest) = ask.target.split_once('?').unwrap_or((&ask.target, ""));
            let more = if rest.is_empty() { String::new() } else { format!("&{rest}") };
            ask.target = format!("{path}?{name}={token}{more}");
        }
    }
}

/// A policy that asks about tokens.
fn policy(generator: &mut Generator, index: usize) -> Value {
    let count = generator.number(1..=2);
    let rules: Vec<Value> = (0..count).map(|_| rule(generator)).collect();
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": { "name": format!("p{index}"), "namespace": "shop" },
        "spec": {
            "targetRefs": [
                { "kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint" },
            ],
            "action": generator.pick(&["ALLOW", "ALLOW", "DENY"]),
            "rules": rules,
        },
    })
}

fn rule(generator: &mut Generator) -> Value {
    const KEYS: [&str; 12] = [
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "request.auth.claims[groups]",
        "request.auth.claims[scope]",
        "request.auth.claims[custom]",
        "request.auth.claims[nested][key]",
        "request.auth.claims[nested][list]",
        "request.auth.claims[number]",
        "experimental.envoy.filters.http.jwt_authn[payload][groups]",
        "experimental.envoy.filters.http.jwt_authn[payload][scope]",
        "experimental.envoy.filters.http.jwt_authn[payload][nested][key]",
    ];
    let field = |generator: &mut Generator, names: [&str; 2], kind: &str| {
        let count = generator.number(1..=2);
        let values: Vec<Value> = (0..count).map(|_| value(generator, kind).into()).collect();
        (generator.pick(&names).to_string(), Value::from(values))
    };
    if generator.chance(50) {
        let names = ["requestPrincipals", "notRequestPrincipals"];
        let (name, values) = field(generator, names, "request.auth.principal");
        return json!({ "from": [{ "source": { name: values } }] });
    }
    let key = *generator.pick(&KEYS);
    let (name, values) = field(generator, ["values", "notValues"], key);
    json!({ "when": [{ "key": key, name: values }] })
}

fn value(generator: &mut Generator, key: &str) -> String {
    // The same by the name of Envoy's filter: a text, or in brackets an element of a list.
    if let Some(path) = key.strip_prefix("experimental.envoy.filters.http.jwt_authn[payload]") {
        let value = value(generator, &format!("request.auth.claims{path}"));
        return if generator.chance(50) { format!("[{value}]") } else { value };
    }
    const PRINCIPALS: [&str; 14] = [
        "*",
        "one*",
        "*sub-1",
        "one/*",
        "one/sub*",
        "*/sub-1",
        "*ne/sub-1",
        "one/sub-1",
        "one",
        "*/*",
        "*ne/sub*",
        "four/x/sub-1",
        "one/a/b",
        "two/",
    ];
    const WORDS: [&str; 9] = ["foo", "bar", "group-1", "group-2", "read", "write", "a", "v1", "7"];
    match key {
        "request.auth.principal" => (*generator.pick(&PRINCIPALS)).to_owned(),
        _ => {
            let word = *generator.pick(&WORDS);
            generator.pattern(word)
        }
    }
}

/// Which of the headers that rules write for upstreams these objects' rules write. What none of them writes may be
/// another scenario's at Envoy, whose rules are all in one filter.
fn written(objects: &[Value]) -> Vec<&'static str> {
    let text = Value::from(objects.to_vec()).to_string();
    ["x-payload", "x-claim"].into_iter().filter(|name| text.contains(name)).collect()
}

/// Whether requests forge no header but those that rules of the scenario write.
pub fn forges_what_is_written(scenario: &Scenario) -> bool {
    let written = written(&scenario.objects);
    let forged = |name: &str| scenario.asks.iter().any(|ask| ask.header(name).next().is_some());
    ["x-payload", "x-claim"].into_iter().all(|name| written.contains(&name) || !forged(name))
}
