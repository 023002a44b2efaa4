//! Telling a caller who may know what decided its request: the response header `x-cairn-decision`.
//!
//! Nobody else gets it, not even from the application: what comes from upstream under that name is removed.

use cairn_filter::{Connection, Exchange};
use cairn_mesh::TextMatch;
use http::{HeaderMap, HeaderName, HeaderValue};
use std::fmt::Write;

/// The header.
pub(crate) const DECISION: HeaderName = HeaderName::from_static("x-cairn-decision");

/// The most characters of one text in it.
const TEXT_CHARS_MAX: usize = 256;

/// Whether the client of a connection is one of those who may know.
pub(crate) fn may_know(explain_to: &[TextMatch], connection: &Connection) -> bool {
    // Only a proven identity counts.
    let Some(identity) = &connection.source.identity else { return false };
    explain_to.iter().any(|principal| principal.matches(identity.principal()))
}

/// Puts the decision on a response for a caller that may know it, and takes it from all others.
pub(crate) fn set(headers: &mut HeaderMap, exchange: &Exchange, may_know: bool) {
    if !may_know {
        headers.remove(DECISION);
        return;
    }
    if let Ok(value) = HeaderValue::try_from(decision(exchange)) {
        headers.insert(DECISION, value);
    }
}

/// A token and parameters, as a structured header field has them (RFC 9651 §3.3).
fn decision(exchange: &Exchange) -> String {
    let mut text = String::new();
    match (&exchange.denial, &*exchange.details) {
        (Some(denial), _) => {
            text.push_str("deny");
            parameter(&mut text, "policy", &denial.policy);
            parameter(&mut text, "reason", &denial.reason);
        }
        (None, "via_upstream") => text.push_str("allow"),
        (None, details) => {
            text.push_str("reply");
            parameter(&mut text, "details", details);
        }
    }
    if let (None, Some(policy)) = (&exchange.denial, &exchange.allowed_by) {
        parameter(&mut text, "policy", policy);
    }
    if let Some(route) = &exchange.route {
        parameter(&mut text, "route", route);
    }
    text
}

fn parameter(text: &mut String, name: &str, value: &str) {
    let _always = write!(text, ";{name}=\"");
    for character in value.chars().take(TEXT_CHARS_MAX) {
        match character {
            '"' | '\\' => text.extend(['\\', character]),
            ' '..='~' => text.push(character),
            // A string of a structured field is ASCII; what a client sent may be anything.
            _ => text.push('?'),
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_filter::{Denial, NoCallout, Peer, Protocol};
    use cairn_mesh::Identity;
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::time::{Instant, SystemTime};

    fn connection() -> Connection {
        let address = SocketAddr::from(([10, 0, 0, 1], 1));
        Connection {
            id: 1,
            worker: 0,
            source: Peer { address, identity: None, workload: None },
            destination: address,
            service: None,
            local: None,
            callout: Arc::new(NoCallout),
        }
    }

    fn exchange(details: &'static str) -> Exchange {
        let mut exchange =
            Exchange::new(Arc::new(connection()), Protocol::Http11, Instant::now(), SystemTime::now());
        exchange.details = details.into();
        exchange.route = Some("shop/catalog/0".into());
        exchange
    }

    #[test]
    fn the_decision_is_one_header_value() {
        let allowed =
            Exchange { allowed_by: Some("ns[a]-policy[p]-rule[0]".into()), ..exchange("via_upstream") };
        let denial = Denial { policy: "none".into(), reason: "path /\"é\n".repeat(100) };
        let denied = Exchange { denial: Some(denial), ..exchange("rbac_access_denied") };
        let text = r#"path /\"??"#.to_owned();
        // Cut at so many characters of the original: 28 times nine, and four.
        let reason = format!("{}path", text.repeat(28));
        for (name, exchange, expected) in [
            ("no policy", exchange("via_upstream"), r#"allow;route="shop/catalog/0""#.to_owned()),
            (
                "allowed",
                allowed,
                r#"allow;policy="ns[a]-policy[p]-rule[0]";route="shop/catalog/0""#.to_owned(),
            ),
            ("denied", denied, format!(r#"deny;policy="none";reason="{reason}";route="shop/catalog/0""#)),
            (
                "no route",
                Exchange { route: None, ..exchange("route_not_found") },
                r#"reply;details="route_not_found""#.to_owned(),
            ),
        ] {
            let mut headers = HeaderMap::new();
            headers.append(DECISION, HeaderValue::from_static("forged"));
            headers.append(DECISION, HeaderValue::from_static("twice"));
            set(&mut headers, &exchange, true);
            let values: Vec<&HeaderValue> = headers.get_all(DECISION).iter().collect();
            assert_eq!(values, [&*expected], "{name}");
            set(&mut headers, &exchange, false);
            assert!(headers.is_empty(), "{name}: others are told nothing");
        }
    }

    #[test]
    fn only_a_proven_identity_that_is_named_may_know() {
        let named =
            [TextMatch::parse("cluster.local/ns/ops/*"), TextMatch::parse("cluster.local/ns/shop/sa/web")];
        for (name, identity, expected) in [
            ("named", Some(("shop", "web")), true),
            ("of a namespace", Some(("ops", "any")), true),
            ("another", Some(("shop", "api")), false),
            ("nobody", None, false),
        ] {
            let mut connection = connection();
            let identity = identity.map(|(namespace, name)| Identity::new("cluster.local", namespace, name));
            connection.source.identity = identity.map(Result::unwrap);
            assert_eq!(may_know(&named, &connection), expected, "{name}");
            assert!(!may_know(&[], &connection), "{name}: nobody is named");
        }
    }
}
