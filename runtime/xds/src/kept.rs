//! What the control plane said last, kept on disk for a start without it.
//!
//! Resources are kept as they came, so that they are read, and refused, as if they came again. A file is of one scope (a node
//! of a cluster), of bounded size and age, whole or not at all, and for our own user only: policies come out of it.

use cairn_proto::discovery::Resource;
use prost::Message;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tracing::{debug, info, warn};

use crate::Mesh;

/// How a file begins; another version of the format has another number.
const MAGIC: &[u8] = b"cairn-xds-1\n";
/// How a file ends: the SHA-256 of all before.
const DIGEST_BYTES: usize = 32;
/// A clock may have been so far ahead when the file was written.
const AHEAD_MAX: Duration = Duration::from_secs(300);
/// Changes that come together are written together.
const SETTLE: Duration = Duration::from_secs(1);

/// Where the last state is kept, and for how long it is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeepSettings {
    /// The file. Its directory must be ours.
    pub path: PathBuf,
    /// Whose state it is: another's file is not used.
    pub scope: String,
    /// How old a file may be that is used. It is written anew at a quarter of that while there is a control plane.
    /// Default: 1 h.
    pub age_max: Duration,
    /// How long the control plane is waited for before the file is used. Default: 5 s.
    pub wait: Duration,
    /// The least time between two writes. Default: 10 s.
    pub interval: Duration,
    /// The largest file. Default: 256 MiB, somewhat more than the largest response.
    pub bytes_max: u64,
}

impl KeepSettings {
    /// Settings with defaults for all but where and whose.
    pub fn new(path: impl Into<PathBuf>, scope: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            scope: scope.into(),
            age_max: Duration::from_secs(60 * 60),
            wait: Duration::from_secs(5),
            interval: Duration::from_secs(10),
            bytes_max: 256 << 20,
        }
    }
}

/// Why a kept state is not used, or not kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is larger than it may be.
    #[error("it is of {bytes} bytes, and may be of {bytes_max}")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// It is not ours alone.
    #[error("it belongs to another user, or others may read or write it")]
    NotOurs,
    /// It begins otherwise.
    #[error("it is of no version that this release reads")]
    Version,
    /// It ends too early, or its digest is another.
    #[error("it is damaged")]
    Damaged,
    /// It is another's.
    #[error("it is of `{found}`, not of `{expected}`")]
    Scope {
        /// Whose it is.
        found: String,
        /// Whose it should be.
        expected: String,
    },
    /// It is too old.
    #[error("it was written {age:?} ago, and is good for {age_max:?}")]
    Old {
        /// Its age.
        age: Duration,
        /// The bound.
        age_max: Duration,
    },
    /// It was written in the future.
    #[error("it was written in the future")]
    Ahead,
}

/// A state that was kept.
#[derive(Debug)]
pub(crate) struct Kept {
    /// When it was written.
    pub(crate) written: SystemTime,
    /// What it holds.
    pub(crate) resources: Vec<Resource>,
}

/// Reads the file; `None` when there is none.
pub(crate) fn read(settings: &KeepSettings, now: SystemTime) -> Result<Option<Kept>, KeepError> {
    let failed = |source| KeepError::Read { path: settings.path.clone(), source };
    let file = match File::open(&settings.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let metadata = file.metadata().map_err(failed)?;
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own || metadata.mode() & 0o077 != 0 || !metadata.is_file() {
        return Err(KeepError::NotOurs);
    }
    let (bytes, bytes_max) = (metadata.len(), settings.bytes_max);
    if bytes > bytes_max {
        return Err(KeepError::TooLarge { bytes, bytes_max });
    }
    let mut content = Vec::with_capacity(usize::try_from(bytes).unwrap_or_default());
    // A file that grows meanwhile is cut off here, and then damaged.
    (&file).take(bytes).read_to_end(&mut content).map_err(failed)?;
    parse(&content, settings, now).map(Some)
}

fn parse(content: &[u8], settings: &KeepSettings, now: SystemTime) -> Result<Kept, KeepError> {
    let body = content.strip_prefix(MAGIC).ok_or(KeepError::Version)?;
    let end = body.len().checked_sub(DIGEST_BYTES).ok_or(KeepError::Damaged)?;
    let (body, digest) = body.split_at_checked(end).ok_or(KeepError::Damaged)?;
    let digested = content.get(..MAGIC.len() + end).ok_or(KeepError::Damaged)?;
    if Sha256::digest(digested).as_slice() != digest {
        return Err(KeepError::Damaged);
    }
    let mut rest = body;
    let scope = String::from_utf8(record(&mut rest)?.to_vec()).map_err(|_| KeepError::Damaged)?;
    if scope != settings.scope {
        return Err(KeepError::Scope { found: scope, expected: settings.scope.clone() });
    }
    let seconds = <[u8; 8]>::try_from(record(&mut rest)?).map_err(|_| KeepError::Damaged)?;
    let written = UNIX_EPOCH.checked_add(Duration::from_secs(u64::from_le_bytes(seconds)));
    let written = written.ok_or(KeepError::Damaged)?;
    match now.duration_since(written) {
        Ok(age) if age > settings.age_max => {
            return Err(KeepError::Old { age, age_max: settings.age_max });
        }
        Err(ahead) if ahead.duration() > AHEAD_MAX => return Err(KeepError::Ahead),
        Ok(_) | Err(_) => {}
    }
    let mut resources = Vec::new();
    while !rest.is_empty() {
        resources.push(Resource::decode(record(&mut rest)?).map_err(|_| KeepError::Damaged)?);
    }
    Ok(Kept { written, resources })
}

/// Takes the next record: its length in four bytes, the lowest first, and then itself.
fn record<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], KeepError> {
    let (length, after) = rest.split_first_chunk::<4>().ok_or(KeepError::Damaged)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| KeepError::Damaged)?;
    let (record, after) = after.split_at_checked(length).ok_or(KeepError::Damaged)?;
    *rest = after;
    Ok(record)
}

/// Writes the file, in place of what was there at once.
fn write(settings: &KeepSettings, records: &[Arc<[u8]>], now: SystemTime) -> Result<u64, KeepError> {
    let failed = |source| KeepError::Write { path: settings.path.clone(), source };
    let bytes = size(settings, records);
    if bytes > settings.bytes_max {
        return Err(KeepError::TooLarge { bytes, bytes_max: settings.bytes_max });
    }
    let beside = beside(&settings.path);
    let written = || -> io::Result<()> {
        // What a process left that ended while it wrote.
        let _none = std::fs::remove_file(&beside);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        let mut out = Digested { out: BufWriter::new(file), digest: Sha256::new() };
        out.write_all(MAGIC)?;
        out.record(settings.scope.as_bytes())?;
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        out.record(&seconds.to_le_bytes())?;
        for record in records {
            out.record(record)?;
        }
        let digest = out.digest.finalize();
        out.out.write_all(digest.as_slice())?;
        let file = out.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        std::fs::rename(&beside, &settings.path)
    };
    let result = written();
    if result.is_err() {
        let _none = std::fs::remove_file(&beside);
    }
    result.map(|()| bytes).map_err(failed)
}

fn size(settings: &KeepSettings, records: &[Arc<[u8]>]) -> u64 {
    let fixed = MAGIC.len() + 4 + settings.scope.len() + 4 + 8 + DIGEST_BYTES;
    let records: usize = records.iter().map(|record| 4 + record.len()).sum();
    u64::try_from(fixed + records).unwrap_or(u64::MAX)
}

fn beside(path: &Path) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    beside.into()
}

/// Writes and digests.
struct Digested {
    out: BufWriter<File>,
    digest: Sha256,
}

impl Digested {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.digest.update(bytes);
        self.out.write_all(bytes)
    }

    fn record(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.write_all(&length.to_le_bytes())?;
        self.write_all(bytes)
    }
}

/// Keeps the file in step with the state, at intervals.
pub(crate) struct Keeper {
    settings: Arc<KeepSettings>,
    /// When to write next, if anything is to be written.
    due: Option<Instant>,
    /// No write before.
    not_before: Instant,
    /// One is under way.
    is_writing: Arc<AtomicBool>,
}

impl Keeper {
    pub(crate) fn new(settings: KeepSettings, now: Instant) -> Self {
        Self { settings: Arc::new(settings), due: None, not_before: now, is_writing: Arc::default() }
    }

    /// The state has changed, or was confirmed.
    pub(crate) fn changed(&mut self, now: Instant) {
        let at = self.not_before.max(now + SETTLE);
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// When to call [`Self::write`].
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Writes, on a thread for such things. Without a connection what is held is no longer known to be so, and keeps
    /// the age that it has.
    pub(crate) fn write(
        &mut self,
        records: Vec<Arc<[u8]>>,
        is_connected: bool,
        mesh: &Arc<Mesh>,
        now: Instant,
    ) {
        self.due = None;
        if !is_connected {
            return;
        }
        self.not_before = now + self.settings.interval;
        if self.is_writing.swap(true, Ordering::AcqRel) {
            // A slow disk: this state is written when it is done.
            self.due = Some(self.not_before);
            return;
        }
        self.due = Some(now + (self.settings.age_max / 4).max(self.settings.interval));
        let (settings, is_writing, mesh) =
            (Arc::clone(&self.settings), Arc::clone(&self.is_writing), Arc::clone(mesh));
        tokio::task::spawn_blocking(move || {
            let now = SystemTime::now();
            match write(&settings, &records, now) {
                Ok(bytes) => {
                    mesh.note_kept(now);
                    debug!(path = %settings.path.display(), bytes, "the state is kept");
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    warn!(path = %settings.path.display(), error, "the state is not kept");
                }
            }
            is_writing.store(false, Ordering::Release);
        });
    }
}

/// Reads what was kept, and says in the log what became of it.
pub(crate) async fn load(settings: &KeepSettings) -> Option<Kept> {
    let of = settings.clone();
    let read = tokio::task::spawn_blocking(move || read(&of, SystemTime::now())).await;
    let path = settings.path.display();
    match read {
        Ok(Ok(Some(kept))) => {
            let age = SystemTime::now().duration_since(kept.written).unwrap_or_default();
            info!(%path, ?age, count = kept.resources.len(), "a kept state is there");
            Some(kept)
        }
        Ok(Ok(None)) => {
            info!(%path, "no state is kept yet");
            None
        }
        Ok(Err(error)) => {
            warn!(%path, error = &error as &dyn std::error::Error, "the kept state is not used");
            None
        }
        // Only when the process ends.
        Err(_) => None,
    }
}

#[cfg(test)]
#[path = "kept/tests.rs"]
mod tests;
