//! Manifests that change while the mesh runs: soon in effect, nothing dropped that need not be, and no mistake of an
//! author's opens or closes anything.

use crate::client::{Client, Who, connect, record, wait_for_text};
use crate::harness::{Mesh, SOON, is_established_to};
use crate::servers::TcpEcho;
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The mesh of this module's and other modules' tests that change theirs.
pub const SMALL: (&str, &str) = ("small.yaml", include_str!("manifests/small.yaml"));

/// A policy of the catalog that allows one method.
fn only(method: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: one-method, namespace: shop }}
spec:
  targetRefs: [{{ group: \"\", kind: Service, name: catalog }}]
  rules:
    - to:
        - operation:
            methods: [{method}]
"
    )
}

/// A policy that lets one service account connect to the pod `own`.
fn only_account(account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: one-account, namespace: shop }}
spec:
  selector: {{ matchLabels: {{ app: own }} }}
  rules: [{{ from: [{{ source: {{ principals: [cluster.local/ns/shop/sa/{account}] }} }}] }}]
"
    )
}

/// Asks until the answer is `status`, on one connection; returns how long that took.
async fn wait_for_status(client: &mut Client, status: u16) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let answer = client.get("/").await?;
        let taken = start.elapsed();
        if answer.status == status {
            return Ok(taken);
        }
        ensure!(taken < SOON, "still {} and not {status} after {taken:?}", answer.status);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_edit_is_in_effect_on_open_connections() -> Result<()> {
    let mesh = Mesh::start(&[SMALL, ("policy.yaml", &only("GET"))], &[])?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let mut client = Client::open(web, mesh.service("shop/catalog", 8000)?).await?;
    assert_eq!(client.get("/").await?.status, 200);
    let mut taken = Vec::new();
    // All on one connection: were it dropped, the next request on it would fail.
    for (method, status) in [("POST", 403), ("GET", 200), ("POST", 403), ("GET", 200), ("POST", 403)] {
        mesh.write("policy.yaml", &only(method))?;
        taken.push(wait_for_status(&mut client, status).await?);
    }
    // Other tests keep the machine busy, so any may be late; on a quiet one the slowest takes a tenth of a second.
    println!("from write to effect: {taken:?}");
    Ok(())
}

/// Whether the other end sends back what it gets.
pub async fn echoes(stream: &mut TcpStream) -> Result<bool> {
    let exchange = async {
        stream.write_all(b"ping").await?;
        let mut back = [0; 4];
        stream.read_exact(&mut back).await.map(|_| back)
    };
    Ok(timeout(SOON, exchange)
        .await
        .context("neither an echo nor an end")?
        .is_ok_and(|back| back == *b"ping"))
}

#[tokio::test]
async fn a_connection_is_cut_when_it_is_no_longer_allowed() -> Result<()> {
    let mesh = Mesh::start(&[SMALL, ("policy.yaml", &only_account("web"))], &[])?;
    let _application = TcpEcho::start(mesh.twin("shop/own", 9000)?).await?;
    let to = mesh.service("shop/direct", 8000)?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let mut stream = connect(web, to).await?;
    assert!(echoes(&mut stream).await?, "allowed");

    // An edit of something else leaves it alone.
    mesh.write("other.yaml", &only("GET"))?;
    let mut client = Client::open(web, mesh.service("shop/catalog", 8000)?).await?;
    mesh.write("other.yaml", &only("POST"))?;
    wait_for_status(&mut client, 403).await?;
    assert!(echoes(&mut stream).await?, "an edit of another's policy cut the connection");

    let start = Instant::now();
    mesh.write("policy.yaml", &only_account("somebody-else"))?;
    let mut byte = [0];
    let cut = timeout(SOON, stream.read(&mut byte)).await.context("the connection was not cut")?;
    assert!(matches!(cut, Ok(0) | Err(_)), "{cut:?}");
    let taken = start.elapsed();
    let is_it = |record: &serde_json::Value| {
        record["direction"] == "inbound"
            && record["error"].as_str().is_some_and(|error| error.contains("one-account"))
    };
    record(mesh.ztunnel(), "/connections", is_it).await?;
    assert!(connect(web, to).await.is_err(), "a new connection must be refused too");

    mesh.write("policy.yaml", &only_account("web"))?;
    let deadline = Instant::now() + SOON;
    while connect(web, to).await.is_err() {
        ensure!(Instant::now() < deadline, "still refused");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("from write to the cut: {taken:?}");
    Ok(())
}

#[tokio::test]
async fn a_broken_manifest_keeps_the_last_good_state_and_says_what_is_wrong() -> Result<()> {
    let mesh = Mesh::start(&[SMALL, ("policy.yaml", &only("POST"))], &[])?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let mut client = Client::open(web, mesh.service("shop/catalog", 8000)?).await?;
    wait_for_status(&mut client, 403).await?;

    // The field is misspelt: were it ignored, every method would be allowed.
    let text = only("GET").replace("methods:", "method:");
    mesh.write("policy.yaml", &text)?;
    let line = text.lines().position(|line| line.contains("method:")).context("no such line")? + 1;
    wait_for_text("policy.yaml:", || mesh.up_log()).await?;
    let log = mesh.up_log()?;
    let place = format!("policy.yaml:{line}:");
    let said = log.lines().find(|line| line.contains(&place));
    let said = said.with_context(|| format!("nothing about {place} in:\n{log}"))?;
    assert!(said.contains("ERROR") && said.contains("spec.rules[0].to[0].operation.method"), "{said}");
    assert_eq!(client.get("/").await?.status, 403, "the last good state forbids GET");

    // Not even YAML.
    mesh.write("policy.yaml", "spec: [")?;
    wait_for_text("policy.yaml:1:", || mesh.up_log()).await?;
    assert_eq!(client.get("/").await?.status, 403, "the last good state forbids GET");
    let mut another = Client::open(web, mesh.service("shop/catalog", 8000)?).await?;
    assert_eq!(another.get("/").await?.status, 403, "for new connections too");

    mesh.write("policy.yaml", &only("GET"))?;
    wait_for_status(&mut client, 200).await?;
    Ok(())
}

/// The connections of tunnels to this address, as the kernel has them.
fn tunnels_to(address: std::net::IpAddr) -> Result<usize> {
    let std::net::IpAddr::V4(address) = address else { anyhow::bail!("only IPv4 here") };
    // As the kernel prints it: the bytes in the order of memory.
    let written = format!("{:08X}:", u32::from_ne_bytes(address.octets()));
    let text = std::fs::read_to_string("/proc/net/tcp")?;
    let is_to = |line: &&str| {
        is_established_to(line, 15008)
            && line.split_whitespace().nth(2).is_some_and(|to| to.starts_with(&written))
    };
    Ok(text.lines().filter(is_to).count())
}

#[tokio::test]
async fn a_tunnel_to_a_pod_that_leaves_is_not_kept_for_the_next_one() -> Result<()> {
    let others: Vec<&str> =
        SMALL.1.split("\n---\n").filter(|one| !one.contains("kind: Pod\nmetadata: { name: own,")).collect();
    ensure!(others.len() + 1 == SMALL.1.split("\n---\n").count(), "the pod is not where it was");
    let mesh = Mesh::start(&[SMALL], &[])?;
    let own = mesh.pod("shop/own")?;
    let application = TcpEcho::start(mesh.twin("shop/own", 9000)?).await?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let mut stream = connect(web, mesh.service("shop/direct", 8000)?).await?;
    assert!(echoes(&mut stream).await?);
    drop((stream, application));
    assert!(tunnels_to(own)? > 0, "a connection is kept for the next tunnel");
    mesh.write(SMALL.0, &others.join("\n---\n"))?;
    // It would be kept for minutes, and longer than a minute were its end only to be noticed.
    let deadline = Instant::now() + SOON;
    while tunnels_to(own)? > 0 {
        ensure!(Instant::now() < deadline, "still kept");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
