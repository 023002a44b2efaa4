//! Addresses of pods and services that a manifest gives none: from one block, by namespace and name, kept on disk so
//! that they survive edits.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// Where the mesh's addresses lie: a pod block, a service block and a twin block, of 65,536 addresses each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    first: u8,
    pods: u8,
    services: u8,
}

/// How far twin addresses lie above pods' own in the second octet (see `cairn_ztunnel`).
const TWIN_DISTANCE: u8 = 20;

impl Block {
    /// A block of loopback: pods in `127.second/16`, services ten above, twins twenty above.
    ///
    /// # Errors
    /// When the block would reach the addresses that other programs use (second octet 0) or leave the network.
    pub fn loopback(second: u8) -> Result<Self> {
        ensure!((1..=200).contains(&second), "block {second} is not within 1 to 200");
        Ok(Self { first: 127, pods: second, services: second + TWIN_DISTANCE / 2 })
    }

    /// The addresses of a mesh in network namespaces of its own: pods in 10.244/16, services in 10.96/16, as
    /// Kubernetes clusters often have them.
    pub fn namespaces() -> Self {
        Self { first: 10, pods: 244, services: 96 }
    }

    /// The address of the machine itself among the pods: xDS and CA are served here.
    pub fn node(self) -> Ipv4Addr {
        Ipv4Addr::new(self.first, self.pods, 0, 1)
    }

    /// The address of the ztunnel's ports for operators.
    pub fn ztunnel(self) -> Ipv4Addr {
        Ipv4Addr::new(self.first, self.pods, 0, 2)
    }

    fn nth(self, second: u8, index: u32) -> Result<IpAddr> {
        // The first 256 are kept for the machine's own ends.
        let number = index + 256;
        ensure!(number < 65_000, "no address is left in {}.{second}.0.0/16", self.first);
        let [_, _, high, low] = number.to_be_bytes();
        Ok(IpAddr::V4(Ipv4Addr::new(self.first, second, high, low)))
    }
}

/// What was handed out, as kept on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Book {
    pods: BTreeMap<String, IpAddr>,
    services: BTreeMap<String, IpAddr>,
}

/// Hands out addresses and remembers them.
#[derive(Debug)]
pub struct Addresses {
    block: Block,
    file: PathBuf,
    book: Book,
    changed: bool,
}

impl Addresses {
    /// Opens the book in the state directory.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn open(state: &Path, block: Block) -> Result<Self> {
        let file = state.join("addresses.json");
        let book = match std::fs::read_to_string(&file) {
            Ok(text) => {
                serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display()))?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Book::default(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        Ok(Self { block, file, book, changed: false })
    }

    /// Writes the book if it changed.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&mut self) -> Result<()> {
        if self.changed {
            let text = serde_json::to_string_pretty(&self.book)?;
            let new = self.file.with_extension("json.new");
            std::fs::write(&new, text).with_context(|| format!("cannot write {}", new.display()))?;
            std::fs::rename(&new, &self.file)
                .with_context(|| format!("cannot write {}", self.file.display()))?;
            self.changed = false;
        }
        Ok(())
    }
}

fn assign(
    book: &mut BTreeMap<String, IpAddr>,
    key: String,
    block: Block,
    second: u8,
) -> Result<(IpAddr, bool)> {
    if let Some(address) = book.get(&key) {
        // An address of another block is of no use: the block was changed since.
        let inside = matches!(address, IpAddr::V4(v4) if v4.octets()[..2] == [block.first, second]);
        if inside {
            return Ok((*address, false));
        }
    }
    let taken: BTreeSet<IpAddr> = book.values().copied().collect();
    for index in 0.. {
        let address = block.nth(second, index)?;
        if !taken.contains(&address) {
            book.insert(key, address);
            return Ok((address, true));
        }
    }
    bail!("no address is left")
}

impl cairn_manifest::Addressing for Addresses {
    fn pod(&mut self, namespace: &str, name: &str) -> Option<IpAddr> {
        let key = format!("{namespace}/{name}");
        let assigned = assign(&mut self.book.pods, key, self.block, self.block.pods);
        self.note(assigned)
    }

    fn service(&mut self, namespace: &str, name: &str) -> Option<IpAddr> {
        let key = format!("{namespace}/{name}");
        let assigned = assign(&mut self.book.services, key, self.block, self.block.services);
        self.note(assigned)
    }
}

impl Addresses {
    fn note(&mut self, assigned: Result<(IpAddr, bool)>) -> Option<IpAddr> {
        match assigned {
            Ok((address, new)) => {
                self.changed |= new;
                Some(address)
            }
            Err(error) => {
                tracing::error!(%error, "no address assigned");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_manifest::Addressing;

    #[test]
    fn addresses_survive_a_restart_and_stay_apart() {
        let state = tempfile::tempdir().unwrap();
        let block = Block::loopback(10).unwrap();
        let mut addresses = Addresses::open(state.path(), block).unwrap();
        let first = addresses.pod("a", "x").unwrap();
        let second = addresses.pod("a", "y").unwrap();
        let vip = addresses.service("a", "x").unwrap();
        assert_eq!(
            [first.to_string(), second.to_string(), vip.to_string()],
            ["127.10.1.0", "127.10.1.1", "127.20.1.0"]
        );
        addresses.save().unwrap();
        let mut again = Addresses::open(state.path(), block).unwrap();
        assert_eq!(again.pod("b", "z").unwrap().to_string(), "127.10.1.2");
        assert_eq!(again.pod("a", "x"), Some(first));
        let mut moved = Addresses::open(state.path(), Block::loopback(50).unwrap()).unwrap();
        assert_eq!(moved.pod("a", "x").unwrap().to_string(), "127.50.1.0");
    }

    #[test]
    fn a_damaged_book_is_an_error() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("addresses.json"), "{").unwrap();
        assert!(Addresses::open(state.path(), Block::namespaces()).is_err());
        assert!(Block::loopback(0).is_err());
    }
}
