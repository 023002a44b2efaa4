//! Secret, of the one type that is read: `kubernetes.io/dockerconfigjson`.

use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::Findings;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cairn_mesh::{Change, PullSecret};
use serde_json::Value;

/// The type of Secret that has a docker configuration, and the key it is under.
const TYPE: &str = "kubernetes.io/dockerconfigjson";
const KEY: &str = ".dockerconfigjson";

/// Who we are to registries. Secrets of other types are none of ours.
pub(super) fn decode(object: &Object, findings: &mut Findings) -> Vec<Change> {
    let field = |map: &str| object.spec.get(map).and_then(|map| map.get(KEY)).and_then(Value::as_str);
    if object.spec.get("type").and_then(Value::as_str) != Some(TYPE) {
        return Vec::new();
    }
    // `stringData` wins over `data`, as in Kubernetes.
    let at = |map: &str| FieldPath::of(&[map, KEY]);
    let config = match (field("stringData"), field("data")) {
        (Some(text), _) => Some(text.to_owned()),
        (None, Some(encoded)) => {
            let encoded: String = encoded.split_whitespace().collect();
            STANDARD.decode(encoded).ok().and_then(|bytes| String::from_utf8(bytes).ok())
        }
        (None, None) => {
            findings.refuse("missing-field", &FieldPath::of(&["data"]), format!("must have `{KEY}`"));
            return Vec::new();
        }
    };
    // What is in it stays out of the finding.
    let is_json = |text: &String| serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object());
    let Some(config) = config.filter(is_json) else {
        findings.refuse("invalid-value", &at("data"), "is not a docker configuration");
        return Vec::new();
    };
    vec![Change::PullSecret(PullSecret { name: object.name.clone(), config: config.into() })]
}
