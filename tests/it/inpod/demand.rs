//! Ztunnels that ask for workloads and services when they need them, rather than follow the whole mesh.

use super::{Cluster, SERVICE, SOON};
use crate::netns::{skipped, within};
use std::collections::BTreeSet;
use std::net::SocketAddr;

const ON_DEMAND: &[(&str, &str)] = &[("XDS_ON_DEMAND", "true"), ("ISTIO_META_DNS_CAPTURE", "false")];

#[test]
fn a_ztunnel_knows_what_its_pods_have_to_do_with() {
    if skipped() {
        return;
    }
    let mut cluster = Cluster::start_with(ON_DEMAND).unwrap();
    assert!(known(&cluster).is_empty(), "{:?}", known(&cluster));
    let outside = SocketAddr::from(([10, 77, 0, 1], 8080));
    assert!(cluster.call("client", outside).is_none(), "nobody is there");
    assert_eq!(known(&cluster), names(&["client"]), "what is not in the mesh is not there");
    for (to, way, expected) in [
        (cluster.application("near"), "direct", &["client", "near"][..]),
        (cluster.application("far"), "direct", &["client", "far", "near"]),
        (SERVICE, "waypoint", &["client", "far", "near", "waypoint"]),
        (cluster.application("outside-far"), "plain", &["client", "far", "near", "outside-far", "waypoint"]),
    ] {
        let mut talk = cluster.talk("client", to).unwrap();
        talk.echo("a question").unwrap();
        let source = talk.local();
        drop(talk);
        assert_eq!(cluster.record(1, source, "outbound")["way"], way, "{to}");
        assert_eq!(known(&cluster), names(expected), "{to}");
    }
    // Policies are all known, whoever calls.
    cluster.talk("near", cluster.application("guarded")).unwrap().echo("allowed").unwrap();
    for stranger in ["client", "outside-far"] {
        assert!(cluster.talk(stranger, cluster.application("guarded")).is_err(), "{stranger}");
    }

    // Without a control plane what is known goes on, and nothing else: it may be guarded.
    drop(cluster.programs.remove(0));
    cluster.talk("client", cluster.application("far")).unwrap().echo("known").unwrap();
    assert!(
        cluster.talk("client", cluster.application("outside-near")).is_err(),
        "not known, and yet let through"
    );
    cluster.start_control_plane().unwrap();
    let anew =
        || cluster.talk("client", cluster.application("outside-near")).and_then(|mut talk| talk.echo("anew"));
    assert!(within(SOON, || anew().is_ok()), "{:?}", anew());
    assert!(known(&cluster).contains("far"), "what is held stays");
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// The workloads that the ztunnel of node 1 knows.
fn known(cluster: &Cluster) -> BTreeSet<String> {
    let dump = cluster.json(1, "/config_dump").unwrap();
    let workloads = dump["workloads"].as_array().into_iter().flatten();
    workloads.filter_map(|workload| Some(workload["name"].as_str()?.to_owned())).collect()
}
