//! Tokens and key sets: both are texts from outside the mesh.

use cairn_builtin::{Jwt, KeySet};

/// A key set, a zero byte, and a token.
pub fn jwt(data: &[u8]) {
    let (keys, token) = match data.iter().position(|byte| *byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (&b"{\"keys\":[]}"[..], data),
    };
    let keys = KeySet::parse(keys);
    let Ok(text) = std::str::from_utf8(token) else { return };
    let Ok(token) = Jwt::parse(text) else { return };
    assert!(text.starts_with(token.signed) && token.signed.ends_with(token.payload_text));
    let (early, late) = (token.terms.hold_at(0, 60), token.terms.hold_at(u64::MAX, 60));
    if token.terms.not_before > 60 {
        assert!(early.is_err(), "a token holds before its time");
    }
    if token.terms.expires.is_some_and(|expires| expires < u64::MAX - 60) {
        assert!(late.is_err(), "a token holds after its time");
    }
    if let Ok(keys) = keys {
        let verified = keys.verify(&token);
        assert!(keys.count() > 0 || verified.is_err(), "verified without a key");
    }
}
