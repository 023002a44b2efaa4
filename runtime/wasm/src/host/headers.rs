//! Header maps.
//!
//! A map can be changed while its head is at hand, and read for as long as the stream lives: Envoy forgets the request's
//! headers after their phase, which only ever crashed plugins.

use super::Guest;
use super::memory::{charge, give, read, split, write_u32};
use crate::abi::{AbiVersion, Done, MapKind, Refusal, Status, answer};
use crate::heads::{
    Edit, EditError, header_pairs, header_value, refuse_injection, remove_header, write_header as write_to,
};
use crate::metrics::Limit;
use crate::pairs::{self, Pairs};
use crate::state::{State, Trailers, number_of};
use cairn_filter::Side;
use http::HeaderMap;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_get_header_map_size",
        |mut guest: Guest<'_>, map: u32, size_at: u32| answer(size(&mut guest, map, size_at)),
    )?;
    linker.func_wrap(
        "env",
        "proxy_get_header_map_pairs",
        |mut guest: Guest<'_>, map: u32, pointer_at: u32, length_at: u32| {
            answer(all(&mut guest, map, pointer_at, length_at))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_set_header_map_pairs",
        |mut guest: Guest<'_>, map: u32, at: u32, length: u32| answer(set_all(&mut guest, map, at, length)),
    )?;
    linker.func_wrap(
        "env",
        "proxy_get_header_map_value",
        |mut guest: Guest<'_>, map: u32, name: u32, name_length: u32, pointer_at: u32, length_at: u32| {
            answer(value(&mut guest, map, (name, name_length), (pointer_at, length_at)))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_add_header_map_value",
        |mut guest: Guest<'_>, map: u32, name: u32, name_length: u32, value: u32, value_length: u32| {
            answer(edit(&mut guest, map, Edit::Add, (name, name_length), (value, value_length)))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_replace_header_map_value",
        |mut guest: Guest<'_>, map: u32, name: u32, name_length: u32, value: u32, value_length: u32| {
            answer(edit(&mut guest, map, Edit::Replace, (name, name_length), (value, value_length)))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_remove_header_map_value",
        |mut guest: Guest<'_>, map: u32, name: u32, name_length: u32| {
            answer(remove(&mut guest, map, (name, name_length)))
        },
    )?;
    Ok(())
}

/// A pointer and a length, as the guest passes them.
type Slice = (u32, u32);

/// A header map as far as it is known where the guest asks.
enum Map<'a> {
    /// The request's head is at hand.
    Request,
    /// The response's head is at hand.
    Response,
    /// What was kept of a head.
    Kept(Pairs<'a>),
    /// What follows a body.
    Trailers(&'a Trailers),
    /// Nothing, in a stream: it has no such headers, yet or at all.
    Absent,
    /// Nothing, outside of streams and in connections that carry no HTTP.
    Nowhere,
}

fn map_of(state: &State, kind: MapKind) -> Map<'_> {
    match (kind, state.callback) {
        (MapKind::RequestHeaders, _) if state.is_at_hand(kind) => return Map::Request,
        (MapKind::ResponseHeaders, _) if state.is_at_hand(kind) => return Map::Response,
        (MapKind::Delivered(index), callback) if callback.is_delivery() => {
            return kept(state.outside.delivery.map(index));
        }
        _ => {}
    }
    let Some(stream) = state.stream().filter(|stream| !stream.is_connection()) else { return Map::Nowhere };
    match kind {
        MapKind::RequestHeaders => kept(&stream.request),
        MapKind::ResponseHeaders => kept(&stream.response),
        MapKind::Trailers(side) => Map::Trailers(&stream.trailers[number_of(side)]),
        MapKind::Delivered(_) => Map::Absent,
    }
}

fn kept(bytes: &[u8]) -> Map<'_> {
    match Pairs::parse(bytes) {
        Some(pairs) if !bytes.is_empty() => Map::Kept(pairs),
        _ => Map::Absent,
    }
}

/// The value of a header, wherever its map is; `None` where there is no map.
pub(super) fn find<'a>(state: &'a State, kind: MapKind, name: &[u8]) -> Option<Option<&'a [u8]>> {
    match map_of(state, kind) {
        Map::Request => Some(state.live.request.value(name)),
        Map::Response => Some(state.live.response.value(name)),
        Map::Kept(pairs) => {
            let name = if name.eq_ignore_ascii_case(b"host") { b":authority" } else { name };
            Some(pairs.find(name))
        }
        Map::Trailers(trailers) => Some(trailers.map.as_ref().and_then(|map| header_value(map, name))),
        Map::Absent => Some(None),
        Map::Nowhere => None,
    }
}

/// Calls `each` with every header of a map in order; false where there is no map.
pub(super) fn for_each(state: &State, kind: MapKind, mut each: impl FnMut(&[u8], &[u8])) -> bool {
    match map_of(state, kind) {
        Map::Request => state.live.request.pairs().for_each(|(name, value)| each(name, value)),
        Map::Response => state.live.response.pairs().for_each(|(name, value)| each(name, value)),
        Map::Kept(pairs) => pairs.iter().for_each(|(name, value)| each(name, value)),
        Map::Trailers(trailers) => {
            let pairs = trailers.map.iter().flat_map(header_pairs);
            pairs.for_each(|(name, value)| each(name, value));
        }
        Map::Absent => {}
        Map::Nowhere => return false,
    }
    true
}

fn size(guest: &mut Guest<'_>, map: u32, size_at: u32) -> Done {
    let kind = MapKind::from_abi(map)?;
    let (memory, state) = split(guest)?;
    let mut bytes = 0;
    if !for_each(state, kind, |name, value| bytes += name.len() + value.len()) {
        return Err(Status::BadArgument.into());
    }
    Ok(write_u32(memory, size_at, bytes as u32)?)
}

fn all(guest: &mut Guest<'_>, map: u32, pointer_at: u32, length_at: u32) -> Done {
    let kind = MapKind::from_abi(map)?;
    give(guest, pointer_at, length_at, |_, state, out| {
        match map_of(state, kind) {
            Map::Request => pairs::write(out, state.live.request.count(), state.live.request.pairs()),
            Map::Response => pairs::write(out, state.live.response.count(), state.live.response.pairs()),
            Map::Kept(kept) => pairs::write(out, kept.count(), kept.iter()),
            Map::Trailers(Trailers { map: Some(map), .. }) if !map.is_empty() => {
                pairs::write(out, map.len() as u32, header_pairs(map));
            }
            Map::Trailers(_) | Map::Absent | Map::Nowhere => {}
        }
        Ok(())
    })
}

fn value(guest: &mut Guest<'_>, map: u32, name: Slice, result: Slice) -> Done {
    let kind = MapKind::from_abi(map)?;
    give(guest, result.0, result.1, |memory, state, out| {
        let name = read(memory, name.0, name.1)?;
        let value = find(state, kind, name).ok_or(Status::BadArgument)?;
        match value {
            Some(value) => out.extend_from_slice(value),
            // ABI 0.1.0 knows no "not found".
            None if state.facts.abi == AbiVersion::V0_1_0 => {}
            None => return Err(Status::NotFound.into()),
        }
        Ok(())
    })
}

/// Whether the map asked for may be changed now.
fn changeable(state: &State, kind: MapKind) -> Result<(), Status> {
    match map_of(state, kind) {
        Map::Request | Map::Response => Ok(()),
        Map::Trailers(trailers) if trailers.is_open => Ok(()),
        Map::Trailers(_) | Map::Kept(_) | Map::Absent | Map::Nowhere => Err(Status::BadArgument),
    }
}

fn trailers_of(state: &mut State, side: Side) -> Option<&mut Option<HeaderMap>> {
    state.stream_mut().map(|stream| &mut stream.trailers[number_of(side)].map)
}

fn edit(guest: &mut Guest<'_>, map: u32, edit: Edit, name: Slice, value: Slice) -> Done {
    let kind = MapKind::from_abi(map)?;
    let (memory, state) = split(guest)?;
    let name = read(memory, name.0, name.1)?;
    let value = read(memory, value.0, value.1)?;
    charge(state, name.len() + value.len())?;
    changeable(state, kind)?;
    write_header(state, kind, name, value, edit)?;
    note(state, if edit == Edit::Add { "added " } else { "set " }, name);
    Ok(())
}

/// What is said of a plugin that may be misused.
const LINE_BREAK: &[u8] = b"a header with a line break was refused";

/// Writes a header. Line breaks are refused with a status, which ends plugins that forward what they should not;
/// anything else that HTTP forbids, or that there is no room for, is left out and logged.
fn write_header(
    state: &mut State,
    kind: MapKind,
    name: &[u8],
    value: &[u8],
    edit: Edit,
) -> Result<(), Refusal> {
    let written = match kind {
        MapKind::RequestHeaders => state.live.request.write(name, value, edit),
        MapKind::ResponseHeaders => state.live.response.write(name, value, edit),
        MapKind::Trailers(side) => {
            let map = trailers_of(state, side).ok_or(Status::BadArgument)?;
            refuse_injection(name, value)
                .and_then(|()| write_to(map.get_or_insert_default(), name, value, edit))
        }
        MapKind::Delivered(_) => return Err(Status::BadArgument.into()),
    };
    match written {
        Ok(()) => Ok(()),
        Err(EditError::Injection) => {
            super::log::write_line(state, tracing::Level::WARN, LINE_BREAK);
            Err(Status::BadArgument.into())
        }
        Err(EditError::Full) => {
            state.facts.counters.hit(Limit::Entries);
            super::log::write_line(
                state,
                tracing::Level::WARN,
                b"a header was left out: there is no room for it",
            );
            Ok(())
        }
        Err(EditError::Invalid) => {
            let name = String::from_utf8_lossy(&name[..name.len().min(64)]).into_owned();
            super::log::write_line(
                state,
                tracing::Level::WARN,
                format!("header `{name}` left out: its name or value is not valid in HTTP").as_bytes(),
            );
            Ok(())
        }
    }
}

fn remove(guest: &mut Guest<'_>, map: u32, name: Slice) -> Done {
    let kind = MapKind::from_abi(map)?;
    let (memory, state) = split(guest)?;
    let name = read(memory, name.0, name.1)?;
    changeable(state, kind)?;
    let present = find(state, kind, name).flatten().is_some();
    match kind {
        MapKind::RequestHeaders => state.live.request.remove(name),
        MapKind::ResponseHeaders => state.live.response.remove(name),
        MapKind::Trailers(side) => {
            if let Some(Some(map)) = trailers_of(state, side) {
                remove_header(map, name);
            }
        }
        MapKind::Delivered(_) => {}
    }
    if present {
        note(state, "removed ", name);
    }
    Ok(())
}

/// Replaces a whole map. A map that does not parse changes nothing: SDKs cannot survive a status here, and an empty
/// map, Envoy's answer, only breaks the request.
fn set_all(guest: &mut Guest<'_>, map: u32, at: u32, length: u32) -> Done {
    let kind = MapKind::from_abi(map)?;
    let (memory, state) = split(guest)?;
    let bytes = read(memory, at, length)?;
    charge(state, bytes.len())?;
    changeable(state, kind)?;
    let Some(pairs) = Pairs::parse(bytes) else {
        super::log::write_line(state, tracing::Level::WARN, b"a malformed header map was ignored");
        return Ok(());
    };
    if pairs.iter().any(|(name, value)| refuse_injection(name, value).is_err()) {
        super::log::write_line(state, tracing::Level::WARN, LINE_BREAK);
        return Err(Status::BadArgument.into());
    }
    match kind {
        MapKind::RequestHeaders => state.live.request.clear(),
        MapKind::ResponseHeaders => state.live.response.clear(),
        MapKind::Trailers(side) => {
            if let Some(map) = trailers_of(state, side) {
                *map = None;
            }
        }
        MapKind::Delivered(_) => {}
    }
    for (name, value) in pairs.iter() {
        write_header(state, kind, name, value, Edit::Add)?;
    }
    note(state, "replaced all ", b"headers");
    Ok(())
}

/// The most text kept about changes of headers in one phase.
const CHANGES_BYTES_MAX: usize = 256;

fn note(state: &mut State, verb: &str, name: &[u8]) {
    let changes = &mut state.live.changes;
    if changes.len() + verb.len() + name.len() > CHANGES_BYTES_MAX {
        return;
    }
    if !changes.is_empty() {
        changes.push_str(", ");
    }
    changes.push_str(verb);
    // Names are tokens, or were just found in the map: ASCII.
    changes.push_str(std::str::from_utf8(name).unwrap_or("?"));
}
