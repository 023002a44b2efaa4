//! Manifests of images: which of an image's blobs is, or holds, the module.

use crate::digest::Digest;
use crate::error::FetchError;
use serde::{Deserialize, Serialize};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const OCI_LAYER_PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub(crate) const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
pub(crate) const MODULE_CONFIG: &str = "application/vnd.module.wasm.config.v1+json";
pub(crate) const MODULE_LAYER: &str = "application/vnd.module.wasm.content.layer.v1+wasm";
pub(crate) const CNCF_CONFIG: &str = "application/vnd.wasm.config.v0+json";
pub(crate) const CNCF_LAYER: &str = "application/wasm";

/// What is asked for, the best first.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// More layers than any image of a module has.
const LAYERS_MAX: usize = 256;

/// A blob, or a manifest in an index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<Platform>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
}

/// An image or an index, as it is written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) config: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) manifests: Vec<Descriptor>,
}

/// How a module lies in a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// It is the blob.
    Bare,
    /// It is the file `plugin.wasm` of an archive.
    Archive,
    /// Not said: whatever the blob shows to be.
    Unsaid,
}

/// What a manifest leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The manifest of this digest: that of one platform.
    Manifest(Digest),
    /// The module's blob.
    Blob { digest: Digest, size: u64, packing: Packing },
}

/// Reads a manifest and decides where the module is.
pub(crate) fn next(bytes: &[u8]) -> Result<Next, FetchError> {
    let manifest: Manifest = serde_json::from_slice(bytes)
        .map_err(|error| FetchError::Image(format!("its manifest cannot be read: {error}")))?;
    if manifest.schema_version != 2 {
        let version = manifest.schema_version;
        return Err(FetchError::Image(format!("its manifest has schema version {version}, 2 is known")));
    }
    if manifest.layers.len() > LAYERS_MAX || manifest.manifests.len() > LAYERS_MAX {
        return Err(FetchError::Image(format!("it has more than {LAYERS_MAX} layers or platforms")));
    }
    if manifest.layers.is_empty() && !manifest.manifests.is_empty() {
        return Ok(Next::Manifest(digest(platform(&manifest.manifests)?)?));
    }
    let (layer, packing) = layer(&manifest.layers)?;
    Ok(Next::Blob { digest: digest(layer)?, size: layer.size, packing })
}

fn digest(of: &Descriptor) -> Result<Digest, FetchError> {
    let parsed = of.digest.strip_prefix("sha256:").and_then(Digest::parse);
    parsed.ok_or_else(|| FetchError::Image(format!("`{}` is not a sha256 digest", of.digest)))
}

/// The manifest for a module out of those for several platforms: one for Wasm, or what most publish, or the only one.
fn platform(manifests: &[Descriptor]) -> Result<&Descriptor, FetchError> {
    let is = |wanted: fn(&Platform) -> bool| {
        manifests.iter().find(|manifest| manifest.platform.as_ref().is_some_and(wanted))
    };
    // Attestations stand beside images, as of an unknown platform.
    let only = || manifests.first().filter(|_| manifests.len() == 1);
    let unsaid = || manifests.iter().find(|manifest| manifest.platform.is_none());
    is(|platform| platform.architecture.contains("wasm") || platform.os.contains("wasi"))
        .or_else(|| is(|platform| platform.architecture == "amd64" && platform.os == "linux"))
        .or_else(unsaid)
        .or_else(only)
        .ok_or_else(|| {
            FetchError::Image("it has images for several platforms, none of them for Wasm".to_owned())
        })
}

/// The layer with the module. Artifacts mark it; of an image it is the last one, which holds a file `plugin.wasm`.
fn layer(layers: &[Descriptor]) -> Result<(&Descriptor, Packing), FetchError> {
    let is_module = |layer: &&Descriptor| {
        matches!(
            layer.media_type.as_str(),
            MODULE_LAYER | CNCF_LAYER | "application/vnd.wasm.content.layer.v1+wasm"
        )
    };
    let mut modules = layers.iter().filter(is_module);
    match (modules.next(), modules.next()) {
        (Some(module), None) => return Ok((module, Packing::Bare)),
        (Some(_), Some(_)) => return Err(FetchError::Image("it has several modules".to_owned())),
        (None, _) => {}
    }
    let Some(last) = layers.last() else {
        return Err(FetchError::Image("it has no layers".to_owned()));
    };
    match last.media_type.as_str() {
        OCI_LAYER | OCI_LAYER_PLAIN | DOCKER_LAYER => Ok((last, Packing::Archive)),
        _ if layers.len() == 1 => Ok((last, Packing::Unsaid)),
        other => {
            Err(FetchError::Image(format!("its last layer is of the type `{other}`, which is not known")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn blob(kind: &str, content: &str) -> Value {
        json!({ "mediaType": kind, "digest": Digest::of(content.as_bytes()).qualified(), "size": 7 })
    }

    fn for_platform(architecture: &str, os: &str) -> Value {
        let mut manifest = blob(OCI_MANIFEST, &format!("{os}/{architecture}"));
        manifest["platform"] = json!({ "architecture": architecture, "os": os });
        manifest
    }

    #[test]
    fn every_way_to_publish_a_module_is_understood() {
        let image = |layers: &[Value]| json!({ "schemaVersion": 2, "config": blob(OCI_CONFIG, "{}"), "layers": layers });
        let index = |manifests: &[Value]| json!({ "schemaVersion": 2, "manifests": manifests });
        let archive = |content: &str| Ok((content.to_owned(), Some(Packing::Archive)));
        let bare = |content: &str| Ok((content.to_owned(), Some(Packing::Bare)));
        let leads = |content: &str| Ok((content.to_owned(), None));
        type Row<'a> = (&'a str, Value, Result<(String, Option<Packing>), &'a str>);
        let rows: Vec<Row<'_>> = vec![
            ("docker image", image(&[blob(DOCKER_LAYER, "a"), blob(DOCKER_LAYER, "b")]), archive("b")),
            ("oci image", image(&[blob(OCI_LAYER, "a")]), archive("a")),
            ("oci image, not compressed", image(&[blob(OCI_LAYER_PLAIN, "a")]), archive("a")),
            (
                "oci artifact",
                image(&[blob(MODULE_LAYER, "m"), blob("application/x", "runtime-config")]),
                bare("m"),
            ),
            (
                "oci artifact, other order",
                image(&[blob("application/x", "c"), blob(MODULE_LAYER, "m")]),
                bare("m"),
            ),
            ("cncf artifact", image(&[blob(CNCF_LAYER, "m")]), bare("m")),
            (
                "one blob",
                image(&[blob("application/octet-stream", "m")]),
                Ok(("m".into(), Some(Packing::Unsaid))),
            ),
            ("several blobs", image(&[blob("a/b", "m"), blob("a/c", "n")]), Err("`a/c`")),
            ("two modules", image(&[blob(CNCF_LAYER, "m"), blob(CNCF_LAYER, "n")]), Err("several modules")),
            ("no layers", image(&[]), Err("no layers")),
            (
                "zstd",
                image(&[blob("a", "x"), blob("application/vnd.oci.image.layer.v1.tar+zstd", "m")]),
                Err("zstd"),
            ),
            (
                "index for wasm",
                index(&[for_platform("amd64", "linux"), for_platform("wasm", "wasi")]),
                leads("wasi/wasm"),
            ),
            (
                "index for many",
                index(&[for_platform("arm64", "linux"), for_platform("amd64", "linux")]),
                leads("linux/amd64"),
            ),
            ("index for another", index(&[for_platform("arm64", "linux")]), leads("linux/arm64")),
            (
                "index without platforms",
                index(&[blob(OCI_MANIFEST, "x"), for_platform("unknown", "unknown")]),
                leads("x"),
            ),
            (
                "index for others",
                index(&[for_platform("arm64", "linux"), for_platform("s390x", "linux")]),
                Err("none of them"),
            ),
            ("schema 1", json!({ "schemaVersion": 1, "fsLayers": [] }), Err("schema version 1")),
            (
                "bad digest",
                image(&[json!({ "mediaType": OCI_LAYER, "digest": "md5:1", "size": 1 })]),
                Err("`md5:1`"),
            ),
            ("no manifest", json!([]), Err("cannot be read")),
        ];
        for (name, manifest, expected) in rows {
            let found = match next(manifest.to_string().as_bytes()) {
                Ok(Next::Manifest(digest)) => Ok((digest, None)),
                Ok(Next::Blob { digest, size: 7, packing }) => Ok((digest, Some(packing))),
                Ok(other) => panic!("{name}: {other:?}"),
                Err(error) => Err(error.to_string()),
            };
            match (found, expected) {
                (Ok((digest, packing)), Ok((content, expected))) => {
                    assert_eq!((digest, packing), (Digest::of(content.as_bytes()), expected), "{name}");
                }
                (Err(said), Err(expected)) => assert!(said.contains(expected), "{name}: {said}"),
                (found, expected) => panic!("{name}: {found:?}, expected {expected:?}"),
            }
        }
    }
}
