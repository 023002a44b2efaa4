//! Path normalisation: whatever is sent, its normal form is one that nobody reads in two ways.

use cairn_mesh::{PathNormalization, normalize_path};

/// Normalises a request target in every mode.
pub fn path(data: &[u8]) {
    let Ok(target) = std::str::from_utf8(data) else { return };
    for mode in [
        PathNormalization::None,
        PathNormalization::Base,
        PathNormalization::MergeSlashes,
        PathNormalization::DecodeAndMergeSlashes,
    ] {
        check(target, mode);
    }
}

fn check(target: &str, mode: PathNormalization) {
    let normal = normalize_path(target, mode).into_owned();
    assert_eq!(normalize_path(&normal, mode), normal, "{mode:?}: again, it is another");
    assert!(!normal.contains('#'), "{mode:?}: a fragment is left");
    if mode == PathNormalization::None || !target.starts_with('/') {
        return;
    }
    let (path, query) = normal.split_once('?').map_or((&*normal, None), |(path, query)| (path, Some(query)));
    let sent = target.split('#').next().unwrap_or_default();
    assert_eq!(query, sent.split_once('?').map(|(_, query)| query), "{mode:?}: the query changed");
    assert!(path.starts_with('/') && !path.contains(['\\', '"', '<', '>', '^', '`', '{', '|', '}']));
    let lower = path.to_ascii_lowercase();
    for encoded in ["%2e", "%7e", "%5f", "%2d", "%41", "%61", "%30"] {
        assert!(!lower.contains(encoded), "{mode:?}: {encoded} is left in {path}");
    }
    assert!(path.split('/').all(|segment| segment != "." && segment != ".."), "{mode:?}: {path}");
    if mode != PathNormalization::Base {
        assert!(!path.contains("//"), "{mode:?}: {path}");
    }
    if mode == PathNormalization::DecodeAndMergeSlashes {
        assert!(!lower.contains("%2f") && !lower.contains("%5c"), "{path}");
    }
}
