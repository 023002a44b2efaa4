//! What the callbacks of a module do: contexts and their exchanges, from the proxy's calls to a plugin's handlers. The same
//! code runs natively under [`crate::testing`].

use crate::abi::{Action, Buffer, Map, Side, Stream};
use crate::connection::{ClosedBy, Connection, Waits};
use crate::task::{self, Arrival, CallKind, Place};
use crate::{Answer, Body, Chunk, Flow, GrpcError, Plugin, Properties, Reply, Request, Response, Trailers};
use crate::{config, logger, sys, timer};
use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

/// Called once, before any context exists.
pub fn initialize() {
    logger::install();
}

/// The plugin of each root context, and the exchanges of all.
pub struct Runtime<P: Plugin> {
    roots: RefCell<Contexts<Rc<P>>>,
    /// In order of their ids, since those only grow. An exchange is taken out while its code runs.
    exchanges: RefCell<Contexts<Box<Exchange<P>>>>,
}

type Contexts<T> = Vec<(u32, Option<T>)>;

struct Exchange<P: Plugin> {
    plugin: Rc<P>,
    root: u32,
    state: P::Exchange,
    request: Half,
    response: Half,
    /// Where it is a connection without HTTP and something waits.
    connection: Waits,
}

/// How far one half of an exchange is.
#[derive(Default)]
struct Half {
    /// The headers have been decided on.
    past_headers: bool,
    /// The body is held until it is whole.
    reads_body: bool,
    /// All of it has arrived.
    ended: bool,
    /// It ended with trailers which no handler has seen.
    trailers: bool,
    /// Bytes of the body that arrived during a wait in the headers' handler, which no handler has seen.
    unseen: usize,
    waiting: Option<Pin<Box<dyn Future<Output = Flow>>>>,
}

impl<P: Plugin> Default for Runtime<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: Plugin> Runtime<P> {
    /// Without any context.
    pub const fn new() -> Self {
        Self { roots: RefCell::new(Vec::new()), exchanges: RefCell::new(Vec::new()) }
    }

    /// `proxy_on_context_create`; root contexts have no root.
    pub fn create(&self, context: u32, root: u32) {
        if root == 0 {
            self.roots.borrow_mut().push((context, None));
            return;
        }
        let Some(plugin) = self.plugin(root) else { return };
        let (request, response, connection) = Default::default();
        let state = P::Exchange::default();
        let exchange = Box::new(Exchange { plugin, root, state, request, response, connection });
        let mut exchanges = self.exchanges.borrow_mut();
        let index = exchanges.partition_point(|(id, _)| *id < context);
        exchanges.insert(index, (context, Some(exchange)));
    }

    /// `proxy_on_configure`. Returns whether the configuration makes sense.
    pub fn configure(&self, root: u32, size: usize) -> bool {
        logger::ask_level();
        task::enter(Place { context: root, root });
        let bytes =
            if size == 0 { Ok(Vec::new()) } else { sys::buffer(Buffer::PluginConfiguration, 0, size) };
        let plugin = bytes
            .map_err(|error| format!("configuration: {error}"))
            .and_then(|bytes| config::configure(&bytes));
        match plugin {
            Ok(plugin) => {
                let mut roots = self.roots.borrow_mut();
                roots.retain(|(id, _)| *id != root);
                roots.push((root, Some(Rc::new(plugin))));
                true
            }
            Err(error) => {
                log::error!("{error}");
                false
            }
        }
    }

    /// The plugin of a root context.
    pub fn plugin(&self, root: u32) -> Option<Rc<P>> {
        self.roots.borrow().iter().find(|(id, _)| *id == root).and_then(|(_, plugin)| plugin.clone())
    }

    /// `proxy_on_request_headers`.
    pub fn request_headers(&self, context: u32, end: bool) -> u32 {
        self.with(context, |exchange| exchange.headers(Side::Request, end))
    }

    /// `proxy_on_request_body`.
    pub fn request_body(&self, context: u32, size: usize, end: bool) -> u32 {
        self.with(context, |exchange| exchange.body(Side::Request, size, end))
    }

    /// `proxy_on_request_trailers`.
    pub fn request_trailers(&self, context: u32) -> u32 {
        self.with(context, |exchange| exchange.trailers(Side::Request))
    }

    /// `proxy_on_response_headers`.
    pub fn response_headers(&self, context: u32, end: bool) -> u32 {
        self.with(context, |exchange| exchange.headers(Side::Response, end))
    }

    /// `proxy_on_response_body`.
    pub fn response_body(&self, context: u32, size: usize, end: bool) -> u32 {
        self.with(context, |exchange| exchange.body(Side::Response, size, end))
    }

    /// `proxy_on_response_trailers`.
    pub fn response_trailers(&self, context: u32) -> u32 {
        self.with(context, |exchange| exchange.trailers(Side::Response))
    }

    /// `proxy_on_new_connection`.
    pub fn new_connection(&self, context: u32) -> u32 {
        self.with(context, |Exchange { plugin, state, connection, .. }| connection.opened(&**plugin, state))
    }

    /// `proxy_on_downstream_data`.
    pub fn downstream_data(&self, context: u32, size: usize, end: bool) -> u32 {
        self.data(context, Stream::Downstream, (size, end))
    }

    /// `proxy_on_upstream_data`.
    pub fn upstream_data(&self, context: u32, size: usize, end: bool) -> u32 {
        self.data(context, Stream::Upstream, (size, end))
    }

    fn data(&self, context: u32, stream: Stream, shown: (usize, bool)) -> u32 {
        self.with(context, |Exchange { plugin, state, connection, .. }| {
            connection.data(&**plugin, state, stream, shown)
        })
    }

    /// `proxy_on_downstream_connection_close`.
    pub fn downstream_close(&self, context: u32, peer: u32) {
        self.with(context, |exchange| {
            exchange.plugin.on_close(Connection(()), ClosedBy::of(peer), &mut exchange.state);
            Action::Continue
        });
    }

    /// `proxy_on_log`.
    pub fn log(&self, context: u32) {
        self.with(context, |exchange| {
            exchange.plugin.on_log(Properties(()), &mut exchange.state);
            Action::Continue
        });
    }

    /// `proxy_on_delete`. Whatever the context waits for is forgotten.
    pub fn delete(&self, context: u32) {
        let removed = {
            let mut exchanges = self.exchanges.borrow_mut();
            let index = exchanges.binary_search_by_key(&context, |(id, _)| *id);
            index.ok().map(|index| exchanges.remove(index))
        };
        if removed.is_some() {
            return;
        }
        task::forget(context);
        timer::forget(context);
        let plugin = self.plugin(context);
        self.roots.borrow_mut().retain(|(id, _)| *id != context);
        drop(plugin);
    }

    /// `cairn_on_clone`: this is an instance for one exchange, and timers run in the one that it was made of.
    pub fn cloned(&self) {
        timer::forget_all();
        let roots: Vec<u32> = self.roots.borrow().iter().map(|(root, _)| *root).collect();
        for root in roots {
            if let Some(plugin) = self.plugin(root) {
                task::enter(Place { context: root, root });
                plugin.on_clone();
            }
        }
    }

    /// `proxy_on_tick`.
    pub fn tick(&self, root: u32) {
        task::enter(Place { context: root, root });
        let due = timer::due(root);
        if due.tick
            && let Some(plugin) = self.plugin(root)
        {
            plugin.on_tick();
        }
        for context in due.contexts {
            self.resume(context);
        }
        timer::rearm(root);
    }

    /// `proxy_on_http_call_response`. A call that failed on its way has no headers.
    pub fn http_answer(&self, id: u32, headers: u32, body: usize, trailers: u32) {
        if !task::is_awaited(CallKind::Http, id) {
            return;
        }
        let answer = (headers > 0).then(|| Answer {
            headers: sys::map(Map::AnswerHeaders).unwrap_or_default(),
            body: if body > 0 {
                sys::buffer(Buffer::AnswerBody, 0, body).unwrap_or_default()
            } else {
                Vec::new()
            },
            trailers: if trailers > 0 {
                sys::map(Map::AnswerTrailers).unwrap_or_default()
            } else {
                Vec::new()
            },
        });
        self.arrived(CallKind::Http, id, Arrival::Http(answer));
    }

    /// `proxy_on_grpc_receive`.
    pub fn grpc_message(&self, id: u32, size: usize) {
        if task::is_awaited(CallKind::Grpc, id) {
            let message = if size > 0 {
                sys::buffer(Buffer::GrpcMessage, 0, size).unwrap_or_default()
            } else {
                Vec::new()
            };
            self.arrived(CallKind::Grpc, id, Arrival::Grpc(Ok(message)));
        }
    }

    /// `proxy_on_grpc_close`: a unary call that brought no message.
    pub fn grpc_close(&self, id: u32, code: u32) {
        if task::is_awaited(CallKind::Grpc, id) {
            let message = String::from_utf8_lossy(&sys::grpc_status_message()).into_owned();
            self.arrived(CallKind::Grpc, id, Arrival::Grpc(Err(GrpcError { code, message })));
        }
    }

    fn arrived(&self, kind: CallKind, id: u32, arrival: Arrival) {
        if let Some(context) = task::arrived(kind, id, arrival) {
            self.resume(context);
        }
    }

    /// Polls what waits in a context.
    fn resume(&self, context: u32) {
        if let Err(error) = sys::set_effective_context(context) {
            log::debug!("context {context} is gone: {error}");
            return;
        }
        if self.plugin(context).is_some() {
            task::enter(Place { context, root: context });
            task::poll_spawned(context);
            return;
        }
        self.with(context, |exchange| {
            exchange.resume(Side::Request);
            exchange.resume(Side::Response);
            let Exchange { plugin, state, connection, .. } = exchange;
            connection.resume(&**plugin, state);
            Action::Continue
        });
    }

    /// Runs code of an exchange. One that is unknown, or whose code runs already, is left alone.
    fn with(&self, context: u32, run: impl FnOnce(&mut Exchange<P>) -> Action) -> u32 {
        let find = |exchanges: &[(u32, _)]| exchanges.binary_search_by_key(&context, |(id, _)| *id).ok();
        let taken = {
            let mut exchanges = self.exchanges.borrow_mut();
            find(&exchanges).and_then(|index| exchanges[index].1.take())
        };
        let Some(mut exchange) = taken else { return Action::Continue as u32 };
        task::enter(Place { context, root: exchange.root });
        let action = run(&mut exchange);
        let mut exchanges = self.exchanges.borrow_mut();
        if let Some(index) = find(&exchanges) {
            exchanges[index].1 = Some(exchange);
        }
        action as u32
    }
}

impl<P: Plugin> Exchange<P> {
    fn half(&mut self, side: Side) -> &mut Half {
        match side {
            Side::Request => &mut self.request,
            Side::Response => &mut self.response,
        }
    }

    fn headers(&mut self, side: Side, end: bool) -> Action {
        self.half(side).ended = end;
        let flow = match side {
            Side::Request => self.plugin.on_request(Request(()), &mut self.state),
            Side::Response => self.plugin.on_response(Response(()), &mut self.state),
        };
        self.decide(side, flow)
    }

    fn body(&mut self, side: Side, size: usize, end: bool) -> Action {
        let half = self.half(side);
        half.ended = end;
        if half.waiting.is_some() {
            // The proxy holds it, and shows more and more of it.
            half.unseen = size;
            return Action::Pause;
        }
        if !half.reads_body {
            return match self.show_chunk(side, size) {
                Ok(()) => Action::Continue,
                Err(reply) => self.decide(side, Flow::Reply(reply)),
            };
        }
        if !end {
            return Action::Pause;
        }
        let flow = self.show_body(side);
        self.decide(side, flow)
    }

    fn trailers(&mut self, side: Side) -> Action {
        let half = self.half(side);
        (half.ended, half.trailers) = (true, true);
        if half.waiting.is_some() {
            return Action::Pause;
        }
        let flow = if half.reads_body { self.show_body(side) } else { Flow::Continue };
        self.decide(side, flow)
    }

    /// Does what a handler decided, and shows the plugin what became due by it.
    fn decide(&mut self, side: Side, mut flow: Flow) -> Action {
        loop {
            flow = match flow {
                Flow::Continue => match self.overdue(side) {
                    Some(next) => next,
                    None => return Action::Continue,
                },
                Flow::ReadBody | Flow::EditBody if self.half(side).past_headers => Flow::Continue,
                Flow::ReadBody | Flow::EditBody => {
                    if matches!(flow, Flow::EditBody) {
                        // A missing header is removed already.
                        let _ = sys::remove_header(side.headers(), "content-length");
                    }
                    let half = self.half(side);
                    let unseen = std::mem::take(&mut half.unseen);
                    (half.past_headers, half.reads_body) = (true, true);
                    if !half.ended {
                        // Going on would let go what the proxy holds of the body.
                        return if unseen > 0 { Action::Pause } else { Action::Continue };
                    }
                    self.show_body(side)
                }
                Flow::Reply(reply) => {
                    send(&reply);
                    return Action::Pause;
                }
                Flow::Wait(mut future) => match task::poll(future.as_mut()) {
                    Poll::Ready(flow) => flow,
                    Poll::Pending => {
                        self.half(side).waiting = Some(future);
                        return Action::Pause;
                    }
                },
            };
        }
    }

    /// What arrived during a wait and has not been shown.
    fn overdue(&mut self, side: Side) -> Option<Flow> {
        let half = self.half(side);
        half.past_headers = true;
        let unseen = std::mem::take(&mut half.unseen);
        if unseen > 0 {
            return Some(self.show_chunk(side, unseen).err().map_or(Flow::Continue, Flow::Reply));
        }
        if !std::mem::take(&mut half.trailers) {
            return None;
        }
        let trailers = Trailers::of(side);
        Some(match side {
            Side::Request => self.plugin.on_request_trailers(Request(()), trailers, &mut self.state),
            Side::Response => self.plugin.on_response_trailers(Response(()), trailers, &mut self.state),
        })
    }

    fn show_chunk(&mut self, side: Side, size: usize) -> Result<(), Reply> {
        let half = self.half(side);
        let mut chunk = Chunk::new(side.body(), size, half.ended && !half.trailers);
        match side {
            Side::Request => self.plugin.on_request_chunk(Request(()), &mut chunk, &mut self.state),
            Side::Response => self.plugin.on_response_chunk(Response(()), &mut chunk, &mut self.state),
        }
    }

    fn show_body(&mut self, side: Side) -> Flow {
        self.half(side).reads_body = false;
        let body = Body::of(side);
        match side {
            Side::Request => self.plugin.on_request_body(Request(()), body, &mut self.state),
            Side::Response => self.plugin.on_response_body(Response(()), body, &mut self.state),
        }
    }

    fn resume(&mut self, side: Side) {
        let Some(mut future) = self.half(side).waiting.take() else { return };
        match task::poll(future.as_mut()) {
            Poll::Pending => self.half(side).waiting = Some(future),
            Poll::Ready(flow) => {
                if self.decide(side, flow) == Action::Continue
                    && let Err(error) = sys::continue_stream(side.stream())
                {
                    log::warn!("the proxy did not go on: {error}");
                }
            }
        }
    }
}

fn send(reply: &Reply) {
    let sent = sys::send_reply(reply.status, &reply.details, &reply.headers, &reply.body, reply.grpc_status);
    let Err(error) = sent else { return };
    log::error!("the proxy did not take a reply of {}: {error}", reply.status);
    // A refusal must not become a pass.
    if let Err(error) = sys::send_reply(500, "plugin_reply_refused", &[], &[], None) {
        log::error!("nor another one: {error}");
    }
}
