//! The proxy's side of a test: what host functions find and change. One world per [`super::Proxy`]; the thread's current one
//! answers the host functions.

use super::message::{Sent, TestResponse, canonical};
use crate::abi::{Buffer, HostError, Map, MetricKind, Pairs, Stream};
use crate::{Answer, Reply};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// Any moment will do, as long as it is not the beginning of time.
const START: u64 = 1_700_000_000_000_000_000;

type Cluster = Rc<dyn Fn(&Sent) -> TestResponse>;
type Grpc = Rc<dyn Fn(&Sent) -> Result<Vec<u8>, (u32, &'static str)>>;
type Foreign = Rc<dyn Fn(&[u8]) -> Vec<u8>>;

/// What an exchange holds at the moment.
#[derive(Default)]
pub(crate) struct Live {
    pub(crate) maps: [Pairs; 4],
    /// Which of them can be changed now.
    pub(crate) open: [bool; 4],
    /// What a handler sees of bodies and of what is sent on connections, per stream; `None` while there is none.
    pub(crate) buffers: [Option<Vec<u8>>; 4],
    pub(crate) resumed: [bool; 4],
    /// The plugin has ended it.
    pub(crate) closed: bool,
    pub(crate) reply: Option<Reply>,
}

/// How a callout ends.
pub(crate) enum End {
    Http(Option<Answer>),
    Grpc(Result<Vec<u8>, (u32, &'static str)>),
}

/// A callout on its way.
pub(crate) struct Pending {
    pub(crate) id: u32,
    pub(crate) due: u64,
    pub(crate) end: End,
}

pub(crate) struct World {
    now: u64,
    pub(crate) effective: u32,
    pub(crate) root: u32,
    pub(crate) live: BTreeMap<u32, Live>,
    pub(crate) clusters: BTreeMap<String, Cluster>,
    pub(crate) services: BTreeMap<String, Grpc>,
    pub(crate) foreign: BTreeMap<String, Foreign>,
    pub(crate) pending: Vec<Pending>,
    calls: u32,
    /// What the answer's maps and buffers show.
    pub(crate) answer: Option<Answer>,
    pub(crate) message: Vec<u8>,
    pub(crate) tick: Option<(u64, u64)>,
    pub(crate) configuration: Vec<u8>,
    properties: BTreeMap<Vec<String>, Vec<u8>>,
    shared: BTreeMap<String, (Vec<u8>, u32)>,
    cas: u32,
    metrics: Vec<(MetricKind, String, i64)>,
    pub(crate) logs: VecDeque<(u32, String)>,
    refused: BTreeMap<String, u32>,
    random: u64,
}

/// The most lines of the log that are kept.
const LINES_MAX: usize = 10_000;

thread_local! {
    static CURRENT: RefCell<Option<Rc<RefCell<World>>>> = const { RefCell::new(None) };
}

/// Makes a world the thread's.
pub(crate) fn install(world: &Rc<RefCell<World>>) {
    CURRENT.set(Some(Rc::clone(world)));
}

/// Asks the thread's world.
pub(crate) fn with<T>(outside: T, ask: impl FnOnce(&mut World) -> T) -> T {
    let current = CURRENT.try_with(|current| current.borrow().clone()).ok().flatten();
    let Some(world) = current else { return outside };
    // A handler of a test may log while the world asks it.
    match world.try_borrow_mut() {
        Ok(mut world) => ask(&mut world),
        Err(_) => outside,
    }
}

impl World {
    pub(crate) fn new(root: u32) -> Self {
        Self {
            now: START,
            effective: root,
            root,
            live: BTreeMap::new(),
            clusters: BTreeMap::new(),
            services: BTreeMap::new(),
            foreign: BTreeMap::new(),
            pending: Vec::new(),
            calls: 0,
            answer: None,
            message: Vec::new(),
            tick: None,
            configuration: Vec::new(),
            properties: BTreeMap::new(),
            shared: BTreeMap::new(),
            cas: 0,
            metrics: Vec::new(),
            logs: VecDeque::new(),
            refused: BTreeMap::new(),
            random: 0,
        }
    }

    /// Whether a host function may be called, by what a test has said.
    pub(crate) fn may(&self, function: &str) -> Result<(), HostError> {
        self.refused.get(function).map_or(Ok(()), |status| HostError::check(*status))
    }

    pub(crate) fn refuse(&mut self, function: &str, status: u32) {
        self.refused.insert(function.to_owned(), status);
    }

    pub(crate) fn log(&mut self, level: u32, text: &str) {
        if self.logs.len() == LINES_MAX {
            self.logs.pop_front();
        }
        self.logs.push_back((level, text.to_owned()));
    }

    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    /// The same numbers in every run, spread evenly (splitmix64, Steele et al. 2014).
    pub(crate) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn set_now(&mut self, now: u64) {
        self.now = now.max(self.now);
    }

    pub(crate) fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.now - START)
    }

    pub(crate) fn set_tick_period(&mut self, milliseconds: u32) {
        let period = u64::from(milliseconds) * 1_000_000;
        self.tick = (period > 0).then(|| (period, self.now + period));
    }

    pub(crate) fn set_effective_context(&mut self, context: u32) -> Result<(), HostError> {
        if context != self.root && !self.live.contains_key(&context) {
            return Err(HostError::BadArgument);
        }
        self.effective = context;
        Ok(())
    }

    fn exchange(&mut self) -> Option<&mut Live> {
        self.live.get_mut(&self.effective)
    }

    pub(crate) fn continue_stream(&mut self, stream: Stream) -> Result<(), HostError> {
        if stream == Stream::Upstream {
            // As in Envoy.
            return Err(HostError::Unimplemented);
        }
        let live = self.exchange().ok_or(HostError::BadArgument)?;
        live.resumed[stream as usize] = true;
        Ok(())
    }

    pub(crate) fn close_stream(&mut self, _: Stream) -> Result<(), HostError> {
        self.exchange().ok_or(HostError::BadArgument)?.closed = true;
        Ok(())
    }

    pub(crate) fn reply(&mut self, reply: Reply) -> Result<(), HostError> {
        if !(100..600).contains(&reply.status) {
            return Err(HostError::BadArgument);
        }
        let live = self.exchange().ok_or(HostError::BadArgument)?;
        live.reply.get_or_insert(reply);
        Ok(())
    }

    pub(crate) fn buffer(&mut self, kind: Buffer, start: usize, most: usize) -> Result<Vec<u8>, HostError> {
        let whole = match kind {
            Buffer::RequestBody | Buffer::ResponseBody | Buffer::DownstreamData | Buffer::UpstreamData => {
                self.exchange().and_then(|live| live.buffers[kind as usize].clone()).unwrap_or_default()
            }
            Buffer::AnswerBody => {
                self.answer.as_ref().map(|answer| answer.body.clone()).ok_or(HostError::NotFound)?
            }
            Buffer::GrpcMessage => self.message.clone(),
            Buffer::PluginConfiguration => self.configuration.clone(),
        };
        let end = start.saturating_add(most).min(whole.len());
        Ok(whole.get(start..end).unwrap_or_default().to_vec())
    }

    pub(crate) fn set_buffer(
        &mut self,
        kind: Buffer,
        start: usize,
        size: usize,
        bytes: &[u8],
    ) -> Result<(), HostError> {
        if kind as usize >= 4 {
            return Err(HostError::BadArgument);
        }
        let buffer = self.exchange().and_then(|live| live.buffers[kind as usize].as_mut());
        let buffer = buffer.ok_or(HostError::NotFound)?;
        if start == 0 {
            buffer.splice(..size.min(buffer.len()), bytes.iter().copied());
        } else if start >= buffer.len() {
            buffer.extend_from_slice(bytes);
        } else {
            return Err(HostError::BadArgument);
        }
        Ok(())
    }

    /// Maps that cannot be read now are empty, as in proxies.
    pub(crate) fn map(&mut self, map: Map) -> Option<&mut Pairs> {
        match map {
            Map::AnswerHeaders => self.answer.as_mut().map(|answer| &mut answer.headers),
            Map::AnswerTrailers => self.answer.as_mut().map(|answer| &mut answer.trailers),
            map => {
                let live = self.exchange()?;
                live.open[map as usize].then(|| &mut live.maps[map as usize])
            }
        }
    }

    pub(crate) fn header(&mut self, map: Map, name: &str) -> Result<Vec<u8>, HostError> {
        let name = canonical(name);
        let pairs = self.map(map).ok_or(HostError::BadArgument)?;
        let found = pairs.iter().find(|(present, _)| *present == name);
        found.map(|(_, value)| value.clone()).ok_or(HostError::NotFound)
    }

    pub(crate) fn add_header(&mut self, map: Map, name: &str, value: &[u8]) -> Result<(), HostError> {
        let pairs = self.map(map).ok_or(HostError::BadArgument)?;
        pairs.push((canonical(name), value.to_vec()));
        Ok(())
    }

    pub(crate) fn set_header(&mut self, map: Map, name: &str, value: &[u8]) -> Result<(), HostError> {
        let name = canonical(name);
        let pairs = self.map(map).ok_or(HostError::BadArgument)?;
        let first = pairs.iter().position(|(present, _)| *present == name).unwrap_or(pairs.len());
        pairs.retain(|(present, _)| *present != name);
        pairs.insert(first.min(pairs.len()), (name, value.to_vec()));
        Ok(())
    }

    pub(crate) fn remove_header(&mut self, map: Map, name: &str) -> Result<(), HostError> {
        let name = canonical(name);
        self.map(map).ok_or(HostError::BadArgument)?.retain(|(present, _)| *present != name);
        Ok(())
    }

    pub(crate) fn property(&self, path: &[&str]) -> Result<Vec<u8>, HostError> {
        let same = |known: &&Vec<String>| known.iter().map(String::as_str).eq(path.iter().copied());
        let known = self.properties.keys().find(same).ok_or(HostError::NotFound)?;
        Ok(self.properties[known].clone())
    }

    pub(crate) fn set_property(&mut self, path: &[&str], value: &[u8]) {
        let path = path.iter().map(|&segment| segment.to_owned()).collect();
        self.properties.insert(path, value.to_vec());
    }

    pub(crate) fn http_call(
        &mut self,
        cluster: &str,
        headers: &[(String, Vec<u8>)],
        body: &[u8],
        timeout: u32,
    ) -> Result<u32, HostError> {
        let answer = self.clusters.get(cluster).ok_or(HostError::BadArgument)?;
        let response =
            answer(&Sent { headers: headers.to_vec(), body: body.to_vec(), trailers: Pairs::new() });
        let timeout = Duration::from_millis(u64::from(timeout));
        let (delay, end) = if response.delay >= timeout {
            (timeout, Some(late()))
        } else if response.fails {
            (response.delay, None)
        } else {
            let body = response.chunks.concat();
            (response.delay, Some(Answer { headers: response.headers, body, trailers: response.trailers }))
        };
        Ok(self.start(delay, End::Http(end)))
    }

    pub(crate) fn grpc_call(
        &mut self,
        cluster: &str,
        path: &str,
        metadata: &[(String, Vec<u8>)],
        message: &[u8],
        _timeout: u32,
    ) -> Result<u32, HostError> {
        let answer = self.services.get(cluster).ok_or(HostError::Internal)?;
        let mut headers = vec![(":path".to_owned(), path.as_bytes().to_vec())];
        headers.extend_from_slice(metadata);
        let end = answer(&Sent { headers, body: message.to_vec(), trailers: Pairs::new() });
        Ok(self.start(Duration::ZERO, End::Grpc(end)))
    }

    fn start(&mut self, delay: Duration, end: End) -> u32 {
        self.calls += 4;
        // Never at once: the answer comes through a callback of its own.
        let due = self.now + u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX / 4).max(1000);
        self.pending.push(Pending { id: self.calls, due, end });
        self.calls
    }

    pub(crate) fn grpc_message(&self) -> Vec<u8> {
        self.message.clone()
    }

    pub(crate) fn shared_data(&self, key: &str) -> Result<(Vec<u8>, u32), HostError> {
        self.shared.get(key).cloned().ok_or(HostError::NotFound)
    }

    pub(crate) fn set_shared_data(&mut self, key: &str, value: &[u8], cas: u32) -> Result<(), HostError> {
        if self.shared.get(key).is_some_and(|(_, present)| cas != 0 && cas != *present) {
            return Err(HostError::CasMismatch);
        }
        self.cas += 1;
        self.shared.insert(key.to_owned(), (value.to_vec(), self.cas));
        Ok(())
    }

    pub(crate) fn define_metric(&mut self, kind: MetricKind, name: &str) -> u32 {
        let known = self.metrics.iter().position(|(_, present, _)| present == name);
        let index = known.unwrap_or_else(|| {
            self.metrics.push((kind, name.to_owned(), 0));
            self.metrics.len() - 1
        });
        (index as u32 + 1) << 2 | kind as u32
    }

    pub(crate) fn increment_metric(&mut self, id: u32, delta: i64) -> Result<(), HostError> {
        let (kind, _, value) = self.metric_mut(id)?;
        if *kind == MetricKind::Histogram || (*kind == MetricKind::Counter && delta <= 0) {
            return Err(HostError::BadArgument);
        }
        *value += delta;
        Ok(())
    }

    pub(crate) fn record_metric(&mut self, id: u32, recorded: u64) -> Result<(), HostError> {
        let (kind, _, value) = self.metric_mut(id)?;
        let recorded = i64::try_from(recorded).map_err(|_| HostError::BadArgument)?;
        *value = if *kind == MetricKind::Gauge { recorded } else { *value + recorded };
        Ok(())
    }

    fn metric_mut(&mut self, id: u32) -> Result<&mut (MetricKind, String, i64), HostError> {
        self.metrics.get_mut((id >> 2).wrapping_sub(1) as usize).ok_or(HostError::NotFound)
    }

    pub(crate) fn metric(&self, name: &str) -> Option<i64> {
        self.metrics.iter().find(|(_, present, _)| present == name).map(|(_, _, value)| *value)
    }

    pub(crate) fn call_foreign(&self, name: &str, argument: &[u8]) -> Result<Vec<u8>, HostError> {
        self.foreign.get(name).map(|function| function(argument)).ok_or(HostError::NotFound)
    }
}

/// What proxies make of a callout whose time is over.
fn late() -> Answer {
    let headers = vec![(":status".to_owned(), b"504".to_vec())];
    Answer { headers, body: b"upstream request timeout".to_vec(), trailers: Pairs::new() }
}
