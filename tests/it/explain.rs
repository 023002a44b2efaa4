//! Why: the last denials of a service, choosing among what is kept, and the decision that callers who may know are told.

use crate::client::{Client, Who, admin, record, request};
use crate::edits::SMALL;
use crate::harness::{Mesh, cairn};
use crate::servers::Parrot;
use anyhow::{Context, Result, anyhow, ensure};
use http::Method;
use serde_json::Value;
use std::process::Command;
use std::sync::LazyLock;

/// The small mesh with a guest, a policy, and a waypoint that explains itself to one of its clients.
const MORE: &str = "
apiVersion: v1
kind: Namespace
metadata: { name: guests, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Pod
metadata: { name: guest, namespace: guests, labels: { app: guest } }
spec:
  serviceAccountName: guest
  containers: [{ name: guest, image: example/guest:v1 }]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: get-only, namespace: shop }
spec:
  targetRefs: [{ group: \"\", kind: Service, name: catalog }, { group: \"\", kind: Service, name: own }]
  rules:
    - to: [{ operation: { methods: [GET] } }]
";

const GATEWAY: &str = "name: gate, namespace: shop,";

static EXPLAINED: LazyLock<Result<Mesh>> = LazyLock::new(|| {
    let told = format!("{GATEWAY} annotations: {{ cairn.dev/explain-to: cluster.local/ns/shop/sa/web }},");
    let small = SMALL.1.replace(GATEWAY, &told);
    ensure!(small != SMALL.1, "the Gateway is written otherwise");
    Mesh::start(&[(SMALL.0, &small), ("more.yaml", MORE)], &[])
});

fn mesh() -> Result<&'static Mesh> {
    EXPLAINED.as_ref().map_err(|error| anyhow!("the mesh is not there: {error:#}"))
}

fn pod(name: &str) -> Result<Who> {
    Ok(Who::Pod(mesh()?.pod(name)?))
}

const HEADER: &str = "x-cairn-decision";

#[tokio::test]
async fn only_a_caller_who_may_know_is_told_the_decision() -> Result<()> {
    let forger = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-cairn-decision: forged\r\n\r\n";
    let _application = Parrot::start(mesh()?.twin("shop/own", 9000)?, forger).await?;
    let allowed = "policy=\"ns[shop]-policy[get-only]-rule[0]\";route=\"default\"";
    let denied = "deny;policy=\"none\";reason=\"ALLOW get-only rule 0 failed on method: POST is not GET\";route=\"default\"";
    let (web, guest) = (pod("shop/web")?, pod("guests/guest")?);
    for service in ["shop/catalog", "shop/own"] {
        let to = mesh()?.service(service, 8000)?;
        let mut client = Client::open(web, to).await?;
        let answer = client.get("/").await?;
        assert_eq!((answer.status, answer.header(HEADER)), (200, &*format!("allow;{allowed}")), "{service}");
        assert_eq!(answer.headers.get_all(HEADER).iter().count(), 1, "{service}");
        let answer = client.send(request(Method::POST, "/", &[])).await?;
        assert_eq!((answer.status, answer.header(HEADER)), (403, denied), "{service}");

        let mut client = Client::open(guest, to).await?;
        for (method, status) in [(Method::GET, 200), (Method::POST, 403)] {
            let answer = client.send(request(method, "/", &[])).await?;
            assert_eq!(answer.status, status, "{service}");
            assert!(!answer.headers.contains_key(HEADER), "{service}: {:?}", answer.headers);
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_last_denials_are_kept_per_service() -> Result<()> {
    let waypoint = mesh()?.waypoint("shop/gate")?;
    let to = mesh()?.service("shop/catalog", 8000)?;
    let mut client = Client::open(pod("guests/guest")?, to).await?;
    let answer = client.send(request(Method::DELETE, "/denied?x=y", &[])).await?;
    assert_eq!(answer.status, 403);
    let is_ours = |denied: &Value| denied["path"] == "/denied?x=y";
    let denied = record(waypoint, "/denials?service=catalog.shop", is_ours).await?;
    assert_eq!(denied["service"], "catalog.shop.svc.cluster.local");
    assert_eq!(denied["sourceIdentity"], "spiffe://cluster.local/ns/guests/sa/guest");
    assert_eq!((&denied["method"], &denied["status"]), (&"DELETE".into(), &403.into()));
    assert_eq!(denied["deniedBecause"], "ALLOW get-only rule 0 failed on method: DELETE is not GET");
    let others = admin(waypoint, "/denials?service=own").await?;
    let others = others.as_array().context("a list")?;
    assert!(others.iter().all(|denied| denied["service"] == "own.shop.svc.cluster.local"), "{others:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_kept_can_be_chosen_from() -> Result<()> {
    let waypoint = mesh()?.waypoint("shop/gate")?;
    let to = mesh()?.service("shop/catalog", 8000)?;
    let mut client = Client::open(pod("guests/guest")?, to).await?;
    assert_eq!(client.get("/chosen").await?.status, 200);
    assert_eq!(client.send(request(Method::PUT, "/chosen", &[])).await?.status, 403);
    let is_ours = |record: &Value| record["path"] == "/chosen";
    let denied = record(waypoint, "/exchanges?status=403&service=shop/catalog", is_ours).await?;
    assert_eq!(denied["method"], "PUT");
    let none = admin(waypoint, "/exchanges?status=200&service=nowhere").await?;
    assert_eq!(none.as_array().map(Vec::len), Some(0));
    assert!(admin(waypoint, "/exchanges?stats=403").await.is_err(), "what is not known is refused");
    let ztunnel = mesh()?.ztunnel();
    drop(client);
    let connection =
        record(ztunnel, "/connections?service=catalog.shop", |record| record["way"] == "waypoint").await?;
    assert_eq!(connection["service"], "catalog.shop.svc.cluster.local");
    assert!(
        admin(ztunnel, "/connections?decision=deny&service=nowhere")
            .await?
            .as_array()
            .is_some_and(Vec::is_empty)
    );
    Ok(())
}

/// What `cairn explain` says of a request, from manifests or from a proxy.
pub fn explained(arguments: &[&str]) -> Result<Value> {
    let output = Command::new(cairn()?).arg("explain").args(arguments).args(["--output", "json"]).output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The lines of all steps: what was looked at, and what it failed on.
fn lines(explanation: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let steps = explanation["steps"].as_array().into_iter().flatten();
    let lines = steps.flat_map(|step| step["lines"].as_array().into_iter().flatten());
    lines.map(|line| (text(&line["what"]), text(&line["because"]))).collect()
}

#[tokio::test]
async fn an_explanation_says_what_traffic_then_does() -> Result<()> {
    let manifests = mesh()?.manifests().display().to_string();
    let admin = mesh()?.waypoint("shop/gate")?.to_string();
    let to = mesh()?.service("shop/catalog", 8000)?;
    for (from, pod_name, method, end, status) in [
        ("shop/web", "shop/web", Method::GET, "passes", 200),
        ("shop/web", "shop/web", Method::POST, "denied", 403),
        ("guests/guest", "guests/guest", Method::GET, "passes", 200),
        ("guests/guest", "guests/guest", Method::DELETE, "denied", 403),
    ] {
        let answer = Client::open(pod(pod_name)?, to).await?.send(request(method.clone(), "/x", &[])).await?;
        assert_eq!(answer.status, status, "{from} {method}");
        let address = to.to_string();
        for (whom, place, to) in [
            ("manifests", vec![manifests.as_str()], "catalog.shop:8000"),
            ("waypoint", vec!["--live", admin.as_str()], address.as_str()),
        ] {
            let asked = ["--from", from, "--to", to, "--method", method.as_str(), "--path", "/x"];
            let explanation = explained(&[place, asked.to_vec()].concat())?;
            let answer = &explanation["answer"];
            assert_eq!(answer["end"], end, "{whom} {from} {method}: {explanation:#}");
            if status == 403 {
                assert_eq!(answer["status"], status, "{whom} {from} {method}: {explanation:#}");
                let miss = format!("ALLOW get-only rule 0 failed on method: {method} is not GET");
                assert!(answer["text"].as_str().is_some_and(|text| text.contains(&miss)), "{explanation:#}");
                let rule = ("ALLOW get-only rule 0".to_owned(), format!("method: {method} is not GET"));
                assert!(lines(&explanation).contains(&rule), "{explanation:#}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_last_denial_of_a_service_is_explained() -> Result<()> {
    let waypoint = mesh()?.waypoint("shop/gate")?;
    let to = mesh()?.service("shop/own", 8000)?;
    let mut client = Client::open(pod("guests/guest")?, to).await?;
    assert_eq!(client.send(request(Method::PATCH, "/last", &[])).await?.status, 403);
    record(waypoint, "/denials?service=own", |denied| denied["method"] == "PATCH").await?;
    let explanation = explained(&["--live", &waypoint.to_string(), "--last-denial", "own.shop"])?;
    assert_eq!(explanation["answer"]["end"], "denied", "{explanation:#}");
    Ok(())
}

#[test]
fn a_question_without_an_answer_is_said_to_have_none() -> Result<()> {
    let manifests = mesh()?.manifests().display().to_string();
    for (from, to, reason) in [
        ("shop/nobody", "catalog.shop:8000", "shop/nobody"),
        ("shop/web", "nowhere:8000", "nowhere:8000"),
        ("shop/web", "catalog.shop", "catalog.shop"),
    ] {
        let output =
            Command::new(cairn()?).args(["explain", &manifests, "--from", from, "--to", to]).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(reason), "{from} {to}: {error}");
    }
    Ok(())
}
