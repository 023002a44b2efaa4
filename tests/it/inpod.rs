//! In-pod mode: the ztunnel of each node is told its pods by istio-cni (a program here that plays its part) and serves
//! them in their own network namespaces, under the redirection that istio-cni installs. Two nodes, each with pods in the
//! mesh and one outside, and a waypoint.
//!
//! Needs root, `ip` and `nft`; where these are missing each test says `skipped:` and why.

mod cni;
mod demand;
mod handover;
mod kept;
mod local;
mod names;
mod nodes;

use crate::harness::{cairn, is_established_to};
use crate::netns::{connect_in, exchange, skipped, within};
use anyhow::{Context, Result, ensure};
use cni::{Connection, Listener, Named};
use nodes::{APPLICATION, Application, FABRIC, Network, Program};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// How long anything may take on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(60);

/// The pods: name, node, last octet of the address, whether istio-cni has taken it into the mesh.
const PODS: [(&str, u8, u8, bool); 12] = [
    ("client", 1, 21, true),
    ("near", 1, 22, true),
    ("far", 2, 23, true),
    ("guarded", 2, 24, true),
    ("outside-near", 1, 25, false),
    ("outside-far", 2, 26, false),
    ("waypoint", 2, 27, false),
    ("late", 1, 28, false),
    ("passing", 2, 29, false),
    ("sandwich", 2, 30, true),
    ("alone", 1, 31, false),
    ("brief", 2, 32, false),
];

/// The ztunnels' own pods: name, node, last octet of the address.
const ZTUNNELS: [(&str, u8, u8); 2] = [("ztunnel1", 1, 2), ("ztunnel2", 2, 2)];

/// The service of `far`, which has a waypoint.
const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 97, 0, 1)), 80);

/// A service whose waypoint stands behind a ztunnel of its own.
const SANDWICHED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 97, 0, 2)), 81);

/// Where that waypoint takes its tunnels.
const HANDOVER_PORT: u16 = 15088;

/// What the node's DNS servers say of every other name.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: waypoint, namespace: shop, labels: { istio.io/waypoint-for: service } }
spec:
  gatewayClassName: istio-waypoint
  listeners: [{ name: mesh, port: 15008, protocol: HBONE }]
---
apiVersion: v1
kind: Service
metadata: { name: far, namespace: shop, labels: { istio.io/use-waypoint: waypoint } }
spec: { clusterIP: 10.97.0.1, selector: { app: far }, ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: sandwich
  namespace: shop
  labels: { istio.io/waypoint-for: service }
  annotations: { ambient.istio.io/waypoint-inbound-binding: PROXY/15088 }
spec:
  gatewayClassName: istio-waypoint
  listeners: [{ name: mesh, port: 15008, protocol: HBONE }]
---
apiVersion: v1
kind: Service
metadata: { name: near, namespace: shop, labels: { istio.io/use-waypoint: sandwich } }
spec: { clusterIP: 10.97.0.2, selector: { app: near }, ports: [{ name: tcp, port: 81, targetPort: 8080 }] }
---
# The pod `guarded` takes traffic from `near` only.
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: only-near, namespace: shop }
spec:
  selector: { matchLabels: { app: guarded } }
  rules: [{ from: [{ source: { principals: [cluster.local/ns/shop/sa/near] } }] }]
"#;

#[test]
fn captured_pods_talk_through_tunnels_on_one_node_and_across() {
    let Some(cluster) = shared() else { return };
    for (server, node) in [("near", 1), ("far", 2)] {
        let to = cluster.application(server);
        let mut talk = cluster.talk("client", to).unwrap();
        assert_eq!(talk.greeting, cluster.address("client"), "{server}: the application sees who calls");
        talk.echo("one question").unwrap();
        let source = talk.local();
        drop(talk);
        let out = cluster.record(1, source, "outbound");
        assert_eq!((&out["way"], &out["authority"]), (&"direct".into(), &to.to_string().into()), "{out}");
        let arrived = cluster.record_with(node, "inbound", |record| {
            record["authority"] == to.to_string() && record["sourceWorkload"] == "shop/client"
        });
        assert_eq!(arrived["sourceIdentity"], "spiffe://cluster.local/ns/shop/sa/client", "{arrived}");
        for (of, reporter) in [(1, "source"), (node, "destination")] {
            let metrics = cluster.metrics(of).unwrap();
            let counted = metrics.lines().any(|line| {
                line.starts_with("istio_tcp_connections_opened_total{")
                    && line.contains(&format!("reporter=\"{reporter}\""))
                    && line.contains("source_workload=\"client\"")
                    && line.contains(&format!("destination_workload=\"{server}\""))
                    && line.contains("connection_security_policy=\"mutual_tls\"")
            });
            assert!(counted, "{reporter} of {server}: {metrics}");
        }
    }
}

#[test]
fn a_server_outside_the_mesh_is_reached_in_plaintext() {
    let Some(cluster) = shared() else { return };
    for server in ["outside-near", "outside-far"] {
        let mut talk = cluster.talk("client", cluster.application(server)).unwrap();
        talk.echo("a question").unwrap();
        assert_eq!(talk.greeting, cluster.address("client"), "{server}");
        let source = talk.local();
        drop(talk);
        let record = cluster.record(1, source, "outbound");
        assert_eq!((&record["way"], &record["authority"]), (&"plain".into(), &"".into()), "{record}");
    }
}

#[test]
fn a_client_outside_the_mesh_arrives_in_plaintext_and_has_no_name() {
    let Some(cluster) = shared() else { return };
    for (client, server, node) in
        [("outside-near", "near", 1), ("outside-far", "near", 1), ("outside-near", "far", 2)]
    {
        let mut talk = cluster.talk(client, cluster.application(server)).unwrap();
        talk.echo("a question").unwrap();
        assert_eq!(talk.greeting, cluster.address(client), "{client} to {server}: the address is kept");
        let source = talk.local();
        drop(talk);
        let record = cluster.record(node, source, "inbound");
        assert_eq!(
            (&record["way"], &record["sourceIdentity"]),
            (&"plaintext".into(), &Value::Null),
            "{record}"
        );
    }
}

#[test]
fn a_service_with_a_waypoint_is_reached_through_it() {
    let Some(cluster) = shared() else { return };
    let mut talk = cluster.talk("client", SERVICE).unwrap();
    talk.echo("a question").unwrap();
    assert_eq!(talk.greeting, cluster.address("waypoint"), "the waypoint calls in place of the client");
    let source = talk.local();
    drop(talk);
    let record = cluster.record(1, source, "outbound");
    assert_eq!((&record["way"], &record["authority"]), (&"waypoint".into(), &SERVICE.to_string().into()));
}

/// The waypoint learns by a header who calls and where to, on the pod's loopback, where nobody else can tell it such things.
#[test]
fn a_waypoint_behind_a_ztunnel_is_told_who_calls_and_where_to() {
    let Some(cluster) = shared() else { return };
    let namespace = cluster.network.open("sandwich").unwrap();
    let loopback = (Ipv4Addr::LOCALHOST, HANDOVER_PORT);
    let listener = namespace.within(|| TcpListener::bind(loopback)).unwrap().unwrap();
    let waypoint = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept()?;
        stream.set_read_timeout(Some(SOON))?;
        let mut fixed = [0; 16];
        stream.read_exact(&mut fixed)?;
        let mut rest = vec![0; u16::from_be_bytes([fixed[14], fixed[15]]).into()];
        stream.read_exact(&mut rest)?;
        let mut word = [0; 5];
        stream.read_exact(&mut word)?;
        stream.write_all(b"heard")?;
        std::io::Result::Ok((peer, fixed, rest, word))
    });
    let mut stream = connect_in(&cluster.network.file("client"), SANDWICHED).unwrap();
    stream.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"heard", "what follows the header is the tunnel's, both ways");
    let source = stream.local_addr().unwrap();
    let (peer, fixed, rest, word) = waypoint.join().unwrap().unwrap();
    assert!(peer.ip().is_loopback(), "{peer}");
    assert_eq!(fixed[..14], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11", "PROXY protocol 2, TCP over IPv4");
    let SocketAddr::V4(to) = SANDWICHED else { panic!() };
    let IpAddr::V4(client) = cluster.address("client") else { panic!() };
    assert_eq!((&rest[..4], &rest[4..8]), (&client.octets()[..], &to.ip().octets()[..]), "{rest:?}");
    assert_ne!(u16::from_be_bytes([rest[8], rest[9]]), 0, "the tunnel's own port");
    assert_eq!(u16::from_be_bytes([rest[10], rest[11]]), to.port());
    let identity = b"spiffe://cluster.local/ns/shop/sa/client";
    assert_eq!((rest[12], usize::from(rest[14])), (0xd0, identity.len()), "{rest:?}");
    assert_eq!(&rest[15..], identity);
    assert_eq!(&word, b"hello");
    drop(stream);
    let record = cluster.record(1, source, "outbound");
    assert_eq!((&record["way"], &record["authority"]), (&"waypoint".into(), &SANDWICHED.to_string().into()));
    // From the network there is no way to it.
    let listener = namespace.within(|| TcpListener::bind(loopback)).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    let to = SocketAddr::new(cluster.address("sandwich"), HANDOVER_PORT);
    assert!(cluster.call("outside-far", to).is_none());
    assert!(listener.accept().is_err(), "somebody got round the ztunnel");
}

#[test]
fn a_policy_decides_by_identity_across_nodes() {
    let Some(cluster) = shared() else { return };
    let to = cluster.application("guarded");
    cluster.talk("near", to).unwrap().echo("a question").unwrap();
    for stranger in ["client", "outside-far"] {
        let refused = cluster.talk(stranger, to);
        assert!(refused.is_err(), "{stranger} was let in");
    }
}

/// Whichever server a pod asks for names, the mesh answers about itself, and the rest goes to the node's servers.
#[test]
fn names_are_answered_from_the_mesh_or_passed_on() {
    let Some(cluster) = shared() else { return };
    // Nobody is there: redirection takes the question.
    let server: SocketAddr = "10.96.0.10:53".parse().unwrap();
    let service = Ipv4Addr::new(10, 97, 0, 1);
    for (pod, name, expected) in [
        ("client", "far.shop.svc.cluster.local", (0, vec![service])),
        ("client", "far", (0, vec![service])),
        ("guarded", "far.shop", (0, vec![service])),
        ("client", "www.example.com", (0, vec![ELSEWHERE])),
        ("client", "no.example.com", (3, vec![])),
    ] {
        let namespace = cluster.network.open(pod).unwrap();
        let told = names::ask(&namespace, server, name);
        assert_eq!(told.unwrap(), expected, "{pod}: {name}");
    }
    let metrics = cluster.metrics(1).unwrap();
    for counted in ["istio_dns_requests_total{", "istio_dns_upstream_requests_total{"] {
        let found = metrics.lines().any(|line| {
            line.starts_with(counted)
                && line.contains("request_query_type=\"A\"")
                && line.contains("source_canonical_service=\"client\"")
        });
        assert!(found, "{counted}: {metrics}");
    }
}

/// A ztunnel's own pod takes tunnels, so that its metrics need not cross the network in the clear.
#[test]
fn a_ztunnels_metrics_are_scraped_through_the_mesh() {
    let Some(cluster) = shared() else { return };
    for (ztunnel, node, number) in ZTUNNELS {
        let to = SocketAddr::new(IpAddr::from([10, 77, node, number]), 15020);
        let mut connection = connect_in(&cluster.network.file("client"), to).unwrap();
        let source = connection.local_addr().unwrap();
        let answer = exchange(&mut connection, "/metrics", b"").unwrap();
        assert!(answer.status == 200 && answer.body.contains("istio_build{"), "{}", answer.body);
        drop(connection);
        let out = cluster.record(1, source, "outbound");
        assert_eq!((&out["way"], &out["authority"]), (&"direct".into(), &to.to_string().into()), "{out}");
        let arrived = cluster.record_with(node, "inbound", |record| record["authority"] == to.to_string());
        assert_eq!(
            arrived["sourceIdentity"], "spiffe://cluster.local/ns/shop/sa/client",
            "{ztunnel}: {arrived}"
        );
    }
}

/// Nobody gets round redirection by calling the ztunnel's own ports, neither on their own pod nor on another, and none
/// of it makes the ztunnel call itself for ever.
#[test]
fn the_ztunnels_own_ports_are_no_way_in_or_round() {
    let Some(cluster) = shared() else { return };
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    for client in ["client", "outside-near", "outside-far"] {
        for target in [loopback, cluster.address("client"), cluster.address("near"), cluster.address("far")] {
            for port in [15001, 15006, 15008] {
                let to = SocketAddr::new(target, port);
                let answer = cluster.call(client, to);
                assert!(answer.is_none(), "{client} to {to}: {answer:?}");
            }
        }
    }
    cluster.talk("client", cluster.application("far")).unwrap().echo("all is well").unwrap();
    for node in [1, 2] {
        let open = cluster.metrics(node).unwrap();
        assert!(open.contains("workload_manager_active_proxy_count"), "{open}");
    }
}

#[test]
fn a_pod_joins_and_leaves_while_others_go_on() {
    let Some(cluster) = shared() else { return };
    let mut other = cluster.talk("client", cluster.application("far")).unwrap();
    for round in ["first", "again"] {
        cluster.join("late", 1).unwrap();
        let mut out = cluster.talk("late", cluster.application("far")).unwrap();
        let mut inbound = cluster.talk("client", cluster.application("late")).unwrap();
        for talk in [&mut out, &mut inbound] {
            talk.echo("a question").unwrap();
        }
        assert!(cluster.tunnels_from("late") > 0, "{round}");
        assert_eq!(cluster.cni(1).delete(&uid("late")).unwrap(), "", "{round}");
        for talk in [&mut out, &mut inbound] {
            assert!(talk.is_ended(), "{round}: a connection outlives its pod");
        }
        assert!(
            within(SOON, || cluster.tunnels_from("late") == 0),
            "{round}: its tunnels hold its namespace"
        );
        // Its redirection is still there, and leads nowhere.
        assert!(cluster.talk("late", cluster.application("far")).is_err(), "{round}");
        assert!(cluster.talk("outside-near", cluster.application("late")).is_err(), "{round}");
        other.echo("still there").unwrap();
    }
}

/// A rolling update: the successor listens in the same pods beside the old ztunnel, which is then ended.
#[test]
fn a_successor_takes_over_without_a_broken_connection() {
    if skipped() {
        return;
    }
    let mut cluster = Cluster::start().unwrap();
    let mut out = cluster.talk("client", cluster.application("far")).unwrap();
    let mut inbound = cluster.talk("outside-near", cluster.application("near")).unwrap();
    let successor = cluster.start_ztunnel(1, "successor").unwrap();
    let connection = cluster.node(1).listener.accept().unwrap();
    for pod in ["client", "near"] {
        cluster.add(&connection, pod).unwrap();
    }
    assert_eq!(connection.snapshot_sent().unwrap(), "");
    assert!(within(SOON, || cluster.is_ready_in("successor")), "{}", successor.log());
    let old = &mut cluster.nodes.get_mut(&1).unwrap().ztunnel;
    old.terminate();
    assert!(within(SOON, || old.log().contains("draining")), "{}", old.log());
    for talk in [&mut out, &mut inbound] {
        talk.echo("still there").unwrap();
    }
    // What reached the old one in the moment in which it stopped listening may have been refused.
    let anew = || cluster.talk("client", cluster.application("near")).and_then(|mut talk| talk.echo("anew"));
    assert!(within(SOON, || anew().is_ok()), "{:?}", anew());
    for _ in 0..10 {
        anew().unwrap();
    }
    for talk in [&mut out, &mut inbound] {
        talk.echo("still there").unwrap();
    }
    drop((out, inbound));
    let old = &mut cluster.nodes.get_mut(&1).unwrap().ztunnel;
    assert!(within(SOON, || old.has_ended()), "{}", old.log());
    cluster.talk("client", cluster.application("far")).unwrap().echo("anew").unwrap();
}

/// What is no network namespace cannot be served; the ztunnel says so, is not ready, and tries again until told to stop.
#[test]
fn a_pod_that_cannot_be_served_is_pending_until_it_is_deleted() {
    let Some(cluster) = shared() else { return };
    let file = File::open("/dev/null").unwrap();
    let named = Named { uid: "broken", namespace: "shop", name: "broken", service_account: "broken" };
    let cni = cluster.cni(2);
    let error = cni.add(&named, file.as_fd()).unwrap();
    assert!(error.starts_with("failure to start proxy: "), "{error}");
    assert!(!cluster.is_ready(2), "ready in spite of a pending pod");
    let dump = cluster.json(2, "/config_dump").unwrap();
    assert_eq!(dump["workloadState"]["broken"]["state"], "Pending", "{}", dump["workloadState"]);
    assert_eq!(dump["workloadState"][uid("far")]["state"], "Up", "{}", dump["workloadState"]);
    assert_eq!(cni.delete("broken").unwrap(), "");
    assert!(within(SOON, || cluster.is_ready(2)));
}

/// A message out of order or without its descriptor is answered with why not, and costs the connection; the pods stay,
/// and what the next snapshot does not name goes.
#[test]
fn a_bad_message_and_a_new_connection_leave_pods_alone() {
    use cairn_proto::zds::workload_request::Payload;
    use cairn_proto::zds::{AddWorkload, KeepWorkload};
    let Some(cluster) = shared() else { return };
    cluster.join("passing", 2).unwrap();
    let mut talk = cluster.talk("client", cluster.application("far")).unwrap();
    let own = File::open("/proc/self/ns/net").unwrap();
    let nameless = Payload::Add(AddWorkload { uid: "x".into(), workload_info: None });
    let late = Payload::Keep(KeepWorkload { uid: uid("far") });
    for (payload, descriptors, expected) in [
        (nameless.clone(), vec![own.as_fd()], "failure to process message: no workload_info"),
        (late, vec![], "failure to process message: KeepWorkload after SnapshotSent"),
        (nameless, vec![], "failure to read message: no network namespace with the pod"),
    ] {
        let mut cni = cluster.cni(2);
        assert_eq!(cni.ask(payload, &descriptors).unwrap(), expected);
        assert!(cni.is_closed().unwrap(), "{expected}");
        *cni = cluster.node(2).listener.accept().unwrap();
        assert!(!cluster.is_ready(2), "ready before the snapshot");
        // Two pods' namespaces cannot be sent again, one is sent again, one is gone.
        for pod in ["far", "sandwich"] {
            assert_eq!(cni.keep(&uid(pod)).unwrap(), "");
        }
        cluster.add(&cni, "guarded").unwrap();
        assert_eq!(cni.snapshot_sent().unwrap(), "");
        talk.echo("still there").unwrap();
        assert!(cluster.talk("outside-far", cluster.application("passing")).is_err(), "not in the snapshot");
    }
    assert!(within(SOON, || cluster.is_ready(2)));
    cluster.talk("client", cluster.application("far")).unwrap().echo("anew").unwrap();
}

#[test]
fn certificates_are_fetched_ahead_and_forgotten_with_their_pods() {
    let Some(cluster) = shared() else { return };
    let state = || {
        let dump = cluster.json(2, "/config_dump").unwrap();
        let mut certificates = dump["certificates"].as_array().into_iter().flatten();
        let own = certificates.find(|one| one["identity"] == "spiffe://cluster.local/ns/shop/sa/visitor")?;
        Some((own["state"].clone(), own["certChain"].as_array().map_or(0, Vec::len)))
    };
    assert_eq!(state(), None);
    let (beside, manifest) = (cluster.file("visitor.yaml"), cluster.file("manifests/visitor.yaml"));
    std::fs::write(&beside, pod("visitor", 2, 99, "")).unwrap();
    std::fs::rename(&beside, &manifest).unwrap();
    assert!(within(SOON, || state() == Some(("Available".into(), 1))), "{:?}", state());
    std::fs::remove_file(&manifest).unwrap();
    assert!(within(SOON, || state().is_none()), "{:?}", state());
}

#[test]
fn operators_see_that_it_lives_and_change_its_log() {
    let Some(cluster) = shared() else { return };
    assert_eq!(cluster.fetch(1, 15021, "/healthz/live").unwrap(), (200, "live\n".to_owned()));
    let change = |query: &str| {
        let at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 15000);
        let mut connection = connect_in(&cluster.network.file("ztunnel1"), at).unwrap();
        // What is sent along makes it a POST.
        let answer = exchange(&mut connection, &format!("/logging{query}"), b"x").unwrap();
        (answer.status, answer.body)
    };
    assert_eq!(change(""), (200, "current log level is info\n".to_owned()));
    let (status, said) = change("?level=cairn_net=trace");
    assert!(status == 200 && said.contains("cairn_net=trace") && said.contains("info"), "{status} {said}");
    assert_eq!(change("?level=cairn_net=loud").0, 400);
    assert_eq!(change("?reset"), (200, "current log level is info\n".to_owned()));
    let metrics = cluster.metrics(1).unwrap();
    for name in
        ["process_open_fds ", "workload_manager_active_proxy_count ", "istio_build{component=\"ztunnel\""]
    {
        assert!(metrics.lines().any(|line| line.starts_with(name)), "{name}: {metrics}");
    }
}

// What the tests stand on.

/// The cluster that tests share while any of them runs; `None`, and said why, where there can be none.
fn shared() -> Option<Arc<Cluster>> {
    static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
    if skipped() {
        return None;
    }
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    Some(shared.upgrade().unwrap_or_else(|| {
        let cluster = Arc::new(Cluster::start().unwrap());
        *shared = Arc::downgrade(&cluster);
        cluster
    }))
}

/// What Kubernetes would call a pod.
fn uid(pod: &str) -> String {
    format!("uid-of-{pod}")
}

/// A node: its ztunnel, and istio-cni's side of their connection.
struct Node {
    listener: Listener,
    connection: Mutex<Connection>,
    ztunnel: Program,
}

/// Two nodes with their pods. What is above ends first.
struct Cluster {
    /// More in the environment of all ztunnels. A value that begins with `@` is a file, of each node in `#`.
    settings: &'static [(&'static str, &'static str)],
    programs: Vec<Program>,
    applications: Vec<Application>,
    _names: Option<names::Server>,
    nodes: BTreeMap<u8, Node>,
    network: Network,
    home: tempfile::TempDir,
}

impl Cluster {
    fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    fn start_with(settings: &'static [(&'static str, &'static str)]) -> Result<Self> {
        let mut cluster = Self {
            settings,
            programs: Vec::new(),
            applications: Vec::new(),
            _names: None,
            nodes: BTreeMap::new(),
            network: Network::create(2)?,
            home: tempfile::tempdir()?,
        };
        for (name, node, number, _) in PODS {
            cluster.network.add_pod(name, node, number)?;
            if name != "waypoint" {
                cluster.applications.push(Application::start(&cluster.network.open(name)?)?);
            }
        }
        for (name, node, number) in ZTUNNELS.into_iter().chain([("successor", 1, 3)]) {
            cluster.network.add_pod(name, node, number)?;
            cluster.network.set_resolvers(name, &format!("nameserver {FABRIC}\n"))?;
        }
        let fabric = cluster.network.open("fabric")?;
        let names = names::Server::start(&fabric, SocketAddr::new(FABRIC.into(), 53), ELSEWHERE)?;
        cluster._names = Some(names);
        cluster.start_control_plane()?;
        cluster.start_waypoint()?;
        for node in [1, 2] {
            cluster.start_node(node)?;
        }
        Ok(cluster)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn start_control_plane(&mut self) -> Result<()> {
        let mut manifests = MESH.to_owned();
        for (name, node, number, is_captured) in PODS {
            let labels = match (name, is_captured) {
                ("waypoint", _) => "gateway.networking.k8s.io/gateway-name: waypoint",
                ("sandwich", _) => "gateway.networking.k8s.io/gateway-name: sandwich",
                ("outside-near" | "outside-far", _) => "istio.io/dataplane-mode: none",
                _ => "",
            };
            manifests += &pod(name, node, number, labels);
        }
        for (name, node, number) in ZTUNNELS {
            let labels = "istio.io/dataplane-mode: none, networking.istio.io/tunnel: http";
            manifests += &pod(name, node, number, labels);
        }
        std::fs::create_dir_all(self.file("manifests"))?;
        std::fs::write(self.file("manifests/mesh.yaml"), manifests)?;
        let (manifests, state) = (self.file("manifests"), self.file("state"));
        let listen = format!("{FABRIC}:15012");
        let program = cairn()?;
        let command = [
            &*program.to_string_lossy(),
            "xds",
            &*manifests.to_string_lossy(),
            "--state",
            &*state.to_string_lossy(),
            "--listen",
            &listen,
            "--mint",
            "1=ztunnel:node1",
            "--mint",
            "2=ztunnel:node2",
            "--mint",
            "waypoint=waypoint:shop/waypoint",
        ];
        let program = Program::start(&self.network, "fabric", &command, &[], self.file("xds.log"))?;
        let serves = within(SOON, || program.log().contains("serving "));
        ensure!(serves, "no control plane: {}", program.log());
        self.programs.push(program);
        Ok(())
    }

    fn start_waypoint(&mut self) -> Result<()> {
        let (root, token) = (self.file("state/root.pem"), self.file("state/tokens/waypoint.token"));
        let (program, xds) = (cairn()?, format!("https://{FABRIC}:15012"));
        let address = self.address("waypoint").to_string();
        let command = [
            &*program.to_string_lossy(),
            "waypoint",
            "--gateway",
            "shop/waypoint",
            "--xds-address",
            &xds,
            "--xds-root",
            &*root.to_string_lossy(),
            "--token",
            &*token.to_string_lossy(),
            "--address",
            &address,
        ];
        let log = self.file("waypoint.log");
        self.programs.push(Program::start(&self.network, "waypoint", &command, &[], log)?);
        Ok(())
    }

    fn start_node(&mut self, node: u8) -> Result<()> {
        let listener = Listener::bind(&self.file(&format!("cni{node}.sock")))?;
        let ztunnel = self.start_ztunnel(node, &format!("ztunnel{node}"))?;
        let connection = listener.accept()?;
        for (name, ..) in PODS.iter().filter(|(_, of, _, is_captured)| *of == node && *is_captured) {
            self.network.redirect(name)?;
            self.add(&connection, name)?;
        }
        ensure!(!self.is_ready(node), "ready before the snapshot");
        let answer = connection.snapshot_sent()?;
        ensure!(answer.is_empty(), "{answer}");
        self.nodes.insert(node, Node { listener, connection: Mutex::new(connection), ztunnel });
        ensure!(within(SOON, || self.is_ready(node)), "the ztunnel of node {node} is not ready");
        Ok(())
    }

    /// Starts a ztunnel of a node, in a pod of its own.
    fn start_ztunnel(&self, node: u8, pod: &str) -> Result<Program> {
        self.start_ztunnel_with(node, pod, pod, &[])
    }

    /// The same, with more in its environment, and its log under another name.
    fn start_ztunnel_with(&self, node: u8, pod: &str, log: &str, more: &[(&str, &str)]) -> Result<Program> {
        let (root, token) = (self.file("state/root.pem"), self.file(&format!("state/tokens/{node}.token")));
        let socket = self.file(&format!("cni{node}.sock"));
        let (program, name, istiod) = (cairn()?, nodes::node_name(node), format!("{FABRIC}:15012"));
        // As Istio's chart starts its ztunnel.
        let command = [&*program.to_string_lossy(), "ztunnel", "proxy", "ztunnel"];
        let settings = self.settings.iter().map(|(name, value)| match value.strip_prefix('@') {
            Some(file) => {
                let file = self.file(&file.replace('#', &node.to_string()));
                (*name, file.to_string_lossy().into_owned())
            }
            None => (*name, (*value).to_owned()),
        });
        let settings: Vec<(&str, String)> = settings.collect();
        let (root, token, socket) =
            (root.to_string_lossy(), token.to_string_lossy(), socket.to_string_lossy());
        let mut environment = vec![
            ("NODE_NAME", name.as_str()),
            ("XDS_ADDRESS", &istiod),
            ("CA_ADDRESS", &istiod),
            ("XDS_ROOT_CA", &root),
            ("CA_ROOT_CA", &root),
            ("AUTH_TOKEN", &token),
            ("INPOD_UDS", &socket),
            ("INPOD_ENABLED", "true"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ];
        if ZTUNNELS.iter().any(|(name, ..)| *name == pod) {
            environment.extend([("POD_NAME", pod), ("POD_NAMESPACE", "shop"), ("SERVICE_ACCOUNT", pod)]);
        }
        environment.extend(settings.iter().map(|(name, value)| (*name, value.as_str())));
        environment.extend(more);
        Program::start(&self.network, pod, &command, &environment, self.file(&format!("{log}.log")))
    }

    /// What istio-cni does for a pod that joins the mesh while it runs.
    fn join(&self, pod: &str, node: u8) -> Result<()> {
        // Redirection stays when a pod has left and comes again.
        static REDIRECTED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
        let file = self.network.file(pod);
        let mut redirected = REDIRECTED.lock().unwrap_or_else(PoisonError::into_inner);
        if !redirected.contains(&file) {
            self.network.redirect(pod)?;
            redirected.push(file);
        }
        self.add(&self.cni(node), pod)
    }

    fn add(&self, cni: &Connection, pod: &str) -> Result<()> {
        let uid = uid(pod);
        let named = Named { uid: &uid, namespace: "shop", name: pod, service_account: pod };
        let answer = cni.add(&named, File::open(self.network.file(pod))?.as_fd())?;
        ensure!(answer.is_empty(), "{pod}: {answer}");
        Ok(())
    }

    fn node(&self, node: u8) -> &Node {
        &self.nodes[&node]
    }

    /// istio-cni's connection to a node's ztunnel.
    fn cni(&self, node: u8) -> std::sync::MutexGuard<'_, Connection> {
        self.node(node).connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self, pod: &str) -> IpAddr {
        let (_, node, number, _) = PODS.iter().find(|(name, ..)| *name == pod).unwrap();
        IpAddr::from([10, 77, *node, *number])
    }

    fn application(&self, pod: &str) -> SocketAddr {
        SocketAddr::new(self.address(pod), APPLICATION)
    }

    /// Connects as a program in a pod would, and waits for the application's greeting.
    fn talk(&self, pod: &str, to: SocketAddr) -> Result<Talk> {
        Talk::on(connect_in(&self.network.file(pod), to)?)
    }

    /// Connects and says what is no protocol's beginning; whom the application greets, if one answers.
    fn call(&self, pod: &str, to: SocketAddr) -> Option<IpAddr> {
        let mut stream = connect_in(&self.network.file(pod), to).ok()?;
        let mut answer = Vec::new();
        // Whether it is reset or ended makes no difference.
        let _ended = stream.write_all(b"hello\r\n\r\n").and_then(|()| stream.read_to_end(&mut answer));
        String::from_utf8_lossy(&answer).lines().next()?.trim().parse().ok()
    }

    /// How many connections to HBONE ports of others are open in a pod's namespace.
    fn tunnels_from(&self, pod: &str) -> usize {
        let namespace = self.network.open(pod).unwrap();
        let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        let (v4, v6) = namespace.within(|| (read("tcp"), read("tcp6"))).unwrap();
        let text = v4.unwrap() + &v6.unwrap_or_default();
        text.lines().filter(|line| is_established_to(line, 15008)).count()
    }

    /// Fetches from a port of a node's ztunnel for operators, as a program in its pod would.
    fn fetch(&self, node: u8, port: u16, path: &str) -> Result<(u16, String)> {
        self.fetch_in(&format!("ztunnel{node}"), port, path)
    }

    fn fetch_in(&self, pod: &str, port: u16, path: &str) -> Result<(u16, String)> {
        let at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let mut connection = connect_in(&self.network.file(pod), at)?;
        let answer = exchange(&mut connection, path, b"")?;
        Ok((answer.status, answer.body))
    }

    fn json(&self, node: u8, path: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.fetch(node, 15000, path)?.1)?)
    }

    fn metrics(&self, node: u8) -> Result<String> {
        Ok(self.fetch(node, 15020, "/metrics")?.1)
    }

    fn is_ready(&self, node: u8) -> bool {
        self.is_ready_in(&format!("ztunnel{node}"))
    }

    fn is_ready_in(&self, pod: &str) -> bool {
        matches!(self.fetch_in(pod, 15021, "/healthz/ready"), Ok((200, _)))
    }

    /// What a node's ztunnel recorded of the connection that came from `source`.
    fn record(&self, node: u8, source: SocketAddr, direction: &str) -> Value {
        self.record_with(node, direction, |record| record["source"] == source.to_string())
    }

    fn record_with(&self, node: u8, direction: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let (mut found, mut last) = (None, Value::Null);
        within(SOON, || {
            last = self.json(node, "/connections").unwrap();
            let mut records = last.as_array().into_iter().flatten();
            found = records.find(|record| record["direction"] == direction && is_it(record)).cloned();
            found.is_some()
        });
        found.unwrap_or_else(|| panic!("no such {direction} record on node {node}: {last:#}"))
    }
}

fn pod(name: &str, node: u8, number: u8, labels: &str) -> String {
    let comma = if labels.is_empty() { "" } else { ", " };
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, namespace: shop, labels: {{ app: {name}{comma}{labels} }} }}\n\
         spec:\n  nodeName: node{node}\n  serviceAccountName: {name}\n  containers:\n    \
         - {{ name: main, image: example/main, ports: [{{ containerPort: {APPLICATION} }}] }}\n\
         status: {{ phase: Running, podIP: 10.77.{node}.{number} }}\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {{ name: {name}, namespace: shop }}\n"
    )
}

/// A connection to an application.
struct Talk {
    /// Who the application says connected to it.
    greeting: IpAddr,
    reader: BufReader<TcpStream>,
}

impl Talk {
    /// Waits for the application's greeting.
    fn on(stream: TcpStream) -> Result<Self> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let greeting = line.trim().parse().with_context(|| format!("no greeting: {line:?}"))?;
        Ok(Self { greeting, reader })
    }

    fn local(&self) -> SocketAddr {
        self.reader.get_ref().local_addr().unwrap()
    }

    /// Says something and hears it back.
    fn echo(&mut self, text: &str) -> Result<()> {
        writeln!(self.reader.get_mut(), "{text}")?;
        let mut heard = String::new();
        self.reader.read_line(&mut heard)?;
        ensure!(heard.trim_end() == text, "{text:?} came back as {heard:?}");
        Ok(())
    }

    /// Whether the other side ends it.
    fn is_ended(&mut self) -> bool {
        match self.reader.read(&mut [0]) {
            Ok(length) => length == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
