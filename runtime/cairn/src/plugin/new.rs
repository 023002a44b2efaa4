//! `cairn plugin new`: a crate that builds, with a native test and a scenario.

use crate::output::Output;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// `cairn plugin new`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The plugin's name: lower-case letters, digits and dashes.
    name: String,
    /// The folder to make. Default: the name.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// The folder of the SDK. Default: `sdk` of the repository that this program was built in, or that encloses the current
    /// folder.
    #[arg(long)]
    sdk: Option<PathBuf>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

const FILES: [(&str, &str); 6] = [
    ("Cargo.toml", include_str!("template/Cargo.toml.in")),
    ("src/lib.rs", include_str!("template/lib.rs.in")),
    ("README.md", include_str!("template/README.md.in")),
    ("config.json", include_str!("template/config.json")),
    ("scenario.json", include_str!("template/scenario.json")),
    (".gitignore", "/target\n"),
];

/// Writes the files.
///
/// # Errors
/// When the name is none, the folder is there already, or the SDK is not found.
pub fn run(options: &Options) -> Result<ExitCode> {
    let name = &options.name;
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(is_name) {
        bail!("`{name}`: a name is lower-case letters, digits and dashes, a letter first");
    }
    let directory = options.directory.clone().unwrap_or_else(|| PathBuf::from(name));
    if directory.exists() {
        bail!("{} is there already", directory.display());
    }
    let sdk = sdk(options.sdk.as_deref())?;
    for (file, template) in FILES {
        let path = directory.join(file);
        let parent = path.parent().unwrap_or(&directory);
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        let text = template.replace("{{name}}", name).replace("{{sdk}}", &sdk.display().to_string());
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let shown = directory.display();
    match options.output {
        Output::Text => println!(
            "{shown} is a plugin now. Next:\n  cairn plugin test {shown}\n  cairn plugin build {shown}"
        ),
        Output::Json => println!(
            "{:#}",
            json!({"directory": directory, "sdk": sdk, "files": FILES.map(|(file, _)| file)})
        ),
    }
    Ok(ExitCode::SUCCESS)
}

fn sdk(given: Option<&Path>) -> Result<PathBuf> {
    let is_sdk = |folder: &PathBuf| folder.join("src/lib.rs").is_file() && folder.join("macros").is_dir();
    let found = match given {
        Some(given) => Some(given.to_owned()).filter(is_sdk),
        None => {
            let starts = [std::env::current_exe().ok(), std::env::current_dir().ok()];
            let around = starts.iter().flatten().flat_map(|start| start.ancestors());
            around.map(|folder| folder.join("sdk")).find(is_sdk)
        }
    };
    let found = found.context("the SDK was not found: name its folder with --sdk")?;
    std::fs::canonicalize(&found).with_context(|| format!("cannot find {}", found.display()))
}
