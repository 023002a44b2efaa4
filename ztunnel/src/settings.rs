//! What a ztunnel is told: flags and environment first, then the settings file, then defaults.

use crate::access::{AccessFilter, Share};
use crate::collector::CollectorSettings;
use crate::inpod::PodName;
use anyhow::Context;
use cairn_hbone::{PoolSettings, ServerSettings};
use cairn_identity::{Compliance, Roots, Token};
use cairn_mesh::MeshSettings;
use cairn_process::LogFormat;
use cairn_xds::KeepSettings;
use serde::Deserialize;
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

/// Where operators find the admin server and metrics, as with a ztunnel of Istio.
pub const ADMIN_PORT: u16 = 15000;
/// See [`ADMIN_PORT`].
pub const METRICS_PORT: u16 = 15020;

/// Flags of `ztunnel`. Each may also stand in the settings file, in kebab-case.
#[derive(Clone, Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Options {
    /// `proxy`: settings come from the environment alone, as Istio's chart gives them to its ztunnel, and what stands
    /// behind it is ignored. `version`: says which this is.
    #[serde(skip)]
    pub command: Vec<String>,
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
    /// A file of lists of revoked certificates (CRL), PEM or DER; read again when it changes. One that is not there
    /// revokes nothing.
    #[arg(long, env = "CRL_PATH")]
    pub revoked: Option<PathBuf>,
    /// Further names of the mesh's trust domain, with commas between them: peers and policies that use one are taken as
    /// if they used the mesh's own.
    #[arg(long, env = "TRUST_DOMAIN_ALIASES", value_delimiter = ',')]
    pub trust_domain_aliases: Vec<String>,
    /// What all TLS of the ztunnel is restricted to: `pqc` is X25519MLKEM768 alone [default: nothing].
    #[arg(long, env = "COMPLIANCE_POLICY")]
    pub compliance_policy: Option<Compliance>,
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
    /// Worker threads: a number, 0 for as many as there are cores, or a share of them, `25%` [default: the number of
    /// cores, at most 2].
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", value_parser = parse_workers)]
    pub workers: Option<usize>,
    /// How traffic reaches the ztunnel [default: addresses].
    #[arg(long, env = "CAIRN_CAPTURE")]
    pub capture: Option<CaptureKind>,
    /// With `--capture namespaces`: the directory of network namespaces, one per pod, named `namespace.pod`
    /// (see `namespace_file` for long names).
    #[arg(long, env = "CAIRN_NETNS_DIRECTORY")]
    pub netns_directory: Option<PathBuf>,
    /// With `--capture in-pod`: istio-cni's socket [default: /var/run/ztunnel/ztunnel.sock].
    #[arg(long, env = "INPOD_UDS")]
    pub cni_socket: Option<PathBuf>,
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
    /// A Unix socket at which a successor takes over this ztunnel's ports, and at which this one asks its predecessor for
    /// them, so that a restart breaks no connection. In a directory that both see [default: none].
    #[arg(long, env = "CAIRN_HANDOVER_SOCKET")]
    pub handover_socket: Option<PathBuf>,
    /// A file in which the state of the mesh is kept, for a start without the control plane [default: none].
    #[arg(long, env = "CAIRN_XDS_SNAPSHOT")]
    pub xds_snapshot: Option<PathBuf>,
    /// How old a kept state may be that is used, in seconds [default: 3600].
    #[arg(long, env = "CAIRN_XDS_SNAPSHOT_SECONDS")]
    pub xds_snapshot_seconds: Option<u64>,
    /// How long the control plane is waited for before a kept state is used, in seconds [default: 5].
    #[arg(long, env = "CAIRN_XDS_SNAPSHOT_WAIT_SECONDS")]
    pub xds_snapshot_wait_seconds: Option<u64>,
    /// One line per connection on standard output [default: true].
    #[arg(long, env = "CAIRN_ACCESS_LOG")]
    pub access_log: Option<bool>,
    /// Of which connections: conditions with commas between them, such as `direction=inbound,src.namespace!=shop`. The
    /// names are those of the line's fields; a value may begin or end with `*`, and `*` alone means any [default: all].
    #[arg(long, env = "CAIRN_ACCESS_LOG_FILTER")]
    pub access_log_filter: Option<String>,
    /// Of which share of those that ended well, `0.1` or `10%`; those that did not are all told of [default: all].
    #[arg(long, env = "CAIRN_ACCESS_LOG_SHARE")]
    pub access_log_share: Option<String>,
    /// Which log events are printed [default: info].
    #[arg(long, env = "RUST_LOG")]
    pub log: Option<String>,
    /// The form of log lines [default: text].
    #[arg(long, env = "CAIRN_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// Of which connections the access log tells.
///
/// # Errors
/// When one of the two cannot be understood.
pub fn access(filter: Option<&str>, share: Option<&str>) -> anyhow::Result<AccessFilter> {
    let filter: AccessFilter =
        filter.unwrap_or_default().parse().context("the filter of the access log cannot be understood")?;
    let share = share.map(str::parse::<Share>).transpose();
    Ok(filter.with_share(share.context("the access log's share cannot be understood")?))
}

/// Reads a number of worker threads, or a share of the cores.
fn parse_workers(text: &str) -> Result<usize, String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    workers_of(text, cores).ok_or_else(|| "not a number, or a share up to 100%".to_owned())
}

/// How many threads `text` asks for on a machine with so many cores: a number, `0` for all, or a share, `25%`.
pub fn workers_of(text: &str, cores: usize) -> Option<usize> {
    match text.trim().strip_suffix('%') {
        Some(share) => {
            let share: usize = share.trim().parse().ok()?;
            (1..=100).contains(&share).then(|| (cores * share).div_ceil(100))
        }
        None => text.trim().parse().ok().map(|count| if count == 0 { cores } else { count }),
    }
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
    /// The same, in namespaces that istio-cni hands over. Needs root.
    InPod,
}

/// Where pods come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodSource {
    /// The mesh says which are here.
    Mesh(Capture),
    /// istio-cni does.
    Cni(InPod),
    /// There is one, and the ztunnel runs in its namespace (Istio's dedicated mode).
    Dedicated(PodName, InPod),
    /// There are none: the ztunnel only follows the mesh.
    Nowhere,
}

/// How pods are served that are under redirection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InPod {
    /// istio-cni's socket.
    pub socket: PathBuf,
    /// Another ztunnel may listen in the same pods, as during a rolling update.
    pub reuse_port: bool,
    /// Listen on IPv6 as well, where a pod has it.
    pub ipv6: bool,
    /// Whether applications see their clients' addresses.
    pub original_source: OriginalSource,
    /// The mark on all packets of ours, which redirection lets pass.
    pub mark: Option<u32>,
    /// Listen for SOCKS5 on loopback as well.
    pub socks5: bool,
    /// Answer DNS questions, and pass those that are not about the mesh on to the servers in this file.
    pub dns: Option<PathBuf>,
}

impl Default for InPod {
    fn default() -> Self {
        Self {
            socket: CNI_SOCKET.into(),
            reuse_port: true,
            ipv6: true,
            original_source: OriginalSource::default(),
            mark: Some(cairn_net::ZTUNNEL_MARK),
            socks5: false,
            dns: Some(RESOLVERS.into()),
        }
    }
}

/// Whom the ztunnel's own pod asks for names.
pub const RESOLVERS: &str = "/etc/resolv.conf";

/// Where istio-cni listens (facts: `INPOD_UDS`).
const CNI_SOCKET: &str = "/var/run/ztunnel/ztunnel.sock";

/// Where the state of the mesh is kept, and for how long it is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptState {
    /// The file.
    pub path: PathBuf,
    /// How old it may be that it is used.
    pub age_max: Duration,
    /// How long the control plane is waited for before.
    pub wait: Duration,
}

impl KeptState {
    /// With defaults for what is not given, in seconds.
    pub fn new(path: impl Into<PathBuf>, age_max: Option<u64>, wait: Option<u64>) -> Self {
        let default = KeepSettings::new("", "");
        Self {
            path: path.into(),
            age_max: age_max.map_or(default.age_max, Duration::from_secs),
            wait: wait.map_or(default.wait, Duration::from_secs),
        }
    }
}

/// The mesh in a file, for a ztunnel that has no control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalState {
    /// YAML in this file.
    File(PathBuf),
    /// This YAML.
    Text(String),
}

/// How a ztunnel takes over from its predecessor and hands over to its successor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handover {
    /// The Unix socket at which both meet.
    pub socket: PathBuf,
    /// What a ztunnel does that has been succeeded.
    pub afterwards: Afterwards,
}

/// What a ztunnel does that has been succeeded and accepts no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It ends with its last connection, or when the time for draining has passed.
    End,
    /// It stays until it is told to stop, and drains then: whoever supervises it would start it anew if it ended by
    /// itself, as Kubernetes does.
    Stay,
}

/// The pod that the ztunnel itself is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnPod {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
}

/// A server of the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlPlane {
    /// `https://host:port`.
    pub address: String,
    /// The roots that its certificate chains to.
    pub roots: Roots,
    /// The name that its certificate is for, if that is not the address's.
    pub host: Option<String>,
    /// What each call carries beside the token.
    pub headers: Vec<(String, String)>,
}

/// Limits of tunnels that differ from the defaults of `cairn-hbone`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunnelLimits {
    /// Bytes a peer may send ahead on one tunnel.
    pub stream_window: Option<u32>,
    /// Bytes a peer may send ahead on all tunnels of a connection.
    pub connection_window: Option<u32>,
    /// The largest frame of a peer.
    pub frame_bytes_max: Option<u32>,
    /// How many tunnels share a connection.
    pub streams_per_connection: Option<usize>,
    /// How long a connection without tunnels is kept.
    pub idle_timeout: Option<Duration>,
}

impl TunnelLimits {
    /// For the tunnels that we open.
    pub fn pool(&self) -> PoolSettings {
        let default = PoolSettings::default();
        PoolSettings {
            stream_window: self.stream_window.unwrap_or(default.stream_window),
            connection_window: self.connection_window.unwrap_or(default.connection_window),
            frame_bytes_max: self.frame_bytes_max.unwrap_or(default.frame_bytes_max),
            streams_per_connection: self.streams_per_connection.unwrap_or(default.streams_per_connection),
            idle_timeout: self.idle_timeout.unwrap_or(default.idle_timeout),
            ..default
        }
    }

    /// For those that we accept.
    pub fn server(&self) -> ServerSettings {
        let default = ServerSettings::default();
        ServerSettings {
            stream_window: self.stream_window.unwrap_or(default.stream_window),
            connection_window: self.connection_window.unwrap_or(default.connection_window),
            frame_bytes_max: self.frame_bytes_max.unwrap_or(default.frame_bytes_max),
            ..default
        }
    }
}

/// Whether applications see their clients' addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OriginalSource {
    /// If the kernel lets us.
    #[default]
    IfPermitted,
    /// Or the pod is not served.
    Always,
    /// They see the pod's own.
    Never,
}

/// How pods that the mesh names are captured, with what each way needs.
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
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The xDS server; `None`: there is none.
    pub xds: Option<ControlPlane>,
    /// The CA.
    pub ca: ControlPlane,
    /// The bearer token for both.
    pub token: Option<Token>,
    /// The lists of revoked certificates.
    pub revoked: Option<PathBuf>,
    /// The mesh, where there is no control plane.
    pub local: Option<LocalState>,
    /// What all TLS is restricted to.
    pub compliance: Compliance,
    /// What is known of the mesh before the control plane says anything, and for as long as it does not.
    pub mesh: MeshSettings,
    /// The node served.
    pub node: String,
    /// The cluster's name.
    pub cluster_id: String,
    /// The ztunnel's own pod, if it is one.
    pub own_pod: Option<OwnPod>,
    /// The ztunnel's own address, for its name in the control plane.
    pub own_address: IpAddr,
    /// What the control plane is told of us beside that.
    pub metadata: Vec<(String, Value)>,
    /// Where ports for metrics and readiness are bound.
    pub address: IpAddr,
    /// Where the admin port is bound.
    pub admin_address: IpAddr,
    /// The admin port.
    pub admin_port: u16,
    /// The port for metrics.
    pub metrics_port: u16,
    /// Worker threads.
    pub workers: usize,
    /// Where pods come from, and how they are captured.
    pub pods: PodSource,
    /// Lifetime asked for certificates.
    pub certificate_ttl: Duration,
    /// Limits of tunnels.
    pub tunnels: TunnelLimits,
    /// How long open connections may go on after SIGTERM.
    pub drain: Duration,
    /// Workloads and services are asked for when they are needed, rather than all followed.
    pub on_demand: bool,
    /// Whether the state of the mesh is kept on disk, and where.
    pub kept_state: Option<KeptState>,
    /// Whether ports are handed over from one ztunnel to the next, and how.
    pub handover: Option<Handover>,
    /// Whether a line is written per connection.
    pub access_log: bool,
    /// Of which connections.
    pub access: AccessFilter,
    /// Where they are told of as well.
    pub collector: Option<CollectorSettings>,
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
        let address =
            self.xds_address.or(file.xds_address).unwrap_or_else(|| "https://localhost:15012".to_owned());
        let roots = self.xds_root.or(file.xds_root).context("--xds-root (XDS_ROOT_CA) is needed")?;
        let xds = ControlPlane { address, roots: roots.into(), host: None, headers: Vec::new() };
        let ca = match self.ca_address.or(file.ca_address) {
            Some(address) => ControlPlane { address, ..xds.clone() },
            None => xds.clone(),
        };
        let cluster_id = self.cluster_id.or(file.cluster_id).unwrap_or_else(|| "Kubernetes".to_owned());
        let pods = match self.capture.or(file.capture).unwrap_or_default() {
            CaptureKind::Addresses => {
                let twins = self.twin_addresses.or(file.twin_addresses).unwrap_or(false);
                PodSource::Mesh(Capture::Addresses { twins })
            }
            CaptureKind::Namespaces => PodSource::Mesh(Capture::Namespaces(
                self.netns_directory
                    .or(file.netns_directory)
                    .context("--capture namespaces needs --netns-directory")?,
            )),
            CaptureKind::InPod => {
                let socket = self.cni_socket.or(file.cni_socket).unwrap_or_else(|| CNI_SOCKET.into());
                PodSource::Cni(InPod { socket, ..InPod::default() })
            }
        };
        let address = self.address.or(file.address).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let local = if address.is_loopback() { address } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Settings {
            xds: Some(xds),
            ca,
            token: self.token.or(file.token).map(Token::File),
            revoked: self.revoked.or(file.revoked),
            local: None,
            compliance: self.compliance_policy.or(file.compliance_policy).unwrap_or_default(),
            mesh: MeshSettings {
                trust_domain_aliases: if self.trust_domain_aliases.is_empty() {
                    file.trust_domain_aliases.into_iter().map(Into::into).collect()
                } else {
                    self.trust_domain_aliases.into_iter().map(Into::into).collect()
                },
                ..MeshSettings::default()
            },
            node: self.node.or(file.node).unwrap_or_else(|| "node".to_owned()),
            metadata: vec![("CLUSTER_ID".to_owned(), cluster_id.as_str().into())],
            cluster_id,
            own_pod: None,
            own_address: address,
            address,
            admin_address: self.admin_address.or(file.admin_address).unwrap_or(local),
            admin_port: ADMIN_PORT,
            metrics_port: METRICS_PORT,
            workers: self.workers.or(file.workers).unwrap_or(cores.min(2)).max(1),
            pods,
            certificate_ttl: Duration::from_secs(
                self.certificate_seconds.or(file.certificate_seconds).unwrap_or(86_400).max(2),
            ),
            tunnels: TunnelLimits::default(),
            drain: Duration::from_secs(self.drain_seconds.or(file.drain_seconds).unwrap_or(5)),
            on_demand: false,
            kept_state: self.xds_snapshot.or(file.xds_snapshot).map(|path| {
                let age_max = self.xds_snapshot_seconds.or(file.xds_snapshot_seconds);
                let wait = self.xds_snapshot_wait_seconds.or(file.xds_snapshot_wait_seconds);
                KeptState::new(path, age_max, wait)
            }),
            handover: self
                .handover_socket
                .or(file.handover_socket)
                .map(|socket| Handover { socket, afterwards: Afterwards::End }),
            access_log: self.access_log.or(file.access_log).unwrap_or(true),
            access: access(
                self.access_log_filter.or(file.access_log_filter).as_deref(),
                self.access_log_share.or(file.access_log_share).as_deref(),
            )?,
            // It is found by OpenTelemetry's own variables.
            collector: None,
            log: self.log.or(file.log).unwrap_or_else(|| "info".to_owned()),
            log_format: self.log_format.or(file.log_format).unwrap_or_default(),
        })
    }
}
