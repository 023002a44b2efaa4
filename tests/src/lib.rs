//! The end-to-end tests, the harness they share and the tidy test.

pub mod envoy;

/// Says that a test could not run, and why. Where `CAIRN_NO_SKIPS` is set to anything, as `.ci/run` does, that is a
/// failure: what CI does not test it must not pass.
///
/// # Panics
/// Where `CAIRN_NO_SKIPS` is set.
pub fn skipped(reason: &str) {
    let may_skip = std::env::var_os("CAIRN_NO_SKIPS").is_none_or(|value| value.is_empty());
    assert!(may_skip, "CAIRN_NO_SKIPS is set, and this would be skipped: {reason}");
    println!("skipped: {reason}");
}
