//! Certificates that their issuers have taken back: the lists of a file (CRL, RFC 5280 §5), read again when it changes.
//!
//! A handshake is refused by the lists as they are then. A connection that is open is looked at again with each change
//! ([`PeerWatch`]), and so is one whose session was resumed, since a resumed handshake proves nothing anew.

use crate::verify::{Peer, Verification};
use parking_lot::{Mutex, RwLock};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::parse_x509_certificate;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

/// How often the file is looked at. A certificate that is taken back ends connections within a second.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The largest file that is read: some hundred thousand certificates.
const BYTES_MAX: u64 = 16 << 20;

/// The most lists of one file.
const LISTS_MAX: usize = 256;

/// Why a file of lists is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RevocationError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is larger than what is read.
    #[error("{path} is larger than {BYTES_MAX} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is not PEM.
    #[error("{path} is not PEM")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// It holds something, and no list.
    #[error("{path} holds no certificate revocation list")]
    NoList {
        /// The file.
        path: PathBuf,
    },
    /// It holds more lists than are kept.
    #[error("{path} holds more than {LISTS_MAX} lists")]
    TooMany {
        /// The file.
        path: PathBuf,
    },
    /// One of the lists cannot be used: it is damaged, or of a kind that says only in part what is revoked.
    #[error("list {number} of {path} cannot be used: {reason}")]
    List {
        /// The file.
        path: PathBuf,
        /// Which of its lists, from 1.
        number: usize,
        /// Why.
        reason: String,
    },
}

/// What operators are told of the lists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RevocationCounts {
    /// Lists in force.
    pub lists: usize,
    /// Certificates that they name.
    pub certificates: usize,
    /// Lists in force whose issuer has promised a newer one by now.
    pub overdue: usize,
    /// Times that the file could not be taken; the lists before it stayed in force.
    pub failures: u64,
    /// Peers that connected to us and were refused, or cut, for their certificates.
    pub clients_refused: u64,
    /// Peers that we connected to, and the same.
    pub servers_refused: u64,
}

/// The lists of one file, shared by all certificates of a process.
pub struct Revocations {
    path: PathBuf,
    /// The file that was looked at last.
    known: Mutex<Option<Stamp>>,
    lists: RwLock<Arc<Lists>>,
    /// Ticks with each new set of lists.
    changes: watch::Sender<u64>,
    failures: AtomicU64,
    clients_refused: AtomicU64,
    servers_refused: AtomicU64,
}

impl Revocations {
    /// Reads the file. One that does not exist yet, or is empty, revokes nothing: Kubernetes mounts it when there is one.
    ///
    /// # Errors
    /// When it is there and cannot be taken. Whoever starts must not go on then: nothing tells him who is revoked.
    pub fn open(path: impl Into<PathBuf>) -> Result<Arc<Self>, RevocationError> {
        let path = path.into();
        let known = Mutex::new(Stamp::of(&path));
        let lists = match Lists::read(&path) {
            Err(RevocationError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), "there is no list of revoked certificates yet");
                Lists::default()
            }
            read => read?,
        };
        lists.tell(&path);
        Ok(Arc::new(Self {
            path,
            known,
            lists: RwLock::new(Arc::new(lists)),
            changes: watch::Sender::new(0),
            failures: AtomicU64::new(0),
            clients_refused: AtomicU64::new(0),
            servers_refused: AtomicU64::new(0),
        }))
    }

    /// Takes the file's changes over for ever. While it cannot be taken, the last lists stay in force. A file that is
    /// gone changes nothing: who removes it has not given back any certificate.
    pub async fn follow(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            // Another thread looks and reads: a file system may be slow.
            let this = Arc::clone(&self);
            if let Err(error) = tokio::task::spawn_blocking(move || this.look()).await {
                tracing::error!(%error, "looking at the list of revoked certificates ended badly");
            }
        }
    }

    /// Reads the file if it is another than the last.
    fn look(&self) {
        // Taken before the file is read: what is written meanwhile is seen next time.
        let stamp = Stamp::of(&self.path);
        if stamp.is_none() || std::mem::replace(&mut *self.known.lock(), stamp) == stamp {
            return;
        }
        match Lists::read(&self.path) {
            Ok(lists) => {
                lists.tell(&self.path);
                *self.lists.write() = Arc::new(lists);
                self.changes.send_modify(|count| *count += 1);
            }
            Err(error) => {
                self.failures.fetch_add(1, Relaxed);
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    error,
                    "revoked certificates cannot be read; those known before stay revoked"
                );
            }
        }
    }

    /// What operators are told.
    pub fn counts(&self) -> RevocationCounts {
        let lists = self.lists();
        let now = SystemTime::now();
        RevocationCounts {
            lists: lists.each.len(),
            certificates: lists.each.iter().map(|list| list.count).sum(),
            overdue: lists.each.iter().filter(|list| list.is_overdue(now)).count(),
            failures: self.failures.load(Relaxed),
            clients_refused: self.clients_refused.load(Relaxed),
            servers_refused: self.servers_refused.load(Relaxed),
        }
    }

    pub(crate) fn lists(&self) -> Arc<Lists> {
        Arc::clone(&self.lists.read())
    }

    pub(crate) fn count_refused(&self, peer: Peer) {
        let count = match peer {
            Peer::Client => &self.clients_refused,
            Peer::Server => &self.servers_refused,
        };
        count.fetch_add(1, Relaxed);
    }
}

impl std::fmt::Debug for Revocations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Revocations").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Which file lies at a path, and when it was written; links are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    file: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let of = std::fs::metadata(path).ok()?;
        Some(Self {
            device: of.dev(),
            file: of.ino(),
            bytes: of.len(),
            modified: (of.mtime(), of.mtime_nsec()),
            changed: (of.ctime(), of.ctime_nsec()),
        })
    }
}

/// The lists of a file.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    each: Vec<List>,
    /// The same as the verifier of chains wants them, which asks only one list of each issuer: in the first round each
    /// issuer's first list, in the second their second, and so on. Nearly always there is one.
    rounds: Vec<Vec<CertRevocationList<'static>>>,
}

/// What is known of one list.
#[derive(Debug)]
struct List {
    /// The issuer's name in DER.
    issuer: Vec<u8>,
    /// Where it stands: in which round, and where in that.
    round: usize,
    place: usize,
    count: usize,
    next_update: Option<SystemTime>,
}

impl Lists {
    fn read(path: &Path) -> Result<Self, RevocationError> {
        let failed = |source| RevocationError::File { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        File::open(path).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes)).map_err(failed)?;
        if bytes.len() as u64 > BYTES_MAX {
            return Err(RevocationError::TooLarge { path: path.to_owned() });
        }
        Self::parse(path, bytes)
    }

    /// One list in DER, or any number in PEM.
    fn parse(path: &Path, bytes: Vec<u8>) -> Result<Self, RevocationError> {
        if bytes.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        // A list in DER is a SEQUENCE.
        let encoded: Vec<CertificateRevocationListDer<'static>> = if bytes.first() == Some(&0x30) {
            vec![bytes.into()]
        } else {
            let read = CertificateRevocationListDer::pem_slice_iter(&bytes).collect::<Result<_, _>>();
            read.map_err(|source| RevocationError::Pem { path: path.to_owned(), source })?
        };
        if encoded.is_empty() {
            return Err(RevocationError::NoList { path: path.to_owned() });
        }
        if encoded.len() > LISTS_MAX {
            return Err(RevocationError::TooMany { path: path.to_owned() });
        }
        let mut lists = Self::default();
        for (index, list) in encoded.iter().enumerate() {
            lists.add(list).map_err(|reason| RevocationError::List {
                path: path.to_owned(),
                number: index + 1,
                reason,
            })?;
        }
        Ok(lists)
    }

    fn add(&mut self, encoded: &[u8]) -> Result<(), String> {
        let (rest, parsed) =
            CertificateRevocationList::from_der(encoded).map_err(|error| error.to_string())?;
        if !rest.is_empty() {
            return Err("something follows it".to_owned());
        }
        let list = OwnedCertRevocationList::from_der(encoded).map_err(|error| format!("{error:?}"))?;
        let issuer = parsed.issuer().as_raw();
        let round = self.each.iter().filter(|other| other.issuer == issuer).count();
        if self.rounds.len() <= round {
            self.rounds.push(Vec::new());
        }
        let Some(of_round) = self.rounds.get_mut(round) else { return Err("there is no place".to_owned()) };
        self.each.push(List {
            issuer: issuer.to_vec(),
            round,
            place: of_round.len(),
            count: parsed.iter_revoked_certificates().count(),
            next_update: parsed.next_update().map(|at| {
                let since = Duration::from_secs(at.timestamp().unsigned_abs());
                if at.timestamp() < 0 { UNIX_EPOCH - since } else { UNIX_EPOCH + since }
            }),
        });
        of_round.push(list.into());
        Ok(())
    }

    /// Says what is in force now.
    fn tell(&self, path: &Path) {
        let path = path.display();
        let certificates: usize = self.each.iter().map(|list| list.count).sum();
        tracing::info!(%path, lists = self.each.len(), certificates, "revoked certificates are known");
        if self.each.iter().any(|list| list.is_overdue(SystemTime::now())) {
            tracing::warn!(%path, "a newer list of revoked certificates is overdue; this one stays in force");
        }
    }

    /// The lists, round by round: in each at most one of an issuer.
    pub(crate) fn rounds(&self) -> impl Iterator<Item = Vec<&CertRevocationList<'static>>> {
        self.rounds.iter().map(|round| round.iter().collect())
    }

    /// Whether a list of its issuer names one of these certificates. One that cannot be read counts as named.
    fn names_any(&self, chain: &[CertificateDer<'_>]) -> bool {
        !self.each.is_empty() && (chain.is_empty() || chain.iter().any(|certificate| self.names(certificate)))
    }

    fn names(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok((_, parsed)) = parse_x509_certificate(certificate) else { return true };
        let issuer = parsed.issuer().as_raw();
        let of_issuer = self.each.iter().filter(|list| list.issuer == issuer);
        let mut lists = of_issuer.filter_map(|list| self.rounds.get(list.round)?.get(list.place));
        lists.any(|list| !matches!(list.find_serial(parsed.raw_serial()), Ok(None)))
    }
}

impl List {
    fn is_overdue(&self, now: SystemTime) -> bool {
        self.next_update.is_some_and(|at| at < now)
    }
}

/// Notices when the certificates that a peer has proven itself by are revoked while its connection is open.
#[derive(Debug)]
pub struct PeerWatch {
    revocations: Arc<Revocations>,
    verification: Verification,
    peer: Peer,
    /// When the peer has proven itself: what has expired since is no reason to end a connection.
    since: UnixTime,
    changes: watch::Receiver<u64>,
}

impl PeerWatch {
    pub(crate) fn new(revocations: &Arc<Revocations>, verification: Verification, peer: Peer) -> Self {
        let changes = revocations.changes.subscribe();
        Self { revocations: Arc::clone(revocations), verification, peer, since: UnixTime::now(), changes }
    }

    /// Whether the peer that has proven itself by `chain`, its leaf first, would be refused now. It is counted if so: ask no
    /// more then.
    pub fn is_revoked(&self, chain: &[CertificateDer<'_>]) -> bool {
        let lists = self.revocations.lists();
        // Most are in no list, and that costs no proof. For others the proof decides: what the peer has sent may be more
        // than what leads to a root.
        let is_refused = || {
            let Some((leaf, intermediates)) = chain.split_first() else { return true };
            self.verification.check(self.peer, leaf, intermediates, self.since, &lists).is_err()
        };
        let is_revoked = lists.names_any(chain) && is_refused();
        if is_revoked {
            self.revocations.count_refused(self.peer);
        }
        is_revoked
    }

    /// Waits until other lists are in force than when the last wait began.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The lists are gone, and with them whoever would change them.
            std::future::pending().await
        }
    }
}

#[cfg(test)]
#[path = "revocation/tests.rs"]
mod tests;
