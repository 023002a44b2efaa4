//! Access logs beside stock Envoy's: the same requests through an Envoy with Istio's default formats and through a
//! waypoint, and the same lines, bit for bit, but for times, addresses and what each made up itself. And that logs are
//! opened anew when they were rotated.

use crate::client::{Who, connect};
use crate::edits::SMALL;
use crate::harness::Mesh;
use crate::observe::{mesh_config, until_true};
use anyhow::{Context, Result, ensure};
use cairn_tests::envoy::{Envoy, Start, extension, loopback};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long Envoy may take to start, and an answer to come.
const START_MAX: Duration = Duration::from_secs(60);
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// Istio's default line.
const TEXT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
    %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
    \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
    %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
    \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% \
    %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

/// Istio's default keys.
const KEYS: [(&str, &str); 24] = [
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
];

/// A line of one's own, of operators whose values do not depend on the proxy.
const OWN_TEXT: &str = "%REQ(x-request-id)% a=%REQ(x-a)% b=%REQ(x-b):5% or=%REQ(x-none?x-a)% out=%RESP(x-out)% \
    dup=%RESP(x-dup)% empty=%RESP(x-empty)% status=%RESP(:status)% scheme=%REQ(:SCHEME)% path=%REQ(:PATH)% \
    before=%REQ(X-ENVOY-ORIGINAL-PATH)% plain=%REQ_WITHOUT_QUERY(:PATH)% grpc=%GRPC_STATUS% \
    snake=%GRPC_STATUS(SNAKE_STRING)% number=%GRPC_STATUS_NUMBER% long=%RESPONSE_FLAGS_LONG% \
    attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT% trace=%TRACE_ID% said=%DYNAMIC_METADATA(com.example:x)% \
    host=%REQ(host)% cel=%CEL(request.headers['x-a'])% code=%CEL(response.code)% 100%% via=%REQ(via)%\n";

fn own_keys() -> Value {
    json!({
        "id": "%REQ(x-request-id)%", "a": "%REQ(x-a)%", "mix": "<%REQ(x-a)%|%REQ(x-none)%>", "b": "%REQ(x-b):5%",
        "code": "%RESPONSE_CODE%", "grpc": "%GRPC_STATUS%", "number": "%GRPC_STATUS_NUMBER%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "cel": "%CEL(response.code)%",
        "truth": "%CEL(response.code == 200)%", "path": "%CEL(request.path)%", "out": "%RESP(x-out)%",
        "list": ["%REQ(x-none)%", "%REQ(x-a)%"], "map": { "none": "%REQ(x-none)%" }, "yes": true, "literal": 1.5,
        "text": "as it is", "nothing": "",
    })
}

/// The logs of both, by the names of their files.
fn formats() -> Vec<(&'static str, Value, bool)> {
    let keys: serde_json::Map<String, Value> =
        KEYS.iter().map(|(key, format)| ((*key).to_owned(), (*format).into())).collect();
    vec![
        ("text", TEXT.into(), false),
        ("text-omit", TEXT.into(), true),
        ("json", keys.clone().into(), false),
        ("json-omit", keys.into(), true),
        ("own-text", OWN_TEXT.into(), false),
        ("own-text-omit", OWN_TEXT.into(), true),
        ("own-json", own_keys(), false),
        ("own-json-omit", own_keys(), true),
    ]
}

/// What is asked.
struct Ask {
    name: &'static str,
    /// What its lines have and no others.
    key: String,
    bytes: Vec<u8>,
    /// The client leaves before the answer.
    leaves: bool,
}

impl Ask {
    fn new(name: &'static str, id: &str) -> Self {
        let bytes =
            format!("GET /app/x HTTP/1.1\r\nhost: a\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n");
        Self { name, key: id.to_owned(), bytes: bytes.into_bytes(), leaves: false }
    }
}

/// The requests. Each has an id of its own, but the one whose id is empty.
fn asks() -> Vec<Ask> {
    type Row = (&'static str, &'static [u8], &'static [&'static [u8]]);
    let rows: [Row; 23] = [
        ("plain", b"GET /app/plain?a=b HTTP/1.1", &[b"user-agent: curl/8"]),
        ("quotes", b"GET /app/quotes HTTP/1.1", &[b"user-agent: a\"b\\c", b"x-a: q\"\\"]),
        (
            "utf-8",
            b"GET /app/utf HTTP/1.1",
            &[
                b"user-agent: \xc3\xbc\xe2\x82\xac",
                b"x-a: \xc3\xbc",
                b"x-b: \xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc",
            ],
        ),
        (
            "latin-1",
            b"GET /app/latin HTTP/1.1",
            &[b"user-agent: a\xffb", b"x-a: a\xffb", b"x-b: abcd\xff\xfe"],
        ),
        ("a tab", b"GET /app/tab HTTP/1.1", &[b"user-agent: a\tb", b"x-a: a\tb"]),
        ("empty", b"GET /app/empty HTTP/1.1", &[b"user-agent:", b"x-a:", b"x-forwarded-for:"]),
        (
            "repeated",
            b"GET /app/repeated HTTP/1.1",
            &[b"user-agent: a", b"user-agent: b", b"x-a: 1", b"x-a: 2", b"via: 1", b"via: 2"],
        ),
        ("forwarded", b"GET /app/for HTTP/1.1", &[b"x-forwarded-for: 1.2.3.4", b"x-forwarded-for: 5.6.7.8"]),
        ("HTTP/1.0", b"GET /app/ten HTTP/1.0", &[b"x-a: z"]),
        ("dots", b"GET /app/./a/../dots?x=%22&y=a|b HTTP/1.1", &[]),
        ("escapes", b"GET /app/%22%41 HTTP/1.1", &[]),
        ("absolute", b"GET http://other.example/app/abs HTTP/1.1", &[]),
        ("a head", b"HEAD /app/head HTTP/1.1", &[]),
        ("a body", b"POST /app/body HTTP/1.1", &[b"content-length: 3"]),
        ("pieces", b"POST /app/pieces HTTP/1.1", &[b"transfer-encoding: chunked"]),
        (
            "gRPC without a status",
            b"POST /app/grpc HTTP/1.1",
            &[b"content-type: application/grpc", b"content-length: 0"],
        ),
        ("denied", b"GET /app/denied HTTP/1.1", &[b"x-a: no"]),
        ("no route", b"GET /nowhere HTTP/1.1", &[]),
        ("rewritten", b"GET /before/x?q=1 HTTP/1.1", &[]),
        ("odd answer", b"GET /app/odd HTTP/1.1", &[]),
        ("closed", b"GET /app/close HTTP/1.1", &[]),
        ("cut", b"GET /app/cut HTTP/1.1", &[]),
        ("left", b"GET /app/slow HTTP/1.1", &[]),
    ];
    let ask = |(number, (name, line, headers)): (usize, Row)| {
        let key = format!("0000000{:x}-0000-4000-8000-00000000{number:04}", number % 16);
        let id = format!("x-request-id: {key}");
        let mut bytes = line.to_vec();
        for header in [&b"host: shop.example"[..], id.as_bytes(), b"connection: close"].iter().chain(headers)
        {
            bytes.extend_from_slice(b"\r\n");
            bytes.extend_from_slice(header);
        }
        bytes.extend_from_slice(b"\r\n\r\n");
        bytes.extend_from_slice(match name {
            "a body" => b"abc",
            "pieces" => b"3\r\nabc\r\n0\r\n\r\n",
            _ => b"",
        });
        Ask { name, key, bytes, leaves: name == "left" }
    };
    let mut all: Vec<Ask> = rows.into_iter().enumerate().map(ask).collect();
    // Both make an id of their own.
    let anonymous =
        b"GET /app/anonymous HTTP/1.1\r\nhost: a\r\nx-request-id:\r\nconnection: close\r\n\r\n".to_vec();
    all.push(Ask { bytes: anonymous, ..Ask::new("an empty id", "/app/anonymous") });
    all
}

/// The application behind both: the path says what it answers.
struct Application {
    /// Someone waits for what never comes.
    asked: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Application {
    async fn start(at: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(at).await?;
        let asked = Arc::new(Notify::new());
        let tell = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let tell = Arc::clone(&tell);
                // A client that breaks off has had what it wanted.
                tokio::spawn(async move { drop(answer(stream, &tell).await) });
            }
        });
        Ok(Self { asked, task })
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(mut stream: TcpStream, tell: &Notify) -> Result<()> {
    let mut read = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = read.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            ensure!(stream.read_buf(&mut read).await? > 0, "gone");
        };
        let head = String::from_utf8_lossy(&read[..end]).to_ascii_lowercase();
        let body_ends = |rest: &[u8]| match () {
            () if head.contains("content-length: 3") => rest.len() >= 3,
            () if head.contains("chunked") => rest.ends_with(b"0\r\n\r\n"),
            () => true,
        };
        while !body_ends(&read[end..]) {
            ensure!(stream.read_buf(&mut read).await? > 0, "gone");
        }
        read.clear();
        let path = head.split(' ').nth(1).unwrap_or_default();
        let answer: &[u8] = match path {
            "/app/close" => return Ok(()),
            "/app/slow" => {
                tell.notify_one();
                while stream.read_buf(&mut read).await? > 0 {}
                return Ok(());
            }
            "/app/odd" => {
                b"HTTP/1.1 200 OK\r\nx-out: a\"b\xff\r\nx-dup: 1\r\nx-dup: 2\r\nx-empty:\r\ncontent-length: 2\r\n\r\nok"
            }
            // Shorter than it says.
            "/app/cut" => b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",
            "/app/head" => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n",
            _ => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        };
        stream.write_all(answer).await?;
        if path == "/app/cut" {
            return Ok(());
        }
    }
}

async fn send(mut stream: TcpStream, ask: &Ask, application: &Application) -> Result<()> {
    let asking = async {
        stream.write_all(&ask.bytes).await?;
        if ask.leaves {
            application.asked.notified().await;
            return Ok(());
        }
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        ensure!(answer.starts_with(b"HTTP/1."), "{}: {}", ask.name, answer.escape_ascii());
        Ok(())
    };
    timeout(ANSWER_MAX, asking).await.with_context(|| format!("no answer to {}", ask.name))?
}

/// What the waypoint does with the application's service: the same as Envoy below.
const RESOURCES: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: own, namespace: shop }
spec:
  parentRefs: [{ group: \"\", kind: Service, name: own, port: 8000 }]
  rules:
    - matches: [{ path: { type: PathPrefix, value: /before } }]
      filters: [{ type: URLRewrite, urlRewrite: { path: { type: ReplacePrefixMatch, replacePrefixMatch: /app } } }]
      backendRefs: [{ name: own, port: 8000 }]
    - matches: [{ path: { type: PathPrefix, value: /app } }]
      backendRefs: [{ name: own, port: 8000 }]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: own, namespace: shop }
spec:
  targetRefs: [{ group: \"\", kind: Service, name: own }]
  rules: [{ to: [{ operation: { notPaths: [/app/denied] } }] }]
";

fn telemetry() -> String {
    let names: Vec<Value> = formats().iter().map(|(name, ..)| json!({ "name": name })).collect();
    let resource = json!({
        "apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry",
        "metadata": { "name": "own", "namespace": "shop" },
        "spec": {
            "targetRefs": [{ "group": "", "kind": "Service", "name": "own" }],
            "accessLogging": [{ "providers": names }],
        },
    });
    resource.to_string()
}

/// The waypoint's providers. Where the format is Istio's own, it is left to the waypoint to know it.
fn providers(directory: &Path) -> String {
    let provider = |(name, format, omit): (&str, Value, bool)| {
        let format = match (name.starts_with("own"), format) {
            (false, Value::String(_)) => json!({}),
            (false, _) => json!({ "labels": {} }),
            (true, Value::String(text)) => json!({ "text": text }),
            (true, keys) => json!({ "labels": keys }),
        };
        let path = directory.join(name);
        json!({ "name": name, "envoyFileAccessLog": {
            "path": path, "logFormat": format, "omitEmptyValues": omit,
        } })
    };
    let all: Vec<Value> = formats().into_iter().map(provider).collect();
    mesh_config(&format!("extensionProviders: {}\n", Value::from(all)))
}

/// The names that a waypoint gives its clusters and routes.
const CLUSTER: &str = "inbound-vip|8000|http|own.shop.svc.cluster.local";

fn bootstrap(directory: &Path, application: SocketAddr) -> Value {
    let logs = formats().into_iter().map(|(name, format, omit)| {
        let mut format = match format {
            Value::String(text) => json!({ "text_format_source": { "inline_string": text } }),
            keys => json!({ "json_format": keys }),
        };
        format["omit_empty_values"] = omit.into();
        format["formatters"] =
            json!([extension("query", "formatter.req_without_query.v3.ReqWithoutQuery", json!({})),]);
        let log = json!({ "path": directory.join(name), "log_format": format });
        extension("file", "access_loggers.file.v3.FileAccessLog", log)
    });
    let is_denied = json!({ "url_path": { "path": { "exact": "/app/denied" } } });
    let rbac = json!({ "rules": { "action": "ALLOW", "policies": { "own": {
        "permissions": [{ "not_rule": is_denied }], "principals": [{ "any": true }],
    } } } });
    let route = |name: &str, prefix: &str, rewrite: Option<&str>| {
        // Istio's routes have no timeout, and retry what has not been worked on.
        let mut action = json!({ "cluster": CLUSTER, "timeout": "0s" });
        if let Some(rewrite) = rewrite {
            action["prefix_rewrite"] = rewrite.into();
        }
        json!({ "name": name, "match": { "path_separated_prefix": prefix }, "route": action })
    };
    let routes = [route("shop/own/0", "/before", Some("/app")), route("shop/own/1", "/app", None)];
    let manager = json!({
        "stat_prefix": "logs",
        "access_log": logs.collect::<Vec<_>>(),
        "normalize_path": true,
        "skip_xff_append": true,
        "preserve_external_request_id": true,
        "http_protocol_options": { "accept_http_10": true },
        "http_filters": [
            extension("envoy.filters.http.rbac", "filters.http.rbac.v3.RBAC", rbac),
            extension("envoy.filters.http.router", "filters.http.router.v3.Router", json!({})),
        ],
        "route_config": { "name": "own", "virtual_hosts": [
            { "name": "own", "domains": ["*"], "routes": routes },
        ] },
    });
    let manager = extension(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        manager,
    );
    let at = json!({ "socket_address": {
        "address": application.ip().to_string(), "port_value": application.port(),
    } });
    let cluster = json!({
        "name": CLUSTER,
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": CLUSTER, "endpoints": [
            { "lb_endpoints": [{ "endpoint": { "address": at } }] },
        ] },
    });
    json!({
        "admin": { "address": loopback(0) },
        "static_resources": {
            "listeners": [{ "name": "in", "address": loopback(0), "filter_chains": [{ "filters": [manager] }] }],
            "clusters": [cluster],
        },
    })
}

fn lines(file: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(file).unwrap_or_default();
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let lines = bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(<[u8]>::to_vec).collect()
}

/// Where a line has the first of its values that may differ, and what stands there.
fn replaced(line: &mut Vec<u8>, from: &str, to: &str) -> Result<()> {
    let found = line.windows(from.len()).position(|part| part == from.as_bytes());
    let at = found.with_context(|| format!("no `{from}` in {}", line.escape_ascii()))?;
    line.splice(at..at + from.len(), to.bytes());
    Ok(())
}

/// The lines of one request in all logs, in which what may differ is the same.
fn comparable(name: &str, logs: &BTreeMap<&'static str, Vec<u8>>) -> Result<BTreeMap<&'static str, Vec<u8>>> {
    let facts: Value = serde_json::from_slice(&logs["json"])?;
    let text = |key: &str| facts[key].as_str().unwrap_or("-").to_owned();
    let or_nothing = |value: &str| if value == "-" { String::new() } else { value.to_owned() };
    let id = text("request_id");
    let mut all = logs.clone();
    for (log, line) in &mut all {
        if *log == "text" || *log == "text-omit" {
            let of = |key: &str| if *log == "text" { text(key) } else { or_nothing(&text(key)) };
            let bytes = |key: &str| facts[key].to_string();
            replaced(line, &format!("[{}]", text("start_time")), "[T]")?;
            let took = (of("upstream_service_time"), bytes("duration"));
            let service = if facts["upstream_service_time"].is_null() {
                of("upstream_service_time")
            } else {
                "S".to_owned()
            };
            let (received, sent) = (bytes("bytes_received"), bytes("bytes_sent"));
            // The text of an answer made here is each proxy's own.
            let shown = if name == "closed" { "B".to_owned() } else { sent.clone() };
            replaced(
                line,
                &format!(" {received} {sent} {} {} \"", took.1, took.0),
                &format!(" {received} {shown} D {service} \""),
            )?;
            let host = if facts["upstream_host"].is_null() { of("upstream_host") } else { "H".to_owned() };
            let tail = |host: &str, local: &str, down: &str, remote: &str| {
                format!("\"{host}\" {} {local} {down} {remote} ", of("upstream_cluster"))
            };
            replaced(
                line,
                &tail(
                    &of("upstream_host"),
                    &of("upstream_local_address"),
                    &text("downstream_local_address"),
                    &text("downstream_remote_address"),
                ),
                &tail(&host, "L", "A", "R"),
            )?;
        } else if *log == "json" || *log == "json-omit" {
            for key in ["start_time", "duration", "downstream_local_address", "downstream_remote_address"] {
                replaced(line, &format!("\"{key}\":{}", facts[key]), &format!("\"{key}\":X"))?;
            }
            for key in ["upstream_service_time", "upstream_host"].iter().filter(|key| !facts[**key].is_null())
            {
                replaced(line, &format!("\"{key}\":{}", facts[*key]), &format!("\"{key}\":X"))?;
            }
            // Behind a tunnel we have no address of our own.
            let key = "upstream_local_address";
            if *log == "json" || !facts[key].is_null() {
                let field = format!("\"{key}\":{}", facts[key]);
                // It is the last one where those after it are left out.
                replaced(line, &format!("{field},"), "")
                    .or_else(|_| replaced(line, &format!(",{field}"), ""))?;
            }
            if name == "closed" {
                replaced(line, &format!("\"bytes_sent\":{}", facts["bytes_sent"]), "\"bytes_sent\":B")?;
            }
        }
        if name == "an empty id" {
            ensure!(id.len() == 36, "{id}");
            replaced(line, &id, "I")?;
        }
    }
    Ok(all)
}

/// The line that has `key`.
fn line_of(file: &Path, key: &str) -> Option<Vec<u8>> {
    let has_key = |line: &Vec<u8>| line.windows(key.len()).any(|part| part == key.as_bytes());
    lines(file).into_iter().find(has_key)
}

/// The lines of each request, by log.
async fn collected(directory: &Path) -> Result<Vec<BTreeMap<&'static str, Vec<u8>>>> {
    let mut found = Vec::new();
    for ask in asks() {
        let mut by_log = BTreeMap::new();
        for (name, ..) in formats() {
            let file = directory.join(name);
            let what = format!("the line of `{}` in {name}", ask.name);
            until_true(&what, || async { Ok(line_of(&file, &ask.key).is_some()) }).await?;
            by_log.insert(name, line_of(&file, &ask.key).context(what)?);
        }
        found.push(by_log);
    }
    Ok(found)
}

struct Waypoint {
    mesh: Mesh,
    logs: PathBuf,
    web: Who,
    to: SocketAddr,
}

impl Waypoint {
    async fn start() -> Result<(Self, Application)> {
        let mesh = Mesh::start(&[SMALL, ("resources.yaml", RESOURCES)], &[])?;
        let application = Application::start(mesh.twin("shop/own", 9000)?).await?;
        let logs = mesh.state().join("access-logs");
        std::fs::create_dir(&logs)?;
        mesh.write("mesh-config.yaml", &providers(&logs))?;
        mesh.write("telemetry.yaml", &telemetry())?;
        let (web, to) = (Who::Pod(mesh.pod("shop/web")?), mesh.service("shop/own", 8000)?);
        Ok((Self { mesh, logs, web, to }, application))
    }

    async fn send(&self, ask: &Ask, application: &Application) -> Result<()> {
        send(connect(self.web, self.to).await?, ask, application).await
    }

    /// Sends requests until the logs have lines.
    async fn until_logged(&self, application: &Application) -> Result<()> {
        let again = Ask::new("again", "again");
        until_true("lines", || async {
            self.send(&again, application).await?;
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok(formats().iter().all(|(name, ..)| !lines(&self.logs.join(name)).is_empty()))
        })
        .await
    }

    /// Tells the waypoint's process that its logs were moved.
    fn rotated(&self) -> Result<()> {
        let of_mesh = self.mesh.state().join("waypoints").display().to_string();
        for entry in std::fs::read_dir("/proc")? {
            let entry = entry?;
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&command).contains(&of_mesh) {
                let status = Command::new("kill").arg("-USR1").arg(entry.file_name()).status()?;
                ensure!(status.success(), "the waypoint cannot be told");
                return Ok(());
            }
        }
        anyhow::bail!("no waypoint runs")
    }
}

#[tokio::test]
async fn lines_are_those_of_envoy_bit_for_bit_and_files_are_opened_anew() -> Result<()> {
    let Some(program) = cairn_tests::envoy::program() else {
        cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    };
    let (waypoint, application) = Waypoint::start().await?;
    waypoint.until_logged(&application).await?;
    for ask in asks() {
        waypoint.send(&ask, &application).await?;
    }
    let ours = collected(&waypoint.logs).await?;

    let logs = tempfile::tempdir()?;
    let bootstrap = bootstrap(logs.path(), waypoint.mesh.twin("shop/own", 9000)?);
    let flags = &["--file-flush-interval-msec", "20"];
    let start = Start { bootstrap: &bootstrap, listeners: 1, flags, limit: START_MAX };
    let envoy = Envoy::start(&program, &start).await?;
    for ask in asks() {
        send(TcpStream::connect(envoy.address("in")?).await?, &ask, &application).await?;
    }
    let theirs = collected(logs.path()).await?;

    let mut differences = Vec::new();
    for ((ask, ours), theirs) in asks().iter().zip(&ours).zip(&theirs) {
        let (ours, theirs) = (comparable(ask.name, ours)?, comparable(ask.name, theirs)?);
        for (log, theirs) in theirs {
            if ours[log] != theirs {
                let (ours, theirs) = (ours[log].escape_ascii(), theirs.escape_ascii());
                differences.push(format!("{}, {log}:\n  Envoy {theirs}\n  ours  {ours}", ask.name));
            }
        }
    }
    ensure!(differences.is_empty(), "{} lines differ\n{}", differences.len(), differences.join("\n"));

    // Rotated: what follows goes to a new file of the old name.
    let (file, moved) = (waypoint.logs.join("text"), waypoint.logs.join("text.1"));
    std::fs::rename(&file, &moved)?;
    waypoint.rotated()?;
    waypoint.until_logged(&application).await?;
    waypoint.send(&Ask::new("after", "after-rotation"), &application).await?;
    until_true("a line in the new file", || async { Ok(line_of(&file, "after-rotation").is_some()) }).await?;
    ensure!(line_of(&moved, "after-rotation").is_none(), "the old file is still written to");
    Ok(())
}
