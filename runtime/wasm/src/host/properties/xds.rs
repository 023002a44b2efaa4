//! Properties under `xds`: this proxy, and what its configuration says of the exchange.

use super::messages::{self, Kind};
use super::step;
use super::value::Value;
use crate::state::State;

/// A property under `xds`, or one of the names from before there was `xds`.
pub(super) fn property<'a>(state: &'a State, path: &[u8]) -> Option<Value<'a>> {
    let (name, rest) = step(path);
    if name == b"node" {
        return messages::walk(messages::node(&state.facts.environment.settings.node), rest, Kind::Node);
    }
    if name.is_empty() {
        return Some(Value::Whole);
    }
    let exchange = state.exchange()?;
    let metadata = |message| messages::walk(message, rest, Kind::Metadata);
    match name {
        b"cluster_name" => exchange.cluster.as_deref().map(Value::text),
        b"route_name" => exchange.route.as_deref().map(Value::text),
        // Inbound: a waypoint stands on the server's side.
        b"listener_direction" => Some(Value::Int(1)),
        b"cluster_metadata" => metadata(messages::cluster(exchange)?),
        b"upstream_host_metadata" => metadata(messages::upstream_host(exchange)?),
        b"listener_metadata" | b"route_metadata" | b"virtual_host_metadata" => metadata(messages::none()),
        _ => None,
    }
}
