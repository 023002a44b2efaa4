//! Packets between processes of one machine, which may bring file descriptors (`SOCK_SEQPACKET`, `SCM_RIGHTS`).

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    recvmsg, send, sendmsg, socket_with,
};
use std::fs::Permissions;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// The largest packet that is read whole (facts: ZDS, 1,024 bytes in both directions).
const PACKET_BYTES_MAX: usize = 1024;

/// As many descriptors of one packet are taken; of more, the packet says that they were cut off.
const DESCRIPTORS_MAX: usize = 4;

/// Peers that wait to be accepted; more are turned away.
const WAITING_MAX: i32 = 8;

/// What a socket of packets could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// The path cannot be listened at.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A peer cannot be accepted.
    #[error("cannot accept a peer")]
    Accept(#[source] io::Error),
    /// Nobody listens there, or the socket could not be made.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The listener's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] io::Error),
}

/// One packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
    /// Bytes or descriptors are missing: there was no room for them.
    pub is_cut: bool,
}

/// A connected socket of packets.
#[derive(Debug)]
pub struct PacketSocket {
    descriptor: AsyncFd<OwnedFd>,
}

impl PacketSocket {
    /// Connects to the listener at a path.
    ///
    /// # Errors
    /// When nobody listens there, or more wait to be accepted than it lets.
    pub fn connect(path: &Path) -> Result<Self, PacketError> {
        let failed = |source: io::Error| PacketError::Connect { path: path.to_owned(), source };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let descriptor = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .and_then(|descriptor| {
                rustix::net::connect(&descriptor, &SocketAddrUnix::new(path)?)?;
                Ok(descriptor)
            })
            .map_err(|error| failed(error.into()))?;
        Ok(Self { descriptor: register(descriptor).map_err(failed)? })
    }

    /// Waits for the next packet; `None` when the peer has closed the connection. Cancelling this loses nothing.
    ///
    /// # Errors
    /// When the connection broke.
    pub async fn receive(&self) -> Result<Option<Packet>, PacketError> {
        let received = self.descriptor.async_io(Interest::READABLE, receive).await;
        let packet = received.map_err(PacketError::Broken)?;
        // A packet of no bytes is how the end looks; none of ours is empty.
        Ok(Some(packet).filter(|packet| !packet.bytes.is_empty()))
    }

    /// Sends one packet, whole or not at all.
    ///
    /// # Errors
    /// When the connection broke.
    pub async fn send(&self, packet: &[u8]) -> Result<(), PacketError> {
        let sent = |descriptor: &OwnedFd| Ok(send(descriptor, packet, SendFlags::NOSIGNAL)?);
        let sent = self.descriptor.async_io(Interest::WRITABLE, sent).await;
        sent.map(|_whole| ()).map_err(PacketError::Broken)
    }

    /// Sends one packet, whole or not at all, and a descriptor with it, which stays ours as well.
    ///
    /// # Errors
    /// When the connection broke, or more descriptors are on their way than the system lets.
    pub async fn send_with(&self, packet: &[u8], descriptor: BorrowedFd<'_>) -> Result<(), PacketError> {
        let sent = |socket: &OwnedFd| {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            let descriptors = [descriptor];
            if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            Ok(sendmsg(socket, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL)?)
        };
        let sent = self.descriptor.async_io(Interest::WRITABLE, sent).await;
        sent.map(|_whole| ()).map_err(PacketError::Broken)
    }

    /// Whether the process at the other end ran as our own user when it connected or began to listen
    /// (`SO_PEERCRED`).
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn is_of_our_user(&self) -> io::Result<bool> {
        // The peer's process may have no number in our namespace of processes, which rustix's type cannot express;
        // the kernel does not care that the stream is one of packets.
        let same: StdUnixStream = self.descriptor.get_ref().try_clone()?.into();
        let peer = UnixStream::from_std(same)?.peer_cred()?;
        Ok(peer.uid() == rustix::process::geteuid().as_raw())
    }
}

/// A listening socket of packets.
#[derive(Debug)]
pub struct PacketListener {
    descriptor: AsyncFd<OwnedFd>,
}

impl PacketListener {
    /// Listens at a path, for processes of our own user only (mode 0600), and in place of whoever listened there: the
    /// path leads to one or the other at any moment. The file stays when the listener is gone, and whoever connects then
    /// is refused.
    ///
    /// # Errors
    /// When the path is too long (107 bytes) or its directory is not ours to write to.
    pub fn bind(path: &Path) -> Result<Self, PacketError> {
        let failed = |source: io::Error| PacketError::Listen { path: path.to_owned(), source };
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        let beside = PathBuf::from(beside);
        let open = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let descriptor = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            bind(&descriptor, &SocketAddrUnix::new(&beside)?)?;
            // Nobody can connect before it listens, so its mode is never another.
            std::fs::set_permissions(&beside, Permissions::from_mode(0o600))?;
            listen(&descriptor, WAITING_MAX)?;
            std::fs::rename(&beside, path)?;
            register(descriptor)
        };
        // What a process of our number left that ended between the two.
        let _none = std::fs::remove_file(&beside);
        let opened = open();
        if opened.is_err() {
            let _none = std::fs::remove_file(&beside);
        }
        Ok(Self { descriptor: opened.map_err(failed)? })
    }

    /// Waits for the next peer. Cancelling this loses nobody.
    ///
    /// # Errors
    /// When the system has no descriptor left for it.
    pub async fn accept(&self) -> Result<PacketSocket, PacketError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = |listener: &OwnedFd| Ok(accept_with(listener, flags)?);
        let accepted = self.descriptor.async_io(Interest::READABLE, accepted).await;
        let descriptor = accepted.and_then(register).map_err(PacketError::Accept)?;
        Ok(PacketSocket { descriptor })
    }
}

/// Registers a descriptor with the runtime's event queue.
#[expect(
    deprecated,
    reason = "what it is deprecated for cannot be: an `OwnedFd` stays the descriptor that it is"
)]
fn register(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(descriptor)
}

fn receive(descriptor: &OwnedFd) -> io::Result<Packet> {
    let mut bytes = vec![0; PACKET_BYTES_MAX];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let received =
        recvmsg(descriptor, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    bytes.truncate(received.bytes);
    let is_cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok(Packet { bytes, descriptors, is_cut })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{accept, socketpair};
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    fn pair() -> (PacketSocket, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (PacketSocket { descriptor: register(ours).unwrap() }, theirs)
    }

    fn send_with(to: &OwnedFd, bytes: &[u8], count: usize) {
        let file = File::open("/proc/self/ns/net").unwrap();
        let descriptors = vec![file.as_fd(); count];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if count > 0 {
            assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        }
        sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    }

    #[tokio::test]
    async fn a_packet_arrives_whole_or_says_that_it_is_cut() {
        let (ours, theirs) = pair();
        for (name, length, count, kept, is_cut) in [
            ("bytes alone", 3, 0, (3, 0), false),
            ("a descriptor", 3, 1, (3, 1), false),
            ("as large as may be", 1024, 0, (1024, 0), false),
            ("larger", 1025, 1, (1024, 1), true),
            ("as many descriptors as may be", 1, 4, (1, 4), false),
        ] {
            send_with(&theirs, &vec![7; length], count);
            let packet = ours.receive().await.unwrap().unwrap();
            assert_eq!((packet.bytes.len(), packet.descriptors.len()), kept, "{name}");
            assert_eq!(packet.is_cut, is_cut, "{name}");
        }
        // The kernel's own arithmetic says how many fit: what matters is that it is told.
        send_with(&theirs, &[7], 8);
        assert!(ours.receive().await.unwrap().unwrap().is_cut, "more descriptors");
    }

    #[tokio::test]
    async fn packets_are_not_joined_and_the_end_is_seen() {
        let (ours, theirs) = pair();
        ours.send(b"one").await.unwrap();
        ours.send(b"two").await.unwrap();
        let mut buffer = [0; 16];
        for expected in [&b"one"[..], b"two"] {
            let length = rustix::io::read(&theirs, &mut buffer).unwrap();
            assert_eq!(buffer.get(..length), Some(expected));
        }
        drop(theirs);
        assert!(ours.receive().await.unwrap().is_none());
        assert!(matches!(ours.send(b"three").await, Err(PacketError::Broken(_))));
    }

    #[tokio::test]
    async fn a_connection_needs_a_listener() {
        let path = std::env::temp_dir().join(format!("cairn-packet-{}", std::process::id()));
        let error = PacketSocket::connect(&path).unwrap_err();
        assert!(matches!(&error, PacketError::Connect { path: at, .. } if *at == path), "{error}");
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let listener = listener.unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 1).unwrap();
        let ours = PacketSocket::connect(&path).unwrap();
        let theirs = accept(&listener).unwrap();
        std::fs::remove_file(&path).unwrap();
        rustix::io::write(&theirs, b"hello").unwrap();
        assert_eq!(ours.receive().await.unwrap().unwrap().bytes, b"hello");
    }

    #[tokio::test]
    async fn a_descriptor_goes_along_and_stays() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let listener = PacketListener::bind(&path).unwrap();
        let ours = PacketSocket::connect(&path).unwrap();
        let theirs = listener.accept().await.unwrap();
        let file = File::open("/proc/self/ns/net").unwrap();
        ours.send_with(b"take this", file.as_fd()).await.unwrap();
        let packet = theirs.receive().await.unwrap().unwrap();
        assert_eq!((packet.bytes.as_slice(), packet.is_cut), (&b"take this"[..], false));
        let [came] = packet.descriptors.as_slice() else { panic!("{packet:?}") };
        let number = |file: &File| file.metadata().unwrap().ino();
        assert_eq!(number(&File::from(came.try_clone().unwrap())), number(&file));
    }

    #[tokio::test]
    async fn a_path_is_for_our_user_and_leads_to_the_last_who_listens() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let mut last = None;
        for round in 0..3 {
            let listener = PacketListener::bind(&path).unwrap();
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "round {round}");
            let ours = PacketSocket::connect(&path).unwrap();
            let theirs = listener.accept().await.unwrap();
            assert!(ours.is_of_our_user().unwrap() && theirs.is_of_our_user().unwrap());
            theirs.send(b"hello").await.unwrap();
            assert_eq!(ours.receive().await.unwrap().unwrap().bytes, b"hello", "round {round}");
            last = Some(listener);
        }
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1, "something is left over");
        drop(last);
        let error = PacketSocket::connect(&path).unwrap_err();
        assert!(matches!(error, PacketError::Connect { source, .. }
            if source.kind() == io::ErrorKind::ConnectionRefused));
    }

    #[tokio::test]
    async fn a_path_that_cannot_be_listened_at_is_named() {
        let long = Path::new("/tmp").join("x".repeat(120));
        for path in [Path::new("/nowhere/socket"), &long] {
            let error = PacketListener::bind(path).unwrap_err();
            assert!(matches!(&error, PacketError::Listen { path: at, .. } if at == path), "{error}");
        }
    }
}
