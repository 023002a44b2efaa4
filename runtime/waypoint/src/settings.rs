//! What a waypoint is told: flags and environment first, then the settings file, then defaults.

use anyhow::Context;
use cairn_mesh::ResourceName;
use cairn_process::LogFormat;
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Flags of `waypoint`. Each may also stand in the settings file, in kebab-case.
#[derive(Clone, Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Options {
    /// A YAML file with any of these settings; flags and environment win over it.
    #[arg(long, env = "CAIRN_SETTINGS")]
    #[serde(skip)]
    pub settings: Option<PathBuf>,
    /// The Gateway that this waypoint is an instance of, `namespace/name`.
    #[arg(long, env = "CAIRN_GATEWAY")]
    pub gateway: Option<String>,
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
    /// The trust domain of the waypoint's own identity [default: cluster.local].
    #[arg(long, env = "TRUST_DOMAIN")]
    pub trust_domain: Option<String>,
    /// The waypoint's service account [default: the Gateway's name].
    #[arg(long, env = "SERVICE_ACCOUNT")]
    pub service_account: Option<String>,
    /// The cluster's name, sent to the xDS server [default: Kubernetes].
    #[arg(long, env = "CLUSTER_ID")]
    pub cluster_id: Option<String>,
    /// The waypoint pod's address: HBONE on 15008, ports for operators on 15000, 15020 and 15021.
    #[arg(long, env = "INSTANCE_IP")]
    pub address: Option<IpAddr>,
    /// The port of HBONE [default: 15008].
    #[arg(long, env = "CAIRN_HBONE_PORT")]
    pub hbone_port: Option<u16>,
    /// The address of the admin port, 15000 [default: the address above if it is loopback, else 127.0.0.1].
    #[arg(long, env = "CAIRN_ADMIN_ADDRESS")]
    pub admin_address: Option<IpAddr>,
    /// Worker threads [default: the number of cores, at most 2].
    #[arg(long, env = "CAIRN_WORKERS")]
    pub workers: Option<usize>,
    /// How an endpoint is chosen among those that are equally near [default: least-request].
    #[arg(long, env = "CAIRN_BALANCER")]
    pub balancer: Option<BalancerKind>,
    /// Lifetime of certificates in seconds [default: 86400].
    #[arg(long, env = "SECRET_TTL_SECONDS")]
    pub certificate_seconds: Option<u64>,
    /// How long open exchanges may go on after SIGTERM, in seconds [default: 5].
    #[arg(long, env = "DRAIN_SECONDS")]
    pub drain_seconds: Option<u64>,
    /// One line per exchange on standard output [default: true].
    #[arg(long, env = "CAIRN_ACCESS_LOG")]
    pub access_log: Option<bool>,
    /// Verified tokens are remembered until they expire or their keys change, so that each is verified once
    /// [default: true].
    #[arg(long, env = "CAIRN_TOKEN_CACHE")]
    pub token_cache: Option<bool>,
    /// Root certificates, PEM, that key servers of token issuers may chain to beside the system's.
    #[arg(long, env = "CAIRN_JWKS_ROOTS")]
    pub jwks_roots: Option<PathBuf>,
    /// A directory of the waypoint's own in which fetched keys of token issuers are kept, so that it knows them when it
    /// starts while an issuer is down, if they are not older than a day [default: none].
    #[arg(long, env = "CAIRN_JWKS_CACHE")]
    pub jwks_cache: Option<PathBuf>,
    /// After how many seconds without a request a label set of metrics is forgotten [default: never].
    #[arg(long, env = "CAIRN_METRICS_IDLE_SECONDS")]
    pub metrics_idle_seconds: Option<u64>,
    /// Which log events are printed [default: info].
    #[arg(long, env = "RUST_LOG")]
    pub log: Option<String>,
    /// The form of log lines [default: text].
    #[arg(long, env = "CAIRN_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalancerKind {
    /// The less busy of two drawn at random (Istio's default).
    #[default]
    LeastRequest,
    /// One after the other.
    RoundRobin,
}

/// Settings, resolved.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The Gateway.
    pub gateway: ResourceName,
    /// The xDS server.
    pub xds_address: String,
    /// Root certificates of xDS and CA.
    pub xds_root: PathBuf,
    /// The CA.
    pub ca_address: String,
    /// The bearer token's file.
    pub token: Option<PathBuf>,
    /// The waypoint's own identity.
    pub identity: cairn_mesh::Identity,
    /// The cluster's name.
    pub cluster_id: String,
    /// Where HBONE is accepted.
    pub hbone: SocketAddr,
    /// Where the admin port is bound.
    pub admin_address: IpAddr,
    /// Worker threads.
    pub workers: usize,
    /// How an endpoint is chosen.
    pub balancer: BalancerKind,
    /// Lifetime asked for certificates.
    pub certificate_ttl: Duration,
    /// How long open exchanges may go on after SIGTERM.
    pub drain: Duration,
    /// Whether verified tokens are remembered.
    pub token_cache: bool,
    /// Further root certificates of key servers.
    pub jwks_roots: Option<PathBuf>,
    /// Where fetched keys are kept for the next start.
    pub jwks_cache: Option<PathBuf>,
    /// Whether a line is written per exchange.
    pub access_log: bool,
    /// How long a label set of metrics may count nothing until it is forgotten.
    pub metrics_idle: Option<Duration>,
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
        let gateway = self.gateway.or(file.gateway).context("--gateway (CAIRN_GATEWAY) is needed")?;
        let gateway = ResourceName::parse(&gateway)
            .with_context(|| format!("--gateway `{gateway}` is not namespace/name"))?;
        let trust_domain =
            self.trust_domain.or(file.trust_domain).unwrap_or_else(|| "cluster.local".to_owned());
        let account =
            self.service_account.or(file.service_account).unwrap_or_else(|| gateway.name.to_string());
        let xds_address =
            self.xds_address.or(file.xds_address).unwrap_or_else(|| "https://localhost:15012".to_owned());
        let address = self.address.or(file.address).context("--address (INSTANCE_IP) is needed")?;
        let port = self.hbone_port.or(file.hbone_port).unwrap_or(cairn_mesh::HBONE_PORT);
        let local = if address.is_loopback() { address } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Settings {
            identity: cairn_mesh::Identity::new(&trust_domain, &gateway.namespace, &account)?,
            gateway,
            ca_address: self.ca_address.or(file.ca_address).unwrap_or_else(|| xds_address.clone()),
            xds_address,
            xds_root: self.xds_root.or(file.xds_root).context("--xds-root (XDS_ROOT_CA) is needed")?,
            token: self.token.or(file.token),
            cluster_id: self.cluster_id.or(file.cluster_id).unwrap_or_else(|| "Kubernetes".to_owned()),
            hbone: SocketAddr::new(address, port),
            admin_address: self.admin_address.or(file.admin_address).unwrap_or(local),
            workers: self.workers.or(file.workers).unwrap_or(cores.min(2)).max(1),
            balancer: self.balancer.or(file.balancer).unwrap_or_default(),
            certificate_ttl: Duration::from_secs(
                self.certificate_seconds.or(file.certificate_seconds).unwrap_or(86_400).max(2),
            ),
            drain: Duration::from_secs(self.drain_seconds.or(file.drain_seconds).unwrap_or(5)),
            token_cache: self.token_cache.or(file.token_cache).unwrap_or(true),
            jwks_roots: self.jwks_roots.or(file.jwks_roots),
            jwks_cache: self.jwks_cache.or(file.jwks_cache),
            access_log: self.access_log.or(file.access_log).unwrap_or(true),
            metrics_idle: self
                .metrics_idle_seconds
                .or(file.metrics_idle_seconds)
                .map(|seconds| Duration::from_secs(seconds.max(1))),
            log: self.log.or(file.log).unwrap_or_else(|| "info".to_owned()),
            log_format: self.log_format.or(file.log_format).unwrap_or_default(),
        })
    }
}
