//! What a waypoint is told: flags and environment first, then the settings file, then defaults.

use anyhow::Context;
use cairn_identity::Compliance;
use cairn_mesh::ResourceName;
use cairn_process::LogFormat;
use ipnet::IpNet;
use serde::Deserialize;
use std::collections::BTreeMap;
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
    /// What all TLS of the waypoint is restricted to: `pqc` is X25519MLKEM768 alone [default: nothing].
    #[arg(long, env = "COMPLIANCE_POLICY")]
    pub compliance_policy: Option<Compliance>,
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
    /// A directory of the waypoint's own, where fetched and compiled modules of plugins are kept. Its parent must be there
    /// [default: none: both are got again at every start].
    #[arg(long, env = "CAIRN_STATE_DIRECTORY")]
    pub state_directory: Option<PathBuf>,
    /// How many MiB of fetched modules are kept, and again how many of compiled ones [default: 1024].
    #[arg(long, env = "CAIRN_MODULE_CACHE_MIB")]
    pub module_cache_mib: Option<u64>,
    /// Root certificates, PEM, that registries and servers of modules may chain to beside the system's.
    #[arg(long, env = "CAIRN_REGISTRY_ROOTS")]
    pub registry_roots: Option<PathBuf>,
    /// Registries, `host` or `host:port`, that need not prove who they are and may speak plain HTTP; `*` is any.
    #[arg(long, env = "WASM_INSECURE_REGISTRIES", value_delimiter = ',')]
    pub insecure_registries: Option<Vec<String>>,
    /// Addresses, as blocks, that modules are never fetched from [default: none beside link-local and metadata addresses].
    #[arg(long, env = "BLOCKED_CIDRS_IN_WASM_FETCH", value_delimiter = ',')]
    pub blocked_module_addresses: Option<Vec<IpNet>>,
    /// A docker configuration, JSON: who registries are told that we are by plugins that name no secret.
    #[arg(long, env = "CAIRN_REGISTRY_CREDENTIALS")]
    pub registry_credentials: Option<PathBuf>,
    /// Environment variables of the waypoint that plugins may ask for [default: none].
    #[arg(long, env = "CAIRN_PLUGIN_ENVIRONMENT", value_delimiter = ',')]
    pub plugin_environment: Option<Vec<String>>,
    /// What a waypoint that starts does about plugins that are not loaded yet [default: wait].
    #[arg(long, env = "CAIRN_PLUGIN_STARTUP")]
    pub plugin_startup: Option<Startup>,
    /// For how many seconds it waits [default: 15].
    #[arg(long, env = "CAIRN_PLUGIN_WAIT_SECONDS")]
    pub plugin_wait_seconds: Option<u64>,
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

/// What a waypoint that starts does about plugins that are not loaded yet. Their targets are refused meanwhile, unless
/// their failStrategy lets traffic pass without them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Startup {
    /// It is not ready until each has been tried, for a while.
    #[default]
    Wait,
    /// It is ready at once.
    Serve,
    /// It is not ready until each runs.
    Require,
}

/// How modules of plugins are had.
#[derive(Clone, Debug)]
pub struct PluginSettings {
    /// Where they are kept.
    pub state_directory: Option<PathBuf>,
    /// How much of each kind is kept.
    pub cache_bytes_max: u64,
    /// Further root certificates of registries.
    pub registry_roots: Option<PathBuf>,
    /// Registries that need not prove who they are.
    pub insecure_registries: Vec<String>,
    /// Addresses that are not asked.
    pub blocked: Vec<IpNet>,
    /// A docker configuration.
    pub registry_credentials: Option<PathBuf>,
    /// What plugins may have of the environment.
    pub environment: BTreeMap<String, String>,
    /// What is done about plugins that are not loaded yet.
    pub startup: Startup,
    /// For how long they are waited for.
    pub wait: Duration,
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
    /// What all TLS is restricted to.
    pub compliance: Compliance,
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
    /// How modules of plugins are had.
    pub plugins: PluginSettings,
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
        let plugins = self.plugins(&file);
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
            compliance: self.compliance_policy.or(file.compliance_policy).unwrap_or_default(),
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
            plugins,
            log: self.log.or(file.log).unwrap_or_else(|| "info".to_owned()),
            log_format: self.log_format.or(file.log_format).unwrap_or_default(),
        })
    }

    /// The part about plugins, of flags and environment over `file`.
    fn plugins(&self, file: &Self) -> PluginSettings {
        fn either<T: Clone>(own: &Option<T>, file: &Option<T>) -> Option<T> {
            own.clone().or_else(|| file.clone())
        }
        let allowed = either(&self.plugin_environment, &file.plugin_environment).unwrap_or_default();
        let value = |name: String| {
            std::env::var(&name).map(|value| (name.clone(), value)).unwrap_or((name, String::new()))
        };
        let wait = either(&self.plugin_wait_seconds, &file.plugin_wait_seconds).unwrap_or(15);
        PluginSettings {
            state_directory: either(&self.state_directory, &file.state_directory),
            cache_bytes_max: either(&self.module_cache_mib, &file.module_cache_mib)
                .unwrap_or(1024)
                .saturating_mul(1 << 20),
            registry_roots: either(&self.registry_roots, &file.registry_roots),
            insecure_registries: either(&self.insecure_registries, &file.insecure_registries)
                .unwrap_or_default(),
            blocked: either(&self.blocked_module_addresses, &file.blocked_module_addresses)
                .unwrap_or_default(),
            registry_credentials: either(&self.registry_credentials, &file.registry_credentials),
            environment: allowed.into_iter().map(value).collect(),
            startup: either(&self.plugin_startup, &file.plugin_startup).unwrap_or_default(),
            wait: Duration::from_secs(wait),
        }
    }
}
