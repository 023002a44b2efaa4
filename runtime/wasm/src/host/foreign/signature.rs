//! Signatures: `verify_signature` and `sign`, with RSA (PKCS#1 v1.5) and ECDSA keys.

use crate::abi::Status;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    self as algorithms, EcdsaKeyPair, RsaKeyPair, UnparsedPublicKey, VerificationAlgorithm,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message;

/// `VerifySignatureArguments`.
#[derive(Clone, PartialEq, Message)]
struct Question {
    #[prost(string, tag = "1")]
    hash: String,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    signature: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    text: Vec<u8>,
    #[prost(string, tag = "5")]
    key_pem: String,
}

/// `VerifySignatureResult`.
#[derive(Clone, PartialEq, Message)]
struct Verdict {
    #[prost(bool, tag = "1")]
    result: bool,
    #[prost(string, tag = "2")]
    error: String,
}

/// `SignArguments`.
#[derive(Clone, PartialEq, Message)]
struct Order {
    #[prost(string, tag = "1")]
    hash: String,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    text: Vec<u8>,
    #[prost(string, tag = "4")]
    key_pem: String,
}

/// `SignResult`.
#[derive(Clone, PartialEq, Message)]
struct Signed {
    #[prost(bool, tag = "1")]
    result: bool,
    #[prost(bytes = "vec", tag = "2")]
    signature: Vec<u8>,
    #[prost(string, tag = "3")]
    error: String,
}

/// Whether a text has this signature. A key that is none is a bad argument.
pub(super) fn verify(arguments: &[u8]) -> Result<Vec<u8>, Status> {
    let question = Question::decode(arguments).map_err(|_| Status::BadArgument)?;
    let key = key(&question.key, &question.key_pem)?;
    if !is_public_key(&key) {
        return Err(Status::BadArgument);
    }
    let Some(algorithms) = verifying(&question.hash) else {
        return Ok(Verdict { result: false, error: unsupported(&question.hash) }.encode_to_vec());
    };
    let fits = |algorithm: &&'static dyn VerificationAlgorithm| {
        let key = UnparsedPublicKey::new(*algorithm, &key[..]);
        key.verify(&question.text, &question.signature).is_ok()
    };
    let result = algorithms.iter().any(fits);
    let error = if result { "" } else { "Failed to verify digest." };
    Ok(Verdict { result, error: error.to_owned() }.encode_to_vec())
}

fn unsupported(hash: &str) -> String {
    format!("{hash} is not supported.")
}

/// A key in DER, from either of two fields; not from both.
fn key(der: &[u8], pem: &str) -> Result<Vec<u8>, Status> {
    match (der.is_empty(), pem.is_empty()) {
        (false, true) => Ok(der.to_vec()),
        (true, false) => from_pem(pem).ok_or(Status::BadArgument),
        (true, true) | (false, false) => Err(Status::BadArgument),
    }
}

/// The bytes between the first two lines of dashes.
fn from_pem(pem: &str) -> Option<Vec<u8>> {
    let mut lines = pem.lines().map(str::trim).skip_while(|line| !line.starts_with("-----BEGIN"));
    lines.next()?;
    let text: String = lines.take_while(|line| !line.starts_with("-----END")).collect();
    STANDARD.decode(text).ok()
}

/// Whether the bytes hold a public key of a kind that is verified with.
fn is_public_key(key: &[u8]) -> bool {
    let parsed = |algorithm: &'static dyn VerificationAlgorithm| {
        algorithms::ParsedPublicKey::new(algorithm, key).is_ok()
    };
    parsed(&algorithms::RSA_PKCS1_2048_8192_SHA256)
        || parsed(&algorithms::ECDSA_P256_SHA256_ASN1)
        || parsed(&algorithms::ECDSA_P384_SHA384_ASN1)
        || parsed(&algorithms::ECDSA_P521_SHA512_ASN1)
}

/// The algorithms that go with a hash function. Keys of RSA have 2048 bits at least.
fn verifying(hash: &str) -> Option<&'static [&'static dyn VerificationAlgorithm]> {
    Some(match hash.to_ascii_lowercase().as_str() {
        "sha256" => &[
            &algorithms::RSA_PKCS1_2048_8192_SHA256,
            &algorithms::ECDSA_P256_SHA256_ASN1,
            &algorithms::ECDSA_P384_SHA256_ASN1,
            &algorithms::ECDSA_P521_SHA256_ASN1,
        ],
        "sha384" => &[
            &algorithms::RSA_PKCS1_2048_8192_SHA384,
            &algorithms::ECDSA_P256_SHA384_ASN1,
            &algorithms::ECDSA_P384_SHA384_ASN1,
            &algorithms::ECDSA_P521_SHA384_ASN1,
        ],
        "sha512" => &[&algorithms::RSA_PKCS1_2048_8192_SHA512, &algorithms::ECDSA_P521_SHA512_ASN1],
        _ => return None,
    })
}

/// Signs a text. A key that is none is a bad argument.
pub(super) fn sign(arguments: &[u8]) -> Result<Vec<u8>, Status> {
    let order = Order::decode(arguments).map_err(|_| Status::BadArgument)?;
    let key = key(&order.key, &order.key_pem)?;
    let rsa = RsaKeyPair::from_pkcs8(&key).or_else(|_| RsaKeyPair::from_der(&key)).ok();
    let signature = match &rsa {
        Some(key) => sign_rsa(key, &order),
        None => sign_ecdsa(&key, &order)?,
    };
    let result = signature.is_some();
    let error = if result { String::new() } else { unsupported(&order.hash) };
    Ok(Signed { result, signature: signature.unwrap_or_default(), error }.encode_to_vec())
}

fn sign_rsa(key: &RsaKeyPair, order: &Order) -> Option<Vec<u8>> {
    let padding: &'static dyn algorithms::RsaEncoding = match order.hash.to_ascii_lowercase().as_str() {
        "sha256" => &algorithms::RSA_PKCS1_SHA256,
        "sha384" => &algorithms::RSA_PKCS1_SHA384,
        "sha512" => &algorithms::RSA_PKCS1_SHA512,
        _ => return None,
    };
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(padding, &SystemRandom::new(), &order.text, &mut signature).ok()?;
    Some(signature)
}

/// `None` when the hash function does not go with the key.
fn sign_ecdsa(key: &[u8], order: &Order) -> Result<Option<Vec<u8>>, Status> {
    let kinds = [
        ("sha256", &algorithms::ECDSA_P256_SHA256_ASN1_SIGNING),
        ("sha384", &algorithms::ECDSA_P384_SHA384_ASN1_SIGNING),
        ("sha512", &algorithms::ECDSA_P521_SHA512_ASN1_SIGNING),
    ];
    for (hash, algorithm) in kinds {
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, key)
            .or_else(|_| EcdsaKeyPair::from_private_key_der(algorithm, key));
        let Ok(pair) = pair else { continue };
        if !order.hash.eq_ignore_ascii_case(hash) {
            return Ok(None);
        }
        let signature = pair.sign(&SystemRandom::new(), &order.text);
        return Ok(signature.ok().map(|signature| signature.as_ref().to_vec()));
    }
    Err(Status::BadArgument)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::KeyPair;

    fn signed(key: &[u8], hash: &str) -> Signed {
        let order =
            Order { hash: hash.into(), key: key.to_vec(), text: b"text".to_vec(), key_pem: String::new() };
        Signed::decode(&*sign(&order.encode_to_vec()).unwrap()).unwrap()
    }

    fn verified(key: &[u8], hash: &str, signature: &[u8], text: &[u8]) -> Verdict {
        let question = Question {
            hash: hash.into(),
            key: Vec::new(),
            signature: signature.to_vec(),
            text: text.to_vec(),
            key_pem: format!(
                "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
                STANDARD.encode(key)
            ),
        };
        Verdict::decode(&*verify(&question.encode_to_vec()).unwrap()).unwrap()
    }

    #[test]
    fn what_is_signed_is_verified() {
        let rsa = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let rsa_private: Pkcs8V1Der<'_> = rsa.as_der().unwrap();
        let rsa_public: PublicKeyX509Der<'_> = rsa.public_key().as_der().unwrap();
        let ec = EcdsaKeyPair::generate(&algorithms::ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
        let ec_private = ec.to_pkcs8v1().unwrap();
        let ec_public: PublicKeyX509Der<'_> = ec.public_key().as_der().unwrap();
        for (private, public, hashes) in [
            (rsa_private.as_ref(), rsa_public.as_ref(), &["sha256", "SHA384", "sha512"][..]),
            (ec_private.as_ref(), ec_public.as_ref(), &["sha256"][..]),
        ] {
            for hash in hashes {
                let signed = signed(private, hash);
                assert!(signed.result, "{hash} {}", signed.error);
                assert!(verified(public, hash, &signed.signature, b"text").result, "{hash}");
                let other = verified(public, hash, &signed.signature, b"other");
                assert_eq!((other.result, &*other.error), (false, "Failed to verify digest."));
            }
            let unknown = signed(private, "md5");
            assert_eq!((unknown.result, &*unknown.error), (false, "md5 is not supported."));
            assert_eq!(verified(public, "md5", b"", b"").error, "md5 is not supported.");
        }
    }

    #[test]
    fn keys_that_are_none_are_bad_arguments() {
        assert_eq!(verify(b"1 == 1"), Err(Status::BadArgument));
        assert_eq!(sign(b"1 == 1"), Err(Status::BadArgument));
        for (key, key_pem) in [(vec![], ""), (vec![1, 2], ""), (vec![1], "x"), (vec![], "no pem")] {
            let question = Question { key: key.clone(), key_pem: key_pem.into(), ..Question::default() };
            assert_eq!(verify(&question.encode_to_vec()), Err(Status::BadArgument), "{key:?} {key_pem}");
            let order = Order { key: key.clone(), key_pem: key_pem.into(), ..Order::default() };
            assert_eq!(sign(&order.encode_to_vec()), Err(Status::BadArgument), "{key:?} {key_pem}");
        }
    }
}
