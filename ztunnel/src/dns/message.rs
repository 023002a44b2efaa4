//! DNS messages, as far as we answer them: one question in, records of four kinds out (RFC 1035, 2782, 3596, 6891). What we
//! do not answer passes as it is and is never taken apart.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Record types that we know.
pub const A: u16 = 1;
/// See [`A`].
pub const CNAME: u16 = 5;
/// See [`A`].
pub const AAAA: u16 = 28;
/// See [`A`].
pub const SRV: u16 = 33;
const OPT: u16 = 41;
const CLASS_IN: u16 = 1;

/// Answers to be kept this long (facts: ztunnel, 30 s).
const TTL_SECONDS: u32 = 30;

/// The longest message over UDP without EDNS, and the longest that we send with it: what passes any network unbroken.
const UDP_BYTES_MIN: usize = 512;
const UDP_BYTES_MAX: usize = 1232;

/// A message of DNS has at most this many bytes.
pub const MESSAGE_BYTES_MAX: usize = 65_535;

/// The bits and codes of a header that we set or read (RFC 1035 §4.1.1).
const RESPONSE: u16 = 0x8000;
const AUTHORITATIVE: u16 = 0x0400;
const TRUNCATED: u16 = 0x0200;
const RECURSION_DESIRED: u16 = 0x0100;
const RECURSION_AVAILABLE: u16 = 0x0080;
const OPCODE: u16 = 0x7800;

/// How a question went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// It is answered, perhaps with nothing.
    Done = 0,
    /// It cannot be read.
    Format = 1,
    /// It should be answered and cannot be now.
    Failure = 2,
}

/// Why a message is no question that we answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// It is too short to be answered, or an answer itself.
    Nothing,
    /// It can be answered with [`Code::Format`].
    Malformed,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// The client's number for it.
    pub id: u16,
    flags: u16,
    /// The name in lower case, without the last dot. Bytes that no host's name has are escaped, so that it matches none.
    pub name: String,
    /// The type of record.
    pub kind: u16,
    class: u16,
    /// The question as it came.
    question: Vec<u8>,
    /// How much the client takes over UDP, if it says so.
    edns: Option<u16>,
}

/// One record of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An IPv4 address.
    A(Ipv4Addr),
    /// An IPv6 address.
    Aaaa(Ipv6Addr),
    /// Another name for it.
    Cname(String),
    /// Where a service is: port and host.
    Srv(u16, String),
}

impl Query {
    /// Whether it is an ordinary question about the internet.
    pub fn is_plain(&self) -> bool {
        self.flags & OPCODE == 0 && self.class == CLASS_IN
    }

    /// How many bytes an answer over UDP may have.
    pub fn udp_bytes_max(&self) -> usize {
        self.edns.map_or(UDP_BYTES_MIN, |size| usize::from(size).clamp(UDP_BYTES_MIN, UDP_BYTES_MAX))
    }

    /// What metrics call its type.
    pub fn kind_name(&self) -> &'static str {
        match self.kind {
            A => "A",
            AAAA => "AAAA",
            CNAME => "CNAME",
            SRV => "SRV",
            12 => "PTR",
            15 => "MX",
            16 => "TXT",
            _ => "other",
        }
    }
}

/// Reads a question.
///
/// # Errors
/// When it is not one, or more than one.
pub fn read(bytes: &[u8]) -> Result<Query, Unread> {
    let mut reader = Reader { bytes, at: 0 };
    let header: Option<Vec<u16>> = (0..6).map(|_| reader.u16()).collect();
    let header = header.ok_or(Unread::Nothing)?;
    let [id, flags, questions, answers, authorities, additionals] = header[..] else {
        return Err(Unread::Nothing);
    };
    if flags & RESPONSE != 0 {
        return Err(Unread::Nothing);
    }
    let malformed = || Unread::Malformed;
    if questions != 1 {
        return Err(malformed());
    }
    let start = reader.at;
    let name = reader.name().ok_or_else(malformed)?;
    let kind = reader.u16().ok_or_else(malformed)?;
    let class = reader.u16().ok_or_else(malformed)?;
    let question = bytes.get(start..reader.at).ok_or_else(malformed)?.to_vec();
    let mut edns = None;
    for _ in 0..u32::from(answers) + u32::from(authorities) + u32::from(additionals) {
        // What follows the question may be cut off or unknown: only its size of answers is of interest.
        let Some((kind, class)) = reader.record() else { break };
        if kind == OPT {
            edns = Some(class);
        }
    }
    Ok(Query { id, flags, name, kind, class, question, edns })
}

/// Reads from untrusted bytes.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    /// A name of at most 255 bytes. A question's cannot point elsewhere: there is nothing before it.
    fn name(&mut self) -> Option<String> {
        let mut name = String::new();
        let start = self.at;
        loop {
            let length = usize::from(*self.take(1)?.first()?);
            if length == 0 {
                break;
            }
            if length > 63 || self.at - start + length > 254 {
                return None;
            }
            if !name.is_empty() {
                name.push('.');
            }
            for byte in self.take(length)? {
                match byte {
                    b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'*' => name.push(char::from(*byte)),
                    b'A'..=b'Z' => name.push(char::from(byte.to_ascii_lowercase())),
                    other => name.push_str(&format!("\\{other:03}")),
                }
            }
        }
        Some(name)
    }

    /// Steps over a record; its type and class.
    fn record(&mut self) -> Option<(u16, u16)> {
        loop {
            let length = usize::from(*self.take(1)?.first()?);
            match length {
                0 => break,
                192.. => {
                    self.take(1)?;
                    break;
                }
                _ => self.take(length)?,
            };
        }
        let (kind, class) = (self.u16()?, self.u16()?);
        self.take(4)?;
        let length = usize::from(self.u16()?);
        self.take(length)?;
        Some((kind, class))
    }
}

/// Writes an answer of at most so many bytes; what does not fit is left out and said to be.
pub fn write(query: &Query, code: Code, records: &[(String, Record)], bytes_max: usize) -> Vec<u8> {
    let edns = query.edns.map(|_| edns_record());
    let room = bytes_max.saturating_sub(edns.as_ref().map_or(0, Vec::len));
    let mut body = query.question.clone();
    let (mut count, mut is_cut) = (0_u16, false);
    for (owner, record) in records {
        let before = body.len();
        append(&mut body, &query.name, owner, record);
        if 12 + body.len() > room {
            body.truncate(before);
            is_cut = true;
            break;
        }
        count += 1;
    }
    let mut flags =
        RESPONSE | RECURSION_AVAILABLE | (query.flags & (OPCODE | RECURSION_DESIRED)) | code as u16;
    if code == Code::Done {
        flags |= AUTHORITATIVE;
    }
    if is_cut {
        flags |= TRUNCATED;
    }
    let header = [query.id, flags, 1, count, 0, u16::from(edns.is_some())];
    let mut message: Vec<u8> = header.iter().flat_map(|word| word.to_be_bytes()).collect();
    message.extend(body);
    message.extend(edns.into_iter().flatten());
    message
}

/// The answer to what could not be read: its number and that.
pub fn refuse(bytes: &[u8]) -> Option<Vec<u8>> {
    let id = bytes.get(..2)?;
    let flags = RESPONSE | Code::Format as u16;
    Some([id, &flags.to_be_bytes(), &[0; 8]].concat())
}

fn edns_record() -> Vec<u8> {
    let size = UDP_BYTES_MAX as u16;
    [&[0][..], &OPT.to_be_bytes(), &size.to_be_bytes(), &[0; 6]].concat()
}

fn append(out: &mut Vec<u8>, asked: &str, owner: &str, record: &Record) {
    if owner == asked {
        // Points to the question, which follows the header.
        out.extend([0xc0, 12]);
    } else {
        append_name(out, owner);
    }
    let (kind, data) = match record {
        Record::A(address) => (A, address.octets().to_vec()),
        Record::Aaaa(address) => (AAAA, address.octets().to_vec()),
        Record::Cname(name) => {
            let mut data = Vec::new();
            append_name(&mut data, name);
            (CNAME, data)
        }
        Record::Srv(port, host) => {
            // No priority, and equal weights.
            let mut data = [&[0, 0, 0, 1][..], &port.to_be_bytes()].concat();
            append_name(&mut data, host);
            (SRV, data)
        }
    };
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    out.extend(TTL_SECONDS.to_be_bytes());
    out.extend((data.len() as u16).to_be_bytes());
    out.extend(data);
}

/// Labels that are too long are cut: names come from the control plane, where none is.
fn append_name(out: &mut Vec<u8>, name: &str) {
    for label in name.split('.').filter(|label| !label.is_empty()) {
        let label = label.as_bytes();
        let label = label.get(..63).unwrap_or(label);
        out.push(label.len() as u8);
        out.extend(label);
    }
    out.push(0);
}

/// Puts another number in place of a message's own.
pub fn renumber(message: &mut [u8], id: u16) {
    if let Some(place) = message.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
}

/// The number of a message, and whether it is an answer.
pub fn is_answer_to(message: &[u8], id: u16) -> bool {
    let mut reader = Reader { bytes: message, at: 0 };
    reader.u16() == Some(id) && reader.u16().is_some_and(|flags| flags & RESPONSE != 0)
}

/// Whether the server could not answer: another may.
pub fn is_failure(message: &[u8]) -> bool {
    // SERVFAIL, NOTIMP and REFUSED.
    message.get(3).is_some_and(|low| matches!(low & 0xf, 2 | 4 | 5))
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
