//! `ztunnel proxy`: settings from the environment that Istio's chart gives its ztunnel, so that only the image's name
//! changes (facts: Istio's ztunnel, environment variables).
//!
//! [`VARIABLES`] says of each variable what becomes of it; [`settings`] reads them in that order.

use crate::inpod::PodName;
use crate::settings::{
    ADMIN_PORT, Afterwards, ControlPlane, Handover, InPod, KeptState, LocalState, METRICS_PORT,
    OriginalSource, OwnPod, PodSource, Settings, TunnelLimits, access, workers_of,
};
use anyhow::{Context, Result, bail};
use cairn_identity::{Roots, Token};
use cairn_mesh::MeshSettings;
use cairn_process::LogFormat;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What becomes of a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It is followed.
    Followed,
    /// It is accepted and changes nothing, for this reason.
    Without(&'static str),
}
use Use::{Followed, Without};

/// Every variable of Istio's ztunnel, and some of ours (`TRUST_DOMAIN_ALIASES`, `CAIRN_*`); any other is ignored, as there,
/// but for those by which OpenTelemetry names a collector. A name that ends in `*` stands for all that begin so.
pub const VARIABLES: &[(&str, Use)] = &[
    ("ENABLE_PROXY", Followed),
    ("PROXY_MODE", Followed),
    ("PROXY_WORKLOAD_INFO", Followed),
    ("NODE_NAME", Followed),
    ("ISTIO_META_CLUSTER_ID", Followed),
    ("CLUSTER_ID", Followed),
    ("POD_NAME", Followed),
    ("POD_NAMESPACE", Followed),
    ("SERVICE_ACCOUNT", Followed),
    ("INSTANCE_IP", Followed),
    ("XDS_ADDRESS", Followed),
    ("CA_ADDRESS", Followed),
    ("XDS_ROOT_CA", Followed),
    ("CA_ROOT_CA", Followed),
    ("ALT_XDS_HOSTNAME", Followed),
    ("ALT_CA_HOSTNAME", Followed),
    ("AUTH_TOKEN", Followed),
    ("XDS_HEADER_*", Followed),
    ("CA_HEADER_*", Followed),
    ("SECRET_TTL", Followed),
    ("TRUST_DOMAIN", Followed),
    ("TRUST_DOMAIN_ALIASES", Followed),
    ("CLUSTER_DOMAIN", Followed),
    ("CRL_PATH", Followed),
    ("ISTIO_META_DNS_CAPTURE", Followed),
    ("ISTIO_META_DNS_PROXY_ADDR", Without("pods' questions are redirected to 127.0.0.1:15053")),
    ("ISTIO_META_*", Followed),
    ("ISTIO_METAJSON_*", Followed),
    ("PROXY_CONFIG", Followed),
    ("ZTUNNEL_WORKER_THREADS", Followed),
    ("ZTUNNEL_CPU_LIMIT", Followed),
    ("ZTUNNEL_RESOURCE_CPU_LIMIT", Followed),
    ("ZTUNNEL_RESOURCE_CPU_REQUEST", Followed),
    ("PACKET_MARK", Followed),
    ("INPOD_UDS", Followed),
    ("INPOD_PORT_REUSE", Followed),
    ("ENABLE_ORIG_SRC", Followed),
    ("IPV6_ENABLED", Followed),
    ("HTTP2_STREAM_WINDOW_SIZE", Followed),
    ("HTTP2_CONNECTION_WINDOW_SIZE", Followed),
    ("HTTP2_FRAME_SIZE", Followed),
    ("POOL_MAX_STREAMS_PER_CONNECTION", Followed),
    ("POOL_UNUSED_RELEASE_TIMEOUT", Followed),
    ("CONNECTION_TERMINATION_DEADLINE", Followed),
    ("TERMINATION_GRACE_PERIOD_SECONDS", Followed),
    ("UNSTABLE_ENABLE_SOCKS5", Followed),
    ("CAIRN_ACCESS_LOG_FILTER", Followed),
    ("CAIRN_ACCESS_LOG_SHARE", Followed),
    ("CAIRN_HANDOVER_SOCKET", Followed),
    ("CAIRN_XDS_SNAPSHOT", Followed),
    ("CAIRN_XDS_SNAPSHOT_SECONDS", Followed),
    ("CAIRN_XDS_SNAPSHOT_WAIT_SECONDS", Followed),
    ("RUST_LOG", Followed),
    ("LOG_FORMAT", Followed),
    ("INPOD_ENABLED", Without("Istio's ztunnel does not read it either")),
    ("NETWORK", Without("the control plane says of each workload, our own included, in which network it is")),
    ("FAKE_CA", Without("there is no false CA in what is shipped")),
    ("LOCAL_XDS_PATH", Followed),
    ("LOCAL_XDS", Followed),
    ("XDS_ON_DEMAND", Followed),
    ("PREFERED_SERVICE_NAMESPACE", Without("one's own namespace comes first, then the canonical service")),
    ("KEEPALIVE_ENABLED", Without("a vanished peer is always noticed")),
    ("KEEPALIVE_TIME", Without("it is always 180 s")),
    ("KEEPALIVE_INTERVAL", Without("it is always 180 s")),
    ("KEEPALIVE_RETRIES", Without("it is always 9")),
    ("USER_TIMEOUT_ENABLED", Without("keepalive notices a vanished peer")),
    ("LOCALHOST_APP_TUNNEL", Without("tunnels are always announced to applications on loopback")),
    ("ENABLE_RESPONSE_BAGGAGE", Without("it is always sent")),
    ("TLS12_ENABLED", Without("tunnels are TLS 1.3 only")),
    ("COMPLIANCE_POLICY", Followed),
    ("AUTHZ_POLICY_INFO_LOGGING", Without("/connections says which policy decided")),
];

/// Where Istio's chart puts the roots and the token, from the working directory as there.
const ROOT_CA: &str = "./var/run/secrets/istio/root-cert.pem";
const TOKEN: &str = "./var/run/secrets/tokens/istio-token";
/// The mesh's own defaults for proxies, if there are any.
const MESH_CONFIG: &str = "./etc/istio/config/mesh";
/// istiod as a pod of the cluster finds it, and anyone else.
const ISTIOD: &str = "https://istiod.istio-system.svc:15012";
const LOCAL: &str = "https://localhost:15012";

/// The environment.
pub type Environment = BTreeMap<String, String>;

/// `PROXY_CONFIG`, and the `defaultConfig` of the mesh. What else is in them is for other proxies.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ProxyConfig {
    discovery_address: Option<String>,
    proxy_admin_port: Option<u16>,
    stats_port: Option<u16>,
    concurrency: Option<usize>,
    proxy_metadata: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct MeshConfig {
    default_config: ProxyConfig,
    trust_domain: Option<String>,
    trust_domain_aliases: Vec<String>,
}

/// The settings that an environment means.
///
/// # Errors
/// When a variable that is followed cannot be understood.
pub fn settings(environment: &Environment) -> Result<Settings> {
    let mesh = mesh_config()?;
    let config = proxy_config(environment, &mesh.default_config)?;
    let mut merged = config.proxy_metadata.clone();
    merged.extend(environment.clone());
    let read = Reader(&merged);
    let is_kubernetes = read.text("KUBERNETES_SERVICE_HOST").is_some();
    let istiod = if is_kubernetes { ISTIOD } else { LOCAL };
    let cluster_id = read.text("ISTIO_META_CLUSTER_ID").or(read.text("CLUSTER_ID")).unwrap_or("Kubernetes");
    let ipv6 = read.flag("IPV6_ENABLED")?.unwrap_or(true);
    let own_pod = own_pod(&read);
    let instance = read.parsed::<IpAddr>("INSTANCE_IP")?;
    Ok(Settings {
        xds: xds(&read, &config, istiod),
        ca: ControlPlane {
            address: https(read.text("CA_ADDRESS").unwrap_or(istiod)),
            roots: roots(read.text("CA_ROOT_CA")),
            host: read.text("ALT_CA_HOSTNAME").map(str::to_owned),
            headers: read.headers("CA_HEADER_"),
        },
        token: Some(token(read.text("AUTH_TOKEN"))),
        revoked: read.text("CRL_PATH").map(Into::into),
        local: local_state(&read)?,
        compliance: read.text("COMPLIANCE_POLICY").unwrap_or_default().parse()?,
        mesh: mesh_settings(&read, &mesh),
        node: read.text("NODE_NAME").unwrap_or_default().to_owned(),
        cluster_id: cluster_id.to_owned(),
        metadata: metadata(&read, own_pod.as_ref(), cluster_id)?,
        own_address: instance.unwrap_or(IpAddr::V4(Ipv4Addr::new(1, 1, 1, 1))),
        own_pod,
        address: if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() },
        admin_address: Ipv4Addr::LOCALHOST.into(),
        admin_port: config.proxy_admin_port.unwrap_or(ADMIN_PORT),
        metrics_port: config.stats_port.unwrap_or(METRICS_PORT),
        workers: workers(&read, &config)?,
        pods: pods(&read, ipv6)?,
        certificate_ttl: read.duration("SECRET_TTL")?.unwrap_or(Duration::from_secs(24 * 60 * 60)),
        tunnels: TunnelLimits {
            stream_window: within(&read, "HTTP2_STREAM_WINDOW_SIZE", WINDOW_BYTES)?,
            connection_window: within(&read, "HTTP2_CONNECTION_WINDOW_SIZE", WINDOW_BYTES)?,
            frame_bytes_max: within(&read, "HTTP2_FRAME_SIZE", FRAME_BYTES)?,
            streams_per_connection: read.parsed("POOL_MAX_STREAMS_PER_CONNECTION")?,
            idle_timeout: read.duration("POOL_UNUSED_RELEASE_TIMEOUT")?,
        },
        drain: drain(&read)?,
        on_demand: on_demand(&read)?,
        kept_state: kept_state(&read)?,
        handover: read.text("CAIRN_HANDOVER_SOCKET").map(|socket| Handover {
            socket: socket.into(),
            afterwards: if is_kubernetes { Afterwards::Stay } else { Afterwards::End },
        }),
        access_log: true,
        access: access(read.text("CAIRN_ACCESS_LOG_FILTER"), read.text("CAIRN_ACCESS_LOG_SHARE"))?,
        collector: None,
        log: read.text("RUST_LOG").unwrap_or("info").to_owned(),
        log_format: match read.text("LOG_FORMAT") {
            Some("json") => LogFormat::Json,
            _ => LogFormat::Text,
        },
    })
}

/// Windows of HTTP/2 (RFC 9113 §6.9.1); with one of nothing, nothing moves.
const WINDOW_BYTES: RangeInclusive<u32> = 1..=(1 << 31) - 1;
/// Frames of HTTP/2 (RFC 9113 §6.5.2).
const FRAME_BYTES: RangeInclusive<u32> = 16_384..=(1 << 24) - 1;

/// A number that the protocol bounds.
fn within(read: &Reader<'_>, name: &str, bounds: RangeInclusive<u32>) -> Result<Option<u32>> {
    let number = read.parsed::<u32>(name)?;
    if let Some(number) = number.filter(|number| !bounds.contains(number)) {
        bail!("{name} is {number}; it must be from {} to {}", bounds.start(), bounds.end());
    }
    Ok(number)
}

/// Tells the operator which variables are set and change nothing.
pub fn tell_what_is_without_effect(environment: &Environment) {
    for (name, usage) in VARIABLES {
        if let Without(reason) = usage
            && environment.contains_key(*name)
        {
            tracing::info!(variable = name, reason, "a setting is without effect");
        }
    }
}

fn mesh_config() -> Result<MeshConfig> {
    match std::fs::read_to_string(MESH_CONFIG) {
        Ok(text) => serde_saphyr::from_str(&text).with_context(|| format!("{MESH_CONFIG} is not valid")),
        Err(_) => Ok(MeshConfig::default()),
    }
}

/// What the control plane does not tell: the names of the trust domain, and that of the cluster in DNS. The mesh's own
/// file says the former, unless the environment does.
fn mesh_settings(read: &Reader<'_>, mesh: &MeshConfig) -> MeshSettings {
    let default = MeshSettings::default();
    let aliases: Vec<&str> = match read.text("TRUST_DOMAIN_ALIASES") {
        Some(text) => text.split(',').map(str::trim).filter(|alias| !alias.is_empty()).collect(),
        None => mesh.trust_domain_aliases.iter().map(String::as_str).collect(),
    };
    MeshSettings {
        trust_domain: read
            .text("TRUST_DOMAIN")
            .or(mesh.trust_domain.as_deref())
            .map_or(default.trust_domain, Arc::from),
        trust_domain_aliases: aliases.into_iter().map(Arc::from).collect(),
        cluster_domain: read.text("CLUSTER_DOMAIN").map_or(default.cluster_domain, Arc::from),
        ..MeshSettings::default()
    }
}

fn proxy_config(environment: &Environment, default: &ProxyConfig) -> Result<ProxyConfig> {
    let own: ProxyConfig = match environment.get("PROXY_CONFIG").filter(|text| !text.trim().is_empty()) {
        Some(text) => serde_saphyr::from_str(text).context("PROXY_CONFIG is not valid")?,
        None => ProxyConfig::default(),
    };
    let mut proxy_metadata = default.proxy_metadata.clone();
    proxy_metadata.extend(own.proxy_metadata);
    Ok(ProxyConfig {
        discovery_address: own.discovery_address.or(default.discovery_address.clone()),
        proxy_admin_port: own.proxy_admin_port.or(default.proxy_admin_port),
        stats_port: own.stats_port.or(default.stats_port),
        concurrency: own.concurrency.or(default.concurrency),
        proxy_metadata,
    })
}

/// An empty address means that there is no control plane to follow.
fn xds(read: &Reader<'_>, config: &ProxyConfig, istiod: &str) -> Option<ControlPlane> {
    let address = match read.0.get("XDS_ADDRESS").map(|text| text.trim()) {
        Some("") => return None,
        Some(address) => address,
        None => config.discovery_address.as_deref().unwrap_or(istiod),
    };
    Some(ControlPlane {
        address: https(address),
        roots: roots(read.text("XDS_ROOT_CA")),
        host: read.text("ALT_XDS_HOSTNAME").map(str::to_owned),
        headers: read.headers("XDS_HEADER_"),
    })
}

fn https(address: &str) -> String {
    if address.contains("://") { address.to_owned() } else { format!("https://{address}") }
}

fn roots(text: Option<&str>) -> Roots {
    match text {
        None => Roots::from(ROOT_CA),
        Some("SYSTEM") => Roots::System,
        Some(text) if text.contains("-----BEGIN") => Roots::Text(text.to_owned()),
        Some(path) => Roots::from(path),
    }
}

/// A path where there is such a file or the text looks like one, else the token itself.
fn token(text: Option<&str>) -> Token {
    let Some(text) = text else { return Token::from(TOKEN) };
    let is_path = text.starts_with('/') || text.starts_with("./") || Path::new(text).exists();
    if is_path { Token::from(text) } else { Token::Text(text.to_owned()) }
}

fn own_pod(read: &Reader<'_>) -> Option<OwnPod> {
    let text = |name| read.text(name).map(str::to_owned);
    Some(OwnPod {
        name: text("POD_NAME")?,
        namespace: text("POD_NAMESPACE")?,
        service_account: text("SERVICE_ACCOUNT")?,
    })
}

/// What the control plane is told of the node beside its name.
fn metadata(read: &Reader<'_>, own: Option<&OwnPod>, cluster_id: &str) -> Result<Vec<(String, Value)>> {
    let mut metadata = BTreeMap::from([("CLUSTER_ID".to_owned(), Value::from(cluster_id))]);
    if let Some(own) = own {
        metadata.insert("NAME".to_owned(), own.name.as_str().into());
        metadata.insert("NAMESPACE".to_owned(), own.namespace.as_str().into());
    }
    if let Some(address) = read.text("INSTANCE_IP") {
        metadata.insert("INSTANCE_IPS".to_owned(), address.into());
    }
    for (name, text) in read.0 {
        if let Some(key) = name.strip_prefix("ISTIO_META_") {
            metadata.insert(key.to_owned(), text.as_str().into());
        } else if let Some(key) = name.strip_prefix("ISTIO_METAJSON_") {
            let value = serde_json::from_str(text).with_context(|| format!("{name} is not JSON"))?;
            metadata.insert(key.to_owned(), value);
        }
    }
    Ok(metadata.into_iter().collect())
}

/// How many threads carry traffic: as told, else as many as the pod may use, else a quarter of the cores.
fn workers(read: &Reader<'_>, config: &ProxyConfig) -> Result<usize> {
    let whole = |name| -> Result<Option<usize>> {
        let cores = read.text(name).map(|text| {
            cpu_quantity(text).with_context(|| format!("{name}: `{text}` is no number of cores"))
        });
        cores.transpose()
    };
    let cores = match whole("ZTUNNEL_CPU_LIMIT")? {
        Some(cores) => cores,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let count = match (read.text("ZTUNNEL_WORKER_THREADS"), config.concurrency) {
        (Some(text), _) => workers_of(text, cores)
            .with_context(|| format!("ZTUNNEL_WORKER_THREADS: `{text}` is no number or share"))?,
        (None, Some(0)) => cores,
        (None, Some(concurrency)) => concurrency,
        (None, None) => {
            let request = whole("ZTUNNEL_RESOURCE_CPU_REQUEST")?.unwrap_or(0);
            match whole("ZTUNNEL_RESOURCE_CPU_LIMIT")? {
                Some(limit) => limit.max(request),
                None => cores.div_ceil(4).max(request).max(2),
            }
        }
    };
    Ok(count.max(1))
}

/// A number of cores as Kubernetes writes it, rounded up: `2`, `1500m`, `0.5`.
fn cpu_quantity(text: &str) -> Option<usize> {
    let thousandths = match text.strip_suffix('m') {
        Some(thousandths) => thousandths.parse().ok()?,
        None => {
            (text.parse::<f64>().ok().filter(|cores| (0.0..100_000.0).contains(cores))? * 1000.0) as usize
        }
    };
    Some(thousandths.div_ceil(1000))
}

fn pods(read: &Reader<'_>, ipv6: bool) -> Result<PodSource> {
    if read.flag("ENABLE_PROXY")? == Some(false) {
        return Ok(PodSource::Nowhere);
    }
    let is_dedicated = match read.text("PROXY_MODE") {
        None | Some("shared") => false,
        Some("dedicated") => true,
        Some(other) => bail!("PROXY_MODE is `{other}`, not shared or dedicated"),
    };
    let default = InPod::default();
    let settings = InPod {
        socket: read.text("INPOD_UDS").map_or(default.socket, Into::into),
        reuse_port: read.flag("INPOD_PORT_REUSE")?.unwrap_or(true),
        ipv6,
        original_source: match read.flag("ENABLE_ORIG_SRC")? {
            None => OriginalSource::IfPermitted,
            Some(true) => OriginalSource::Always,
            Some(false) => OriginalSource::Never,
        },
        mark: read.parsed("PACKET_MARK")?.or(default.mark.filter(|_| !is_dedicated)),
        socks5: read.flag("UNSTABLE_ENABLE_SOCKS5")?.unwrap_or(false),
        dns: default.dns.filter(|_| matches!(read.text("ISTIO_META_DNS_CAPTURE"), None | Some("true"))),
    };
    if !is_dedicated {
        return Ok(PodSource::Cni(settings));
    }
    let who = read.text("PROXY_WORKLOAD_INFO").context("PROXY_MODE=dedicated needs PROXY_WORKLOAD_INFO")?;
    let parts: Vec<&str> = who.split('/').collect();
    let [namespace, name, service_account] = parts[..] else {
        bail!("PROXY_WORKLOAD_INFO is `{who}`, not namespace/name/service-account");
    };
    let name =
        PodName { name: name.into(), namespace: namespace.into(), service_account: service_account.into() };
    Ok(PodSource::Dedicated(name, settings))
}

/// A mesh in a file is the whole of it.
fn local_state(read: &Reader<'_>) -> Result<Option<LocalState>> {
    let state = match (read.text("LOCAL_XDS_PATH"), read.text("LOCAL_XDS")) {
        (None, None) => return Ok(None),
        (Some(path), None) => LocalState::File(path.into()),
        (None, Some(text)) => LocalState::Text(text.to_owned()),
        (Some(_), Some(_)) => bail!("LOCAL_XDS_PATH and LOCAL_XDS are both set: the mesh is in one of them"),
    };
    if read.0.get("XDS_ADDRESS").is_none_or(|address| !address.trim().is_empty()) {
        bail!(
            "LOCAL_XDS_PATH and LOCAL_XDS stand for the control plane: set XDS_ADDRESS to nothing beside them"
        );
    }
    for other in ["XDS_ON_DEMAND", "CAIRN_XDS_SNAPSHOT"] {
        if read.text(other).is_some_and(|text| text != "false") {
            bail!(
                "{other} is for a ztunnel with a control plane: it cannot be set beside LOCAL_XDS_PATH or LOCAL_XDS"
            );
        }
    }
    Ok(Some(state))
}

/// Names are answered, and a state is kept, of a mesh that is known whole.
fn on_demand(read: &Reader<'_>) -> Result<bool> {
    let on_demand = read.flag("XDS_ON_DEMAND")?.unwrap_or(false);
    if on_demand && matches!(read.text("ISTIO_META_DNS_CAPTURE"), None | Some("true")) {
        bail!("XDS_ON_DEMAND leaves names to others: set ISTIO_META_DNS_CAPTURE=false as well");
    }
    if on_demand && read.text("CAIRN_XDS_SNAPSHOT").is_some() {
        bail!("XDS_ON_DEMAND knows no state that could be kept: CAIRN_XDS_SNAPSHOT cannot be set as well");
    }
    Ok(on_demand)
}

fn kept_state(read: &Reader<'_>) -> Result<Option<KeptState>> {
    let age_max = read.parsed("CAIRN_XDS_SNAPSHOT_SECONDS")?;
    let wait = read.parsed("CAIRN_XDS_SNAPSHOT_WAIT_SECONDS")?;
    Ok(read.text("CAIRN_XDS_SNAPSHOT").map(|path| KeptState::new(path, age_max, wait)))
}

/// The drain ends before Kubernetes would end us: 5 s, or 1 s of a short time.
fn drain(read: &Reader<'_>) -> Result<Duration> {
    if let Some(deadline) = read.duration("CONNECTION_TERMINATION_DEADLINE")? {
        return Ok(deadline);
    }
    let seconds = match read.parsed::<u64>("TERMINATION_GRACE_PERIOD_SECONDS")? {
        None => 5,
        Some(grace) if grace > 10 => grace - 5,
        Some(grace) => grace.saturating_sub(1),
    };
    Ok(Duration::from_secs(seconds))
}

/// Variables by their type. An empty one counts as not given.
struct Reader<'a>(&'a Environment);

impl<'a> Reader<'a> {
    fn text(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|text| text.trim()).filter(|text| !text.is_empty())
    }

    fn parsed<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let parsed = text.parse().ok();
        parsed.map(Some).with_context(|| format!("{name}: `{text}` cannot be read"))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.parsed(name)
    }

    fn duration(&self, name: &str) -> Result<Option<Duration>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        duration(text).map(Some).with_context(|| format!("{name}: `{text}` is no duration"))
    }

    /// Headers whose variables begin so: the rest of the name, in lower case and with dashes.
    fn headers(&self, prefix: &str) -> Vec<(String, String)> {
        let variables = self.0.iter();
        let named = variables.filter_map(|(name, value)| Some((name.strip_prefix(prefix)?, value)));
        named.map(|(name, value)| (name.to_lowercase().replace('_', "-"), value.clone())).collect()
    }
}

/// `5s`, `1h30m`, `100ms`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit())?;
        let (number, tail) = rest.split_at_checked(digits)?;
        let unit = tail.find(|letter: char| letter.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(unit)?;
        let number: u64 = number.parse().ok()?;
        let part = match unit.trim() {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.checked_mul(60)?),
            "h" => Duration::from_secs(number.checked_mul(60 * 60)?),
            "d" => Duration::from_secs(number.checked_mul(24 * 60 * 60)?),
            _ => return None,
        };
        sum = sum.checked_add(part)?;
        rest = tail;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
#[path = "istio/tests.rs"]
mod tests;
