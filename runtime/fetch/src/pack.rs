//! From a module to an image of it, in the forms that others read.

use crate::digest::Digest;
use crate::manifest::{
    CNCF_CONFIG, CNCF_LAYER, DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST, Descriptor, MODULE_CONFIG,
    MODULE_LAYER, Manifest, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST,
};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use std::io::{self, Write};

/// How a module is published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageFormat {
    /// As the image of a container with the file `plugin.wasm`, in OCI's types. Everything reads it.
    #[default]
    Compat,
    /// The same in Docker's types.
    Docker,
    /// As an artifact of two layers, the module and settings of a runtime (Solo's and Istio's).
    Artifact,
    /// As an artifact of one layer, of the types that the CNCF's Wasm working group chose. Istio does not read it.
    Cncf,
}

/// An image, ready to be brought to a registry.
pub(crate) struct Image {
    pub(crate) blobs: Vec<Bytes>,
    pub(crate) manifest: Bytes,
    pub(crate) media_type: &'static str,
}

/// Packs a module. The same module always makes the same image.
pub(crate) fn image(module: &Bytes, format: ImageFormat) -> io::Result<Image> {
    let compat = |config_type, layer_type, media_type| {
        let tar = archive(&[("plugin.wasm", module)])?;
        let (layer, unpacked) = (gzip(&tar)?, Digest::of(&tar).qualified());
        let config = json!({
            "architecture": "wasm",
            "os": "wasi",
            "config": {},
            "rootfs": { "type": "layers", "diff_ids": [unpacked] },
        });
        Ok::<_, io::Error>((config, config_type, vec![(Bytes::from(layer), layer_type)], media_type))
    };
    let (config, config_type, layers, media_type) = match format {
        ImageFormat::Compat => compat(OCI_CONFIG, OCI_LAYER, OCI_MANIFEST)?,
        ImageFormat::Docker => compat(DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST)?,
        ImageFormat::Artifact => {
            let settings = Bytes::from_static(br#"{"type":"envoy_proxy","abiVersions":["v0-2-1"]}"#);
            let layers = vec![
                (settings, "application/vnd.module.wasm.runtime-config.layer.v1+json"),
                (module.clone(), MODULE_LAYER),
            ];
            (json!({ "type": "envoy_proxy" }), MODULE_CONFIG, layers, OCI_MANIFEST)
        }
        ImageFormat::Cncf => {
            let config = json!({
                "architecture": "wasm",
                "os": "wasip1",
                "layerDigests": [Digest::of(module).qualified()],
            });
            (config, CNCF_CONFIG, vec![(module.clone(), CNCF_LAYER)], OCI_MANIFEST)
        }
    };
    let config = Bytes::from(config.to_string());
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media_type.to_owned()),
        config: Some(descriptor(&config, config_type)),
        layers: layers.iter().map(|(blob, kind)| descriptor(blob, kind)).collect(),
        manifests: Vec::new(),
    };
    let manifest = serde_json::to_vec(&manifest).map_err(io::Error::other)?.into();
    let blobs = layers.into_iter().map(|(blob, _)| blob).chain([config]).collect();
    Ok(Image { blobs, manifest, media_type })
}

fn descriptor(blob: &Bytes, media_type: &str) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(blob).qualified(),
        size: blob.len() as u64,
        platform: None,
    }
}

/// An archive of files, all as old as time.
pub(crate) fn archive(files: &[(&str, &[u8])]) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *content)?;
    }
    builder.into_inner()
}

pub(crate) fn gzip(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes)?;
    encoder.finish()
}
