//! When to ask again: what was fetched before, what the registry has now, and what to do when it does not answer.

use crate::digest::Digest;
use crate::error::FetchError;
use crate::fetcher::{Fetched, Fetcher, Wanted};
use crate::source::Source;
use crate::store::{Known, Store};
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// When a module that was fetched before is asked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// Never.
    IfNotPresent,
    /// Every time.
    Always,
}

/// A module that can be loaded.
#[derive(Debug)]
pub struct Pulled {
    /// Its digest.
    pub digest: Digest,
    /// The digest of the image's manifest.
    pub manifest: Option<Digest>,
    /// Its bytes, if they were fetched just now; else the store has them, or the caller said that it needs none.
    pub bytes: Option<Bytes>,
    /// It is what was had before: nobody could be asked whether it still is what it should be.
    pub stale: Option<FetchError>,
}

/// What was asked for so far.
#[derive(Debug, Default)]
pub struct PullCounts {
    /// Modules fetched.
    pub fetched: AtomicU64,
    /// Modules that were there already.
    pub present: AtomicU64,
    /// Times that a module could not be had, or only as it was before.
    pub failed: AtomicU64,
}

/// What a module is kept as. What is pinned has a place of its own, where only what was held against the pin comes: so it is
/// neither replaced by what another pin, or none, brings from the same source, nor compared again.
#[must_use]
pub fn kept_as(name: &str, pinned: Option<Digest>) -> String {
    match pinned {
        Some(digest) => format!("{name} pinned to {}", digest.qualified()),
        None => name.to_owned(),
    }
}

/// Fetches what is not there, and keeps it.
pub struct Puller {
    fetcher: Fetcher,
    store: Arc<Store>,
    /// What was asked for so far.
    pub counts: PullCounts,
}

impl Puller {
    /// Fetches with `fetcher` and keeps in `store`.
    pub fn new(fetcher: Fetcher, store: Arc<Store>) -> Self {
        Self { fetcher, store, counts: PullCounts::default() }
    }

    /// Makes a module available, asking at most once. `name` says what it is kept as, together with its pin ([`kept_as`]): no
    /// two that differ in source or in who may have them share one. `needless` says of which modules no bytes are needed. A
    /// file is read every time, and what is pinned is asked for once.
    ///
    /// # Errors
    /// When it is not there and cannot be fetched.
    pub async fn pull(
        &self,
        name: &str,
        wanted: &Wanted,
        asking: Asking,
        needless: &(dyn Fn(Digest) -> bool + Sync),
    ) -> Result<Pulled, FetchError> {
        let pulled = self.decide(name, wanted, asking, needless).await;
        let count = match &pulled {
            Ok(Pulled { stale: None, bytes: Some(_), .. }) => &self.counts.fetched,
            Ok(Pulled { stale: None, bytes: None, .. }) => &self.counts.present,
            Ok(Pulled { stale: Some(_), .. }) | Err(_) => &self.counts.failed,
        };
        count.fetch_add(1, Ordering::Relaxed);
        pulled
    }

    async fn decide(
        &self,
        name: &str,
        wanted: &Wanted,
        asking: Asking,
        needless: &(dyn Fn(Digest) -> bool + Sync),
    ) -> Result<Pulled, FetchError> {
        if let Source::File(_) = wanted.source {
            return self.fetcher.try_fetch(wanted).await.map(new);
        }
        let name = &kept_as(name, wanted.pinned);
        let known = self.store.known(name, SystemTime::now());
        let known = known.filter(|known| needless(known.digest) || self.store.holds(known.digest));
        let Some(known) = known else { return self.fetch(name, wanted).await };
        let is_fixed = match &wanted.source {
            Source::Oci(reference) => reference.digest().is_some() || wanted.pinned.is_some(),
            _ => wanted.pinned.is_some(),
        };
        if is_fixed || asking == Asking::IfNotPresent {
            return Ok(before(known, None));
        }
        let asked = match &wanted.source {
            Source::Oci(reference) => match self.fetcher.resolve(reference, &wanted.credentials).await {
                Ok(resolved) if Some(resolved) == known.resolved => return Ok(before(known, None)),
                Ok(_) => self.fetch(name, wanted).await,
                Err(error) => Err(error),
            },
            _ => self.fetch(name, wanted).await,
        };
        match asked {
            // The registry is away. One that says no, on the other hand, is heeded.
            Err(error) if error.is_transient() => Ok(before(known, Some(error))),
            asked => asked,
        }
    }

    async fn fetch(&self, name: &str, wanted: &Wanted) -> Result<Pulled, FetchError> {
        let fetched = self.fetcher.try_fetch(wanted).await?;
        let (store, name, copy) = (Arc::clone(&self.store), name.to_owned(), fetched.clone());
        let kept = tokio::task::spawn_blocking(move || store.keep(&name, &copy, SystemTime::now())).await;
        // It can be used all the same.
        if let Ok(Err(error)) = kept {
            tracing::warn!(%error, "a fetched module is not kept");
        }
        Ok(new(fetched))
    }
}

fn new(fetched: Fetched) -> Pulled {
    Pulled { digest: fetched.digest, manifest: fetched.manifest, bytes: Some(fetched.bytes), stale: None }
}

fn before(known: Known, stale: Option<FetchError>) -> Pulled {
    Pulled { digest: known.digest, manifest: known.manifest, bytes: None, stale }
}
