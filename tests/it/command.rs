//! The command line itself: `check`, `demo`, and how `up` ends.

use crate::client::{Client, Who, wait_for_text};
use crate::edits::SMALL;
use crate::harness::{Mesh, cairn, next_block, root};
use crate::servers::Slow;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Result<Output> {
    Command::new(cairn()?).args(arguments).output().context("cannot run cairn")
}

fn check(directory: &Path, output: &str) -> Result<(bool, String)> {
    let result = run(&["check", &directory.display().to_string(), "--output", output])?;
    ensure!(result.stderr.is_empty(), "{}", String::from_utf8_lossy(&result.stderr));
    Ok((result.status.success(), String::from_utf8(result.stdout)?))
}

#[test]
fn check_tells_good_manifests_from_bad() -> Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("a.yaml"), SMALL.1)?;
    let (good, text) = check(directory.path(), "text")?;
    assert!(good && text.ends_with("0 findings\n"), "{text}");
    let (good, json) = check(directory.path(), "json")?;
    assert!(good && serde_json::from_str::<Vec<Value>>(&json)?.is_empty(), "{json}");

    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: misspelt, namespace: shop }
spec:
  action: DENNY
  rules: [{}]
";
    std::fs::write(directory.path().join("b.yaml"), policy)?;
    let (good, text) = check(directory.path(), "text")?;
    assert!(!good && text.contains("b.yaml:5:") && text.contains("spec.action"), "{text}");
    let (good, json) = check(directory.path(), "json")?;
    assert!(!good, "{json}");
    let findings: Vec<Value> = serde_json::from_str(&json)?;
    let found = findings.iter().find(|finding| finding["field"] == "spec.action");
    let found = found.with_context(|| json.clone())?;
    assert_eq!((&found["severity"], &found["line"]), (&"error".into(), &5.into()), "{found}");
    assert!(found["file"].as_str().is_some_and(|file| file.ends_with("b.yaml")), "{found}");
    let (good, sarif) = check(directory.path(), "sarif")?;
    let sarif: Value = serde_json::from_str(&sarif)?;
    assert!(!good && sarif["version"] == "2.1.0", "{sarif}");
    let results = sarif["runs"][0]["results"].as_array().context("no results")?;
    assert!(results.iter().any(|result| result["ruleId"] == "invalid-value"), "{results:?}");
    Ok(())
}

#[test]
fn a_warning_fails_the_check_only_where_it_is_asked_to() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: twice, namespace: shop }
spec:
  targetRefs: [{ group: \"\", kind: Service, name: catalog }]
  rules: [{ to: [{ operation: { methods: [GET] } }] }, { to: [{ operation: { methods: [GET], paths: [/a] } }] }]
";
    std::fs::write(directory.path().join("a.yaml"), SMALL.1)?;
    std::fs::write(directory.path().join("b.yaml"), policy)?;
    let (good, text) = check(directory.path(), "text")?;
    assert!(good && text.contains("b.yaml:6:") && text.contains("[shadowed-rule]"), "{text}");
    assert!(text.contains("= fix: remove it"), "{text}");
    let denied = run(&["check", &directory.path().display().to_string(), "--deny-warnings"])?;
    assert!(!denied.status.success());
    Ok(())
}

#[test]
fn check_says_when_there_is_nothing_to_check() -> Result<()> {
    let (good, text) = check(Path::new("/no/such/directory"), "text")?;
    assert!(!good && text.contains("/no/such/directory"), "{text}");
    Ok(())
}

#[test]
fn the_demo_finds_everything_as_it_should_be() -> Result<()> {
    let plugins = root().join("target/plugins");
    let block = next_block()?.to_string();
    let plugins = plugins.display().to_string();
    let result = run(&["demo", "--output", "json", "--block", &block, "--plugins", &plugins])?;
    let (out, error) = (String::from_utf8_lossy(&result.stdout), String::from_utf8_lossy(&result.stderr));
    ensure!(result.status.success(), "the demo failed:\n{out}\n{error}");
    let rows: Vec<Value> = serde_json::from_slice(&result.stdout).with_context(|| out.to_string())?;
    assert!(rows.len() >= 10, "only {} rows:\n{out}", rows.len());
    for row in &rows {
        assert_eq!(row["ok"], true, "{row:#}");
        assert!(row["why"].as_array().is_some_and(|why| !why.is_empty()), "no reason given: {row:#}");
    }
    Ok(())
}

#[tokio::test]
async fn a_mesh_that_ends_finishes_what_it_began() -> Result<()> {
    let mut mesh = Mesh::start(&[SMALL], &[])?;
    let application = Slow::start(mesh.twin("shop/own", 9000)?).await?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let to = mesh.service("shop/own", 8000)?;
    let mut client = Client::open(web, to).await?;
    let request = tokio::spawn(async move { client.get("/").await });
    application.asked().await;

    let stopping = mesh.begin_stop()?;
    for process in ["ztunnel", "waypoint"] {
        wait_for_text("draining", || mesh.log(process)).await?;
    }
    assert!(crate::client::get(web, to, "/").await.is_err(), "a mesh that ends takes nothing new");
    application.answer();
    let answer = request.await??;
    assert_eq!((answer.status, answer.body.as_str()), (200, "slow\n"));
    application.wait().await?;
    let (log, ended_well) = (mesh.up_log()?, tokio::task::spawn_blocking(move || stopping.wait()).await??);
    assert!(ended_well, "cairn up failed:\n{log}");
    Ok(())
}
