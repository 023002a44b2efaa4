//! Addresses of pods and services that a manifest gives none: from one block, by namespace and name, kept on disk so
//! that they survive edits.

use anyhow::{Context, Result, ensure};
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

impl Block {
    /// A block of loopback: pods in `127.second/16`, services ten above, twins twenty above.
    ///
    /// # Errors
    /// When the block would reach the addresses that other programs use (second octet 0) or leave the network.
    pub fn loopback(second: u8) -> Result<Self> {
        ensure!((1..=200).contains(&second), "block {second} is not within 1 to 200");
        Ok(Self { first: 127, pods: second, services: second + cairn_ztunnel::TWIN_DISTANCE / 2 })
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

    /// Where ztunnels' ports for operators are, a node each. The first 256 addresses of pods are the machine's own;
    /// their first and last would be a network's, and the second is [`Block::node`].
    fn of_nodes(self) -> Range {
        Range { network: [self.first, self.pods], numbers: 2..255 }
    }

    fn of_pods(self) -> Range {
        Range { network: [self.first, self.pods], numbers: 256..65_000 }
    }

    fn of_services(self) -> Range {
        Range { network: [self.first, self.services], numbers: 256..65_000 }
    }
}

/// Addresses of one /16.
struct Range {
    network: [u8; 2],
    numbers: std::ops::Range<u16>,
}

impl Range {
    fn contains(&self, address: IpAddr) -> bool {
        let IpAddr::V4(v4) = address else { return false };
        let [a, b, high, low] = v4.octets();
        [a, b] == self.network && self.numbers.contains(&u16::from_be_bytes([high, low]))
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let [a, b] = self.network;
        self.numbers.clone().map(move |number| {
            let [high, low] = number.to_be_bytes();
            IpAddr::V4(Ipv4Addr::new(a, b, high, low))
        })
    }
}

/// What was handed out, as kept on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Book {
    nodes: BTreeMap<String, IpAddr>,
    pods: BTreeMap<String, IpAddr>,
    services: BTreeMap<String, IpAddr>,
}

/// Hands out addresses and remembers them.
#[derive(Debug)]
pub struct Addresses {
    block: Block,
    file: PathBuf,
    book: Book,
    /// What manifests give away themselves.
    written: BTreeSet<IpAddr>,
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
        Ok(Self { block, file, book, written: BTreeSet::new(), changed: false })
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

    /// Keeps what is handed out from now on apart from addresses that manifests give, and from those that belong to
    /// them as twins. Who has such an address from us gets another.
    pub fn keep_clear_of(&mut self, written: impl IntoIterator<Item = IpAddr>) {
        self.written =
            written.into_iter().flat_map(|address| [address, cairn_ztunnel::twin(address)]).collect();
    }

    /// The addresses of these nodes' ztunnels. What no address is left for is not among them; nodes that are gone
    /// lose theirs only when others need them.
    pub fn nodes(&mut self, names: &BTreeSet<&str>) -> BTreeMap<String, IpAddr> {
        let range = self.block.of_nodes();
        let mut given = BTreeMap::new();
        for name in names {
            let mut assigned = assign(&mut self.book.nodes, name, &range, &self.written);
            if assigned.is_none() {
                self.book.nodes.retain(|node, _| names.contains(node.as_str()));
                assigned = assign(&mut self.book.nodes, name, &range, &self.written);
            }
            if let Some((address, new)) = assigned {
                self.changed |= new;
                given.insert((*name).to_owned(), address);
            }
        }
        given
    }
}

/// The address of `key`, and whether it is new; `None` when none is left.
fn assign(
    book: &mut BTreeMap<String, IpAddr>,
    key: &str,
    range: &Range,
    written: &BTreeSet<IpAddr>,
) -> Option<(IpAddr, bool)> {
    let is_ours =
        |address: IpAddr| !written.contains(&address) && !written.contains(&cairn_ztunnel::twin(address));
    if let Some(address) = book.get(key)
        // An address of another block is of no use: the block was changed since.
        && range.contains(*address)
        && is_ours(*address)
    {
        return Some((*address, false));
    }
    let taken: BTreeSet<IpAddr> = book.values().copied().collect();
    let address = range.addresses().find(|address| !taken.contains(address) && is_ours(*address))?;
    book.insert(key.to_owned(), address);
    Some((address, true))
}

impl cairn_manifest::Addressing for Addresses {
    fn pod(&mut self, namespace: &str, name: &str) -> Option<IpAddr> {
        let key = format!("{namespace}/{name}");
        let assigned = assign(&mut self.book.pods, &key, &self.block.of_pods(), &self.written);
        self.note(&key, assigned)
    }

    fn service(&mut self, namespace: &str, name: &str) -> Option<IpAddr> {
        let key = format!("{namespace}/{name}");
        let assigned = assign(&mut self.book.services, &key, &self.block.of_services(), &self.written);
        self.note(&key, assigned)
    }
}

impl Addresses {
    fn note(&mut self, key: &str, assigned: Option<(IpAddr, bool)>) -> Option<IpAddr> {
        match assigned {
            Some((address, new)) => {
                self.changed |= new;
                Some(address)
            }
            None => {
                tracing::error!(name = key, "no address is left in the block");
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
    fn assigned_addresses_make_way_for_written_ones() {
        let state = tempfile::tempdir().unwrap();
        let mut addresses = Addresses::open(state.path(), Block::loopback(30).unwrap()).unwrap();
        assert_eq!(addresses.pod("a", "x").unwrap().to_string(), "127.30.1.0");
        // The address itself, one whose twin is an address of ours, and one that is a twin of ours.
        let written = ["127.30.1.0", "127.10.1.1", "127.50.1.2", "127.40.1.0", "127.30.0.2"];
        addresses.keep_clear_of(written.map(|address| address.parse().unwrap()));
        assert_eq!(addresses.pod("a", "x").unwrap().to_string(), "127.30.1.3");
        assert_eq!(addresses.pod("a", "y").unwrap().to_string(), "127.30.1.4");
        assert_eq!(addresses.service("a", "x").unwrap().to_string(), "127.40.1.1");
        assert_eq!(addresses.nodes(&BTreeSet::from(["n"]))["n"].to_string(), "127.30.0.3");
    }

    #[test]
    fn nodes_keep_their_addresses_when_others_come_and_go() {
        let state = tempfile::tempdir().unwrap();
        let mut addresses = Addresses::open(state.path(), Block::loopback(10).unwrap()).unwrap();
        let told = |addresses: &mut Addresses, names: &[&str]| {
            let nodes = addresses.nodes(&names.iter().copied().collect());
            nodes.into_iter().map(|(name, address)| format!("{name} {address}")).collect::<Vec<_>>()
        };
        assert_eq!(told(&mut addresses, &["m"]), ["m 127.10.0.2"]);
        assert_eq!(told(&mut addresses, &["a", "m"]), ["a 127.10.0.3", "m 127.10.0.2"]);
        addresses.save().unwrap();
        let mut again = Addresses::open(state.path(), Block::loopback(10).unwrap()).unwrap();
        assert_eq!(told(&mut again, &["a"]), ["a 127.10.0.3"]);
        // As many as there is room for: those that are gone give theirs up, and one goes without.
        let many: Vec<String> = (0..253).map(|number| format!("n{number:03}")).collect();
        let mut names: Vec<&str> = many.iter().map(String::as_str).collect();
        names.push("a");
        let full = again.nodes(&names.iter().copied().collect());
        assert_eq!((full.len(), full["a"].to_string()), (253, "127.10.0.3".to_owned()));
        assert_eq!(full.values().collect::<BTreeSet<_>>().len(), 253, "each its own");
        assert!(!full.contains_key("n252"), "{:?}", full.get("n252"));
    }

    #[test]
    fn a_damaged_book_is_an_error() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("addresses.json"), "{").unwrap();
        assert!(Addresses::open(state.path(), Block::namespaces()).is_err());
        assert!(Block::loopback(0).is_err());
    }
}
