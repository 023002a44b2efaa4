//! Filters in WebAssembly: the proxy-wasm host.
