//! Modules that were fetched, kept on disk: so that a waypoint that starts again asks nobody, and goes on with what it last
//! had when the registry is away.

use crate::digest::Digest;
use crate::error::FetchError;
use crate::fetcher::Fetched;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where fetched modules are kept, and for how long.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// A directory; `None`: only what was had is remembered, and nothing outlives the process.
    pub directory: Option<PathBuf>,
    /// How much is kept, in bytes. Default 1 GiB.
    pub bytes_max: u64,
    /// How long what nobody uses is kept. Default 24 h, as in Istio's agent.
    pub age_max: Duration,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self { directory: None, bytes_max: 1 << 30, age_max: Duration::from_secs(24 * 3600) }
    }
}

/// Sources remembered.
const ENTRIES_MAX: usize = 10_000;

/// An index that is larger is not ours.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// What was last had from one source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    digest: String,
    manifest: Option<String>,
    resolved: Option<String>,
    bytes: u64,
    /// Seconds since 1970.
    fetched: u64,
    used: u64,
}

/// The parts of an entry, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) digest: Digest,
    pub(crate) manifest: Option<Digest>,
    pub(crate) resolved: Option<Digest>,
}

/// Fetched modules.
pub struct Store {
    settings: StoreSettings,
    index: Mutex<BTreeMap<String, Entry>>,
}

impl Store {
    /// Opens the store. An index that cannot be read is begun anew.
    ///
    /// # Errors
    /// When the directory cannot be made, or others may write to it.
    pub fn open(settings: StoreSettings) -> Result<Self, FetchError> {
        let mut index = BTreeMap::new();
        if let Some(directory) = &settings.directory {
            let failed = |source| FetchError::Store { path: directory.clone(), source };
            DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
            // What it remembers decides what code is run.
            let metadata = std::fs::symlink_metadata(directory).map_err(failed)?;
            let is_ours = metadata.uid() == rustix::process::geteuid().as_raw();
            if !metadata.is_dir() || !is_ours || metadata.mode() & 0o077 != 0 {
                let reason = "it must belong to this user, and to nobody else (mode 0700)";
                return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, reason)));
            }
            index = read_index(&directory.join(INDEX));
        }
        Ok(Self { settings, index: Mutex::new(index) })
    }

    /// What was last had under this name, which is in use from now on.
    pub(crate) fn known(&self, name: &str, now: SystemTime) -> Option<Known> {
        let mut index = self.lock();
        let entry = index.get_mut(name)?;
        entry.used = seconds(now);
        let parse = |text: &Option<String>| text.as_deref().and_then(Digest::parse);
        Some(Known {
            digest: Digest::parse(&entry.digest)?,
            manifest: parse(&entry.manifest),
            resolved: parse(&entry.resolved),
        })
    }

    /// Whether the bytes of this module are here.
    pub(crate) fn holds(&self, digest: Digest) -> bool {
        self.path(digest).is_some_and(|path| path.is_file())
    }

    /// The bytes of this module, if they are here and whole. Reads a file.
    pub fn bytes(&self, digest: Digest) -> Option<Bytes> {
        let path = self.path(digest)?;
        let bytes = std::fs::read(&path).ok()?;
        if Digest::of(&bytes) == digest {
            return Some(bytes.into());
        }
        tracing::warn!(file = %path.display(), "kept module is damaged");
        // It is fetched again, and then replaced.
        let _gone = std::fs::remove_file(path);
        None
    }

    /// Keeps what was fetched under this name. Writes files.
    ///
    /// # Errors
    /// When they cannot be written; the module is remembered all the same.
    pub(crate) fn keep(&self, name: &str, fetched: &Fetched, now: SystemTime) -> Result<(), FetchError> {
        let text = |digest: Option<Digest>| digest.map(|digest| digest.to_string());
        let entry = Entry {
            digest: fetched.digest.to_string(),
            manifest: text(fetched.manifest),
            resolved: text(fetched.resolved),
            bytes: fetched.bytes.len() as u64,
            fetched: seconds(now),
            used: seconds(now),
        };
        self.lock().insert(name.to_owned(), entry);
        if let Some(path) = self.path(fetched.digest)
            && !path.is_file()
        {
            write_whole(&path, &fetched.bytes).map_err(|source| FetchError::Store { path, source })?;
        }
        // Whoever has started only now may want what is old.
        self.tidy(&BTreeSet::from([name]), now, Duration::MAX)
    }

    /// Notes that these names ([`crate::kept_as`]) are in use, and removes what was not for too long, or does not fit. Writes files.
    ///
    /// # Errors
    /// When the index cannot be written.
    pub fn purge(&self, in_use: &BTreeSet<&str>, now: SystemTime) -> Result<(), FetchError> {
        self.tidy(in_use, now, self.settings.age_max)
    }

    fn tidy(&self, in_use: &BTreeSet<&str>, now: SystemTime, age_max: Duration) -> Result<(), FetchError> {
        let mut index = self.lock();
        let now = seconds(now);
        for (_, entry) in index.iter_mut().filter(|(name, _)| in_use.contains(name.as_str())) {
            entry.used = now;
        }
        let age_max = age_max.as_secs();
        let is_young = |entry: &Entry| now.saturating_sub(entry.used) <= age_max;
        index.retain(|name, entry| in_use.contains(name.as_str()) || is_young(entry));
        while too_much(&index, self.settings.bytes_max) {
            let spare = index.iter().filter(|(name, _)| !in_use.contains(name.as_str()));
            let Some(oldest) = spare.min_by_key(|(_, entry)| entry.used).map(|(name, _)| name.clone()) else {
                break;
            };
            index.remove(&oldest);
        }
        let Some(directory) = &self.settings.directory else { return Ok(()) };
        let wanted: BTreeSet<String> = index.values().map(|entry| format!("{}.wasm", entry.digest)).collect();
        remove_others(directory, &wanted);
        let path = directory.join(INDEX);
        let written = serde_json::to_vec(&*index).map_err(io::Error::other);
        let written = written.and_then(|bytes| write_whole(&path, &bytes));
        written.map_err(|source| FetchError::Store { path, source })
    }

    fn path(&self, digest: Digest) -> Option<PathBuf> {
        self.settings.directory.as_ref().map(|directory| directory.join(format!("{digest}.wasm")))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Entry>> {
        // Nothing is left half done by a thread that panics.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const INDEX: &str = "index.json";

fn too_much(index: &BTreeMap<String, Entry>, bytes_max: u64) -> bool {
    let sizes: BTreeMap<&str, u64> =
        index.values().map(|entry| (entry.digest.as_str(), entry.bytes)).collect();
    index.len() > ENTRIES_MAX || sizes.values().sum::<u64>() > bytes_max
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn read_index(path: &Path) -> BTreeMap<String, Entry> {
    let small = std::fs::metadata(path).is_ok_and(|metadata| metadata.len() <= INDEX_BYTES_MAX);
    let bytes = if small { std::fs::read(path).ok() } else { None };
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Removes the modules that no entry names. What is written at this moment has another ending.
fn remove_others(directory: &Path, wanted: &BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok) {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".wasm") && !wanted.contains(&*name) {
            // It is tried again the next time.
            let _gone = std::fs::remove_file(entry.path());
        }
    }
}

/// Writes a file that is either whole or not there.
fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension(format!("{}.new", std::process::id()));
    // One that an earlier process of this number left is in the way.
    let _gone = std::fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    let written = written.and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        // The disk may be full: what could not be written must not fill it further.
        let _gone = std::fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn fetched(mark: u8, size: usize) -> Fetched {
        let bytes = Bytes::from(vec![mark; size]);
        let digest = Digest::of(&bytes);
        Fetched { digest, manifest: Some(Digest::of(&[mark])), resolved: None, bytes }
    }

    fn at(hours: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000 + hours * 3600)
    }

    /// In a folder of its own in `home`.
    fn open(home: &Path) -> Store {
        let directory = Some(home.join("modules"));
        let settings = StoreSettings { directory, bytes_max: 100, ..Default::default() };
        Store::open(settings).unwrap()
    }

    #[test]
    fn what_was_fetched_outlives_the_process() {
        let home = tempfile::tempdir().unwrap();
        let module = fetched(1, 10);
        open(home.path()).keep("a", &module, at(0)).unwrap();
        let store = open(home.path());
        let known = store.known("a", at(0)).unwrap();
        assert_eq!((known.digest, known.manifest, known.resolved), (module.digest, module.manifest, None));
        assert_eq!(store.bytes(module.digest).unwrap(), module.bytes);
        assert_eq!(store.known("b", at(0)), None);
        // Without a directory only the process remembers.
        let forgetful = Store::open(StoreSettings::default()).unwrap();
        forgetful.keep("a", &module, at(0)).unwrap();
        assert!(forgetful.known("a", at(0)).is_some() && !forgetful.holds(module.digest));
    }

    #[test]
    fn a_directory_that_others_may_enter_is_not_used() {
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let settings = StoreSettings { directory: Some(home.path().into()), ..Default::default() };
        assert!(matches!(Store::open(settings), Err(FetchError::Store { .. })));
    }

    #[test]
    fn what_is_damaged_is_not_used() {
        let home = tempfile::tempdir().unwrap();
        let module = fetched(1, 10);
        let store = open(home.path());
        store.keep("a", &module, at(0)).unwrap();
        std::fs::write(home.path().join(format!("modules/{}.wasm", module.digest)), "other").unwrap();
        assert!(
            store.holds(module.digest) && store.bytes(module.digest).is_none() && !store.holds(module.digest)
        );
        std::fs::write(home.path().join("modules").join(INDEX), "{").unwrap();
        assert_eq!(open(home.path()).known("a", at(0)), None);
    }

    #[test]
    fn what_nobody_uses_is_removed_by_age_and_by_size() {
        let home = tempfile::tempdir().unwrap();
        let store = open(home.path());
        let (a, b, c) = (fetched(1, 40), fetched(2, 40), fetched(3, 40));
        store.keep("a", &a, at(0)).unwrap();
        store.keep("b", &b, at(1)).unwrap();
        store.keep("same as b", &b, at(1)).unwrap();
        store.purge(&BTreeSet::from(["a"]), at(2)).unwrap();
        // 120 bytes are too many; `a` was used last.
        store.keep("c", &c, at(3)).unwrap();
        let held = |module: &Fetched| store.holds(module.digest);
        assert_eq!((held(&a), held(&b), held(&c)), (true, false, true));
        store.purge(&BTreeSet::from(["c"]), at(27)).unwrap();
        assert_eq!((held(&a), held(&c)), (false, true));
        assert_eq!(open(home.path()).known("a", at(0)), None);
        assert_eq!(
            std::fs::read_dir(home.path().join("modules")).unwrap().count(),
            2,
            "a module and the index"
        );
    }
}
