//! Providers: services of MeshConfig that policies refer to by name.

use super::{Remark, Survey, elements};
use crate::decode::mesh_config;
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::Findings;
use std::collections::BTreeSet;

/// The most providers that a fix names.
const NAMED_MAX: usize = 8;

pub(super) fn look(survey: &mut Survey<'_>) {
    let known = known(survey);
    missing(survey, &known);
    clashes(survey);
}

/// The names of all providers that MeshConfig has.
fn known(survey: &Survey<'_>) -> BTreeSet<String> {
    let is_config = |object: &&Object| {
        object.kind == "ConfigMap"
            && &*object.name.name == "istio"
            && &*object.name.namespace == "istio-system"
    };
    let config = survey.objects.iter().find(is_config);
    let config = config.and_then(|object| mesh_config(object, &mut Findings::default()));
    let Some((config, at)) = config else { return BTreeSet::new() };
    let providers = elements(&config, "extensionProviders", &at);
    providers
        .into_iter()
        .filter_map(|(_, provider)| Some(provider.get("name")?.as_str()?.to_owned()))
        .collect()
}

/// Where a policy refers to its provider, and as what.
fn reference(policy: &Object) -> Option<(FieldPath, String)> {
    let name = policy.spec.get("provider")?.get("name")?.as_str()?;
    Some((FieldPath::of(&["spec", "provider", "name"]), name.to_owned()))
}

/// Policies whose provider is not there. (Of Telemetry that is said where it is read.)
fn missing(survey: &mut Survey<'_>, known: &BTreeSet<String>) {
    let policies = survey.policies.iter().map(|written| written.object);
    let referring = policies.filter_map(|object| Some((object, reference(object)?)));
    let missing: Vec<_> = referring.filter(|(_, (_, name))| !known.contains(name)).collect();
    for (object, (at, name)) in missing {
        let reason =
            format!("MeshConfig has no extensionProvider `{name}`: the requests it matches are refused");
        let fix = match known.is_empty() {
            true => format!("add `{name}` to extensionProviders in the ConfigMap istio-system/istio"),
            false => {
                let known: Vec<&str> = known.iter().take(NAMED_MAX).map(String::as_str).collect();
                format!("add `{name}` to extensionProviders, or use one of {}", known.join(", "))
            }
        };
        survey.say(
            object,
            Remark { severity: Severity::Error, code: "missing-provider", at: &at, reason, fix },
        );
    }
}

/// Providers of CUSTOM policies of which one's name begins with another's: Istio's own waypoints take the first for
/// both.
fn clashes(survey: &mut Survey<'_>) {
    let mut used: Vec<(&Object, FieldPath, String)> = Vec::new();
    for written in &survey.policies {
        used.extend(reference(written.object).map(|(at, name)| (written.object, at, name)));
    }
    let mut remarks = Vec::new();
    for (object, at, name) in &used {
        let shorter =
            used.iter().find(|(_, _, other)| other.len() < name.len() && name.starts_with(&**other));
        if let Some((other, _, shorter)) = shorter {
            let reason = format!(
                "`{name}` begins with `{shorter}`, the provider of {other}: in Istio's own waypoints this policy's requests \
                 go to both"
            );
            remarks.push((*object, at.clone(), reason));
        }
    }
    for (object, at, reason) in remarks {
        let fix = "rename one, so that no provider's name begins with another's".to_owned();
        survey.say(
            object,
            Remark { severity: Severity::Warning, code: "provider-name-clash", at: &at, reason, fix },
        );
    }
}
