//! gRPC messages, counted as the bytes of a body pass by.

/// Bytes before each message: a flag and the length (gRPC `PROTOCOL-HTTP2.md`, Length-Prefixed-Message).
const PREFIX_BYTES: u8 = 5;

/// Where in its messages a body is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Messages {
    /// Bytes of the current prefix that have passed.
    prefix: u8,
    /// The length, as far as its bytes have passed.
    length: u32,
    /// Bytes of the current message that are still to come.
    left: u32,
}

impl Messages {
    /// Goes over the next bytes and returns how many messages begin in them: those whose prefix is complete.
    pub(crate) fn pass(&mut self, mut bytes: &[u8]) -> u64 {
        let mut begun = 0;
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped = bytes.len().min(self.left as usize);
                self.left -= skipped as u32;
                bytes = bytes.get(skipped..).unwrap_or_default();
                continue;
            }
            let Some((byte, rest)) = bytes.split_first() else { break };
            bytes = rest;
            self.length = if self.prefix == 0 { 0 } else { self.length << 8 | u32::from(*byte) };
            self.prefix += 1;
            if self.prefix == PREFIX_BYTES {
                self.prefix = 0;
                self.left = self.length;
                begun += 1;
            }
        }
        begun
    }
}

#[cfg(test)]
mod tests {
    use super::Messages;

    fn body(lengths: &[u32]) -> Vec<u8> {
        let message = |length: &u32| {
            let mut bytes = vec![0];
            bytes.extend(length.to_be_bytes());
            bytes.extend(std::iter::repeat_n(0xff, *length as usize));
            bytes
        };
        lengths.iter().flat_map(message).collect()
    }

    #[test]
    fn messages_are_counted_wherever_the_body_is_cut() {
        for (name, lengths) in [
            ("none", &[][..]),
            ("one empty", &[0]),
            ("some empty", &[0, 0, 0]),
            ("of all sizes", &[3, 0, 300, 1]),
        ] {
            let whole = body(lengths);
            for piece in 1..=whole.len().max(1) {
                let mut messages = Messages::default();
                let count: u64 = whole.chunks(piece).map(|bytes| messages.pass(bytes)).sum();
                assert_eq!(count, lengths.len() as u64, "{name}, {piece} bytes at a time");
                assert_eq!(messages.left, 0, "{name}");
            }
        }
    }

    #[test]
    fn half_a_prefix_is_no_message() {
        assert_eq!(Messages::default().pass(&[0, 0, 0, 0]), 0);
    }
}
