//! Inbound connections that are open now. Each is decided again whenever the mesh changes, policies and workloads
//! alike, and cut when it is no longer allowed.

use cairn_mesh::{Decision, DenyReason, Identity, L4Peer, L4Policies, Snapshot, l4_policies};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::oneshot;

/// The open inbound connections of this process.
#[derive(Default)]
pub struct Live {
    next: AtomicU64,
    /// By the workload's uid.
    to: Mutex<HashMap<Arc<str>, To>>,
}

/// The connections to one workload, whose current form decides.
#[derive(Default)]
struct To {
    /// What they were decided by, if all of them were by the same.
    decided_by: Option<Arc<L4Policies>>,
    open: HashMap<u64, Open>,
}

struct Open {
    identity: Option<Identity>,
    source: SocketAddr,
    destination: SocketAddr,
    cut: Option<oneshot::Sender<DenyReason>>,
}

/// One open connection; it leaves the register when dropped.
pub struct LiveGuard {
    live: Arc<Live>,
    workload: Arc<str>,
    id: u64,
    cut: oneshot::Receiver<DenyReason>,
}

impl LiveGuard {
    /// Resolves with the reason when the connection must end.
    pub async fn cut_reason(&mut self) -> String {
        match (&mut self.cut).await {
            Ok(reason) => reason.to_string(),
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for LiveGuard {
    fn drop(&mut self) {
        let mut all = self.live.to.lock();
        let Some(to) = all.get_mut(&self.workload) else { return };
        to.open.remove(&self.id);
        if to.open.is_empty() {
            all.remove(&self.workload);
        }
    }
}

/// Who is connected to whom.
pub struct Connected {
    /// The workload's uid.
    pub workload: Arc<str>,
    /// The peer's identity.
    pub identity: Option<Identity>,
    /// The peer's address.
    pub source: SocketAddr,
    /// The workload's address and port.
    pub destination: SocketAddr,
}

impl Live {
    /// Registers a connection that has been allowed.
    pub fn register(self: &Arc<Self>, connected: Connected) -> LiveGuard {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (cut, cut_received) = oneshot::channel();
        let Connected { workload, identity, source, destination } = connected;
        let mut all = self.to.lock();
        let to = all.entry(Arc::clone(&workload)).or_default();
        // Nobody knows by which policies this one was decided.
        to.decided_by = None;
        to.open.insert(id, Open { identity, source, destination, cut: Some(cut) });
        LiveGuard { live: Arc::clone(self), workload, id, cut: cut_received }
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.to.lock().values().map(|to| to.open.len()).sum()
    }

    /// Decides open connections again and cuts those no longer allowed; returns how many. Those to a workload for which
    /// neither itself nor any policy has changed are not looked at. Those to a workload that the mesh no longer knows are cut:
    /// nobody can say by which policies they would be allowed.
    pub fn recheck(&self, snapshot: &Snapshot) -> usize {
        let mut cut_count = 0;
        for (uid, to) in self.to.lock().iter_mut() {
            let Some(workload) = snapshot.workload(uid) else {
                let gone = to.open.values_mut().filter_map(|open| open.cut.take());
                cut_count += gone.filter_map(|cut| cut.send(DenyReason::UnknownWorkload).ok()).count();
                continue;
            };
            let policies = l4_policies(snapshot, workload);
            if to.decided_by.as_ref().is_some_and(|before| Arc::ptr_eq(before, &policies)) {
                continue;
            }
            for open in to.open.values_mut() {
                let peer = L4Peer {
                    identity: open.identity.as_ref(),
                    source: open.source,
                    destination: open.destination,
                };
                let Decision::Deny(reason) = policies.decide(&peer) else { continue };
                if let Some(cut) = open.cut.take() {
                    cut_count += usize::from(cut.send(reason).is_ok());
                }
            }
            to.decided_by = Some(policies);
        }
        cut_count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::{Authorization, Change, PolicyAction, ResourceName, Scope, Store, Workload};

    #[test]
    fn a_connection_is_cut_when_a_policy_no_longer_allows_it() {
        let identity = Identity::new("cluster.local", "a", "x").unwrap();
        let mut store = Store::new();
        store.apply([Change::Workload(Workload::new("w", "w", identity.clone()))]);
        let live = Arc::new(Live::default());
        let mut guard = live.register(Connected {
            workload: "w".into(),
            identity: Some(identity),
            source: "10.0.0.1:1000".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
        });
        assert_eq!(live.recheck(store.current()), 0);
        store.apply([Change::Authorization(Authorization {
            name: ResourceName::new("a", "nothing"),
            scope: Scope::Namespace,
            action: PolicyAction::Allow,
            rules: Vec::new(),
            dry_run: false,
        })]);
        assert_eq!(live.recheck(store.current()), 1);
        assert!(matches!(guard.cut.try_recv(), Ok(DenyReason::NotAllowed(_))));
        assert_eq!(live.recheck(store.current()), 0, "cut once");
        drop(guard);
        assert_eq!(live.len(), 0);
    }

    #[test]
    fn a_connection_to_a_workload_that_is_gone_is_cut() {
        let identity = Identity::new("cluster.local", "a", "x").unwrap();
        let mut store = Store::new();
        store.apply([Change::Workload(Workload::new("w", "w", identity))]);
        let live = Arc::new(Live::default());
        let mut guard = live.register(Connected {
            workload: "w".into(),
            identity: None,
            source: "10.0.0.1:1000".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
        });
        assert_eq!(live.recheck(store.current()), 0);
        assert_eq!(live.recheck(Store::new().current()), 1);
        assert_eq!(guard.cut.try_recv(), Ok(DenyReason::UnknownWorkload));
    }

    #[test]
    fn a_connection_is_cut_when_its_workload_comes_under_another_policy() {
        let identity = Identity::new("cluster.local", "a", "x").unwrap();
        let workload = |policies: &[&str]| Workload {
            authorization_policies: policies.iter().map(|name| ResourceName::new("a", *name)).collect(),
            ..Workload::new("w", "w", identity.clone())
        };
        let policy = |name: &str| Authorization {
            name: ResourceName::new("a", name),
            scope: Scope::WorkloadSelector,
            action: PolicyAction::Allow,
            rules: Vec::new(),
            dry_run: false,
        };
        let mut store = Store::new();
        store.apply([Change::Authorization(policy("nothing")), Change::Workload(workload(&[]))]);
        let live = Arc::new(Live::default());
        let connect = || {
            live.register(Connected {
                workload: "w".into(),
                identity: Some(identity.clone()),
                source: "10.0.0.1:1000".parse().unwrap(),
                destination: "10.0.0.2:80".parse().unwrap(),
            })
        };
        let (_first, _second) = (connect(), connect());
        assert_eq!(live.recheck(store.current()), 0);
        store.apply([Change::Workload(Workload::new("other", "other", identity.clone()))]);
        assert_eq!(live.recheck(store.current()), 0, "nothing of it has changed");
        store.apply([Change::Workload(workload(&["nothing"]))]);
        assert_eq!(live.recheck(store.current()), 2);
        // One that comes while nothing changes is decided at the next look all the same.
        let _late = connect();
        assert_eq!(live.recheck(store.current()), 1);
    }
}
