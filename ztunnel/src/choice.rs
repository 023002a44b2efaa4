//! What this process knows of endpoints that the mesh does not: how many connections each has from here, which has just
//! failed, and what DNS says of those that are known by name.

use cairn_mesh::{Chooser, Workload};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connections from here to each workload, by its uid.
#[derive(Default)]
pub struct Loads(Mutex<HashMap<Arc<str>, u64>>);

/// One connection to a workload; it counts until dropped.
pub struct Load {
    loads: Arc<Loads>,
    uid: Arc<str>,
}

impl Loads {
    /// Counts a connection to `workload`.
    pub fn begin(self: &Arc<Self>, workload: &Workload) -> Load {
        *self.0.lock().entry(Arc::clone(&workload.uid)).or_default() += 1;
        Load { loads: Arc::clone(self), uid: Arc::clone(&workload.uid) }
    }

    fn of(&self, workload: &Workload) -> u64 {
        self.0.lock().get(&workload.uid).copied().unwrap_or(0)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let mut loads = self.loads.0.lock();
        match loads.get_mut(&self.uid) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(loads.remove(&self.uid)),
        }
    }
}

/// How many names are kept.
const NAMES_MAX: usize = 4096;

/// How long what DNS said is believed; the system's resolver does not tell how long it may be. A failure is believed
/// for less.
const NAME_LIFETIME: Duration = Duration::from_secs(10);
const FAILURE_LIFETIME: Duration = Duration::from_secs(2);

/// How long DNS may take.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What DNS said of a name, and until when that is believed.
type Answer = (Instant, Arc<[IpAddr]>);

/// What DNS said of names of workloads.
#[derive(Default)]
pub struct Names(Mutex<HashMap<Arc<str>, Answer>>);

impl Names {
    /// The addresses of a name; none if there are none, or if DNS did not say in time. Asks the system's resolver unless
    /// it has just been asked.
    pub async fn resolve(&self, name: &Arc<str>) -> Arc<[IpAddr]> {
        if let Some((until, known)) = self.0.lock().get(name)
            && *until > Instant::now()
        {
            return Arc::clone(known);
        }
        let asked = tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((&**name, 0))).await;
        let found: Arc<[IpAddr]> = match asked {
            Ok(Ok(found)) => found.map(|address| address.ip().to_canonical()).collect(),
            Ok(Err(error)) => {
                tracing::debug!(hostname = %name, %error, "DNS knows no address");
                Arc::default()
            }
            Err(_) => {
                tracing::debug!(hostname = %name, "DNS took too long");
                Arc::default()
            }
        };
        let lifetime = if found.is_empty() { FAILURE_LIFETIME } else { NAME_LIFETIME };
        let mut names = self.0.lock();
        if names.len() >= NAMES_MAX {
            let now = Instant::now();
            names.retain(|_, (until, _)| *until > now);
        }
        if names.len() < NAMES_MAX {
            names.insert(Arc::clone(name), (Instant::now() + lifetime, Arc::clone(&found)));
        }
        found
    }
}

/// Chooses for one connection, in as many attempts as it takes.
pub struct Choice {
    loads: Arc<Loads>,
    tried: Vec<Arc<str>>,
    names: Vec<(Arc<str>, Arc<[IpAddr]>)>,
}

impl Choice {
    pub fn new(loads: &Arc<Loads>) -> Self {
        Self { loads: Arc::clone(loads), tried: Vec::new(), names: Vec::new() }
    }

    /// This workload has failed the connection. Returns whether it is the first time.
    pub fn failed(&mut self, workload: &Workload) -> bool {
        let is_new = !self.is_tried(workload);
        if is_new {
            self.tried.push(Arc::clone(&workload.uid));
        }
        is_new
    }

    /// What DNS says of a name.
    pub fn learn(&mut self, name: &Arc<str>, addresses: Arc<[IpAddr]>) {
        self.names.push((Arc::clone(name), addresses));
    }
}

impl Chooser for Choice {
    fn below(&mut self, bound: u64) -> u64 {
        fastrand::u64(..bound)
    }

    fn load(&self, workload: &Workload) -> Option<u64> {
        Some(self.loads.of(workload))
    }

    fn is_tried(&self, workload: &Workload) -> bool {
        self.tried.contains(&workload.uid)
    }

    fn addresses(&self, hostname: &str) -> Option<&[IpAddr]> {
        self.names.iter().find(|(name, _)| **name == *hostname).map(|(_, addresses)| &**addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::Identity;

    fn workload(uid: &str) -> Workload {
        Workload::new(uid, uid, Identity::new("td", "ns", "sa").unwrap())
    }

    #[test]
    fn a_connection_is_a_load_until_it_ends() {
        let loads = Arc::new(Loads::default());
        let (busy, idle) = (workload("busy"), workload("idle"));
        let held = [loads.begin(&busy), loads.begin(&busy)];
        let choice = Choice::new(&loads);
        assert_eq!((choice.load(&busy), choice.load(&idle)), (Some(2), Some(0)));
        drop(held);
        assert_eq!(choice.load(&busy), Some(0));
        assert!(loads.0.lock().is_empty());
    }

    #[tokio::test]
    async fn names_are_asked_for_once_in_a_while() {
        let names = Names::default();
        let found = names.resolve(&"localhost".into()).await;
        assert!(found.iter().all(IpAddr::is_loopback) && !found.is_empty(), "{found:?}");
        let again = names.resolve(&"localhost".into()).await;
        assert!(Arc::ptr_eq(&found, &again));
        assert!(names.resolve(&"x".repeat(300).into()).await.is_empty());
    }
}
