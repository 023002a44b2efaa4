//! Certificates that are renewed every two seconds while requests go on.

use crate::client::{Client, Who, admin};
use crate::edits::SMALL;
use crate::harness::Mesh;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Certificates live for 4 s and are renewed at half of that.
const LIFE: &[&str] = &["--certificate-seconds", "4"];

/// How long requests are sent: some five lives of a certificate's half.
const LOAD: Duration = Duration::from_secs(11);

/// A pause of each client between requests, so that the test does not take the whole machine.
const PAUSE: Duration = Duration::from_millis(5);

#[tokio::test]
async fn no_request_fails_while_certificates_rotate() -> Result<()> {
    let mesh = Mesh::start(&[SMALL], LIFE)?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let to = mesh.service("shop/catalog", 8000)?;
    let (ztunnel, waypoint) = (mesh.ztunnel(), mesh.waypoint("shop/gate")?);
    let end = Instant::now() + LOAD;
    let load = [
        tokio::spawn(kept_connection(web, to, end)),
        tokio::spawn(new_connections(web, to, end)),
        tokio::spawn(new_connections(web, SocketAddr::new(mesh.pod("shop/catalog")?, 8080), end)),
    ];
    let mut serials: [BTreeSet<String>; 2] = Default::default();
    while Instant::now() < end {
        for (proxy, identity, seen) in [
            (ztunnel, "spiffe://cluster.local/ns/shop/sa/web", 0),
            (waypoint, "spiffe://cluster.local/ns/shop/sa/gate", 1),
        ] {
            serials[seen].insert(serial(proxy, identity).await?);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    for task in load {
        let count = task.await??;
        assert!(count > 20, "only {count} requests were sent");
    }
    for (proxy, serials) in ["ztunnel", "waypoint"].iter().zip(&serials) {
        assert!(serials.len() >= 3, "the {proxy} rotated its certificate less than twice: {serials:?}");
    }
    Ok(())
}

/// The serial number of the certificate that a proxy holds for an identity.
async fn serial(proxy: IpAddr, identity: &str) -> Result<String> {
    let dump = admin(proxy, "/config_dump").await?;
    let mut certificates = dump["certificates"].as_array().into_iter().flatten();
    let found = certificates.find(|certificate| certificate["identity"] == identity);
    // A ztunnel writes them as Istio's does, in a chain.
    let found = found.with_context(|| format!("no certificate of {identity} in {}", dump["certificates"]))?;
    let serial = [&found["serialNumber"], &found["certChain"][0]["serialNumber"]];
    Ok(serial.into_iter().find_map(Value::as_str).context("no serial number")?.to_owned())
}

async fn kept_connection(who: Who, to: SocketAddr, end: Instant) -> Result<usize> {
    let mut client = Client::open(who, to).await?;
    let mut count = 0;
    while Instant::now() < end {
        let answer = client.get("/").await.with_context(|| format!("request {count} of one connection"))?;
        ensure!(answer.status == 200, "request {count} of one connection: {} {}", answer.status, answer.body);
        count += 1;
        tokio::time::sleep(PAUSE).await;
    }
    Ok(count)
}

async fn new_connections(who: Who, to: SocketAddr, end: Instant) -> Result<usize> {
    let mut count = 0;
    while Instant::now() < end {
        let answer = crate::client::get(who, to, "/").await;
        let answer = answer.with_context(|| format!("connection {count} to {to}"))?;
        ensure!(answer.status == 200, "connection {count} to {to}: {} {}", answer.status, answer.body);
        count += 1;
        tokio::time::sleep(PAUSE).await;
    }
    Ok(count)
}
