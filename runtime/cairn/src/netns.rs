//! `cairn up --netns`: a network namespace per pod, joined through a node namespace, with real redirection.
//!
//! The node namespace stands for the machine: it routes between pods, and its packet filter stands in for kube-proxy.
//! A pod of the mesh gets the redirection that istio-cni installs (facts: marks 0x539 and 0x111, ports 15001, 15006,
//! 15008). Everything is in namespaces of our own; the machine's own network is not touched.

use anyhow::{Context, Result, ensure};
use cairn_mesh::{Service, Snapshot, TunnelProtocol, Workload};
use cairn_net::Namespace;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

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
    /// Makes the node namespace, which has `gateway` as its address. `prefix` begins the names of all namespaces.
    ///
    /// # Errors
    /// When not root, or `ip` or `nft` is missing or fails.
    pub fn create(prefix: &str, gateway: Ipv4Addr, state: &Path) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "--netns needs root");
        let links = state.join("netns");
        std::fs::create_dir_all(&links).with_context(|| format!("cannot create {}", links.display()))?;
        let mut network = Self {
            prefix: prefix.to_owned(),
            gateway,
            links,
            pods: BTreeMap::new(),
            balancing: String::new(),
        };
        network.remove_all();
        let node = network.node_name();
        ip(&["netns", "add", &node])?;
        network.in_node(&["ip", "link", "set", "lo", "up"])?;
        network.in_node(&["ip", "addr", "add", &format!("{gateway}/32"), "dev", "lo"])?;
        network.in_node(&["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"])?;
        network.balancing.clear();
        Ok(network)
    }

    /// The node's namespace, to listen in.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn node(&self) -> Result<Namespace> {
        Ok(Namespace::open(&Path::new(NAMESPACES).join(self.node_name()))?)
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
        vec!["ip".into(), "netns".into(), "exec".into(), self.pod_name(&format!("{namespace}.{pod}"))]
    }

    /// Makes namespaces be those of the mesh's pods, and services reachable for pods outside the mesh.
    ///
    /// # Errors
    /// When `ip` or `nft` fails.
    pub fn follow(&mut self, snapshot: &Snapshot) -> Result<()> {
        let mut wanted = BTreeMap::new();
        for workload in snapshot.workloads() {
            if let Some(address) = workload.addresses.first() {
                let redirected = workload.protocol == TunnelProtocol::Hbone && !workload.native_tunnel;
                wanted.insert(key(workload), Pod { address: *address, redirected });
            }
        }
        let known: BTreeSet<String> = self.pods.keys().cloned().collect();
        for name in known {
            if wanted.get(&name) != self.pods.get(&name) {
                self.remove_pod(&name);
            }
        }
        for (name, pod) in wanted {
            if !self.pods.contains_key(&name) {
                self.add_pod(&name, &pod)
                    .with_context(|| format!("cannot make the namespace of pod {name}"))?;
                self.pods.insert(name, pod);
            }
        }
        let balancing = balancing_rules(snapshot);
        if balancing != self.balancing {
            self.nft_in(&self.node_name(), &balancing)?;
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

    fn in_node(&self, command: &[&str]) -> Result<()> {
        run_in(&self.node_name(), command)
    }

    fn add_pod(&self, key: &str, pod: &Pod) -> Result<()> {
        let IpAddr::V4(address) = pod.address else { anyhow::bail!("only IPv4 pods can have namespaces") };
        let (name, gateway) = (self.pod_name(key), self.gateway.to_string());
        let [_, _, high, low] = address.octets();
        let outer = format!("cairn{high:02x}{low:02x}");
        let own = format!("{address}/32");
        ip(&["netns", "add", &name])?;
        self.in_node(&["ip", "link", "add", &outer, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
        self.in_node(&["ip", "link", "set", &outer, "up"])?;
        self.in_node(&["ip", "route", "replace", &own, "dev", &outer, "src", &gateway])?;
        self.in_node(&["sysctl", "-qw", &format!("net.ipv4.conf.{outer}.proxy_arp=1")])?;
        let inside = |command: &[&str]| run_in(&name, command);
        inside(&["ip", "link", "set", "lo", "up"])?;
        inside(&["ip", "addr", "add", &own, "dev", "eth0"])?;
        inside(&["ip", "link", "set", "eth0", "up"])?;
        inside(&["ip", "route", "add", &gateway, "dev", "eth0", "scope", "link"])?;
        inside(&["ip", "route", "add", "default", "via", &gateway])?;
        inside(&["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0"])?;
        if pod.redirected {
            inside(&["ip", "rule", "add", "fwmark", "0x111/0xfff", "lookup", "100", "pref", "32764"])?;
            inside(&["ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100"])?;
            self.nft_in(&name, REDIRECTION)?;
        }
        let link = self.links.join(key);
        if link.symlink_metadata().is_ok() {
            std::fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
        }
        std::os::unix::fs::symlink(Path::new(NAMESPACES).join(&name), &link)
            .with_context(|| format!("cannot create {}", link.display()))
    }

    fn remove_pod(&mut self, key: &str) {
        self.pods.remove(key);
        // What is gone already need not be removed.
        let _gone = std::fs::remove_file(self.links.join(key));
        let _gone = ip(&["netns", "del", &self.pod_name(key)]);
    }

    fn nft_in(&self, namespace: &str, rules: &str) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["netns", "exec", namespace, "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run nft")?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(rules.as_bytes()).context("cannot write to nft")?;
        }
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// Removes every namespace whose name begins with our prefix: an earlier run may have left some.
    fn remove_all(&mut self) {
        let Ok(entries) = std::fs::read_dir(NAMESPACES) else { return };
        let (pods, node) = (format!("{}-pod-", self.prefix), self.node_name());
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&pods) || name == node {
                // What is gone already need not be removed.
                let _gone = ip(&["netns", "del", &name]);
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.remove_all();
    }
}

fn key(workload: &Workload) -> String {
    format!("{}.{}", workload.namespace, workload.name)
}

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

/// What kube-proxy would do for pods outside the mesh: a service's address becomes one of its pods'.
fn balancing_rules(snapshot: &Snapshot) -> String {
    let mut lines = BTreeSet::new();
    for state in snapshot.services() {
        lines.extend(service_rules(&state.service, &state.endpoints));
    }
    let mut rules =
        String::from("table ip cairn-services\ndelete table ip cairn-services\ntable ip cairn-services {\n");
    rules
        .push_str("    chain prerouting {\n        type nat hook prerouting priority -100; policy accept;\n");
    for line in lines {
        rules.push_str(&line);
    }
    rules.push_str("    }\n}\n");
    rules
}

fn service_rules(service: &Service, endpoints: &[cairn_mesh::Endpoint]) -> Vec<String> {
    let mut rules = Vec::new();
    for (vip, port) in
        service.vips.iter().flat_map(|vip| service.ports.iter().map(move |port| (vip, port.port)))
    {
        let targets: Vec<(IpAddr, u16)> = endpoints
            .iter()
            .filter_map(|endpoint| {
                let address = endpoint.workload.addresses.first()?;
                Some((*address, endpoint.target_port(service, port)?))
            })
            .collect();
        if targets.is_empty() {
            continue;
        }
        let mut rule = format!(
            "        ip daddr {} tcp dport {port} dnat to numgen random mod {} map {{ ",
            vip.address,
            targets.len()
        );
        for (index, (address, target)) in targets.iter().enumerate() {
            // Writing to a String cannot fail.
            let _infallible =
                write!(rule, "{}{index} : {address} . {target}", if index == 0 { "" } else { ", " });
        }
        rule.push_str(" }\n");
        rules.push(rule);
    }
    rules
}

fn ip(arguments: &[&str]) -> Result<()> {
    run("ip", arguments)
}

fn run_in(namespace: &str, command: &[&str]) -> Result<()> {
    let mut arguments = vec!["netns", "exec", namespace];
    arguments.extend(command);
    run("ip", &arguments)
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), error.trim());
    Ok(())
}
