//! `cairn plugin`: from nothing to a module that runs here, and the plugins of this repository here and in Envoy.

use crate::harness::{cairn, root, until};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Runs `cairn plugin`; returns whether it is content, and what it says.
fn plugin(arguments: &[&str]) -> Result<(bool, Value)> {
    let mut command = Command::new(cairn()?);
    command.arg("plugin").args(arguments).args(["--output", "json"]);
    let output = command.output().context("cannot run cairn")?;
    let text = String::from_utf8(output.stdout)?;
    let said = if text.is_empty() { Value::Null } else { serde_json::from_str(&text)? };
    ensure!(output.status.success() || said != Value::Null, "{}", String::from_utf8_lossy(&output.stderr));
    Ok((output.status.success(), said))
}

/// The plugins for people: those with a scenario. The probe, which asks for all there is, has a test of its own.
fn plugins() -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root().join("plugins"))? {
        let folder = entry?.path();
        if folder.join("Cargo.toml").is_file() && !folder.ends_with("probe") {
            let name = folder.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned();
            found.push((name, folder));
        }
    }
    found.sort();
    ensure!(found.len() >= 12, "only {} plugins", found.len());
    Ok(found)
}

fn module(name: &str) -> Result<String> {
    let path = root().join(format!("target/plugins/{name}.wasm"));
    ensure!(path.is_file(), "{} is not there: run plugins/build", path.display());
    Ok(path.display().to_string())
}

/// Plays the scenario of every plugin; returns how many steps there were.
fn play(more: &[&str]) -> Result<usize> {
    let mut steps = 0;
    for (name, folder) in plugins()? {
        let (folder, module) = (folder.display().to_string(), module(&name)?);
        let (_, told) = plugin(&["inspect", &module])?;
        let uncalled = told["uncalled"].to_string();
        if more.is_empty() && uncalled.contains("body") {
            cairn_tests::skipped(&format!("{name}, since this host does not call {uncalled}"));
            continue;
        }
        let arguments = [&["test", folder.as_str(), "--module", module.as_str()], more].concat();
        let (passed, said) = plugin(&arguments).with_context(|| name.clone())?;
        ensure!(passed, "{name}: {said:#}");
        let count = said["steps"].as_array().map_or(0, Vec::len);
        ensure!(count > 0, "{name} has no scenario");
        steps += count;
    }
    Ok(steps)
}

#[test]
fn every_plugin_does_what_its_scenario_says() -> Result<()> {
    let steps = play(&[])?;
    ensure!(steps > 35, "{steps} steps");
    Ok(())
}

#[test]
fn every_plugin_does_the_same_in_envoy() -> Result<()> {
    let envoy = root().join("target/peers/envoy");
    if !envoy.is_file() {
        cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    }
    let steps = play(&["--envoy", &envoy.display().to_string()])?;
    ensure!(steps > 50, "{steps} steps");
    Ok(())
}

#[test]
fn a_module_says_what_it_is_and_what_it_costs() -> Result<()> {
    let tag = module("tag")?;
    let (good, said) = plugin(&["inspect", &tag])?;
    ensure!(good && said["abi"] == "0.2.1", "{said:#}");
    let callbacks = said["callbacks"].to_string();
    ensure!(!callbacks.contains("body"), "tag has nothing to do with bodies: {callbacks}");
    ensure!(said["lacking"]["envoy"] == serde_json::json!([]), "{said:#}");
    ensure!(said["lacking"]["cairn"] == serde_json::json!([]), "{said:#}");
    let (good, said) = plugin(&["bench", &tag, "--rounds", "2000"])?;
    ensure!(good && said["exchangeNs"].as_u64().is_some_and(|nanos| nanos > 0), "{said:#}");
    Ok(())
}

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server that answers everything with its name.
fn upstream() -> Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let at = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut read = [0; 4096];
            if stream.read(&mut read).is_ok_and(|length| length > 0) {
                // A client that has gone needs no answer.
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\nconnection: close\r\n\r\nupstream");
            }
        }
    });
    Ok(at)
}

fn ask(at: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn a_plugin_runs_in_front_of_a_url_and_follows_its_files() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("config.json");
    let write = |value: &str| {
        std::fs::write(&config, format!(r#"{{"response": [{{"header": "x-v", "value": "{value}"}}]}}"#))
    };
    write("one")?;
    let listen = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    let mut command = Command::new(cairn()?);
    command.args(["plugin", "run", &module("tag")?, "--config"]).arg(&config);
    command.args(["--upstream", &format!("http://{}", upstream()?), "--listen", &listen.to_string()]);
    let _running = Running(command.stdout(Stdio::null()).spawn()?);
    let limit = Duration::from_secs(30);
    let says = |value: &str| {
        until(limit, || Ok(ask(listen).is_ok_and(|answer| answer.contains(&format!("x-v: {value}")))))
    };
    ensure!(says("one")?, "the plugin does not run: {:?}", ask(listen));
    ensure!(ask(listen)?.ends_with("upstream"), "the upstream was not asked");
    write("two")?;
    ensure!(says("two")?, "the change was not taken up: {:?}", ask(listen));
    std::fs::write(&config, "{\"respond\": 1}")?;
    ensure!(ask(listen)?.contains("x-v: two"), "a configuration that makes no sense was taken up");
    write("three")?;
    ensure!(says("three")?, "the way back is closed: {:?}", ask(listen));
    Ok(())
}

#[test]
fn a_new_plugin_is_a_crate_of_its_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let directory = folder.path().join("hello");
    let (shown, sdk) = (directory.display().to_string(), root().join("sdk").display().to_string());
    let new = || plugin(&["new", "hello", "--directory", &shown, "--sdk", &sdk]);
    let (good, said) = new()?;
    ensure!(good && said["files"].as_array().is_some_and(|files| files.len() == 6), "{said:#}");
    for file in ["Cargo.toml", "src/lib.rs", "README.md", "config.json", "scenario.json"] {
        let text = std::fs::read_to_string(directory.join(file)).with_context(|| file.to_owned())?;
        ensure!(!text.contains("{{"), "{file} has a gap: {text}");
    }
    let error = new().err().context("it was overwritten")?;
    ensure!(error.to_string().contains("is there already"), "{error}");
    Ok(())
}
