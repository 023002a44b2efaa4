//! The probe: a guest that calls every host function in every phase and logs what it gets, compared line by line with what it
//! logged in Envoy 1.40 (`probe/envoy.log`). What is meant to differ is listed, with the reason.

// A test may end where it stands.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::string_slice
)]

use cairn_filter::{
    Callout, CalloutAnswer, CalloutError, CalloutFuture, CalloutRequest, Chunk, Connection, Exchange,
    Factory, Filter, LocalReply, Measures, Part, Peer, Protocol, RequestHead, ResponseHead, Side, Verdict,
};
use cairn_mesh::{
    FailStrategy, Isolation, PluginKind, PluginLimits, PluginMode, PluginPhase, ResourceName, WasmPlugin,
};
use cairn_wasm::{Engine, EngineSettings, WorkerPlace};
use http::header::{HeaderMap, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Response, StatusCode, Version};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tracing_subscriber::fmt::MakeWriter;

/// Lines of Envoy's that begin so, and hold what stands behind the star, are others of ours.
struct Difference {
    lines: &'static str,
    reason: &'static str,
}

const fn differs(lines: &'static str, reason: &'static str) -> Difference {
    Difference { lines, reason }
}

const NO_VM: &str = "a WasmPlugin has neither an id nor a configuration for its VM";
const JSON: &str = "the configuration of a WasmPlugin is JSON, not a message";
const STALE: &str = "the buffer of foreign functions does not show what another one held before";
const FORMER: &str = "names from before there was `xds` are still answered: plugins use them";
const CONFIGURED: &str = "the recording configured it for Envoy; a waypoint has no such metadata or name";
const UNORDERED: &str = "the order in a map has no meaning";
const READABLE: &str =
    "what Envoy refuses to read is empty, or as it was: a refusal crashes plugins of the Rust SDK";
const UNKNOWN: &str = "filters are not told of it";

/// Everything that is meant to differ.
const DIFFERENCES: &[Difference] = &[
    differs("CB vm_start(", NO_VM),
    differs("CB configure(", JSON),
    differs("PROP plugin_vm_id", NO_VM),
    differs("PROP node.", FORMER),
    differs("PROP cluster_name", FORMER),
    differs("PROP cluster_metadata", FORMER),
    differs("PROP route_name", FORMER),
    differs("PROP route_metadata", FORMER),
    differs("PROP listener_direction", FORMER),
    differs("PROP listener_metadata", FORMER),
    differs(
        "METRIC type=*define st=0",
        "one name is one metric with one id, not an alias with an id of its own",
    ),
    differs("MISC ", "resuming a TCP stream from elsewhere is no error: the Rust SDK knows no such status"),
    differs("BUF *type=6 ", NO_VM),
    differs("BUF configure*type=7 ", JSON),
    differs("BUF *type=8 ", STALE),
    differs("MAP *size st=2", READABLE),
    differs("PROP request.path st=1", READABLE),
    differs("PROP request.host st=1", READABLE),
    differs("PROP request.headers st=0", UNORDERED),
    differs("PROP response.headers st=0", UNORDERED),
    differs("PROP xds.node st=0", "Envoy lists its extensions in it"),
    differs("PROP xds.cluster_metadata", CONFIGURED),
    differs("PROP xds.route_metadata", CONFIGURED),
    differs("PROP xds.virtual_host_", CONFIGURED),
    differs("PROP xds.filter_chain_name", CONFIGURED),
    differs("PROP xds.listener_metadata", CONFIGURED),
    differs(
        "PROP xds.upstream_host_metadata st=3",
        "an endpoint without metadata has an empty message of it",
    ),
    differs("PROP upstream.local_address st=0", UNKNOWN),
    differs("PROP upstream.cx_pool_ready_duration st=0", UNKNOWN),
    differs("REQBODY ", READABLE),
    differs(
        "MAP log type=1 ",
        "trailers that were added are told; Envoy knows how long they are, and gives none",
    ),
    differs("PROP response.code st=0*a201", "a reply of 418 is 200 to a client of gRPC, and to everybody"),
    differs(
        "HDRS4 ",
        "a malformed map changes nothing; an empty one, Envoy's answer, only breaks the request",
    ),
];

impl Difference {
    fn covers(&self, line: &str) -> bool {
        let (start, rest) = self.lines.split_once('*').unwrap_or((self.lines, ""));
        line.starts_with(start) && line.contains(rest)
    }
}

/// The two services of the recording: one answers, nobody listens at the other.
#[derive(Debug)]
struct Recorded;

impl Callout for Recorded {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        Box::pin(async move {
            if &*request.host == "dead" {
                return Err(CalloutError::Unreachable("nobody listens".to_owned()));
            }
            // The failure came first.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let mut response =
                Response::new(bytes::Bytes::from(ANSWER.to_owned() + &" ".repeat(210 - ANSWER.len())));
            *response.headers_mut() = headers(&[
                ("server", "BaseHTTP/0.6 Python/3.11.7"),
                ("date", "Sun, 22 Nov 2026 22:29:40 GMT"),
                ("content-type", "application/json"),
                ("x-up", "u1"),
                ("x-up", "u2"),
                ("content-length", "210"),
                ("x-envoy-upstream-service-time", "2"),
            ]);
            Ok(CalloutAnswer { response, trailers: HeaderMap::new() })
        })
    }

    fn version(&self, host: &str, _: Option<&str>, port: u16) -> Option<Version> {
        (["up", "dead"].contains(&host) && port == 80).then_some(Version::HTTP_11)
    }
}

/// The beginning of the recorded answer, of which the log shows as much.
const ANSWER: &str = "{\"method\": \"GET\", \"path\": \"/callout\", \"headers\": ";

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
}

/// Keeps the lines of the log.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Lines {
    /// Whether the guest was too slow on a busy machine, and ended for it.
    fn tell_of_a_crash(&self) -> bool {
        String::from_utf8_lossy(&self.0.lock()).contains("the plugin crashed")
    }

    /// What the probe logged, without what the proxy adds.
    fn of_probe(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().clone()).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_suffix(" plugin=\"ns/myplugin\""));
        let lines = lines.map(|line| line.trim_start().to_owned());
        // The host's own word on a map that it did not take.
        lines.filter(|line| line != "a malformed header map was ignored").collect()
    }
}

fn settings_of_recording() -> EngineSettings {
    let node = [
        ("id", "sidecar~1.2.3.4~pod.ns~ns.svc"),
        ("cluster", "app.ns"),
        ("metadata.LABELS.app", "web"),
        ("metadata.NAMESPACE", "ns"),
        ("metadata.PORT", "15001"),
    ];
    let place =
        crate::WorkerPlace { runtime: tokio::runtime::Handle::current(), callout: Arc::new(Recorded) };
    EngineSettings {
        node: node.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        places: vec![place],
        ..EngineSettings::default()
    }
}

fn exchange_of_recording(id: u64, port: u16) -> Exchange {
    let connection = Connection {
        id,
        worker: 0,
        source: Peer { address: ([127, 0, 0, 1], port).into(), identity: None, workload: None },
        destination: "127.0.0.1:18080".parse().unwrap(),
        service: None,
        local: None,
        callout: Arc::new(Recorded),
    };
    let mut exchange =
        Exchange::new(Arc::new(connection), Protocol::Http11, Instant::now(), SystemTime::now());
    exchange.cluster = Some("up".into());
    exchange.route = Some("r1".into());
    exchange
}

fn request_of_recording(path: &'static str, more: &[(&'static str, &'static str)]) -> RequestHead {
    let usual = [("user-agent", "curl/7.88.1"), ("accept", "*/*")];
    RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("127.0.0.1:18080"),
        path: PathAndQuery::from_static(path),
        headers: headers(&[&usual[..], more].concat()),
        version: Version::HTTP_11,
    }
}

/// Runs the probe as it was run in Envoy: its start, a tick with two calls, and ten requests.
async fn run(module: &[u8], lines: &Lines) {
    let engine = Engine::new(settings_of_recording()).unwrap();
    let plugin = WasmPlugin {
        name: ResourceName::new("ns", "myplugin"),
        targets: Vec::new(),
        url: "file:///probe.wasm".into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "my-root".into(),
        kind: PluginKind::Http,
        limits: PluginLimits::default(),
        ports: Vec::new(),
        config: "{\"the configuration\": 1}".into(),
        phase: PluginPhase::Unspecified,
        priority: 0,
        fail_strategy: FailStrategy::Close,
        env: Vec::new(),
        host_env: Vec::new(),
        holds_heads: false,
        isolation: Isolation::Shared,
        mode: PluginMode::Enforce,
    };
    let factory = engine.factory(engine.compile(module).unwrap(), &plugin).unwrap();
    let answered = || lines.of_probe().iter().filter(|line| line.starts_with("CALLMAP")).count() == 2;
    wait_for(|| answered() || lines.tell_of_a_crash()).await;

    for (number, one) in recorded_exchanges().into_iter().enumerate() {
        if number == 4 {
            // It logs more than a plugin may in one second.
            tokio::time::sleep(Duration::from_millis(1100)).await;
        }
        one.run(&*factory);
    }
}

/// What followed the request's head.
enum Then {
    /// An upstream answered with a body of this length, whose end came later.
    Answered(usize),
    /// The plugin's own reply, with this content type if it had a body, and these trailers-only headers if not.
    Replied,
    /// Nothing: the client or the plugin had enough.
    Nothing,
}

/// An exchange of the recording.
struct Recording {
    /// The number and the client's port of its connection.
    connection: (u64, u16),
    method: Method,
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    body: Option<&'static str>,
    then: Then,
    details: &'static str,
    measures: Measures,
}

fn recorded_exchanges() -> Vec<Recording> {
    let measured = |request_bytes, flags| Measures { request_bytes, flags, ..Measures::default() };
    let answered = |request_bytes, response_bytes| Measures {
        response_body_bytes: 17,
        response_bytes,
        attempts: 1,
        upstream_duration: Some(Duration::from_millis(6)),
        grpc_status: Some(2),
        ..measured(request_bytes, "-")
    };
    let get = |path, id, then, details, measures| Recording {
        connection: (0, 0),
        method: Method::GET,
        path,
        headers: vec![("x-forwarded-proto", "http"), ("x-request-id", id)],
        body: None,
        then,
        details,
        measures,
    };
    let replied = |response_body_bytes, response_bytes, grpc_status| Measures {
        response_body_bytes,
        response_bytes,
        grpc_status: Some(grpc_status),
        ..measured(0x9c, "-")
    };
    let gone = "downstream_remote_disconnect";
    let first = [("x-dup", "a"), ("x-dup", "b"), ("x-empty", ""), ("referer", "ref")];
    let posted = [("content-length", "10"), ("content-type", "application/x-www-form-urlencoded")];
    let more = |more: &[(&'static str, &'static str)], one: Recording| Recording {
        headers: [more, &one.headers].concat(),
        ..one
    };
    let mut all = vec![
        more(
            &first,
            get("/hello?x=1&y=2", "rid-1", Then::Answered(372), "via_upstream", answered(0xdc, 0x9a)),
        ),
        Recording {
            method: Method::POST,
            body: Some("hello-body"),
            ..more(
                &posted,
                get(
                    "/post",
                    "d8774429-339a-4966-90a6-50a0a60bab3f",
                    Then::Nothing,
                    gone,
                    Measures { request_body_bytes: 10, attempts: 1, ..measured(0x132, "DC") },
                ),
            )
        },
        get(
            "/local",
            "05e38da7-0284-4ecb-92f1-db5b2252fac9",
            Then::Replied,
            "my_details_x",
            replied(17, 0x80, 2),
        ),
        get(
            "/localcont",
            "5a933f99-05e0-4908-b10b-ec4ea767380b",
            Then::Replied,
            "my_details_x",
            Measures { request_bytes: 0xa0, ..replied(17, 0x80, 2) },
        ),
        more(
            &[("content-type", "application/grpc")],
            get(
                "/localgrpc",
                "d4f50936-d0a6-401b-a158-46ee58fe40e2",
                Then::Replied,
                "my_details_x",
                Measures { request_bytes: 0xbc, ..replied(0, 0x8d, 7) },
            ),
        ),
        get("/pause", "227a5cd5-7052-48e7-93f2-fd3c1484ae70", Then::Nothing, gone, measured(0x9c, "DC")),
        get(
            "/close",
            "9998d5ff-540d-4957-a01c-851aedffc4b1",
            Then::Nothing,
            "wasm_close_stream",
            measured(0x9c, "-"),
        ),
        get("/bigaction", "149be9a7-ef5d-42b3-b477-efe7a9fc709f", Then::Nothing, gone, measured(0xa0, "DC")),
        get(
            "/chg",
            "190c1599-bc6a-4e0a-8e00-208ad0aa6f28",
            Then::Answered(366),
            "via_upstream",
            answered(0xea, 0x9a),
        ),
        get(
            "/setmapjunk",
            "6e9778f8-bcf3-4145-b495-cd3030841a86",
            Then::Nothing,
            "route_not_found",
            measured(0, "NR"),
        ),
    ];
    // Ports are told where the probe does all that it can.
    let connections =
        [(4, 52334), (6, 52340), (7, 0), (8, 0), (9, 0), (10, 0), (11, 0), (12, 0), (14, 52330), (13, 52314)];
    all.iter_mut().zip(connections).for_each(|(one, connection)| one.connection = connection);
    all
}

/// The beginning of what the recorded upstream answers, of which the log shows as much.
const ECHOED: &str = "{\"method\": \"GET\", \"path\": \"/rewritten?y=2\", \"headers\": [[\"ho";

impl Recording {
    fn run(self, factory: &dyn Factory) {
        let (id, port) = self.connection;
        let mut exchange = exchange_of_recording(id, port);
        let mut filter = factory.start(&exchange).unwrap();
        let mut head = request_of_recording(self.path, &self.headers);
        head.method = self.method.clone();
        exchange.grpc = self.path.contains("grpc");
        let verdict = filter.request_headers(&mut exchange, &mut head, self.body.is_none());
        exchange.details = self.details.into();
        if let Some(body) = self.body {
            show(&mut *filter, &mut exchange, Side::Request, body, false);
            show(&mut *filter, &mut exchange, Side::Request, "", true);
        }
        if self.measures.attempts > 0 {
            exchange.upstream = Some("127.0.0.1:18081".parse().unwrap());
            exchange.cluster = Some("up2".into());
            exchange.route = Some("r-rewritten".into());
        }
        match (self.then, verdict) {
            (Then::Answered(length), Verdict::Continue) => answer(&mut *filter, &mut exchange, length),
            (Then::Replied, Verdict::Reply(reply)) => replied(&mut *filter, &mut exchange, *reply),
            // A guest that had no time comes to something else, and is asked again; so do the lines tell of anything else.
            _ => {}
        }
        exchange.measures = Some(self.measures);
        filter.finish(&mut exchange);
    }
}

fn show(filter: &mut dyn Filter, exchange: &mut Exchange, side: Side, text: &str, end: bool) {
    let mut chunk = Chunk { bytes: text.to_owned().into(), end_of_stream: end, ..Chunk::default() };
    filter.body(exchange, Part { side, head: None, chunk: &mut chunk });
}

fn answer(filter: &mut dyn Filter, exchange: &mut Exchange, length: usize) {
    exchange.status = Some(StatusCode::OK);
    let is_first = length == 372;
    let answer = headers(&[
        ("server", "BaseHTTP/0.6 Python/3.11.7"),
        ("date", if is_first { "Sun, 22 Nov 2026 22:29:42 GMT" } else { "Sun, 22 Nov 2026 22:29:54 GMT" }),
        ("content-type", "application/json"),
        ("x-up", "u1"),
        ("x-up", "u2"),
        ("content-length", if is_first { "372" } else { "366" }),
        ("x-envoy-upstream-service-time", if is_first { "6" } else { "3" }),
    ]);
    let mut response = ResponseHead { status: StatusCode::OK, headers: answer };
    filter.response_headers(exchange, &mut response, false);
    show(filter, exchange, Side::Response, &format!("{ECHOED:length$}"), false);
    show(filter, exchange, Side::Response, "", true);
}

/// The plugin is shown its own reply, as the engine writes it.
fn replied(filter: &mut dyn Filter, exchange: &mut Exchange, reply: LocalReply) {
    let (status, more, body): (_, &[(&str, &str)], &[u8]) = match exchange.grpc {
        true => {
            let more =
                &[("content-type", "application/grpc"), ("grpc-status", "7"), ("grpc-message", "teapot")];
            (StatusCode::OK, more, &[])
        }
        false => (reply.status, &[("content-length", "6")], &reply.body),
    };
    exchange.status = Some(status);
    let mut response = ResponseHead { status, headers: reply.headers };
    for (name, value) in more {
        response.headers.insert(*name, HeaderValue::from_static(value));
    }
    filter.response_headers(exchange, &mut response, body.is_empty());
    if !body.is_empty() {
        show(filter, exchange, Side::Response, std::str::from_utf8(body).unwrap(), true);
    }
}

/// The lines of each callback, by its name.
fn sections(lines: impl Iterator<Item = String>) -> Vec<(String, Vec<String>)> {
    let mut sections: Vec<(String, Vec<String>)> = Vec::new();
    for line in lines {
        if let Some(callback) = line.strip_prefix("CB ") {
            let name = callback.split('(').next().unwrap_or_default().to_owned();
            sections.push((name, Vec::new()));
        }
        if let Some((_, section)) = sections.last_mut() {
            section.push(line);
        }
    }
    sections
}

/// The part of a line that does not depend on when and where it ran, on how many streams there were before, or on the order
/// of headers.
fn comparable(line: &str) -> String {
    let varies = ["request.time ", "request.duration ", "response.backend_latency "];
    let end = if varies.iter().any(|name| line.contains(name)) { line.find(" hex") } else { None };
    let line = &line[..end.unwrap_or(line.len())];
    if line.starts_with("HDRS") {
        let mut headers: Vec<&str> = line.split(['[', ']']).flat_map(|part| part.split("), (")).collect();
        headers.iter_mut().for_each(|header| *header = header.trim_matches(['(', ')', ' ']));
        headers.sort_unstable();
        return headers.join(" ");
    }
    match line.strip_prefix("CB ").and_then(|callback| callback.split_once('(')) {
        Some((name, rest)) => format!("{name} {}", rest.trim_start_matches(|c: char| c.is_ascii_digit())),
        None => line.to_owned(),
    }
}

/// Waits for something that other tasks of this thread do.
async fn wait_for(mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !happened() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What the probe logs here.
fn recorded(module: &[u8]) -> Lines {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(lines.clone())
        .with_ansi(false)
        .with_level(false)
        .with_target(false)
        .without_time()
        .finish();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    tracing::subscriber::with_default(subscriber, || runtime.block_on(run(module, &lines)));
    lines
}

#[test]
fn a_guest_sees_what_it_sees_in_envoy() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/plugins/probe.wasm");
    let Ok(module) = std::fs::read(path) else {
        // As in all tests: where nothing may be skipped, this is a failure.
        let may_skip = std::env::var_os("CAIRN_NO_SKIPS").is_none_or(|value| value.is_empty());
        assert!(may_skip, "CAIRN_NO_SKIPS is set, and this would be skipped: no target/plugins/probe.wasm");
        println!("skipped: no target/plugins/probe.wasm; plugins/build makes it");
        return;
    };
    // A guest may run for 100 ms, which passes quickly on a machine that does much else.
    let lines = (0..5).map(|_| recorded(&module)).find(|lines| !lines.tell_of_a_crash());
    let lines = lines.expect("the guest ends in time once");

    let envoy = sections(include_str!("probe/envoy.log").lines().map(str::to_owned));
    let mut ours = sections(lines.of_probe().into_iter());
    let mut used = BTreeSet::new();
    let mut wrong = Vec::new();
    for (name, expected) in envoy {
        let Some(index) = ours.iter().position(|(present, _)| *present == name) else {
            wrong.push(format!("no more {name}"));
            continue;
        };
        let (_, found) = ours.remove(index);
        for index in 0..expected.len().max(found.len()) {
            let line = |lines: &[String]| lines.get(index).cloned().unwrap_or_default();
            let (theirs, own) = (line(&expected), line(&found));
            if comparable(&theirs) == comparable(&own) {
                continue;
            }
            match DIFFERENCES.iter().position(|known| known.covers(&theirs)) {
                Some(known) => drop(used.insert(known)),
                None => wrong.push(format!("{name}\n  envoy {theirs}\n  ours  {own}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{} lines differ:\n{}", wrong.len(), wrong.join("\n"));
    for (index, known) in DIFFERENCES.iter().enumerate() {
        assert!(used.contains(&index), "`{}` does not differ ({})", known.lines, known.reason);
    }
}
