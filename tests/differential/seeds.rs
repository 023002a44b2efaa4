//! The seeds of the fuzz targets, through the same functions, and cut short anywhere.

use crate::fuzz;
use anyhow::{Context, Result};
use std::path::Path;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 7] = [
    ("policy", fuzz::policy),
    ("path", fuzz::path),
    ("jwt", fuzz::jwt),
    ("format", fuzz::format),
    ("cel", fuzz::cel),
    ("calls", fuzz::calls),
    // What the target `module` makes of its seeds; what makes it is not here.
    ("modules", |module| fuzz::proxy::run(module, b"/items?a=b\nx-in: hello")),
];

/// Seeds are cut at so many places, evenly.
const CUTS: usize = 16;

#[test]
fn every_seed_of_every_fuzz_target_passes() -> Result<()> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    for (name, target) in TARGETS {
        let files = std::fs::read_dir(seeds.join(name)).with_context(|| format!("seeds of {name}"))?;
        let mut count = 0;
        for file in files {
            let bytes = std::fs::read(file?.path())?;
            for cut in 0..=CUTS {
                target(&bytes[..bytes.len() * cut / CUTS]);
            }
            count += 1;
        }
        anyhow::ensure!(count > 0, "{name} has no seeds");
    }
    Ok(())
}
