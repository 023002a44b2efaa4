//! The `waypoint` binary.

use clap::Parser;
use std::process::ExitCode;

/// The L7 proxy of the Cairn mesh.
#[derive(Parser)]
#[command(name = "waypoint", version)]
struct Arguments {
    #[command(flatten)]
    options: cairn_waypoint::Options,
}

fn main() -> anyhow::Result<ExitCode> {
    if let Some(code) = cairn_waypoint::compile_if_asked() {
        return Ok(code);
    }
    cairn_waypoint::run(Arguments::parse().options).map(|()| ExitCode::SUCCESS)
}
