//! A restart without broken connections: a successor takes over the sockets of its predecessor, which is told to end, while
//! connections come and go. None fails, and none that is shorter than the drain is cut.

use super::{Cluster, SOON, Talk, names};
use crate::netns::{connect_in, skipped, within};
use anyhow::{Context, Result, ensure};
use cairn_net::Namespace;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A pause of each client between connections, so that the test does not take the whole machine.
const PAUSE: Duration = Duration::from_millis(4);

/// How long connections come before, and after the old ztunnel was told to end.
const BEFORE: Duration = Duration::from_millis(500);
const AFTER: Duration = Duration::from_secs(2);

const HANDS_OVER: &[(&str, &str)] = &[("CAIRN_HANDOVER_SOCKET", "@handover#.sock")];

/// Clients that connect, ask and go, one after the other, until told to stop.
struct Load {
    ending: Arc<AtomicBool>,
    clients: Vec<(String, JoinHandle<Result<usize>>)>,
}

impl Load {
    fn new() -> Self {
        Self { ending: Arc::default(), clients: Vec::new() }
    }

    /// Adds a client; the first error ends it.
    fn add(&mut self, name: impl Into<String>, once: impl Fn() -> Result<()> + Send + 'static) {
        let ending = Arc::clone(&self.ending);
        let client = std::thread::spawn(move || {
            let mut count = 0;
            while !ending.load(Ordering::Relaxed) {
                once().with_context(|| format!("number {count}"))?;
                count += 1;
                std::thread::sleep(PAUSE);
            }
            Ok(count)
        });
        self.clients.push((name.into(), client));
    }

    /// Adds a client that connects from a namespace to an application.
    fn connect(&mut self, name: &str, from: PathBuf, to: SocketAddr) {
        self.add(name, move || Talk::on(connect_in(&from, to)?)?.echo("a question"));
    }

    /// Stops all, none of which may have met an error.
    fn end(mut self) {
        self.ending.store(true, Ordering::Relaxed);
        let clients = std::mem::take(&mut self.clients).into_iter();
        let ended = clients.map(|(name, client)| (name, client.join().unwrap()));
        let ended: Vec<(String, Result<usize>)> = ended.collect();
        let failed: Vec<_> = ended.iter().filter(|(_, result)| result.is_err()).collect();
        assert!(failed.is_empty(), "{failed:?}");
        for (name, result) in ended {
            let count = result.unwrap_or_default();
            assert!(count > 5, "{name}: only {count} connections");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
    }
}

/// Pods of istio-cni: the successor is another pod, and the sockets are in the pods' own namespaces.
#[test]
fn pods_of_a_node_go_on_while_their_ztunnel_is_succeeded() {
    if skipped() {
        return;
    }
    let mut cluster = Cluster::start_with(HANDS_OVER).unwrap();
    let file = |pod: &str| cluster.network.file(pod);
    let mut load = Load::new();
    load.connect("out of the node by a tunnel", file("client"), cluster.application("far"));
    load.connect("into the node by a tunnel", file("far"), cluster.application("near"));
    load.connect("both by a tunnel", file("client"), cluster.application("near"));
    load.connect("out in plaintext", file("client"), cluster.application("outside-far"));
    load.connect("in in plaintext", file("outside-near"), cluster.application("near"));
    let asking = cluster.network.open("client").unwrap();
    load.add("names", move || {
        let told =
            names::ask(&asking, SocketAddr::from(([10, 96, 0, 10], 53)), "far.shop.svc.cluster.local")?;
        ensure!(told == (0, vec![Ipv4Addr::new(10, 97, 0, 1)]), "{told:?}");
        Ok(())
    });
    let mut long: Vec<Talk> = [("client", "far"), ("far", "near"), ("outside-near", "near")]
        .map(|(from, to)| cluster.talk(from, cluster.application(to)).unwrap())
        .into();
    std::thread::sleep(BEFORE);

    let successor = cluster.start_ztunnel(1, "successor").unwrap();
    let connection = cluster.node(1).listener.accept().unwrap();
    for pod in ["client", "near"] {
        cluster.add(&connection, pod).unwrap();
    }
    assert_eq!(connection.snapshot_sent().unwrap(), "");
    assert!(within(SOON, || cluster.is_ready_in("successor")), "{}", successor.log());
    let has_stopped = || successor.log().contains("the predecessor accepts no more connections");
    assert!(within(SOON, has_stopped), "{}", successor.log());
    assert!(successor.log().contains("sockets of the predecessor received"), "{}", successor.log());
    let old = &mut cluster.nodes.get_mut(&1).unwrap().ztunnel;
    old.terminate();
    std::thread::sleep(AFTER);
    assert!(!old.has_ended(), "it has connections: {}", old.log());
    for talk in &mut long {
        talk.echo("still there").unwrap();
    }
    drop(long);
    let old = &mut cluster.nodes.get_mut(&1).unwrap().ztunnel;
    assert!(within(SOON, || old.has_ended()), "{}", old.log());
    assert!(old.log().contains("all_ended=true"), "{}", old.log());
    load.end();
}

/// One pod in the ztunnel's own namespace, so that the ports for operators are handed over as well. The old one is told to
/// end before the successor is ready, and another time when there is none.
#[test]
fn a_dedicated_ztunnel_is_succeeded_though_it_was_told_to_end_before() {
    if skipped() {
        return;
    }
    let cluster = Cluster::start_with(HANDS_OVER).unwrap();
    let socket = cluster.file("dedicated.sock");
    let dedicated = |log: &str| {
        let environment = [
            ("PROXY_MODE", "dedicated"),
            ("PROXY_WORKLOAD_INFO", "shop/late/late"),
            ("UNSTABLE_ENABLE_SOCKS5", "true"),
            // There is no redirection here that would bring replies back.
            ("ENABLE_ORIG_SRC", "false"),
            ("CAIRN_HANDOVER_SOCKET", &*socket.to_string_lossy()),
        ];
        cluster.start_ztunnel_with(1, "late", log, &environment).unwrap()
    };
    let mut old = dedicated("first");
    assert!(within(SOON, || cluster.is_ready_in("late")), "{}", old.log());

    let mut load = Load::new();
    let late = cluster.network.file("late");
    load.connect("in by a tunnel", cluster.network.file("client"), cluster.application("late"));
    let (from, far) = (late.clone(), cluster.application("far"));
    load.add("out by SOCKS5", move || by_socks(&from, far)?.echo("a question"));
    let from = late.clone();
    load.add("readiness", move || {
        let mut connection = connect_in(&from, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15021))?;
        let answer = crate::netns::exchange(&mut connection, "/healthz/ready", b"")?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(())
    });
    let asking = Namespace::open(&late).unwrap();
    load.add("names", move || {
        let server = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15053);
        let told = names::ask(&asking, server, "far.shop.svc.cluster.local")?;
        ensure!(told == (0, vec![Ipv4Addr::new(10, 97, 0, 1)]), "{told:?}");
        Ok(())
    });
    for round in ["second", "third"] {
        let mut long = cluster.talk("client", cluster.application("late")).unwrap();
        std::thread::sleep(BEFORE);
        let successor = dedicated(round);
        old.terminate();
        let has_stopped = || successor.log().contains("the predecessor accepts no more connections");
        assert!(within(SOON, has_stopped), "{round}: {}", successor.log());
        std::thread::sleep(AFTER);
        long.echo("still there").unwrap();
        drop(long);
        assert!(within(SOON, || old.has_ended()), "{round}: {}", old.log());
        old = successor;
    }
    load.end();
    // What remains of a hand-over is a file that nobody listens at: the next one opens its ports itself.
    old.terminate();
    assert!(within(SOON, || old.has_ended()), "{}", old.log());
    let fresh = dedicated("fresh");
    assert!(within(SOON, || cluster.is_ready_in("late")), "{}", fresh.log());
    assert!(within(SOON, || fresh.log().contains("no predecessor")), "{}", fresh.log());
    cluster.talk("client", cluster.application("late")).unwrap().echo("anew").unwrap();
}

/// Connects by the SOCKS5 port of a pod.
pub fn by_socks(from: &std::path::Path, to: SocketAddr) -> Result<Talk> {
    let mut stream = connect_in(from, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15080))?;
    let IpAddr::V4(address) = to.ip() else { anyhow::bail!("{to} is not IPv4") };
    let mut request = vec![5, 1, 0, 5, 1, 0, 1];
    request.extend(address.octets());
    request.extend(to.port().to_be_bytes());
    stream.write_all(&request)?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer)?;
    ensure!(answer.get(..4) == Some(&[5, 0, 5, 0]), "SOCKS5 says {answer:?}");
    Talk::on(stream)
}
