//! The header by which an application learns whose tunnel it is given, and where that one wanted to go (HAProxy's PROXY
//! protocol, version 2).

use cairn_mesh::Identity;
use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const TCP_OVER_V4: u8 = 0x11;
const TCP_OVER_V6: u8 = 0x21;

/// The type under which Istio's waypoints look for the peer's identity.
const IDENTITY: u8 = 0xd0;

/// The header of a connection from `source`, which has proven to be `identity`, to `destination`. Where the two are not of
/// one family, both are written as IPv6.
pub fn header(source: SocketAddr, destination: SocketAddr, identity: Option<&Identity>) -> Vec<u8> {
    let (family, mut body) = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (TCP_OVER_V4, [from.octets(), to.octets()].concat()),
        (from, to) => (TCP_OVER_V6, [v6(from), v6(to)].concat()),
    };
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    if let Some(identity) = identity {
        let text = identity.as_str().as_bytes();
        // An identity is at most 2,048 bytes.
        let length = u16::try_from(text.len()).unwrap_or(0);
        body.push(IDENTITY);
        body.extend(length.to_be_bytes());
        body.extend(text.iter().take(length.into()));
    }
    let mut header = SIGNATURE.to_vec();
    header.extend([PROXY, family]);
    header.extend(u16::try_from(body.len()).unwrap_or(0).to_be_bytes());
    header.extend(body);
    header
}

fn v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_those_of_the_specification() {
        let identity = Identity::new("td", "a", "x").unwrap();
        let signature = "0d0a0d0a000d0a515549540a21";
        let spiffe = "7370696666653a2f2f74642f6e732f612f73612f78";
        for (name, source, destination, identity, expected) in [
            ("IPv4", "10.0.1.5:4660", "10.96.0.10:80", None, "11000c0a0001050a60000a12340050".to_owned()),
            (
                "IPv4 and who it is",
                "10.0.1.5:4660",
                "10.96.0.10:80",
                Some(&identity),
                format!("1100240a0001050a60000a12340050d00015{spiffe}"),
            ),
            (
                "IPv6",
                "[fd00::1]:1",
                "[fd00::2]:2",
                None,
                "210024fd000000000000000000000000000001fd00000000000000000000000000000200010002".to_owned(),
            ),
            (
                "of both families",
                "10.0.1.5:1",
                "[fd00::2]:2",
                None,
                "21002400000000000000000000ffff0a000105fd00000000000000000000000000000200010002".to_owned(),
            ),
        ] {
            let found = header(source.parse().unwrap(), destination.parse().unwrap(), identity);
            let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found, format!("{signature}{expected}"), "{name}");
        }
    }
}
