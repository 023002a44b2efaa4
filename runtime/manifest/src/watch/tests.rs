//! A change is told soon, whatever way the editor makes it.

use super::*;
use std::fs;
use std::future::Future;
use tempfile::TempDir;

/// How long a change may take. Far above what it takes, which is asserted of events alone below.
const PATIENCE: Duration = Duration::from_secs(20);

fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(limit, future).await.ok() })
}

fn place() -> (TempDir, Watch) {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("one")).unwrap();
    fs::create_dir(place.path().join("two")).unwrap();
    fs::write(place.path().join("one/a.yaml"), "a: 1").unwrap();
    fs::write(place.path().join("two/a.yaml"), "a: 2").unwrap();
    std::os::unix::fs::symlink("one", place.path().join("current")).unwrap();
    let watch = Watch::start(place.path().join("current")).unwrap();
    (place, watch)
}

#[test]
fn every_kind_of_edit_is_told() {
    type Edit = fn(&Path);
    let edits: [(&str, Edit); 6] = [
        ("write", |root| fs::write(root.join("current/a.yaml"), "a: 3").unwrap()),
        ("rename over", |root| {
            fs::write(root.join("one/.a.swp"), "a: 3").unwrap();
            fs::rename(root.join("one/.a.swp"), root.join("one/a.yaml")).unwrap();
        }),
        ("remove", |root| fs::remove_file(root.join("one/a.yaml")).unwrap()),
        ("new file in a new directory", |root| {
            fs::create_dir(root.join("one/sub")).unwrap();
            fs::write(root.join("one/sub/b.yaml"), "a: 3").unwrap();
        }),
        ("the directory's link is swapped", |root| {
            std::os::unix::fs::symlink("two", root.join("next")).unwrap();
            fs::rename(root.join("next"), root.join("current")).unwrap();
        }),
        ("a file appears through a link", |root| {
            std::os::unix::fs::symlink("../two/a.yaml", root.join("one/b.yaml")).unwrap();
        }),
    ];
    for (name, edit) in edits {
        let (place, mut watch) = place();
        edit(place.path());
        assert!(within(PATIENCE, watch.changed()).is_some(), "{name}");
    }
}

#[test]
fn edits_after_a_swapped_link_are_told_too() {
    let (place, mut watch) = place();
    std::os::unix::fs::symlink("two", place.path().join("next")).unwrap();
    fs::rename(place.path().join("next"), place.path().join("current")).unwrap();
    assert!(within(PATIENCE, watch.changed()).is_some());
    fs::write(place.path().join("two/a.yaml"), "a: 33").unwrap();
    assert!(within(PATIENCE, watch.changed()).is_some());
}

#[test]
fn a_file_behind_a_link_to_elsewhere_is_looked_at() {
    let (place, watch) = place();
    drop(watch);
    std::os::unix::fs::symlink("../two/a.yaml", place.path().join("one/b.yaml")).unwrap();
    let mut watch = Watch::start(place.path().join("one")).unwrap();
    fs::write(place.path().join("two/a.yaml"), "a: longer").unwrap();
    assert!(within(PATIENCE, watch.changed()).is_some());
}

#[test]
fn a_directory_that_is_not_there_yet_is_waited_for() {
    let place = tempfile::tempdir().unwrap();
    let mut watch = Watch::start(place.path().join("later")).unwrap();
    fs::create_dir(place.path().join("later")).unwrap();
    fs::write(place.path().join("later/a.yaml"), "a: 1").unwrap();
    assert!(within(PATIENCE, watch.changed()).is_some());
}

#[test]
fn reading_is_not_a_change() {
    for (kind, changes) in [
        (EventKind::Access(AccessKind::Open(AccessMode::Any)), false),
        (EventKind::Access(AccessKind::Close(AccessMode::Read)), false),
        (EventKind::Access(AccessKind::Close(AccessMode::Write)), true),
        (EventKind::Create(notify::event::CreateKind::File), true),
        (EventKind::Remove(notify::event::RemoveKind::File), true),
        (EventKind::Any, true),
    ] {
        assert_eq!(may_change(&kind), changes, "{kind:?}");
    }
}
