//! Network namespaces: sockets are made inside one while a thread visits it between two awaits.

use crate::NetError;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The mark on every packet that a ztunnel sends in a pod, by which redirection lets it pass (0x539, as istio-cni's
/// rules expect).
pub const ZTUNNEL_MARK: u32 = 0x539;

/// The namespace of the thread that looks.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace, held open.
#[derive(Clone, Debug)]
pub struct Namespace {
    path: Arc<Path>,
    file: Arc<File>,
}

/// Which namespace it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.device, self.inode)
    }
}

impl NamespaceId {
    /// The one that this thread is in.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn own() -> std::io::Result<Self> {
        let metadata = std::fs::metadata(OWN)?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino() })
    }
}

impl PartialEq for Namespace {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.file, &other.file)
    }
}

impl Eq for Namespace {}

impl Namespace {
    /// Opens the namespace behind a file, as `ip netns add` leaves one in `/run/netns`.
    ///
    /// # Errors
    /// When the file is not there or cannot be opened.
    pub fn open(path: &Path) -> Result<Self, NetError> {
        let file =
            File::open(path).map_err(|source| NetError::Namespace { path: path.to_owned(), source })?;
        Ok(Self { path: path.into(), file: Arc::new(file) })
    }

    /// The namespace behind a descriptor that another process sent. `name` stands for its file in errors.
    pub fn received(descriptor: OwnedFd, name: &str) -> Self {
        Self { path: Path::new(name).into(), file: Arc::new(File::from(descriptor)) }
    }

    /// What tells this namespace from all others while it is held.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn id(&self) -> std::io::Result<NamespaceId> {
        let metadata = self.file.metadata()?;
        Ok(NamespaceId { device: metadata.dev(), inode: metadata.ino() })
    }

    /// Whether this is still the namespace behind the file it was opened from: the file may stand for a new one of the
    /// same name by now.
    pub fn is_current(&self) -> bool {
        match (self.id(), std::fs::metadata(&self.path)) {
            (Ok(held), Ok(found)) => held == NamespaceId { device: found.dev(), inode: found.ino() },
            _ => false,
        }
    }

    /// Runs `work` with this thread inside the namespace. `work` must not await: the thread is back in its own
    /// namespace when this returns. Needs `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    ///
    /// # Aborts
    /// When the thread cannot return to its own namespace: everything the process did on it from then on would be in
    /// the wrong one.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetError> {
        let failed =
            |source: std::io::Error| NetError::Namespace { path: PathBuf::from(&*self.path), source };
        let own = File::open(OWN).map_err(failed)?;
        move_into_link_name_space(self.file.as_fd(), NETWORK).map_err(|error| failed(error.into()))?;
        // Also when `work` panics.
        let _way_back = WayBack(own);
        Ok(work())
    }
}

const NETWORK: Option<LinkNameSpaceType> = Some(LinkNameSpaceType::Network);

/// Returns the thread to its own namespace.
struct WayBack(File);

impl Drop for WayBack {
    fn drop(&mut self) {
        if let Err(error) = move_into_link_name_space(self.0.as_fd(), NETWORK) {
            tracing::error!(%error, "thread is lost in another network namespace");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_knows_when_its_file_stands_for_another() {
        let link = std::env::temp_dir().join(format!("cairn-net-{}", std::process::id()));
        let point_to = |target: &str| {
            // The first time there is nothing to remove.
            let _gone = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(target, &link).unwrap();
        };
        point_to("/proc/self/ns/net");
        let namespace = Namespace::open(&link).unwrap();
        assert!(namespace.is_current());
        point_to("/proc/self/ns/uts");
        assert!(!namespace.is_current(), "another namespace");
        std::fs::remove_file(&link).unwrap();
        assert!(!namespace.is_current(), "none");
    }

    #[test]
    fn a_namespace_is_the_same_however_it_came() {
        let own = Path::new("/proc/self/ns/net");
        let sent = Namespace::received(File::open(own).unwrap().into(), "sent");
        assert_eq!(sent.id().unwrap(), Namespace::open(own).unwrap().id().unwrap());
        assert_eq!(sent.id().unwrap().to_string(), NamespaceId::own().unwrap().to_string());
        let other = Namespace::open(Path::new("/proc/self/ns/uts")).unwrap();
        assert_ne!(sent.id().unwrap(), other.id().unwrap());
    }

    #[test]
    fn a_namespace_that_is_not_there_is_an_error_with_its_path() {
        let error = Namespace::open(Path::new("/nowhere/pod")).unwrap_err();
        assert!(matches!(&error, NetError::Namespace { path, source }
            if path == Path::new("/nowhere/pod") && source.kind() == std::io::ErrorKind::NotFound));
    }
}
