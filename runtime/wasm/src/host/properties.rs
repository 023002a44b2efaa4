//! Properties: what plugins may ask about the exchange, the connection and themselves by name.
//!
//! Paths are segments joined by NUL. Names that Envoy dropped in favour of `xds.*` are still answered.

mod connection;
mod messages;
mod value;
mod xds;

pub(super) use value::Value;

use super::Guest;
use super::headers::{find, for_each};
use super::memory::{give, read, split};
use crate::abi::{Callback, Done, MapKind, Status, answer};
use crate::state::State;
use cairn_filter::{Measures, Protocol, Side};
use std::borrow::Cow;
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
        let value = property(state, path).ok_or(Status::NotFound)?;
        Ok(value.write(out)?)
    })
}

fn set(guest: &mut Guest<'_>, path: Slice, value: Slice) -> Done {
    let (memory, state) = split(guest)?;
    let path = trimmed(read(memory, path.0, path.1)?);
    let value = read(memory, value.0, value.1)?;
    let properties = match state.streams.get_mut(&state.effective) {
        Some(stream) => &mut stream.properties,
        None => &mut state.root_properties,
    };
    if state.declared.is_read_only(path) && properties.get(path).is_some() {
        return Err(Status::BadArgument.into());
    }
    if !properties.set(path, value) {
        // SDKs survive no status here.
        state.in_vain("proxy_set_property beyond its bounds");
    }
    Ok(())
}

/// C++ and Go end paths with a NUL, Rust does not.
fn trimmed(path: &[u8]) -> &[u8] {
    path.strip_suffix(&[0]).unwrap_or(path)
}

/// The value at a path of segments joined by NUL.
pub(super) fn property<'a>(state: &'a State, path: &'a [u8]) -> Option<Value<'a>> {
    known(state, path).or_else(|| custom(state, path))
}

/// The first segment of a path, and the rest.
fn step(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().position(|byte| *byte == 0) {
        Some(end) => (&path[..end], &path[end + 1..]),
        None => (path, &[]),
    }
}

fn known<'a>(state: &'a State, path: &'a [u8]) -> Option<Value<'a>> {
    let (root, rest) = step(path);
    let facts = &state.facts;
    match root {
        b"plugin_name" => Some(Value::text(&facts.plugin_name)),
        b"plugin_root_id" => Some(Value::text(&facts.root_id)),
        b"plugin_vm_id" => Some(Value::text("")),
        b"request" => request(state, rest),
        b"response" => response(state, rest),
        b"connection_id" => Some(Value::UInt(state.exchange()?.connection.id)),
        b"source" | b"destination" | b"connection" | b"upstream" => {
            connection::property(state.exchange()?, root, rest)
        }
        b"metadata" => messages::walk(messages::dynamic(state.exchange()?), rest, messages::Kind::Metadata),
        b"filter_state" | b"upstream_filter_state" if rest.is_empty() => {
            (root == b"filter_state").then_some(Value::Whole)
        }
        b"filter_state" => connection::filter_state(state.exchange()?, rest),
        // Before there was `filter_state`, the peers stood among the plugin's own properties.
        b"wasm.downstream_peer" | b"wasm.upstream_peer" | b"downstream_peer" | b"upstream_peer" => {
            connection::filter_state(state.exchange()?, path)
        }
        b"xds" => xds::property(state, rest),
        b"node"
        | b"cluster_name"
        | b"cluster_metadata"
        | b"route_name"
        | b"route_metadata"
        | b"listener_direction"
        | b"listener_metadata"
        | b"upstream_host_metadata" => xds::property(state, path),
        _ => None,
    }
}

/// What plugins set themselves, under its own name or as Envoy's filter state `wasm.<name>`.
fn custom<'a>(state: &'a State, path: &[u8]) -> Option<Value<'a>> {
    let path = path.strip_prefix(b"filter_state\0wasm.").unwrap_or(path);
    let of_stream = state.stream().and_then(|stream| stream.properties.get(path));
    of_stream.or_else(|| state.root_properties.get(path)).map(Value::bytes)
}

/// Whether the exchange is over, and its measures are final.
fn measures(state: &State) -> Option<&Measures> {
    state.exchange()?.measures.as_ref()
}

fn request<'a>(state: &'a State, rest: &[u8]) -> Option<Value<'a>> {
    let kind = MapKind::RequestHeaders;
    let header = |name: &[u8]| find(state, kind, name).flatten().map(Value::bytes);
    match rest {
        b"" => Some(Value::Whole),
        b"path" => header(b":path"),
        b"host" => header(b":authority"),
        b"scheme" => header(b":scheme"),
        b"method" => header(b":method"),
        b"referer" => header(b"referer"),
        b"useragent" => header(b"user-agent"),
        b"id" => header(b"x-request-id"),
        b"url_path" | b"query" => {
            let path = find(state, kind, b":path").flatten()?;
            let (before, after) = match path.iter().position(|byte| *byte == b'?') {
                Some(mark) => (&path[..mark], &path[mark + 1..]),
                None => (path, &[][..]),
            };
            Some(Value::bytes(if rest == b"query" { after } else { before }))
        }
        b"size" => {
            state.exchange()?;
            let measured = measures(state).map_or(0, |measures| measures.request_body_bytes);
            Some(Value::Int(announced(state, kind).unwrap_or(measured as i64)))
        }
        b"total_size" => {
            state.exchange()?;
            let measured = measures(state).map(|measures| measures.request_bytes);
            Some(Value::Int(measured.unwrap_or_else(|| bytes(state, kind)) as i64))
        }
        b"headers_bytes" => Some(Value::Int(state.exchange().map(|_| bytes(state, kind))? as i64)),
        b"headers" => all(state, kind),
        b"time" => Some(Value::time(state.exchange()?.started_at)),
        b"protocol" => {
            let protocol = state.exchange()?.protocol;
            (protocol != Protocol::Tcp).then(|| Value::text(protocol.as_str()))
        }
        // Known once the exchange is over.
        b"duration" if matches!(state.callback, Callback::Log | Callback::Done) => {
            Some(Value::duration(Instant::now().duration_since(state.exchange()?.started)))
        }
        _ => joined(state, kind, rest.strip_prefix(b"headers\0")?),
    }
}

fn response<'a>(state: &'a State, rest: &[u8]) -> Option<Value<'a>> {
    let kind = MapKind::ResponseHeaders;
    let measured = |of: fn(&Measures) -> u64| {
        state.exchange()?;
        Some(Value::Int(measures(state).map_or(0, of) as i64))
    };
    match rest {
        b"" => Some(Value::Whole),
        b"code" => match number(find(state, kind, b":status").flatten()) {
            Some(status) => Some(Value::Int(status)),
            None => Some(Value::Int(state.exchange()?.status?.as_u16().into())),
        },
        b"code_details" => {
            let details = &state.exchange()?.details;
            (!details.is_empty()).then(|| Value::text(details))
        }
        b"flags" => measured(|measures| flag_bits(measures.flags)),
        b"grpc_status" => match number(find(state, kind, b"grpc-status").flatten()) {
            Some(status) => Some(Value::Int(status)),
            None => Some(Value::Int(measures(state)?.grpc_status.map(i64::from)?)),
        },
        b"size" => measured(|measures| measures.response_body_bytes),
        b"total_size" => measured(|measures| measures.response_bytes),
        b"headers_bytes" => Some(Value::Int(state.exchange().map(|_| bytes(state, kind))? as i64)),
        b"backend_latency" => Some(Value::duration(measures(state)?.upstream_duration?)),
        b"headers" => all(state, kind),
        b"trailers" => all(state, MapKind::Trailers(Side::Response)),
        _ => match rest.strip_prefix(b"trailers\0") {
            Some(name) => joined(state, MapKind::Trailers(Side::Response), name),
            None => joined(state, kind, rest.strip_prefix(b"headers\0")?),
        },
    }
}

/// Bits of response flags, as Envoy numbers them (`CoreResponseFlag`).
fn flag_bits(flags: &str) -> u64 {
    const FLAGS: [&str; 26] = [
        "LH", "UH", "UT", "LR", "UR", "UF", "UC", "UO", "NR", "DI", "FI", "RL", "UAEX", "RLSE", "DC", "URX",
        "SI", "IH", "DPE", "UMSDR", "RFCF", "NFCF", "DT", "UPE", "NC", "OM",
    ];
    let bit = |flag: &str| FLAGS.iter().position(|known| *known == flag).map_or(0, |at| 1 << at);
    flags.split(',').map(bit).sum()
}

/// All values of a header, joined by commas.
fn joined<'a>(state: &State, kind: MapKind, name: &[u8]) -> Option<Value<'a>> {
    let mut values: Option<Vec<u8>> = None;
    for_each(state, kind, |present, value| {
        if present.eq_ignore_ascii_case(name) {
            match &mut values {
                Some(values) => {
                    values.push(b',');
                    values.extend_from_slice(value);
                }
                None => values = Some(value.to_vec()),
            }
        }
    });
    values.map(|values| Value::Bytes(Cow::Owned(values)))
}

/// A whole map, the values of one name joined by commas.
fn all<'a>(state: &State, kind: MapKind) -> Option<Value<'a>> {
    let mut merged: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let known =
        for_each(state, kind, |name, value| match merged.iter_mut().find(|(present, _)| present == name) {
            Some((_, values)) => {
                values.push(b',');
                values.extend_from_slice(value);
            }
            None => merged.push((name.to_vec(), value.to_vec())),
        });
    known.then_some(Value::Map(merged))
}

/// The bytes of a map's names and values.
fn bytes(state: &State, kind: MapKind) -> u64 {
    let mut bytes = 0;
    for_each(state, kind, |name, value| bytes += name.len() + value.len());
    bytes as u64
}

/// The announced length of a body.
fn announced(state: &State, kind: MapKind) -> Option<i64> {
    number(find(state, kind, b"content-length").flatten())
}

fn number(digits: Option<&[u8]>) -> Option<i64> {
    std::str::from_utf8(digits?).ok()?.parse().ok()
}
