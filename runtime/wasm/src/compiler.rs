//! Modules become machine code: in a process of its own, or on a thread of this one.
//!
//! A compiler takes a second per megabyte, hundreds of megabytes for a large module, and reads what a stranger wrote. In a
//! process of its own it may be as fast as it can on every processor, gives way to all that serve traffic, has bounds on
//! memory and time that the system keeps, and takes all that it needed with it.

use crate::engine::compile_error;
use crate::error::PluginError;
use crate::load::{self, Compiled};
use rustix::process::{Resource, Rlimit, setpriority_process, setrlimit};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
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

/// What a compiler's process writes before the machine code, so that no other program is taken for one.
const GREETING: &[u8] = b"cairn machine code\n";

/// The most memory that a compiler's process may write to.
const MEMORY_BYTES_MAX: u64 = 4 << 30;
/// The most processor time of a compiler's process, over all its threads: a WAF of 16 MiB takes some 10 s.
const SECONDS_MAX: u64 = 600;
/// The most machine code that is taken from it.
const CODE_BYTES_MAX: u64 = 1 << 30;
/// The most of what it says about a module that cannot be compiled.
const REASON_BYTES_MAX: u64 = 4096;

/// Has a module compiled by another process; the outer error says that there is none.
fn ask(program: &PathBuf, kind: EngineKind, bytes: &[u8]) -> io::Result<Result<Compiled, PluginError>> {
    let mut command = Command::new(program);
    command.arg(ASKED).arg(kind.as_str()).env_clear();
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // One that has ended already says why.
    let _written = process.stdin.take().map(|mut stdin| stdin.write_all(bytes));
    let (mut greeting, mut code, mut reason) = (Vec::new(), Vec::new(), Vec::new());
    // It writes one or the other, and of a reason less than a pipe holds.
    let read = match (process.stdout.take(), process.stderr.take()) {
        (Some(mut stdout), Some(stderr)) => stdout
            .by_ref()
            .take(GREETING.len() as u64)
            .read_to_end(&mut greeting)
            .and_then(|_| stdout.take(CODE_BYTES_MAX + 1).read_to_end(&mut code))
            .and_then(|_| stderr.take(REASON_BYTES_MAX).read_to_end(&mut reason)),
        _ => Ok(0),
    };
    let status = process.wait()?;
    read?;
    if status.success() && greeting != GREETING {
        return Err(io::Error::other("it is no compiler of modules"));
    }
    let failed = |reason: String| Ok(Err(PluginError::Compile(reason.into())));
    match status.code() {
        Some(0) if code.len() as u64 <= CODE_BYTES_MAX => Ok(Ok(Compiled::by_another_process(code))),
        Some(0) => failed(format!("its machine code has more than {CODE_BYTES_MAX} bytes")),
        Some(REFUSED) => failed(String::from_utf8_lossy(&reason).trim_end().to_owned()),
        _ => failed(format!(
            "the compiler's process ended early ({status}); it may take {} GiB of memory and {SECONDS_MAX} s{}",
            MEMORY_BYTES_MAX >> 30,
            last_line(&reason)
        )),
    }
}

fn last_line(reason: &[u8]) -> String {
    let text = String::from_utf8_lossy(reason);
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
            // Nobody else is there to be told.
            let _told = io::stderr().write_all(text.join(": ").as_bytes());
            Some(ExitCode::from(REFUSED as u8))
        }
    }
}

fn compile_for_parent(kind: EngineKind) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // Where these are not allowed, the compiler is as important as all else and may take what it wants.
    let _polite = setpriority_process(None, NICENESS);
    for (resource, limit) in
        [(Resource::Data, MEMORY_BYTES_MAX), (Resource::Cpu, SECONDS_MAX), (Resource::Core, 0)]
    {
        let _bounded = setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) });
    }
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes)?;
    let mut config = kind.config();
    config.parallel_compilation(true);
    let compiled = load::compile(&config, &bytes)?;
    let mut out = io::stdout();
    out.write_all(GREETING)?;
    out.write_all(compiled.code())?;
    out.flush()?;
    Ok(())
}
