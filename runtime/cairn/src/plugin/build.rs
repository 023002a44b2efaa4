//! `cairn plugin build`: a crate becomes a module.

use super::toolchain::Toolchain;
use crate::output::Output;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

/// `cairn plugin build`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The folder of the crate.
    #[arg(default_value = ".")]
    directory: PathBuf,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// A module that was built.
pub struct Built {
    /// The file.
    pub module: PathBuf,
    toolchain: Toolchain,
    took: Duration,
}

/// Builds, and says where the module is.
///
/// # Errors
/// When it does not build.
pub fn run(options: &Options) -> Result<ExitCode> {
    let Built { module, toolchain, took } = build(&options.directory)?;
    let bytes =
        std::fs::metadata(&module).with_context(|| format!("cannot read {}", module.display()))?.len();
    match options.output {
        Output::Text => {
            println!(
                "{}: {bytes} bytes, by {}'s compiler in {:.1} s",
                module.display(),
                toolchain.name(),
                took.as_secs_f64()
            );
        }
        Output::Json => {
            let view = json!({"module": module, "bytes": bytes, "toolchain": toolchain.name(), "seconds": took.as_secs_f64()});
            println!("{view:#}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the crate in a folder.
///
/// # Errors
/// When it does not build, or to no module.
pub fn build(directory: &Path) -> Result<Built> {
    let manifest = directory.join("Cargo.toml");
    if !manifest.is_file() {
        bail!("{} is not there: name the folder of a plugin's crate", manifest.display());
    }
    let toolchain = Toolchain::find()?;
    let started = Instant::now();
    let mut command = toolchain.cargo_build();
    command.arg("--manifest-path").arg(&manifest).arg("--message-format=json-render-diagnostics");
    let output = command.stderr(Stdio::inherit()).output().context("cargo cannot be run")?;
    if !output.status.success() {
        bail!("the plugin does not build");
    }
    let module = String::from_utf8_lossy(&output.stdout).lines().rev().find_map(module_of);
    let module = module.context("the crate has no module: it needs `[lib] crate-type = [\"cdylib\"]`")?;
    Ok(Built { module, toolchain, took: started.elapsed() })
}

/// The module that a message of cargo's is about.
fn module_of(line: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(line).ok()?;
    let files = message["filenames"].as_array()?.iter().filter_map(Value::as_str);
    files.map(PathBuf::from).find(|path| path.extension().is_some_and(|extension| extension == "wasm"))
}
