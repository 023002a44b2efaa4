//! Modules become machine code: in a process of its own, or on a thread of this one.
//!
//! A compiler takes a second per megabyte, hundreds of megabytes for a large module, and reads what a stranger wrote. In a
//! process of its own it may be as fast as it can on every processor, gives way to all that serve traffic, has bounds on
//! memory and time that the system keeps, and takes all that it needed with it.

use crate::engine::compile_error;
use crate::error::PluginError;
use crate::load::{self, Compiled};
use rustix::process::{
    Resource, Rlimit, Signal, set_parent_process_death_signal, setpriority_process, setrlimit,
};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;
use wasmtime::{Config, OptLevel, WasmBacktraceDetails};

/// Where modules are compiled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Compiler {
    /// On a thread of this process.
    #[default]
    Here,
    /// By this program, which calls [`compile_if_asked`] first of all. If it cannot be started, here.
    Apart(PathBuf),
}

impl Compiler {
    /// By the program that runs, if the system tells where that is. It must call [`compile_if_asked`] first of all.
    pub fn this_program() -> Self {
        // The very file that runs, even if another has taken its name since.
        let program = PathBuf::from("/proc/self/exe");
        if program.exists() { Self::Apart(program) } else { Self::Here }
    }

    /// Compiles a module for engines of this kind.
    pub(crate) fn compile(&self, kind: EngineKind, bytes: &[u8]) -> Result<Compiled, PluginError> {
        match self {
            Self::Here => on_a_thread(kind, bytes),
            Self::Apart(program) => match ask(program, kind, bytes) {
                Ok(answer) => answer,
                Err(error) => {
                    tracing::warn!(program = %program.display(), %error, "no compiler's process; compiled in this one");
                    on_a_thread(kind, bytes)
                }
            },
        }
    }
}

/// Which engines run the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EngineKind {
    /// Instances that live as long as their plugin.
    Lasting,
    /// Instances of single exchanges, out of a pool.
    Pooled,
}

/// The most stack that a guest may use. Workers need that much and what the proxy itself uses.
const STACK_BYTES_MAX: usize = 1 << 20;

/// Snapshots up to this size are mapped copy-on-write however many zeros are in them.
const IMAGE_BYTES_MAX: u64 = 64 << 20;

impl EngineKind {
    const ALL: [Self; 2] = [Self::Lasting, Self::Pooled];

    /// The configuration that compilers and engines have in common.
    pub(crate) fn config(self) -> Config {
        let mut config = Config::new();
        config
            .cranelift_opt_level(OptLevel::Speed)
            .epoch_interruption(true)
            .max_wasm_stack(STACK_BYTES_MAX)
            .wasm_backtrace_details(WasmBacktraceDetails::Disable)
            .wasm_memory64(false)
            .wasm_multi_memory(false)
            .native_unwind_info(false)
            .parallel_compilation(false)
            .memory_init_cow(true);
        if self == Self::Pooled {
            config.memory_guaranteed_dense_image_size(IMAGE_BYTES_MAX);
        }
        config
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Lasting => "lasting",
            Self::Pooled => "pooled",
        }
    }
}

/// The stack of the thread that compiles: Cranelift recurses on deeply nested code.
const STACK_BYTES: usize = 8 << 20;

/// How much the compiler gives way to the workers.
const NICENESS: i32 = 10;

/// On a thread of which nothing stays.
fn on_a_thread(kind: EngineKind, bytes: &[u8]) -> Result<Compiled, PluginError> {
    let compile = || {
        // Of this thread alone, on Linux. Where it is not allowed, compiling is as important as all else.
        let _polite = setpriority_process(None, NICENESS);
        load::compile(&kind.config(), bytes).map_err(compile_error)
    };
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("wasm-compile".into()).stack_size(STACK_BYTES);
        let thread = builder.spawn_scoped(scope, compile).map_err(PluginError::Thread)?;
        thread.join().unwrap_or_else(|_| Err(PluginError::Compile("the compiler panicked".into())))
    })
}

/// The first argument of a program that is to compile a module; the second is the kind of engine.
const ASKED: &str = "compile-module";

/// What a compiler's process says first, so that no other program is taken for one.
const GREETING: &[u8] = b"cairn machine code\n";

/// The most memory that a compiler's process may write to, unless half of what its container may have is less.
const MEMORY_BYTES_MAX: u64 = 4 << 30;
/// The most threads that compile.
const THREADS_MAX: usize = 8;
/// The most processor time of a compiler's process, over all its threads (a WAF of 16 MiB takes half a minute), and the most
/// time by the clock.
const SECONDS_MAX: u64 = 600;
const WALL_MAX: Duration = Duration::from_secs(1800);
/// The most machine code that is taken from it.
const CODE_BYTES_MAX: u64 = 1 << 30;
/// The most of what it says about a module that cannot be compiled: less than any pipe holds.
const REASON_BYTES_MAX: usize = 2048;

/// Has a module compiled by another process; the outer error says that there is none.
fn ask(program: &Path, kind: EngineKind, bytes: &[u8]) -> io::Result<Result<Compiled, PluginError>> {
    let threads = thread::available_parallelism().map_or(1, |count| count.get().min(THREADS_MAX));
    let mut command = Command::new(program);
    command.arg(ASKED).arg(kind.as_str()).env_clear();
    command.env("RAYON_NUM_THREADS", threads.to_string()).env("RUST_MIN_STACK", STACK_BYTES.to_string());
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut greeting, mut code, mut said) = (Vec::new(), Vec::new(), Vec::new());
    let (stdin, stdout, stderr) = (process.stdin.take(), process.stdout.take(), process.stderr.take());
    let read = thread::scope(|scope| {
        // Whoever ends badly may have much to say, and waits until it is read.
        let listener = stderr.map(|mut stderr| {
            scope.spawn(move || {
                let mut said = Vec::new();
                let heard = stderr.by_ref().take(REASON_BYTES_MAX as u64).read_to_end(&mut said);
                heard.and_then(|_| io::copy(&mut stderr, &mut io::sink())).map(|_| said)
            })
        });
        let read = || {
            let Some(mut stdout) = stdout else { return Ok(0) };
            stdout.by_ref().take(GREETING.len() as u64).read_to_end(&mut greeting)?;
            if greeting == GREETING {
                // One that has ended already says why.
                let _written = stdin.map(|mut stdin| stdin.write_all(bytes));
                stdout.take(CODE_BYTES_MAX + 1).read_to_end(&mut code)?;
            }
            io::Result::Ok(code.len())
        };
        let read = read();
        if let Some(Ok(Ok(heard))) = listener.map(thread::ScopedJoinHandle::join) {
            said = heard;
        }
        read
    });
    let status = process.wait()?;
    if greeting != GREETING {
        return Err(io::Error::other(format!("it is no compiler of modules ({status}){}", last_line(&said))));
    }
    read?;
    Ok(match status.code() {
        _ if code.len() as u64 > CODE_BYTES_MAX => {
            let reason = format!("its machine code has more than {CODE_BYTES_MAX} bytes");
            Err(PluginError::Compile(reason.into()))
        }
        Some(0) => Ok(Compiled::by_another_process(code)),
        Some(REFUSED) => {
            Err(PluginError::Compile(String::from_utf8_lossy(&said).trim_end().to_owned().into()))
        }
        _ => Err(PluginError::CompilerEnded { status: status.to_string(), said: last_line(&said) }),
    })
}

fn last_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    text.lines().last().map_or_else(String::new, |line| format!(": {line}"))
}

/// The exit code of a process that could not compile the module, and has said why.
const REFUSED: i32 = 3;

/// Compiles the module on standard input and writes its machine code to standard output, if this program was started for
/// that ([`Compiler::Apart`]): call it first of all in `main`, and end with the code that it returns.
pub fn compile_if_asked() -> Option<ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).take(3).collect();
    let [asked, kind] = arguments.as_slice() else { return None };
    let kind = EngineKind::ALL.into_iter().find(|known| kind == known.as_str()).filter(|_| asked == ASKED)?;
    match compile_for_parent(kind) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            let error: &dyn std::error::Error = &*error;
            let text = std::iter::successors(Some(error), |error| error.source());
            let text: Vec<String> = text.map(ToString::to_string).collect();
            let text = text.join(": ");
            // Nobody else is there to be told.
            let _told =
                io::stderr().write_all(text.as_bytes().get(..REASON_BYTES_MAX).unwrap_or(text.as_bytes()));
            Some(ExitCode::from(REFUSED as u8))
        }
    }
}

fn compile_for_parent(kind: EngineKind) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    bind_to_parent();
    let mut out = io::stdout();
    out.write_all(GREETING)?;
    out.flush()?;
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes)?;
    let mut config = kind.config();
    config.parallel_compilation(true);
    let compiled = load::compile(&config, &bytes)?;
    out.write_all(compiled.code())?;
    out.flush()?;
    Ok(())
}

/// Ends with its parent, gives way to it, and is bounded. Where one of these is not allowed, the others are kept.
fn bind_to_parent() {
    let _ends = set_parent_process_death_signal(Some(Signal::KILL));
    let _polite = setpriority_process(None, NICENESS);
    // If memory is short, it is this process that ends.
    let _first = std::fs::write("/proc/self/oom_score_adj", "1000");
    for (resource, limit) in
        [(Resource::Data, memory_max()), (Resource::Cpu, SECONDS_MAX), (Resource::Core, 0)]
    {
        let _bounded = setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) });
    }
    let watch = || {
        thread::sleep(WALL_MAX);
        std::process::abort();
    };
    let _watched = thread::Builder::new().stack_size(64 << 10).spawn(watch);
}

/// Half of what the container may have, where there is one.
fn memory_max() -> u64 {
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|text| text.trim().parse::<u64>().ok());
    limit.map_or(MEMORY_BYTES_MAX, |limit| (limit / 2).min(MEMORY_BYTES_MAX))
}
