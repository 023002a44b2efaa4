//! Ways onwards over real sockets and TLS on loopback: the examples of a ztunnel's wire, gateways, names, and endpoints
//! that fail.

use super::*;
use cairn_hbone::{Connect, ServerSettings};
use cairn_identity::{Authority, CertificateSettings};
use cairn_mesh::{
    Change, GatewayAddress, GatewayTarget, NetworkAddress, PortMapping, ResourceName, Service, ServicePort,
    Store, TunnelProtocol,
};
use cairn_net::{ListenOptions, drain};
use cairn_telemetry::Direction;
use std::net::{IpAddr, Ipv4Addr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

/// What no test should ever take.
const LONG: Duration = Duration::from_secs(30);

fn identity(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account).unwrap()
}

/// An address of loopback that no other test uses: the process's number and a count make it.
fn own_address() -> IpAddr {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_mul(61).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
    let [_, a, b, c] = number.to_be_bytes();
    Ipv4Addr::new(127, 200 + a % 40, b, c).into()
}

/// A CONNECT as it arrived at a peer.
struct Seen {
    authority: String,
    headers: HeaderMap,
    identity: Identity,
}

/// A mesh, and a client `a/web` in it.
struct Scene {
    ca: Arc<Authority>,
    store: Store,
    ways: Arc<Ways>,
    _dir: tempfile::TempDir,
}

const CLIENT: &str = "10.0.1.5:43210";

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Arc::new(Authority::open(dir.path(), "cluster.local").unwrap());
        let mut store = Store::new();
        let client = Workload {
            canonical_revision: "v1".into(),
            locality: cairn_mesh::Locality { region: "r".into(), zone: "z".into(), subzone: "".into() },
            ..Workload::new("web", "web", identity("a", "x"))
        };
        store.apply([Change::Workload(client)]);
        let ways = Arc::new(Ways {
            mesh: Mesh::new(),
            certificates: Certificates::new(Arc::clone(&ca) as Arc<_>, CertificateSettings::default()),
            pools: [Pool::new(PoolSettings::default())].into(),
            tunnels: PoolSettings::default(),
            loads: Arc::default(),
            names: Names::default(),
            asked: OnDemandDns::default(),
        });
        tokio::spawn(Arc::clone(&ways.certificates).renew());
        Self { ca, store, ways, _dir: dir }
    }

    fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        self.store.apply(changes);
        self.ways.mesh.publish(self.store.snapshot());
    }

    async fn open(&self, destination: &str) -> (Result<Onward, Failure>, Account) {
        let destination = destination.parse().unwrap();
        let mut account = Account::new(Direction::Outbound, CLIENT.parse().unwrap(), destination);
        let workload = |snapshot: &Snapshot| snapshot.workload("web").cloned();
        let options = ConnectOptions { timeout: LONG, ..ConnectOptions::default() };
        let client = Client { workload: &workload, options, worker: 0 };
        let opening = open(&self.ways, &client, destination, &mut account);
        let opened = tokio::time::timeout(LONG, opening).await.expect("an answer");
        (opened, *account)
    }

    /// A peer with HBONE at `address`, who answers each CONNECT as `answer` says.
    async fn peer(
        &self,
        address: IpAddr,
        who: &Identity,
        answer: impl Fn(Connect) + Send + Sync + Clone + 'static,
    ) -> mpsc::UnboundedReceiver<Seen> {
        let at = SocketAddr::new(address, 15008);
        let listener = cairn_net::listen(at, &ListenOptions::default()).unwrap();
        let certificate = WorkloadCertificate::request(&*self.ca, who, LONG * 100).await;
        let certificate = Arc::new(certificate.unwrap());
        let (seen_sender, seen) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (_, never) = drain();
                let (answer, seen, certificate) =
                    (answer.clone(), seen_sender.clone(), Arc::clone(&certificate));
                tokio::spawn(async move {
                    let handler = |connect: Connect| {
                        let (authority, headers) =
                            (connect.authority().to_string(), connect.headers().clone());
                        let identity = connect.downstream().identity.clone();
                        // The test may be over.
                        let _ = seen.send(Seen { authority, headers, identity });
                        answer(connect);
                    };
                    // How it ends is the client's business.
                    let _ = cairn_hbone::serve(tcp, certificate, &ServerSettings::default(), never, handler)
                        .await;
                });
            }
        });
        seen
    }
}

/// Sends back what comes.
fn echo(connect: Connect) {
    tokio::spawn(async move {
        let described =
            HeaderValue::from_static("k8s.namespace.name=far,k8s.pod.name=remote-1,service.name=remote");
        let headers = [(http::HeaderName::from_static("baggage"), described)].into_iter().collect();
        let (mut read, mut write) = tokio::io::split(connect.accept(headers).unwrap());
        // The client may leave.
        if tokio::io::copy(&mut read, &mut write).await.is_ok() {
            let _ = write.shutdown().await;
        }
    });
}

fn workload(uid: &str, account: &str, address: IpAddr) -> Workload {
    Workload {
        addresses: vec![address],
        protocol: TunnelProtocol::Hbone,
        services: vec![(ResourceName::new("b", "echo.b.svc.cluster.local"), Vec::<PortMapping>::new())],
        ..Workload::new(uid, uid, identity("b", account))
    }
}

fn service() -> Service {
    Service {
        name: "echo".into(),
        namespace: "b".into(),
        hostname: "echo.b.svc.cluster.local".into(),
        vips: vec![NetworkAddress { network: "".into(), address: [10, 96, 0, 10].into() }],
        ports: vec![ServicePort { port: 80, target_port: 8080, protocol: Default::default() }],
        ..Service::default()
    }
}

fn at(network: &str, address: IpAddr) -> Option<GatewayAddress> {
    let target = GatewayTarget::Address(NetworkAddress { network: network.into(), address });
    Some(GatewayAddress { target, hbone_port: 15008 })
}

async fn expect_echo(opened: Result<Onward, Failure>) {
    let mut onward = opened.map_err(|failure| failure.reason).unwrap();
    let mut back = [0; 5];
    match &mut onward.stream {
        OnwardStream::Tcp(stream) => {
            stream.write_all(b"hello").await.unwrap();
            stream.read_exact(&mut back).await.unwrap();
        }
        OnwardStream::Tunnel(stream) => {
            stream.write_all(b"hello").await.unwrap();
            stream.read_exact(&mut back).await.unwrap();
        }
    }
    assert_eq!(&back, b"hello");
}

const BAGGAGE: &str = "k8s.cluster.name=Kubernetes,k8s.namespace.name=a,k8s.pod.name=web,service.name=web,\
                       service.version=v1,cloud.region=r,cloud.availability_zone=z";

#[tokio::test]
async fn tunnels_ask_for_what_a_ztunnels_ask_for() {
    const VIP: Option<&str> = Some("10.96.0.10:80");
    // `None`: the pod's own address and port.
    for (name, of_service, of_workload, destination, authority) in [
        ("VIP, no waypoint", false, false, VIP, None),
        ("pod address, no waypoint", false, false, None, None),
        ("VIP, service waypoint", true, false, VIP, VIP),
        ("pod address, workload waypoint", false, true, None, None),
    ] {
        let (pod, waypoint) = (own_address(), own_address());
        let pod_port = format!("{pod}:8080");
        let bound = |is: bool| at("", waypoint).filter(|_| is);
        let (bind_service, bind_workload) = (bound(of_service), bound(of_workload));
        let through_waypoint = of_service || of_workload;
        let mut scene = Scene::new();
        let wp = Workload { services: Vec::new(), ..workload("wp", "wp", waypoint) };
        scene.apply([
            Change::Service(Service { waypoint: bind_service, ..service() }),
            Change::Workload(Workload { waypoint: bind_workload, ..workload("echo", "echo", pod) }),
            Change::Workload(wp),
        ]);
        let (address, account) = if through_waypoint { (waypoint, "wp") } else { (pod, "echo") };
        let mut seen = scene.peer(address, &identity("b", account), echo).await;
        let (opened, _) = scene.open(destination.unwrap_or(&pod_port)).await;
        expect_echo(opened).await;
        let seen = seen.recv().await.unwrap();
        assert_eq!(seen.authority, authority.unwrap_or(&pod_port), "{name}");
        assert_eq!(seen.identity, identity("a", "x"), "{name}");
        assert_eq!(seen.headers.get("baggage").unwrap(), BAGGAGE, "{name}");
        let host = if destination.is_some() { ";host=echo.b.svc.cluster.local" } else { "" };
        assert_eq!(*seen.headers.get("forwarded").unwrap(), *format!("for=\"{CLIENT}\"{host}"), "{name}");
        assert_eq!(seen.headers.get("traceparent").unwrap().len(), 55, "{name}");
        assert_eq!(seen.headers.get("x-forwarded-network"), None, "{name}");
    }
}

#[tokio::test]
async fn what_is_not_in_the_mesh_is_connected_to_as_it_is() {
    let address = own_address();
    let listener = cairn_net::listen(SocketAddr::new(address, 0), &ListenOptions::default()).unwrap();
    let to = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let (mut read, mut write) = tcp.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    });
    let mut scene = Scene::new();
    scene.apply([]);
    let (opened, account) = scene.open(&to.to_string()).await;
    expect_echo(opened).await;
    assert_eq!((account.way, &*account.authority), ("passthrough", ""));
}

#[tokio::test]
async fn another_network_is_reached_by_a_tunnel_in_a_tunnel() {
    let (gateway, end) = (own_address(), own_address());
    let mut scene = Scene::new();
    let remote = Workload {
        network: "n2".into(),
        addresses: Vec::new(),
        network_gateway: at("n2", gateway),
        ..workload("split", "nobody", end)
    };
    let gw = Workload {
        network: "n2".into(),
        services: Vec::new(),
        ..Workload::new("gw", "gw", identity("istio-gateways", "gw"))
    };
    scene.apply([
        Change::Service(Service { subject_alt_names: vec![identity("far", "echo")], ..service() }),
        Change::Workload(remote),
        Change::Workload(Workload { addresses: vec![gateway], ..gw }),
    ]);
    let mut inner = scene.peer(end, &identity("far", "echo"), echo).await;
    // The gateway does not look inside.
    let pass_on = move |connect: Connect| {
        tokio::spawn(async move {
            let mut inside = TcpStream::connect(SocketAddr::new(end, 15008)).await.unwrap();
            let mut stream = connect.accept(HeaderMap::new()).unwrap();
            // Either side may leave.
            let _ = cairn_net::copy(&mut stream, &mut inside, &Default::default()).await;
        });
    };
    let mut outer = scene.peer(gateway, &identity("istio-gateways", "gw"), pass_on).await;
    let (opened, account) = scene.open("10.96.0.10:80").await;
    expect_echo(opened).await;
    let (outer, inner) = (outer.recv().await.unwrap(), inner.recv().await.unwrap());
    assert_eq!(outer.authority, "echo.b.svc.cluster.local:80");
    assert_eq!(inner.authority, "echo.b.svc.cluster.local:80");
    assert_eq!(outer.headers.get("x-forwarded-network"), None);
    assert_eq!(inner.headers.get("x-forwarded-network").unwrap(), "");
    assert_eq!((&outer.identity, &inner.identity), (&identity("a", "x"), &identity("a", "x")));
    assert_eq!(account.way, "gateway");
    assert_eq!(account.destination, SocketAddr::new(gateway, 15008));
    assert_eq!(account.destination_identity, Some(identity("far", "echo")));
    assert_eq!(account.destination_workload.map(|found| found.name.to_string()).as_deref(), Some("remote-1"));
}

#[tokio::test]
async fn the_far_end_must_be_who_the_service_says() {
    let (gateway, end) = (own_address(), own_address());
    let mut scene = Scene::new();
    let remote = Workload {
        network: "n2".into(),
        addresses: Vec::new(),
        network_gateway: at("n2", gateway),
        ..workload("split", "nobody", end)
    };
    let gw = Workload { network: "n2".into(), services: Vec::new(), ..workload("gw", "gw", gateway) };
    scene.apply([
        Change::Service(Service { subject_alt_names: vec![identity("far", "echo")], ..service() }),
        Change::Workload(remote),
        Change::Workload(gw),
    ]);
    let _inner = scene.peer(end, &identity("far", "somebody-else"), echo).await;
    let pass_on = move |connect: Connect| {
        tokio::spawn(async move {
            let mut inside = TcpStream::connect(SocketAddr::new(end, 15008)).await.unwrap();
            let mut stream = connect.accept(HeaderMap::new()).unwrap();
            let _ = cairn_net::copy(&mut stream, &mut inside, &Default::default()).await;
        });
    };
    let _outer = scene.peer(gateway, &identity("b", "gw"), pass_on).await;
    let (opened, _) = scene.open("10.96.0.10:80").await;
    assert_eq!(opened.err().map(|failure| failure.flag), Some("TLS_FAILURE"));
}

#[tokio::test]
async fn another_endpoint_is_tried_when_one_fails_before_a_byte_is_taken() {
    let (good, dead, busy, stranger) = (own_address(), own_address(), own_address(), own_address());
    let unavailable = |connect: Connect| connect.refuse(StatusCode::SERVICE_UNAVAILABLE);
    let mut scene = Scene::new();
    scene.apply([Change::Service(service()), Change::Workload(workload("good", "good", good))]);
    let mut seen = scene.peer(good, &identity("b", "good"), echo).await;
    let _busy = scene.peer(busy, &identity("b", "busy"), unavailable).await;
    let _stranger = scene.peer(stranger, &identity("b", "another"), echo).await;
    for (name, uid, address) in [
        ("nobody listens", "dead", dead),
        ("its application is not there", "busy", busy),
        ("it is somebody else", "stranger", stranger),
    ] {
        scene.apply([Change::Workload(workload(uid, uid, address))]);
        // One of two is picked at random, and the good one is picked in the end.
        for _ in 0..8 {
            let (opened, account) = scene.open("10.96.0.10:80").await;
            expect_echo(opened).await;
            assert_eq!(account.destination.ip(), good, "{name}");
            assert_eq!(seen.recv().await.unwrap().authority, format!("{good}:8080"), "{name}");
        }
        scene.apply([Change::WorkloadRemoved(uid.into())]);
    }
}

/// The record of a connection that went plainly in the end says nothing of the tunnel that could not be had.
#[tokio::test]
async fn an_endpoint_outside_the_mesh_is_tried_when_a_tunnel_fails() {
    let (outside, dead) = (own_address(), own_address());
    let listener = cairn_net::listen(SocketAddr::new(outside, 8080), &ListenOptions::default()).unwrap();
    let outside = Workload { protocol: TunnelProtocol::None, ..workload("outside", "outside", outside) };
    let mut scene = Scene::new();
    scene.apply([
        Change::Service(service()),
        Change::Workload(outside),
        Change::Workload(workload("dead", "dead", dead)),
    ]);
    // One of two is picked at random.
    for _ in 0..8 {
        let (opened, account) = scene.open("10.96.0.10:80").await;
        let onward = opened.map_err(|failure| failure.reason).unwrap();
        assert!(matches!(onward.stream, OnwardStream::Tcp(_)));
        assert_eq!((account.way, account.authority.as_str()), ("plain", ""));
        assert_eq!(account.destination_identity, None);
        listener.accept().await.unwrap();
    }
}

#[tokio::test]
async fn tries_are_few_and_a_refusal_is_final() {
    let denied = |connect: Connect| connect.refuse(StatusCode::FORBIDDEN);
    let mut scene = Scene::new();
    scene.apply([Change::Service(service())]);
    let mut peers = Vec::new();
    for uid in ["one", "two", "three", "four", "five"] {
        let address = own_address();
        scene.apply([Change::Workload(workload(uid, uid, address))]);
        peers.push(scene.peer(address, &identity("b", uid), denied).await);
    }
    let (opened, _) = scene.open("10.96.0.10:80").await;
    assert_eq!(opened.err().map(|failure| failure.flag), Some("DENY"));
    assert_eq!(
        peers.iter_mut().filter_map(|seen| seen.try_recv().ok()).count(),
        1,
        "policy is not shopped around"
    );

    let mut scene = Scene::new();
    scene.apply([Change::Service(service())]);
    let unavailable = |connect: Connect| connect.refuse(StatusCode::SERVICE_UNAVAILABLE);
    let mut peers = Vec::new();
    for uid in ["one", "two", "three", "four", "five"] {
        let address = own_address();
        scene.apply([Change::Workload(workload(uid, uid, address))]);
        peers.push(scene.peer(address, &identity("b", uid), unavailable).await);
    }
    let (opened, _) = scene.open("10.96.0.10:80").await;
    assert!(opened.err().is_some_and(|failure| failure.flag == "CONNECT"));
    let asked = peers.iter_mut().filter_map(|seen| seen.try_recv().ok()).count();
    assert_eq!(asked, ENDPOINTS_MAX);
}

#[tokio::test]
async fn a_workload_known_by_name_is_asked_of_dns() {
    let listener = cairn_net::listen("127.0.0.1:0".parse().unwrap(), &ListenOptions::default()).unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let (mut read, mut write) = tcp.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    });
    let named = |hostname: &str| Workload {
        addresses: Vec::new(),
        hostname: hostname.into(),
        protocol: TunnelProtocol::None,
        ..workload("entry", "entry", own_address())
    };
    let mut scene = Scene::new();
    let ports = vec![ServicePort { port: 80, target_port: port, protocol: Default::default() }];
    scene.apply([Change::Service(Service { ports, ..service() }), Change::Workload(named("localhost"))]);
    let (opened, account) = scene.open("10.96.0.10:80").await;
    expect_echo(opened).await;
    assert_eq!(
        (account.way, account.destination),
        ("plain", SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))
    );

    scene.apply([Change::Workload(named(&"x".repeat(300)))]);
    let (opened, _) = scene.open("10.96.0.10:80").await;
    assert!(opened.err().is_some_and(|failure| failure.reason.contains("no healthy upstream")));
}

#[tokio::test]
async fn an_open_connection_counts_as_load_until_it_ends() {
    let pod = own_address();
    let mut scene = Scene::new();
    scene.apply([Change::Service(service()), Change::Workload(workload("echo", "echo", pod))]);
    let _seen = scene.peer(pod, &identity("b", "echo"), echo).await;
    let load = |scene: &Scene| {
        use cairn_mesh::Chooser;
        Choice::new(&scene.ways.loads).load(&workload("echo", "echo", pod))
    };
    let (opened, _) = scene.open("10.96.0.10:80").await;
    assert_eq!(load(&scene), Some(1));
    drop(opened);
    assert_eq!(load(&scene), Some(0));
}

#[test]
fn what_did_not_come_about_is_flagged_as_istio_flags_it() {
    let address: SocketAddr = "10.0.2.7:15008".parse().unwrap();
    let slow = cairn_net::NetError::ConnectTimeout { address, timeout: Duration::from_secs(10) };
    let refused =
        cairn_net::NetError::Connect { address, source: std::io::ErrorKind::ConnectionRefused.into() };
    let broken = || std::io::Error::other("certificate unknown");
    for (error, flag, says, elsewhere) in [
        (ConnectError::Tcp(Arc::new(slow)), "NETWORK_POLICY", "port 15008", true),
        (ConnectError::Tcp(Arc::new(refused)), "CONNECT", "10.0.2.7:15008", true),
        (ConnectError::Tls(Arc::new(broken())), "TLS_FAILURE", "certificate unknown", true),
        (ConnectError::Revoked, "TLS_FAILURE", "revoked", true),
        (ConnectError::Refused(StatusCode::FORBIDDEN), "DENY", "403", false),
        (ConnectError::Refused(StatusCode::UNAUTHORIZED), "DENY", "401", false),
        (ConnectError::Refused(StatusCode::SERVICE_UNAVAILABLE), "CONNECT", "503", true),
        (ConnectError::Refused(StatusCode::NOT_FOUND), "CONNECT", "404", false),
        (ConnectError::Timeout, "CONNECT", "in time", true),
    ] {
        let found = failure(&error);
        assert_eq!((found.flag, found.elsewhere), (flag, elsewhere), "{error}");
        assert!(found.reason.contains(says), "{}", found.reason);
    }
}
