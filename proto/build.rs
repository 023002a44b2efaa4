//! Compiles the `.proto` files of this folder, without `protoc`.

use std::error::Error;

const FILES: [&str; 14] = [
    "envoy/accesslog.proto",
    "envoy/address.proto",
    "envoy/auth.proto",
    "envoy/core.proto",
    "envoy/discovery.proto",
    "envoy/header.proto",
    "envoy/http_status.proto",
    "google/rpc/status.proto",
    "istio/ca.proto",
    "istio/mcp.proto",
    "istio/security.proto",
    "istio/workload.proto",
    "istio/zds.proto",
    "opentelemetry/telemetry.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    // Sorted maps: equal messages have equal bytes, so a hash of the bytes is a version.
    tonic_prost_build::configure()
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .include_file("cairn_proto.rs")
        .compile_fds(descriptors)?;
    Ok(())
}
