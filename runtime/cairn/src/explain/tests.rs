//! What is said of requests, from manifests alone.

use super::*;
use clap::Parser;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    options: Options,
}

const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { istio.io/dataplane-mode: ambient, istio.io/use-waypoint: wp } }
---
apiVersion: v1
kind: Namespace
metadata: { name: bank, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Namespace
metadata: { name: out }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: wp, namespace: shop }
spec: { gatewayClassName: istio-waypoint, listeners: [{ name: mesh, port: 15008, protocol: HBONE }] }
---
apiVersion: v1
kind: Pod
metadata: { name: web, namespace: shop }
spec: { serviceAccountName: web-account }
---
apiVersion: v1
kind: Pod
metadata: { name: stranger, namespace: out }
---
apiVersion: v1
kind: Pod
metadata: { name: api-1, namespace: shop, labels: { app: api } }
---
apiVersion: v1
kind: Pod
metadata: { name: api-2, namespace: shop, labels: { app: api, closed: "yes" } }
---
apiVersion: v1
kind: Service
metadata: { name: api, namespace: shop }
spec:
  selector: { app: api }
  ports: [{ name: http, port: 8000, targetPort: 8080 }, { name: tcp, port: 9000, targetPort: 9000 }]
---
apiVersion: v1
kind: Service
metadata: { name: closed, namespace: shop }
spec: { selector: { closed: "yes" }, ports: [{ name: http, port: 8000, targetPort: 8080 }] }
---
apiVersion: v1
kind: Pod
metadata: { name: vault, namespace: bank, labels: { app: vault } }
---
apiVersion: v1
kind: Service
metadata: { name: vault, namespace: bank }
spec: { selector: { app: vault }, ports: [{ name: http, port: 80, targetPort: 8080 }] }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: bankers, namespace: bank }
spec: { rules: [{ from: [{ source: { namespaces: [bank] } }] }] }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: shut, namespace: shop }
spec: { selector: { matchLabels: { closed: "yes" } }, rules: [{ from: [{ source: { principals: [cluster.local/ns/x/sa/y] } }] }] }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: get-only, namespace: shop }
spec:
  targetRefs: [{ group: "", kind: Service, name: api }]
  rules:
    - to: [{ operation: { methods: [GET] } }]
    - from: [{ source: { principals: [cluster.local/ns/shop/sa/web-account] } }]
      to: [{ operation: { ports: ["9000"] } }]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: api, namespace: shop }
spec:
  parentRefs: [{ group: "", kind: Service, name: api, port: 8000 }]
  rules:
    - matches: [{ path: { value: /old } }]
      filters: [{ type: RequestRedirect, requestRedirect: { hostname: new.example, statusCode: 301 } }]
    - matches: [{ path: { value: /split } }]
      backendRefs: [{ name: api, port: 8000, weight: 3 }, { name: closed, port: 8000, weight: 1 }]
    - matches: [{ path: { value: /plain } }]
      filters: [{ type: URLRewrite, urlRewrite: { path: { type: ReplacePrefixMatch, replacePrefixMatch: /inner } } }]
      backendRefs: [{ name: vault, namespace: bank, port: 80 }]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: { name: tokens, namespace: shop }
spec:
  targetRefs: [{ group: "", kind: Service, name: closed }]
  jwtRules: [{ issuer: https://issuer.example, jwksUri: https://issuer.example/keys }]
---
apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: { name: tag, namespace: shop }
spec:
  targetRefs: [{ group: "", kind: Service, name: api }]
  url: file:///nowhere/tag.wasm
"#;

fn explained(arguments: &[&str]) -> Result<Explanation> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("mesh.yaml"), MESH)?;
    let path = directory.path().display().to_string();
    let options = Command::parse_from([&["explain", &path], arguments].concat()).options;
    from_manifests(directory.path(), &options)
}

#[test]
fn every_way_through_the_mesh_is_told() {
    let web = ["--from", "shop/web", "--to"];
    for (name, arguments, end, text, told) in [
        (
            "denied by the waypoint",
            [&web[..], &["api.shop:8000", "--method", "POST"]].concat(),
            r#"{"end":"denied","status":403"#,
            "403 from waypoint shop/wp, filter authorization: ALLOW get-only rule 0 failed on method: POST is not GET",
            "ALLOW get-only rule 1: no, port: 8000 is not 9000",
        ),
        (
            "redirected, by account",
            ["--from", "shop/web-account", "--to", "api:8000", "--path", "/old/x?y=z"].to_vec(),
            r#"{"end":"replied","status":301"#,
            "301 from waypoint shop/wp: redirected to http://new.example:8000/old/x?y=z",
            "rule shop/api/0",
        ),
        (
            "no route",
            [&web[..], &["api:8000", "--path", "/elsewhere"]].concat(),
            r#"{"end":"fails","status":404"#,
            "404 from waypoint shop/wp: no route matches",
            "shop/api/1: no, path: /elsewhere is not /split/…",
        ),
        (
            "some endpoints refuse the waypoint",
            [&web[..], &["api:8000", "--path", "/split"]].concat(),
            r#"{"end":"depends""#,
            "503 from waypoint shop/wp: the ztunnel of shop/api-2 refuses it: allow policies exist, but none allowed: shop/shut",
            "ALLOW shop/shut rule 0: no, principal: cluster.local/ns/shop/sa/wp is none that it asks for",
        ),
        (
            "rewritten",
            [&web[..], &["api:8000", "--path", "/plain/x"]].concat(),
            r#"{"end":"denied","status":503"#,
            "the ztunnel of bank/vault refuses it",
            "sent as GET api:8000/inner/x",
        ),
        (
            "a port without HTTP",
            [&web[..], &["api:9000"]].concat(),
            r#"{"end":"depends""#,
            "reaches shop/api-1",
            "the port carries no HTTP; allowed by ns[shop]-policy[get-only]-rule[1]",
        ),
        (
            "without a waypoint",
            [&web[..], &["vault.bank:80"]].concat(),
            r#"{"end":"denied""#,
            "the connection is refused by the ztunnel of bank/vault: allow policies exist, but none allowed: bank/bankers",
            "ALLOW bank/bankers rule 0: no, namespace: shop is none that it asks for",
        ),
        (
            "a client outside the mesh goes past the waypoint",
            ["--from", "out/stranger", "--to", "api.shop:8000"].to_vec(),
            r#"{"end":"depends""#,
            "reaches shop/api-1",
            "plain TCP straight to a pod, past any waypoint",
        ),
        (
            "an address that nobody knows",
            [&web[..], &["192.0.2.1:80"]].concat(),
            r#"{"end":"passes""#,
            "reaches an application outside the mesh",
            "plain TCP to 192.0.2.1:80",
        ),
    ] {
        let explanation = explained(&arguments).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let answer = serde_json::to_string(&explanation.answer).unwrap();
        assert!(answer.starts_with(end), "{name}: {answer}");
        assert!(explanation.answer.text.contains(text), "{name}: {answer}");
        let rendered = text::render(&explanation);
        assert!(rendered.contains(told), "{name}:\n{rendered}");
    }
}

#[test]
fn a_plugin_is_named_and_not_run() {
    let explanation = explained(&["--from", "shop/web", "--to", "api:8000", "--path", "/old"]).unwrap();
    assert_eq!(explanation.answer.unless, ["shop/tag decides otherwise"]);
    let rendered = text::render(&explanation);
    assert!(
        rendered.contains("filter shop/tag: would take part, and did not here: its code is not run"),
        "{rendered}"
    );
}

#[test]
fn keys_that_are_not_fetched_are_named() {
    let asked = ["--from", "shop/web", "--to", "closed:8000", "--jwt", "not.a.token"];
    let explanation = explained(&asked).unwrap();
    assert_eq!(explanation.answer.status, Some(401), "{:?}", explanation.answer);
    let missing =
        "the keys of RequestAuthentication shop/tokens are given with --jwks: none are fetched here";
    assert_eq!(explanation.answer.unless, [missing]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys.json");
    std::fs::write(&file, NO_KEYS).unwrap();
    let keys = file.display().to_string();
    let explanation = explained(&[&asked[..], &["--jwks", &keys]].concat()).unwrap();
    assert_eq!(explanation.answer.unless, [""; 0]);
}

#[test]
fn what_a_request_holds_does_not_move_the_terminal() {
    let explanation = Explanation {
        request: "GET /".to_owned(),
        steps: Vec::new(),
        answer: serde_json::from_str(r#"{"end":"passes","text":"\u001b[31m"}"#).unwrap(),
    };
    assert!(text::render(&explanation).ends_with("=> \u{fffd}[31m\n"));
}
