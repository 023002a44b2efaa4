//! Values that match other texts than it seems.

use super::{Remark, Survey, elements, parts, texts};
use crate::decode::policy::Action;
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use cairn_mesh::{Service, is_joined_header};
use serde_json::Value;
use std::collections::BTreeSet;

/// Fields whose values may have a star at one end only.
const SOURCE_TEXTS: [&str; 4] = ["principals", "notPrincipals", "requestPrincipals", "notRequestPrincipals"];
const OPERATION_TEXTS: [&str; 6] = ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"];

/// The ports that clients leave out of the host (RFC 9110 §4.2).
const DEFAULT_PORTS: [u16; 2] = [80, 443];

/// The most ports that a fix names.
const PORTS_NAMED_MAX: usize = 4;

pub(super) fn look(survey: &mut Survey<'_>) {
    let mut remarks = Vec::new();
    for written in &survey.policies {
        let attachment = &written.policy.attachment;
        let services = survey.services(&written.object.name.namespace, &attachment.targets);
        for (at, rule) in written.rules() {
            let mut found = Vec::new();
            stars(rule, &at, &mut found);
            headers(rule, &at, written.policy.action, &mut found);
            if !services.is_empty() {
                hosts(rule, &at, written.policy.action, &services, &mut found);
                ports(rule, &at, &services, &mut found);
            }
            remarks.extend(found.into_iter().map(|found| (written.object, found)));
        }
    }
    for (object, Found { code, at, reason, fix }) in remarks {
        survey.say(object, Remark { severity: Severity::Warning, code, at: &at, reason, fix });
    }
}

struct Found {
    code: &'static str,
    at: FieldPath,
    reason: String,
    fix: String,
}

/// Whether a value has a star that stands for itself: neither the whole value nor at its one end that counts.
fn has_literal_star(value: &str) -> bool {
    let rest = value.strip_prefix('*').or_else(|| value.strip_suffix('*')).unwrap_or(value);
    rest.contains('*') && !value.contains(['{', '}'])
}

fn stars(rule: &Value, at: &FieldPath, found: &mut Vec<Found>) {
    let mut values = Vec::new();
    for (at, source) in parts(rule, at, "from", "source") {
        values.extend(SOURCE_TEXTS.iter().flat_map(|key| texts(source, key, &at)));
    }
    for (at, operation) in parts(rule, at, "to", "operation") {
        values.extend(OPERATION_TEXTS.iter().flat_map(|key| texts(operation, key, &at)));
    }
    for (at, condition) in parts(rule, at, "when", "") {
        if is_text_key(condition) {
            values.extend(["values", "notValues"].iter().flat_map(|key| texts(condition, key, &at)));
        }
    }
    for (at, value) in values.into_iter().filter(|(_, value)| has_literal_star(value)) {
        let reason =
            format!("in `{value}` a `*` stands for itself: only one at the start or end stands for any text");
        let is_whole =
            value.starts_with('/') && value.split('/').all(|part| part == "*" || !part.contains('*'));
        let fix = match is_whole {
            true => format!("use a path template: `{}`", value.replace('*', "{*}")),
            false => "use one `*` at the start or end, or in paths the operators `{*}` and `{**}` for whole segments"
                .to_owned(),
        };
        found.push(Found { code: "star-in-middle", at, reason, fix });
    }
}

/// Whether a condition compares texts in which only one star counts.
fn is_text_key(condition: &Value) -> bool {
    let key = condition.get("key").and_then(Value::as_str).unwrap_or_default();
    key == "source.principal" || key.starts_with("request.") || key == "connection.sni"
}

/// Headers of which a client can send several lines: of some they are compared joined by commas, of others each by itself.
fn headers(rule: &Value, at: &FieldPath, action: Action, found: &mut Vec<Found>) {
    for (at, condition) in elements(rule, "when", at) {
        let key = condition.get("key").and_then(Value::as_str).unwrap_or_default();
        let name = key.strip_prefix("request.headers[").and_then(|name| name.strip_suffix(']'));
        let name = name.map(str::to_ascii_lowercase).filter(|name| !name.starts_with(':') && name != "host");
        let Some((evaded, name)) = name.and_then(|name| Some((evaded(action, &name)?, name))) else {
            continue;
        };
        let Some((at, value)) =
            texts(condition, evaded.field, &at).into_iter().find(|(_, value)| *value != "*")
        else {
            continue;
        };
        let reason = match evaded.is_joined {
            true => format!("the values are joined by `,`, and then are not `{value}`"),
            false => format!("each is compared by itself, and one that is `{value}` suffices"),
        };
        let reason = format!("a client gets round it by sending {name} twice: {reason}");
        found.push(Found { code: "header-sent-twice", at, reason, fix: evaded.fix.to_owned() });
    }
}

/// The field of a condition that a header sent twice gets round.
struct Evaded {
    field: &'static str,
    is_joined: bool,
    fix: &'static str,
}

/// What a policy with this action cannot rely on for the header `name`. ALLOW with `values` is left out for headers whose
/// lines are compared one by one: whoever sends the value at all is let pass as meant.
fn evaded(action: Action, name: &str) -> Option<Evaded> {
    let is_joined = is_joined_header(name);
    let (field, fix) = match (action, is_joined) {
        (Action::Deny, true) => {
            ("values", "name what may pass instead: DENY with `notValues`, or ALLOW with `values`")
        }
        (Action::Allow, true) => ("notValues", "name what may pass instead, with `values`"),
        (Action::Deny, false) => ("notValues", "name what may not pass instead, with `values`"),
        (Action::Allow, false) | (Action::Audit | Action::Custom, _) => return None,
    };
    Some(Evaded { field, is_joined, fix })
}

/// Hosts without the port that clients send with them.
fn hosts(rule: &Value, at: &FieldPath, action: Action, services: &[&Service], found: &mut Vec<Found>) {
    let ports = services.iter().flat_map(|service| &service.ports).map(|port| port.port);
    let ports: BTreeSet<u16> = ports.filter(|port| !DEFAULT_PORTS.contains(port)).collect();
    let Some(first) = ports.first() else { return };
    for (at, operation) in parts(rule, at, "to", "operation") {
        for (key, excludes) in [("hosts", false), ("notHosts", true)] {
            let values = texts(operation, key, &at);
            let misses = |(_, host): &&(FieldPath, &str)| {
                let with_port = format!("{host}:{first}");
                let known =
                    |(_, other): &(FieldPath, &str)| *other == with_port || *other == format!("{host}:*");
                !host.ends_with('*') && !has_port(host) && !values.iter().any(known)
            };
            let Some((place, host)) = values.iter().find(misses) else { continue };
            let slips = excludes != (action == Action::Deny);
            let consequence =
                if slips { "their requests slip past it" } else { "the rule is not for their requests" };
            let reason = format!(
                "clients of port {first} send the host with its port, so `{host}` does not match, and \
                 {consequence}"
            );
            let named: Vec<String> =
                ports.iter().take(PORTS_NAMED_MAX).map(|port| format!("`{host}:{port}`")).collect();
            let fix = format!("add {}", named.join(", "));
            found.push(Found { code: "host-without-port", at: place.clone(), reason, fix });
        }
    }
}

fn has_port(host: &str) -> bool {
    host.rsplit_once(':')
        .is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Ports that no service behind the waypoint has: there a port is the service's, not the pod's.
fn ports(rule: &Value, at: &FieldPath, services: &[&Service], found: &mut Vec<Found>) {
    let served: BTreeSet<u16> =
        services.iter().flat_map(|service| &service.ports).map(|port| port.port).collect();
    let mut values = Vec::new();
    for (at, operation) in parts(rule, at, "to", "operation") {
        values.extend(["ports", "notPorts"].iter().flat_map(|key| texts(operation, key, &at)));
    }
    for (at, condition) in parts(rule, at, "when", "") {
        if condition.get("key").and_then(Value::as_str) == Some("destination.port") {
            values.extend(["values", "notValues"].iter().flat_map(|key| texts(condition, key, &at)));
        }
    }
    for (at, value) in values {
        if value.parse::<u16>().is_ok_and(|port| !served.contains(&port)) {
            let known: Vec<String> = served.iter().take(PORTS_NAMED_MAX).map(ToString::to_string).collect();
            let reason =
                format!("at a waypoint a port is the service's, and no service it is for has port {value}");
            let fix = format!("use a port of the service: {}", known.join(", "));
            found.push(Found { code: "port-not-served", at, reason, fix });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_star_at_an_end_stands_for_others() {
        for (value, expected) in [
            ("*", false),
            ("/a*", false),
            ("*.js", false),
            ("/a/*/b", true),
            ("*/productpage*", true),
            ("/a**", true),
            ("/a/{*}/b", false),
            ("*/*", true),
        ] {
            assert_eq!(has_literal_star(value), expected, "{value}");
        }
    }
}
