//! The part of WASI preview 1 that plugins import, under both of its module names. There are no files, no sockets and no
//! arguments; standard output and error are the log.

use super::Guest;
use super::memory::{check, read, read_u32, split, write, write_u32};
use crate::abi::{Refusal, Status};
use crate::state::State;
use std::sync::LazyLock;
use std::time::{Instant, SystemTime};
use tracing::Level;
use wasmtime::{IntoFunc, Linker};

/// Ends the guest with an exit code (`proc_exit`).
#[derive(Debug, thiserror::Error)]
#[error("the plugin exited with code {0}")]
pub(crate) struct Exit(pub(crate) u32);

/// WASI's error numbers.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Errno {
    Success = 0,
    BadFile = 8,
    Fault = 21,
    Invalid = 28,
    NoEntry = 44,
    NotSupported = 58,
}

/// What became of a call: an error number, or a trap.
type Outcome = Result<Errno, Refusal>;

fn errno(outcome: Outcome) -> wasmtime::Result<u32> {
    match outcome {
        Ok(errno) => Ok(errno as u32),
        // The memory helpers refuse only addresses.
        Err(Refusal::Status(_)) => Ok(Errno::Fault as u32),
        Err(Refusal::Trap(error)) => Err(error),
    }
}

const MODULES: [&str; 2] = ["wasi_snapshot_preview1", "wasi_unstable"];
/// The most random bytes per call, as in proxy-wasm-cpp-host.
const RANDOM_BYTES_MAX: u32 = 64 << 10;
/// The most buffers of one `fd_write`.
const BUFFERS_MAX: u32 = 1024;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    define_process(linker)?;
    define_files(linker)?;
    define_paths(linker)
}

fn both<Params, Results>(
    linker: &mut Linker<State>,
    name: &str,
    function: impl IntoFunc<State, Params, Results> + Copy,
) -> wasmtime::Result<()> {
    for module in MODULES {
        linker.func_wrap(module, name, function)?;
    }
    Ok(())
}

fn define_process(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    both(linker, "proc_exit", |code: u32| -> wasmtime::Result<()> { Err(wasmtime::Error::new(Exit(code))) })?;
    both(linker, "environ_sizes_get", |mut guest: Guest<'_>, count_at: u32, bytes_at: u32| {
        errno(environ_sizes(&mut guest, count_at, bytes_at))
    })?;
    both(linker, "environ_get", |mut guest: Guest<'_>, pointers: u32, texts: u32| {
        errno(environ(&mut guest, pointers, texts))
    })?;
    both(linker, "args_sizes_get", |mut guest: Guest<'_>, count_at: u32, bytes_at: u32| {
        errno(no_arguments(&mut guest, count_at, bytes_at))
    })?;
    both(linker, "args_get", |_: u32, _: u32| Errno::Success as u32)?;
    both(linker, "clock_time_get", |mut guest: Guest<'_>, clock: u32, _precision: u64, time_at: u32| {
        guest.data_mut().is_unique = true;
        errno(clock_time(&mut guest, clock, time_at))
    })?;
    both(linker, "clock_res_get", |mut guest: Guest<'_>, clock: u32, resolution_at: u32| {
        errno(clock_resolution(&mut guest, clock, resolution_at))
    })?;
    both(linker, "random_get", |mut guest: Guest<'_>, at: u32, length: u32| {
        guest.data_mut().is_unique = true;
        errno(random(&mut guest, at, length))
    })?;
    both(linker, "sched_yield", || Errno::Success as u32)?;
    // Nothing ever happens to wait for. Go spins on it while it sleeps, until the deadline ends that.
    both(linker, "poll_oneoff", |mut guest: Guest<'_>, _: u32, _: u32, _: u32, count_at: u32| {
        guest.data().in_vain("poll_oneoff (sleeping in a callback)");
        errno(zero(&mut guest, count_at))
    })?;
    Ok(())
}

fn define_files(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    const BAD_FILE: u32 = Errno::BadFile as u32;
    both(linker, "fd_write", |mut guest: Guest<'_>, fd: u32, buffers: u32, count: u32, written_at: u32| {
        errno(fd_write(&mut guest, fd, (buffers, count), written_at))
    })?;
    both(linker, "fd_fdstat_get", |mut guest: Guest<'_>, fd: u32, stat_at: u32| {
        errno(fd_fdstat(&mut guest, fd, stat_at))
    })?;
    both(linker, "fd_fdstat_set_flags", |_: u32, _: u32| Errno::Success as u32)?;
    both(linker, "fd_close", |fd: u32| standard_or_bad(fd))?;
    both(linker, "fd_seek", |fd: u32, _: i64, _: u32, _: u32| standard_or_bad(fd))?;
    both(linker, "fd_sync", |fd: u32| standard_or_bad(fd))?;
    both(linker, "fd_datasync", |fd: u32| standard_or_bad(fd))?;
    both(linker, "fd_tell", |_: u32, _: u32| BAD_FILE)?;
    both(linker, "fd_advise", |_: u32, _: i64, _: i64, _: u32| BAD_FILE)?;
    both(linker, "fd_allocate", |_: u32, _: i64, _: i64| BAD_FILE)?;
    both(linker, "fd_fdstat_set_rights", |_: u32, _: i64, _: i64| BAD_FILE)?;
    both(linker, "fd_filestat_get", |_: u32, _: u32| BAD_FILE)?;
    both(linker, "fd_filestat_set_size", |_: u32, _: i64| BAD_FILE)?;
    both(linker, "fd_filestat_set_times", |_: u32, _: i64, _: i64, _: u32| BAD_FILE)?;
    both(linker, "fd_read", |_: u32, _: u32, _: u32, _: u32| BAD_FILE)?;
    both(linker, "fd_pread", |_: u32, _: u32, _: u32, _: i64, _: u32| BAD_FILE)?;
    both(linker, "fd_pwrite", |_: u32, _: u32, _: u32, _: i64, _: u32| BAD_FILE)?;
    both(linker, "fd_readdir", |_: u32, _: u32, _: u32, _: i64, _: u32| BAD_FILE)?;
    both(linker, "fd_renumber", |_: u32, _: u32| BAD_FILE)?;
    // Answering "bad file" ends the search for preopened directories.
    both(linker, "fd_prestat_get", |_: u32, _: u32| BAD_FILE)?;
    both(linker, "fd_prestat_dir_name", |_: u32, _: u32, _: u32| BAD_FILE)?;
    Ok(())
}

fn define_paths(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    const NO_ENTRY: u32 = Errno::NoEntry as u32;
    const NOT_SUPPORTED: u32 = Errno::NotSupported as u32;
    both(linker, "path_open", |_: u32, _: u32, _: u32, _: u32, _: u32, _: i64, _: i64, _: u32, _: u32| {
        NO_ENTRY
    })?;
    both(linker, "path_filestat_get", |_: u32, _: u32, _: u32, _: u32, _: u32| NO_ENTRY)?;
    both(linker, "path_filestat_set_times", |_: u32, _: u32, _: u32, _: u32, _: i64, _: i64, _: u32| {
        NO_ENTRY
    })?;
    both(linker, "path_create_directory", |_: u32, _: u32, _: u32| NO_ENTRY)?;
    both(linker, "path_link", |_: u32, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32| NO_ENTRY)?;
    both(linker, "path_readlink", |_: u32, _: u32, _: u32, _: u32, _: u32, _: u32| NO_ENTRY)?;
    both(linker, "path_remove_directory", |_: u32, _: u32, _: u32| NO_ENTRY)?;
    both(linker, "path_rename", |_: u32, _: u32, _: u32, _: u32, _: u32, _: u32| NO_ENTRY)?;
    both(linker, "path_symlink", |_: u32, _: u32, _: u32, _: u32, _: u32| NO_ENTRY)?;
    both(linker, "path_unlink_file", |_: u32, _: u32, _: u32| NO_ENTRY)?;
    both(linker, "sock_accept", |_: u32, _: u32, _: u32| NOT_SUPPORTED)?;
    both(linker, "sock_recv", |_: u32, _: u32, _: u32, _: u32, _: u32, _: u32| NOT_SUPPORTED)?;
    both(linker, "sock_send", |_: u32, _: u32, _: u32, _: u32, _: u32| NOT_SUPPORTED)?;
    both(linker, "sock_shutdown", |_: u32, _: u32| NOT_SUPPORTED)?;
    both(linker, "proc_raise", |_: u32| NOT_SUPPORTED)?;
    Ok(())
}

fn standard_or_bad(fd: u32) -> u32 {
    if fd <= 2 { Errno::Success as u32 } else { Errno::BadFile as u32 }
}

fn zero(guest: &mut Guest<'_>, at: u32) -> Outcome {
    let (memory, _) = split(guest)?;
    write_u32(memory, at, 0)?;
    Ok(Errno::Success)
}

fn no_arguments(guest: &mut Guest<'_>, count_at: u32, bytes_at: u32) -> Outcome {
    zero(guest, count_at)?;
    zero(guest, bytes_at)
}

fn environ_sizes(guest: &mut Guest<'_>, count_at: u32, bytes_at: u32) -> Outcome {
    let (memory, state) = split(guest)?;
    let env = &state.facts.env;
    // Each is `name=value` and a NUL.
    let bytes: usize = env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    write_u32(memory, count_at, env.len() as u32)?;
    write_u32(memory, bytes_at, bytes as u32)?;
    Ok(Errno::Success)
}

fn environ(guest: &mut Guest<'_>, mut pointers: u32, mut texts: u32) -> Outcome {
    let (memory, state) = split(guest)?;
    let next = |at: u32, length: usize| at.checked_add(length as u32).ok_or(Status::InvalidMemoryAccess);
    for (name, value) in &state.facts.env {
        write_u32(memory, pointers, texts)?;
        pointers = next(pointers, 4)?;
        for part in [name.as_bytes(), b"=", value.as_bytes(), b"\0"] {
            write(memory, texts, part)?;
            texts = next(texts, part.len())?;
        }
    }
    Ok(Errno::Success)
}

fn clock_time(guest: &mut Guest<'_>, clock: u32, time_at: u32) -> Outcome {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let time = match clock {
        0 => super::log::nanoseconds_since_epoch(SystemTime::now()),
        1 => u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX),
        _ => return Ok(Errno::NotSupported),
    };
    let (memory, _) = split(guest)?;
    write(memory, time_at, &time.to_le_bytes())?;
    Ok(Errno::Success)
}

fn clock_resolution(guest: &mut Guest<'_>, clock: u32, resolution_at: u32) -> Outcome {
    if clock > 1 {
        return Ok(Errno::NotSupported);
    }
    let (memory, _) = split(guest)?;
    write(memory, resolution_at, &1u64.to_le_bytes())?;
    Ok(Errno::Success)
}

fn random(guest: &mut Guest<'_>, at: u32, length: u32) -> Outcome {
    if length > RANDOM_BYTES_MAX {
        return Ok(Errno::Invalid);
    }
    let (memory, _) = split(guest)?;
    check(memory, at, length)?;
    let room =
        memory.get_mut(at as usize..at as usize + length as usize).ok_or(Status::InvalidMemoryAccess)?;
    getrandom::fill(room).map_err(wasmtime::Error::new)?;
    Ok(Errno::Success)
}

/// Standard output logs at level info, standard error at error, each call a line.
fn fd_write(guest: &mut Guest<'_>, fd: u32, (buffers, count): (u32, u32), written_at: u32) -> Outcome {
    let level = match fd {
        1 => Level::INFO,
        2 => Level::ERROR,
        _ => return Ok(Errno::BadFile),
    };
    let (memory, state) = split(guest)?;
    check(memory, written_at, 4)?;
    check(memory, buffers, count.checked_mul(8).ok_or(Status::InvalidMemoryAccess)?)?;
    if count > BUFFERS_MAX {
        return Ok(Errno::Invalid);
    }
    let mut written = 0u32;
    let mut line = std::mem::take(&mut state.scratch);
    line.clear();
    for index in 0..count {
        let entry = buffers.checked_add(index * 8).ok_or(Status::InvalidMemoryAccess)?;
        let (at, length) = (read_u32(memory, entry)?, read_u32(memory, entry.saturating_add(4))?);
        let bytes = read(memory, at, length)?;
        written = written.saturating_add(length);
        // The log shortens lines to less than this.
        let room = (16usize << 10).saturating_sub(line.len());
        line.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
    if !line.is_empty() {
        super::log::write_line(state, level, &line);
    }
    state.scratch = line;
    write_u32(memory, written_at, written)?;
    Ok(Errno::Success)
}

/// Standard streams can be written to and are nothing else: 24 bytes, of which the rights hold `FD_WRITE`.
fn fd_fdstat(guest: &mut Guest<'_>, fd: u32, stat_at: u32) -> Outcome {
    if fd > 2 {
        return Ok(Errno::BadFile);
    }
    let mut stat = [0; 24];
    stat[8] = 64;
    let (memory, _) = split(guest)?;
    write(memory, stat_at, &stat)?;
    Ok(Errno::Success)
}
