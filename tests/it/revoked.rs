//! Certificates that are revoked while the mesh runs: who holds one is out within a second, on open connections too.

use crate::client::{Who, admin, connect, metrics, record};
use crate::edits::{SMALL, echoes};
use crate::harness::{Mesh, SOON};
use crate::servers::TcpEcho;
use anyhow::{Context, Result, ensure};
use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

/// Writes the mesh's list of revoked certificates: those with these serial numbers.
fn revoke(mesh: &Mesh, list: &Path, serials: &[u128]) -> Result<()> {
    let read = |name| std::fs::read_to_string(mesh.state().join("ca").join(name));
    let issuer =
        Issuer::from_ca_cert_pem(&read("root-cert.pem")?, KeyPair::from_pem(&read("root-key.pem")?)?)?;
    let now = SystemTime::now();
    let revoked = |serial: &u128| RevokedCertParams {
        serial_number: SerialNumber::from_slice(&serial.to_be_bytes()),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    };
    let made = CertificateRevocationListParams {
        this_update: now.into(),
        next_update: (now + Duration::from_secs(600)).into(),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    replace(list, &made.signed_by(&issuer)?.pem()?)
}

fn replace(list: &Path, text: &str) -> Result<()> {
    let new = list.with_extension("new");
    std::fs::write(&new, text)?;
    Ok(std::fs::rename(new, list)?)
}

/// The serial number of the certificate that a ztunnel holds for a service account of the shop.
async fn serial(ztunnel: IpAddr, account: &str) -> Result<u128> {
    let dump = admin(ztunnel, "/config_dump").await?;
    let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
    let mut certificates = dump["certificates"].as_array().into_iter().flatten();
    let found = certificates.find(|certificate| certificate["identity"] == identity.as_str());
    let found = found.with_context(|| format!("no certificate of {identity}"))?;
    Ok(found["certChain"][0]["serialNumber"].as_str().context("no serial number")?.parse()?)
}

/// Waits until a metric has this value.
async fn wait_for_metric(ztunnel: IpAddr, line: &str) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let text = metrics(ztunnel).await?;
        if text.lines().any(|found| found == line) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no `{line}` in\n{text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn wait_until_taken(who: Who, to: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        if let Ok(mut stream) = connect(who, to).await
            && echoes(&mut stream).await?
        {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "still refused");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn who_is_revoked_is_out_and_stays_out_until_a_list_says_otherwise() -> Result<()> {
    let home = tempfile::tempdir()?;
    let list = home.path().join("ca-crl.pem");
    let mesh = Mesh::start_with(&[SMALL], &[], &[("CRL_PATH", list.as_os_str())])?;
    let _application = TcpEcho::start(mesh.twin("shop/own", 9000)?).await?;
    let (ztunnel, to) = (mesh.ztunnel(), mesh.service("shop/direct", 8000)?);
    let (web, catalog) = (Who::Pod(mesh.pod("shop/web")?), Who::Pod(mesh.pod("shop/catalog")?));
    let mut stream = connect(web, to).await?;
    assert!(echoes(&mut stream).await?, "there is no list yet");
    let mut kept = connect(catalog, to).await?;
    assert!(echoes(&mut kept).await?);

    // The client's: the server cuts it.
    let client = serial(ztunnel, "web").await?;
    let since = Instant::now();
    revoke(&mesh, &list, &[client])?;
    let cut = timeout(SOON, stream.read(&mut [0])).await.context("the connection was not cut")?;
    assert!(matches!(cut, Ok(0) | Err(_)), "{cut:?}");
    println!("from the list to the cut: {:?}", since.elapsed());
    let is_cut = |record: &Value| {
        record["direction"] == "inbound" && record["error"] == "the peer's certificate is revoked"
    };
    record(ztunnel, "/connections", is_cut).await?;
    assert!(connect(web, to).await.is_err(), "neither a session nor a handshake brings it back");
    assert!(echoes(&mut kept).await?, "another client goes on");
    let text = metrics(ztunnel).await?;
    let closed = text.lines().find(|line| {
        line.starts_with("istio_tcp_connections_closed_total{") && line.contains("\"CERT_REVOKED\"")
    });
    assert!(closed.is_some_and(|line| line.contains("reporter=\"destination\"")), "{text}");
    assert!(text.lines().any(|line| line == "cairn_crl_certificates 1"), "{text}");

    // What cannot be read changes nothing.
    replace(&list, "-----BEGIN X509 CRL-----\nMII\n")?;
    wait_for_metric(ztunnel, "cairn_crl_failures_total 1").await?;
    assert!(connect(web, to).await.is_err(), "what was revoked stays so");
    let is_logged = || async { Ok(mesh.log("ztunnel")?.contains("those known before stay revoked")) };
    crate::observe::until_true("a line of it in the log", is_logged).await?;

    // The server's: the client leaves it.
    let server = serial(ztunnel, "own").await?;
    let since = Instant::now();
    revoke(&mesh, &list, &[server])?;
    let cut = timeout(SOON, kept.read(&mut [0])).await.context("the connection was not cut")?;
    assert!(matches!(cut, Ok(0) | Err(_)), "{cut:?}");
    println!("from the list to the cut: {:?}", since.elapsed());
    assert!(connect(catalog, to).await.is_err());
    let text = metrics(ztunnel).await?;
    let refused = text.lines().find_map(|line| {
        line.strip_prefix("istio_crl_policy_rejections_total{reporter=\"source\"} ")?.parse::<u64>().ok()
    });
    assert!(refused.is_some_and(|count| count >= 2), "{text}");

    revoke(&mesh, &list, &[])?;
    wait_until_taken(web, to).await?;
    Ok(())
}
