//! Whom proxies believe: certificates of our CA, in our trust domain, for destinations that are theirs.

use crate::harness::SOON;
use crate::shop::{mesh, waypoint};
use anyhow::{Context, Result, bail};
use cairn_hbone::{ConnectError, Pool, PoolSettings, PoolTarget, TunnelStream};
use cairn_identity::{Authority, WorkloadCertificate};
use cairn_mesh::Identity;
use cairn_net::ConnectOptions;
use http::{HeaderMap, StatusCode};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The mesh's own CA, without its own reluctance to sign for other trust domains.
fn authority() -> Result<Authority> {
    let directory = mesh()?.state().join("ca");
    Ok(Authority::from_files(&directory.join("root-cert.pem"), &directory.join("root-key.pem"))?)
}

async fn certificate(authority: &Authority, trust_domain: &str) -> Result<Arc<WorkloadCertificate>> {
    let identity = Identity::new(trust_domain, "shop", "web")?;
    let ttl = Duration::from_secs(600);
    Ok(Arc::new(WorkloadCertificate::request(authority, &identity, ttl).await?))
}

/// Opens a tunnel by hand, from the web pod's address.
async fn tunnel(
    certificate: Arc<WorkloadCertificate>,
    connect: SocketAddr,
    server: &str,
    authority: &str,
) -> Result<Result<TunnelStream, ConnectError>> {
    let target = PoolTarget {
        certificate,
        connect,
        workload: None,
        identities: vec![server.parse()?],
        options: ConnectOptions { bind: Some(mesh()?.pod("shop/web")?), ..ConnectOptions::default() },
        authority: authority.to_owned(),
    };
    let pool = Pool::new(PoolSettings::default());
    let opening = pool.connect(&target, HeaderMap::new());
    tokio::time::timeout(SOON, opening).await.context("the proxy did not answer")
}

const WAYPOINT: &str = "spiffe://cluster.local/ns/shop/sa/shop-waypoint";
const LOBBY: &str = "spiffe://cluster.local/ns/bank/sa/lobby";

#[tokio::test]
async fn a_waypoint_takes_tunnels_for_its_own_destinations_only() -> Result<()> {
    let certificate = certificate(&authority()?, "cluster.local").await?;
    let at = SocketAddr::new(waypoint()?, 15008);
    let catalog = mesh()?.service("shop/catalog", 8000)?.to_string();
    for (authority, expected, what) in [
        (catalog.as_str(), None, "a service of its own"),
        ("catalog.shop.svc.cluster.local:8000", None, "the same by name"),
        (&mesh()?.service("shop/catalog", 8009)?.to_string(), Some(404), "a port that it has not"),
        (&mesh()?.service("bank/lobby", 8000)?.to_string(), Some(404), "a service of others"),
        (&format!("{}:8080", mesh()?.pod("bank/lobby")?), Some(404), "a pod of others"),
        ("127.0.0.1:15000", Some(404), "what runs beside it"),
        ("catalog.other.svc.cluster.local:8000", Some(404), "no service at all"),
    ] {
        match (tunnel(Arc::clone(&certificate), at, WAYPOINT, authority).await?, expected) {
            (Ok(mut stream), None) => {
                stream
                    .write_all(b"GET /items HTTP/1.1\r\nhost: catalog\r\nconnection: close\r\n\r\n")
                    .await?;
                let mut answer = Vec::new();
                tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.context(what)??;
                let answer = String::from_utf8_lossy(&answer);
                assert!(answer.starts_with("HTTP/1.1 200 "), "{what}: {answer}");
            }
            (Err(ConnectError::Refused(status)), Some(code)) => {
                assert_eq!(status, StatusCode::from_u16(code)?, "{what}")
            }
            (Ok(_), Some(_)) => bail!("{what}: {authority} was accepted"),
            (Err(error), _) => bail!("{what}: {authority}: {error:?}"),
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_ztunnel_takes_tunnels_for_the_pod_that_they_reach_only() -> Result<()> {
    let certificate = certificate(&authority()?, "cluster.local").await?;
    let lobby = mesh()?.pod("bank/lobby")?;
    let at = SocketAddr::new(lobby, 15008);
    assert!(tunnel(Arc::clone(&certificate), at, LOBBY, &format!("{lobby}:8080")).await?.is_ok());
    for authority in [format!("{}:8080", mesh()?.pod("bank/vault")?), "127.0.0.1:8080".to_owned()] {
        let refused = tunnel(Arc::clone(&certificate), at, LOBBY, &authority).await?;
        let is_refusal = matches!(refused, Err(ConnectError::Refused(StatusCode::NOT_FOUND)));
        assert!(is_refusal, "{authority}: {:?}", refused.err());
    }
    Ok(())
}

#[tokio::test]
async fn a_client_of_another_trust_domain_or_ca_is_not_believed() -> Result<()> {
    let ours = authority()?;
    let other = tempfile::tempdir()?;
    let theirs = Authority::open(&other.path().join("ca"), "cluster.local")?;
    let waypoint = SocketAddr::new(waypoint()?, 15008);
    let lobby = SocketAddr::new(mesh()?.pod("bank/lobby")?, 15008);
    let catalog = mesh()?.service("shop/catalog", 8000)?.to_string();
    let application = SocketAddr::new(lobby.ip(), 8080).to_string();
    for (at, authority, server) in
        [(waypoint, &catalog, "shop/sa/shop-waypoint"), (lobby, &application, "bank/sa/lobby")]
    {
        let own = format!("spiffe://cluster.local/ns/{server}");
        let believed = tunnel(certificate(&ours, "cluster.local").await?, at, &own, authority).await?;
        assert!(believed.is_ok(), "our own: {:?}", believed.err());
        // The client's key and CA are good, its trust domain is not; it does not mind the server's.
        for (issuer, trust_domain, what) in
            [(&ours, "elsewhere.local", "another trust domain"), (&theirs, "cluster.local", "another CA")]
        {
            let certificate = certificate(issuer, trust_domain).await?;
            let refused = tunnel(certificate, at, &own, authority).await?;
            let failed =
                matches!(refused, Err(ConnectError::Tls(_) | ConnectError::Http2(_) | ConnectError::Closed));
            assert!(failed, "{what} at {server}: {:?}", refused.map(|_| "a tunnel"));
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_ca_signs_for_its_own_trust_domain_only() -> Result<()> {
    let strict = Authority::open(&mesh()?.state().join("ca"), "cluster.local")?;
    assert!(certificate(&strict, "cluster.local").await.is_ok());
    assert!(certificate(&strict, "elsewhere.local").await.is_err());
    Ok(())
}
