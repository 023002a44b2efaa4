//! The admin server: what the waypoint knows and what it did.

use crate::Waypoint;
use crate::plugins::Standing;
use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use cairn_mesh::Workload;
use cairn_telemetry::HttpExplanation;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// `GET /config_dump`: destinations, their filters, plugins, certificates. `GET /exchanges`: the last exchanges, newest
/// first, and what decided each.
pub fn router(waypoint: Arc<Waypoint>) -> Router {
    Router::new()
        .route("/config_dump", get(config_dump))
        .route("/exchanges", get(exchanges))
        .with_state(waypoint)
}

async fn config_dump(State(waypoint): State<Arc<Waypoint>>) -> Json<Value> {
    let plugins = waypoint.plugin_list.load();
    let destinations = waypoint.table.load().list();
    Json(json!({
        "gateway": waypoint.settings.gateway.to_string(),
        "identity": waypoint.settings.identity.as_str(),
        "generation": waypoint.mesh.snapshot().generation(),
        "destinations": destinations
            .into_iter()
            .map(|(name, filters)| json!({ "destination": name, "filters": filters }))
            .collect::<Vec<_>>(),
        "plugins": plugins.iter().map(|(name, url, standing)| {
            let (state, reason) = match standing {
                Standing::Ready(_, reason) => ("ready", reason.as_deref()),
                Standing::Loading => ("loading", None),
                Standing::Failed(reason) => ("failed", Some(&**reason)),
            };
            json!({ "name": name, "url": url, "state": state, "reason": reason })
        }).collect::<Vec<_>>(),
        "certificates": waypoint.certificates.list().iter().map(|certificate| json!({
            "identity": certificate.identity.as_str(),
            "serialNumber": certificate.serial,
            "validFrom": unix_seconds(certificate.not_before),
            "expirationTime": unix_seconds(certificate.not_after),
        })).collect::<Vec<_>>(),
    }))
}

async fn exchanges(State(waypoint): State<Arc<Waypoint>>) -> Json<Value> {
    Json(waypoint.telemetry.exchanges.list().iter().map(view).collect())
}

fn view(record: &HttpExplanation) -> Value {
    let name = |workload: &Option<Arc<Workload>>| {
        workload.as_ref().map(|workload| format!("{}/{}", workload.namespace, workload.name))
    };
    json!({
        "time": unix_seconds(record.started),
        "durationMs": record.duration.as_secs_f64() * 1e3,
        "requestId": record.request_id,
        "source": record.source,
        "sourceIdentity": record.source_identity.as_ref().map(|identity| identity.as_str()),
        "sourceWorkload": name(&record.source_workload),
        "service": record.destination_service.as_ref().map(|service| service.hostname.as_ref()),
        "destination": record.destination,
        "method": record.method,
        "authority": record.authority,
        "path": record.path,
        "protocol": record.protocol,
        "status": record.status,
        "grpcStatus": record.grpc_status,
        "flags": record.flags,
        "details": record.details,
        "deniedBy": record.denied_by,
        "deniedBecause": record.denial_reason,
        "allowedBy": record.allowed_by,
        "route": record.route,
        "cluster": record.cluster,
        "upstream": record.upstream,
        "upstreamWorkload": name(&record.upstream_workload),
        "notes": record.notes.iter().map(|(filter, text)| json!({ "filter": filter, "did": text })).collect::<Vec<_>>(),
    })
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
