//! Modules are compiled by a process of this very program.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use cairn_wasm::{Compiler, Engine, EngineSettings, PluginError};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
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
        assert_eq!((refused.status.code(), &*refused.stdout), (Some(3), &b"cairn machine code\n"[..]));
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
fn however_much_is_to_be_said_of_a_module_it_is_said_in_few_words() {
    // Two exports of one name that is longer than a pipe.
    let name = "x".repeat(99_000);
    let module = wat::parse_str(format!(
        "(module (func $f) (memory 1) (export \"{name}\" (func $f)) (export \"{name}\" (memory 0)))"
    ));
    let PluginError::Compile(reason) = compiled_by(WAYPOINT, &module.unwrap()) else { panic!("it compiled") };
    let reason = reason.to_string();
    assert!(reason.len() < 4096 && reason.contains("xxxx"), "{reason}");
}

#[test]
fn a_compiler_that_ends_early_may_do_better_the_next_time() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("killed");
    let script = "#!/bin/sh\necho 'cairn machine code'\necho 'out of luck' >&2\nkill -9 $$\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
    let PluginError::CompilerEnded { status, said } = compiled_by(program, EMPTY) else {
        panic!("it compiled")
    };
    assert!(status.contains("signal: 9") && said == ": out of luck", "{status}{said}");
}

#[test]
fn without_a_compiler_the_module_is_compiled_here() {
    for program in ["/bin/true", "/bin/false", "/nonexistent/program"] {
        assert!(matches!(compiled_by(program, EMPTY), PluginError::UnknownAbi), "{program}: compiled here");
    }
}
