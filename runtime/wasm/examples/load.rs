//! What it takes to load plugins: with nothing compiled, and with all of it compiled before.
//!
//! `cargo run --release -p cairn-wasm --example load -- target/plugins/tag.wasm ANOTHER.wasm`
//!
//! Each module is loaded by a process of its own, once with an empty cache and once with what that left; the last line is of
//! twenty plugins of the first module. Memory is what the process holds more than before, with two workers.

#![allow(clippy::expect_used, reason = "a measuring tool may stop with a message")]

use cairn_mesh::{FailStrategy, Isolation, PluginKind, PluginMode, PluginPhase, ResourceName, WasmPlugin};
use cairn_wasm::{CacheSettings, Engine, EngineSettings, Started};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const WORKERS: usize = 2;
const MANY: usize = 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, cache, module] = arguments.as_slice()
        && mode == "--one"
    {
        return one(Path::new(cache), Path::new(module));
    }
    let program = std::env::current_exe().expect("this program");
    for (number, module) in arguments.iter().enumerate() {
        let cache = std::env::temp_dir().join(format!("cairn-load-{}-{number}", std::process::id()));
        for _ in 0..2 {
            let status = Command::new(&program).arg("--one").arg(&cache).arg(module).status();
            assert!(status.expect("a process").success());
        }
        std::fs::remove_dir_all(&cache).expect("the cache can be removed");
    }
}

fn one(cache: &Path, path: &Path) {
    let begun = Instant::now();
    let cache = CacheSettings { directory: cache.to_owned(), bytes_max: 1 << 30 };
    let settings = EngineSettings { workers: WORKERS, cache: Some(cache), ..EngineSettings::default() };
    let engine = Engine::new(settings).expect("an engine");
    let engine_took = begun.elapsed();
    // The name of a file stands for the digest, which whoever fetches a module knows.
    let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
    let before = Memory::now();
    let (origin, code_took, first) = start(&engine, &name, path, 0);
    let with_one = Memory::now();
    println!(
        "{name}: {origin}; engine {engine_took:?}, code {code_took:?}, start of {WORKERS} instances {:?}; memory {}",
        first.1,
        with_one.more_than(before)
    );
    let many = Instant::now();
    let others: Vec<_> = (1..MANY).map(|number| start(&engine, &name, path, number).2.0).collect();
    let took = many.elapsed();
    println!(
        "{name}: {} more in {took:?}, each with {}",
        others.len(),
        Memory::now().more_than(with_one).each(MANY - 1)
    );
}

fn start(
    engine: &Engine,
    name: &str,
    path: &Path,
    number: usize,
) -> (&'static str, Duration, (Started, Duration)) {
    let loaded = match engine.find(name) {
        Some(loaded) => loaded,
        None => {
            let bytes = std::fs::read(path).expect("the module can be read");
            engine.load(name, &bytes).expect("the module compiles")
        }
    };
    let begun = Instant::now();
    let started = engine.start(loaded.module, &plugin(number)).expect("the plugin starts");
    (loaded.origin.as_str(), loaded.took, (started, begun.elapsed()))
}

fn plugin(number: usize) -> WasmPlugin {
    WasmPlugin {
        name: ResourceName::new("shop", format!("p{number}")),
        targets: Vec::new(),
        url: "".into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "".into(),
        kind: PluginKind::Http,
        ports: Vec::new(),
        config: "".into(),
        phase: PluginPhase::Unspecified,
        priority: 0,
        fail_strategy: FailStrategy::Close,
        env: Vec::new(),
        host_env: Vec::new(),
        holds_heads: false,
        limits: Default::default(),
        isolation: Isolation::Shared,
        mode: PluginMode::Enforce,
    }
}

/// Resident memory in KiB: all of it, and what no file is behind; 0 where there is no procfs.
#[derive(Clone, Copy)]
struct Memory {
    all: i64,
    anonymous: i64,
}

impl Memory {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        Self { all: field("VmRSS:"), anonymous: field("RssAnon:") }
    }

    fn more_than(self, before: Self) -> Self {
        Self { all: self.all - before.all, anonymous: self.anonymous - before.anonymous }
    }

    fn each(self, count: usize) -> Self {
        let count = i64::try_from(count).unwrap_or(1);
        Self { all: self.all / count, anonymous: self.anonymous / count }
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} KiB, {} of it anonymous", self.all, self.anonymous)
    }
}
