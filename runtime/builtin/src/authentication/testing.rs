//! For tests and benchmarks: issuers that sign tokens with keys of their own.

use aws_lc_rs::encoding::{AsBigEndian, EcPublicKeyUncompressedBin};
use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaEncoding, RsaKeyPair};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use serde_json::{Value, json};

/// Somebody who signs.
pub struct Signer {
    algorithm: &'static str,
    key_id: &'static str,
    key: Key,
}

enum Key {
    Rsa(Box<RsaKeyPair>, &'static dyn RsaEncoding),
    Elliptic(Box<EcdsaKeyPair>, &'static str),
    Edwards(Ed25519KeyPair),
    Secret(Box<hmac::Key>, Vec<u8>),
}

impl Signer {
    /// A signer with a new key.
    pub fn new(algorithm: &'static str, key_id: &'static str) -> Self {
        let rsa = |encoding| Key::Rsa(Box::new(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()), encoding);
        let elliptic = |kind, curve| Key::Elliptic(Box::new(EcdsaKeyPair::generate(kind).unwrap()), curve);
        let secret = |kind| {
            let bytes: Vec<u8> = (0..64).map(|at| at * 3 + 1).collect();
            Key::Secret(Box::new(hmac::Key::new(kind, &bytes)), bytes)
        };
        let key = match algorithm {
            "RS256" => rsa(&signature::RSA_PKCS1_SHA256),
            "RS384" => rsa(&signature::RSA_PKCS1_SHA384),
            "RS512" => rsa(&signature::RSA_PKCS1_SHA512),
            "PS256" => rsa(&signature::RSA_PSS_SHA256),
            "PS384" => rsa(&signature::RSA_PSS_SHA384),
            "PS512" => rsa(&signature::RSA_PSS_SHA512),
            "ES256" => elliptic(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, "P-256"),
            "ES384" => elliptic(&signature::ECDSA_P384_SHA384_FIXED_SIGNING, "P-384"),
            "ES512" => elliptic(&signature::ECDSA_P521_SHA512_FIXED_SIGNING, "P-521"),
            "EdDSA" => Key::Edwards(Ed25519KeyPair::generate().unwrap()),
            "HS256" => secret(hmac::HMAC_SHA256),
            "HS384" => secret(hmac::HMAC_SHA384),
            "HS512" => secret(hmac::HMAC_SHA512),
            other => panic!("{other}"),
        };
        Self { algorithm, key_id, key }
    }

    /// The public key, or the secret.
    pub fn jwk(&self) -> Value {
        let mut jwk = match &self.key {
            Key::Rsa(pair, _) => {
                let public = pair.public_key();
                let (n, e) = (public.modulus(), public.exponent());
                let text = |bytes: &[u8]| BASE64.encode(bytes);
                json!({
                    "kty": "RSA",
                    "n": text(n.big_endian_without_leading_zero()),
                    "e": text(e.big_endian_without_leading_zero()),
                })
            }
            Key::Elliptic(pair, curve) => {
                let point: EcPublicKeyUncompressedBin<'_> = pair.public_key().as_be_bytes().unwrap();
                let (x, y) = point.as_ref()[1..].split_at(point.as_ref().len() / 2);
                json!({ "kty": "EC", "crv": curve, "x": BASE64.encode(x), "y": BASE64.encode(y) })
            }
            Key::Edwards(pair) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "x": BASE64.encode(pair.public_key()) })
            }
            Key::Secret(_, bytes) => json!({ "kty": "oct", "k": BASE64.encode(bytes) }),
        };
        if !self.key_id.is_empty() {
            jwk["kid"] = self.key_id.into();
        }
        jwk
    }

    /// A set with these keys.
    pub fn set(keys: &[Value]) -> String {
        json!({ "keys": keys }).to_string()
    }

    /// A token with these claims.
    pub fn sign(&self, payload: &Value) -> String {
        let mut header = json!({ "alg": self.algorithm, "typ": "JWT" });
        if !self.key_id.is_empty() {
            header["kid"] = self.key_id.into();
        }
        self.sign_as(&header, payload)
    }

    /// A token whose header says what it will.
    pub fn sign_as(&self, header: &Value, payload: &Value) -> String {
        let signed = format!("{}.{}", BASE64.encode(header.to_string()), BASE64.encode(payload.to_string()));
        let random = SystemRandom::new();
        let message = signed.as_bytes();
        let signature = match &self.key {
            Key::Rsa(pair, encoding) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(*encoding, &random, message, &mut signature).unwrap();
                signature
            }
            Key::Elliptic(pair, _) => pair.sign(&random, message).unwrap().as_ref().to_vec(),
            Key::Edwards(pair) => pair.sign(message).as_ref().to_vec(),
            Key::Secret(key, _) => hmac::sign(key, message).as_ref().to_vec(),
        };
        format!("{signed}.{}", BASE64.encode(signature))
    }
}
