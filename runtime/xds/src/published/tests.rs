//! Differences between generations, by role.

use super::*;
use serde_json::json;

const ROUTES: &str = "g/v1/HTTPRoute";

fn workload(name: &str, capacity: u32) -> Workload {
    let identity = Identity::new("td", "ns", name).unwrap();
    Workload { node: "node-1".into(), capacity, ..Workload::new(name, name, identity) }
}

fn object(name: &str, gateways: &[&str]) -> Object {
    Object {
        group: "g".into(),
        version: "v1".into(),
        kind: "HTTPRoute".into(),
        name: ResourceName::new("ns", name),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created: String::new(),
        spec: json!({}),
        gateways: gateways.iter().map(|name| ResourceName::new("ns", *name)).collect(),
    }
}

fn ztunnel() -> Role {
    Role::Ztunnel { node: "node-1".into() }
}

fn waypoint(name: &str) -> Role {
    let identity = Identity::new("td", "ns", name).unwrap();
    Role::Waypoint { gateway: ResourceName::new("ns", name), identity }
}

/// Names put, with `+`, and removed, with `-`.
fn words(difference: Difference) -> Vec<String> {
    let put = difference.put.into_iter().map(|resource| format!("+{}", resource.name));
    put.chain(difference.removed.into_iter().map(|name| format!("-{name}"))).collect()
}

#[test]
fn only_what_changed_is_told() {
    let first = Published::default().next(Served {
        workloads: vec![workload("same", 1), workload("changed", 1), workload("gone", 1)],
        ..Served::default()
    });
    let second = first.next(Served {
        workloads: vec![workload("same", 1), workload("changed", 2), workload("new", 1)],
        ..Served::default()
    });
    let held = Held::Sent(first.resources(ADDRESS_TYPE));
    let now = second.resources(ADDRESS_TYPE);
    assert_eq!(words(difference(&held, &now, &ztunnel())), ["+changed", "+new", "-gone"]);
    assert_eq!((first.generation, second.generation), (1, 2));
    let before = first.resources(ADDRESS_TYPE);
    assert!(Arc::ptr_eq(&before["same"], &now["same"]), "what is the same is shared");
}

#[test]
fn a_type_without_change_is_shared_whole() {
    let served = || Served { workloads: vec![workload("a", 1)], ..Served::default() };
    let first = Published::default().next(served());
    let second = first.next(served());
    assert!(Arc::ptr_eq(&first.resources(ADDRESS_TYPE), &second.resources(ADDRESS_TYPE)));
}

#[test]
fn what_a_client_claims_is_compared_by_version() {
    let now = Published::default()
        .next(Served { workloads: vec![workload("a", 1), workload("b", 1)], ..Served::default() })
        .resources(ADDRESS_TYPE);
    let version = |name: &str| now[name].version.clone();
    for (name, claimed, expected) in [
        ("nothing", vec![], &["+a", "+b"][..]),
        ("everything", vec![("a", version("a")), ("b", version("b"))], &[]),
        ("an old version", vec![("a", "old".to_owned()), ("b", version("b"))], &["+a"]),
        ("what is gone", vec![("a", version("a")), ("b", version("b")), ("c", "v".to_owned())], &["-c"]),
    ] {
        let claimed = claimed.into_iter().map(|(name, version)| (name.to_owned(), version)).collect();
        assert_eq!(words(difference(&Held::Claimed(claimed), &now, &ztunnel())), expected, "{name}");
    }
}

#[test]
fn versions_are_of_the_content_alone() {
    let serve = |workloads| Published::default().next(Served { workloads, ..Served::default() });
    let one = serve(vec![workload("a", 1)]).resources(ADDRESS_TYPE);
    let other = serve(vec![workload("b", 1), workload("a", 1)]).resources(ADDRESS_TYPE);
    assert_eq!(one["a"].version, other["a"].version, "another process gives the same version");
    assert_ne!(other["a"].version, other["b"].version);
}

#[test]
fn objects_are_for_the_waypoints_that_they_name() {
    let first = Published::default().next(Served {
        objects: vec![object("both", &["a", "b"]), object("mine", &["a"]), object("nobody", &[])],
        ..Served::default()
    });
    let second = first.next(Served {
        objects: vec![object("both", &["b"]), object("mine", &["a"]), object("nobody", &["a"])],
        ..Served::default()
    });
    let (before, now) = (first.resources(ROUTES), second.resources(ROUTES));
    let nothing = || Held::Claimed(BTreeMap::new());
    for (name, held, now, role, expected) in [
        ("a at first", nothing(), &before, waypoint("a"), &["+ns/both", "+ns/mine"][..]),
        ("b at first", nothing(), &before, waypoint("b"), &["+ns/both"]),
        ("a later", Held::Sent(Arc::clone(&before)), &now, waypoint("a"), &["+ns/nobody", "-ns/both"]),
        ("b later", Held::Sent(Arc::clone(&before)), &now, waypoint("b"), &[]),
        ("a ztunnel gets none", nothing(), &now, ztunnel(), &[]),
        (
            "a claim on what is another's",
            Held::Claimed([("ns/mine".into(), "v".into())].into()),
            &now,
            waypoint("b"),
            &["+ns/both", "-ns/mine"],
        ),
    ] {
        assert_eq!(words(difference(&held, now, &role)), expected, "{name}");
    }
}

#[test]
fn identities_run_on_the_nodes_of_their_workloads() {
    let published =
        Published::default().next(Served { workloads: vec![workload("a", 1)], ..Served::default() });
    let identity = |name| Identity::new("td", "ns", name).unwrap();
    assert!(published.runs_on(&identity("a"), "node-1"));
    assert!(!published.runs_on(&identity("a"), "node-2"));
    assert!(!published.runs_on(&identity("b"), "node-1"));
}
