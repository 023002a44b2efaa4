//! Carrying bytes between two sides once both stand, and the record of it.

use crate::Proxy;
use crate::open::Open;
use cairn_mesh::{Identity, Service, Workload};
use cairn_net::{ByteCounts, Side};
use cairn_telemetry::{
    CustomLabels, Direction, PeerLabels, Reporter, Security, TcpConnection, TcpLabels, TcpRecord,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

/// Long connections report their bytes this often (Istio's TCP reporting interval).
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Why a connection is ended that both sides would go on with.
pub struct Cut {
    /// For the metrics (facts: ztunnel's response flags).
    flag: &'static str,
    reason: String,
}

impl Cut {
    /// Policies have changed, and no longer allow it.
    pub fn denied(reason: String) -> Self {
        Self { flag: "DENY", reason }
    }

    /// The certificate of the tunnel's other end was revoked.
    pub fn revoked() -> Self {
        Self { flag: "CERT_REVOKED", reason: "the peer's certificate is revoked".to_owned() }
    }
}

/// What is known of one connection, filled in as it proceeds. It is recorded once: by [`Account::refused`] when it
/// never stood, else at the end of [`Account::carry`].
pub struct Account {
    started: Instant,
    started_at: SystemTime,
    direction: Direction,
    /// The client's address.
    pub source: SocketAddr,
    /// The client's workload.
    pub source_workload: Option<Arc<Workload>>,
    /// The identity that mTLS proved, or that this side presents.
    pub source_identity: Option<Identity>,
    /// Outbound: the next hop. Inbound: where the client connected.
    pub destination: SocketAddr,
    /// Where the client connected to.
    original: SocketAddr,
    /// The CONNECT authority; empty without a tunnel.
    pub authority: String,
    /// The service addressed.
    pub service: Option<Arc<Service>>,
    /// The workload at the other end.
    pub destination_workload: Option<Arc<Workload>>,
    /// The identity proven by the other end, or presented by this side.
    pub destination_identity: Option<Identity>,
    /// `direct`, `waypoint`, `plain` …
    pub way: &'static str,
    /// `allow`, `deny` or empty.
    pub decision: &'static str,
    /// The policy that decided, or why.
    pub policy: String,
}

impl Account {
    /// Starts the account of a connection just accepted.
    pub fn new(direction: Direction, source: SocketAddr, destination: SocketAddr) -> Box<Self> {
        Box::new(Self {
            started: Instant::now(),
            started_at: SystemTime::now(),
            direction,
            source,
            source_workload: None,
            source_identity: None,
            destination,
            original: destination,
            authority: String::new(),
            service: None,
            destination_workload: None,
            destination_identity: None,
            way: "",
            decision: "",
            policy: String::new(),
        })
    }

    fn labels(&self, response_flags: &'static str) -> TcpLabels {
        let source = PeerLabels::of(self.source_workload.as_ref(), self.source_identity.as_ref());
        let destination =
            PeerLabels::of(self.destination_workload.as_ref(), self.destination_identity.as_ref());
        let reporter = match self.direction {
            Direction::Outbound => Reporter::Source,
            Direction::Inbound => Reporter::Destination,
        };
        let security = match Security::between(&source, &destination) {
            // A ztunnel of Istio does not say more.
            Security::None => Security::Unknown,
            security => security,
        };
        TcpLabels {
            reporter,
            source,
            destination,
            service: self.service.clone(),
            response_flags,
            security,
            custom: CustomLabels::default(),
        }
    }

    fn record(&self, proxy: &Proxy, counts: &ByteCounts, error: &str) {
        // The log speaks from the reporter's own side, metrics from the client's.
        let (to_server, to_client) = (counts.received.load(Relaxed), counts.sent.load(Relaxed));
        let (bytes_sent, bytes_received) = match self.direction {
            Direction::Outbound => (to_server, to_client),
            Direction::Inbound => (to_client, to_server),
        };
        let record = TcpRecord {
            started: self.started_at,
            duration: self.started.elapsed(),
            direction: self.direction,
            source: self.source,
            source_workload: self.source_workload.as_ref(),
            source_identity: self.source_identity.as_ref(),
            destination: self.destination,
            hbone_authority: &self.authority,
            service: self.service.as_ref(),
            destination_workload: self.destination_workload.as_ref(),
            destination_identity: self.destination_identity.as_ref(),
            bytes_sent,
            bytes_received,
            error,
            plan: self.way,
            decision: self.decision,
            policy: &self.policy,
        };
        if proxy.settings.access.wants(&record, fastrand::f64) {
            proxy.telemetry.log_tcp(&record);
            if let Some(collector) = &proxy.collector {
                collector.push(&record);
            }
        }
        proxy.telemetry.keep_tcp(&record);
    }

    fn open(&self) -> Open {
        let is_inbound = self.direction == Direction::Inbound;
        let own = if is_inbound { &self.destination_workload } else { &self.source_workload };
        Open {
            is_inbound,
            source: self.source,
            original: self.original,
            actual: self.destination,
            is_tunnelled: !self.authority.is_empty(),
            workload: own.clone(),
        }
    }

    /// The connection never stood: counts it under `flag` and records why.
    pub fn refused(&self, proxy: &Proxy, flag: &'static str, error: &str) {
        TcpConnection::failed(&proxy.telemetry.metrics, &self.labels(flag));
        self.record(proxy, &ByteCounts::default(), error);
    }

    /// Copies bytes until both sides have ended or `cut` resolves with why to end it, then records.
    pub async fn carry<A, B, C>(self: Box<Self>, proxy: &Proxy, client: &mut A, server: &mut B, mut cut: C)
    where
        A: Side,
        B: Side,
        C: Future<Output = Cut> + Unpin,
    {
        let counts = ByteCounts::default();
        tracing::debug!(
            target: "access",
            source = %self.source,
            destination = %self.destination,
            authority = %self.authority,
            direction = self.direction.as_str(),
            "connection opened"
        );
        let _listed = proxy.open.add(self.open());
        let mut metrics = TcpConnection::open(&proxy.telemetry.metrics, self.labels("-"));
        let copy = cairn_net::copy_sides(client, server, &counts);
        tokio::pin!(copy);
        let mut tick =
            tokio::time::interval_at(tokio::time::Instant::now() + REPORT_INTERVAL, REPORT_INTERVAL);
        let (flag, error) = loop {
            tokio::select! {
                // A cut breaks streams too; it says more than they do.
                biased;
                Cut { flag, reason } = &mut cut => break (flag, reason),
                ended = &mut copy => break match ended {
                    Ok(()) => ("-", String::new()),
                    Err(error) => ("-", error.to_string()),
                },
                _ = tick.tick() => metrics.report(counts.received.load(Relaxed), counts.sent.load(Relaxed)),
            }
        };
        metrics.report(counts.received.load(Relaxed), counts.sent.load(Relaxed));
        metrics.close(flag);
        self.record(proxy, &counts, &error);
    }
}
