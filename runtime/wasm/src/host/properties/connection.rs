//! Properties of the connection: its ends, and who they are.

use super::step;
use super::value::Value;
use cairn_filter::{Connection, Exchange};
use cairn_mesh::{Identity, Workload};
use std::net::SocketAddr;

/// A property under `source`, `destination`, `connection` or `upstream`.
pub(super) fn property<'a>(exchange: &'a Exchange, root: &[u8], rest: &[u8]) -> Option<Value<'a>> {
    let connection = &exchange.connection;
    if rest.is_empty() {
        return Some(Value::Whole);
    }
    match root {
        b"source" => address(connection.source.address, rest),
        b"destination" => address(connection.destination, rest),
        b"upstream" => upstream(exchange, rest),
        _ => of_connection(connection, rest),
    }
}

fn upstream<'a>(exchange: &'a Exchange, rest: &[u8]) -> Option<Value<'a>> {
    let workload = exchange.upstream_workload.as_deref();
    match rest {
        b"request_attempt_count" => Some(Value::UInt(
            exchange
                .measures
                .as_ref()
                .map_or(u64::from(exchange.upstream.is_some()), |measures| u64::from(measures.attempts)),
        )),
        b"uri_san_peer_certificate" => identity(workload.map(|workload| &workload.identity)),
        b"uri_san_local_certificate" => identity(exchange.connection.local.as_ref()),
        b"tls_version" => workload.map(|_| Value::text("TLSv1.3")),
        _ => address(exchange.upstream?, rest),
    }
}

fn of_connection<'a>(connection: &'a Connection, rest: &[u8]) -> Option<Value<'a>> {
    let peer = connection.source.identity.as_ref();
    match rest {
        b"id" => Some(Value::UInt(connection.id)),
        b"mtls" => Some(Value::Bool(peer.is_some())),
        b"requested_server_name" => Some(Value::text("")),
        b"tls_version" => peer.map(|_| Value::text("TLSv1.3")),
        b"uri_san_peer_certificate" => identity(peer),
        b"uri_san_local_certificate" => identity(connection.local.as_ref()),
        _ => None,
    }
}

fn identity(identity: Option<&Identity>) -> Option<Value<'_>> {
    identity.map(|identity| Value::text(identity.as_str()))
}

fn address<'a>(at: SocketAddr, rest: &[u8]) -> Option<Value<'a>> {
    match rest {
        b"address" => Some(Value::owned(at.to_string())),
        b"port" => Some(Value::Int(at.port().into())),
        _ => None,
    }
}

/// The peers as Istio's metadata exchange leaves them, under their present and their former names.
pub(super) fn filter_state<'a>(exchange: &'a Exchange, rest: &[u8]) -> Option<Value<'a>> {
    let (key, field) = step(rest);
    let workload = match key.strip_prefix(b"wasm.").unwrap_or(key) {
        b"downstream_peer" => exchange.connection.source.workload.as_deref(),
        b"upstream_peer" => exchange.upstream_workload.as_deref(),
        b"downstream_peer_id" => return exchange.connection.source.workload.as_deref().map(id),
        b"upstream_peer_id" => return exchange.upstream_workload.as_deref().map(id),
        b"io.istio.peer_principal" => return identity(exchange.connection.source.identity.as_ref()),
        b"io.istio.local_principal" => return identity(exchange.connection.local.as_ref()),
        _ => None,
    }?;
    if field.is_empty() {
        let entry = |(name, value): (&str, &str)| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
        return Some(Value::Map(fields(workload).into_iter().map(entry).collect()));
    }
    let name = std::str::from_utf8(field).ok()?;
    fields(workload).into_iter().find(|(known, _)| *known == name).map(|(_, value)| Value::text(value))
}

fn id(workload: &Workload) -> Value<'_> {
    Value::text(&workload.name)
}

/// What a peer says of itself (Istio's `WorkloadMetadataObject`).
fn fields(workload: &Workload) -> [(&'static str, &str); 12] {
    [
        ("name", &workload.name),
        ("namespace", &workload.namespace),
        ("cluster", &workload.cluster_id),
        ("service", &workload.canonical_name),
        ("revision", &workload.canonical_revision),
        ("app", &workload.canonical_name),
        ("version", &workload.canonical_revision),
        ("workload", &workload.workload_name),
        ("type", workload.kind.as_str()),
        ("identity", workload.identity.as_str()),
        ("region", &workload.locality.region),
        ("zone", &workload.locality.zone),
    ]
}
