//! Finds what a policy says and we do not understand.
//!
//! The protobuf decoder drops unknown fields without a word, which would make a rule match more than its author
//! wrote. So policies are also read tag by tag and compared with what is known of each message.

/// Which field numbers of a message are known, and the shape of those that are messages themselves.
pub(crate) struct Shape(pub(crate) &'static [(u32, Option<&'static Shape>)]);

static STRING_MATCH: Shape = Shape(&[(1, None), (2, None), (3, None), (4, Some(&EMPTY))]);
static ADDRESS: Shape = Shape(&[(1, None), (2, None)]);
static SERVICE_ACCOUNT: Shape = Shape(&[(1, None), (2, None)]);
static EMPTY: Shape = Shape(&[]);

/// `istio.security.Match`. Its extensions (13) are conditions that we cannot judge, hence unknown.
pub(crate) static MATCH: Shape = Shape(&[
    (1, Some(&STRING_MATCH)),
    (2, Some(&STRING_MATCH)),
    (3, Some(&STRING_MATCH)),
    (4, Some(&STRING_MATCH)),
    (5, Some(&ADDRESS)),
    (6, Some(&ADDRESS)),
    (7, Some(&ADDRESS)),
    (8, Some(&ADDRESS)),
    (9, None),
    (10, None),
    (11, Some(&SERVICE_ACCOUNT)),
    (12, Some(&SERVICE_ACCOUNT)),
]);
/// `istio.security.Clause` without its matches' inside.
pub(crate) static CLAUSE: Shape = Shape(&[(2, None)]);
/// `istio.security.Rule` without its clauses' inside.
pub(crate) static RULE: Shape = Shape(&[(1, None)]);
/// `istio.security.Authorization` without its rules' inside; extensions (7) are unknown.
pub(crate) static AUTHORIZATION: Shape =
    Shape(&[(1, None), (2, None), (3, None), (4, None), (5, None), (6, None)]);

/// Whether a message that the decoder accepted holds a field that is not known, at any depth.
pub(crate) fn has_unknown(message: &[u8], shape: &Shape) -> bool {
    Fields(message).any(|(number, content)| match shape.0.iter().find(|(known, _)| *known == number) {
        None => true,
        Some((_, None)) => false,
        Some((_, Some(inner))) => has_unknown(content, inner),
    })
}

/// The contents of the fields with this number, in order: as many as the decoder made of a repeated message.
pub(crate) fn contents(message: &[u8], wanted: u32) -> impl Iterator<Item = &[u8]> {
    Fields(message).filter(move |(number, _)| *number == wanted).map(|(_, content)| content)
}

/// The fields of a message: number and content (empty unless length-delimited). It stops at the first byte that is
/// not protobuf; the decoder has refused such messages before.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (u32, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).ok()?;
        let content = match key & 7 {
            0 => {
                self.varint()?;
                &[]
            }
            1 => {
                self.take(8)?;
                &[]
            }
            2 => {
                let length = self.varint()?;
                self.take(usize::try_from(length).ok()?)?
            }
            5 => {
                self.take(4)?;
                &[]
            }
            // A group, which proto3 does not have: the rest cannot be read, so it counts as one unknown field.
            _ => {
                self.0 = &[];
                return Some((0, &[]));
            }
        };
        Some((number, content))
    }
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn unknown_fields_are_found_at_any_depth() {
        for (name, bytes, expected) in [
            ("nothing", &b""[..], false),
            ("namespaces exact", b"\x0a\x03\x0a\x01a", false),
            ("packed ports", b"\x4a\x02\x50\x51", false),
            ("port unpacked", b"\x48\x50", false),
            ("presence", b"\x1a\x02\x22\x00", false),
            ("a field of presence", b"\x1a\x04\x22\x02\x08\x01", true),
            ("extensions", b"\x6a\x00", true),
            ("field 14, varint", b"\x70\x01", true),
            ("field 15, fixed 64", b"\x79\x00\x00\x00\x00\x00\x00\x00\x00", true),
            ("field 1000, fixed 32", b"\xc5\x3e\x00\x00\x00\x00", true),
            ("field 5 of a string match", b"\x0a\x05\x0a\x01a\x28\x01", true),
            ("a group", b"\x0b\x0c", true),
            ("known, then unknown", b"\x48\x50\x70\x01", true),
        ] {
            assert_eq!(has_unknown(bytes, &MATCH), expected, "{name}");
        }
    }

    proptest! {
        #[test]
        fn scanning_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            has_unknown(&bytes, &MATCH);
            contents(&bytes, 2).count();
        }
    }
}
