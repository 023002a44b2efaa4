//! Hashes of passwords: `{SSHA256}` with base64 of SHA-256 over password and salt, then the salt, as directories keep them, and
//! `$pbkdf2-sha256$ITERATIONS$SALT$HASH` with both in base64 (RFC 8018), which is slow on purpose.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

const HASH_BYTES: usize = 32;
/// A proxy computes this while others wait.
const ITERATIONS_MAX: u32 = 100_000;

/// A salted hash.
#[derive(Debug)]
pub(crate) struct Password {
    hash: [u8; HASH_BYTES],
    salt: Vec<u8>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Salted,
    Stretched { iterations: u32 },
}

impl Password {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some(encoded) = text.strip_prefix("{SSHA256}") {
            let bytes = decode(encoded.as_bytes()).ok_or("the hash is not base64")?;
            let (hash, salt) = bytes.split_first_chunk().ok_or("the hash is too short")?;
            if salt.is_empty() {
                return Err("the hash has no salt".to_owned());
            }
            return Ok(Self { hash: *hash, salt: salt.to_vec(), kind: Kind::Salted });
        }
        let fields = text
            .strip_prefix("$pbkdf2-sha256$")
            .ok_or("the hash is neither `{SSHA256}…` nor `$pbkdf2-sha256$…`")?;
        let [iterations, salt, hash] = fields.split('$').collect::<Vec<_>>()[..] else {
            return Err("it is not `$pbkdf2-sha256$ITERATIONS$SALT$HASH`".to_owned());
        };
        let iterations = iterations.parse().ok().filter(|count| (1..=ITERATIONS_MAX).contains(count));
        let iterations = iterations.ok_or_else(|| format!("iterations are 1 to {ITERATIONS_MAX}"))?;
        let salt = decode(salt.as_bytes()).ok_or("the salt is not base64")?;
        let hash = decode(hash.as_bytes()).and_then(|hash| hash.try_into().ok());
        let hash = hash.ok_or_else(|| format!("the hash is not base64 of {HASH_BYTES} bytes"))?;
        Ok(Self { hash, salt, kind: Kind::Stretched { iterations } })
    }

    /// Whether this is the password. Takes the same time however much of it is right.
    pub(crate) fn is(&self, given: &[u8]) -> bool {
        let hash = match self.kind {
            Kind::Salted => Sha256::new().chain_update(given).chain_update(&self.salt).finalize().into(),
            Kind::Stretched { iterations } => stretch(given, &self.salt, iterations),
        };
        let difference = hash.iter().zip(self.hash).fold(0, |all, (a, b)| all | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

pub(crate) fn decode(text: &[u8]) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

#[cfg(test)]
pub(crate) fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// The first block of PBKDF2 (RFC 8018 §5.2), which is all that is needed.
fn stretch(password: &[u8], salt: &[u8], iterations: u32) -> [u8; HASH_BYTES] {
    let keyed = Keyed::new(password);
    let mut block = keyed.hash(&[salt, &1u32.to_be_bytes()]);
    let mut all = block;
    for _ in 1..iterations {
        block = keyed.hash(&[&block]);
        all.iter_mut().zip(block).for_each(|(all, one)| *all ^= one);
    }
    all
}

/// HMAC-SHA-256 (RFC 2104) of one key.
struct Keyed {
    inner: Sha256,
    outer: Sha256,
}

impl Keyed {
    fn new(key: &[u8]) -> Self {
        const BLOCK_BYTES: usize = 64;
        let mut block = [0; BLOCK_BYTES];
        let hashed;
        let key = if key.len() > BLOCK_BYTES {
            hashed = Sha256::digest(key);
            hashed.as_slice()
        } else {
            key
        };
        block[..key.len()].copy_from_slice(key);
        let with = |pad: u8| Sha256::new_with_prefix(block.map(|byte| byte ^ pad));
        Self { inner: with(0x36), outer: with(0x5c) }
    }

    fn hash(&self, parts: &[&[u8]]) -> [u8; HASH_BYTES] {
        let inner = parts.iter().fold(self.inner.clone(), |hash, part| hash.chain_update(part));
        self.outer.clone().chain_update(inner.finalize()).finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7914 §11.
    #[test]
    fn stretching_gives_the_published_result() {
        let hash = stretch(b"passwd", b"salt", 1);
        assert_eq!(hash[..8], [0x55, 0xac, 0x04, 0x6e, 0x56, 0xe3, 0x08, 0x9f]);
        assert_eq!(
            stretch(&[b'x'; 100], b"salt", 2),
            stretch(Sha256::digest([b'x'; 100]).as_slice(), b"salt", 2)
        );
    }
}
