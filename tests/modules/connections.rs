//! Connections that carry no HTTP: the probe as a network filter in stock Envoy, in front of its TCP proxy, and as a plugin of
//! type NETWORK in our engine. The same clients and servers, compared in every line that the probe logs and in what the
//! client is told.

use crate::envoy::{Envoy, cluster};
use crate::ours::{NAMESPACE, hostname, lines_of, listen_to_plugins, nobodys_site, service};
use crate::run::wait_until;
use crate::{ask::Version, built};
use anyhow::{Context, Result, ensure};
use arc_swap::ArcSwap;
use cairn_filter::{Chain, Connection, Peer};
use cairn_http::{MeshCallout, Site, Worker, WorkerSettings, serve};
use cairn_mesh::{
    AppProtocol, FailStrategy, Isolation, PluginKind, PluginLimits, PluginMode, PluginPhase, ResourceName,
    ServicePort, Store, WasmPlugin,
};
use cairn_net::drain;
use cairn_telemetry::{Telemetry, TelemetrySettings};
use cairn_tests::envoy::{extension, loopback, program};
use cairn_wasm::{Engine, EngineSettings, WorkerPlace};
use serde_json::{Value, json};
use socket2::SockRef;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::task::JoinSet;

/// How long a client waits for the end of its connection.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a client does, in turn. Then it reads to the end.
#[derive(Clone, Copy)]
enum Step {
    Send(&'static str),
    /// Waits until the probe has logged so many lines that begin so.
    Logged(&'static str, usize),
    /// Reads until it has as many bytes.
    Read(usize),
    /// Has no more to send.
    End,
    Reset,
}
use Step::{End, Logged, Read, Reset, Send};

/// What the server behind the proxy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Server {
    /// Sends everything back in brackets, and ends when the client has.
    Echo,
    /// Speaks first, and ends when the client has.
    Greeter,
    /// Answers `bye`, and ends when it is sent more.
    Leaver,
    /// Resets when it is sent something.
    Breaker,
    /// Does not listen.
    Nobody,
}

const SERVERS: [Server; 5] = [Server::Echo, Server::Greeter, Server::Leaver, Server::Breaker, Server::Nobody];

struct Scenario {
    name: &'static str,
    /// What the probe does; see its `connection.rs`.
    script: &'static str,
    server: Server,
    client: &'static [Step],
    /// The lines, by how they begin, that are meant to be others or at another place, and why.
    differs: &'static [(&'static str, &'static str)],
}

const fn scenario(
    name: &'static str,
    script: &'static str,
    server: Server,
    client: &'static [Step],
) -> Scenario {
    Scenario { name, script, server, client, differs: &[] }
}

const FAILURE: &str = "how a backtrace is had is the guest's own to say, or not";
const REPLACED: &str = "an instance that crashed is replaced, where Envoy leaves the plugin dead";
const RESUMES: &str = "what a server sent can be resumed; Envoy says that it does not know how";
const OF_OWN: &str = "told of the waypoint's own configuration";

const PROPERTIES: &[(&str, &str)] = &[
    ("PROP connection", "numbered in its own way"),
    ("PROP destination.", "the service, not the listener"),
    ("PROP plugin_name", OF_OWN),
    ("PROP xds.", OF_OWN),
    ("PROP upstream.transport_failure_reason", "empty and not known are the same"),
    ("PROP request.duration", "known once a connection is over"),
    ("PROP metadata", "empty and not known are the same"),
    ("PROP response.size", "counted when the client's socket took it, not before"),
    ("PROP response.total_size", "counted when the client's socket took it, not before"),
];

const SCENARIOS: &[Scenario] = &[
    scenario("plain", "x:x", Server::Echo, &[Send("one"), Read(5), Send("two"), Read(10), End]),
    scenario("greeted", "x:x", Server::Greeter, &[Read(5), End]),
    scenario(
        "serverends",
        "x:x",
        Server::Leaver,
        &[Send("hi"), Read(3), Send("go"), Logged("CB upstream_close", 1), End],
    ),
    scenario("serverbreaks", "x:x", Server::Breaker, &[Send("hi")]),
    scenario("clientbreaks", "x:x", Server::Echo, &[Send("hi"), Read(4), Reset]),
    scenario("nobody", "x:x", Server::Nobody, &[]),
    Scenario {
        differs: PROPERTIES,
        ..scenario(
            "properties",
            "new:properties down:properties up:properties log:properties",
            Server::Echo,
            &[Send("one"), Read(5), End],
        )
    },
    scenario("maps", "new:phase down:phase", Server::Echo, &[Send("one"), Read(5), End]),
    Scenario {
        differs: PROPERTIES,
        ..scenario("own", "new:property log:properties", Server::Echo, &[Send("one"), Read(5), End])
    },
    Scenario {
        differs: &[("TICK", RESUMES)],
        ..scenario("waits", "new:tick", Server::Echo, &[Send("one"), Read(5), End])
    },
    scenario("goeson", "new:goon", Server::Echo, &[Send("one"), Read(5), End]),
    scenario(
        "holds",
        "down:hold,hold,pass",
        Server::Echo,
        &[
            Send("one"),
            Logged("CB downstream_data", 1),
            Send("two"),
            Logged("CB downstream_data", 2),
            Send("three"),
            Read(13),
            End,
        ],
    ),
    Scenario {
        differs: &[("TICK", RESUMES)],
        ..scenario("holdsforatime", "down:tick,pass", Server::Echo, &[Send("one"), Read(5), End])
    },
    scenario(
        "letsgoatonce",
        "down:goon,pass",
        Server::Echo,
        &[Send("one"), Read(5), Send("two"), Read(10), End],
    ),
    scenario(
        "holdstheserver",
        "up:hold,pass",
        Server::Echo,
        &[Send("one"), Logged("CB upstream_data", 1), Send("two"), Read(10), End],
    ),
    scenario("replaces", "down:replace,x up:replace,x", Server::Echo, &[Send("one"), Read(8), End]),
    scenario("edits", "down:edit,x up:edit,x", Server::Echo, &[Send("one"), Read(19), End]),
    scenario("refuses", "new:closedown", Server::Echo, &[]),
    scenario("refusesup", "new:closeup", Server::Echo, &[]),
    scenario("closes", "down:x,closedown", Server::Echo, &[Send("one"), Read(5), Send("two")]),
    scenario("closesup", "down:closeup", Server::Echo, &[Send("one")]),
    scenario("closesonanswer", "up:closedown", Server::Echo, &[Send("one")]),
    scenario("closesnothing", "down:closeodd,x", Server::Echo, &[Send("one"), Read(5), End]),
    scenario("replies", "new:reply down:reply,x", Server::Echo, &[Send("one"), Read(5), End]),
    Scenario {
        differs: &[
            ("note: run with `RUST_BACKTRACE", FAILURE),
            ("CB context_create(", REPLACED),
            ("CB vm_start(", REPLACED),
            ("CB configure(", REPLACED),
        ],
        ..scenario("crashes", "down:crash", Server::Echo, &[Send("one")])
    },
];

/// What came of a scenario in one host.
struct Came {
    lines: Vec<String>,
    told: Vec<u8>,
}

#[tokio::test]
async fn connections_are_to_a_guest_what_they_are_in_envoy() -> Result<()> {
    let probe = built().join("../plugins/probe.wasm");
    let Some(program) = program() else {
        cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    };
    if !probe.exists() {
        cairn_tests::skipped("no target/plugins/probe.wasm; `plugins/build` makes it");
        return Ok(());
    }
    let servers = Servers::start().await?;
    let ours = Ours::start(&probe, &servers).await?;
    let envoy = start_envoy(&program, &probe, &servers).await?;
    let mut wrong = Vec::new();
    for scenario in SCENARIOS {
        let (there, here) = tokio::try_join!(
            run(scenario, envoy.listener(scenario.name)?, || envoy.lines_of(scenario.name)),
            run(scenario, ours.address(scenario.name)?, || lines_of(&format!(
                "{NAMESPACE}/{}",
                scenario.name
            ))),
        )?;
        wrong.extend(
            compare(scenario, &there, &here).err().map(|error| format!("{}: {error:#}", scenario.name)),
        );
    }
    ensure!(wrong.is_empty(), "{} of {} differ\n\n{}", wrong.len(), SCENARIOS.len(), wrong.join("\n\n"));
    Ok(())
}

fn compare(scenario: &Scenario, envoy: &Came, ours: &Came) -> Result<()> {
    let (there, here) = (String::from_utf8_lossy(&envoy.told), String::from_utf8_lossy(&ours.told));
    ensure!(there == here, "the client is told `{there}` by Envoy, `{here}` by us");
    let is_meant = |line: &&String| {
        let mut known = scenario.differs.iter();
        line.is_empty() || known.any(|(start, _)| line.starts_with(start))
    };
    let lines =
        |came: &Came| came.lines.iter().filter(|line| !is_meant(line)).map(|line| comparable(line)).collect();
    let (there, here): (Vec<String>, Vec<String>) = (lines(envoy), lines(ours));
    ensure!(there == here, "Envoy\n  {}\nours\n  {}", there.join("\n  "), here.join("\n  "));
    Ok(())
}

/// The part of a line that does not depend on when and where it ran.
fn comparable(line: &str) -> String {
    let varies = ["PROP source.", "PROP upstream.address", "PROP upstream.port", "PROP request.time"];
    if varies.iter().any(|name| line.starts_with(name)) {
        return line.split(" len=").next().unwrap_or_default().to_owned();
    }
    match line.strip_prefix("CB ").and_then(|callback| callback.split_once('(')) {
        Some((name, rest)) => format!("CB {name}({}", rest.trim_start_matches(|c: char| c.is_ascii_digit())),
        // As our host writes it.
        None => line.replace('\n', "\\n"),
    }
}

/// Runs a client against `address`, and waits until the guest has heard of its end.
async fn run(scenario: &Scenario, address: SocketAddr, lines: impl Fn() -> Vec<String>) -> Result<Came> {
    let count = |start: &str| lines().iter().filter(|line| line.starts_with(start)).count();
    let before = lines().len();
    let mut told = Vec::new();
    let mut stream = TcpStream::connect(address).await?;
    for step in scenario.client {
        match *step {
            Send(text) => stream.write_all(text.as_bytes()).await?,
            Read(length) => {
                while told.len() < length {
                    let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut told)).await;
                    let read = read.with_context(|| format!("{}: nothing comes", scenario.name))??;
                    ensure!(read > 0, "{}: the connection ended", scenario.name);
                }
            }
            Logged(start, wanted) => {
                wait_until("the guest sees it", || async { Ok(count(start) >= wanted) }).await?;
            }
            End => stream.shutdown().await?,
            Reset => SockRef::from(&stream).set_linger(Some(Duration::ZERO))?,
        }
    }
    if !matches!(scenario.client.last(), Some(Reset)) {
        let rest = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut told)).await;
        // A reset is an end too.
        let _end = rest.with_context(|| format!("{}: no end of the connection", scenario.name))?;
    }
    drop(stream);
    if scenario.name != "crashes" {
        wait_until("the guest hears of the end", || async { Ok(count("CB delete(") > 0) }).await?;
    }
    Ok(Came { lines: lines().split_off(before), told })
}

/// The servers of all scenarios. They end when dropped.
struct Servers {
    addresses: BTreeMap<Server, SocketAddr>,
    /// Bound, and not listening: nobody else is given the port, and who connects is refused.
    _nobody: TcpSocket,
    _running: JoinSet<()>,
}

impl Servers {
    async fn start() -> Result<Self> {
        let (mut addresses, mut running) = (BTreeMap::new(), JoinSet::new());
        let nobody = TcpSocket::new_v4()?;
        nobody.bind("127.0.0.1:0".parse()?)?;
        for server in SERVERS {
            if server == Server::Nobody {
                addresses.insert(server, nobody.local_addr()?);
                continue;
            }
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            addresses.insert(server, listener.local_addr()?);
            running.spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    // What a client does to it ends a connection.
                    connections.spawn(async move { drop(answer(server, stream).await) });
                }
            });
        }
        Ok(Self { addresses, _nobody: nobody, _running: running })
    }
}

async fn answer(server: Server, mut stream: TcpStream) -> Result<()> {
    let mut bytes = vec![0; 4096];
    match server {
        Server::Echo => loop {
            let length = stream.read(&mut bytes).await?;
            if length == 0 {
                stream.shutdown().await?;
                break;
            }
            stream.write_all(&[b"<", &bytes[..length], b">"].concat()).await?;
        },
        Server::Greeter => {
            stream.write_all(b"hello").await?;
            while stream.read(&mut bytes).await? > 0 {}
            stream.shutdown().await?;
        }
        Server::Leaver => {
            let _length = stream.read(&mut bytes).await?;
            stream.write_all(b"bye").await?;
            let _length = stream.read(&mut bytes).await?;
            stream.shutdown().await?;
            while stream.read(&mut bytes).await? > 0 {}
        }
        Server::Breaker => {
            let _length = stream.read(&mut bytes).await?;
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        Server::Nobody => {}
    }
    Ok(())
}

fn configuration(scenario: &Scenario) -> String {
    json!({ "connections": scenario.script }).to_string()
}

async fn start_envoy(program: &Path, probe: &Path, servers: &Servers) -> Result<Envoy> {
    let clusters =
        servers.addresses.iter().map(|(server, at)| cluster(&format!("{server:?}"), *at, Version::Http1));
    let listeners = SCENARIOS.iter().map(|scenario| listener(scenario, probe));
    Envoy::run(program, listeners.collect(), clusters.collect()).await
}

fn listener(scenario: &Scenario, probe: &Path) -> Value {
    let text = json!({
        "@type": "type.googleapis.com/google.protobuf.StringValue", "value": configuration(scenario),
    });
    let plugin = json!({ "config": {
        "name": scenario.name,
        "root_id": "r",
        "failure_policy": "FAIL_CLOSED",
        "configuration": text,
        "vm_config": {
            // A machine for each: a crash is nobody else's.
            "vm_id": scenario.name,
            "runtime": "envoy.wasm.runtime.v8",
            "code": { "local": { "filename": probe } },
        },
    } });
    let proxy = json!({ "stat_prefix": "connections", "cluster": format!("{:?}", scenario.server) });
    let filters = [
        extension("wasm", "filters.network.wasm.v3.Wasm", plugin),
        extension("tcp", "filters.network.tcp_proxy.v3.TcpProxy", proxy),
    ];
    json!({ "name": scenario.name, "address": loopback(0), "filter_chains": [{ "filters": filters }] })
}

/// Our engine with a listener for each scenario. It ends when dropped.
struct Ours {
    addresses: BTreeMap<&'static str, SocketAddr>,
    _running: JoinSet<()>,
}

impl Ours {
    async fn start(probe: &Path, servers: &Servers) -> Result<Self> {
        listen_to_plugins();
        let mut store = Store::new();
        for (index, (server, at)) in (1..).zip(&servers.addresses) {
            let port = ServicePort { port: 9000, target_port: at.port(), protocol: AppProtocol::Tcp };
            store.apply(service(&name(*server), index, *at, vec![port]));
        }
        let snapshot = Arc::new(ArcSwap::from_pointee(store.snapshot()));
        let settings = TelemetrySettings { access_log: false, ..TelemetrySettings::default() };
        let telemetry = Telemetry::new("modules", "0", &settings, std::io::sink());
        let settings = WorkerSettings { retries_max: 0, ..WorkerSettings::default() };
        let worker = Worker::new(settings, Arc::clone(&snapshot), None, telemetry);
        let nowhere = || Arc::new(ArcSwap::from_pointee(nobodys_site()));
        let callout =
            Arc::new(MeshCallout::new(Arc::clone(&worker), nowhere(), ([10, 0, 0, 1], 9000).into()));
        let place = WorkerPlace { runtime: Handle::current(), callout };
        let engine = Engine::new(EngineSettings { places: vec![place], ..EngineSettings::default() })?;
        let module = engine.compile(&std::fs::read(probe)?)?;
        let (mut addresses, mut running) = (BTreeMap::new(), JoinSet::new());
        for scenario in SCENARIOS {
            let state = snapshot.load();
            let service = state.service_named(&hostname(&name(scenario.server)), "").context("no service")?;
            let site = Site {
                chain: Chain::new(vec![engine.factory(Arc::clone(&module), &plugin(scenario, probe))?]),
                protocol: AppProtocol::Tcp,
                service: Some(Arc::clone(&service.service)),
                port: 9000,
                ..nobodys_site()
            };
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            addresses.insert(scenario.name, listener.local_addr()?);
            running.spawn(accept(listener, site, Arc::clone(&worker)));
        }
        Ok(Self { addresses, _running: running })
    }

    fn address(&self, name: &str) -> Result<SocketAddr> {
        self.addresses.get(name).copied().context("no such listener")
    }
}

fn name(server: Server) -> String {
    format!("{server:?}").to_lowercase()
}

fn plugin(scenario: &Scenario, probe: &Path) -> WasmPlugin {
    WasmPlugin {
        name: ResourceName::new(NAMESPACE, scenario.name),
        targets: Vec::new(),
        url: format!("file://{}", PathBuf::from(probe).display()).into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "r".into(),
        kind: PluginKind::Network,
        ports: Vec::new(),
        limits: PluginLimits::default(),
        config: configuration(scenario).into(),
        phase: PluginPhase::Unspecified,
        priority: 0,
        fail_strategy: FailStrategy::Close,
        env: Vec::new(),
        host_env: Vec::new(),
        holds_heads: false,
        isolation: Isolation::Shared,
        mode: PluginMode::Enforce,
    }
}

async fn accept(listener: TcpListener, site: Site, worker: Arc<Worker>) {
    let vip = site.service.as_ref().and_then(|service| service.vips.first()).map(|vip| vip.address);
    let Some(vip) = vip else { return };
    let destination = SocketAddr::new(vip, site.port);
    let site = Arc::new(ArcSwap::from_pointee(site));
    let (_trigger, drain) = drain();
    let mut connections = JoinSet::new();
    let mut id = 0;
    while let Ok((stream, client)) = listener.accept().await {
        id += 1;
        let connection = Connection {
            id,
            worker: 0,
            source: Peer { address: client, identity: None, workload: None },
            destination,
            service: site.load().service.clone(),
            local: None,
            callout: Arc::new(MeshCallout::new(Arc::clone(&worker), Arc::clone(&site), destination)),
        };
        connections.spawn(serve(
            stream,
            Arc::new(connection),
            Arc::clone(&site),
            Arc::clone(&worker),
            drain.clone(),
        ));
    }
}
