//! The admin server: what the waypoint knows and what it did.

use crate::Waypoint;
use crate::explain::{self, Explanation, Place, Question, explain};
use crate::plugins::View;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use cairn_mesh::Workload;
use cairn_telemetry::{Denied, HttpExplanation, is_service};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// `GET /config_dump`: destinations, their filters, plugins, certificates. `GET /plugins`: where each plugin's module came
/// from, how it stands, which version runs and which exchanges have not left yet. `GET /exchanges`: the last exchanges, newest
/// first, and what decided each; `?status=403` and `?service=catalog.shop` choose among them. `GET /denials`: the last
/// denials of each service, newest first; `?service=` chooses. `POST /explain`: what would become of a request, and why.
pub fn router(waypoint: Arc<Waypoint>) -> Router {
    Router::new()
        .route("/config_dump", get(config_dump))
        .route("/plugins", get(list_plugins))
        .route("/exchanges", get(exchanges))
        .route("/denials", get(denials))
        .route("/explain", post(explain_request))
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
        "plugins": plugins.iter().map(View::brief).collect::<Vec<_>>(),
        "certificates": waypoint.certificates.list().iter().map(|certificate| json!({
            "identity": certificate.identity.as_str(),
            "serialNumber": certificate.serial,
            "validFrom": unix_seconds(certificate.not_before),
            "expirationTime": unix_seconds(certificate.not_after),
        })).collect::<Vec<_>>(),
    }))
}

async fn list_plugins(State(waypoint): State<Arc<Waypoint>>) -> Json<Value> {
    Json(waypoint.plugin_list.load().iter().map(View::whole).collect())
}

/// Which exchanges or denials are asked for. What is not known is refused rather than ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    status: Option<u16>,
    service: Option<String>,
}

impl Asked {
    fn wants_service(&self, hostname: &str) -> bool {
        self.service.as_ref().is_none_or(|wanted| is_service(hostname, wanted))
    }

    fn wants(&self, record: &HttpExplanation) -> bool {
        let hostname = record.destination_service.as_ref().map_or("", |service| &*service.hostname);
        self.status.is_none_or(|status| status == record.status) && self.wants_service(hostname)
    }
}

async fn exchanges(State(waypoint): State<Arc<Waypoint>>, Query(asked): Query<Asked>) -> Json<Value> {
    let exchanges = waypoint.telemetry.exchanges.list();
    Json(exchanges.iter().filter(|record| asked.wants(record)).map(view).collect())
}

/// The question is answered from what the waypoint has in force, filters included; nothing is sent.
async fn explain_request(
    State(waypoint): State<Arc<Waypoint>>,
    Json(question): Json<Question>,
) -> Result<Json<Explanation>, (StatusCode, String)> {
    let snapshot = waypoint.snapshot.load_full();
    let place = Place {
        gateway: waypoint.settings.gateway.clone(),
        identity: waypoint.settings.identity.clone(),
        address: waypoint.settings.hbone.ip(),
        snapshot: Arc::clone(&snapshot),
        table: waypoint.table.load_full(),
    };
    let ours = |workload: &Workload| (workload.identity == place.identity).then_some(&place);
    // The policies of ztunnels are not sent to waypoints.
    let view = explain::View { snapshot: &snapshot, knows_l4: false, waypoint: &ours };
    explain(&view, &question).map(Json).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}

async fn denials(State(waypoint): State<Arc<Waypoint>>, Query(asked): Query<Asked>) -> Json<Value> {
    let denials = waypoint.telemetry.denials.list(|service| asked.wants_service(service));
    let wanted = denials.iter().filter(|denied| asked.status.is_none_or(|status| status == denied.status));
    Json(wanted.map(view_denied).collect())
}

fn view_denied(denied: &Denied) -> Value {
    json!({
        "time": unix_seconds(denied.at),
        "source": denied.source,
        "sourceIdentity": denied.source_identity.as_ref().map(|identity| identity.as_str()),
        "service": denied.service,
        "destination": denied.destination,
        "method": denied.method,
        "authority": denied.authority,
        "path": denied.path,
        "status": denied.status,
        "deniedBy": denied.policy,
        "deniedBecause": denied.reason,
    })
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
