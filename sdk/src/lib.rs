//! The guest side of proxy-wasm for plugin authors.
