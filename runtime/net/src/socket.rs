//! Sockets: how we listen, how we connect, and where a redirected connection was going.

use crate::Namespace;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

/// What a socket could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer refused, or the socket could not be prepared.
    #[error("cannot connect to {address}")]
    Connect {
        /// The peer.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer did not answer.
    #[error("{address} did not answer within {timeout:?}")]
    ConnectTimeout {
        /// The peer.
        address: SocketAddr,
        /// How long we waited.
        timeout: Duration,
    },
    /// A network namespace cannot be opened or entered.
    #[error("cannot enter network namespace {}", path.display())]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A socket that another process opened is not what would be opened here.
    #[error("the socket handed over for {address} differs: {difference}")]
    Differs {
        /// The address to listen on.
        address: SocketAddr,
        /// In what.
        difference: &'static str,
    },
    /// A connected socket that has no local address.
    #[error("the connection's own address is unknown")]
    LocalAddress(#[source] io::Error),
}

/// How to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenOptions {
    /// Accept connections whose destination is not ours (`IP_TRANSPARENT`). Needs `CAP_NET_ADMIN`.
    pub transparent: bool,
    /// Let another process listen on the same address, as during a rolling update (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// How many connections may wait to be accepted.
    pub backlog: u32,
    /// The packet mark (`SO_MARK`), which accepted connections inherit. Needs `CAP_NET_ADMIN`.
    pub mark: Option<u32>,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self { transparent: false, reuse_port: false, backlog: 1024, mark: None }
    }
}

/// What arrives on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// Connections.
    Stream,
    /// Packets.
    Datagram,
}

/// How to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectOptions {
    /// The address to connect from; the kernel's choice if unset.
    pub bind: Option<IpAddr>,
    /// `bind` need not be ours (`IP_TRANSPARENT` and `IP_FREEBIND`). Needs `CAP_NET_ADMIN`.
    pub transparent: bool,
    /// The packet mark (`SO_MARK`). Needs `CAP_NET_ADMIN`.
    pub mark: Option<u32>,
    /// The network namespace to connect in; our own if unset.
    pub namespace: Option<Namespace>,
    /// How long to wait for the peer.
    pub timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { bind: None, transparent: false, mark: None, namespace: None, timeout: Duration::from_secs(10) }
    }
}

/// Keepalive as a ztunnel sets it (facts: `KEEPALIVE_TIME`, `_INTERVAL`, `_RETRIES`).
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(180))
    .with_interval(Duration::from_secs(180))
    .with_retries(9);

/// Listens on `address`. `[::]` is every address of both families; where there is no IPv6, of IPv4.
///
/// # Errors
/// When the address is taken or not ours, or an option is not permitted.
pub fn listen(address: SocketAddr, options: &ListenOptions) -> Result<TcpListener, NetError> {
    let is_any_v6 = address.is_ipv6() && address.ip().is_unspecified();
    let without_v6 = |error: &io::Error| {
        let no_family = rustix::io::Errno::AFNOSUPPORT.raw_os_error();
        is_any_v6
            && (error.raw_os_error() == Some(no_family)
                || matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported))
    };
    let listener = match open_listener(address, options) {
        Err(error) if without_v6(&error) => {
            open_listener(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()), options)
        }
        other => other,
    };
    listener.map_err(|source| NetError::Listen { address, source })
}

fn open_listener(address: SocketAddr, options: &ListenOptions) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    if options.transparent {
        // The IPv4 option also covers IPv4 clients of an IPv6 wildcard socket.
        socket.set_ip_transparent_v4(true)?;
        if address.is_ipv6() {
            socket.set_ip_transparent_v6(true)?;
        }
    }
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    TcpListener::from_std(socket.into())
}

/// Whether a socket that another process opened is what [`listen`] (or, for packets, [`listen_datagram`]) would open.
/// The number of connections that may wait is not compared.
///
/// # Errors
/// With the difference, when it is not.
pub fn fits(
    descriptor: &OwnedFd,
    kind: SocketKind,
    address: SocketAddr,
    options: &ListenOptions,
) -> Result<(), NetError> {
    let socket = SockRef::from(descriptor);
    let differs = |difference| NetError::Differs { address, difference };
    let is = |holds: io::Result<bool>, difference| match holds {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(differs(difference)),
    };
    let expected = match kind {
        SocketKind::Stream => Type::STREAM,
        SocketKind::Datagram => Type::DGRAM,
    };
    is(socket.r#type().map(|found| found == expected), "its kind")?;
    let at = socket.local_addr().map(|at| at.as_socket());
    // Where there is no IPv6, `[::]` is every address of IPv4.
    let same = |at: SocketAddr| {
        let same_ip = at.ip() == address.ip() || (at.ip().is_unspecified() && address.ip().is_unspecified());
        same_ip && at.port() == address.port()
    };
    is(at.map(|at| at.is_some_and(same)), "its address")?;
    is(socket.reuse_port().map(|reuse| reuse == options.reuse_port), "whether others may share its port")?;
    is(socket.mark().map(|mark| mark == options.mark.unwrap_or(0)), "its mark")?;
    if kind == SocketKind::Stream {
        is(socket.is_listener(), "it does not listen")?;
        let transparent = socket.ip_transparent_v4();
        is(transparent.map(|found| found == options.transparent), "whether it is transparent")?;
    }
    Ok(())
}

/// Takes over a listening socket that another process opened, and that [`fits`].
///
/// # Errors
/// When the runtime does not take it.
pub fn adopt(descriptor: OwnedFd, address: SocketAddr) -> Result<TcpListener, NetError> {
    let adopted = || {
        let socket = Socket::from(descriptor);
        socket.set_nonblocking(true)?;
        TcpListener::from_std(socket.into())
    };
    adopted().map_err(|source| NetError::Listen { address, source })
}

/// Takes over a socket for packets that another process opened, and that [`fits`].
///
/// # Errors
/// When the runtime does not take it.
pub fn adopt_datagram(descriptor: OwnedFd, address: SocketAddr) -> Result<UdpSocket, NetError> {
    let adopted = || {
        let socket = Socket::from(descriptor);
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket.into())
    };
    adopted().map_err(|source| NetError::Listen { address, source })
}

/// Connects to `address`. The stream sends small writes at once and notices a vanished peer.
///
/// # Errors
/// When the peer refuses or does not answer in time, or an option is not permitted.
pub async fn connect(address: SocketAddr, options: &ConnectOptions) -> Result<TcpStream, NetError> {
    let failed = |source| NetError::Connect { address, source };
    let socket = match &options.namespace {
        Some(namespace) => namespace.within(|| open_socket(address, options))?,
        None => open_socket(address, options),
    };
    let socket = socket.map_err(failed)?;
    match tokio::time::timeout(options.timeout, socket.connect(address)).await {
        Ok(connected) => connected.map_err(failed),
        Err(_) => Err(NetError::ConnectTimeout { address, timeout: options.timeout }),
    }
}

fn open_socket(address: SocketAddr, options: &ConnectOptions) -> io::Result<TcpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    if let Some(source) = options.bind {
        if options.transparent && address.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
            socket.set_freebind_v4(true)?;
        } else if options.transparent {
            socket.set_ip_transparent_v6(true)?;
            socket.set_freebind_v6(true)?;
        }
        // The port is chosen when the destination is known: any that is free towards there, instead of one that is free
        // towards everybody, of which there are few and which takes long to find.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// A socket for packets that is connected to `peer`: it hears only what comes from there. `mark` as in
/// [`ConnectOptions::mark`].
///
/// # Errors
/// When there is no way to the peer, or the mark is not permitted.
pub fn datagram(peer: SocketAddr, mark: Option<u32>) -> Result<UdpSocket, NetError> {
    let open = || {
        let socket = open_datagram(peer, mark)?;
        socket.connect(&peer.into())?;
        UdpSocket::from_std(socket.into())
    };
    open().map_err(|source| NetError::Connect { address: peer, source })
}

/// A socket for packets at `address`, as [`listen`] for connections.
///
/// # Errors
/// When the address is taken or not ours, or an option is not permitted.
pub fn listen_datagram(address: SocketAddr, options: &ListenOptions) -> Result<UdpSocket, NetError> {
    let open = || {
        let socket = open_datagram(address, options.mark)?;
        if options.reuse_port {
            socket.set_reuse_port(true)?;
        }
        socket.bind(&address.into())?;
        UdpSocket::from_std(socket.into())
    };
    open().map_err(|source| NetError::Listen { address, source })
}

fn open_datagram(address: SocketAddr, mark: Option<u32>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

/// Prepares an accepted socket: small writes leave at once, a vanished peer is noticed.
///
/// # Errors
/// When the socket is already gone.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(&KEEPALIVE)
}

/// Where a connection was going before the kernel redirected it to us; our own address if it was not redirected.
///
/// # Errors
/// When the connection is already gone.
pub fn original_destination(stream: &TcpStream) -> Result<SocketAddr, NetError> {
    let local = stream.local_addr().map_err(NetError::LocalAddress)?;
    let socket = SockRef::from(stream);
    // An IPv4 client of an IPv6 wildcard socket is asked for in the IPv4 way, so that one comes first.
    let redirected = socket.original_dst_v4().or_else(|_| socket.original_dst_v6());
    let address = redirected.ok().and_then(|address| address.as_socket()).unwrap_or(local);
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn loopback() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    #[tokio::test]
    async fn connection_has_the_options_and_the_source_asked_for() {
        let listener = listen(loopback(), &ListenOptions::default()).unwrap();
        let address = listener.local_addr().unwrap();
        let options = ConnectOptions { bind: Some("127.0.0.9".parse().unwrap()), ..Default::default() };
        let client = connect(address, &options).await.unwrap();
        let (server, peer) = listener.accept().await.unwrap();
        assert_eq!(peer.ip().to_string(), "127.0.0.9");
        prepare(&server).unwrap();
        for stream in [&client, &server] {
            assert!(stream.nodelay().unwrap());
            assert!(SockRef::from(stream).keepalive().unwrap());
            assert_eq!(SockRef::from(stream).tcp_keepalive_time().unwrap(), Duration::from_secs(180));
        }
        assert_eq!(original_destination(&server).unwrap(), address);
    }

    #[tokio::test]
    async fn a_port_is_taken_only_towards_its_destination() {
        for source in ["127.0.0.9", "::1"] {
            let source: IpAddr = source.parse().unwrap();
            let address = SocketAddr::new(source, 80);
            let options = ConnectOptions { bind: Some(source), ..Default::default() };
            let socket = open_socket(address, &options).unwrap();
            assert_eq!(socket.local_addr().unwrap(), SocketAddr::new(source, 0));
        }
    }

    #[tokio::test]
    async fn two_listeners_share_a_port_only_when_asked() {
        let shared = ListenOptions { reuse_port: true, ..Default::default() };
        let first = listen(loopback(), &shared).unwrap();
        let address = first.local_addr().unwrap();
        listen(address, &shared).unwrap();
        let error = listen(address, &ListenOptions::default()).unwrap_err();
        assert!(matches!(error, NetError::Listen { address: at, .. } if at == address));
    }

    #[tokio::test]
    async fn a_socket_of_another_process_goes_on_where_it_fits() {
        let options = ListenOptions { reuse_port: true, ..Default::default() };
        let first = listen(loopback(), &options).unwrap();
        let address = first.local_addr().unwrap();
        let waiting = connect(address, &ConnectOptions::default()).await.unwrap();
        let other = "127.0.0.1:1".parse().unwrap();
        let handed = || first.as_fd().try_clone_to_owned().unwrap();
        for (name, kind, at, options, expected) in [
            ("as it is", SocketKind::Stream, address, options.clone(), None),
            ("packets", SocketKind::Datagram, address, options.clone(), Some("its kind")),
            ("elsewhere", SocketKind::Stream, other, options.clone(), Some("its address")),
            (
                "alone",
                SocketKind::Stream,
                address,
                ListenOptions::default(),
                Some("whether others may share its port"),
            ),
            (
                "marked",
                SocketKind::Stream,
                address,
                ListenOptions { mark: Some(7), ..options.clone() },
                Some("its mark"),
            ),
            (
                "transparent",
                SocketKind::Stream,
                address,
                ListenOptions { transparent: true, ..options.clone() },
                Some("whether it is transparent"),
            ),
        ] {
            let found = match fits(&handed(), kind, at, &options) {
                Ok(()) => None,
                Err(NetError::Differs { difference, .. }) => Some(difference),
                Err(other) => panic!("{name}: {other}"),
            };
            assert_eq!(found, expected, "{name}");
        }
        let idle = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        idle.bind(&loopback().into()).unwrap();
        let at = idle.local_addr().unwrap().as_socket().unwrap();
        let error = fits(&idle.into(), SocketKind::Stream, at, &ListenOptions::default()).unwrap_err();
        assert!(matches!(error, NetError::Differs { difference: "it does not listen", .. }), "{error}");
        // Who waits to be accepted goes with the socket.
        let second = adopt(handed(), address).unwrap();
        drop(first);
        let (_, peer) = second.accept().await.unwrap();
        assert_eq!(peer, waiting.local_addr().unwrap());
    }

    #[tokio::test]
    async fn packets_that_wait_go_with_their_socket() {
        let first = listen_datagram(loopback(), &ListenOptions::default()).unwrap();
        let address = first.local_addr().unwrap();
        let client = datagram(address, None).unwrap();
        client.send(b"question").await.unwrap();
        let handed = first.as_fd().try_clone_to_owned().unwrap();
        fits(&handed, SocketKind::Datagram, address, &ListenOptions::default()).unwrap();
        let second = adopt_datagram(handed, address).unwrap();
        drop(first);
        let mut buffer = [0; 16];
        let length = second.recv(&mut buffer).await.unwrap();
        assert_eq!(buffer.get(..length), Some(&b"question"[..]));
    }

    #[tokio::test]
    async fn packets_are_heard_from_the_peer_only() {
        let listener = listen_datagram(loopback(), &ListenOptions::default()).unwrap();
        let client = datagram(listener.local_addr().unwrap(), None).unwrap();
        let stranger = datagram(client.local_addr().unwrap(), None).unwrap();
        client.send(b"hello").await.unwrap();
        let mut buffer = [0; 16];
        let (length, peer) = listener.recv_from(&mut buffer).await.unwrap();
        assert_eq!((buffer.get(..length), peer), (Some(&b"hello"[..]), client.local_addr().unwrap()));
        stranger.send(b"guess").await.unwrap();
        listener.send_to(b"answer", peer).await.unwrap();
        let length = client.recv(&mut buffer).await.unwrap();
        assert_eq!(buffer.get(..length), Some(&b"answer"[..]));
    }

    #[tokio::test]
    async fn every_address_is_of_both_families() {
        let listener = listen("[::]:0".parse().unwrap(), &ListenOptions::default()).unwrap();
        let address = SocketAddr::new("127.0.0.1".parse().unwrap(), listener.local_addr().unwrap().port());
        connect(address, &ConnectOptions::default()).await.unwrap();
    }

    #[tokio::test]
    async fn refused_connection_names_the_peer() {
        let address = listen(loopback(), &ListenOptions::default()).unwrap().local_addr().unwrap();
        let error = connect(address, &ConnectOptions::default()).await.unwrap_err();
        assert!(matches!(&error, NetError::Connect { address: at, source }
            if *at == address && source.kind() == io::ErrorKind::ConnectionRefused));
    }

    #[tokio::test]
    async fn silent_peer_times_out() {
        // A full backlog drops further handshakes, so the next connection gets no answer.
        let listener = listen(loopback(), &ListenOptions { backlog: 0, ..Default::default() }).unwrap();
        let address = listener.local_addr().unwrap();
        let timeout = Duration::from_millis(200);
        let options = ConnectOptions { timeout, ..Default::default() };
        let mut held = Vec::new();
        let error = loop {
            match connect(address, &options).await {
                Ok(stream) => held.push(stream),
                Err(error) => break error,
            }
            assert!(held.len() < 16, "the backlog has no end");
        };
        assert!(matches!(error, NetError::ConnectTimeout { timeout: waited, .. } if waited == timeout));
    }
}
