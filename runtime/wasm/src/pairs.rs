//! Maps as the ABI serialises them: a count, the lengths of all keys and values, then each key and value with a NUL
//! behind it; all numbers 32 bits, little-endian.

/// Bounds on what a guest may send (proxy-wasm-cpp-host has the same).
const BYTES_MAX: usize = 1 << 20;
const COUNT_MAX: usize = 1024;

type Pair<'a> = (&'a [u8], &'a [u8]);

/// Appends the serialised form of `pairs`, of which there are `count`.
pub(crate) fn write<'a>(out: &mut Vec<u8>, count: u32, pairs: impl Iterator<Item = Pair<'a>>) {
    out.extend_from_slice(&count.to_le_bytes());
    let mut lengths_at = out.len();
    out.resize(lengths_at + 8 * count as usize, 0);
    for (key, value) in pairs.take(count as usize) {
        for part in [key, value] {
            if let Some(length) = out.get_mut(lengths_at..lengths_at + 4) {
                length.copy_from_slice(&(part.len() as u32).to_le_bytes());
            }
            lengths_at += 4;
            out.extend_from_slice(part);
            out.push(0);
        }
    }
}

/// A serialised map whose lengths were found to fit.
#[derive(Clone, Copy)]
pub(crate) struct Pairs<'a> {
    lengths: &'a [u8],
    data: &'a [u8],
}

impl<'a> Pairs<'a> {
    /// Reads what [`write`] writes. Nothing, one zero byte and four zero bytes are all the empty map.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        if bytes.is_empty() || bytes == [0] {
            return Some(Self { lengths: &[], data: &[] });
        }
        if bytes.len() > BYTES_MAX {
            return None;
        }
        let (count, rest) = bytes.split_first_chunk::<4>()?;
        let count = u32::from_le_bytes(*count) as usize;
        if count > COUNT_MAX {
            return None;
        }
        let (lengths, data) = rest.split_at_checked(count * 8)?;
        let mut needed = 0usize;
        for length in lengths.chunks_exact(4) {
            needed = needed.checked_add(length_of(length) as usize)?.checked_add(1)?;
        }
        (needed <= data.len()).then_some(Self { lengths, data })
    }

    /// The pairs in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Pair<'a>> + Clone + use<'a> {
        let mut data = self.data;
        self.lengths.chunks_exact(8).map_while(move |lengths| {
            let (key, value) = lengths.split_at(4);
            let key = take(&mut data, length_of(key) as usize)?;
            Some((key, take(&mut data, length_of(value) as usize)?))
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        (self.lengths.len() / 8) as u32
    }

    /// The value of the first pair with this key, without regard to case.
    pub(crate) fn find(&self, key: &[u8]) -> Option<&'a [u8]> {
        self.iter().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| value)
    }
}

fn length_of(bytes: &[u8]) -> u32 {
    bytes.first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Splits `length` bytes and the NUL behind them off the front of `data`.
fn take<'a>(data: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (part, rest) = data.split_at_checked(length)?;
    *data = rest.get(1..)?;
    Some(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn empty_maps_have_three_forms() {
        for bytes in [&[][..], &[0], &[0, 0, 0, 0]] {
            assert_eq!(Pairs::parse(bytes).unwrap().iter().count(), 0);
        }
    }

    #[test]
    fn lengths_beyond_the_data_are_refused() {
        let mut bytes = Vec::new();
        write(&mut bytes, 1, [(&b"key"[..], &b"value"[..])].into_iter());
        assert_eq!(Pairs::parse(&bytes).unwrap().find(b"KEY"), Some(&b"value"[..]));
        for cut in 1..bytes.len() {
            assert!(
                Pairs::parse(&bytes[..bytes.len() - cut]).is_none() || bytes.len() - cut == 0,
                "cut {cut}"
            );
        }
        assert!(Pairs::parse(&[255, 255, 255, 255]).is_none());
        assert!(Pairs::parse(&[1, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]).is_none());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(pairs: Vec<(Vec<u8>, Vec<u8>)>) {
            let mut bytes = Vec::new();
            write(&mut bytes, pairs.len() as u32, pairs.iter().map(|(key, value)| (&key[..], &value[..])));
            let read = Pairs::parse(&bytes).unwrap();
            let read: Vec<_> = read.iter().map(|(key, value)| (key.to_vec(), value.to_vec())).collect();
            prop_assert_eq!(read, pairs);
        }

        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            if let Some(pairs) = Pairs::parse(&bytes) {
                let _ = pairs.iter().count();
            }
        }
    }
}
