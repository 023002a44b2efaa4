//! `cairn check`: what is wrong with a directory of manifests, without running it.

use crate::addresses::{Addresses, Block};
use crate::control::read_once;
use anyhow::Result;
use cairn_manifest::{Diagnostic, DiagnosticView};
use std::path::PathBuf;
use std::process::ExitCode;

/// `cairn check`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The directory (or file) of manifests.
    directory: PathBuf,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// Prints what is wrong; the exit status tells whether something must be mended.
///
/// # Errors
/// When the answer cannot be written.
pub fn run(options: Options) -> Result<ExitCode> {
    let nowhere = std::env::temp_dir().join(format!("cairn-check-{}", std::process::id()));
    let mut addresses = Addresses::open(&nowhere, Block::namespaces())?;
    let reading = read_once(&options.directory, &mut addresses);
    match options.output {
        Output::Json => {
            let views: Vec<DiagnosticView<'_>> = reading.diagnostics.iter().map(Diagnostic::view).collect();
            println!("{}", serde_json::to_string_pretty(&views)?);
        }
        Output::Text => {
            for diagnostic in &reading.diagnostics {
                println!("{diagnostic}");
            }
            let (world, count) = (&reading.world, reading.diagnostics.len());
            println!(
                "{} workloads, {} services, {} waypoints: {count} findings",
                world.workloads.len(),
                world.services.len(),
                world.gateways.len(),
            );
        }
    }
    Ok(if reading.has_errors() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
