//! `cairn xds`: the control plane alone, for proxies started otherwise. Addresses are served as written.

use crate::control::{Addressing, AsWritten, Control};
use anyhow::{Context, Result, bail};
use cairn_manifest::Watch;
use cairn_mesh::{Identity, ResourceName};
use cairn_net::ListenOptions;
use cairn_xds::Role;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// `cairn xds`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The directory (or file) of manifests.
    directory: PathBuf,
    /// Where to serve xDS and certificates.
    #[arg(long, default_value = "127.0.0.1:15012")]
    listen: SocketAddr,
    /// Where the CA and tokens are kept.
    #[arg(long, env = "CAIRN_STATE", default_value = ".cairn")]
    state: PathBuf,
    /// A token to mint, in `STATE/tokens/NAME.token`: `NAME=ztunnel:NODE` or `NAME=waypoint:NAMESPACE/GATEWAY`.
    #[arg(long = "mint")]
    mint: Vec<String>,
    /// A CA certificate to use in place of a self-made one, PEM.
    #[arg(long, requires = "ca_key")]
    ca_cert: Option<PathBuf>,
    /// Its key, PEM.
    #[arg(long, requires = "ca_cert")]
    ca_key: Option<PathBuf>,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When the CA or the port cannot be had, or a token's role is not one.
pub async fn run(options: Options) -> Result<()> {
    let ca = options.ca_cert.as_deref().zip(options.ca_key.as_deref());
    let addressing = Addressing::AsWritten(AsWritten);
    let mut control = Control::open(&options.directory, &options.state, addressing, ca)?;
    let reading = control.refresh()?;
    for text in &options.mint {
        let (name, role) = parse_role(text, &reading.settings.trust_domain)?;
        println!("{}", control.token(name, role)?.display());
    }
    let mut watch = Watch::start(&options.directory).context("cannot watch the manifests")?;
    let listener = cairn_net::listen(options.listen, &ListenOptions::default())?;
    let tls = control.authority.server_tls(&[options.listen.ip().to_string(), "localhost".to_owned()])?;
    let mut serving = tokio::spawn(Arc::clone(&control.server).serve(listener, tls, std::future::pending()));
    println!("serving {} on https://{}", options.directory.display(), options.listen);
    let stop = cairn_process::stop_signal();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = watch.changed() => {
                control.refresh()?;
            }
            ended = &mut serving => {
                ended??;
                bail!("the server ended");
            }
            signal = &mut stop => {
                println!("{}: stopping", signal?);
                return Ok(());
            }
        }
    }
}

fn parse_role<'a>(text: &'a str, trust_domain: &str) -> Result<(&'a str, Role)> {
    let wrong = || format!("`{text}` is not NAME=ztunnel:NODE or NAME=waypoint:NAMESPACE/GATEWAY");
    let (name, role) = text.split_once('=').with_context(wrong)?;
    match role.split_once(':').with_context(wrong)? {
        ("ztunnel", node) => Ok((name, Role::Ztunnel { node: node.to_owned() })),
        ("waypoint", gateway) => {
            let gateway = ResourceName::parse(gateway).with_context(wrong)?;
            let identity = Identity::new(trust_domain, &gateway.namespace, &gateway.name)?;
            Ok((name, Role::Waypoint { gateway, identity }))
        }
        _ => bail!(wrong()),
    }
}
