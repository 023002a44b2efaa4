//! A proxy made of memory: the plugin runs natively, by the same code that runs it in a proxy, under a clock of its own.
//!
//! ```
//! use cairn_sdk::testing::{Proxy, TestRequest, TestResponse};
//! use cairn_sdk::{Flow, Plugin, Response, log};
//!
//! struct Servers;
//!
//! #[cairn_sdk::plugin]
//! impl Plugin for Servers {
//!     type Config = ();
//!     type Exchange = ();
//! #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
//!
//!     fn on_response(&self, response: Response, _: &mut ()) -> Flow {
//!         log::info!("status {}", response.status());
//!         response.remove_header("server");
//!         Flow::Continue
//!     }
//! }
//!
//! let mut proxy = Proxy::<Servers>::new("").unwrap();
//! proxy.upstream(|request| TestResponse::new(201).header("server", "nginx").body(&request.body));
//! let outcome = proxy.send(TestRequest::post("/", "hello").cut(2));
//! assert_eq!((outcome.status, outcome.header("server"), outcome.text()), (201, None, "hello".to_owned()));
//! assert_eq!(proxy.logs(), ["status 201"]);
//! ```

mod connection;
mod exchange;
mod message;
pub(crate) mod world;

pub use connection::ConnectionId;
pub use message::{Outcome, Sent, TestRequest, TestResponse};

use crate::runtime::Runtime;
use crate::{Plugin, logger};
use connection::Connected;
use exchange::Running;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use world::{End, World};

/// How long [`Proxy::send`] waits for an exchange, by the test's clock.
const PATIENCE: Duration = Duration::from_secs(600);

thread_local! {
    /// Contexts of all proxies of a thread have numbers of their own.
    static NEXT_CONTEXT: Cell<u32> = const { Cell::new(1) };
}

fn next_context() -> u32 {
    NEXT_CONTEXT.replace(NEXT_CONTEXT.get() + 1)
}

type Upstream = Box<dyn Fn(&Sent) -> TestResponse>;

/// A proxy that runs one plugin. Time stands still but in [`Proxy::send`], as long as the exchange waits, and in
/// [`Proxy::advance`].
pub struct Proxy<P: Plugin> {
    runtime: Runtime<P>,
    world: Rc<RefCell<World>>,
    root: u32,
    upstream: Upstream,
    running: BTreeMap<u32, Running>,
    ended: BTreeMap<u32, Outcome>,
    connections: BTreeMap<u32, Connected>,
}

/// An exchange under way, started by [`Proxy::start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExchangeId(u32);

impl<P: Plugin> Proxy<P> {
    /// Configures a plugin from JSON as a proxy would. Its upstream answers 200.
    ///
    /// # Errors
    /// The text that a proxy's log would show.
    pub fn new(json: &str) -> Result<Self, String> {
        logger::install_quietly();
        let root = next_context();
        let world = Rc::new(RefCell::new(World::new(root)));
        world::install(&world);
        world.borrow_mut().configuration = json.as_bytes().to_vec();
        let runtime = Runtime::new();
        runtime.create(root, 0);
        if !runtime.configure(root, json.len()) {
            let log = world.borrow().logs.back().map(|(_, line)| line.clone());
            return Err(log.unwrap_or_default());
        }
        let upstream: Upstream = Box::new(|_| TestResponse::new(200));
        let (running, ended, connections) = Default::default();
        Ok(Self { runtime, world, root, upstream, running, ended, connections })
    }

    /// The plugin itself.
    ///
    /// # Panics
    /// Never: the plugin was configured.
    #[allow(clippy::expect_used)]
    pub fn plugin(&self) -> Rc<P> {
        self.runtime.plugin(self.root).expect("the plugin was configured")
    }

    /// What the upstream answers.
    pub fn upstream(&mut self, answer: impl Fn(&Sent) -> TestResponse + 'static) {
        self.upstream = Box::new(answer);
    }

    /// A cluster for callouts, and what it answers. Clusters that are not made this way are unknown to the proxy.
    pub fn cluster(&mut self, name: &str, answer: impl Fn(&Sent) -> TestResponse + 'static) {
        self.world.borrow_mut().clusters.insert(name.to_owned(), Rc::new(answer));
    }

    /// A cluster for gRPC callouts: a message, or a status and its text.
    pub fn grpc(
        &mut self,
        name: &str,
        answer: impl Fn(&Sent) -> Result<Vec<u8>, (u32, &'static str)> + 'static,
    ) {
        self.world.borrow_mut().services.insert(name.to_owned(), Rc::new(answer));
    }

    /// A foreign function.
    pub fn foreign(&mut self, name: &str, answer: impl Fn(&[u8]) -> Vec<u8> + 'static) {
        self.world.borrow_mut().foreign.insert(name.to_owned(), Rc::new(answer));
    }

    /// A property of all exchanges.
    pub fn property(&mut self, path: &[&str], value: impl AsRef<[u8]>) {
        self.world.borrow_mut().set_property(path, value.as_ref());
    }

    /// From now on this host function (`proxy_…`) answers with this status, 0 to end that: a plugin must survive whatever a
    /// proxy answers.
    pub fn refuse(&mut self, function: &str, status: u32) {
        self.world.borrow_mut().refuse(function, status);
    }

    /// What another worker has left as shared data.
    pub fn set_shared(&mut self, key: &str, value: impl AsRef<[u8]>) {
        // Without a number to compare, setting succeeds.
        let _ = self.world.borrow_mut().set_shared_data(key, value.as_ref(), 0);
    }

    /// Shared data.
    pub fn shared(&self, key: &str) -> Option<Vec<u8>> {
        self.world.borrow().shared_data(key).ok().map(|(value, _)| value)
    }

    /// A metric's value by its whole name, labels included; a histogram's is its sum.
    pub fn metric(&self, name: &str) -> Option<i64> {
        self.world.borrow().metric(name)
    }

    /// The lines that the plugin has logged at level info and above.
    pub fn logs(&self) -> Vec<String> {
        const INFO: u32 = 2;
        let world = self.world.borrow();
        world.logs.iter().filter(|(level, _)| *level >= INFO).map(|(_, line)| line.clone()).collect()
    }

    /// Sends a request and waits for its end.
    ///
    /// # Panics
    /// When the plugin holds the exchange for ten minutes of the test's clock.
    #[allow(clippy::panic)]
    pub fn send(&mut self, request: TestRequest) -> Outcome {
        let id = self.start(request);
        let deadline = self.world.borrow().now() + PATIENCE.as_nanos() as u64;
        loop {
            if let Some(outcome) = self.outcome(id) {
                return outcome;
            }
            let next = self.next_event().filter(|next| *next <= deadline);
            let Some(next) = next else { panic!("the plugin holds the exchange for ever") };
            self.advance_to(next);
        }
    }

    /// Sends a request several times with its body, and the upstream's, cut in different ways.
    ///
    /// # Panics
    /// When it does not end in the same way each time.
    #[allow(clippy::panic)]
    pub fn send_split(&mut self, request: TestRequest) -> Outcome {
        let whole = self.send(request.clone());
        for size in [1, 2, 3, 7] {
            let cut = self.send(request.clone().cut(size));
            let same = Outcome { took: whole.took, ..cut };
            if same != whole {
                panic!("cut into pieces of {size}, the outcome is {same:?}, and otherwise {whole:?}");
            }
        }
        whole
    }

    /// Starts an exchange and goes as far as it gets.
    pub fn start(&mut self, request: TestRequest) -> ExchangeId {
        let context = next_context();
        world::install(&self.world);
        let running = Running::start(context, request, &mut self.world.borrow_mut());
        self.runtime.create(context, self.root);
        self.running.insert(context, running);
        self.go_on(context);
        ExchangeId(context)
    }

    /// How an exchange ended, if it has. Told once.
    pub fn outcome(&mut self, id: ExchangeId) -> Option<Outcome> {
        self.ended.remove(&id.0)
    }

    /// The client goes away in the middle of an exchange.
    pub fn abort(&mut self, id: ExchangeId) {
        if self.running.remove(&id.0).is_some() {
            self.finish(id.0);
        }
    }

    /// Lets time pass: answers arrive, timers go off.
    pub fn advance(&mut self, duration: Duration) {
        let until = self.world.borrow().now() + duration.as_nanos() as u64;
        while let Some(next) = self.next_event().filter(|next| *next <= until) {
            self.advance_to(next);
        }
        self.world.borrow_mut().set_now(until);
    }

    /// How much time has passed.
    pub fn elapsed(&self) -> Duration {
        self.world.borrow().elapsed()
    }

    /// Goes on as in an instance for one exchange: no timer runs, and [`Plugin::on_clone`] is called.
    pub fn become_clone(&mut self) {
        world::install(&self.world);
        self.world.borrow_mut().tick = None;
        self.runtime.cloned();
    }

    fn next_event(&self) -> Option<u64> {
        let world = self.world.borrow();
        let call = world.pending.iter().map(|call| call.due).min();
        let tick = world.tick.map(|(_, next)| next);
        call.into_iter().chain(tick).chain(exchange::next_response(&self.running)).min()
    }

    fn advance_to(&mut self, now: u64) {
        world::install(&self.world);
        self.world.borrow_mut().set_now(now);
        let due = {
            let mut world = self.world.borrow_mut();
            let (due, later) =
                std::mem::take(&mut world.pending).into_iter().partition(|call| call.due <= now);
            world.pending = later;
            due
        };
        for call in due {
            self.answer(call.id, call.end);
        }
        self.tick(now);
        for context in self.running.keys().copied().collect::<Vec<_>>() {
            self.go_on(context);
        }
        self.connections_go_on();
    }

    fn tick(&mut self, now: u64) {
        let is_due = {
            let mut world = self.world.borrow_mut();
            world.effective = self.root;
            let due = world.tick.filter(|(_, next)| *next <= now);
            if let Some((period, _)) = due {
                world.tick = Some((period, now + period));
            }
            due.is_some()
        };
        if is_due {
            self.runtime.tick(self.root);
        }
    }

    fn answer(&mut self, id: u32, end: End) {
        self.world.borrow_mut().effective = self.root;
        match end {
            End::Http(answer) => {
                let sizes = answer.as_ref().map_or((0, 0, 0), |answer| {
                    (answer.headers.len() as u32, answer.body.len(), answer.trailers.len() as u32)
                });
                self.world.borrow_mut().answer = answer;
                self.runtime.http_answer(id, sizes.0, sizes.1, sizes.2);
                self.world.borrow_mut().answer = None;
            }
            End::Grpc(Ok(message)) => {
                let size = message.len();
                self.world.borrow_mut().message = message;
                self.runtime.grpc_message(id, size);
            }
            End::Grpc(Err((code, message))) => {
                self.world.borrow_mut().message = message.as_bytes().to_vec();
                self.runtime.grpc_close(id, code);
            }
        }
    }

    fn go_on(&mut self, context: u32) {
        let Some(mut running) = self.running.remove(&context) else { return };
        match running.go_on(&self.runtime, &self.world, &self.upstream) {
            Some(outcome) => {
                self.finish(context);
                self.ended.insert(context, outcome);
            }
            None => {
                self.running.insert(context, running);
            }
        }
    }

    fn finish(&mut self, context: u32) {
        if let Some(live) = self.world.borrow_mut().live.get_mut(&context) {
            live.open = [true; 4];
        }
        self.world.borrow_mut().effective = context;
        self.runtime.log(context);
        self.runtime.delete(context);
        self.world.borrow_mut().live.remove(&context);
    }
}

impl<P: Plugin> Drop for Proxy<P> {
    fn drop(&mut self) {
        world::install(&self.world);
        for context in std::mem::take(&mut self.running).into_keys() {
            self.finish(context);
        }
        self.close_all();
        self.runtime.delete(self.root);
    }
}

#[cfg(test)]
mod tests;
