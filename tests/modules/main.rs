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
mod grpc;
mod known;
mod module;
mod ours;
mod run;
mod statuses;
mod upstream;

use anyhow::{Result, ensure};
use futures_util::stream::{self, StreamExt};
use module::Module;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Where `build` puts what the package registries carry.
fn built() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/modules")
}

/// Modules that are compared at the same time: each waits for most of it.
const TOGETHER: usize = 3;

#[tokio::test]
async fn modules_of_the_registries_do_what_they_do_in_envoy() -> Result<()> {
    let names = std::fs::read_to_string(built().join("names")).unwrap_or_default();
    let skipped = std::fs::read_to_string(built().join("skipped")).unwrap_or_default();
    skipped.lines().for_each(cairn_tests::skipped);
    if names.is_empty() {
        cairn_tests::skipped("no modules in target/modules; `tests/modules/build` makes them");
    }
    println!("skipped: the C++ SDK's examples, since no registry has that SDK; CAIRN_MODULES takes them");
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

async fn compare(mut modules: Vec<Module>) -> Result<()> {
    let Some(program) = cairn_tests::envoy::program() else {
        cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    };
    let only = std::env::var("CAIRN_MODULES_ONLY").unwrap_or_default();
    modules.retain(|module| module.name.contains(&only));
    let (left, mut modules): (Vec<_>, Vec<_>) =
        modules.into_iter().partition(|module| module.known.skipped.is_some());
    for module in left {
        println!("skipped: {}: {}", module.name, module.known.skipped.unwrap_or_default());
    }
    // The largest take longest, and go beside all others.
    modules.sort_by_key(|module| {
        std::cmp::Reverse(std::fs::metadata(&module.file).map_or(0, |file| file.len()))
    });
    let program = &program;
    let run = |module: Module| async move {
        let start = Instant::now();
        let report = run::compare(program, &module).await;
        (module.name, report, start.elapsed())
    };
    let mut reports = stream::iter(modules.into_iter().map(run)).buffered(TOGETHER);
    let mut failed = Vec::new();
    while let Some((name, report, taken)) = reports.next().await {
        match report {
            Ok(run::Report { requests, lines, intended, unexplained }) => {
                let count = unexplained.len();
                println!(
                    "{name}: {requests} requests, {lines} lines, {count} differences, intended: {intended:?}, in {taken:.1?}"
                );
                failed.extend(unexplained.iter().map(|text| format!("{name}: {text}")));
            }
            Err(error) => {
                println!("{name}: {error:#}");
                failed.push(format!("{name}: {error:#}"));
            }
        }
    }
    ensure!(failed.is_empty(), "{} differences\n\n{}", failed.len(), failed.join("\n\n"));
    Ok(())
}
