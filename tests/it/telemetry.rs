//! What the mesh says of what it did: metrics, access logs, and why.

use crate::client::{Client, get, metrics, record, request, wait_for, wait_for_text};
use crate::harness::SOON;
use crate::shop::{guest, mesh, service, waypoint, web};
use anyhow::{Result, ensure};
use http::Method;
use std::net::IpAddr;
use std::time::Duration;

/// The sum of a counter's series that have all of these labels.
fn sum(text: &str, name: &str, labels: &[(&str, &str)]) -> u64 {
    let has_all =
        |line: &&str| labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")));
    let series = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    series.filter(has_all).filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// Waits until a counter has grown by `count` over `before`: it is counted when an exchange or connection ends.
async fn wait_for_growth(
    proxy: IpAddr,
    name: &str,
    labels: &[(&str, &str)],
    before: u64,
    count: u64,
) -> Result<()> {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        let text = metrics(proxy).await?;
        let now = sum(&text, name, labels);
        if now >= before + count {
            return Ok(());
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "{name}{labels:?} went from {before} to {now}, not by {count}:\n{text}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_waypoint_counts_requests_with_istios_labels() -> Result<()> {
    let proxy = waypoint()?;
    let common = [
        ("reporter", "waypoint"),
        ("source_workload", "web"),
        ("source_workload_namespace", "shop"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
        ("source_canonical_service", "web"),
        ("destination_service", "precedence.shop.svc.cluster.local"),
        ("destination_service_name", "precedence"),
        ("destination_service_namespace", "shop"),
        ("request_protocol", "http"),
    ];
    let passed = [
        ("response_code", "200"),
        ("response_flags", "-"),
        ("destination_workload", "catalog-v1"),
        ("destination_principal", "spiffe://cluster.local/ns/shop/sa/catalog"),
        ("destination_version", "v1"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let allowed: Vec<_> = common.into_iter().chain(passed).collect();
    let denied: Vec<_> = common.into_iter().chain([("response_code", "403")]).collect();
    let before = metrics(proxy).await?;
    let mut client = Client::open(web()?, service("precedence")?).await?;
    for _ in 0..3 {
        assert_eq!(client.get("/allow").await?.status, 200);
    }
    assert_eq!(client.get("/other").await?.status, 403);
    for (labels, count) in [(&allowed, 3), (&denied, 1)] {
        let name = "istio_requests_total";
        wait_for_growth(proxy, name, labels, sum(&before, name, labels), count).await?;
        let name = "istio_request_duration_milliseconds_count";
        wait_for_growth(proxy, name, labels, sum(&before, name, labels), count).await?;
    }
    Ok(())
}

#[tokio::test]
async fn ztunnels_count_connections_from_both_sides() -> Result<()> {
    let proxy = mesh()?.ztunnel();
    let peers = [
        ("source_workload", "guest"),
        ("source_workload_namespace", "guests"),
        ("source_principal", "spiffe://cluster.local/ns/guests/sa/guest"),
        ("destination_workload", "vault"),
        ("destination_workload_namespace", "bank"),
        ("destination_principal", "spiffe://cluster.local/ns/bank/sa/vault"),
        ("destination_service", "vault.bank.svc.cluster.local"),
        ("request_protocol", "tcp"),
        ("connection_security_policy", "mutual_tls"),
        ("response_flags", "-"),
    ];
    let before = metrics(proxy).await?;
    let answer = get(guest()?, mesh()?.service("bank/vault", 8000)?, "/").await?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    for reporter in ["source", "destination"] {
        let labels: Vec<_> = peers.into_iter().chain([("reporter", reporter)]).collect();
        for (name, count) in [
            ("istio_tcp_connections_opened_total", 1),
            ("istio_tcp_connections_closed_total", 1),
            ("istio_tcp_sent_bytes_total", answer.body.len() as u64),
        ] {
            wait_for_growth(proxy, name, &labels, sum(&before, name, &labels), count).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_exchange_is_logged_and_explained() -> Result<()> {
    let mut client = Client::open(guest()?, service("catalog")?).await?;
    let id = "telemetry-an-exchange";
    let asked = request(Method::GET, "/items?logged", &[("x-request-id", id), ("user-agent", "a-test")]);
    assert_eq!(client.send(asked).await?.status, 403);

    let found = record(waypoint()?, "/exchanges", |record| record["requestId"] == id).await?;
    assert_eq!(found["sourceIdentity"], "spiffe://cluster.local/ns/guests/sa/guest", "{found}");
    assert_eq!(
        (&found["status"], &found["service"]),
        (&403.into(), &"catalog.shop.svc.cluster.local".into())
    );
    let because = found["deniedBecause"].as_str().unwrap_or_default();
    assert!(because.contains("web-may-read"), "{found}");

    wait_for_text(id, || mesh()?.log("waypoint")).await?;
    let log = mesh()?.log("waypoint")?;
    let line = log.lines().find(|line| line.contains(id)).unwrap_or_default();
    let begins =
        "] \"GET /items?logged HTTP/1.1\" 403 - rbac_access_denied_matched_policy[none] - \"-\" 0 19 ";
    assert!(line.contains(begins), "{line}");
    assert!(line.contains("\"a-test\""), "{line}");
    Ok(())
}

#[tokio::test]
async fn a_connection_is_logged_by_both_ends() -> Result<()> {
    let to = mesh()?.service("bank/strict", 8000)?;
    assert_eq!(get(guest()?, to, "/").await?.status, 200);
    for direction in ["inbound", "outbound"] {
        let is_it = |line: &str| {
            line.contains(&format!("direction=\"{direction}\""))
                && line.contains("src.workload=\"guest\"")
                && line.contains("dst.workload=\"strict\"")
                && line.contains("src.identity=\"spiffe://cluster.local/ns/guests/sa/guest\"")
                && line.contains("dst.service=\"strict.bank.svc.cluster.local\"")
        };
        let what = format!("the {direction} line of the connection");
        wait_for(&what, || mesh()?.log("ztunnel"), |log| log.lines().any(is_it)).await?;
    }
    Ok(())
}
