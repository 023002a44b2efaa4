//! Scenarios: requests that are sent through a compiled module in this host, and what must become of them.
//!
//! The upstream answers each request with 200 (or the scenario's status and headers) and a body of its method and path, then
//! its own body.

use super::envoy::Envoy;
use super::module::Files;
use super::server::{Known, Server};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// The largest body of a scenario, and the longest that a step takes.
const BODY_BYTES_MAX: usize = 16 << 20;
const STEP_MAX: Duration = Duration::from_secs(30);

/// A scenario, as its file says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The plugin's configuration, a file beside the scenario's.
    config: Option<PathBuf>,
    /// What the upstream answers.
    #[serde(default)]
    upstream: Answer,
    /// Services that the plugin asks, by `host:port`, and what they answer.
    #[serde(default)]
    services: BTreeMap<String, Answer>,
    steps: Vec<Step>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    /// None echoes the request.
    body: Option<String>,
}

impl Default for Answer {
    fn default() -> Self {
        Self { status: 200, headers: BTreeMap::new(), body: None }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    name: String,
    #[serde(default)]
    request: Asked,
    expect: Expected,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Asked {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Default for Asked {
    fn default() -> Self {
        Self { method: "GET".into(), path: "/".into(), headers: BTreeMap::new(), body: String::new() }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    status: u16,
    /// Values of the response's headers; null for none.
    #[serde(default)]
    headers: BTreeMap<String, Option<String>>,
    /// A part of the response's body.
    body: Option<String>,
    /// Whether the upstream is asked; an object is headers that it gets, null for none.
    upstream: Option<Upstream>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Upstream {
    Asked(bool),
    Gets(BTreeMap<String, Option<String>>),
}

/// How a step ended.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// What was otherwise than expected.
    pub failure: Option<String>,
}

/// What an upstream was asked last.
type Seen = Arc<Mutex<Option<HeaderMap>>>;

/// Plays a scenario's file against a module, in this host or in the Envoy of this path.
///
/// # Errors
/// When the scenario makes no sense, or the plugin does not start.
pub async fn play(module: &Path, path: &Path, envoy: Option<&Path>) -> Result<Vec<Outcome>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let scenario: Scenario =
        serde_json::from_slice(&text).with_context(|| format!("{} is no scenario", path.display()))?;
    let beside = path.parent().unwrap_or_else(|| Path::new("."));
    let config = scenario.config.as_ref().map(|file| beside.join(file));
    let files = Files { module: module.to_owned(), config };
    let seen = Seen::default();
    let upstream = answering(scenario.upstream.clone(), Arc::clone(&seen)).await?;
    let mut known = Vec::new();
    for (name, answer) in &scenario.services {
        let at = answering(answer.clone(), Seen::default()).await?;
        known.push(format!("{name}={at}").parse::<Known>().map_err(anyhow::Error::msg)?);
    }
    let (trigger, drain) = cairn_net::drain();
    let started = match envoy {
        Some(binary) => Some(Envoy::start(binary, &files, upstream, &known).await?),
        None => None,
    };
    let at = match &started {
        Some(envoy) => envoy.address,
        None => {
            let server =
                Server::new((&files.name(), &files.read()?), upstream, &known, std::io::sink(), drain)?;
            let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
            let at = listener.local_addr()?;
            tokio::spawn(server.serve(listener));
            at
        }
    };
    let mut outcomes = Vec::new();
    for step in &scenario.steps {
        seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let played = tokio::time::timeout(STEP_MAX, step.play(at, &seen)).await;
        let failure = match played {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some(format!("it is not over after {} s", STEP_MAX.as_secs())),
        };
        outcomes.push(Outcome { name: step.name.clone(), failure });
    }
    trigger.start();
    Ok(outcomes)
}

impl Step {
    async fn play(&self, at: SocketAddr, seen: &Seen) -> Result<()> {
        let (status, headers, body) = self.request.send(at).await?;
        let expected = &self.expect;
        ensure!(status == expected.status, "status {status} instead of {}: {body}", expected.status);
        compare(&headers, &expected.headers).context("the response")?;
        if let Some(part) = &expected.body {
            ensure!(body.contains(part.as_str()), "the body has no `{part}`: {body}");
        }
        let seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        match (&expected.upstream, seen) {
            (Some(Upstream::Asked(true) | Upstream::Gets(_)), None) => {
                anyhow::bail!("the upstream was not asked")
            }
            (Some(Upstream::Asked(false)), Some(_)) => anyhow::bail!("the upstream was asked"),
            (Some(Upstream::Gets(wanted)), Some(seen)) => compare(&seen, wanted).context("the upstream"),
            _ => Ok(()),
        }
    }
}

fn compare(headers: &HeaderMap, expected: &BTreeMap<String, Option<String>>) -> Result<()> {
    for (name, value) in expected {
        let found = headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        ensure!(found == *value, "header {name}: {found:?} instead of {value:?}");
    }
    Ok(())
}

impl Asked {
    async fn send(&self, at: SocketAddr) -> Result<(u16, HeaderMap, String)> {
        let stream = TcpStream::connect(at).await.context("the server is gone")?;
        let (mut sender, connection) = client::handshake(TokioIo::new(stream)).await?;
        // It ends with the sender.
        tokio::spawn(connection);
        let mut request = Request::builder().method(self.method.as_str()).uri(self.path.as_str());
        if !self.headers.keys().any(|name| name.eq_ignore_ascii_case("host")) {
            request = request.header("host", "test");
        }
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let response = sender.send_request(request.body(Full::new(Bytes::from(self.body.clone())))?).await?;
        let (head, body) = response.into_parts();
        let body =
            Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes();
        Ok((head.status.as_u16(), head.headers, String::from_utf8_lossy(&body).into_owned()))
    }
}

/// A server that gives one answer, and remembers what it was asked.
async fn answering(answer: Answer, seen: Seen) -> Result<SocketAddr> {
    let mut headers = HeaderMap::new();
    for (name, value) in &answer.headers {
        let name =
            HeaderName::from_bytes(name.as_bytes()).with_context(|| format!("`{name}` names no header"))?;
        headers.append(
            name,
            HeaderValue::from_str(value).with_context(|| format!("`{value}` is no header's value"))?,
        );
    }
    let status =
        StatusCode::from_u16(answer.status).with_context(|| format!("{} is no status", answer.status))?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let at = listener.local_addr()?;
    let reply = Arc::new((status, headers, answer.body));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (reply, seen) = (Arc::clone(&reply), Arc::clone(&seen));
            let service = service_fn(move |request| respond(request, Arc::clone(&reply), Arc::clone(&seen)));
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    Ok(at)
}

type Reply = (StatusCode, HeaderMap, Option<String>);

async fn respond(request: Request<Incoming>, reply: Arc<Reply>, seen: Seen) -> Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    *seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(head.headers);
    let body =
        Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes();
    let (status, headers, text) = &*reply;
    let echo = || format!("{} {}\n{}", head.method, head.uri, String::from_utf8_lossy(&body));
    let mut response = Response::new(Full::new(Bytes::from(text.clone().unwrap_or_else(echo))));
    *response.status_mut() = *status;
    *response.headers_mut() = headers.clone();
    Ok(response)
}
