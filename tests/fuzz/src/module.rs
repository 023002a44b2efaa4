//! Random modules: whatever a registry serves, the host refuses it or lives with it.

use arbitrary::{Error, Result, Unstructured};
use cairn_fuzz::{guest, proxy};
use std::sync::LazyLock;
use wasm_smith::{Config, Module};

/// After so many calls and loops a module traps.
const FUEL: u32 = 2000;

/// A module made of the bytes, which imports what the host offers and exports what it calls. The first byte says which
/// proposals of WebAssembly it may use, the second what it exports; the last bytes are what is said to it.
pub fn module(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(mut bytes) = made_of(&mut input) else { return };
    keep(&bytes, data);
    let said = input.take_rest();
    let said = &said[..said.len().min(1024)];
    // Some are broken somewhere.
    if let [3, by, at @ ..] = said {
        let at = at.iter().fold(0, |at, byte| at << 8 | usize::from(*byte));
        let length = bytes.len();
        bytes[at % length] ^= by;
    }
    proxy::run(&bytes, said);
}

/// Writes a module down, if the variable `KEEP` names a folder: how `seeds/modules` came to be. Its name is a sum of the bytes
/// that it is made of.
fn keep(module: &[u8], data: &[u8]) {
    let Some(folder) = std::env::var_os("KEEP") else { return };
    let sum = data.iter().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()));
    std::fs::write(std::path::Path::new(&folder).join(format!("{sum:08x}")), module).expect("a folder");
}

fn made_of(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let proposals: u8 = input.arbitrary()?;
    let exports = usize::from(input.arbitrary::<u8>()?) % EXPORTS.len();
    let has = |bit: u8| proposals & (1 << bit) != 0;
    let config = Config {
        available_imports: Some(IMPORTS.clone()),
        exports: Some(EXPORTS[exports].clone()),
        max_imports: 64,
        max_funcs: 40,
        max_memories: 1,
        max_memory32_bytes: 16 << 20,
        max_instructions: 60,
        simd_enabled: has(0),
        reference_types_enabled: has(1),
        tail_call_enabled: has(2),
        exceptions_enabled: has(3),
        gc_enabled: has(3) && has(1),
        memory64_enabled: has(4),
        threads_enabled: has(5),
        wide_arithmetic_enabled: has(6),
        allow_start_export: has(7),
        ..Config::default()
    };
    let mut module = Module::new(config, input)?;
    // What does not end is ended by the clock, which takes long.
    module.ensure_termination(FUEL).map_err(|_| Error::IncorrectFormat)?;
    Ok(module.to_bytes())
}

static IMPORTS: LazyLock<Vec<u8>> = LazyLock::new(|| parse(&format!("(module {})", guest::imports())));

/// What modules export, in three ways: everything, what a small plugin does, and the older shape of it.
static EXPORTS: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| {
    let all = |_: &str| true;
    let some = |name: &str| name.starts_with("proxy_on_request") || name.starts_with("proxy_on_response");
    [exports(2, all), exports(1, some), exports(0, some)]
});

fn exports(marker: usize, has: impl Fn(&str) -> bool) -> Vec<u8> {
    let functions = guest::CALLBACKS.iter().filter(|callback| has(callback.name)).map(|callback| {
        let parameters = " i32".repeat(callback.parameters);
        let result = if callback.answers { "(result i32)" } else { "" };
        format!("(func (export \"{}\") (param{parameters}) {result} unreachable)", callback.name)
    });
    parse(&format!(
        r#"(module (memory (export "memory") 1) (func (export "{}"))
           (func (export "proxy_on_memory_allocate") (param i32) (result i32) unreachable) {})"#,
        guest::MARKERS[marker],
        functions.collect::<String>()
    ))
}

fn parse(text: &str) -> Vec<u8> {
    wat::parse_str(text).expect("a module")
}
