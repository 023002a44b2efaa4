//! `cairn plugin`: from nothing to a plugin in a registry.

mod bench;
mod build;
mod envoy;
mod inspect;
mod module;
mod new;
mod push;
mod run;
mod scenario;
mod server;
mod test;
mod toolchain;

use anyhow::Result;
use std::process::ExitCode;

/// `cairn plugin`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Starts a plugin: a crate that builds, with a native test and a scenario.
    New(new::Options),
    /// Builds a plugin's crate to WebAssembly.
    Build(build::Options),
    /// Runs a plugin's native tests, and its scenario against the compiled module in this host.
    Test(test::Options),
    /// Serves a plugin in front of any URL, and takes up changes of the module and its configuration.
    Run(run::Options),
    /// Measures what a plugin costs: time per call, time to start, memory.
    Bench(bench::Options),
    /// Says what a module is and asks for, and which proxies lack it.
    Inspect(inspect::Options),
    /// Brings a module to a registry of images, and prints a WasmPlugin that uses it.
    Push(push::Options),
}

/// Does what was asked.
///
/// # Errors
/// When it cannot be done.
pub async fn run(options: Options) -> Result<ExitCode> {
    match options.command {
        Command::New(options) => new::run(&options),
        Command::Build(options) => build::run(&options),
        Command::Test(options) => test::run(&options).await,
        Command::Run(options) => run::run(options).await,
        Command::Bench(options) => bench::run(&options),
        Command::Inspect(options) => inspect::run(&options),
        Command::Push(options) => push::run(&options).await,
    }
}
