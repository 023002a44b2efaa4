//! Connections without HTTP through a test's proxy: what the plugin lets pass either way, and what it holds.

use super::world::Live;
use super::{Proxy, next_context, world};
use crate::Plugin;
use crate::abi::{Action, Stream};
use std::collections::VecDeque;

/// A connection, started by [`Proxy::connect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionId(u32);

/// A connection and what came of it.
#[derive(Default)]
pub(crate) struct Connected {
    /// The plugin has let the connection itself pass.
    is_let_in: bool,
    ended: Option<ClosedBy>,
    ways: [Way; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ClosedBy {
    Proxy = 1,
    Client = 2,
}

/// One way of a connection.
#[derive(Default)]
struct Way {
    /// What was sent before the connection was let in, and whether each was the last.
    early: VecDeque<(Vec<u8>, bool)>,
    passed: Vec<u8>,
    is_held: bool,
    /// The sender has ended.
    ended: bool,
    /// And the receiver was told.
    over: bool,
}

const WAYS: [Stream; 2] = [Stream::Downstream, Stream::Upstream];

impl<P: Plugin> Proxy<P> {
    /// A client connects, and speaks anything but HTTP.
    pub fn connect(&mut self) -> ConnectionId {
        let context = next_context();
        world::install(&self.world);
        self.world.borrow_mut().live.insert(context, Live::default());
        self.runtime.create(context, self.root);
        self.world.borrow_mut().effective = context;
        let action = self.runtime.new_connection(context);
        let connected = Connected { is_let_in: action == Action::Continue as u32, ..Connected::default() };
        self.connections.insert(context, connected);
        self.connection_goes_on(context);
        ConnectionId(context)
    }

    /// The client sends bytes.
    pub fn client_sends(&mut self, id: ConnectionId, bytes: impl AsRef<[u8]>) {
        self.sent(id, Stream::Downstream, bytes.as_ref(), false);
    }

    /// The client has no more to send.
    pub fn client_ends(&mut self, id: ConnectionId) {
        self.sent(id, Stream::Downstream, &[], true);
    }

    /// The server sends bytes.
    pub fn server_sends(&mut self, id: ConnectionId, bytes: impl AsRef<[u8]>) {
        self.sent(id, Stream::Upstream, bytes.as_ref(), false);
    }

    /// The server has no more to send.
    pub fn server_ends(&mut self, id: ConnectionId) {
        self.sent(id, Stream::Upstream, &[], true);
    }

    /// The client goes away.
    pub fn client_leaves(&mut self, id: ConnectionId) {
        self.close(id.0, ClosedBy::Client);
    }

    /// What has arrived at the server.
    pub fn to_server(&self, id: ConnectionId) -> Vec<u8> {
        self.passed(id, Stream::Downstream)
    }

    /// What has arrived at the client.
    pub fn to_client(&self, id: ConnectionId) -> Vec<u8> {
        self.passed(id, Stream::Upstream)
    }

    /// Whether neither the plugin nor both ends have ended it.
    pub fn is_open(&self, id: ConnectionId) -> bool {
        self.connections.get(&id.0).is_some_and(|connected| connected.ended.is_none())
    }

    fn passed(&self, id: ConnectionId, stream: Stream) -> Vec<u8> {
        let connected = self.connections.get(&id.0);
        connected.map(|connected| connected.ways[way(stream)].passed.clone()).unwrap_or_default()
    }

    fn sent(&mut self, id: ConnectionId, stream: Stream, bytes: &[u8], end: bool) {
        world::install(&self.world);
        let Some(connected) = self.connections.get_mut(&id.0) else { return };
        connected.ways[way(stream)].early.push_back((bytes.to_vec(), end));
        self.connection_goes_on(id.0);
    }

    pub(super) fn connections_go_on(&mut self) {
        for context in self.connections.keys().copied().collect::<Vec<_>>() {
            self.connection_goes_on(context);
        }
    }

    pub(super) fn close_all(&mut self) {
        for context in self.connections.keys().copied().collect::<Vec<_>>() {
            self.close(context, ClosedBy::Proxy);
        }
    }

    /// Lets go what the plugin let go, and shows it what was sent.
    fn connection_goes_on(&mut self, context: u32) {
        self.take_resumed(context);
        for stream in WAYS {
            while let Some((bytes, end)) = self.next_sent(context, stream) {
                self.show(context, stream, &bytes, end);
                self.take_resumed(context);
            }
        }
        let Some(connected) = self.connections.get(&context) else { return };
        if self.world.borrow().live.get(&context).is_some_and(|live| live.closed) {
            self.close(context, ClosedBy::Proxy);
        } else if connected.ways.iter().all(|way| way.over) {
            self.close(context, ClosedBy::Client);
        }
    }

    fn next_sent(&mut self, context: u32, stream: Stream) -> Option<(Vec<u8>, bool)> {
        let is_closed = self.world.borrow().live.get(&context).is_none_or(|live| live.closed);
        let connected = self.connections.get_mut(&context).filter(|_| !is_closed)?;
        let may = connected.is_let_in && connected.ended.is_none();
        let way = connected.ways.get_mut(way(stream)).filter(|way| may && !way.ended)?;
        way.early.pop_front()
    }

    fn show(&mut self, context: u32, stream: Stream, bytes: &[u8], end: bool) {
        let size = {
            let mut world = self.world.borrow_mut();
            world.effective = context;
            let live = world.live.entry(context).or_default();
            live.resumed[stream as usize] = false;
            let buffer = live.buffers[stream as usize].get_or_insert_default();
            buffer.extend_from_slice(bytes);
            buffer.len()
        };
        let action = match stream {
            Stream::Upstream => self.runtime.upstream_data(context, size, end),
            _ => self.runtime.downstream_data(context, size, end),
        };
        let Some(connected) = self.connections.get_mut(&context) else { return };
        let way = &mut connected.ways[way(stream)];
        way.ended |= end;
        way.is_held = true;
        if action == Action::Continue as u32 {
            self.let_go(context, stream);
        }
    }

    fn take_resumed(&mut self, context: u32) {
        for stream in WAYS {
            let is_resumed = {
                let mut world = self.world.borrow_mut();
                let live = world.live.get_mut(&context);
                live.is_some_and(|live| std::mem::take(&mut live.resumed[stream as usize]))
            };
            if is_resumed {
                self.let_go(context, stream);
            }
        }
    }

    fn let_go(&mut self, context: u32, stream: Stream) {
        let mut world = self.world.borrow_mut();
        let live = world.live.entry(context).or_default();
        let Some(connected) = self.connections.get_mut(&context).filter(|_| !live.closed) else { return };
        connected.is_let_in = true;
        let way = &mut connected.ways[way(stream)];
        if std::mem::take(&mut way.is_held) {
            way.passed.extend(live.buffers[stream as usize].take().unwrap_or_default());
            way.over |= way.ended;
        }
    }

    fn close(&mut self, context: u32, by: ClosedBy) {
        world::install(&self.world);
        let Some(connected) = self.connections.get_mut(&context) else { return };
        if connected.ended.replace(by).is_some() {
            return;
        }
        self.world.borrow_mut().effective = context;
        self.runtime.downstream_close(context, by as u32);
        self.finish(context);
    }
}

fn way(stream: Stream) -> usize {
    usize::from(stream == Stream::Upstream)
}
