//! Connections that carry no HTTP: an endpoint is chosen and bytes are copied, or shown to filters on their way.

mod filtered;

use crate::endpoint::{Chosen, Reach, choose};
use crate::record::REPORT_EVERY;
use crate::route::Target;
use crate::stream::Upstream;
use crate::upstream::Open;
use crate::{Failure, Site, SiteHandle, Worker, upstream};
use cairn_filter::{Admission, Closer, Connection, Denial};
use cairn_net::ByteCounts;
use cairn_telemetry::{
    CustomLabels, Direction, HttpRecord, HttpScope, Observe, PeerLabels, Reporter, Security, TcpConnection,
    TcpLabels, TcpRecord,
};
use filtered::Filters;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// The response flag of a connection that policy ended (as a ztunnel's).
const DENIED: &str = "DENY";

/// Copies between `stream` and an endpoint of its destination.
pub(crate) async fn serve<S>(mut stream: S, connection: &Arc<Connection>, site: &SiteHandle, worker: &Worker)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let started = (Instant::now(), SystemTime::now());
    let mut changes = worker.site_changes();
    let current = site.load_full();
    let observed = Observed::new(connection, &current, worker, started.1);
    let counts = ByteCounts::default();
    let failed = |flags| {
        let labels = observed.labels(connection, None, flags);
        TcpConnection::failed(&worker.telemetry().metrics, &labels);
    };
    let mut flags = "-";
    let (mut upstream_local, mut upstream_failure) = (None, "");
    let mut verdict = admit(&current, connection).await;
    let filters = match verdict {
        Admission::Pass(_) => Filters::start(&current.chain, connection, started),
        Admission::Refuse(_) => None,
    };
    let mut closer = Closer::Here;
    let opening = async {
        if let Some(filters) = &filters {
            Box::pin(filters.opened()).await.map_err(|end| ("-", "", end.into_reason()))?;
        }
        let opened = open(connection, &current, worker).await;
        opened.map_err(|failure| (failure.answer().flags, failure.transport(), failure.to_string()))
    };
    let (chosen, outcome) = match (&verdict, opening) {
        (Admission::Refuse(denial), _) => {
            failed(DENIED);
            flags = DENIED;
            (None, Err(denial.reason.clone()))
        }
        (Admission::Pass(_), opening) => match opening.await {
            Ok((chosen, Open { stream: mut server, local })) => {
                upstream_local = local;
                let labels = observed.labels(connection, Some(&chosen), "-");
                let mut counted = TcpConnection::open(&worker.telemetry().metrics, labels);
                if let Some(filters) = &filters {
                    filters.connected(&chosen);
                }
                let copying = copy(
                    (&mut stream, &mut server),
                    &counts,
                    &mut counted,
                    observed.interval(),
                    filters.as_ref(),
                );
                let ended = tokio::select! {
                    (by, copied) = copying => {
                        closer = by;
                        copied
                    }
                    denial = until_refused(connection, site, Arc::clone(&current), &mut changes) => {
                        let reason = denial.reason.clone();
                        verdict = Admission::Refuse(denial);
                        Err(reason)
                    }
                };
                counted.report(counts.received.load(Relaxed), counts.sent.load(Relaxed));
                if matches!(verdict, Admission::Refuse(_)) {
                    flags = DENIED;
                }
                counted.close(flags);
                (Some(chosen), ended)
            }
            Err((flag, failure, reason)) => {
                (flags, upstream_failure) = (flag, failure);
                failed(flags);
                (None, Err(reason))
            }
        },
    };
    if let Some(filters) = &filters {
        filters.closed(closer);
    }
    let (decision, policy) = match &verdict {
        Admission::Pass(Some(by)) => ("allow", &**by),
        Admission::Pass(None) => ("", ""),
        Admission::Refuse(denial) => ("deny", &*denial.policy),
    };
    let workload = chosen.as_ref().map(|chosen| &chosen.workload);
    let upstream = chosen.as_ref().map(|chosen| chosen.active.host());
    let record = TcpRecord {
        started: started.1,
        duration: started.0.elapsed(),
        direction: Direction::Inbound,
        source: connection.source.address,
        source_workload: connection.source.workload.as_ref(),
        source_identity: connection.source.identity.as_ref(),
        destination: upstream.map_or(connection.destination, |host| host.address),
        hbone_authority: &connection.destination.to_string(),
        service: connection.service.as_ref(),
        destination_workload: workload,
        destination_identity: upstream.and_then(|host| host.identity.as_ref()),
        bytes_sent: counts.sent.load(Relaxed),
        bytes_received: counts.received.load(Relaxed),
        error: outcome.as_ref().err().map_or("", String::as_str),
        plan: "waypoint",
        decision,
        policy,
    };
    let end = End { flags, upstream_local, upstream_failure };
    observed.finished(connection, chosen.as_ref(), worker, (&record, &end));
}

/// What an observer is told of a connection's end beside its record.
struct End {
    flags: &'static str,
    upstream_local: Option<SocketAddr>,
    upstream_failure: &'static str,
}

/// How a connection is observed: as its destination's telemetry settings say when it begins.
struct Observed {
    observer: Option<Arc<dyn Observe>>,
    scope: HttpScope,
    started: SystemTime,
}

impl Observed {
    fn new(connection: &Connection, site: &Site, worker: &Worker, started: SystemTime) -> Self {
        let scope =
            HttpScope::new(&worker.telemetry().metrics, source(connection), connection.service.clone());
        Self { observer: site.observer.clone(), scope, started }
    }

    fn interval(&self) -> Duration {
        self.observer.as_ref().map_or(REPORT_EVERY, |observer| observer.interval())
    }

    fn labels(
        &self,
        connection: &Connection,
        chosen: Option<&Chosen>,
        response_flags: &'static str,
    ) -> TcpLabels {
        let workload = chosen.map(|chosen| &chosen.workload);
        let destination = PeerLabels::of(workload, workload.map(|workload| &workload.identity));
        let source = source(connection);
        let security = Security::between(&source, &destination);
        let custom = match &self.observer {
            None => CustomLabels::default(),
            Some(observer) => {
                let mut values = Vec::new();
                observer.label_values(&self.scope, &self.told(connection, chosen), &mut values);
                CustomLabels::new(observer.shape(), values)
            }
        };
        TcpLabels {
            reporter: Reporter::Waypoint,
            source,
            destination,
            service: connection.service.clone(),
            response_flags,
            security,
            custom,
        }
    }

    /// What is known of a connection besides its ends and its bytes is little.
    fn told<'a>(&self, connection: &'a Connection, chosen: Option<&'a Chosen>) -> HttpRecord<'a> {
        HttpRecord {
            http: false,
            connection_id: connection.id,
            upstream: chosen.map(|chosen| chosen.active.host().address),
            upstream_workload: chosen.map(|chosen| &chosen.workload),
            ..HttpRecord::new(self.started, connection.source.address, connection.destination)
        }
    }

    fn finished(
        &self,
        connection: &Connection,
        chosen: Option<&Chosen>,
        worker: &Worker,
        (record, end): (&TcpRecord<'_>, &End),
    ) {
        let Some(observer) = &self.observer else { return worker.telemetry().record_tcp(record) };
        let told = HttpRecord {
            duration: record.duration,
            flags: end.flags,
            upstream_local: end.upstream_local,
            upstream_failure: end.upstream_failure,
            request_body_bytes: record.bytes_received,
            response_body_bytes: record.bytes_sent,
            request_bytes: record.bytes_received,
            response_bytes: record.bytes_sent,
            ..self.told(connection, chosen)
        };
        observer.finished(&self.scope, &told);
        worker.telemetry().keep_tcp(record);
    }
}

fn source(connection: &Connection) -> PeerLabels {
    PeerLabels::of(connection.source.workload.as_ref(), connection.source.identity.as_ref())
}

/// The judgement of the destination's filters: first of those that know, then of those that ask.
async fn admit(site: &Site, connection: &Connection) -> Admission {
    let allowed_by = match site.chain.admit(connection) {
        Admission::Pass(by) => by,
        refused => return refused,
    };
    match site.chain.ask(connection).await {
        Admission::Pass(by) => Admission::Pass(allowed_by.or(by)),
        refused => refused,
    }
}

/// Resolves when the destination's filters, as they are by then, no longer let the connection pass. They let it when
/// they were as `judged` has them.
async fn until_refused(
    connection: &Connection,
    site: &SiteHandle,
    mut judged: Arc<Site>,
    changes: &mut watch::Receiver<()>,
) -> Denial {
    loop {
        if changes.changed().await.is_err() {
            // Nothing changes any more: the worker is ending.
            return std::future::pending().await;
        }
        let now = site.load_full();
        if Arc::ptr_eq(&now, &judged) {
            continue;
        }
        if let Admission::Refuse(denial) = admit(&now, connection).await {
            return denial;
        }
        judged = now;
    }
}

async fn open(connection: &Connection, site: &Site, worker: &Worker) -> Result<(Chosen, Open), Failure> {
    let target = match &site.service {
        Some(service) => Target::Service { key: service.key(), port: site.port },
        None => Target::Addressed,
    };
    let mut tried = Vec::new();
    let reach = Reach { worker, viewpoint: site.viewpoint.as_deref(), destination: connection.destination };
    loop {
        let chosen = choose(&reach, &target, &tried)?;
        match upstream::open(worker, chosen.active.host()).await {
            Ok(server) => return Ok((chosen, server)),
            Err(failure) if !failure.answer().retry || tried.len() == worker.settings.retries_max => {
                return Err(failure);
            }
            Err(_) => tried.push(chosen.active.host().address),
        }
    }
}

/// Copies both ways, through filters if there are any, and says who ended it.
async fn copy<S>(
    (client, server): (&mut S, &mut Upstream),
    counts: &ByteCounts,
    counted: &mut TcpConnection,
    interval: Duration,
    filters: Option<&Filters>,
) -> (Closer, Result<(), String>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut copying = pin!(async {
        let Some(filters) = filters else {
            let copied = cairn_net::copy(client, server, counts).await;
            return (Closer::Here, copied.map_err(|error| error.to_string()));
        };
        // Apart, so that connections without filters are none the larger.
        match Box::pin(filters.copy(client, server, counts)).await {
            Ok(by) => (by, Ok(())),
            Err(end) => (end.by(), Err(end.into_reason())),
        }
    });
    let outcome = loop {
        match tokio::time::timeout(interval, copying.as_mut()).await {
            Ok(outcome) => break outcome,
            Err(_elapsed) => counted.report(counts.received.load(Relaxed), counts.sent.load(Relaxed)),
        }
    };
    counted.report(counts.received.load(Relaxed), counts.sent.load(Relaxed));
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_telemetry::{Metrics, MetricsSettings};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn a_connection_reports_its_bytes_at_every_interval_and_at_its_end() {
        let metrics = Metrics::new("proxy", "1", MetricsSettings::default());
        let labels = TcpLabels {
            reporter: Reporter::Waypoint,
            source: PeerLabels::default(),
            destination: PeerLabels::default(),
            service: None,
            response_flags: "-",
            security: Security::None,
            custom: CustomLabels::default(),
        };
        let received = || {
            let text = metrics.encode();
            let line = text.lines().find(|line| line.starts_with("istio_tcp_received_bytes_total{"));
            line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        };
        let (mut client, mut from) = tokio::io::duplex(64);
        let (to, mut server) = tokio::io::duplex(64);
        let mut counted = TcpConnection::open(&metrics, labels);
        let copying = tokio::spawn(async move {
            let (mut to, counts): (Upstream, _) = (Box::new(to), ByteCounts::default());
            copy((&mut from, &mut to), &counts, &mut counted, Duration::from_secs(7), None).await
        });
        let mut read = [0; 5];
        client.write_all(b"hello").await.unwrap();
        server.read_exact(&mut read).await.unwrap();
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(received(), 0, "before the first interval is over");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(received(), 5);
        client.write_all(b"again").await.unwrap();
        server.read_exact(&mut read).await.unwrap();
        drop((client, server));
        let (_, copied) = copying.await.unwrap();
        copied.unwrap();
        assert_eq!(received(), 10, "at its end");
    }
}
