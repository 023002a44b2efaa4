//! One instance of a plugin: its start, and the callbacks of its streams. The only place that calls guests.

mod clone;
mod connection;
mod grpc;
mod outside;
mod parts;

use crate::abi::{Callback, MapKind, ROOT_CONTEXT, VM_CONTEXT};
use crate::budget::{Budget, Exhausted, out_of_time};
use crate::error::PluginError;
use crate::host::Exit;
use crate::metrics::Limit;
use crate::module::{Exports, Module};
use crate::pairs;
use crate::state::{Facts, State, Stream, number_of};
use cairn_filter::{Exchange, LocalReply, RequestHead, ResponseHead, Side};
use connection::ConnectionCallbacks;
use outside::OutsideCallbacks;
use parts::PartCallbacks;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use wasmtime::{Store, Trap, TypedFunc, WasmBacktrace, WasmParams, WasmResults};

/// Why the guest ended.
#[derive(Debug)]
pub(crate) struct Crash {
    /// The callback it was in.
    pub(crate) callback: &'static str,
    /// What happened, in words.
    pub(crate) reason: String,
    /// The guest's functions, innermost first.
    pub(crate) backtrace: String,
    /// The bound that it ran into, if it did.
    pub(crate) limit: Option<Limit>,
}

/// What a phase came to in the guest.
pub(crate) enum Outcome {
    Continue,
    Reply(Box<LocalReply>),
    Reset,
    /// The guest took away a pseudo-header that is needed.
    Incomplete(&'static str),
    /// The guest holds the exchange; woken when that may have changed.
    Paused(Arc<Notify>),
}

/// A phase with headers.
pub(crate) enum Phase<'a> {
    Request(&'a mut RequestHead),
    Response(&'a mut ResponseHead),
}

impl Phase<'_> {
    pub(crate) fn side(&self) -> Side {
        match self {
            Self::Request(_) => Side::Request,
            Self::Response(_) => Side::Response,
        }
    }

    fn map(&self) -> MapKind {
        match self {
            Self::Request(_) => MapKind::RequestHeaders,
            Self::Response(_) => MapKind::ResponseHeaders,
        }
    }
}

/// The guest's exports, found once by name.
struct Callbacks {
    context_create: Option<TypedFunc<(u32, u32), ()>>,
    request_headers: Option<HeadersCallback>,
    response_headers: Option<HeadersCallback>,
    log: Option<TypedFunc<u32, ()>>,
    done: Option<TypedFunc<u32, u32>>,
    delete: Option<TypedFunc<u32, ()>>,
    parts: Option<PartCallbacks>,
    connection: Option<ConnectionCallbacks>,
    outside: Option<OutsideCallbacks>,
}

impl Callbacks {
    /// Those for bodies and trailers, which most exchanges do not need: found when they are first called.
    fn parts(&mut self, store: &mut Store<State>, guest: &wasmtime::Instance) -> &PartCallbacks {
        self.parts.get_or_insert_with(|| PartCallbacks::resolve(store, guest))
    }

    /// Those for connections without HTTP, found when they are first called.
    fn connection(&mut self, store: &mut Store<State>, guest: &wasmtime::Instance) -> &ConnectionCallbacks {
        self.connection.get_or_insert_with(|| ConnectionCallbacks::resolve(store, guest))
    }

    /// Those outside of streams, found when they are first called.
    fn outside(&mut self, store: &mut Store<State>, guest: &wasmtime::Instance) -> &OutsideCallbacks {
        self.outside.get_or_insert_with(|| OutsideCallbacks::resolve(store, guest))
    }
}

/// `proxy_on_{request,response}_headers` with and without `end_of_stream`.
enum HeadersCallback {
    Two(TypedFunc<(u32, u32), u32>),
    Three(TypedFunc<(u32, u32, u32), u32>),
}

/// A running guest.
pub(crate) struct Instance {
    store: Store<State>,
    guest: wasmtime::Instance,
    callbacks: Callbacks,
    exports: Exports,
    next_context: u32,
    /// Streams that are over but for `proxy_done`, and until when they may stay.
    lingering: VecDeque<(u32, Instant)>,
}

/// Context ids stay below this, since some SDKs take them for signed numbers.
const CONTEXT_MAX: u32 = i32::MAX as u32;
/// The most streams of one instance.
const STREAMS_MAX: usize = 1 << 16;
/// How long a stream may outlive its exchange, and how many may.
const LINGER: Duration = Duration::from_secs(30);
const LINGERING_MAX: usize = 1024;

impl Instance {
    /// Instantiates the module and runs everything that precedes the first stream, each part of it within `deadline`.
    pub(crate) fn start(
        module: &Module,
        facts: &Arc<Facts>,
        deadline: Duration,
    ) -> Result<Self, PluginError> {
        let mut store = Store::new(module.pre.module().engine(), State::new(Arc::clone(facts)));
        store.limiter(|state| &mut state.limits);
        store.epoch_deadline_callback(out_of_time);
        store.data_mut().start_deadline = deadline;
        store.data_mut().log.keep();
        match Self::start_in(store, module) {
            Ok(instance) => Ok(instance),
            Err((mut store, failure)) => Err(failure.into_error(store.data_mut().log.take_kept())),
        }
    }

    fn start_in(mut store: Store<State>, module: &Module) -> Result<Self, (Box<Store<State>>, Failure)> {
        match start_guest(&mut store, module) {
            Ok((guest, callbacks)) => {
                store.data_mut().log.take_kept();
                Ok(Self::of(store, guest, callbacks, module.exports))
            }
            Err(failure) => Err((Box::new(store), failure)),
        }
    }

    /// An instance whose root context is there, and no stream.
    fn of(store: Store<State>, guest: wasmtime::Instance, callbacks: Callbacks, exports: Exports) -> Self {
        let next_context = ROOT_CONTEXT + 1;
        Self { store, guest, callbacks, exports, next_context, lingering: VecDeque::new() }
    }

    /// Whether it waits for something that is not over when its exchanges are: an answer, or the guest's `proxy_done`.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.lingering.is_empty() || self.store.data().outside.has_calls()
    }

    /// A new stream context; `None` when there are too many.
    pub(crate) fn open(&mut self) -> Result<Option<u32>, Crash> {
        let spare = &mut self.store.data_mut().spare;
        let buffers = (spare.pop().unwrap_or_default(), spare.pop().unwrap_or_default());
        let stream =
            Stream { request: emptied(buffers.0), response: emptied(buffers.1), ..Stream::default() };
        self.open_as(stream)
    }

    /// A new context for a stream; `None` when there are too many.
    fn open_as(&mut self, stream: Stream) -> Result<Option<u32>, Crash> {
        let state = self.store.data_mut();
        if state.streams.len() >= STREAMS_MAX {
            return Ok(None);
        }
        let mut context = self.next_context;
        while state.streams.contains_key(&context) {
            context = following(context);
        }
        self.next_context = following(context);
        state.streams.insert(context, stream);
        if let Some(create) = &self.callbacks.context_create {
            call(&mut self.store, create, (context, ROOT_CONTEXT), Callback::ContextCreate, context)?;
        }
        Ok(Some(context))
    }

    /// Shows the guest a head. `exchange` and the head are moved into the store for the duration of the call.
    pub(crate) fn headers(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        mut phase: Phase<'_>,
        end_of_stream: bool,
    ) -> Result<Outcome, Crash> {
        let side = phase.side();
        let index = number_of(side);
        self.enter(context, exchange, &mut phase);
        let called = self.call_headers(context, index, end_of_stream);
        let missing = self.leave(context, exchange, &mut phase);
        let paused = called?;
        if let Some(name) = missing {
            return Ok(Outcome::Incomplete(name));
        }
        let outcome = self.outcome(context, index, paused);
        if matches!(outcome, Outcome::Paused(_)) {
            self.hold(context, exchange, side, Some(&phase));
        }
        Ok(outcome)
    }

    fn outcome(&mut self, context: u32, index: usize, paused: bool) -> Outcome {
        let Some(stream) = self.store.data_mut().streams.get_mut(&context) else { return Outcome::Reset };
        if let Some(reply) = stream.reply.take() {
            return Outcome::Reply(reply);
        }
        if stream.closed {
            return Outcome::Reset;
        }
        let resumed = stream.resumed.get(index).copied().unwrap_or_default();
        if !paused || resumed {
            stream.waiting[index] = None;
            return Outcome::Continue;
        }
        Outcome::Paused(Arc::clone(stream.waiting[index].get_or_insert_default()))
    }

    fn enter(&mut self, context: u32, exchange: &mut Exchange, phase: &mut Phase<'_>) {
        let state = self.store.data_mut();
        let live = &mut state.live;
        live.context = context;
        live.head = Some(phase.map());
        live.changes.clear();
        std::mem::swap(&mut live.exchange, exchange);
        match phase {
            Phase::Request(head) => {
                std::mem::swap(&mut live.request.head, *head);
                (live.request.no_authority, live.request.no_path, live.request.no_method) =
                    (false, false, false);
            }
            Phase::Response(head) => {
                std::mem::swap(&mut live.response.head, *head);
                live.response.no_status = false;
            }
        }
    }

    /// Moves the head and the exchange back out, keeps the head's headers for later phases, and notes what changed.
    fn leave(
        &mut self,
        context: u32,
        exchange: &mut Exchange,
        phase: &mut Phase<'_>,
    ) -> Option<&'static str> {
        let exports = &self.exports;
        let [request_body, response_body] = exports.body;
        let keeps = match phase {
            Phase::Request(_) => request_body || exports.response_headers || response_body || exports.log,
            Phase::Response(_) => response_body || exports.log,
        };
        let State { live, streams, facts, .. } = self.store.data_mut();
        let stream = streams.get_mut(&context).filter(|_| keeps);
        let missing = match phase {
            Phase::Request(head) => {
                if let Some(stream) = stream {
                    keep(&mut stream.request, live.request.count(), live.request.pairs());
                }
                std::mem::swap(&mut live.request.head, *head);
                live.request.missing()
            }
            Phase::Response(head) => {
                if let Some(stream) = stream {
                    keep(&mut stream.response, live.response.count(), live.response.pairs());
                }
                std::mem::swap(&mut live.response.head, *head);
                live.response.no_status.then_some(":status")
            }
        };
        std::mem::swap(&mut live.exchange, exchange);
        live.context = VM_CONTEXT;
        live.head = None;
        if !live.changes.is_empty() {
            let side = if matches!(phase, Phase::Request(_)) { "request: " } else { "response: " };
            let mut text = String::with_capacity(side.len() + live.changes.len());
            text.push_str(side);
            text.push_str(&live.changes);
            exchange.note(&facts.name, text);
        }
        missing
    }

    /// Calls the guest; true when it wants to hold the exchange.
    fn call_headers(&mut self, context: u32, index: usize, end_of_stream: bool) -> Result<bool, Crash> {
        let (callback, function, count) = match index {
            0 => (
                Callback::RequestHeaders,
                &self.callbacks.request_headers,
                self.store.data().live.request.count(),
            ),
            _ => (
                Callback::ResponseHeaders,
                &self.callbacks.response_headers,
                self.store.data().live.response.count(),
            ),
        };
        let Some(function) = function else { return Ok(false) };
        if let Some(resumed) =
            self.store.data_mut().streams.get_mut(&context).and_then(|s| s.resumed.get_mut(index))
        {
            *resumed = false;
        }
        let action = match function {
            HeadersCallback::Two(function) => {
                call(&mut self.store, function, (context, count), callback, context)?
            }
            HeadersCallback::Three(function) => {
                let parameters = (context, count, u32::from(end_of_stream));
                call(&mut self.store, function, parameters, callback, context)?
            }
        };
        self.settle()?;
        // 0 continues, and so does 2 of the C++ SDK, "continue and end the stream", in Envoy. All others hold.
        Ok(!matches!(action, 0 | 2))
    }

    /// Ends a stream: `proxy_on_log`, `proxy_on_done`, and `proxy_on_delete` unless the guest asks for time, in the order
    /// of Envoy. Without an exchange (the client's task was dropped) nothing is logged.
    pub(crate) fn close(&mut self, context: u32, exchange: Option<&mut Exchange>) -> Result<(), Crash> {
        if let Some(exchange) = exchange {
            let live = &mut self.store.data_mut().live;
            live.context = context;
            std::mem::swap(&mut live.exchange, exchange);
            let ended = self.log_and_done(context, true).and_then(|done| self.delete_unless(context, done));
            let live = &mut self.store.data_mut().live;
            std::mem::swap(&mut live.exchange, exchange);
            live.context = VM_CONTEXT;
            ended?;
        } else {
            let ended = self.log_and_done(context, false);
            self.delete_unless(context, ended?)?;
        }
        self.settle()
    }

    /// True when the guest is done with the stream.
    fn log_and_done(&mut self, context: u32, logs: bool) -> Result<bool, Crash> {
        if let Some(log) = self.callbacks.log.as_ref().filter(|_| logs) {
            call(&mut self.store, log, context, Callback::Log, context)?;
        }
        match &self.callbacks.done {
            Some(done) => Ok(call(&mut self.store, done, context, Callback::Done, context)? != 0),
            None => Ok(true),
        }
    }

    fn delete_unless(&mut self, context: u32, done: bool) -> Result<(), Crash> {
        if done {
            return self.delete(context);
        }
        if let Some(stream) = self.store.data_mut().streams.get_mut(&context) {
            stream.done_pending = true;
        }
        self.lingering.push_back((context, Instant::now() + LINGER));
        Ok(())
    }

    fn delete(&mut self, context: u32) -> Result<(), Crash> {
        if let Some(delete) = &self.callbacks.delete {
            call(&mut self.store, delete, context, Callback::Delete, context)?;
        }
        self.store.data_mut().forget(context);
        Ok(())
    }

    /// Deletes streams whose `proxy_done` came, or never came.
    fn settle(&mut self) -> Result<(), Crash> {
        while let Some(context) = self.store.data_mut().released.pop() {
            self.lingering.retain(|(lingering, _)| *lingering != context);
            self.delete(context)?;
        }
        while let Some((context, until)) = self.lingering.front().copied() {
            if self.lingering.len() <= LINGERING_MAX && Instant::now() < until {
                break;
            }
            self.lingering.pop_front();
            self.delete(context)?;
        }
        Ok(())
    }

    /// Ends the root context, for a plugin that is replaced.
    pub(crate) fn shut_down(&mut self) -> Result<(), Crash> {
        if let Some(done) = &self.callbacks.done {
            call(&mut self.store, done, ROOT_CONTEXT, Callback::Done, ROOT_CONTEXT)?;
        }
        if let Some(delete) = &self.callbacks.delete {
            call(&mut self.store, delete, ROOT_CONTEXT, Callback::Delete, ROOT_CONTEXT)?;
        }
        Ok(())
    }

    /// Wakes every exchange that waits for the guest, for when it is gone.
    pub(crate) fn wake_all(&self) {
        self.store.data().streams.values().for_each(Stream::wake);
    }
}

fn following(context: u32) -> u32 {
    if context >= CONTEXT_MAX { ROOT_CONTEXT + 1 } else { context + 1 }
}

fn emptied(mut buffer: Vec<u8>) -> Vec<u8> {
    buffer.clear();
    buffer
}

/// Keeps the headers of a head for later phases.
fn keep<'a>(out: &mut Vec<u8>, count: u32, headers: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
    out.clear();
    pairs::write(out, count, headers);
}

/// Why a start failed.
enum Failure {
    Crash(Crash),
    Refused(&'static str),
}

impl From<Crash> for Failure {
    fn from(crash: Crash) -> Self {
        Self::Crash(crash)
    }
}

impl Failure {
    fn into_error(self, log: Vec<String>) -> PluginError {
        match self {
            Self::Crash(Crash { callback, mut reason, backtrace, .. }) => {
                if !backtrace.is_empty() {
                    reason = format!("{reason} (in {backtrace})");
                }
                PluginError::Start { callback, reason, log }
            }
            Self::Refused(callback) => PluginError::Refused { callback, log },
        }
    }
}

/// The start sequence that suits all SDKs: the module's own initialisation, the root context, its configuration.
fn start_guest(
    store: &mut Store<State>,
    module: &Module,
) -> Result<(wasmtime::Instance, Callbacks), Failure> {
    let within = store.data().start_deadline;
    prepare(store, Callback::Start, VM_CONTEXT, within);
    let instance = module.pre.instantiate(&mut *store);
    let instance = instance.map_err(|error| crash(store, Callback::Start, within, &error))?;
    store.data_mut().memory = instance.get_memory(&mut *store, "memory");
    store.data_mut().allocate = instance.get_typed_func(&mut *store, module.exports.allocator).ok();
    initialize(store, &instance)?;

    let callbacks = callbacks(store, &instance);
    if let Some(create) = &callbacks.context_create {
        let parameters = (ROOT_CONTEXT, 0);
        call_within(store, create, parameters, Callback::ContextCreate, ROOT_CONTEXT, within)?;
    }
    let config_length = store.data().facts.config.len() as u32;
    for (name, callback, length) in [
        ("proxy_on_vm_start", Callback::VmStart, 0),
        ("proxy_on_configure", Callback::Configure, config_length),
    ] {
        let Ok(function) = instance.get_typed_func::<(u32, u32), u32>(&mut *store, name) else { continue };
        let agreed = call_within(store, &function, (ROOT_CONTEXT, length), callback, ROOT_CONTEXT, within)?;
        if agreed == 0 {
            return Err(Failure::Refused(callback.as_str()));
        }
    }
    Ok((instance, callbacks))
}

/// Runs the module's initialisation: a reactor's `_initialize` and its `main`, or a command's `_start`, which may exit.
fn initialize(store: &mut Store<State>, instance: &wasmtime::Instance) -> Result<(), Crash> {
    let within = store.data().start_deadline;
    if let Ok(function) = instance.get_typed_func::<(), ()>(&mut *store, "_initialize") {
        call_within(store, &function, (), Callback::Start, VM_CONTEXT, within)?;
        if let Ok(main) = instance.get_typed_func::<(u32, u32), u32>(&mut *store, "main") {
            call_within(store, &main, (0, 0), Callback::Start, VM_CONTEXT, within)?;
        } else if let Ok(main) = instance.get_typed_func::<(), u32>(&mut *store, "__main_void") {
            call_within(store, &main, (), Callback::Start, VM_CONTEXT, within)?;
        } else if let Ok(main) = instance.get_typed_func::<(), ()>(&mut *store, "main") {
            call_within(store, &main, (), Callback::Start, VM_CONTEXT, within)?;
        }
    } else if let Ok(function) = instance.get_typed_func::<(), ()>(&mut *store, "_start") {
        prepare(store, Callback::Start, VM_CONTEXT, within);
        if let Err(error) = function.call(&mut *store, ()) {
            if error.downcast_ref::<Exit>().is_some_and(|exit| exit.0 == 0) {
                return Ok(());
            }
            return Err(crash(store, Callback::Start, within, &error));
        }
    }
    Ok(())
}

/// Resolves the exports; their types were checked when the module was compiled.
fn callbacks(store: &mut Store<State>, instance: &wasmtime::Instance) -> Callbacks {
    let mut headers = |name: &str| {
        let three = instance.get_typed_func(&mut *store, name).map(HeadersCallback::Three);
        three.or_else(|_| instance.get_typed_func(&mut *store, name).map(HeadersCallback::Two)).ok()
    };
    let (request_headers, response_headers) =
        (headers("proxy_on_request_headers"), headers("proxy_on_response_headers"));
    Callbacks {
        request_headers,
        response_headers,
        context_create: instance.get_typed_func(&mut *store, "proxy_on_context_create").ok(),
        log: instance.get_typed_func(&mut *store, "proxy_on_log").ok(),
        done: instance.get_typed_func(&mut *store, "proxy_on_done").ok(),
        delete: instance.get_typed_func(&mut *store, "proxy_on_delete").ok(),
        parts: None,
        connection: None,
        outside: None,
    }
}

fn call<P: WasmParams, R: WasmResults>(
    store: &mut Store<State>,
    function: &TypedFunc<P, R>,
    parameters: P,
    callback: Callback,
    context: u32,
) -> Result<R, Crash> {
    let deadline = store.data().facts.deadline;
    call_within(store, function, parameters, callback, context, deadline)
}

fn call_within<P: WasmParams, R: WasmResults>(
    store: &mut Store<State>,
    function: &TypedFunc<P, R>,
    parameters: P,
    callback: Callback,
    context: u32,
    deadline: Duration,
) -> Result<R, Crash> {
    prepare(store, callback, context, deadline);
    function.call(&mut *store, parameters).map_err(|error| crash(store, callback, deadline, &error))
}

fn prepare(store: &mut Store<State>, callback: Callback, context: u32, deadline: Duration) {
    let budget = Budget::new(deadline);
    store.set_epoch_deadline(budget.first_ticks());
    let state = store.data_mut();
    state.budget = budget;
    state.facts.environment.ticker.wake();
    state.callback = callback;
    state.effective = context;
}

/// Says what happened in words that help the plugin's author.
fn crash(store: &Store<State>, callback: Callback, deadline: Duration, error: &wasmtime::Error) -> Crash {
    let state = store.data();
    let trap = error.downcast_ref::<Trap>();
    let (reason, limit) = if let Some(exit) = error.downcast_ref::<Exit>() {
        (exit.to_string(), None)
    } else if trap == Some(&Trap::Interrupt) {
        (format!("it ran for more than {} ms", deadline.as_millis()), Some(Limit::Deadline))
    } else if state.limits.memory_hit {
        (format!("it wanted more than {} MiB of memory", state.facts.memory_max >> 20), Some(Limit::Memory))
    } else if state.limits.is_refused() {
        let mebibytes = state.facts.environment.settings.exchange_memory_max >> 20;
        let reason = format!(
            "it wanted more memory than is left of the {mebibytes} MiB that instances of exchanges may have"
        );
        (reason, Some(Limit::Memory))
    } else if let Some(exhausted) = error.downcast_ref::<Exhausted>() {
        (exhausted.to_string(), Some(exhausted.limit()))
    } else {
        let limit = (trap == Some(&Trap::StackOverflow)).then_some(Limit::Stack);
        (error.root_cause().to_string(), limit)
    };
    if let Some(limit) = limit {
        state.facts.counters.hit(limit);
    }
    let backtrace = error.downcast_ref::<WasmBacktrace>().map(backtrace_line).unwrap_or_default();
    Crash { callback: callback.as_str(), reason, backtrace, limit }
}

/// The most functions of a backtrace.
const FRAMES_MAX: usize = 20;

/// The functions of a backtrace in one line, innermost first.
pub(crate) fn backtrace_line(backtrace: &WasmBacktrace) -> String {
    // Frames print as `  0:  0x1a2 - <module>!function`, demangled.
    let text = backtrace.to_string();
    let frames = text.lines().filter_map(|line| line.split_once(" - "));
    let mut line = String::new();
    let mut last = "";
    for (_, frame) in frames.take(FRAMES_MAX) {
        let function = frame.split_once('!').map_or(frame, |(_, function)| function);
        if function == last {
            if !line.ends_with(REPEATED) {
                line.push_str(REPEATED);
            }
            continue;
        }
        if !line.is_empty() {
            line.push_str(" < ");
        }
        line.push_str(function);
        last = function;
    }
    line
}

/// Stands behind a function that called itself.
const REPEATED: &str = " (repeated)";
