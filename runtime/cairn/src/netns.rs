//! `cairn up --netns`: a network namespace per pod, joined through a node namespace, with real redirection.
//!
//! The node namespace stands for the machine: it routes between pods, and its packet filter stands in for kube-proxy.
//! A pod of the mesh gets the redirection that istio-cni installs (facts: marks 0x539 and 0x111, ports 15001, 15006,
//! 15008). Everything is in namespaces of our own; the machine's own network is not touched.

use anyhow::{Context, Result, ensure};
use cairn_mesh::{Endpoint, Service, Snapshot, TunnelProtocol};
use cairn_net::Namespace;
use cairn_ztunnel::namespace_file;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// What namespaces' names may begin with: short enough that a pod's name still fits behind it in a file's.
const PREFIX_BYTES_MAX: usize = 40;

/// The namespaces of one mesh. Dropping it removes them.
pub struct Network {
    prefix: String,
    gateway: Ipv4Addr,
    /// Links to the namespaces by `namespace.pod`, for the ztunnel.
    links: PathBuf,
    pods: BTreeMap<String, Pod>,
    balancing: String,
}

#[derive(Clone, PartialEq, Eq)]
struct Pod {
    address: IpAddr,
    redirected: bool,
}

impl Network {
    /// Makes the node namespace, in which `gateway` and the 255 addresses around it are the node's own. `prefix`
    /// begins the names of all namespaces; what an earlier run left under it is removed.
    ///
    /// # Errors
    /// When not root, when another mesh runs under the prefix, or `ip` or `nft` is missing or fails.
    pub fn create(prefix: &str, gateway: Ipv4Addr, state: &Path) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "--netns needs root");
        ensure!(
            !prefix.is_empty() && prefix.len() <= PREFIX_BYTES_MAX && is_word(prefix),
            "--netns-prefix {prefix:?} is not 1 to {PREFIX_BYTES_MAX} letters, digits and dashes"
        );
        ensure_free(prefix)?;
        let links = state.join("netns");
        std::fs::create_dir_all(&links).with_context(|| format!("cannot create {}", links.display()))?;
        let network = Self {
            prefix: prefix.to_owned(),
            gateway,
            links,
            pods: BTreeMap::new(),
            balancing: String::new(),
        };
        network.remove_all();
        feed("ip", &["netns", "add", &network.node_name()], None, "")?;
        let node = network.node()?;
        set(&node, &["ip_forward=1", "conf/all/rp_filter=0", "conf/default/rp_filter=0"])?;
        let addresses = format!("link set lo up\naddr add {gateway}/24 dev lo\n");
        feed("ip", &["-batch", "-"], Some(&node), &addresses)?;
        // Says at once when nft is missing or the kernel lacks what we need of it.
        feed("nft", &["-f", "-"], Some(&node), "table ip cairn-services\n")?;
        Ok(network)
    }

    /// The node's namespace, to listen in.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn node(&self) -> Result<Namespace> {
        open(&self.node_name())
    }

    /// The directory of links `namespace.pod` to namespaces.
    pub fn links(&self) -> &Path {
        &self.links
    }

    /// The words before a command that make it run in the node's namespace.
    pub fn enter_node(&self) -> Vec<String> {
        vec!["ip".into(), "netns".into(), "exec".into(), self.node_name()]
    }

    /// The words before a command that make it run in a pod's namespace.
    pub fn enter_pod(&self, namespace: &str, pod: &str) -> Vec<String> {
        vec!["ip".into(), "netns".into(), "exec".into(), self.pod_name(&namespace_file(namespace, pod))]
    }

    /// Makes namespaces be those of the mesh's pods, and services reachable for pods outside the mesh. A pod that
    /// cannot have a namespace is reported and left out.
    ///
    /// # Errors
    /// When `nft` fails in the node's namespace.
    pub fn follow(&mut self, snapshot: &Snapshot) -> Result<()> {
        let mut wanted = BTreeMap::new();
        for workload in snapshot.workloads() {
            if let Some(address) = workload.addresses.first() {
                let redirected = workload.protocol == TunnelProtocol::Hbone && !workload.native_tunnel;
                let name = namespace_file(&workload.namespace, &workload.name);
                wanted.insert(name, Pod { address: *address, redirected });
            }
        }
        for (name, pod) in self.pods.clone() {
            if wanted.get(&name) != Some(&pod) {
                self.remove_pod(&name, &pod);
            }
        }
        for (name, pod) in wanted {
            if self.pods.contains_key(&name) {
                continue;
            }
            if self.pods.values().any(|other| other.address == pod.address) {
                tracing::error!(pod = name, address = %pod.address, "pod has another one's address and no namespace");
                continue;
            }
            match self.add_pod(&name, &pod) {
                Ok(()) => {
                    self.pods.insert(name, pod);
                }
                Err(error) => {
                    self.remove_pod(&name, &pod);
                    tracing::error!(pod = name, error = format!("{error:#}"), "pod has no namespace");
                }
            }
        }
        let balancing = balancing_rules(snapshot, self.gateway);
        if balancing != self.balancing {
            feed("nft", &["-f", "-"], Some(&self.node()?), &balancing)?;
            self.balancing = balancing;
        }
        Ok(())
    }

    fn node_name(&self) -> String {
        format!("{}-node", self.prefix)
    }

    fn pod_name(&self, key: &str) -> String {
        format!("{}-pod-{key}", self.prefix)
    }

    /// Makes a pod's namespace: one end of a virtual wire in it as `eth0`, the other in the node's.
    fn add_pod(&self, key: &str, pod: &Pod) -> Result<()> {
        ensure!(is_word(key), "its name is not one of Kubernetes'");
        let IpAddr::V4(address) = pod.address else { anyhow::bail!("only IPv4 pods can have namespaces") };
        let (name, gateway) = (self.pod_name(key), self.gateway);
        feed("ip", &["netns", "add", &name], None, "")?;
        let namespace = open(&name)?;
        set(&namespace, &["conf/all/rp_filter=0", "conf/default/rp_filter=0"])?;
        let outer = wire_name(address);
        let wire = format!(
            "link add {outer} type veth peer name eth0 netns {name}\n\
             link set {outer} up\n\
             route add {address}/32 dev {outer} src {gateway}\n"
        );
        feed("ip", &["-batch", "-"], Some(&self.node()?), &wire)?;
        // Redirection comes before the network: a connection begun without it would never be given one.
        if pod.redirected {
            feed("nft", &["-f", "-"], Some(&namespace), REDIRECTION)?;
        }
        let mut inside = format!(
            "link set lo up\n\
             addr add {address}/32 dev eth0\n\
             link set eth0 up\n\
             route add {gateway} dev eth0 scope link\n\
             route add default via {gateway}\n"
        );
        if pod.redirected {
            inside.push_str(REPLIES);
        }
        feed("ip", &["-batch", "-"], Some(&namespace), &inside)?;
        let link = self.links.join(key);
        // A link that an earlier run left would be in the way.
        let _gone = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(Path::new(NAMESPACES).join(&name), &link)
            .with_context(|| format!("cannot create {}", link.display()))
    }

    fn remove_pod(&mut self, key: &str, pod: &Pod) {
        self.pods.remove(key);
        // The wire would go with the namespace, but only some time later, and its name may be needed before.
        let cut = |address| {
            let link = wire_name(address);
            feed("ip", &["link", "del", &link], Some(&self.node()?), "")
        };
        if let IpAddr::V4(address) = pod.address
            && let Err(error) = cut(address)
        {
            tracing::debug!(pod = key, error = format!("{error:#}"), "wire not removed");
        }
        // What is gone already need not be removed.
        let _gone = std::fs::remove_file(self.links.join(key));
        remove(&self.pod_name(key));
    }

    /// Removes every namespace whose name begins with our prefix, and the links to them.
    fn remove_all(&self) {
        for name in names(&self.prefix) {
            remove(&name);
        }
        for entry in std::fs::read_dir(&self.links).into_iter().flatten().flatten() {
            // What is gone already need not be removed.
            let _gone = std::fs::remove_file(entry.path());
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.remove_all();
    }
}

/// The node's end of the wire to a pod.
fn wire_name(pod: Ipv4Addr) -> String {
    format!("cairn{:08x}", u32::from(pod))
}

/// The namespaces there are under a prefix.
fn names(prefix: &str) -> Vec<String> {
    let (pods, node) = (format!("{prefix}-pod-"), format!("{prefix}-node"));
    let entries = std::fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&pods) || *name == node).collect()
}

/// Refuses to take namespaces away from a mesh that runs, or from processes that outlived theirs.
fn ensure_free(prefix: &str) -> Result<()> {
    for name in names(prefix) {
        let output = Command::new("ip").args(["netns", "pids", &name]).output().context("cannot run ip")?;
        let pids = String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(", ");
        ensure!(
            pids.is_empty(),
            "network namespace {name} is in use by {pids}: end these, or choose another --netns-prefix"
        );
    }
    Ok(())
}

fn remove(name: &str) {
    if let Err(error) = feed("ip", &["netns", "del", name], None, "") {
        tracing::debug!(name, error = format!("{error:#}"), "namespace not removed");
    }
}

/// Whether `text` means nothing but itself to a shell, a path, `ip` and `nft`.
fn is_word(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'~'))
}

/// Replies to spoofed addresses are delivered in the pod, to the ztunnel's sockets.
const REPLIES: &str = "rule add fwmark 0x111/0xfff lookup 100 pref 32764\n\
                       route add local 0.0.0.0/0 dev lo table 100\n";

/// The redirection of a pod of the mesh, as istio-cni's nftables variant has it, without DNS: packets with mark 0x539
/// are the ztunnel's own; connections whose source it spoofs carry connection mark 0x111, by which replies come back
/// to it.
const REDIRECTION: &str = r#"
table inet istio-ambient-nat {
    chain istio-prerouting {
        type nat hook prerouting priority -100; policy accept;
        meta l4proto tcp ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
    }
    chain istio-output {
        type nat hook output priority -100; policy accept;
        meta l4proto tcp meta mark & 0xfff == 0x111 accept
        ip daddr != 127.0.0.1 oifname "lo" accept
        meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15001
    }
}
table inet istio-ambient-mangle {
    chain istio-prerouting {
        type filter hook prerouting priority -150; policy accept;
        meta mark & 0xfff == 0x539 ct mark set 0x111
    }
    chain istio-output {
        type route hook output priority -150; policy accept;
        ct mark & 0xfff == 0x111 meta mark set ct mark
    }
}
"#;

/// What kube-proxy would do for pods outside the mesh: a service's address becomes one of its pods'. A pod that
/// reaches itself that way must not see its own address as the client's.
fn balancing_rules(snapshot: &Snapshot, gateway: Ipv4Addr) -> String {
    let (mut lines, mut itself) = (BTreeSet::new(), BTreeSet::new());
    for state in snapshot.services() {
        lines.extend(service_rules(&state.service, &state.endpoints));
        let addresses = state.endpoints.iter().filter_map(address_of);
        itself.extend(addresses.map(|address| format!("{address} . {address}")));
    }
    let services: String = lines.into_iter().collect();
    let hairpin = if itself.is_empty() {
        String::new()
    } else {
        let pairs: Vec<String> = itself.into_iter().collect();
        format!("        ip saddr . ip daddr {{ {} }} snat to {gateway}\n", pairs.join(", "))
    };
    format!(
        "table ip cairn-services
delete table ip cairn-services
table ip cairn-services {{
    chain services {{
{services}    }}
    chain prerouting {{
        type nat hook prerouting priority -100; policy accept;
        jump services
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        jump services
    }}
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
{hairpin}    }}
}}
"
    )
}

/// One rule for each address and port of a service.
fn service_rules(service: &Service, endpoints: &[Endpoint]) -> Vec<String> {
    let mut rules = Vec::new();
    for vip in service.vips.iter().filter(|vip| vip.address.is_ipv4()) {
        for port in &service.ports {
            let target = |endpoint: &Endpoint| {
                Some((address_of(endpoint)?, endpoint.target_port(service, port.port)?))
            };
            let targets: Vec<_> = endpoints.iter().filter_map(target).collect();
            let mut choices = String::new();
            for (index, (address, target)) in targets.iter().enumerate() {
                let comma = if index == 0 { "" } else { ", " };
                // Writing to a String cannot fail.
                let _infallible = write!(choices, "{comma}{index} : {address} . {target}");
            }
            if !targets.is_empty() {
                rules.push(format!(
                    "        ip daddr {} tcp dport {} dnat to numgen random mod {} map {{ {choices} }}\n",
                    vip.address,
                    port.port,
                    targets.len()
                ));
            }
        }
    }
    rules
}

fn address_of(endpoint: &Endpoint) -> Option<Ipv4Addr> {
    match endpoint.workload.addresses.first()? {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    }
}

fn open(name: &str) -> Result<Namespace> {
    Ok(Namespace::open(&Path::new(NAMESPACES).join(name))?)
}

/// Sets kernel parameters below `net/ipv4`, which are those of the namespace that the writing thread is in.
fn set(namespace: &Namespace, parameters: &[&str]) -> Result<()> {
    for parameter in parameters {
        let (name, value) = parameter.split_once('=').context("not name=value")?;
        let file = Path::new("/proc/sys/net/ipv4").join(name);
        namespace
            .within(|| std::fs::write(&file, value))?
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Runs a program with `script` as its input, in a namespace if one is given: a process begins in that of the thread
/// that starts it.
fn feed(program: &str, arguments: &[&str], namespace: Option<&Namespace>, script: &str) -> Result<()> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let spawned = match namespace {
        Some(namespace) => namespace.within(|| command.spawn())?,
        None => command.spawn(),
    };
    let mut child = spawned.with_context(|| format!("cannot run {program}"))?;
    let written = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(script.as_bytes()));
    let output = child.wait_with_output().with_context(|| format!("cannot run {program}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), error.trim());
    written.with_context(|| format!("{program} did not read its input"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::{
        AppProtocol, Change, Identity, LoadBalancing, NetworkAddress, ResourceName, ServicePort, Store,
        Workload,
    };

    #[test]
    fn words_are_safe_in_scripts() {
        for (text, expected) in
            [("shop.web-0", true), ("a\nnetns", false), ("a b", false), ("../x", false), ("a;b", false)]
        {
            assert_eq!(is_word(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_services_address_becomes_one_of_its_pods() {
        let host = "web.shop.svc.cluster.local";
        let endpoint = |name: &str, address: &str| Workload {
            addresses: vec![address.parse().unwrap()],
            services: [(ResourceName::new("shop", host), Vec::new())].into_iter().collect(),
            ..Workload::new(name, name, Identity::new("cluster.local", "shop", "web").unwrap())
        };
        let service = Service {
            name: "web".into(),
            namespace: "shop".into(),
            hostname: host.into(),
            vips: vec![NetworkAddress { network: "".into(), address: "10.96.1.0".parse().unwrap() }],
            ports: vec![ServicePort { port: 80, target_port: 8080, protocol: AppProtocol::Http11 }],
            subject_alt_names: Vec::new(),
            waypoint: None,
            load_balancing: LoadBalancing::default(),
            canonical: true,
            ..Service::default()
        };
        let mut store = Store::new();
        store.apply([Change::Service(service)]);
        let gateway = Ipv4Addr::new(10, 244, 0, 1);
        let rules = balancing_rules(&store.snapshot(), gateway);
        assert!(!rules.contains("dnat") && !rules.contains("snat"), "no endpoint: {rules}");
        store.apply([
            Change::Workload(endpoint("a", "10.244.1.0")),
            Change::Workload(endpoint("b", "10.244.1.1")),
        ]);
        let rules = balancing_rules(&store.snapshot(), gateway);
        for (pair, other) in [("10.244.1.0", "10.244.1.1"), ("10.244.1.1", "10.244.1.0")] {
            let choice = format!("mod 2 map {{ 0 : {pair} . 8080, 1 : {other} . 8080 }}");
            let found =
                rules.contains(&format!("ip daddr 10.96.1.0 tcp dport 80 dnat to numgen random {choice}"));
            let itself = format!("{pair} . {pair}");
            assert!(rules.contains(&itself), "{itself} is missing: {rules}");
            if found {
                return;
            }
        }
        panic!("no rule with both pods: {rules}");
    }
}
