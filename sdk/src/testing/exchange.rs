//! The way of one exchange through a test's proxy: what the plugin is shown when, and what its answers do. Holds what the
//! plugin pauses and passes on the rest, as proxies do.

use super::message::{Outcome, Sent, TestRequest, TestResponse};
use super::world::{Live, World};
use crate::Plugin;
use crate::abi::{Action, Map, Pairs, Side};
use crate::runtime::Runtime;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Where an exchange is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Headers(Side),
    Body(Side),
    Trailers(Side),
    Upstream,
    End,
}

/// An exchange under way.
pub(crate) struct Running {
    context: u32,
    at: At,
    paused: bool,
    started: u64,
    chunks: VecDeque<Vec<u8>>,
    trailers: Pairs,
    response: Option<(u64, TestResponse)>,
    upstream: Option<Sent>,
    passed: [Vec<u8>; 2],
    outcome: Outcome,
}

/// When the next upstream answers.
pub(crate) fn next_response(running: &BTreeMap<u32, Running>) -> Option<u64> {
    running
        .values()
        .filter(|one| one.at == At::Upstream)
        .filter_map(|one| one.response.as_ref())
        .map(|(due, _)| *due)
        .min()
}

impl Running {
    pub(crate) fn start(context: u32, request: TestRequest, world: &mut World) -> Self {
        let mut live = Live::default();
        live.maps[Map::RequestHeaders as usize] = request.headers;
        world.live.insert(context, live);
        Self {
            context,
            at: At::Headers(Side::Request),
            paused: false,
            started: world.now(),
            chunks: request.chunks.into(),
            trailers: request.trailers,
            response: None,
            upstream: None,
            passed: Default::default(),
            outcome: Outcome::default(),
        }
    }

    /// Goes on until the exchange waits or ends.
    pub(crate) fn go_on<P: Plugin>(
        &mut self,
        runtime: &Runtime<P>,
        world: &RefCell<World>,
        upstream: &dyn Fn(&Sent) -> TestResponse,
    ) -> Option<Outcome> {
        loop {
            self.take_reply(world);
            if self.paused && !self.is_resumed(world) {
                return None;
            }
            match self.at {
                At::Headers(side) => self.headers(runtime, world, side),
                At::Body(side) => self.body(runtime, world, side),
                At::Trailers(side) => self.trailers(runtime, world, side),
                At::Upstream => {
                    if !self.ask_upstream(world, upstream) {
                        return None;
                    }
                }
                At::End => return Some(self.end(world)),
            }
        }
    }

    /// Whether the plugin has let go of the exchange since it held it.
    fn is_resumed(&mut self, world: &RefCell<World>) -> bool {
        let (At::Headers(side) | At::Body(side) | At::Trailers(side)) = self.at else { return true };
        let resumed = {
            let mut world = world.borrow_mut();
            let live = world.live.entry(self.context).or_default();
            std::mem::take(&mut live.resumed[side as usize])
        };
        if resumed {
            self.paused = false;
            self.leave(world, side);
        }
        resumed
    }

    fn headers<P: Plugin>(&mut self, runtime: &Runtime<P>, world: &RefCell<World>, side: Side) {
        self.open(world, side.headers());
        let end = self.chunks.is_empty() && self.trailers.is_empty();
        let action = match side {
            Side::Request => runtime.request_headers(self.context, end),
            Side::Response => runtime.response_headers(self.context, end),
        };
        self.act(world, side, action);
    }

    fn body<P: Plugin>(&mut self, runtime: &Runtime<P>, world: &RefCell<World>, side: Side) {
        let Some(chunk) = self.chunks.pop_front() else { return self.next(world, side) };
        let last = self.chunks.is_empty() && self.trailers.is_empty();
        let size = {
            let mut world = world.borrow_mut();
            world.effective = self.context;
            let live = world.live.entry(self.context).or_default();
            let buffer = live.buffers[side as usize].get_or_insert_default();
            buffer.extend_from_slice(&chunk);
            buffer.len()
        };
        let action = match side {
            Side::Request => runtime.request_body(self.context, size, last),
            Side::Response => runtime.response_body(self.context, size, last),
        };
        if action == Action::Pause as u32 && !last {
            // Held, and shown again with what follows, unless something was decided meanwhile.
            return;
        }
        self.act(world, side, action);
    }

    fn trailers<P: Plugin>(&mut self, runtime: &Runtime<P>, world: &RefCell<World>, side: Side) {
        {
            let mut world = world.borrow_mut();
            let live = world.live.entry(self.context).or_default();
            live.maps[side.trailers() as usize] = std::mem::take(&mut self.trailers);
        }
        self.open(world, side.trailers());
        let action = match side {
            Side::Request => runtime.request_trailers(self.context),
            Side::Response => runtime.response_trailers(self.context),
        };
        self.act(world, side, action);
    }

    fn open(&self, world: &RefCell<World>, map: Map) {
        let mut world = world.borrow_mut();
        world.effective = self.context;
        let live = world.live.entry(self.context).or_default();
        live.open[map as usize] = true;
    }

    fn act(&mut self, world: &RefCell<World>, side: Side, action: u32) {
        if action == Action::Continue as u32 {
            self.leave(world, side);
        } else {
            self.paused = true;
        }
    }

    /// What was held goes on, and cannot be changed any more.
    fn leave(&mut self, world: &RefCell<World>, side: Side) {
        let mut guard = world.borrow_mut();
        let live = guard.live.entry(self.context).or_default();
        live.open[side.headers() as usize] = false;
        let ends = self.chunks.is_empty() && matches!(self.at, At::Body(_) | At::Trailers(_));
        if let Some(buffer) = live.buffers[side as usize].take() {
            self.passed[side as usize].extend_from_slice(&buffer);
        }
        drop(guard);
        match self.at {
            At::Headers(_) => self.at = At::Body(side),
            At::Body(_) if ends => self.next(world, side),
            At::Trailers(_) => {
                self.at = if side == Side::Request { At::Upstream } else { At::End };
            }
            _ => {}
        }
    }

    /// Behind the body.
    fn next(&mut self, world: &RefCell<World>, side: Side) {
        if !self.trailers.is_empty() {
            self.at = At::Trailers(side);
            return;
        }
        // Nothing is held here any more unless the plugin holds a body that ended without a last piece.
        let mut world = world.borrow_mut();
        let live = world.live.entry(self.context).or_default();
        if let Some(buffer) = live.buffers[side as usize].take() {
            self.passed[side as usize].extend_from_slice(&buffer);
        }
        self.at = if side == Side::Request { At::Upstream } else { At::End };
    }

    fn ask_upstream(&mut self, world: &RefCell<World>, upstream: &dyn Fn(&Sent) -> TestResponse) -> bool {
        let now = world.borrow().now();
        if self.response.is_none() {
            let sent = {
                let world = world.borrow();
                let maps = world.live.get(&self.context).map(|live| live.maps.clone()).unwrap_or_default();
                let [headers, trailers, ..] = maps;
                Sent { headers, body: std::mem::take(&mut self.passed[0]), trailers }
            };
            let response = upstream(&sent);
            self.upstream = Some(sent);
            let delay = u64::try_from(response.delay.as_nanos()).unwrap_or(u64::MAX / 4);
            self.response = Some((now.saturating_add(delay), response));
        }
        if self.response.as_ref().is_some_and(|(due, _)| *due > now) {
            return false;
        }
        if let Some((_, response)) = self.response.take() {
            self.respond(world, response);
        }
        true
    }

    fn respond(&mut self, world: &RefCell<World>, response: TestResponse) {
        let mut world = world.borrow_mut();
        let live = world.live.entry(self.context).or_default();
        live.maps[Map::ResponseHeaders as usize] = response.headers;
        live.buffers = Default::default();
        self.chunks = response.chunks.into();
        self.trailers = response.trailers;
        (self.at, self.paused) = (At::Headers(Side::Response), false);
    }

    /// A reply takes the place of the response, and is shown to the plugin as one, once.
    fn take_reply(&mut self, world: &RefCell<World>) {
        let reply = {
            let mut world = world.borrow_mut();
            world.live.get_mut(&self.context).and_then(|live| live.reply.take())
        };
        let Some(reply) = reply else { return };
        let mut response = TestResponse::new(reply.status);
        for (name, value) in &reply.headers {
            response = response.header(name, value);
        }
        if !reply.body.is_empty() {
            response = response.body(&reply.body);
        }
        let again = matches!(
            self.at,
            At::Headers(Side::Response) | At::Body(Side::Response) | At::Trailers(Side::Response)
        );
        self.outcome.details = reply.details.replace(' ', "_");
        self.outcome.grpc_status = reply.grpc_status;
        self.passed = Default::default();
        self.respond(world, response);
        if again {
            self.passed[1] = std::mem::take(&mut self.chunks).into_iter().flatten().collect();
            self.at = At::End;
        }
    }

    fn end(&mut self, world: &RefCell<World>) -> Outcome {
        let world = world.borrow();
        let maps = world.live.get(&self.context).map(|live| live.maps.clone()).unwrap_or_default();
        let [.., headers, trailers] = maps;
        let status = headers.iter().find(|(name, _)| name == ":status");
        let status = status.and_then(|(_, value)| std::str::from_utf8(value).ok()?.parse().ok());
        Outcome {
            status: status.unwrap_or(0),
            headers,
            body: std::mem::take(&mut self.passed[1]),
            trailers,
            upstream: self.upstream.take(),
            took: Duration::from_nanos(world.now() - self.started),
            ..std::mem::take(&mut self.outcome)
        }
    }
}
