//! Why a token is not accepted: each in Envoy's own words, which clients and log searches know.

use http::StatusCode;

/// Why a token, or a request's tokens, are not accepted. The text is what the client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// Not three parts with two dots.
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    /// The header is not base64url.
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderEncoding,
    /// The header is no JSON object.
    #[error("Jwt header is an invalid JSON")]
    HeaderJson,
    /// The header has no `alg`, or it is no text.
    #[error("Jwt header [alg] field is required and must be a string")]
    Algorithm,
    /// `alg` is none that is accepted.
    #[error("Jwt header [alg] is not supported")]
    AlgorithmNotSupported,
    /// `kid` is no text.
    #[error("Jwt header [kid] field is not a string")]
    KeyId,
    /// The payload is not base64url.
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadEncoding,
    /// The payload is no JSON object.
    #[error("Jwt payload is an invalid JSON")]
    PayloadJson,
    /// `iss` is no text.
    #[error("Jwt payload [iss] field is not a string")]
    Issuer,
    /// `sub` is no text.
    #[error("Jwt payload [sub] field is not a string")]
    Subject,
    /// `jti` is no text.
    #[error("Jwt payload [jti] field is not a string")]
    TokenId,
    /// `aud` is neither a text nor a list of texts.
    #[error("Jwt payload [aud] field is not a string or string list")]
    Audience,
    /// `iat` is no number.
    #[error("Jwt payload [iat] field is not an integer")]
    IssuedAt,
    /// `iat` is out of range.
    #[error("Jwt payload [iat] field is not a positive 64 bit integer")]
    IssuedAtRange,
    /// `nbf` is no number.
    #[error("Jwt payload [nbf] field is not an integer")]
    NotBefore,
    /// `nbf` is out of range.
    #[error("Jwt payload [nbf] field is not a positive 64 bit integer")]
    NotBeforeRange,
    /// `exp` is no number.
    #[error("Jwt payload [exp] field is not an integer")]
    Expires,
    /// `exp` is out of range.
    #[error("Jwt payload [exp] field is not a positive 64 bit integer")]
    ExpiresRange,
    /// The signature is not base64url.
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureEncoding,
    /// No rule is for this issuer.
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    /// Its time has not come.
    #[error("Jwt not yet valid")]
    NotYetValid,
    /// Its time is over.
    #[error("Jwt is expired")]
    Expired,
    /// It is for somebody else.
    #[error("Audiences in Jwt are not allowed")]
    AudienceNotAllowed,
    /// No key verifies it.
    #[error("Jwt verification fails")]
    Signature,
    /// An Ed25519 signature that cannot be one.
    #[error("Jwt ED25519 signature is wrong length")]
    Ed25519Length,
    /// The issuer has no such key.
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoMatchingKey,
    /// The issuer's keys are here, and none can be used.
    #[error("Jwks doesn't have any valid public key")]
    NoValidKeys,
    /// The issuer's keys cannot be had.
    #[error("Jwks remote fetch is failed")]
    KeysNotFetched,
}

impl TokenError {
    /// The status of the answer: 403 for who is known and not meant, 401 for all else.
    pub fn status(self) -> StatusCode {
        match self {
            Self::AudienceNotAllowed => StatusCode::FORBIDDEN,
            _ => StatusCode::UNAUTHORIZED,
        }
    }

    /// Envoy's `%RESPONSE_CODE_DETAILS%`.
    pub fn details(self) -> String {
        format!("jwt_authn_access_denied{{{}}}", self.to_string().replace(' ', "_"))
    }
}
