//! Into a pod over HBONE: who is it, is it for us, is it allowed, and then to the application.

use crate::Proxy;
use crate::carry::{Account, Cut};
use crate::live::{Connected, LiveGuard};
use crate::onward::chain;
use crate::pods::Pod;
use crate::proxy_protocol;
use cairn_hbone::{Authority, Connect, Downstream, ServeError, TunnelStream};
use cairn_mesh::{
    Arrival, ArrivalTarget, Decision, DenyReason, HBONE_PORT, Identity, L4Peer, NetworkAddress, Service,
    Snapshot, Unwelcome, Wanted, Workload, arrive, decide, wanted_inbound,
};
use cairn_net::ConnectOptions;
use cairn_telemetry::Direction;
use http::{HeaderMap, StatusCode};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// How long an application may take to read the header by which a tunnel is announced to it.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves one HBONE connection of a peer: a tunnel per CONNECT stream.
pub async fn connection(proxy: Arc<Proxy>, pod: Arc<Pod>, _worker: usize, tcp: TcpStream, peer: SocketAddr) {
    let snapshot = proxy.mesh.snapshot();
    let Some(workload) = pod.workload(&snapshot) else {
        return tracing::debug!(%peer, pod = %pod.uid, "pod is no longer known");
    };
    let certificate = match proxy.certificates.get(&workload.identity).await {
        Ok(certificate) => certificate,
        Err(error) => {
            let mut account =
                Account::new(Direction::Inbound, peer, SocketAddr::new(pod.address, HBONE_PORT));
            account.destination_workload = Some(workload);
            return account.refused(&proxy, "IDENTITY_ERROR", &chain(&error));
        }
    };
    let handler = {
        let (proxy, pod) = (Arc::clone(&proxy), Arc::clone(&pod));
        move |connect: Connect| {
            tokio::spawn(tunnel(Arc::clone(&proxy), Arc::clone(&pod), Box::new(connect)));
        }
    };
    let settings = proxy.settings.tunnels.server();
    let served = cairn_hbone::serve(tcp, certificate, &settings, pod.drain.clone(), handler).await;
    let Err(error) = served else { return };
    let is_handshake = matches!(
        error,
        ServeError::Tls(_)
            | ServeError::HandshakeTimeout(_)
            | ServeError::NoIdentity
            | ServeError::NotBelieved
    );
    if is_handshake {
        let mut account = Account::new(Direction::Inbound, peer, SocketAddr::new(pod.address, HBONE_PORT));
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

/// What is done once, to open it, has its own memory, which is given back.
async fn tunnel(proxy: Arc<Proxy>, pod: Arc<Pod>, connect: Box<Connect>) {
    let _working = proxy.drain.hold();
    let downstream = Arc::clone(connect.downstream());
    let mut account = Account::new(Direction::Inbound, downstream.address, downstream.local);
    account.way = "inbound";
    account.authority = connect.authority().to_string();
    account.source_identity = Some(downstream.identity.clone());
    match Box::pin(open(&proxy, &pod, connect, &mut account)).await {
        Ok(Opened { mut stream, mut application, mut live }) => {
            let revocation = stream.revocation().clone();
            let cut = Box::pin(async move {
                tokio::select! {
                    () = revocation.revoked() => Cut::revoked(),
                    reason = live.cut_reason() => Cut::denied(reason),
                }
            });
            account.carry(&proxy, &mut stream, &mut application, cut).await;
        }
        Err((flag, reason)) => account.refused(&proxy, flag, &reason),
    }
}

/// A tunnel that stands, and the application behind it.
struct Opened {
    stream: TunnelStream,
    application: TcpStream,
    live: LiveGuard,
}

/// Lets the tunnel in, or refuses it and says under which flag and why.
async fn open(
    proxy: &Proxy,
    pod: &Pod,
    connect: Box<Connect>,
    account: &mut Account,
) -> Result<Opened, (&'static str, String)> {
    let downstream = Arc::clone(connect.downstream());
    let Admitted { mut application, arrival, workload } = match admit(proxy, pod, &connect, account).await {
        Ok(admitted) => admitted,
        Err(refused) => {
            connect.refuse(refused.status);
            return Err((refused.flag, refused.reason));
        }
    };
    let destination = arrival.destination;
    let live = proxy.live.register(Connected {
        workload: Arc::clone(&workload.uid),
        identity: Some(downstream.identity.clone()),
        source: downstream.address,
        destination,
    });
    // What changed while the application was connected to was not rechecked: the connection was not open yet.
    let peer = L4Peer { identity: Some(&downstream.identity), source: downstream.address, destination };
    if let Err(reason) = note_decision(account, decide_now(proxy, pod, &peer)) {
        connect.refuse(StatusCode::FORBIDDEN);
        return Err(("DENY", reason));
    }
    let mut headers = HeaderMap::new();
    headers.insert("baggage", cairn_hbone::baggage(&workload));
    let stream = connect.accept(headers).map_err(|error| ("CONNECT", chain(&error)))?;
    if let Some(announced) = arrival.announce {
        let header = proxy_protocol::header(downstream.address, announced, Some(&downstream.identity));
        let written = tokio::time::timeout(ANNOUNCE_TIMEOUT, application.write_all(&header)).await;
        if !matches!(written, Ok(Ok(()))) {
            return Err(("CONNECT", "the application did not take the tunnel's header".to_owned()));
        }
    }
    Ok(Opened { stream, application, live })
}

/// A tunnel that is let in.
struct Admitted {
    application: TcpStream,
    arrival: Arrival,
    workload: Arc<Workload>,
}

/// Is it for us, is it allowed, does the application answer? Notes each step in `account`.
async fn admit(
    proxy: &Proxy,
    pod: &Pod,
    connect: &Connect,
    account: &mut Account,
) -> Result<Admitted, Refused> {
    let downstream = connect.downstream();
    let target = match connect.authority() {
        Authority::Address(address) => ArrivalTarget::Address(*address),
        Authority::Host { name, port } => ArrivalTarget::Host(name, *port),
    };
    if proxy.mesh.is_on_demand() {
        Box::pin(ask(proxy, pod, downstream, target)).await?;
    }
    let snapshot = proxy.mesh.snapshot();
    let workload = pod
        .workload(&snapshot)
        .ok_or_else(|| Refused::new(StatusCode::SERVICE_UNAVAILABLE, "CONNECT", "pod is no longer known"))?;
    account.destination_workload = Some(Arc::clone(&workload));
    account.destination_identity = Some(workload.identity.clone());
    account.source_workload = source_workload(proxy, &snapshot, connect, &workload);
    let arrival = arrive(&snapshot, &workload, downstream.local.ip(), target)
        .map_err(|unwelcome| Refused::new(status(unwelcome), "CONNECT", unwelcome.to_string()))?;
    account.service =
        arrival.service.clone().or_else(|| named_service(&snapshot, connect.headers(), &workload));
    drop(snapshot);
    let destination = arrival.destination;
    let peer = L4Peer { identity: Some(&downstream.identity), source: downstream.address, destination };
    note_decision(account, decide_when_known(proxy, pod, &peer).await)
        .map_err(|reason| Refused::new(StatusCode::FORBIDDEN, "DENY", reason))?;
    let (at, options) = to_application(proxy, pod, &arrival, downstream.address.ip());
    let application = cairn_net::connect(at, &options).await;
    let application = application
        .map_err(|error| Refused::new(StatusCode::SERVICE_UNAVAILABLE, "CONNECT", chain(&error)))?;
    Ok(Admitted { application, arrival, workload })
}

/// Asks the control plane for what the tunnel is meant for, and, without waiting, for who sends it.
async fn ask(
    proxy: &Proxy,
    pod: &Pod,
    downstream: &Downstream,
    target: ArrivalTarget<'_>,
) -> Result<(), Refused> {
    let Some(workload) = pod.workload(&proxy.mesh.snapshot()) else { return Ok(()) };
    mention(proxy, downstream.address, &workload);
    let local = downstream.local.ip();
    let wanted = |snapshot: &Snapshot| wanted_inbound(snapshot, &workload, local, target);
    let known = crate::demand::know(&proxy.mesh, wanted).await;
    known.map_err(|error| Refused::new(StatusCode::SERVICE_UNAVAILABLE, "CONNECT", chain(&error)))
}

/// Asks who is at a peer's address, for the record of it and of those that follow.
pub fn mention(proxy: &Proxy, peer: SocketAddr, local: &Workload) {
    let at = NetworkAddress { network: Arc::clone(&local.network), address: peer.ip() };
    proxy.mesh.mention(&Wanted::Address(at));
}

fn status(unwelcome: Unwelcome) -> StatusCode {
    match unwelcome {
        Unwelcome::NotHere | Unwelcome::NotOurService => StatusCode::NOT_FOUND,
        Unwelcome::NoPort | Unwelcome::OwnPort | Unwelcome::NoVip => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Where the application is, and how it is connected to: from the client's address. One that is told by a header who the
/// client is listens on loopback, where nobody else can send it such headers, and is connected to from there.
fn to_application(
    proxy: &Proxy,
    pod: &Pod,
    arrival: &Arrival,
    client: IpAddr,
) -> (SocketAddr, ConnectOptions) {
    let own = arrival.destination;
    if arrival.announce.is_some() && pod.is_alone {
        let loopback = match own.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let options = ConnectOptions {
            bind: Some(loopback),
            transparent: false,
            ..proxy.options_to_application(pod, client)
        };
        return (SocketAddr::new(loopback, own.port()), options);
    }
    // Where pods share a machine's loopback, the application has an address of its own there.
    let ip = if own.ip() == pod.address { pod.application } else { own.ip() };
    (SocketAddr::new(ip, own.port()), proxy.options_to_application(pod, client))
}

/// The client's workload: by the address that its connection kept, or, when it has come through another network's
/// gateway, as it describes itself.
fn source_workload(
    proxy: &Proxy,
    snapshot: &Snapshot,
    connect: &Connect,
    local: &Workload,
) -> Option<Arc<Workload>> {
    let (headers, downstream) = (connect.headers(), connect.downstream());
    if has_crossed(headers, &local.network) {
        let identity: &Identity = &downstream.identity;
        return headers
            .get("baggage")
            .and_then(|baggage| cairn_hbone::described(baggage, identity))
            .map(Arc::new);
    }
    let (trust, own) = (proxy.certificates.trust(), local.identity.trust_domain());
    let source = peer_workload(snapshot, downstream.address, local);
    source.filter(|source| trust.is_same(own, &source.identity, &downstream.identity))
}

/// Whether the request says that it is from another network.
fn has_crossed(headers: &HeaderMap, network: &str) -> bool {
    let from = headers.get("x-forwarded-network").and_then(|value| value.to_str().ok());
    from.is_some_and(|from| !from.eq_ignore_ascii_case(network))
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
            return Decision::Deny(DenyReason::UnknownWorkload);
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

/// The decision as the mesh stands: by the policies of today on the workload of today.
pub fn decide_now(proxy: &Proxy, pod: &Pod, peer: &L4Peer<'_>) -> Decision {
    let snapshot = proxy.mesh.snapshot();
    match pod.workload(&snapshot) {
        Some(workload) => decide(&snapshot, &workload, peer),
        None => Decision::Deny(DenyReason::UnknownWorkload),
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

/// The service that the client says it addressed (`forwarded: …;host=`), for metrics: it must be one of the
/// workload's. A workload of one service has no other.
fn named_service(snapshot: &Snapshot, headers: &HeaderMap, workload: &Workload) -> Option<Arc<Service>> {
    let host = headers.get("forwarded").and_then(cairn_hbone::forwarded_host);
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
