//! The guest's memory as host functions read and write it.

use super::Guest;
use crate::abi::{Done, Refusal, Status};
use crate::state::State;
use wasmtime::format_err;

/// The guest's memory and our state, both at once, for one call of the host.
pub(super) fn split<'a>(guest: &'a mut Guest<'_>) -> Result<(&'a mut [u8], &'a mut State), Refusal> {
    let memory = match guest.data().memory {
        Some(memory) => memory,
        // A start function runs before anybody could look the memory up.
        None => {
            let export = guest.get_export("memory").and_then(wasmtime::Extern::into_memory);
            let memory = export.ok_or_else(|| format_err!("the module exports no memory"))?;
            guest.data_mut().memory = Some(memory);
            memory
        }
    };
    let (memory, state) = memory.data_and_store_mut(guest);
    state.budget.take_call().map_err(wasmtime::Error::new)?;
    Ok((memory, state))
}

/// Takes bytes that are copied out of the guest's budget.
pub(super) fn charge(state: &mut State, bytes: usize) -> Result<(), Refusal> {
    Ok(state.budget.take_bytes(bytes).map_err(wasmtime::Error::new)?)
}

/// The bytes at an address.
pub(super) fn read(memory: &[u8], at: u32, length: u32) -> Result<&[u8], Status> {
    let at = at as usize;
    at.checked_add(length as usize).and_then(|end| memory.get(at..end)).ok_or(Status::InvalidMemoryAccess)
}

/// Checks that `length` bytes can be written at an address.
pub(super) fn check(memory: &[u8], at: u32, length: u32) -> Result<(), Status> {
    read(memory, at, length).map(|_| ())
}

/// Writes bytes at an address.
pub(super) fn write(memory: &mut [u8], at: u32, bytes: &[u8]) -> Result<(), Status> {
    let at = at as usize;
    let end = at.checked_add(bytes.len()).ok_or(Status::InvalidMemoryAccess)?;
    memory.get_mut(at..end).ok_or(Status::InvalidMemoryAccess)?.copy_from_slice(bytes);
    Ok(())
}

/// Writes a number at an address.
pub(super) fn write_u32(memory: &mut [u8], at: u32, number: u32) -> Result<(), Status> {
    write(memory, at, &number.to_le_bytes())
}

/// Reads a number at an address.
pub(super) fn read_u32(memory: &[u8], at: u32) -> Result<u32, Status> {
    let bytes = read(memory, at, 4)?;
    bytes.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)).ok_or(Status::InvalidMemoryAccess)
}

/// Answers with the bytes that `find` appends to an empty buffer: asks the guest's allocator for room, copies them
/// there, and writes their address and length at the two addresses. No bytes: both are 0 and the allocator is not asked,
/// since Go's fails on 0 bytes.
pub(super) fn give(
    guest: &mut Guest<'_>,
    pointer_at: u32,
    length_at: u32,
    find: impl FnOnce(&[u8], &State, &mut Vec<u8>) -> Done,
) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, pointer_at, 4)?;
    check(memory, length_at, 4)?;
    let mut bytes = std::mem::take(&mut state.scratch);
    bytes.clear();
    let done = find(memory, state, &mut bytes).and_then(|()| hand_over(guest, pointer_at, length_at, &bytes));
    guest.data_mut().scratch = bytes;
    done
}

/// Gives a few bytes that are at hand already; see [`give`].
pub(super) fn hand_over(guest: &mut Guest<'_>, pointer_at: u32, length_at: u32, bytes: &[u8]) -> Done {
    let length = u32::try_from(bytes.len()).map_err(|_| Status::InternalFailure)?;
    charge(guest.data_mut(), bytes.len())?;
    let address = if bytes.is_empty() { 0 } else { allocate(guest, length)? };
    let (memory, _) = split(guest)?;
    write(memory, address, bytes)?;
    write_u32(memory, pointer_at, address)?;
    write_u32(memory, length_at, length)?;
    Ok(())
}

/// Room in the guest's memory, from its own allocator.
fn allocate(guest: &mut Guest<'_>, length: u32) -> Result<u32, Refusal> {
    let Some(allocator) = guest.data_mut().allocate.take() else {
        return Err(format_err!(
            "the module asks for data before its allocator is there, or from inside of it"
        )
        .into());
    };
    let address = allocator.call(&mut *guest, length);
    guest.data_mut().allocate = Some(allocator);
    match address? {
        0 => Err(Status::InvalidMemoryAccess.into()),
        address => Ok(address),
    }
}
