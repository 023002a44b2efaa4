//! A plugin that looks at bodies, through a whole mesh.

use crate::client::{Answer, Client, Who, record};
use crate::edits::SMALL;
use crate::harness::{Mesh, SOON};
use anyhow::{Context, Result, ensure};
use http::{Method, Request};
use std::time::{Duration, Instant};

/// Holds a request's body to its end and puts another in its place; adds a line to a response's.
const REPLACES: &str = r#"(module
  (import "env" "proxy_set_buffer_bytes" (func $set (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 16) "a longer body than there was")
  (data (i32.const 64) "\0aseen by: plugin\0a")
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "malloc") (param i32) (result i32) (i32.const 1024))
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
    (if (i32.eqz (local.get 2)) (then (return (i32.const 1))))
    (drop (call $set (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 16) (i32.const 28)))
    (i32.const 0))
  (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
    (if (i32.eqz (local.get 2)) (then (return (i32.const 1))))
    (drop (call $set (i32.const 1) (i32.const -1) (i32.const 0) (i32.const 64) (i32.const 17)))
    (i32.const 0)))"#;

fn post(body: &'static str) -> Request<&'static str> {
    Request::builder().method(Method::POST).uri("/").body(body).unwrap()
}

/// Asks until the plugin is there.
async fn seen(client: &mut Client) -> Result<Answer> {
    let start = Instant::now();
    loop {
        let answer = client.send(post("short")).await?;
        if answer.body.ends_with("\nseen by: plugin\n") {
            return Ok(answer);
        }
        ensure!(start.elapsed() < SOON, "no plugin after {:?}: {answer:?}", start.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_plugin_puts_other_bodies_in_place() -> Result<()> {
    let mesh = Mesh::start(&[SMALL], &[])?;
    let module = mesh.state().join("replaces.wasm");
    std::fs::write(&module, wat::parse_str(REPLACES)?)?;
    mesh.write(
        "plugin.yaml",
        &format!(
            "apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {{ name: replaces, namespace: shop }}
spec:
  targetRefs: [{{ group: \"\", kind: Service, name: catalog }}]
  url: file://{}
",
            module.display()
        ),
    )?;
    let (web, catalog) = (Who::Pod(mesh.pod("shop/web")?), mesh.service("shop/catalog", 8000)?);
    for mut client in [Client::open(web, catalog).await?, Client::open_http2(web, catalog).await?] {
        let answer = seen(&mut client).await?;
        ensure!(answer.status == 200 && answer.seen("content-length") == Some("28"), "{answer:?}");
        let length = answer.header("content-length");
        ensure!(length.is_empty() || length == answer.body.len().to_string(), "{answer:?}");
    }
    let explained =
        record(mesh.waypoint("shop/gate")?, "/exchanges", |exchange| exchange["method"] == "POST").await?;
    let notes = explained["notes"].to_string();
    ensure!(notes.contains("request: changed the body"), "{notes}");
    ensure!(notes.contains("response: changed the body"), "{notes}");
    // A body too long to be held is refused.
    let large: &'static str = Box::leak("x".repeat((1 << 20) + 1).into_boxed_str());
    let answer = Client::open(web, catalog).await?.send(post(large)).await.context("a large body")?;
    ensure!(answer.status == 413, "{answer:?}");
    Ok(())
}
