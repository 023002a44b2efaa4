//! What sets of manifests are told beyond what makes them invalid.

use super::*;
use crate::testing::objects;
use crate::world::Addressing;
use std::net::IpAddr;

/// Numbers pods and services as they come.
#[derive(Default)]
struct Numbers(u8);

impl Addressing for Numbers {
    fn pod(&mut self, _: &str, _: &str) -> Option<IpAddr> {
        self.0 += 1;
        Some([10, 0, 0, self.0].into())
    }

    fn service(&mut self, _: &str, _: &str) -> Option<IpAddr> {
        self.0 += 1;
        Some([10, 1, 0, self.0].into())
    }
}

/// A namespace in the mesh, a waypoint for it, pods and services; `bare` has no waypoint.
const SHOP: &str = "---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: wp}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api-1, namespace: shop, labels: {app: api}}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {selector: {app: api}, ports: [{name: http, port: 8000, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: api}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: bare, namespace: shop, labels: {istio.io/use-waypoint: none}}
spec: {selector: {app: bare}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: bare-1, namespace: shop, labels: {app: bare}}
";

fn lints(text: &str) -> Vec<Diagnostic> {
    let objects = objects(&format!("{SHOP}{text}"));
    let settings = MeshSettings::default();
    let world = World::build(&objects, &mut Numbers::default(), &settings);
    lint(&objects, &world, &settings)
}

fn check(name: &str, text: &str, expected: &[&str]) {
    let found = lints(text);
    let told: Vec<String> = found
        .iter()
        .map(|one| {
            let object = one.object.as_deref().unwrap_or_default();
            let object = object.rsplit_once(['/', ' ']).map_or(object, |(_, name)| name);
            format!("{} {} {object} {}", one.severity, one.code, one.field)
        })
        .collect();
    assert_eq!(told, expected, "{name}: {found:#?}");
    for one in found {
        assert!(one.fix.is_some_and(|fix| !fix.is_empty()), "{name}: no fix for {}", one.code);
        assert!(crate::Code::named(one.code).is_some(), "{name}: {} is not listed", one.code);
        assert!(one.line > 0, "{name}: {} has no place", one.code);
    }
}

fn policy_in(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: \
         {namespace}}}\nspec:\n  {}\n",
        spec.replace('\n', "\n  ")
    )
}

/// A policy in the shop.
fn policy(name: &str, spec: &str) -> String {
    policy_in("shop", name, spec)
}

/// A policy on the service `api`.
fn on_api(name: &str, spec: &str) -> String {
    policy(name, &format!("targetRefs: [{{group: \"\", kind: Service, name: api}}]\n{spec}"))
}

#[test]
fn nothing_is_said_of_a_sound_mesh() {
    let sound = on_api("a", "rules: [{to: [{operation: {methods: [GET]}}]}]")
        + &policy(
            "b",
            "selector: {matchLabels: {app: api}}\nrules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/wp]}}]}]",
        );
    check("sound", &sound, &[]);
}

#[test]
fn policies_that_guard_nobody() {
    let outside =
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: out, namespace: other, labels: {app: out}}\n";
    let any = "rules: [{from: [{source: {namespaces: [x]}}]}]";
    for (name, text, expected) in [
        (
            "labels of no pod",
            policy("p", &format!("selector: {{matchLabels: {{app: apy}}}}\n{any}")),
            &["error selects-nothing p spec.selector"][..],
        ),
        ("no pods in the namespace", policy_in("empty", "p", any), &["error selects-nothing p spec"]),
        (
            "a pod outside the mesh",
            format!("{outside}{}", policy_in("other", "p", any)),
            &["error not-in-mesh p spec"],
        ),
        (
            "the waypoint's own pod",
            policy(
                "p",
                &format!("selector: {{matchLabels: {{gateway.networking.k8s.io/gateway-name: wp}}}}\n{any}"),
            ),
            &["error selector-on-waypoint p spec.selector"],
        ),
        (
            "pods without a waypoint",
            policy("p", &format!("selector: {{matchLabels: {{app: bare}}}}\n{any}")),
            &[],
        ),
    ] {
        check(name, &text, expected);
    }
}

#[test]
fn l4_policies_and_the_waypoint_that_stands_in_between() {
    let select = "selector: {matchLabels: {app: api}}";
    for (name, spec, expected) in [
        (
            "allows clients only",
            format!(
                "{select}\nrules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/web]}}}}]}}]"
            ),
            &["error waypoint-shut-out p spec.rules"][..],
        ),
        ("allows nothing", format!("{select}\naction: ALLOW"), &["error waypoint-shut-out p spec"]),
        (
            "allows the waypoint too",
            format!("{select}\nrules: [{{from: [{{source: {{serviceAccounts: [web, wp]}}}}]}}]"),
            &[],
        ),
        (
            "denies the waypoint",
            format!("{select}\naction: DENY\nrules: [{{from: [{{source: {{notServiceAccounts: [web]}}}}]}}]"),
            &["error waypoint-shut-out p spec.rules[0]"],
        ),
        (
            "denies clients that hide behind the waypoint",
            format!("{select}\naction: DENY\nrules: [{{from: [{{source: {{namespaces: [guests]}}}}]}}]"),
            &["warning client-hidden p spec.rules[0]"],
        ),
        (
            "denies whoever has no identity",
            format!("{select}\naction: DENY\nrules: [{{from: [{{source: {{notPrincipals: ['*']}}}}]}}]"),
            &[],
        ),
    ] {
        check(name, &policy("p", &spec), expected);
    }
}

#[test]
fn a_waypoint_that_nothing_uses() {
    let idle = "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: idle, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";
    check("idle", idle, &["warning waypoint-unused idle "]);
}

#[test]
fn values_that_match_other_texts_than_it_seems() {
    for (name, spec, expected) in [
        (
            "a star in the middle",
            "rules: [{to: [{operation: {paths: [/a, /a/*/b], methods: ['*']}}]}]",
            &["warning star-in-middle p spec.rules[0].to[0].operation.paths[1]"][..],
        ),
        ("a template", "rules: [{to: [{operation: {paths: ['/a/{*}/b']}}]}]", &[]),
        (
            "a star in a principal and in a condition",
            "rules: [{from: [{source: {principals: ['cluster.local/ns/*/sa/web']}}], when: [{key: 'request.headers[x]', values: \
             ['a*b']}]}]",
            &[
                "warning star-in-middle p spec.rules[0].from[0].source.principals[0]",
                "warning star-in-middle p spec.rules[0].when[0].values[0]",
            ],
        ),
        ("a star in a namespace", "rules: [{from: [{source: {namespaces: ['a-*-b']}}]}]", &[]),
        (
            "a host without the port",
            "rules: [{to: [{operation: {hosts: [api.shop, '*']}}]}]",
            &["warning host-without-port p spec.rules[0].to[0].operation.hosts[0]"],
        ),
        (
            "an excluded host without the port",
            "rules: [{to: [{operation: {notHosts: ['*.example']}}]}]",
            &["warning host-without-port p spec.rules[0].to[0].operation.notHosts[0]"],
        ),
        ("a host with the port", "rules: [{to: [{operation: {hosts: [api.shop, 'api.shop:8000']}}]}]", &[]),
        ("any port", "rules: [{to: [{operation: {hosts: ['api.shop*']}}]}]", &[]),
        (
            "the pod's port",
            "rules: [{to: [{operation: {ports: ['8080']}}], when: [{key: destination.port, values: ['8000', '1']}]}]",
            &[
                "warning port-not-served p spec.rules[0].to[0].operation.ports[0]",
                "warning port-not-served p spec.rules[0].when[0].values[1]",
            ],
        ),
        (
            "a header of one value to be denied",
            "action: DENY\nrules: [{when: [{key: 'request.headers[User-Agent]', values: [bot]}]}]",
            &["warning header-sent-twice p spec.rules[0].when[0].values[0]"],
        ),
        (
            "a header of one value to be allowed without a value",
            "rules: [{when: [{key: 'request.headers[authorization]', notValues: [admin]}]}]",
            &["warning header-sent-twice p spec.rules[0].when[0].notValues[0]"],
        ),
        (
            "a header to be denied without a value",
            "action: DENY\nrules: [{when: [{key: 'request.headers[x-role]', notValues: [user]}]}]",
            &["warning header-sent-twice p spec.rules[0].when[0].notValues[0]"],
        ),
        (
            "headers that are safe",
            "action: DENY\nrules: [{when: [{key: 'request.headers[origin]', values: ['*']}]}, {when: [{key: \
             'request.headers[:method]', values: [PUT]}]}, {when: [{key: 'request.headers[y]', values: [a]}]}, {when: \
             [{key: 'request.headers[origin]', notValues: [a]}]}]",
            &[],
        ),
        (
            "headers that are safe to allow by",
            "rules: [{when: [{key: 'request.headers[x]', values: [a]}]}, {when: [{key: 'request.headers[y]', notValues: \
             [b]}]}, {when: [{key: 'request.headers[origin]', values: [a]}]}]",
            &[],
        ),
    ] {
        check(name, &on_api("p", spec), expected);
    }
    let web = policy(
        "p",
        "targetRefs: [{group: \"\", kind: Service, name: web}]\nrules: [{to: [{operation: {hosts: [web]}}]}]",
    );
    check("a host at the port of HTTP", &web, &[]);
}

#[test]
fn rules_that_change_nothing() {
    let get = "rules: [{to: [{operation: {methods: [GET]}}]}]";
    let gateway = "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: wp}]";
    for (name, text, expected) in [
        (
            "a narrower rule of the same policy",
            on_api("p", "rules: [{to: [{operation: {paths: [/a*]}}]}, {to: [{operation: {paths: [/ab]}}]}]"),
            &["warning shadowed-rule p spec.rules[1]"][..],
        ),
        (
            "also when it comes first",
            on_api("p", "rules: [{to: [{operation: {paths: [/ab]}}]}, {to: [{operation: {paths: [/a*]}}]}]"),
            &["warning shadowed-rule p spec.rules[0]"],
        ),
        (
            "of two equal ones the later",
            on_api("a", get) + &on_api("b", get),
            &["warning shadowed-rule b spec.rules[0]"],
        ),
        (
            "by a policy on the whole waypoint",
            policy("z", &format!("{gateway}\n{get}")) + &on_api("a", get),
            &["warning shadowed-rule a spec.rules[0]"],
        ),
        (
            "not by one on a part of it",
            policy("z", &format!("{gateway}\n{get}"))
                + &on_api("a", "rules: [{to: [{operation: {methods: [GET, PUT]}}]}]"),
            &[],
        ),
        (
            "denied all the same",
            on_api("a", "rules: [{to: [{operation: {paths: [/x/a]}}]}, {to: [{operation: {paths: [/y]}}]}]")
                + &on_api("d", "action: DENY\nrules: [{to: [{operation: {paths: [/x/*]}}]}]"),
            &["warning denied-anyway a spec.rules[0]"],
        ),
        (
            "a denial that an allowance covers",
            on_api("a", "rules: [{}]")
                + &on_api("d", "action: DENY\nrules: [{to: [{operation: {paths: [/x]}}]}]"),
            &[],
        ),
    ] {
        check(name, &text, expected);
    }
}

#[test]
fn routes_that_no_request_reaches() {
    let route = |name: &str, parent: &str, rules: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{parentRefs: [{{group: \"\", kind: Service, name: {parent}}}], rules: [{rules}]}}\n"
        )
    };
    let to = "backendRefs: [{name: web, port: 80}]";
    for (name, text, expected) in [
        (
            "the same path again",
            route(
                "r",
                "api",
                &format!(
                    "{{matches: [{{path: {{value: /a}}}}], {to}}}, {{matches: [{{path: {{value: /a/}}}}], {to}}}"
                ),
            ),
            &["warning unreachable-route r spec.rules[1]"][..],
        ),
        (
            "in another route, younger by name",
            route("a", "api", &format!("{{{to}}}")) + &route("b", "api", &format!("{{{to}}}")),
            &["warning unreachable-route b spec.rules[0]"],
        ),
        (
            "of another service",
            route("a", "api", &format!("{{{to}}}")) + &route("b", "web", &format!("{{{to}}}")),
            &[],
        ),
        (
            "an expression behind any prefix",
            route(
                "r",
                "api",
                &format!(
                    "{{matches: [{{path: {{type: RegularExpression, value: '/v[12]'}}}}, {{path: {{value: /z}}}}], {to}}}, {{{to}}}"
                ),
            ),
            &["warning unreachable-route r spec.rules[0].matches[0]"],
        ),
        (
            "told apart by method",
            route("r", "api", &format!("{{matches: [{{method: GET}}], {to}}}, {{{to}}}")),
            &[],
        ),
    ] {
        check(name, &text, expected);
    }
}

const AUTHENTICATION: &str = "---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: shop}
spec:
  targetRefs: [{group: \"\", kind: Service, name: api}]
  jwtRules: [{issuer: https://issuer.example, audiences: [shop], jwks: '{\"keys\":[]}'}]
";

#[test]
fn tokens_that_nobody_verifies() {
    let asks = "rules: [{from: [{source: {requestPrincipals: ['https://issuer.example/*']}}]}]";
    let other = "rules: [{from: [{source: {requestPrincipals: ['https://other.example/me']}}]}]";
    for (name, text, expected) in [
        (
            "no authentication",
            on_api("p", asks),
            &["warning unverified-token p spec.rules[0].from[0].source.requestPrincipals[0]"][..],
        ),
        (
            "none for this service",
            AUTHENTICATION.to_owned()
                + &policy("p", &format!("targetRefs: [{{group: \"\", kind: Service, name: web}}]\n{asks}")),
            &["warning unverified-token p spec.rules[0].from[0].source.requestPrincipals[0]"],
        ),
        ("authenticated", AUTHENTICATION.to_owned() + &on_api("p", asks), &[]),
        (
            "another issuer",
            AUTHENTICATION.to_owned() + &on_api("p", other),
            &["warning claim-never-produced p spec.rules[0].from[0].source.requestPrincipals[0]"],
        ),
        (
            "another audience",
            AUTHENTICATION.to_owned()
                + &on_api("p", "rules: [{when: [{key: request.auth.audiences, values: [bank]}]}]"),
            &["warning claim-never-produced p spec.rules[0].when[0].values[0]"],
        ),
        (
            "any claim",
            AUTHENTICATION.to_owned()
                + &on_api("p", "rules: [{when: [{key: 'request.auth.claims[groups]', values: [staff]}]}]"),
            &[],
        ),
    ] {
        check(name, &text, expected);
    }
}

#[test]
fn providers_that_are_not_there() {
    let config = "---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    extensionProviders:
    - {name: authz, envoyExtAuthzGrpc: {service: authz.shop.svc.cluster.local, port: 9000}}
    - {name: authz-v2, envoyExtAuthzGrpc: {service: authz.shop.svc.cluster.local, port: 9000}}
";
    let custom = |name: &str, provider: &str| {
        on_api(name, &format!("action: CUSTOM\nprovider: {{name: {provider}}}\nrules: [{{}}]"))
    };
    for (name, text, expected) in [
        ("no MeshConfig", custom("p", "authz"), &["error missing-provider p spec.provider.name"][..]),
        ("known", format!("{config}{}", custom("p", "authz")), &[]),
        (
            "misspelt",
            format!("{config}{}", custom("p", "auth")),
            &["error missing-provider p spec.provider.name"],
        ),
        (
            "one begins with the other",
            format!("{config}{}{}", custom("p", "authz"), custom("q", "authz-v2")),
            &["warning provider-name-clash q spec.provider.name"],
        ),
    ] {
        check(name, &text, expected);
    }
}

/// A route of the service `api` that answers preflights.
const CORS: &str = "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: browsers, namespace: shop}
spec:
  parentRefs: [{group: \"\", kind: Service, name: api}]
  rules:
  - filters: [{type: CORS, cors: {allowOrigins: ['https://shop.example']}}]
    backendRefs: [{name: api, port: 8000}]
";

#[test]
fn preflights_that_policies_refuse() {
    let said = ["warning preflight-refused browsers spec.rules[0].filters[0]"];
    let a_token = "from: [{source: {requestPrincipals: ['*']}}]";
    for (name, policies, is_refused) in [
        ("no policy", String::new(), false),
        ("other methods", on_api("p", "rules: [{to: [{operation: {methods: [GET, POST]}}]}]"), true),
        ("all methods", on_api("p", "rules: [{to: [{operation: {paths: ['/a*']}}]}]"), false),
        ("all but this one", on_api("p", "rules: [{to: [{operation: {notMethods: [OPTIONS]}}]}]"), true),
        ("with a token", AUTHENTICATION.to_owned() + &on_api("p", &format!("rules: [{{{a_token}}}]")), true),
        (
            "with a claim",
            AUTHENTICATION.to_owned()
                + &on_api("p", "rules: [{when: [{key: 'request.auth.claims[groups]', values: [staff]}]}]"),
            true,
        ),
        (
            "without one claim",
            AUTHENTICATION.to_owned()
                + &on_api("p", "rules: [{when: [{key: 'request.auth.claims[groups]', notValues: [guest]}]}]"),
            false,
        ),
        (
            "by another policy",
            AUTHENTICATION.to_owned()
                + &on_api("p", &format!("rules: [{{{a_token}}}]"))
                + &on_api("q", "rules: [{to: [{operation: {methods: [OPTIONS]}}]}]"),
            false,
        ),
        (
            "denied without a token",
            AUTHENTICATION.to_owned()
                + &on_api("p", "action: DENY\nrules: [{from: [{source: {notRequestPrincipals: ['*']}}]}]"),
            true,
        ),
        (
            "denied without a token but for preflights",
            AUTHENTICATION.to_owned()
                + &on_api(
                    "p",
                    "action: DENY\nrules: [{from: [{source: {notRequestPrincipals: ['*']}}], to: [{operation: {notMethods: \
                     [OPTIONS]}}]}]",
                ),
            false,
        ),
        ("on trial", policy_on_trial(), false),
        (
            "of another service",
            policy(
                "p",
                "targetRefs: [{group: \"\", kind: Service, name: web}]\nrules: [{to: [{operation: {methods: [GET]}}]}]",
            ),
            false,
        ),
    ] {
        let expected = if is_refused { &said[..] } else { &[] };
        check(name, &format!("{CORS}{policies}"), expected);
    }
    let virtual_service = "---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: pages, namespace: shop}
spec: {hosts: [api], http: [{corsPolicy: {allowOrigins: [{exact: 'https://a'}]}, route: [{destination: {host: api}}]}]}
";
    let get = on_api("p", "rules: [{to: [{operation: {methods: [GET]}}]}]");
    let expected = ["warning preflight-refused pages spec.http[0].corsPolicy"];
    check("a VirtualService", &format!("{virtual_service}{get}"), &expected);
}

fn policy_on_trial() -> String {
    let get = on_api("p", "rules: [{to: [{operation: {methods: [GET]}}]}]");
    get.replace("name: p,", "name: p, annotations: {istio.io/dry-run: 'true'},")
}
