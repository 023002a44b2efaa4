//! The `waypoint` binary.

use clap::Parser;

/// The L7 proxy of the Cairn mesh.
#[derive(Parser)]
#[command(name = "waypoint", version)]
struct Arguments {
    #[command(flatten)]
    options: cairn_waypoint::Options,
}

fn main() -> anyhow::Result<()> {
    cairn_waypoint::run(Arguments::parse().options)
}
