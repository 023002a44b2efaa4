#![no_main]

// Not of the library, which the tests have, too: only this one needs `wasm-smith`.
#[path = "../src/module.rs"]
mod module;

libfuzzer_sys::fuzz_target!(|data: &[u8]| module::module(data));
