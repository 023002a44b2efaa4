//! `cairn demo`: a mesh at work. It checks itself: what came back, and what the proxies recorded of it, must be what
//! should have happened.

use crate::client::{self, Answer, Ask, Way};
use crate::up::{self, Up};
use anyhow::{Context, Result, ensure};
use http::Method;
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::time::Duration;

/// The manifests of the demo.
const MANIFESTS: [(&str, &str); 5] = [
    ("namespaces.yaml", include_str!("../demo/namespaces.yaml")),
    ("applications.yaml", include_str!("../demo/applications.yaml")),
    ("routes.yaml", include_str!("../demo/routes.yaml")),
    ("policies.yaml", include_str!("../demo/policies.yaml")),
    ("plugins.yaml", include_str!("../demo/plugins.yaml")),
];

/// The waypoint of the demo.
const WAYPOINT: &str = "shop/shop-waypoint";

/// How many requests show the weights of the canary, and how far from 20 % their share may be. Chance takes a fair
/// share of 200 requests further than this about once in 2,000 runs.
const CANARY_REQUESTS: usize = 200;
const CANARY_TOLERANCE: f64 = 0.10;

/// How long a record may take to appear after its answer.
const RECORD_MAX: Duration = Duration::from_secs(3);

/// The exit status after a signal, as shells have it for Ctrl-C.
const INTERRUPTED: u8 = 130;

/// `cairn demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The directory of built plugins, with `tag.wasm`.
    #[arg(long, default_value = "target/plugins")]
    plugins: PathBuf,
    /// Leaves the mesh running until Ctrl-C, with a line to try.
    #[arg(long)]
    keep: bool,
    /// Where manifests, addresses, the CA and logs are kept [default: a temporary directory, removed at the end].
    #[arg(long)]
    state: Option<PathBuf>,
    /// The block of loopback used: pods in 127.N/16.
    #[arg(long, default_value_t = 10)]
    block: u8,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: crate::output::Output,
}

/// Runs the demo; the exit status tells whether everything was as it should be.
///
/// # Errors
/// When the mesh does not come up.
pub async fn run(options: Options) -> Result<ExitCode> {
    let plugins = options.plugins.canonicalize().with_context(|| {
        format!("{} is not there; build the plugins first: plugins/build", options.plugins.display())
    })?;
    let temporary = tempfile::tempdir()?;
    let home = options.state.as_deref().unwrap_or(temporary.path());
    let ended = play(&options, home, &plugins).await;
    if !matches!(ended, Ok(Ended::Well | Ended::Interrupted)) && options.state.is_none() {
        eprintln!("manifests and logs of this run stay in {}", temporary.keep().display());
    }
    Ok(match ended? {
        Ended::Well => ExitCode::SUCCESS,
        Ended::Wrong => ExitCode::FAILURE,
        Ended::Interrupted => ExitCode::from(INTERRUPTED),
    })
}

/// How a demo ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Everything happened as it should.
    Well,
    /// Something did not.
    Wrong,
    /// A signal came first.
    Interrupted,
}

/// Starts the mesh, shows what it does, and ends it, however that goes.
async fn play(options: &Options, home: &Path, plugins: &Path) -> Result<Ended> {
    let manifests = home.join("manifests");
    write_manifests(&manifests, plugins)?;
    let stop = cairn_process::stop_signal();
    tokio::pin!(stop);
    let interrupted =
        |signal: std::io::Result<_>| signal.map(|_| Ended::Interrupted).context("cannot watch for signals");
    let mesh = up::Options {
        directory: manifests.clone(),
        state: home.join("state"),
        block: options.block,
        ..up::Options::default()
    };
    let mut up = tokio::select! {
        biased;
        signal = &mut stop => return interrupted(signal),
        up = Up::launch(mesh) => up?,
    };
    let mut ended = tokio::select! {
        biased;
        signal = &mut stop => interrupted(signal),
        shown = show(&mut up, options) => shown,
    };
    if options.keep
        && let Ok(shown @ (Ended::Well | Ended::Wrong)) = ended
    {
        ended = keep(&mut up, &manifests, stop.as_mut()).await.map(|()| shown);
    }
    up.stop().await;
    ended
}

fn write_manifests(directory: &Path, plugins: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    for (name, text) in MANIFESTS {
        let text = text.replace("PLUGINS", &plugins.display().to_string());
        let file = directory.join(name);
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Says what there is to try, and leaves the mesh running until a signal.
async fn keep(
    up: &mut Up,
    manifests: &Path,
    stop: Pin<&mut impl Future<Output = std::io::Result<&'static str>>>,
) -> Result<()> {
    let scene = Scene::find(up)?;
    println!("\nThe mesh stays up. Its manifests are in {}: edit them and see.", manifests.display());
    println!("As the web pod:  curl --socks5-hostname {}:15080 http://catalog:8000/items", scene.web);
    println!("As the guest:    curl --socks5-hostname {}:15080 http://catalog.shop:8000/items", scene.guest);
    println!("What happened:   curl http://{}:15000/exchanges", scene.waypoint);
    println!("Ctrl-C ends it.");
    tokio::select! {
        biased;
        signal = stop => signal.map(drop).context("cannot watch for signals"),
        error = up.broken() => Err(error),
    }
}

/// Where everything is.
struct Scene {
    web: IpAddr,
    guest: IpAddr,
    catalog: SocketAddr,
    pod: SocketAddr,
    waypoint: IpAddr,
    ztunnel: IpAddr,
}

impl Scene {
    fn find(up: &Up) -> Result<Self> {
        let snapshot = up.mesh.snapshot();
        let pod = |namespace: &str, name: &str| {
            let mut workloads = snapshot.workloads();
            let found = workloads.find(|one| &*one.namespace == namespace && &*one.name == name);
            found
                .and_then(|one| one.addresses.first().copied())
                .with_context(|| format!("no pod {namespace}/{name}"))
        };
        let service =
            snapshot.service_named("catalog.shop.svc.cluster.local", "shop").context("no service")?;
        let vip = service.service.vips.first().context("no address")?.address;
        Ok(Self {
            web: pod("shop", "web")?,
            guest: pod("guests", "guest")?,
            catalog: SocketAddr::new(vip, 8000),
            pod: SocketAddr::new(pod("shop", "catalog-v1-0")?, 8080),
            waypoint: *up.waypoints.get(WAYPOINT).context("no waypoint")?,
            ztunnel: *up.ztunnels.values().next().context("no ztunnel")?,
        })
    }
}

/// One row of the table: what was asked, what should come of it, what did, and why.
#[derive(serde::Serialize)]
struct Row {
    who: &'static str,
    request: String,
    expected: String,
    got: String,
    ok: bool,
    why: Vec<String>,
}

/// What is asked of the catalog, and what must come of it.
struct Case {
    who: &'static str,
    method: Method,
    path: &'static str,
    headers: &'static [(&'static str, &'static str)],
    status: u16,
    /// Words that the proxy's own explanation must contain.
    because: &'static [&'static str],
}

/// The cases, in the order of the table.
fn cases() -> Vec<Case> {
    let case =
        |who, method, path, headers, status, because| Case { who, method, path, headers, status, because };
    let (get, post) = (Method::GET, Method::POST);
    const CANARY: &[(&str, &str)] = &[("x-canary", "yes")];
    vec![
        case("web", get.clone(), "/items", &[], 200, &["web-may-read", "shop/catalog", "shop/tag"]),
        case("web", get.clone(), "/items/7", CANARY, 200, &["shop/catalog", "catalog-v2"]),
        case("web", post, "/items", &[], 403, &["none", "web-may-read", "POST"]),
        case("guest", get.clone(), "/items", &[], 403, &["none", "web-may-read"]),
        case("web", get.clone(), "/admin/users", &[], 403, &["no-admin"]),
        case("web", get.clone(), "/nowhere", &[], 404, &["route_not_found"]),
        case("web", get.clone(), "/old", &[], 500, &["catalog-v0"]),
        case("web", get, "/reviews", &[], 503, &["no_healthy_upstream"]),
    ]
}

async fn show(up: &mut Up, options: &Options) -> Result<Ended> {
    let ready = up.ready();
    tokio::select! {
        biased;
        error = up.broken() => return Err(error),
        ready = ready => ready?,
    }
    let scene = Scene::find(up)?;
    let mut rows = Vec::new();
    for case in cases() {
        rows.push(through_waypoint(up, &scene, &case).await?);
    }
    rows.push(canary(&scene).await?);
    rows.push(past_waypoint(up, &scene).await?);
    rows.push(plaintext(up, &scene).await?);
    let all_well = rows.iter().all(|row| row.ok);
    match options.output {
        crate::output::Output::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
        crate::output::Output::Text => print_table(&rows, all_well),
    }
    Ok(if all_well { Ended::Well } else { Ended::Wrong })
}

fn print_table(rows: &[Row], all_well: bool) {
    println!("{:<6} {:<34} {:<22} {:<22}", "WHO", "REQUEST", "EXPECTED", "GOT");
    for row in rows {
        let mark = if row.ok { "ok" } else { "WRONG" };
        println!("{:<6} {:<34} {:<22} {:<22} {mark}", row.who, row.request, row.expected, row.got);
        for line in &row.why {
            println!("{:>9} {line}", "·");
        }
    }
    println!(
        "\n{}",
        if all_well { "Everything happened as it should." } else { "Something did not happen as it should." }
    );
}

async fn through_waypoint(up: &Up, scene: &Scene, case: &Case) -> Result<Row> {
    let client = if case.who == "web" { scene.web } else { scene.guest };
    let id = format!("demo-{:016x}", fastrand::u64(..));
    let mut headers = case.headers.to_vec();
    headers.push(("x-request-id", &id));
    let ask = Ask {
        method: case.method.clone(),
        to: scene.catalog,
        host: "catalog.shop:8000",
        path: case.path,
        headers: &headers,
    };
    let answer = client::send(&Way::As(client), &ask).await;
    let got = match &answer {
        Ok(answer) => format!("{}{}", answer.status.as_u16(), version(answer)),
        Err(error) => format!("{error:#}"),
    };
    let record =
        find_record(&up.way, scene.waypoint, "/exchanges", |record| record["requestId"] == *id).await?;
    let mut why = explain(&record);
    let mut ok = answer.as_ref().is_ok_and(|answer| answer.status.as_u16() == case.status);
    let told = why.join("\n");
    ok &= case.because.iter().all(|word| told.contains(word));
    if let Ok(answer) = &answer {
        let (seen, tagged) = tags(answer);
        if case.status == 200 {
            ok &= seen.is_some() && tagged.is_some();
            why.push(format!(
                "plugin: the application saw x-client: {}; the response has x-tagged-by: {}",
                seen.unwrap_or("(nothing)"),
                tagged.unwrap_or("(nothing)")
            ));
        }
    }
    let request =
        format!("{} {}{}", case.method, case.path, if case.headers.is_empty() { "" } else { " +canary" });
    Ok(Row { who: case.who, request, expected: case.status.to_string(), got, ok, why })
}

/// The version that answered, as the application says.
fn version(answer: &Answer) -> String {
    let version = answer.headers.get("x-echo-version").and_then(|value| value.to_str().ok());
    version.map_or_else(String::new, |version| format!(" from {version}"))
}

/// What the plugin put on the request, as the application saw it, and on the response.
fn tags(answer: &Answer) -> (Option<&str>, Option<&str>) {
    let body = std::str::from_utf8(&answer.body).unwrap_or_default();
    let seen = body.lines().find_map(|line| line.strip_prefix("header: x-client: "));
    (seen, answer.headers.get("x-tagged-by").and_then(|value| value.to_str().ok()))
}

/// A waypoint's record of an exchange, in words.
fn explain(record: &Value) -> Vec<String> {
    let text = |key: &str| record[key].as_str().filter(|text| !text.is_empty());
    let mut why = Vec::new();
    if let Some(policy) = text("deniedBy") {
        why.push(format!("denied by {policy}: {}", text("deniedBecause").unwrap_or("-")));
    }
    if let Some(policy) = text("allowedBy") {
        why.push(format!("allowed by {policy}"));
    }
    if let Some(route) = text("route") {
        why.push(format!("route {route}, cluster {}", text("cluster").unwrap_or("-")));
    }
    if let Some(upstream) = text("upstream") {
        why.push(format!("endpoint {upstream} {}", text("upstreamWorkload").unwrap_or("")));
    }
    for note in record["notes"].as_array().into_iter().flatten() {
        why.push(format!(
            "{}: {}",
            note["filter"].as_str().unwrap_or("-"),
            note["did"].as_str().unwrap_or("-")
        ));
    }
    if let Some(details) = text("details").filter(|details| *details != "via_upstream") {
        why.push(format!("details {details}, flags {}", text("flags").unwrap_or("-")));
    }
    why
}

async fn canary(scene: &Scene) -> Result<Row> {
    let mut second = 0;
    for _ in 0..CANARY_REQUESTS {
        let ask = Ask {
            method: Method::GET,
            to: scene.catalog,
            host: "catalog:8000",
            path: "/items",
            headers: &[],
        };
        let answer = client::send(&Way::As(scene.web), &ask).await?;
        ensure!(answer.status.is_success(), "canary request: {}", answer.status);
        second += usize::from(version(&answer).ends_with("v2"));
    }
    let share = second as f64 / CANARY_REQUESTS as f64;
    Ok(Row {
        who: "web",
        request: format!("GET /items, {CANARY_REQUESTS} times"),
        expected: "20 % from v2".to_owned(),
        got: format!("{:.0} % from v2", share * 100.0),
        ok: (share - 0.2).abs() <= CANARY_TOLERANCE,
        why: vec!["weights 80 and 20 of the route's second rule".to_owned()],
    })
}

/// A client in the mesh that addresses a pod itself: no waypoint is in its way, and the pod's own policy is.
async fn past_waypoint(up: &Up, scene: &Scene) -> Result<Row> {
    let host = scene.pod.to_string();
    let ask = Ask { method: Method::GET, to: scene.pod, host: &host, path: "/items", headers: &[] };
    let answer = client::send(&Way::As(scene.guest), &ask).await;
    let source = scene.guest.to_string();
    let record = find_record(&up.way, scene.ztunnel, "/connections", |record| {
        record["direction"] == "inbound"
            && record["way"] == "inbound"
            && record["source"].as_str().is_some_and(|from| from.starts_with(&source))
    })
    .await?;
    Ok(connection_row("guest", format!("GET http://{}/items", scene.pod), answer, &record))
}

/// A client without a mesh at all: nothing proves who it is.
async fn plaintext(up: &Up, scene: &Scene) -> Result<Row> {
    let host = scene.pod.to_string();
    let ask = Ask { method: Method::GET, to: scene.pod, host: &host, path: "/items", headers: &[] };
    let answer = client::send(&Way::Direct(None), &ask).await;
    let record =
        find_record(&up.way, scene.ztunnel, "/connections", |record| record["way"] == "plaintext").await?;
    Ok(connection_row("nobody", format!("GET http://{}/items", scene.pod), answer, &record))
}

fn connection_row(who: &'static str, request: String, answer: Result<Answer>, record: &Value) -> Row {
    let text = |key: &str| record[key].as_str().unwrap_or("-").to_owned();
    let refused = answer.is_err();
    let told = text("policy");
    Row {
        who,
        request,
        expected: "refused by policy".to_owned(),
        got: if refused { "refused".to_owned() } else { "an answer".to_owned() },
        ok: refused && record["decision"] == "deny" && told.contains("only-through-the-waypoint"),
        why: vec![format!("{}: {told}", text("decision")), text("error")],
    }
}

/// Looks for a record until it is there: it is written when the exchange ends, a moment after its answer.
async fn find_record(way: &Way, proxy: IpAddr, path: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
    let deadline = tokio::time::Instant::now() + RECORD_MAX;
    loop {
        let records = client::get_json(way, SocketAddr::new(proxy, 15000), path).await?;
        if let Some(found) = records.as_array().into_iter().flatten().find(|record| is_it(record)) {
            return Ok(found.clone());
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "http://{proxy}:15000{path} has no record of the request"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
