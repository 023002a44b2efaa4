//! The values that policies match with, each read and checked.

use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{HostMatch, PathMatch, RequestPrincipal, ServiceAccount, TextMatch, Values};
use ipnet::IpNet;
use std::net::IpAddr;
use std::sync::Arc;

/// Istio's limit on the length of a service account.
const SERVICE_ACCOUNT_LEN_MAX: usize = 320;

/// Reads a list and its opposite. An empty list is refused: it would quietly mean any.
pub(super) fn values<T>(
    entries: &Entries<'_>,
    any: &str,
    none: &str,
    findings: &mut Findings,
    parse: impl Fn(&Node<'_>, &str, &mut Findings) -> Option<T>,
) -> Values<T> {
    let mut list = |key: &str| -> Vec<T> {
        let Some(node) = entries.get(key) else { return Vec::new() };
        let items = node.list(findings);
        if items.is_empty() && node.value.is_array() {
            findings.refuse("invalid-value", &node.at, "must not be empty: leave it out to mean any");
        }
        items.iter().filter_map(|item| parse(item, item.filled(findings)?, findings)).collect()
    };
    Values { any: list(any), none: list(none) }
}

pub(super) fn text(_: &Node<'_>, text: &str, _: &mut Findings) -> Option<Arc<str>> {
    Some(text.into())
}

pub(super) fn text_match(_: &Node<'_>, text: &str, _: &mut Findings) -> Option<TextMatch> {
    Some(TextMatch::parse(text))
}

pub(super) fn principal(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<TextMatch> {
    if text.starts_with("spiffe://") {
        findings.refuse(
            "invalid-value",
            &node.at,
            "principals are written without `spiffe://`, and never match with it",
        );
        return None;
    }
    Some(TextMatch::parse(text))
}

pub(super) fn request_principal(_: &Node<'_>, text: &str, _: &mut Findings) -> Option<RequestPrincipal> {
    Some(RequestPrincipal::parse(text))
}

pub(super) fn host(_: &Node<'_>, text: &str, _: &mut Findings) -> Option<HostMatch> {
    Some(TextMatch::parse(&text.to_ascii_lowercase()))
}

pub(super) fn ip_block(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<IpNet> {
    let block = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    if block.is_none() {
        findings.refuse("invalid-value", &node.at, format!("`{text}` is not an IP address or CIDR block"));
    }
    block
}

pub(super) fn port(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<u16> {
    let port = text.parse::<u16>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    if port.is_none() {
        findings.refuse("invalid-value", &node.at, format!("`{text}` is not a port number"));
    }
    port
}

pub(super) fn trust_domain(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<TextMatch> {
    let stars = text.matches('*').count();
    let at_an_end = text.starts_with('*') || text.ends_with('*');
    if text.contains('/') || stars > 1 || (stars == 1 && !at_an_end) {
        let reason = format!("`{text}` is not a trust domain with at most one `*` at its start or end");
        findings.refuse("invalid-value", &node.at, reason);
        return None;
    }
    Some(TextMatch::parse(text))
}

pub(super) fn service_account(
    node: &Node<'_>,
    text: &str,
    object: &Object,
    findings: &mut Findings,
) -> Option<ServiceAccount> {
    let (namespace, name) = text.split_once('/').unwrap_or((&object.name.namespace, text));
    let is_part = |part: &str| !part.is_empty() && !part.contains(['/', '*']);
    if !is_part(namespace) || !is_part(name) || text.len() > SERVICE_ACCOUNT_LEN_MAX {
        let reason = format!("`{text}` is not `namespace/name` or `name` of a service account");
        findings.refuse("invalid-value", &node.at, reason);
        return None;
    }
    Some(ServiceAccount { namespace: namespace.into(), name: name.into() })
}

pub(super) fn path(node: &Node<'_>, text: &str, findings: &mut Findings) -> Option<PathMatch> {
    if !text.contains(['{', '}']) {
        return Some(PathMatch::Text(TextMatch::parse(text)));
    }
    match template_fault(text) {
        None => Some(PathMatch::Template(text.into())),
        Some(fault) => {
            findings.refuse("invalid-value", &node.at, format!("`{text}` is not a path template: {fault}"));
            None
        }
    }
}

/// What is wrong with a path template (Istio `security.CheckValidPathTemplate`, Envoy's `uri_template`).
fn template_fault(text: &str) -> Option<&'static str> {
    const MARKS: &str = "-._~%!$&'()+,;:@=";
    let Some(rest) = text.strip_prefix('/') else { return Some("it must begin with `/`") };
    let is_literal = |segment: &str| segment.chars().all(|c| c.is_ascii_alphanumeric() || MARKS.contains(c));
    let last = rest.split('/').count() - 1;
    let mut ended = false;
    for (index, segment) in rest.split('/').enumerate() {
        match segment {
            "{*}" | "{**}" if ended => return Some("`{**}` must be its last operator"),
            "{**}" => ended = true,
            "{*}" => {}
            "" if index < last => return Some("it has an empty segment"),
            _ if segment.contains(['{', '}', '*']) => return Some("`{*}` or `{**}` must be a whole segment"),
            _ if !is_literal(segment) => return Some("it has a character that a path cannot have"),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::template_fault;

    #[test]
    fn template_is_checked() {
        for (template, valid) in [
            ("/foo/{*}", true),
            ("/foo/{**}/", true),
            ("/foo/{*}/bar/{**}", true),
            ("/{**}/cart", true),
            ("/foo/{*}.txt", false),
            ("/foo//{*}", false),
            ("/foo/{**}/{*}", false),
            ("/foo/{**}/{**}", false),
            ("/foo/*/{*}", false),
            ("/foo/{x}", false),
            ("/foo/{", false),
            ("foo/{*}", false),
            ("/foo bar/{*}", false),
        ] {
            assert_eq!(template_fault(template).is_none(), valid, "{template}");
        }
    }
}
