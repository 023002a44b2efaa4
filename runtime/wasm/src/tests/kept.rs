//! Modules that are compiled once: shared by plugins, and kept for the next process.

use super::*;
use crate::{CacheSettings, Origin};

fn engine(directory: &std::path::Path, memory_max: usize) -> Engine {
    let cache = CacheSettings { directory: directory.join("compiled"), bytes_max: 1 << 20 };
    Engine::new(EngineSettings { cache: Some(cache), memory_max, ..settings() }).unwrap()
}

/// What the metrics say of modules loaded: shared, from disk, compiled.
fn loads(engine: &Engine) -> [u64; 3] {
    let text = engine.encode_metrics();
    ["shared", "disk", "compiled"].map(|origin| {
        let start = format!("cairn_wasm_modules_loaded_total{{origin=\"{origin}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&start)).unwrap();
        line.parse().unwrap()
    })
}

fn answers(engine: &Engine, loaded: crate::Loaded) {
    let factory = engine.start(loaded.module, &plugin(FailStrategy::Close, "")).unwrap().factory;
    let mut filter = factory.start(&exchange()).unwrap();
    let (mut exchange, mut head) = (exchange(), request());
    assert!(matches!(filter.request_headers(&mut exchange, &mut head, true), Verdict::Continue));
    assert_eq!(head.headers.get("x-status").unwrap(), "07");
}

#[test]
fn a_process_that_starts_again_compiles_nothing() {
    let home = tempfile::tempdir().unwrap();
    let bytes = wat::parse_str(calling("", "(i32.const 7)")).unwrap();
    let first = engine(home.path(), 4 << 20);
    assert!(first.find("d1").is_none());
    let loaded = first.load("d1", &bytes).unwrap();
    assert_eq!(loaded.origin, Origin::Compiled);
    assert_eq!(first.find("d1").unwrap().origin, Origin::Shared);
    answers(&first, loaded);
    assert_eq!(first.load("d1", &bytes).unwrap().origin, Origin::Disk, "nobody uses it any more");
    assert_eq!(loads(&first), [1, 1, 1]);
    drop(first);

    let second = engine(home.path(), 4 << 20);
    let loaded = second.find("d1").unwrap();
    assert_eq!(loaded.origin, Origin::Disk);
    answers(&second, loaded);
    assert_eq!(loads(&second), [0, 1, 0]);
    let compiled = second.encode_metrics();
    assert!(compiled.contains("\ncairn_wasm_compile_seconds_total 0\n"), "{compiled}");
    assert!(compiled.contains("\ncairn_wasm_cache_modules 1\n"), "{compiled}");
}

#[test]
fn what_lies_in_the_cache_and_is_not_ours_is_compiled_again() {
    let home = tempfile::tempdir().unwrap();
    let bytes = wat::parse_str(calling("", "(i32.const 7)")).unwrap();
    drop(engine(home.path(), 4 << 20).load("d1", &bytes).unwrap());
    let code = std::fs::read_dir(home.path().join("compiled")).unwrap().map(|entry| entry.unwrap().path());
    let code = code.into_iter().find(|path| path.extension().is_some_and(|end| end == "cwasm")).unwrap();
    let mut changed = std::fs::read(&code).unwrap();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    std::fs::write(&code, changed).unwrap();
    let again = engine(home.path(), 4 << 20);
    let loaded = again.load("d1", &bytes).unwrap();
    assert_eq!(loaded.origin, Origin::Compiled);
    answers(&again, loaded);
}

#[test]
fn modules_that_do_not_compile_are_counted_and_not_kept() {
    let home = tempfile::tempdir().unwrap();
    let engine = engine(home.path(), 4 << 20);
    assert!(matches!(engine.load("d1", b"not wasm"), Err(PluginError::Compile(_))));
    let text = engine.encode_metrics();
    assert!(text.contains("\ncairn_wasm_compile_failures_total 1\n"), "{text}");
    assert!(text.contains("\ncairn_wasm_cache_modules 0\n"), "{text}");
}

#[test]
fn a_version_is_in_use_while_its_factory_or_an_exchange_is() {
    let host = Engine::new(settings()).unwrap();
    let module = host.compile(&wat::parse_str(calling("", "(i32.const 7)")).unwrap()).unwrap();
    let started = host.start(module, &plugin(FailStrategy::Close, "")).unwrap();
    let mut filter = started.factory.start(&exchange()).unwrap();
    let version = started.version;
    drop(started.factory);
    assert!(version.is_in_use(), "an exchange has begun with it");
    filter.request_headers(&mut exchange(), &mut request(), true);
    drop(filter);
    assert!(!version.is_in_use());
}
