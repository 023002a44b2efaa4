//! Kubernetes objects on the wire between our server and our waypoints: an `istio.mcp.v1alpha1.Resource` whose body
//! is a `google.protobuf.Struct` with labels, annotations and spec.

use crate::ResourceError;
use cairn_mesh::ResourceName;
use cairn_proto::mcp;
use prost::Message;
use prost_types::{Any, ListValue, Struct, Timestamp, Value, value::Kind};
use std::collections::BTreeMap;

const ENVELOPE_TYPE: &str = "type.googleapis.com/istio.mcp.v1alpha1.Resource";
const STRUCT_TYPE: &str = "type.googleapis.com/google.protobuf.Struct";

/// One Kubernetes object, as read from a manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Its API group, such as `gateway.networking.k8s.io`.
    pub group: String,
    /// Its API version, such as `v1`.
    pub version: String,
    /// Its kind, such as `HTTPRoute`.
    pub kind: String,
    /// Its name.
    pub name: ResourceName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// When it was created, RFC 3339; `""` if unknown.
    pub created: String,
    /// Its spec. Numbers are doubles on the wire: integers beyond 2^53 lose digits.
    pub spec: serde_json::Value,
    /// The waypoints that get it. Known to the server only; empty after decoding.
    pub gateways: Vec<ResourceName>,
}

impl Object {
    /// `<group>/<version>/<Kind>`, its type on the wire.
    pub fn type_url(&self) -> String {
        format!("{}/{}/{}", self.group, self.version, self.kind)
    }

    /// Its envelope. `metadata.version` is left empty; the version is the resource's.
    pub(crate) fn to_any(&self) -> Any {
        let texts = |texts: &BTreeMap<String, String>| {
            let text =
                |(key, value): (&String, &String)| (key.clone(), kind(Kind::StringValue(value.clone())));
            kind(Kind::StructValue(Struct { fields: texts.iter().map(text).collect() }))
        };
        let fields = [
            ("annotations".to_owned(), texts(&self.annotations)),
            ("labels".to_owned(), texts(&self.labels)),
            ("spec".to_owned(), value_to_proto(&self.spec)),
        ];
        let body = Struct { fields: fields.into() };
        let metadata = mcp::Metadata {
            name: self.name.to_string(),
            create_time: self.created.parse::<Timestamp>().ok(),
            version: String::new(),
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
        };
        let body = Any { type_url: STRUCT_TYPE.to_owned(), value: body.encode_to_vec() };
        let envelope = mcp::Resource { metadata: Some(metadata), body: Some(body) };
        Any { type_url: ENVELOPE_TYPE.to_owned(), value: envelope.encode_to_vec() }
    }

    /// Reads an envelope of the type `<group>/<version>/<Kind>`.
    pub(crate) fn from_any(type_url: &str, any: &Any) -> Result<Self, ResourceError> {
        if any.type_url != ENVELOPE_TYPE {
            return Err(ResourceError::WrongType { found: any.type_url.clone() });
        }
        let mut parts = type_url.splitn(3, '/');
        let (Some(group), Some(version), Some(kind)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(ResourceError::value("type_url", type_url));
        };
        let envelope = mcp::Resource::decode(any.value.as_slice())?;
        let metadata = envelope.metadata.ok_or(ResourceError::Missing { field: "metadata" })?;
        let body = envelope.body.ok_or(ResourceError::Missing { field: "body" })?;
        if body.type_url != STRUCT_TYPE {
            return Err(ResourceError::WrongType { found: body.type_url });
        }
        let mut body = Struct::decode(body.value.as_slice())?;
        let spec = body.fields.remove("spec").map_or(serde_json::Value::Null, value_from_proto);
        let name = ResourceName::parse(&metadata.name)
            .ok_or_else(|| ResourceError::value("metadata.name", &metadata.name))?;
        Ok(Self {
            group: group.to_owned(),
            version: version.to_owned(),
            kind: kind.to_owned(),
            name,
            labels: texts(metadata.labels, body.fields.remove("labels")),
            annotations: texts(metadata.annotations, body.fields.remove("annotations")),
            created: metadata.create_time.map_or_else(String::new, |time| time.to_string()),
            spec,
            gateways: Vec::new(),
        })
    }
}

/// What happened to an object.
#[expect(clippy::large_enum_variant, reason = "made one at a time, on the stack")]
#[derive(Clone, Debug, PartialEq)]
pub enum ObjectEvent {
    /// It is there, or changed.
    Put(Object),
    /// It is gone.
    Removed {
        /// Its type, `<group>/<version>/<Kind>`.
        type_url: String,
        /// Its name.
        name: ResourceName,
    },
}

/// The envelope's labels or annotations, or those of the body when the envelope has none.
fn texts(envelope: BTreeMap<String, String>, body: Option<Value>) -> BTreeMap<String, String> {
    let Some(Kind::StructValue(body)) = body.and_then(|value| value.kind).filter(|_| envelope.is_empty())
    else {
        return envelope;
    };
    let text = |(key, value): (String, Value)| match value.kind {
        Some(Kind::StringValue(text)) => Some((key, text)),
        _ => None,
    };
    body.fields.into_iter().filter_map(text).collect()
}

fn kind(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

/// JSON as a protobuf value.
pub(crate) fn value_to_proto(from: &serde_json::Value) -> Value {
    kind(match from {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(it) => Kind::BoolValue(*it),
        serde_json::Value::Number(it) => Kind::NumberValue(it.as_f64().unwrap_or_default()),
        serde_json::Value::String(it) => Kind::StringValue(it.clone()),
        serde_json::Value::Array(items) => {
            Kind::ListValue(ListValue { values: items.iter().map(value_to_proto).collect() })
        }
        serde_json::Value::Object(fields) => Kind::StructValue(Struct {
            fields: fields.iter().map(|(key, value)| (key.clone(), value_to_proto(value))).collect(),
        }),
    })
}

/// A protobuf value as JSON. Whole numbers become integers again, so that typed readers accept them as such.
fn value_from_proto(from: Value) -> serde_json::Value {
    match from.kind {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::BoolValue(it)) => it.into(),
        Some(Kind::NumberValue(it)) => number(it),
        Some(Kind::StringValue(it)) => it.into(),
        Some(Kind::ListValue(it)) => it.values.into_iter().map(value_from_proto).collect(),
        Some(Kind::StructValue(it)) => {
            let fields = it.fields.into_iter().map(|(key, value)| (key, value_from_proto(value)));
            serde_json::Value::Object(fields.collect())
        }
    }
}

/// 2^53: below it every whole double is exactly one integer.
const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;

fn number(value: f64) -> serde_json::Value {
    if value.fract() == 0.0 && value.abs() <= WHOLE_MAX {
        (value as i64).into()
    } else {
        // NaN and infinity, which JSON does not have, become null.
        value.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(spec: serde_json::Value) -> Object {
        Object {
            group: "gateway.networking.k8s.io".into(),
            version: "v1".into(),
            kind: "HTTPRoute".into(),
            name: ResourceName::new("ns", "route"),
            labels: [("app".to_owned(), "echo".to_owned())].into(),
            annotations: [("a/b".to_owned(), "c".to_owned())].into(),
            created: "2026-01-02T03:04:05Z".into(),
            spec,
            gateways: Vec::new(),
        }
    }

    #[test]
    fn object_survives_the_wire() {
        for (name, spec) in [
            ("nothing", json!(null)),
            ("nested", json!({"a": [1, -2, {"b": "c", "d": null}], "e": true, "weight": 100})),
            ("fraction", json!({"percent": 0.5})),
            ("empty things", json!({"a": [], "b": {}, "c": ""})),
        ] {
            let object = object(spec);
            let any = object.to_any();
            assert_eq!(Object::from_any(&object.type_url(), &any).unwrap(), object, "{name}");
        }
    }

    #[test]
    fn unknown_creation_time_stays_unknown() {
        let object = Object { created: String::new(), ..object(json!({})) };
        assert_eq!(Object::from_any(&object.type_url(), &object.to_any()).unwrap().created, "");
    }

    #[test]
    fn labels_may_stand_in_the_body_alone() {
        let object = object(json!({}));
        let mut any = object.to_any();
        let mut envelope = mcp::Resource::decode(any.value.as_slice()).unwrap();
        let metadata = envelope.metadata.as_mut().unwrap();
        metadata.labels.clear();
        metadata.annotations.clear();
        any.value = envelope.encode_to_vec();
        assert_eq!(Object::from_any(&object.type_url(), &any).unwrap(), object);
    }

    #[test]
    fn malformed_envelopes_are_refused() {
        let good = object(json!({})).to_any();
        let change = |change: fn(&mut mcp::Resource)| {
            let mut envelope = mcp::Resource::decode(good.value.as_slice()).unwrap();
            change(&mut envelope);
            Any { value: envelope.encode_to_vec(), ..good.clone() }
        };
        for (name, type_url, any) in [
            ("type without kind", "networking/v1", good.clone()),
            ("other content", "a/b/C", Any { type_url: "x".into(), ..good.clone() }),
            ("bytes", "a/b/C", Any { value: vec![0xff], ..good.clone() }),
            ("no metadata", "a/b/C", change(|it| it.metadata = None)),
            ("no body", "a/b/C", change(|it| it.body = None)),
            ("name without namespace", "a/b/C", change(|it| it.metadata.as_mut().unwrap().name = "n".into())),
        ] {
            assert!(Object::from_any(type_url, &any).is_err(), "{name}");
        }
    }
}
