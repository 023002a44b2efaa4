//! Logging and the time.

use super::Guest;
use super::memory::{check, read, split, write, write_u32};
use crate::abi::{Done, Status, answer};
use crate::log::{level_of, threshold};
use crate::state::State;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};
use tracing::Level;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap("env", "proxy_log", |mut guest: Guest<'_>, level: u32, at: u32, length: u32| {
        answer(log(&mut guest, level, at, length))
    })?;
    linker.func_wrap("env", "proxy_get_log_level", |mut guest: Guest<'_>, level_at: u32| {
        answer(log_level(&mut guest, level_at))
    })?;
    linker.func_wrap("env", "proxy_get_current_time_nanoseconds", |mut guest: Guest<'_>, time_at: u32| {
        answer(current_time(&mut guest, time_at))
    })?;
    Ok(())
}

fn log(guest: &mut Guest<'_>, level: u32, at: u32, length: u32) -> Done {
    let level = level_of(level).ok_or(Status::BadArgument)?;
    let (memory, state) = split(guest)?;
    let line = read(memory, at, length)?;
    write_line(state, level, line);
    Ok(())
}

/// Logs a line of the guest, if anybody listens.
pub(super) fn write_line(state: &mut State, level: Level, line: &[u8]) {
    let facts = &state.facts;
    if state.log.wants(level) && !state.log.write(&facts.log_rate, &facts.name, level, line) {
        facts.counters.log_lines_dropped.fetch_add(1, Ordering::Relaxed);
    }
}

fn log_level(guest: &mut Guest<'_>, level_at: u32) -> Done {
    let (memory, _) = split(guest)?;
    check(memory, level_at, 4)?;
    Ok(write_u32(memory, level_at, threshold())?)
}

fn current_time(guest: &mut Guest<'_>, time_at: u32) -> Done {
    let (memory, state) = split(guest)?;
    state.is_unique = true;
    Ok(write(memory, time_at, &nanoseconds_since_epoch(SystemTime::now()).to_le_bytes())?)
}

/// Nanoseconds since 1970; 0 before.
pub(super) fn nanoseconds_since_epoch(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
