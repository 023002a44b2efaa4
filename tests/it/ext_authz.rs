//! Policies with action CUSTOM through a whole mesh: the tables of Istio's own integration tests, with a provider over
//! HTTP, and one over gRPC that is the official library with Envoy's own messages.

use crate::client::{Client, Who, connect, record, request};
use crate::harness::{Mesh, SOON, root};
use crate::servers::TcpEcho;
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

const MANIFESTS: [(&str, &str); 1] = [("mesh.yaml", include_str!("manifests/ext_authz.yaml"))];

/// What a provider was asked, one line each: method, path, and body.
type Asked = Arc<Mutex<Vec<String>>>;

/// A provider over HTTP that lets pass what says `allow` or `http`.
struct HttpProvider {
    asked: Asked,
    task: JoinHandle<()>,
}

impl Drop for HttpProvider {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl HttpProvider {
    async fn start(at: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(at).await.with_context(|| format!("cannot listen on {at}"))?;
        let asked = Asked::default();
        let log = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let log = Arc::clone(&log);
                let service = service_fn(move |request| answer(Arc::clone(&log), request));
                // A client that goes away has had what it wanted.
                tokio::spawn(async move {
                    drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Ok(Self { asked, task })
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

async fn answer(asked: Asked, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let line = format!("{} {} {}", head.method, head.uri, String::from_utf8_lossy(&body));
    asked.lock().unwrap().push(line);
    let says = head.headers.get("x-ext-authz").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let answer = Response::builder().header("x-checked-by", "http").header("x-why", "http says no");
    let passes = says == "allow" || says == "http";
    let answer = answer.status(if passes { 200 } else { 403 });
    Ok(answer.body(Full::from(if passes { "" } else { "denied by http" })).unwrap())
}

/// The provider over gRPC, if it could be installed.
struct GrpcProvider {
    lines: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl GrpcProvider {
    async fn start(at: SocketAddr) -> Result<Option<Self>> {
        let python = root().join("target/peers/python/bin/python");
        if !python.exists() {
            cairn_tests::skipped("no gRPC for Python in target/peers; tests/peers installs it");
            return Ok(None);
        }
        let mut child = Command::new(python)
            .arg(root().join("tests/it/ext_authz.py"))
            .arg(at.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().context("no pipe")?;
        let mut provider = Self { lines: BufReader::new(stdout).lines(), _child: child };
        ensure!(provider.line().await? == "ready", "the provider did not start");
        Ok(Some(provider))
    }

    async fn line(&mut self) -> Result<String> {
        timeout(SOON, self.lines.next_line())
            .await
            .context("the provider was not asked")??
            .context("it ended")
    }

    async fn asked(&mut self) -> Result<Value> {
        Ok(serde_json::from_str(&self.line().await?)?)
    }
}

fn pod(mesh: &Mesh, name: &str) -> Result<Who> {
    Ok(Who::Pod(mesh.pod(&format!("shop/{name}"))?))
}

#[tokio::test]
async fn providers_decide_what_policies_ask_them_about() -> Result<()> {
    let mesh = Mesh::start(&MANIFESTS, &[])?;
    let http = HttpProvider::start(mesh.twin("authz/http", 8000)?).await?;
    over_http(&mesh, &http).await?;
    a_body_is_told(&mesh, &http).await?;
    let Some(mut grpc) = GrpcProvider::start(mesh.twin("authz/grpc", 9000)?).await? else { return Ok(()) };
    over_grpc(&mesh, &mut grpc).await?;
    both(&mesh).await?;
    connections(&mesh).await
}

/// Sends one request for each row: path, what its `x-ext-authz` says, and the status expected.
async fn check(mesh: &Mesh, rows: &[(&str, &str, u16)]) -> Result<()> {
    let mut client = Client::open(pod(mesh, "web")?, mesh.service("shop/app", 8000)?).await?;
    for (path, says, status) in rows {
        let headers = [("x-ext-authz", *says)];
        let headers = if says.is_empty() { &[][..] } else { &headers };
        let answer = client.send(request(Method::GET, path, headers)).await?;
        assert_eq!(answer.status, *status, "{path} {says}: {}", answer.body);
    }
    Ok(())
}

async fn over_http(mesh: &Mesh, http: &HttpProvider) -> Result<()> {
    check(mesh, &[("/http", "allow", 200), ("/http", "other", 403), ("/http?a=b", "", 403)]).await?;
    assert_eq!(http.take(), ["GET /check/http ", "GET /check/http ", "GET /check/http?a=b "]);
    check(mesh, &[("/health", "", 200), ("/broken", "allow", 403), ("/health", "other", 200)]).await?;
    assert_eq!(http.take(), [""; 0], "nobody is asked about what no policy matches");
    let mut client = Client::open(pod(mesh, "web")?, mesh.service("shop/app", 8000)?).await?;
    let passed = client.send(request(Method::GET, "/http", &[("x-ext-authz", "allow")])).await?;
    assert_eq!(passed.seen("x-checked-by"), Some("http"), "{}", passed.body);
    let denied = client.get("/http/why").await?;
    assert_eq!((denied.header("x-why"), &*denied.body), ("http says no", "denied by http"));
    assert_eq!(denied.header("x-checked-by"), "", "only what the list names");
    let waypoint = mesh.waypoint("shop/shop-waypoint")?;
    let found = record(waypoint, "/exchanges", |record| record.to_string().contains("/http/why")).await?;
    let text = found.to_string();
    assert!(text.contains("provider http answered 403"), "{text}");
    assert!(text.contains("ns[shop]-policy[over-http]-rule[0]"), "{text}");
    http.take();
    Ok(())
}

async fn a_body_is_told(mesh: &Mesh, http: &HttpProvider) -> Result<()> {
    for (body, status, asked) in [
        ("a short body", 200, &["POST /check/http a short body"][..]),
        ("a body that is longer than it may be", 413, &[]),
    ] {
        let mut client = Client::open(pod(mesh, "web")?, mesh.service("shop/app", 8000)?).await?;
        let mut request = request(Method::POST, "/http", &[("x-ext-authz", "allow")]);
        *request.body_mut() = body;
        let answer = client.send(request).await?;
        assert_eq!(answer.status, status, "{}", answer.body);
        assert_eq!(http.take(), asked);
        if status == 200 {
            let line = format!("body-bytes: {}", body.len());
            assert!(answer.body.contains(&line), "the application gets it all: {}", answer.body);
        }
    }
    Ok(())
}

async fn over_grpc(mesh: &Mesh, grpc: &mut GrpcProvider) -> Result<()> {
    check(mesh, &[("/grpc?a=b", "allow", 200)]).await?;
    let asked = grpc.asked().await?;
    assert_eq!(asked["source"], "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(asked["destination"], "spiffe://cluster.local/ns/shop/sa/shop-waypoint");
    assert_eq!(asked["address"], mesh.pod("shop/web")?.to_string());
    assert_eq!((&asked["method"], &asked["path"]), (&"GET".into(), &"/grpc?a=b".into()));
    assert_eq!((&asked["port"], &asked["header"]), (&8000.into(), &"allow".into()));
    check(mesh, &[("/grpc", "other", 401), ("/grpc", "", 401)]).await?;
    let mut client = Client::open(pod(mesh, "web")?, mesh.service("shop/app", 8000)?).await?;
    let passed =
        client.send(request(Method::GET, "/grpc", &[("x-ext-authz", "allow"), ("x-secret", "s")])).await?;
    assert_eq!((passed.seen("x-checked-by"), passed.seen("x-secret")), (Some("grpc"), None));
    assert_eq!(passed.header("x-passed"), "grpc");
    let denied = client.get("/grpc").await?;
    assert_eq!((denied.header("x-why"), &*denied.body), ("grpc says no", "denied by grpc"));
    Ok(())
}

/// Where two providers are asked, both must let it pass.
async fn both(mesh: &Mesh) -> Result<()> {
    let rows = [
        ("/both", "allow", 200),
        // gRPC is asked first, as its name comes first.
        ("/both", "http", 401),
        ("/both", "grpc", 403),
        ("/both", "", 401),
        ("/health", "", 200),
    ];
    check(mesh, &rows).await
}

async fn connections(mesh: &Mesh) -> Result<()> {
    let _raw = TcpEcho::start(mesh.twin("shop/raw", 9000)?).await?;
    let to = mesh.service("shop/raw", 9000)?;
    assert_eq!(echo(connect(pod(mesh, "web")?, to).await?).await?, b"hello");
    assert_eq!(echo(connect(pod(mesh, "other")?, to).await?).await?, b"");
    Ok(())
}

/// What comes back; nothing when the connection ends before it does.
async fn echo(mut stream: TcpStream) -> Result<Vec<u8>> {
    let mut back = vec![0; 5];
    let exchange = async {
        stream.write_all(b"hello").await?;
        stream.read_exact(&mut back).await
    };
    match timeout(SOON, exchange).await.context("neither an echo nor an end")? {
        Ok(_) => Ok(back),
        Err(_) => Ok(Vec::new()),
    }
}
