//! The `ztunnel` binary.

use clap::Parser;

/// The node proxy of the Cairn mesh.
#[derive(Parser)]
#[command(name = "ztunnel", version)]
struct Arguments {
    #[command(flatten)]
    options: cairn_ztunnel::Options,
}

fn main() -> anyhow::Result<()> {
    cairn_ztunnel::run(Arguments::parse().options)
}
