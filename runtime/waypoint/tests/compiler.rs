//! Modules are compiled by a process of this very program.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use cairn_wasm::{Compiler, Engine, EngineSettings, PluginError};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// The shortest module there is; it compiles, and is no plugin.
const EMPTY: &[u8] = b"\0asm\x01\0\0\0";

const WAYPOINT: &str = env!("CARGO_BIN_EXE_waypoint");

fn asked(kind: &str, module: &[u8]) -> Output {
    let mut command = Command::new(WAYPOINT);
    command
        .arg("compile-module")
        .arg(kind)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    process.stdin.take().unwrap().write_all(module).unwrap();
    process.wait_with_output().unwrap()
}

fn compiled_by(program: impl Into<PathBuf>, module: &[u8]) -> PluginError {
    let compiler = Compiler::Apart(program.into());
    let engine = Engine::new(EngineSettings { compiler, ..EngineSettings::default() }).unwrap();
    engine.compile(module).err().expect("nothing here is a plugin")
}

#[test]
fn the_program_compiles_modules_for_its_parent() {
    for kind in ["lasting", "pooled"] {
        let output = asked(kind, EMPTY);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.starts_with(b"cairn machine code\n\x7fELF"), "{output:?}");
        let refused = asked(kind, b"not wasm");
        assert_eq!((refused.status.code(), refused.stdout.len()), (Some(3), 0));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("magic header"), "{refused:?}");
    }
}

#[test]
fn an_engine_takes_what_the_program_compiled_and_says_why_it_did_not() {
    assert!(matches!(compiled_by(WAYPOINT, EMPTY), PluginError::UnknownAbi), "compiled, and no plugin");
    let PluginError::Compile(reason) = compiled_by(WAYPOINT, b"not wasm") else { panic!("it compiled") };
    assert!(reason.to_string().contains("magic header"), "{reason}");
}

#[test]
fn a_compiler_that_ends_early_costs_the_module_and_one_that_is_none_nothing() {
    let PluginError::Compile(reason) = compiled_by("/bin/false", EMPTY) else { panic!("it compiled") };
    assert!(reason.to_string().contains("ended early (exit status: 1)"), "{reason}");
    for program in ["/bin/true", "/nonexistent/program"] {
        assert!(matches!(compiled_by(program, EMPTY), PluginError::UnknownAbi), "{program}: compiled here");
    }
}
