//! Fetching: from a URL to the module's bytes.

use crate::backoff::Backoff;
use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::error::FetchError;
use crate::manifest::{self, Next, Packing};
use crate::pack::{self, ImageFormat};
use crate::registry::{Access, Session};
use crate::source::{Reference, Source};
use crate::unpack;
use crate::web::{Call, Trust, Web, host};
use bytes::Bytes;
use http::{StatusCode, Uri};
use ipnet::IpNet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How modules are fetched.
#[derive(Clone, Debug)]
pub struct FetchSettings {
    /// A file of root certificates, PEM, that servers may chain to beside the system's. Default none.
    pub roots: Option<PathBuf>,
    /// Registries, `host` or `host:port`, that need not prove who they are and may speak plain HTTP; `*` is any. Default
    /// none. Registries on a loopback address may always speak plain HTTP.
    pub insecure_registries: Vec<String>,
    /// Addresses that are not asked, beside link-local ones and those of clouds' metadata. Default none.
    pub blocked: Vec<IpNet>,
    /// The largest module, in bytes, packed or not. Default 256 MiB, as in Istio's agent.
    pub module_bytes_max: u64,
    /// How long a server may be silent. Default 15 s, as in Istio's agent.
    pub silence_max: Duration,
    /// How long one try may take. Default 5 min.
    pub try_max: Duration,
    /// How often it is tried again when the network or the server fails. Default 5, as in Istio's agent.
    pub retries: u32,
    /// The wait before the second try; it doubles. Default 500 ms, as in Istio's agent.
    pub backoff: Duration,
}

impl Default for FetchSettings {
    fn default() -> Self {
        Self {
            roots: None,
            insecure_registries: Vec::new(),
            blocked: Vec::new(),
            module_bytes_max: 256 << 20,
            silence_max: Duration::from_secs(15),
            try_max: Duration::from_secs(300),
            retries: 5,
            backoff: Duration::from_millis(500),
        }
    }
}

/// The longest wait between two tries of one fetch.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// What is to be fetched.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// From where.
    pub source: Source,
    /// What it must be: an image's manifest, or the module itself.
    pub pinned: Option<Digest>,
    /// Who to say that we are.
    pub credentials: Credentials,
}

/// A module.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Its bytes, unpacked.
    pub bytes: Bytes,
    /// Their digest.
    pub digest: Digest,
    /// The digest of the image's manifest.
    pub manifest: Option<Digest>,
    /// What the image's tag meant: the digest of the manifest, or of the index that names it.
    pub resolved: Option<Digest>,
}

/// Fetches modules, and publishes them.
pub struct Fetcher {
    settings: FetchSettings,
    web: Web,
}

impl Fetcher {
    /// Root certificates are read when the first server is to prove who it is.
    pub fn new(settings: FetchSettings) -> Self {
        let web = Web::new(settings.roots.clone(), settings.blocked.clone(), settings.silence_max);
        Self { settings, web }
    }

    /// Fetches a module, trying again as the settings say.
    ///
    /// # Errors
    /// When it cannot be had, or is not what is wanted.
    pub async fn fetch(&self, wanted: &Wanted) -> Result<Fetched, FetchError> {
        let mut backoff = Backoff::new(self.settings.backoff, BACKOFF_MAX);
        let mut retries = self.settings.retries;
        loop {
            match self.try_fetch(wanted).await {
                Err(error) if error.is_transient() && retries > 0 => {
                    retries -= 1;
                    let pause = backoff.pause();
                    tracing::debug!(%error, ?pause, "a module was not got, will retry");
                    tokio::time::sleep(pause).await;
                }
                ended => return ended,
            }
        }
    }

    /// Fetches a module, trying once.
    ///
    /// # Errors
    /// When it cannot be had, or is not what is wanted.
    pub async fn try_fetch(&self, wanted: &Wanted) -> Result<Fetched, FetchError> {
        let fetch = async {
            match &wanted.source {
                Source::File(path) => self.fetch_file(path.clone(), wanted.pinned).await,
                Source::Http(uri) => self.fetch_web(uri, wanted.pinned).await,
                Source::Oci(reference) => self.fetch_image(reference, wanted).await,
            }
        };
        let limit = self.settings.try_max;
        tokio::time::timeout(limit, fetch).await.map_err(|_| FetchError::Timeout(limit))?
    }

    /// What an image's reference means now: the digest of its manifest or index.
    ///
    /// # Errors
    /// When the registry does not say.
    pub async fn resolve(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<Digest, FetchError> {
        let resolve = async { self.session(reference, credentials, Access::Pull).await?.resolve().await };
        let limit = self.settings.try_max;
        tokio::time::timeout(limit, resolve).await.map_err(|_| FetchError::Timeout(limit))?
    }

    /// Brings a module to a registry as an image, under the reference's tag, and returns the digest of its manifest.
    ///
    /// # Errors
    /// When it is no module, or the registry does not take it.
    pub async fn push(
        &self,
        module: &Bytes,
        format: ImageFormat,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<Digest, FetchError> {
        unpack::module(module.clone(), Packing::Bare, self.settings.module_bytes_max)?;
        let image = pack::image(module, format).map_err(FetchError::Packing)?;
        let push = async { self.session(reference, credentials, Access::Push).await?.push(&image).await };
        let limit = self.settings.try_max;
        tokio::time::timeout(limit, push).await.map_err(|_| FetchError::Timeout(limit))?
    }

    async fn session<'a>(
        &'a self,
        reference: &'a Reference,
        credentials: &'a Credentials,
        access: Access,
    ) -> Result<Session<'a>, FetchError> {
        let registry = reference.registry();
        let insecure =
            self.settings.insecure_registries.iter().any(|known| known == "*" || known == registry);
        let login = credentials.login(registry, reference.repository());
        Session::open(&self.web, reference, login, access, insecure).await
    }

    async fn fetch_file(&self, path: PathBuf, pinned: Option<Digest>) -> Result<Fetched, FetchError> {
        let bytes_max = self.settings.module_bytes_max;
        let read = tokio::task::spawn_blocking(move || unpacked(read(&path, bytes_max)?, pinned, bytes_max));
        joined(read.await)
    }

    async fn fetch_web(&self, uri: &Uri, pinned: Option<Digest>) -> Result<Fetched, FetchError> {
        let bytes_max = self.settings.module_bytes_max;
        let answer = self.web.call(Call::get(uri.clone(), Trust::Verified, bytes_max)).await?;
        if answer.status != StatusCode::OK {
            return Err(FetchError::Status { host: host(uri).to_owned(), status: answer.status, code: None });
        }
        let bytes = answer.body;
        joined(tokio::task::spawn_blocking(move || unpacked(bytes, pinned, bytes_max)).await)
    }

    async fn fetch_image(&self, reference: &Reference, wanted: &Wanted) -> Result<Fetched, FetchError> {
        let bytes_max = self.settings.module_bytes_max;
        let mut session = self.session(reference, &wanted.credentials, Access::Pull).await?;
        let mut found = session.manifest(None).await?;
        let resolved = found.digest;
        let mut next = manifest::next(&found.bytes)?;
        if let Next::Manifest(digest) = next {
            found = session.manifest(Some(digest)).await?;
            next = manifest::next(&found.bytes)?;
        }
        let Next::Blob { digest, size, packing } = next else {
            return Err(FetchError::Image("its index leads to another index".to_owned()));
        };
        let manifest = found.digest;
        if let Some(wanted) = wanted.pinned.filter(|wanted| *wanted != manifest && *wanted != resolved) {
            return Err(FetchError::Digest { actual: manifest, wanted });
        }
        if size > bytes_max {
            return Err(FetchError::TooLarge { bytes_max });
        }
        let blob = session.blob(digest, bytes_max).await?;
        let unpack = tokio::task::spawn_blocking(move || {
            let bytes = unpack::module(blob, packing, bytes_max)?;
            let digest = Digest::of(&bytes);
            Ok(Fetched { bytes, digest, manifest: Some(manifest), resolved: Some(resolved) })
        });
        joined(unpack.await)
    }
}

/// The file's bytes.
fn read(path: &Path, bytes_max: u64) -> Result<Bytes, FetchError> {
    let failed = |source| FetchError::Read { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(FetchError::NotAFile(path.to_owned()));
    }
    if metadata.len() > bytes_max {
        return Err(FetchError::TooLarge { bytes_max });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or_default());
    let file = std::fs::File::open(path).map_err(failed)?;
    // It may have grown meanwhile.
    file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > bytes_max {
        return Err(FetchError::TooLarge { bytes_max });
    }
    Ok(bytes.into())
}

/// The module in what was read, either of which may be pinned.
fn unpacked(read: Bytes, pinned: Option<Digest>, bytes_max: u64) -> Result<Fetched, FetchError> {
    let bytes = unpack::module(read.clone(), Packing::Unsaid, bytes_max)?;
    let digest = Digest::of(&bytes);
    let is_other = |wanted: &Digest| *wanted != digest && (read == bytes || *wanted != Digest::of(&read));
    if let Some(wanted) = pinned.filter(is_other) {
        return Err(FetchError::Digest { actual: digest, wanted });
    }
    Ok(Fetched { bytes, digest, manifest: None, resolved: None })
}

/// What a thread returned. None is left behind but when the process ends.
fn joined<T>(ended: Result<Result<T, FetchError>, tokio::task::JoinError>) -> Result<T, FetchError> {
    ended.unwrap_or_else(|error| Err(FetchError::Packing(std::io::Error::other(error))))
}
