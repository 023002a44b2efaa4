//! When the writer publishes, and what readers see.

use super::*;
use cairn_mesh::{Authorization, Identity, PolicyAction, ResourceName, Scope, Workload};
use cairn_proto::discovery::DeltaDiscoveryRequest;

fn received(index: usize, generation: Option<u64>, changes: Vec<Change>) -> Received {
    Received {
        answer: DeltaDiscoveryRequest { type_url: "t".into(), ..DeltaDiscoveryRequest::default() },
        subscription: Some(index),
        changes,
        problems: vec![],
        settled: vec![],
        generation,
        answered: vec![],
    }
}

fn workload(policies: &[&str]) -> Change {
    let identity = Identity::new("td", "ns", "sa").unwrap();
    let names = policies.iter().map(|name| ResourceName::new("ns", *name));
    Change::Workload(Workload {
        authorization_policies: names.collect(),
        ..Workload::new("u", "w", identity)
    })
}

fn policy(name: &str) -> Change {
    Change::Authorization(Authorization {
        name: ResourceName::new("ns", name),
        scope: Scope::WorkloadSelector,
        action: PolicyAction::Allow,
        rules: vec![],
        dry_run: false,
    })
}

fn policies(mesh: &Mesh) -> Vec<String> {
    let snapshot = mesh.snapshot();
    let workload = snapshot.workload("u").expect("known");
    workload.authorization_policies.iter().map(ToString::to_string).collect()
}

#[test]
fn nothing_is_shown_before_every_type_has_arrived() {
    let mesh = Mesh::new();
    let mut writer = Writer::new(Arc::clone(&mesh), 2);
    let now = Instant::now();
    writer.take(received(0, None, vec![workload(&[])]), now);
    assert!(mesh.snapshot().workload("u").is_none());
    assert!(!mesh.is_ready());
    writer.take(received(1, None, vec![]), now);
    assert!(mesh.snapshot().workload("u").is_some());
    assert!(mesh.is_ready());
}

#[test]
fn a_mesh_with_nothing_in_it_becomes_ready() {
    let mesh = Mesh::new();
    let mut writer = Writer::new(Arc::clone(&mesh), 1);
    writer.take(received(0, Some(1), vec![]), Instant::now());
    assert!(mesh.is_ready());
}

#[test]
fn what_lags_behind_its_generation_is_published_at_its_deadline() {
    let mesh = Mesh::new();
    let mut writer = Writer::new(Arc::clone(&mesh), 2);
    let now = Instant::now();
    writer.take(received(0, Some(1), vec![]), now);
    writer.take(received(1, Some(1), vec![]), now);
    writer.take(received(0, Some(2), vec![workload(&[])]), now);
    assert!(mesh.snapshot().workload("u").is_none());
    let deadline = writer.deadline().expect("something waits");
    assert_eq!(deadline, now + crate::gate::GENERATION_WAIT);
    writer.tick(deadline);
    assert!(mesh.snapshot().workload("u").is_some());
    assert_eq!(writer.deadline(), None);
}

#[test]
fn a_workload_waits_for_its_policy_and_then_no_longer() {
    let mesh = Mesh::new();
    let mut writer = Writer::new(Arc::clone(&mesh), 1);
    let now = Instant::now();
    writer.take(received(0, None, vec![policy("old"), workload(&["old"])]), now);
    writer.take(received(0, None, vec![workload(&["new"])]), now);
    assert_eq!(policies(&mesh), ["ns/old"], "the previous policies stay until the new one arrives");
    assert_eq!(writer.deadline(), Some(now + POLICY_WAIT));

    let later = now + POLICY_WAIT / 2;
    writer.take(received(0, None, vec![workload(&["new"])]), later);
    assert_eq!(writer.deadline(), Some(now + POLICY_WAIT), "an update does not extend the wait");
    writer.tick(later);
    assert_eq!(policies(&mesh), ["ns/old"]);
    writer.tick(now + POLICY_WAIT);
    assert_eq!(policies(&mesh), ["ns/new"], "what names an unknown policy is denied from now on");
    assert_eq!(writer.deadline(), None);
}

#[test]
fn a_policy_that_arrives_ends_the_wait() {
    let mesh = Mesh::new();
    let mut writer = Writer::new(Arc::clone(&mesh), 1);
    let now = Instant::now();
    writer.take(received(0, None, vec![policy("old"), workload(&["old"])]), now);
    writer.take(received(0, None, vec![workload(&["new"])]), now);
    writer.take(received(0, None, vec![policy("new")]), now);
    assert_eq!(policies(&mesh), ["ns/new"]);
    assert_eq!(writer.deadline(), None);
}

#[test]
fn problems_stay_until_their_resource_is_fine() {
    let mesh = Mesh::new();
    let mut writer = Writer::new(Arc::clone(&mesh), 1);
    let problem = |name: &str| Problem {
        type_url: "t".into(),
        name: name.to_owned(),
        reason: "why".to_owned(),
        refused: true,
    };
    let now = Instant::now();
    writer.take(Received { problems: vec![problem("a"), problem("b")], ..received(0, None, vec![]) }, now);
    writer.take(Received { settled: vec!["a".to_owned()], ..received(0, None, vec![]) }, now);
    assert_eq!(mesh.problems(), [problem("b")]);
    let many = (0..2 * PROBLEMS_MAX).map(|index| problem(&index.to_string())).collect();
    writer.take(Received { problems: many, ..received(0, None, vec![]) }, now);
    assert_eq!(mesh.problems().len(), PROBLEMS_MAX);
}

#[test]
fn what_was_known_of_the_mesh_at_first_stays_while_nobody_says_otherwise() {
    let settings = MeshSettings { trust_domain_aliases: vec!["old".into()], ..MeshSettings::default() };
    let mesh = Mesh::with_settings(settings.clone());
    let mut writer = Writer::new(Arc::clone(&mesh), 1);
    writer.take(received(0, Some(1), vec![workload(&[])]), Instant::now());
    assert_eq!(**mesh.snapshot().settings(), settings);
    let changed = vec![Change::Settings(MeshSettings::default())];
    writer.take(received(0, Some(2), changed), Instant::now());
    assert_eq!(**mesh.snapshot().settings(), MeshSettings::default());
}

fn kept() -> Vec<Received> {
    vec![received(0, None, vec![workload(&["there"])]), received(1, None, vec![policy("there")])]
}

#[test]
fn what_was_kept_is_shown_when_the_control_plane_does_not_come() {
    let (mesh, now) = (Mesh::new(), Instant::now());
    let mut writer = Writer::new(Arc::clone(&mesh), 2);
    let (written, show_at) = (SystemTime::now(), now + Duration::from_secs(5));
    writer.restore(kept(), written, show_at);
    assert_eq!(writer.deadline(), Some(show_at));
    writer.tick(now);
    assert!(!mesh.is_ready());
    writer.tick(show_at);
    assert!(mesh.is_ready() && !writer.is_live());
    assert_eq!((policies(&mesh), mesh.restored()), (vec!["ns/there".to_owned()], Some(written)));
    // One type is not all: nothing of it is shown before the other.
    writer.take(received(0, None, vec![Change::WorkloadRemoved("u".into())]), show_at);
    assert_eq!((policies(&mesh).len(), mesh.restored()), (1, Some(written)));
    writer.take(received(1, None, vec![]), show_at);
    assert!(mesh.snapshot().workload("u").is_none() && writer.is_live());
    assert_eq!(mesh.restored(), None);
}

#[test]
fn what_was_kept_is_not_shown_when_the_control_plane_comes() {
    let (mesh, now) = (Mesh::new(), Instant::now());
    let mut writer = Writer::new(Arc::clone(&mesh), 2);
    let show_at = now + Duration::from_secs(5);
    writer.restore(kept(), SystemTime::now(), show_at);
    writer.take(received(0, None, vec![]), now);
    writer.take(received(1, None, vec![Change::WorkloadRemoved("u".into())]), now);
    assert!(mesh.is_ready() && mesh.snapshot().workload("u").is_none());
    writer.tick(show_at);
    assert_eq!((mesh.restored(), writer.deadline()), (None, None));
}

/// A workload that names a policy which was not kept is denied: it has no earlier policies to go by.
#[test]
fn a_policy_that_was_not_kept_denies() {
    let (mesh, now) = (Mesh::new(), Instant::now());
    let mut writer = Writer::new(Arc::clone(&mesh), 2);
    writer.restore(vec![received(0, None, vec![workload(&["lost"])])], SystemTime::now(), now);
    writer.tick(now);
    let snapshot = mesh.snapshot();
    let peer = cairn_mesh::L4Peer {
        identity: None,
        source: "10.0.0.1:1".parse().expect("valid"),
        destination: "10.0.0.2:80".parse().expect("valid"),
    };
    let decision = cairn_mesh::decide(&snapshot, snapshot.workload("u").expect("known"), &peer);
    assert!(
        matches!(&decision, cairn_mesh::Decision::Deny(cairn_mesh::DenyReason::MissingPolicy(name))
            if name.to_string() == "ns/lost"),
        "{decision:?}"
    );
}

#[test]
fn a_type_that_is_asked_for_by_name_is_not_waited_for() {
    let mesh = Mesh::on_demand(MeshSettings::default());
    let mut writer = Writer::new(Arc::clone(&mesh), 2);
    writer.expect_nothing_of(1);
    let now = Instant::now();
    writer.take(received(0, None, vec![policy("p")]), now);
    assert!(mesh.is_ready() && writer.is_settled());
    writer.take(received(1, None, vec![workload(&["p"])]), now);
    assert!(mesh.snapshot().workload("u").is_some());
}

#[test]
fn a_state_that_was_replaced_is_freed_by_its_writer() {
    let mesh = Mesh::new();
    let mut writer = Writer::new(Arc::clone(&mesh), 1);
    let now = Instant::now();
    writer.take(received(0, None, vec![workload(&[])]), now);
    let read = mesh.snapshot();
    let state = Arc::downgrade(&read);
    writer.take(received(0, None, vec![policy("p")]), now);
    assert_eq!(writer.deadline(), Some(now + RETIRED_LOOK), "somebody reads it");
    drop(read);
    assert_eq!(state.strong_count(), 1, "whoever read it last does not free it");
    writer.tick(now + RETIRED_LOOK);
    assert_eq!((state.strong_count(), writer.deadline()), (0, None));

    let held: Vec<_> = (0..RETIRED_MAX + 5)
        .map(|round| {
            let state = mesh.snapshot();
            writer.take(received(0, None, vec![policy(&round.to_string())]), now);
            state
        })
        .collect();
    assert_eq!(
        writer.retired.len(),
        RETIRED_MAX,
        "and of those that are read for long only so many are kept"
    );
    drop(held);
    writer.tick(now + RETIRED_LOOK);
    assert!(writer.retired.is_empty());
}
