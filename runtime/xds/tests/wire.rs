//! Server and client over real sockets and real TLS.

// The whole file is a test, its helpers included.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use cairn_identity::Authority;
use cairn_mesh::{
    Authorization, Change, Identity, Kind, MeshSettings, NetworkAddress, PolicyAction, ResourceKey,
    ResourceName, Scope, Service, Unenforceable, Wanted, Workload,
};
use cairn_proto::ca::IstioCertificateRequest;
use cairn_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use cairn_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use cairn_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status as Detail};
use cairn_xds::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, FollowSettings, KeepSettings, Mesh, Object, ObjectDecoder, ObjectEvent,
    Role, Served, Server, Tokens, follow,
};
use rcgen::{CertificateParams, KeyPair, SanType};
use serde_json::json;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Streaming};

const ROUTES: &str = "gateway.networking.k8s.io/v1/HTTPRoute";

/// Nothing here takes a second; this only ends a test that would hang.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("in time")
}

/// A server on loopback, with the files a client of it needs.
struct Plane {
    server: Arc<Server>,
    tokens: Tokens,
    address: SocketAddr,
    dir: TempDir,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Plane {
    async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), Tokens::new()).await
    }

    async fn start_in(dir: TempDir, tokens: Tokens) -> Self {
        let authority = Arc::new(Authority::open(&dir.path().join("ca"), "cluster.local").unwrap());
        std::fs::write(dir.path().join("roots.pem"), authority.roots_pem()).unwrap();
        let tls = authority.server_tls(&["127.0.0.1".to_owned()]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::new(authority, tokens.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        let running = Arc::clone(&server);
        let serving = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            running.serve(listener, tls, stopped).await.unwrap();
        });
        tokens.insert("node-1".into(), Role::Ztunnel { node: "node-1".into() });
        for name in ["a", "b"] {
            let identity = Identity::new("cluster.local", "ns", name).unwrap();
            tokens.insert(name.into(), Role::Waypoint { gateway: ResourceName::new("ns", name), identity });
        }
        Self { server, tokens, address, dir, stop, serving }
    }

    fn settings(&self, token: &str, address: SocketAddr) -> FollowSettings {
        let path = self.dir.path().join(format!("token-{token}"));
        std::fs::write(&path, format!("{token}\n")).unwrap();
        let mut settings = FollowSettings::new(
            format!("https://{address}"),
            self.dir.path().join("roots.pem"),
            format!("ztunnel~127.0.0.1~{token}.ns~ns.svc.cluster.local"),
        );
        settings.token = Some(path.into());
        settings
    }

    async fn channel(&self) -> Channel {
        let roots = std::fs::read(self.dir.path().join("roots.pem")).unwrap();
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots));
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).unwrap();
        endpoint.tls_config(tls).unwrap().connect().await.unwrap()
    }

    async fn raw(&self, token: &str, types: &[(&str, BTreeMap<String, String>)]) -> Raw {
        let (requests, queue) = mpsc::channel(64);
        for (type_url, versions) in types {
            let request = DeltaDiscoveryRequest {
                type_url: (*type_url).to_owned(),
                initial_resource_versions: versions.clone(),
                ..DeltaDiscoveryRequest::default()
            };
            requests.send(request).await.unwrap();
        }
        let mut client = AggregatedDiscoveryServiceClient::new(self.channel().await);
        let responses =
            client.delta_aggregated_resources(bearer(token, ReceiverStream::new(queue))).await.unwrap();
        Raw { requests, responses: responses.into_inner() }
    }
}

fn bearer<T>(token: &str, body: T) -> Request<T> {
    let mut request = Request::new(body);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// A client that shows what is on the wire.
struct Raw {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Raw {
    async fn next(&mut self) -> DeltaDiscoveryResponse {
        soon(self.responses.message()).await.unwrap().expect("a response")
    }

    async fn answer(&self, response: &DeltaDiscoveryResponse, error_detail: Option<Detail>) {
        let request = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail,
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }
}

/// Names put, with `+`, and removed, with `-`.
fn words(response: &DeltaDiscoveryResponse) -> Vec<String> {
    let put = response.resources.iter().map(|resource| format!("+{}", resource.name));
    put.chain(response.removed_resources.iter().map(|name| format!("-{name}"))).collect()
}

/// A client in the background.
struct Follower {
    mesh: Arc<Mesh>,
    task: JoinHandle<()>,
}

impl Follower {
    fn start(settings: FollowSettings, decoder: Option<ObjectDecoder>) -> Self {
        Self::start_with(Mesh::new(), settings, decoder)
    }

    fn start_with(mesh: Arc<Mesh>, settings: FollowSettings, decoder: Option<ObjectDecoder>) -> Self {
        let task = tokio::spawn(follow(settings, decoder, Arc::clone(&mesh), std::future::pending()));
        Self { mesh, task }
    }

    /// Waits for a snapshot of which this holds.
    async fn until(&self, what: impl Fn(&cairn_mesh::Snapshot) -> bool) {
        let mut changes = self.mesh.changes();
        soon(async {
            while !what(&self.mesh.snapshot()) {
                changes.changed().await.unwrap();
            }
        })
        .await;
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn workload(name: &str, capacity: u32) -> Workload {
    let identity = Identity::new("cluster.local", "ns", name).unwrap();
    Workload {
        node: "node-1".into(),
        capacity,
        addresses: vec!["10.0.0.1".parse().unwrap()],
        ..Workload::new(name, name, identity)
    }
}

fn policy(name: &str) -> Authorization {
    Authorization {
        name: ResourceName::new("ns", name),
        scope: Scope::Namespace,
        action: PolicyAction::Allow,
        rules: vec![],
        dry_run: false,
    }
}

fn route(name: &str, spec: serde_json::Value, gateways: &[&str]) -> Object {
    Object {
        group: "gateway.networking.k8s.io".into(),
        version: "v1".into(),
        kind: "HTTPRoute".into(),
        name: ResourceName::new("ns", name),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created: String::new(),
        spec,
        gateways: gateways.iter().map(|name| ResourceName::new("ns", *name)).collect(),
    }
}

fn workloads(names: &[(&str, u32)]) -> Served {
    Served {
        workloads: names.iter().map(|(name, capacity)| workload(name, *capacity)).collect(),
        ..Served::default()
    }
}

/// Keeps each object's spec as the reason of an unenforceable one, and refuses a spec that is not an object.
fn decoder() -> ObjectDecoder {
    let key = |name: &ResourceName| ResourceKey { kind: Kind::HttpRoute, name: name.clone() };
    Box::new(move |event| match event {
        ObjectEvent::Put(object) if !object.spec.is_object() => Err("the spec is no object".to_owned()),
        ObjectEvent::Put(object) => {
            let what = Unenforceable {
                what: "route".into(),
                targets: vec![],
                namespace: "ns".into(),
                reason: object.spec.to_string().into(),
            };
            Ok(vec![Change::Unenforceable(key(&object.name), what)])
        }
        ObjectEvent::Removed { name, .. } => Ok(vec![Change::L7Removed(key(name))]),
    })
}

fn objects(snapshot: &cairn_mesh::Snapshot) -> Vec<String> {
    let unenforceable = snapshot.l7().unenforceable.iter();
    unenforceable.map(|(key, what)| format!("{} {}", key.name, what.reason)).collect()
}

#[tokio::test]
async fn a_follower_has_what_is_published_and_loses_what_is_not() {
    let plane = Plane::start().await;
    let follower = Follower::start(plane.settings("node-1", plane.address), None);
    plane.server.publish(Served { authorizations: vec![policy("p")], ..workloads(&[("a", 1), ("b", 1)]) });
    soon(follower.mesh.ready()).await;
    let snapshot = follower.mesh.snapshot();
    assert_eq!(**snapshot.workload("a").unwrap(), workload("a", 1));
    assert!(snapshot.workload("b").is_some());
    assert_eq!(**snapshot.authorization(&ResourceName::new("ns", "p")).unwrap(), policy("p"));

    plane.server.publish(workloads(&[("a", 7)]));
    follower.until(|now| now.workload("b").is_none()).await;
    let snapshot = follower.mesh.snapshot();
    assert_eq!(snapshot.workload("a").unwrap().capacity, 7, "one generation is one snapshot");
    assert!(snapshot.authorization(&ResourceName::new("ns", "p")).is_none());
    assert_eq!(follower.mesh.problems(), []);
}

/// A start without the control plane goes by what was kept of it, until it is there again.
#[tokio::test]
async fn what_was_kept_serves_until_the_control_plane_is_there() {
    let plane = Plane::start().await;
    let (silent, home) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), tempfile::tempdir().unwrap());
    let settings = |address| {
        let mut settings = plane.settings("node-1", address);
        settings.keep = Some(KeepSettings {
            wait: Duration::from_millis(100),
            interval: Duration::ZERO,
            ..KeepSettings::new(home.path().join("state"), "node-1")
        });
        settings
    };
    plane.server.publish(Served { authorizations: vec![policy("p")], ..workloads(&[("a", 1), ("b", 1)]) });
    let first = Follower::start(settings(plane.address), None);
    soon(first.mesh.ready()).await;
    assert_eq!(first.mesh.restored(), None);
    soon(async {
        while first.mesh.kept().is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    drop(first);

    let nowhere = silent.local_addr().unwrap();
    let second = Follower::start(settings(nowhere), None);
    soon(second.mesh.ready()).await;
    assert!(second.mesh.restored().is_some());
    let snapshot = second.mesh.snapshot();
    assert_eq!(**snapshot.workload("a").unwrap(), workload("a", 1));
    assert_eq!(**snapshot.authorization(&ResourceName::new("ns", "p")).unwrap(), policy("p"));
    drop(second);

    // Whatever the server remembers of `b`, it is gone when its first word does not name it.
    plane.server.publish(workloads(&[("a", 7)]));
    let front = Forwarder::start(nowhere).await;
    let third = Follower::start(settings(front.address), None);
    third.until(|now| now.workload("b").is_some()).await;
    assert!(third.mesh.restored().is_some());
    front.backend.send_replace(plane.address);
    third.until(|now| now.workload("b").is_none()).await;
    assert_eq!(third.mesh.snapshot().workload("a").unwrap().capacity, 7);
    assert!(third.mesh.snapshot().authorization(&ResourceName::new("ns", "p")).is_none());
    assert_eq!(third.mesh.restored(), None);
}

/// Only what is asked for is known, changes of it are told, and what is absent is told when it comes to be.
#[tokio::test]
async fn workloads_and_services_are_known_when_they_were_asked_for() {
    let plane = Plane::start().await;
    let front = Forwarder::start(plane.address).await;
    let at = |address: &str| NetworkAddress { network: "".into(), address: address.parse().unwrap() };
    let behind = |name: &str, address: &str, capacity| Workload {
        addresses: vec![address.parse().unwrap()],
        services: vec![(ResourceName::new("ns", "echo"), vec![])],
        ..workload(name, capacity)
    };
    let echo = || Service {
        name: "echo".into(),
        namespace: "ns".into(),
        hostname: "echo".into(),
        vips: vec![at("10.96.0.1")],
        ..Service::default()
    };
    let served = |more: Vec<Workload>| Served {
        workloads: [workload("other", 1), workload("own", 1)].into_iter().chain(more).collect(),
        services: vec![echo()],
        authorizations: vec![policy("p")],
        ..Served::default()
    };
    plane.server.publish(served(vec![behind("e1", "10.0.0.11", 1)]));
    let settings = plane.settings("node-1", front.address);
    let follower = Follower::start_with(Mesh::on_demand(MeshSettings::default()), settings, None);
    soon(follower.mesh.ready()).await;
    let names = || {
        let snapshot = follower.mesh.snapshot();
        let mut names: Vec<String> = snapshot.workloads().map(|workload| workload.uid.to_string()).collect();
        names.extend(snapshot.services().map(|state| state.service.key().to_string()));
        names.sort();
        names.join(" ")
    };
    assert_eq!((names().as_str(), follower.mesh.snapshot().authorizations().count()), ("", 1));
    for (wanted, expected) in [
        (Wanted::Workload("own".into()), "own"),
        (Wanted::Address(at("10.96.0.1")), "e1 ns/echo own"),
        (Wanted::Name(ResourceName::new("ns", "echo")), "e1 ns/echo own"),
        (Wanted::Address(at("10.0.0.12")), "e1 ns/echo own"),
        (Wanted::Name(ResourceName::new("ns", "none")), "e1 ns/echo own"),
    ] {
        follower.mesh.ask(&wanted).await.unwrap();
        assert_eq!(names(), expected, "{wanted}");
    }
    // A new endpoint of the service has the address that was absent; the other has changed.
    plane.server.publish(served(vec![behind("e1", "10.0.0.11", 7), behind("e2", "10.0.0.12", 1)]));
    follower.until(|now| now.workload("e2").is_some()).await;
    assert_eq!(follower.mesh.snapshot().workload("e1").unwrap().capacity, 7);
    assert!(Wanted::Address(at("10.0.0.12")).is_known(&follower.mesh.snapshot()));
    // What is held is held over connections, and what is gone meanwhile is gone.
    front.backend.send_replace(plane.address);
    plane.server.publish(served(vec![behind("e2", "10.0.0.12", 1)]));
    follower.until(|now| now.workload("e1").is_none()).await;
    assert_eq!(names(), "e2 ns/echo own");
    follower.mesh.ask(&Wanted::Workload("other".into())).await.unwrap();
    assert_eq!(names(), "e2 ns/echo other own");
}

#[tokio::test]
async fn only_differences_travel() {
    let plane = Plane::start().await;
    plane.server.publish(workloads(&[("a", 1), ("b", 1), ("c", 1)]));
    let mut client = plane.raw("node-1", &[(ADDRESS_TYPE, BTreeMap::new())]).await;
    let first = client.next().await;
    assert_eq!(words(&first), ["+a", "+b", "+c"]);
    client.answer(&first, None).await;

    plane.server.publish(workloads(&[("a", 1), ("b", 2)]));
    let second = client.next().await;
    assert_eq!(words(&second), ["+b", "-c"]);
    assert_ne!(first.system_version_info, second.system_version_info);
    drop(client);

    let versions = |responses: [&DeltaDiscoveryResponse; 2]| -> BTreeMap<String, String> {
        let resources = responses.into_iter().flat_map(|response| &response.resources);
        resources.map(|resource| (resource.name.clone(), resource.version.clone())).collect()
    };
    let mut held = versions([&first, &second]);
    held.remove("c");
    let mut again = plane.raw("node-1", &[(ADDRESS_TYPE, held.clone())]).await;
    assert_eq!(words(&again.next().await), [""; 0], "what is held is not sent again");

    held.insert("c".into(), "v".into());
    held.insert("a".into(), "old".into());
    let mut stale = plane.raw("node-1", &[(ADDRESS_TYPE, held)]).await;
    assert_eq!(words(&stale.next().await), ["+a", "-c"]);
}

#[tokio::test]
async fn a_type_without_change_still_reaches_the_generation() {
    let plane = Plane::start().await;
    plane.server.publish(workloads(&[("a", 1)]));
    let types = [(ADDRESS_TYPE, BTreeMap::new()), (AUTHORIZATION_TYPE, BTreeMap::new())];
    let mut client = plane.raw("node-1", &types).await;
    let (one, other) = (client.next().await, client.next().await);
    assert_eq!(one.system_version_info, other.system_version_info);
    plane.server.publish(workloads(&[("a", 2)]));
    let (policies, addresses) = (client.next().await, client.next().await);
    assert_eq!((policies.type_url.as_str(), words(&policies).len()), (AUTHORIZATION_TYPE, 0));
    assert_eq!(words(&addresses), ["+a"]);
    assert_eq!(policies.system_version_info, addresses.system_version_info);
}

#[tokio::test]
async fn without_a_valid_token_nothing_is_served() {
    let plane = Plane::start().await;
    plane.server.publish(workloads(&[("a", 1)]));
    let mut discovery = AggregatedDiscoveryServiceClient::new(plane.channel().await);
    let mut ca = IstioCertificateServiceClient::new(plane.channel().await);
    plane.tokens.insert("withdrawn".into(), Role::Ztunnel { node: "node-1".into() });
    plane.tokens.remove("withdrawn");
    for token in ["wrong", "", "withdrawn"] {
        let refused = discovery.delta_aggregated_resources(bearer(token, tokio_stream::empty())).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated, "{token}");
        let refused = ca.create_certificate(bearer(token, request("a"))).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated, "{token}");
    }
    let refused = discovery.delta_aggregated_resources(Request::new(tokio_stream::empty())).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_token_that_becomes_valid_is_used_at_the_next_attempt() {
    let plane = Plane::start().await;
    plane.server.publish(workloads(&[("a", 1)]));
    let mut front = Forwarder::start(plane.address).await;
    let settings = plane.settings("later", front.address);
    let token = settings.token.clone().unwrap();
    let follower = Follower::start(settings, None);
    front.accepted(3).await;
    assert!(!follower.mesh.is_ready());
    std::fs::write(token.name(), "node-1").unwrap();
    soon(follower.mesh.ready()).await;
    assert!(follower.mesh.snapshot().workload("a").is_some());
}

#[tokio::test]
async fn a_server_with_other_roots_is_not_followed() {
    let plane = Plane::start().await;
    let other = Plane::start().await;
    plane.server.publish(workloads(&[("a", 1)]));
    let mut front = Forwarder::start(plane.address).await;
    let settings = other.settings("node-1", front.address);
    let roots = settings.roots.clone();
    let follower = Follower::start(settings, None);
    front.accepted(3).await;
    assert!(!follower.mesh.is_ready(), "its certificate chains to nothing we trust");
    std::fs::copy(plane.dir.path().join("roots.pem"), roots.name()).unwrap();
    soon(follower.mesh.ready()).await;
}

#[tokio::test]
async fn a_waypoint_gets_its_own_objects_and_everyones_workloads() {
    let plane = Plane::start().await;
    let objects_of = |gateways: &[&str]| Served {
        objects: vec![
            route("mine", json!({"of": "a"}), &["a"]),
            route("theirs", json!({"of": "b"}), &["b"]),
            route("shared", json!({"port": 80}), gateways),
        ],
        ..workloads(&[("a", 1)])
    };
    plane.server.publish(objects_of(&["a", "b"]));
    let start = |token| {
        let mut settings = plane.settings(token, plane.address);
        settings.object_types = vec![ROUTES.to_owned()];
        Follower::start(settings, Some(decoder()))
    };
    let (a, b, node) = (start("a"), start("b"), start("node-1"));
    for (follower, expected) in [
        (&a, vec![r#"ns/mine {"of":"a"}"#, r#"ns/shared {"port":80}"#]),
        (&b, vec![r#"ns/shared {"port":80}"#, r#"ns/theirs {"of":"b"}"#]),
        (&node, vec![]),
    ] {
        soon(follower.mesh.ready()).await;
        assert_eq!(objects(&follower.mesh.snapshot()), expected);
        assert!(follower.mesh.snapshot().workload("a").is_some());
    }
    plane.server.publish(objects_of(&["b"]));
    a.until(|now| objects(now) == [r#"ns/mine {"of":"a"}"#]).await;
    assert_eq!(objects(&b.mesh.snapshot()).len(), 2);
}

#[tokio::test]
async fn a_refused_object_leaves_its_siblings_and_is_known_to_the_server() {
    let plane = Plane::start().await;
    let serve = |spec| Served {
        objects: vec![route("bad", spec, &["a"]), route("good", json!({}), &["a"])],
        ..Served::default()
    };
    plane.server.publish(serve(json!("text")));
    let mut settings = plane.settings("a", plane.address);
    settings.object_types = vec![ROUTES.to_owned()];
    let follower = Follower::start(settings, Some(decoder()));
    soon(follower.mesh.ready()).await;
    assert_eq!(objects(&follower.mesh.snapshot()), ["ns/good {}"]);
    let [problem] = &follower.mesh.problems()[..] else { panic!("one problem") };
    assert_eq!((problem.name.as_str(), problem.refused), ("ns/bad", true));

    let rejections = |count: usize| {
        let server = Arc::clone(&plane.server);
        soon(async move {
            while server.rejections().len() != count {
                tokio::task::yield_now().await;
            }
            server.rejections()
        })
    };
    let [rejection] = &rejections(1).await[..] else { panic!("one rejection") };
    assert_eq!((rejection.type_url.as_str(), rejection.name.as_str()), (ROUTES, "ns/bad"));
    assert_eq!(rejection.reason, "the spec is no object");
    assert!(rejection.node.starts_with("ztunnel~127.0.0.1~a"), "{}", rejection.node);

    plane.server.publish(serve(json!({"now": "good"})));
    follower.until(|now| objects(now).len() == 2).await;
    assert_eq!(follower.mesh.problems(), []);
    assert_eq!(rejections(0).await, []);
}

#[tokio::test]
async fn rejections_end_with_the_stream_that_made_them() {
    let plane = Plane::start().await;
    plane.server.publish(workloads(&[("a", 1)]));
    let mut client = plane.raw("node-1", &[(ADDRESS_TYPE, BTreeMap::new())]).await;
    let response = client.next().await;
    let error = Detail { code: 3, message: "whatever".into(), details: vec![] };
    client.answer(&response, Some(error)).await;
    let until = |count: usize| {
        let server = Arc::clone(&plane.server);
        soon(async move {
            while server.rejections().len() != count {
                tokio::task::yield_now().await;
            }
        })
    };
    until(1).await;
    assert_eq!(plane.server.rejections()[0].reason, "whatever");
    drop(client);
    until(0).await;
}

fn request(name: &str) -> IstioCertificateRequest {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    let identity = format!("spiffe://cluster.local/ns/ns/sa/{name}");
    params.subject_alt_names = vec![SanType::URI(identity.try_into().unwrap())];
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    IstioCertificateRequest { csr, validity_duration: 3600, metadata: None }
}

fn impersonating(name: &str, other: &str) -> IstioCertificateRequest {
    let kind = prost_types::value::Kind::StringValue(format!("spiffe://cluster.local/ns/ns/sa/{other}"));
    let value = prost_types::Value { kind: Some(kind) };
    let metadata = prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() };
    IstioCertificateRequest { metadata: Some(metadata), ..request(name) }
}

#[tokio::test]
async fn certificates_are_signed_for_the_callers_own_identities_only() {
    let plane = Plane::start().await;
    let elsewhere = Workload { node: "node-2".into(), ..workload("elsewhere", 1) };
    plane.server.publish(Served { workloads: vec![workload("here", 1), elsewhere], ..Served::default() });
    let mut ca = IstioCertificateServiceClient::new(plane.channel().await);
    let bad_csr = IstioCertificateRequest { csr: "text".into(), ..request("here") };
    for (name, token, request, expected) in [
        ("a ztunnel, for its node", "node-1", request("here"), Ok(())),
        ("a ztunnel, said twice", "node-1", impersonating("here", "here"), Ok(())),
        ("a ztunnel, for another node", "node-1", request("elsewhere"), Err(Code::PermissionDenied)),
        ("a ztunnel, for nobody", "node-1", request("unknown"), Err(Code::PermissionDenied)),
        ("a ztunnel, in two names", "node-1", impersonating("here", "elsewhere"), Err(Code::InvalidArgument)),
        ("a ztunnel, without a CSR", "node-1", bad_csr, Err(Code::InvalidArgument)),
        ("a waypoint, for itself", "a", request("a"), Ok(())),
        ("a waypoint, for another", "a", request("b"), Err(Code::PermissionDenied)),
        ("a waypoint, for a workload", "a", request("here"), Err(Code::PermissionDenied)),
    ] {
        let answer = soon(ca.create_certificate(bearer(token, request))).await;
        let code = answer.as_ref().map(|_| ()).map_err(tonic::Status::code);
        assert_eq!(code, expected, "{name}");
        if let Ok(answer) = answer {
            let chain = answer.into_inner().cert_chain;
            assert_eq!(chain.len(), 2, "{name}");
            assert!(chain.iter().all(|pem| pem.starts_with("-----BEGIN CERTIFICATE-----")), "{name}");
        }
    }
}

/// Forwards TCP to an address that can be changed; a change cuts what stands.
struct Forwarder {
    address: SocketAddr,
    backend: watch::Sender<SocketAddr>,
    accepted: watch::Receiver<usize>,
}

impl Forwarder {
    async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (backend, mut changes) = watch::channel(to);
        let (count, accepted) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                count.send_modify(|count| *count += 1);
                let to = *changes.borrow_and_update();
                let mut changed = changes.clone();
                tokio::spawn(async move {
                    let mut server = TcpStream::connect(to).await?;
                    tokio::select! {
                        _ = changed.changed() => {}
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                    }
                    Ok::<_, std::io::Error>(())
                });
            }
        });
        Self { address, backend, accepted }
    }

    /// Waits for so many connections: all but the last have come to their end.
    async fn accepted(&mut self, count: usize) {
        soon(self.accepted.wait_for(|accepted| *accepted >= count)).await.unwrap();
    }
}

#[tokio::test]
async fn a_follower_survives_the_restart_of_its_server() {
    let first = Plane::start().await;
    first.server.publish(workloads(&[("stays", 1), ("goes", 1)]));
    let front = Forwarder::start(first.address).await;
    let follower = Follower::start(first.settings("node-1", front.address), None);
    follower.until(|now| now.workload("goes").is_some()).await;
    let before = Arc::clone(follower.mesh.snapshot().workload("stays").unwrap());

    // The same CA and tokens, another process: its generations begin anew.
    let Plane { dir, tokens, stop, serving, .. } = first;
    drop(stop);
    soon(serving).await.unwrap();
    assert!(follower.mesh.snapshot().workload("goes").is_some(), "what is known stays without a server");
    let second = Plane::start_in(dir, tokens).await;
    second.server.publish(workloads(&[("stays", 1), ("comes", 1)]));
    front.backend.send_replace(second.address);
    follower.until(|now| now.workload("comes").is_some()).await;
    let snapshot = follower.mesh.snapshot();
    assert!(snapshot.workload("goes").is_none(), "what went meanwhile is removed");
    assert!(Arc::ptr_eq(&before, snapshot.workload("stays").unwrap()), "what stayed was not sent again");
}

#[tokio::test]
async fn a_stopped_server_ends_the_streams_of_its_clients() {
    let plane = Plane::start().await;
    plane.server.publish(workloads(&[("a", 1)]));
    let mut client = plane.raw("node-1", &[(ADDRESS_TYPE, BTreeMap::new())]).await;
    client.next().await;
    plane.stop.send(()).unwrap();
    assert_eq!(soon(client.responses.message()).await.unwrap(), None);
    drop(client);
    soon(plane.serving).await.unwrap();
}

#[tokio::test]
async fn a_silent_peer_does_not_hold_up_the_others() {
    let plane = Plane::start().await;
    plane.server.publish(workloads(&[("a", 1)]));
    let _silent = TcpStream::connect(plane.address).await.unwrap();
    let follower = Follower::start(plane.settings("node-1", plane.address), None);
    soon(follower.mesh.ready()).await;
}

#[tokio::test]
async fn publications_that_come_quickly_arrive_in_the_end() {
    let plane = Plane::start().await;
    let follower = Follower::start(plane.settings("node-1", plane.address), None);
    for capacity in 1..=500 {
        plane.server.publish(workloads(&[("a", capacity)]));
    }
    follower.until(|now| now.workload("a").is_some_and(|workload| workload.capacity == 500)).await;
}
