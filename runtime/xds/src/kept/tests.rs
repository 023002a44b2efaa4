//! What is written is read again, and what may not be used is refused with its reason.

use super::*;
use prost_types::Any;

fn settings(home: &Path) -> KeepSettings {
    KeepSettings::new(home.join("state"), "Kubernetes/node1")
}

fn resource(name: &str) -> Resource {
    let content = Any { type_url: "type".into(), value: vec![7; 1000] };
    Resource { name: name.into(), version: "1".into(), resource: Some(content), aliases: vec![] }
}

fn records(names: &[&str]) -> Vec<Arc<[u8]>> {
    names.iter().map(|name| resource(name).encode_to_vec().into()).collect()
}

/// A moment in whole seconds, as it is written.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

#[test]
fn what_is_written_is_read_again_and_is_for_our_user_only() {
    let home = tempfile::tempdir().unwrap();
    let settings = settings(home.path());
    assert!(read(&settings, now()).unwrap().is_none(), "there is none");
    for names in [&["a", "b"][..], &["c"], &[]] {
        let bytes = write(&settings, &records(names), now()).unwrap();
        let metadata = std::fs::metadata(&settings.path).unwrap();
        assert_eq!((metadata.mode() & 0o777, metadata.len()), (0o600, bytes));
        let kept = read(&settings, now()).unwrap().unwrap();
        let expected: Vec<Resource> = names.iter().map(|name| resource(name)).collect();
        assert_eq!((kept.written, kept.resources), (now(), expected));
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1, "something is left over");
    }
}

#[test]
fn what_may_not_be_used_is_refused_with_its_reason() {
    type Spoil = fn(&mut Vec<u8>);
    let nothing: Spoil = |_| {};
    let hour = Duration::from_secs(3600);
    let rows: &[(&str, Spoil, u32, &str, SystemTime, &str)] = &[
        ("as written", nothing, 0o600, "Kubernetes/node1", now() + hour, ""),
        ("a flipped bit", |bytes| bytes[60] ^= 1, 0o600, "Kubernetes/node1", now(), "Damaged"),
        ("cut off", |bytes| bytes.truncate(900), 0o600, "Kubernetes/node1", now(), "Damaged"),
        ("nearly empty", |bytes| bytes.truncate(13), 0o600, "Kubernetes/node1", now(), "Damaged"),
        ("empty", |bytes| bytes.clear(), 0o600, "Kubernetes/node1", now(), "Version"),
        ("another version", |bytes| bytes[10] = b'2', 0o600, "Kubernetes/node1", now(), "Version"),
        ("another node", nothing, 0o600, "Kubernetes/node2", now(), "Scope"),
        ("too old", nothing, 0o600, "Kubernetes/node1", now() + hour + Duration::from_secs(1), "Old"),
        ("from the future", nothing, 0o600, "Kubernetes/node1", now() - hour, "Ahead"),
        ("others may read it", nothing, 0o640, "Kubernetes/node1", now(), "NotOurs"),
        ("others may write it", nothing, 0o602, "Kubernetes/node1", now(), "NotOurs"),
        ("larger", |bytes| bytes.resize(4000, 0), 0o600, "Kubernetes/node1", now(), "TooLarge"),
    ];
    for (name, spoil, mode, scope, at, expected) in rows {
        let home = tempfile::tempdir().unwrap();
        let settings = KeepSettings { bytes_max: 3000, ..settings(home.path()) };
        write(&settings, &records(&["a", "b"]), now()).unwrap();
        let mut bytes = std::fs::read(&settings.path).unwrap();
        spoil(&mut bytes);
        std::fs::write(&settings.path, bytes).unwrap();
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(*mode);
        std::fs::set_permissions(&settings.path, permissions).unwrap();
        let settings = KeepSettings { scope: (*scope).to_owned(), ..settings };
        let found = match read(&settings, *at) {
            Ok(kept) => kept.map_or("None".to_owned(), |_| String::new()),
            Err(error) => format!("{error:?}"),
        };
        let word = found.split([' ', '{']).next().unwrap_or_default();
        assert_eq!(word, *expected, "{name}: {found}");
    }
}

#[test]
fn what_cannot_be_written_leaves_what_was_there() {
    let home = tempfile::tempdir().unwrap();
    let settings = KeepSettings { bytes_max: 1500, ..settings(home.path()) };
    write(&settings, &records(&["a"]), now()).unwrap();
    let error = write(&settings, &records(&["a", "b"]), now()).unwrap_err();
    assert!(matches!(error, KeepError::TooLarge { bytes_max: 1500, .. }), "{error:?}");
    let kept = read(&settings, now()).unwrap().unwrap();
    assert_eq!(kept.resources, [resource("a")]);
    let elsewhere = KeepSettings { path: home.path().join("none/state"), ..settings };
    assert!(matches!(write(&elsewhere, &[], now()), Err(KeepError::Write { .. })));
}

/// Steps of a second; what is due in each.
#[tokio::test]
async fn writes_are_few_and_go_on_while_connected() {
    let home = tempfile::tempdir().unwrap();
    let settings = KeepSettings { age_max: Duration::from_secs(400), ..settings(home.path()) };
    let (start, mesh) = (Instant::now(), Mesh::new());
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut keeper = Keeper::new(settings, start);
    assert_eq!(keeper.deadline(), None);
    keeper.changed(at(5));
    keeper.changed(at(5));
    assert_eq!(keeper.deadline(), Some(at(6)), "what comes together is written together");
    keeper.write(vec![], false, &mesh, at(6));
    assert_eq!(keeper.deadline(), None, "without a connection nothing is known to be so");
    keeper.changed(at(7));
    keeper.write(vec![], true, &mesh, at(8));
    assert_eq!(keeper.deadline(), Some(at(108)), "anew at a quarter of its life");
    keeper.changed(at(9));
    assert_eq!(keeper.deadline(), Some(at(18)), "ten seconds after the last");
    let kept = async {
        while mesh.kept().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), kept).await.unwrap();
}
