//! A ztunnel that starts while there is no control plane goes by the state that was kept, its policies included, until there
//! is one again.

use super::{Cluster, SOON, names};
use crate::netns::{skipped, within};
use std::net::{Ipv4Addr, SocketAddr};

const KEEPS: &[(&str, &str)] = &[("CAIRN_XDS_SNAPSHOT", "@kept#")];

#[test]
fn a_ztunnel_starts_without_its_control_plane() {
    if skipped() {
        return;
    }
    let mut cluster = Cluster::start_with(KEEPS).unwrap();
    assert!(within(SOON, || metric(&cluster, "cairn_xds_kept_timestamp_seconds") > Some(0)), "never kept");
    assert_eq!(metric(&cluster, "cairn_xds_restored"), Some(0));

    // The control plane goes, and then the ztunnel is started anew.
    drop(cluster.programs.remove(0));
    let mut node = cluster.nodes.remove(&2).unwrap();
    node.ztunnel.terminate();
    assert!(within(SOON, || node.ztunnel.has_ended()), "{}", node.ztunnel.log());
    node.ztunnel = cluster.start_ztunnel_with(2, "ztunnel2", "again", &[]).unwrap();
    let connection = node.listener.accept().unwrap();
    for pod in ["far", "guarded"] {
        cluster.add(&connection, pod).unwrap();
    }
    assert_eq!(connection.snapshot_sent().unwrap(), "");
    node.connection = connection.into();
    cluster.nodes.insert(2, node);
    assert!(within(SOON, || cluster.is_ready(2)), "not ready");
    let dump = cluster.json(2, "/config_dump").unwrap();
    assert!(dump["restored"].is_string(), "{}", dump["restored"]);
    assert_eq!(metric(&cluster, "cairn_xds_restored"), Some(1));
    let is_logged = || cluster.node(2).ztunnel.log().contains("the state that was kept is in force");
    assert!(within(SOON, is_logged), "{}", cluster.node(2).ztunnel.log());

    cluster.talk("outside-far", cluster.application("far")).unwrap().echo("a question").unwrap();
    assert!(cluster.talk("outside-far", cluster.application("guarded")).is_err(), "its policy was lost");
    let asking = cluster.network.open("far").unwrap();
    let told = names::ask(&asking, SocketAddr::from(([10, 96, 0, 10], 53)), "far.shop.svc.cluster.local");
    assert_eq!(told.unwrap(), (0, vec![Ipv4Addr::new(10, 97, 0, 1)]));

    cluster.start_control_plane().unwrap();
    let confirmed = || metric(&cluster, "cairn_xds_restored") == Some(0);
    assert!(within(SOON, confirmed), "{}", cluster.node(2).ztunnel.log());
    assert!(cluster.json(2, "/config_dump").unwrap()["restored"].is_null());
    cluster.talk("client", cluster.application("far")).unwrap().echo("by a tunnel").unwrap();
    assert!(cluster.talk("client", cluster.application("guarded")).is_err());
    cluster.talk("near", cluster.application("guarded")).unwrap().echo("allowed").unwrap();
}

/// A gauge of node 2's ztunnel.
fn metric(cluster: &Cluster, name: &str) -> Option<u64> {
    let metrics = cluster.metrics(2).ok()?;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    value.parse().ok()
}
