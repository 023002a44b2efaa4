//! Messages among properties: `Node` of the proxy, and `Metadata` of the exchange and of what serves it. They are
//! walked by path, or given as a whole, serialised.

use super::step;
use super::value::Value;
use cairn_filter::Exchange;
use serde_json::{Map, Value as Json, json};
use std::borrow::Cow;

/// Which message it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `envoy.config.core.v3.Node`.
    Node,
    /// `envoy.config.core.v3.Metadata`.
    Metadata,
}

/// A message of metadata with nothing in it.
pub(super) fn none() -> Json {
    json!({})
}

/// What filters said of the exchange: what a token claims, where Istio's filter for tokens puts it.
pub(super) fn dynamic(exchange: &Exchange) -> Json {
    match &exchange.token {
        Some(token) => {
            json!({ "filter_metadata": { "envoy.filters.http.jwt_authn": { "payload": token.payload() } } })
        }
        None => none(),
    }
}

/// What Istio says of the cluster: the services behind it.
pub(super) fn cluster(exchange: &Exchange) -> Option<Json> {
    exchange.cluster.as_ref()?;
    let Some(service) = &exchange.connection.service else { return Some(none()) };
    let service =
        json!({ "host": *service.hostname, "name": *service.name, "namespace": *service.namespace });
    Some(json!({ "filter_metadata": { "istio": { "services": [service] } } }))
}

/// What Istio says of an endpoint: its workload in one text.
pub(super) fn upstream_host(exchange: &Exchange) -> Option<Json> {
    exchange.upstream?;
    let Some(workload) = &exchange.upstream_workload else { return Some(none()) };
    let text = [
        &*workload.workload_name,
        &*workload.namespace,
        &*workload.canonical_name,
        &*workload.canonical_revision,
        &*workload.cluster_id,
    ]
    .join(";");
    Some(json!({ "filter_metadata": { "istio": { "workload": text } } }))
}

/// This proxy, from what the operator told about it: names whose segments are joined by dots.
pub(super) fn node(known: &[(String, String)]) -> Json {
    let mut node = Map::new();
    for (path, value) in known {
        let mut at = &mut node;
        let mut segments = path.split('.').peekable();
        while let Some(segment) = segments.next() {
            if segments.peek().is_none() {
                at.insert(segment.to_owned(), Json::String(value.clone()));
                break;
            }
            let next = at.entry(segment).or_insert_with(none);
            let Json::Object(next) = next else { break };
            at = next;
        }
    }
    Json::Object(node)
}

/// The part of a message at a path, or all of it.
pub(super) fn walk<'a>(message: Json, path: &[u8], kind: Kind) -> Option<Value<'a>> {
    if path.is_empty() {
        return Some(Value::Bytes(Cow::Owned(encode(&message, kind))));
    }
    let mut at = &message;
    let mut rest = path;
    while !rest.is_empty() {
        let (segment, after) = step(rest);
        let segment = std::str::from_utf8(segment).ok()?;
        at = match at {
            Json::Object(map) => map.get(segment)?,
            Json::Array(list) => list.get(segment.parse::<usize>().ok()?)?,
            _ => return None,
        };
        rest = after;
    }
    Value::of_json(at)
}

/// The message in the wire format of protocol buffers.
fn encode(message: &Json, kind: Kind) -> Vec<u8> {
    let mut out = Vec::new();
    let Json::Object(message) = message else { return out };
    match kind {
        Kind::Node => {
            for (field, name) in [(1, "id"), (2, "cluster")] {
                if let Some(Json::String(text)) = message.get(name) {
                    put(&mut out, field, text.as_bytes());
                }
            }
            if let Some(Json::Object(metadata)) = message.get("metadata") {
                put(&mut out, 3, &structure(metadata));
            }
        }
        Kind::Metadata => {
            if let Some(Json::Object(filters)) = message.get("filter_metadata") {
                for (name, filter) in filters {
                    let Json::Object(filter) = filter else { continue };
                    put(&mut out, 1, &entry(name, &structure(filter)));
                }
            }
        }
    }
    out
}

/// `google.protobuf.Struct`.
fn structure(map: &Map<String, Json>) -> Vec<u8> {
    let mut out = Vec::new();
    map.iter().for_each(|(name, json)| put(&mut out, 1, &entry(name, &value(json))));
    out
}

/// An entry of a map: its key and its value.
fn entry(key: &str, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out, 1, key.as_bytes());
    put(&mut out, 2, value);
    out
}

/// `google.protobuf.Value`.
fn value(json: &Json) -> Vec<u8> {
    let mut out = Vec::new();
    match json {
        Json::Null => out.extend_from_slice(&[1 << 3, 0]),
        Json::Number(number) => {
            out.push(2 << 3 | 1);
            out.extend_from_slice(&number.as_f64().unwrap_or_default().to_le_bytes());
        }
        Json::String(text) => put(&mut out, 3, text.as_bytes()),
        Json::Bool(flag) => out.extend_from_slice(&[4 << 3, u8::from(*flag)]),
        Json::Object(map) => put(&mut out, 5, &structure(map)),
        Json::Array(list) => {
            let mut items = Vec::new();
            list.iter().for_each(|item| put(&mut items, 1, &value(item)));
            put(&mut out, 6, &items);
        }
    }
    out
}

/// A field with a length before it.
fn put(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    let mut length = bytes.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_written_as_envoy_writes_them() {
        // What Envoy 1.40 gave for `xds.cluster_metadata` of a cluster with this metadata.
        let message = json!({ "filter_metadata": { "istio": { "c": "1" } } });
        let expected = b"\n\x13\n\x05istio\x12\n\n\x08\n\x01c\x12\x03\x1a\x011";
        assert_eq!(encode(&message, Kind::Metadata), expected);
        assert_eq!(encode(&none(), Kind::Metadata), b"");
        let node = node(&[("id".into(), "n".into()), ("metadata.LABELS.app".into(), "web".into())]);
        let expected = b"\n\x01n\x1a\x1c\n\x1a\n\x06LABELS\x12\x10*\x0e\n\x0c\n\x03app\x12\x05\x1a\x03web";
        assert_eq!(encode(&node, Kind::Node), expected);
        assert_eq!(walk(node, b"metadata\0LABELS\0app", Kind::Node), Some(Value::text("web")));
    }

    #[test]
    fn parts_have_the_types_of_cel() {
        let message = || json!({ "a": { "list": ["x", { "n": 1.5 }], "flag": true, "none": null } });
        for (path, expected) in [
            ("a.list.0", Some(Value::text("x"))),
            ("a.list.1.n", Some(Value::Float(1.5))),
            ("a.list.2", None),
            ("a.flag", Some(Value::Bool(true))),
            ("a.none", None),
            ("a.flag.x", None),
            ("b", None),
        ] {
            assert_eq!(
                walk(message(), path.replace('.', "\0").as_bytes(), Kind::Metadata),
                expected,
                "{path}"
            );
        }
        let Some(Value::Map(map)) = walk(message(), b"a\0list", Kind::Metadata) else { panic!("a map") };
        assert_eq!(map[0], (b"x".to_vec(), Vec::new()));
    }
}
