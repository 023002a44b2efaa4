//! Nodes and pods on one machine: a network namespace each, wired and routed as a cluster's network does, with the
//! redirection that istio-cni installs in the pods of the mesh.

use crate::netns::LIFELINE;
use anyhow::{Context, Result, ensure};
use cairn_net::Namespace;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// Where `ip netns exec` looks for files of a namespace.
const RESOLVERS: &str = "/etc/netns";

/// What joins the nodes has this address; the control plane is there.
pub const FABRIC: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// Redirection in a pod of the mesh (facts: the nftables variant of istio-cni, with DNS).
const REDIRECTION: &str = r#"
table inet istio-ambient-nat {
    chain istio-prerouting {
        type nat hook prerouting priority -100; policy accept;
        ip saddr 169.254.7.127 meta l4proto tcp accept
        meta l4proto tcp ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
    }
    chain istio-output {
        type nat hook output priority -100; policy accept;
        ip daddr 169.254.7.127 meta l4proto tcp accept
        oifname != "lo" meta mark & 0xfff != 0x539 udp dport 53 redirect to :15053
        ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 tcp dport 53 redirect to :15053
        meta l4proto tcp meta mark & 0xfff == 0x111 accept
        ip daddr != 127.0.0.1 oifname "lo" accept
        meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15001
    }
}
table inet istio-ambient-mangle {
    chain istio-prerouting {
        type filter hook prerouting priority -150; policy accept;
        meta mark & 0xfff == 0x539 ct mark set (ct mark & 0xfffff000) | 0x111
    }
    chain istio-output {
        type route hook output priority -150; policy accept;
        ct mark & 0xfff == 0x111 meta mark set ct mark
    }
}
table inet istio-ambient-raw {
    chain istio-prerouting {
        type filter hook prerouting priority -300; policy accept;
        meta mark & 0xfff != 0x539 udp sport 53 ct zone set 1
    }
    chain istio-output {
        type filter hook output priority -300; policy accept;
        meta mark & 0xfff == 0x539 udp dport 53 ct zone set 1
    }
}
"#;

/// Replies to addresses that the ztunnel has taken are delivered in the pod.
const REPLIES: &str = "rule add fwmark 0x111/0xfff lookup 100 pref 32764\n\
                       route add local 0.0.0.0/0 dev lo table 100\n";

/// Namespaces of one run, which end with it.
pub struct Network {
    prefix: String,
    names: std::sync::Mutex<Vec<String>>,
}

impl Network {
    /// The fabric, and nodes 1 to `nodes` on it.
    pub fn create(nodes: u8) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("cairn-i{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let network = Self { prefix, names: Default::default() };
        network.add("fabric")?;
        network.ip("fabric", &format!("link set lo up\naddr add {FABRIC}/32 dev lo\n"))?;
        for node in 1..=nodes {
            network.add_node(node)?;
        }
        Ok(network)
    }

    fn add_node(&self, node: u8) -> Result<()> {
        let (name, address) = (node_name(node), node_address(node));
        self.add(&name)?;
        let target = self.name(&name);
        self.ip(
            "fabric",
            &format!(
                "link add n{node} type veth peer name eth0 netns {target}\nlink set n{node} up\n\
                 route add {address}/32 dev n{node} src {FABRIC}\n\
                 route add 10.77.{node}.0/24 via {address} dev n{node} onlink\n"
            ),
        )?;
        self.ip(
            &name,
            &format!(
                "link set lo up\naddr add {address}/32 dev eth0\nlink set eth0 up\n\
                 route add {FABRIC} dev eth0 scope link\nroute add default via {FABRIC}\n"
            ),
        )
    }

    /// A pod's namespace on a node. Its number is the last octet of its address.
    pub fn add_pod(&self, name: &str, node: u8, number: u8) -> Result<Ipv4Addr> {
        let (address, gateway) = (Ipv4Addr::new(10, 77, node, number), node_address(node));
        self.add(name)?;
        let target = self.name(name);
        let wire = format!(
            "link add p{number} type veth peer name eth0 netns {target}\nlink set p{number} up\n\
             route add {address}/32 dev p{number} src {gateway}\n"
        );
        self.ip(&node_name(node), &wire)?;
        let inside = format!(
            "link set lo up\naddr add {address}/32 dev eth0\nlink set eth0 up\n\
             route add {gateway} dev eth0 scope link\nroute add default via {gateway}\n"
        );
        self.ip(name, &inside)?;
        Ok(address)
    }

    /// What istio-cni does in a pod that joins the mesh, before it tells the ztunnel.
    pub fn redirect(&self, pod: &str) -> Result<()> {
        self.run(pod, "nft", &["-f", "-"], REDIRECTION)?;
        self.ip(pod, REPLIES)
    }

    /// The full name of a namespace.
    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// Its file.
    pub fn file(&self, name: &str) -> PathBuf {
        Path::new(NAMESPACES).join(self.name(name))
    }

    pub fn open(&self, name: &str) -> Result<Namespace> {
        Ok(Namespace::open(&self.file(name))?)
    }

    /// Has programs that are started in a namespace ask these servers for names (`ip netns exec` shows them this file).
    pub fn set_resolvers(&self, name: &str, text: &str) -> Result<()> {
        let directory = Path::new(RESOLVERS).join(self.name(name));
        std::fs::create_dir_all(&directory)?;
        Ok(std::fs::write(directory.join("resolv.conf"), text)?)
    }

    fn add(&self, name: &str) -> Result<()> {
        let full = self.name(name);
        self.names.lock().unwrap().push(full.clone());
        run(Command::new("ip").args(["netns", "add", &full]), "")?;
        let namespace = self.open(name)?;
        for (parameter, value) in
            [("ip_forward", "1"), ("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0")]
        {
            let file = Path::new("/proc/sys/net/ipv4").join(parameter);
            namespace.within(|| std::fs::write(&file, value))?.with_context(|| parameter.to_owned())?;
        }
        Ok(())
    }

    fn ip(&self, name: &str, script: &str) -> Result<()> {
        self.run(name, "ip", &["-batch", "-"], script)
    }

    fn run(&self, name: &str, program: &str, arguments: &[&str], script: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(name), program]).args(arguments);
        run(&mut command, script)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in self.names.lock().unwrap().iter() {
            // What a test has removed already is gone.
            let _gone = run(Command::new("ip").args(["netns", "del", name]), "");
            let _none = std::fs::remove_dir_all(Path::new(RESOLVERS).join(name));
        }
    }
}

pub fn node_name(node: u8) -> String {
    format!("node{node}")
}

fn node_address(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 10 + node)
}

fn run(command: &mut Command, script: &str) -> Result<()> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no pipe")?.write_all(script.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}

/// A program in a namespace. It ends when dropped, or with this process.
pub struct Program {
    child: Child,
    lifeline: Option<ChildStdin>,
    log: PathBuf,
}

impl Program {
    pub fn start(
        network: &Network,
        namespace: &str,
        command: &[&str],
        environment: &[(&str, &str)],
        log: PathBuf,
    ) -> Result<Self> {
        let out = File::create(&log)?;
        let mut child = Command::new("sh")
            .args(["-c", LIFELINE, "program", "ip", "netns", "exec", &network.name(namespace)])
            .args(command)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()?;
        let lifeline = child.stdin.take();
        Ok(Self { child, lifeline, log })
    }

    /// Sends it SIGTERM, without waiting.
    pub fn terminate(&mut self) {
        self.lifeline = None;
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} ---\n{}", self.log.display(), self.log());
        }
        self.lifeline = None;
        // The shell ends when its program has, which has a deadline of its own.
        let _status = self.child.wait();
    }
}

/// The port of every application.
pub const APPLICATION: u16 = 8080;

/// An application of a pod: it tells each client who it seems to be, then says back what it hears.
pub struct Application {
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Application {
    pub fn start(namespace: &Namespace) -> Result<Self> {
        let any = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        let listener = namespace.within(|| TcpListener::bind((any, APPLICATION)))??;
        listener.set_nonblocking(true)?;
        let ending = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ending);
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((client, peer)) => drop(std::thread::spawn(move || talk(client, peer.ip()))),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Ok(Self { ending, thread: Some(thread) })
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ended = thread.join();
        }
    }
}

fn talk(mut client: TcpStream, peer: IpAddr) {
    let mut echo = || -> std::io::Result<()> {
        client.set_nonblocking(false)?;
        client.set_read_timeout(Some(Duration::from_secs(60)))?;
        client.write_all(format!("{peer}\n").as_bytes())?;
        let mut buffer = [0; 4096];
        loop {
            let length = client.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            client.write_all(buffer.get(..length).unwrap_or_default())?;
        }
    };
    // A client that goes away is as good as one that ends.
    let _gone = echo();
}
