//! Objects: what the documents of a directory describe, named and placed, not yet decoded.

use crate::diagnostic::{Finding, Severity};
use crate::document::{Document, Position};
use crate::field::{FieldPath, Step};
use cairn_mesh::ResourceName;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where an object was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<Path>,
    /// The line of its first key.
    pub line: usize,
    /// Where its fields are.
    pub position: Arc<Position>,
}

/// What controls an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The controller's kind.
    pub kind: String,
    /// Its name, in the object's namespace.
    pub name: String,
}

/// One Kubernetes object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// API group; empty for the core one.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind.
    pub kind: String,
    /// Name; the namespace is empty for kinds that live in none.
    pub name: ResourceName,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// When it was created, RFC 3339; empty when the manifest does not say.
    pub created: String,
    /// What controls it, if the manifest says so.
    pub owner: Option<Owner>,
    /// `spec` for the kinds that a waypoint reads (groups under `istio.io` and `gateway.networking.k8s.io`); for all
    /// others everything but `metadata`.
    pub spec: Value,
    /// Its document is not readable, for this reason: only its name is known.
    pub broken: Option<Arc<str>>,
    /// Where it was read; `None` when it came over xDS.
    pub origin: Option<Origin>,
}

/// What makes two objects the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectId {
    /// API group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: ResourceName,
}

impl Object {
    /// What makes it the same object as an earlier version.
    pub fn id(&self) -> ObjectId {
        ObjectId { group: self.group.clone(), kind: self.kind.clone(), name: self.name.clone() }
    }

    /// Whether it is of this group and kind, of any version.
    pub fn is(&self, group: &str, kind: &str) -> bool {
        self.kind == kind && self.group == group
    }

    /// A label's value.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    /// The path of what [`Object::spec`] holds.
    pub(crate) fn root(&self) -> FieldPath {
        if has_spec(&self.group) { FieldPath::of(&["spec"]) } else { FieldPath::root() }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name.name)
        } else {
            write!(f, "{} {}", self.kind, self.name)
        }
    }
}

/// Whether objects of `group` are read by their `spec` alone.
fn has_spec(group: &str) -> bool {
    group == "gateway.networking.k8s.io" || group.ends_with(".istio.io")
}

/// Kinds that live in no namespace, of those that are read.
fn is_cluster_scoped(group: &str, kind: &str) -> bool {
    matches!(
        (group, kind),
        ("", "Namespace" | "Node" | "PersistentVolume")
            | ("gateway.networking.k8s.io", "GatewayClass")
            | ("apiextensions.k8s.io", "CustomResourceDefinition")
            | ("rbac.authorization.k8s.io", "ClusterRole" | "ClusterRoleBinding")
            | ("admissionregistration.k8s.io", _)
    )
}

/// An object that cannot even be named, or whose metadata is not what it must be.
#[derive(Debug)]
pub(crate) struct BrokenObject {
    /// What it is, if that much can be told.
    pub(crate) id: Option<ObjectId>,
    pub(crate) findings: Vec<(Finding, Position)>,
}

/// The objects of a document: one, or those of a `List`.
pub(crate) fn objects(document: Document, file: &Arc<Path>) -> Vec<Result<Object, BrokenObject>> {
    let Document { value, position } = document;
    let is_list = value.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
    match value {
        Value::Object(mut map) if is_list && map.get("items").is_some_and(Value::is_array) => {
            let Some(Value::Array(items)) = map.remove("items") else { return Vec::new() };
            let items_at = position.child(&Step::Key("items".into())).cloned().unwrap_or_default();
            let at = |index| items_at.child(&Step::Index(index)).cloned().unwrap_or_default();
            items.into_iter().enumerate().map(|(index, item)| object(item, at(index), file)).collect()
        }
        value => vec![object(value, position, file)],
    }
}

fn object(value: Value, position: Position, file: &Arc<Path>) -> Result<Object, BrokenObject> {
    let mut problems = Vec::new();
    let found = named(value, &mut problems);
    match found {
        Some(mut object) if problems.is_empty() => {
            let line = position.line() as usize;
            object.origin = Some(Origin { file: Arc::clone(file), line, position: Arc::new(position) });
            Ok(object)
        }
        found => {
            let place = |finding| (finding, position.clone());
            let findings = problems.into_iter().map(place).collect();
            Err(BrokenObject { id: found.map(|object| object.id()), findings })
        }
    }
}

fn named(value: Value, problems: &mut Vec<Finding>) -> Option<Object> {
    let root = FieldPath::root();
    let Value::Object(mut map) = value else {
        problems.push(wrong(root, "a document must be a map with apiVersion, kind and metadata"));
        return None;
    };
    let api_version = text(&map, &root, "apiVersion", problems);
    let kind = text(&map, &root, "kind", problems);
    map.remove("apiVersion");
    map.remove("kind");
    let metadata_at = root.key("metadata");
    let metadata = match map.remove("metadata") {
        Some(Value::Object(metadata)) => metadata,
        _ => {
            problems.push(wrong(metadata_at, "must be a map with a name"));
            return None;
        }
    };
    let name = text(&metadata, &metadata_at, "name", problems);
    let (api_version, kind, name) = (api_version?, kind?, name?);
    let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
    let namespace = match metadata.get("namespace") {
        _ if is_cluster_scoped(group, &kind) => String::new(),
        None | Some(Value::Null) => "default".to_owned(),
        Some(_) => text(&metadata, &metadata_at, "namespace", problems)?,
    };
    let created = metadata.get("creationTimestamp").and_then(Value::as_str).unwrap_or_default();
    let spec = if has_spec(group) { map.remove("spec").unwrap_or(Value::Null) } else { Value::Object(map) };
    Some(Object {
        group: group.to_owned(),
        version: version.to_owned(),
        name: ResourceName::new(namespace, name),
        labels: texts(&metadata, &metadata_at, "labels", problems),
        annotations: texts(&metadata, &metadata_at, "annotations", problems),
        created: created.to_owned(),
        owner: owner(&metadata),
        kind,
        spec,
        broken: None,
        origin: None,
    })
}

fn wrong(field: FieldPath, reason: &str) -> Finding {
    Finding { severity: Severity::Error, code: "bad-object", field, reason: reason.to_owned() }
}

fn text(map: &Map<String, Value>, at: &FieldPath, key: &str, problems: &mut Vec<Finding>) -> Option<String> {
    match map.get(key) {
        Some(Value::String(text)) if !text.is_empty() && !text.contains(char::is_whitespace) => {
            Some(text.clone())
        }
        Some(_) => {
            problems.push(wrong(at.key(key), "must be text without spaces"));
            None
        }
        None => {
            problems.push(wrong(at.clone(), &format!("has no {key}")));
            None
        }
    }
}

fn texts(
    map: &Map<String, Value>,
    at: &FieldPath,
    key: &str,
    problems: &mut Vec<Finding>,
) -> BTreeMap<String, String> {
    let at = at.key(key);
    let entries = match map.get(key) {
        None | Some(Value::Null) => return BTreeMap::new(),
        Some(Value::Object(entries)) => entries,
        Some(_) => {
            problems.push(wrong(at, "must be a map of texts"));
            return BTreeMap::new();
        }
    };
    let mut texts = BTreeMap::new();
    for (name, value) in entries {
        match value {
            Value::String(value) => drop(texts.insert(name.clone(), value.clone())),
            Value::Null => drop(texts.insert(name.clone(), String::new())),
            _ => problems.push(wrong(at.key(name), "must be text: quote it")),
        }
    }
    texts
}

fn owner(metadata: &Map<String, Value>) -> Option<Owner> {
    let owners = metadata.get("ownerReferences")?.as_array()?;
    let is_controller = |owner: &&Value| owner.get("controller").and_then(Value::as_bool).unwrap_or(false);
    let owner = owners.iter().find(is_controller).or_else(|| owners.first())?;
    let part = |key| owner.get(key).and_then(Value::as_str).map(str::to_owned);
    Some(Owner { kind: part("kind")?, name: part("name")? })
}

/// What the text of a document that is not YAML seems to describe, read line by line: enough to deny what a broken
/// policy guards.
pub(crate) fn sniff(text: &str) -> Option<ObjectId> {
    let top = |key: &str| text.lines().find_map(|line| scalar(line.strip_prefix(key)?));
    let api_version = top("apiVersion:")?;
    let kind = top("kind:")?;
    let metadata = text.lines().skip_while(|line| !line.starts_with("metadata:")).skip(1);
    let mut indent = None;
    let (mut name, mut namespace) = (None, None);
    for line in metadata.take_while(|line| line.starts_with(' ') || line.trim().is_empty()) {
        let trimmed = line.trim_start();
        let depth = line.len() - trimmed.len();
        if trimmed.is_empty() || *indent.get_or_insert(depth) != depth {
            continue;
        }
        name = name.or_else(|| scalar(trimmed.strip_prefix("name:")?));
        namespace = namespace.or_else(|| scalar(trimmed.strip_prefix("namespace:")?));
    }
    let (group, _) = api_version.split_once('/').unwrap_or(("", &api_version));
    let namespace = namespace.unwrap_or_else(|| "default".to_owned());
    Some(ObjectId { group: group.to_owned(), kind, name: ResourceName::new(namespace, name?) })
}

fn scalar(text: &str) -> Option<String> {
    let text = text.split(" #").next()?.trim().trim_matches(['"', '\'']);
    (!text.is_empty() && !text.contains(char::is_whitespace)).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::documents;

    fn read(text: &str) -> Vec<Result<Object, BrokenObject>> {
        let file: Arc<Path> = Path::new("a.yaml").into();
        documents(text).into_iter().flat_map(|document| objects(document.unwrap(), &file)).collect()
    }

    #[test]
    fn object_is_named_and_placed() {
        let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: n\n  \
                    labels: {a: b}\nspec:\n  action: DENY\n";
        let object = read(text).remove(0).unwrap();
        assert_eq!(object.to_string(), "AuthorizationPolicy n/p");
        assert_eq!((object.group.as_str(), object.version.as_str()), ("security.istio.io", "v1"));
        assert_eq!(object.spec, serde_json::json!({"action": "DENY"}));
        let origin = object.origin.unwrap();
        assert_eq!(origin.line, 1);
        assert_eq!(origin.position.find(&FieldPath::of(&["spec", "action"])), (8, 3));
    }

    #[test]
    fn list_gives_its_items_each_with_its_own_place() {
        let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: n}\n- \
                    apiVersion: v1\n  kind: Pod\n  metadata: {name: p}\n  spec: {nodeName: x}\n";
        let found: Vec<Object> = read(text).into_iter().map(Result::unwrap).collect();
        assert_eq!(found[0].to_string(), "Namespace n");
        assert_eq!(found[1].to_string(), "Pod default/p");
        assert_eq!(found[1].spec, serde_json::json!({"spec": {"nodeName": "x"}}));
        assert_eq!(found[1].origin.as_ref().unwrap().line, 7);
    }

    #[test]
    fn bad_metadata_is_an_error_at_its_field() {
        for (name, text, field) in [
            ("no map", "- 1", ""),
            ("no kind", "apiVersion: v1\nmetadata: {name: x}", ""),
            ("no metadata", "apiVersion: v1\nkind: Pod", "metadata"),
            ("no name", "apiVersion: v1\nkind: Pod\nmetadata: {}", "metadata"),
            ("name is a number", "apiVersion: v1\nkind: Pod\nmetadata: {name: 1}", "metadata.name"),
            (
                "label is a bool",
                "apiVersion: v1\nkind: Pod\nmetadata: {name: x, labels: {a: true}}",
                "metadata.labels.a",
            ),
        ] {
            let broken = read(text).remove(0).unwrap_err();
            assert_eq!(broken.findings[0].0.field.to_string(), field, "{name}");
        }
    }

    #[test]
    fn broken_text_still_tells_what_it_is() {
        let text = "apiVersion: security.istio.io/v1 # x\nkind: \"AuthorizationPolicy\"\nmetadata:\n  labels:\n    \
                    name: other\n  name: p\n  namespace: n\nspec: [\n";
        let id = sniff(text).unwrap();
        assert_eq!((id.kind.as_str(), id.name.to_string()), ("AuthorizationPolicy", "n/p".to_owned()));
        assert_eq!(id.group, "security.istio.io");
        assert!(sniff("kind: AuthorizationPolicy\nspec: [").is_none());
    }
}
