//! A module's way through a real registry of images, with its own root certificate and a password: pushed by
//! `cairn plugin push`, deployed as the manifest that this prints, fetched by the waypoint as what is pinned.

#[path = "../../runtime/fetch/src/tests/peer.rs"]
mod peer;

use crate::client::{Who, admin, get};
use crate::edits::SMALL;
use crate::harness::{Mesh, SOON, cairn};
use crate::plugins::module;
use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cairn_fetch::Digest;
use peer::Registry;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// `me`, whose password is `open sesame`.
const HTPASSWD: &str = "me:$2b$04$9QRXD55yfJKXrBhwTSQFxOm7MjfHbFFa4z.f4cVULiHyf28twWzB.\n";
const PASSWORD: &str = "open sesame";

/// A registry of which nobody knows whose it is, but who has `roots.pem` in `home`.
fn registry(home: &Path) -> Result<Option<Registry>> {
    let mut root = CertificateParams::new(Vec::new())?;
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let (root_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
    std::fs::write(home.join("roots.pem"), root.self_signed(&root_key)?.pem())?;
    let leaf = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    let leaf = leaf.signed_by(&key, &Issuer::new(root, root_key))?.pem();
    let files = [("cert.pem", leaf.as_str()), ("key.pem", &key.serialize_pem()), ("htpasswd", HTPASSWD)];
    let tls = ", tls: {certificate: HOME/cert.pem, key: HOME/key.pem}";
    Ok(Registry::start(tls, "auth: {htpasswd: {realm: x, path: HOME/htpasswd}}", &files))
}

/// What docker keeps of a login.
fn login(registry: SocketAddr, password: &str) -> String {
    json!({ "auths": { registry.to_string(): { "username": "me", "password": password } } }).to_string()
}

/// Pushes a module, and returns what is said of it.
///
/// # Errors
/// With what is said when it does not work.
fn push(home: &Path, module: &[u8], image: &str, credentials: &str) -> Result<Value> {
    let (file, logins) = (home.join("module.wasm"), home.join("config.json"));
    std::fs::write(&file, module)?;
    std::fs::write(&logins, credentials)?;
    let mut command = Command::new(cairn()?);
    command.args(["plugin", "push"]).arg(&file).arg(image).arg("--credentials").arg(&logins);
    command.arg("--roots").arg(home.join("roots.pem"));
    command.args(["--namespace", "shop", "--gateway", "gate", "--pull-secret", "login", "--output", "json"]);
    let output = command.output().context("cannot run cairn")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn text<'a>(pushed: &'a Value, field: &str) -> Result<&'a str> {
    pushed[field].as_str().with_context(|| format!("no {field}: {pushed}"))
}

/// Asks until the plugin that marks requests with this letter has run.
async fn wait_for(mesh: &Mesh, letter: char) -> Result<()> {
    let (web, catalog) = (Who::Pod(mesh.pod("shop/web")?), mesh.service("shop/catalog", 8000)?);
    let deadline = Instant::now() + SOON;
    loop {
        let answer = get(web, catalog, "/").await?;
        if answer.status == 200 && answer.body.contains(&format!("header: x-swap-{letter}: ")) {
            return Ok(());
        }
        let plugins = admin(mesh.waypoint("shop/gate")?, "/plugins").await?;
        ensure!(Instant::now() < deadline, "{} {}\n{plugins:#}", answer.status, answer.body);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn what_is_pushed_runs_as_the_manifest_says_that_is_printed() -> Result<()> {
    let home = tempfile::tempdir()?;
    let Some(registry) = registry(home.path())? else { return Ok(()) };
    let (address, home) = (registry.address, home.path());
    let (image, right) = (format!("{address}/team/swap:v1"), login(registry.address, PASSWORD));
    let refused =
        push(home, &module('a'), &image, &login(address, "wrong")).err().context("anybody may push")?;
    ensure!(refused.to_string().contains("401 Unauthorized"), "{refused}");

    let pushed = push(home, &module('a'), &image, &right)?;
    let secret = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{ name: login, namespace: shop }}\ntype: kubernetes.io/dockerconfigjson\n\
         data: {{ .dockerconfigjson: {} }}\n",
        STANDARD.encode(&right)
    );
    let manifests = [SMALL, ("secret.yaml", &secret), ("plugin.yaml", text(&pushed, "wasmPlugin")?)];
    let roots = home.join("roots.pem");
    let mesh = Mesh::start_with(&manifests, &[], &[("CAIRN_REGISTRY_ROOTS", roots.as_os_str())])?;
    wait_for(&mesh, 'a').await?;
    let plugin = admin(mesh.waypoint("shop/gate")?, "/plugins").await?[0].clone();
    ensure!(plugin["state"] == "ready", "{plugin:#}");
    ensure!(plugin["running"]["sha256"] == Digest::of(&module('a')).to_string(), "{plugin:#}");

    // The tag moves. What is pinned does not, until the new manifest is deployed.
    let moved = push(home, &module('b'), &image, &right)?;
    ensure!(text(&moved, "url")? == text(&pushed, "url")? && moved["digest"] != pushed["digest"], "{moved}");
    let touched = text(&pushed, "wasmPlugin")?.replace("pluginConfig: {}", "pluginConfig: { n: 2 }");
    mesh.write("plugin.yaml", &touched)?;
    wait_for(&mesh, 'a').await?;
    mesh.write("plugin.yaml", text(&moved, "wasmPlugin")?)?;
    wait_for(&mesh, 'b').await?;

    // Nobody is asked for what is pinned and here.
    drop(registry);
    mesh.write("plugin.yaml", &touched)?;
    wait_for(&mesh, 'a').await
}
