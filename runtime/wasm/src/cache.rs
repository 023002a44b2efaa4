//! Compiled modules, kept on disk, so that a waypoint that starts again compiles nothing.
//!
//! What is in these files runs as the proxy's own code. So the directory belongs to this user alone, each file is vouched
//! for by a keyed checksum whose key never leaves the directory, and code from anywhere else is never taken. A file is named
//! after the module's digest and the engine that it was compiled for: another version, other settings or another processor
//! do not find it.

use aws_lc_rs::hmac;
use parking_lot::Mutex;
use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Where compiled modules are kept.
#[derive(Clone, Debug)]
pub struct CacheSettings {
    /// A directory of this user's own. It is made if it is not there; its parent must be.
    pub directory: PathBuf,
    /// How much is kept, in bytes; what was not used for the longest time goes first.
    pub bytes_max: u64,
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// It cannot be made or read.
    #[error("{} cannot be used", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others may write to it, or read the key in it.
    #[error("{} must belong to this user, and to nobody else (mode 0700, and 0600 for files)", .0.display())]
    Open(PathBuf),
}

/// Changes whenever code compiled before must not be used, for a reason that the engine does not know.
const GENERATION: u32 = 1;

/// The file with the key, and its length.
const KEY: &str = "key";
const KEY_BYTES: usize = 32;

/// Files that were not finished and are older than this are nobody's any more.
const UNFINISHED_MAX: Duration = Duration::from_secs(3600);

/// More files than this are not looked at.
const FILES_MAX: usize = 100_000;

/// Compiled modules on disk.
pub(crate) struct Cache {
    settings: CacheSettings,
    key: hmac::Key,
    /// The engine that code must be for.
    engine: String,
    /// Only one thread makes room.
    room: Mutex<()>,
}

/// A file whose code may run. Made only by [`Cache::find`].
pub(crate) struct Kept(File);

impl Kept {
    pub(crate) fn into_file(self) -> File {
        self.0
    }
}

impl Cache {
    /// Opens the cache for an engine.
    pub(crate) fn open(settings: CacheSettings, engine: &wasmtime::Engine) -> Result<Self, CacheError> {
        let directory = &settings.directory;
        let failed = |source| CacheError::File { path: directory.clone(), source };
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(failed)?,
        }
        let metadata = std::fs::symlink_metadata(directory).map_err(failed)?;
        if !metadata.is_dir() || !is_ours_alone(&metadata) {
            return Err(CacheError::Open(directory.clone()));
        }
        let key = key(&directory.join(KEY))?;
        let mut hasher = DefaultHasher::new();
        (GENERATION, engine.precompile_compatibility_hash()).hash(&mut hasher);
        let engine = format!("{:016x}", hasher.finish());
        let cache = Self { key, engine, room: Mutex::new(()), settings };
        cache.remove_unfinished();
        Ok(cache)
    }

    /// The code of a module, if it is there and ours. What is not ours is removed.
    pub(crate) fn find(&self, digest: &str) -> Option<Kept> {
        let (code, seal) = (self.code(digest), self.seal(digest));
        let seal_text = std::fs::read(&seal).ok()?;
        match self.verified(digest, &code, &seal_text) {
            Ok(Some(file)) => {
                // When it was last used. It is found without, too.
                let _touched = file.set_modified(SystemTime::now());
                Some(Kept(file))
            }
            refused => {
                let reason =
                    refused.err().map_or_else(|| "it is not sealed by us".to_owned(), |e| e.to_string());
                tracing::warn!(file = %code.display(), reason, "compiled module not used");
                self.remove(digest);
                None
            }
        }
    }

    /// Whether something is there, ours or not.
    pub(crate) fn has(&self, digest: &str) -> bool {
        self.code(digest).is_file()
    }

    /// The file, if the seal is that of its content.
    fn verified(&self, digest: &str, code: &Path, seal: &[u8]) -> io::Result<Option<File>> {
        let mut file = OpenOptions::new().read(true).custom_flags(nofollow()).open(code)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || !is_ours_alone(&metadata) {
            return Ok(None);
        }
        let mut context = self.context(digest);
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let read = file.read(&mut buffer)?;
            match buffer.get(..read) {
                Some(piece) if read > 0 => context.update(piece),
                _ => break,
            }
        }
        let is_ours =
            aws_lc_rs::constant_time::verify_slices_are_equal(context.sign().as_ref(), seal).is_ok();
        Ok(is_ours.then_some(file))
    }

    /// Keeps what the compiler returned, and makes room for it.
    pub(crate) fn keep(&self, digest: &str, code: &[u8]) -> io::Result<()> {
        let mut context = self.context(digest);
        context.update(code);
        write_whole(&self.seal(digest), context.sign().as_ref())?;
        write_whole(&self.code(digest), code)?;
        self.make_room(digest)
    }

    /// Forgets a module whose code turned out not to fit.
    pub(crate) fn remove(&self, digest: &str) {
        // What is not there need not be removed, and without its seal the rest is worth nothing.
        let _gone = (std::fs::remove_file(self.seal(digest)), std::fs::remove_file(self.code(digest)));
    }

    /// How many modules are kept, and their bytes.
    pub(crate) fn size(&self) -> (usize, u64) {
        let files = self.files();
        (files.len(), files.iter().map(|file| file.bytes).sum())
    }

    /// The checksum of a module's code begins with whose code it is: a file that is moved to another name is not found.
    fn context(&self, digest: &str) -> hmac::Context {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(format!("cairn compiled module\n{digest}\n{}\n", self.engine).as_bytes());
        context
    }

    fn code(&self, digest: &str) -> PathBuf {
        self.settings.directory.join(format!("{digest}-{}.cwasm", self.engine))
    }

    fn seal(&self, digest: &str) -> PathBuf {
        self.settings.directory.join(format!("{digest}-{}.seal", self.engine))
    }

    /// Removes what was not used for the longest time, until the rest fits. A module that runs stays mapped.
    fn make_room(&self, but: &str) -> io::Result<()> {
        let _one_at_a_time = self.room.lock();
        let mut files = self.files();
        files.sort_by_key(|file| file.used);
        let mut total: u64 = files.iter().map(|file| file.bytes).sum();
        let but = self.code(but);
        for file in files {
            if total <= self.settings.bytes_max {
                break;
            }
            if file.path != but {
                // Another process may have removed it.
                let _gone = (
                    std::fs::remove_file(file.path.with_extension("seal")),
                    std::fs::remove_file(&file.path),
                );
                total -= file.bytes;
            }
        }
        Ok(())
    }

    fn files(&self) -> Vec<Stored> {
        let entries = std::fs::read_dir(&self.settings.directory).into_iter().flatten().take(FILES_MAX);
        let stored = |entry: io::Result<std::fs::DirEntry>| {
            let entry = entry.ok()?;
            let path = entry.path();
            let metadata = entry.metadata().ok().filter(|_| path.extension() == Some(OsStr::new("cwasm")))?;
            Some(Stored { path, bytes: metadata.len(), used: metadata.modified().ok()? })
        };
        entries.filter_map(stored).collect()
    }

    fn remove_unfinished(&self) {
        let entries = std::fs::read_dir(&self.settings.directory).into_iter().flatten().take(FILES_MAX);
        for entry in entries.filter_map(Result::ok) {
            let is_new = entry.path().extension() == Some(OsStr::new("new"));
            let age = entry.metadata().and_then(|metadata| metadata.modified()).ok();
            let age = age.and_then(|modified| modified.elapsed().ok());
            if is_new && age.is_some_and(|age| age > UNFINISHED_MAX) {
                // It does no harm where it is.
                let _gone = std::fs::remove_file(entry.path());
            }
        }
    }
}

struct Stored {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

fn nofollow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits() as i32
}

fn is_ours_alone(metadata: &std::fs::Metadata) -> bool {
    metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o077 == 0
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

/// The key of the directory, made when it is not there.
fn key(path: &Path) -> Result<hmac::Key, CacheError> {
    let failed = |source| CacheError::File { path: path.to_owned(), source };
    if !path.exists() {
        let mut secret = [0; KEY_BYTES];
        getrandom::fill(&mut secret).map_err(|error| failed(io::Error::other(error)))?;
        let new = path.with_extension(format!("{}.new", std::process::id()));
        write_whole(&new, &secret).map_err(failed)?;
        // Another process may have been quicker, and then its key is the one.
        let linked = std::fs::hard_link(&new, path);
        let removed = std::fs::remove_file(&new);
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => removed.map_err(failed)?,
        }
    }
    let file = OpenOptions::new().read(true).custom_flags(nofollow()).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || !is_ours_alone(&metadata) {
        return Err(CacheError::Open(path.to_owned()));
    }
    let mut secret = Vec::new();
    file.take(KEY_BYTES as u64 + 1).read_to_end(&mut secret).map_err(failed)?;
    if secret.len() != KEY_BYTES {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "the key has another length")));
    }
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &secret))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn open(directory: &Path, bytes_max: u64) -> Result<Cache, CacheError> {
        let engine = wasmtime::Engine::default();
        Cache::open(CacheSettings { directory: directory.to_owned(), bytes_max }, &engine)
    }

    #[test]
    fn what_was_kept_is_found_again_by_another_process() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("compiled");
        open(&directory, 1000).unwrap().keep("abc", b"code").unwrap();
        let mut found = open(&directory, 1000).unwrap().find("abc").unwrap().into_file();
        let mut code = String::new();
        std::io::Seek::rewind(&mut found).unwrap();
        found.read_to_string(&mut code).unwrap();
        assert_eq!(code, "code");
        assert!(open(&directory, 1000).unwrap().find("abd").is_none());
        for (path, mode) in [(directory.clone(), 0o700), (directory.join("key"), 0o600)] {
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
        }
        assert_eq!(open(&directory, 1000).unwrap().size(), (1, 4));
    }

    #[test]
    fn foreign_and_changed_code_is_not_used_and_removed() {
        type Change = fn(&Cache);
        let changes: [(&str, Change); 6] = [
            ("changed code", |cache| std::fs::write(cache.code("abc"), "CODE").unwrap()),
            ("changed seal", |cache| std::fs::write(cache.seal("abc"), [7; 32]).unwrap()),
            ("empty seal", |cache| std::fs::write(cache.seal("abc"), "").unwrap()),
            ("the code of another module", |cache| {
                cache.keep("other", b"evil").unwrap();
                std::fs::rename(cache.code("other"), cache.code("abc")).unwrap();
                std::fs::rename(cache.seal("other"), cache.seal("abc")).unwrap();
            }),
            ("a link", |cache| {
                let elsewhere = cache.settings.directory.with_extension("elsewhere");
                std::fs::rename(cache.code("abc"), &elsewhere).unwrap();
                std::os::unix::fs::symlink(elsewhere, cache.code("abc")).unwrap();
            }),
            ("a file that others may write to", |cache| {
                let mode = std::fs::Permissions::from_mode(0o666);
                std::fs::set_permissions(cache.code("abc"), mode).unwrap();
            }),
        ];
        for (name, change) in changes {
            let home = tempfile::tempdir().unwrap();
            let cache = open(&home.path().join("compiled"), 1000).unwrap();
            cache.keep("abc", b"code").unwrap();
            assert!(cache.find("abc").is_some(), "{name}");
            change(&cache);
            assert!(cache.find("abc").is_none(), "{name}");
            assert!(!cache.seal("abc").exists() && !cache.code("abc").exists(), "{name}");
        }
        // Sealed with the key of another directory.
        let home = tempfile::tempdir().unwrap();
        let (ours, theirs) = (home.path().join("ours"), home.path().join("theirs"));
        let (ours, theirs) = (open(&ours, 1000).unwrap(), open(&theirs, 1000).unwrap());
        theirs.keep("abc", b"code").unwrap();
        std::fs::rename(theirs.code("abc"), ours.code("abc")).unwrap();
        std::fs::rename(theirs.seal("abc"), ours.seal("abc")).unwrap();
        assert!(ours.find("abc").is_none());
    }

    #[test]
    fn a_directory_that_others_may_enter_is_not_used() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("compiled");
        std::fs::create_dir(&directory).unwrap();
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(open(&directory, 1000), Err(CacheError::Open(_))));
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(directory.join("key"), [1; 32]).unwrap();
        std::fs::set_permissions(directory.join("key"), std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(open(&directory, 1000), Err(CacheError::Open(_))));
        std::fs::set_permissions(directory.join("key"), std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(open(&directory, 1000).is_ok());
        std::fs::write(directory.join("key"), "short").unwrap();
        assert!(matches!(open(&directory, 1000), Err(CacheError::File { .. })));
        let link = home.path().join("link");
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        assert!(matches!(open(&link, 1000), Err(CacheError::Open(_))));
    }

    #[test]
    fn what_was_not_used_for_the_longest_time_goes_first() {
        let home = tempfile::tempdir().unwrap();
        let cache = open(&home.path().join("compiled"), 10).unwrap();
        let age = |digest: &str, seconds| {
            let file = File::open(cache.code(digest)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
        };
        for (digest, seconds) in [("a", 30), ("b", 20), ("c", 10)] {
            cache.keep(digest, b"123").unwrap();
            age(digest, seconds);
        }
        assert!(cache.find("a").is_some(), "which makes it the last used");
        cache.keep("d", b"12345").unwrap();
        let kept: Vec<&str> =
            ["a", "b", "c", "d"].into_iter().filter(|name| cache.find(name).is_some()).collect();
        assert_eq!(kept, ["a", "d"]);
        cache.keep("e", b"much too large").unwrap();
        assert!(cache.find("e").is_some() && cache.find("a").is_none());
    }
}
