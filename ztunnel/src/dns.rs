//! The DNS proxy of a pod: redirection brings its questions to 15053; the mesh answers those about itself, and the rest is
//! passed on (facts: Istio's ztunnel, DNS proxy).
//!
//! `message.rs` reads and writes, `lookup.rs` knows the answers, `forward.rs` passes on; here they meet.

mod forward;
mod lookup;
mod message;

pub use forward::{Forwarder, Transport, servers_of};

use crate::Proxy;
use cairn_mesh::Workload;
use cairn_telemetry::Metrics;
use forward::{read_framed, write_framed};
use message::{Code, MESSAGE_BYTES_MAX, Query, Unread};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;

/// Where redirected questions arrive.
pub const DNS_PORT: u16 = 15053;

/// Questions of one pod that are worked on at once; more are not taken, and the client asks again.
const QUESTIONS_MAX: usize = 512;

/// A connection on which nothing comes for so long ends (facts: 5 s).
const IDLE_MAX: Duration = Duration::from_secs(5);

type Labels = [(&'static str, String); 4];

/// Metrics as Istio's ztunnel names them.
pub struct DnsMetrics {
    requests: Family<Vec<(&'static str, String)>, Counter>,
    upstream_requests: Family<Vec<(&'static str, String)>, Counter>,
    upstream_failures: Family<Vec<(&'static str, String)>, Counter>,
    upstream_seconds: Family<Vec<(&'static str, String)>, Histogram>,
}

impl DnsMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        let this = Self {
            requests: Family::default(),
            upstream_requests: Family::default(),
            upstream_failures: Family::default(),
            upstream_seconds: Family::new_with_constructor(seconds as fn() -> Histogram),
        };
        metrics.register(|registry| {
            registry.register("istio_dns_requests", "DNS questions of pods", this.requests.clone());
            let help = "DNS questions that were passed on";
            registry.register("istio_dns_upstream_requests", help, this.upstream_requests.clone());
            let help = "DNS questions that were passed on and not answered";
            registry.register("istio_dns_upstream_failures", help, this.upstream_failures.clone());
            let help = "How long others took to answer DNS questions";
            let upstream_seconds = this.upstream_seconds.clone();
            registry.register("istio_dns_upstream_request_duration_seconds", help, upstream_seconds);
        });
        this
    }
}

/// Buckets as Istio's ztunnel has them.
fn seconds() -> Histogram {
    Histogram::new([0.0005, 0.001, 0.01, 0.1, 1.0, 5.0])
}

fn labels(query: &Query, transport: Transport, client: Option<&Workload>) -> Labels {
    let text = |read: fn(&Workload) -> &str| match client.map(read) {
        None | Some("") => "unknown".to_owned(),
        Some(text) => text.to_owned(),
    };
    let protocol = match transport {
        Transport::Udp => "udp",
        Transport::Tcp => "tcp",
    };
    [
        ("request_query_type", query.kind_name().to_owned()),
        ("request_protocol", protocol.to_owned()),
        ("source_canonical_service", text(|client| &client.canonical_name)),
        ("source_canonical_revision", text(|client| &client.canonical_revision)),
    ]
}

/// Serves packets until the drain begins. `client` finds out who the pod is.
pub async fn serve_packets<F>(
    proxy: Arc<Proxy>,
    socket: Arc<UdpSocket>,
    forwarder: Arc<Forwarder>,
    client: impl Fn() -> F,
) where
    F: Future<Output = Option<Arc<Workload>>> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = proxy.drain.started() => return,
        };
        let (length, peer) = match received {
            Ok(received) => received,
            Err(error) => {
                // As when a client has closed its socket before the answer came.
                tracing::debug!(%error, "DNS packet not received");
                tokio::task::yield_now().await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else { continue };
        let question = buffer.get(..length).unwrap_or_default().to_vec();
        let (proxy, socket, forwarder) = (Arc::clone(&proxy), Arc::clone(&socket), Arc::clone(&forwarder));
        let client = client();
        let working = proxy.drain.hold();
        tokio::spawn(async move {
            if let Some(answer) = answer(&proxy, client, &forwarder, &question, Transport::Udp).await
                && let Err(error) = socket.send_to(&answer, peer).await
            {
                tracing::debug!(%peer, %error, "DNS answer not sent");
            }
            drop((place, working));
        });
    }
}

/// Serves the questions of one connection, one after the other.
pub async fn serve_connection<F>(
    proxy: &Proxy,
    mut stream: TcpStream,
    forwarder: &Forwarder,
    client: impl Fn() -> F,
) where
    F: Future<Output = Option<Arc<Workload>>>,
{
    while let Ok(Ok(question)) = tokio::time::timeout(IDLE_MAX, read_framed(&mut stream)).await {
        let Some(answer) = answer(proxy, client(), forwarder, &question, Transport::Tcp).await else {
            return;
        };
        let written = tokio::time::timeout(IDLE_MAX, write_framed(&mut stream, &answer)).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
    }
}

/// The answer to a message; `None` when it is none that can be answered.
async fn answer(
    proxy: &Proxy,
    client: impl Future<Output = Option<Arc<Workload>>>,
    forwarder: &Forwarder,
    question: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    let query = match message::read(question) {
        Ok(query) => query,
        Err(Unread::Nothing) => return None,
        Err(Unread::Malformed) => return message::refuse(question),
    };
    let bytes_max = match transport {
        Transport::Udp => query.udp_bytes_max(),
        Transport::Tcp => MESSAGE_BYTES_MAX,
    };
    let client = client.await;
    let labels = labels(&query, transport, client.as_deref());
    proxy.dns.requests.get_or_create(&labels.to_vec()).inc();
    let Some(client) = client else {
        tracing::debug!(name = query.name, "DNS question of a pod that the mesh does not know");
        return Some(message::write(&query, Code::Failure, &[], bytes_max));
    };
    let found = query.is_plain().then(|| {
        let mut random = |bound: u64| fastrand::u64(..bound);
        lookup::lookup(&proxy.mesh.snapshot(), &client, &query.name, query.kind, &mut random)
    });
    if let Some(records) = found.flatten() {
        tracing::debug!(
            name = query.name,
            kind = query.kind_name(),
            count = records.len(),
            "DNS question answered"
        );
        return Some(message::write(&query, Code::Done, &records, bytes_max));
    }
    Some(
        forwarded(proxy, forwarder, question, transport, &labels)
            .await
            .unwrap_or_else(|| message::write(&query, Code::Failure, &[], bytes_max)),
    )
}

async fn forwarded(
    proxy: &Proxy,
    forwarder: &Forwarder,
    question: &[u8],
    transport: Transport,
    labels: &Labels,
) -> Option<Vec<u8>> {
    let labels = labels.to_vec();
    proxy.dns.upstream_requests.get_or_create(&labels).inc();
    let started = Instant::now();
    let answer = forwarder.ask(question, transport).await;
    proxy.dns.upstream_seconds.get_or_create(&labels).observe(started.elapsed().as_secs_f64());
    match answer {
        Ok(answer) => Some(answer),
        Err(error) => {
            proxy.dns.upstream_failures.get_or_create(&labels).inc();
            tracing::debug!(%error, "DNS question not answered by others");
            None
        }
    }
}
