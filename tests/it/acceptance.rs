//! The tables of Istio's own authorization suites, through a whole mesh: one application behind two waypoints with the
//! same policies, a client that most rules name and one that they do not.

use crate::client::{Client, Who, request};
use crate::harness::{Mesh, SOON};
use anyhow::{Result, ensure};
use http::Method;
use std::net::SocketAddr;
use std::time::Instant;

const MANIFESTS: [(&str, &str); 1] = [("acceptance.yaml", include_str!("manifests/acceptance.yaml"))];

/// A method and a path, headers, and the statuses that the clients `a` and `b` see.
type Row = (Method, &'static str, &'static [(&'static str, &'static str)], u16, u16);

const GET: Method = Method::GET;
const POST: Method = Method::POST;

const ROWS: [Row; 51] = [
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
    (GET, "/other", &[], 403, 403),
    (GET, "/hosts", &[("host", "other.example")], 200, 200),
    (GET, "/hosts", &[("host", "deny.example")], 403, 403),
    (GET, "/hosts", &[("host", "DENY.example")], 403, 403),
    (GET, "/hosts", &[("host", "prefix.any")], 403, 403),
    (GET, "/hosts", &[("host", "PREFIX.any")], 403, 403),
    (GET, "/hosts", &[("host", "a.suffix.example")], 403, 403),
    (GET, "/hosts", &[("host", "a.Suffix.Example")], 403, 403),
    (GET, "/hosts", &[("host", "suffix.example")], 200, 200),
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
    let mesh = Mesh::start(&MANIFESTS, &[])?;
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
    let answer = match Client::open(who, mesh.service("app/server", 9000)?).await {
        Ok(mut client) => client.get("/allowed").await,
        Err(refused) => Err(refused),
    };
    ensure!(answer.is_err(), "TCP was let in: {answer:?}");
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
    mesh.write("waypoint.yaml", WAYPOINT_MAY)?;
    wait_for_status(who, to, "/allowed", 200).await?;
    mesh.write("class.yaml", AT_WAYPOINTS)?;
    // No ALLOW policy is weaker for another that allows nothing.
    wait_for_status(who, to, "/allowed", 200).await?;
    wait_for_status(who, to, "/other", 403).await
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
