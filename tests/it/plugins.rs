//! Delivery of plugins: swapped under traffic, waited for by those alone that use them, fetched with a secret.

use crate::client::{ANSWER_MAX, Client, Who, admin, connect, get, metrics};
use crate::edits::SMALL;
use crate::harness::{Mesh, SOON};
use crate::servers::TcpEcho;
use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cairn_fetch::Digest;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A module that adds its configuration to each request, as the header `x-swap-` and a letter of its own.
pub fn module(letter: char) -> Vec<u8> {
    let text = format!(
        r#"(module
          (import "env" "proxy_get_buffer_bytes" (func $buffer (param i32 i32 i32 i32 i32) (result i32)))
          (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 2)
          (global $free (mut i32) (i32.const 65536))
          (data (i32.const 512) "x-swap-{letter}")
          (func (export "proxy_abi_version_0_2_1"))
          (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
            (local $at i32)
            (local.set $at (global.get $free))
            (global.set $free (i32.add (global.get $free) (local.get $size)))
            (local.get $at))
          (func (export "proxy_on_configure") (param i32 i32) (result i32)
            (drop (call $buffer (i32.const 7) (i32.const 0) (local.get 1) (i32.const 8) (i32.const 12)))
            (i32.const 1))
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (drop (call $add (i32.const 0)
              (i32.const 512) (i32.const 8) (i32.load (i32.const 8)) (i32.load (i32.const 12))))
            (i32.const 0)))"#
    );
    wat::parse_str(text).unwrap()
}

/// A plugin of the waypoint, or of one service.
fn plugin(name: &str, target: &str, url: &str, further: &str) -> String {
    format!(
        "apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {{ name: {name}, namespace: shop }}
spec:
  targetRefs: [{{ {target} }}]
  url: {url}
{further}
---
"
    )
}

const GATEWAY: &str = "group: gateway.networking.k8s.io, kind: Gateway, name: gate";
const OWN: &str = "group: '', kind: Service, name: own";

/// Plugins that are edited together, edits, and clients that ask meanwhile.
const PLUGINS: u64 = 4;
const EDITS: u64 = 25;
const CLIENTS: usize = 4;

#[tokio::test]
async fn a_hundred_swaps_under_traffic_and_no_request_fails() -> Result<()> {
    let home = tempfile::tempdir()?;
    for letter in ['a', 'b'] {
        std::fs::write(home.path().join(format!("{letter}.wasm")), module(letter))?;
    }
    // Every edit is of the configuration, every second one of the code, too.
    let edit = |number: u64| {
        let letter = if (number / 2).is_multiple_of(2) { 'a' } else { 'b' };
        let url = format!("file://{}/{letter}.wasm", home.path().display());
        let config = format!("  pluginConfig: {{ n: {number} }}");
        let all =
            (0..PLUGINS).map(|plugin_number| plugin(&format!("p{plugin_number}"), GATEWAY, &url, &config));
        (all.collect::<String>(), format!("header: x-swap-{letter}: {{\"n\":{number}}}"))
    };
    let mesh = Mesh::start(&[SMALL, ("plugins.yaml", &edit(0).0)], &[])?;
    let (web, catalog) = (Who::Pod(mesh.pod("shop/web")?), mesh.service("shop/catalog", 8000)?);
    let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let (stop, asked) = (Arc::clone(&stop), Arc::clone(&asked));
        let mut client = Client::open(web, catalog).await?;
        clients.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let answer = client.get("/").await?;
                ensure!(answer.status == 200, "{}: {}", answer.status, answer.body);
                let marks = answer.body.lines().filter(|line| line.starts_with("header: x-swap-")).count();
                ensure!(marks as u64 == PLUGINS, "{marks} plugins ran:\n{}", answer.body);
                asked.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        }));
    }
    let mut client = Client::open(web, catalog).await?;
    let start = Instant::now();
    for number in 0..=EDITS {
        let (text, expected) = edit(number);
        mesh.write("plugins.yaml", &text)?;
        let deadline = Instant::now() + SOON;
        loop {
            let answer = client.get("/").await?;
            let new = answer.body.lines().filter(|line| **line == expected).count() as u64;
            if new == PLUGINS {
                break;
            }
            ensure!(Instant::now() < deadline, "edit {number} is not in effect:\n{}", answer.body);
        }
    }
    let taken = start.elapsed();
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await??;
    }
    let waypoint = mesh.waypoint("shop/gate")?;
    let plugins = admin(waypoint, "/plugins").await?;
    let versions: u64 = plugins
        .as_array()
        .context("no list")?
        .iter()
        .filter_map(|one| one["running"]["version"].as_u64())
        .sum();
    println!("{} swaps in {taken:?} under {} requests", versions - PLUGINS, asked.load(Ordering::Relaxed));
    assert_eq!(versions, PLUGINS * (EDITS + 1), "{plugins:#}");
    // Nothing is left of the versions before: each is gone with the last exchange that began with it.
    let is_drained = || async {
        let plugins = admin(waypoint, "/plugins").await?;
        let drained = plugins.as_array().context("no list")?.iter().all(|one| one["draining"] == json!([]));
        anyhow::Ok((drained, plugins))
    };
    let deadline = Instant::now() + SOON;
    loop {
        let (drained, plugins) = is_drained().await?;
        if drained {
            break;
        }
        ensure!(Instant::now() < deadline, "versions of before are still there: {plugins:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Two modules were compiled, once each, however many plugins and versions there were.
    let metrics = metrics(waypoint).await?;
    assert!(metrics.contains("cairn_wasm_modules_loaded_total{origin=\"compiled\"} 2\n"), "{metrics}");
    Ok(())
}

/// A module that adds to each request how many it has seen, up to 9, as `x-count`.
fn counter() -> Vec<u8> {
    wat::parse_str(
        r#"(module
          (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (global $count (mut i32) (i32.const 48))
          (data (i32.const 512) "x-count")
          (func (export "proxy_abi_version_0_2_1"))
          (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 1024))
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (global.set $count (i32.add (global.get $count) (i32.const 1)))
            (i32.store8 (i32.const 520) (global.get $count))
            (drop (call $add (i32.const 0) (i32.const 512) (i32.const 7) (i32.const 520) (i32.const 1)))
            (i32.const 0)))"#,
    )
    .unwrap()
}

/// A module that answers every request with 403.
fn denier() -> Vec<u8> {
    wat::parse_str(
        r#"(module
          (import "env" "proxy_send_local_response"
            (func $reply (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (func (export "proxy_abi_version_0_2_1"))
          (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 1024))
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (drop (call $reply (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
              (i32.const 0) (i32.const 0) (i32.const -1)))
            (i32.const 1)))"#,
    )
    .unwrap()
}

#[tokio::test]
async fn an_exchange_has_an_instance_of_its_own_and_a_shadow_decides_nothing() -> Result<()> {
    let home = tempfile::tempdir()?;
    let mut manifests = String::new();
    for (name, module, annotation) in
        [("count", counter(), "isolation: exchange"), ("deny", denier(), "mode: shadow")]
    {
        let file = home.path().join(format!("{name}.wasm"));
        std::fs::write(&file, module)?;
        let text = plugin(name, GATEWAY, &format!("file://{}", file.display()), "");
        let annotated = format!("namespace: shop, annotations: {{ cairn.dev/{annotation} }} }}");
        manifests += &text.replace("namespace: shop }", &annotated);
    }
    let mesh = Mesh::start(&[SMALL, ("plugins.yaml", &manifests)], &[])?;
    let (web, catalog) = (Who::Pod(mesh.pod("shop/web")?), mesh.service("shop/catalog", 8000)?);
    let mut client = Client::open(web, catalog).await?;
    for _ in 0..3 {
        let answer = client.get("/").await?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.body);
        ensure!(answer.body.lines().any(|line| line == "header: x-count: 1"), "{}", answer.body);
    }
    let waypoint = mesh.waypoint("shop/gate")?;
    let deadline = Instant::now() + SOON;
    let plugins = loop {
        // What is in the shadow may lag behind.
        let plugins = admin(waypoint, "/plugins").await?;
        if plugins[1]["shadow"]["verdicts"]["answer_4xx"] == 3 {
            break plugins;
        }
        ensure!(Instant::now() < deadline, "{plugins:#}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let isolations = [&plugins[0]["isolation"], &plugins[1]["isolation"]];
    assert_eq!(isolations, ["exchange", "shared"], "{plugins:#}");
    assert_eq!([&plugins[0]["mode"], &plugins[1]["mode"]], ["enforce", "shadow"], "{plugins:#}");
    assert_eq!((&plugins[0]["shadow"], &plugins[1]["shadow"]["exchanges"]), (&Value::Null, &json!(3)));
    assert!(plugins[1]["shadow"]["cpuSeconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{plugins:#}");
    let exchanges = admin(waypoint, "/exchanges").await?.to_string();
    assert!(exchanges.contains("shadow: would have answered 403"), "{exchanges}");
    let metrics = metrics(waypoint).await?;
    assert!(metrics.contains("\ncairn_wasm_exchange_instances 0\n"), "{metrics}");
    Ok(())
}

/// A registry of images with one image and one user. It ends when dropped.
struct FakeRegistry {
    address: SocketAddr,
    is_up: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeRegistry {
    async fn start(module: Vec<u8>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (address, is_up) = (listener.local_addr()?, Arc::new(AtomicBool::new(false)));
        let (up, module) = (Arc::clone(&is_up), Bytes::from(module));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (up, module) = (Arc::clone(&up), module.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    let response = if up.load(Ordering::Relaxed) {
                        respond(&request, &module)
                    } else {
                        Response::builder().status(503).body(Full::default())
                    };
                    async move { Ok::<_, Infallible>(response.unwrap_or_default()) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Ok(Self { address, is_up, task })
    }
}

fn respond(request: &Request<Incoming>, module: &Bytes) -> http::Result<Response<Full<Bytes>>> {
    let known = format!("Basic {}", STANDARD.encode("me:open sesame"));
    if request.headers().get("authorization").is_none_or(|value| *value != *known) {
        return Response::builder()
            .status(401)
            .header("www-authenticate", "Basic realm=x")
            .body(Full::default());
    }
    let digest = Digest::of(module).qualified();
    let manifest = json!({
        "schemaVersion": 2,
        "layers": [{ "mediaType": "application/wasm", "digest": digest, "size": module.len() }],
    });
    let path = request.uri().path();
    let body = if path == "/v2/team/swap/manifests/v1" {
        Bytes::from(manifest.to_string())
    } else if path == format!("/v2/team/swap/blobs/{digest}") {
        module.clone()
    } else {
        return Response::builder().status(404).body(Full::default());
    };
    Response::builder().body(Full::new(body))
}

async fn the_plugin(mesh: &Mesh) -> Result<Value> {
    Ok(admin(mesh.waypoint("shop/gate")?, "/plugins").await?[0].clone())
}

// The registry answers while the mesh is started, which blocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_those_wait_for_a_plugin_who_use_it_and_it_comes_with_its_secret() -> Result<()> {
    let registry = FakeRegistry::start(module('a')).await?;
    let url = format!("oci://{}/team/swap:v1", registry.address);
    let config =
        json!({ "auths": { registry.address.to_string(): { "username": "me", "password": "open sesame" } } });
    let secret = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{ name: login, namespace: shop }}\ntype: kubernetes.io/dockerconfigjson\n\
         data: {{ .dockerconfigjson: {} }}\n",
        STANDARD.encode(config.to_string())
    );
    let plugin = plugin("late", OWN, &url, "  imagePullSecret: login\n  pluginConfig: { n: 1 }");
    // The mesh comes up although the registry does not answer.
    let mesh = Mesh::start(&[SMALL, ("plugin.yaml", &plugin), ("secret.yaml", &secret)], &[])?;
    let _application = crate::servers::Parrot::start(
        mesh.twin("shop/own", 9000)?,
        "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    )
    .await?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let (catalog, own) = (mesh.service("shop/catalog", 8000)?, mesh.service("shop/own", 8000)?);
    assert_eq!(get(web, catalog, "/").await?.status, 200, "it does not use the plugin");
    assert_eq!(get(web, own, "/").await?.status, 503, "it does, and the plugin fails closed");
    let failed = the_plugin(&mesh).await?;
    assert_eq!(failed["state"], "failed", "{failed:#}");
    assert!(failed["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{failed:#}");
    assert!(failed["retryAfterSeconds"].is_number(), "{failed:#}");

    // It is tried again without anybody doing anything.
    registry.is_up.store(true, Ordering::Relaxed);
    let deadline = Instant::now() + ANSWER_MAX * 2;
    while get(web, own, "/").await?.status != 200 {
        ensure!(Instant::now() < deadline, "{:#}", the_plugin(&mesh).await?);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let ready = the_plugin(&mesh).await?;
    assert_eq!((&ready["state"], &ready["reason"]), (&json!("ready"), &Value::Null), "{ready:#}");
    assert_eq!(ready["running"]["sha256"], Digest::of(&module('a')).to_string());
    // Nothing of the secret is said anywhere.
    let waypoint = mesh.waypoint("shop/gate")?;
    for text in [admin(waypoint, "/config_dump").await?.to_string(), mesh.log("waypoint")?, mesh.up_log()?] {
        assert!(
            !text.contains("open sesame") && !text.contains(&STANDARD.encode("me:open sesame")),
            "{text}"
        );
    }
    Ok(())
}

/// A module for connections: it holds what a client sends until it has four bytes, and puts its configuration in front of
/// them; what a server sends passes.
fn line_module() -> Vec<u8> {
    let text = r#"(module
      (import "env" "proxy_get_buffer_bytes" (func $buffer (param i32 i32 i32 i32 i32) (result i32)))
      (import "env" "proxy_set_buffer_bytes" (func $set (param i32 i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 2)
      (global $free (mut i32) (i32.const 65536))
      (func (export "proxy_abi_version_0_2_1"))
      (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
        (global.get $free) (global.set $free (i32.add (global.get $free) (local.get $size))))
      (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $buffer (i32.const 7) (i32.const 0) (local.get 1) (i32.const 8) (i32.const 12)))
        (i32.const 1))
      (func (export "proxy_on_downstream_data") (param $context i32) (param $size i32) (param $end i32) (result i32)
        (if (i32.and (i32.lt_u (local.get $size) (i32.const 4)) (i32.eqz (local.get $end))) (then
          (return (i32.const 1))))
        (drop (call $set (i32.const 2) (i32.const 0) (i32.const 0)
          (i32.load (i32.const 8)) (i32.load (i32.const 12))))
        (i32.const 0)))"#;
    wat::parse_str(text).unwrap()
}

/// A pod and a service of it whose one port carries TCP, the other HTTP.
const LINE: &str = "apiVersion: v1
kind: Pod
metadata: { name: line, namespace: shop, labels: { app: line } }
spec: { serviceAccountName: web, containers: [{ name: a, image: a, ports: [{ containerPort: 9000 }] }] }
---
apiVersion: v1
kind: Service
metadata: { name: line, namespace: shop, labels: { istio.io/use-waypoint: gate } }
spec: { selector: { app: line }, ports: [{ name: tcp, port: 9000 }, { name: tcp-other, port: 9001, targetPort: 9000 }] }
";

#[tokio::test]
async fn a_plugin_of_type_network_sees_the_bytes_of_connections_and_closes_them_when_it_cannot_run()
-> Result<()> {
    let home = tempfile::tempdir()?;
    std::fs::write(home.path().join("line.wasm"), line_module())?;
    let network = |file: &str, number: u8| {
        let url = format!("file://{}/{file}.wasm", home.path().display());
        let rest = format!(
            "  type: NETWORK\n  match: [{{ ports: [{{ number: 9000 }}] }}]\n  pluginConfig: {{ n: {number} }}"
        );
        plugin("line", GATEWAY, &url, &rest)
    };
    let mesh = Mesh::start(&[SMALL, ("line.yaml", LINE), ("plugin.yaml", &network("line", 1))], &[])?;
    let _application = TcpEcho::start(mesh.twin("shop/line", 9000)?).await?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let asked = async |port: u16, pieces: &[&[u8]], length: usize| -> Result<Vec<u8>> {
        let mut stream = connect(web, mesh.service("shop/line", port)?).await?;
        for piece in pieces {
            stream.write_all(piece).await?;
            stream.flush().await?;
        }
        let mut back = vec![0; length];
        match timeout(SOON, stream.read_exact(&mut back)).await.context("neither an echo nor an end")? {
            Ok(_) => Ok(back),
            Err(_) => Ok(Vec::new()),
        }
    };
    let sees = b"{\"n\":1}\0one".as_slice();
    assert_eq!(asked(9000, &[b"\0o", b"ne"], sees.len()).await?, sees);
    assert_eq!(asked(9001, &[b"\0one"], 4).await?, b"\0one", "a port that it is not for");
    let catalog = get(web, mesh.service("shop/catalog", 8000)?, "/").await?;
    assert_eq!(catalog.status, 200, "HTTP is nothing to it");

    // What is open stays with the version it began with; a version that cannot be had leaves the one before.
    let mut open = connect(web, mesh.service("shop/line", 9000)?).await?;
    open.write_all(b"\0one").await?;
    let mut back = vec![0; sees.len()];
    timeout(SOON, open.read_exact(&mut back)).await??;
    mesh.write("plugin.yaml", &network("line", 2))?;
    let later = Instant::now() + SOON;
    while asked(9000, &[b"\0one"], sees.len()).await? != b"{\"n\":2}\0one" {
        ensure!(Instant::now() < later, "the second version does not come");
    }
    open.write_all(b"\0one").await?;
    timeout(SOON, open.read_exact(&mut back)).await??;
    assert_eq!(back, sees);
    drop(mesh);

    let mesh = Mesh::start(&[SMALL, ("line.yaml", LINE), ("plugin.yaml", &network("none", 1))], &[])?;
    let _application = TcpEcho::start(mesh.twin("shop/line", 9000)?).await?;
    let web = Who::Pod(mesh.pod("shop/web")?);
    let mut stream = connect(web, mesh.service("shop/line", 9000)?).await?;
    stream.write_all(b"\0one").await?;
    let read = timeout(SOON, stream.read(&mut [0])).await.context("it is not closed")?;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    assert_eq!(get(web, mesh.service("shop/catalog", 8000)?, "/").await?.status, 200, "and no other");
    Ok(())
}
