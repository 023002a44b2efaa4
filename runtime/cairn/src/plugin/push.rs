//! `cairn plugin push`: a module becomes an image in a registry.

use crate::output::Output;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use cairn_fetch::{Credentials, FetchSettings, Fetcher, ImageFormat, Reference};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// `cairn plugin push`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The module, `.wasm`.
    module: PathBuf,
    /// Where to: `registry.example/shop/waf:v1`, with or without `oci://`.
    reference: String,
    /// The kind of image. `compat` is read by every version of Istio.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// A file of logins as Docker keeps them. Default: `~/.docker/config.json`, if it is there.
    #[arg(long)]
    credentials: Option<PathBuf>,
    /// Root certificates, PEM, that the registry may chain to beside the system's.
    #[arg(long)]
    roots: Option<PathBuf>,
    /// Whether the registry need not prove who it is and may speak plain HTTP. One on loopback always may.
    #[arg(long)]
    insecure: bool,
    /// The namespace of the WasmPlugin that is printed.
    #[arg(long, default_value = "default")]
    namespace: String,
    /// The Gateway, a waypoint, whose plugin it is to be.
    #[arg(long, default_value = "waypoint")]
    gateway: String,
    /// The Secret with which the waypoint asks the registry, if it needs one.
    #[arg(long)]
    pull_secret: Option<String>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Format {
    #[default]
    Compat,
    Docker,
    Artifact,
    Cncf,
}

/// Pushes, and prints the digest and a WasmPlugin that pins it.
///
/// # Errors
/// When the module is none, or the registry does not take it.
pub async fn run(options: &Options) -> Result<ExitCode> {
    let module = std::fs::read(&options.module)
        .with_context(|| format!("cannot read {}", options.module.display()))?;
    let reference = options.reference.strip_prefix("oci://").unwrap_or(&options.reference);
    let reference = Reference::parse(reference).with_context(|| format!("`{reference}` names no image"))?;
    let Some(tag) = reference.tag().filter(|_| reference.digest().is_none()) else {
        bail!("`{}`: name a tag, and no digest, which follows from the module", options.reference);
    };
    let format = match options.format {
        Format::Compat => ImageFormat::Compat,
        Format::Docker => ImageFormat::Docker,
        Format::Artifact => ImageFormat::Artifact,
        Format::Cncf => ImageFormat::Cncf,
    };
    let insecure = options.insecure.then(|| reference.registry().to_owned());
    let settings = FetchSettings {
        roots: options.roots.clone(),
        insecure_registries: insecure.into_iter().collect(),
        ..FetchSettings::default()
    };
    let pushed =
        Fetcher::new(settings).push(&Bytes::from(module), format, &reference, &credentials(options)?).await;
    let digest = pushed.with_context(|| format!("cannot push to {}", reference.registry()))?.qualified();
    let url = format!("oci://{}/{}:{tag}", reference.registry(), reference.repository());
    let manifest = manifest(options, reference.repository(), &url, &digest);
    match options.output {
        Output::Text => println!("# pushed {url}\n# digest {digest}\n{manifest}"),
        Output::Json => println!("{:#}", json!({"url": url, "digest": digest, "wasmPlugin": manifest})),
    }
    Ok(ExitCode::SUCCESS)
}

fn credentials(options: &Options) -> Result<Credentials> {
    let home =
        std::env::home_dir().map(|home| home.join(".docker/config.json")).filter(|path| path.is_file());
    let Some(path) = options.credentials.clone().or(home) else { return Ok(Credentials::default()) };
    let json = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Credentials::parse(&json).with_context(|| format!("{} holds no logins", path.display()))
}

/// A WasmPlugin that pins the image: `sha256` is the digest of its manifest.
fn manifest(options: &Options, repository: &str, url: &str, digest: &str) -> String {
    let Options { namespace, gateway, .. } = options;
    let name = repository.rsplit('/').next().unwrap_or(repository).replace(['_', '.'], "-");
    let sha256 = digest.strip_prefix("sha256:").unwrap_or(digest);
    let secret = options.pull_secret.as_ref();
    let secret = secret.map(|name| format!("\n  imagePullSecret: {name}")).unwrap_or_default();
    format!(
        "apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {{ name: {name}, namespace: {namespace} }}
spec:
  targetRefs: [{{ group: gateway.networking.k8s.io, kind: Gateway, name: {gateway} }}]
  url: {url}
  sha256: {sha256}{secret}
  pluginConfig: {{}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn the_manifest_pins_what_was_pushed() {
        let check = |further: &[&str], expected: &str| {
            let line = [&["push", "m.wasm", "r.example/shop/my_waf:v1"], further].concat();
            let options = Line::parse_from(line).options;
            let text = manifest(&options, "shop/my_waf", "oci://r.example/shop/my_waf:v1", "sha256:abc");
            assert!(text.contains(expected), "{text}");
        };
        check(&[], "metadata: { name: my-waf, namespace: default }");
        check(&[], "  url: oci://r.example/shop/my_waf:v1\n  sha256: abc\n  pluginConfig");
        check(&["--namespace", "shop"], "namespace: shop }");
        check(&["--gateway", "gate"], "kind: Gateway, name: gate }");
        check(&["--pull-secret", "login"], "sha256: abc\n  imagePullSecret: login\n");
    }
}
