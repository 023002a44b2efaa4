//! What this process knows of endpoints that the mesh does not: how many connections each has from here, which has just
//! failed, and what DNS says of those that are known by name.

use cairn_mesh::{Chooser, Workload};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};

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

/// How many names are asked for at a time. The system's resolver holds a thread for each, and longer than we wait.
const LOOKUPS_MAX: usize = 16;

/// What DNS said of a name, and until when that is believed.
type Answer = (Instant, Arc<[IpAddr]>);

/// Where those who ask for a name wait for what DNS says.
type Waiting = watch::Receiver<Option<Arc<[IpAddr]>>>;

/// What DNS said of names of workloads.
pub struct Names(Arc<Asked>);

struct Asked {
    known: Mutex<HashMap<Arc<str>, Answer>>,
    /// The names that are being asked for: each once, however many wait, and until the resolver is done with it.
    waiting: Mutex<HashMap<Arc<str>, Waiting>>,
    lookups: Semaphore,
}

impl Default for Names {
    fn default() -> Self {
        let lookups = Semaphore::new(LOOKUPS_MAX);
        Self(Arc::new(Asked { known: Mutex::default(), waiting: Mutex::default(), lookups }))
    }
}

impl Names {
    /// The addresses of a name; none if there are none, or if DNS did not say in time. Asks the system's resolver unless
    /// it has just been asked.
    pub async fn resolve(&self, name: &Arc<str>) -> Arc<[IpAddr]> {
        if let Some((until, known)) = self.0.known.lock().get(name)
            && *until > Instant::now()
        {
            return Arc::clone(known);
        }
        let Some(mut waiting) = Asked::ask(&self.0, name) else { return Arc::default() };
        match tokio::time::timeout(RESOLVE_TIMEOUT, waiting.wait_for(Option::is_some)).await {
            Ok(Ok(found)) => found.clone().unwrap_or_default(),
            Ok(Err(_)) => Arc::default(),
            Err(_) => {
                tracing::debug!(hostname = %name, "DNS took too long");
                self.0.believe(name, &Arc::default());
                Arc::default()
            }
        }
    }
}

impl Asked {
    /// Has the name asked for; `None` if too many are already.
    fn ask(this: &Arc<Self>, name: &Arc<str>) -> Option<Waiting> {
        let mut all = this.waiting.lock();
        if let Some(waiting) = all.get(name) {
            return Some(waiting.clone());
        }
        if all.len() >= NAMES_MAX {
            return None;
        }
        let (tell, waiting) = watch::channel(None);
        all.insert(Arc::clone(name), waiting.clone());
        let (this, name) = (Arc::clone(this), Arc::clone(name));
        tokio::spawn(async move {
            let found = this.look_up(&name).await;
            this.believe(&name, &found);
            this.waiting.lock().remove(&name);
            // Nobody may wait any more.
            tell.send_replace(Some(found));
        });
        Some(waiting)
    }

    async fn look_up(&self, name: &str) -> Arc<[IpAddr]> {
        let Ok(_permit) = self.lookups.acquire().await else { return Arc::default() };
        match tokio::net::lookup_host((name, 0)).await {
            Ok(found) => found.map(|address| address.ip().to_canonical()).collect(),
            Err(error) => {
                tracing::debug!(hostname = %name, %error, "DNS knows no address");
                Arc::default()
            }
        }
    }

    fn believe(&self, name: &Arc<str>, found: &Arc<[IpAddr]>) {
        let lifetime = if found.is_empty() { FAILURE_LIFETIME } else { NAME_LIFETIME };
        let mut known = self.known.lock();
        if known.len() >= NAMES_MAX {
            let now = Instant::now();
            known.retain(|_, (until, _)| *until > now);
        }
        if known.len() < NAMES_MAX {
            known.insert(Arc::clone(name), (Instant::now() + lifetime, Arc::clone(found)));
        }
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
        let is_new = !self.has_failed(workload);
        if is_new {
            self.tried.push(Arc::clone(&workload.uid));
        }
        is_new
    }

    /// Whether this workload has failed the connection.
    pub fn has_failed(&self, workload: &Workload) -> bool {
        self.tried.contains(&workload.uid)
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

    fn is_tried(&self, workload: &Workload, _port: u16) -> bool {
        self.has_failed(workload)
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
        assert!(names.0.waiting.lock().is_empty());
        assert!(names.resolve(&"x".repeat(300).into()).await.is_empty());
    }

    #[tokio::test]
    async fn a_name_is_asked_for_once_however_many_wait() {
        let names = Names::default();
        let held = names.0.lookups.acquire_many(LOOKUPS_MAX as u32).await.unwrap();
        let name: Arc<str> = "localhost".into();
        let ask = || {
            let (names, name) = (Names(Arc::clone(&names.0)), Arc::clone(&name));
            tokio::spawn(async move { names.resolve(&name).await })
        };
        let asking = [ask(), ask(), ask()];
        tokio::task::yield_now().await;
        assert_eq!(names.0.waiting.lock().len(), 1);
        drop(held);
        let [one, two, three] = asking;
        let (one, two, three) = (one.await.unwrap(), two.await.unwrap(), three.await.unwrap());
        assert!(!one.is_empty() && Arc::ptr_eq(&one, &two) && Arc::ptr_eq(&two, &three));
    }
}
