//! Whether modules that nobody here wrote do in our host what they do in stock Envoy: the same module, the same
//! configuration, the same requests, compared in what the client is told, what the upstream sees and what the module logs.
//!
//! `README.md` beside this file says where modules come from and which differences are meant.

// All of it is a test, helpers included: what does not hold ends it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod ask;
mod catalogue;
mod client;
mod connections;
mod envoy;
mod known;
mod module;
mod ours;
mod run;
mod upstream;

use anyhow::{Result, ensure};
use module::Module;
use std::path::{Path, PathBuf};

/// Where `build` puts what the package registries carry.
fn built() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/modules")
}

#[tokio::test]
async fn modules_of_the_registries_do_what_they_do_in_envoy() -> Result<()> {
    let names = std::fs::read_to_string(built().join("names")).unwrap_or_default();
    let skipped = std::fs::read_to_string(built().join("skipped")).unwrap_or_default();
    skipped.lines().for_each(|line| println!("skipped: {line}"));
    if names.is_empty() {
        println!("skipped: no modules in target/modules; `tests/modules/build` makes them");
    }
    let modules = names.lines().map(|name| Module::at(&built().join(format!("{name}.wasm"))));
    compare(modules.collect::<Result<_>>()?).await
}

#[tokio::test]
async fn modules_of_a_given_folder_do_what_they_do_in_envoy() -> Result<()> {
    let Some(folder) = std::env::var_os("CAIRN_MODULES") else {
        println!("skipped: CAIRN_MODULES names no folder of modules");
        return Ok(());
    };
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "wasm"));
    files.sort();
    ensure!(!files.is_empty(), "CAIRN_MODULES names a folder without modules");
    compare(files.iter().map(|file| Module::at(file)).collect::<Result<_>>()?).await
}

async fn compare(modules: Vec<Module>) -> Result<()> {
    let Some(program) = cairn_tests::envoy::program() else {
        println!("skipped: no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    };
    let only = std::env::var("CAIRN_MODULES_ONLY").unwrap_or_default();
    let mut failed = Vec::new();
    for module in modules.iter().filter(|module| module.name.contains(&only)) {
        if let Some(why) = module.known.skipped {
            println!("skipped: {}: {why}", module.name);
            continue;
        }
        match run::compare(&program, module).await {
            Ok(run::Report { lacking: Some(callback), .. }) => {
                println!("skipped: {}: this host does not call {callback}", module.name);
            }
            Ok(report) => {
                let run::Report { requests, lines, intended, unexplained, .. } = &report;
                println!(
                    "{}: {requests} requests, {lines} lines, {} differences, intended: {intended:?}",
                    module.name,
                    unexplained.len()
                );
                failed.extend(unexplained.iter().map(|text| format!("{}: {text}", module.name)));
            }
            Err(error) => {
                println!("{}: {error:#}", module.name);
                failed.push(format!("{}: {error:#}", module.name));
            }
        }
    }
    ensure!(failed.is_empty(), "{} differences\n\n{}", failed.len(), failed.join("\n\n"));
    Ok(())
}
