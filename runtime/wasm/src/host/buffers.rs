//! Buffers: bodies, what a callback brings, and configuration.
//!
//! A body, and what was sent on a connection, can be read and changed while the guest's callback for it runs, and for as
//! long as the guest holds it; outside of that it is empty, and cannot be changed.

use super::Guest;
use super::memory::{charge, give, read, split, write_u32};
use crate::abi::{Callback, Done, Status, answer};
use crate::bodies::Bodies;
use crate::state::State;
use cairn_filter::Side;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_get_buffer_bytes",
        |mut guest: Guest<'_>, buffer: u32, start: u32, max: u32, pointer_at: u32, length_at: u32| {
            answer(bytes(&mut guest, buffer, (start, max), (pointer_at, length_at)))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_get_buffer_status",
        |mut guest: Guest<'_>, buffer: u32, length_at: u32, flags_at: u32| {
            answer(status(&mut guest, buffer, length_at, flags_at))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_set_buffer_bytes",
        |mut guest: Guest<'_>, buffer: u32, start: u32, size: u32, at: u32, length: u32| {
            answer(set(&mut guest, buffer, (start, size), (at, length)))
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

/// Whose body a buffer is, or what was sent by whom on a connection, by its number.
fn side(number: u32) -> Option<Side> {
    match number {
        0 | 2 => Some(Side::Request),
        1 | 3 => Some(Side::Response),
        _ => None,
    }
}

/// What the stream at hand shows in the buffer of this number: bodies, or the bytes of a connection.
fn shown(state: &State, number: u32) -> Option<&Bodies> {
    let stream = state.stream()?;
    if number < 2 { stream.bodies.as_deref() } else { stream.data.as_deref() }
}

/// Calls `look` with the bytes of a buffer.
fn with_buffer<T>(state: &State, number: u32, look: impl FnOnce(&[u8]) -> T) -> Result<T, Status> {
    if let Some(side) = side(number) {
        let body = shown(state, number).map(|bodies| bodies.side(side)).filter(|body| body.is_at_hand);
        return Ok(look(body.as_ref().map_or(&[][..], |body| &body.bytes)));
    }
    let bytes = match number {
        // Arguments of foreign functions: there are none.
        8 => &[][..],
        5 => &state.outside.delivery.message,
        // The body of the answer to a call, while it is delivered.
        4 => state.outside.delivery.body.as_deref().ok_or(Status::NotFound)?,
        // The configuration of the VM, which WasmPlugin has no field for.
        6 => &[],
        7 if state.callback == Callback::Configure => state.facts.config.as_bytes(),
        7 => return Err(Status::NotFound),
        _ => return Err(Status::BadArgument),
    };
    Ok(look(bytes))
}

fn bytes(guest: &mut Guest<'_>, number: u32, (start, max): (u32, u32), result: (u32, u32)) -> Done {
    give(guest, result.0, result.1, |_, state, out| {
        with_buffer(state, number, |bytes| {
            let rest = bytes.get(start as usize..).unwrap_or_default();
            out.extend_from_slice(&rest[..rest.len().min(max as usize)]);
        })?;
        Ok(())
    })
}

fn status(guest: &mut Guest<'_>, number: u32, length_at: u32, flags_at: u32) -> Done {
    let (memory, state) = split(guest)?;
    let length = with_buffer(state, number, <[u8]>::len)? as u32;
    write_u32(memory, length_at, length)?;
    Ok(write_u32(memory, flags_at, 0)?)
}

fn set(guest: &mut Guest<'_>, number: u32, (start, size): (u32, u32), (at, length): (u32, u32)) -> Done {
    let (memory, state) = split(guest)?;
    let with = read(memory, at, length)?;
    charge(state, with.len())?;
    let Some(side) = side(number) else {
        // What is not there is not found, and what is there is not the guest's to change.
        with_buffer(state, number, |_| ())?;
        return Err(Status::BadArgument.into());
    };
    let body = shown(state, number).map(|bodies| bodies.side(side)).filter(|body| body.is_at_hand);
    Ok(body.ok_or(Status::BadArgument)?.set(start as usize, size as usize, with)?)
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
