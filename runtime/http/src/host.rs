//! The endpoints a worker has used: their load, and the connections kept open to them.

use crate::body::RequestBody;
use cairn_mesh::Identity;
use hyper::client::conn::{http1, http2};
use parking_lot::Mutex;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The endpoints by address. Several share one while a pod's address passes to another identity.
#[derive(Default)]
pub(crate) struct Hosts {
    by_address: Mutex<HashMap<SocketAddr, SmallVec<[Arc<Host>; 1]>>>,
}

/// One endpoint, reached plainly or as an identity through tunnels.
pub(crate) struct Host {
    /// The workload's own address and port.
    pub(crate) address: SocketAddr,
    /// Who must be at the other end; `None`: plain TCP, nobody is proven.
    pub(crate) identity: Option<Identity>,
    /// Requests in progress.
    active: AtomicUsize,
    /// Connections open, idle or not.
    open: AtomicUsize,
    /// HTTP/1.1 connections without work, the longest idle first.
    idle: Mutex<Vec<Idle>>,
    /// HTTP/2 connections.
    shared: Mutex<Vec<Shared>>,
    /// Held while an HTTP/2 connection is being opened, so that a burst opens one and not many.
    pub(crate) opening: tokio::sync::Mutex<()>,
}

/// An HTTP/1.1 connection, and our end of it, if it is a socket of its own.
pub(crate) type Kept = (http1::SendRequest<RequestBody>, Option<SocketAddr>);

struct Idle {
    sender: http1::SendRequest<RequestBody>,
    local: Option<SocketAddr>,
    since: Instant,
}

/// An HTTP/2 connection and its streams in progress.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) sender: http2::SendRequest<RequestBody>,
    pub(crate) streams: Arc<AtomicUsize>,
    /// Our end of it, if it is a socket of its own.
    pub(crate) local: Option<SocketAddr>,
    idle_since: Arc<Mutex<Option<Instant>>>,
}

/// Streams per HTTP/2 connection before another is opened; what servers usually allow (RFC 9113 §6.5.2).
const STREAMS_MAX: usize = 100;

impl Hosts {
    /// The endpoint, remembered from its first use on.
    pub(crate) fn host(&self, address: SocketAddr, identity: Option<&Identity>) -> Arc<Host> {
        let mut by_address = self.by_address.lock();
        let hosts = by_address.entry(address).or_default();
        if let Some(host) = hosts.iter().find(|host| host.identity.as_ref() == identity) {
            return Arc::clone(host);
        }
        let host = Arc::new(Host {
            address,
            identity: identity.cloned(),
            active: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            idle: Mutex::default(),
            shared: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
        });
        hosts.push(Arc::clone(&host));
        host
    }

    /// Closes what idled for longer than `idle_max`, and forgets endpoints without connections or requests.
    pub(crate) fn prune(&self, idle_max: Duration) {
        let now = Instant::now();
        let is_used = |host: &mut Arc<Host>| {
            host.prune(now, idle_max);
            // Somebody who has just looked it up holds it too.
            host.open.load(Relaxed) > 0 || Arc::strong_count(host) > 1
        };
        self.by_address.lock().retain(|_, hosts| {
            hosts.retain(is_used);
            !hosts.is_empty()
        });
    }
}

impl Host {
    /// Requests in progress.
    pub(crate) fn active(&self) -> usize {
        self.active.load(Relaxed)
    }

    /// An idle HTTP/1.1 connection, the one used last: it is the least likely to be closed by the other end.
    pub(crate) fn take_idle(&self) -> Option<Kept> {
        let mut idle = self.idle.lock();
        let mut at = idle.len();
        while at > 0 {
            at -= 1;
            match idle.get(at) {
                Some(candidate) if candidate.sender.is_closed() => drop(idle.remove(at)),
                // Others are still finishing: their peer has not taken the whole request.
                Some(candidate) if candidate.sender.is_ready() => {
                    let Idle { sender, local, .. } = idle.remove(at);
                    return Some((sender, local));
                }
                _ => {}
            }
        }
        None
    }

    pub(crate) fn put_idle(&self, (sender, local): Kept, idle_max: usize) {
        if sender.is_closed() || idle_max == 0 {
            return;
        }
        let mut idle = self.idle.lock();
        if idle.len() >= idle_max {
            idle.remove(0);
        }
        idle.push(Idle { sender, local, since: Instant::now() });
    }

    /// An HTTP/2 connection with room for a stream.
    pub(crate) fn shared(&self) -> Option<Shared> {
        let mut shared = self.shared.lock();
        shared.retain(|connection| !connection.sender.is_closed());
        shared.iter().find(|connection| connection.streams.load(Relaxed) < STREAMS_MAX).cloned()
    }

    pub(crate) fn put_shared(
        &self,
        sender: http2::SendRequest<RequestBody>,
        local: Option<SocketAddr>,
    ) -> Shared {
        let connection = Shared { sender, streams: Arc::default(), local, idle_since: Arc::default() };
        self.shared.lock().push(connection.clone());
        connection
    }

    fn prune(&self, now: Instant, idle_max: Duration) {
        let expired = |since: Instant| now.saturating_duration_since(since) > idle_max;
        self.idle.lock().retain(|idle| !idle.sender.is_closed() && !expired(idle.since));
        self.shared.lock().retain(|connection| {
            let mut idle_since = connection.idle_since.lock();
            if connection.streams.load(Relaxed) > 0 {
                *idle_since = None;
            }
            let waits = connection.streams.load(Relaxed) == 0 && expired(*idle_since.get_or_insert(now));
            !connection.sender.is_closed() && !waits
        });
    }
}

/// A request in progress on an endpoint.
pub(crate) struct Active(Arc<Host>);

impl Active {
    pub(crate) fn new(host: Arc<Host>) -> Self {
        host.active.fetch_add(1, Relaxed);
        Self(host)
    }

    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.0
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// An open connection to an endpoint, held by what drives it.
pub(crate) struct Opened(Arc<Host>);

impl Opened {
    /// Counts a connection; `None` when there are `open_max` already.
    pub(crate) fn new(host: &Arc<Host>, open_max: usize) -> Option<Self> {
        let before = host.open.fetch_add(1, Relaxed);
        let opened = Self(Arc::clone(host));
        (before < open_max).then_some(opened)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}
