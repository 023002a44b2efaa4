//! Settings of the whole mesh: key `mesh` of the ConfigMap `istio`, of which only what Cairn reads is looked at.

use super::{provider, telemetry_settings};
use crate::document::documents;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Findings, Node};
use cairn_mesh::{Change, MeshSettings, PathNormalization};
use serde_json::Value;
use std::sync::Arc;

/// The settings, with what the ConfigMap does not say from `settings`.
pub(super) fn decode(object: &Object, settings: &MeshSettings, findings: &mut Findings) -> Vec<Change> {
    let Some((config, at)) = mesh_config(object, findings) else { return Vec::new() };
    let entries = Node::new(&config, at).any_map(findings);
    let mut read = settings.clone();
    if let Some(node) = entries.get("trustDomain") {
        match node.filled(findings) {
            Some(text) if text.contains('/') => {
                findings.refuse("invalid-value", &node.at, "must not hold a `/`")
            }
            Some(text) => read.trust_domain = text.into(),
            None => {}
        }
    }
    if let Some(node) = entries.get("trustDomainAliases") {
        read.trust_domain_aliases = aliases(&node, findings);
    }
    if entries.get("extensionProviders").is_some() {
        read.authorization_providers = provider::decode(&entries, findings);
    }
    if let Some(text) = entries.get("rootNamespace").and_then(|node| node.filled(findings)) {
        read.root_namespace = text.into();
    }
    if let Some(node) = entries.get("pathNormalization") {
        const MODES: [(&str, PathNormalization); 5] = [
            ("DEFAULT", PathNormalization::Base),
            ("NONE", PathNormalization::None),
            ("BASE", PathNormalization::Base),
            ("MERGE_SLASHES", PathNormalization::MergeSlashes),
            ("DECODE_AND_MERGE_SLASHES", PathNormalization::DecodeAndMergeSlashes),
        ];
        let mode = node.any_map(findings).get("normalization").and_then(|node| node.choice(&MODES, findings));
        read.path_normalization = mode.unwrap_or(read.path_normalization);
    }
    read.telemetry = telemetry_settings::decode(&entries, &settings.telemetry, findings);
    if findings.broken { Vec::new() } else { vec![Change::Settings(read)] }
}

/// The MeshConfig as the object has it, if it can be read without doubt.
pub fn written_mesh_config(object: &Object) -> Option<Value> {
    let mut findings = Findings::default();
    decode(object, &MeshSettings::default(), &mut findings);
    let (config, _) = mesh_config(object, &mut findings)?;
    (!findings.broken && config.is_object()).then_some(config)
}

fn aliases(node: &Node<'_>, findings: &mut Findings) -> Vec<Arc<str>> {
    let mut aliases = Vec::new();
    for node in node.list(findings) {
        match node.filled(findings) {
            Some(text) if text.contains(['/', '*']) => {
                findings.refuse("invalid-value", &node.at, "must not hold a `/` or a `*`")
            }
            Some(text) => aliases.push(text.into()),
            None => {}
        }
    }
    aliases
}

/// The MeshConfig inside the ConfigMap, or the object's own spec.
pub(crate) fn mesh_config(object: &Object, findings: &mut Findings) -> Option<(Value, FieldPath)> {
    let Some(data) = object.spec.get("data") else {
        let own = object.kind == "MeshConfig";
        return own.then(|| (object.spec.clone(), object.root()));
    };
    let at = FieldPath::of(&["data", "mesh"]);
    let text = Node::new(data.get("mesh")?, at.clone()).text(findings)?;
    match documents(text).into_iter().next()? {
        Ok(document) => Some((document.value, at)),
        Err(broken) => {
            findings.refuse("bad-yaml", &at, format!("line {}: {}", broken.line, broken.reason));
            None
        }
    }
}
