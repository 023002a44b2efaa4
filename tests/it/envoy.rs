//! Stock Envoy at the other end of our tunnels: as a client of our ztunnel, and as a server behind it.
//!
//! Envoy is a pod that speaks HBONE itself (`networking.istio.io/tunnel: http`), with a certificate of our CA and the
//! configuration that Istio gives its own proxies: CONNECT over mutual TLS, through an internal listener. `tests/peers`
//! installs it.

use anyhow::{Context, Result, bail, ensure};
use cairn_identity::Authority;
use rcgen::{CertificateParams, KeyPair, SanType};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

/// These tests use one block of loopback, one after the other.
static BLOCK: Mutex<()> = Mutex::new(());

/// The ports for operators of the mesh's ztunnel.
const ZTUNNEL: Ipv4Addr = Ipv4Addr::new(127, 100, 0, 2);
/// An application that our ztunnel guards: it takes connections of Envoy's identity only.
const SERVER: Ipv4Addr = Ipv4Addr::new(127, 100, 1, 10);
/// A client of ours, and one whom Envoy does not know.
const CLIENT: Ipv4Addr = Ipv4Addr::new(127, 100, 1, 11);
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 100, 1, 14);
/// Envoy's pod, and one whose identity Envoy does not have.
const ENVOY: Ipv4Addr = Ipv4Addr::new(127, 100, 1, 12);
const IMPOSTOR: Ipv4Addr = Ipv4Addr::new(127, 100, 1, 13);
/// The service in front of Envoy's pod.
const SERVICE: Ipv4Addr = Ipv4Addr::new(127, 110, 1, 12);
/// Where Envoy's own application listens.
const BEHIND_ENVOY: Ipv4Addr = Ipv4Addr::new(127, 120, 1, 12);
/// Envoy's local ports: administration, and one for each identity that it can speak as.
const LOCAL: Ipv4Addr = Ipv4Addr::new(127, 120, 0, 9);
const ADMIN: u16 = 9901;
const AS_ENVOY: u16 = 10001;
const AS_STRANGER: u16 = 10002;

const MANIFESTS: &str = "
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Pod
metadata: { name: server, namespace: shop, labels: { app: server }, annotations: { cairn.dev/run: echo } }
spec: { serviceAccountName: server, containers: [{ name: a, image: a, ports: [{ containerPort: 8080 }] }] }
status: { podIP: 127.100.1.10 }
---
apiVersion: v1
kind: Pod
metadata: { name: client, namespace: shop }
spec: { serviceAccountName: client, containers: [{ name: a, image: a }] }
status: { podIP: 127.100.1.11 }
---
apiVersion: v1
kind: Pod
metadata: { name: envoy, namespace: shop, labels: { app: envoy, networking.istio.io/tunnel: http } }
spec: { serviceAccountName: envoy, containers: [{ name: a, image: a, ports: [{ containerPort: 8080 }] }] }
status: { podIP: 127.100.1.12 }
---
apiVersion: v1
kind: Pod
metadata: { name: impostor, namespace: shop, labels: { networking.istio.io/tunnel: http } }
spec: { serviceAccountName: impostor, containers: [{ name: a, image: a }] }
status: { podIP: 127.100.1.13 }
---
apiVersion: v1
kind: Pod
metadata: { name: other, namespace: shop }
spec: { serviceAccountName: other, containers: [{ name: a, image: a }] }
status: { podIP: 127.100.1.14 }
---
apiVersion: v1
kind: Service
metadata: { name: envoy, namespace: shop }
spec: { clusterIP: 127.110.1.12, selector: { app: envoy }, ports: [{ name: http, port: 80, targetPort: 8080 }] }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: only-envoy, namespace: shop }
spec:
  selector: { matchLabels: { app: server } }
  action: ALLOW
  rules: [{ from: [{ source: { principals: [cluster.local/ns/shop/sa/envoy] } }] }]
";

#[test]
fn envoy_reaches_an_application_through_our_ztunnel() -> Result<()> {
    let Some(mesh) = Mesh::start()? else { return Ok(()) };
    let (status, body) = get(connect(LOCAL, AS_ENVOY)?).with_context(|| mesh.logs())?;
    ensure!(status == 200, "status {status}: {body}\n{}", mesh.logs());
    ensure!(body.contains("name: server\n"), "another application answered: {body}");
    ensure!(body.contains(&format!("peer: {ENVOY}\n")), "the application does not see who calls: {body}");
    let record = mesh.connection(|record| record["sourceIdentity"] == spiffe("envoy"))?;
    ensure!(record["decision"] == "allow", "{record}");
    ensure!(record["policy"].as_str().is_some_and(|policy| policy.contains("only-envoy")), "{record}");
    ensure!(
        record["direction"] == "inbound" && record["destination"] == format!("{SERVER}:15008"),
        "{record}"
    );
    ensure!(record["authority"] == format!("{SERVER}:8080"), "{record}");
    Ok(())
}

#[test]
fn envoy_with_an_identity_that_policy_does_not_allow_is_refused() -> Result<()> {
    let Some(mesh) = Mesh::start()? else { return Ok(()) };
    // Envoy has accepted the connection by the time it learns that there is no way on.
    let answer = get(connect(LOCAL, AS_STRANGER)?);
    ensure!(answer.is_err(), "a stranger was answered: {answer:?}");
    let record = mesh.connection(|record| record["sourceIdentity"] == spiffe("stranger"))?;
    ensure!(record["decision"] == "deny", "{record}");
    ensure!(record["error"].as_str().is_some_and(|error| error.contains("policy rejection")), "{record}");
    let (_, stats) = ask(connect(LOCAL, ADMIN)?, "/stats?filter=cluster.as-stranger.upstream_cx_total$")?;
    ensure!(stats.trim() == "cluster.as-stranger.upstream_cx_total: 1", "no connection of Envoy's: {stats}");
    Ok(())
}

#[test]
fn our_ztunnel_reaches_an_application_through_envoy() -> Result<()> {
    let Some(mesh) = Mesh::start()? else { return Ok(()) };
    for (name, address, port) in [("by its address", ENVOY, 8080), ("by its service", SERVICE, 80)] {
        let stream = socks(CLIENT, SocketAddr::from((address, port)))?;
        let stream = stream.map_err(|reply| anyhow::anyhow!("{name}: SOCKS5 {reply}\n{}", mesh.logs()))?;
        let (status, body) = get(stream).with_context(|| format!("{name}\n{}", mesh.logs()))?;
        ensure!(status == 200, "{name}: {status}: {body}");
        ensure!(body.contains("name: behind-envoy\n"), "{name}: another application answered: {body}");
    }
    let record = mesh.connection(|record| record["service"] == "envoy.shop.svc.cluster.local")?;
    ensure!(record["destination"] == format!("{ENVOY}:15008"), "not through a tunnel: {record}");
    ensure!(record["sourceIdentity"] == spiffe("client") && record["way"] == "direct", "{record}");
    Ok(())
}

#[test]
fn envoy_and_our_ztunnel_refuse_identities_that_they_do_not_expect() -> Result<()> {
    let Some(mesh) = Mesh::start()? else { return Ok(()) };
    let refused = |from, to: Ipv4Addr| match socks(from, SocketAddr::from((to, 8080)))? {
        Ok(_) => bail!("{from} got through to {to}\n{}", mesh.logs()),
        Err(reply) => Ok(reply),
    };
    refused(CLIENT, IMPOSTOR)?;
    let record = mesh.connection(|record| record["destination"] == format!("{IMPOSTOR}:15008"))?;
    ensure!(record["error"].as_str().is_some_and(|error| error.contains(&spiffe("stranger"))), "{record}");
    refused(OTHER, ENVOY)?;
    let (_, stats) = ask(connect(LOCAL, ADMIN)?, "/stats?filter=ssl.fail_verify_san$")?;
    let refusals = stats.lines().filter(|line| !line.ends_with(": 0")).count();
    ensure!(refusals > 0, "Envoy did not refuse the other client: {stats}");
    Ok(())
}

/// Everything of ours keeps the policy: the control plane's connections too, or the ztunnel would not be ready.
#[test]
fn under_the_post_quantum_policy_only_peers_that_can_do_it_are_spoken_with() -> Result<()> {
    let Some(mesh) = Mesh::start_with(KeyExchange::PostQuantum)? else { return Ok(()) };
    let (status, _) = get(connect(LOCAL, AS_ENVOY)?).with_context(|| mesh.logs())?;
    ensure!(status == 200, "in: {status}");
    let stream = socks(CLIENT, SocketAddr::from((ENVOY, 8080)))?;
    let stream = stream.map_err(|reply| anyhow::anyhow!("out: SOCKS5 {reply}\n{}", mesh.logs()))?;
    ensure!(get(stream)?.0 == 200, "out");
    let (_, stats) = ask(connect(LOCAL, ADMIN)?, "/stats?filter=ssl.curves")?;
    let exchanged: Vec<_> = stats.lines().filter(|line| !line.ends_with(": 0")).collect();
    ensure!(!exchanged.is_empty(), "{stats}");
    ensure!(exchanged.iter().all(|line| line.contains("X25519MLKEM768")), "{stats}");

    let answer = get(connect(LOCAL, AS_STRANGER)?);
    ensure!(answer.is_err(), "a classical key exchange was accepted: {answer:?}");
    let (_, stats) = ask(connect(LOCAL, ADMIN)?, "/stats?filter=cluster.as-stranger.ssl.handshake$")?;
    ensure!(stats.trim() == "cluster.as-stranger.ssl.handshake: 0", "{stats}");
    ensure!(
        socks(CLIENT, SocketAddr::from((IMPOSTOR, 8080)))?.is_err(),
        "a classical key exchange was offered"
    );
    let record = mesh.connection(|record| record["destination"] == format!("{IMPOSTOR}:15008"))?;
    let error = record["error"].as_str().unwrap_or_default();
    ensure!(error.contains("HandshakeFailure"), "not for its key exchange: {record}");
    Ok(())
}

fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

/// A mesh with Envoy in it. Ends all of its processes when dropped.
struct Mesh {
    programs: Vec<Child>,
    directory: TempDir,
    _block: MutexGuard<'static, ()>,
}

impl Mesh {
    /// Starts it; `None`, having said why, where there is no Envoy.
    fn start() -> Result<Option<Self>> {
        Self::start_with(KeyExchange::Any)
    }

    fn start_with(keys: KeyExchange) -> Result<Option<Self>> {
        let Some(envoy) = envoy() else {
            cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
            return Ok(None);
        };
        let block = BLOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let mut mesh = Self { programs: Vec::new(), directory: tempfile::tempdir()?, _block: block };
        let (manifests, state) = (mesh.path("mesh.yaml"), mesh.path("state"));
        fs::write(&manifests, MANIFESTS)?;
        let cairn = cairn()?;
        let mut up = Command::new(&cairn);
        up.args(["up", "--block", "100", "--state"]).arg(&state).arg(&manifests);
        if keys == KeyExchange::PostQuantum {
            up.env("COMPLIANCE_POLICY", "pqc");
        }
        mesh.run(up, "cairn.log")?;
        let mut echo = Command::new(&cairn);
        echo.args(["echo", "--name", "behind-envoy", "--listen", &format!("{BEHIND_ENVOY}:8080")]);
        mesh.run(echo, "echo.log")?;
        mesh.until("the ztunnel is ready", || match ask(connect(ZTUNNEL, 15021)?, "/healthz/ready")? {
            (200, _) => Ok(()),
            (status, body) => bail!("{status}: {body}"),
        })?;
        for pod in [SERVER, CLIENT, OTHER] {
            mesh.until("every pod is served", || connect(pod, 15008).map(drop))?;
        }
        mesh.until("the server's application is up", || {
            connect(Ipv4Addr::new(127, 120, 1, 10), 8080).map(drop)
        })?;
        mesh.until("Envoy's application is up", || connect(BEHIND_ENVOY, 8080).map(drop))?;
        let authority = Authority::open(&state.join("ca"), "cluster.local")?;
        for account in ["envoy", "stranger"] {
            issue(&authority, account, mesh.directory.path())?;
        }
        let configuration = mesh.path("envoy.yaml");
        // JSON is YAML.
        let place = Place { directory: mesh.directory.path(), state: &state, keys };
        fs::write(&configuration, serde_json::to_vec_pretty(&bootstrap(&place))?)?;
        let mut command = Command::new(envoy);
        command.arg("-c").arg(configuration);
        command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "info"]);
        mesh.run(command, "envoy.log")?;
        mesh.until("Envoy is ready", || match ask(connect(LOCAL, ADMIN)?, "/ready")? {
            (200, _) => Ok(()),
            (status, body) => bail!("{status}: {body}"),
        })?;
        Ok(Some(mesh))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn run(&mut self, mut command: Command, log: &str) -> Result<()> {
        let output = File::create(self.path(log))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        self.programs.push(command.spawn().with_context(|| format!("{command:?}"))?);
        Ok(())
    }

    /// Polls until something succeeds; after half a minute says what it was still waiting for.
    fn until<T>(&self, what: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("waited until {what}\n{}", self.logs())));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// The newest of the ztunnel's records that is wanted. Records are written when a connection ends.
    fn connection(&self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.until("the ztunnel has recorded the connection", || {
            let (status, body) = ask(connect(ZTUNNEL, 15000)?, "/connections")?;
            ensure!(status == 200, "{status}: {body}");
            let records: Vec<Value> = serde_json::from_str(&body)?;
            records.into_iter().find(&wanted).with_context(|| format!("it has: {body}"))
        })
    }

    fn logs(&self) -> String {
        let logs = ["cairn.log", "envoy.log", "state/logs/ztunnel.node.log"];
        let tail = |name: &&str| {
            let text = fs::read_to_string(self.path(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().rev().take(30).collect();
            format!("--- {name}\n{}", lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
        };
        logs.iter().map(tail).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        for program in &self.programs {
            let pid = i32::try_from(program.id()).ok().and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid {
                // `cairn up` ends its children on SIGTERM; a program that is gone needs nothing.
                let _gone = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(15);
        for program in &mut self.programs {
            while matches!(program.try_wait(), Ok(None)) {
                if Instant::now() > deadline {
                    let _gone = program.kill();
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn envoy() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/envoy");
    std::env::var_os("ENVOY").map(PathBuf::from).or(Some(installed)).filter(|file| file.exists())
}

/// The command line, which `make test` builds beside this test.
fn cairn() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let profile = own.parent().and_then(Path::parent).context("where am I?")?;
    let cairn = profile.join("cairn");
    ensure!(cairn.exists(), "{} is missing: cargo build --package cairn", cairn.display());
    Ok(cairn)
}

/// Writes `account.pem` and `account.key`: a certificate of the mesh's CA for a service account.
fn issue(authority: &Authority, account: &str, directory: &Path) -> Result<()> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(spiffe(account).as_str().try_into()?)];
    let request = params.serialize_request(&key)?.pem()?;
    let chain = authority.sign(&request, Duration::from_secs(3600), SystemTime::now())?;
    fs::write(directory.join(format!("{account}.pem")), chain.concat())?;
    fs::write(directory.join(format!("{account}.key")), key.serialize_pem())?;
    Ok(())
}

/// How keys are exchanged.
#[derive(Clone, Copy, PartialEq, Eq)]
enum KeyExchange {
    /// As each side likes.
    Any,
    /// Our proxies keep `COMPLIANCE_POLICY=pqc`, Envoy does the same under its own identity, and as the stranger it has
    /// X25519 alone.
    PostQuantum,
}

/// What Envoy's configuration is made of.
struct Place<'a> {
    directory: &'a Path,
    state: &'a Path,
    keys: KeyExchange,
}

/// Envoy's configuration: a way out under each of two identities, and a way in on two addresses.
fn bootstrap(place: &Place<'_>) -> Value {
    json!({
        "admin": { "address": address(LOCAL, ADMIN) },
        "bootstrap_extensions": [{
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": typed("bootstrap.internal_listener.v3.InternalListener", json!({})),
        }],
        "static_resources": {
            "listeners": [
                way_out("as-envoy", AS_ENVOY), connect_originate("as-envoy"),
                way_out("as-stranger", AS_STRANGER), connect_originate("as-stranger"),
                connect_terminate(ENVOY, place, "envoy"),
                connect_terminate(IMPOSTOR, place, "stranger"),
            ],
            "clusters": [
                internal("as-envoy"), hbone(place, "as-envoy", "envoy"),
                internal("as-stranger"), hbone(place, "as-stranger", "stranger"),
                cluster("application", &endpoint(address(BEHIND_ENVOY, 8080)), &json!({})),
            ],
        },
    })
}

fn typed(kind: &str, fields: Value) -> Value {
    let mut fields = fields;
    fields["@type"] = format!("type.googleapis.com/envoy.extensions.{kind}").into();
    fields
}

fn address(ip: Ipv4Addr, port: u16) -> Value {
    json!({ "socket_address": { "address": ip.to_string(), "port_value": port } })
}

fn endpoint(address: Value) -> Value {
    json!({ "lb_endpoints": [{ "endpoint": { "address": address } }] })
}

fn cluster(name: &str, endpoints: &Value, further: &Value) -> Value {
    let mut cluster = json!({
        "name": name,
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": name, "endpoints": [endpoints] },
    });
    for (field, value) in further.as_object().into_iter().flatten() {
        cluster[field] = value.clone();
    }
    cluster
}

fn tcp_proxy(fields: Value) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": typed("filters.network.tcp_proxy.v3.TcpProxy", fields),
    })
}

/// A local port whose connections go to the internal listener.
fn way_out(name: &str, port: u16) -> Value {
    let proxy = tcp_proxy(json!({ "stat_prefix": name, "cluster": format!("{name}-internal") }));
    json!({ "name": name, "address": address(LOCAL, port), "filter_chains": [{ "filters": [proxy] }] })
}

fn internal(name: &str) -> Value {
    let listener = json!({ "envoy_internal_address": { "server_listener_name": format!("{name}-connect") } });
    cluster(&format!("{name}-internal"), &endpoint(listener), &json!({}))
}

/// The internal listener: each connection becomes a CONNECT for the server's port 8080.
fn connect_originate(name: &str) -> Value {
    let proxy = tcp_proxy(json!({
        "stat_prefix": format!("{name}-connect"),
        "cluster": name,
        "tunneling_config": { "hostname": format!("{SERVER}:8080") },
    }));
    json!({
        "name": format!("{name}-connect"),
        "internal_listener": {},
        "filter_chains": [{ "filters": [proxy] }],
    })
}

/// HTTP/2 over mutual TLS to the server's ztunnel, from Envoy's own address.
fn hbone(place: &Place<'_>, name: &str, account: &str) -> Value {
    let socket = json!({
        "name": "tls",
        "typed_config": typed("transport_sockets.tls.v3.UpstreamTlsContext", json!({
            "common_tls_context": tls(place, account, "server"),
        })),
    });
    let protocol = typed(
        "upstreams.http.v3.HttpProtocolOptions",
        json!({
            "explicit_http_config": { "http2_protocol_options": {} },
        }),
    );
    cluster(
        name,
        &endpoint(address(SERVER, 15008)),
        &json!({
            "transport_socket": socket,
            "typed_extension_protocol_options": { "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol },
            "upstream_bind_config": { "source_address": { "address": ENVOY.to_string(), "port_value": 0 } },
        }),
    )
}

fn tls(place: &Place<'_>, account: &str, peer: &str) -> Value {
    let Place { directory, state, keys } = *place;
    let file = |path: PathBuf| json!({ "filename": path });
    let mut parameters =
        json!({ "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" });
    if keys == KeyExchange::PostQuantum {
        parameters["ecdh_curves"] =
            if account == "envoy" { json!(["X25519MLKEM768"]) } else { json!(["X25519"]) };
    }
    json!({
        "alpn_protocols": ["h2"],
        "tls_params": parameters,
        "tls_certificates": [{
            "certificate_chain": file(directory.join(format!("{account}.pem"))),
            "private_key": file(directory.join(format!("{account}.key"))),
        }],
        "validation_context": {
            "trusted_ca": file(state.join("root.pem")),
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": spiffe(peer) } }],
        },
    })
}

/// HBONE from the client pod: a CONNECT for Envoy's port 8080 goes to the application.
fn connect_terminate(ip: Ipv4Addr, place: &Place<'_>, account: &str) -> Value {
    let manager = typed(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "connect_terminate",
            "http2_protocol_options": { "allow_connect": true },
            "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": typed("filters.http.router.v3.Router", json!({})),
            }],
            "route_config": { "name": "connect", "virtual_hosts": [{
                "name": "connect",
                "domains": [format!("{ip}:8080")],
                "routes": [{
                    "match": { "connect_matcher": {} },
                    "route": {
                        "cluster": "application",
                        "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }],
                    },
                }],
            }] },
        }),
    );
    let socket = typed(
        "transport_sockets.tls.v3.DownstreamTlsContext",
        json!({
            "require_client_certificate": true,
            "common_tls_context": tls(place, account, "client"),
        }),
    );
    json!({
        "name": format!("connect_terminate {ip}"),
        "address": address(ip, 15008),
        "filter_chains": [{
            "transport_socket": { "name": "tls", "typed_config": socket },
            "filters": [{ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager }],
        }],
    })
}

fn connect(ip: Ipv4Addr, port: u16) -> Result<TcpStream> {
    let address = SocketAddr::from((ip, port));
    let stream =
        TcpStream::connect_timeout(&address, Duration::from_secs(5)).with_context(|| address.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

/// Asks a pod's SOCKS5 port for a connection: the stream, or the code of the refusal.
fn socks(pod: Ipv4Addr, to: SocketAddr) -> Result<std::result::Result<TcpStream, u8>> {
    let SocketAddr::V4(to) = to else { bail!("only IPv4 here") };
    let mut stream = connect(pod, 15080)?;
    stream.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    stream.read_exact(&mut method)?;
    ensure!(method == [5, 0], "SOCKS5 greeting answered with {method:?}");
    let mut request = vec![5, 1, 0, 1];
    request.extend(to.ip().octets());
    request.extend(to.port().to_be_bytes());
    stream.write_all(&request)?;
    let mut reply = [0; 10];
    stream.read_exact(&mut reply)?;
    Ok(if reply[1] == 0 { Ok(stream) } else { Err(reply[1]) })
}

fn get(stream: TcpStream) -> Result<(u16, String)> {
    ask(stream, "/")
}

/// One request on a connection of its own: the status and the body.
fn ask(mut stream: TcpStream, path: &str) -> Result<(u16, String)> {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let answer = String::from_utf8_lossy(&bytes);
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunk(body)? } else { body.to_owned() };
    Ok((status.with_context(|| format!("no status: {head}"))?, body))
}

fn unchunk(mut rest: &str) -> Result<String> {
    let mut body = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n").context("a chunk without a size")?;
        let size = usize::from_str_radix(size, 16).with_context(|| format!("chunk size {size:?}"))?;
        if size == 0 {
            return Ok(body);
        }
        body.push_str(after.get(..size).context("a chunk broke off")?);
        rest = after.get(size + 2..).context("a chunk without an end")?;
    }
}
