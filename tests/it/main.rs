//! The end-to-end tests: real sockets, real TLS, real xDS, a real Wasm module. One binary, so that it links once.

mod tidy;
