//! Rules by the block of addresses that they ask for.

use ipnet::IpNet;
use std::collections::HashMap;
use std::net::IpAddr;

/// Positions of rules by block.
#[derive(Debug, Default)]
pub(super) struct BlockIndex {
    rules: HashMap<IpNet, Vec<u32>>,
    /// The lengths of the blocks' prefixes, each once, by family.
    lengths_v4: Vec<u8>,
    lengths_v6: Vec<u8>,
}

impl BlockIndex {
    /// Files the rule at `position` under `block`. Positions must not fall.
    pub(super) fn insert(&mut self, block: IpNet, position: u32) {
        let lengths = match block {
            IpNet::V4(_) => &mut self.lengths_v4,
            IpNet::V6(_) => &mut self.lengths_v6,
        };
        if !lengths.contains(&block.prefix_len()) {
            lengths.push(block.prefix_len());
        }
        let rules = self.rules.entry(block.trunc()).or_default();
        if rules.last() != Some(&position) {
            rules.push(position);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Calls `each` with the rules of every block that has `address`.
    pub(super) fn find(&self, address: IpAddr, each: &mut impl FnMut(&[u32])) {
        let lengths = if address.is_ipv4() { &self.lengths_v4 } else { &self.lengths_v6 };
        for length in lengths {
            let block = IpNet::new(address, *length).ok();
            if let Some(rules) = block.and_then(|block| self.rules.get(&block.trunc())) {
                each(rules);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_in_every_block_around_it_and_in_no_other() {
        let blocks = [
            "10.0.0.0/8",
            "10.1.0.0/16",
            "10.1.2.3/32",
            "0.0.0.0/0",
            "::/0",
            "2001:db8::/32",
            "10.1.2.3/8",
            "::ffff:10.0.0.0/104",
        ];
        let mut index = BlockIndex::default();
        for (block, position) in blocks.iter().zip(0..) {
            index.insert(block.parse().unwrap(), position);
        }
        for (address, expected) in [
            ("10.1.2.3", &[0, 1, 2, 3, 6][..]),
            ("10.1.2.4", &[0, 1, 3, 6]),
            ("10.2.0.0", &[0, 3, 6]),
            ("11.0.0.0", &[3]),
            ("2001:db8::1", &[4, 5]),
            ("fd00::1", &[4]),
        ] {
            let mut found = Vec::new();
            index.find(address.parse().unwrap(), &mut |rules| found.extend_from_slice(rules));
            found.sort_unstable();
            assert_eq!(found, expected, "{address}");
        }
    }
}
