//! The sockets that this process listens on, by name, and those that its predecessor left it.

use cairn_net::{ListenOptions, Namespace, NamespaceId, NetError, SocketKind};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use tokio::net::{TcpListener, UdpSocket};

/// What tells a socket from all others on the node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SocketName {
    /// The uid of the pod that it is for; empty: the ztunnel itself.
    pub owner: Arc<str>,
    /// The network namespace that it is in: a pod that comes anew under the same uid has another.
    pub network: Arc<str>,
    /// What arrives on it.
    pub transport: Transport,
    /// Where, as it was asked for.
    pub address: SocketAddr,
}

/// What arrives on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Connections.
    Stream,
    /// Packets.
    Datagram,
}

impl From<Transport> for SocketKind {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Stream => Self::Stream,
            Transport::Datagram => Self::Datagram,
        }
    }
}

/// Whom a socket is opened for, and in which namespace.
#[derive(Clone, Copy)]
pub struct Owner<'a> {
    /// The uid of the pod; empty: the ztunnel itself.
    pub uid: &'a str,
    /// Its network namespace; `None`: our own.
    pub namespace: Option<&'a Namespace>,
}

impl Owner<'_> {
    /// The ztunnel itself.
    pub const ZTUNNEL: Self = Self { uid: "", namespace: None };
}

type Held = dyn AsFd + Send + Sync;

/// Opens sockets, or finds them among those that were left; remembers those that are open, for a successor.
pub struct Sockets {
    /// Our own network namespace; `None` where nothing is ever handed over.
    network: Option<Arc<str>>,
    open: Mutex<HashMap<SocketName, Weak<Held>>>,
    left: Mutex<HashMap<SocketName, OwnedFd>>,
}

impl Sockets {
    /// Sockets that nobody will take over.
    pub fn new() -> Self {
        Self { network: None, open: Mutex::default(), left: Mutex::default() }
    }

    /// Sockets that can be handed over.
    ///
    /// # Errors
    /// When it is not known which network namespace this is.
    pub fn for_handover() -> std::io::Result<Self> {
        let network = NamespaceId::own()?.to_string();
        Ok(Self { network: Some(network.into()), ..Self::new() })
    }

    /// Our own network namespace, as names have it.
    pub fn network(&self) -> &str {
        self.network.as_deref().unwrap_or_default()
    }

    /// Listens for connections.
    ///
    /// # Errors
    /// As [`cairn_net::listen`].
    pub fn listen(
        &self,
        owner: Owner<'_>,
        address: SocketAddr,
        options: &ListenOptions,
    ) -> Result<Arc<TcpListener>, NetError> {
        let name = self.name(owner, Transport::Stream, address);
        let listener = match self.claim(name.as_ref(), options) {
            Some(descriptor) => cairn_net::adopt(descriptor, address)?,
            None => within(owner, || cairn_net::listen(address, options))?,
        };
        let listener = Arc::new(listener);
        self.remember(name, Arc::clone(&listener) as Arc<Held>);
        Ok(listener)
    }

    /// Listens for packets.
    ///
    /// # Errors
    /// As [`cairn_net::listen_datagram`].
    pub fn listen_datagram(
        &self,
        owner: Owner<'_>,
        address: SocketAddr,
        options: &ListenOptions,
    ) -> Result<UdpSocket, NetError> {
        let name = self.name(owner, Transport::Datagram, address);
        match self.claim(name.as_ref(), options) {
            Some(descriptor) => cairn_net::adopt_datagram(descriptor, address),
            None => within(owner, || cairn_net::listen_datagram(address, options)),
        }
    }

    /// Remembers a socket for packets that [`Self::listen_datagram`] opened, once it is where it stays.
    pub fn remember_datagram(&self, owner: Owner<'_>, address: SocketAddr, socket: &Arc<UdpSocket>) {
        let name = self.name(owner, Transport::Datagram, address);
        self.remember(name, Arc::clone(socket) as Arc<Held>);
    }

    /// The sockets that are open now and of use in the network namespace of a successor: those of pods that have one of
    /// their own, and ours where it is the same.
    pub fn open(&self, network: &str) -> Vec<(SocketName, OwnedFd)> {
        let open = self.open.lock();
        let of_use = |name: &SocketName| *name.network != *self.network() || self.network() == network;
        let held = open.iter().filter(|(name, _)| of_use(name));
        let copied = held.filter_map(|(name, socket)| {
            let socket = socket.upgrade()?;
            match socket.as_fd().try_clone_to_owned() {
                Ok(copy) => Some((name.clone(), copy)),
                Err(error) => {
                    tracing::warn!(?name, %error, "a socket cannot be handed over");
                    None
                }
            }
        });
        copied.collect()
    }

    /// Takes what a predecessor leaves.
    pub fn leave(&self, sockets: Vec<(SocketName, OwnedFd)>) {
        self.left.lock().extend(sockets);
    }

    /// Closes what was left and is not of use here. Returns how many those were.
    pub fn close_left(&self) -> usize {
        let left = std::mem::take(&mut *self.left.lock());
        for name in left.keys() {
            tracing::debug!(?name, "a socket of the predecessor is of no use");
        }
        left.len()
    }

    fn name(&self, owner: Owner<'_>, transport: Transport, address: SocketAddr) -> Option<SocketName> {
        let own = self.network.as_ref()?;
        let network = match owner.namespace {
            None => Arc::clone(own),
            // A namespace that cannot be named is not handed over.
            Some(namespace) => namespace.id().ok()?.to_string().into(),
        };
        Some(SocketName { owner: owner.uid.into(), network, transport, address })
    }

    /// The socket that was left under this name, if it is as one opened here would be. One that is not stays: it may be
    /// what is asked for next.
    fn claim(&self, name: Option<&SocketName>, options: &ListenOptions) -> Option<OwnedFd> {
        let name = name?;
        let mut left = self.left.lock();
        match cairn_net::fits(left.get(name)?, name.transport.into(), name.address, options) {
            Ok(()) => left.remove(name),
            Err(error) => {
                tracing::info!(owner = %name.owner, %error, "a socket of the predecessor is not taken");
                None
            }
        }
    }

    fn remember(&self, name: Option<SocketName>, socket: Arc<Held>) {
        let Some(name) = name else { return };
        let mut open = self.open.lock();
        // Pods come and go; there are some thousand names at most.
        open.retain(|_, socket| socket.strong_count() > 0);
        open.insert(name, Arc::downgrade(&socket));
    }
}

fn within<T>(owner: Owner<'_>, open: impl FnOnce() -> Result<T, NetError>) -> Result<T, NetError> {
    match owner.namespace {
        Some(namespace) => namespace.within(open)?,
        None => open(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    fn handover() -> Sockets {
        Sockets::for_handover().unwrap()
    }

    #[tokio::test]
    async fn what_is_open_can_be_handed_over_and_is_the_same_socket() {
        let (old, new) = (handover(), handover());
        let pod = Owner { uid: "pod", namespace: None };
        let probe = cairn_net::listen(any(), &ListenOptions::default()).unwrap();
        let at = probe.local_addr().unwrap();
        drop(probe);
        let listener = old.listen(pod, at, &ListenOptions::default()).unwrap();
        let packets = Arc::new(old.listen_datagram(pod, at, &ListenOptions::default()).unwrap());
        old.remember_datagram(pod, at, &packets);
        let mut sockets = old.open(old.network());
        sockets.sort_by_key(|(name, _)| name.transport as u8);
        let kinds: Vec<_> = sockets.iter().map(|(name, _)| (&*name.owner, name.transport)).collect();
        assert_eq!(kinds, [("pod", Transport::Stream), ("pod", Transport::Datagram)]);
        new.leave(sockets);
        // Nothing else listens there, and nobody could.
        let taken = new.listen(pod, at, &ListenOptions::default()).unwrap();
        drop((listener, packets));
        let client = tokio::net::TcpStream::connect(at).await.unwrap();
        assert_eq!(taken.accept().await.unwrap().1, client.local_addr().unwrap());
        assert_eq!(new.close_left(), 1, "the one for packets was not asked for");
        assert!(old.open(old.network()).is_empty(), "what is closed is not handed over");
    }

    #[tokio::test]
    async fn only_what_is_meant_for_the_same_pod_and_place_is_taken() {
        let (old, new) = (handover(), handover());
        let pod = Owner { uid: "pod", namespace: None };
        let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
        let first = old.listen(pod, any(), &options).unwrap();
        let at = first.local_addr().unwrap();
        let named = old.listen(pod, at, &options).unwrap();
        new.leave(old.open(old.network()));
        let other = Owner { uid: "other", namespace: None };
        let anew = new.listen(other, at, &options).unwrap();
        // Options that differ are not what would be opened here.
        assert!(new.listen(pod, at, &ListenOptions::default()).is_err(), "the port is taken");
        drop((first, anew));
        let same = new.listen(pod, at, &options).unwrap();
        drop(named);
        assert_eq!(new.close_left(), 1, "the first, which was asked for by another name");
        let client = tokio::net::TcpStream::connect(at).await.unwrap();
        assert_eq!(same.accept().await.unwrap().1, client.local_addr().unwrap());
    }

    #[tokio::test]
    async fn our_own_ports_are_of_no_use_in_another_network() {
        let old = handover();
        let _own = old.listen(Owner::ZTUNNEL, any(), &ListenOptions::default()).unwrap();
        assert_eq!(old.open(old.network()).len(), 1);
        assert!(old.open("another").is_empty());
    }

    #[tokio::test]
    async fn where_nothing_is_handed_over_nothing_is_remembered() {
        let sockets = Sockets::new();
        let _own = sockets.listen(Owner::ZTUNNEL, any(), &ListenOptions::default()).unwrap();
        assert!(sockets.open("").is_empty());
    }
}
