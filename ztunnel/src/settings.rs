//! What a ztunnel is told: flags and environment first, then the settings file, then defaults.

use anyhow::Context;
use cairn_process::LogFormat;
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

/// Flags of `ztunnel`. Each may also stand in the settings file, in kebab-case.
#[derive(Clone, Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Options {
    /// A YAML file with any of these settings; flags and environment win over it.
    #[arg(long, env = "CAIRN_SETTINGS")]
    #[serde(skip)]
    pub settings: Option<PathBuf>,
    /// The xDS server, `https://host:port` [default: https://localhost:15012].
    #[arg(long, env = "XDS_ADDRESS")]
    pub xds_address: Option<String>,
    /// The root certificate(s) that the xDS and CA servers chain to, PEM.
    #[arg(long, env = "XDS_ROOT_CA")]
    pub xds_root: Option<PathBuf>,
    /// The CA, `https://host:port` [default: the xDS server].
    #[arg(long, env = "CA_ADDRESS")]
    pub ca_address: Option<String>,
    /// A file with the bearer token for xDS and CA; read again for each call.
    #[arg(long, env = "CAIRN_TOKEN")]
    pub token: Option<PathBuf>,
    /// The node whose pods this ztunnel serves [default: node].
    #[arg(long, env = "NODE_NAME")]
    pub node: Option<String>,
    /// The cluster's name, sent to the xDS server [default: Kubernetes].
    #[arg(long, env = "CLUSTER_ID")]
    pub cluster_id: Option<String>,
    /// The address of the ports for operators [default: 127.0.0.1].
    #[arg(long, env = "CAIRN_ADDRESS")]
    pub address: Option<IpAddr>,
    /// The address of the admin port, 15000 [default: the address above if it is loopback, else 127.0.0.1].
    #[arg(long, env = "CAIRN_ADMIN_ADDRESS")]
    pub admin_address: Option<IpAddr>,
    /// Worker threads [default: the number of cores, at most 2].
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS")]
    pub workers: Option<usize>,
    /// How traffic reaches the ztunnel [default: addresses].
    #[arg(long, env = "CAIRN_CAPTURE")]
    pub capture: Option<CaptureKind>,
    /// With `--capture namespaces`: the directory of network namespaces, one per pod, named `namespace.pod`
    /// (see `namespace_file` for long names).
    #[arg(long, env = "CAIRN_NETNS_DIRECTORY")]
    pub netns_directory: Option<PathBuf>,
    /// With `--capture addresses`: applications listen on twin addresses (second octet + 20), and the ztunnel on
    /// theirs.
    #[arg(long, env = "CAIRN_TWIN_ADDRESSES", num_args = 0..=1, default_missing_value = "true")]
    pub twin_addresses: Option<bool>,
    /// Lifetime of certificates in seconds [default: 86400].
    #[arg(long, env = "SECRET_TTL_SECONDS")]
    pub certificate_seconds: Option<u64>,
    /// How long open connections may go on after SIGTERM, in seconds [default: 5].
    #[arg(long, env = "DRAIN_SECONDS")]
    pub drain_seconds: Option<u64>,
    /// One line per connection on standard output [default: true].
    #[arg(long, env = "CAIRN_ACCESS_LOG")]
    pub access_log: Option<bool>,
    /// Which log events are printed [default: info].
    #[arg(long, env = "RUST_LOG")]
    pub log: Option<String>,
    /// The form of log lines [default: text].
    #[arg(long, env = "CAIRN_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// How traffic reaches the ztunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureKind {
    /// Ports on each pod's own address: HBONE on 15008, SOCKS5 on 15080. Needs no privileges.
    #[default]
    Addresses,
    /// Redirection in each pod's network namespace: 15001, 15006 and 15008. Needs root.
    Namespaces,
}

/// How pods are captured, with what each way needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capture {
    /// Ports on each pod's own address.
    Addresses {
        /// Applications listen on twin addresses.
        twins: bool,
    },
    /// Redirection in namespaces found in this directory.
    Namespaces(PathBuf),
}

/// Settings, resolved.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The xDS server.
    pub xds_address: String,
    /// Root certificates of xDS and CA.
    pub xds_root: PathBuf,
    /// The CA.
    pub ca_address: String,
    /// The bearer token's file.
    pub token: Option<PathBuf>,
    /// The node served.
    pub node: String,
    /// The cluster's name.
    pub cluster_id: String,
    /// Where ports for metrics and readiness are bound.
    pub address: IpAddr,
    /// Where the admin port is bound.
    pub admin_address: IpAddr,
    /// Worker threads.
    pub workers: usize,
    /// How pods are captured.
    pub capture: Capture,
    /// Lifetime asked for certificates.
    pub certificate_ttl: Duration,
    /// How long open connections may go on after SIGTERM.
    pub drain: Duration,
    /// Whether a line is written per connection.
    pub access_log: bool,
    /// Log filter.
    pub log: String,
    /// Log form.
    pub log_format: LogFormat,
}

impl Options {
    /// Merges flags, environment, file and defaults.
    ///
    /// # Errors
    /// When the file is not valid or a needed setting is missing.
    pub fn resolve(self) -> anyhow::Result<Settings> {
        let file: Options = cairn_process::load_file(self.settings.as_deref())?;
        let xds_address =
            self.xds_address.or(file.xds_address).unwrap_or_else(|| "https://localhost:15012".to_owned());
        let capture = match self.capture.or(file.capture).unwrap_or_default() {
            CaptureKind::Addresses => {
                Capture::Addresses { twins: self.twin_addresses.or(file.twin_addresses).unwrap_or(false) }
            }
            CaptureKind::Namespaces => Capture::Namespaces(
                self.netns_directory
                    .or(file.netns_directory)
                    .context("--capture namespaces needs --netns-directory")?,
            ),
        };
        let address = self.address.or(file.address).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let local = if address.is_loopback() { address } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Settings {
            ca_address: self.ca_address.or(file.ca_address).unwrap_or_else(|| xds_address.clone()),
            xds_address,
            xds_root: self.xds_root.or(file.xds_root).context("--xds-root (XDS_ROOT_CA) is needed")?,
            token: self.token.or(file.token),
            node: self.node.or(file.node).unwrap_or_else(|| "node".to_owned()),
            cluster_id: self.cluster_id.or(file.cluster_id).unwrap_or_else(|| "Kubernetes".to_owned()),
            address,
            admin_address: self.admin_address.or(file.admin_address).unwrap_or(local),
            workers: self.workers.or(file.workers).unwrap_or(cores.min(2)).max(1),
            capture,
            certificate_ttl: Duration::from_secs(
                self.certificate_seconds.or(file.certificate_seconds).unwrap_or(86_400).max(2),
            ),
            drain: Duration::from_secs(self.drain_seconds.or(file.drain_seconds).unwrap_or(5)),
            access_log: self.access_log.or(file.access_log).unwrap_or(true),
            log: self.log.or(file.log).unwrap_or_else(|| "info".to_owned()),
            log_format: self.log_format.or(file.log_format).unwrap_or_default(),
        })
    }
}
