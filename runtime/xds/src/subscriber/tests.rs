//! One client's stream, request by request.

use super::*;
use crate::published::Served;
use crate::{ADDRESS_TYPE, session};
use cairn_mesh::{Identity, Workload};
use cairn_proto::discovery::Status;

fn published(before: &Published, names: &[&str]) -> Arc<Published> {
    let identity = Identity::new("td", "ns", "sa").unwrap();
    let workload = |name: &&str| Workload::new(*name, *name, identity.clone());
    Arc::new(before.next(Served { workloads: names.iter().map(workload).collect(), ..Served::default() }))
}

fn subscriber(now: Arc<Published>) -> Subscriber {
    Subscriber::new(Role::Ztunnel { node: "n".into() }, now)
}

fn subscribe(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: type_url.into(), ..DeltaDiscoveryRequest::default() }
}

fn answer(response: &DeltaDiscoveryResponse, error_detail: Option<Status>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        response_nonce: response.nonce.clone(),
        error_detail,
        ..subscribe(&response.type_url)
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|resource| resource.name.as_str()).collect()
}

#[test]
fn every_type_is_told_every_generation_policies_first() {
    let first = published(&Published::default(), &["a"]);
    let mut subscriber = subscriber(Arc::clone(&first));
    subscriber.hear(subscribe(ADDRESS_TYPE));
    subscriber.hear(subscribe(AUTHORIZATION_TYPE));
    let policies = subscriber.next().unwrap();
    assert_eq!((policies.type_url.as_str(), names(&policies)), (AUTHORIZATION_TYPE, vec![]));
    assert!(!subscriber.is_told());
    let workloads = subscriber.next().unwrap();
    assert_eq!(names(&workloads), ["a"]);
    assert_eq!(workloads.system_version_info, policies.system_version_info);
    assert!(subscriber.is_told());
    assert_eq!(subscriber.next(), None);

    subscriber.advance(published(&first, &["a", "b"]));
    let (policies, workloads) = (subscriber.next().unwrap(), subscriber.next().unwrap());
    assert_eq!((names(&policies), names(&workloads)), (vec![], vec!["b"]));
    assert_eq!(policies.system_version_info, session::generation_text(2));
    assert_ne!(policies.nonce, workloads.nonce);
}

#[test]
fn nothing_is_told_before_the_first_generation() {
    let nothing = Arc::new(Published::default());
    let mut subscriber = subscriber(Arc::clone(&nothing));
    subscriber.hear(subscribe(ADDRESS_TYPE));
    assert_eq!(subscriber.next(), None);
    assert!(subscriber.is_told(), "so that it goes on to the first");
    subscriber.advance(published(&nothing, &["a"]));
    assert_eq!(names(&subscriber.next().unwrap()), ["a"]);
}

#[test]
fn a_type_is_subscribed_once() {
    let mut subscriber = subscriber(published(&Published::default(), &["a"]));
    subscriber.hear(subscribe(ADDRESS_TYPE));
    subscriber.next().unwrap();
    assert_eq!(subscriber.hear(subscribe(ADDRESS_TYPE)), Heard::Nothing);
    assert_eq!(subscriber.next(), None);
    for index in 0..SUBSCRIPTIONS_MAX - 1 {
        assert_eq!(subscriber.hear(subscribe(&index.to_string())), Heard::Nothing);
    }
    assert_eq!(subscriber.hear(subscribe("one more")), Heard::TooMany);
}

#[test]
fn a_refusal_names_its_resources_and_takes_the_others() {
    let mut subscriber = subscriber(published(&Published::default(), &["a", "b"]));
    subscriber.hear(subscribe(ADDRESS_TYPE));
    let response = subscriber.next().unwrap();
    let detail = cairn_proto::discovery::BadRequest {
        field_violations: vec![cairn_proto::discovery::bad_request::FieldViolation {
            field: "a".into(),
            description: "why".into(),
        }],
    };
    let error = Status {
        code: 3,
        message: "bad".into(),
        details: vec![prost_types::Any {
            type_url: "type.googleapis.com/google.rpc.BadRequest".into(),
            value: prost::Message::encode_to_vec(&detail),
        }],
    };
    let heard = subscriber.hear(answer(&response, Some(error)));
    let type_url: Arc<str> = ADDRESS_TYPE.into();
    let refused = vec![("a".to_owned(), "why".to_owned())];
    assert_eq!(heard, Heard::Answer { type_url, refused, taken: vec!["b".to_owned()] });
    assert_eq!(subscriber.hear(answer(&response, None)), Heard::Nothing, "a second answer says nothing");
}

#[test]
fn a_client_that_does_not_answer_is_told_nothing_new() {
    let mut now = published(&Published::default(), &["a"]);
    let mut subscriber = subscriber(Arc::clone(&now));
    subscriber.hear(subscribe(ADDRESS_TYPE));
    let mut last = None;
    for _ in 0..UNANSWERED_MAX {
        last = Some(subscriber.next().expect("room for one more"));
        now = published(&now, &["a"]);
        subscriber.advance(Arc::clone(&now));
    }
    assert_eq!(subscriber.next(), None);
    subscriber.hear(answer(&last.unwrap(), None));
    assert!(subscriber.next().is_some());
}

fn by_name(names: &[&str], held: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
        resource_names_unsubscribe: vec!["*".to_owned()],
        initial_resource_versions: held
            .iter()
            .map(|(name, version)| ((*name).to_owned(), (*version).to_owned()))
            .collect(),
        ..subscribe(ADDRESS_TYPE)
    }
}

fn more(names: &[&str], fewer: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        resource_names_unsubscribe: fewer.iter().map(|name| (*name).to_owned()).collect(),
        ..by_name(names, &[])
    }
}

/// What a response puts, `+`, and removes, `-`.
fn words(response: &DeltaDiscoveryResponse) -> Vec<String> {
    let put = response.resources.iter().map(|resource| format!("+{}", resource.name));
    put.chain(response.removed_resources.iter().map(|name| format!("-{name}"))).collect()
}

#[test]
fn what_is_asked_for_by_name_is_answered_each_time() {
    let first = published(&Published::default(), &["a", "b", "c"]);
    let mut subscriber = subscriber(Arc::clone(&first));
    subscriber.hear(by_name(&["*"], &[]));
    assert!(words(&subscriber.next().unwrap()).is_empty(), "nothing is asked for yet");
    assert_eq!(subscriber.next(), None);
    for (name, asked, fewer, expected) in [
        ("there", &["a"][..], &[][..], &["+a"][..]),
        ("there, once more", &["a"], &[], &["+a"]),
        ("absent", &["/10.0.0.1"], &[], &["-/10.0.0.1"]),
        ("both", &["b", "x"], &[], &["+b", "-x"]),
    ] {
        subscriber.hear(more(asked, fewer));
        assert_eq!(words(&subscriber.next().unwrap()), expected, "{name}");
        assert_eq!(subscriber.next(), None, "{name}");
    }
    subscriber.hear(more(&[], &["b"]));
    // What was absent and comes to be is told; what nobody asks for any more is taken away.
    subscriber.advance(published(&first, &["a", "b", "c", "x"]));
    assert_eq!(words(&subscriber.next().unwrap()), ["+x", "-b"]);
}

#[test]
fn what_is_held_and_waited_for_is_said_with_a_new_connection() {
    let now = published(&Published::default(), &["a", "b", "c"]);
    let mut subscriber = subscriber(now);
    subscriber.hear(by_name(&["*"], &[("a", "old"), ("gone", "v"), ("b", ""), ("/10.0.0.1", "")]));
    assert_eq!(words(&subscriber.next().unwrap()), ["+a", "+b", "-gone", "-/10.0.0.1"]);
    assert_eq!(subscriber.next(), None);
}
