//! Connections that are carried now, for operators.

use cairn_mesh::Workload;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One connection that is carried.
#[derive(Clone, Debug)]
pub struct Open {
    /// Into a pod of ours, or out of one.
    pub is_inbound: bool,
    /// The client.
    pub source: SocketAddr,
    /// Where the client wanted to.
    pub original: SocketAddr,
    /// Where the connection leads next.
    pub actual: SocketAddr,
    /// It comes or goes through a tunnel.
    pub is_tunnelled: bool,
    /// The pod of ours.
    pub workload: Option<Arc<Workload>>,
}

impl Open {
    /// Whether it is a connection of this pod.
    pub fn is_of(&self, namespace: &str, name: &str) -> bool {
        self.workload.as_ref().is_some_and(|own| *own.namespace == *namespace && *own.name == *name)
    }
}

/// The connections of this process.
#[derive(Default)]
pub struct OpenConnections {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Open>>,
}

/// A connection that is listed while this lives.
pub struct Listed {
    connections: Arc<OpenConnections>,
    id: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.connections.open.lock().remove(&self.id);
    }
}

impl OpenConnections {
    /// Lists a connection.
    pub fn add(self: &Arc<Self>, open: Open) -> Listed {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.lock().insert(id, open);
        Listed { connections: Arc::clone(self), id }
    }

    /// How many there are out of pods, and into them.
    pub fn counts(&self) -> (usize, usize) {
        let open = self.open.lock();
        let inbound = open.values().filter(|open| open.is_inbound).count();
        (open.len() - inbound, inbound)
    }

    /// All of them, the oldest first.
    pub fn list(&self) -> Vec<Open> {
        let mut open: Vec<(u64, Open)> =
            self.open.lock().iter().map(|(id, open)| (*id, open.clone())).collect();
        open.sort_by_key(|(id, _)| *id);
        open.into_iter().map(|(_, open)| open).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_listed_while_it_is_carried() {
        let connections = Arc::new(OpenConnections::default());
        let at = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let open = |port| Open {
            is_inbound: true,
            source: at(port),
            original: at(80),
            actual: at(8080),
            is_tunnelled: false,
            workload: None,
        };
        let (first, second) = (connections.add(open(1)), connections.add(open(2)));
        let ports = || connections.list().iter().map(|open| open.source.port()).collect::<Vec<_>>();
        assert_eq!(ports(), [1, 2]);
        assert_eq!(connections.counts(), (0, 2));
        drop(first);
        assert_eq!(ports(), [2]);
        drop(second);
        assert!(ports().is_empty());
    }
}
