//! The end-to-end tests: real sockets, real TLS, real xDS, a real Wasm module. One binary, so that it links once.

// All of it is tests, helpers included: what does not hold ends the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod acceptance;
mod access_log;
mod bodies;
mod chaos;
mod client;
mod command;
mod connections;
mod edits;
mod envoy;
mod explain;
mod ext_authz;
mod harness;
mod inpod;
mod issuers;
mod jwt;
mod netns;
mod observe;
mod peers;
mod plugin;
mod plugins;
mod policy;
mod registry;
mod revoked;
mod rotation;
mod servers;
mod shop;
mod telemetry;
mod tidy;
mod traffic;
mod trust;
