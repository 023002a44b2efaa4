//! L4: who may connect to whom, with and without a waypoint, with and without an identity.

use crate::client::{Client, Refused, Who, connect, get, record};
use crate::harness::SOON;
use crate::servers::TcpEcho;
use crate::shop::{guest, mesh, web};
use anyhow::{Context, Result};
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A pod of the bank, at its own address and port.
fn bank(pod: &str) -> Result<SocketAddr> {
    Ok(SocketAddr::new(mesh()?.pod(&format!("bank/{pod}"))?, 8080))
}

/// What an echo server sends back; empty when the connection ends before it does.
async fn echo(mut stream: TcpStream, text: &[u8]) -> Result<Vec<u8>> {
    let mut back = vec![0; text.len()];
    let exchange = async {
        stream.write_all(text).await?;
        stream.read_exact(&mut back).await
    };
    match timeout(SOON, exchange).await.context("neither an echo nor an end")? {
        Ok(_) => Ok(back),
        Err(_) => Ok(Vec::new()),
    }
}

fn refusal(error: &anyhow::Error) -> Option<u8> {
    error.downcast_ref::<Refused>().map(|refused| refused.0)
}

#[tokio::test]
async fn a_client_without_identity_reaches_only_what_needs_none() -> Result<()> {
    let open = get(Who::Nobody, bank("lobby")?, "/").await?;
    assert_eq!((open.status, open.header("x-echo-name")), (200, "lobby"));
    for pod in ["vault", "strict"] {
        let answer = get(Who::Nobody, bank(pod)?, "/").await;
        assert!(answer.is_err(), "{pod} answered a client without identity: {answer:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_refused_plaintext_client_is_explained() -> Result<()> {
    let stream = connect(Who::Nobody, bank("vault")?).await?;
    let client = stream.local_addr()?.to_string();
    let found =
        record(mesh()?.ztunnel(), "/connections", |record| record["source"] == client.as_str()).await?;
    assert_eq!(
        (found["way"].as_str(), found["decision"].as_str()),
        (Some("plaintext"), Some("deny")),
        "{found}"
    );
    let policy = found["policy"].as_str().unwrap_or_default();
    assert!(policy.contains("bank/guests-only"), "{policy}");
    Ok(())
}

#[tokio::test]
async fn an_identity_opens_what_asks_for_one() -> Result<()> {
    for (who, pod) in [(guest()?, "vault"), (guest()?, "strict"), (web()?, "strict"), (web()?, "lobby")] {
        let answer = get(who, bank(pod)?, "/").await?;
        assert_eq!((answer.status, answer.header("x-echo-name")), (200, pod), "{who:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_tunnel_that_policy_does_not_allow_is_refused_as_such() -> Result<()> {
    let error = connect(web()?, bank("vault")?).await.err().context("web may not connect to the vault")?;
    assert_eq!(refusal(&error), Some(2), "{error:#}");
    let error = connect(web()?, mesh()?.service("bank/vault", 8000)?).await.err().context("by service")?;
    assert_eq!(refusal(&error), Some(2), "{error:#}");
    Ok(())
}

#[tokio::test]
async fn the_application_sees_the_clients_address() -> Result<()> {
    let answer = get(guest()?, bank("lobby")?, "/").await?;
    let peer = format!("peer: {}", mesh()?.pod("guests/guest")?);
    assert!(answer.body.lines().any(|line| line == peer), "`{peer}` is not in:\n{}", answer.body);
    Ok(())
}

#[tokio::test]
async fn tcp_passes_the_waypoint_untouched() -> Result<()> {
    let _application = raw().await?;
    let to = mesh()?.service("shop/raw", 9000)?;
    for text in [&b"\0\x01binary\xff"[..], b"GET / HTTP/1.1\r\nnot: really\r\n\r\n", &[7; 300_000]] {
        // Read while writing: the echo of a long text does not wait for its end.
        let (mut reader, mut writer) = connect(web()?, to).await?.into_split();
        let sent = text.to_vec();
        let writing = tokio::spawn(async move { writer.write_all(&sent).await.map(|()| writer) });
        let mut back = vec![0; text.len()];
        timeout(SOON, reader.read_exact(&mut back)).await.context("no echo in time")??;
        assert!(back == text, "{} bytes came back changed", back.len());
        drop(writing.await??);
    }
    Ok(())
}

#[tokio::test]
async fn a_waypoints_policy_also_guards_what_is_not_http() -> Result<()> {
    let _application = raw().await?;
    // The one port is declared to carry TCP, the other is not declared to carry anything.
    for port in [9000, 9001] {
        let to = mesh()?.service("shop/sealed", port)?;
        let allowed = echo(connect(guest()?, to).await?, b"\0hello").await?;
        assert_eq!(allowed, b"\0hello", "port {port}: the guest may");
        // What may only be done by HTTP may not be done at all where there is none.
        match connect(web()?, to).await {
            Ok(stream) => assert_eq!(echo(stream, b"\0hello").await?, b"", "port {port}: web may not"),
            Err(error) => assert_eq!(refusal(&error), Some(2), "port {port}: {error:#}"),
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_connection_serves_many_requests_and_clients_many_connections() -> Result<()> {
    let to = bank("lobby")?;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(Client::open(guest()?, to).await?);
    }
    for round in 0..5 {
        for client in &mut clients {
            assert_eq!(client.get("/").await?.status, 200, "round {round}");
        }
    }
    Ok(())
}

/// The application of the pod `raw`. Tests run side by side, and one address has one listener: they take turns.
async fn raw() -> Result<(TcpEcho, tokio::sync::MutexGuard<'static, ()>)> {
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let turn = TURN.lock().await;
    let at = mesh()?.twin("shop/raw", 9000)?;
    Ok((TcpEcho::start(at).await?, turn))
}
