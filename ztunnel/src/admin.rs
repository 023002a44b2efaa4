//! The admin server: what the ztunnel knows and what it did.

use crate::Proxy;
use crate::explain::{Explanation, Question, explain};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use cairn_mesh::{Service, Workload};
use cairn_telemetry::{Denied, TcpExplanation, is_service};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// `GET /config_dump`: the mesh as it is known, and certificates. `GET /connections`: the last connections, newest
/// first, and why each went where it went; `?decision=deny` and `?service=catalog.shop` choose among them. `GET
/// /denials`: the last denials of each service, newest first; `?service=` chooses. `POST /explain`: what would become of a
/// connection, and why.
pub fn router(proxy: Arc<Proxy>) -> Router {
    Router::new()
        .route("/config_dump", get(config_dump))
        .route("/connections", get(connections))
        .route("/denials", get(denials))
        .route("/explain", post(explain_connection))
        .with_state(proxy)
}

async fn config_dump(State(proxy): State<Arc<Proxy>>) -> Json<Value> {
    let snapshot = proxy.mesh.snapshot();
    let mut workloads: Vec<&Arc<Workload>> = snapshot.workloads().collect();
    workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
    let mut services: Vec<_> = snapshot.services().collect();
    services.sort_by_key(|state| state.service.key());
    let mut policies: Vec<_> = snapshot.authorizations().collect();
    policies.sort_by(|a, b| a.name.cmp(&b.name));
    Json(json!({
        "generation": snapshot.generation(),
        "workloads": workloads.into_iter().map(|workload| view_workload(workload)).collect::<Vec<_>>(),
        "services": services.into_iter().map(|state| view_service(&state.service, state.endpoints.len())).collect::<Vec<_>>(),
        "policies": policies.into_iter().map(|policy| json!({
            "name": policy.name.name.as_ref(),
            "namespace": policy.name.namespace.as_ref(),
            "scope": format!("{:?}", policy.scope),
            "action": format!("{:?}", policy.action),
            "rules": policy.rules.len(),
            "dryRun": policy.dry_run,
        })).collect::<Vec<_>>(),
        "certificates": proxy.certificates.list().iter().map(|certificate| json!({
            "identity": certificate.identity.as_str(),
            "state": "Available",
            "certChain": [{
                "serialNumber": certificate.serial,
                "validFrom": unix_seconds(certificate.not_before),
                "expirationTime": unix_seconds(certificate.not_after),
            }],
        })).collect::<Vec<_>>(),
        "openInbound": proxy.live.len(),
    }))
}

/// Answered from what the ztunnel has in force; nothing is sent.
async fn explain_connection(
    State(proxy): State<Arc<Proxy>>,
    Json(question): Json<Question>,
) -> Result<Json<Explanation>, (StatusCode, String)> {
    let explained = explain(&proxy.mesh.snapshot(), &question);
    explained.map(Json).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}

fn view_workload(workload: &Workload) -> Value {
    json!({
        "uid": workload.uid.as_ref(),
        "name": workload.name.as_ref(),
        "namespace": workload.namespace.as_ref(),
        "serviceAccount": workload.identity.service_account(),
        "workloadIps": workload.addresses,
        "protocol": format!("{:?}", workload.protocol).to_uppercase(),
        "waypoint": workload.waypoint.as_ref().map(|waypoint| json!({ "destination": waypoint.to_string() })),
        "node": workload.node.as_ref(),
        "status": format!("{:?}", workload.health),
        "authorizationPolicies": workload.authorization_policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "canonicalName": workload.canonical_name.as_ref(),
        "canonicalRevision": workload.canonical_revision.as_ref(),
        "workloadName": workload.workload_name.as_ref(),
        "workloadType": workload.kind.as_str(),
        "trustDomain": workload.identity.trust_domain(),
        "clusterId": workload.cluster_id.as_ref(),
        "capacity": workload.capacity,
    })
}

fn view_service(service: &Service, endpoints: usize) -> Value {
    json!({
        "name": service.name.as_ref(),
        "namespace": service.namespace.as_ref(),
        "hostname": service.hostname.as_ref(),
        "vips": service.vips.iter().map(|vip| format!("{}/{}", vip.network, vip.address)).collect::<Vec<_>>(),
        "ports": service.ports.iter().map(|port| (port.port.to_string(), port.target_port)).collect::<std::collections::BTreeMap<_, _>>(),
        "waypoint": service.waypoint.as_ref().map(|waypoint| json!({ "destination": waypoint.to_string() })),
        "readyEndpoints": endpoints,
    })
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
