//! What does a token cost a request that carries it: one that was verified before, and one that was not?
//!
//! The token has the claims of a usual identity provider, about 700 bytes. Beside it runs a fixed loop of arithmetic, so
//! that figures of different machines can be compared. A hit must stay under a microsecond.

// A benchmark's own inputs are right or it must stop.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../src/authentication/testing.rs"]
mod testing;

use cairn_builtin::{Authenticator, Judgement, Jwt, Moment, TokenCache, inline_keys};
use cairn_filter::RequestHead;
use cairn_mesh::{JwtRule, KeyPlace, RequestAuthentication, ResourceName};
use divan::{Bencher, black_box};
use http::{HeaderMap, HeaderValue, Method, Version};
use serde_json::json;
use smallvec::SmallVec;
use std::sync::Arc;
use testing::Signer;

const ISSUER: &str = "https://issuer.example/realms/shop";
const NOW: u64 = 1_700_000_000;

fn main() {
    divan::main();
}

fn token(signer: &Signer) -> String {
    signer.sign(&json!({
        "iss": ISSUER, "sub": "0c1b4f1e-5a4e-4f2b-9d3a-6a1f0f3b2c1d", "aud": ["web", "account"],
        "exp": NOW + 300, "iat": NOW, "jti": "b7a4d4de-3b0e-4f6b-8f3c-5f4a1b2c3d4e", "azp": "web",
        "scope": "openid profile email", "email": "somebody@shop.example", "email_verified": true,
        "groups": ["staff", "cashiers", "openers"], "realm_access": { "roles": ["offline_access", "user"] },
    }))
}

struct Case {
    authenticator: Authenticator,
    head: RequestHead,
}

impl Case {
    fn new(algorithm: &'static str) -> Self {
        let signer = Signer::new(algorithm, "key-1");
        let keys = KeyPlace::Inline(Signer::set(&[signer.jwk()]).into());
        let policy = RequestAuthentication {
            name: ResourceName::new("shop", "tokens"),
            targets: Vec::new(),
            rules: vec![JwtRule::new(ISSUER, keys)],
        };
        let mut source = |_: &ResourceName, rule: &JwtRule| match &rule.keys {
            KeyPlace::Inline(text) => inline_keys(text),
            _ => panic!("the keys are inline"),
        };
        let authenticator = Authenticator::compile(&[Arc::new(policy)], &mut source);
        let mut headers = HeaderMap::new();
        let value = format!("Bearer {}", token(&signer));
        headers.insert("authorization", HeaderValue::from_str(&value).unwrap());
        let head = RequestHead {
            method: Method::GET,
            scheme: HeaderValue::from_static("http"),
            authority: HeaderValue::from_static("shop.example"),
            path: "/cart/17".parse().unwrap(),
            headers,
            version: Version::HTTP_2,
        };
        Self { authenticator, head }
    }

    fn judge(&self, cache: &TokenCache) {
        let moment = Moment { now: NOW, worker: 0, cache };
        let judgement = self.authenticator.judge(black_box(&self.head), moment, &mut SmallVec::new());
        let Judgement::Accepted(accepted) = judgement else { panic!("the token is good") };
        black_box(accepted.token());
    }
}

/// A token that was verified before.
#[divan::bench]
fn hit(bencher: Bencher<'_, '_>) {
    let (case, cache) = (Case::new("RS256"), TokenCache::default());
    case.judge(&cache);
    bencher.bench_local(|| case.judge(&cache));
    assert_eq!(cache.counts().1, 1, "only the first was a miss");
}

/// A token that is seen for the first time.
#[divan::bench(args = ["RS256", "ES256", "EdDSA", "HS256"])]
fn miss(bencher: Bencher<'_, '_>, algorithm: &'static str) {
    let case = Case::new(algorithm);
    bencher.with_inputs(TokenCache::default).bench_local_refs(|cache| case.judge(cache));
}

/// Taking it apart alone.
#[divan::bench]
fn parse(bencher: Bencher<'_, '_>) {
    let text = token(&Signer::new("ES256", "key-1"));
    bencher.bench_local(|| Jwt::parse(black_box(&text)).unwrap());
}

/// What a machine is worth: a thousand dependent multiplications, as in the benchmark of decisions.
#[divan::bench]
fn reference(bencher: Bencher<'_, '_>) {
    let spin = || {
        (0..1_000_u64).fold(black_box(1_u64), |sum, step| {
            sum.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step)
        })
    };
    bencher.counter(1_u32).bench(spin);
}
