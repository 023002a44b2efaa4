//! Properties: what plugins may ask about the exchange, the connection and themselves by name.
//!
//! Paths are segments joined by NUL. Numbers and times are 64-bit little-endian, truth is one byte, maps are serialised
//! like header maps. Names that Envoy dropped in favour of `xds.*` are still answered.

use super::Guest;
use super::headers::{find, for_each};
use super::log::nanoseconds_since_epoch;
use super::memory::{give, read, split};
use crate::abi::{Callback, Done, MapKind, Status, answer};
use crate::pairs;
use crate::state::State;
use cairn_filter::{Exchange, Peer};
use cairn_mesh::{Identity, Workload};
use std::io::Write;
use std::net::SocketAddr;
use std::time::Instant;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_get_property",
        |mut guest: Guest<'_>, path: u32, path_length: u32, pointer_at: u32, length_at: u32| {
            answer(get(&mut guest, (path, path_length), (pointer_at, length_at)))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_set_property",
        |mut guest: Guest<'_>, path: u32, path_length: u32, value: u32, value_length: u32| {
            answer(set(&mut guest, (path, path_length), (value, value_length)))
        },
    )?;
    Ok(())
}

/// A pointer and a length, as the guest passes them.
type Slice = (u32, u32);

fn get(guest: &mut Guest<'_>, path: Slice, result: Slice) -> Done {
    give(guest, result.0, result.1, |memory, state, out| {
        let path = trimmed(read(memory, path.0, path.1)?);
        match property(state, path, out) {
            Found::Value => Ok(()),
            Found::Whole => Err(Status::SerializationFailure.into()),
            Found::Nothing => custom(state, path, out).map_err(Into::into),
        }
    })
}

fn set(guest: &mut Guest<'_>, path: Slice, value: Slice) -> Done {
    let (memory, state) = split(guest)?;
    let path = trimmed(read(memory, path.0, path.1)?);
    let value = read(memory, value.0, value.1)?;
    let kept = match state.streams.get_mut(&state.effective) {
        Some(stream) => stream.properties.set(path, value),
        None => state.root_properties.set(path, value),
    };
    if !kept {
        // SDKs survive no status here.
        state.in_vain("proxy_set_property beyond its bounds");
    }
    Ok(())
}

/// C++ and Go end paths with a NUL, Rust does not.
fn trimmed(path: &[u8]) -> &[u8] {
    path.strip_suffix(&[0]).unwrap_or(path)
}

/// What plugins set themselves, under its own name or as Envoy's filter state `wasm.<name>`.
fn custom(state: &State, path: &[u8], out: &mut Vec<u8>) -> Result<(), Status> {
    let path = path.strip_prefix(b"filter_state\0wasm.").unwrap_or(path);
    let of_stream = state.stream().and_then(|stream| stream.properties.get(path));
    let value = of_stream.or_else(|| state.root_properties.get(path)).ok_or(Status::NotFound)?;
    out.extend_from_slice(value);
    Ok(())
}

/// What a path leads to.
#[derive(PartialEq, Eq, Debug)]
enum Found {
    /// A value, written to the buffer.
    Value,
    /// An object as a whole, which has no serialised form.
    Whole,
    /// Nothing known here or now.
    Nothing,
}

impl From<bool> for Found {
    fn from(found: bool) -> Self {
        if found { Self::Value } else { Self::Nothing }
    }
}

fn property(state: &State, path: &[u8], out: &mut Vec<u8>) -> Found {
    let (root, rest) = match path.iter().position(|byte| *byte == 0) {
        Some(end) => (&path[..end], &path[end + 1..]),
        None => (path, &[][..]),
    };
    let facts = &state.facts;
    match root {
        b"plugin_name" => text(out, &facts.plugin_name),
        b"plugin_root_id" => text(out, &facts.root_id),
        b"plugin_vm_id" => Found::Value,
        b"node" => node(state, rest, out),
        b"xds" => xds(state, rest, out),
        b"cluster_name" | b"route_name" | b"listener_direction" => xds(state, root, out),
        b"request" => request(state, rest, out),
        b"response" => response(state, rest, out),
        b"source" | b"destination" | b"connection" | b"upstream" | b"filter_state" | b"connection_id" => {
            match state.exchange() {
                Some(exchange) => of_exchange(exchange, root, rest, out),
                None => Found::Nothing,
            }
        }
        _ => Found::Nothing,
    }
}

fn of_exchange(exchange: &Exchange, root: &[u8], rest: &[u8], out: &mut Vec<u8>) -> Found {
    let connection = &exchange.connection;
    match (root, rest) {
        (b"filter_state", _) => filter_state(exchange, rest, out),
        (_, b"") if root != b"connection_id" => Found::Whole,
        (b"source", _) => address(connection.source.address, rest, out),
        (b"destination", _) => address(connection.destination, rest, out),
        (b"upstream", _) => match exchange.upstream {
            Some(upstream) => address(upstream, rest, out),
            None => Found::Nothing,
        },
        (b"connection_id", _) | (_, b"id") => number(out, connection.id as i64),
        (_, _) => of_connection(&connection.source, connection.local.as_ref(), rest, out),
    }
}

fn of_connection(source: &Peer, local: Option<&Identity>, rest: &[u8], out: &mut Vec<u8>) -> Found {
    let uri = |identity: Option<&Identity>, out: &mut Vec<u8>| match identity {
        Some(identity) => text(out, identity.as_str()),
        None => Found::Nothing,
    };
    match rest {
        b"mtls" => {
            out.push(u8::from(source.identity.is_some()));
            Found::Value
        }
        b"requested_server_name" => Found::Value,
        b"tls_version" if source.identity.is_some() => text(out, "TLSv1.3"),
        b"uri_san_peer_certificate" => uri(source.identity.as_ref(), out),
        b"uri_san_local_certificate" => uri(local, out),
        _ => Found::Nothing,
    }
}

fn address(at: SocketAddr, rest: &[u8], out: &mut Vec<u8>) -> Found {
    match rest {
        b"address" => written(out, format_args!("{at}")),
        b"port" => number(out, i64::from(at.port())),
        _ => Found::Nothing,
    }
}

/// The peers as Istio's metadata exchange leaves them.
fn filter_state(exchange: &Exchange, rest: &[u8], out: &mut Vec<u8>) -> Found {
    let (key, field) = match rest.iter().position(|byte| *byte == 0) {
        Some(end) => (&rest[..end], &rest[end + 1..]),
        None if rest.is_empty() => return Found::Whole,
        None => return Found::Nothing,
    };
    let workload = match key {
        b"downstream_peer" => exchange.connection.source.workload.as_deref(),
        b"upstream_peer" => exchange.upstream_workload.as_deref(),
        _ => None,
    };
    workload.map_or(Found::Nothing, |workload| workload_field(workload, field, out))
}

fn workload_field(workload: &Workload, field: &[u8], out: &mut Vec<u8>) -> Found {
    let value = match field {
        b"workload" => &*workload.workload_name,
        b"namespace" => &*workload.namespace,
        b"name" => &*workload.name,
        b"service" | b"app" => &*workload.canonical_name,
        b"revision" | b"version" => &*workload.canonical_revision,
        b"cluster" => &*workload.cluster_id,
        b"type" => workload.kind.as_str(),
        b"identity" => workload.identity.as_str(),
        _ => return Found::Nothing,
    };
    text(out, value)
}

fn xds(state: &State, rest: &[u8], out: &mut Vec<u8>) -> Found {
    if let Some(rest) = rest.strip_prefix(b"node\0") {
        return node(state, rest, out);
    }
    let Some(exchange) = state.exchange() else { return Found::Nothing };
    match rest {
        b"cluster_name" => exchange.cluster.as_deref().map_or(Found::Nothing, |name| text(out, name)),
        b"route_name" => exchange.route.as_deref().map_or(Found::Nothing, |name| text(out, name)),
        // Inbound: a waypoint stands on the server's side.
        b"listener_direction" => number(out, 1),
        _ => Found::Nothing,
    }
}

/// What the operator told about this proxy; the segments of a path are joined by dots there.
fn node(state: &State, rest: &[u8], out: &mut Vec<u8>) -> Found {
    let known = &state.facts.environment.settings.node;
    let same = |key: &str| {
        key.len() == rest.len()
            && key.bytes().zip(rest).all(|(ours, theirs)| ours == *theirs || (ours == b'.' && *theirs == 0))
    };
    known.iter().find(|(key, _)| same(key)).map_or(Found::Nothing, |(_, value)| text(out, value))
}

fn request(state: &State, rest: &[u8], out: &mut Vec<u8>) -> Found {
    let kind = MapKind::RequestHeaders;
    let header = |name: &[u8], out: &mut Vec<u8>| Found::from(first(state, kind, name, out));
    match rest {
        b"" => Found::Whole,
        b"path" => header(b":path", out),
        b"host" => header(b":authority", out),
        b"scheme" => header(b":scheme", out),
        b"method" => header(b":method", out),
        b"referer" => header(b"referer", out),
        b"useragent" => header(b"user-agent", out),
        b"id" => header(b"x-request-id", out),
        b"url_path" | b"query" => match find(state, kind, b":path").flatten() {
            Some(path) => {
                let (before, after) = match path.iter().position(|byte| *byte == b'?') {
                    Some(mark) => (&path[..mark], &path[mark + 1..]),
                    None => (path, &[][..]),
                };
                out.extend_from_slice(if rest == b"query" { after } else { before });
                Found::Value
            }
            None => Found::Nothing,
        },
        b"size" => length(state, kind, out),
        b"headers" => all(state, kind, out),
        b"time" | b"protocol" | b"duration" => match state.exchange() {
            Some(exchange) => request_facts(state, exchange, rest, out),
            None => Found::Nothing,
        },
        _ => match rest.strip_prefix(b"headers\0") {
            Some(name) => Found::from(joined(state, kind, name, out)),
            None => Found::Nothing,
        },
    }
}

fn request_facts(state: &State, exchange: &Exchange, rest: &[u8], out: &mut Vec<u8>) -> Found {
    match rest {
        b"time" => number(out, nanoseconds_since_epoch(exchange.started_at) as i64),
        b"protocol" => text(out, exchange.protocol.as_str()),
        // Known once the exchange is over.
        b"duration" if matches!(state.callback, Callback::Log | Callback::Done) => {
            number(out, Instant::now().duration_since(exchange.started).as_nanos() as i64)
        }
        _ => Found::Nothing,
    }
}

fn response(state: &State, rest: &[u8], out: &mut Vec<u8>) -> Found {
    let kind = MapKind::ResponseHeaders;
    match rest {
        b"" => Found::Whole,
        b"code" => match find(state, kind, b":status").flatten() {
            Some(status) => parsed_number(status, out),
            None => match state.exchange().and_then(|exchange| exchange.status) {
                Some(status) => number(out, i64::from(status.as_u16())),
                None => Found::Nothing,
            },
        },
        b"code_details" => match state.exchange() {
            Some(exchange) if !exchange.details.is_empty() => text(out, &exchange.details),
            _ => Found::Nothing,
        },
        b"grpc_status" => match find(state, kind, b"grpc-status").flatten() {
            Some(status) => parsed_number(status, out),
            None => Found::Nothing,
        },
        b"size" => length(state, kind, out),
        b"headers" => all(state, kind, out),
        _ => match rest.strip_prefix(b"headers\0") {
            Some(name) => Found::from(joined(state, kind, name, out)),
            None => Found::Nothing,
        },
    }
}

/// The first value of a header.
fn first(state: &State, kind: MapKind, name: &[u8], out: &mut Vec<u8>) -> bool {
    let value = find(state, kind, name).flatten();
    out.extend_from_slice(value.unwrap_or_default());
    value.is_some()
}

/// All values of a header, joined by commas.
fn joined(state: &State, kind: MapKind, name: &[u8], out: &mut Vec<u8>) -> bool {
    let mut found = false;
    for_each(state, kind, |present, value| {
        if present.eq_ignore_ascii_case(name) {
            if found {
                out.push(b',');
            }
            out.extend_from_slice(value);
            found = true;
        }
    });
    found
}

/// A whole map, the values of one name joined by commas.
fn all(state: &State, kind: MapKind, out: &mut Vec<u8>) -> Found {
    let mut merged: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let known =
        for_each(state, kind, |name, value| match merged.iter_mut().find(|(present, _)| present == name) {
            Some((_, values)) => {
                values.push(b',');
                values.extend_from_slice(value);
            }
            None => merged.push((name.to_vec(), value.to_vec())),
        });
    pairs::write(out, merged.len() as u32, merged.iter().map(|(name, value)| (&name[..], &value[..])));
    Found::from(known)
}

/// The announced length of a body.
fn length(state: &State, kind: MapKind, out: &mut Vec<u8>) -> Found {
    match find(state, kind, b"content-length").flatten() {
        Some(length) => parsed_number(length, out),
        None => Found::Nothing,
    }
}

fn parsed_number(digits: &[u8], out: &mut Vec<u8>) -> Found {
    match std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()) {
        Some(parsed) => number(out, parsed),
        None => Found::Nothing,
    }
}

fn text(out: &mut Vec<u8>, text: &str) -> Found {
    out.extend_from_slice(text.as_bytes());
    Found::Value
}

fn number(out: &mut Vec<u8>, number: i64) -> Found {
    out.extend_from_slice(&number.to_le_bytes());
    Found::Value
}

fn written(out: &mut Vec<u8>, arguments: std::fmt::Arguments<'_>) -> Found {
    // Writing to a Vec cannot fail.
    let _ = out.write_fmt(arguments);
    Found::Value
}
