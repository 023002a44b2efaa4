//! Into a pod over HBONE: who is it, is it for us, is it allowed, and then to the application.

use crate::Proxy;
use crate::carry::Account;
use crate::live::Connected;
use crate::outbound::chain;
use crate::pods::{OWN_PORTS, Pod};
use cairn_hbone::{Authority, Connect, ServeError, ServerSettings};
use cairn_mesh::{Decision, DenyReason, L4Peer, NetworkAddress, Service, Snapshot, Workload, decide};
use cairn_telemetry::Direction;
use http::{HeaderMap, StatusCode};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::TcpStream;

/// Serves one HBONE connection of a peer: a tunnel per CONNECT stream.
pub async fn connection(proxy: Arc<Proxy>, pod: Arc<Pod>, _worker: usize, tcp: TcpStream, peer: SocketAddr) {
    let snapshot = proxy.mesh.snapshot();
    let Some(workload) = pod.workload(&snapshot) else {
        return tracing::debug!(%peer, pod = %pod.uid, "pod is no longer known");
    };
    let certificate = match proxy.certificates.get(&workload.identity).await {
        Ok(certificate) => certificate,
        Err(error) => {
            let mut account = Account::new(Direction::Inbound, peer, SocketAddr::new(pod.address, 15008));
            account.destination_workload = Some(workload);
            return account.refused(&proxy, "IDENTITY_ERROR", &chain(&error));
        }
    };
    let handler = {
        let (proxy, pod) = (Arc::clone(&proxy), Arc::clone(&pod));
        move |connect: Connect| {
            tokio::spawn(tunnel(Arc::clone(&proxy), Arc::clone(&pod), connect));
        }
    };
    let settings = ServerSettings::default();
    let served =
        cairn_hbone::serve(tcp, certificate.server_config(), &settings, proxy.drain.clone(), handler).await;
    let Err(error) = served else { return };
    let is_handshake =
        matches!(error, ServeError::Tls(_) | ServeError::HandshakeTimeout(_) | ServeError::NoIdentity);
    if is_handshake {
        let mut account = Account::new(Direction::Inbound, peer, SocketAddr::new(pod.address, 15008));
        account.destination_workload = Some(workload);
        account.refused(&proxy, "TLS_FAILURE", &chain(&error));
    } else {
        tracing::debug!(%peer, error = %chain(&error), "tunnel connection broke");
    }
}

/// Why a CONNECT is refused.
struct Refused {
    status: StatusCode,
    flag: &'static str,
    reason: String,
}

impl Refused {
    fn new(status: StatusCode, flag: &'static str, reason: impl Into<String>) -> Self {
        Self { status, flag, reason: reason.into() }
    }
}

async fn tunnel(proxy: Arc<Proxy>, pod: Arc<Pod>, connect: Connect) {
    let _working = proxy.drain.hold();
    let downstream = Arc::clone(connect.downstream());
    let mut account = Account::new(Direction::Inbound, downstream.address, downstream.local);
    account.way = "inbound";
    account.authority = connect.authority().to_string();
    account.source_identity = Some(downstream.identity.clone());
    match admit(&proxy, &pod, &connect, &mut account).await {
        Ok((mut application, destination, workload)) => {
            let mut live = proxy.live.register(Connected {
                workload: Arc::clone(&workload.uid),
                identity: Some(downstream.identity.clone()),
                source: downstream.address,
                destination,
            });
            // What changed while the application was connected to was not rechecked: the connection was not open yet.
            let peer =
                L4Peer { identity: Some(&downstream.identity), source: downstream.address, destination };
            if let Err(reason) = note_decision(&mut account, decide(&proxy.mesh.snapshot(), &workload, &peer))
            {
                connect.refuse(StatusCode::FORBIDDEN);
                return account.refused(&proxy, "DENY", &reason);
            }
            let mut headers = HeaderMap::new();
            headers.insert("baggage", cairn_hbone::baggage(&workload));
            let mut stream = match connect.accept(headers) {
                Ok(stream) => stream,
                Err(error) => return account.refused(&proxy, "CONNECT", &chain(&error)),
            };
            account.carry(&proxy, &mut stream, &mut application, live.cut_reason()).await;
        }
        Err(refused) => {
            connect.refuse(refused.status);
            account.refused(&proxy, refused.flag, &refused.reason);
        }
    }
}

/// Is it for us, is it allowed, does the application answer? Notes each step in `account`.
async fn admit(
    proxy: &Proxy,
    pod: &Pod,
    connect: &Connect,
    account: &mut Account,
) -> Result<(TcpStream, SocketAddr, Arc<Workload>), Refused> {
    let downstream = connect.downstream();
    let snapshot = proxy.mesh.snapshot();
    let workload = pod
        .workload(&snapshot)
        .ok_or_else(|| Refused::new(StatusCode::SERVICE_UNAVAILABLE, "CONNECT", "pod is no longer known"))?;
    account.destination_workload = Some(Arc::clone(&workload));
    account.destination_identity = Some(workload.identity.clone());
    let source = peer_workload(&snapshot, downstream.address, &workload);
    account.source_workload = source.filter(|source| source.identity == downstream.identity);
    account.service = named_service(&snapshot, connect.headers(), &workload);
    let port = destination_port(&snapshot, connect.authority(), &workload)
        .ok_or_else(|| Refused::new(StatusCode::NOT_FOUND, "CONNECT", "destination is not this workload"))?;
    if OWN_PORTS.contains(&port) {
        return Err(Refused::new(StatusCode::SERVICE_UNAVAILABLE, "CONNECT", "port belongs to the ztunnel"));
    }
    let destination = SocketAddr::new(pod.address, port);
    let peer = L4Peer { identity: Some(&downstream.identity), source: downstream.address, destination };
    note_decision(account, decide_when_known(proxy, pod, &peer).await)
        .map_err(|reason| Refused::new(StatusCode::FORBIDDEN, "DENY", reason))?;
    let options = proxy.options_to_application(pod, downstream.address.ip());
    let application = cairn_net::connect(SocketAddr::new(pod.application, port), &options).await;
    let application = application
        .map_err(|error| Refused::new(StatusCode::SERVICE_UNAVAILABLE, "CONNECT", chain(&error)))?;
    Ok((application, destination, workload))
}

/// Decides by the mesh as it is now. When a policy that the workload names has not arrived, the connection waits for it,
/// at most as long as the mesh itself would; after that it is denied.
pub async fn decide_when_known(proxy: &Proxy, pod: &Pod, peer: &L4Peer<'_>) -> Decision {
    let mut changes = proxy.mesh.changes();
    let deadline = tokio::time::Instant::now() + cairn_xds::POLICY_WAIT;
    loop {
        changes.borrow_and_update();
        let snapshot = proxy.mesh.snapshot();
        let Some(workload) = pod.workload(&snapshot) else {
            return Decision::Deny(DenyReason::NotAllowed(Vec::new()));
        };
        let decision = decide(&snapshot, &workload, peer);
        if !matches!(decision, Decision::Deny(DenyReason::MissingPolicy(_))) {
            proxy.trials.note(&snapshot, &workload, peer, Instant::now());
            return decision;
        }
        match tokio::time::timeout_at(deadline, changes.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return decision,
        }
    }
}

/// Writes a decision into the account; the reason when it is no.
pub fn note_decision(account: &mut Account, decision: Decision) -> Result<(), String> {
    match decision {
        Decision::Allow(by) => {
            account.decision = "allow";
            account.policy = by.map_or_else(String::new, |(name, rule)| format!("{name} rule {rule}"));
            Ok(())
        }
        Decision::Deny(reason) => {
            account.decision = "deny";
            account.policy = reason.to_string();
            Err(format!("connection closed due to policy rejection: {reason}"))
        }
    }
}

/// The peer's workload, by the address that its connection kept.
pub fn peer_workload(snapshot: &Snapshot, peer: SocketAddr, local: &Workload) -> Option<Arc<Workload>> {
    let address = NetworkAddress { network: Arc::clone(&local.network), address: peer.ip() };
    snapshot.workload_at(&address).cloned()
}

/// The application's port: the authority must name this workload's address, or a service it is an endpoint of.
fn destination_port(snapshot: &Snapshot, authority: &Authority, workload: &Workload) -> Option<u16> {
    match authority {
        Authority::Address(address) => {
            workload.addresses.contains(&address.ip().to_canonical()).then(|| address.port())
        }
        Authority::Host { name, port } => {
            let state = snapshot.service_named(name, &workload.namespace)?;
            let endpoint = state.endpoints.iter().find(|endpoint| endpoint.workload.uid == workload.uid)?;
            endpoint.target_port(&state.service, *port)
        }
    }
}

/// The service that the client says it addressed (`forwarded: …;host=`), for metrics: it must be one of the
/// workload's. A workload of one service has no other.
fn named_service(snapshot: &Snapshot, headers: &HeaderMap, workload: &Workload) -> Option<Arc<Service>> {
    let text = headers.get("forwarded").and_then(|value| value.to_str().ok()).unwrap_or("");
    let host =
        text.split(';').find_map(|part| part.trim().strip_prefix("host=")).map(|host| host.trim_matches('"'));
    let mut services = workload
        .services
        .iter()
        .filter(|(key, _)| host.is_none_or(|host| host.eq_ignore_ascii_case(&key.name)));
    let (key, _) = services.next()?;
    if host.is_none() && services.next().is_some() {
        return None;
    }
    snapshot.service(key).map(|state| Arc::clone(&state.service))
}
