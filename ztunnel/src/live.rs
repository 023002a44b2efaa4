//! Inbound connections that are open now. Each is decided again whenever the mesh changes, policies and workloads
//! alike, and cut when it is no longer allowed.

use cairn_mesh::{Decision, DenyReason, Identity, L4Peer, Snapshot, decide};
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
    open: Mutex<HashMap<u64, Open>>,
}

struct Open {
    /// The workload that is connected to, by uid: its current form decides.
    workload: Arc<str>,
    identity: Option<Identity>,
    source: SocketAddr,
    destination: SocketAddr,
    cut: Option<oneshot::Sender<DenyReason>>,
}

/// One open connection; it leaves the register when dropped.
pub struct LiveGuard {
    live: Arc<Live>,
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
        self.live.open.lock().remove(&self.id);
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
        self.open.lock().insert(id, Open { workload, identity, source, destination, cut: Some(cut) });
        LiveGuard { live: Arc::clone(self), id, cut: cut_received }
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.open.lock().len()
    }

    /// Decides every open connection again and cuts those no longer allowed; returns how many. A workload that is
    /// gone ends with its sockets, not here.
    pub fn recheck(&self, snapshot: &Snapshot) -> usize {
        let mut cut_count = 0;
        for open in self.open.lock().values_mut() {
            let Some(workload) = snapshot.workload(&open.workload) else { continue };
            let peer = L4Peer {
                identity: open.identity.as_ref(),
                source: open.source,
                destination: open.destination,
            };
            let Decision::Deny(reason) = decide(snapshot, workload, &peer) else { continue };
            if let Some(cut) = open.cut.take() {
                cut_count += usize::from(cut.send(reason).is_ok());
            }
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
}
