//! The client's protocol, response by response.

use super::*;
use crate::authorization::authorization_to_proto;
use crate::workload::{service_to_proto, workload_to_proto};
use cairn_mesh::{Authorization, Identity, L4Rule, PolicyAction, Scope, Service, Workload};
use cairn_proto::workload::address;
use serde_json::json;

const ROUTES: &str = "gateway.networking.k8s.io/v1/HTTPRoute";

fn session() -> Session {
    Session::new(Node { id: "me".into(), ..Node::default() }, [ROUTES.to_owned()])
}

fn workload(name: &str) -> Resource {
    let workload = Workload::new(name, name, Identity::new("td", "ns", "sa").unwrap());
    address(name, address::Type::Workload(workload_to_proto(&workload)))
}

fn service(name: &str) -> Resource {
    let service = Service {
        name: name.into(),
        namespace: "ns".into(),
        hostname: name.into(),
        vips: vec![],
        ports: vec![],
        subject_alt_names: vec![],
        waypoint: None,
        load_balancing: Default::default(),
        canonical: true,
        ..Service::default()
    };
    address(&format!("ns/{name}"), address::Type::Service(service_to_proto(&service)))
}

fn address(name: &str, message: address::Type) -> Resource {
    let message = Address { r#type: Some(message) };
    resource(name, ADDRESS_TYPE, message.encode_to_vec())
}

fn policy(name: &str, action: i32) -> Resource {
    let policy = Authorization {
        name: ResourceName::new("ns", name),
        scope: Scope::Namespace,
        action: PolicyAction::Allow,
        rules: vec![],
        dry_run: false,
    };
    let mut message = authorization_to_proto(&policy).unwrap();
    message.action = action;
    resource(&format!("ns/{name}"), AUTHORIZATION_TYPE, message.encode_to_vec())
}

fn route(name: &str) -> Resource {
    let object = Object {
        group: "gateway.networking.k8s.io".into(),
        version: "v1".into(),
        kind: "HTTPRoute".into(),
        name: ResourceName::new("ns", name),
        labels: Default::default(),
        annotations: Default::default(),
        created: String::new(),
        spec: json!({}),
        gateways: vec![],
    };
    Resource { resource: Some(object.to_any()), ..resource(&format!("ns/{name}"), ROUTES, vec![]) }
}

fn resource(name: &str, type_url: &str, value: Vec<u8>) -> Resource {
    Resource {
        version: "v1".into(),
        resource: Some(Any { type_url: type_url.into(), value }),
        name: name.into(),
        aliases: vec![],
    }
}

fn response(type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: "cairn:7".into(),
        resources,
        type_url: type_url.into(),
        nonce: "n".into(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// A decoder that names the Gateway after the object, and refuses what is called `bad`.
fn decoder() -> ObjectDecoder {
    Box::new(|event| match event {
        ObjectEvent::Put(object) if &*object.name.name == "bad" => Err("too bad".to_owned()),
        ObjectEvent::Put(object) => Ok(vec![Change::Gateway(object.name.clone())]),
        ObjectEvent::Removed { name, .. } => Ok(vec![Change::L7Removed(cairn_mesh::ResourceKey {
            kind: cairn_mesh::Kind::HttpRoute,
            name: name.clone(),
        })]),
    })
}

fn words(changes: &[Change]) -> Vec<String> {
    let word = |change: &Change| match change {
        Change::Workload(it) => format!("+workload {}", it.uid),
        Change::WorkloadRemoved(it) => format!("-workload {it}"),
        Change::Service(it) => format!("+service {}", it.key()),
        Change::ServiceRemoved(it) => format!("-service {it}"),
        Change::Authorization(it) if it.rules == [L4Rule::default()] => format!("+deny-all {}", it.name),
        Change::Authorization(it) => format!("+policy {}", it.name),
        Change::AuthorizationRemoved(it) => format!("-policy {it}"),
        Change::Gateway(it) => format!("+object {it}"),
        Change::L7Removed(it) => format!("-object {}", it.name),
        other => panic!("unexpected {other:?}"),
    };
    changes.iter().map(word).collect()
}

fn held(session: &mut Session, type_url: &str) -> Vec<String> {
    let request = session.connect(&[]).into_iter().find(|request| request.type_url == type_url).unwrap();
    let versions = request.initial_resource_versions.iter();
    versions.map(|(name, version)| format!("{name}={version}")).collect()
}

#[test]
fn a_connection_begins_with_one_wildcard_per_type_policies_first() {
    let requests = session().connect(&[]);
    let types: Vec<&str> = requests.iter().map(|request| request.type_url.as_str()).collect();
    assert_eq!(types, [AUTHORIZATION_TYPE, ADDRESS_TYPE, ROUTES]);
    for request in &requests {
        assert_eq!(request.node.as_ref().unwrap().id, "me");
        assert!(request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty() && request.response_nonce.is_empty());
    }
}

#[test]
fn each_response_has_one_answer_and_its_changes() {
    struct Row {
        name: &'static str,
        response: DeltaDiscoveryResponse,
        changes: &'static [&'static str],
        refused: &'static [&'static str],
        held: &'static [&'static str],
    }
    let other_type =
        Resource { resource: Some(Any { type_url: "x".into(), value: vec![] }), ..workload("a") };
    let rows = [
        Row {
            name: "workloads and services",
            response: response(ADDRESS_TYPE, vec![workload("a"), service("s")], &[]),
            changes: &["+workload a", "+service ns/s"],
            refused: &[],
            held: &["a=v1", "ns/s=v1"],
        },
        Row {
            name: "nothing",
            response: response(ADDRESS_TYPE, vec![], &[]),
            changes: &[],
            refused: &[],
            held: &[],
        },
        Row {
            name: "removal of what is not held",
            response: response(ADDRESS_TYPE, vec![], &["ns/x"]),
            changes: &[],
            refused: &[],
            held: &[],
        },
        Row {
            name: "a bad one among good ones",
            response: response(
                ADDRESS_TYPE,
                vec![workload("a"), resource("b", ADDRESS_TYPE, vec![0xff]), workload("c")],
                &[],
            ),
            changes: &["+workload a", "+workload c"],
            refused: &["b"],
            held: &["a=v1", "c=v1"],
        },
        Row {
            name: "content of another type",
            response: response(ADDRESS_TYPE, vec![other_type], &[]),
            changes: &[],
            refused: &["a"],
            held: &[],
        },
        Row {
            name: "no content",
            response: response(ADDRESS_TYPE, vec![Resource { resource: None, ..workload("a") }], &[]),
            changes: &[],
            refused: &["a"],
            held: &[],
        },
        Row {
            name: "a name that is not its content's",
            response: response(ADDRESS_TYPE, vec![Resource { name: "other".into(), ..workload("a") }], &[]),
            changes: &[],
            refused: &["other"],
            held: &[],
        },
        Row {
            name: "an unreadable policy has a stand-in that is asked for again",
            response: response(AUTHORIZATION_TYPE, vec![policy("p", 0), policy("q", 9)], &[]),
            changes: &["+policy ns/p", "+deny-all ns/q"],
            refused: &["ns/q"],
            held: &["ns/p=v1", "ns/q="],
        },
        Row {
            name: "an object that the decoder refuses",
            response: response(ROUTES, vec![route("bad"), route("good")], &[]),
            changes: &["+object ns/good"],
            refused: &["ns/bad"],
            held: &["ns/good=v1"],
        },
    ];
    let decoder = decoder();
    for row in rows {
        let mut session = session();
        let type_url = row.response.type_url.clone();
        let received = session.receive(row.response, Some(&decoder));
        assert_eq!(words(&received.changes), row.changes, "{}", row.name);
        assert_eq!(
            (received.answer.type_url.as_str(), received.answer.response_nonce.as_str()),
            (type_url.as_str(), "n")
        );
        let refused = received.answer.error_detail.as_ref().map(refused_resources).unwrap_or_default();
        let names: Vec<&str> = refused.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, row.refused, "{}", row.name);
        let mut held = held(&mut session, &type_url);
        held.sort();
        assert_eq!(held, row.held, "{}", row.name);
        assert_eq!(received.generation, Some(7));
    }
}

#[test]
fn removal_is_of_the_kind_that_was_held() {
    let decoder = decoder();
    let mut session = session();
    session.receive(response(ADDRESS_TYPE, vec![workload("ns/odd"), service("s")], &[]), None);
    session.receive(response(AUTHORIZATION_TYPE, vec![policy("p", 0), policy("q", 9)], &[]), None);
    session.receive(response(ROUTES, vec![route("r")], &[]), Some(&decoder));
    let removed = session.receive(response(ADDRESS_TYPE, vec![], &["ns/odd", "ns/s"]), None);
    assert_eq!(words(&removed.changes), ["-workload ns/odd", "-service ns/s"]);
    let removed = session.receive(response(AUTHORIZATION_TYPE, vec![], &["ns/p", "ns/q"]), None);
    assert_eq!(words(&removed.changes), ["-policy ns/p", "-policy ns/q"], "a stand-in goes too");
    let removed = session.receive(response(ROUTES, vec![], &["ns/r"]), Some(&decoder));
    assert_eq!(words(&removed.changes), ["-object ns/r"]);
    for type_url in [ADDRESS_TYPE, AUTHORIZATION_TYPE, ROUTES] {
        assert!(held(&mut session, type_url).is_empty(), "{type_url}");
    }
}

#[test]
fn a_refused_update_leaves_the_version_that_is_held() {
    let mut session = session();
    session.receive(response(AUTHORIZATION_TYPE, vec![policy("p", 0)], &[]), None);
    let bad = Resource { version: "v2".into(), ..policy("p", 9) };
    let received = session.receive(response(AUTHORIZATION_TYPE, vec![bad], &[]), None);
    assert!(received.changes.is_empty(), "the old policy stays in force");
    assert!(received.answer.error_detail.is_some());
    assert_eq!(held(&mut session, AUTHORIZATION_TYPE), ["ns/p=v1"]);
}

#[test]
fn a_policy_understood_in_part_is_reported_and_not_refused() {
    let mut resource = policy("p", 0);
    resource.resource.as_mut().unwrap().value.extend([0x98, 0x06, 0x01]);
    let received = session().receive(response(AUTHORIZATION_TYPE, vec![resource], &[]), None);
    assert_eq!(received.answer.error_detail, None);
    let [problem] = received.problems.as_slice() else { panic!("{:?}", received.problems) };
    assert_eq!((problem.name.as_str(), problem.refused), ("ns/p", false));
}

#[test]
fn a_type_that_was_not_asked_for_is_refused() {
    let received = session().receive(response("x", vec![], &[]), None);
    assert!(received.answer.error_detail.is_some());
    assert_eq!(received.subscription, None);
}

#[test]
fn a_refusal_is_bounded() {
    let bad = |index: usize| resource(&format!("bad-{index}"), ADDRESS_TYPE, vec![0xff]);
    let received = session().receive(response(ADDRESS_TYPE, (0..500).map(bad).collect(), &[]), None);
    let error = received.answer.error_detail.unwrap();
    assert_eq!(refused_resources(&error).len(), REFUSED_NAMED_MAX);
    assert!(error.message.ends_with("and 484 more"), "{}", error.message);
    assert!(error.encoded_len() < 8192);
}

#[test]
fn only_our_own_server_has_generations() {
    for (text, expected) in
        [("cairn:12", Some(12)), ("2026-01-02T03:04:05Z/12", None), ("12", None), ("", None)]
    {
        assert_eq!(generation(text), expected, "{text}");
    }
    assert_eq!(generation(&generation_text(9)), Some(9));
}

#[test]
fn the_first_word_of_a_server_replaces_what_was_restored() {
    let (mut before, decoder) = (session(), decoder());
    before.hold_records();
    // A policy that cannot be read denies what it guards, before a restart and after it.
    let policies = vec![policy("stays", 0), policy("goes", 0), policy("bad", 99)];
    before.receive(response(AUTHORIZATION_TYPE, policies, &[]), Some(&decoder));
    before.receive(response(ADDRESS_TYPE, vec![workload("u1"), workload("u2"), service("s")], &[]), None);
    before.receive(response(ADDRESS_TYPE, vec![workload("u3")], &["u2"]), None);
    before.receive(response(ROUTES, vec![route("r")], &[]), Some(&decoder));
    let kept: Vec<Resource> =
        before.records().iter().map(|record| Resource::decode(&**record).unwrap()).collect();

    let mut after = session();
    let restored: Vec<String> =
        after.restore(kept, Some(&decoder)).iter().flat_map(|received| words(&received.changes)).collect();
    let mut sorted = restored.clone();
    sorted.sort();
    assert_eq!(
        sorted,
        [
            "+deny-all ns/bad",
            "+policy ns/goes",
            "+policy ns/stays",
            "+service ns/s",
            "+workload u1",
            "+workload u3",
        ]
    );
    for type_url in [AUTHORIZATION_TYPE, ADDRESS_TYPE, ROUTES] {
        assert!(held(&mut after, type_url).is_empty(), "{type_url}: a server is asked for all of it");
    }
    let first = after.receive(response(AUTHORIZATION_TYPE, vec![policy("stays", 0)], &[]), None);
    let mut changes = words(&first.changes);
    changes.sort();
    assert_eq!(changes, ["+policy ns/stays", "-policy ns/bad", "-policy ns/goes"]);
    assert_eq!(held(&mut after, AUTHORIZATION_TYPE), ["ns/stays=v1"]);
    assert!(held(&mut after, ADDRESS_TYPE).is_empty(), "of this type nothing was said");
    // From then on only differences are said.
    let second = after.receive(response(AUTHORIZATION_TYPE, vec![policy("new", 0)], &[]), None);
    assert_eq!(words(&second.changes), ["+policy ns/new"]);
}

#[test]
fn resources_are_held_as_they_came_only_when_asked_for() {
    let mut session = session();
    session.receive(response(ADDRESS_TYPE, vec![workload("u")], &[]), None);
    assert!(session.records().is_empty());
}

#[test]
fn what_is_asked_for_by_name_is_held_and_waited_for_over_connections() {
    let mut session = session();
    assert_eq!(session.ask_by_name(), Some(1));
    let addresses = |session: &mut Session, waiting: &[&str]| {
        let waiting: Vec<String> = waiting.iter().map(|name| (*name).to_owned()).collect();
        let requests = session.connect(&waiting);
        requests.into_iter().find(|request| request.type_url == ADDRESS_TYPE).unwrap()
    };
    let first = addresses(&mut session, &[]);
    assert_eq!(first.resource_names_subscribe, ["*"]);
    assert_eq!(first.resource_names_unsubscribe, ["*"]);
    assert!(first.initial_resource_versions.is_empty());
    let policies = session.connect(&[]).into_iter().find(|it| it.type_url == AUTHORIZATION_TYPE).unwrap();
    assert!(policies.resource_names_unsubscribe.is_empty(), "of policies all are wanted");

    let named = Resource { aliases: vec!["/10.0.0.1".into()], ..workload("u") };
    let received = session.receive(response(ADDRESS_TYPE, vec![named, workload("v")], &["/1.1.1.1"]), None);
    let answered: Vec<_> = received.answered.iter().map(|(name, there)| (name.as_str(), *there)).collect();
    assert_eq!(answered, [("/1.1.1.1", false), ("/10.0.0.1", true), ("u", true), ("v", true)]);
    let again = addresses(&mut session, &["/10.0.0.9"]);
    let versions: Vec<_> = again.initial_resource_versions.iter().map(|(a, b)| (&**a, &**b)).collect();
    assert_eq!(versions, [("/10.0.0.9", ""), ("u", "v1"), ("v", "v1")]);
    assert_eq!(again.resource_names_unsubscribe, ["*"]);
}

#[test]
fn a_reconnect_in_a_large_mesh_stays_below_what_servers_read() {
    let name = |number: usize| {
        format!("cluster-of-the-east//Pod/namespace-of-a-team/a-workload-with-a-name-{number:06}")
    };
    let mut session = session();
    let all: Vec<Resource> = (0..40_000).map(|number| workload(&name(number))).collect();
    session.receive(response(ADDRESS_TYPE, all, &[]), None);
    let requests = session.connect(&[]);
    assert_eq!(requests.len(), 3);
    assert!(requests.iter().all(|request| request.encoded_len() < 4 << 20), "gRPC's default limit");
    let told = &requests[1].initial_resource_versions;
    assert!(told.len() > 20_000 && told.len() < 40_000, "{} of them have room", told.len());

    // What the server was not told of comes again, but for one that is gone meanwhile.
    let untold: Vec<usize> = (0..40_000).filter(|number| !told.contains_key(&name(*number))).collect();
    let (gone, still) = untold.split_first().unwrap();
    let again = still.iter().map(|number| workload(&name(*number))).collect();
    let received = session.receive(response(ADDRESS_TYPE, again, &[]), None);
    let removed: Vec<String> =
        words(&received.changes).into_iter().filter(|change| change.starts_with('-')).collect();
    assert_eq!(removed, [format!("-workload {}", name(*gone))]);
    // Further words are about what they name, and nothing else.
    let received = session.receive(response(ADDRESS_TYPE, vec![workload("new")], &[]), None);
    assert_eq!(words(&received.changes), ["+workload new"]);
}

#[test]
fn what_is_asked_for_by_name_is_asked_for_in_as_many_requests_as_it_takes() {
    let mut session = session();
    session.ask_by_name();
    let waiting: Vec<String> = (0..40_000).map(|number| format!("/{number:0100}")).collect();
    let requests = session.connect(&waiting);
    assert!(requests.iter().all(|request| request.encoded_len() < 4 << 20));
    let mut asked: Vec<&String> =
        requests.iter().flat_map(|it| it.initial_resource_versions.keys()).collect();
    asked.extend(requests.iter().flat_map(|it| &it.resource_names_subscribe).filter(|name| *name != "*"));
    asked.sort();
    assert_eq!(asked, waiting.iter().collect::<Vec<_>>());
    assert!(requests[1].node.is_some() && requests.len() > 3);
}
