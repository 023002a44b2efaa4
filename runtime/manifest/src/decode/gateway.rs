//! What a waypoint reads of its own Gateway.

use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::Findings;
use cairn_mesh::{Change, TextMatch};

/// The annotation that names, separated by commas, principals of clients who are told what decided their requests.
const EXPLAIN_TO: &str = "cairn.dev/explain-to";

/// The most principals that it may name: each request is compared with all of them.
const PRINCIPALS_MAX: usize = 32;

/// The Gateway's name, and whom its waypoint explains decisions to: nobody that is not certain.
pub(super) fn decode(object: &Object, findings: &mut Findings) -> Vec<Change> {
    let text = object.annotations.get(EXPLAIN_TO).map_or("", String::as_str);
    let at = FieldPath::of(&["metadata", "annotations", EXPLAIN_TO]);
    let mut principals = Vec::new();
    for principal in text.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        if principal.starts_with("spiffe://") || principal.contains(char::is_whitespace) {
            let reason = format!("`{principal}` is no principal: write it without `spiffe://` and spaces");
            findings.note(Severity::Error, "invalid-value", &at, reason);
        } else if principals.len() == PRINCIPALS_MAX {
            let reason = format!("names more than {PRINCIPALS_MAX} principals: the rest is told nothing");
            findings.note(Severity::Error, "invalid-value", &at, reason);
            break;
        } else {
            principals.push(TextMatch::parse(principal));
        }
    }
    if principals.contains(&TextMatch::Present) {
        let reason = "every client with an identity is told which policy decided and why";
        findings.note(Severity::Warning, "explains-to-all", &at, reason);
    }
    vec![Change::Gateway(object.name.clone()), Change::ExplainTo(principals)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{object, short};

    #[test]
    fn only_certain_principals_are_told() {
        for (name, text, expected, said) in [
            ("none", "", &[][..], &[][..]),
            (
                "two",
                "cluster.local/ns/a/sa/b, cluster.local/ns/ops/*",
                &["cluster.local/ns/a/sa/b", "cluster.local/ns/ops/*"],
                &[],
            ),
            ("a whole id", "spiffe://cluster.local/ns/a/sa/b,x", &["x"], &["error invalid-value"]),
            ("two in one", "a b", &[], &["error invalid-value"]),
            ("everyone", "*", &["*"], &["warning explains-to-all"]),
        ] {
            let object = object(&format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: g, namespace: n, annotations: \
                 {{cairn.dev/explain-to: '{text}'}}}}\n"
            ));
            let mut findings = Findings::default();
            let changes = decode(&object, &mut findings);
            let [Change::Gateway(_), Change::ExplainTo(principals)] = changes.as_slice() else {
                panic!("{changes:?}")
            };
            assert_eq!(principals.iter().map(ToString::to_string).collect::<Vec<_>>(), expected, "{name}");
            let place = " metadata.annotations[\"cairn.dev/explain-to\"]";
            let told: Vec<String> = findings.list.iter().map(|one| short(one).replace(place, "")).collect();
            assert_eq!(told, said, "{name}");
            assert!(!findings.broken, "{name}: the waypoint stays");
        }
        let many = vec!["a"; PRINCIPALS_MAX + 1].join(",");
        let object = object(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: g, annotations: \
             {{cairn.dev/explain-to: '{many}'}}}}\n"
        ));
        let changes = decode(&object, &mut Findings::default());
        let Some(Change::ExplainTo(principals)) = changes.last() else { panic!("{changes:?}") };
        assert_eq!(principals.len(), PRINCIPALS_MAX);
    }
}
