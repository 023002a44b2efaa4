//! A tunnel in a tunnel: how another network is reached through its gateway, which passes the inner one on unread.

use crate::client::{Client, OpenError};
use crate::transport::Transport;
use crate::{ConnectError, PoolSettings, TunnelStream};
use cairn_identity::WorkloadCertificate;
use cairn_mesh::Identity;
use http::HeaderMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

/// Where the inner tunnel leads, and in whose name.
#[derive(Clone, Debug)]
pub struct NestedTarget {
    /// The certificate of the source.
    pub certificate: Arc<WorkloadCertificate>,
    /// Who may be at its end. Nobody is not anybody: with no identity, no end is accepted.
    pub identities: Vec<Identity>,
    /// Where it leads: `host:port`.
    pub authority: String,
}

/// Opens a tunnel of its own within `outer`: TLS, HTTP/2 and one CONNECT with `headers`. It is not shared, so that each
/// connection may end at another of the gateway's endpoints. Must run within a tokio runtime.
///
/// # Errors
/// When the end is someone else, refuses, or does not answer in time.
pub async fn connect_nested(
    outer: TunnelStream,
    target: &NestedTarget,
    headers: HeaderMap,
    settings: &PoolSettings,
) -> Result<TunnelStream, ConnectError> {
    let authority = target.authority.parse();
    let authority = authority.map_err(|_| ConnectError::Authority(target.authority.clone()))?;
    // Who is at the end is not known by any address; sessions are kept by that of nobody.
    let name = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let NestedTarget { certificate, identities, .. } = target;
    let begun = Client::begin(Transport::Tunnel(Box::new(outer)), certificate, identities, name, settings);
    let (client, driver) = tokio::time::timeout(settings.handshake_timeout, begun)
        .await
        .unwrap_or(Err(ConnectError::Timeout))?;
    tokio::spawn(async move {
        if let Err(error) = driver.run(|| {}).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "inner tunnel lost");
        }
    });
    let Some(place) = client.take_place() else { return Err(ConnectError::Full) };
    place.open(&authority, &headers, settings).await.map_err(|error| match error {
        OpenError::NotSent(error) => ConnectError::Http2(Arc::new(error)),
        OpenError::Failed(error) => error,
    })
}
