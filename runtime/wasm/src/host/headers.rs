//! Header maps and buffers.
//!
//! A map can be changed while its head is at hand, and read for as long as the stream lives: Envoy forgets the request's
//! headers after their phase, which only ever crashed plugins.

use super::Guest;
use super::memory::{give, read, split, write_u32};
use crate::abi::{AbiVersion, Callback, Done, MapKind, Refusal, Status, answer};
use crate::heads::{Edit, EditError, refuse_injection};
use crate::pairs::{self, Pairs};
use crate::state::State;
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
    linker.func_wrap(
        "env",
        "proxy_get_buffer_bytes",
        |mut guest: Guest<'_>, buffer: u32, start: u32, max: u32, pointer_at: u32, length_at: u32| {
            answer(buffer_bytes(&mut guest, buffer, (start, max), (pointer_at, length_at)))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_get_buffer_status",
        |mut guest: Guest<'_>, buffer: u32, length_at: u32, flags_at: u32| {
            answer(buffer_status(&mut guest, buffer, length_at, flags_at))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_set_buffer_bytes",
        |guest: Guest<'_>, buffer: u32, _start: u32, _size: u32, _at: u32, _length: u32| {
            answer(set_buffer(&guest, buffer))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_get_configuration",
        |mut guest: Guest<'_>, pointer_at: u32, length_at: u32| {
            answer(configuration(&mut guest, pointer_at, length_at))
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
    /// Nothing, in a stream: it has no such headers, yet or at all.
    Absent,
    /// Nothing, outside of streams.
    Nowhere,
}

fn map_of(state: &State, kind: MapKind) -> Map<'_> {
    match (kind, state.callback) {
        (MapKind::RequestHeaders, Callback::RequestHeaders) if state.is_live() => return Map::Request,
        (MapKind::ResponseHeaders, Callback::ResponseHeaders) if state.is_live() => return Map::Response,
        (MapKind::RequestHeaders, _) if state.is_at_hand(kind) => return Map::Request,
        (MapKind::ResponseHeaders, _) if state.is_at_hand(kind) => return Map::Response,
        (MapKind::Delivered(index), callback) if callback.is_delivery() => {
            return kept(state.outside.delivery.map(index));
        }
        _ => {}
    }
    let Some(stream) = state.stream() else { return Map::Nowhere };
    match kind {
        MapKind::RequestHeaders => kept(&stream.request),
        MapKind::ResponseHeaders => kept(&stream.response),
        MapKind::Delivered(_) | MapKind::Other => Map::Absent,
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
            Map::Absent | Map::Nowhere => {}
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

/// The one map that may be changed now, if it is the one asked for.
fn changeable(state: &State, kind: MapKind) -> Result<(), Status> {
    match map_of(state, kind) {
        Map::Request | Map::Response => Ok(()),
        Map::Kept(_) | Map::Absent | Map::Nowhere => Err(Status::BadArgument),
    }
}

fn edit(guest: &mut Guest<'_>, map: u32, edit: Edit, name: Slice, value: Slice) -> Done {
    let kind = MapKind::from_abi(map)?;
    let (memory, state) = split(guest)?;
    let name = read(memory, name.0, name.1)?;
    let value = read(memory, value.0, value.1)?;
    changeable(state, kind)?;
    write_header(state, kind, name, value, edit)?;
    note(state, if edit == Edit::Add { "added " } else { "set " }, name);
    Ok(())
}

/// Writes a header. Line breaks are refused with a status, which ends plugins that forward what they should not;
/// anything else that HTTP forbids is left out and logged.
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
        MapKind::Delivered(_) | MapKind::Other => {
            return Err(Status::BadArgument.into());
        }
    };
    match written {
        Ok(()) => Ok(()),
        Err(EditError::Injection) => {
            tracing::warn!(plugin = %state.facts.name, "the plugin tried to write a line break into a header");
            Err(Status::BadArgument.into())
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
        MapKind::Delivered(_) | MapKind::Other => {}
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
    changeable(state, kind)?;
    let Some(pairs) = Pairs::parse(bytes) else {
        super::log::write_line(state, tracing::Level::WARN, b"a malformed header map was ignored");
        return Ok(());
    };
    if pairs.iter().any(|(name, value)| refuse_injection(name, value).is_err()) {
        tracing::warn!(plugin = %state.facts.name, "the plugin tried to write a line break into a header");
        return Err(Status::BadArgument.into());
    }
    match kind {
        MapKind::RequestHeaders => state.live.request.clear(),
        MapKind::ResponseHeaders => state.live.response.clear(),
        MapKind::Delivered(_) | MapKind::Other => {}
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

/// The buffers of the ABI that exist today, by number.
fn buffer(state: &State, buffer: u32) -> Result<&[u8], Status> {
    match buffer {
        // Bodies and stream data: there are none in the header phases.
        0..=3 | 8 => Ok(&[]),
        5 => Ok(&state.outside.delivery.message),
        // The body of the answer to a call, while it is delivered.
        4 => state.outside.delivery.body.as_deref().ok_or(Status::NotFound),
        // The configuration of the VM, which WasmPlugin has no field for.
        6 => Ok(&[]),
        7 if state.callback == Callback::Configure => Ok(state.facts.config.as_bytes()),
        7 => Err(Status::NotFound),
        _ => Err(Status::BadArgument),
    }
}

fn buffer_bytes(guest: &mut Guest<'_>, number: u32, (start, max): (u32, u32), result: Slice) -> Done {
    give(guest, result.0, result.1, |_, state, out| {
        let bytes = buffer(state, number)?;
        // Envoy refuses a range whose end does not fit 32 bits, but takes "everything".
        if start.checked_add(max).is_none() {
            return Err(Status::BadArgument.into());
        }
        let rest = bytes.get(start as usize..).unwrap_or_default();
        out.extend_from_slice(&rest[..rest.len().min(max as usize)]);
        Ok(())
    })
}

fn buffer_status(guest: &mut Guest<'_>, number: u32, length_at: u32, flags_at: u32) -> Done {
    let (memory, state) = split(guest)?;
    let length = buffer(state, number)?.len() as u32;
    write_u32(memory, length_at, length)?;
    Ok(write_u32(memory, flags_at, 0)?)
}

fn set_buffer(guest: &Guest<'_>, number: u32) -> Done {
    match number {
        0 | 1 => {
            guest.data().in_vain("proxy_set_buffer_bytes");
            Ok(())
        }
        _ => Err(Status::BadArgument.into()),
    }
}

/// ABI 0.1.0: the VM's or the plugin's configuration, whichever callback runs.
fn configuration(guest: &mut Guest<'_>, pointer_at: u32, length_at: u32) -> Done {
    give(guest, pointer_at, length_at, |_, state, out| {
        if state.callback == Callback::Configure {
            out.extend_from_slice(state.facts.config.as_bytes());
        }
        Ok(())
    })
}
