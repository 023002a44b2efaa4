//! Holds the graph of crates to the table in ARCHITECTURE.md, and files to the few rules that a script can check.

use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// Rows of the table: crate → (folder, crates it may use).
fn table() -> Result<BTreeMap<String, (String, BTreeSet<String>)>> {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md"))?;
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [tier, name, folder, _, uses] = cells[..] else { continue };
        if tier.parse::<u8>().is_err() || !name.starts_with("cairn") {
            continue;
        }
        let uses = uses.split(',').map(str::trim).filter(|one| one.starts_with("cairn")).map(str::to_owned);
        rows.insert(name.to_owned(), (folder.to_owned(), uses.collect()));
    }
    ensure!(rows.len() > 10, "the table of crates in ARCHITECTURE.md was not found");
    Ok(rows)
}

/// Our crates as cargo knows them: name → (folder, our crates that it uses outside its own tests).
fn graph() -> Result<BTreeMap<String, (String, BTreeSet<String>)>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .context("cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let mut crates = BTreeMap::new();
    for package in metadata["packages"].as_array().context("packages")? {
        let name = package["name"].as_str().context("name")?.to_owned();
        let manifest = Path::new(package["manifest_path"].as_str().context("manifest_path")?);
        let folder = manifest.parent().context("folder")?.strip_prefix(root())?.display().to_string();
        let dependencies = package["dependencies"].as_array().context("dependencies")?;
        let ours = dependencies.iter().filter(|one| one["kind"].as_str() != Some("dev"));
        let ours = ours.filter_map(|one| one["name"].as_str()).filter(|one| one.starts_with("cairn"));
        crates.insert(name, (folder, ours.map(str::to_owned).collect()));
    }
    Ok(crates)
}

#[test]
fn crates_depend_only_as_the_table_says() -> Result<()> {
    let (table, graph) = (table()?, graph()?);
    for (name, (folder, uses)) in &graph {
        if name == "cairn-tests" {
            continue;
        }
        let row = if name.starts_with("cairn-plugin-") { "cairn-plugin-*" } else { name };
        let (expected, allowed) = table.get(row).with_context(|| format!("{name} is not in the table"))?;
        let place = if row == name { expected.clone() } else { folder.clone() };
        ensure!(*folder == place, "{name} is in {folder}, the table says {expected}");
        for used in uses {
            ensure!(allowed.contains(used), "{name} uses {used}, which the table does not allow");
        }
    }
    for name in table.keys().filter(|name| !name.contains('*')) {
        ensure!(graph.contains_key(name), "{name} is in the table and not in the workspace");
    }
    Ok(())
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            rust_files(&path, found)?;
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
    Ok(())
}

#[test]
fn every_file_says_what_it_is_for() -> Result<()> {
    let mut files = Vec::new();
    for folder in ["proto", "runtime", "ztunnel", "sdk", "plugins", "tests/it", "tests/src"] {
        rust_files(&root().join(folder), &mut files)?;
    }
    ensure!(files.len() > 50, "only {} files found", files.len());
    for file in files {
        let text = std::fs::read_to_string(&file)?;
        ensure!(text.starts_with("//!"), "{} does not begin with //!", file.display());
    }
    Ok(())
}

#[test]
fn the_ten_steps_name_functions_that_exist() -> Result<()> {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md"))?;
    let steps = text.lines().filter(|line| {
        let first = line.trim_matches('|').split('|').next().unwrap_or_default().trim();
        line.starts_with("| ") && first.parse::<u8>().is_ok() && line.contains("` → `")
    });
    let mut count = 0;
    for line in steps {
        count += 1;
        let names: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
        let mut source = String::new();
        for name in names {
            if name.ends_with(".rs") {
                source =
                    std::fs::read_to_string(root().join(name)).with_context(|| format!("{name}: {line}"))?;
            } else {
                let function = name.rsplit("::").next().unwrap_or(name);
                let found = source.contains(&format!("fn {function}("))
                    || source.contains(&format!("fn {function}<"));
                ensure!(found, "no function {function} in the file named before it: {line}");
            }
        }
    }
    ensure!(count == 10, "{count} steps");
    Ok(())
}

/// Where the tests of a crate are, by the name that the ztunnel's table gives it.
fn tests_of(name: &str) -> PathBuf {
    match name {
        "ztunnel" => root().join("ztunnel"),
        "it" => root().join("tests/it"),
        other => root().join("runtime").join(other),
    }
}

/// Whether a test stands in a file of this module: `module.rs`, or one in a folder `module`.
fn has_test(folder: &Path, module: &str, test: &str) -> Result<bool> {
    let mut files = Vec::new();
    rust_files(folder, &mut files)?;
    for file in files {
        let parts = file.strip_prefix(folder)?.with_extension("");
        if !parts.iter().any(|part| part == module) {
            continue;
        }
        let text = std::fs::read_to_string(&file)?;
        let found = text.split_once(&format!("fn {test}(")).is_some_and(|(before, _)| {
            let attributes = before.rsplit("\n\n").next().unwrap_or_default();
            attributes.contains("#[test]") || attributes.contains("#[tokio::test")
        });
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn each_row_of_the_ztunnels_table_names_tests_that_exist_or_says_that_it_is_not_done() -> Result<()> {
    let text = std::fs::read_to_string(root().join("ztunnel/README.md"))?;
    let mut rows = BTreeSet::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [row, _behaviour, shown] = cells[..] else { continue };
        let Some(number) = row.split(' ').next().and_then(|word| word.parse::<u8>().ok()) else { continue };
        ensure!(rows.insert(number), "row {number} is there twice");
        let named: Vec<&str> =
            shown.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect();
        ensure!(!named.is_empty() || shown.starts_with("not done"), "row {number} shows nothing: {shown}");
        for name in named {
            let (of, path) = name.split_once(": ").with_context(|| format!("row {number}: {name}"))?;
            let (module, test) = path.split_once("::").with_context(|| format!("row {number}: {name}"))?;
            ensure!(has_test(&tests_of(of), module, test)?, "row {number}: there is no test {name}");
        }
    }
    ensure!(rows == (1..=54).collect::<BTreeSet<u8>>(), "rows {rows:?}");
    Ok(())
}
