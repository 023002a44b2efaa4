//! Which addresses may be asked on others' behalf.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether something may be got from this address because a policy or a plugin says so. Its author must not make a proxy
/// read what only its own machine may: link-local addresses, among them that of the cloud's metadata, and the clouds' other
/// such addresses.
pub fn may_be_asked(address: IpAddr) -> bool {
    const METADATA_V4: [Ipv4Addr; 3] =
        [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(192, 0, 0, 192)];
    const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let is_nobodys = v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast();
            !is_nobodys && !v4.is_link_local() && !METADATA_V4.contains(&v4)
        }
        IpAddr::V6(v6) => match v6.segments() {
            // IPv4 behind NAT64 (RFC 6052 §2.1).
            [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
                may_be_asked(IpAddr::V4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))))
            }
            _ => {
                !(v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast()) && v6 != METADATA_V6
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_machines_own_network_are_not_asked() {
        for (address, may) in [
            ("127.0.0.1", true),
            ("10.1.2.3", true),
            ("93.184.216.34", true),
            ("2606:2800::1", true),
            ("fd00::1", true),
            ("169.254.169.254", false),
            ("169.254.1.1", false),
            ("::ffff:169.254.169.254", false),
            ("64:ff9b::a9fe:a9fe", false),
            ("64:ff9b::5db8:d822", true),
            ("fe80::1", false),
            ("fd00:ec2::254", false),
            ("100.100.100.200", false),
            ("168.63.129.16", false),
            ("192.0.0.192", false),
            ("0.0.0.0", false),
            ("::", false),
            ("224.0.0.1", false),
        ] {
            assert_eq!(may_be_asked(address.parse().unwrap()), may, "{address}");
        }
    }
}
