//! A token as it was sent, taken apart and not believed yet (RFC 7519, RFC 7515 compact form).

use super::TokenError;
use super::json;
use base64::Engine;
use base64::engine::general_purpose::GeneralPurpose;
use base64::engine::{DecodePaddingMode, GeneralPurposeConfig};
use serde_json::{Map, Value};
use std::str::FromStr;

/// The longest token that is looked at. Heads of requests are bounded below this.
const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// Base64url. Padding should not be there (RFC 7515 §2) but some issuers send it, and Envoy takes it.
pub(super) const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The same for what is signed as text, so that it cannot be spelt anew: stray bits in its last letter harm nobody, and Envoy
/// takes them.
const SIGNED_BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// How a token is signed (RFC 7518 §3.1, RFC 8037).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// HMAC with SHA-256.
    Hs256,
    /// HMAC with SHA-384.
    Hs384,
    /// HMAC with SHA-512.
    Hs512,
    /// RSA PKCS #1 v1.5 with SHA-256.
    Rs256,
    /// RSA PKCS #1 v1.5 with SHA-384.
    Rs384,
    /// RSA PKCS #1 v1.5 with SHA-512.
    Rs512,
    /// RSA PSS with SHA-256.
    Ps256,
    /// RSA PSS with SHA-384.
    Ps384,
    /// RSA PSS with SHA-512.
    Ps512,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// ECDSA on P-384 with SHA-384.
    Es384,
    /// ECDSA on P-521 with SHA-512.
    Es512,
    /// Ed25519.
    EdDsa,
}

impl FromStr for Algorithm {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        Ok(match text {
            "HS256" => Self::Hs256,
            "HS384" => Self::Hs384,
            "HS512" => Self::Hs512,
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "EdDSA" => Self::EdDsa,
            _ => return Err(TokenError::AlgorithmNotSupported),
        })
    }
}

/// A token taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Jwt<'a> {
    /// How it says it is signed.
    pub algorithm: Algorithm,
    /// The key it names; empty: none.
    pub key_id: String,
    /// All claims.
    pub payload: Map<String, Value>,
    /// The claims that decide whether it holds.
    pub terms: Terms,
    /// What is signed: header and payload as sent.
    pub signed: &'a str,
    /// The payload as sent.
    pub payload_text: &'a str,
    /// The signature.
    pub signature: Vec<u8>,
}

/// Whose token it is, for whom, and when.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Terms {
    /// `iss`; empty without one.
    pub issuer: String,
    /// `aud`.
    pub audiences: Vec<String>,
    /// `nbf` in seconds since 1970; 0 without one.
    pub not_before: u64,
    /// `exp` in seconds since 1970; `None` without one.
    pub expires: Option<u64>,
}

impl<'a> Jwt<'a> {
    /// Takes a token apart, in the order in which Envoy does, so that of several things that are wrong the same is said.
    /// Nothing is verified. Bytes are an attacker's: this is the entry for fuzzing.
    ///
    /// # Errors
    /// With the first thing that is wrong.
    pub fn parse(text: &'a str) -> Result<Self, TokenError> {
        let [header_text, payload_text, signature] = sections(text).ok_or(TokenError::Form)?;
        let header = SIGNED_BASE64.decode(header_text).map_err(|_| TokenError::HeaderEncoding)?;
        let header = json::object(&header).ok_or(TokenError::HeaderJson)?;
        let algorithm = header.get("alg").and_then(Value::as_str).ok_or(TokenError::Algorithm)?.parse()?;
        let key_id = text_of(&header, "kid", TokenError::KeyId)?.to_owned();
        let payload = SIGNED_BASE64.decode(payload_text).map_err(|_| TokenError::PayloadEncoding)?;
        let payload = json::object(&payload).ok_or(TokenError::PayloadJson)?;
        let terms = Terms::read(&payload)?;
        let signature = BASE64.decode(signature).map_err(|_| TokenError::SignatureEncoding)?;
        // Envoy would take more dots between the sections. A token has one spelling.
        let (signed, _) = text.rsplit_once('.').ok_or(TokenError::Form)?;
        if signed.len() != header_text.len() + 1 + payload_text.len() {
            return Err(TokenError::Form);
        }
        Ok(Self { algorithm, key_id, payload, terms, signed, payload_text, signature })
    }
}

/// Header, payload and signature: all that stands between dots, and is not empty.
fn sections(text: &str) -> Option<[&str; 3]> {
    if text.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let mut sections = text.split('.').filter(|section| !section.is_empty());
    let all = [sections.next()?, sections.next()?, sections.next()?];
    sections.next().is_none().then_some(all)
}

impl Terms {
    fn read(payload: &Map<String, Value>) -> Result<Self, TokenError> {
        let issuer = text_of(payload, "iss", TokenError::Issuer)?.to_owned();
        text_of(payload, "sub", TokenError::Subject)?;
        seconds(payload, "iat", TokenError::IssuedAt, TokenError::IssuedAtRange)?;
        let not_before = seconds(payload, "nbf", TokenError::NotBefore, TokenError::NotBeforeRange)?;
        let expires = seconds(payload, "exp", TokenError::Expires, TokenError::ExpiresRange)?;
        text_of(payload, "jti", TokenError::TokenId)?;
        let audiences = audiences(payload).ok_or(TokenError::Audience)?;
        Ok(Self { issuer, audiences, not_before: not_before.unwrap_or(0), expires })
    }

    /// Whether the token holds at `now`, in seconds since 1970, with clocks that may differ by `skew`.
    ///
    /// # Errors
    /// When it does not hold yet, or no longer.
    pub fn hold_at(&self, now: u64, skew: u64) -> Result<(), TokenError> {
        if now.saturating_add(skew) < self.not_before {
            return Err(TokenError::NotYetValid);
        }
        match self.expires {
            Some(expires) if now > expires.saturating_add(skew) => Err(TokenError::Expired),
            _ => Ok(()),
        }
    }
}

/// The text `name`, empty when it is not there.
fn text_of<'a>(map: &'a Map<String, Value>, name: &str, wrong: TokenError) -> Result<&'a str, TokenError> {
    match map.get(name) {
        None => Ok(""),
        Some(value) => value.as_str().ok_or(wrong),
    }
}

/// A time: any number from 0 up to what 64 bits hold, its fraction dropped.
fn seconds(
    map: &Map<String, Value>,
    name: &str,
    wrong: TokenError,
    out_of_range: TokenError,
) -> Result<Option<u64>, TokenError> {
    let Some(value) = map.get(name) else { return Ok(None) };
    if let Some(whole) = value.as_u64() {
        return Ok(Some(whole));
    }
    let number = value.as_f64().ok_or(wrong)?;
    if number < 0.0 || number >= u64::MAX as f64 {
        return Err(out_of_range);
    }
    Ok(Some(number as u64))
}

fn audiences(payload: &Map<String, Value>) -> Option<Vec<String>> {
    match payload.get("aud") {
        None => Some(Vec::new()),
        Some(Value::String(one)) => Some(vec![one.clone()]),
        Some(Value::Array(list)) => list.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(header: &str, payload: &str) -> String {
        format!("{}.{}.c2ln", BASE64.encode(header), BASE64.encode(payload))
    }

    const HEADER: &str = r#"{"alg":"RS256"}"#;

    #[test]
    fn a_token_is_taken_apart() {
        let text = token(
            r#"{"alg":"ES512","kid":"k1","typ":"JWT"}"#,
            r#"{"iss":"me","sub":"you","aud":["a","b"],"nbf":1.9,"exp":2e3,"iat":0,"x":{"y":[1]}}"#,
        );
        let jwt = Jwt::parse(&text).unwrap();
        assert_eq!((jwt.algorithm, &*jwt.key_id), (Algorithm::Es512, "k1"));
        let audiences = vec!["a".to_owned(), "b".to_owned()];
        let terms = Terms { issuer: "me".into(), audiences, not_before: 1, expires: Some(2000) };
        assert_eq!(jwt.terms, terms);
        assert_eq!(jwt.signature, b"sig");
        assert_eq!(format!("{}.c2ln", jwt.signed), text);
        assert!(jwt.signed.ends_with(jwt.payload_text));
        assert_eq!(jwt.payload["x"]["y"][0], 1);
    }

    #[test]
    fn the_first_thing_wrong_is_said_in_envoys_words() {
        let payload = |fields: &str| token(HEADER, fields);
        for (name, text, expected) in [
            (
                "empty",
                String::new(),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            (
                "one dot",
                "a.b".into(),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            (
                "three dots",
                "a.b.c.d".into(),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            (
                "no signature",
                "a.b.".into(),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            (
                "no header",
                ".b.c".into(),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            (
                "no payload",
                "a..c".into(),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            ("header encoding", "a+b=.b.c".into(), "Jwt header is an invalid Base64url encoded"),
            ("header JSON", format!("{}.b.c", BASE64.encode("{")), "Jwt header is an invalid JSON"),
            ("header is a list", format!("{}.b.c", BASE64.encode("[]")), "Jwt header is an invalid JSON"),
            ("no alg", token("{}", "{}"), "Jwt header [alg] field is required and must be a string"),
            (
                "alg is a number",
                token(r#"{"alg":1}"#, "{}"),
                "Jwt header [alg] field is required and must be a string",
            ),
            ("alg none", token(r#"{"alg":"none"}"#, "{}"), "Jwt header [alg] is not supported"),
            ("alg in lower case", token(r#"{"alg":"rs256"}"#, "{}"), "Jwt header [alg] is not supported"),
            (
                "kid is a number",
                token(r#"{"alg":"RS256","kid":1}"#, "{}"),
                "Jwt header [kid] field is not a string",
            ),
            (
                "payload encoding",
                format!("{}.!.c", BASE64.encode(HEADER)),
                "Jwt payload is an invalid Base64url encoded",
            ),
            ("payload JSON", payload("x"), "Jwt payload is an invalid JSON"),
            ("a claim twice", payload(r#"{"sub":"a","sub":"b"}"#), "Jwt payload is an invalid JSON"),
            ("iss", payload(r#"{"iss":1}"#), "Jwt payload [iss] field is not a string"),
            ("iss is null", payload(r#"{"iss":null}"#), "Jwt payload [iss] field is not a string"),
            ("sub", payload(r#"{"sub":[]}"#), "Jwt payload [sub] field is not a string"),
            ("iat", payload(r#"{"iat":"1"}"#), "Jwt payload [iat] field is not an integer"),
            (
                "iat below zero",
                payload(r#"{"iat":-1}"#),
                "Jwt payload [iat] field is not a positive 64 bit integer",
            ),
            ("nbf", payload(r#"{"nbf":true}"#), "Jwt payload [nbf] field is not an integer"),
            (
                "nbf too large",
                payload(r#"{"nbf":1e20}"#),
                "Jwt payload [nbf] field is not a positive 64 bit integer",
            ),
            ("exp", payload(r#"{"exp":{}}"#), "Jwt payload [exp] field is not an integer"),
            (
                "exp below zero",
                payload(r#"{"exp":-0.5}"#),
                "Jwt payload [exp] field is not a positive 64 bit integer",
            ),
            ("jti", payload(r#"{"jti":1}"#), "Jwt payload [jti] field is not a string"),
            ("aud", payload(r#"{"aud":1}"#), "Jwt payload [aud] field is not a string or string list"),
            (
                "aud in a list",
                payload(r#"{"aud":["a",1]}"#),
                "Jwt payload [aud] field is not a string or string list",
            ),
            (
                "signature encoding",
                format!("{}!", payload("{}")),
                "Jwt signature is an invalid Base64url encoded",
            ),
            (
                "good but for a dot before it",
                format!(".{}", payload("{}")),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            (
                "good but for two dots",
                payload("{}").replacen('.', "..", 1),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            (
                "good but for a dot behind it",
                format!("{}.", payload("{}")),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
            ("more dots, and a payload", "a+b=..b.c".into(), "Jwt header is an invalid Base64url encoded"),
            (
                "stray bits in the signature",
                payload("{}").replace("c2ln", "c2l"),
                "Jwt signature is an invalid Base64url encoded",
            ),
            (
                "too long",
                format!("{}.b.c", "a".repeat(TOKEN_BYTES_MAX)),
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            ),
        ] {
            assert_eq!(Jwt::parse(&text).unwrap_err().to_string(), expected, "{name}");
        }
    }

    #[test]
    fn times_hold_with_clocks_a_minute_apart() {
        let terms = Terms { not_before: 1000, expires: Some(2000), ..Terms::default() };
        for (now, expected) in [
            (939, Err(TokenError::NotYetValid)),
            (940, Ok(())),
            (2060, Ok(())),
            (2061, Err(TokenError::Expired)),
            (u64::MAX, Err(TokenError::Expired)),
        ] {
            assert_eq!(terms.hold_at(now, 60), expected, "{now}");
        }
        assert_eq!(Terms::default().hold_at(u64::MAX, 60), Ok(()), "no times, no limit");
        let forever = Terms { expires: Some(u64::MAX), ..Terms::default() };
        assert_eq!(forever.hold_at(5, 60), Ok(()));
    }

    #[test]
    fn stray_bits_of_what_is_signed_do_not_matter() {
        let header = BASE64.encode(r#"{"alg":"EdDSA"} "#);
        assert!(header.ends_with("IA=="));
        let text = format!("{}B.e30.c2ln", &header[..header.len() - 3]);
        assert_eq!(Jwt::parse(&text).unwrap().algorithm, Algorithm::EdDsa);
    }

    #[test]
    fn padding_does_not_matter() {
        let text = format!("{}.e30=.c2k=", BASE64.encode(r#"{"alg":"EdDSA"}"#));
        assert_eq!(Jwt::parse(&text).unwrap().signature, b"si");
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,200}", header in ".{0,40}", payload in ".{0,80}") {
            let _nothing = Jwt::parse(&text).is_ok();
            let _nothing = Jwt::parse(&token(&header, &payload)).is_ok();
        }
    }
}
