//! Data and queues that plugins of one namespace share over all workers: process-wide and bounded.

use crate::abi::Status;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

/// The bounds of one namespace.
const BYTES_MAX: usize = 16 << 20;
const QUEUES_MAX: usize = 256;
const QUEUE_ITEMS_MAX: usize = 1024;
const QUEUE_BYTES_MAX: usize = 4 << 20;

/// Why shared state was not changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SharedError {
    /// The status to answer.
    Status(Status),
    /// A bound that one more would break; the ABI has no status for it that SDKs survive, so the guest is ended.
    Full(&'static str),
}

/// All shared state of the process.
#[derive(Default)]
pub(crate) struct Shared {
    scopes: Mutex<HashMap<Arc<str>, Scope>>,
    queues: Mutex<Queues>,
}

#[derive(Default)]
struct Scope {
    values: HashMap<Box<[u8]>, Value>,
    /// Keys by the time of their last write, so that the oldest goes first when room is needed.
    by_age: BTreeMap<u32, Box<[u8]>>,
    bytes: usize,
    last_cas: u32,
}

struct Value {
    bytes: Box<[u8]>,
    cas: u32,
}

#[derive(Default)]
struct Queues {
    ids: HashMap<(Arc<str>, Box<[u8]>), u32>,
    queues: Vec<Queue>,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Box<[u8]>>,
    bytes: usize,
    /// Tells who last asked to be told of items.
    listener: Option<Listener>,
    /// That is under way.
    telling: bool,
}

/// Starts to tell a plugin that there are items in a queue.
pub(crate) type Listener = Arc<dyn Fn() + Send + Sync>;

impl Shared {
    /// Copies a value into `out` and returns its version.
    pub(crate) fn read(&self, scope: &str, key: &[u8], out: &mut Vec<u8>) -> Result<u32, Status> {
        let scopes = self.scopes.lock();
        let value = scopes.get(scope).and_then(|scope| scope.values.get(key)).ok_or(Status::NotFound)?;
        out.extend_from_slice(&value.bytes);
        Ok(value.cas)
    }

    /// Writes a value if `cas` is 0, its present version, or there is none (`proxy_set_shared_data`). The values that
    /// were written longest ago make room.
    pub(crate) fn write(
        &self,
        scope: &Arc<str>,
        key: &[u8],
        bytes: &[u8],
        cas: u32,
    ) -> Result<(), SharedError> {
        if key.len() + bytes.len() > BYTES_MAX {
            return Err(SharedError::Full("a shared value is larger than all shared data may be"));
        }
        let mut scopes = self.scopes.lock();
        let scope = scopes.entry(Arc::clone(scope)).or_default();
        if let Some(present) = scope.values.get(key) {
            if cas != 0 && cas != present.cas {
                return Err(SharedError::Status(Status::CasMismatch));
            }
            scope.remove(key);
        }
        while scope.bytes + key.len() + bytes.len() > BYTES_MAX {
            let Some((_, oldest)) = scope.by_age.pop_first() else { break };
            scope.remove(&oldest);
        }
        scope.insert(key, bytes);
        Ok(())
    }

    /// `proxy_register_shared_queue`: creates it on first use.
    pub(crate) fn register_queue(&self, scope: &Arc<str>, name: &[u8]) -> Result<u32, SharedError> {
        let mut queues = self.queues.lock();
        let key = (Arc::clone(scope), Box::from(name));
        if let Some(id) = queues.ids.get(&key) {
            return Ok(*id);
        }
        if queues.ids.keys().filter(|(present, _)| present == scope).count() >= QUEUES_MAX {
            return Err(SharedError::Full("too many shared queues"));
        }
        queues.queues.push(Queue::default());
        let id = queues.queues.len() as u32;
        queues.ids.insert(key, id);
        Ok(id)
    }

    /// `proxy_resolve_shared_queue`.
    pub(crate) fn resolve_queue(&self, scope: &Arc<str>, name: &[u8]) -> Result<u32, Status> {
        let queues = self.queues.lock();
        queues.ids.get(&(Arc::clone(scope), Box::from(name))).copied().ok_or(Status::NotFound)
    }

    /// `proxy_enqueue_shared_queue`. A full queue drops its oldest items.
    pub(crate) fn enqueue(&self, id: u32, item: &[u8]) -> Result<(), Status> {
        let mut queues = self.queues.lock();
        let queue = queues.find(id)?;
        queue.items.push_back(item.into());
        queue.bytes += item.len();
        while queue.items.len() > QUEUE_ITEMS_MAX || queue.bytes > QUEUE_BYTES_MAX {
            let Some(dropped) = queue.items.pop_front() else { break };
            queue.bytes -= dropped.len();
            tracing::debug!(queue = id, "a full shared queue dropped its oldest item");
        }
        let listener = queue.listener_to_tell();
        drop(queues);
        if let Some(tell) = listener {
            tell();
        }
        Ok(())
    }

    /// Has items of a queue told of by `listener` from now on, and by nobody else (Envoy: the last registrant).
    pub(crate) fn listen(&self, id: u32, listener: Listener) {
        let mut queues = self.queues.lock();
        let Ok(queue) = queues.find(id) else { return };
        queue.listener = Some(listener);
        queue.telling = false;
        let listener = if queue.items.is_empty() { None } else { queue.listener_to_tell() };
        drop(queues);
        if let Some(tell) = listener {
            tell();
        }
    }

    /// The number of items that a listener is to be told of now. Items put in later make it start again.
    pub(crate) fn begin_telling(&self, id: u32) -> usize {
        let mut queues = self.queues.lock();
        let Ok(queue) = queues.find(id) else { return 0 };
        queue.telling = false;
        queue.items.len()
    }

    /// `proxy_dequeue_shared_queue`.
    pub(crate) fn dequeue(&self, id: u32) -> Result<Box<[u8]>, Status> {
        let mut queues = self.queues.lock();
        let queue = queues.find(id)?;
        let item = queue.items.pop_front().ok_or(Status::Empty)?;
        queue.bytes -= item.len();
        Ok(item)
    }
}

impl Scope {
    fn remove(&mut self, key: &[u8]) {
        if let Some(value) = self.values.remove(key) {
            self.by_age.remove(&value.cas);
            self.bytes -= key.len() + value.bytes.len();
        }
    }

    fn insert(&mut self, key: &[u8], bytes: &[u8]) {
        // Versions start at 1 and skip 0, which means "whatever there is".
        self.last_cas = self.last_cas.wrapping_add(1).max(1);
        while self.by_age.contains_key(&self.last_cas) {
            self.last_cas = self.last_cas.wrapping_add(1).max(1);
        }
        self.by_age.insert(self.last_cas, key.into());
        self.values.insert(key.into(), Value { bytes: bytes.into(), cas: self.last_cas });
        self.bytes += key.len() + bytes.len();
    }
}

impl Queue {
    /// The listener, unless it has been told already and has not looked yet.
    fn listener_to_tell(&mut self) -> Option<Listener> {
        let listener = self.listener.clone().filter(|_| !self.telling)?;
        self.telling = true;
        Some(listener)
    }
}

impl Queues {
    fn find(&mut self, id: u32) -> Result<&mut Queue, Status> {
        let index = (id as usize).checked_sub(1).ok_or(Status::NotFound)?;
        self.queues.get_mut(index).ok_or(Status::NotFound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(shared: &Shared, key: &[u8]) -> Result<(Vec<u8>, u32), Status> {
        let mut out = Vec::new();
        shared.read("ns", key, &mut out).map(|cas| (out, cas))
    }

    #[test]
    fn versions_guard_writes() {
        let (shared, scope) = (Shared::default(), Arc::from("ns"));
        assert_eq!(read(&shared, b"k"), Err(Status::NotFound));
        assert_eq!(shared.write(&scope, b"k", b"1", 123), Ok(()), "an absent key takes any version");
        assert_eq!(read(&shared, b"k"), Ok((b"1".to_vec(), 1)));
        assert_eq!(shared.write(&scope, b"k", b"2", 9), Err(SharedError::Status(Status::CasMismatch)));
        assert_eq!(shared.write(&scope, b"k", b"2", 1), Ok(()));
        assert_eq!(shared.write(&scope, b"k", b"", 0), Ok(()));
        assert_eq!(read(&shared, b"k"), Ok((Vec::new(), 3)));
        assert_eq!(
            shared.read("other", b"k", &mut Vec::new()),
            Err(Status::NotFound),
            "namespaces do not share"
        );
    }

    #[test]
    fn oldest_values_make_room() {
        let (shared, scope) = (Shared::default(), Arc::from("ns"));
        let third = vec![0; BYTES_MAX / 3];
        for key in [b"a", b"b", b"a", b"c", b"d"] {
            shared.write(&scope, key, &third, 0).unwrap();
        }
        let present = |key: &[u8]| read(&shared, key).is_ok();
        assert_eq!([present(b"a"), present(b"b"), present(b"c"), present(b"d")], [false, false, true, true]);
        assert!(matches!(shared.write(&scope, b"e", &vec![0; BYTES_MAX], 0), Err(SharedError::Full(_))));
    }

    #[test]
    fn queues_are_bounded_and_scoped() {
        let (shared, scope) = (Shared::default(), Arc::from("ns"));
        let id = shared.register_queue(&scope, b"q").unwrap();
        assert_eq!(id, 1);
        assert_eq!(shared.register_queue(&scope, b"q"), Ok(1));
        assert_eq!(shared.resolve_queue(&scope, b"q"), Ok(1));
        assert_eq!(shared.resolve_queue(&Arc::from("other"), b"q"), Err(Status::NotFound));
        assert_eq!(shared.dequeue(id), Err(Status::Empty));
        assert_eq!(shared.dequeue(7), Err(Status::NotFound));
        assert_eq!(shared.enqueue(0, b""), Err(Status::NotFound));
        for number in 0..=QUEUE_ITEMS_MAX as u32 {
            shared.enqueue(id, &number.to_le_bytes()).unwrap();
        }
        assert_eq!(&*shared.dequeue(id).unwrap(), &1u32.to_le_bytes(), "the oldest was dropped");
    }
}
