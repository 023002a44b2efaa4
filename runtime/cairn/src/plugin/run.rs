//! `cairn plugin run`: a plugin in front of any URL.

use super::module::{Contents, Files};
use super::server::{Known, Server};
use crate::output::Output;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, lookup_host};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// `cairn plugin run`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    files: Files,
    /// What is behind the plugin: `http://host:port`.
    #[arg(long, short)]
    upstream: String,
    /// Where to listen.
    #[arg(long, short, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// A service that the plugin may ask, and where it is: `host:port=address:port`. The plugin names it
    /// `outbound|port||host` or `host:port`.
    #[arg(long)]
    service: Vec<Known>,
    /// The form of what is told. The access log is on standard output in any case.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Serves until it is interrupted, and takes up changes of the module and the configuration.
///
/// # Errors
/// When the plugin does not start, or the address cannot be had.
pub async fn run(options: Options) -> Result<ExitCode> {
    let upstream = address(&options.upstream).await?;
    let contents = options.files.read()?;
    let (trigger, drain) = cairn_net::drain();
    let name = options.files.name();
    let server = Server::new((&name, &contents), upstream, &options.service, std::io::stdout(), drain)?;
    let listener = TcpListener::bind(options.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", options.listen))?;
    let at = listener.local_addr()?;
    tell(options.output, "serving", &format!("http://{at}, in front of {upstream}"));
    tokio::spawn(Arc::clone(&server).serve(listener));
    let follow = follow(&options, &server, contents);
    tokio::select! {
        () = follow => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    trigger.start();
    trigger.finished(Duration::from_secs(5)).await;
    Ok(ExitCode::SUCCESS)
}

/// Where a URL leads.
async fn address(url: &str) -> Result<SocketAddr> {
    let uri: http::Uri = url.parse().with_context(|| format!("`{url}` is no URL"))?;
    let (Some("http"), Some(host), "" | "/") = (uri.scheme_str(), uri.host(), uri.path()) else {
        bail!("`{url}`: an upstream is http://host:port, without a path");
    };
    let port = uri.port_u16().unwrap_or(80);
    let host = host.trim_matches(['[', ']']);
    let found = lookup_host((host, port)).await.with_context(|| format!("cannot find {host}"))?;
    found.into_iter().next().with_context(|| format!("{host} has no address"))
}

/// Puts each new version of the files in place of the last. What does not start is told once and not taken up.
async fn follow(options: &Options, server: &Server, mut last: Contents) {
    loop {
        tokio::time::sleep(LOOK).await;
        // A file that is just being written is read again.
        let Ok(now) = options.files.read() else { continue };
        if now == last {
            continue;
        }
        match server.replace(&now) {
            Ok(()) => tell(options.output, "reloaded", &options.files.module.display().to_string()),
            Err(error) => tell(options.output, "not taken up", &format!("{error:#}")),
        }
        last = now;
    }
}

fn tell(output: Output, event: &str, what: &str) {
    match output {
        Output::Text => eprintln!("{event}: {what}"),
        Output::Json => eprintln!("{}", json!({"event": event, "what": what})),
    }
}
