//! SOCKS5 (RFC 1928), the way out for programs on a machine without redirection.
//!
//! CONNECT only, no authentication: whoever reaches a pod's SOCKS5 port speaks as that pod, so the port is bound on
//! loopback addresses only. Service names are resolved from the mesh. The answer is sent when the connection
//! onwards stands, so that a client sees a refusal as one.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// A client that is slower than this to say what it wants is dropped.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_ACCEPTABLE_METHOD: u8 = 0xff;
const COMMAND_CONNECT: u8 = 1;
const ADDRESS_IPV4: u8 = 1;
const ADDRESS_NAME: u8 = 3;
const ADDRESS_IPV6: u8 = 4;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name to be resolved here.
    Name(String, u16),
}

/// The reply field of RFC 1928 §6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The connection stands.
    Succeeded = 0,
    /// Something here failed.
    Failure = 1,
    /// A rule does not allow it.
    NotAllowed = 2,
    /// The name or address is not known.
    HostUnreachable = 4,
    /// Nobody answers there.
    Refused = 5,
    /// Only CONNECT is spoken here.
    CommandNotSupported = 7,
    /// Not an address type of RFC 1928.
    AddressNotSupported = 8,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocksError {
    /// The client went away or sent too little.
    #[error("client ended its SOCKS5 handshake")]
    Io(#[from] io::Error),
    /// It does not speak SOCKS5.
    #[error("not SOCKS5: first byte {0:#04x}")]
    Version(u8),
    /// It insists on authentication.
    #[error("client offers no SOCKS5 method without authentication")]
    Method,
    /// It wants something else than CONNECT.
    #[error("SOCKS5 command {0} is not supported")]
    Command(u8),
    /// Its address is of no known type, or its name is not text.
    #[error("SOCKS5 address is not valid")]
    Address,
}

/// Reads greeting and request. On an error that the protocol has an answer for, the answer has been sent.
///
/// # Errors
/// When the client does not speak SOCKS5 as supported here.
pub async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<Target, SocksError> {
    let version = stream.read_u8().await?;
    if version != VERSION {
        return Err(SocksError::Version(version));
    }
    let mut methods = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        stream.write_all(&[VERSION, NO_ACCEPTABLE_METHOD]).await?;
        return Err(SocksError::Method);
    }
    stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?;

    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let [version, command, _reserved, address_type] = head;
    if version != VERSION {
        return Err(SocksError::Version(version));
    }
    if command != COMMAND_CONNECT {
        answer(stream, Reply::CommandNotSupported).await?;
        return Err(SocksError::Command(command));
    }
    let target = match address_type {
        ADDRESS_IPV4 => {
            let mut octets = [0; 4];
            stream.read_exact(&mut octets).await?;
            let port = stream.read_u16().await?;
            Target::Address(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(octets)), port))
        }
        ADDRESS_IPV6 => {
            let mut octets = [0; 16];
            stream.read_exact(&mut octets).await?;
            let port = stream.read_u16().await?;
            Target::Address(SocketAddr::new(IpAddr::V6(Ipv6Addr::from(octets)), port))
        }
        ADDRESS_NAME => {
            let mut name = vec![0; usize::from(stream.read_u8().await?)];
            stream.read_exact(&mut name).await?;
            let port = stream.read_u16().await?;
            match String::from_utf8(name) {
                Ok(name) if !name.is_empty() => match name.parse() {
                    Ok(ip) => Target::Address(SocketAddr::new(ip, port)),
                    Err(_) => Target::Name(name.to_ascii_lowercase(), port),
                },
                _ => {
                    answer(stream, Reply::AddressNotSupported).await?;
                    return Err(SocksError::Address);
                }
            }
        }
        _ => {
            answer(stream, Reply::AddressNotSupported).await?;
            return Err(SocksError::Address);
        }
    };
    Ok(target)
}

/// Sends the reply. The bound address is left zero: clients have no use for it.
///
/// # Errors
/// When the client is gone.
pub async fn answer<S: AsyncWrite + Unpin>(stream: &mut S, reply: Reply) -> io::Result<()> {
    stream.write_all(&[VERSION, reply as u8, 0, ADDRESS_IPV4, 0, 0, 0, 0, 0, 0]).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn check(input: &[u8]) -> (Result<Target, SocksError>, Vec<u8>) {
        let (mut client, mut server) = tokio::io::duplex(1024);
        client.write_all(input).await.unwrap();
        client.shutdown().await.unwrap();
        let result = handshake(&mut server).await;
        drop(server);
        let mut sent = Vec::new();
        client.read_to_end(&mut sent).await.unwrap();
        (result, sent)
    }

    #[tokio::test]
    async fn handshake_reads_each_address_type() {
        let (target, sent) = check(&[5, 1, 0, 5, 1, 0, 1, 10, 0, 0, 1, 0, 80]).await;
        assert_eq!(target.unwrap(), Target::Address("10.0.0.1:80".parse().unwrap()));
        assert_eq!(sent, [5, 0]);
        let mut name = vec![5, 2, 1, 0, 5, 1, 0, 3, 4];
        name.extend(b"Echo");
        name.extend([31, 144]);
        assert_eq!(check(&name).await.0.unwrap(), Target::Name("echo".into(), 8080));
        let mut v6 = vec![5, 1, 0, 5, 1, 0, 4];
        v6.extend([0; 15]);
        v6.extend([1, 0, 80]);
        assert_eq!(check(&v6).await.0.unwrap(), Target::Address("[::1]:80".parse().unwrap()));
        let mut literal = vec![5, 1, 0, 5, 1, 0, 3, 9];
        literal.extend(b"127.0.0.1");
        literal.extend([0, 80]);
        assert_eq!(check(&literal).await.0.unwrap(), Target::Address("127.0.0.1:80".parse().unwrap()));
    }

    #[tokio::test]
    async fn handshake_refuses_what_it_does_not_speak() {
        assert!(matches!(check(b"GET / HTTP/1.1").await.0, Err(SocksError::Version(b'G'))));
        let (result, sent) = check(&[5, 1, 2]).await;
        assert!(matches!(result, Err(SocksError::Method)));
        assert_eq!(sent, [5, 0xff]);
        let (result, sent) = check(&[5, 1, 0, 5, 2, 0, 1]).await;
        assert!(matches!(result, Err(SocksError::Command(2))));
        assert_eq!(sent[..4], [5, 0, 5, 7]);
        assert!(matches!(check(&[5, 1, 0, 5, 1, 0, 9]).await.0, Err(SocksError::Address)));
        assert!(matches!(check(&[5, 1, 0, 5, 1, 0, 3, 1, 0xff, 0, 80]).await.0, Err(SocksError::Address)));
        assert!(matches!(check(&[5, 1, 0, 5]).await.0, Err(SocksError::Io(_))));
    }
}
