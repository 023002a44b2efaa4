//! Why: the last denials of a service, choosing among what is kept, and the decision that callers who may know are told.

use crate::client::{Client, Who, admin, record, request};
use crate::edits::SMALL;
use crate::harness::Mesh;
use crate::servers::Parrot;
use anyhow::{Context, Result, anyhow, ensure};
use http::Method;
use serde_json::Value;
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
