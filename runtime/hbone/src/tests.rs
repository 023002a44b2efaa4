//! Both ends together: real TLS over loopback, certificates of a CA made for the test.

use crate::{
    Authority, Connect, ConnectError, Downstream, NestedTarget, Pool, PoolSettings, PoolTarget, ServeError,
    ServerSettings, TunnelStream, connect_nested, serve,
};
use cairn_identity::WorkloadCertificate;
use cairn_mesh::Identity;
use cairn_net::{ByteCounts, ConnectOptions, Drain, DrainTrigger, ListenOptions, drain};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use rustls_pki_types::ServerName;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsConnector;

mod revoked;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What no test should ever take.
const LONG: Duration = Duration::from_secs(30);

fn identity(name: &str) -> Identity {
    Identity::new("cluster.local", "a", name).unwrap()
}

/// A CA, and certificates of it.
struct Ca {
    authority: cairn_identity::Authority,
    _dir: tempfile::TempDir,
}

impl Ca {
    fn new(trust_domain: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = cairn_identity::Authority::open(dir.path(), trust_domain).unwrap();
        Self { authority, _dir: dir }
    }

    async fn certificate(&self, identity: &Identity) -> Arc<WorkloadCertificate> {
        Arc::new(WorkloadCertificate::request(&self.authority, identity, DAY).await.unwrap())
    }
}

/// A server whose connections end up in `ended` with their result.
struct Server {
    address: SocketAddr,
    ended: mpsc::UnboundedReceiver<Result<(), ServeError>>,
    accepted: mpsc::UnboundedReceiver<()>,
    _accepting: JoinHandle<()>,
}

impl Server {
    fn start(
        certificate: &Arc<WorkloadCertificate>,
        settings: ServerSettings,
        drain_of: impl Fn(usize) -> Drain + Send + 'static,
        handler: impl Fn(Connect) + Send + Sync + 'static,
    ) -> Self {
        let listener = listener();
        let address = listener.local_addr().unwrap();
        let (ended_sender, ended) = mpsc::unbounded_channel();
        let (accepted_sender, accepted) = mpsc::unbounded_channel();
        let (certificate, handler) = (Arc::clone(certificate), Arc::new(handler));
        let accepting = tokio::spawn(async move {
            for number in 0.. {
                let (tcp, _) = listener.accept().await.unwrap();
                accepted_sender.send(()).unwrap();
                let (settings, drain) = (settings.clone(), drain_of(number));
                let (certificate, handler) = (Arc::clone(&certificate), Arc::clone(&handler));
                let ended = ended_sender.clone();
                tokio::spawn(async move {
                    // The test may be over already.
                    let _ = ended
                        .send(serve(tcp, certificate, &settings, drain, |connect| handler(connect)).await);
                });
            }
        });
        Self { address, ended, accepted, _accepting: accepting }
    }

    /// One that sends back what it gets.
    fn echo(certificate: &Arc<WorkloadCertificate>) -> Self {
        let (_, never) = drain();
        Self::start(certificate, ServerSettings::default(), move |_| never.clone(), spawn_echo)
    }

    fn accepted_count(&mut self) -> usize {
        std::iter::from_fn(|| self.accepted.try_recv().ok()).count()
    }
}

fn listener() -> TcpListener {
    cairn_net::listen("127.0.0.1:0".parse().unwrap(), &ListenOptions::default()).unwrap()
}

fn spawn_echo(connect: Connect) {
    tokio::spawn(async move { echo(connect.accept(HeaderMap::new()).unwrap()).await });
}

async fn echo(stream: TunnelStream) {
    let (mut read, mut write) = tokio::io::split(stream);
    // The peer may cancel.
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        let _ = write.shutdown().await;
    }
}

fn target(certificate: &Arc<WorkloadCertificate>, connect: SocketAddr, server: &Identity) -> PoolTarget {
    PoolTarget {
        certificate: Arc::clone(certificate),
        connect,
        workload: None,
        identities: vec![server.clone()],
        options: ConnectOptions::default(),
        authority: "10.0.0.7:8080".to_owned(),
    }
}

async fn expect_echo(stream: &mut TunnelStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(back, text.as_bytes());
}

/// Client, server and their certificates.
struct Pair {
    ca: Ca,
    client: Arc<WorkloadCertificate>,
    server: Arc<WorkloadCertificate>,
}

impl Pair {
    async fn new() -> Self {
        let ca = Ca::new("cluster.local");
        let client = ca.certificate(&identity("client")).await;
        let server = ca.certificate(&identity("server")).await;
        Self { ca, client, server }
    }

    fn target(&self, connect: SocketAddr) -> PoolTarget {
        target(&self.client, connect, &self.server.identity)
    }
}

#[tokio::test]
async fn tunnel_carries_bytes_identities_and_headers() {
    let pair = Pair::new().await;
    let (seen_sender, mut seen) = mpsc::unbounded_channel();
    let (_, never) = drain();
    let handler = move |connect: Connect| {
        let downstream: Downstream = (**connect.downstream()).clone();
        let baggage = connect.headers().get("baggage").cloned();
        seen_sender.send((connect.authority().clone(), downstream, baggage)).unwrap();
        let answer = [("baggage", "service.name=server")]
            .into_iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
        let stream = connect.accept(answer.collect()).unwrap();
        tokio::spawn(echo(stream));
    };
    let server = Server::start(&pair.server, ServerSettings::default(), move |_| never.clone(), handler);
    let pool = Pool::new(PoolSettings::default());
    let mut headers = HeaderMap::new();
    headers.insert("baggage", HeaderValue::from_static("service.name=client"));
    let mut target = pair.target(server.address);
    target.options.bind = Some("127.0.0.3".parse().unwrap());
    let mut stream = pool.connect(&target, headers).await.unwrap();
    expect_echo(&mut stream, "hello").await;
    assert_eq!(stream.headers().get("baggage").unwrap(), "service.name=server");

    let (authority, downstream, baggage) = seen.recv().await.unwrap();
    assert_eq!(authority, Authority::Address("10.0.0.7:8080".parse().unwrap()));
    assert_eq!(downstream.identity, pair.client.identity);
    assert_eq!(downstream.local, server.address);
    assert_eq!(downstream.address.ip(), Ipv4Addr::new(127, 0, 0, 3));
    assert_eq!(baggage.unwrap(), "service.name=client");
}

#[tokio::test]
async fn client_may_half_close_first() {
    let pair = Pair::new().await;
    let (_, never) = drain();
    let handler = |connect: Connect| {
        tokio::spawn(async move {
            let mut stream = connect.accept(HeaderMap::new()).unwrap();
            let mut question = String::new();
            stream.read_to_string(&mut question).await.unwrap();
            stream.write_all(format!("you said {question}").as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        });
    };
    let server = Server::start(&pair.server, ServerSettings::default(), move |_| never.clone(), handler);
    let pool = Pool::new(PoolSettings::default());
    let mut stream = pool.connect(&pair.target(server.address), HeaderMap::new()).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "you said hello");
    assert!(stream.write_all(b"more").await.is_err());
}

#[tokio::test]
async fn server_may_half_close_first() {
    let pair = Pair::new().await;
    let (received_sender, mut received) = mpsc::unbounded_channel();
    let (_, never) = drain();
    let handler = move |connect: Connect| {
        let received = received_sender.clone();
        tokio::spawn(async move {
            let mut stream = connect.accept(HeaderMap::new()).unwrap();
            stream.write_all(b"welcome").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            received.send(text).unwrap();
        });
    };
    let server = Server::start(&pair.server, ServerSettings::default(), move |_| never.clone(), handler);
    let pool = Pool::new(PoolSettings::default());
    let mut stream = pool.connect(&pair.target(server.address), HeaderMap::new()).await.unwrap();
    let mut welcome = String::new();
    stream.read_to_string(&mut welcome).await.unwrap();
    assert_eq!(welcome, "welcome");
    stream.write_all(b"thank you").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(received.recv().await.unwrap(), "thank you");
}

#[tokio::test]
async fn cancelled_tunnel_ends_for_the_other_side() {
    let pair = Pair::new().await;
    let (ended_sender, mut ended) = mpsc::unbounded_channel();
    let (_, never) = drain();
    let handler = move |connect: Connect| {
        let ended = ended_sender.clone();
        tokio::spawn(async move {
            let mut stream = connect.accept(HeaderMap::new()).unwrap();
            let mut start = [0; 4];
            stream.read_exact(&mut start).await.unwrap();
            stream.write_all(&start).await.unwrap();
            let mut rest = String::new();
            ended.send(stream.read_to_string(&mut rest).await).unwrap();
        });
    };
    let server = Server::start(&pair.server, ServerSettings::default(), move |_| never.clone(), handler);
    let pool = Pool::new(PoolSettings::default());
    let mut stream = pool.connect(&pair.target(server.address), HeaderMap::new()).await.unwrap();
    expect_echo(&mut stream, "half").await;
    drop(stream);
    // As if it had ended in order: no error, nothing more.
    assert_eq!(ended.recv().await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn refusal_reaches_the_client_and_leaves_the_connection_usable() {
    let pair = Pair::new().await;
    let (_, never) = drain();
    let handler = |connect: Connect| match connect.authority() {
        Authority::Address(_) => spawn_echo(connect),
        Authority::Host { port, .. } => {
            let status = StatusCode::from_u16(*port).unwrap();
            connect.refuse(status);
        }
    };
    let mut server = Server::start(&pair.server, ServerSettings::default(), move |_| never.clone(), handler);
    let pool = Pool::new(PoolSettings::default());
    let mut target = pair.target(server.address);
    for status in [400, 401, 403, 404, 503] {
        target.authority = format!("status:{status}");
        let error = pool.connect(&target, HeaderMap::new()).await.err().unwrap();
        assert!(matches!(error, ConnectError::Refused(refused) if refused == status), "{error}");
    }
    let mut stream = pool.connect(&pair.target(server.address), HeaderMap::new()).await.unwrap();
    expect_echo(&mut stream, "still here").await;
    assert_eq!(server.accepted_count(), 1);
}

#[tokio::test]
async fn what_is_no_tunnel_is_answered_400() {
    let pair = Pair::new().await;
    let server = Server::echo(&pair.server);
    let config = pair.client.client_config(std::slice::from_ref(&pair.server.identity));
    let tcp = TcpStream::connect(server.address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let tls = TlsConnector::from(config).connect(name, tcp).await.unwrap();
    let (mut requests, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(connection);
    for (name, method, uri) in [
        ("a GET", Method::GET, "https://10.0.0.7:8080/"),
        ("no port", Method::CONNECT, "10.0.0.7"),
        ("a user", Method::CONNECT, "me@10.0.0.7:80"),
    ] {
        let request =
            Request::builder().method(method).uri(uri).version(http::Version::HTTP_2).body(()).unwrap();
        let (answer, _) = requests.send_request(request, true).unwrap();
        assert_eq!(answer.await.unwrap().status(), StatusCode::BAD_REQUEST, "{name}");
    }
}

#[tokio::test]
async fn server_with_another_identity_is_refused() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings::default());
    let wrong = target(&pair.client, server.address, &identity("someone-else"));
    let error = pool.connect(&wrong, HeaderMap::new()).await.err().unwrap();
    assert!(matches!(error, ConnectError::Tls(_)), "{error}");
    assert!(matches!(server.ended.recv().await.unwrap(), Err(ServeError::Tls(_))));
    assert_eq!(pool.connection_count(), 0);
}

#[tokio::test]
async fn client_of_another_trust_domain_is_refused() {
    let pair = Pair::new().await;
    // The same root, so that only the trust domain differs.
    let dir = tempfile::tempdir().unwrap();
    drop(cairn_identity::Authority::open(dir.path(), "cluster.local").unwrap());
    let (cert, key) = (dir.path().join("root-cert.pem"), dir.path().join("root-key.pem"));
    let both = Ca { authority: cairn_identity::Authority::from_files(&cert, &key).unwrap(), _dir: dir };
    let own = both.certificate(&pair.server.identity).await;
    let stranger = both.certificate(&Identity::new("elsewhere", "a", "client").unwrap()).await;
    let mut server = Server::echo(&own);
    let pool = Pool::new(PoolSettings::default());
    let target = target(&stranger, server.address, &own.identity);
    let error = pool.connect(&target, HeaderMap::new()).await.err().unwrap();
    assert!(matches!(error, ConnectError::Tls(_)), "{error:?}");
    assert!(matches!(server.ended.recv().await.unwrap(), Err(ServeError::Tls(_))));
}

#[tokio::test]
async fn plaintext_client_is_refused() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let mut tcp = TcpStream::connect(server.address).await.unwrap();
    tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    assert!(matches!(server.ended.recv().await.unwrap(), Err(ServeError::Tls(_))));
}

#[tokio::test]
async fn unreachable_peer_fails_everyone_who_waits() {
    let pair = Pair::new().await;
    let address = listener().local_addr().unwrap();
    let pool = Pool::new(PoolSettings::default());
    let mut waiting = JoinSet::new();
    for _ in 0..5 {
        let (pool, target) = (pool.clone(), pair.target(address));
        waiting.spawn(async move { pool.connect(&target, HeaderMap::new()).await.err() });
    }
    for error in waiting.join_all().await {
        assert!(matches!(error, Some(ConnectError::Tcp(_))));
    }
    assert!(pool.shared_is_empty());
}

#[tokio::test]
async fn drain_sends_new_tunnels_elsewhere_and_lets_open_ones_finish() {
    let pair = Pair::new().await;
    let (trigger, first): (DrainTrigger, Drain) = drain();
    let (_, later) = drain();
    let drain_of = move |number| if number == 0 { first.clone() } else { later.clone() };
    let mut server = Server::start(&pair.server, ServerSettings::default(), drain_of, spawn_echo);
    let pool = Pool::new(PoolSettings::default());
    let target = pair.target(server.address);
    let mut open = pool.connect(&target, HeaderMap::new()).await.unwrap();
    expect_echo(&mut open, "before").await;
    assert_eq!(server.accepted_count(), 1);

    trigger.start();
    // The news takes a moment; no tunnel fails meanwhile.
    let mut tunnels = 0;
    while server.accepted_count() == 0 {
        let mut stream = pool.connect(&target, HeaderMap::new()).await.unwrap();
        expect_echo(&mut stream, "meanwhile").await;
        tunnels += 1;
        assert!(tunnels < 1000, "never told to go away");
    }
    expect_echo(&mut open, "after").await;
    assert!(!trigger.finished(Duration::from_millis(10)).await);
    open.shutdown().await.unwrap();
    let mut rest = Vec::new();
    open.read_to_end(&mut rest).await.unwrap();
    drop(open);
    assert!(trigger.finished(LONG).await);
    assert!(server.ended.recv().await.unwrap().is_ok());
}

#[tokio::test]
async fn a_cut_ends_tunnels_at_once_and_says_so_first() {
    let pair = Pair::new().await;
    let (whole, all) = drain();
    let (trigger, part) = all.part();
    let mut server =
        Server::start(&pair.server, ServerSettings::default(), move |_| part.clone(), spawn_echo);
    let tcp = TcpStream::connect(server.address).await.unwrap();
    let config = pair.client.client_config(std::slice::from_ref(&pair.server.identity));
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let tls = TlsConnector::from(config).connect(name, tcp).await.unwrap();
    let (requests, connection) = h2::client::handshake(tls).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut requests = requests.ready().await.unwrap();
    let request = Request::builder().method(Method::CONNECT).uri("10.0.0.7:8080").body(()).unwrap();
    let (answer, mut outgoing) = requests.send_request(request, false).unwrap();
    let mut incoming = answer.await.unwrap().into_body();
    outgoing.send_data("before".into(), false).unwrap();
    assert_eq!(incoming.data().await.unwrap().unwrap(), "before");
    trigger.cut();
    let cut = tokio::time::timeout(LONG, incoming.data()).await.unwrap();
    assert!(cut.is_none_or(|data| data.is_err()), "the tunnel goes on");
    let said = requests.ready().await.err().unwrap();
    assert!(said.is_go_away() && said.is_remote(), "{said:?}");
    assert_eq!(said.reason(), Some(h2::Reason::NO_ERROR));
    assert!(tokio::time::timeout(LONG, server.ended.recv()).await.unwrap().unwrap().is_ok());
    // How the client's side ends is its own affair.
    drop(connection.await);
    assert!(whole.finished(LONG).await, "nothing is held any more");
}

#[tokio::test]
async fn many_tunnels_spread_over_connections_which_are_used_again() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings::default());
    for round in ["first", "second"] {
        let mut opening = JoinSet::new();
        for _ in 0..300 {
            let (pool, target) = (pool.clone(), pair.target(server.address));
            opening.spawn(async move {
                let mut stream = pool.connect(&target, HeaderMap::new()).await.unwrap();
                expect_echo(&mut stream, "hello").await;
                stream
            });
        }
        let open = opening.join_all().await;
        assert_eq!(open.len(), 300);
        assert_eq!(pool.connection_count(), 3, "{round}");
        drop(open);
    }
    assert_eq!(server.accepted_count(), 3);
}

#[tokio::test]
async fn peers_own_limit_is_kept() {
    let pair = Pair::new().await;
    let (_, never) = drain();
    let settings = ServerSettings { streams_max: 10, ..Default::default() };
    let server = Server::start(&pair.server, settings, move |_| never.clone(), spawn_echo);
    let pool = Pool::new(PoolSettings::default());
    let mut opening = JoinSet::new();
    for _ in 0..25 {
        let (pool, target) = (pool.clone(), pair.target(server.address));
        opening.spawn(async move { pool.connect(&target, HeaderMap::new()).await.unwrap() });
    }
    let open = opening.join_all().await;
    assert_eq!(pool.connection_count(), 3);
    drop(open);
}

#[tokio::test]
async fn new_certificate_loses_no_tunnel() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings::default());
    let (rotate, rotated) = tokio::sync::watch::channel(Arc::clone(&pair.client));
    let mut load = JoinSet::new();
    for _ in 0..20 {
        let (pool, mut rotated) = (pool.clone(), rotated.clone());
        let (address, peer) = (server.address, pair.server.identity.clone());
        load.spawn(async move {
            let old = target(&rotated.borrow_and_update().clone(), address, &peer);
            let mut kept = pool.connect(&old, HeaderMap::new()).await.unwrap();
            expect_echo(&mut kept, "before").await;
            rotated.changed().await.unwrap();
            for _ in 0..20 {
                let new = target(&rotated.borrow().clone(), address, &peer);
                let mut stream = pool.connect(&new, HeaderMap::new()).await.unwrap();
                expect_echo(&mut stream, "during").await;
                expect_echo(&mut kept, "still").await;
            }
        });
    }
    while pool.connection_count() == 0 {
        tokio::task::yield_now().await;
    }
    // Certificates begin at whole seconds, so a newer one needs a later second.
    let newer = loop {
        let certificate = pair.ca.certificate(&pair.client.identity).await;
        if certificate.not_before > pair.client.not_before {
            break certificate;
        }
        tokio::task::yield_now().await;
    };
    rotate.send(newer).unwrap();
    load.join_all().await;
    // The old connection has closed itself once its tunnels were done.
    assert!(server.ended.recv().await.unwrap().is_ok());
    assert_eq!(pool.connection_count(), 1);
    assert_eq!(server.accepted_count(), 2);
}

#[tokio::test]
async fn bulk_arrives_whole_through_the_smallest_windows() {
    let pair = Pair::new().await;
    let (_, never) = drain();
    let settings = ServerSettings {
        stream_window: 65_535,
        connection_window: 65_535,
        frame_bytes_max: 16_384,
        send_buffer_bytes_max: 10_000,
        ..Default::default()
    };
    let server = Server::start(&pair.server, settings, move |_| never.clone(), spawn_echo);
    let pool = Pool::new(PoolSettings {
        stream_window: 65_535,
        connection_window: 65_535,
        frame_bytes_max: 16_384,
        ..Default::default()
    });
    let mut transfers = JoinSet::new();
    for seed in 0..3_u32 {
        let stream = pool.connect(&pair.target(server.address), HeaderMap::new()).await.unwrap();
        transfers.spawn(async move {
            let data: Vec<u8> = (0..3_000_000).map(|i: u32| (i.wrapping_mul(31) + seed) as u8).collect();
            let (mut read, mut write) = tokio::io::split(stream);
            let sent = data.clone();
            let send = tokio::spawn(async move {
                for part in sent.chunks(17_000) {
                    write.write_all(part).await.unwrap();
                }
                write.shutdown().await.unwrap();
            });
            let mut back = Vec::new();
            read.read_to_end(&mut back).await.unwrap();
            send.await.unwrap();
            assert!(back == data);
        });
    }
    transfers.join_all().await;
}

/// As a ztunnel does at both ends: what is large is passed on without a copy, what is small is gathered.
#[tokio::test]
async fn bytes_between_sockets_and_tunnels_arrive_whole() {
    let pair = Pair::new().await;
    let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = application.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = application.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.into_split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
            });
        }
    });
    let (_, never) = drain();
    let to_application = move |connect: Connect| {
        tokio::spawn(async move {
            let mut inside = TcpStream::connect(address).await.unwrap();
            let mut stream = connect.accept(HeaderMap::new()).unwrap();
            cairn_net::copy_sides(&mut stream, &mut inside, &ByteCounts::default()).await.unwrap();
        });
    };
    let server =
        Server::start(&pair.server, ServerSettings::default(), move |_| never.clone(), to_application);
    let pool = Pool::new(PoolSettings::default());
    let captured = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut transfers = JoinSet::new();
    for seed in 0..3_u64 {
        let mut stream = pool.connect(&pair.target(server.address), HeaderMap::new()).await.unwrap();
        let client = TcpStream::connect(captured.local_addr().unwrap()).await.unwrap();
        let (mut accepted, _) = captured.accept().await.unwrap();
        transfers.spawn(async move {
            let data: Vec<u8> = (0..5_000_000_u64).map(|i| (i.wrapping_mul(31) + seed) as u8).collect();
            let counts = ByteCounts::default();
            let (mut read, mut write) = client.into_split();
            let sent = data.clone();
            let send = tokio::spawn(async move {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut rest = &*sent;
                while !rest.is_empty() {
                    // From single bytes to more than any buffer.
                    let count = (1 << random.u32(..19)).min(rest.len());
                    write.write_all(&rest[..count]).await.unwrap();
                    rest = &rest[count..];
                }
            });
            let back = tokio::spawn(async move {
                let mut back = Vec::new();
                read.read_to_end(&mut back).await.unwrap();
                back
            });
            cairn_net::copy_sides(&mut accepted, &mut stream, &counts).await.unwrap();
            send.await.unwrap();
            assert!(back.await.unwrap() == data);
            let counted = [&counts.received, &counts.sent].map(|count| count.load(Ordering::Relaxed));
            assert_eq!(counted, [5_000_000; 2]);
        });
    }
    transfers.join_all().await;
}

#[tokio::test]
async fn idle_connection_is_closed() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings {
        idle_timeout: Duration::from_millis(20),
        ping_interval: Duration::from_millis(20),
        ..Default::default()
    });
    let target = pair.target(server.address);
    let mut stream = pool.connect(&target, HeaderMap::new()).await.unwrap();
    expect_echo(&mut stream, "hello").await;
    drop(stream);
    assert!(tokio::time::timeout(LONG, server.ended.recv()).await.unwrap().unwrap().is_ok());
    assert!(pool.shared_is_empty());
    let mut stream = pool.connect(&target, HeaderMap::new()).await.unwrap();
    expect_echo(&mut stream, "again").await;
}

#[tokio::test]
async fn silent_server_ends_its_tunnels() {
    let pair = Pair::new().await;
    let listener = listener();
    let address = listener.local_addr().unwrap();
    let tls = tokio_rustls::TlsAcceptor::from(pair.server.server_config());
    let (open_sender, open) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(tls.accept(tcp).await.unwrap()).await.unwrap();
        let (_, mut answer) = connection.accept().await.unwrap().unwrap();
        let stream = answer.send_response(http::Response::new(()), false).unwrap();
        // Serves until the tunnel is open, and then never again.
        tokio::select! {
            _ = connection.accept() => {}
            _ = open => {}
        }
        std::future::pending::<()>().await;
        drop((stream, connection));
    });
    let pool = Pool::new(PoolSettings {
        ping_interval: Duration::from_millis(20),
        ping_timeout: Duration::from_secs(1),
        ..Default::default()
    });
    let mut stream = pool.connect(&pair.target(address), HeaderMap::new()).await.unwrap();
    open_sender.send(()).unwrap();
    let read = tokio::time::timeout(LONG, stream.read_u8()).await.unwrap();
    assert_ne!(read.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    assert!(pool.shared_is_empty());
}

#[tokio::test]
async fn silent_client_ends_its_connection() {
    let pair = Pair::new().await;
    let (_, never) = drain();
    let settings = ServerSettings {
        ping_interval: Duration::from_millis(20),
        ping_timeout: Duration::from_millis(50),
        ..Default::default()
    };
    let mut server = Server::start(&pair.server, settings, move |_| never.clone(), spawn_echo);
    let config = pair.client.client_config(std::slice::from_ref(&pair.server.identity));
    let tcp = TcpStream::connect(server.address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let tls = TlsConnector::from(config).connect(name, tcp).await.unwrap();
    // Begins, and never reads again.
    let kept = h2::client::handshake(tls).await.unwrap();
    let ended = tokio::time::timeout(LONG, server.ended.recv()).await.unwrap().unwrap();
    assert!(matches!(ended, Err(ServeError::NoAnswer(_))), "{ended:?}");
    drop(kept);
}

#[tokio::test]
async fn handshake_has_a_deadline() {
    let pair = Pair::new().await;
    let (_, never) = drain();
    let settings = ServerSettings { handshake_timeout: Duration::from_millis(20), ..Default::default() };
    let mut server = Server::start(&pair.server, settings, move |_| never.clone(), spawn_echo);
    let silent = TcpStream::connect(server.address).await.unwrap();
    assert!(matches!(server.ended.recv().await.unwrap(), Err(ServeError::HandshakeTimeout(_))));
    drop(silent);

    let listener = listener();
    let pool = Pool::new(PoolSettings { handshake_timeout: Duration::from_millis(20), ..Default::default() });
    let target = pair.target(listener.local_addr().unwrap());
    let error = pool.connect(&target, HeaderMap::new()).await.err().unwrap();
    assert!(matches!(error, ConnectError::Timeout));
}

#[tokio::test]
async fn unanswered_connect_has_a_deadline() {
    let pair = Pair::new().await;
    let (kept_sender, mut kept) = mpsc::unbounded_channel();
    let (_, never) = drain();
    let handler = move |connect: Connect| kept_sender.send(connect).unwrap();
    let server = Server::start(&pair.server, ServerSettings::default(), move |_| never.clone(), handler);
    let pool = Pool::new(PoolSettings { answer_timeout: Duration::from_millis(20), ..Default::default() });
    let error = pool.connect(&pair.target(server.address), HeaderMap::new()).await.err().unwrap();
    assert!(matches!(error, ConnectError::Timeout));
    assert!(kept.recv().await.is_some());
}

#[tokio::test]
async fn a_tunnel_in_a_tunnel_ends_at_who_the_gateway_chooses() {
    let pair = Pair::new().await;
    let end = Server::echo(&pair.server);
    let gateway = pair.ca.certificate(&identity("gateway")).await;
    let (_, never) = drain();
    // The gateway passes bytes on to the end, and reads none of them.
    let address = end.address;
    let pass_on = move |connect: Connect| {
        tokio::spawn(async move {
            assert_eq!(connect.authority().to_string(), "echo.b:80");
            let mut inside = TcpStream::connect(address).await.unwrap();
            let mut stream = connect.accept(HeaderMap::new()).unwrap();
            // Either side may end it.
            let _ = cairn_net::copy(&mut stream, &mut inside, &Default::default()).await;
        });
    };
    let outer = Server::start(&gateway, ServerSettings::default(), move |_| never.clone(), pass_on);
    let pool = Pool::new(PoolSettings::default());
    let to_gateway = PoolTarget {
        authority: "echo.b:80".to_owned(),
        ..target(&pair.client, outer.address, &identity("gateway"))
    };
    let nested = |identities| NestedTarget {
        certificate: Arc::clone(&pair.client),
        identities,
        authority: "echo.b:80".to_owned(),
    };
    for _ in 0..2 {
        let through = pool.connect(&to_gateway, HeaderMap::new()).await.unwrap();
        assert_eq!(through.peer(), Some(&identity("gateway")));
        let target = nested(vec![pair.server.identity.clone()]);
        let settings = PoolSettings::default();
        let mut stream = connect_nested(through, &target, HeaderMap::new(), &settings).await.unwrap();
        assert_eq!(stream.peer(), Some(&pair.server.identity));
        expect_echo(&mut stream, "hello").await;
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
    }
    assert_eq!(pool.connection_count(), 1, "the outer connection is shared");
    for wrong in [vec![identity("gateway")], vec![]] {
        let through = pool.connect(&to_gateway, HeaderMap::new()).await.unwrap();
        let refused =
            connect_nested(through, &nested(wrong), HeaderMap::new(), &PoolSettings::default()).await;
        assert!(matches!(refused.err(), Some(ConnectError::Tls(_))));
    }
}

#[tokio::test]
async fn a_workload_that_is_gone_keeps_no_connection() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings::default());
    let target = PoolTarget { workload: Some("w".into()), ..pair.target(server.address) };
    let mut open = pool.connect(&target, HeaderMap::new()).await.unwrap();
    expect_echo(&mut open, "before").await;
    assert_eq!(pool.forget(|uid| uid == "another"), 0);
    assert_eq!(pool.forget(|uid| uid == "w"), 1);
    assert!(pool.shared_is_empty());
    // It answers, so what is open goes on; new tunnels take another connection.
    expect_echo(&mut open, "still there").await;
    let mut other = pool.connect(&target, HeaderMap::new()).await.unwrap();
    expect_echo(&mut other, "anew").await;
    assert_eq!(server.accepted_count(), 2);
    drop((open, other));
    assert!(tokio::time::timeout(LONG, server.ended.recv()).await.unwrap().unwrap().is_ok());
}

#[tokio::test]
async fn a_peer_that_is_gone_without_a_word_is_noticed_when_its_workload_is() {
    let pair = Pair::new().await;
    let listener = listener();
    let address = listener.local_addr().unwrap();
    let tls = tokio_rustls::TlsAcceptor::from(pair.server.server_config());
    let (silence_sender, silence) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(tls.accept(tcp).await.unwrap()).await.unwrap();
        let (_, mut answer) = connection.accept().await.unwrap().unwrap();
        let stream = answer.send_response(http::Response::new(()), false).unwrap();
        tokio::select! {
            _ = connection.accept() => {}
            _ = silence => {}
        }
        std::future::pending::<()>().await;
        drop((stream, connection));
    });
    // Without the news it would take longer than the test.
    let slow = PoolSettings { ping_interval: LONG * 10, ping_timeout: LONG * 10, ..Default::default() };
    let pool = Pool::new(slow);
    let target = PoolTarget { workload: Some("w".into()), ..pair.target(address) };
    let mut stream = pool.connect(&target, HeaderMap::new()).await.unwrap();
    silence_sender.send(()).unwrap();
    assert_eq!(pool.forget(|_| true), 1);
    let read = tokio::time::timeout(LONG, stream.read_u8()).await.unwrap();
    assert_ne!(read.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_tunnel_that_carries_much_does_not_hold_up_others() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings { spread_max: 2, ..Default::default() });
    let target = pair.target(server.address);
    let bulk = async |stream: &mut TunnelStream| {
        let part = vec![7; 1 << 20];
        for _ in 0..17 {
            let (mut read, mut write) = tokio::io::split(&mut *stream);
            let mut back = vec![0; part.len()];
            let (sent, got) = tokio::join!(write.write_all(&part), read.read_exact(&mut back));
            sent.unwrap();
            got.unwrap();
        }
    };
    let mut first = pool.connect(&target, HeaderMap::new()).await.unwrap();
    let small = pool.connect(&target, HeaderMap::new()).await.unwrap();
    assert_eq!(pool.connection_count(), 1);
    bulk(&mut first).await;
    let mut second = pool.connect(&target, HeaderMap::new()).await.unwrap();
    assert_eq!(pool.connection_count(), 2, "the first carries much");
    bulk(&mut second).await;
    let third = pool.connect(&target, HeaderMap::new()).await.unwrap();
    assert_eq!(pool.connection_count(), 2, "there are as many as may be");
    drop(first);
    let fourth = pool.connect(&target, HeaderMap::new()).await.unwrap();
    assert_eq!((pool.connection_count(), server.accepted_count()), (2, 2), "the first has room again");
    drop((small, second, third, fourth));
}

#[tokio::test]
async fn tunnels_in_different_names_share_no_connection() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings::default());
    let other = pair.ca.certificate(&identity("other")).await;
    let expected = &pair.server.identity;
    let from = |address: &str| {
        let mut target = pair.target(server.address);
        target.options.bind = Some(address.parse().unwrap());
        target
    };
    let targets = [
        pair.target(server.address),
        target(&other, server.address, expected),
        from("127.0.0.5"),
        from("127.0.0.6"),
    ];
    for target in &targets {
        let mut stream = pool.connect(target, HeaderMap::new()).await.unwrap();
        expect_echo(&mut stream, "hello").await;
    }
    assert_eq!((pool.connection_count(), server.accepted_count()), (4, 4));
    drop(pool);
    for _ in 0..4 {
        assert!(tokio::time::timeout(LONG, server.ended.recv()).await.unwrap().unwrap().is_ok());
    }
}

/// Whoever a connection was proven to lead to, another may only go over it who expects that one too.
#[tokio::test]
async fn a_connection_is_not_shared_with_who_expects_somebody_else() {
    let pair = Pair::new().await;
    let mut server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings::default());
    let server_is = &pair.server.identity;
    expect_echo(&mut pool.connect(&pair.target(server.address), HeaderMap::new()).await.unwrap(), "hello")
        .await;
    let expecting = |identities: &[&Identity]| PoolTarget {
        identities: identities.iter().map(|identity| (*identity).clone()).collect(),
        ..pair.target(server.address)
    };
    let (other, error) =
        (identity("other"), pool.connect(&expecting(&[&identity("other")]), HeaderMap::new()).await.err());
    assert!(matches!(error, Some(ConnectError::Tls(_))), "{error:?}");
    for identities in [[server_is, &other], [&other, server_is]] {
        let mut stream = pool.connect(&expecting(&identities), HeaderMap::new()).await.unwrap();
        expect_echo(&mut stream, "hello").await;
        assert_eq!(stream.peer(), Some(server_is));
    }
    assert!(server.accepted_count() >= 2, "those who expect several have a connection of their own");
}

#[tokio::test]
async fn what_arrived_is_read_in_any_portions() {
    let pair = Pair::new().await;
    let server = Server::echo(&pair.server);
    let pool = Pool::new(PoolSettings::default());
    let mut stream = pool.connect(&pair.target(server.address), HeaderMap::new()).await.unwrap();
    stream.write_all(b"abcde").await.unwrap();
    let mut one = [0; 1];
    for expected in b"abc" {
        stream.read_exact(&mut one).await.unwrap();
        assert_eq!(one[0], *expected);
    }
    let mut rest = [0; 100];
    let count = stream.read(&mut rest).await.unwrap();
    assert_eq!(&rest[..count], b"de");
}
