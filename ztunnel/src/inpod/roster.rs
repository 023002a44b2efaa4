//! The pods that istio-cni has named: who is to be served, who is, and who no longer. It starts and stops nothing
//! itself.

use super::message::{Fault, PodName};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The pods named; `N` tells network namespaces apart.
#[derive(Debug)]
pub struct Roster<N> {
    pods: BTreeMap<Arc<str>, Listed<N>>,
    /// Every pod has been named on this connection.
    is_complete: bool,
}

/// A pod on the roster.
#[derive(Clone, Debug)]
pub struct Listed<N> {
    /// Its name.
    pub name: PodName,
    /// Its network namespace.
    pub namespace: N,
    /// It is served; otherwise it is still to be.
    pub is_served: bool,
    /// It was named on this connection.
    is_named: bool,
}

/// What an Add asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// Nothing: it is served.
    Same,
    /// To serve it.
    Start,
    /// To serve it in place of what was there under its uid.
    Replace,
}

impl<N: PartialEq + Clone> Roster<N> {
    /// Nobody is on it, and nobody has said that this is all.
    pub fn new() -> Self {
        Self { pods: BTreeMap::new(), is_complete: false }
    }

    /// A connection begins. Who is served remains so; who could not be is forgotten, for they will be named anew.
    pub fn connected(&mut self) {
        self.is_complete = false;
        self.pods.retain(|_, pod| pod.is_served);
        for pod in self.pods.values_mut() {
            pod.is_named = false;
        }
    }

    /// The connection is over: until the next one has named all pods, who knows.
    pub fn disconnected(&mut self) {
        self.is_complete = false;
    }

    /// A pod has joined, or is named again.
    pub fn add(&mut self, uid: &Arc<str>, name: PodName, namespace: N) -> Added {
        if let Some(known) = self.pods.get_mut(uid)
            && known.is_served
            && known.namespace == namespace
        {
            known.is_named = true;
            return Added::Same;
        }
        let pod = Listed { name, namespace, is_served: false, is_named: true };
        match self.pods.insert(Arc::clone(uid), pod) {
            Some(replaced) if replaced.is_served => Added::Replace,
            _ => Added::Start,
        }
    }

    /// It is served now.
    pub fn started(&mut self, uid: &str) {
        if let Some(pod) = self.pods.get_mut(uid) {
            pod.is_served = true;
        }
    }

    /// A pod remains as it is. Returns whether it is known.
    ///
    /// # Errors
    /// When all pods have been named already.
    pub fn keep(&mut self, uid: &str) -> Result<bool, Fault> {
        if self.is_complete {
            return Err(Fault::Process("KeepWorkload after SnapshotSent"));
        }
        let known = self.pods.get_mut(uid);
        Ok(known.map(|pod| pod.is_named = true).is_some())
    }

    /// A pod has left. Returns whether to stop serving it now; before all pods have been named that is left to the end
    /// of them, when it counts who was named.
    pub fn delete(&mut self, uid: &str) -> bool {
        if !self.is_complete
            && let Some(pod) = self.pods.get_mut(uid)
            && pod.is_served
        {
            pod.is_named = false;
            return false;
        }
        self.pods.remove(uid).is_some_and(|pod| pod.is_served)
    }

    /// All pods have been named. Returns those that are not to be served any more.
    ///
    /// # Errors
    /// When it was said before.
    pub fn snapshot_sent(&mut self) -> Result<Vec<Arc<str>>, Fault> {
        if self.is_complete {
            return Err(Fault::Process("a second SnapshotSent"));
        }
        self.is_complete = true;
        let (named, gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.pods).into_iter().partition(|(_, pod)| pod.is_named);
        self.pods = named;
        Ok(gone.into_keys().collect())
    }

    /// Who is still to be served.
    pub fn pending(&self) -> Vec<(Arc<str>, Listed<N>)> {
        let pending = self.pods.iter().filter(|(_, pod)| !pod.is_served);
        pending.map(|(uid, pod)| (Arc::clone(uid), pod.clone())).collect()
    }

    /// Everyone, by uid.
    pub fn pods(&self) -> impl Iterator<Item = (&Arc<str>, &Listed<N>)> {
        self.pods.iter()
    }

    /// All pods have been named, and all are served.
    pub fn is_whole(&self) -> bool {
        self.is_complete && self.pods.values().all(|pod| pod.is_served)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happens: a pod's uid, its namespace, whether listeners can be had.
    enum Step {
        Connect,
        Disconnect,
        Add(&'static str, u8, bool),
        Retry(bool),
        Keep(&'static str),
        Delete(&'static str),
        Snapshot,
    }
    use Step::{Add, Connect, Delete, Disconnect, Keep, Retry, Snapshot};

    fn name() -> PodName {
        PodName { name: "web".into(), namespace: "a".into(), service_account: "x".into() }
    }

    /// Plays the steps, starting what is to be started, and says what each did.
    fn play(roster: &mut Roster<u8>, step: &Step) -> String {
        match step {
            Connect => {
                roster.connected();
                String::new()
            }
            Disconnect => {
                roster.disconnected();
                String::new()
            }
            Add(uid, namespace, works) => {
                let uid: Arc<str> = (*uid).into();
                let added = roster.add(&uid, name(), *namespace);
                if added != Added::Same && *works {
                    roster.started(&uid);
                }
                format!("{added:?}")
            }
            Retry(works) => {
                let pending = roster.pending();
                let uids: Vec<&str> = pending.iter().map(|(uid, _)| &**uid).collect();
                let told = uids.join(",");
                for (uid, _) in pending.iter().filter(|_| *works) {
                    roster.started(uid);
                }
                told
            }
            Keep(uid) => roster.keep(uid).map_or_else(|fault| fault.to_string(), |known| known.to_string()),
            Delete(uid) => if roster.delete(uid) { "stop" } else { "" }.to_owned(),
            Snapshot => roster.snapshot_sent().map_or_else(|fault| fault.to_string(), |gone| gone.join(",")),
        }
    }

    /// Each row: what it shows; the steps and what each does; who is served at the end; whether all is well.
    #[test]
    fn pods_are_served_as_istio_cni_names_them() {
        type Row = (&'static str, Vec<(Step, &'static str)>, &'static str, bool);
        let rows: Vec<Row> = vec![
            (
                "an add starts the pod",
                vec![(Connect, ""), (Add("1", 1, true), "Start"), (Snapshot, "")],
                "1",
                true,
            ),
            (
                "an add is idempotent",
                vec![
                    (Connect, ""),
                    (Add("1", 1, true), "Start"),
                    (Add("1", 1, true), "Same"),
                    (Snapshot, ""),
                ],
                "1",
                true,
            ),
            (
                "an add that fails is tried again",
                vec![
                    (Connect, ""),
                    (Add("1", 1, false), "Start"),
                    (Snapshot, ""),
                    (Retry(false), "1"),
                    (Retry(true), "1"),
                    (Retry(true), ""),
                ],
                "1",
                true,
            ),
            (
                "an add that fails keeps the proxy unready",
                vec![(Connect, ""), (Add("1", 1, false), "Start"), (Snapshot, "")],
                "",
                false,
            ),
            (
                "an add that fails and is deleted is not tried again",
                vec![
                    (Connect, ""),
                    (Add("1", 1, false), "Start"),
                    (Snapshot, ""),
                    (Delete("1"), ""),
                    (Retry(true), ""),
                ],
                "",
                true,
            ),
            (
                "an add that fails and is deleted before the snapshot is not tried again",
                vec![
                    (Connect, ""),
                    (Add("1", 1, false), "Start"),
                    (Delete("1"), ""),
                    (Snapshot, ""),
                    (Retry(true), ""),
                ],
                "",
                true,
            ),
            (
                "a delete before the snapshot counts at the snapshot",
                vec![(Connect, ""), (Add("1", 1, true), "Start"), (Delete("1"), ""), (Snapshot, "1")],
                "",
                true,
            ),
            (
                "add, delete, add",
                vec![
                    (Connect, ""),
                    (Snapshot, ""),
                    (Add("1", 1, true), "Start"),
                    (Delete("1"), "stop"),
                    (Add("1", 1, true), "Start"),
                ],
                "1",
                true,
            ),
            (
                "add, delete, add before the snapshot keeps it",
                vec![
                    (Connect, ""),
                    (Add("1", 1, true), "Start"),
                    (Delete("1"), ""),
                    (Add("1", 1, true), "Same"),
                    (Snapshot, ""),
                ],
                "1",
                true,
            ),
            (
                "a pod that is kept outlives a new snapshot",
                vec![
                    (Connect, ""),
                    (Add("1", 1, true), "Start"),
                    (Add("2", 2, true), "Start"),
                    (Snapshot, ""),
                    (Disconnect, ""),
                    (Connect, ""),
                    (Keep("1"), "true"),
                    (Keep("3"), "false"),
                    (Snapshot, "2"),
                ],
                "1",
                true,
            ),
            (
                "another namespace replaces the pod",
                vec![
                    (Connect, ""),
                    (Add("1", 1, true), "Start"),
                    (Snapshot, ""),
                    (Add("1", 2, true), "Replace"),
                ],
                "1",
                true,
            ),
            (
                "what a lost connection named is served on, and it is not known whether that is all",
                vec![(Connect, ""), (Add("1", 1, true), "Start"), (Snapshot, ""), (Disconnect, "")],
                "1",
                false,
            ),
            (
                "what could not be served is forgotten with its connection",
                vec![
                    (Connect, ""),
                    (Add("1", 1, false), "Start"),
                    (Disconnect, ""),
                    (Connect, ""),
                    (Snapshot, ""),
                ],
                "",
                true,
            ),
            (
                "a pod that a new snapshot does not name is stopped",
                vec![
                    (Connect, ""),
                    (Add("1", 1, true), "Start"),
                    (Add("2", 2, true), "Start"),
                    (Snapshot, ""),
                    (Connect, ""),
                    (Add("2", 2, true), "Same"),
                    (Snapshot, "1"),
                ],
                "2",
                true,
            ),
            (
                "before the snapshot it is not known whether that is all",
                vec![(Connect, ""), (Add("1", 1, true), "Start")],
                "1",
                false,
            ),
            (
                "nothing is kept after the snapshot",
                vec![
                    (Connect, ""),
                    (Snapshot, ""),
                    (Keep("1"), "failure to process message: KeepWorkload after SnapshotSent"),
                    (Snapshot, "failure to process message: a second SnapshotSent"),
                ],
                "",
                true,
            ),
            (
                "an unknown pod can be deleted",
                vec![(Connect, ""), (Snapshot, ""), (Delete("1"), "")],
                "",
                true,
            ),
        ];
        for (name, steps, served, is_whole) in rows {
            let mut roster = Roster::new();
            for (number, (step, expected)) in steps.iter().enumerate() {
                assert_eq!(play(&mut roster, step), *expected, "{name}: step {number}");
            }
            let found: Vec<&str> =
                roster.pods().filter(|(_, pod)| pod.is_served).map(|(uid, _)| &**uid).collect();
            assert_eq!((found.join(",").as_str(), roster.is_whole()), (served, is_whole), "{name}");
        }
    }
}
