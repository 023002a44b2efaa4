//! The tables of Istio's own authorization suites, through a whole mesh: one application behind two waypoints with the
//! same policies, a client that most rules name and one that they do not.

use crate::client::{Client, Who, metrics, request};
use crate::explain::explained;
use crate::harness::{Mesh, SOON};
use anyhow::{Result, ensure};
use http::Method;
use std::net::SocketAddr;
use std::time::Instant;

const MESH: (&str, &str) = ("acceptance-mesh.yaml", include_str!("manifests/acceptance-mesh.yaml"));
const POLICIES: (&str, &str) = ("acceptance.yaml", include_str!("manifests/acceptance.yaml"));

/// A method and a path, headers, and the statuses that the clients `a` and `b` see.
type Row = (Method, &'static str, &'static [(&'static str, &'static str)], u16, u16);

const GET: Method = Method::GET;
const POST: Method = Method::POST;

const ROWS: [Row; 61] = [
    (GET, "/allowed", &[], 200, 200),
    (GET, "/allowed?x=y", &[], 200, 200),
    (GET, "/deny", &[], 403, 403),
    (GET, "/", &[], 403, 403),
    (GET, "/allowed-identity", &[], 200, 403),
    (GET, "/denied-identity", &[], 403, 403),
    (POST, "/explicit-deny", &[], 403, 403),
    (GET, "/explicit-deny", &[], 200, 200),
    (GET, "/allowed-wildcardtest", &[], 200, 200),
    (GET, "/global-deny", &[], 403, 403),
    (GET, "/global-deny?x=y", &[], 403, 403),
    (GET, "/global-deny/allow", &[], 200, 200),
    (GET, "/header", &[("x-foo", "foo")], 200, 200),
    (GET, "/header", &[("x-foo", "bar")], 403, 403),
    (GET, "/header", &[], 403, 403),
    (GET, "/not-header", &[("x-foo", "foo")], 200, 200),
    (GET, "/not-header", &[("x-foo", "bar")], 403, 403),
    (GET, "/not-header", &[], 200, 200),
    (GET, "/source-ip", &[], 200, 200),
    (GET, "/other-source-ip", &[], 403, 403),
    (GET, "/not-source-ip", &[], 403, 403),
    (GET, "/source-namespace", &[], 200, 403),
    (GET, "/not-source-namespace", &[], 403, 200),
    (GET, "/source-principal", &[], 200, 403),
    (GET, "/not-source-principal", &[], 403, 200),
    (GET, "/source-trust-domain", &[], 200, 200),
    (GET, "/other-trust-domain", &[], 403, 403),
    (GET, "/destination-ip", &[], 200, 200),
    (GET, "/other-destination-ip", &[], 403, 403),
    (GET, "/destination-port", &[], 200, 200),
    (GET, "/not-destination-port", &[], 403, 403),
    (GET, "/other-destination-port", &[], 403, 403),
    (GET, "/not-other-destination-port", &[], 200, 200),
    (GET, "/not-destination-ip", &[], 403, 403),
    (GET, "/not-other-destination-ip", &[], 200, 200),
    (GET, "/not-other-source-ip", &[], 200, 200),
    (GET, "/not-source-trust-domain", &[], 403, 403),
    (GET, "/sni", &[], 403, 403),
    (GET, "/not-sni", &[], 200, 200),
    (GET, "/other", &[], 403, 403),
    (GET, "/private", &[("host", "other.example")], 403, 403),
    (GET, "/hosts", &[("host", "other.example")], 200, 200),
    (GET, "/hosts", &[("host", "deny.example")], 403, 403),
    (GET, "/hosts", &[("host", "DENY.example")], 403, 403),
    (GET, "/hosts", &[("host", "prefix.any")], 403, 403),
    (GET, "/hosts", &[("host", "PREFIX.any")], 403, 403),
    (GET, "/hosts", &[("host", "a.suffix.example")], 403, 403),
    (GET, "/hosts", &[("host", "a.Suffix.Example")], 403, 403),
    (GET, "/hosts", &[("host", "suffix.example")], 200, 200),
    (GET, "/hosts", &[("host", "Internal.Example")], 403, 403),
    (GET, "/remote", &[("x-forwarded-for", "172.17.72.46")], 403, 403),
    (GET, "/remote", &[("x-forwarded-for", "192.168.5.233")], 403, 403),
    (GET, "/remote", &[("x-forwarded-for", "10.4.5.6")], 200, 200),
    (GET, "/not-remote", &[("x-forwarded-for", "10.2.3.4")], 403, 403),
    (GET, "/not-remote", &[("x-forwarded-for", "172.23.242.188")], 200, 200),
    (GET, "/remote-condition", &[("x-forwarded-for", "10.242.5.7")], 403, 403),
    (GET, "/remote-condition", &[("x-forwarded-for", "10.124.99.200")], 403, 403),
    (GET, "/remote-condition", &[("x-forwarded-for", "10.4.5.6")], 200, 200),
    (GET, "/allowed/../deny", &[], 403, 403),
    (GET, "/deny/%2e%2e/allowed", &[], 200, 200),
    (GET, "/allowed-wildcard/../deny", &[], 403, 403),
];

#[tokio::test]
async fn istio_s_tables_hold_through_a_mesh() -> Result<()> {
    let mesh = Mesh::start(&[MESH, POLICIES], &[])?;
    let (a, b) = (Who::Pod(mesh.pod("app/a")?), Who::Pod(mesh.pod("other/b")?));
    for service in ["app/server", "app/twin"] {
        let to = mesh.service(service, 8000)?;
        table(a, to, |row| row.3).await?;
        table(b, to, |row| row.4).await?;
    }
    only_the_service_it_names(&mesh, a).await?;
    grpc(&mesh, a, b).await?;
    nothing_of_http_on_tcp(&mesh, a).await?;
    default_deny(&mesh, a).await
}

async fn table(who: Who, to: SocketAddr, expected: impl Fn(&Row) -> u16) -> Result<()> {
    let mut client = Client::open(who, to).await?;
    for row in &ROWS {
        let (method, path, headers, ..) = row;
        let answer = client.send(request(method.clone(), path, headers)).await?;
        ensure!(answer.status == expected(row), "{who:?} {method} {path} {headers:?}: {}", answer.status);
    }
    Ok(())
}

async fn only_the_service_it_names(mesh: &Mesh, who: Who) -> Result<()> {
    for (service, status) in [("app/server", 403), ("app/sibling", 200), ("app/twin", 200)] {
        let answer = Client::open(who, mesh.service(service, 8000)?).await?.get("/health").await?;
        ensure!(answer.status == status, "{service}: {}", answer.status);
    }
    Ok(())
}

/// The ways to name the client `a`, and not `b`.
const IDENTITIES: [(&str, &str); 6] = [
    ("principal", "principals: [cluster.local/ns/app/sa/a]"),
    ("suffix", "principals: ['*/ns/app/sa/a']"),
    ("account", "serviceAccounts: [a]"),
    ("account-elsewhere", "serviceAccounts: [app/a]"),
    ("namespace", "namespaces: [app]"),
    ("not-namespace", "notNamespaces: [other]"),
];

#[tokio::test]
async fn identities_are_asked_for_by_http_grpc_and_tcp_alike() -> Result<()> {
    let written = IDENTITIES.map(|(name, source)| {
        let text = include_str!("manifests/identities.yaml");
        (format!("{name}.yaml"), text.replace("NAME", name).replace("SOURCE", source))
    });
    let texts = written.iter().map(|(name, text)| (&**name, &**text));
    let manifests: Vec<_> = [MESH].into_iter().chain(texts).collect();
    let mesh = Mesh::start(&manifests, &[])?;
    let (a, b) = (Who::Pod(mesh.pod("app/a")?), Who::Pod(mesh.pod("other/b")?));
    for (name, _) in IDENTITIES {
        let (allow, deny) = (format!("app/{name}-allow"), format!("app/{name}-deny"));
        for (who, is_named) in [(a, true), (b, false)] {
            for (service, path, expected) in [
                (&allow, "/allowed-identity-too", is_named),
                (&allow, "/allowed-identity-too?param=value", is_named),
                (&allow, "/deny", false),
                (&deny, "/deny", !is_named),
                (&deny, "/deny?x=y", !is_named),
                (&deny, "/deny/allow", true),
                (&deny, "/allow", true),
                (&deny, "/global-deny", false),
                (&deny, "/global-deny?x=y", false),
                (&deny, "/global-deny/allow", true),
            ] {
                let answer = Client::open(who, mesh.service(service, 8000)?).await?.get(path).await?;
                let status = if expected { 200 } else { 403 };
                ensure!(answer.status == status, "{service}{path} {who:?}: {}", answer.status);
            }
            for (service, expected) in [(&allow, is_named), (&deny, !is_named)] {
                let mut client = Client::open_http2(who, mesh.service(service, 7070)?).await?;
                let headers = [("content-type", "application/grpc"), ("te", "trailers")];
                let answer = client.send(request(POST, "/proto.EchoTestService/Say", &headers)).await?;
                let status = if expected { "" } else { "7" };
                ensure!(answer.header("grpc-status") == status, "{service} {who:?}: {answer:?}");
                let passes = passes_tcp(&mesh, who, service).await?;
                ensure!(passes == expected, "{service} {who:?}: TCP passes: {passes}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn who_may_connect_is_asked_at_the_waypoint_and_at_the_workload() -> Result<()> {
    let mesh = Mesh::start(&[MESH, ("l4.yaml", include_str!("manifests/l4.yaml"))], &[])?;
    let (a, b) = (Who::Pod(mesh.pod("app/a")?), Who::Pod(mesh.pod("other/b")?));
    for (service, by_a, by_b) in
        [("app/open", true, false), ("app/shut", false, false), ("outside/bare", true, true)]
    {
        for (who, expected) in [(a, by_a), (b, by_b)] {
            let passes = passes_tcp(&mesh, who, service).await?;
            ensure!(passes == expected, "{service} {who:?}: TCP passes: {passes}");
        }
    }
    for (pod, expected) in [("app/open", false), ("app/shut", false), ("outside/bare", true)] {
        let passes = passes(Who::Nobody, SocketAddr::new(mesh.pod(pod)?, 8080)).await;
        ensure!(passes == expected, "{pod} by a client outside the mesh: TCP passes: {passes}");
    }
    Ok(())
}

/// Whether a connection to the port of TCP carries bytes there and back.
async fn passes_tcp(mesh: &Mesh, who: Who, service: &str) -> Result<bool> {
    Ok(passes(who, mesh.service(service, 9000)?).await)
}

async fn passes(who: Who, to: SocketAddr) -> bool {
    let Ok(mut client) = Client::open(who, to).await else { return false };
    client.get("/allowed").await.is_ok_and(|answer| answer.status == 200)
}

/// A denial of gRPC is a status of gRPC.
async fn grpc(mesh: &Mesh, a: Who, b: Who) -> Result<()> {
    let to = mesh.service("app/server", 7070)?;
    let headers = [("content-type", "application/grpc"), ("te", "trailers")];
    for (who, status) in [(a, ""), (b, "7")] {
        let mut client = Client::open_http2(who, to).await?;
        let answer = client.send(request(POST, "/proto.EchoTestService/Echo", &headers)).await?;
        ensure!(answer.status == 200 && answer.header("grpc-status") == status, "{who:?}: {answer:?}");
    }
    Ok(())
}

/// Every ALLOW rule asks about HTTP, so a connection without it is let in by none.
async fn nothing_of_http_on_tcp(mesh: &Mesh, who: Who) -> Result<()> {
    ensure!(!passes_tcp(mesh, who, "app/server").await?, "TCP was let in");
    Ok(())
}

/// A policy without rules allows nothing: from the root namespace at every ztunnel, waypoints being clients like others;
/// named for their class, at every waypoint.
async fn default_deny(mesh: &Mesh, who: Who) -> Result<()> {
    const AT_ZTUNNELS: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: nothing, namespace: istio-system }
spec: {}
";
    const WAYPOINT_MAY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: waypoint, namespace: app }
spec:
  selector: { matchLabels: { app: server } }
  rules: [{ from: [{ source: { principals: [cluster.local/ns/app/sa/gate] } }] }]
";
    const AT_WAYPOINTS: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: nothing-at-waypoints, namespace: istio-system }
spec:
  targetRefs: [{ group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint }]
";
    let to = mesh.service("app/sibling", 8000)?;
    mesh.write("nothing.yaml", AT_ZTUNNELS)?;
    wait_for_status(who, to, "/allowed", 503).await?;
    ztunnels_explain(mesh, to, Some(503))?;
    mesh.write("waypoint.yaml", WAYPOINT_MAY)?;
    wait_for_status(who, to, "/allowed", 200).await?;
    ztunnels_explain(mesh, to, None)?;
    mesh.write("class.yaml", AT_WAYPOINTS)?;
    // No ALLOW policy is weaker for another that allows nothing.
    wait_for_status(who, to, "/allowed", 200).await?;
    wait_for_status(who, to, "/other", 403).await
}

/// What the waypoint says together with a ztunnel is what traffic meets; `status` is that of the mesh, if it refuses.
fn ztunnels_explain(mesh: &Mesh, to: SocketAddr, status: Option<u16>) -> Result<()> {
    let (waypoint, ztunnel) = (mesh.waypoint("app/gate")?.to_string(), mesh.ztunnel().to_string());
    let to = to.to_string();
    let asked = ["--from", "app/a", "--to", &to, "--path", "/allowed"];
    let alone = explained(&[&["--live", &waypoint], &asked[..]].concat())?;
    ensure!(alone["answer"]["end"] == "passes" && alone["answer"]["unless"][0].is_string(), "{alone:#}");
    let whole = explained(&[&["--live", &waypoint, "--ztunnel", &ztunnel], &asked[..]].concat())?;
    let end = if status.is_some() { "denied" } else { "passes" };
    ensure!(whole["answer"]["end"] == end && whole["answer"].get("unless").is_none(), "{whole:#}");
    ensure!(whole["answer"]["status"].as_u64() == status.map(u64::from), "{whole:#}");
    ensure!(whole.to_string().contains("ALLOW istio-system/nothing"), "the policy is named: {whole:#}");
    let pod = SocketAddr::new(mesh.pod("app/server")?, 8080).to_string();
    let by_ztunnel = explained(&["--live", &ztunnel, "--from", "other/b", "--to", &pod])?;
    ensure!(by_ztunnel["answer"]["end"] == "denied", "b is no waypoint: {by_ztunnel:#}");
    Ok(())
}

#[tokio::test]
async fn a_policy_on_trial_at_a_ztunnel_is_noted() -> Result<()> {
    const TRIAL: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: trial, namespace: app, annotations: { istio.io/dry-run: 'true' } }
spec:
  action: DENY
  rules: [{ from: [{ source: { namespaces: [other] } }] }]
";
    let mesh = Mesh::start(&[MESH, ("trial.yaml", TRIAL)], &[])?;
    let pod = SocketAddr::new(mesh.pod("app/server")?, 8080);
    let answer = Client::open(Who::Pod(mesh.pod("other/b")?), pod).await?.get("/").await?;
    ensure!(answer.status == 200, "it is on trial only: {}", answer.status);
    let counted = "cairn_dry_run_connections_total{namespace=\"app\",policy=\"trial\",decision=\"deny\"} 1";
    let text = metrics(mesh.ztunnel()).await?;
    ensure!(text.lines().any(|line| line == counted), "`{counted}` is not in\n{text}");
    let is_logged = || async { Ok(mesh.log("ztunnel")?.contains("app/trial rule 0 would deny")) };
    crate::observe::until_true("a line of it in the log", is_logged).await?;
    Ok(())
}

async fn wait_for_status(who: Who, to: SocketAddr, path: &'static str, status: u16) -> Result<()> {
    let start = Instant::now();
    loop {
        let answer = Client::open(who, to).await?.get(path).await?;
        if answer.status == status {
            return Ok(());
        }
        ensure!(start.elapsed() < SOON, "{path} is still {} and not {status}", answer.status);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
