//! `cairn explain`: what would become of a request, and why, from manifests or from a waypoint that runs.

mod text;
mod ztunnel;

use crate::addresses::{Addresses, Block};
use crate::control::read_once;
use crate::output::Output;
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use cairn_manifest::Object;
use cairn_mesh::{Change, ResourceName, Store, Workload};
use cairn_waypoint::{Explanation, Place, Question, View, explain, offline};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::TcpStream;

/// The port on which proxies answer operators.
const ADMIN_PORT: u16 = 15000;

/// How long a waypoint may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// The most bytes of its answer.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// `cairn explain`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The directory (or file) of manifests.
    #[arg(required_unless_present = "live", conflicts_with = "live")]
    directory: Option<PathBuf>,
    /// Ask the waypoint with this admin address instead, `address[:15000]`: it answers from what it has in force.
    #[arg(long)]
    live: Option<String>,
    /// With `--live`: complete the answer with the policies that the ztunnel with this admin address has in force. `--live`
    /// may also be a ztunnel's, to ask about a connection alone.
    #[arg(long, requires = "live")]
    ztunnel: Option<String>,
    /// Who asks: a pod or service account, `namespace/name`; left out: somebody outside the mesh.
    #[arg(long, required_unless_present = "last_denial")]
    from: Option<String>,
    /// Where it goes: `service.namespace:port`, or an address and port.
    #[arg(long, required_unless_present = "last_denial")]
    to: Option<String>,
    /// With `--live`: explain the last request that was denied of this service.
    #[arg(long, requires = "live", conflicts_with_all = ["from", "to"])]
    last_denial: Option<String>,
    /// The method.
    #[arg(long, default_value = "GET")]
    method: String,
    /// The path with its query.
    #[arg(long, default_value = "/")]
    path: String,
    /// A header, `name: value`; may be given several times.
    #[arg(short = 'H', long = "header")]
    headers: Vec<String>,
    /// A token, sent as `authorization: Bearer …`.
    #[arg(long)]
    jwt: Option<String>,
    /// The keys of issuers whose keys are not in the manifests: a file with a JSON Web Key Set.
    #[arg(long, conflicts_with = "live")]
    jwks: Option<PathBuf>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Prints what would become of a request.
///
/// # Errors
/// When there is nobody to ask, or the question has no answer.
pub async fn run(options: Options) -> Result<()> {
    let explanation = match (&options.live, &options.directory) {
        (Some(live), _) => ask(live, &options).await?,
        (None, Some(directory)) => from_manifests(directory, &options)?,
        (None, None) => bail!("name a directory, or a waypoint with --live"),
    };
    match options.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&explanation)?),
        Output::Text => print!("{}", text::render(&explanation)),
    }
    Ok(())
}

fn question(options: &Options) -> Result<Question> {
    let mut headers = Vec::new();
    for header in &options.headers {
        let (name, value) =
            header.split_once(':').with_context(|| format!("`{header}` is not `name: value`"))?;
        headers.push((name.trim().to_owned(), value.trim().to_owned()));
    }
    if let Some(token) = &options.jwt {
        headers.push(("authorization".to_owned(), format!("Bearer {token}")));
    }
    // Nobody in the mesh is called `outside`: a name has two parts.
    let from = options.from.clone().filter(|from| from != "outside");
    Ok(Question {
        from,
        to: options.to.clone().unwrap_or_default(),
        method: options.method.clone(),
        path: options.path.clone(),
        headers,
    })
}

fn from_manifests(directory: &Path, options: &Options) -> Result<Explanation> {
    let nowhere = std::env::temp_dir().join(format!("cairn-explain-{}", std::process::id()));
    let mut addresses = Addresses::open(&nowhere, Block::namespaces())?;
    let mut reading = read_once(directory, &mut addresses);
    ensure!(!reading.objects.is_empty(), "{} holds no objects", directory.display());
    let keys = match &options.jwks {
        Some(file) => {
            Some(std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?)
        }
        None => None,
    };
    let fetching = reading.objects.iter_mut();
    let fetching = fetching.filter_map(|object| give_keys(object, keys.as_deref().unwrap_or(NO_KEYS)));
    let said = |object| format!("the keys of {object} are given with --jwks: none are fetched here");
    let without_keys: Vec<String> = fetching.filter(|_| keys.is_none()).map(said).collect();
    let world = &reading.world;
    let mut changes: Vec<Change> = world.authorizations.iter().cloned().map(Change::Authorization).collect();
    changes.extend(world.workloads.iter().cloned().map(Change::Workload));
    changes.extend(world.services.iter().cloned().map(Change::Service));
    changes.push(Change::Settings(reading.settings.clone()));
    let mut places: BTreeMap<ResourceName, Place> = BTreeMap::new();
    for gateway in &world.gateways {
        let pod = world
            .workloads
            .iter()
            .find(|workload| gateway.workloads.iter().any(|uid| **uid == *workload.uid));
        let Some(address) = pod.and_then(|pod| pod.addresses.first()) else { continue };
        let read = world.scoped.iter().filter(|(_, gateways)| gateways.contains(&gateway.name));
        let objects = read.filter_map(|(index, _)| reading.objects.get(*index));
        let own = (gateway.name.clone(), gateway.identity.clone(), *address);
        places.insert(gateway.name.clone(), offline(own, changes.clone(), objects, &reading.settings));
    }
    let mut store = Store::new();
    store.apply(changes.iter().cloned());
    let find = |workload: &Workload| {
        let of = |gateway: &&cairn_manifest::GatewayEntry| {
            gateway.workloads.iter().any(|uid| **uid == *workload.uid)
        };
        places.get(&world.gateways.iter().find(of)?.name)
    };
    let view = View { snapshot: store.current(), knows_l4: true, waypoint: &find };
    let mut explanation = explain(&view, &question(options)?)?;
    let verifies = |step: &cairn_waypoint::Step| step.what == "filter authentication";
    if explanation.steps.iter().any(verifies) {
        explanation.answer.unless.extend(without_keys);
    }
    Ok(explanation)
}

/// A set of keys that verifies no token.
const NO_KEYS: &str = r#"{"keys":[]}"#;

/// Puts keys into the rules of a RequestAuthentication that fetch theirs; returns its name if any do.
fn give_keys(object: &mut Object, keys: &str) -> Option<String> {
    if !object.is("security.istio.io", "RequestAuthentication") {
        return None;
    }
    let name = object.to_string();
    let rules = object.spec.get_mut("jwtRules").and_then(Value::as_array_mut);
    let rules = rules.into_iter().flatten().filter_map(Value::as_object_mut);
    let mut fetches = false;
    for rule in rules.filter(|rule| !rule.contains_key("jwks")) {
        rule.remove("jwksUri");
        rule.insert("jwks".to_owned(), keys.into());
        fetches = true;
    }
    fetches.then_some(name)
}

async fn ask(live: &str, options: &Options) -> Result<Explanation> {
    let address = admin_address(live)?;
    let question = match &options.last_denial {
        Some(service) => last_denial(address, service).await?,
        None => question(options)?,
    };
    let answer = exchange(address, "POST", "/explain", serde_json::to_vec(&question)?).await?;
    let mut explanation = serde_json::from_slice(&answer).context("the proxy's answer is none")?;
    if let Some(ztunnel) = &options.ztunnel {
        ztunnel::complete(&mut explanation, admin_address(ztunnel)?).await?;
    }
    Ok(explanation)
}

/// `address[:15000]`.
fn admin_address(text: &str) -> Result<SocketAddr> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let ip = text.parse().with_context(|| format!("`{text}` is no address"))?;
    Ok(SocketAddr::new(ip, ADMIN_PORT))
}

/// The last request of a service that was denied, as far as the waypoint keeps it: without its headers.
async fn last_denial(address: SocketAddr, service: &str) -> Result<Question> {
    let path = format!("/denials?service={service}");
    let denials: Vec<Value> = serde_json::from_slice(&exchange(address, "GET", &path, Vec::new()).await?)?;
    let last = denials.first().with_context(|| format!("no denial of {service} is kept"))?;
    let text = |key: &str| last.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let identity: cairn_mesh::Identity =
        text("sourceIdentity").parse().context("the client of the last denial has no identity")?;
    let method = text("method");
    Ok(Question {
        from: Some(format!("{}/{}", identity.namespace(), identity.service_account())),
        to: text("destination"),
        method: if method.is_empty() { "GET".to_owned() } else { method },
        path: Some(text("path")).filter(|path| !path.is_empty()).unwrap_or_else(|| "/".to_owned()),
        headers: Some(text("authority"))
            .filter(|host| !host.is_empty())
            .map(|host| ("host".to_owned(), host))
            .into_iter()
            .collect(),
    })
}

/// Asks an admin port once.
async fn exchange(address: SocketAddr, method: &str, path: &str, body: Vec<u8>) -> Result<Bytes> {
    let asking = async {
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot reach {address}"))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Its outcome is that of the request on it.
        tokio::spawn(async move { drop(connection.await) });
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", address.to_string())
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await.context("no answer")?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?.to_bytes();
        ensure!(status.is_success(), "{}", String::from_utf8_lossy(&body));
        Ok(body)
    };
    tokio::time::timeout(ANSWER_MAX, asking).await.with_context(|| format!("{address} does not answer"))?
}

#[cfg(test)]
#[path = "explain/tests.rs"]
mod tests;
