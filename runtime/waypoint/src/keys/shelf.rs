//! Key sets on disk, so that a proxy that starts while an issuer is down knows the keys that it knew before.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Larger files are not read: no answer that was taken is longer, and JSON escapes at most double it.
const FILE_BYTES_MAX: u64 = 2 << 20;

/// A directory that only we can read, with a file for each place.
#[derive(Debug)]
pub(super) struct Shelf(PathBuf);

/// What a file holds.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Where the set came from, to be sure.
    source: String,
    /// When, in seconds of Unix time.
    fetched: u64,
    /// The set as it came.
    keys: String,
}

impl Shelf {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self(directory)
    }

    /// The set of a place, and how old it is at `now`.
    pub(super) fn read(&self, source: &str, now: SystemTime) -> Option<(Vec<u8>, Duration)> {
        let file = self.file(source);
        if fs::metadata(&file).ok()?.len() > FILE_BYTES_MAX {
            return None;
        }
        let kept: Kept = serde_json::from_slice(&fs::read(&file).ok()?).ok()?;
        let fetched = UNIX_EPOCH.checked_add(Duration::from_secs(kept.fetched))?;
        // One from the future says nothing of its age.
        let age = now.duration_since(fetched).ok()?;
        (kept.source == source).then(|| (kept.keys.into_bytes(), age))
    }

    /// Keeps the set of a place. It is whole on disk, or the one before.
    pub(super) fn write(&self, source: &str, keys: &[u8], now: SystemTime) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
        let fetched = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let keys = String::from_utf8_lossy(keys).into_owned();
        let text = serde_json::to_vec(&Kept { source: source.to_owned(), fetched, keys })?;
        let file = self.file(source);
        let draft = file.with_extension(format!("draft-{}", std::process::id()));
        write_private(&draft, &text)?;
        fs::rename(&draft, &file)
    }

    fn file(&self, source: &str) -> PathBuf {
        let name: String = Sha256::digest(source).iter().map(|byte| format!("{byte:02x}")).collect();
        self.0.join(name).with_extension("json")
    }
}

fn write_private(file: &Path, text: &[u8]) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(file)?.write_all(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_found_again_with_its_age() {
        let directory = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(directory.path().join("keys"));
        let start = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        assert_eq!(shelf.read("https://a/keys", start), None);
        shelf.write("https://a/keys", b"{\"keys\":[]}", start).unwrap();
        shelf.write("https://a/keys", b"{\"keys\":[1]}", start).unwrap();
        let hour = Duration::from_secs(3600);
        assert_eq!(shelf.read("https://a/keys", start + hour), Some((b"{\"keys\":[1]}".to_vec(), hour)));
        assert_eq!(shelf.read("https://b/keys", start), None);
        assert_eq!(shelf.read("https://a/keys", start - hour), None, "from the future");
        let files = fs::read_dir(directory.path().join("keys")).unwrap().count();
        assert_eq!(files, 1, "no drafts are left");
    }

    #[test]
    fn what_is_not_ours_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let shelf = Shelf::new(directory.path().to_owned());
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        for text in ["", "{}", r#"{"source":"https://other","fetched":1,"keys":"x"}"#] {
            fs::write(shelf.file("https://a"), text).unwrap();
            assert_eq!(shelf.read("https://a", now), None, "{text}");
        }
    }
}
