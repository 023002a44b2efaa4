//! All certificates of a proxy: fetched when first wanted, renewed at half their life, one fetch at a time for each.

use crate::{ChainError, IssueError, Issuer, Trust, WorkloadCertificate};
use cairn_mesh::Identity;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How certificates are fetched and kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateSettings {
    /// The life to ask for. Default: a day.
    pub ttl: Duration,
    /// How long [`Certificates::get`] waits. Default: 10 s.
    pub wait: Duration,
    /// The pause after a first failure; it doubles with each further one. Also the least time between two fetches of
    /// one identity, whatever life the CA gives. Default: 1 s.
    pub retry_min: Duration,
    /// The longest pause between failures. Default: 150 s.
    pub retry_max: Duration,
    /// How many fetches run at once. Default: 8.
    pub fetches_max: usize,
    /// How many identities are kept. Default: 1,024.
    pub identities_max: usize,
}

impl Default for CertificateSettings {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 60 * 60),
            wait: Duration::from_secs(10),
            retry_min: Duration::from_secs(1),
            retry_max: Duration::from_secs(150),
            fetches_max: 8,
            identities_max: 1024,
        }
    }
}

/// Why there is no certificate now.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// The last attempt failed; the next one will come later.
    #[error("no certificate for {identity}")]
    Issue {
        /// Whose.
        identity: Identity,
        /// Why.
        #[source]
        source: Arc<IssueError>,
    },
    /// It did not come in time; it may still come.
    #[error("no certificate for {identity} within {waited:?}")]
    Timeout {
        /// Whose.
        identity: Identity,
        /// How long we waited.
        waited: Duration,
    },
    /// Too many identities are kept already.
    #[error("no room for {identity}: {maximum} identities are kept")]
    Full {
        /// Whose.
        identity: Identity,
        /// The bound.
        maximum: usize,
    },
    /// Nobody wants it any more.
    #[error("{identity} was forgotten")]
    Forgotten {
        /// Whose.
        identity: Identity,
    },
}

/// How it stands with a certificate.
#[derive(Clone, Debug)]
pub enum CertificateState {
    /// There is a valid one.
    Available(Arc<WorkloadCertificate>),
    /// There is none yet.
    Initializing,
    /// There is none, and this is why.
    Unavailable(String),
}

/// The certificates of a proxy. [`Certificates::renew`] must run for any to be fetched.
pub struct Certificates {
    issuer: Arc<dyn Issuer>,
    settings: CertificateSettings,
    trust: Arc<Trust>,
    entries: Mutex<HashMap<Identity, Entry>>,
    /// Something became due earlier than `renew` knows.
    wake: Notify,
}

struct Entry {
    current: Option<Arc<WorkloadCertificate>>,
    /// Attempts that failed since the last success.
    failures: u32,
    error: Option<Arc<IssueError>>,
    /// When to fetch; `None` while a fetch runs.
    due: Option<Instant>,
    /// Somebody waits for it.
    is_awaited: bool,
    /// Ticks when a fetch has ended, either way.
    ended: watch::Sender<()>,
}

impl Entry {
    fn new() -> Self {
        Self {
            current: None,
            failures: 0,
            error: None,
            due: Some(Instant::now()),
            is_awaited: false,
            ended: watch::Sender::new(()),
        }
    }

    fn valid(&self) -> Option<Arc<WorkloadCertificate>> {
        self.current.as_ref().filter(|certificate| certificate.is_valid(SystemTime::now())).cloned()
    }
}

impl Certificates {
    /// None yet. Peers will be believed as the roots that come with each certificate say.
    pub fn new(issuer: Arc<dyn Issuer>, settings: CertificateSettings) -> Arc<Self> {
        Self::with_trust(issuer, settings, Arc::default())
    }

    /// None yet. Peers will be believed as those roots and `trust` say.
    pub fn with_trust(
        issuer: Arc<dyn Issuer>,
        settings: CertificateSettings,
        trust: Arc<Trust>,
    ) -> Arc<Self> {
        Arc::new(Self { issuer, settings, trust, entries: Mutex::default(), wake: Notify::new() })
    }

    /// What peers are believed by beside roots.
    pub fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// The valid certificate of `identity`, if there is one. Never waits and fetches nothing.
    pub fn current(&self, identity: &Identity) -> Option<Arc<WorkloadCertificate>> {
        self.entries.lock().get(identity)?.valid()
    }

    /// The valid certificates, in no order.
    pub fn list(&self) -> Vec<Arc<WorkloadCertificate>> {
        self.entries.lock().values().filter_map(Entry::valid).collect()
    }

    /// Whose certificates are kept or wanted, in no order.
    pub fn identities(&self) -> Vec<Identity> {
        self.entries.lock().keys().cloned().collect()
    }

    /// How it stands with each certificate, in no order.
    pub fn states(&self) -> Vec<(Identity, CertificateState)> {
        let entries = self.entries.lock();
        let states = entries.iter().map(|(identity, entry)| {
            let state = match (entry.valid(), &entry.error) {
                (Some(certificate), _) => CertificateState::Available(certificate),
                (None, Some(error)) => CertificateState::Unavailable(Chain(&**error).to_string()),
                (None, None) => CertificateState::Initializing,
            };
            (identity.clone(), state)
        });
        states.collect()
    }

    /// Has the certificate of `identity` fetched, and renewed from then on, without waiting for it.
    ///
    /// # Errors
    /// When there is no room for one more.
    pub fn prefetch(&self, identity: &Identity) -> Result<(), CertificateError> {
        let mut entries = self.entries.lock();
        if !entries.contains_key(identity) {
            self.insert(&mut entries, identity)?;
        }
        Ok(())
    }

    /// The valid certificate of `identity`, waiting for it if needed. Any runtime may call this.
    ///
    /// # Errors
    /// When the CA does not give one in time.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let deadline = Instant::now() + self.settings.wait;
        let ended = {
            let mut entries = self.entries.lock();
            match entries.get_mut(identity) {
                None => {
                    let ended = self.insert(&mut entries, identity)?;
                    if let Some(entry) = entries.get_mut(identity) {
                        entry.is_awaited = true;
                    }
                    ended
                }
                Some(entry) => {
                    if let Some(certificate) = entry.valid() {
                        return Ok(certificate);
                    }
                    match (entry.due, &entry.error) {
                        (Some(due), Some(error)) if due > deadline => {
                            let source = Arc::clone(error);
                            return Err(CertificateError::Issue { identity: identity.clone(), source });
                        }
                        // Expired before its renewal was due: the clock has jumped.
                        (Some(due), None) if entry.current.is_some() => {
                            entry.due = Some(due.min(Instant::now()));
                            self.wake.notify_one();
                        }
                        _ => {}
                    }
                    entry.is_awaited = true;
                    entry.ended.subscribe()
                }
            }
        };
        self.wait(identity, ended, deadline).await
    }

    async fn wait(
        &self,
        identity: &Identity,
        mut ended: watch::Receiver<()>,
        deadline: Instant,
    ) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let identity = identity.clone();
        match tokio::time::timeout_at(deadline, ended.changed()).await {
            Err(_) => Err(CertificateError::Timeout { identity, waited: self.settings.wait }),
            Ok(Err(_)) => Err(CertificateError::Forgotten { identity }),
            Ok(Ok(())) => {
                let entries = self.entries.lock();
                let Some(entry) = entries.get(&identity) else {
                    return Err(CertificateError::Forgotten { identity });
                };
                match (entry.valid(), &entry.error) {
                    (Some(certificate), _) => Ok(certificate),
                    (None, Some(error)) => {
                        Err(CertificateError::Issue { source: Arc::clone(error), identity })
                    }
                    (None, None) => Err(CertificateError::Timeout { identity, waited: self.settings.wait }),
                }
            }
        }
    }

    /// Stops renewing the certificate of `identity` and drops it. Tunnels that use it live on.
    pub fn forget(&self, identity: &Identity) {
        self.entries.lock().remove(identity);
    }

    fn insert(
        &self,
        entries: &mut HashMap<Identity, Entry>,
        identity: &Identity,
    ) -> Result<watch::Receiver<()>, CertificateError> {
        let maximum = self.settings.identities_max;
        if entries.len() >= maximum {
            return Err(CertificateError::Full { identity: identity.clone(), maximum });
        }
        let entry = Entry::new();
        let ended = entry.ended.subscribe();
        entries.insert(identity.clone(), entry);
        self.wake.notify_one();
        Ok(ended)
    }

    /// Fetches and renews for ever. One task of the binary's control runtime runs this; dropping the future stops all
    /// fetches, and running it anew takes them up again.
    pub async fn renew(self: Arc<Self>) {
        let mut fetches = JoinSet::new();
        for entry in self.entries.lock().values_mut() {
            entry.due.get_or_insert_with(Instant::now);
        }
        loop {
            let (due, next) = self.take_due(self.settings.fetches_max.saturating_sub(fetches.len()));
            for identity in due {
                let this = Arc::clone(&self);
                fetches.spawn(async move {
                    let (issuer, ttl, trust) = (&*this.issuer, this.settings.ttl, Arc::clone(&this.trust));
                    let result = WorkloadCertificate::request_with(issuer, &identity, ttl, trust).await;
                    this.fetched(&identity, result);
                });
            }
            let room = fetches.len() < self.settings.fetches_max;
            let at_next = async {
                match next {
                    Some(next) if room => tokio::time::sleep_until(next).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.wake.notified() => {}
                () = at_next => {}
                Some(ended) = fetches.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "fetching a certificate ended badly");
                    }
                }
            }
        }
    }

    /// Takes at most `room` identities that are due, those that somebody waits for first, then those without a certificate;
    /// and when the next is due.
    fn take_due(&self, room: usize) -> (Vec<Identity>, Option<Instant>) {
        let now = Instant::now();
        let mut entries = self.entries.lock();
        let mut due: Vec<(bool, bool, Instant, Identity)> = entries
            .iter()
            .filter_map(|(identity, entry)| {
                let at = entry.due.filter(|at| *at <= now)?;
                Some((!entry.is_awaited, entry.current.is_some(), at, identity.clone()))
            })
            .collect();
        due.sort();
        due.truncate(room);
        for (_, _, _, identity) in &due {
            if let Some(entry) = entries.get_mut(identity) {
                entry.due = None;
            }
        }
        let next = entries.values().filter_map(|entry| entry.due).min();
        (due.into_iter().map(|(_, _, _, identity)| identity).collect(), next)
    }

    fn fetched(&self, identity: &Identity, result: Result<WorkloadCertificate, IssueError>) {
        let mut entries = self.entries.lock();
        // Forgotten meanwhile.
        let Some(entry) = entries.get_mut(identity) else { return };
        let result = result.and_then(|certificate| {
            let valid = certificate.is_valid(SystemTime::now());
            if valid { Ok(certificate) } else { Err(IssueError::Chain(ChainError::NotValidNow)) }
        });
        let pause = match result {
            Ok(certificate) => {
                let pause = until_half_life(&certificate, SystemTime::now()).max(self.settings.retry_min);
                tracing::info!(%identity, serial = certificate.serial, "certificate issued");
                entry.current = Some(Arc::new(certificate));
                entry.failures = 0;
                entry.error = None;
                pause
            }
            Err(error) => {
                let pause = self.back_off(entry.failures);
                tracing::warn!(%identity, error = %Chain(&error), ?pause, "certificate not issued");
                entry.failures = entry.failures.saturating_add(1);
                entry.error = Some(Arc::new(error));
                pause
            }
        };
        entry.due = Some(Instant::now() + pause);
        entry.is_awaited = false;
        entry.ended.send_replace(());
    }

    /// The pause after one more failure: doubling, and 20 % to either side so that proxies spread out.
    fn back_off(&self, failures: u32) -> Duration {
        let doubled = self.settings.retry_min.saturating_mul(1 << failures.min(16));
        doubled.min(self.settings.retry_max).mul_f64(0.8 + 0.4 * fastrand::f64())
    }
}

/// An error and what caused it, on one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

fn until_half_life(certificate: &WorkloadCertificate, now: SystemTime) -> Duration {
    let life = certificate.not_after.duration_since(certificate.not_before).unwrap_or_default();
    (certificate.not_before + life / 2).duration_since(now).unwrap_or_default()
}

#[cfg(test)]
#[path = "certificates/tests.rs"]
mod tests;
