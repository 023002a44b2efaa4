//! Where a module is: what its URL says.

use crate::digest::Digest;
use http::Uri;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

/// Where a module is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In a file of this machine.
    File(PathBuf),
    /// On a server of files, over HTTP or HTTPS.
    Http(Uri),
    /// In a registry of images.
    Oci(Reference),
}

/// Why a URL names no module.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Its scheme is none of those that are known.
    #[error("`{0}` is not one of the schemes file, http, https, oci")]
    Scheme(String),
    /// A file is not named by its whole path.
    #[error("a file is named by its whole path, `file:///…`")]
    Path,
    /// It is no URL of a server.
    #[error("`{0}` is not a URL with a host, and without user and password")]
    Uri(String),
    /// It is no reference of an image.
    #[error(
        "`{0}` is not the reference of an image, `registry/repository:tag` or `registry/repository@sha256:…`"
    )]
    Reference(String),
}

impl Source {
    /// Reads a URL. One without a scheme is the reference of an image, as in Istio.
    ///
    /// # Errors
    /// When the URL names nothing that can be fetched.
    pub fn parse(url: &str) -> Result<Self, SourceError> {
        match url.split_once("://") {
            Some(("file", path)) if path.starts_with('/') && path.len() > 1 => Ok(Self::File(path.into())),
            Some(("file", _)) => Err(SourceError::Path),
            Some(("http" | "https", _)) => web_uri(url).map(Self::Http),
            Some(("oci", reference)) => Reference::parse(reference).map(Self::Oci),
            Some((scheme, _)) => Err(SourceError::Scheme(scheme.to_owned())),
            None => Reference::parse(url).map(Self::Oci),
        }
    }
}

fn web_uri(text: &str) -> Result<Uri, SourceError> {
    let bad = || SourceError::Uri(text.to_owned());
    let uri: Uri = text.parse().map_err(|_| bad())?;
    let is_plain = uri.authority().is_some_and(|at| !at.as_str().contains('@') && !at.host().is_empty());
    if is_plain { Ok(uri) } else { Err(bad()) }
}

/// The reference of an image: `registry/repository:tag`, `registry/repository@sha256:…`, or both.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// As long as registries allow names and tags to be (distribution-spec, "Pulling manifests").
const REPOSITORY_LEN_MAX: usize = 255;
const TAG_LEN_MAX: usize = 128;

/// What images without a registry come from, as everywhere.
const DOCKER_HUB: &str = "index.docker.io";

impl Reference {
    /// Reads a reference. One without a registry is of Docker Hub.
    ///
    /// # Errors
    /// When it is not one.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let bad = || SourceError::Reference(text.to_owned());
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) if digest.starts_with("sha256:") => {
                (name, Some(Digest::parse(digest).ok_or_else(bad)?))
            }
            Some(_) => return Err(bad()),
            None => (text, None),
        };
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if is_host(first) => (first, rest),
            _ => (DOCKER_HUB, name),
        };
        let is_hub = matches!(registry, "docker.io" | "registry-1.docker.io" | DOCKER_HUB);
        let repository = match repository {
            official if is_hub && !official.contains('/') => format!("library/{official}"),
            other => other.to_owned(),
        };
        if !is_repository(&repository) || !tag.is_none_or(is_tag) || !is_registry(registry) {
            return Err(bad());
        }
        let registry = if is_hub { DOCKER_HUB } else { registry }.to_owned();
        Ok(Self { registry, repository, tag: tag.map(str::to_owned), digest })
    }

    /// The registry, `host` or `host:port`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository in it.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if it has one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the manifest, if it is pinned.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Whether what it names may change by itself and often: it has no digest, and the tag `latest` or none.
    pub fn is_latest(&self) -> bool {
        self.digest.is_none() && matches!(self.tag.as_deref(), None | Some("latest"))
    }

    /// What the manifest is asked for by: the digest, else the tag.
    pub(crate) fn wanted(&self) -> String {
        match self.digest {
            Some(digest) => digest.qualified(),
            None => self.tag.clone().unwrap_or_else(|| "latest".to_owned()),
        }
    }

    /// The server that speaks for the registry: Docker Hub's is not where its images are said to be.
    pub(crate) fn server(&self) -> &str {
        if self.registry == DOCKER_HUB { "registry-1.docker.io" } else { &self.registry }
    }

    /// Whether the registry is on this machine, to which plain HTTP can do no harm.
    pub(crate) fn is_local(&self) -> bool {
        let host = host(&self.registry);
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.map_or(Ok(()), |digest| write!(f, "@{}", digest.qualified()))
    }
}

/// The host of `host:port`, without the brackets of IPv6.
fn host(registry: &str) -> &str {
    if let Some(rest) = registry.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    registry.split(':').next().unwrap_or_default()
}

/// Whether the first part of a name is a registry and not a folder of Docker Hub.
fn is_host(part: &str) -> bool {
    part.contains(['.', ':']) || part == "localhost"
}

fn is_registry(registry: &str) -> bool {
    let Ok(authority) = registry.parse::<http::uri::Authority>() else { return false };
    // A port that is no number is not told by the parser.
    let has_port =
        !registry.ends_with(']') && registry.rsplit(']').next().is_some_and(|rest| rest.contains(':'));
    !authority.host().is_empty() && !registry.contains('@') && has_port == authority.port_u16().is_some()
}

fn is_repository(name: &str) -> bool {
    let is_part = |part: &str| {
        let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
        let inner = |byte: u8| plain(byte) || matches!(byte, b'.' | b'_' | b'-');
        let ends = part.bytes().next().is_some_and(plain) && part.bytes().last().is_some_and(plain);
        ends && part.bytes().all(inner)
    };
    name.len() <= REPOSITORY_LEN_MAX && name.split('/').all(is_part)
}

fn is_tag(tag: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let starts = tag.bytes().next().is_some_and(plain);
    starts && tag.len() <= TAG_LEN_MAX && tag.bytes().all(|byte| plain(byte) || matches!(byte, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_say_where_modules_are() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let pinned = format!("oci://ghcr.io/a/b:v1@sha256:{hex}");
        for (url, expected) in [
            ("file:///opt/tag.wasm", "file /opt/tag.wasm"),
            ("https://host/x/tag.wasm?v=1", "http https://host/x/tag.wasm?v=1"),
            ("http://10.0.0.1:8080/tag.wasm", "http http://10.0.0.1:8080/tag.wasm"),
            ("oci://ghcr.io/istio/basic-auth:1.12.0", "oci ghcr.io istio/basic-auth 1.12.0"),
            ("ghcr.io/istio/basic-auth", "oci ghcr.io istio/basic-auth latest"),
            ("oci://localhost:5000/tag:latest", "oci localhost:5000 tag latest"),
            ("oci://[::1]:5000/tag", "oci [::1]:5000 tag latest"),
            ("oci://tag", "oci index.docker.io library/tag latest"),
            ("oci://docker.io/me/tag:1", "oci index.docker.io me/tag 1"),
            ("oci://me/tag:1", "oci index.docker.io me/tag 1"),
            (&pinned, &format!("oci ghcr.io a/b sha256:{hex}")),
        ] {
            let said = match Source::parse(url).unwrap() {
                Source::File(path) => format!("file {}", path.display()),
                Source::Http(uri) => format!("http {uri}"),
                Source::Oci(image) => {
                    format!("oci {} {} {}", image.registry(), image.repository(), image.wanted())
                }
            };
            assert_eq!(said, expected, "{url}");
        }
    }

    #[test]
    fn urls_that_name_nothing_are_refused() {
        for url in [
            "",
            "file://tag.wasm",
            "file:///",
            "ftp://host/x",
            "https://",
            "https:///x",
            "https://user:word@host/x",
            "oci://",
            "oci://host.example/",
            "oci://host.example/Upper",
            "oci://host.example/a//b",
            "oci://host.example/a:tag with space",
            "oci://host.example/a@sha256:12",
            "oci://host.example/a@md5:12",
            "oci://host.example/../a",
            "oci://user@host.example/a",
            "oci://host.example:x/a",
            "oci://host.example:/a",
            "http://host/a b",
        ] {
            assert!(Source::parse(url).is_err(), "{url}: {:?}", Source::parse(url));
        }
    }

    #[test]
    fn a_missing_or_latest_tag_may_change_by_itself() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for (text, expected) in [
            ("ghcr.io/a", true),
            ("ghcr.io/a:latest", true),
            ("ghcr.io/a:1", false),
            (&format!("ghcr.io/a:latest@sha256:{hex}"), false),
        ] {
            assert_eq!(Reference::parse(text).unwrap().is_latest(), expected, "{text}");
        }
    }
}
