//! Providers of external authorization: `extensionProviders` of the kinds `envoyExtAuthzGrpc` and `envoyExtAuthzHttp`.

use crate::diagnostic::Severity;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{AuthorizationProvider, CheckBody, CheckProtocol, HttpCheck, TextMatch};
use std::sync::Arc;
use std::time::Duration;

/// Istio's limit on providers.
const PROVIDERS_MAX: usize = 1000;
/// The most headers that one list names.
const HEADERS_MAX: usize = 64;
/// The most bytes of a body that are kept for a provider, whatever it wishes.
const BODY_BYTES_MAX: i64 = 16 << 20;
/// Istio's default.
const TIMEOUT: Duration = Duration::from_secs(600);

const GRPC: &str = "envoyExtAuthzGrpc";
const HTTP: &str = "envoyExtAuthzHttp";

/// Reads the providers of `entries`. One that cannot be read is left out and told: what would ask it is refused.
pub(super) fn decode(entries: &Entries<'_>, findings: &mut Findings) -> Vec<Arc<AuthorizationProvider>> {
    let mut providers: Vec<Arc<AuthorizationProvider>> = Vec::new();
    for node in entries.bounded_list("extensionProviders", PROVIDERS_MAX, findings) {
        let outer = std::mem::take(findings);
        let provider = provider(&node, findings).filter(|_| !findings.broken);
        let found = std::mem::replace(findings, outer);
        findings.list.extend(found.list);
        let Some(provider) = provider else { continue };
        if providers.iter().any(|known| known.name == provider.name) {
            let reason = format!("there is a provider `{}` already: this one is not used", provider.name);
            findings.note(Severity::Error, "invalid-value", &node.at.key("name"), reason);
        } else {
            providers.push(Arc::new(provider));
        }
    }
    providers
}

fn provider(node: &Node<'_>, findings: &mut Findings) -> Option<AuthorizationProvider> {
    let entries = node.any_map(findings);
    let (kind, is_grpc) = match (entries.get(GRPC), entries.get(HTTP)) {
        (Some(kind), None) => (kind, true),
        (None, Some(kind)) => (kind, false),
        (Some(_), Some(both)) => {
            findings.refuse("invalid-value", &both.at, format!("{GRPC} and {HTTP} are both set"));
            return None;
        }
        // Another kind, which others read.
        (None, None) => return None,
    };
    let name = entries.require("name", findings)?;
    let name_text = name.filled(findings)?;
    if !is_label(name_text) {
        let reason = format!("`{name_text}` is not a DNS label of at most 63 characters");
        findings.refuse("invalid-value", &name.at, reason);
    }
    let known: &[&str] = if is_grpc { &KNOWN_GRPC } else { &KNOWN_HTTP };
    let e = kind.map(known, findings);
    let service = e.require("service", findings)?;
    let (namespace, host) = match service.filled(findings)?.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, service.filled(findings)?),
    };
    if host.is_empty() || host.contains('/') || namespace == Some("") {
        findings.refuse("invalid-value", &service.at, "must be `host` or `namespace/host`");
    }
    let port = e.require("port", findings)?.port(findings)?;
    let flag = |key: &str, findings: &mut Findings| e.get(key).and_then(|node| node.flag(findings));
    flag("clearRouteCache", findings);
    Some(AuthorizationProvider {
        name: name_text.into(),
        host: host.into(),
        namespace: namespace.map(Arc::from),
        port,
        timeout: e.get("timeout").and_then(|node| node.duration(findings)).unwrap_or(TIMEOUT),
        fail_open: flag("failOpen", findings).unwrap_or(false),
        status_on_error: e.get("statusOnError").and_then(|node| status(&node, findings)).unwrap_or(403),
        body: e.get("includeRequestBodyInCheck").and_then(|node| body(&node, is_grpc, findings)),
        protocol: if is_grpc { CheckProtocol::Grpc } else { CheckProtocol::Http(http(&e, findings)) },
    })
}

const KNOWN_GRPC: [&str; 7] = [
    "service",
    "port",
    "timeout",
    "failOpen",
    "clearRouteCache",
    "statusOnError",
    "includeRequestBodyInCheck",
];

const KNOWN_HTTP: [&str; 14] = [
    "service",
    "port",
    "timeout",
    "failOpen",
    "clearRouteCache",
    "statusOnError",
    "includeRequestBodyInCheck",
    "pathPrefix",
    "includeRequestHeadersInCheck",
    "includeHeadersInCheck",
    "includeAdditionalHeadersInCheck",
    "headersToUpstreamOnAllow",
    "headersToDownstreamOnDeny",
    "headersToDownstreamOnAllow",
];

/// RFC 1123 §2.1.
fn is_label(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    text.len() <= 63 && text.bytes().all(is_inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// A status is written as text.
fn status(node: &Node<'_>, findings: &mut Findings) -> Option<u16> {
    let text = node.text(findings)?;
    let status = text.parse::<u16>().ok().filter(|status| (200..600).contains(status));
    if status.is_none() {
        findings.refuse("invalid-value", &node.at, format!("`{text}` is not a status from 200 to 599"));
    }
    status
}

fn body(node: &Node<'_>, is_grpc: bool, findings: &mut Findings) -> Option<CheckBody> {
    let e = node.map(&["maxRequestBytes", "allowPartialMessage", "packAsBytes"], findings);
    let bytes_max = e.require("maxRequestBytes", findings)?.integer(1..=BODY_BYTES_MAX, findings)?;
    let flag = |key: &str, findings: &mut Findings| e.get(key).and_then(|node| node.flag(findings));
    Some(CheckBody {
        bytes_max: usize::try_from(bytes_max).ok()?,
        allow_partial: flag("allowPartialMessage", findings).unwrap_or(false),
        as_bytes: flag("packAsBytes", findings).unwrap_or(false) && is_grpc,
    })
}

fn http(e: &Entries<'_>, findings: &mut Findings) -> HttpCheck {
    let prefix = e.get("pathPrefix");
    let path_prefix = prefix.as_ref().and_then(|node| node.text(findings)).unwrap_or_default();
    if let Some(node) = prefix.filter(|_| {
        !path_prefix.is_empty() && (!path_prefix.starts_with('/') || path_prefix.contains(['?', '#']))
    }) {
        findings.refuse("invalid-value", &node.at, "must begin with `/` and have neither query nor fragment");
    }
    let mut request_headers = headers(e, "includeRequestHeadersInCheck", findings);
    request_headers.extend(headers(e, "includeHeadersInCheck", findings));
    HttpCheck {
        path_prefix: path_prefix.into(),
        request_headers,
        additional_headers: additional(e, findings),
        upstream_on_allow: headers(e, "headersToUpstreamOnAllow", findings),
        downstream_on_deny: headers(e, "headersToDownstreamOnDeny", findings),
        downstream_on_allow: headers(e, "headersToDownstreamOnAllow", findings),
    }
}

/// Names of headers, or what they begin or end with.
fn headers(e: &Entries<'_>, key: &str, findings: &mut Findings) -> Vec<TextMatch> {
    let list = e.bounded_list(key, HEADERS_MAX, findings);
    let texts = list.iter().filter_map(|node| node.filled(findings));
    texts.map(|text| TextMatch::parse(&text.to_ascii_lowercase())).collect()
}

fn additional(e: &Entries<'_>, findings: &mut Findings) -> Vec<(Arc<str>, Arc<str>)> {
    let Some(node) = e.get("includeAdditionalHeadersInCheck") else { return Vec::new() };
    let mut headers = Vec::new();
    for (name, value) in node.any_map(findings).all() {
        let Some(text) = value.text(findings) else { continue };
        let is_name = !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.!#$%&'*+^`|~".contains(&byte));
        if text.replace("%%", "").contains('%') {
            let reason = "has a `%` operator, which is not supported: write `%%` for a percent sign";
            findings.refuse("invalid-value", &value.at, reason);
        } else if is_name && !text.contains(|c: char| c.is_ascii_control()) {
            headers.push((name.to_ascii_lowercase().into(), text.replace("%%", "%").into()));
        } else {
            findings.refuse("invalid-value", &value.at, "is not a header");
        }
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::FieldPath;

    fn read(yaml: &str) -> (Vec<Arc<AuthorizationProvider>>, Vec<String>) {
        let text = format!("extensionProviders:\n{yaml}");
        let document = crate::document::documents(&text).into_iter().next().unwrap().unwrap();
        let mut findings = Findings::default();
        let entries = Node::new(&document.value, FieldPath::root()).any_map(&mut findings);
        let providers = decode(&entries, &mut findings);
        assert!(!findings.broken, "the mesh's other settings are not in doubt");
        let said = findings.list.iter().map(|f| format!("{} {} {}", f.severity, f.code, f.field)).collect();
        (providers, said)
    }

    #[test]
    fn every_field_is_read() {
        let (providers, said) = read(
            "- name: grpc\n  envoyExtAuthzGrpc:\n    service: ns/authz.example\n    port: 9000\n    timeout: 0.5s\n    \
             failOpen: true\n    statusOnError: \"503\"\n    includeRequestBodyInCheck: {maxRequestBytes: 10, \
             allowPartialMessage: true, packAsBytes: true}\n- name: http\n  envoyExtAuthzHttp:\n    service: \
             authz.example\n    port: 8000\n    pathPrefix: /check\n    includeRequestHeadersInCheck: [X-Team, \"x-b-*\"]\n    \
             includeAdditionalHeadersInCheck: {X-From: 100%% mesh}\n    headersToUpstreamOnAllow: [\"*-user\"]\n    \
             headersToDownstreamOnDeny: [set-cookie]\n    headersToDownstreamOnAllow: [x-seen]\n- name: other\n  \
             prometheus: {}\n",
        );
        assert_eq!(said, [""; 0]);
        let [grpc, http] = providers.as_slice() else { panic!("{providers:?}") };
        let body = CheckBody { bytes_max: 10, allow_partial: true, as_bytes: true };
        let expected = AuthorizationProvider {
            name: "grpc".into(),
            host: "authz.example".into(),
            namespace: Some("ns".into()),
            port: 9000,
            timeout: Duration::from_millis(500),
            fail_open: true,
            status_on_error: 503,
            body: Some(body),
            protocol: CheckProtocol::Grpc,
        };
        assert_eq!(**grpc, expected);
        let check = HttpCheck {
            path_prefix: "/check".into(),
            request_headers: vec![TextMatch::Exact("x-team".into()), TextMatch::Prefix("x-b-".into())],
            additional_headers: vec![("x-from".into(), "100% mesh".into())],
            upstream_on_allow: vec![TextMatch::Suffix("-user".into())],
            downstream_on_deny: vec![TextMatch::Exact("set-cookie".into())],
            downstream_on_allow: vec![TextMatch::Exact("x-seen".into())],
        };
        let expected = AuthorizationProvider {
            name: "http".into(),
            host: "authz.example".into(),
            namespace: None,
            port: 8000,
            timeout: Duration::from_secs(600),
            fail_open: false,
            status_on_error: 403,
            body: None,
            protocol: CheckProtocol::Http(check),
        };
        assert_eq!(**http, expected);
    }

    #[test]
    fn a_provider_that_cannot_be_read_is_left_out_and_told() {
        for (name, provider, field) in [
            (
                "no port",
                "envoyExtAuthzGrpc: {service: a}",
                "missing-field extensionProviders[0].envoyExtAuthzGrpc",
            ),
            (
                "unknown field",
                "envoyExtAuthzGrpc: {service: a, port: 1, pathPrefix: /}",
                "unknown-field extensionProviders[0].envoyExtAuthzGrpc.pathPrefix",
            ),
            (
                "status",
                "envoyExtAuthzGrpc: {service: a, port: 1, statusOnError: \"99\"}",
                "invalid-value extensionProviders[0].envoyExtAuthzGrpc.statusOnError",
            ),
            (
                "body without bound",
                "envoyExtAuthzGrpc: {service: a, port: 1, includeRequestBodyInCheck: {}}",
                "missing-field extensionProviders[0].envoyExtAuthzGrpc.includeRequestBodyInCheck",
            ),
            (
                "relative prefix",
                "envoyExtAuthzHttp: {service: a, port: 1, pathPrefix: check}",
                "invalid-value extensionProviders[0].envoyExtAuthzHttp.pathPrefix",
            ),
            (
                "two slashes",
                "envoyExtAuthzHttp: {service: a/b/c, port: 1}",
                "invalid-value extensionProviders[0].envoyExtAuthzHttp.service",
            ),
            (
                "header",
                "envoyExtAuthzHttp: {service: a, port: 1, includeAdditionalHeadersInCheck: {\"a b\": c}}",
                "invalid-value extensionProviders[0].envoyExtAuthzHttp.includeAdditionalHeadersInCheck[\"a b\"]",
            ),
            (
                "operator",
                "envoyExtAuthzHttp: {service: a, port: 1, includeAdditionalHeadersInCheck: {x: \"100%% %PROTOCOL%\"}}",
                "invalid-value extensionProviders[0].envoyExtAuthzHttp.includeAdditionalHeadersInCheck.x",
            ),
        ] {
            let good = "- {name: b, envoyExtAuthzGrpc: {service: a, port: 1}}";
            let (providers, said) = read(&format!("- {{name: a, {provider}}}\n{good}\n"));
            assert_eq!(said, [format!("error {field}")], "{name}");
            assert_eq!(providers.len(), 1, "{name}");
        }
        let (_, said) = read("- {name: A_b, envoyExtAuthzGrpc: {service: a, port: 1}}\n");
        assert_eq!(said, ["error invalid-value extensionProviders[0].name"]);
        let twice = "- {name: a, envoyExtAuthzGrpc: {service: a, port: 1}}\n";
        let (providers, said) = read(&twice.repeat(2));
        assert_eq!(
            (providers.len(), said),
            (1, vec!["error invalid-value extensionProviders[1].name".to_owned()])
        );
    }
}
