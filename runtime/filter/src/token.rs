//! What a verified token says of the requester.

use serde_json::{Map, Value};
use std::sync::Arc;

/// The payload of a token that was verified, as authorization, routes, logs and plugins see it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Token {
    principal: String,
    payload: Map<String, Value>,
}

impl Token {
    /// A token with this payload, in which claims that are lists separated by spaces are lists already.
    pub fn new(payload: Map<String, Value>) -> Self {
        let text = |name: &str| payload.get(name).and_then(Value::as_str).unwrap_or_default();
        let principal = format!("{}/{}", text("iss"), text("sub"));
        Self { principal, payload }
    }

    /// `issuer/subject`: Istio's `request.auth.principal`.
    pub fn principal(&self) -> &str {
        &self.principal
    }

    /// All claims.
    pub fn payload(&self) -> &Map<String, Value> {
        &self.payload
    }

    /// The claim at `path`, which descends through objects only: a list cannot be traversed (Envoy's metadata matcher).
    pub fn claim(&self, path: &[Arc<str>]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.payload.get(&**first)?, |value, name| value.as_object()?.get(&**name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_found_through_objects_and_not_through_lists() {
        let payload = serde_json::json!({
            "iss": "issuer", "sub": "me", "a": { "b": { "c": 1 } }, "list": [{ "b": 2 }], "a.b": 3,
        });
        let Value::Object(payload) = payload else { panic!("an object") };
        let token = Token::new(payload);
        assert_eq!(token.principal(), "issuer/me");
        for (path, expected) in [
            (&["a", "b", "c"][..], Some(Value::from(1))),
            (&["a.b"], Some(Value::from(3))),
            (&["list", "b"], None),
            (&["a", "x"], None),
            (&["iss", "x"], None),
            (&[], None),
        ] {
            let names: Vec<Arc<str>> = path.iter().map(|name| Arc::from(*name)).collect();
            assert_eq!(token.claim(&names), expected.as_ref(), "{path:?}");
        }
    }
}
