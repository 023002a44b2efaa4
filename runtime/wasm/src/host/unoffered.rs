//! What the ABI has and this host does not offer yet: gRPC calls and foreign functions. Each answers with the status
//! for failure that SDKs hand to the plugin's code, and is logged once per plugin.

use super::Guest;
use super::memory::{check, read, split, write_u32};
use crate::abi::{Done, Status, answer};
use crate::state::State;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_grpc_call",
        |guest: Guest<'_>,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32| { refuse(&guest, "proxy_grpc_call", Status::InternalFailure) },
    )?;
    linker.func_wrap(
        "env",
        "proxy_grpc_stream",
        |guest: Guest<'_>, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32| {
            refuse(&guest, "proxy_grpc_stream", Status::InternalFailure)
        },
    )?;
    // No call was ever started, so no id is known.
    linker.func_wrap("env", "proxy_grpc_send", |guest: Guest<'_>, _: u32, _: u32, _: u32, _: u32| {
        refuse(&guest, "proxy_grpc_send", Status::NotFound)
    })?;
    linker.func_wrap("env", "proxy_grpc_cancel", |guest: Guest<'_>, _: u32| {
        refuse(&guest, "proxy_grpc_cancel", Status::NotFound)
    })?;
    linker.func_wrap("env", "proxy_grpc_close", |guest: Guest<'_>, _: u32| {
        refuse(&guest, "proxy_grpc_close", Status::NotFound)
    })?;
    linker.func_wrap(
        "env",
        "proxy_get_status",
        |mut guest: Guest<'_>, code_at: u32, pointer_at: u32, length_at: u32| {
            answer(no_status(&mut guest, [code_at, pointer_at, length_at]))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_call_foreign_function",
        |mut guest: Guest<'_>, name: u32, name_length: u32, _: u32, _: u32, _: u32, _: u32| {
            answer(foreign_function(&mut guest, name, name_length))
        },
    )?;
    // Emscripten calls it after its memory grew; WebAssembly itself has no use for it.
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_: Guest<'_>, _: u32| {})?;
    linker.func_wrap("env", "pthread_equal", |_: Guest<'_>, a: u32, b: u32| u32::from(a == b))?;
    Ok(())
}

fn refuse(guest: &Guest<'_>, name: &str, status: Status) -> wasmtime::Result<u32> {
    guest.data().in_vain(name);
    answer(Err(status.into()))
}

/// The status of the gRPC call that is being delivered: there is none, which Envoy answers with zeros.
fn no_status(guest: &mut Guest<'_>, results: [u32; 3]) -> Done {
    let (memory, _) = split(guest)?;
    for at in results {
        check(memory, at, 4)?;
    }
    for at in results {
        write_u32(memory, at, 0)?;
    }
    Ok(())
}

fn foreign_function(guest: &mut Guest<'_>, name: u32, name_length: u32) -> Done {
    let (memory, state) = split(guest)?;
    let name = read(memory, name, name_length)?;
    if name == b"clear_route_cache" {
        // Routes are looked up again whenever a plugin changed what they match on.
        return Ok(());
    }
    let name = &name[..name.len().min(64)];
    state.in_vain(&format!("foreign function {}", String::from_utf8_lossy(name).escape_default()));
    Err(Status::NotFound.into())
}
