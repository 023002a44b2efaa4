//! Shared data and queues.

use super::Guest;
use super::memory::{charge, check, give, hand_over, read, split, write_u32};
use crate::abi::{Done, Refusal, Status, answer};
use crate::shared::SharedError;
use crate::state::State;
use wasmtime::{Linker, format_err};

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_get_shared_data",
        |mut guest: Guest<'_>, key: u32, key_length: u32, pointer_at: u32, length_at: u32, cas_at: u32| {
            answer(get(&mut guest, (key, key_length), (pointer_at, length_at), cas_at))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_set_shared_data",
        |mut guest: Guest<'_>, key: u32, key_length: u32, value: u32, value_length: u32, cas: u32| {
            answer(set(&mut guest, (key, key_length), (value, value_length), cas))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_register_shared_queue",
        |mut guest: Guest<'_>, name: u32, name_length: u32, id_at: u32| {
            answer(register(&mut guest, (name, name_length), id_at))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_resolve_shared_queue",
        |mut guest: Guest<'_>, vm: u32, vm_length: u32, name: u32, name_length: u32, id_at: u32| {
            answer(resolve(&mut guest, (vm, vm_length), (name, name_length), id_at))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_enqueue_shared_queue",
        |mut guest: Guest<'_>, id: u32, at: u32, length: u32| answer(enqueue(&mut guest, id, at, length)),
    )?;
    linker.func_wrap(
        "env",
        "proxy_dequeue_shared_queue",
        |mut guest: Guest<'_>, id: u32, pointer_at: u32, length_at: u32| {
            answer(dequeue(&mut guest, id, pointer_at, length_at))
        },
    )?;
    Ok(())
}

/// A pointer and a length, as the guest passes them.
type Slice = (u32, u32);

fn get(guest: &mut Guest<'_>, key: Slice, result: Slice, cas_at: u32) -> Done {
    let (memory, _) = split(guest)?;
    check(memory, cas_at, 4)?;
    let mut cas = 0;
    give(guest, result.0, result.1, |memory, state, out| {
        let key = read(memory, key.0, key.1)?;
        cas = state.facts.environment.shared.read(&state.facts.data_scope, key, out)?;
        Ok(())
    })?;
    let (memory, _) = split(guest)?;
    Ok(write_u32(memory, cas_at, cas)?)
}

fn set(guest: &mut Guest<'_>, key: Slice, value: Slice, cas: u32) -> Done {
    let (memory, state) = split(guest)?;
    let key = read(memory, key.0, key.1)?;
    let value = read(memory, value.0, value.1)?;
    charge(state, key.len() + value.len())?;
    state.facts.environment.shared.write(&state.facts.data_scope, key, value, cas).map_err(refusal)
}

fn register(guest: &mut Guest<'_>, name: Slice, id_at: u32) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, id_at, 4)?;
    let name = read(memory, name.0, name.1)?;
    let id = state.facts.environment.shared.register_queue(&state.facts.data_scope, name).map_err(refusal)?;
    state.outside.listen(id);
    Ok(write_u32(memory, id_at, id)?)
}

fn resolve(guest: &mut Guest<'_>, vm: Slice, name: Slice, id_at: u32) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, id_at, 4)?;
    let (vm, name) = (read(memory, vm.0, vm.1)?, read(memory, name.0, name.1)?);
    // Our plugins have the VM id "", as istiod gives them none.
    if !vm.is_empty() {
        return Err(Status::NotFound.into());
    }
    let id = state.facts.environment.shared.resolve_queue(&state.facts.data_scope, name)?;
    Ok(write_u32(memory, id_at, id)?)
}

fn enqueue(guest: &mut Guest<'_>, id: u32, at: u32, length: u32) -> Done {
    let (memory, state) = split(guest)?;
    let item = read(memory, at, length)?;
    charge(state, item.len())?;
    Ok(state.facts.environment.shared.enqueue(id, item)?)
}

fn dequeue(guest: &mut Guest<'_>, id: u32, pointer_at: u32, length_at: u32) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, pointer_at, 4)?;
    check(memory, length_at, 4)?;
    let item = state.facts.environment.shared.dequeue(id)?;
    hand_over(guest, pointer_at, length_at, &item)
}

fn refusal(error: SharedError) -> Refusal {
    match error {
        SharedError::Status(status) => status.into(),
        SharedError::Full(what) => format_err!("{what}").into(),
    }
}
