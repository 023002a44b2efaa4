//! The command line of Cairn: a whole mesh on one machine, or parts of it.

mod addresses;
mod check;
mod child;
mod client;
mod control;
mod demo;
mod echo;
mod explain;
mod forward;
mod netns;
mod output;
mod plugin;
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
    /// Says what would become of a request, and why.
    Explain(Box<explain::Options>),
    /// Serves a directory of manifests over xDS, with a CA.
    Xds(xds::Options),
    /// Runs a ztunnel.
    Ztunnel(Box<cairn_ztunnel::Options>),
    /// Runs a waypoint.
    Waypoint(Box<cairn_waypoint::Options>),
    /// Runs an application that answers with what it saw of each request.
    Echo(echo::Options),
    /// Makes plugins: from nothing to one in a registry.
    Plugin(plugin::Options),
    /// Becomes a program that ends with the process that started it. For `up`.
    #[command(hide = true)]
    Child(child::ChildOptions),
    /// Runs a program and ends all that it started when the process that started this one ends. For `up`.
    #[command(hide = true)]
    Guard(child::Program),
}

fn main() -> ExitCode {
    if let Some(code) = cairn_wasm::compile_if_asked() {
        return code;
    }
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
    let done = |()| ExitCode::SUCCESS;
    let log = arguments.log_level;
    match arguments.command {
        // The proxies set up their own threads and logs.
        Command::Ztunnel(options) => cairn_ztunnel::run(*options).map(done),
        Command::Waypoint(options) => cairn_waypoint::run(*options).map(done),
        Command::Check(options) => check::run(options),
        Command::Child(options) => child::become_program(&options).map(|never| match never {}),
        Command::Up(options) => here(&log, up::run(options)).map(done),
        Command::Demo(options) => here(&log, demo::run(options)),
        Command::Explain(options) => here(&log, explain::run(*options)).map(done),
        Command::Plugin(options) => here(&log, plugin::run(options)),
        Command::Xds(options) => here(&log, xds::run(options)).map(done),
        Command::Guard(program) => here(&log, child::guard(program)),
        Command::Echo(options) => here(&log, echo::run(options)).map(done),
    }
}

/// Runs a command on this thread, with its log on standard error.
fn here<T>(log: &str, command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    cairn_process::init_logging(log, cairn_process::LogFormat::Text)?;
    cairn_process::control_runtime()?.block_on(command)
}
