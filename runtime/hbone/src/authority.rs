//! Where a tunnel leads: the `:authority` of a CONNECT.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// The target of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address; IPv4 inside IPv6 is read as IPv4.
    Address(SocketAddr),
    /// A host name, in lower case.
    Host {
        /// The name.
        name: String,
        /// The port.
        port: u16,
    },
}

/// Why a text is no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is neither <address>:<port> nor <host>:<port>")]
pub struct AuthorityError {
    /// The text, or its beginning.
    pub text: String,
}

/// The longest host name (RFC 1035 §2.3.4).
const NAME_BYTES_MAX: usize = 253;

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, AuthorityError> {
        let error = || AuthorityError { text: text.chars().take(300).collect() };
        if let Ok(address) = text.parse::<SocketAddr>() {
            let canonical = SocketAddr::new(address.ip().to_canonical(), address.port());
            return if address.port() == 0 { Err(error()) } else { Ok(Self::Address(canonical)) };
        }
        let (name, port) = text.rsplit_once(':').ok_or_else(error)?;
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|port| digits && *port != 0).ok_or_else(error)?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(allowed) {
            return Err(error());
        }
        // `10.0.0.300` is nobody's name, and `10.0.0.1` would have been an address.
        let numeric =
            name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
        if numeric && name.parse::<IpAddr>().is_err() {
            return Err(error());
        }
        Ok(Self::Host { name: name.to_ascii_lowercase(), port })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authority_is_an_address_or_a_host_with_a_port() {
        for (text, expected) in [
            ("10.0.2.7:8080", Some("10.0.2.7:8080")),
            ("[fd00::7]:8080", Some("[fd00::7]:8080")),
            ("[::ffff:10.0.2.7]:80", Some("10.0.2.7:80")),
            ("Echo.b.svc.cluster.local:80", Some("echo.b.svc.cluster.local:80")),
            ("echo_1:65535", Some("echo_1:65535")),
            ("10.0.2.7", None),
            ("10.0.2.7:0", None),
            ("10.0.2.300:80", None),
            ("echo:0", None),
            ("echo:", None),
            ("echo:+80", None),
            ("echo:65536", None),
            (":80", None),
            ("fd00::7:80", None),
            ("user@echo:80", None),
            ("echo/path:80", None),
            ("", None),
        ] {
            let parsed: Option<Authority> = text.parse().ok();
            assert_eq!(parsed.map(|authority| authority.to_string()).as_deref(), expected, "{text}");
        }
        assert!(format!("{}:80", "a".repeat(254)).parse::<Authority>().is_err());
    }
}
