//! `cairn plugin test`: a plugin's native tests, and its scenario against the compiled module.

use super::build;
use super::scenario::{self, Outcome};
use crate::output::Output;
use anyhow::{Context, Result};
use serde_json::json;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

/// `cairn plugin test`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The folder of the crate.
    #[arg(default_value = ".")]
    directory: PathBuf,
    /// The scenario. Default: `scenario.json` of the folder, if it is there.
    #[arg(long)]
    scenario: Option<PathBuf>,
    /// Test this module, instead of running native tests and building one.
    #[arg(long)]
    module: Option<PathBuf>,
    /// Play the scenario through this Envoy instead of this host.
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Tests. The exit status tells whether all is as expected.
///
/// # Errors
/// When the plugin does not build or start.
pub async fn run(options: &Options) -> Result<ExitCode> {
    let native = if options.module.is_some() { None } else { Some(native(options)?) };
    if native == Some(false) {
        return finish(options, native, &[]);
    }
    let usual = options.directory.join("scenario.json");
    let scenario = options.scenario.clone().or_else(|| usual.is_file().then_some(usual));
    let outcomes = match &scenario {
        Some(scenario) => {
            let module = match &options.module {
                Some(module) => module.clone(),
                None => build::build(&options.directory)?.module,
            };
            scenario::play(&module, scenario, options.envoy.as_deref()).await?
        }
        None => Vec::new(),
    };
    finish(options, native, &outcomes)
}

/// Whether the native tests pass. What they print goes to standard error, since the answer is on standard output.
fn native(options: &Options) -> Result<bool> {
    let manifest = options.directory.join("Cargo.toml");
    let mut command = Command::new("cargo");
    command.arg("test").arg("--manifest-path").arg(&manifest).stdout(Stdio::from(std::io::stderr()));
    Ok(command.status().context("cargo cannot be run")?.success())
}

fn finish(options: &Options, native: Option<bool>, outcomes: &[Outcome]) -> Result<ExitCode> {
    let passed = native != Some(false) && outcomes.iter().all(|outcome| outcome.failure.is_none());
    match options.output {
        Output::Json => println!("{:#}", json!({"native": native, "steps": outcomes, "passed": passed})),
        Output::Text => {
            for outcome in outcomes {
                match &outcome.failure {
                    None => println!("ok      {}", outcome.name),
                    Some(failure) => println!("failed  {}: {failure}", outcome.name),
                }
            }
            println!("{}", if passed { "passed" } else { "failed" });
        }
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
