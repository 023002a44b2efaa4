//! What filters tell each other and the log of an exchange, under the names that Envoy's filters use (its dynamic metadata).

use serde_json::{Map, Value};

/// Values by the namespace of the filter that wrote them, and by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(Option<Box<Map<String, Value>>>);

/// The most namespaces of one exchange; there are few filters that write any.
const NAMESPACES_MAX: usize = 32;

impl Metadata {
    /// Writes `values` into a namespace, over those of the same keys.
    pub fn merge(&mut self, namespace: &str, values: Map<String, Value>) {
        let all = self.0.get_or_insert_default();
        if all.len() >= NAMESPACES_MAX && !all.contains_key(namespace) {
            return;
        }
        let known = all.entry(namespace).or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(known) = known {
            known.extend(values);
        }
    }

    /// Writes all of `other`.
    pub fn merge_all(&mut self, other: Self) {
        for (namespace, values) in other.0.into_iter().flat_map(|all| *all) {
            if let Value::Object(values) = values {
                self.merge(&namespace, values);
            }
        }
    }

    /// Writes one value.
    pub fn set(&mut self, namespace: &str, key: impl Into<String>, value: impl Into<Value>) {
        self.merge(namespace, Map::from_iter([(key.into(), value.into())]));
    }

    /// Everything, by namespace; `None` when nobody has written.
    pub fn all(&self) -> Option<&Map<String, Value>> {
        self.0.as_deref()
    }

    /// The value at `path` in a namespace. It descends through objects only.
    pub fn get<N: AsRef<str>>(&self, namespace: &str, path: &[N]) -> Option<&Value> {
        let values = self.all()?.get(namespace)?;
        path.iter().try_fold(values, |value, name| value.as_object()?.get(name.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_written_is_found_by_namespace_and_path() {
        let mut metadata = Metadata::default();
        assert_eq!(metadata.all(), None);
        metadata.set("a", "x", 1);
        metadata.set("a", "y", json!({ "z": [1] }));
        metadata.set("a", "x", 2);
        for (namespace, path, expected) in [
            ("a", &["x"][..], Some(json!(2))),
            ("a", &["y", "z"], Some(json!([1]))),
            ("a", &["y", "z", "0"], None),
            ("a", &["none"], None),
            ("b", &["x"], None),
        ] {
            assert_eq!(metadata.get(namespace, path), expected.as_ref(), "{namespace} {path:?}");
        }
    }

    #[test]
    fn namespaces_are_bounded() {
        let mut metadata = Metadata::default();
        (0..2 * NAMESPACES_MAX).for_each(|number| metadata.set(&number.to_string(), "k", 1));
        assert_eq!(metadata.all().map(Map::len), Some(NAMESPACES_MAX));
    }
}
