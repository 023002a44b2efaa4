//! Every code that a diagnostic can have: what it means and what mends it.

use crate::Severity;

/// A kind of diagnostic.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    /// Its name, which does not change.
    pub name: &'static str,
    /// How bad it is at worst; a place can make it less.
    pub severity: Severity,
    /// What it means, one line.
    pub meaning: &'static str,
    /// What mends it, one line.
    pub fix: &'static str,
}

impl Code {
    /// The code with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        CODES.iter().find(|code| code.name == name)
    }
}

const fn error(name: &'static str, meaning: &'static str, fix: &'static str) -> Code {
    Code { name, severity: Severity::Error, meaning, fix }
}

const fn warning(name: &'static str, meaning: &'static str, fix: &'static str) -> Code {
    Code { name, severity: Severity::Warning, meaning, fix }
}

const fn info(name: &'static str, meaning: &'static str, fix: &'static str) -> Code {
    Code { name, severity: Severity::Info, meaning, fix }
}

/// All codes, by name.
pub const CODES: &[Code] = &[
    error(
        "backend-not-found",
        "A route sends requests to a Service or port that is not there; they are answered 500.",
        "Name a Service and a port that exist, or remove the backend.",
    ),
    error(
        "bad-expression",
        "A CEL expression cannot be read.",
        "Mend the expression; the message says where it fails.",
    ),
    error("bad-format", "The format of an access log cannot be read.", "Mend the operator that is named."),
    error(
        "bad-object",
        "A document is no Kubernetes object: apiVersion, kind or metadata are missing or wrong.",
        "Give it apiVersion, kind, and metadata with a name.",
    ),
    error("bad-yaml", "A document is not YAML or JSON.", "Mend the syntax at the line that is named."),
    warning(
        "claim-never-produced",
        "A policy asks for an issuer or audience that no RequestAuthentication of its targets accepts.",
        "Use an issuer or audience that is accepted, or accept this one too.",
    ),
    warning(
        "client-hidden",
        "A ztunnel is to deny certain clients, but sees the waypoint through which they come in their place.",
        "Attach the policy to the waypoint with targetRefs.",
    ),
    error(
        "dangling-waypoint",
        "A label names a waypoint that is not there or may not be used: traffic goes direct, without L7 policies.",
        "Name a Gateway of a waypoint class, or let it accept routes from this namespace.",
    ),
    warning(
        "denied-anyway",
        "An ALLOW rule allows nothing, since a DENY rule matches all that it matches.",
        "Remove one of them, or make the DENY rule narrower.",
    ),
    error(
        "duplicate-object",
        "Two documents describe the same object; the first is in effect.",
        "Remove or rename one of them.",
    ),
    warning(
        "explains-to-all",
        "A waypoint tells every client with an identity which policy decided its requests.",
        "Name the principals of those who are to know in cairn.dev/explain-to.",
    ),
    warning(
        "header-sent-twice",
        "A client gets round a condition on a header by sending it twice: lines are compared joined by commas, or one by one.",
        "Name the values that may pass in place of those that may not, or the reverse, as the message says.",
    ),
    warning(
        "host-without-port",
        "A host is compared with what the client sends, port included, and this one has none.",
        "Add the host with each port of the service.",
    ),
    error(
        "invalid-backend",
        "A backend of a route cannot be used; its share of the requests is answered 500.",
        "Use a Service with a port.",
    ),
    error(
        "invalid-value",
        "A field has a value that it cannot have.",
        "Give it a value of the kind that is named.",
    ),
    warning(
        "kept",
        "Objects are gone from the files and stay in effect, because some file cannot be read.",
        "Mend the files that cannot be read.",
    ),
    error(
        "l7-in-l4-policy",
        "A policy without targetRefs is enforced by ztunnels, which cannot look at this: its rule allows nothing, denies \
         more, or never denies.",
        "Attach the policy to a waypoint with targetRefs in place of the selector.",
    ),
    error("missing-field", "A field that must be there is not.", "Add the field."),
    error(
        "missing-provider",
        "A policy names a provider that MeshConfig does not have.",
        "Add it to extensionProviders in the ConfigMap istio-system/istio, or use one that is there.",
    ),
    error(
        "needs-restart",
        "A setting takes effect only when the mesh is started again.",
        "Start the mesh again.",
    ),
    error(
        "no-address",
        "There is no address left for this, or none yet.",
        "Give it an address in its manifest, or use a larger block.",
    ),
    warning(
        "no-backend",
        "A rule of a route has no backend that takes a share: its requests are answered 500.",
        "Give it a backend with a weight, or a redirect.",
    ),
    error(
        "no-effect",
        "The object is read and changes nothing.",
        "Remove it, or follow what the message says.",
    ),
    error(
        "no-keys",
        "An issuer's keys cannot be had as the rule is written, so that each of its tokens is refused.",
        "Set `jwks` to a JWK Set or `jwksUri` to its address, or let the issuer be a URI with an OpenID configuration.",
    ),
    warning(
        "no-listener",
        "The Gateway of a waypoint has no HBONE listener on port 15008.",
        "Add `{name: mesh, port: 15008, protocol: HBONE}` to its listeners.",
    ),
    warning(
        "no-service",
        "An EndpointSlice belongs to no Service.",
        "Set its label kubernetes.io/service-name to a Service of its namespace.",
    ),
    error(
        "not-applied",
        "The object cannot be applied as written; what it guards is refused, or its last good version stays.",
        "Mend what else is said of it.",
    ),
    warning(
        "not-attached",
        "A resource for waypoints has no targetRefs, so no waypoint takes it.",
        "Give it targetRefs to a Gateway or Service.",
    ),
    error(
        "not-in-mesh",
        "A policy is for pods that no ztunnel guards.",
        "Label their namespace istio.io/dataplane-mode: ambient.",
    ),
    info("not-ours", "The object is for another part of the cluster.", "Nothing needs to be done."),
    error(
        "not-supported",
        "A field or kind is not supported, and has no effect.",
        "Remove it, or use what is supported.",
    ),
    error(
        "parent-not-bound",
        "A route's parent has no waypoint, so the route has no effect on it.",
        "Label the Service or its namespace istio.io/use-waypoint.",
    ),
    error("parent-not-found", "A route's parent is not there.", "Name a Service and port that exist."),
    warning(
        "port-not-served",
        "A policy at a waypoint names a port that no Service it is for has: there ports are the Service's.",
        "Use a port of the Service, not of its pods.",
    ),
    warning(
        "preflight-refused",
        "A route answers the preflights of browsers, which have no token, and policies refuse them before it does.",
        "Let OPTIONS pass without a token.",
    ),
    warning(
        "private-key",
        "A JWK Set in a RequestAuthentication holds a private key, with which whoever reads it can sign tokens.",
        "Replace it by the public key, and the key pair by another.",
    ),
    warning(
        "provider-name-clash",
        "The name of a CUSTOM provider begins with another's, which Istio's own waypoints confuse.",
        "Rename one of them.",
    ),
    error(
        "secret-not-found",
        "A plugin names a pull secret that is not there, or holds no docker configuration.",
        "Add a Secret of type kubernetes.io/dockerconfigjson to the plugin's namespace.",
    ),
    error(
        "selector-and-target-refs",
        "A policy has both a selector and targetRefs.",
        "Make two policies: one for ztunnels, one for waypoints.",
    ),
    error(
        "selector-on-waypoint",
        "A selector selects a waypoint's pods, and waypoints look at targetRefs only.",
        "Use targetRefs to the Gateway.",
    ),
    error(
        "selects-nothing",
        "A policy is for pods that are not there.",
        "Give its selector labels that pods have, in the namespace of the pods.",
    ),
    warning(
        "shadowed-rule",
        "A rule changes nothing, since another of the same action matches all that it matches.",
        "Remove it, or make the wider rule narrower.",
    ),
    warning(
        "star-in-middle",
        "A `*` inside a value stands for itself: only one at the start or end stands for any text.",
        "Use one star at an end, or a path template with {*} and {**}.",
    ),
    error(
        "target-not-bound",
        "A policy's target has no waypoint, or is none, so nothing enforces the policy.",
        "Label the Service or its namespace istio.io/use-waypoint.",
    ),
    error(
        "target-not-found",
        "A policy's target is not there. Targets are in the policy's own namespace.",
        "Name what exists, or move the policy to the namespace of its target.",
    ),
    error(
        "unenforceable",
        "A policy asks for what is not supported; its targets answer 503 until it is gone.",
        "Remove what is not supported.",
    ),
    error("unknown-field", "A field has a name that is not known.", "Correct the spelling, or remove it."),
    info("unknown-kind", "A kind of object that nothing here reads.", "Nothing needs to be done."),
    warning(
        "unknown-provider",
        "Telemetry names a provider that MeshConfig does not have, or that takes no such data.",
        "Add it to extensionProviders in the ConfigMap istio-system/istio, or use one that is there.",
    ),
    warning(
        "unreachable-route",
        "No request reaches a rule of a route, since others come first and match all of it.",
        "Remove it, or make it differ by a longer path, a method or a header.",
    ),
    error("unreadable", "A file cannot be read.", "Make it readable, and smaller than the limit."),
    warning(
        "unverified-token",
        "A policy asks for a verified token where no RequestAuthentication verifies any.",
        "Add a RequestAuthentication with the same targets.",
    ),
    error(
        "waypoint-shut-out",
        "An L4 policy refuses the waypoint through which all requests come.",
        "Allow the waypoint's identity, and name clients in a policy with targetRefs.",
    ),
    warning(
        "waypoint-unused",
        "Nothing uses a waypoint, so it guards nothing.",
        "Label a Namespace, Service or Pod istio.io/use-waypoint with its name.",
    ),
    error(
        "wrong-type",
        "A field has a value of another type than it must have.",
        "Give it a value of that type.",
    ),
    warning(
        "wrong-waypoint",
        "The waypoint that is named is not for this kind of traffic, which goes direct.",
        "Set istio.io/waypoint-for on the Gateway, or name another waypoint.",
    ),
];

#[cfg(test)]
mod tests {
    use super::{CODES, Code};
    use regex::Regex;
    use std::path::{Path, PathBuf};

    /// The texts of this crate's source files, but for this one and for tests.
    fn sources() -> Vec<(PathBuf, String)> {
        fn visit(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                if path.is_dir() {
                    visit(&path, found);
                } else if name.ends_with(".rs") && name != "codes.rs" && name != "tests.rs" {
                    let text = std::fs::read_to_string(&path).unwrap();
                    let code = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
                    found.push((path, code));
                }
            }
        }
        let mut found = Vec::new();
        visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        found
    }

    #[test]
    fn every_code_that_is_given_has_a_row_and_every_row_is_given() {
        let code = "\"([a-z0-9]+(?:-[a-z0-9]+)*)\"";
        // Where a code stands: as an argument of what refuses or notes, as a field, or first in a pair with its reason.
        let given = [
            format!(r"\b(?:refuse|breaks)\(\s*{code}"),
            format!(r"Severity::(?:Error|Warning|Info),\s*(?:code: )?{code}"),
            format!(r"\bcode: {code}"),
            format!(r"\(\s*{code},\s*(?:reason|format!)"),
        ];
        let given = given.map(|pattern| Regex::new(&pattern).unwrap());
        let sources = sources();
        let mut count = 0;
        for (path, text) in &sources {
            for found in given.iter().flat_map(|pattern| pattern.captures_iter(text)) {
                let name = &found[1];
                assert!(Code::named(name).is_some(), "{}: `{name}` has no row", path.display());
                count += 1;
            }
        }
        assert!(count > CODES.len(), "only {count} places found: they are written in another way");
        // This one is said of a mesh that runs.
        for code in CODES.iter().filter(|code| code.name != "needs-restart") {
            let literal = format!("\"{}\"", code.name);
            assert!(
                sources.iter().any(|(_, text)| text.contains(&literal)),
                "`{}` is never given",
                code.name
            );
        }
    }

    #[test]
    fn codes_are_sorted_and_said_whole() {
        assert!(CODES.windows(2).all(|pair| pair[0].name < pair[1].name));
        for code in CODES {
            assert!(code.meaning.ends_with('.') && code.fix.ends_with('.'), "{}", code.name);
        }
    }
}
