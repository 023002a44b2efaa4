//! What the ABI has and this host does not offer yet: foreign functions. Each answers with the status
//! for failure that SDKs hand to the plugin's code, and is logged once per plugin.

use super::Guest;
use super::memory::{read, split};
use crate::abi::{Done, Status, answer};
use crate::state::State;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
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
