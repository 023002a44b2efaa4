//! Opening tunnels over few connections: those to one peer, in one name, share connections.

use crate::TunnelStream;
use crate::client::{Client, Driver, OpenError, Place};
use cairn_identity::WorkloadCertificate;
use cairn_mesh::Identity;
use cairn_net::{ConnectOptions, Namespace, NetError};
use http::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::oneshot;

/// Limits and times of opened connections. Defaults as in a ztunnel, except where said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSettings {
    /// How many tunnels share a connection, if the peer allows as many. Default: 100.
    pub streams_per_connection: usize,
    /// How many connections to one peer are made so that tunnels that carry much do not hold up others. More are made
    /// only when there is no room. Default: 1, which is none for that.
    pub spread_max: usize,
    /// How long a connection without tunnels is kept. Default: 300 s. It is looked at every `ping_interval`.
    pub idle_timeout: Duration,
    /// How many connections are kept; beyond, the idle ones go. Default: 4,096.
    pub connections_max: usize,
    /// How many tunnels may wait for a connection to one peer. Default: 4,096.
    pub waiters_max: usize,
    /// Bytes the peer may send on one tunnel before we have read them. Default: 4 MiB.
    pub stream_window: u32,
    /// Bytes the peer may send on all tunnels of a connection before we have read them. Default: 16 MiB.
    pub connection_window: u32,
    /// The largest frame the peer may send. Default: 64 KiB, as for [`crate::ServerSettings`].
    pub frame_bytes_max: u32,
    /// The largest set of headers the peer may send. Default: 16 KiB.
    pub header_bytes_max: u32,
    /// Bytes queued for sending on one tunnel. Default: 256 KiB.
    pub send_buffer_bytes_max: usize,
    /// How often the peer is asked whether it is there. Default: 10 s.
    pub ping_interval: Duration,
    /// How long it may take to answer. Default: 20 s.
    pub ping_timeout: Duration,
    /// How long TLS and HTTP/2 may take to begin. Default: 10 s.
    pub handshake_timeout: Duration,
    /// How long the peer may take to answer a CONNECT. Default: 10 s; a ztunnel waits for ever.
    pub answer_timeout: Duration,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            streams_per_connection: 100,
            spread_max: 1,
            idle_timeout: Duration::from_secs(300),
            connections_max: 4096,
            waiters_max: 4096,
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame_bytes_max: 64 << 10,
            header_bytes_max: 16 << 10,
            send_buffer_bytes_max: 256 << 10,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            handshake_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(10),
        }
    }
}

/// Where a tunnel leads, and in whose name.
#[derive(Clone, Debug)]
pub struct PoolTarget {
    /// The certificate of the source.
    pub certificate: Arc<WorkloadCertificate>,
    /// The peer that ends the tunnel.
    pub connect: SocketAddr,
    /// The uid of its workload, if it is known: see [`Pool::forget`].
    pub workload: Option<Arc<str>>,
    /// Who the peer may be.
    pub identities: Vec<Identity>,
    /// How to connect: the source's address and namespace, among others.
    pub options: ConnectOptions,
    /// Where the tunnel leads behind the peer: `address:port` or `host:port`.
    pub authority: String,
}

/// Why there is no tunnel.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The peer cannot be reached.
    #[error("cannot reach the peer")]
    Tcp(#[source] Arc<NetError>),
    /// TLS failed: the peer is someone else, or does not trust us.
    #[error("TLS handshake failed")]
    Tls(#[source] Arc<io::Error>),
    /// The peer resumed a session that its certificate, revoked since, had begun.
    #[error("the peer's certificate is revoked")]
    Revoked,
    /// HTTP/2 failed.
    #[error("HTTP/2 failed")]
    Http2(#[source] Arc<h2::Error>),
    /// The peer answered with this status.
    #[error("the peer refused the tunnel with status {0}")]
    Refused(StatusCode),
    /// The peer did not finish the handshake or did not answer the CONNECT.
    #[error("the peer did not answer in time")]
    Timeout,
    /// The target's authority cannot be sent.
    #[error("`{0}` is no authority")]
    Authority(String),
    /// All connections are in use and there may be no more of them, or too many wait already.
    #[error("the pool is full")]
    Full,
    /// The task that connects was ended, with its runtime.
    #[error("the pool is shutting down")]
    Closed,
}

/// How often a CONNECT that the peer has not looked at is sent again on another connection.
const ATTEMPTS: usize = 3;

/// Tunnels of one worker. Clones are handles of the same pool.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    settings: PoolSettings,
    /// Never held across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Each has a connection, or one is being made.
    peers: HashMap<Key, Peer>,
    /// Connections of all peers.
    connections: usize,
}

/// Connections to one peer in one name.
#[derive(Default)]
struct Peer {
    /// The uid of its workload.
    workload: Option<Arc<str>>,
    clients: Vec<Arc<Client>>,
    /// A connection is being made; one at a time.
    connecting: bool,
    /// Who waits for it.
    waiters: VecDeque<Waiter>,
}

impl Peer {
    fn take_place(&self, spread_max: usize) -> Option<Place> {
        let easy = self.clients.iter().filter(|client| client.bulky() == 0).find_map(Client::take_place);
        if easy.is_some() || self.clients.len() < spread_max {
            return easy;
        }
        let mut clients: Vec<&Arc<Client>> = self.clients.iter().collect();
        clients.sort_by_key(|client| client.bulky());
        clients.into_iter().find_map(Client::take_place)
    }
}

type Waiter = oneshot::Sender<Result<Place, ConnectError>>;

/// What tunnels must have in common to share a connection.
#[derive(Clone, PartialEq, Eq)]
struct Key {
    source: Identity,
    connect: SocketAddr,
    identities: Box<[Identity]>,
    options: ConnectOptions,
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.source, &self.connect, &self.identities, &self.options.bind).hash(state);
    }
}

impl Key {
    fn of(target: &PoolTarget) -> Self {
        Self {
            source: target.certificate.identity.clone(),
            connect: target.connect,
            identities: target.identities.as_slice().into(),
            options: target.options.clone(),
        }
    }
}

enum Checkout {
    Place(Place),
    Wait(oneshot::Receiver<Result<Place, ConnectError>>),
}

impl Pool {
    /// An empty pool.
    pub fn new(settings: PoolSettings) -> Self {
        Self { shared: Arc::new(Shared { settings, state: Mutex::default() }) }
    }

    /// Opens a tunnel to `target`, with `headers` in its CONNECT. Connects if no connection has room. Must run within a
    /// tokio runtime; connections live on it.
    ///
    /// # Errors
    /// When the peer cannot be reached, is someone else, or refuses.
    pub async fn connect(
        &self,
        target: &PoolTarget,
        headers: HeaderMap,
    ) -> Result<TunnelStream, ConnectError> {
        let authority = target.authority.parse();
        let authority = authority.map_err(|_| ConnectError::Authority(target.authority.clone()))?;
        let settings = &self.shared.settings;
        let mut attempt = 1;
        loop {
            let place = self.place(target).await?;
            let client = Arc::clone(place.client());
            match place.open(&authority, &headers, settings).await {
                Ok(tunnel) => return Ok(tunnel),
                Err(OpenError::Failed(error)) => return Err(error),
                Err(OpenError::NotSent(error)) if attempt >= ATTEMPTS => {
                    return Err(ConnectError::Http2(Arc::new(error)));
                }
                Err(OpenError::NotSent(error)) => {
                    tracing::debug!(%error, destination = %target.connect, "trying another connection");
                    // A stream refused for want of room says nothing about the connection.
                    if error.reason() != Some(h2::Reason::REFUSED_STREAM) {
                        client.mark_broken();
                    }
                    attempt += 1;
                }
            }
        }
    }

    /// Gives up the connections to workloads that are gone: they get no new tunnels, those without tunnels close at once,
    /// and those with tunnels do unless the peer proves within seconds that it is still there. Returns how many.
    pub fn forget(&self, is_gone: impl Fn(&str) -> bool) -> usize {
        let mut state = self.shared.state.lock();
        let gone = |peer: &Peer| peer.workload.as_ref().is_some_and(|workload| is_gone(workload));
        let keys: Vec<Key> =
            state.peers.iter().filter(|(_, peer)| gone(peer)).map(|(key, _)| key.clone()).collect();
        let before = state.connections;
        for key in &keys {
            if let Some(peer) = state.peers.get(key) {
                peer.clients.iter().for_each(|client| client.suspect());
            }
            state.retire(key, |_| true);
        }
        before - state.connections
    }

    /// Gives up the connections that were made in a namespace: the pod there is gone. They get no new tunnels and close
    /// with their last one. Returns how many.
    pub fn forget_from(&self, namespace: &Namespace) -> usize {
        let mut state = self.shared.state.lock();
        let is_from = |key: &&Key| key.options.namespace.as_ref() == Some(namespace);
        let keys: Vec<Key> = state.peers.keys().filter(is_from).cloned().collect();
        let before = state.connections;
        for key in &keys {
            state.retire(key, |_| true);
        }
        before - state.connections
    }

    /// How many connections there are.
    pub fn connection_count(&self) -> usize {
        self.shared.state.lock().connections
    }

    async fn place(&self, target: &PoolTarget) -> Result<Place, ConnectError> {
        match self.check_out(target)? {
            Checkout::Place(place) => Ok(place),
            // Connecting has its own deadlines and answers everyone who waits.
            Checkout::Wait(place) => place.await.unwrap_or(Err(ConnectError::Closed)),
        }
    }

    fn check_out(&self, target: &PoolTarget) -> Result<Checkout, ConnectError> {
        let key = Key::of(target);
        let mut state = self.shared.state.lock();
        state.retire(&key, |client| client.not_before < target.certificate.not_before);
        if let Some(place) = state.take_place(&key, self.shared.settings.spread_max) {
            return Ok(Checkout::Place(place));
        }
        let peer = state.peers.entry(key.clone()).or_default();
        peer.workload.clone_from(&target.workload);
        if peer.waiters.len() >= self.shared.settings.waiters_max {
            return Err(ConnectError::Full);
        }
        let (waiter, place) = oneshot::channel();
        peer.waiters.push_back(waiter);
        if !std::mem::replace(&mut peer.connecting, true) {
            let connecting = Connecting { shared: Arc::clone(&self.shared), key, done: false };
            tokio::spawn(connecting.run(target.clone()));
        }
        Ok(Checkout::Wait(place))
    }
}

impl State {
    /// A place on the first connection with room: so the others may fall idle. One whose tunnels carry much is taken
    /// only when there are `spread_max` connections already.
    fn take_place(&mut self, key: &Key, spread_max: usize) -> Option<Place> {
        let place = self.peers.get(key)?.take_place(spread_max)?;
        if place.client().is_usable() {
            return Some(place);
        }
        // Some are gone: forget those, and look again among the rest.
        self.retire(key, |client| !client.is_usable());
        self.peers.get(key)?.take_place(spread_max)
    }

    /// Forgets connections of a peer. Their tunnels go on; then they close themselves.
    fn retire(&mut self, key: &Key, retired: impl Fn(&Arc<Client>) -> bool) {
        let Some(peer) = self.peers.get_mut(key) else { return };
        let before = peer.clients.len();
        peer.clients.retain(|client| !retired(client));
        self.connections -= before - peer.clients.len();
        if peer.clients.is_empty() && !peer.connecting {
            self.peers.remove(key);
        }
    }

    fn retire_idle(&mut self) {
        let keys: Vec<Key> = self.peers.keys().cloned().collect();
        for key in keys {
            self.retire(&key, |client| client.idle_since().is_some());
        }
    }

    /// Adds a connection and gives its places to those who wait. Returns whether more must be made.
    fn connected(&mut self, key: &Key, client: &Arc<Client>) -> bool {
        let Some(peer) = self.peers.get_mut(key) else { return false };
        peer.clients.push(Arc::clone(client));
        self.connections += 1;
        while let Some(waiter) = peer.waiters.pop_front() {
            if waiter.is_closed() {
                continue;
            }
            let Some(place) = client.take_place() else {
                peer.waiters.push_front(waiter);
                return true;
            };
            // One who has gone meanwhile drops the place, which frees it.
            let _ = waiter.send(Ok(place));
        }
        peer.connecting = false;
        false
    }

    /// Tells those who wait that there is no further connection. What room there is beside tunnels that carry much is
    /// theirs.
    fn failed(&mut self, key: &Key, error: &ConnectError) {
        let Some(peer) = self.peers.get_mut(key) else { return };
        for waiter in std::mem::take(&mut peer.waiters) {
            if let Some(place) = peer.take_place(0) {
                // One who has gone meanwhile drops the place, which frees it.
                let _ = waiter.send(Ok(place));
                continue;
            }
            // One who has gone needs no answer.
            let _ = waiter.send(Err(error.clone()));
        }
        peer.connecting = false;
        if peer.clients.is_empty() {
            self.peers.remove(key);
        }
    }
}

/// The one task that makes connections to a peer, as long as someone waits for one.
struct Connecting {
    shared: Arc<Shared>,
    key: Key,
    done: bool,
}

impl Connecting {
    async fn run(mut self, target: PoolTarget) {
        while !self.done {
            match Client::connect(&target, &self.shared.settings).await {
                Ok((client, driver)) => self.add(&client, driver),
                Err(error) => self.fail(&error),
            }
        }
    }

    fn add(&mut self, client: &Arc<Client>, driver: Driver) {
        let mut state = self.shared.state.lock();
        if state.connections >= self.shared.settings.connections_max {
            state.retire_idle();
        }
        if state.connections >= self.shared.settings.connections_max {
            state.failed(&self.key, &ConnectError::Full);
            self.done = true;
            return;
        }
        self.done = !state.connected(&self.key, client);
        let place = Kept {
            shared: Arc::downgrade(&self.shared),
            key: self.key.clone(),
            client: Arc::downgrade(client),
        };
        tokio::spawn(place.run(driver));
    }

    fn fail(&mut self, error: &ConnectError) {
        self.shared.state.lock().failed(&self.key, error);
        self.done = true;
    }
}

impl Drop for Connecting {
    /// The task was ended before it was done: nobody shall wait for it.
    fn drop(&mut self) {
        if !self.done {
            self.shared.state.lock().failed(&self.key, &ConnectError::Closed);
        }
    }
}

/// A connection's place in the pool, as its driver sees it. It keeps neither alive.
struct Kept {
    shared: Weak<Shared>,
    key: Key,
    client: Weak<Client>,
}

impl Kept {
    async fn run(self, driver: Driver) {
        let result = driver.run(|| self.retire_if_idle()).await;
        if let Err(error) = result {
            tracing::debug!(error = &error as &dyn std::error::Error, peer = %self.key.connect, "connection lost");
        }
        if let (Some(shared), Some(client)) = (self.shared.upgrade(), self.client.upgrade()) {
            client.mark_broken();
            shared.state.lock().retire(&self.key, |other| Arc::ptr_eq(other, &client));
        }
    }

    fn retire_if_idle(&self) {
        let (Some(shared), Some(client)) = (self.shared.upgrade(), self.client.upgrade()) else { return };
        let mut state = shared.state.lock();
        if client.idle_since().is_some_and(|since| since.elapsed() >= shared.settings.idle_timeout) {
            state.retire(&self.key, |other| Arc::ptr_eq(other, &client));
        }
    }
}

#[cfg(test)]
impl Pool {
    /// Whether nothing is kept, not even for a peer without connections.
    pub(crate) fn shared_is_empty(&self) -> bool {
        let state = self.shared.state.lock();
        state.peers.is_empty() && state.connections == 0
    }
}
