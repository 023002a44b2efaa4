//! The keys of an issuer: JWK Sets (RFC 7517, RFC 7518 §6, RFC 8037), read as Envoy reads them, and signatures verified
//! with them.

use super::TokenError;
use super::json;
use super::token::{Algorithm, BASE64, Jwt};
use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::signature::{self, ParsedPublicKey, RsaPublicKeyComponents, VerificationAlgorithm};
use aws_lc_rs::{digest, hmac};
use base64::Engine;
use serde_json::{Map, Value};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// The most keys of one set.
const KEYS_MAX: usize = 256;

/// Where the keys of an issuer are found while requests are served.
pub trait KeySource: Send + Sync {
    /// The keys as they stand. It never waits.
    fn keys(&self) -> Keys;

    /// Asks for the keys anew because a token names `key_id`, which is not among them, or because there are none yet.
    /// The future resolves when they have been asked for, or when the rule's timeout is over. `None`: asking again
    /// would not help, or has been done too often.
    fn renew(&self, key_id: &str) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>>;
}

/// The keys of an issuer as they stand.
#[derive(Clone, Debug)]
pub enum Keys {
    /// These.
    Known(Arc<KeySet>),
    /// They were given with the rule, and there is none among them.
    Unusable,
    /// They have not been fetched yet, or could not be.
    Missing,
}

/// Keys given with the rule.
pub fn inline_keys(text: &str) -> Arc<dyn KeySource> {
    let keys = match KeySet::parse(text.as_bytes()) {
        Ok(set) => Keys::Known(Arc::new(set)),
        Err(error) => {
            tracing::warn!(%error, "keys of a RequestAuthentication cannot be used: its tokens are refused");
            Keys::Unusable
        }
    };
    Arc::new(Inline(keys))
}

struct Inline(Keys);

impl KeySource for Inline {
    fn keys(&self) -> Keys {
        self.0.clone()
    }

    fn renew(&self, _key_id: &str) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> {
        None
    }
}

/// Why a text is no JWK Set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeySetError {
    /// It is no JSON object.
    #[error("Jwks is an invalid JSON")]
    Json,
    /// It has no `keys`.
    #[error("Jwks does not have [keys] field")]
    NoKeys,
    /// Its `keys` are no list.
    #[error("[keys] in Jwks is not an array")]
    NotAList,
    /// None of its keys can be used.
    #[error("Jwks doesn't have any valid public key")]
    NoValidKeys,
}

/// The keys of an issuer.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
    /// Of the text that the set was read from: equal sets verify the same.
    digest: [u8; 32],
}

#[derive(Debug)]
struct Key {
    /// Empty without one.
    id: String,
    material: Material,
}

/// What verifies, by the algorithms that the key is for.
#[derive(Debug)]
enum Material {
    Public(Vec<(Algorithm, ParsedPublicKey)>),
    Secret(Vec<(Algorithm, hmac::Key)>),
}

impl KeySet {
    /// Reads a JWK Set. Keys that cannot be used are left out, as long as one can.
    ///
    /// # Errors
    /// When it is no set, or none of its keys can be used.
    pub fn parse(text: &[u8]) -> Result<Self, KeySetError> {
        let set = json::object(text).ok_or(KeySetError::Json)?;
        let list = set.get("keys").ok_or(KeySetError::NoKeys)?.as_array().ok_or(KeySetError::NotAList)?;
        let objects = list.iter().filter_map(Value::as_object).take(KEYS_MAX);
        let keys: Vec<Key> = objects.filter_map(Key::read).collect();
        if keys.is_empty() {
            return Err(KeySetError::NoValidKeys);
        }
        let mut of_text = [0; 32];
        of_text.copy_from_slice(digest::digest(&digest::SHA256, text).as_ref());
        Ok(Self { keys, digest: of_text })
    }

    /// What tells this set from others.
    pub(super) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// How many keys can be used.
    pub fn count(&self) -> usize {
        self.keys.len()
    }

    /// Whether one of the keys signed the token. A key is tried when it has the token's `kid` or one of the two has none,
    /// and when it is for the token's `alg`.
    ///
    /// # Errors
    /// When no key may be tried, or none fits the signature.
    pub fn verify(&self, jwt: &Jwt<'_>) -> Result<(), TokenError> {
        let is_named = |key: &&Key| jwt.key_id.is_empty() || key.id.is_empty() || key.id == jwt.key_id;
        let mut outcome = Err(TokenError::NoMatchingKey);
        for key in self.keys.iter().filter(is_named) {
            match key.verify(jwt) {
                None => {}
                Some(Err(TokenError::Signature)) => outcome = Err(TokenError::Signature),
                Some(decided) => return decided,
            }
        }
        outcome
    }
}

impl Key {
    fn read(jwk: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let bytes = |name: &str| BASE64.decode(text(name)?).ok();
        let algorithm: Option<Algorithm> = match text("alg").filter(|text| !text.is_empty()) {
            Some(text) => Some(text.parse().ok()?),
            None => None,
        };
        let material = match text("kty")? {
            "RSA" => rsa(&bytes("n")?, &bytes("e")?, algorithm),
            "EC" => elliptic(text("crv").unwrap_or_default(), &bytes("x")?, &bytes("y")?, algorithm),
            "OKP" if text("crv") == Some("Ed25519") => edwards(&bytes("x")?, algorithm),
            "oct" => secret(&bytes("k")?, algorithm),
            _ => None,
        }?;
        Some(Self { id: text("kid").unwrap_or_default().to_owned(), material })
    }

    /// `None` when the key is not for the token's algorithm.
    fn verify(&self, jwt: &Jwt<'_>) -> Option<Result<(), TokenError>> {
        let signed = jwt.signed.as_bytes();
        let fits = match &self.material {
            Material::Public(keys) => {
                let (_, key) = keys.iter().find(|(algorithm, _)| *algorithm == jwt.algorithm)?;
                if jwt.algorithm == Algorithm::EdDsa && jwt.signature.len() != 64 {
                    return Some(Err(TokenError::Ed25519Length));
                }
                key.verify_sig(signed, &jwt.signature).is_ok()
            }
            Material::Secret(keys) => {
                let (_, key) = keys.iter().find(|(algorithm, _)| *algorithm == jwt.algorithm)?;
                hmac::verify(key, signed, &jwt.signature).is_ok()
            }
        };
        Some(if fits { Ok(()) } else { Err(TokenError::Signature) })
    }
}

/// The key under each algorithm of its kind, or under `only` that one if the key names it.
fn public(
    bytes: &[u8],
    kind: &[(Algorithm, &'static dyn VerificationAlgorithm)],
    only: Option<Algorithm>,
) -> Option<Material> {
    let wanted = kind.iter().filter(|(algorithm, _)| only.is_none_or(|only| only == *algorithm));
    let keys: Vec<_> = wanted
        .map(|(algorithm, verifier)| Some((*algorithm, ParsedPublicKey::new(*verifier, bytes).ok()?)))
        .collect::<Option<_>>()?;
    (!keys.is_empty()).then_some(Material::Public(keys))
}

/// RSA keys have 2,048 to 8,192 bits (RFC 7518 §3.3) and one of the two usual exponents.
fn rsa(modulus: &[u8], exponent: &[u8], algorithm: Option<Algorithm>) -> Option<Material> {
    const KIND: [(Algorithm, &dyn VerificationAlgorithm); 6] = [
        (Algorithm::Rs256, &signature::RSA_PKCS1_2048_8192_SHA256),
        (Algorithm::Rs384, &signature::RSA_PKCS1_2048_8192_SHA384),
        (Algorithm::Rs512, &signature::RSA_PKCS1_2048_8192_SHA512),
        (Algorithm::Ps256, &signature::RSA_PSS_2048_8192_SHA256),
        (Algorithm::Ps384, &signature::RSA_PSS_2048_8192_SHA384),
        (Algorithm::Ps512, &signature::RSA_PSS_2048_8192_SHA512),
    ];
    let (modulus, exponent) = (without_zeros(modulus), without_zeros(exponent));
    if !matches!(exponent, [3] | [1, 0, 1]) || !(256..=1024).contains(&modulus.len()) {
        return None;
    }
    let der: PublicKeyX509Der<'_> = RsaPublicKeyComponents { n: modulus, e: exponent }.as_der().ok()?;
    public(der.as_ref(), &KIND, algorithm)
}

fn elliptic(curve: &str, x: &[u8], y: &[u8], algorithm: Option<Algorithm>) -> Option<Material> {
    let (kind, size): ((Algorithm, &'static dyn VerificationAlgorithm), usize) = match (curve, algorithm) {
        ("P-256", _) | ("", None | Some(Algorithm::Es256)) => {
            ((Algorithm::Es256, &signature::ECDSA_P256_SHA256_FIXED), 32)
        }
        ("P-384", _) | ("", Some(Algorithm::Es384)) => {
            ((Algorithm::Es384, &signature::ECDSA_P384_SHA384_FIXED), 48)
        }
        ("P-521", _) | ("", Some(Algorithm::Es512)) => {
            ((Algorithm::Es512, &signature::ECDSA_P521_SHA512_FIXED), 66)
        }
        _ => return None,
    };
    // An uncompressed point: both coordinates in full length.
    let mut point = vec![4];
    for coordinate in [without_zeros(x), without_zeros(y)] {
        point.resize(point.len() + size.checked_sub(coordinate.len())?, 0);
        point.extend_from_slice(coordinate);
    }
    public(&point, &[kind], algorithm)
}

fn edwards(x: &[u8], algorithm: Option<Algorithm>) -> Option<Material> {
    public(x, &[(Algorithm::EdDsa, &signature::ED25519)], algorithm)
}

fn secret(bytes: &[u8], algorithm: Option<Algorithm>) -> Option<Material> {
    const KIND: [(Algorithm, hmac::Algorithm); 3] = [
        (Algorithm::Hs256, hmac::HMAC_SHA256),
        (Algorithm::Hs384, hmac::HMAC_SHA384),
        (Algorithm::Hs512, hmac::HMAC_SHA512),
    ];
    let wanted = KIND.iter().filter(|(kind, _)| algorithm.is_none_or(|only| only == *kind));
    let keys: Vec<_> = wanted.map(|(kind, hash)| (*kind, hmac::Key::new(*hash, bytes))).collect();
    (!keys.is_empty() && !bytes.is_empty()).then_some(Material::Secret(keys))
}

fn without_zeros(mut number: &[u8]) -> &[u8] {
    while let [0, rest @ ..] = number {
        number = rest;
    }
    number
}
