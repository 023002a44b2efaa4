//! Which files of a directory are manifests.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

/// How deep directories may nest; symbolic links may go round in circles.
const DEPTH_MAX: usize = 16;
/// How many files are read.
pub(crate) const FILES_MAX: usize = 20_000;
/// How large a file may be, in bytes.
pub(crate) const FILE_LEN_MAX: u64 = 16 << 20;

/// The manifests found, in order, and the places that could not be looked into.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) failed: Vec<(PathBuf, io::Error)>,
}

/// Lists `*.yaml`, `*.yml` and `*.json` under `root`, which may also be one file. Names that begin with a dot are
/// passed over: editors' temporary files, and the directories behind a mounted ConfigMap's links.
pub(crate) fn list(root: &Path) -> Listing {
    let mut listing = Listing::default();
    match std::fs::metadata(root) {
        Ok(metadata) if metadata.is_file() => listing.files.push(root.to_owned()),
        Ok(_) => walk(root, 0, &mut listing),
        Err(error) => listing.failed.push((root.to_owned(), error)),
    }
    listing.files.sort();
    listing
}

fn walk(directory: &Path, depth: usize, listing: &mut Listing) {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => return listing.failed.push((directory.to_owned(), error)),
    };
    for entry in entries {
        let path = match entry {
            Ok(entry) => entry.path(),
            Err(error) => {
                listing.failed.push((directory.to_owned(), error));
                continue;
            }
        };
        let hidden = path.file_name().and_then(|name| name.to_str()).is_none_or(|name| name.starts_with('.'));
        if hidden {
            continue;
        }
        // Follows links, as a link is how manifests are often put in place.
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => {
                if depth < DEPTH_MAX {
                    walk(&path, depth + 1, listing);
                } else {
                    listing.failed.push((path, io::Error::other("directories nest too deep")));
                }
            }
            Ok(_) if is_manifest(&path) && listing.files.len() >= FILES_MAX => {
                listing.failed.push((path, io::Error::other("too many files")));
                return;
            }
            Ok(_) if is_manifest(&path) => listing.files.push(path),
            Ok(_) => {}
            // Gone since it was listed, or a link to nowhere.
            Err(_) if !is_manifest(&path) => {}
            Err(error) => listing.failed.push((path, error)),
        }
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension()
        .and_then(|extension| extension.to_str())
        .is_some_and(|ext| matches!(ext, "yaml" | "yml" | "json"))
}

/// A number that changes when a manifest is added, removed, replaced or written to.
pub(crate) fn fingerprint(root: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    let listing = list(root);
    listing.failed.len().hash(&mut hasher);
    for path in listing.files {
        if let Ok(metadata) = std::fs::metadata(&path) {
            metadata.len().hash(&mut hasher);
            metadata.modified().ok().hash(&mut hasher);
            #[cfg(unix)]
            std::os::unix::fs::MetadataExt::ino(&metadata).hash(&mut hasher);
        }
        path.hash(&mut hasher);
    }
    hasher.finish()
}
