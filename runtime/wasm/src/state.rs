//! What the host keeps about one instance: which callback runs, what the guest may see in it, and its streams.

use crate::abi::{AbiVersion, Callback, MapKind, VM_CONTEXT};
use crate::bodies::Bodies;
use crate::budget::{Budget, START_DEADLINE};
use crate::engine::Environment;
use crate::heads::{Request, Response};
use crate::host::{Declared, Expressions};
use crate::lease::Lease;
use crate::log::{LogGate, LogRate, Sampled};
use crate::metrics::{Metric, PluginCounters};
use crate::outside::Outside;
use cairn_filter::{Connection, Exchange, LocalReply, Peer, Protocol, Side};
use http::HeaderMap;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Notify;
use wasmtime::{Memory, ResourceLimiter, TypedFunc};

/// What never changes about one plugin, shared by its instances.
pub(crate) struct Facts {
    /// `ns/name`.
    pub(crate) name: Arc<str>,
    /// `ns.name`, as Envoy names it to plugins.
    pub(crate) plugin_name: String,
    /// The plugin's namespace.
    pub(crate) scope: Arc<str>,
    /// Whose data and queues it shares: those of its namespace, unless it is in the shadow.
    pub(crate) data_scope: Arc<str>,
    pub(crate) abi: AbiVersion,
    pub(crate) root_id: Arc<str>,
    pub(crate) config: Arc<str>,
    pub(crate) env: Vec<(Arc<str>, Arc<str>)>,
    pub(crate) environment: Arc<Environment>,
    pub(crate) counters: Arc<PluginCounters>,
    /// The longest that one call of it may take.
    pub(crate) deadline: Duration,
    /// The most memory of one instance, in bytes.
    pub(crate) memory_max: usize,
    pub(crate) log_rate: LogRate,
    /// Says that the plugin is slow.
    pub(crate) slow_sampled: Sampled,
    /// What the plugin asked for and is not offered, to log each once.
    pub(crate) asked_in_vain: Mutex<BTreeSet<String>>,
}

/// One stream context of the guest.
#[derive(Default)]
pub(crate) struct Stream {
    /// The request's headers, serialised, once its phase is over.
    pub(crate) request: Vec<u8>,
    /// The response's headers, serialised, once its phase is over.
    pub(crate) response: Vec<u8>,
    /// What the guest set with `proxy_set_property`.
    pub(crate) properties: Properties,
    /// The answer the guest wants to give.
    pub(crate) reply: Option<Box<LocalReply>>,
    /// The guest wants the stream to end.
    pub(crate) closed: bool,
    /// The guest wants the request, and the response, to go on.
    pub(crate) resumed: [bool; 2],
    /// Wakes the exchange that waits.
    pub(crate) waiting: [Option<Arc<Notify>>; 2],
    /// What the guest may see and change of the stream while it holds its request or its response.
    pub(crate) held: [Option<Box<Held>>; 2],
    /// The bodies of the request and of the response, once the guest was shown some.
    pub(crate) bodies: Option<Arc<Bodies>>,
    /// What the client and the server sent, where the stream is a connection without HTTP.
    pub(crate) data: Option<Arc<Bodies>>,
    /// The trailers of the request and of the response.
    pub(crate) trailers: [Trailers; 2],
    /// The exchange is over and the guest asked for time until it calls `proxy_done`.
    pub(crate) done_pending: bool,
}

impl Stream {
    /// Whether it is a connection without HTTP.
    pub(crate) fn is_connection(&self) -> bool {
        self.data.is_some()
    }

    /// Wakes the exchange, which then looks for what changed.
    pub(crate) fn wake(&self) {
        if let Some(data) = &self.data {
            data.wakes.fetch_add(1, Ordering::Release);
        }
        self.waiting.iter().flatten().for_each(|waiting| waiting.notify_one());
    }
}

/// What follows a body.
#[derive(Default)]
pub(crate) struct Trailers {
    pub(crate) map: Option<HeaderMap>,
    /// The guest may change them.
    pub(crate) is_open: bool,
}

/// The number of a side's stream in the ABI.
pub(crate) fn number_of(side: Side) -> usize {
    match side {
        Side::Request => 0,
        Side::Response => 1,
    }
}

/// Properties that a guest set, bounded.
#[derive(Clone, Default)]
pub(crate) struct Properties(Vec<Property>);

/// A path, its segments joined by NUL, and a value.
type Property = (Box<[u8]>, Box<[u8]>);

/// Bounds of the properties that one stream may set.
const PROPERTIES_MAX: usize = 64;
const PROPERTY_BYTES_MAX: usize = 64 << 10;

impl Properties {
    pub(crate) fn get(&self, path: &[u8]) -> Option<&[u8]> {
        self.0.iter().find(|(present, _)| **present == *path).map(|(_, value)| &**value)
    }

    /// Sets a property; false when there is no room.
    pub(crate) fn set(&mut self, path: &[u8], value: &[u8]) -> bool {
        if path.len() + value.len() > PROPERTY_BYTES_MAX {
            return false;
        }
        if let Some((_, present)) = self.0.iter_mut().find(|(present, _)| **present == *path) {
            *present = value.into();
            return true;
        }
        let room = self.0.len() < PROPERTIES_MAX;
        if room {
            self.0.push((path.into(), value.into()));
        }
        room
    }
}

/// The exchange that the running callback is about, moved in for its duration, and placeholders in between.
pub(crate) struct Live {
    /// The stream context it belongs to; 0 while there is none.
    pub(crate) context: u32,
    pub(crate) exchange: Exchange,
    pub(crate) request: Request,
    pub(crate) response: Response,
    /// What the guest did to headers, in words.
    pub(crate) changes: String,
    /// The head that is at hand.
    pub(crate) head: Option<MapKind>,
    /// It is on loan from a stream that is held: from the request's or the response's place.
    pub(crate) on_loan: Option<usize>,
}

/// The exchange of a stream that the guest holds, for callbacks that are about something else: its facts as they were, and
/// its head, which goes back into the exchange when the stream goes on.
pub(crate) struct Held {
    pub(crate) exchange: Exchange,
    pub(crate) request: Request,
    pub(crate) response: Response,
    /// Whose head it is, if that is held too.
    pub(crate) map: Option<MapKind>,
    pub(crate) changes: String,
}

/// The facts of an exchange.
pub(crate) fn copy_of(exchange: &Exchange) -> Exchange {
    let (connection, started) = (Arc::clone(&exchange.connection), exchange.started);
    let mut copy = Exchange::new(connection, exchange.protocol, started, exchange.started_at);
    copy.grpc = exchange.grpc;
    copy.route = exchange.route.clone();
    copy.cluster = exchange.cluster.clone();
    copy.upstream = exchange.upstream;
    copy.upstream_workload = exchange.upstream_workload.clone();
    copy.status = exchange.status;
    copy.measures = exchange.measures;
    copy.details = exchange.details.clone();
    copy.token = exchange.token.clone();
    copy.allowed_by = exchange.allowed_by.clone();
    copy
}

impl Live {
    fn swap(&mut self, held: &mut Held) {
        std::mem::swap(&mut self.exchange, &mut held.exchange);
        std::mem::swap(&mut self.request, &mut held.request);
        std::mem::swap(&mut self.response, &mut held.response);
        std::mem::swap(&mut self.changes, &mut held.changes);
    }

    fn none() -> Self {
        /// Where nothing comes from.
        static NOWHERE: LazyLock<Arc<Connection>> = LazyLock::new(|| {
            let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
            Arc::new(Connection {
                id: 0,
                worker: 0,
                source: Peer { address: nowhere, identity: None, workload: None },
                destination: nowhere,
                service: None,
                local: None,
                callout: Arc::new(cairn_filter::NoCallout),
            })
        });
        let now = (Instant::now(), SystemTime::UNIX_EPOCH);
        Self {
            context: VM_CONTEXT,
            exchange: Exchange::new(Arc::clone(&NOWHERE), Protocol::Http11, now.0, now.1),
            request: Request::none(),
            response: Response::none(),
            changes: String::new(),
            head: None,
            on_loan: None,
        }
    }
}

/// The bounds on memory and tables of one instance.
pub(crate) struct Limits {
    pub(crate) memory_bytes_max: usize,
    /// The guest wanted more memory than that.
    pub(crate) memory_hit: bool,
    /// What it has.
    memory_bytes: usize,
    counters: Arc<PluginCounters>,
    /// The instance's share of what all instances of single exchanges have; `None` for one that many exchanges share.
    pub(crate) lease: Option<Lease>,
}

impl Limits {
    /// Whether it wanted more memory than all instances of single exchanges may have.
    pub(crate) fn is_refused(&self) -> bool {
        self.lease.as_ref().is_some_and(Lease::was_refused)
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        self.counters.memory_bytes.fetch_sub(self.memory_bytes as u64, Ordering::Relaxed);
    }
}

/// The largest table. Coraza, the largest plugin we know, has 12,408 entries.
const TABLE_ELEMENTS_MAX: usize = 100_000;

impl ResourceLimiter for Limits {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let fits = desired <= self.memory_bytes_max;
        self.memory_hit |= !fits;
        if !fits || self.lease.as_mut().is_some_and(|lease| !lease.grow(current, desired)) {
            return Ok(false);
        }
        let more = desired.saturating_sub(current);
        self.memory_bytes += more;
        self.counters.memory_bytes.fetch_add(more as u64, Ordering::Relaxed);
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS_MAX)
    }

    fn instances(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        4
    }

    fn memories(&self) -> usize {
        1
    }
}

/// Hashes context ids, which are consecutive, as themselves spread over the upper bits that the map looks at.
#[derive(Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        // The golden ratio in 64 bits, Knuth's multiplicative hash.
        self.0 = (self.0 ^ u64::from(id)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

pub(crate) type Streams = HashMap<u32, Stream, BuildHasherDefault<IdHasher>>;

/// The host's half of one instance.
pub(crate) struct State {
    pub(crate) facts: Arc<Facts>,
    pub(crate) limits: Limits,
    /// The longest that each part of its start may take.
    pub(crate) start_deadline: Duration,
    /// What the running callback has left.
    pub(crate) budget: Budget,
    pub(crate) memory: Option<Memory>,
    /// The guest's allocator; taken out while it runs, so that it cannot be entered twice.
    pub(crate) allocate: Option<TypedFunc<u32, u32>>,
    pub(crate) callback: Callback,
    /// The context that host functions speak of.
    pub(crate) effective: u32,
    pub(crate) live: Live,
    pub(crate) streams: Streams,
    pub(crate) root_properties: Properties,
    /// Streams whose `proxy_done` came, to be deleted once the guest has returned.
    pub(crate) released: Vec<u32>,
    /// Bytes on their way to the guest; kept to spare the allocation.
    pub(crate) scratch: Vec<u8>,
    /// Buffers of finished streams, for new ones.
    pub(crate) spare: Vec<Vec<u8>>,
    pub(crate) metrics: Vec<Option<Arc<Metric>>>,
    pub(crate) log: LogGate,
    pub(crate) outside: Outside,
    /// What the guest declared of its properties.
    pub(crate) declared: Declared,
    pub(crate) expressions: Expressions,
    /// It was told the time, or random bytes: no other instance comes to the same memory.
    pub(crate) is_unique: bool,
}

/// The most buffers kept for new streams.
const SPARE_MAX: usize = 64;
/// Larger buffers are not kept.
const SPARE_BYTES_MAX: usize = 16 << 10;

impl State {
    pub(crate) fn new(facts: Arc<Facts>) -> Self {
        let counters = Arc::clone(&facts.counters);
        let memory_bytes_max = facts.memory_max;
        let limits = Limits { memory_bytes_max, memory_hit: false, memory_bytes: 0, counters, lease: None };
        Self {
            facts,
            limits,
            start_deadline: START_DEADLINE,
            budget: Budget::new(START_DEADLINE),
            memory: None,
            allocate: None,
            callback: Callback::Start,
            effective: VM_CONTEXT,
            live: Live::none(),
            streams: Streams::default(),
            root_properties: Properties::default(),
            released: Vec::new(),
            scratch: Vec::new(),
            spare: Vec::new(),
            metrics: Vec::new(),
            log: LogGate::default(),
            outside: Outside::default(),
            declared: Declared::default(),
            expressions: Expressions::default(),
            is_unique: false,
        }
    }

    /// The stream that host functions speak of.
    pub(crate) fn stream(&self) -> Option<&Stream> {
        self.streams.get(&self.effective)
    }

    /// The stream that host functions speak of.
    pub(crate) fn stream_mut(&mut self) -> Option<&mut Stream> {
        self.streams.get_mut(&self.effective)
    }

    /// The exchange that host functions speak of, if it is the one at hand.
    pub(crate) fn exchange(&self) -> Option<&Exchange> {
        self.is_live().then_some(&self.live.exchange)
    }

    /// Whether host functions speak of the exchange at hand.
    pub(crate) fn is_live(&self) -> bool {
        self.live.context != VM_CONTEXT && self.live.context == self.effective
    }

    /// Whether host functions speak of a stream whose head this map is, and that is at hand.
    pub(crate) fn is_at_hand(&self, map: MapKind) -> bool {
        self.live.head == Some(map) && self.is_live()
    }

    /// Makes host functions speak of another context. If that is a stream that the guest holds, its exchange is at hand until
    /// they speak of something else.
    pub(crate) fn speak_of(&mut self, context: u32) {
        self.hand_back();
        self.effective = context;
        if self.live.context != VM_CONTEXT {
            return;
        }
        let Some(stream) = self.streams.get_mut(&context) else { return };
        let [request, response] = &stream.held;
        // Whichever has a head to show.
        let has_head = |held: &Option<Box<Held>>| held.as_ref().is_some_and(|held| held.map.is_some());
        let index = usize::from(request.is_none() || has_head(response) && !has_head(request));
        if let Some(held) = stream.held.get_mut(index).and_then(Option::as_deref_mut) {
            self.live.context = context;
            self.live.on_loan = Some(index);
            self.live.head = held.map;
            self.live.swap(held);
        }
    }

    /// Gives a stream that is held its exchange back.
    pub(crate) fn hand_back(&mut self) {
        let Some(index) = self.live.on_loan.take() else { return };
        self.live.head = None;
        let context = std::mem::replace(&mut self.live.context, VM_CONTEXT);
        let held = self.streams.get_mut(&context).and_then(|stream| stream.held.get_mut(index));
        if let Some(held) = held.and_then(Option::as_deref_mut) {
            self.live.swap(held);
        }
    }

    /// Takes a stream away and keeps its buffers.
    pub(crate) fn forget(&mut self, context: u32) {
        let Some(stream) = self.streams.remove(&context) else { return };
        for buffer in [stream.request, stream.response] {
            let fits = (1..=SPARE_BYTES_MAX).contains(&buffer.capacity());
            if fits && self.spare.len() < SPARE_MAX {
                self.spare.push(buffer);
            }
        }
    }

    /// Says, once per plugin, that it asked for something that is not there.
    pub(crate) fn in_vain(&self, what: &str) {
        let mut asked = self.facts.asked_in_vain.lock();
        // A guest can name arbitrary things; nobody reads the hundredth of them.
        if asked.len() < 100 && !asked.contains(what) {
            asked.insert(what.to_owned());
            tracing::warn!(plugin = %self.facts.name, function = what, "the plugin asked for what is not offered");
        }
    }
}
