//! The admin server: what the ztunnel knows and what it did.

use crate::Proxy;
use crate::dump::dump;
use crate::explain::{Explanation, Question, explain};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use cairn_mesh::Workload;
use cairn_telemetry::{Denied, TcpExplanation, is_service};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `GET /config_dump`: the mesh as it is known, and certificates. `GET /connections`: the last connections, newest
/// first, and why each went where it went; `?decision=deny` and `?service=catalog.shop` choose among them. `GET
/// /denials`: the last denials of each service, newest first; `?service=` chooses. `POST /explain`: what would become of a
/// connection, and why. `POST /logging`: which log events are printed; `?level=` adds directives, `&reset` returns to those
/// of the beginning first. `POST /quitquitquit`: the drain, as with SIGTERM. `GET /turns`: the longest turn of each worker in
/// microseconds, looked for during `?milliseconds=` (1,000), which keeps the workers busy.
pub fn router(proxy: Arc<Proxy>) -> Router {
    Router::new()
        .route("/config_dump", get(config_dump))
        .route("/connections", get(connections))
        .route("/denials", get(denials))
        .route("/explain", post(explain_connection))
        .route("/logging", post(change_log))
        .route("/quitquitquit", post(quit))
        .route("/turns", get(turns))
        .with_state(proxy)
}

async fn config_dump(State(proxy): State<Arc<Proxy>>) -> Json<Value> {
    Json(dump(&proxy))
}

/// What is to become of the log. Whatever `reset` says, it is meant.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogChange {
    level: Option<String>,
    reset: Option<String>,
}

async fn change_log(
    State(proxy): State<Arc<Proxy>>,
    Query(change): Query<LogChange>,
) -> Result<String, (StatusCode, String)> {
    let reset = change.reset.map_or(Ok(()), |_| proxy.log.reset());
    let changed = reset.and_then(|()| match change.level.as_deref() {
        None | Some("") => Ok(()),
        Some(level) => proxy.log.add(level),
    });
    changed.map_err(|error| (StatusCode::BAD_REQUEST, format!("{error}\n")))?;
    Ok(format!("current log level is {}\n", proxy.log.filter()))
}

async fn quit(State(proxy): State<Arc<Proxy>>) -> &'static str {
    proxy.quit.notify_one();
    "shutdown now\n"
}

/// How long turns are looked for at most: an answer may take no longer.
const TURNS_MAX: Duration = Duration::from_secs(25);

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TurnsAsked {
    milliseconds: Option<u64>,
}

async fn turns(State(proxy): State<Arc<Proxy>>, Query(asked): Query<TurnsAsked>) -> Json<Vec<u64>> {
    let period = Duration::from_millis(asked.milliseconds.unwrap_or(1000)).min(TURNS_MAX);
    let turns = cairn_process::longest_turns(&proxy.workers.runtimes(), period).await;
    Json(turns.iter().map(|turn| u64::try_from(turn.as_micros()).unwrap_or(u64::MAX)).collect())
}

/// Answered from what the ztunnel has in force; nothing is sent.
async fn explain_connection(
    State(proxy): State<Arc<Proxy>>,
    Json(question): Json<Question>,
) -> Result<Json<Explanation>, (StatusCode, String)> {
    let explained = explain(&proxy.mesh.snapshot(), &question);
    explained.map(Json).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}

/// Which connections or denials are asked for. What is not known is refused rather than ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    decision: Option<String>,
    service: Option<String>,
}

impl Asked {
    fn wants_service(&self, hostname: &str) -> bool {
        self.service.as_ref().is_none_or(|wanted| is_service(hostname, wanted))
    }

    fn wants(&self, record: &TcpExplanation) -> bool {
        let hostname = record.service.as_ref().map_or("", |service| &*service.hostname);
        self.decision.as_ref().is_none_or(|decision| *decision == record.decision)
            && self.wants_service(hostname)
    }
}

async fn connections(State(proxy): State<Arc<Proxy>>, Query(asked): Query<Asked>) -> Json<Value> {
    let connections = proxy.telemetry.connections.list();
    Json(connections.iter().filter(|record| asked.wants(record)).map(view_connection).collect())
}

async fn denials(State(proxy): State<Arc<Proxy>>, Query(asked): Query<Asked>) -> Json<Value> {
    let denials = proxy.telemetry.denials.list(|service| asked.wants_service(service));
    Json(denials.iter().map(view_denied).collect())
}

fn view_denied(denied: &Denied) -> Value {
    json!({
        "time": unix_seconds(denied.at),
        "source": denied.source,
        "sourceIdentity": denied.source_identity.as_ref().map(|identity| identity.as_str()),
        "service": denied.service,
        "destination": denied.destination,
        "deniedBy": denied.policy,
        "deniedBecause": denied.reason,
    })
}

fn view_connection(record: &TcpExplanation) -> Value {
    let name = |workload: &Option<Arc<Workload>>| {
        workload.as_ref().map(|workload| format!("{}/{}", workload.namespace, workload.name))
    };
    json!({
        "time": unix_seconds(record.started),
        "durationMs": record.duration.as_secs_f64() * 1e3,
        "direction": record.direction.as_str(),
        "source": record.source,
        "sourceWorkload": name(&record.source_workload),
        "sourceIdentity": record.source_identity.as_ref().map(|identity| identity.as_str()),
        "destination": record.destination,
        "authority": record.hbone_authority,
        "service": record.service.as_ref().map(|service| service.hostname.as_ref()),
        "destinationWorkload": name(&record.destination_workload),
        "bytesSent": record.bytes_sent,
        "bytesReceived": record.bytes_received,
        "way": record.plan,
        "decision": record.decision,
        "policy": record.policy,
        "error": record.error,
    })
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
