//! The command line of Cairn: a whole mesh on one machine, or parts of it.

mod addresses;
mod check;
mod client;
mod control;
mod demo;
mod echo;
mod forward;
mod netns;
mod supervise;
mod up;
mod xds;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Cairn: the data plane of an ambient service mesh.
#[derive(Parser)]
#[command(name = "cairn", version)]
struct Arguments {
    /// Which log events are printed.
    #[arg(long, env = "CAIRN_LOG", default_value = "warn", global = true)]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts the whole mesh of a directory of manifests on this machine.
    Up(up::Options),
    /// Shows a mesh at work: starts one, sends requests through it, and says what happened to each and why.
    Demo(demo::Options),
    /// Says what is wrong with a directory of manifests.
    Check(check::Options),
    /// Serves a directory of manifests over xDS, with a CA.
    Xds(xds::Options),
    /// Runs a ztunnel.
    Ztunnel(Box<cairn_ztunnel::Options>),
    /// Runs a waypoint.
    Waypoint(Box<cairn_waypoint::Options>),
    /// Runs an application that answers with what it saw of each request.
    Echo(echo::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cairn: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    // The proxies set up their own threads and logs.
    match arguments.command {
        Command::Ztunnel(options) => return cairn_ztunnel::run(*options).map(|()| ExitCode::SUCCESS),
        Command::Waypoint(options) => return cairn_waypoint::run(*options).map(|()| ExitCode::SUCCESS),
        Command::Check(options) => return check::run(options),
        _ => {}
    }
    cairn_process::init_logging(&arguments.log_level, cairn_process::LogFormat::Text)?;
    let runtime = cairn_process::control_runtime()?;
    match arguments.command {
        Command::Up(options) => runtime.block_on(up::run(options)).map(|()| ExitCode::SUCCESS),
        Command::Demo(options) => runtime.block_on(demo::run(options)),
        Command::Xds(options) => runtime.block_on(xds::run(options)).map(|()| ExitCode::SUCCESS),
        Command::Echo(options) => runtime.block_on(echo::run(options)).map(|()| ExitCode::SUCCESS),
        Command::Check(_) | Command::Ztunnel(_) | Command::Waypoint(_) => Ok(ExitCode::SUCCESS),
    }
}
