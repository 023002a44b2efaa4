//! What expressions come to, attribute by attribute, and which are refused.

use super::*;
use crate::testing::Exchange;

fn text(expression: &str) -> Option<String> {
    let expression = Expression::parse(expression).unwrap_or_else(|error| panic!("{expression}: {error}"));
    Exchange::new().with(|_| (), |facts| expression.text(facts).map(|text| text.to_string()))
}

#[test]
fn every_attribute_has_its_value() {
    for (expression, expected) in [
        ("request.path", "/a/b?c=d"),
        ("request.url_path", "/a/b"),
        ("request.query", "c=d"),
        ("request.host", "cart:80"),
        ("request.scheme", "http"),
        ("request.method", "GET"),
        ("request.referer", "there"),
        ("request.useragent", "curl/8"),
        ("request.id", "0a1b"),
        ("request.protocol", "HTTP/1.1"),
        ("request.size", "3"),
        ("request.total_size", "103"),
        ("request.time", "2025-12-31T23:59:59.007+00:00"),
        ("request.time > timestamp('2025-01-01T00:00:00Z')", "true"),
        ("request.duration", "12.9ms"),
        ("request.duration > duration('10ms')", "true"),
        ("request.duration > duration('1s')", "false"),
        ("response.backend_latency", "11.25ms"),
        ("upstream.local_address", "10.0.0.9:50000"),
        ("upstream.transport_failure_reason", ""),
        ("metadata.filter_metadata['envoy.filters.http.jwt_authn']['payload']['iss']", "me"),
        ("has(metadata.filter_metadata.other.key)", "false"),
        ("request.headers['x-team']", "blue"),
        ("request.headers['X-Team']", "blue"),
        ("request.headers[':path']", "/a/b?c=d"),
        ("request.headers['x-request-id']", "0a1b"),
        ("request.auth.principal", "me/you"),
        ("request.auth.claims.iss", "me"),
        ("request.auth.claims['deep']['n']", "7"),
        ("response.code", "200"),
        ("response.code_details", "via_upstream"),
        ("response.flags", "0"),
        ("response.size", "5"),
        ("response.total_size", "95"),
        ("response.headers['x-out']", "1"),
        ("response.trailers['x-end']", "2"),
        ("source.address", "10.0.0.1:4000"),
        ("source.port", "4000"),
        ("source.principal", "spiffe://cluster.local/ns/shop/sa/web"),
        ("destination.address", "10.96.0.1:80"),
        ("destination.port", "80"),
        ("destination.principal", "spiffe://cluster.local/ns/shop/sa/cart"),
        ("upstream.address", "10.0.0.2:8080"),
        ("upstream.port", "8080"),
        (
            "metadata.filter_metadata['envoy.filters.http.rbac']['istio_dry_run_allow_shadow_engine_result']",
            "denied",
        ),
        ("upstream.request_attempt_count", "1"),
        ("connection.uri_san_local_certificate", "spiffe://cluster.local/ns/shop/sa/wp"),
        ("connection.id", "42"),
        ("connection.mtls", "true"),
        ("connection.requested_server_name", ""),
        ("connection.uri_san_peer_certificate", "spiffe://cluster.local/ns/shop/sa/web"),
        ("upstream_peer.name", "cart-0"),
        ("upstream_peer.workload", "cart"),
        ("upstream_peer.service", "cart-app"),
        ("upstream_peer.revision", "v1"),
        ("upstream_peer.cluster", "Kubernetes"),
        ("downstream_peer.namespace", "shop"),
        ("downstream_peer.app", "web-app"),
        ("downstream_peer.version", "v1"),
        ("downstream_peer.type", "pod"),
        ("downstream_peer.identity", "spiffe://cluster.local/ns/shop/sa/web"),
        ("filter_state['upstream_peer'].workload", "cart"),
        ("filter_state['wasm.downstream_peer'].workload", "web"),
        ("xds.cluster_name", "inbound-vip|80|http|cart"),
        ("xds.route_name", "shop/r/0"),
        ("xds.node.id", "waypoint~10.0.0.9~wp-0.shop~shop.svc.cluster.local"),
        ("node.metadata['NAMESPACE']", "shop"),
        ("xds.node.metadata['CLUSTER_ID']", "c1"),
    ] {
        assert_eq!(text(expression).as_deref(), Some(expected), "{expression}");
    }
}

#[test]
fn attributes_are_worked_with() {
    for (expression, expected) in [
        ("'test'", Some("test")),
        ("request.path == '/a/b?c=d'", Some("true")),
        ("request.url_path.startsWith('/a') && response.code < 300", Some("true")),
        ("request.method + '-' + string(response.code)", Some("GET-200")),
        ("has(request.headers.missing) ? 'there' : 'not there'", Some("not there")),
        ("has(request.headers.referer)", Some("true")),
        ("'x-team' in request.headers", Some("true")),
        ("'missing' in request.headers", Some("false")),
        ("request.headers.exists(name, name == 'x-team')", Some("true")),
        ("'a' in request.auth.claims.groups", Some("true")),
        ("request.auth.claims.deep.n + 1", Some("8")),
        ("upstream_peer.labels == ''", None),
        ("size(request.headers['x-long'])", Some("8")),
        ("request.url_path.matches('^/a/[a-z]$')", Some("true")),
        ("request.url_path.matches('^/b') || matches(request.method, 'E')", Some("true")),
        ("request.url_path.matches('^/' + request.headers['x-missing'])", None),
        ("request.url_path.matches('^/' + 'a')", Some("true")),
        ("response.code.matches('2')", None),
        // What is not there has no value, and is not looked at where it does not matter.
        ("request.headers['missing']", None),
        ("response.code == 200 || request.headers['missing'] == 'x'", Some("true")),
        ("connection.termination_details", None),
        ("connection.subject_peer_certificate", None),
        ("upstream.tls_version", None),
        ("xds.listener_direction", None),
        ("response.grpc_status", None),
        // Neither have lists and maps, as labels.
        ("request.headers", None),
    ] {
        let Ok(parsed) = Expression::parse(expression) else {
            assert_eq!(expected, None, "{expression}");
            continue;
        };
        let found = Exchange::new().with(|_| (), |facts| parsed.text(facts).map(|text| text.to_string()));
        assert_eq!(found.as_deref(), expected, "{expression}");
    }
}

#[test]
fn flags_are_envoys_bits() {
    let expression = Expression::parse("response.flags").unwrap();
    for (flags, expected) in [
        ("-", "0"),
        ("UH", "2"),
        ("UF", "32"),
        ("NR", "256"),
        ("DC", "16384"),
        ("UAEX", "4096"),
        ("URX,UF", "32800"),
    ] {
        let found = Exchange::new()
            .with(|record| record.flags = flags, |facts| expression.text(facts).map(|text| text.to_string()));
        assert_eq!(found.as_deref(), Some(expected), "{flags}");
    }
}

#[test]
fn a_filter_is_true_only_if_it_says_so() {
    for (expression, expected) in [
        ("response.code == 200", true),
        ("response.code != 200", false),
        ("'text'", false),
        ("request.headers['missing'] == 'x'", false),
        ("1 / 0 == 1", false),
    ] {
        let expression = Expression::parse(expression).unwrap();
        assert_eq!(Exchange::new().with(|_| (), |facts| expression.is_true(facts)), expected);
    }
}

#[test]
fn what_cannot_be_used_is_refused_with_its_reason() {
    let deep = format!("{}1{}", "(".repeat(100), ")".repeat(100));
    let long = format!("'{}'", "x".repeat(5000));
    let many = vec!["1"; 400].join(" + ");
    let loops = "request.headers.all(a, request.headers.all(b, a == b))";
    for (expression, expected) in [
        ("", "is not a CEL expression"),
        ("1 +", "is not a CEL expression"),
        ("request.nope", "there is no attribute `request.nope`"),
        ("request.path.matches('(')", "`(` is no pattern"),
        ("request.path.matches('(a{1000}){1000}')", "is no pattern"),
        ("nobody == 1", "there is no attribute `nobody`"),
        ("upstream_peer.shoe == ''", "there is no attribute `upstream_peer.shoe`"),
        (&deep, "costs too much"),
        (&long, "costs too much"),
        (&many, "costs too much"),
        (loops, "costs too much"),
    ] {
        let said = Expression::parse(expression).map(drop).unwrap_err().to_string();
        assert!(said.contains(expected), "{expression}: {said}");
    }
}

#[test]
fn only_the_headers_it_speaks_of_are_asked_for() {
    let mut wants = Wants::default();
    let expression = "request.headers['x-a'] == request.path && response.headers['x-b'] != ''";
    Expression::parse(expression).unwrap().want(&mut wants);
    assert_eq!(wants.request, cairn_telemetry::Wanted::Names(vec!["x-a".parse().unwrap()]));
    assert_eq!(wants.response, cairn_telemetry::Wanted::Names(vec!["x-b".parse().unwrap()]));
    assert!(wants.trailers.is_nothing());
}
