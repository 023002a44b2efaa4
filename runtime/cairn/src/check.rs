//! `cairn check`: what is wrong with a directory of manifests, and what is hardly meant so, without running it.
//!
//! Every code that it may give is in `docs/check.md`.

mod sarif;
mod text;

use crate::addresses::{Addresses, Block};
use crate::control::read_once;
use anyhow::Result;
use cairn_manifest::{Diagnostic, DiagnosticView, Severity, lint};
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
    /// Let warnings fail the check, as errors do.
    #[arg(long)]
    deny_warnings: bool,
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
    /// For code scanning: SARIF 2.1.0.
    Sarif,
}

/// Prints what is wrong; the exit status tells whether something must be mended.
///
/// # Errors
/// When the answer cannot be written.
pub fn run(options: Options) -> Result<ExitCode> {
    let nowhere = std::env::temp_dir().join(format!("cairn-check-{}", std::process::id()));
    let mut addresses = Addresses::open(&nowhere, Block::namespaces())?;
    let reading = read_once(&options.directory, &mut addresses);
    let mut diagnostics = reading.diagnostics.clone();
    diagnostics.extend(lint(&reading.objects, &reading.world, &reading.settings));
    diagnostics.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    match options.output {
        Output::Json => {
            let views: Vec<DiagnosticView<'_>> = diagnostics.iter().map(Diagnostic::view).collect();
            println!("{}", serde_json::to_string_pretty(&views)?);
        }
        Output::Sarif => println!("{}", serde_json::to_string_pretty(&sarif::log(&diagnostics))?),
        Output::Text => {
            print!("{}", text::render(&diagnostics));
            let (world, count) = (&reading.world, diagnostics.len());
            println!(
                "{} workloads, {} services, {} waypoints: {count} findings",
                world.workloads.len(),
                world.services.len(),
                world.gateways.len(),
            );
        }
    }
    Ok(if fails(&diagnostics, options.deny_warnings) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn fails(diagnostics: &[Diagnostic], deny_warnings: bool) -> bool {
    diagnostics.iter().any(|diagnostic| match diagnostic.severity {
        Severity::Error => true,
        Severity::Warning => deny_warnings,
        Severity::Info => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_manifest::CODES;

    #[test]
    fn every_code_is_documented_as_it_is() {
        let page = include_str!("../../../docs/check.md");
        let rows = page.lines().filter(|line| line.starts_with("| `"));
        let documented: Vec<String> = rows.map(str::to_owned).collect();
        let row = |code: &cairn_manifest::Code| {
            let cell = |text: &str| text.replace('|', "\\|");
            format!("| `{}` | {} | {} | {} |", code.name, code.severity, cell(code.meaning), cell(code.fix))
        };
        assert_eq!(documented, CODES.iter().map(row).collect::<Vec<_>>());
    }

    #[test]
    fn the_exit_status_is_for_ci() {
        use Severity::{Error, Info, Warning};
        let finding = |severity| Diagnostic {
            severity,
            file: std::path::Path::new("a").into(),
            line: 0,
            column: 0,
            object: None,
            field: String::new(),
            reason: String::new(),
            code: "kept",
            fix: None,
        };
        for (name, severities, deny_warnings, expected) in [
            ("clean", &[][..], true, false),
            ("info", &[Info], true, false),
            ("warning", &[Info, Warning], false, false),
            ("denied warning", &[Warning], true, true),
            ("error", &[Warning, Error], false, true),
        ] {
            let found: Vec<Diagnostic> = severities.iter().map(|severity| finding(*severity)).collect();
            assert_eq!(fails(&found, deny_warnings), expected, "{name}");
        }
    }
}
