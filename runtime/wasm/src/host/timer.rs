//! The root context's timer.

use super::Guest;
use crate::abi::answer;
use crate::state::State;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap("env", "proxy_set_tick_period_milliseconds", |mut guest: Guest<'_>, period: u32| {
        guest.data_mut().outside.set_tick(period);
        answer(Ok(()))
    })?;
    Ok(())
}
