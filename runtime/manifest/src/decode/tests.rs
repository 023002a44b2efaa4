//! Each field of each kind: what it becomes, or which finding it makes.

use super::*;
use crate::testing::{object, short};
use cairn_mesh::{
    AuthorizationPolicy, BackendKind, Condition, FailStrategy, HttpRoute, Isolation, MetadataKey,
    MetadataMatch, PathMatch, PathNormalization, PathRewrite, PathRule, PluginMode, PluginPhase,
    PolicyAction, PullPolicy, RequestPrincipal, RouteFilter, TargetKind, TextMatch, ValueMatch, Values,
    WasmPlugin,
};

fn read(head: &str, spec: &str) -> Decoded {
    let indented: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    decode(&object(&format!("{head}\nspec:\n{indented}")), &MeshSettings::default())
}

const TARGET: &str = "targetRefs: [{kind: Service, name: web}]\n";

fn policy(spec: &str) -> Decoded {
    read(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: n}",
        spec,
    )
}

fn route(spec: &str) -> Decoded {
    read("apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: n}", spec)
}

fn plugin(spec: &str) -> Decoded {
    read(
        "apiVersion: extensions.istio.io/v1alpha1\nkind: WasmPlugin\nmetadata: {name: w, namespace: n}",
        spec,
    )
}

fn shorts(decoded: &Decoded) -> Vec<String> {
    decoded.findings.iter().map(short).collect()
}

fn the_policy(decoded: Decoded) -> AuthorizationPolicy {
    assert_eq!(shorts(&decoded), [""; 0]);
    match decoded.changes.into_iter().next() {
        Some(Change::Policy(policy)) => policy,
        other => panic!("{other:?}"),
    }
}

fn the_route(decoded: &Decoded) -> &HttpRoute {
    assert!(!decoded.broken, "{:?}", decoded.findings);
    match decoded.changes.as_slice() {
        [Change::Route(route)] => route,
        other => panic!("{other:?}"),
    }
}

fn the_plugin(decoded: Decoded) -> WasmPlugin {
    assert_eq!(shorts(&decoded), [""; 0]);
    match decoded.changes.into_iter().next() {
        Some(Change::Plugin(plugin)) => plugin,
        other => panic!("{other:?}"),
    }
}

fn the_refusal(decoded: &Decoded) -> &Unenforceable {
    match decoded.changes.as_slice() {
        [Change::Unenforceable(_, refusal)] => refusal,
        other => panic!("{other:?}"),
    }
}

fn text(value: &str) -> TextMatch {
    TextMatch::parse(value)
}

#[test]
fn every_field_of_a_policy_is_read() {
    let policy = the_policy(policy(&format!(
        "{TARGET}action: DENY\nrules:\n- from:\n  - source:\n      principals: [a/ns/b/sa/c, \"x*\"]\n      \
         notNamespaces: [dev]\n      ipBlocks: [10.0.0.1, fd00::/8]\n      trustDomains: [\"*.corp\"]\n  - source: \
         {{serviceAccounts: [web, other/job]}}\n  to:\n  - operation:\n      hosts: [Shop.Example]\n      ports: \
         [\"80\"]\n      notMethods: [GET]\n      paths: [/a, \"/b/{{**}}\"]\n  when:\n  - {{key: \
         \"request.headers[X-Team]\", values: [\"*\"]}}\n  - {{key: destination.port, notValues: [\"81\"]}}\n"
    )));
    assert_eq!(policy.action, PolicyAction::Deny);
    assert_eq!((policy.targets[0].kind, &*policy.targets[0].name), (TargetKind::Service, "web"));
    let rule = &policy.rules[0];
    let source = &rule.from[0];
    assert_eq!(source.principals.any, [text("a/ns/b/sa/c"), text("x*")]);
    assert_eq!(*source.namespaces.none[0], *"dev");
    assert_eq!(source.ip_blocks.any[0].to_string(), "10.0.0.1/32");
    assert_eq!(source.ip_blocks.any[1].to_string(), "fd00::/8");
    assert_eq!(source.trust_domains.any, [text("*.corp")]);
    let accounts: Vec<String> =
        rule.from[1].service_accounts.any.iter().map(|a| format!("{}/{}", a.namespace, a.name)).collect();
    assert_eq!(accounts, ["n/web", "other/job"]);
    let operation = &rule.to[0];
    assert_eq!(operation.hosts.any, [text("shop.example")], "hosts are compared in lower case");
    assert_eq!(operation.ports.any, [80]);
    assert_eq!(operation.methods.none, [text("GET")]);
    assert_eq!(operation.paths.any, [PathMatch::Text(text("/a")), PathMatch::Template("/b/{**}".into())]);
    assert!(matches!(&rule.when[0], Condition::RequestHeader(name, values)
        if &**name == "x-team" && values.any == [TextMatch::Present]));
    assert!(matches!(&rule.when[1], Condition::DestinationPort(values) if values.none == [81]));
}

#[test]
fn questions_about_tokens_are_read() {
    let policy = the_policy(policy(&format!(
        "{TARGET}rules:\n- from:\n  - source: {{requestPrincipals: [i/s], notRequestPrincipals: [\"*\"]}}\n  when:\n  \
         - {{key: request.auth.principal, values: [\"i/*\"]}}\n  - {{key: request.auth.audiences, values: [a]}}\n  - \
         {{key: request.auth.presenter, notValues: [b]}}\n  - {{key: \"request.auth.claims[a][b]\", values: [c]}}\n  \
         - {{key: \"experimental.envoy.filters.http.jwt_authn[payload][g]\", values: [c, \"[d]\"]}}\n"
    )));
    let rule = &policy.rules[0];
    let principals = &rule.from[0].request_principals;
    assert_eq!(principals.any, [RequestPrincipal::parse("i/s")]);
    assert_eq!(principals.none, [RequestPrincipal::parse("*")]);
    let any = |value: &str| Values { any: vec![text(value)], none: Vec::new() };
    let metadata = MetadataKey {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: ["payload".into(), "g".into()].into(),
    };
    let matches = vec![MetadataMatch::Text(text("c")), MetadataMatch::Listed(text("d"))];
    let expected = [
        Condition::RequestPrincipal(Values { any: vec![RequestPrincipal::parse("i/*")], none: Vec::new() }),
        Condition::RequestAudiences(any("a")),
        Condition::RequestPresenter(Values { any: Vec::new(), none: vec![text("b")] }),
        Condition::RequestClaim(["a".into(), "b".into()].into(), any("c")),
        Condition::FilterMetadata(metadata, Values { any: matches, none: Vec::new() }),
    ];
    assert_eq!(rule.when, expected);
}

#[test]
fn a_custom_policy_names_its_provider() {
    let custom = format!(
        "{TARGET}action: CUSTOM\nprovider: {{name: x}}\nrules: [{{to: [{{operation: {{paths: [/a]}}}}]}}]"
    );
    let decoded = policy(&custom);
    assert_eq!(shorts(&decoded), [""; 0]);
    let [Change::CustomPolicy(custom)] = decoded.changes.as_slice() else { panic!("{decoded:?}") };
    assert_eq!((&*custom.provider, custom.policy.action), ("x", PolicyAction::Deny));
    assert_eq!(custom.policy.rules[0].to[0].paths.any.len(), 1);
    assert!(!decoded.broken, "it means something certain, so an older version must not stay");
}

#[test]
fn a_custom_policy_cannot_ask_who() {
    let from = |source: &str| (format!("from: [{{source: {{{source}}}}}]"), "spec.rules[0].from[0].source");
    let when = |key: &str| (format!("when: [{{key: \"{key}\", values: [a]}}]"), "spec.rules[0].when[0].key");
    for (rule, field) in [
        from("principals: [a]"),
        from("notPrincipals: [a]"),
        from("requestPrincipals: [a]"),
        from("namespaces: [a]"),
        from("serviceAccounts: [a]"),
        from("trustDomains: [a]"),
        when("source.principal"),
        when("source.namespace"),
        when("source.serviceAccount"),
        when("source.trustDomain"),
        when("request.auth.principal"),
        when("request.auth.audiences"),
        when("request.auth.presenter"),
        when("request.auth.claims[a]"),
    ] {
        let decoded = policy(&format!("{TARGET}action: CUSTOM\nprovider: {{name: x}}\nrules: [{{{rule}}}]"));
        assert_eq!(shorts(&decoded), [format!("error invalid-value {field}")], "{rule}");
    }
    let addresses =
        "rules: [{from: [{source: {ipBlocks: [10.0.0.1]}}], when: [{key: remote.ip, values: [10.0.0.1]}]}]";
    let decoded = policy(&format!("{TARGET}action: CUSTOM\nprovider: {{name: x}}\n{addresses}"));
    assert_eq!(shorts(&decoded), [""; 0]);
    for (provider, expected) in [
        ("", "missing-field spec"),
        ("provider: {}\n", "missing-field spec.provider"),
        ("provider: {name: \"\"}\n", "invalid-value spec.provider.name"),
    ] {
        let decoded = policy(&format!("{TARGET}action: CUSTOM\n{provider}rules: [{{}}]"));
        assert_eq!(shorts(&decoded), [format!("error {expected}")], "{provider}");
    }
}

#[test]
fn metadata_that_there_is_not_is_warned_of() {
    let decoded = policy(&format!(
        "{TARGET}rules: [{{when: [{{key: \"experimental.envoy.filters.a.b[c]\", notValues: [d]}}]}}]"
    ));
    assert_eq!(shorts(&decoded), ["warning not-supported spec.rules[0].when[0].key"]);
    assert!(matches!(decoded.changes.as_slice(), [Change::Policy(_)]));
}

#[test]
fn a_policy_without_rules_allows_nothing() {
    let policy = the_policy(policy(TARGET));
    assert_eq!((policy.action, policy.rules.len()), (PolicyAction::Allow, 0));
}

#[test]
fn wrong_policies_are_refused_at_the_exact_field() {
    let source = "rules[0].from[0].source";
    for (name, spec, expected) in [
        ("unknown field", "rule: []".to_owned(), "unknown-field spec.rule".to_owned()),
        (
            "action in lower case",
            "action: deny\nrules: [{}]".to_owned(),
            "invalid-value spec.action".to_owned(),
        ),
        ("deny without rules", "action: DENY".to_owned(), "missing-field spec".to_owned()),
        (
            "provider without custom",
            "provider: {name: x}".to_owned(),
            "invalid-value spec.provider".to_owned(),
        ),
        ("from is empty", "rules: [{from: []}]".to_owned(), "invalid-value spec.rules[0].from".to_owned()),
        (
            "source is empty",
            "rules: [{from: [{source: {}}]}]".to_owned(),
            format!("invalid-value spec.{source}"),
        ),
        ("no source", "rules: [{from: [{}]}]".to_owned(), "missing-field spec.rules[0].from[0]".to_owned()),
        (
            "number for text",
            "rules: [{to: [{operation: {ports: [80]}}]}]".to_owned(),
            "wrong-type spec.rules[0].to[0].operation.ports[0]".to_owned(),
        ),
        (
            "text for list",
            "rules: [{from: [{source: {principals: \"*\"}}]}]".to_owned(),
            format!("wrong-type spec.{source}.principals"),
        ),
        (
            "empty text",
            "rules: [{from: [{source: {principals: [a, \"\"]}}]}]".to_owned(),
            format!("invalid-value spec.{source}.principals[1]"),
        ),
        (
            "scheme in a principal",
            "rules: [{from: [{source: {principals: [\"spiffe://a/ns/b/sa/c\"]}}]}]".to_owned(),
            format!("invalid-value spec.{source}.principals[0]"),
        ),
        (
            "bad block",
            "rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]".to_owned(),
            format!("invalid-value spec.{source}.ipBlocks[0]"),
        ),
        (
            "two slashes in an account",
            "rules: [{from: [{source: {serviceAccounts: [a/b/c]}}]}]".to_owned(),
            format!("invalid-value spec.{source}.serviceAccounts[0]"),
        ),
        (
            "accounts beside namespaces",
            "rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]".to_owned(),
            format!("invalid-value spec.{source}"),
        ),
        (
            "star inside a trust domain",
            "rules: [{from: [{source: {trustDomains: [\"a*b\"]}}]}]".to_owned(),
            format!("invalid-value spec.{source}.trustDomains[0]"),
        ),
        (
            "port too high",
            "rules: [{to: [{operation: {ports: [\"65536\"]}}]}]".to_owned(),
            "invalid-value spec.rules[0].to[0].operation.ports[0]".to_owned(),
        ),
        (
            "half a template",
            "rules: [{to: [{operation: {paths: [\"/a/{*}.txt\"]}}]}]".to_owned(),
            "invalid-value spec.rules[0].to[0].operation.paths[0]".to_owned(),
        ),
        (
            "unknown condition",
            "rules: [{when: [{key: source.user, values: [a]}]}]".to_owned(),
            "invalid-value spec.rules[0].when[0].key".to_owned(),
        ),
        (
            "condition without values",
            "rules: [{when: [{key: source.ip}]}]".to_owned(),
            "missing-field spec.rules[0].when[0]".to_owned(),
        ),
    ] {
        let decoded = policy(&format!("{TARGET}{spec}"));
        assert_eq!(shorts(&decoded), [format!("error {expected}")], "{name}");
        assert!(decoded.broken, "{name}");
        let refusal = the_refusal(&decoded);
        assert_eq!(refusal.targets.len(), 1, "{name}: its target is refused");
        assert!(refusal.reason.contains("spec"), "{name}: {}", refusal.reason);
    }
}

#[test]
fn all_mistakes_are_found_at_once() {
    let decoded =
        policy(&format!("{TARGET}actoin: DENY\nrules: [{{from: [{{source: {{x: [], ipBlocks: [y]}}}}]}}]"));
    let expected = [
        "error unknown-field spec.actoin",
        "error unknown-field spec.rules[0].from[0].source.x",
        "error invalid-value spec.rules[0].from[0].source.ipBlocks[0]",
    ];
    assert_eq!(shorts(&decoded), expected);
}

#[test]
fn uncertain_targets_refuse_the_whole_namespace() {
    for (name, spec) in [
        ("unknown kind", "targetRefs: [{kind: Pod, name: x}]"),
        ("no name", "targetRefs: [{kind: Service}]"),
        ("another namespace", "targetRefs: [{kind: Service, name: x, namespace: other}]"),
        ("wrong type", "targetRefs: web"),
        ("empty", "targetRefs: []"),
        (
            "class outside the root namespace",
            "targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint}]",
        ),
        ("more than 16", &format!("targetRefs: [{}]", "{kind: Service, name: x}, ".repeat(17))),
    ] {
        let decoded = policy(spec);
        assert!(decoded.broken, "{name}");
        let refusal = the_refusal(&decoded);
        assert_eq!((refusal.targets.len(), &*refusal.namespace), (0, "n"), "{name}");
    }
}

#[test]
fn a_broken_policy_for_workloads_is_not_the_waypoints_to_refuse() {
    let decoded = policy("selector: {matchLabels: {app: web}}\nrules: [{x: 1}]");
    assert!(decoded.broken);
    assert!(matches!(decoded.changes.as_slice(), [Change::L7Removed(_)]));
}

#[test]
fn selector_and_targets_together_are_refused() {
    let decoded = policy(&format!("{TARGET}selector: {{matchLabels: {{app: web}}}}"));
    assert_eq!(shorts(&decoded), ["error selector-and-target-refs spec.selector"]);
    assert_eq!(the_refusal(&decoded).targets.len(), 1);
}

#[test]
fn dry_run_is_read_from_its_annotation() {
    let with = |value: &str, action: &str| {
        let head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: n\n";
        let head = format!("{head}  annotations: {{istio.io/dry-run: \"{value}\"}}");
        read(&head, &format!("{TARGET}action: {action}\nrules: [{{}}]"))
    };
    assert!(the_policy(with("true", "DENY")).dry_run);
    assert!(!the_policy(with("false", "DENY")).dry_run);
    let field = "metadata.annotations[\"istio.io/dry-run\"]";
    assert_eq!(shorts(&with("yes", "DENY")), [format!("error invalid-value {field}")]);
    assert_eq!(shorts(&with("true", "AUDIT")), [format!("error invalid-value {field}")]);
}

#[test]
fn what_cannot_be_tried_is_in_effect_and_says_so() {
    let said = ["error invalid-value metadata.annotations[\"istio.io/dry-run\"]"];
    let metadata = "metadata: {name: a, namespace: n, annotations: {istio.io/dry-run: \"true\"}}";
    let keys = "'{\"keys\":[{\"kty\":\"oct\",\"k\":\"a2V5\"}]}'";
    for (kind, spec) in [
        (
            "security.istio.io/v1\nkind: RequestAuthentication",
            format!("jwtRules: [{{issuer: me, jwks: {keys}}}]"),
        ),
        ("extensions.istio.io/v1alpha1\nkind: WasmPlugin", "url: file:///plugins/a.wasm".to_owned()),
    ] {
        let decoded = read(&format!("apiVersion: {kind}\n{metadata}"), &format!("{TARGET}{spec}"));
        assert_eq!(shorts(&decoded), said, "{kind}");
        assert!(!decoded.broken && decoded.changes.len() == 1, "{kind}: {:?}", decoded.changes);
    }
}

#[test]
fn a_document_that_is_not_yaml_refuses_its_namespace() {
    let mut broken = object(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: n}",
    );
    broken.broken = Some("line 3: x".into());
    let decoded = decode(&broken, &MeshSettings::default());
    assert!(decoded.broken);
    assert_eq!(the_refusal(&decoded).targets.len(), 0);
    assert!(the_refusal(&decoded).reason.contains("line 3"));
}

#[test]
fn every_field_of_a_route_is_read() {
    let decoded = route(
        "parentRefs: [{group: \"\", kind: Service, name: web, namespace: m, port: 80}]\nrules:\n- name: one\n  matches:\n  \
         - path: {type: Exact, value: /a}\n    headers: [{name: X-A, value: b}, {name: x-a, value: c}]\n    queryParams: \
         [{type: RegularExpression, name: q, value: \"[0-9]+\"}]\n    method: GET\n  - {}\n  filters:\n  - type: \
         RequestHeaderModifier\n    requestHeaderModifier: {set: [{name: X-S, value: \"1\"}], remove: [X-R]}\n  \
         backendRefs:\n  - {name: v1, port: 80, weight: 9}\n  - {name: v2, namespace: m, port: 81.0}\n  - {group: \
         example.com, kind: Bucket, name: b}\n- filters:\n  - type: RequestRedirect\n    requestRedirect: {scheme: \
         https, port: 8443, statusCode: 308, path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}}\n",
    );
    let route = the_route(&decoded);
    assert_eq!(route.parents[0].service.to_string(), "m/web");
    assert_eq!(route.parents[0].port, Some(80));
    let first = &route.rules[0];
    assert_eq!(first.matches[0].path, PathRule::Exact("/a".into()));
    assert_eq!(first.matches[0].headers.len(), 1, "of two with one name, the first counts");
    assert_eq!(*first.matches[0].headers[0].name, *"x-a");
    assert_eq!(first.matches[0].query[0].value, ValueMatch::Regex("[0-9]+".into()));
    assert_eq!(first.matches[0].method.as_deref(), Some("GET"));
    assert_eq!(first.matches[1].path, PathRule::Prefix("/".into()));
    assert!(matches!(&first.filters[0], RouteFilter::RequestHeaders(changes)
        if *changes.set[0].name == *"x-s" && *changes.remove[0] == *"x-r"));
    assert_eq!(first.backends[0].weight, 9);
    assert!(
        matches!(&first.backends[1].kind, BackendKind::Service { service, port: 81 } if service.to_string() == "m/v2")
    );
    assert!(matches!(&first.backends[2].kind, BackendKind::Invalid(_)));
    assert_eq!(first.broken, None, "one bad backend costs its own share only");
    assert!(matches!(&route.rules[1].filters[0], RouteFilter::Redirect(redirect)
        if redirect.status == 308 && redirect.path == Some(PathRewrite::Prefix("/x".into())) && redirect.port == Some(8443)));
    assert_eq!(shorts(&decoded), ["error invalid-backend spec.rules[0].backendRefs[2]"]);
}

#[test]
fn what_breaks_one_rule_leaves_the_others() {
    let good = "backendRefs: [{name: v1, port: 80}]";
    for (name, rule, expected) in [
        (
            "mirror",
            format!("filters: [{{type: RequestMirror, requestMirror: {{}}}}]\n  {good}"),
            "not-supported spec.rules[0].filters[0].type",
        ),
        (
            "extension",
            format!("filters: [{{type: ExtensionRef, extensionRef: {{}}}}]\n  {good}"),
            "not-supported spec.rules[0].filters[0].type",
        ),
        (
            "redirect with backends",
            format!("filters: [{{type: RequestRedirect, requestRedirect: {{hostname: a}}}}]\n  {good}"),
            "invalid-value spec.rules[0].filters",
        ),
        (
            "prefix rewrite of an exact match",
            format!(
                "matches: [{{path: {{type: Exact, value: /a}}}}]\n  filters: [{{type: URLRewrite, urlRewrite: {{path: \
                 {{type: ReplacePrefixMatch, replacePrefixMatch: /b}}}}}}]\n  {good}"
            ),
            "invalid-value spec.rules[0].filters",
        ),
        (
            "one bad expression of two matches",
            format!(
                "matches: [{{path: {{type: RegularExpression, value: \"(\"}}}}, {{method: GET}}]\n  {good}"
            ),
            "invalid-value spec.rules[0].matches[0].path.value",
        ),
        (
            "rewrite for one backend",
            "backendRefs: [{name: v1, port: 80, filters: [{type: URLRewrite, urlRewrite: {hostname: a}}]}]"
                .to_owned(),
            "not-supported spec.rules[0].backendRefs[0].filters",
        ),
    ] {
        let decoded = route(&format!("rules:\n- {rule}\n- {good}\n"));
        assert_eq!(shorts(&decoded), [format!("error {expected}")], "{name}");
        let route = the_route(&decoded);
        assert!(route.rules[0].broken.is_some(), "{name}");
        assert_eq!(route.rules[1].broken, None, "{name}");
    }
}

#[test]
fn a_rule_with_nothing_certain_to_match_is_left_out() {
    let decoded = route(
        "rules:\n- matches: [{path: {type: RegularExpression, value: \"(\"}}]\n- {backendRefs: [{name: a, port: 1}]}",
    );
    assert_eq!(the_route(&decoded).rules.len(), 1);
}

#[test]
fn wrong_routes_are_refused_at_the_exact_field() {
    for (name, spec, expected) in [
        ("unknown field", "rules: [{backends: []}]", "unknown-field spec.rules[0].backends"),
        (
            "path without slash",
            "rules: [{matches: [{path: {value: a}}], backendRefs: [{name: a, port: 1}]}]",
            "invalid-value spec.rules[0].matches[0].path.value",
        ),
        (
            "method in lower case",
            "rules: [{matches: [{method: get}], backendRefs: [{name: a, port: 1}]}]",
            "invalid-value spec.rules[0].matches[0].method",
        ),
        (
            "bad header name",
            "rules: [{matches: [{headers: [{name: \"a b\", value: c}]}], backendRefs: [{name: a, port: 1}]}]",
            "invalid-value spec.rules[0].matches[0].headers[0].name",
        ),
        (
            "port as text",
            "rules: [{backendRefs: [{name: a, port: \"80\"}]}]",
            "wrong-type spec.rules[0].backendRefs[0].port",
        ),
        (
            "port by name",
            "parentRefs: [{kind: Service, group: \"\", name: a, sectionName: http}]",
            "not-supported spec.parentRefs[0].sectionName",
        ),
        (
            "unknown filter",
            "rules: [{filters: [{type: Magic}], backendRefs: [{name: a, port: 1}]}]",
            "invalid-value spec.rules[0].filters[0].type",
        ),
    ] {
        let decoded = route(spec);
        assert!(decoded.broken && decoded.changes.is_empty(), "{name}");
        assert!(shorts(&decoded).contains(&format!("error {expected}")), "{name}: {:?}", shorts(&decoded));
    }
    assert_eq!(
        shorts(&route("rules: [{timeouts: {request: 1s}, backendRefs: [{name: a, port: 1}]}]")),
        ["warning not-supported spec.rules[0].timeouts"]
    );
    assert_eq!(shorts(&route("rules: [{}]")), ["warning no-backend spec.rules[0]"]);
}

#[test]
fn every_field_of_a_plugin_is_read() {
    let hash = "0123456789abcdef".repeat(4);
    let plugin = the_plugin(plugin(&format!(
        "{TARGET}url: file:///p.wasm\nsha256: {hash}\nphase: AUTHN\npriority: 10.0\nfailStrategy: FAIL_RELOAD\npluginName: \
         root\npluginConfig: {{limit: 1.0, ratio: 0.5, list: [true, null]}}\nvmConfig: {{env: [{{name: A, value: \
         b}}, {{name: H, valueFrom: HOST}}]}}\nimagePullPolicy: Always\nmatch: [{{mode: SERVER}}]\ntype: HTTP\n"
    )));
    assert_eq!(&*plugin.url, "file:///p.wasm");
    assert_eq!(plugin.sha256.as_deref(), Some(hash.as_str()));
    assert_eq!(
        (plugin.phase, plugin.priority, plugin.fail_strategy),
        (PluginPhase::Authn, 10, FailStrategy::Reload)
    );
    assert_eq!(&*plugin.plugin_name, "root");
    assert_eq!(&*plugin.config, r#"{"limit":1,"ratio":0.5,"list":[true,null]}"#);
    assert_eq!((&*plugin.env[0].0, &*plugin.env[0].1), ("A", "b"));
    assert_eq!((plugin.env.len(), plugin.host_env.as_slice()), (1, &["H".into()][..]));
    assert_eq!((plugin.pull_policy, plugin.pull_secret), (Some(PullPolicy::Always), None));
}

/// What a plugin with an annotation comes to, and what is said of it.
fn annotated(annotation: &str, value: &str, spec: &str) -> (Vec<Change>, Vec<String>) {
    let head = format!(
        "apiVersion: extensions.istio.io/v1alpha1\nkind: WasmPlugin\nmetadata: {{name: w, namespace: n, \
         annotations: {{{annotation}: '{value}'}}}}"
    );
    let decoded = read(&head, spec);
    let said = shorts(&decoded);
    (decoded.changes, said)
}

#[test]
fn annotations_say_what_wasm_plugin_has_no_field_for() {
    const SHARED: (bool, Isolation, PluginMode) = (false, Isolation::Shared, PluginMode::Enforce);
    for (annotation, value, expected, is_known) in [
        ("hold-headers", "true", (true, SHARED.1, SHARED.2), true),
        ("hold-headers", "false", SHARED, true),
        ("hold-headers", "yes", SHARED, false),
        ("isolation", "exchange", (false, Isolation::Exchange, SHARED.2), true),
        ("isolation", "shared", SHARED, true),
        ("isolation", "stream", SHARED, false),
        ("mode", "shadow", (false, SHARED.1, PluginMode::Shadow), true),
        ("mode", "enforce", SHARED, true),
        ("mode", "Shadow", SHARED, false),
    ] {
        let annotation = format!("cairn.dev/{annotation}");
        let (changes, said) = annotated(&annotation, value, &format!("{TARGET}url: file:///p.wasm"));
        let error = format!("error invalid-value metadata.annotations[\"{annotation}\"]");
        assert_eq!(said, if is_known { vec![] } else { vec![error] }, "{annotation} {value}");
        let [Change::Plugin(plugin)] = changes.as_slice() else { panic!("{changes:?}") };
        let found = (plugin.holds_heads, plugin.isolation, plugin.mode);
        assert_eq!(found, expected, "{annotation} {value}");
    }
}

#[test]
fn a_plugin_that_only_watches_stands_in_nobodys_way_when_it_cannot_run() {
    for (spec, said) in [
        ("url: file:///p.wasm\nmatch: [{ports: [{number: 80}]}]", "error not-supported spec.match[0].ports"),
        ("url: file:///p.wasm\nfailStrategy: NONE", "error invalid-value spec.failStrategy"),
        (
            "url: file:///p.wasm\ntype: NETWORK",
            "error not-supported metadata.annotations[\"cairn.dev/mode\"]",
        ),
    ] {
        for (mode, expected) in [("shadow", true), ("enforce", false)] {
            let (changes, found) = annotated("cairn.dev/mode", mode, &format!("{TARGET}{spec}"));
            let passes = matches!(changes.as_slice(), [Change::L7Removed(_)]);
            assert_eq!(passes, expected, "{spec} {mode}: {changes:?}");
            assert_eq!(
                found.contains(&said.to_owned()),
                mode == "shadow" || spec.contains("NONE"),
                "{found:?}"
            );
        }
    }
}

#[test]
fn a_connection_has_no_instance_of_its_own() {
    let spec = format!("{TARGET}url: file:///p.wasm\ntype: NETWORK");
    let (changes, said) = annotated("cairn.dev/isolation", "exchange", &spec);
    assert_eq!(said, ["error unenforceable metadata.annotations[\"cairn.dev/isolation\"]"]);
    assert!(matches!(changes.as_slice(), [Change::Unenforceable(..)]), "{changes:?}");
}

#[test]
fn an_unset_priority_is_the_lowest() {
    assert_eq!(the_plugin(plugin(&format!("{TARGET}url: file:///p.wasm"))).priority, i32::MIN);
}

#[test]
fn modules_come_from_registries_and_servers() {
    for url in
        ["oci://reg.example/p:v1", "reg.example/p:v1", "https://files.example/p.wasm", "http://f/p.wasm"]
    {
        let plugin = the_plugin(plugin(&format!("{TARGET}url: {url}")));
        assert_eq!((&*plugin.url, plugin.pull_policy, plugin.pull_secret), (url, None, None));
    }
    let secret = the_plugin(plugin(&format!("{TARGET}url: reg.example/p\nimagePullSecret: login")));
    assert_eq!(secret.pull_secret.as_deref(), Some("login"));
    for (spec, expected) in [
        ("url: file:///p\nimagePullSecret: login", "warning no-effect spec.imagePullSecret"),
        ("url: reg.example/p\nverificationKey: k", "warning no-effect spec.verificationKey"),
    ] {
        let decoded = plugin(&format!("{TARGET}{spec}"));
        assert_eq!(shorts(&decoded), [expected]);
        assert!(matches!(decoded.changes.as_slice(), [Change::Plugin(_)]), "{spec}");
    }
}

#[test]
fn pull_secrets_are_read_and_what_is_in_them_not_said() {
    let secret = |rest: &str| {
        let head = "apiVersion: v1\nkind: Secret\nmetadata: {name: login, namespace: n}\n";
        decode(&object(&format!("{head}{rest}")), &MeshSettings::default())
    };
    let typed = "type: kubernetes.io/dockerconfigjson\n";
    for data in [
        r#"data: {.dockerconfigjson: eyJhdXRocyI6IHt9fQ==}"#,
        r#"stringData: {.dockerconfigjson: '{"auths": {}}'}"#,
    ] {
        let decoded = secret(&format!("{typed}{data}"));
        assert_eq!(shorts(&decoded), [""; 0]);
        let [Change::PullSecret(found)] = decoded.changes.as_slice() else { panic!("{decoded:?}") };
        assert_eq!(&*found.config, r#"{"auths": {}}"#);
        assert!(!format!("{decoded:?}").contains("auths"));
    }
    assert!(secret("type: Opaque\ndata: {.dockerconfigjson: eyJhdXRocyI6IHt9fQ==}").changes.is_empty());
    for (rest, expected) in [
        ("data: {other: eA==}", "error missing-field data"),
        ("data: {.dockerconfigjson: c2VjcmV0}", "error invalid-value data"),
        ("data: {.dockerconfigjson: '?'}", "error invalid-value data"),
    ] {
        let said = shorts(&secret(&format!("{typed}{rest}")));
        assert!(said.len() == 1 && said[0].starts_with(expected), "{said:?}");
    }
}

#[test]
fn a_plugin_that_cannot_run_refuses_its_targets_unless_it_may_be_missing() {
    let spec = "url: file:///p.wasm\nmatch: [{ports: [{number: 80}]}]";
    let decoded = plugin(&format!("{TARGET}{spec}"));
    assert_eq!(shorts(&decoded), ["error unenforceable spec.match[0].ports"]);
    assert_eq!(the_refusal(&decoded).targets.len(), 1);
    let decoded = plugin(&format!("{TARGET}{spec}\nfailStrategy: FAIL_OPEN"));
    assert_eq!(shorts(&decoded), ["error not-supported spec.match[0].ports"]);
    assert!(matches!(decoded.changes.as_slice(), [Change::L7Removed(_)]));
}

#[test]
fn a_plugin_for_connections_may_be_for_some_ports_only() {
    for (name, matched, expected) in [
        ("no match", "", Some(&[][..])),
        ("a port", "match: [{ports: [{number: 9000}]}]", Some(&[9000][..])),
        (
            "ports of several",
            "match: [{ports: [{number: 9001}, {number: 9000}]}, {mode: SERVER, ports: [{number: 9000}]}]",
            Some(&[9000, 9001][..]),
        ),
        ("all of one, some of another", "match: [{ports: [{number: 9000}]}, {mode: SERVER}]", Some(&[][..])),
        ("ports of clients", "match: [{mode: CLIENT, ports: [{number: 9000}]}]", None),
        ("clients and some", "match: [{mode: CLIENT}, {ports: [{number: 9000}]}]", Some(&[9000][..])),
    ] {
        let decoded = plugin(&format!("{TARGET}url: file:///p.wasm\ntype: NETWORK\n{matched}"));
        match (decoded.changes.as_slice(), expected) {
            ([Change::Plugin(plugin)], Some(ports)) => {
                assert_eq!((plugin.kind, &*plugin.ports), (cairn_mesh::PluginKind::Network, ports), "{name}");
                assert_eq!(shorts(&decoded), [""; 0], "{name}");
            }
            ([Change::L7Removed(_)], None) => {}
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn wrong_plugins_are_refused_at_the_exact_field() {
    for (name, spec, expected) in [
        ("no url", "phase: AUTHN", "missing-field spec"),
        ("relative file", "url: file://p.wasm", "invalid-value spec.url"),
        ("unknown scheme", "url: ftp://a/b", "invalid-value spec.url"),
        ("an image with spaces", "url: oci://reg.example/a b", "invalid-value spec.url"),
        ("no image", "url: oci://", "invalid-value spec.url"),
        (
            "unknown pull policy",
            "url: file:///p\nimagePullPolicy: Never",
            "invalid-value spec.imagePullPolicy",
        ),
        (
            "a value for a variable of the proxy's",
            "url: file:///p\nvmConfig: {env: [{name: A, value: b, valueFrom: HOST}]}",
            "invalid-value spec.vmConfig.env[0].value",
        ),
        (
            "no port",
            "url: file:///p\ntype: NETWORK\nmatch: [{ports: [{number: 0}]}]",
            "invalid-value spec.match[0].ports[0].number",
        ),
        ("short digest", "url: file:///p\nsha256: abc", "invalid-value spec.sha256"),
        ("unknown phase", "url: file:///p\nphase: LATER", "invalid-value spec.phase"),
        ("unknown field", "url: file:///p\npluginconfig: {}", "unknown-field spec.pluginconfig"),
        ("config is text", "url: file:///p\npluginConfig: x", "wrong-type spec.pluginConfig"),
        ("priority is too high", "url: file:///p\npriority: 3000000000", "invalid-value spec.priority"),
        (
            "twice the same variable",
            "url: file:///p\nvmConfig: {env: [{name: A}, {name: A}]}",
            "invalid-value spec.vmConfig.env[1]",
        ),
    ] {
        let decoded = plugin(&format!("{TARGET}{spec}"));
        assert_eq!(shorts(&decoded), [format!("error {expected}")], "{name}");
        assert!(decoded.broken, "{name}");
    }
    assert_eq!(shorts(&plugin("url: file:///p")), ["warning not-attached spec"]);
    assert_eq!(
        shorts(&plugin(&format!("{TARGET}url: file:///p\nmatch: [{{mode: CLIENT}}]"))),
        ["warning not-attached spec.match"]
    );
}

#[test]
fn settings_come_from_the_config_map() {
    let text = |mesh: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n{mesh}"
        )
    };
    let base = MeshSettings { cluster_id: "c1".into(), ..MeshSettings::default() };
    let mesh = "    trustDomain: corp\n    trustDomainAliases: [old]\n    rootNamespace: mesh\n    pathNormalization: {normalization: MERGE_SLASHES}\n    \
                enableTracing: true\n";
    let decoded = decode(&object(&text(mesh)), &base);
    let [Change::Settings(settings)] = decoded.changes.as_slice() else { panic!("{decoded:?}") };
    assert_eq!((&*settings.trust_domain, &*settings.root_namespace), ("corp", "mesh"));
    assert_eq!(settings.trust_domain_aliases, ["old".into()]);
    assert_eq!(settings.path_normalization, PathNormalization::MergeSlashes);
    assert_eq!(&*settings.cluster_id, "c1", "what is not said stays");
    for (mesh, code) in
        [("    pathNormalization: {normalization: SOME}\n", "invalid-value"), ("    a: [\n", "bad-yaml")]
    {
        let decoded = decode(&object(&text(mesh)), &base);
        assert!(decoded.broken && decoded.changes.is_empty());
        assert_eq!(decoded.findings[0].code, code);
    }
    let other = object(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: shop}\ndata: {mesh: \"trustDomain: x\"}",
    );
    assert!(decode(&other, &base).changes.is_empty(), "another namespace's ConfigMap is not the mesh's");
}

#[test]
fn a_claim_of_the_token_is_matched_like_a_header() {
    let read = |name: &str| {
        let matches = format!("[{{headers: [{{name: \"{name}\", value: v}}, {{name: X-A, value: b}}]}}]");
        let parent = "parentRefs: [{group: \"\", kind: Service, name: web}]";
        route(&format!("{parent}\nrules: [{{matches: {matches}, backendRefs: [{{name: web, port: 80}}]}}]"))
    };
    for (name, expected) in [
        ("@request.auth.claims.sub", &["sub"][..]),
        ("@request.auth.claims.a.B.c", &["a", "B", "c"]),
        ("@request.auth.claims[sub]", &["sub"]),
        ("@request.auth.claims[me@x.io/a][b]", &["me@x.io/a", "b"]),
    ] {
        let decoded = read(name);
        let matched = &the_route(&decoded).rules[0].matches[0];
        let [claim] = matched.claims.as_slice() else { panic!("{name}: {matched:?}") };
        let path: Vec<&str> = claim.path.iter().map(|name| &**name).collect();
        assert_eq!((path.as_slice(), &claim.value), (expected, &ValueMatch::Exact("v".into())), "{name}");
        assert!(!claim.inverted, "{name}");
        assert_eq!(matched.headers.iter().map(|one| &*one.name).collect::<Vec<_>>(), ["x-a"], "{name}");
    }
    for name in [
        "@request.auth.claims",
        "@request.auth.claims.",
        "@request.auth.claims[a",
        "@request.auth.claims[a]b",
        "@x",
    ] {
        let decoded = read(name);
        assert_eq!(
            shorts(&decoded),
            ["error invalid-value spec.rules[0].matches[0].headers[0].name"],
            "{name}"
        );
    }
}
