//! From what was read to the module in it: bare, compressed, in an archive, or both. Everything is bounded while it is
//! unpacked, since a small file may unfold to a very large one.

use crate::error::FetchError;
use crate::manifest::Packing;
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use std::io::{self, Read};

const WASM: &[u8] = b"\0asm";
const GZIP: &[u8] = b"\x1f\x8b";

/// Where the letters `ustar` stand in an archive.
const TAR_MARK: (usize, &[u8]) = (257, b"ustar");

/// What the file in an image's layer is called.
const PLUGIN: &str = "plugin.wasm";

/// Files of an archive that are passed over.
const ENTRIES_MAX: usize = 10_000;

/// The module in `bytes`.
pub(crate) fn module(bytes: Bytes, packing: Packing, bytes_max: u64) -> Result<Bytes, FetchError> {
    let bytes =
        if bytes.starts_with(GZIP) && packing != Packing::Bare { gunzip(&bytes, bytes_max)? } else { bytes };
    let is_tar = bytes.get(TAR_MARK.0..).is_some_and(|rest| rest.starts_with(TAR_MARK.1));
    let module = match packing {
        Packing::Archive => from_archive(&bytes, &|path| path == PLUGIN, bytes_max)?,
        Packing::Unsaid if is_tar => from_archive(&bytes, &|_| true, bytes_max)?,
        Packing::Bare | Packing::Unsaid => bytes,
    };
    if !module.starts_with(WASM) {
        return Err(FetchError::NotAModule);
    }
    if module.len() as u64 > bytes_max {
        return Err(FetchError::TooLarge { bytes_max });
    }
    Ok(module)
}

/// What the compressed bytes unfold to. Archives have files beside the module, so twice its size is allowed.
fn gunzip(bytes: &[u8], bytes_max: u64) -> Result<Bytes, FetchError> {
    let mut unfolded = Vec::new();
    let limit = bytes_max.saturating_mul(2);
    let mut reader = MultiGzDecoder::new(bytes).take(limit.saturating_add(1));
    reader.read_to_end(&mut unfolded).map_err(FetchError::Packing)?;
    if unfolded.len() as u64 > limit {
        return Err(FetchError::TooLarge { bytes_max });
    }
    Ok(unfolded.into())
}

/// The first file whose name is wanted.
fn from_archive(bytes: &Bytes, wanted: &dyn Fn(&str) -> bool, bytes_max: u64) -> Result<Bytes, FetchError> {
    let mut archive = tar::Archive::new(&bytes[..]);
    for entry in archive.entries().map_err(FetchError::Packing)?.take(ENTRIES_MAX) {
        let mut entry = entry.map_err(FetchError::Packing)?;
        let path = entry.path().map_err(FetchError::Packing)?;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !entry.header().entry_type().is_file() || !wanted(name) {
            continue;
        }
        if entry.size() > bytes_max {
            return Err(FetchError::TooLarge { bytes_max });
        }
        let mut module = Vec::new();
        entry.read_to_end(&mut module).map_err(FetchError::Packing)?;
        return Ok(module.into());
    }
    let missing =
        io::Error::new(io::ErrorKind::NotFound, format!("there is no file {PLUGIN} in the archive"));
    Err(FetchError::Packing(missing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{archive, gzip};

    const MODULE: &[u8] = b"\0asm\x01\0\0\0";

    fn check(name: &str, bytes: Vec<u8>, packing: Packing, expected: Result<&[u8], &str>) {
        let found = module(bytes.into(), packing, 100_000);
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{name}"),
            (Err(error), Err(expected)) => {
                let said = format!("{error:?} {error}");
                assert!(said.contains(expected), "{name}: {said}");
            }
            (found, expected) => panic!("{name}: {found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn modules_are_found_however_they_are_packed() {
        let layer = |files: &[(&str, &[u8])]| archive(files).unwrap();
        let pressed = |bytes: &[u8]| gzip(bytes).unwrap();
        let zeros = vec![0; 1_000_000];
        let large: Vec<u8> = MODULE.iter().copied().chain(zeros.iter().copied()).collect();
        let image = layer(&[("etc/readme", b"x"), ("./plugin.wasm", MODULE)]);
        let two_members = [pressed(&MODULE[..4]), pressed(&MODULE[4..])].concat();
        use Packing::{Archive, Bare, Unsaid};
        check("bare", MODULE.into(), Unsaid, Ok(MODULE));
        check("bare, said to be", MODULE.into(), Bare, Ok(MODULE));
        check("gzip", pressed(MODULE), Unsaid, Ok(MODULE));
        check("gzip of two members", two_members, Unsaid, Ok(MODULE));
        check("tar", layer(&[("anything", MODULE)]), Unsaid, Ok(MODULE));
        check("tar in gzip", pressed(&layer(&[("anything", MODULE)])), Unsaid, Ok(MODULE));
        check("image's layer", pressed(&image), Archive, Ok(MODULE));
        check("image's layer, not compressed", image.clone(), Archive, Ok(MODULE));
        check(
            "image's layer without a plugin",
            layer(&[("other.wasm", MODULE)]),
            Archive,
            Err("no file plugin.wasm"),
        );
        check("something else", b"<html>".to_vec(), Unsaid, Err("NotAModule"));
        check("something else in gzip", pressed(b"<html>"), Unsaid, Err("NotAModule"));
        check("gzip said to be bare", pressed(MODULE), Bare, Err("NotAModule"));
        check("nothing", Vec::new(), Unsaid, Err("NotAModule"));
        check("too large", large.clone(), Unsaid, Err("TooLarge"));
        check("too large in gzip", pressed(&large), Unsaid, Err("TooLarge"));
        check("too large in tar", layer(&[("plugin.wasm", &large)]), Archive, Err("TooLarge"));
        let damaged = pressed(MODULE);
        check("half a gzip", damaged[..damaged.len() - 6].to_vec(), Unsaid, Err("Packing"));
        check("half a tar", image[..1200].to_vec(), Archive, Err("Packing"));
    }
}
