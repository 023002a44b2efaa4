//! The seeds of the fuzz targets, through the same functions, and cut short anywhere; and what becomes of some when bytes of them
//! change at random.

use crate::fuzz;
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::{Duration, Instant};

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 7] = [
    ("policy", fuzz::policy),
    ("path", fuzz::path),
    ("jwt", fuzz::jwt),
    ("format", fuzz::format),
    ("cel", fuzz::cel),
    ("calls", fuzz::calls),
    // What the target `module` makes of its seeds; what makes it is not here.
    ("modules", modules),
];

fn modules(module: &[u8]) {
    fuzz::proxy::run(module, b"/items?a=b\nx-in: hello");
}

/// Seeds are cut at so many places, evenly.
const CUTS: usize = 16;

fn seeds(name: &str) -> Result<Vec<Vec<u8>>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
    let files = std::fs::read_dir(folder).with_context(|| format!("seeds of {name}"))?;
    let seeds = files.map(|file| Ok(std::fs::read(file?.path())?)).collect::<Result<Vec<_>>>()?;
    ensure!(!seeds.is_empty(), "{name} has no seeds");
    Ok(seeds)
}

#[test]
fn every_seed_of_every_fuzz_target_passes() -> Result<()> {
    for (name, target) in TARGETS {
        for bytes in seeds(name)? {
            for cut in 0..=CUTS {
                target(&bytes[..bytes.len() * cut / CUTS]);
            }
        }
    }
    Ok(())
}

/// Says what was tried when that was too much.
struct Tried<'a>(&'a str, &'a [u8]);

impl Drop for Tried<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let bytes: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            println!("{}: {bytes}", self.0);
        }
    }
}

/// For a second, or as many as `CAIRN_FUZZ_SECONDS` says: libFuzzer finds more, but is not everywhere.
#[test]
fn guests_made_of_seeds_that_changed_pass() -> Result<()> {
    let seconds = std::env::var("CAIRN_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut random = fastrand::Rng::new();
    let targets: [(&str, Target); 2] = [("calls", fuzz::calls), ("modules", modules)];
    let mut corpora = [seeds("calls")?, seeds("modules")?];
    let mut counts = [0u32; 2];
    while Instant::now() < until {
        for (((name, target), corpus), count) in targets.iter().zip(&mut corpora).zip(&mut counts) {
            let bytes = changed(&mut random, corpus);
            let _tried = Tried(name, &bytes);
            target(&bytes);
            *count += 1;
            // Changes of changes reach further; the seeds themselves stay.
            if random.u8(..) < 8 && corpus.len() < 200 {
                corpus.push(bytes.clone());
            }
        }
    }
    println!("{} guests of calls, {} modules", counts[0], counts[1]);
    Ok(())
}

/// One of the corpus with a few bytes put in, taken out or changed, or with the end of another.
fn changed(random: &mut fastrand::Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let any = |random: &mut fastrand::Rng| random.choice(corpus).cloned().unwrap_or_default();
    let mut bytes = any(random);
    for _ in 0..random.usize(1..12) {
        let at = random.usize(..=bytes.len());
        match random.u8(..8) {
            0 => bytes.insert(at, random.u8(..)),
            1 if at < bytes.len() => {
                bytes.remove(at);
            }
            2 => {
                let other = any(random);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[at.min(other.len())..]);
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = if random.bool() { random.u8(..) } else { *byte ^ (1 << random.u8(..8)) };
                }
            }
        }
        bytes.truncate(4096);
    }
    bytes
}
